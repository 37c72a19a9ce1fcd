//! Why a layer did not become local.

use std::sync::Arc;

use crate::fetch::FetchError;
use crate::model::{BlobDigest, DiffId};

/// Why a layer did not become local.
#[derive(Debug, Clone, thiserror::Error)]
pub enum UnpackError {
    /// Bytes did not come, or could not be verified or kept.
    #[error("cannot bring layer {blob} to local")]
    Fetch {
        /// The layer's blob.
        blob: BlobDigest,
        /// What is missing, and why.
        #[source]
        source: Arc<FetchError>,
    },
    /// The image contradicts itself.
    #[error("layer {blob} cannot become local: its chunks make diffID {found}, the image says {expected}")]
    Contradiction {
        /// The layer's blob.
        blob: BlobDigest,
        /// What the image says.
        expected: DiffId,
        /// What its chunks make.
        found: DiffId,
    },
    /// What its diffID covers is not to be had.
    #[error("layer {blob} cannot become local: its diffID covers bytes behind the image that are not known")]
    Unverifiable {
        /// The layer's blob.
        blob: BlobDigest,
    },
    /// The disk took only a part.
    #[error("cannot bring layer {blob} to local: the disk is full")]
    Full {
        /// The layer's blob.
        blob: BlobDigest,
    },
    /// The process is shutting down, or nobody wants it any more.
    #[error("bringing layer {blob} to local was given up")]
    Abandoned {
        /// The layer's blob.
        blob: BlobDigest,
    },
}
