//! The records of an EROFS image, as the kernel's header defines them: constants, and for each record a struct that
//! reads and writes exactly its bytes. Reader and writer share this room, so that they cannot disagree.
//!
//! Guarantees: `decode` takes any bytes and never fails (nothing is judged here), `encode` is its inverse.
//! Refuses to know where records lie and whether their values make sense. Everything is little endian.

mod features;
mod inode;
mod superblock;
mod xattr;

pub use features::{compat, feature_names, incompat};
pub use inode::{ChunkFormat, ChunkIndexEntry, CompactInode, DataLayout, ExtendedInode, InodeFormat};
pub use superblock::{DeviceSlot, RawSuperblock, checksummed_len, superblock_checksum};
pub use xattr::{
    XATTR_LONG_PREFIX, XATTR_PREFIXES, XattrEntry, XattrHeader, split_xattr_name, visible_xattr_prefix,
    xattr_area_size, xattr_filter_bit, xattr_prefix,
};

use crate::model::FileKind;

/// First word of the superblock.
pub const SUPER_MAGIC: u32 = 0xE0F5_E1E2;
/// Where the superblock lies: boot sectors may come first.
pub const SUPER_OFFSET: u64 = 1024;
/// Bytes of the superblock without extension slots.
pub const SUPER_SIZE: usize = 128;
/// Bytes of one superblock extension slot.
pub const SUPER_SLOT_SIZE: usize = 16;
/// Inodes start at multiples of this; a nid counts them from the start of the metadata area.
pub const INODE_SLOT_BITS: u32 = 5;
/// Bytes of a compact inode.
pub const COMPACT_SIZE: usize = 32;
/// Bytes of an extended inode.
pub const EXTENDED_SIZE: usize = 64;
/// Bytes of a directory entry without its name.
pub const DIRENT_SIZE: usize = 12;
/// Bytes of the header before an inode's attributes.
pub const XATTR_HEADER_SIZE: usize = 12;
/// Bytes of an attribute entry without name and value.
pub const XATTR_ENTRY_SIZE: usize = 4;
/// Attribute entries start at multiples of this.
pub const XATTR_ALIGN: u64 = 4;
/// Bytes of an entry of a block map.
pub const BLOCK_MAP_ENTRY_SIZE: usize = 4;
/// Bytes of a chunk index.
pub const CHUNK_INDEX_SIZE: usize = 8;
/// Bytes of a device slot.
pub const DEVICE_SLOT_SIZE: usize = 128;
/// Smallest block: 512 bytes.
pub const MIN_BLOCK_BITS: u8 = 9;
/// Largest block, and largest directory block (name offsets have 16 bits): 64 KiB.
pub const MAX_BLOCK_BITS: u8 = 16;
/// The block address that means "hole", to as many bits as an address has.
pub const NULL_BLOCK: u64 = u64::MAX;
/// This bit of a directory entry's nid says that the inode lies in the (compressed) metabox.
pub const NID_METABOX_BIT: u64 = 1 << 63;

/// Takes fields off a record, in order.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) = self.0.split_first_chunk().expect("a record's fields add up to its size");
        self.0 = rest;
        *field
    }

    fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.bytes())
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }
}

/// Joins fields to a record.
struct Record<const N: usize> {
    bytes: [u8; N],
    filled: usize,
}

impl<const N: usize> Record<N> {
    const fn new() -> Self {
        Self { bytes: [0; N], filled: 0 }
    }

    fn put(mut self, field: &[u8]) -> Self {
        let end = self.filled + field.len();
        self.bytes[self.filled..end].copy_from_slice(field);
        self.filled = end;
        self
    }

    fn u8(self, value: u8) -> Self {
        self.put(&value.to_le_bytes())
    }

    fn u16(self, value: u16) -> Self {
        self.put(&value.to_le_bytes())
    }

    fn u32(self, value: u32) -> Self {
        self.put(&value.to_le_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.put(&value.to_le_bytes())
    }

    fn done(self) -> [u8; N] {
        assert_eq!(self.filled, N, "a record's fields add up to its size");
        self.bytes
    }
}

/// `struct erofs_dirent`. Names follow all entries of a directory block, in the same order; a name ends where the
/// next one begins, the last one at a NUL or at the end of the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dirent {
    /// The inode.
    pub nid: u64,
    /// Where the name begins, from the start of the block.
    pub name_offset: u16,
    /// See [`file_type_of`].
    pub file_type: u8,
    /// Zero.
    pub reserved: u8,
}

impl Dirent {
    /// Reads the record.
    pub fn decode(raw: &[u8; DIRENT_SIZE]) -> Self {
        let mut f = Fields(raw);
        Self { nid: f.u64(), name_offset: f.u16(), file_type: f.u8(), reserved: f.u8() }
    }

    /// Writes the record.
    pub fn encode(&self) -> [u8; DIRENT_SIZE] {
        Record::new().u64(self.nid).u16(self.name_offset).u8(self.file_type).u8(self.reserved).done()
    }
}

/// The number a directory entry holds for a kind of file.
pub const fn file_type_of(kind: FileKind) -> u8 {
    match kind {
        FileKind::Regular => 1,
        FileKind::Directory => 2,
        FileKind::CharDevice => 3,
        FileKind::BlockDevice => 4,
        FileKind::Fifo => 5,
        FileKind::Socket => 6,
        FileKind::Symlink => 7,
    }
}

/// The kind of file that a directory entry's number means; none for 0 (unknown) and for undefined numbers.
pub const fn kind_of_file_type(file_type: u8) -> Option<FileKind> {
    Some(match file_type {
        1 => FileKind::Regular,
        2 => FileKind::Directory,
        3 => FileKind::CharDevice,
        4 => FileKind::BlockDevice,
        5 => FileKind::Fifo,
        6 => FileKind::Socket,
        7 => FileKind::Symlink,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted<const N: usize>() -> [u8; N] {
        std::array::from_fn(|i| u8::try_from(i + 1).unwrap())
    }

    #[test]
    fn records_survive_decoding_and_encoding() {
        assert_eq!(RawSuperblock::decode(&counted()).encode(), counted::<SUPER_SIZE>());
        assert_eq!(CompactInode::decode(&counted()).encode(), counted::<COMPACT_SIZE>());
        assert_eq!(ExtendedInode::decode(&counted()).encode(), counted::<EXTENDED_SIZE>());
        assert_eq!(ChunkIndexEntry::decode(&counted()).encode(), counted::<CHUNK_INDEX_SIZE>());
        assert_eq!(DeviceSlot::decode(&counted()).encode(), counted::<DEVICE_SLOT_SIZE>());
        assert_eq!(Dirent::decode(&counted()).encode(), counted::<DIRENT_SIZE>());
        assert_eq!(XattrHeader::decode(&counted()).encode(), counted::<XATTR_HEADER_SIZE>());
        assert_eq!(XattrEntry::decode(&counted()).encode(), counted::<XATTR_ENTRY_SIZE>());
    }

    #[test]
    fn fields_lie_where_the_kernel_puts_them() {
        let superblock = RawSuperblock::decode(&counted());
        assert_eq!(superblock.epoch, 0x201f_1e1d_1c1b_1a19);
        assert_eq!(superblock.feature_incompat, 0x5453_5251);
        assert_eq!(superblock.dir_block_bits, 0x5b);
        assert_eq!(superblock.packed_nid, 0x6867_6665_6463_6261);
        assert_eq!(superblock.root_nid_8b, 0x7877_7675_7473_7271);
        let inode = ExtendedInode::decode(&counted());
        assert_eq!((inode.u, inode.nlink), (0x1413_1211, 0x302f_2e2d));
    }
}
