//! From tar layers to chunked EROFS layers: composition only.

mod adopt;
mod ahead;
mod blob;
mod events;
mod image;
pub mod layer;
mod lower;
mod ordered;
mod packer;
mod readback;
mod stack;

pub use events::{Event, Observer, Outcome};
pub use image::{Converted, ConvertedImage, ImageError, ImageOptions, Platforms, convert_image};
