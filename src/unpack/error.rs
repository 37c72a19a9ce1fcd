//! Why a layer did not become local.

use std::io;
use std::sync::Arc;

use crate::convert::layer::LayerError;
use crate::fetch::FetchError;
use crate::model::{BlobDigest, ChainId, DiffId};
use crate::store::StoreError;

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
    /// The blob of a tar layer broke off, has wrong bytes or does not decompress.
    #[error("cannot read layer {blob}")]
    Read {
        /// The layer's blob.
        blob: BlobDigest,
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// A tar layer cannot become an image.
    #[error("cannot unpack layer {blob}")]
    Tar {
        /// The layer's blob.
        blob: BlobDigest,
        /// Why.
        #[source]
        source: Arc<LayerError>,
    },
    /// The tar is not the one that the image's config names.
    #[error("layer {blob} is not what its image says: it has diffID {found}, not {expected}")]
    DiffId {
        /// The layer's blob.
        blob: BlobDigest,
        /// What the image says.
        expected: DiffId,
        /// What its bytes hash to.
        found: DiffId,
    },
    /// The tar does not make the stack that it is to be the top of.
    #[error(
        "layer {blob} does not belong where it is to be applied: with what is below it makes {found}, not {expected} \
         (with containerd before 2.3, the snapshotter must not be declared able to rebase)"
    )]
    Misplaced {
        /// The layer's blob.
        blob: BlobDigest,
        /// The stack that it is to be the top of.
        expected: ChainId,
        /// The stack that it is the top of.
        found: ChainId,
    },
    /// The store failed.
    #[error("cannot keep layer {blob}")]
    Store {
        /// The layer's blob.
        blob: BlobDigest,
        /// Why.
        #[source]
        source: Arc<StoreError>,
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
