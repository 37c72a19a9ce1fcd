//! The records of an EROFS image, as the kernel's header defines them: constants, and for each record a struct that
//! reads and writes exactly its bytes. Reader and writer share this file, so that they cannot disagree.
//!
//! Guarantees: `decode` takes any bytes and never fails (nothing is judged here), `encode` is its inverse.
//! Refuses to know where records lie and whether their values make sense. Everything is little endian.

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

/// Compatible features: whoever does not know one may read on.
pub mod compat {
    /// The superblock's checksum is set.
    pub const SB_CHKSUM: u32 = 0x01;
    /// Inodes hold modification times (older images held change times).
    pub const MTIME: u32 = 0x02;
    /// Attribute headers hold a name filter.
    pub const XATTR_FILTER: u32 = 0x04;
    /// Shared attributes lie in the metabox.
    pub const SHARED_EA_IN_METABOX: u32 = 0x08;
    /// Long attribute prefixes lie in the image itself, in no inode.
    pub const PLAIN_XATTR_PFX: u32 = 0x10;
    /// Some attributes name content for page cache sharing.
    pub const ISHARE_XATTRS: u32 = 0x20;

    /// Bit and name of each.
    pub const NAMES: [(u32, &str); 6] = [
        (SB_CHKSUM, "sb_chksum"),
        (MTIME, "mtime"),
        (XATTR_FILTER, "xattr_filter"),
        (SHARED_EA_IN_METABOX, "shared_ea_in_metabox"),
        (PLAIN_XATTR_PFX, "plain_xattr_pfx"),
        (ISHARE_XATTRS, "ishare_xattrs"),
    ];
}

/// Incompatible features: whoever does not know one must not read.
pub mod incompat {
    /// LZ4 data is padded at its beginning. Written by `mkfs.erofs` even where nothing is compressed.
    pub const LZ4_0PADDING: u32 = 0x001;
    /// Compression parameters follow the superblock; the same bit allows big clusters.
    pub const COMPR_CFGS: u32 = 0x002;
    /// Some files are chunk-based.
    pub const CHUNKED_FILE: u32 = 0x004;
    /// There is a device table; the same bit means a second compression algorithm.
    pub const DEVICE_TABLE: u32 = 0x008;
    /// Compressed tails lie beside inodes.
    pub const ZTAILPACKING: u32 = 0x010;
    /// Parts of files lie in the packed inode; the same bit means deduplicated compressed data.
    pub const FRAGMENTS: u32 = 0x020;
    /// There are long attribute name prefixes.
    pub const XATTR_PREFIXES: u32 = 0x040;
    /// Block addresses may have 48 bits.
    pub const BITS_48: u32 = 0x080;
    /// Metadata is compressed.
    pub const METABOX: u32 = 0x100;

    /// Bit and name of each.
    pub const NAMES: [(u32, &str); 9] = [
        (LZ4_0PADDING, "lz4_0padding"),
        (COMPR_CFGS, "compr_cfgs/big_pcluster"),
        (CHUNKED_FILE, "chunked_file"),
        (DEVICE_TABLE, "device_table/compr_head2"),
        (ZTAILPACKING, "ztailpacking"),
        (FRAGMENTS, "fragments/dedupe"),
        (XATTR_PREFIXES, "xattr_prefixes"),
        (BITS_48, "48bit"),
        (METABOX, "metabox"),
    ];
}

/// The names of the set bits of `bits`, unknown ones as hexadecimal, joined with commas.
pub fn feature_names(bits: u32, table: &[(u32, &str)]) -> String {
    let named = table.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| (*name).to_owned());
    let unknown = (0..32)
        .map(|shift| 1_u32 << shift)
        .filter(|bit| bits & bit != 0 && table.iter().all(|(known, _)| known != bit))
        .map(|bit| format!("{bit:#x}"));
    named.chain(unknown).collect::<Vec<_>>().join(", ")
}

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

/// `struct erofs_super_block` without extension slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RawSuperblock {
    /// [`SUPER_MAGIC`].
    pub magic: u32,
    /// See [`superblock_checksum`].
    pub checksum: u32,
    /// Bits of [`compat`].
    pub feature_compat: u32,
    /// log2 of the block size.
    pub block_bits: u8,
    /// The superblock has `SUPER_SIZE + ext_slots * SUPER_SLOT_SIZE` bytes.
    pub ext_slots: u8,
    /// nid of the root directory; with `root_nid_8b` set: high 16 bits of the block count.
    pub root_nid_2b: u16,
    /// Number of inodes.
    pub inodes: u64,
    /// Seconds that the times of compact inodes count from.
    pub epoch: u64,
    /// Nanoseconds of all compact inodes' times.
    pub fixed_nsec: u32,
    /// Number of blocks, low 32 bits.
    pub blocks_lo: u32,
    /// Block at which nids count from 0.
    pub meta_block: u32,
    /// Block at which shared attribute ids count from 0.
    pub xattr_block: u32,
    /// Identity of the image.
    pub uuid: [u8; 16],
    /// Name, padded with NUL.
    pub volume_name: [u8; 16],
    /// Bits of [`incompat`].
    pub feature_incompat: u32,
    /// Compression algorithms, or LZ4's window.
    pub compression: u16,
    /// Devices besides the primary one.
    pub extra_devices: u16,
    /// The device table starts at this multiple of [`DEVICE_SLOT_SIZE`].
    pub device_slot: u16,
    /// log2 of (directory block size / block size).
    pub dir_block_bits: u8,
    /// Number of long attribute prefixes.
    pub xattr_prefix_count: u8,
    /// Where they lie, in units of 4 bytes.
    pub xattr_prefix_start: u32,
    /// nid of the packed inode.
    pub packed_nid: u64,
    /// Not zero if the name filter is of another kind than this program knows.
    pub xattr_filter_reserved: u8,
    /// Which prefix marks attributes for page cache sharing.
    pub ishare_prefix: u8,
    /// Zero.
    pub reserved: u16,
    /// Seconds to add to `epoch` for the time of making.
    pub build_time: u32,
    /// With [`incompat::BITS_48`] and not zero: nid of the root directory.
    pub root_nid_8b: u64,
    /// Zero.
    pub reserved2: u64,
}

impl RawSuperblock {
    /// Reads the record.
    pub fn decode(raw: &[u8; SUPER_SIZE]) -> Self {
        let mut f = Fields(raw);
        Self {
            magic: f.u32(),
            checksum: f.u32(),
            feature_compat: f.u32(),
            block_bits: f.u8(),
            ext_slots: f.u8(),
            root_nid_2b: f.u16(),
            inodes: f.u64(),
            epoch: f.u64(),
            fixed_nsec: f.u32(),
            blocks_lo: f.u32(),
            meta_block: f.u32(),
            xattr_block: f.u32(),
            uuid: f.bytes(),
            volume_name: f.bytes(),
            feature_incompat: f.u32(),
            compression: f.u16(),
            extra_devices: f.u16(),
            device_slot: f.u16(),
            dir_block_bits: f.u8(),
            xattr_prefix_count: f.u8(),
            xattr_prefix_start: f.u32(),
            packed_nid: f.u64(),
            xattr_filter_reserved: f.u8(),
            ishare_prefix: f.u8(),
            reserved: f.u16(),
            build_time: f.u32(),
            root_nid_8b: f.u64(),
            reserved2: f.u64(),
        }
    }

    /// Writes the record.
    pub fn encode(&self) -> [u8; SUPER_SIZE] {
        Record::new()
            .u32(self.magic)
            .u32(self.checksum)
            .u32(self.feature_compat)
            .u8(self.block_bits)
            .u8(self.ext_slots)
            .u16(self.root_nid_2b)
            .u64(self.inodes)
            .u64(self.epoch)
            .u32(self.fixed_nsec)
            .u32(self.blocks_lo)
            .u32(self.meta_block)
            .u32(self.xattr_block)
            .put(&self.uuid)
            .put(&self.volume_name)
            .u32(self.feature_incompat)
            .u16(self.compression)
            .u16(self.extra_devices)
            .u16(self.device_slot)
            .u8(self.dir_block_bits)
            .u8(self.xattr_prefix_count)
            .u32(self.xattr_prefix_start)
            .u64(self.packed_nid)
            .u8(self.xattr_filter_reserved)
            .u8(self.ishare_prefix)
            .u16(self.reserved)
            .u32(self.build_time)
            .u64(self.root_nid_8b)
            .u64(self.reserved2)
            .done()
    }
}

/// How many bytes from [`SUPER_OFFSET`] on the superblock's checksum covers: the rest of the block that holds the
/// superblock where blocks are larger than its offset, else one block.
pub const fn checksummed_len(block_bits: u8) -> usize {
    let block = 1_usize << block_bits;
    if block > 1024 { block - 1024 } else { block }
}

/// The superblock's checksum: CRC-32C (no final inversion) over the first [`checksummed_len`] bytes from
/// [`SUPER_OFFSET`] on, the checksum field itself taken as zero.
pub fn superblock_checksum(covered: &[u8]) -> u32 {
    let (head, tail) = covered.split_at(covered.len().min(4));
    let crc = crc32c::crc32c(head);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    !crc32c::crc32c_append(crc, tail.get(4..).unwrap_or_default())
}

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
    /// Size of the attributes, see [`xattr_area_size`].
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
    /// Size of the attributes, see [`xattr_area_size`].
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

/// `struct erofs_deviceslot`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSlot {
    /// Free text, often a digest.
    pub tag: [u8; 64],
    /// Blocks of the device, bits 0..32.
    pub blocks_lo: u32,
    /// Where the device lies in the flat form of the image, in blocks, bits 0..32.
    pub flat_lo: u32,
    /// Bits 32..48 of the blocks.
    pub blocks_hi: u16,
    /// Bits 32..48 of the place.
    pub flat_hi: u16,
    /// Zero.
    pub reserved: [u8; 52],
}

impl DeviceSlot {
    /// Reads the record.
    pub fn decode(raw: &[u8; DEVICE_SLOT_SIZE]) -> Self {
        let mut f = Fields(raw);
        Self {
            tag: f.bytes(),
            blocks_lo: f.u32(),
            flat_lo: f.u32(),
            blocks_hi: f.u16(),
            flat_hi: f.u16(),
            reserved: f.bytes(),
        }
    }

    /// Writes the record.
    pub fn encode(&self) -> [u8; DEVICE_SLOT_SIZE] {
        Record::new()
            .put(&self.tag)
            .u32(self.blocks_lo)
            .u32(self.flat_lo)
            .u16(self.blocks_hi)
            .u16(self.flat_hi)
            .put(&self.reserved)
            .done()
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

/// `struct erofs_xattr_ibody_header`. After it: ids of shared attributes (u32 each), then entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XattrHeader {
    /// A set bit says: no name that hashes to it is here. See [`xattr_filter_bit`].
    pub name_filter: u32,
    /// Number of shared attributes.
    pub shared_count: u8,
    /// Zero.
    pub reserved: [u8; 7],
}

impl XattrHeader {
    /// Reads the record.
    pub fn decode(raw: &[u8; XATTR_HEADER_SIZE]) -> Self {
        let mut f = Fields(raw);
        Self { name_filter: f.u32(), shared_count: f.u8(), reserved: f.bytes() }
    }

    /// Writes the record.
    pub fn encode(&self) -> [u8; XATTR_HEADER_SIZE] {
        Record::new().u32(self.name_filter).u8(self.shared_count).put(&self.reserved).done()
    }
}

/// `struct erofs_xattr_entry`. After it: the name without its prefix, the value, padding to 4 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XattrEntry {
    /// Bytes of the name without its prefix.
    pub name_len: u8,
    /// Which prefix: see [`XATTR_PREFIXES`]; with [`XATTR_LONG_PREFIX`] set, a long prefix of the image.
    pub name_index: u8,
    /// Bytes of the value.
    pub value_len: u16,
}

impl XattrEntry {
    /// Reads the record.
    pub fn decode(raw: &[u8; XATTR_ENTRY_SIZE]) -> Self {
        let mut f = Fields(raw);
        Self { name_len: f.u8(), name_index: f.u8(), value_len: f.u16() }
    }

    /// Writes the record.
    pub fn encode(&self) -> [u8; XATTR_ENTRY_SIZE] {
        Record::new().u8(self.name_len).u8(self.name_index).u16(self.value_len).done()
    }

    /// Bytes of entry, name, value and padding.
    pub fn padded_len(&self) -> usize {
        (XATTR_ENTRY_SIZE + usize::from(self.name_len) + usize::from(self.value_len)).next_multiple_of(4)
    }
}

/// Bytes of the attribute area of an inode that says `count`.
pub fn xattr_area_size(count: u16) -> usize {
    match count {
        0 => 0,
        _ => XATTR_HEADER_SIZE + 4 * (usize::from(count) - 1),
    }
}

/// In an attribute entry's `name_index`: the other bits count the long prefixes of the image.
pub const XATTR_LONG_PREFIX: u8 = 0x80;

/// Index and prefix of attribute names. The two ACL prefixes are whole names.
pub const XATTR_PREFIXES: [(u8, &[u8]); 6] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (5, b"lustre."),
    (6, b"security."),
];

/// The prefix that `index` stands for.
pub fn xattr_prefix(index: u8) -> Option<&'static [u8]> {
    XATTR_PREFIXES.iter().find(|(known, _)| *known == index).map(|(_, prefix)| *prefix)
}

/// As [`xattr_prefix`], but none for prefixes whose attributes the kernel does not show (Lustre's).
pub fn visible_xattr_prefix(index: u8) -> Option<&'static [u8]> {
    if index == 5 { None } else { xattr_prefix(index) }
}

/// Cuts a full attribute name into prefix index and rest; none if EROFS has no prefix for it.
pub fn split_xattr_name(name: &[u8]) -> Option<(u8, &[u8])> {
    XATTR_PREFIXES.iter().find_map(|(index, prefix)| {
        let rest = name.strip_prefix(*prefix)?;
        // The ACL names are complete; anything longer is another name, which EROFS cannot hold.
        (matches!(index, 2 | 3) == rest.is_empty()).then_some((*index, rest))
    })
}

/// Which of the 32 bits of a name filter speaks for the attribute `rest` below prefix `index` (after taking a long
/// prefix apart: `index` is its base, `rest` includes its infix).
pub fn xattr_filter_bit(index: u8, rest: &[u8]) -> u32 {
    const SEED: u32 = 0x25BB_E08F;
    xxh32(rest, SEED.wrapping_add(u32::from(index))) & 31
}

/// XXH32 as its specification defines it (`xxHash/doc/xxhash_spec.md`).
fn xxh32(data: &[u8], seed: u32) -> u32 {
    const P1: u32 = 0x9E37_79B1;
    const P2: u32 = 0x85EB_CA77;
    const P3: u32 = 0xC2B2_AE3D;
    const P4: u32 = 0x27D4_EB2F;
    const P5: u32 = 0x1656_67B1;
    let round = |lane: u32, word: u32| lane.wrapping_add(word.wrapping_mul(P2)).rotate_left(13).wrapping_mul(P1);

    let (stripes, rest) = data.as_chunks::<16>();
    let mut hash = if stripes.is_empty() {
        seed.wrapping_add(P5)
    } else {
        let mut lanes = [seed.wrapping_add(P1).wrapping_add(P2), seed.wrapping_add(P2), seed, seed.wrapping_sub(P1)];
        for stripe in stripes {
            for (lane, word) in lanes.iter_mut().zip(stripe.as_chunks::<4>().0) {
                *lane = round(*lane, u32::from_le_bytes(*word));
            }
        }
        let [a, b, c, d] = lanes;
        a.rotate_left(1).wrapping_add(b.rotate_left(7)).wrapping_add(c.rotate_left(12)).wrapping_add(d.rotate_left(18))
    };
    let [a, b, c, d, ..] = (data.len() as u64).to_le_bytes();
    hash = hash.wrapping_add(u32::from_le_bytes([a, b, c, d]));

    let (words, bytes) = rest.as_chunks::<4>();
    for word in words {
        hash = hash.wrapping_add(u32::from_le_bytes(*word).wrapping_mul(P3)).rotate_left(17).wrapping_mul(P4);
    }
    for byte in bytes {
        hash = hash.wrapping_add(u32::from(*byte).wrapping_mul(P5)).rotate_left(11).wrapping_mul(P1);
    }
    hash = (hash ^ (hash >> 15)).wrapping_mul(P2);
    hash = (hash ^ (hash >> 13)).wrapping_mul(P3);
    hash ^ (hash >> 16)
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

    #[test]
    fn xxh32_gives_the_published_values() {
        // Values from the reference implementation's own self test and documentation.
        assert_eq!(xxh32(b"", 0), 0x02CC_5D05);
        assert_eq!(xxh32(b"", P1_SEED), 0x36B7_8AE7);
        assert_eq!(xxh32(b"Nobody inspects the spammish repetition", 0), 0xE229_3B2F);
    }
    const P1_SEED: u32 = 2_654_435_761;

    #[test]
    fn the_checksum_takes_its_own_field_as_zero() {
        let mut covered = vec![7_u8; 64];
        let one = superblock_checksum(&covered);
        covered[4..8].copy_from_slice(&[9; 4]);
        assert_eq!(superblock_checksum(&covered), one);
        covered[8] = 0;
        assert_ne!(superblock_checksum(&covered), one);
        assert_eq!([9, 10, 11, 12, 16].map(checksummed_len), [512, 1024, 1024, 3072, 64512]);
    }

    #[test]
    fn attribute_names_are_cut_at_known_prefixes() {
        for (name, cut) in [
            (&b"user.a"[..], Some((1, &b"a"[..]))),
            (b"system.posix_acl_access", Some((2, b""))),
            (b"system.posix_acl_default", Some((3, b""))),
            (b"system.posix_acl_access2", None),
            (b"trusted.overlay.opaque", Some((4, b"overlay.opaque"))),
            (b"security.capability", Some((6, b"capability"))),
            (b"user.", None),
            (b"strange", None),
        ] {
            assert_eq!(split_xattr_name(name), cut, "{name:?}");
        }
    }

    #[test]
    fn features_are_named() {
        assert_eq!(feature_names(incompat::METABOX | 0x8000, &incompat::NAMES), "metabox, 0x8000");
        assert_eq!(feature_names(0, &compat::NAMES), "");
    }

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
