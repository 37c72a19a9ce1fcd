//! Why an image was not converted.

use crate::convert::layer::LayerError;
use crate::model::{BlobDigest, DiffId};
use crate::oci::{DocumentError, Platform, Reference};
use crate::transport::TransportError;

/// Why an image was not converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The source or the destination.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A layer cannot be fetched.
    #[error("cannot fetch layer {layer} ({blob})")]
    Fetch {
        /// Which layer, the lowest is 0.
        layer: usize,
        /// Its blob.
        blob: BlobDigest,
        /// Why.
        #[source]
        source: Box<TransportError>,
    },
    /// A layer's blob cannot be read to its end.
    #[error("cannot read layer {layer} ({blob})")]
    Read {
        /// Which layer.
        layer: usize,
        /// Its blob.
        blob: BlobDigest,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A layer cannot be converted.
    #[error("cannot convert layer {layer} ({blob})")]
    Layer {
        /// Which layer.
        layer: usize,
        /// Its blob.
        blob: BlobDigest,
        /// Why.
        #[source]
        source: Box<LayerError>,
    },
    /// A layer has other bytes than the config says.
    #[error("layer {layer} ({blob}) unpacks to {found}, but the image's config says {expected}: the image is damaged")]
    DiffId {
        /// Which layer.
        layer: usize,
        /// Its blob.
        blob: BlobDigest,
        /// The config's.
        expected: DiffId,
        /// The tar's.
        found: DiffId,
    },
    /// The config has too few diffIDs.
    #[error("the image's config has no diffID for layer {layer}")]
    NoDiffId {
        /// Which layer.
        layer: usize,
    },
    /// A layer of a type that is neither tar nor EROFS.
    #[error("layer {layer} ({blob}) has the type {media_type:?}, which is neither a tar nor EROFS")]
    UnknownLayer {
        /// Which layer.
        layer: usize,
        /// Its blob.
        blob: BlobDigest,
        /// Its media type.
        media_type: String,
    },
    /// An image for another system.
    #[error("the image is for {0}: only Linux images have layers that EROFS can hold")]
    NotLinux(Platform),
    /// The config cannot be rewritten.
    #[error("cannot rewrite the image's config")]
    Config(#[source] DocumentError),
    /// A converted layer cannot be kept for those above it.
    #[error("cannot keep the converted layer {layer} open")]
    Keep {
        /// Which layer.
        layer: usize,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Publishing over the source would lose images.
    #[error(
        "{reference} has images for other platforms, which would be lost if one alone was published under the same name; \
         convert all platforms or publish under another name"
    )]
    WouldLose {
        /// The reference.
        reference: Box<Reference>,
    },
    /// The source has nothing that can be converted.
    #[error("{reference} has no image for Linux")]
    NoImage {
        /// The reference.
        reference: Box<Reference>,
    },
    /// The threads cannot be started.
    #[error("cannot start threads for compression")]
    Threads(#[source] rayon::ThreadPoolBuildError),
    /// Somebody else's failure, or a wish, stopped it.
    #[error("the conversion was stopped")]
    Stopped,
}
