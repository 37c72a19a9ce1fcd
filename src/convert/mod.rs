//! From tar layers to chunked EROFS layers: composition only.

mod blob;
pub mod layer;
mod ordered;
mod packer;
