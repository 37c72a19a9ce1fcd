//! What can go wrong with an image, wherever it is.

use crate::layout::LayoutError;
use crate::model::{BlobDigest, SourceError};
use crate::oci::{DocumentError, Reference};
use crate::registry::{RegistryError, is_transient};

/// Why an image could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The registry's side.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The disk's side.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A document of the image is unusable.
    #[error("cannot use {document} of {reference}")]
    Document {
        /// The image.
        reference: Box<Reference>,
        /// Which document.
        document: BlobDigest,
        /// Why.
        #[source]
        source: DocumentError,
    },
    /// Nothing fits the platform.
    #[error("{reference} has no image for {wanted}; it has: {known}")]
    NoPlatform {
        /// The image.
        reference: Box<Reference>,
        /// What was asked for.
        wanted: String,
        /// What there is.
        known: String,
    },
    /// Indexes in indexes without end.
    #[error("{reference} has indexes within indexes: more than {limit}")]
    TooManyIndexes {
        /// The image.
        reference: Box<Reference>,
        /// How many are read.
        limit: usize,
    },
    /// The reference cannot be written to.
    #[error("cannot write to {reference}: {reason}")]
    Unwritable {
        /// The reference.
        reference: Box<Reference>,
        /// Why not.
        reason: &'static str,
    },
    /// A blob could not be streamed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A blob is not what its descriptor says.
    #[error("blob {expected} from {origin} is damaged: its {size} bytes have the digest {found}")]
    Damaged {
        /// Digest in the descriptor.
        expected: BlobDigest,
        /// Where it came from.
        origin: String,
        /// How many bytes came.
        size: u64,
        /// Digest of what came.
        found: BlobDigest,
    },
    /// A blob on its way could not be kept on the disk.
    #[error("cannot keep blob {blob} in {}", .directory.display())]
    Spool {
        /// Which blob.
        blob: String,
        /// Where.
        directory: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

impl TransportError {
    /// True if the same undertaking may succeed later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Registry(error) => is_transient(error),
            Self::Source(error) => error.transient,
            Self::Layout(_)
            | Self::Document { .. }
            | Self::NoPlatform { .. }
            | Self::TooManyIndexes { .. }
            | Self::Unwritable { .. }
            | Self::Damaged { .. }
            | Self::Spool { .. } => false,
        }
    }
}
