//! What is in a tree, in numbers.

use crate::model::Tally;

/// What was left out on purpose, with how often.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dropped {
    /// Attributes whose names the kernel cannot show from EROFS (`com.apple.…`, `lustre.…`). No Linux file system that containers are
    /// unpacked to would hold them either.
    pub foreign_xattrs: Tally,
    /// `trusted.overlay.…` attributes of the tar but an `opaque` of a directory, which counts like an opaque mark:
    /// they would make overlayfs fetch or redirect files.
    pub overlay_xattrs: Tally,
    /// Whiteouts and opaque marks of a bottom layer.
    pub bottom_whiteouts: Tally,
}

/// What is in a tree.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TreeStatistics {
    /// Inodes.
    pub inodes: u64,
    /// Regular files (inodes).
    pub files: u64,
    /// Directories, the root included.
    pub directories: u64,
    /// Symlinks.
    pub symlinks: u64,
    /// Devices and pipes.
    pub specials: u64,
    /// Names of files beyond each one's first.
    pub hard_links: u64,
    /// Whiteouts.
    pub whiteouts: u64,
    /// Opaque directories.
    pub opaque_directories: u64,
    /// Bytes of all regular files as `stat` tells them, each inode once.
    pub bytes: u64,
    /// How much of that is holes.
    pub hole_bytes: u64,
    /// What was left out.
    pub dropped: Dropped,
}
