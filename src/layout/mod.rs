//! Images on the local disk: OCI layouts, tars of them, and `docker save` archives (the last for reading only).
//!
//! A [`LayoutReader`] is one image of any of the three; archives are read in place, never unpacked. A [`LayoutWriter`]
//! writes the first two. Everything here blocks on the disk, but for [`LayoutBlobs`], which reads on threads for that.

mod blob;
mod docker;
mod error;
mod read;
mod tarfile;
mod write;

pub use error::LayoutError;
pub use read::{LayoutBlobs, LayoutReader};
pub use write::LayoutWriter;
