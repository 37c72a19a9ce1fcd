//! Why records cannot be had or changed.

use std::io;
use std::path::{Path, PathBuf};

use crate::chain::{ChainError, Damage};
use crate::store::StoreError;

/// Why records cannot be had or changed.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    /// The rules say no.
    #[error(transparent)]
    Refused(#[from] ChainError),
    /// Another process changes them.
    #[error("cannot open {}: another process has it open", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// Whoever changed them last died while he did, and somebody who may write has to open them first.
    #[error("cannot read {}: it was not closed and has to be opened for writing once", path.display())]
    Unclean {
        /// The file.
        path: PathBuf,
    },
    /// A newer program wrote them, in a form that cannot be understood safely.
    #[error("cannot use {}: it needs {needs}, which this version does not know", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Which version or feature.
        needs: String,
    },
    /// The file is none of ours, or was altered.
    #[error("cannot use {}: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Records contradict each other.
    #[error("cannot use {}", path.display())]
    Contradiction {
        /// The file.
        path: PathBuf,
        /// Which, and how.
        #[source]
        source: Damage,
    },
    /// The database cannot do what it should.
    #[error("cannot {attempted} {}", path.display())]
    Database {
        /// What was attempted.
        attempted: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: Box<redb::Error>,
    },
    /// The disk failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl RecordsError {
    pub(super) fn database(attempted: &'static str, path: &Path, error: redb::Error) -> Self {
        let path = path.to_owned();
        match error {
            redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => Self::InUse { path },
            redb::Error::RepairAborted => Self::Unclean { path },
            redb::Error::UpgradeRequired(version) => {
                Self::Unsupported { path, needs: format!("database file format {version}") }
            }
            redb::Error::Corrupted(what) => Self::Damaged { path, what },
            // What does not begin as such a file does.
            redb::Error::Io(error)
                if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
            {
                Self::Damaged { path, what: error.to_string() }
            }
            redb::Error::Io(error) => Self::Store(StoreError::io(attempted, path, error)),
            other => Self::Database { attempted, path, source: Box::new(other) },
        }
    }
}
