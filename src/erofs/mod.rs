//! The EROFS on-disk format: reader and writer. Bytes in, values out.

pub mod ondisk;
