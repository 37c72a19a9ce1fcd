//! What the verifier found, in words.

use crate::erofs::{Defect, Nid};
use crate::model::{ByteRange, FileKind};

/// After this many findings the rest is only counted: nobody reads more.
pub const MAX_FINDINGS: usize = 1000;

/// What is wrong at one place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// The bytes contradict the format.
    #[error("{0}")]
    Defect(Defect),
    /// The file is compressed inside of the image.
    #[error("it is compressed inside of the image, which is not supported")]
    Compressed,
    /// Data lies on a device that was not given.
    #[error("it has data on device {0}, which was not given")]
    DeviceMissing(u16),
    /// The root is no directory.
    #[error("the root is a {0:?}")]
    Root(FileKind),
    /// A directory stands in two places, or in itself.
    #[error("the directory was met before as {0}: it is in two places or in itself")]
    DirectoryTwice(String),
    /// `.` or `..` is missing.
    #[error("there is no entry {0:?}")]
    DotMissing(&'static str),
    /// `.` or `..` leads elsewhere.
    #[error("entry {name:?} leads to inode {found} instead of {expected}")]
    DotWrong {
        /// `.` or `..`.
        name: &'static str,
        /// Where it leads.
        found: u64,
        /// Where it should.
        expected: u64,
    },
    /// The directory and the inode tell different types.
    #[error("the directory calls it {listed}, but the inode is a {found:?}")]
    FileType {
        /// The number in the directory.
        listed: u8,
        /// What the inode is.
        found: FileKind,
    },
    /// The link count is not the number of names.
    #[error("the link count is {found}, but there are {counted}")]
    LinkCount {
        /// What the inode says.
        found: u32,
        /// What was counted.
        counted: u64,
    },
    /// Two structures claim the same bytes.
    #[error("bytes {range} of device {device} are also {other}")]
    Overlap {
        /// 0 for the image itself.
        device: u16,
        /// What both claim.
        range: ByteRange,
        /// Who else claims them.
        other: String,
    },
    /// The image is shorter than its superblock says.
    #[error("the superblock counts {expected} bytes, but there are {found}")]
    Truncated {
        /// What it says.
        expected: u64,
        /// What there is.
        found: u64,
    },
    /// The superblock counts other inodes than there are.
    #[error("the superblock counts {found} inodes, but there are {counted}")]
    InodeCount {
        /// What it says.
        found: u64,
        /// What was counted.
        counted: u64,
    },
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The file's path, with a leading slash; empty for the image as a whole.
    pub path: String,
    /// Its inode, none for the image as a whole.
    pub nid: Option<Nid>,
    /// Where in the image, in bytes.
    pub offset: u64,
    /// What.
    pub problem: Problem,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.nid {
            None => write!(f, "image (byte {}): {}", self.offset, self.problem),
            Some(nid) => write!(f, "{} (inode {nid}, byte {}): {}", self.path, self.offset, self.problem),
        }
    }
}

/// What a look at the whole image found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Report {
    /// What is wrong, [`MAX_FINDINGS`] at most.
    pub findings: Vec<Finding>,
    /// How many more there were.
    pub more: u64,
    /// Inodes looked at.
    pub inodes: u64,
    /// Directories among them.
    pub directories: u64,
    /// Bytes of regular files, holes included.
    pub content: u64,
}
