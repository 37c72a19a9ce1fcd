//! One change that a layer makes, as the tar reader tells it and the EROFS writer takes it.

use super::{DeviceNumber, RelPath, Timestamp, Xattr};

/// Owner, permissions, time and extended attributes of an entry.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Metadata {
    /// The twelve permission bits.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last modification.
    pub mtime: Timestamp,
    /// Extended attributes, sorted by name, no name twice.
    pub xattrs: Vec<Xattr>,
}

/// What an entry creates or removes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A directory, or new metadata for one that exists.
    Directory,
    /// A regular file whose `size` bytes the reader hands out next (holes as zeros).
    Regular {
        /// Bytes of content.
        size: u64,
    },
    /// A symbolic link.
    Symlink {
        /// Its target, 1 to 4,095 bytes, no NUL.
        target: Box<[u8]>,
    },
    /// Another name for a file.
    HardLink {
        /// The file's path in the same image (it may lie in a lower layer).
        target: RelPath,
    },
    /// A character device. 0/0 written literally in a tar is a whiteout to overlayfs.
    CharDevice(DeviceNumber),
    /// A block device.
    BlockDevice(DeviceNumber),
    /// A named pipe.
    Fifo,
    /// From `.wh.<name>`: `path` is removed from the layers below.
    Whiteout,
    /// From `.wh..wh..opq`: nothing of the layers below shows in directory `path`.
    Opaque,
}

/// One entry of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerEntry {
    /// Where. For [`EntryKind::Whiteout`] the path of what is removed, for [`EntryKind::Opaque`] the directory.
    pub path: RelPath,
    /// What.
    pub kind: EntryKind,
    /// With which metadata. Default for whiteouts, opaque marks and hard links.
    pub metadata: Metadata,
}
