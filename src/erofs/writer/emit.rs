//! The one routine that puts the metadata of an image into bytes. It runs twice: into nothing, to learn where
//! everything lies, and into the image.

use std::io::{self, Write};

use super::early::EarlyLayout;
use super::plan::Plan;
use super::tree::{Body, ROOT};
use super::xattrs::XattrSet;
use super::{BLOCK_BITS, BLOCK_SIZE};
use crate::erofs::WRITER_NAME;
use crate::erofs::ondisk::{
    COMPACT_SIZE, ChunkFormat, CompactInode, DIRENT_SIZE, DataLayout, Dirent, EXTENDED_SIZE, ExtendedInode,
    INODE_SLOT_BITS, InodeFormat, RawSuperblock, SUPER_MAGIC, SUPER_OFFSET, XATTR_HEADER_SIZE, XattrHeader,
    checksummed_len, compat, file_type_of, incompat, superblock_checksum,
};
use crate::model::FileKind;

/// [`SUPER_OFFSET`] as an index.
const SUPER_AT: usize = 1024;

/// Where things lie. Filled by the counting run, used by the writing run.
#[derive(Debug, Clone, Default)]
pub(super) struct Places {
    /// Of each node: its nid, the place of its inode in units of 32 bytes.
    nids: Vec<u32>,
    /// First block of the metadata behind the superblock's own; 0 if it follows the superblock.
    pub(super) base: u32,
    /// First block of the shared attributes.
    shared: u32,
    /// First block of directories.
    directories: u32,
    /// Bytes of metadata.
    pub(super) end: u64,
    /// How the early data lies.
    pub(super) early_layout: EarlyLayout,
    /// First block of early data.
    pub(super) early: u32,
    /// First block of late data.
    pub(super) late: u32,
    /// Blocks of the image.
    pub(super) blocks: u32,
}

impl Places {
    pub(super) fn new(nodes: usize, base: u32) -> Self {
        Self { nids: vec![0; nodes], base, ..Self::default() }
    }
}

/// A run over the metadata.
pub(super) struct Emission<'a, W> {
    plan: &'a Plan,
    places: &'a mut Places,
    out: W,
    at: u64,
    /// Nodes whose data goes to the directory blocks, and if the last part of it is beside the inode.
    in_blocks: Vec<(u32, bool)>,
    /// Directory blocks that are promised so far.
    blocks: u32,
}

/// How the data of an inode lies.
struct Data {
    layout: DataLayout,
    size: u64,
    u: u32,
}

impl<'a, W: Write> Emission<'a, W> {
    pub(super) fn new(plan: &'a Plan, places: &'a mut Places, out: W) -> Self {
        Self { plan, places, out, at: 0, in_blocks: Vec::new(), blocks: 0 }
    }

    /// Emits everything.
    pub(super) fn run(mut self) -> io::Result<()> {
        self.pad_to(SUPER_OFFSET)?;
        let superblock = self.superblock().encode();
        self.put(&superblock)?;
        if self.places.base > 0 {
            // The blocks of files come first. No inode has number 0: readers of directories take that for a gap.
            self.start_block()?;
            self.at = self.base();
            self.pad_to(self.at + (1 << INODE_SLOT_BITS))?;
        }
        let plan = self.plan;
        for number in &plan.order {
            self.inode(*number)?;
        }
        if !plan.shared.is_empty() {
            self.places.shared = self.start_block()?;
            for id in &plan.shared {
                self.put(plan.tree.xattrs.entry(*id))?;
            }
        }
        self.places.directories = self.start_block()?;
        for (number, has_tail) in std::mem::take(&mut self.in_blocks) {
            self.data_blocks(number, has_tail)?;
        }
        self.start_block()?;
        self.places.end = self.at;
        Ok(())
    }

    /// Where nids are counted from.
    fn base(&self) -> u64 {
        u64::from(self.places.base) * BLOCK_SIZE
    }

    fn superblock(&self) -> RawSuperblock {
        let plan = self.plan;
        // See `Superblock::shows_no_xattrs`. The few marks of a layer without other attributes need no filter.
        let filter = if plan.tree.xattrs.shows_any() { compat::XATTR_FILTER } else { 0 };
        let mut volume_name = [0; 16];
        volume_name[..WRITER_NAME.len()].copy_from_slice(WRITER_NAME);
        RawSuperblock {
            magic: SUPER_MAGIC,
            feature_compat: compat::SB_CHKSUM | compat::MTIME | filter,
            volume_name,
            block_bits: BLOCK_BITS,
            root_nid_2b: u16::try_from(self.places.nids[ROOT as usize]).expect("the root is the first inode"),
            inodes: plan.order.len() as u64,
            epoch: plan.epoch.seconds.cast_unsigned(),
            fixed_nsec: plan.epoch.nanos,
            blocks_lo: self.places.blocks,
            meta_block: self.places.base,
            xattr_block: self.places.shared,
            uuid: plan.identity.uuid,
            feature_incompat: if plan.chunked { incompat::CHUNKED_FILE } else { 0 },
            ..RawSuperblock::default()
        }
    }

    fn inode(&mut self, number: u32) -> io::Result<()> {
        let plan = self.plan;
        let node = &plan.tree.nodes[number as usize];
        let compact = plan.is_compact(number, node);
        let inode_size = if compact { COMPACT_SIZE } else { EXTENDED_SIZE } as u64;
        let xattrs = self.xattr_area(node.xattrs);
        self.pad_to(self.at.next_multiple_of(1 << INODE_SLOT_BITS))?;

        // What stands behind the inode.
        let mut tail = Vec::new();
        let body = match node.body {
            Body::Directory(_) => {
                let shape = self.shape(number);
                if shape.tail > 0 && self.make_room(inode_size, xattrs.len() as u64, shape.tail)? {
                    tail = self.directory_block(number, shape.tail_entry);
                }
                self.body_in_blocks(number, shape.size(), shape.blocks, !tail.is_empty())?
            }
            Body::Symlink { target } => {
                let target = plan.tree.strings.get(target);
                if self.make_room(inode_size, xattrs.len() as u64, target.len() as u64)? {
                    tail.extend_from_slice(target);
                }
                self.body_in_blocks(number, target.len() as u64, 0, !tail.is_empty())?
            }
            Body::Flat { size: 0, .. } => Data { layout: DataLayout::FlatPlain, size: 0, u: 0 },
            Body::Flat { size, start } => Data { layout: DataLayout::FlatPlain, size, u: self.places.block(start) },
            Body::Mapped { size, map } => {
                let map = &plan.tree.maps[map as usize];
                let blocks = map.blocks().map(|block| block.map_or(u32::MAX, |block| self.places.block(block)));
                tail.extend(blocks.flat_map(u32::to_le_bytes));
                let format = ChunkFormat::new(map.chunk_bits - BLOCK_BITS, false, false);
                Data { layout: DataLayout::ChunkBased, size, u: format.0.into() }
            }
            Body::CharDevice(raw) | Body::BlockDevice(raw) => Data { layout: DataLayout::FlatPlain, size: 0, u: raw },
            Body::Fifo => Data { layout: DataLayout::FlatPlain, size: 0, u: 0 },
            Body::Pending { .. } | Body::Alias(_) => unreachable!("all links were resolved"),
        };

        let nid = (self.at - self.base()) >> INODE_SLOT_BITS;
        self.places.nids[number as usize] = u32::try_from(nid).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let format = InodeFormat::new(!compact, body.layout, false);
        let xattr_count = match xattrs.len() {
            0 => 0,
            len => u16::try_from((len - XATTR_HEADER_SIZE) / 4 + 1).expect("the size of attributes was checked"),
        };
        let mode = node.kind().mode_bits() | node.permissions;
        let nlink = plan.nlink[number as usize];
        let ino = self.places.nids[number as usize];
        if compact {
            const FITS: &str = "only inodes that fit are compact";
            let inode = CompactInode {
                format,
                xattr_count,
                mode,
                nb: u16::try_from(nlink).expect(FITS),
                size: u32::try_from(body.size).expect(FITS),
                mtime: 0,
                u: body.u,
                ino,
                uid: u16::try_from(node.uid).expect(FITS),
                gid: u16::try_from(node.gid).expect(FITS),
                reserved: 0,
            };
            self.put(&inode.encode())?;
        } else {
            let inode = ExtendedInode {
                format,
                xattr_count,
                mode,
                nb: 0,
                size: body.size,
                u: body.u,
                ino,
                uid: node.uid,
                gid: node.gid,
                mtime: node.mtime.seconds,
                mtime_nsec: node.mtime.nanos,
                nlink,
                reserved: [0; 16],
            };
            self.put(&inode.encode())?;
        }
        self.put(&xattrs)?;
        self.put(&tail)
    }

    /// The layout of a directory or symlink of which `blocks` whole blocks, and its tail too if that is not inline,
    /// go to the directory blocks.
    fn body_in_blocks(&mut self, number: u32, size: u64, blocks: u32, inline: bool) -> io::Result<Data> {
        let layout = if inline { DataLayout::FlatInline } else { DataLayout::FlatPlain };
        let has_tail = !size.is_multiple_of(BLOCK_SIZE);
        let count = blocks + u32::from(has_tail && !inline);
        if count == 0 {
            return Ok(Data { layout, size, u: 0 });
        }
        let start = self.places.directories.checked_add(self.blocks).ok_or(io::ErrorKind::FileTooLarge)?;
        self.blocks = self.blocks.checked_add(count).ok_or(io::ErrorKind::FileTooLarge)?;
        self.in_blocks.push((number, has_tail && !inline));
        Ok(Data { layout, size, u: start })
    }

    /// Sees to it that `tail` bytes behind inode and attributes end in the block where the inode itself ends (the
    /// kernel looks for them there), with padding if that wastes less than a block of their own would. True if so.
    fn make_room(&mut self, inode: u64, xattrs: u64, tail: u64) -> io::Result<bool> {
        let fits = |at: u64| (at + inode - 1) / BLOCK_SIZE == (at + inode + xattrs + tail - 1) / BLOCK_SIZE;
        if fits(self.at) {
            return Ok(true);
        }
        let next = self.at.next_multiple_of(BLOCK_SIZE);
        if fits(next) && next - self.at <= BLOCK_SIZE - tail.min(BLOCK_SIZE) {
            self.pad_to(next)?;
            return Ok(true);
        }
        Ok(false)
    }

    /// Attributes of an inode as they stand behind it.
    fn xattr_area(&self, set: XattrSet) -> Vec<u8> {
        if set == XattrSet::EMPTY {
            return Vec::new();
        }
        let pool = &self.plan.tree.xattrs;
        let (shared, inline) = self.plan.split_xattrs(set);
        let header = XattrHeader {
            name_filter: pool.filter(set),
            shared_count: u8::try_from(shared.len()).expect("an inode has at most 255 shared attributes"),
            reserved: [0; 7],
        };
        let mut area = header.encode().to_vec();
        area.extend(shared.into_iter().flat_map(u32::to_le_bytes));
        for id in inline {
            area.extend_from_slice(pool.entry(id));
        }
        area
    }

    /// Emits what `inode` promised.
    fn data_blocks(&mut self, number: u32, has_tail: bool) -> io::Result<()> {
        match self.plan.tree.nodes[number as usize].body {
            Body::Symlink { target } => {
                self.put(self.plan.tree.strings.get(target))?;
                self.start_block()?;
            }
            _ => {
                let shape = self.shape(number);
                let mut entry = 0;
                while entry < shape.tail_entry || (has_tail && entry < shape.entries) {
                    let block = self.directory_block(number, entry);
                    entry += first_name_offset(&block) / DIRENT_SIZE;
                    self.put(&block)?;
                    self.start_block()?;
                }
            }
        }
        Ok(())
    }

    /// Entries of a directory, sorted: `.` and `..` among the others.
    fn entries(&self, directory: u32) -> Entries<'a> {
        Entries::new(self.plan, directory)
    }

    /// How a directory falls into blocks.
    fn shape(&self, directory: u32) -> Shape {
        let entries = self.entries(directory);
        let mut shape = Shape { blocks: 0, tail: 0, tail_entry: 0, entries: entries.len() };
        for number in 0..entries.len() {
            let (name, _) = entries.get(number);
            let len = (DIRENT_SIZE + name.len()) as u64;
            if shape.tail + len > BLOCK_SIZE {
                shape.blocks += 1;
                shape.tail = 0;
                shape.tail_entry = number;
            }
            shape.tail += len;
        }
        if shape.tail == BLOCK_SIZE {
            (shape.blocks, shape.tail, shape.tail_entry) = (shape.blocks + 1, 0, shape.entries);
        }
        shape
    }

    /// The block of a directory that begins with entry `first`, without padding.
    fn directory_block(&self, directory: u32, first: usize) -> Vec<u8> {
        let entries = self.entries(directory);
        let mut used = 0;
        let mut last = first;
        while last < entries.len() {
            let len = DIRENT_SIZE + entries.get(last).0.len();
            if used + len > 1 << BLOCK_BITS {
                break;
            }
            used += len;
            last += 1;
        }
        let mut block = Vec::with_capacity(used);
        let mut name_offset = (last - first) * DIRENT_SIZE;
        for (name, node) in (first..last).map(|number| entries.get(number)) {
            let kind: FileKind = self.plan.tree.nodes[node as usize].kind();
            let dirent = Dirent {
                nid: self.places.nids[node as usize].into(),
                name_offset: u16::try_from(name_offset).expect("a block is smaller than 64 KiB"),
                file_type: file_type_of(kind),
                reserved: 0,
            };
            block.extend_from_slice(&dirent.encode());
            name_offset += name.len();
        }
        for number in first..last {
            block.extend_from_slice(entries.get(number).0);
        }
        block
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn pad_to(&mut self, end: u64) -> io::Result<()> {
        const ZEROS: [u8; 1 << BLOCK_BITS] = [0; 1 << BLOCK_BITS];
        while self.at < end {
            let len = usize::try_from(end - self.at).unwrap_or(usize::MAX).min(ZEROS.len());
            self.put(&ZEROS[..len])?;
        }
        Ok(())
    }

    /// Pads to the next block and gives its number.
    fn start_block(&mut self) -> io::Result<u32> {
        self.pad_to(self.at.next_multiple_of(BLOCK_SIZE))?;
        u32::try_from(self.at / BLOCK_SIZE).map_err(|_| io::ErrorKind::FileTooLarge.into())
    }
}

/// Where the names of a directory block begin.
fn first_name_offset(block: &[u8]) -> usize {
    let dirent = Dirent::decode(block.first_chunk().expect("a directory block has an entry"));
    dirent.name_offset.into()
}

/// How a directory falls into blocks.
struct Shape {
    /// Whole blocks, of which each but the last may have unused bytes at its end.
    blocks: u32,
    /// Bytes in the last, partial block.
    tail: u64,
    /// The entry it begins with.
    tail_entry: usize,
    /// Number of entries.
    entries: usize,
}

impl Shape {
    fn size(&self) -> u64 {
        u64::from(self.blocks) * BLOCK_SIZE + self.tail
    }
}

/// The entries of a directory, sorted by name with `.` and `..` in their places.
struct Entries<'a> {
    plan: &'a Plan,
    directory: u32,
    children: &'a [u32],
    /// Children before `.`.
    before_dot: usize,
    /// Children before `..`.
    before_dots: usize,
}

impl<'a> Entries<'a> {
    fn new(plan: &'a Plan, directory: u32) -> Self {
        let children = plan.children_of(directory);
        let before = |dots: &[u8]| {
            children.partition_point(|link| plan.tree.strings.get(plan.tree.links[*link as usize].name) < dots)
        };
        Self { plan, directory, children, before_dot: before(b"."), before_dots: before(b"..") }
    }

    fn len(&self) -> usize {
        self.children.len() + 2
    }

    /// Name and node of an entry.
    fn get(&self, number: usize) -> (&'a [u8], u32) {
        let child = if number == self.before_dot {
            return (b".", self.directory);
        } else if number == self.before_dots + 1 {
            return (b"..", self.plan.parent[self.directory as usize]);
        } else if number < self.before_dot {
            number
        } else if number <= self.before_dots {
            number - 1
        } else {
            number - 2
        };
        let link = &self.plan.tree.links[self.children[child] as usize];
        (self.plan.tree.strings.get(link.name), link.node)
    }
}

/// Holds the first block back until its checksum is known, and passes the rest on.
pub(super) struct FirstBlock<W> {
    out: W,
    held: Vec<u8>,
}

impl<W: Write> FirstBlock<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, held: Vec::with_capacity(1 << BLOCK_BITS) }
    }

    /// Flushes.
    pub(super) fn finish(mut self) -> io::Result<()> {
        assert!(self.is_past_first(), "metadata has at least one block");
        self.out.flush()
    }

    fn is_past_first(&self) -> bool {
        self.held.capacity() == 0
    }
}

impl<W: Write> Write for FirstBlock<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.is_past_first() {
            return self.out.write(bytes);
        }
        let taken = bytes.len().min((1 << BLOCK_BITS) - self.held.len());
        self.held.extend_from_slice(&bytes[..taken]);
        if self.held.len() == 1 << BLOCK_BITS {
            let mut block = std::mem::take(&mut self.held);
            let covered = SUPER_AT..SUPER_AT + checksummed_len(BLOCK_BITS);
            let checksum = superblock_checksum(&block[covered]);
            block[SUPER_AT + 4..][..4].copy_from_slice(&checksum.to_le_bytes());
            self.out.write_all(&block)?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
