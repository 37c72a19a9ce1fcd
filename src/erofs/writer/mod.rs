//! Writes EROFS images of single layers: a [`Tree`] takes the entries of a layer in the order of its tar, a [`Plan`]
//! lays it out, metadata first, and writes the metadata. File data is the caller's: it is told where each file's blocks
//! lie ([`FileData`], [`Extents`]) and streams them behind the metadata, so that no file is ever held in memory.
//!
//! ```text
//! block 0          superblock at 1024, then the root inode
//! inodes           in the order of a walk: all entries of a directory side by side (sorted by name), then those of
//!                  its first sub-directory, … Beside each inode: its attributes, its block map, its symlink target or
//!                  the last part of its directory, where that fits into the block
//! shared xattrs    each attribute that several inodes have, once
//! directory blocks in the order of their inodes (and targets of symlinks that fit nowhere else)
//! file data        first the files of a start-up profile, then the others in the order they came; block aligned
//! ```
//!
//! The volume is named `headstart`. The name filter of attributes (a compatible feature) is left out where no file shows
//! any, which readers may take as a promise: see [`super::Superblock::shows_no_xattrs`].
//!
//! Guarantees: the same entries give the same bytes. The image uses no incompatible feature but `chunked_file`, and
//! that only if a file has holes, so that Linux 5.4 and later mount it. An inode is compact (32 bytes) only where that
//! loses nothing on any kernel. Names, ids, times, links and attributes that EROFS cannot hold are errors, never
//! silently changed; the exceptions are listed at [`Dropped`].
//!
//! It refuses to know tar, compression and where the bytes go.

mod below;
mod content;
mod early;
mod emit;
mod error;
mod intern;
mod plan;
mod statistics;
mod tree;
mod walk;
mod xattrs;

pub use below::{ImpliedDirectory, UnresolvedLink};
pub use content::{Extents, FileData};
pub use early::EarlyLayout;
pub use error::TreeError;
pub use plan::{ImageIdentity, Plan};
pub use statistics::{Dropped, TreeStatistics};
pub use tree::{LayerRole, Tree};

/// Bytes of a block. Every kernel that knows EROFS mounts this size on every machine with pages of 4 KiB.
pub const BLOCK_SIZE: u64 = 4096;
/// log2 of [`BLOCK_SIZE`].
pub const BLOCK_BITS: u8 = 12;

/// The attribute of a directory that hides those of the same name in lower layers (Linux `overlayfs.rst`).
const OPAQUE_NAME: &[u8] = b"trusted.overlay.opaque";
/// Its value.
const OPAQUE_VALUE: &[u8] = b"y";

/// In which of the two rows of data blocks a block lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Area {
    /// Right behind the metadata: what the start-up profile names.
    Early,
    /// Behind that: everything else.
    #[default]
    Late,
}

/// A block of file data, counted from the start of its area. Where the areas lie is known when the tree is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct DataBlock {
    /// Which area.
    pub area: Area,
    /// Which of its blocks.
    pub block: u32,
}
