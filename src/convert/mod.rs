//! From tar layers to chunked EROFS layers: composition only.

pub mod layer;
mod ordered;
