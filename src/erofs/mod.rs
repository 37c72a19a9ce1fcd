//! The EROFS on-disk format: reader and writer. Bytes in, values out.
//!
//! [`Image`] reads: it answers questions about one image from bytes that come through [`ReadAt`](crate::model::ReadAt),
//! trusts none of them, and keeps no state, so that an operation that met [`Error::Absent`] is simply run again.
//! Images that need EROFS's own compression are refused by the feature's name. [`writer`] writes.

pub mod ondisk;
pub mod writer;

mod check;
mod data;
mod dir;
mod dump;
mod error;
mod image;
mod inode;
mod recent;
mod superblock;
mod xattr;

#[cfg(test)]
mod draft;
#[cfg(test)]
mod tests;

pub use check::{Finding, MAX_FINDINGS, Problem, Report, check};
pub use data::{Extent, ExtentSource, Extents};
pub use dir::{DirEntry, DirPage};
pub use dump::{DumpError, dump};
pub use error::{Defect, Error, Place};
pub use image::{Device, Image};
pub use inode::{Inode, Nid};
pub use ondisk::DataLayout;
pub use superblock::Superblock;
use superblock::WRITER_NAME;
