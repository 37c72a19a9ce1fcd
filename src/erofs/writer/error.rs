//! Why a layer cannot become an image, and the limits that say so.

use super::BLOCK_SIZE;
use crate::model::{NameError, RelPath};

/// Longest path in bytes (Linux `PATH_MAX`, without the closing NUL). Longer ones could never be opened, and each of
/// their bytes could become a directory.
pub(super) const MAX_PATH: usize = 4095;
/// Longest target of a symlink in bytes.
pub(super) const MAX_TARGET: usize = 4095;
/// Symlinks that are followed on one path, as Linux does.
pub(super) const MAX_FOLLOWED: usize = 40;
/// Largest file: with the largest chunks its map still has no more than 1,024 entries.
pub(super) const MAX_FILE_SIZE: u64 = 1 << 53;
/// Directories without entry that each entry may need on average, beyond [`FREE_IMPLIED`]. Layers without any
/// directory entries need about one; symlinks to long paths could make thousands.
pub(super) const MAX_IMPLIED: u64 = 16;
/// Directories without entry that cost nothing.
pub(super) const FREE_IMPLIED: u64 = 10_000;

/// Why a layer cannot become an EROFS image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    /// The root of a layer is a directory.
    #[error("the layer has an entry for its root that is no directory")]
    RootNotDirectory,
    /// A path beyond what Linux opens.
    #[error("path {path} has {len} bytes, Linux allows {MAX_PATH}")]
    PathTooLong {
        /// The path.
        path: RelPath,
        /// Its length.
        len: usize,
    },
    /// Symlinks that lead in a circle, on the way to an entry.
    #[error("more than {MAX_FOLLOWED} symlinks on the way to {path}")]
    SymlinkLoop {
        /// The entry.
        path: RelPath,
    },
    /// A symlink to nothing, or to more than Linux follows.
    #[error("symlink {path} has a target of {len} bytes, 1 to {MAX_TARGET} are possible")]
    SymlinkTarget {
        /// The symlink.
        path: RelPath,
        /// Bytes of its target.
        len: usize,
    },
    /// A link to a directory.
    #[error("{path} is a hard link to {target}, which is a directory")]
    LinkToDirectory {
        /// The link.
        path: RelPath,
        /// What it names.
        target: RelPath,
    },
    /// Links whose target is in no layer.
    #[error("hard link {path} names {target}, which is not in this layer")]
    DanglingLink {
        /// One of the links.
        path: RelPath,
        /// What it names.
        target: RelPath,
    },
    /// A device number beyond 12 and 20 bits.
    #[error("device {path} has the number {major}:{minor}, Linux allows 12 and 20 bits")]
    DeviceNumber {
        /// The device.
        path: RelPath,
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// A time whose nanoseconds are a second or more.
    #[error("the modification time of {path} has {nanos} nanoseconds")]
    Time {
        /// The entry.
        path: RelPath,
        /// The nanoseconds.
        nanos: u32,
    },
    /// A file larger than any file system holds.
    #[error("file {path} has {size} bytes, more than the limit of {MAX_FILE_SIZE}")]
    FileTooLarge {
        /// The file.
        path: RelPath,
        /// Its size.
        size: u64,
    },
    /// An attribute that EROFS cannot hold.
    #[error("extended attribute {name:?} of {path} cannot be kept: {reason}")]
    Xattr {
        /// The entry.
        path: RelPath,
        /// The attribute.
        name: String,
        /// Why.
        reason: &'static str,
    },
    /// Attributes that are too large together.
    #[error("the extended attributes of {path} take {size} bytes, EROFS allows {limit}")]
    XattrsTooLarge {
        /// The entry.
        path: RelPath,
        /// What they take.
        size: usize,
        /// What they may.
        limit: usize,
    },
    /// A component that cannot be a name, met in a symlink on the way.
    #[error("a symlink on the way to {path} leads through an impossible name")]
    Name {
        /// The entry.
        path: RelPath,
        /// What is wrong.
        #[source]
        source: NameError,
    },
    /// Far more directories are needed than the layer has entries.
    #[error("the layer needs {implied} directories that it does not list for its {entries} entries")]
    TooManyImplied {
        /// Directories without entry.
        implied: u64,
        /// Entries.
        entries: u64,
    },
    /// A layer beyond 4 Gi entries, 4 GiB of names or 16 TiB of data.
    #[error("the layer is larger than an EROFS image with blocks of {BLOCK_SIZE} bytes can be")]
    TooLarge,
}
