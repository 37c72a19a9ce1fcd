//! Why something cannot be done with snapshots.

use crate::chain::ChainError;
use crate::store::StoreError;
use crate::store::records::RecordsError;

/// Why something cannot be done with snapshots.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotsError {
    /// The rules say no, or the records cannot be had.
    #[error(transparent)]
    Records(#[from] RecordsError),
    /// A directory cannot be made, or the store cannot be looked at.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<ChainError> for SnapshotsError {
    fn from(error: ChainError) -> Self {
        Self::Records(RecordsError::Refused(error))
    }
}

impl SnapshotsError {
    /// What the rules said, if it was they who refused.
    pub const fn refusal(&self) -> Option<&ChainError> {
        match self {
            Self::Records(RecordsError::Refused(refused)) => Some(refused),
            Self::Records(_) | Self::Store(_) => None,
        }
    }

    /// True if the rules refused.
    pub const fn is_refusal(&self) -> bool {
        self.refusal().is_some()
    }
}
