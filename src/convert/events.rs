//! What a conversion tells while it runs. Whoever listens draws progress bars or writes log lines.

use crate::model::{BlobDigest, RelPath};
use crate::oci::Platform;

use super::layer::LayerStatistics;
use super::left_out::LeftOut;

/// Something that happened. Layers are numbered from the lowest, 0; images in the order in which they are converted.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The image for a platform comes next.
    Image {
        /// Which image.
        image: usize,
        /// How many are converted.
        images: usize,
        /// For which platform.
        platform: &'a Platform,
        /// How many layers it has.
        layers: usize,
    },
    /// A layer begins to be read.
    LayerStarted {
        /// Which image.
        image: usize,
        /// Which layer.
        layer: usize,
        /// Its blob.
        blob: BlobDigest,
        /// Bytes of the blob.
        size: u64,
    },
    /// More of a layer has been read.
    LayerRead {
        /// Which image.
        image: usize,
        /// Which layer.
        layer: usize,
        /// How many bytes of its blob so far.
        read: u64,
    },
    /// A layer is at the destination.
    LayerDone {
        /// Which image.
        image: usize,
        /// Which layer.
        layer: usize,
        /// What was done.
        outcome: Outcome<'a>,
    },
    /// An original image was copied, or something in an index that is no image for Linux.
    Copied {
        /// Its manifest.
        manifest: BlobDigest,
    },
    /// Something of a layer is not in the result.
    LeftOut {
        /// Which image.
        image: usize,
        /// Which layer.
        layer: usize,
        /// What.
        what: &'a LeftOut,
    },
    /// The start-up profile names paths that are no regular files of the layers that were converted.
    NotLaidOut {
        /// Which image.
        image: usize,
        /// Which paths, in the order of the profile.
        paths: &'a [RelPath],
    },
}

/// What became of a layer.
#[derive(Debug, Clone, Copy)]
pub enum Outcome<'a> {
    /// It was converted.
    Converted {
        /// The new blob.
        blob: BlobDigest,
        /// Its bytes.
        size: u64,
        /// What is in it.
        statistics: &'a LayerStatistics,
    },
    /// The same layer was converted before.
    Repeated {
        /// The blob.
        blob: BlobDigest,
    },
    /// It was no tar and stays as it is.
    Kept,
}

/// Listens to a conversion. Called from many threads; must not block.
pub trait Observer: Send + Sync {
    /// Something happened.
    fn event(&self, event: &Event<'_>);
}

/// Listens to nothing.
impl Observer for () {
    fn event(&self, _: &Event<'_>) {}
}
