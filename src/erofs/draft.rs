//! Images made by hand for tests: records put anywhere, right or wrong.

use super::ondisk::{
    ChunkFormat, ChunkIndexEntry, CompactInode, DIRENT_SIZE, DataLayout, Dirent, ExtendedInode, InodeFormat,
    RawSuperblock, SUPER_MAGIC, SUPER_OFFSET, XATTR_HEADER_SIZE, XattrEntry, XattrHeader, checksummed_len, compat,
    file_type_of, superblock_checksum,
};
use super::{Image, Nid};
use crate::model::FileKind;

/// An image in the making. Inodes may be put at any nid; nid 0 is byte 0 unless the metadata block says otherwise.
pub(crate) struct Draft {
    pub(crate) bytes: Vec<u8>,
    pub(crate) superblock: RawSuperblock,
}

/// A compact inode that says as little as it can.
pub(crate) fn compact(kind: FileKind, layout: DataLayout, size: u32, u: u32) -> CompactInode {
    CompactInode {
        format: InodeFormat::new(false, layout, false),
        xattr_count: 0,
        mode: kind.mode_bits() | 0o644,
        nb: if kind == FileKind::Directory { 2 } else { 1 },
        size,
        mtime: 0,
        u,
        ino: 0,
        uid: 0,
        gid: 0,
        reserved: 0,
    }
}

/// An extended inode that says as little as it can.
pub(crate) fn extended(kind: FileKind, layout: DataLayout, size: u64, u: u32) -> ExtendedInode {
    ExtendedInode {
        format: InodeFormat::new(true, layout, false),
        xattr_count: 0,
        mode: kind.mode_bits() | 0o644,
        nb: 0,
        size,
        u,
        ino: 0,
        uid: 0,
        gid: 0,
        mtime: 0,
        mtime_nsec: 0,
        nlink: if kind == FileKind::Directory { 2 } else { 1 },
        reserved: [0; 16],
    }
}

/// A directory block of these names, in this order.
pub(crate) fn dir_block(entries: &[(&[u8], u64, u8)]) -> Vec<u8> {
    let mut offset = entries.len() * DIRENT_SIZE;
    let mut table = Vec::new();
    let mut names = Vec::new();
    for (name, nid, file_type) in entries {
        let name_offset = u16::try_from(offset).unwrap();
        table.extend(Dirent { nid: *nid, name_offset, file_type: *file_type, reserved: 0 }.encode());
        names.extend_from_slice(name);
        offset += name.len();
    }
    table.extend(names);
    table
}

/// An attribute area: header, shared ids, entries of (prefix index, rest of the name, value).
pub(crate) fn xattr_area(filter: u32, shared: &[u32], entries: &[(u8, &[u8], &[u8])]) -> Vec<u8> {
    let shared_count = u8::try_from(shared.len()).unwrap();
    let mut area = XattrHeader { name_filter: filter, shared_count, reserved: [0; 7] }.encode().to_vec();
    for id in shared {
        area.extend(id.to_le_bytes());
    }
    for (index, name, value) in entries {
        area.extend(xattr_entry(*index, name, value));
    }
    area
}

/// One attribute entry with its padding.
pub(crate) fn xattr_entry(index: u8, name: &[u8], value: &[u8]) -> Vec<u8> {
    let entry = XattrEntry {
        name_len: u8::try_from(name.len()).unwrap(),
        name_index: index,
        value_len: u16::try_from(value.len()).unwrap(),
    };
    let mut bytes = [&entry.encode()[..], name, value].concat();
    bytes.resize(entry.padded_len(), 0);
    bytes
}

/// What an inode with an attribute area of `len` bytes says.
pub(crate) fn xattr_count(len: usize) -> u16 {
    u16::try_from((len - XATTR_HEADER_SIZE) / 4 + 1).unwrap()
}

impl Draft {
    /// An image of `blocks` blocks of `1 << block_bits` bytes, all zero, with the root at nid 64 (byte 2048).
    pub(crate) fn new(block_bits: u8, blocks: u32) -> Self {
        let superblock = RawSuperblock {
            magic: SUPER_MAGIC,
            feature_compat: compat::SB_CHKSUM,
            block_bits,
            root_nid_2b: 64,
            blocks_lo: blocks,
            ..RawSuperblock::default()
        };
        Self { bytes: vec![0; (blocks as usize) << block_bits], superblock }
    }

    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        let end = at + bytes.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[at..end].copy_from_slice(bytes);
        self
    }

    /// Where inode `nid` lies.
    pub(crate) fn position(&self, nid: u64) -> usize {
        ((self.superblock.meta_block as usize) << self.superblock.block_bits) + usize::try_from(nid).unwrap() * 32
    }

    /// Puts an inode and what follows it.
    pub(crate) fn compact(&mut self, nid: u64, inode: CompactInode, after: &[u8]) -> &mut Self {
        self.put(self.position(nid), &[&inode.encode(), after].concat())
    }

    /// Puts an inode and what follows it.
    pub(crate) fn extended(&mut self, nid: u64, inode: ExtendedInode, after: &[u8]) -> &mut Self {
        self.put(self.position(nid), &[&inode.encode(), after].concat())
    }

    /// Puts a directory whose block lies beside it.
    pub(crate) fn directory(&mut self, nid: u64, entries: &[(&[u8], u64, FileKind)]) -> &mut Self {
        let raw: Vec<_> = entries.iter().map(|(name, nid, kind)| (*name, *nid, file_type_of(*kind))).collect();
        let block = dir_block(&raw);
        let mut inode = compact(FileKind::Directory, DataLayout::FlatInline, u32::try_from(block.len()).unwrap(), 0);
        let below = entries.iter().filter(|(name, _, kind)| *kind == FileKind::Directory && !name.starts_with(b"."));
        inode.nb = 2 + u16::try_from(below.count()).unwrap();
        self.compact(nid, inode, &block)
    }

    /// Puts the root with these entries besides the dots.
    pub(crate) fn root(&mut self, entries: &[(&[u8], u64, FileKind)]) -> &mut Self {
        let dots = [(&b"."[..], 64, FileKind::Directory), (b"..", 64, FileKind::Directory)];
        self.directory(64, &[&dots[..], entries].concat())
    }

    /// Puts a chunk-based file with chunk indexes: (device, block) each.
    pub(crate) fn chunked(&mut self, nid: u64, size: u64, chunk_bits: u8, chunks: &[(u16, u64)]) -> &mut Self {
        let format = ChunkFormat::new(chunk_bits, true, true);
        let table = chunks.iter().flat_map(|(device, block)| {
            let [a, b, c, d, e, f, ..] = block.to_le_bytes();
            ChunkIndexEntry {
                start_hi: u16::from_le_bytes([e, f]),
                device: *device,
                start_lo: u32::from_le_bytes([a, b, c, d]),
            }
            .encode()
        });
        let inode = extended(FileKind::Regular, DataLayout::ChunkBased, size, format.0.into());
        self.extended(nid, inode, &table.collect::<Vec<_>>())
    }

    /// The image, with superblock and checksum.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let start = usize::try_from(SUPER_OFFSET).unwrap();
        let mut bytes = self.bytes.clone();
        let mut superblock = self.superblock;
        bytes[start..start + 128].copy_from_slice(&superblock.encode());
        let covered = checksummed_len(superblock.block_bits.clamp(9, 16)).min(bytes.len() - start);
        superblock.checksum = superblock_checksum(&bytes[start..start + covered]);
        bytes[start..start + 128].copy_from_slice(&superblock.encode());
        bytes
    }

    pub(crate) fn open(&self) -> Image<Vec<u8>> {
        Image::open(self.bytes()).unwrap()
    }
}

/// Shorthand.
pub(crate) const fn nid(number: u64) -> Nid {
    Nid(number)
}
