//! An inode, judged: attributes, and where attributes and data lie.

use std::fmt;

use super::ondisk::{
    self, COMPACT_SIZE, ChunkFormat, CompactInode, DataLayout, EXTENDED_SIZE, ExtendedInode, InodeFormat, NULL_BLOCK,
};
use super::{Defect, Error, Place, Superblock};
use crate::model::{Attributes, DeviceNumber, FileKind, Timestamp};

/// Names an inode: its place in the metadata area, in slots of 32 bytes. Two names with one nid are hard links.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nid(pub u64);

impl fmt::Display for Nid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Where the data of an inode lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Data {
    /// Device files, pipes, sockets.
    None,
    /// One run of blocks.
    Plain {
        /// First block.
        start: u64,
    },
    /// Nothing but zeros.
    Hole,
    /// One run of blocks, the last one beside the inode.
    Inline {
        /// First block.
        start: u64,
    },
    /// Chunks, each anywhere.
    Chunks(ChunkFormat),
    /// Compressed.
    Compressed,
}

/// An inode. Small, and free of any reference to the image it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inode {
    pub(crate) nid: Nid,
    pub(crate) attributes: Attributes,
    pub(crate) data: Data,
    /// Where the inode starts in the image.
    pub(crate) position: u64,
    /// Bytes of the inode itself: 32 or 64.
    pub(crate) record_size: u8,
    /// Bytes of the attribute area behind it.
    pub(crate) xattr_size: u32,
    pub(crate) layout: DataLayout,
    pub(crate) format: InodeFormat,
    pub(crate) ino: u32,
}

impl Inode {
    /// Judges the record of inode `nid`, which starts at `position`.
    pub(crate) fn decode(
        superblock: &Superblock,
        nid: Nid,
        position: u64,
        record: &InodeRecord,
    ) -> Result<Self, Error> {
        let corrupt = |defect| Error::corrupt(Place::Inode(nid), position, defect);
        let fields = match record {
            InodeRecord::Compact(raw) => Fields::of_compact(&CompactInode::decode(raw), superblock),
            InodeRecord::Extended(raw) => Fields::of_extended(&ExtendedInode::decode(raw)),
        };
        let format = fields.format;
        let layout = match (format.unknown_bits(), format.data_layout()) {
            (0, Some(layout)) => layout,
            _ => return Err(corrupt(Defect::InodeFormat(format.0))),
        };
        let kind = FileKind::from_mode(fields.mode).ok_or_else(|| corrupt(Defect::Mode(fields.mode)))?;
        if i64::try_from(fields.size).is_err() {
            return Err(corrupt(Defect::Size(fields.size)));
        }
        if fields.mtime.nanos >= 1_000_000_000 {
            return Err(corrupt(Defect::Nanoseconds(fields.mtime.nanos)));
        }
        let chunks = ChunkFormat::of_inode(fields.u);
        if layout == DataLayout::ChunkBased && chunks.unknown_bits() != 0 {
            return Err(corrupt(Defect::ChunkFormat(chunks.0)));
        }
        let has_data = matches!(kind, FileKind::Regular | FileKind::Directory | FileKind::Symlink);
        let start = u64::from(fields.start_hi) << 32 | u64::from(fields.u);
        let data = match layout {
            _ if !has_data => Data::None,
            DataLayout::FlatPlain if (start ^ NULL_BLOCK) & fields.address_mask == 0 => Data::Hole,
            DataLayout::FlatPlain => Data::Plain { start },
            DataLayout::FlatInline => Data::Inline { start },
            DataLayout::ChunkBased => Data::Chunks(chunks),
            DataLayout::CompressedFull | DataLayout::CompressedCompact => Data::Compressed,
        };
        let rdev = match kind {
            FileKind::CharDevice | FileKind::BlockDevice => DeviceNumber::decode(fields.u),
            _ => DeviceNumber::default(),
        };
        let attributes = Attributes {
            kind,
            permissions: fields.mode & 0o7777,
            uid: fields.uid,
            gid: fields.gid,
            mtime: fields.mtime,
            nlink: fields.nlink,
            size: fields.size,
            rdev,
        };
        Ok(Self {
            nid,
            attributes,
            data,
            position,
            record_size: record.size(),
            xattr_size: u32::try_from(ondisk::xattr_area_size(fields.xattr_count))
                .expect("65,535 units of 4 bytes fit 32 bits"),
            layout,
            format,
            ino: fields.ino,
        })
    }

    /// Which inode this is.
    pub const fn nid(&self) -> Nid {
        self.nid
    }

    /// What `stat` tells.
    pub const fn attributes(&self) -> &Attributes {
        &self.attributes
    }

    /// False if the inode certainly has no extended attributes.
    pub const fn has_xattrs(&self) -> bool {
        self.xattr_size != 0
    }

    /// How the data lies.
    pub const fn data_layout(&self) -> DataLayout {
        self.layout
    }

    /// True if the inode has 64 bytes, false if it has 32.
    pub const fn is_extended(&self) -> bool {
        self.format.is_extended()
    }

    /// Where the inode starts in the image, in bytes.
    pub const fn position(&self) -> u64 {
        self.position
    }

    /// The inode number that 32-bit `stat` shows. Not an identity: see [`Inode::nid`].
    pub const fn stat32_ino(&self) -> u32 {
        self.ino
    }

    /// A directory that has no `.` entry on purpose.
    pub(crate) fn omits_dot(&self) -> bool {
        self.attributes.kind == FileKind::Directory && self.format.flag()
    }

    pub(crate) const fn place(&self) -> Place {
        Place::Inode(self.nid)
    }

    /// Where the attribute area starts.
    pub(crate) fn xattr_position(&self) -> Option<u64> {
        self.position.checked_add(self.record_size.into())
    }

    /// Where inline data or the chunk table starts, before alignment.
    pub(crate) fn tail_position(&self) -> Option<u64> {
        self.xattr_position()?.checked_add(self.xattr_size.into())
    }

    pub(crate) fn corrupt(&self, defect: impl Into<Defect>) -> Error {
        Error::corrupt(self.place(), self.position, defect)
    }
}

/// The bytes of one of the two kinds of inode.
pub(crate) enum InodeRecord {
    Compact([u8; COMPACT_SIZE]),
    Extended([u8; EXTENDED_SIZE]),
}

impl InodeRecord {
    const fn size(&self) -> u8 {
        match self {
            Self::Compact(_) => 32,
            Self::Extended(_) => 64,
        }
    }
}

/// What both kinds of inode say, in one form.
struct Fields {
    format: InodeFormat,
    xattr_count: u16,
    mode: u16,
    size: u64,
    u: u32,
    start_hi: u16,
    /// The bits of an address that this inode can hold.
    address_mask: u64,
    ino: u32,
    uid: u32,
    gid: u32,
    mtime: Timestamp,
    nlink: u32,
}

impl Fields {
    fn of_compact(inode: &CompactInode, superblock: &Superblock) -> Self {
        let is_directory = FileKind::from_mode(inode.mode) == Some(FileKind::Directory);
        let (nlink, start_hi, address_bits) =
            if inode.format.flag() && !is_directory { (1, inode.nb, 48) } else { (inode.nb, 0, 32) };
        Self {
            format: inode.format,
            xattr_count: inode.xattr_count,
            mode: inode.mode,
            size: inode.size.into(),
            u: inode.u,
            start_hi,
            address_mask: (1 << address_bits) - 1,
            ino: inode.ino,
            uid: inode.uid.into(),
            gid: inode.gid.into(),
            mtime: superblock.compact_time(inode.mtime),
            nlink: nlink.into(),
        }
    }

    const fn of_extended(inode: &ExtendedInode) -> Self {
        Self {
            format: inode.format,
            xattr_count: inode.xattr_count,
            mode: inode.mode,
            size: inode.size,
            u: inode.u,
            start_hi: inode.nb,
            address_mask: (1 << 48) - 1,
            ino: inode.ino,
            uid: inode.uid,
            gid: inode.gid,
            mtime: Timestamp { seconds: inode.mtime, nanos: inode.mtime_nsec },
            nlink: inode.nlink,
        }
    }
}
