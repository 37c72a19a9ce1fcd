//! From tar layers to chunked EROFS layers: composition only.

mod adopt;
mod ahead;
mod blob;
pub mod direct;
mod events;
mod image;
pub mod layer;
mod left_out;
mod lower;
mod ordered;
mod packer;
mod readback;
mod stack;
mod unpacked;
mod view;

/// How a layer looks into those below it, for whoever unpacks layers instead of converting them.
pub(crate) mod below {
    pub(crate) use super::ahead::ReadAhead;
    pub(crate) use super::lower::{Below, LayerBelow, Lower, Root};
    pub(crate) use super::view::ViewError;
}

pub use events::{Event, Observer, Outcome};
pub use image::{Converted, ConvertedImage, ImageError, ImageOptions, Platforms, convert_image};
pub use left_out::{LeftOut, What};
