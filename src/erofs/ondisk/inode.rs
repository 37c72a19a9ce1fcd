//! Inodes of both sizes, and the tables of chunk-based ones.

use super::{CHUNK_INDEX_SIZE, COMPACT_SIZE, EXTENDED_SIZE, Fields, Record};

/// The low five bits of an inode's format word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InodeFormat(pub u16);

impl InodeFormat {
    const EXTENDED: u16 = 1;
    const FLAG: u16 = 1 << 4;
    const ALL: u16 = 0x1f;

    /// A format word.
    pub const fn new(extended: bool, layout: DataLayout, flag: bool) -> Self {
        let layout = (layout as u16) << 1;
        Self(if extended { Self::EXTENDED } else { 0 } | layout | if flag { Self::FLAG } else { 0 })
    }

    /// True for 64-byte inodes.
    pub const fn is_extended(self) -> bool {
        self.0 & Self::EXTENDED != 0
    }

    /// How the data lies, none for values nobody has defined.
    pub const fn data_layout(self) -> Option<DataLayout> {
        Some(match (self.0 >> 1) & 7 {
            0 => DataLayout::FlatPlain,
            1 => DataLayout::CompressedFull,
            2 => DataLayout::FlatInline,
            3 => DataLayout::CompressedCompact,
            4 => DataLayout::ChunkBased,
            _ => return None,
        })
    }

    /// Of a directory: its `.` entry is left out. Of another compact inode: it has one link, and the link field holds the high bits of an address.
    pub const fn flag(self) -> bool {
        self.0 & Self::FLAG != 0
    }

    /// Bits nobody has defined.
    pub const fn unknown_bits(self) -> u16 {
        self.0 & !Self::ALL
    }
}

/// How an inode's data lies in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum DataLayout {
    /// Whole blocks, one after the other.
    FlatPlain = 0,
    /// Compressed, with full indexes.
    CompressedFull = 1,
    /// Whole blocks, and the tail right behind the inode.
    FlatInline = 2,
    /// Compressed, with compact indexes.
    CompressedCompact = 3,
    /// Chunks of equal size, each anywhere.
    ChunkBased = 4,
}

/// `struct erofs_inode_compact`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompactInode {
    /// Format.
    pub format: InodeFormat,
    /// Size of the attributes, see [`xattr_area_size`](super::xattr_area_size).
    pub xattr_count: u16,
    /// `st_mode`.
    pub mode: u16,
    /// Links, or high bits of the first block.
    pub nb: u16,
    /// File size.
    pub size: u32,
    /// Seconds since the superblock's epoch.
    pub mtime: u32,
    /// First block, device number or chunk format.
    pub u: u32,
    /// Inode number for 32-bit `stat`.
    pub ino: u32,
    /// Owner.
    pub uid: u16,
    /// Group.
    pub gid: u16,
    /// Zero.
    pub reserved: u32,
}

impl CompactInode {
    /// Reads the record.
    pub fn decode(raw: &[u8; COMPACT_SIZE]) -> Self {
        let mut f = Fields(raw);
        Self {
            format: InodeFormat(f.u16()),
            xattr_count: f.u16(),
            mode: f.u16(),
            nb: f.u16(),
            size: f.u32(),
            mtime: f.u32(),
            u: f.u32(),
            ino: f.u32(),
            uid: f.u16(),
            gid: f.u16(),
            reserved: f.u32(),
        }
    }

    /// Writes the record.
    pub fn encode(&self) -> [u8; COMPACT_SIZE] {
        Record::new()
            .u16(self.format.0)
            .u16(self.xattr_count)
            .u16(self.mode)
            .u16(self.nb)
            .u32(self.size)
            .u32(self.mtime)
            .u32(self.u)
            .u32(self.ino)
            .u16(self.uid)
            .u16(self.gid)
            .u32(self.reserved)
            .done()
    }
}

/// `struct erofs_inode_extended`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtendedInode {
    /// Format.
    pub format: InodeFormat,
    /// Size of the attributes, see [`xattr_area_size`](super::xattr_area_size).
    pub xattr_count: u16,
    /// `st_mode`.
    pub mode: u16,
    /// High bits of the first block.
    pub nb: u16,
    /// File size.
    pub size: u64,
    /// First block, device number or chunk format.
    pub u: u32,
    /// Inode number for 32-bit `stat`.
    pub ino: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970, in two's complement.
    pub mtime: i64,
    /// Nanoseconds.
    pub mtime_nsec: u32,
    /// Links.
    pub nlink: u32,
    /// Zero.
    pub reserved: [u8; 16],
}

impl ExtendedInode {
    /// Reads the record.
    pub fn decode(raw: &[u8; EXTENDED_SIZE]) -> Self {
        let mut f = Fields(raw);
        Self {
            format: InodeFormat(f.u16()),
            xattr_count: f.u16(),
            mode: f.u16(),
            nb: f.u16(),
            size: f.u64(),
            u: f.u32(),
            ino: f.u32(),
            uid: f.u32(),
            gid: f.u32(),
            mtime: i64::from_le_bytes(f.bytes()),
            mtime_nsec: f.u32(),
            nlink: f.u32(),
            reserved: f.bytes(),
        }
    }

    /// Writes the record.
    pub fn encode(&self) -> [u8; EXTENDED_SIZE] {
        Record::new()
            .u16(self.format.0)
            .u16(self.xattr_count)
            .u16(self.mode)
            .u16(self.nb)
            .u64(self.size)
            .u32(self.u)
            .u32(self.ino)
            .u32(self.uid)
            .u32(self.gid)
            .put(&self.mtime.to_le_bytes())
            .u32(self.mtime_nsec)
            .u32(self.nlink)
            .put(&self.reserved)
            .done()
    }
}

/// The 32 bits that a chunk-based inode holds instead of a block address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkFormat(pub u16);

impl ChunkFormat {
    const BITS: u16 = 0x1f;
    const INDEXES: u16 = 0x20;
    const WIDE: u16 = 0x40;

    /// Chunks of `1 << (block_bits + chunk_bits)` bytes, with chunk indexes or with a block map.
    pub const fn new(chunk_bits: u8, indexes: bool, wide: bool) -> Self {
        let indexes = if indexes { Self::INDEXES } else { 0 };
        Self((chunk_bits as u16 & Self::BITS) | indexes | if wide { Self::WIDE } else { 0 })
    }

    /// From an inode's `u` field.
    pub const fn of_inode(u: u32) -> Self {
        let [low, high, ..] = u.to_le_bytes();
        Self(u16::from_le_bytes([low, high]))
    }

    /// log2 of the blocks of a chunk.
    pub const fn chunk_bits(self) -> u8 {
        (self.0 & Self::BITS).to_le_bytes()[0]
    }

    /// True for chunk indexes, false for a block map.
    pub const fn has_indexes(self) -> bool {
        self.0 & Self::INDEXES != 0
    }

    /// True if addresses in chunk indexes have 48 bits, false if they have 32.
    pub const fn is_wide(self) -> bool {
        self.0 & Self::WIDE != 0
    }

    /// Bits nobody has defined.
    pub const fn unknown_bits(self) -> u16 {
        self.0 & !(Self::BITS | Self::INDEXES | Self::WIDE)
    }
}

/// `struct erofs_inode_chunk_index`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkIndexEntry {
    /// Bits 32..48 of the chunk's first block.
    pub start_hi: u16,
    /// 0 for the primary device, else a device slot counted from 1.
    pub device: u16,
    /// Bits 0..32 of the chunk's first block.
    pub start_lo: u32,
}

impl ChunkIndexEntry {
    /// Reads the record.
    pub fn decode(raw: &[u8; CHUNK_INDEX_SIZE]) -> Self {
        let mut f = Fields(raw);
        Self { start_hi: f.u16(), device: f.u16(), start_lo: f.u32() }
    }

    /// Writes the record.
    pub fn encode(&self) -> [u8; CHUNK_INDEX_SIZE] {
        Record::new().u16(self.start_hi).u16(self.device).u32(self.start_lo).done()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn format_words_survive() {
        let format = InodeFormat::new(true, DataLayout::ChunkBased, true);
        assert!(format.is_extended() && format.flag());
        assert_eq!(format.data_layout(), Some(DataLayout::ChunkBased));
        assert_eq!(InodeFormat(0xffe0).unknown_bits(), 0xffe0);
        assert_eq!(InodeFormat(0b1010).data_layout(), None);
        let chunks = ChunkFormat::new(7, true, false);
        assert_eq!((chunks.chunk_bits(), chunks.has_indexes(), chunks.is_wide()), (7, true, false));
        assert_eq!(ChunkFormat::of_inode(0xdead_0027), chunks);
        assert_eq!(ChunkFormat(0x80).unknown_bits(), 0x80);
    }
}
