//! From tar layers to chunked EROFS layers: composition only.
