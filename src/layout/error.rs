//! What can be wrong with an image on disk.

use std::io;
use std::path::PathBuf;

use crate::model::BlobDigest;
use crate::oci::DocumentError;
use crate::sys::FileError;

/// Why an image on disk could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// The system refused.
    #[error(transparent)]
    Io(#[from] FileError),
    /// The directory holds something else.
    #[error("{} is no OCI image layout: {reason}", .path.display())]
    NoLayout {
        /// The directory or archive.
        path: PathBuf,
        /// What is missing or wrong.
        reason: String,
    },
    /// The archive is broken or hostile.
    #[error("{} is no usable archive: {reason}", .path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// What is wrong, and where.
        reason: String,
    },
    /// A document in it is unusable.
    #[error("cannot use {document} of {}", .path.display())]
    Document {
        /// The layout or archive.
        path: PathBuf,
        /// Which document.
        document: String,
        /// Why.
        #[source]
        source: DocumentError,
    },
    /// No image has the name.
    #[error("there is no image {wanted} in {}; it holds: {known}", .path.display())]
    NoImage {
        /// The layout or archive.
        path: PathBuf,
        /// What was asked for.
        wanted: String,
        /// What there is.
        known: String,
    },
    /// Several images fit.
    #[error("{} holds several images that fit; name one of: {known}", .path.display())]
    Ambiguous {
        /// The layout or archive.
        path: PathBuf,
        /// What there is.
        known: String,
    },
    /// A blob is not there.
    #[error("blob {blob} is missing in {}", .path.display())]
    NoBlob {
        /// The layout or archive.
        path: PathBuf,
        /// Which blob.
        blob: BlobDigest,
    },
    /// A blob has another size.
    #[error("blob {blob} has {found} bytes in {} where {expected} were announced", .path.display())]
    Size {
        /// The layout or archive.
        path: PathBuf,
        /// Which blob.
        blob: BlobDigest,
        /// Announced.
        expected: u64,
        /// Found.
        found: u64,
    },
}

impl LayoutError {
    /// For `map_err` on I/O.
    pub(super) fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let error = FileError::of(action, path);
        move |source| Self::Io(error(source))
    }
}
