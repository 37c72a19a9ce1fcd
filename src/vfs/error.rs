//! Why the file system has no answer.

use crate::erofs;
use crate::model::{ByteRange, DiffId, ReadAtError};
use crate::overlay;

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Bytes are not local. When they are, the same operation gets further.
    #[error("bytes {range} of layer {layer} are not local yet")]
    Absent {
        /// Index of the layer, 0 is the lowest.
        layer: u16,
        /// Device of the layer's image, 0 is the image itself.
        device: u16,
        /// Which bytes.
        range: ByteRange,
    },
    /// A layer's image could not be read, or is damaged.
    #[error("cannot read layer {layer}")]
    Layer {
        /// Index of the layer, 0 is the lowest.
        layer: u16,
        /// Why not.
        #[source]
        source: erofs::Error,
    },
    /// A file that overlayfs would refuse as well.
    #[error(transparent)]
    Refused(Box<overlay::Error<erofs::Error>>),
    /// A number of layers that cannot be stacked.
    #[error("cannot stack {0} layers: 1 to 65535 are possible")]
    LayerCount(usize),
    /// An inode number that was never given out.
    #[error("there is no inode {0}")]
    NoSuchInode(u64),
    /// A place in a layer that has no inode number.
    #[error("file {nid} of layer {layer} is too far behind in its image to be given an inode number")]
    NumberTooLarge {
        /// Index of the layer.
        layer: u16,
        /// Number of the file.
        nid: u64,
    },
    /// A layer as a whole could not be read.
    #[error("cannot read layer {diff_id}")]
    Image {
        /// Which layer.
        diff_id: DiffId,
        /// Why not.
        #[source]
        source: ReadAtError,
    },
    /// A file is used like a directory.
    #[error("inode {0} is no directory")]
    NotADirectory(u64),
    /// Something else is read like a symbolic link.
    #[error("inode {0} is no symbolic link")]
    NotALink(u64),
    /// A directory is read like a file.
    #[error("inode {0} is a directory")]
    IsADirectory(u64),
    /// A device, pipe, socket or link is read like a file.
    #[error("inode {0} is no regular file")]
    NotRegular(u64),
}

impl Error {
    /// What a failed question to layer `layer` means.
    pub(super) fn of_layer(layer: u16, source: erofs::Error) -> Self {
        match source {
            erofs::Error::Absent { device, range } => Self::Absent { layer, device, range },
            source => Self::Layer { layer, source },
        }
    }
}

impl From<overlay::Error<erofs::Error>> for Error {
    fn from(error: overlay::Error<erofs::Error>) -> Self {
        match error {
            overlay::Error::Layer { layer, source } => Self::of_layer(layer, source),
            overlay::Error::LayerCount(count) => Self::LayerCount(count),
            refused => Self::Refused(Box::new(refused)),
        }
    }
}
