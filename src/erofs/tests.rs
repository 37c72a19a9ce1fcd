//! The reader against images made by hand: every layout, and everything that bytes can lie about.

use std::sync::Mutex;

use super::draft::{Draft, compact, dir_block, extended, nid, xattr_area, xattr_count, xattr_entry};
use super::ondisk::{
    ChunkFormat, DataLayout, DeviceSlot, InodeFormat, RawSuperblock, XATTR_PREFIXES, compat, incompat, xattr_filter_bit,
};
use super::*;
use crate::model::{Attributes, ByteRange, DeviceNumber, FileKind, NameError, ReadAt, ReadAtError, Timestamp, Xattr};

const DIR: FileKind = FileKind::Directory;
const FILE: FileKind = FileKind::Regular;

/// The defect that an error tells of.
#[track_caller]
fn defect<T: std::fmt::Debug>(result: Result<T, Error>) -> Defect {
    match result {
        Err(Error::Corrupt { defect, .. }) => defect,
        other => panic!("{other:?} instead of a corruption"),
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect()
}

#[track_caller]
fn content(image: &Image<Vec<u8>>, number: u64) -> Vec<u8> {
    let inode = image.inode(nid(number)).unwrap();
    let mut buf = vec![0xee; usize::try_from(inode.attributes().size).unwrap() + 10];
    let len = image.read(&inode, 0, &mut buf).unwrap();
    buf.truncate(len);
    buf
}

// ---- superblock ----

#[test]
fn what_is_no_image_is_refused() {
    assert!(matches!(Image::open(vec![0; 100]), Err(Error::TooShort { size: 100 })));
    assert!(matches!(Image::open(vec![7; 8192]), Err(Error::NotErofs { found: 0x0707_0707 })));
    assert_eq!(defect(Image::open(Draft::new(8, 32).bytes())), Defect::BlockSize(8));
    assert_eq!(defect(Image::open(Draft::new(17, 1).bytes())), Defect::BlockSize(17));
    let mut draft = Draft::new(12, 2);
    draft.superblock.dir_block_bits = 5;
    assert_eq!(defect(Image::open(draft.bytes())), Defect::BlockSize(17));
    draft.superblock.dir_block_bits = 0;
    draft.superblock.fixed_nsec = 1_000_000_000;
    assert_eq!(defect(Image::open(draft.bytes())), Defect::Nanoseconds(1_000_000_000));
}

#[test]
fn every_block_size_has_its_checksum() {
    for bits in 9..=16 {
        let mut bytes = Draft::new(bits, if bits < 12 { 8 } else { 2 }).bytes();
        Image::open(bytes.clone()).unwrap();
        let covered = 1024 + ondisk::checksummed_len(bits);
        bytes[covered - 1] ^= 1;
        assert!(matches!(defect(Image::open(bytes.clone())), Defect::Checksum { .. }), "2^{bits}");
        bytes[covered - 1] ^= 1;
        bytes[covered] ^= 1;
        Image::open(bytes).unwrap();
    }
}

#[test]
fn features_that_are_not_known_are_refused_by_name() {
    for (features, names) in [
        (0x200, "0x200"),
        (0x8000_0000 | incompat::CHUNKED_FILE, "0x80000000"),
        (incompat::METABOX | incompat::BITS_48, "metabox (compression inside of the image)"),
        (incompat::FRAGMENTS, "fragments/dedupe (compression inside of the image)"),
        (incompat::LZ4_0PADDING, "lz4_0padding (compression inside of the image)"),
    ] {
        let mut draft = Draft::new(12, 2);
        draft.superblock.feature_incompat = features;
        match Image::open(draft.bytes()) {
            Err(Error::Features { names: found }) => assert_eq!(found, names),
            other => panic!("{other:?}"),
        }
    }
    // Where prefixes lie in the packed inode, "fragments" means no more than that.
    let mut draft = Draft::new(12, 2);
    draft.superblock.feature_incompat = incompat::FRAGMENTS | incompat::XATTR_PREFIXES;
    Image::open(draft.bytes()).unwrap();
}

#[test]
fn the_48_bit_superblock_has_a_wide_root_and_size() {
    let mut draft = Draft::new(12, 2);
    draft.superblock.feature_incompat = incompat::BITS_48;
    assert_eq!(draft.open().root(), nid(64));
    draft.superblock.root_nid_8b = 0x1_0000_0000;
    draft.superblock.root_nid_2b = 3;
    let image = draft.open();
    assert_eq!((image.root(), image.superblock().blocks()), (nid(0x1_0000_0000), 0x3_0000_0002));
}

// ---- inodes ----

#[test]
fn compact_inodes_count_time_from_the_epoch() {
    let mut draft = Draft::new(12, 2);
    draft.superblock.epoch = (-1000_i64).cast_unsigned();
    draft.superblock.fixed_nsec = 17;
    let mut inode =
        compact(FileKind::CharDevice, DataLayout::FlatPlain, 0, DeviceNumber { major: 4, minor: 300 }.encode());
    inode.mtime = 5;
    inode.uid = 65_535;
    inode.gid = 7;
    inode.mode |= 0o4000;
    draft.compact(80, inode, b"");
    let found = draft.open().inode(nid(80)).unwrap();
    let expected = Attributes {
        kind: FileKind::CharDevice,
        permissions: 0o4644,
        uid: 65_535,
        gid: 7,
        mtime: Timestamp { seconds: -995, nanos: 17 },
        nlink: 1,
        size: 0,
        rdev: DeviceNumber { major: 4, minor: 300 },
    };
    assert_eq!(*found.attributes(), expected);
    assert!(!found.has_xattrs() && !found.is_extended());
}

#[test]
fn extended_inodes_have_their_own_time_and_may_cross_a_block() {
    let mut draft = Draft::new(12, 3);
    let mut inode = extended(FILE, DataLayout::FlatPlain, 0, 0);
    inode.mtime = -5;
    inode.mtime_nsec = 999_999_999;
    inode.uid = u32::MAX;
    inode.nlink = 70_000;
    // The last slot of the first block: the second half lies in the next block.
    draft.extended(127, inode, b"");
    let found = draft.open().inode(nid(127)).unwrap();
    let attributes = found.attributes();
    assert_eq!(attributes.mtime, Timestamp { seconds: -5, nanos: 999_999_999 });
    assert_eq!((attributes.uid, attributes.nlink), (u32::MAX, 70_000));
}

#[test]
fn a_compact_inode_in_the_last_slot_is_read_without_what_follows() {
    let mut draft = Draft::new(12, 2);
    draft.compact(255, compact(FileKind::Fifo, DataLayout::FlatPlain, 0, 0), b"");
    assert_eq!(draft.open().inode(nid(255)).unwrap().attributes().kind, FileKind::Fifo);
}

#[test]
fn one_link_may_be_said_by_a_bit_whose_field_then_widens_the_address() {
    let mut draft = Draft::new(12, 2);
    let mut inode = compact(FILE, DataLayout::FlatPlain, 10, 5);
    inode.format = InodeFormat::new(false, DataLayout::FlatPlain, true);
    inode.nb = 2;
    draft.compact(80, inode, b"");
    // For a directory the bit means that its dot is left out.
    let mut directory = compact(DIR, DataLayout::FlatPlain, 10, 5);
    directory.format = inode.format;
    directory.nb = 3;
    draft.compact(81, directory, b"");
    let image = draft.open();
    let file = image.inode(nid(80)).unwrap();
    assert_eq!(file.attributes().nlink, 1);
    let extents: Vec<_> = image.extents(&file, ByteRange::to(10)).map(Result::unwrap).collect();
    assert_eq!(extents[0].source, ExtentSource::Data { device: 0, offset: 0x2_0000_0005 << 12 });
    assert_eq!(image.inode(nid(81)).unwrap().attributes().nlink, 3);
}

#[test]
fn inodes_that_cannot_be_are_refused() {
    let broken = |change: &dyn Fn(&mut ondisk::ExtendedInode)| {
        let mut inode = extended(FILE, DataLayout::FlatPlain, 0, 0);
        change(&mut inode);
        let mut draft = Draft::new(12, 2);
        draft.extended(80, inode, b"");
        defect(draft.open().inode(nid(80)))
    };
    assert_eq!(broken(&|inode| inode.mode = 0o644), Defect::Mode(0o644));
    assert_eq!(broken(&|inode| inode.format = InodeFormat(0x21)), Defect::InodeFormat(0x21));
    assert_eq!(broken(&|inode| inode.format = InodeFormat(0xb)), Defect::InodeFormat(0xb));
    assert_eq!(broken(&|inode| inode.size = 1 << 63), Defect::Size(1 << 63));
    assert_eq!(broken(&|inode| inode.mtime_nsec = u32::MAX), Defect::Nanoseconds(u32::MAX));
    let chunks = |inode: &mut ondisk::ExtendedInode| {
        inode.format = InodeFormat::new(true, DataLayout::ChunkBased, false);
        inode.u = 0x80;
    };
    assert_eq!(broken(&chunks), Defect::ChunkFormat(0x80));
}

#[test]
fn nids_that_lead_nowhere_are_refused() {
    let image = Draft::new(12, 2).open();
    assert!(matches!(defect(image.inode(nid(256))), Defect::OutOfBounds { .. }));
    assert!(matches!(defect(image.inode(nid(u64::MAX >> 6))), Defect::OutOfBounds { .. }));
    assert_eq!(defect(image.inode(nid(u64::MAX >> 1))), Defect::Overflow);
    assert_eq!(defect(image.inode(nid(1 << 63 | 80))), Defect::MetaboxNid(1 << 63 | 80));
    let mut draft = Draft::new(16, 1);
    draft.superblock.meta_block = u32::MAX;
    assert!(matches!(defect(draft.open().inode(nid(0))), Defect::OutOfBounds { .. }));
}

// ---- data ----

#[test]
fn plain_and_inline_data_are_read_to_the_byte() {
    for bits in [9, 12, 16] {
        let block = 1_usize << bits;
        for len in [0, 1, block - 1, block, block + 1, 2 * block + 100] {
            let data = pattern(len);
            let size = u32::try_from(len).unwrap();
            let first = 65_536 / block + 2;
            let mut draft = Draft::new(bits, u32::try_from(first + 8).unwrap());
            draft.compact(80, compact(FILE, DataLayout::FlatPlain, size, u32::try_from(first).unwrap()), b"");
            draft.put(first * block, &data);
            assert_eq!(content(&draft.open(), 80), data, "plain, {len} bytes, 2^{bits}");

            // The last block lies beside the inode; one that is full does not fit there.
            let tail = len.saturating_sub(1) / block * block;
            let fits = len - tail + 32 <= block;
            let mut draft = Draft::new(bits, u32::try_from(first + 8).unwrap());
            let at = ((first + 4) * block / 32) as u64;
            let inode = compact(FILE, DataLayout::FlatInline, size, u32::try_from(first).unwrap());
            draft.compact(at, inode, &data[tail..]);
            draft.put(first * block, &data[..tail]);
            let image = draft.open();
            if fits {
                assert_eq!(content(&image, at), data, "inline, {len} bytes, 2^{bits}");
            } else {
                let inode = image.inode(nid(at)).unwrap();
                assert_eq!(defect(image.read(&inode, 0, &mut vec![0; len])), Defect::InlineCrossesBlock);
            }
        }
    }
}

#[test]
fn reads_begin_and_end_anywhere() {
    let data = pattern(10_000);
    let mut draft = Draft::new(12, 6);
    draft.compact(64, compact(FILE, DataLayout::FlatInline, 10_000, 3), &data[8192..]);
    draft.put(3 * 4096, &data[..8192]);
    let image = draft.open();
    let inode = image.inode(nid(64)).unwrap();
    for (offset, len) in
        [(0, 10), (4090, 20), (8190, 4), (8192, 5000), (9999, 1), (9999, 100), (10_000, 5), (u64::MAX, 9)]
    {
        let mut buf = vec![0; len];
        let read = image.read(&inode, offset, &mut buf).unwrap();
        let start = usize::try_from(offset.min(10_000)).unwrap();
        assert_eq!(buf[..read], data[start..(start + len).min(10_000)], "{len} bytes from {offset}");
    }
}

#[test]
fn the_null_address_is_a_hole_in_as_many_bits_as_the_inode_has() {
    let mut draft = Draft::new(12, 2);
    draft.compact(80, compact(FILE, DataLayout::FlatPlain, 5000, u32::MAX), b"");
    let mut wide = extended(FILE, DataLayout::FlatPlain, 5000, u32::MAX);
    wide.nb = u16::MAX;
    draft.extended(82, wide, b"");
    let mut other = wide;
    other.nb = 0;
    draft.extended(84, other, b"");
    let image = draft.open();
    assert_eq!(content(&image, 80), vec![0; 5000]);
    assert_eq!(content(&image, 82), vec![0; 5000]);
    let inode = image.inode(nid(84)).unwrap();
    assert!(matches!(defect(image.read(&inode, 0, &mut [0; 10])), Defect::OutOfBounds { .. }));
}

#[test]
fn chunks_join_where_they_continue() {
    const HOLE: u64 = (1 << 48) - 1;
    let mut draft = Draft::new(12, 16);
    draft.chunked(80, 7 * 8192 + 5, 1, &[(0, 4), (0, 6), (0, HOLE), (0, HOLE), (0, 12), (0, 4), (0, 8), (0, 10)]);
    for block in 4..16_u8 {
        draft.put(usize::from(block) * 4096, &[block; 4096]);
    }
    let image = draft.open();
    let inode = image.inode(nid(80)).unwrap();
    let extents: Vec<_> = image
        .extents(&inode, ByteRange::to(u64::MAX))
        .map(Result::unwrap)
        .map(|extent| (extent.file.start() / 8192, extent.file.end().div_ceil(8192), extent.source))
        .collect();
    let data = |block: u64| ExtentSource::Data { device: 0, offset: block * 4096 };
    assert_eq!(
        extents,
        [(0, 2, data(4)), (2, 4, ExtentSource::Hole), (4, 5, data(12)), (5, 6, data(4)), (6, 8, data(8))]
    );
    let bytes = content(&image, 80);
    assert_eq!(bytes.len(), 7 * 8192 + 5);
    for (chunk, value) in [(0, 4), (1, 6), (2, 0), (3, 0), (4, 12), (5, 4), (6, 8), (7, 10)] {
        assert_eq!(bytes[chunk * 8192], value, "chunk {chunk}");
    }
    // In the middle of a chunk.
    let mut buf = [0; 2];
    assert_eq!(image.read(&inode, 8192 + 4095, &mut buf).unwrap(), 2);
    assert_eq!(buf, [6, 7]);
}

#[test]
fn block_maps_are_aligned_behind_attributes() {
    let mut draft = Draft::new(12, 8);
    let format = ChunkFormat::new(0, false, false);
    let mut inode = compact(FILE, DataLayout::ChunkBased, 3 * 4096, format.0.into());
    let area = xattr_area(0, &[], &[(1, b"abc", b"de")]);
    inode.xattr_count = xattr_count(area.len());
    let table: Vec<u8> = [5_u32, u32::MAX, 4].into_iter().flat_map(u32::to_le_bytes).collect();
    draft.compact(80, inode, &[area, table].concat());
    draft.put(4 * 4096, &[44; 4096]).put(5 * 4096, &[55; 4096]);
    let bytes = content(&draft.open(), 80);
    assert_eq!([bytes[0], bytes[4096], bytes[8192]], [55, 0, 44]);
}

#[test]
fn chunk_tables_that_are_not_there_cost_nothing() {
    let mut draft = Draft::new(12, 2);
    // A table of 2^51 entries.
    draft.chunked(80, i64::MAX as u64, 0, &[(0, 1)]);
    let image = draft.open();
    let inode = image.inode(nid(80)).unwrap();
    assert_eq!(image.read(&inode, 0, &mut [0; 4096]).unwrap(), 4096);
    assert!(matches!(defect(image.read(&inode, 1 << 40, &mut [0; 4096])), Defect::OutOfBounds { .. }));
    // Chunks of 2^43 bytes.
    draft.chunked(80, i64::MAX as u64, 31, &[(0, 1)]);
    let image = draft.open();
    let inode = image.inode(nid(80)).unwrap();
    assert!(matches!(defect(image.read(&inode, 1 << 42, &mut [0; 4096])), Defect::OutOfBounds { .. }));
    // An address beyond 64 bits.
    let mut draft = Draft::new(16, 2);
    draft.chunked(80, 100, 0, &[(0, (1 << 48) - 2)]);
    let image = draft.open();
    let inode = image.inode(nid(80)).unwrap();
    assert!(matches!(defect(image.read(&inode, 0, &mut [0; 10])), Defect::OutOfBounds { .. } | Defect::Overflow));
}

fn with_devices(devices: &[(u32, u32)]) -> Draft {
    let mut draft = Draft::new(12, 4);
    draft.superblock.feature_incompat = incompat::DEVICE_TABLE | incompat::CHUNKED_FILE;
    draft.superblock.extra_devices = u16::try_from(devices.len()).unwrap();
    draft.superblock.device_slot = 12;
    for (index, (flat_lo, blocks_lo)) in devices.iter().enumerate() {
        let mut tag = [0; 64];
        tag[..4].copy_from_slice(b"sha!");
        let slot =
            DeviceSlot { tag, blocks_lo: *blocks_lo, flat_lo: *flat_lo, blocks_hi: 9, flat_hi: 9, reserved: [0; 52] };
        draft.put(12 * 128 + index * 128, &slot.encode());
    }
    draft
}

#[test]
fn chunks_lie_on_separate_devices_or_in_the_flat_image() {
    let mut draft = with_devices(&[(4, 2), (6, 1), (0, 1)]);
    // Bits above those that count three devices do not matter.
    draft.chunked(80, 5 * 4096, 0, &[(1, 1), (2, 0), (0, 3), (0, 6), (0x8003, 0)]);
    draft.put(3 * 4096, &[3; 4096]);
    let separate = |fill: u8, blocks: usize| vec![fill; blocks * 4096];
    let devices = vec![separate(10, 2), separate(20, 1), separate(30, 1)];
    let image = Image::open_with_devices(draft.bytes(), devices).unwrap();
    let device = &image.devices()[0];
    assert_eq!((&*device.tag, device.blocks, device.flat_start), (&b"sha!"[..], 2, 4));
    let bytes = content(&image, 80);
    // The fourth chunk lies in the unified address space, where the second device is.
    assert_eq!([0, 1, 2, 3, 4].map(|chunk| bytes[chunk * 4096]), [10, 20, 3, 20, 30]);

    draft.chunked(80, 3 * 4096, 0, &[(1, 1), (2, 0), (0, 3)]);
    let mut flat = draft.bytes();
    flat.extend([separate(10, 2), separate(20, 1)].concat());
    let bytes = content(&Image::open(flat).unwrap(), 80);
    assert_eq!([0, 1, 2].map(|chunk| bytes[chunk * 4096]), [10, 20, 3]);

    let alone = draft.open();
    let inode = alone.inode(nid(80)).unwrap();
    assert!(matches!(alone.read(&inode, 0, &mut [0; 10]), Err(Error::DeviceMissing { device: 1, .. })));
    let none = Image::open_with_devices(draft.bytes(), vec![]);
    assert!(matches!(none, Err(Error::DeviceCount { expected: 3, given: 0 })));
}

#[test]
fn devices_that_are_not_in_the_table_are_refused() {
    let mut draft = with_devices(&[(4, 2), (6, 1)]);
    draft.chunked(80, 4096, 0, &[(3, 0)]);
    let image = draft.open();
    let inode = image.inode(nid(80)).unwrap();
    assert_eq!(defect(image.read(&inode, 0, &mut [0; 10])), Defect::NoSuchDevice { device: 3, devices: 2 });
    // A table that reaches out of the image.
    draft.superblock.extra_devices = u16::MAX;
    assert!(matches!(defect(Image::open(draft.bytes())), Defect::OutOfBounds { .. }));
}

#[test]
fn compressed_files_can_be_seen_but_not_read() {
    let mut draft = Draft::new(12, 2);
    draft.compact(80, compact(FILE, DataLayout::CompressedFull, 100, 1), b"");
    let image = draft.open();
    let inode = image.inode(nid(80)).unwrap();
    assert_eq!(inode.attributes().size, 100);
    assert!(matches!(image.read(&inode, 0, &mut [0; 10]), Err(Error::Compressed { nid: Nid(80) })));
}

// ---- symbolic links ----

#[test]
fn symlinks_are_read_and_bounded() {
    let mut draft = Draft::new(12, 3);
    let link = |layout, size, u| compact(FileKind::Symlink, layout, size, u);
    draft.compact(80, link(DataLayout::FlatInline, 6, 0), b"target");
    draft.compact(82, link(DataLayout::FlatPlain, 4095, 2), b"");
    draft.put(8192, &[b'y'; 4096]);
    draft.compact(84, link(DataLayout::FlatPlain, 4096, 2), b"");
    draft.compact(86, link(DataLayout::FlatInline, 0, 0), b"");
    draft.compact(88, link(DataLayout::FlatInline, 3, 0), b"a\0b");
    let image = draft.open();
    let read = |number| image.read_link(&image.inode(nid(number)).unwrap());
    assert_eq!(&*read(80).unwrap(), b"target");
    assert_eq!(&*read(82).unwrap(), [b'y'; 4095]);
    assert_eq!(defect(read(84)), Defect::SymlinkSize(4096));
    assert_eq!(defect(read(86)), Defect::SymlinkSize(0));
    assert_eq!(defect(read(88)), Defect::SymlinkNul);
    draft.compact(90, compact(FILE, DataLayout::FlatInline, 6, 0), b"target");
    let image = draft.open();
    let error = image.read_link(&image.inode(nid(90)).unwrap());
    assert!(matches!(error, Err(Error::WrongKind { wanted: "symbolic link", found: FILE, .. })));
}

// ---- directories ----

/// A directory of `blocks` blocks, `per_block` names each, in an image of that block size.
fn big_directory(bits: u8, dir_bits: u8, blocks: usize, per_block: usize) -> Draft {
    let dir_block_size = 1_usize << (bits + dir_bits);
    let base = (1_usize << bits).max(8192);
    let first = base >> bits;
    let mut draft = Draft::new(bits, u32::try_from(first + (blocks << dir_bits)).unwrap());
    draft.superblock.dir_block_bits = dir_bits;
    let mut size = 0;
    for block in 0..blocks {
        let names: Vec<_> = (0..per_block).map(|i| format!("name-{:06}", block * per_block + i)).collect();
        let mut entries: Vec<_> = names.iter().map(|name| (name.as_bytes(), 1000, 1)).collect();
        if block == 0 {
            // The dots stand where their bytes sort.
            entries[0] = (b"!first", 1001, 1);
            entries.splice(1..1, [(&b"."[..], 64, 2), (b"..", 64, 2)]);
        }
        let bytes = dir_block(&entries);
        assert!(bytes.len() <= dir_block_size);
        draft.put(base + block * dir_block_size, &bytes);
        size = block * dir_block_size + bytes.len();
    }
    let inode = compact(DIR, DataLayout::FlatPlain, u32::try_from(size).unwrap(), u32::try_from(first).unwrap());
    draft.compact(64, inode, b"");
    draft
}

#[test]
fn directories_of_any_size_are_listed_and_searched() {
    for (bits, dir_bits, blocks, per_block) in
        [(9, 0, 40, 15), (9, 3, 9, 100), (12, 0, 9, 150), (12, 4, 3, 2000), (16, 0, 3, 2000)]
    {
        let draft = big_directory(bits, dir_bits, blocks, per_block);
        let image = draft.open();
        let root = image.root_inode().unwrap();
        let entries = image.entries(&root).unwrap();
        assert_eq!(entries.len(), blocks * per_block);
        assert_eq!(entries[0].name.as_bytes(), b"!first");
        for entry in &entries {
            assert_eq!(image.lookup(&root, entry.name.as_bytes()).unwrap().as_ref(), Some(entry));
        }
        for absent in [&b"name-"[..], b"name-000001x", b"zzz", b"\x01", b".", b"..", b"", b"a/b", b"name-000000"] {
            assert_eq!(image.lookup(&root, absent).unwrap(), None, "{absent:?}");
        }
        // In pages, from any one on.
        let mut paged = Vec::new();
        let mut next = Some(0);
        while let Some(from) = next {
            let page = image.read_dir(&root, from).unwrap();
            paged.extend(page.entries);
            next = page.next;
        }
        assert_eq!(paged, entries);
        assert_eq!(image.read_dir(&root, 1 << 60).unwrap().entries, []);
    }
}

#[test]
fn the_type_of_an_entry_may_be_unknown() {
    let mut draft = Draft::new(12, 2);
    let block = dir_block(&[(b"a", 1, 0), (b"b", 2, 7), (b"c", 3, 99)]);
    draft.compact(64, compact(DIR, DataLayout::FlatInline, u32::try_from(block.len()).unwrap(), 0), &block);
    let image = draft.open();
    let entries = image.entries(&image.root_inode().unwrap()).unwrap();
    let kinds: Vec<_> = entries.iter().map(|entry| entry.kind).collect();
    assert_eq!(kinds, [None, Some(FileKind::Symlink), None]);
}

#[test]
fn directory_blocks_that_lie_are_refused() {
    let list = |block: &[u8]| {
        let mut draft = Draft::new(12, 2);
        draft.compact(64, compact(DIR, DataLayout::FlatInline, u32::try_from(block.len()).unwrap(), 0), block);
        let image = draft.open();
        image.entries(&image.root_inode().unwrap())
    };
    let good = dir_block(&[(b"a", 1, 1), (b"b", 2, 1)]);
    assert_eq!(list(&good).unwrap().len(), 2);
    let patched = |at: usize, value: u16| {
        let mut block = good.clone();
        block[at..at + 2].copy_from_slice(&value.to_le_bytes());
        list(&block)
    };
    for (at, value) in [(8, 0), (8, 11), (8, 23), (8, 36), (8, 60_000), (20, 24), (20, 0), (20, 26), (20, 65_535)] {
        assert_eq!(defect(patched(at, value)), Defect::NameOffsets { block: 0 }, "{value} at {at}");
    }
    assert_eq!(defect(list(&good[..20])), Defect::NameOffsets { block: 0 });
    assert_eq!(defect(list(&good[..3])), Defect::NameOffsets { block: 0 });
    assert_eq!(defect(list(&dir_block(&[(b"a", 1, 1), (b"\0", 2, 1)]))), Defect::NameOffsets { block: 0 });
    assert_eq!(defect(list(&dir_block(&[(b"b", 1, 1), (b"a", 2, 1)]))), Defect::Unsorted("a".into()));
    assert_eq!(defect(list(&dir_block(&[(b"a", 1, 1), (b"a", 2, 1)]))), Defect::Unsorted("a".into()));
    assert_eq!(defect(list(&dir_block(&[(b"a/b", 1, 1)]))), Defect::Name(NameError::Separator("a/b".into())));
    assert_eq!(
        defect(list(&dir_block(&[(b"a\0b", 1, 1), (b"c", 1, 1)]))),
        Defect::Name(NameError::Separator("a\0b".into()))
    );
    assert_eq!(defect(list(&dir_block(&[(&[b'n'; 256], 1, 1)]))), Defect::Name(NameError::TooLong(256)));
    assert_eq!(defect(list(&dir_block(&[(b"m", 1 << 63, 1)]))), Defect::MetaboxNid(1 << 63));
    // The last name ends at a NUL or with the block.
    assert_eq!(list(&[&good[..], b"c\0rest"].concat()).unwrap()[1].name.as_bytes(), b"bc");
}

#[test]
fn directories_larger_than_the_image_are_refused() {
    let mut draft = Draft::new(12, 2);
    draft.compact(64, compact(DIR, DataLayout::FlatPlain, u32::MAX, 0), b"");
    let image = draft.open();
    let root = image.root_inode().unwrap();
    let size = u32::MAX.into();
    assert_eq!(defect(image.entries(&root)), Defect::DirectorySize { size });
    assert_eq!(defect(image.lookup(&root, b"a")), Defect::DirectorySize { size });
}

#[test]
fn the_same_block_again_and_again_ends_a_listing() {
    let mut draft = Draft::new(12, 64);
    draft.chunked(64, 60 * 4096, 0, &[(0, 2); 60]);
    let position = draft.position(64);
    draft.put(position + 4, &(DIR.mode_bits() | 0o755).to_le_bytes());
    draft.put(2 * 4096, &dir_block(&[(b"a", 1, 1), (b"b", 1, 1)]));
    let image = draft.open();
    assert_eq!(defect(image.entries(&image.root_inode().unwrap())), Defect::Unsorted("a".into()));
}

#[test]
fn only_directories_are_listed() {
    let mut draft = Draft::new(12, 2);
    draft.compact(64, compact(FILE, DataLayout::FlatInline, 3, 0), b"abc");
    let image = draft.open();
    assert!(matches!(image.root_inode(), Err(Error::WrongKind { wanted: "directory", found: FILE, .. })));
}

// ---- attributes ----

fn xattr(name: &[u8], value: &[u8]) -> Xattr {
    Xattr { name: name.into(), value: value.into() }
}

/// An image whose inode 80 has this attribute area, and shared attributes from byte 4096 on.
fn with_xattrs(area: &[u8], shared: &[u8]) -> Draft {
    let mut draft = Draft::new(12, 3);
    draft.superblock.xattr_block = 1;
    let mut inode = compact(FILE, DataLayout::FlatPlain, 0, 0);
    inode.xattr_count = xattr_count(area.len());
    draft.compact(80, inode, area);
    draft.put(4096, shared);
    draft
}

#[test]
fn attributes_are_read_from_both_places_under_full_names() {
    let large = vec![9; 3000];
    let first = xattr_entry(6, b"capability", b"cap");
    let second = xattr_entry(4, b"overlay.opaque", b"y");
    let third = xattr_entry(1, b"large", &large);
    let id = |bytes: usize| u32::try_from(bytes / 4).unwrap();
    let area = xattr_area(
        0,
        &[0, id(first.len()), id(first.len() + second.len())],
        &[
            (1, b"b", b"inline"),
            (2, b"", b"acl"),
            (3, b"", b""),
            (5, b"lustre", b"hidden"),
            (0, b"x", b"none"),
            (9, b"y", b""),
        ],
    );
    let draft = with_xattrs(&area, &[first, second, third].concat());
    let image = draft.open();
    let inode = image.inode(nid(80)).unwrap();
    assert!(inode.has_xattrs());
    let expected = [
        xattr(b"security.capability", b"cap"),
        xattr(b"system.posix_acl_access", b"acl"),
        xattr(b"system.posix_acl_default", b""),
        xattr(b"trusted.overlay.opaque", b"y"),
        xattr(b"user.b", b"inline"),
        xattr(b"user.large", &large),
    ];
    assert_eq!(image.xattrs(&inode).unwrap(), expected);
    for Xattr { name, value } in &expected {
        assert_eq!(image.xattr(&inode, name).unwrap().as_ref(), Some(value));
    }
    for absent in [&b"user.c"[..], b"user.", b"lustre.lustre", b"x", b""] {
        assert_eq!(image.xattr(&inode, absent).unwrap(), None, "{absent:?}");
    }
}

#[test]
fn of_two_attributes_with_one_name_the_first_counts() {
    let area = xattr_area(0, &[0], &[(1, b"a", b"inline"), (1, b"a", b"again")]);
    let image = with_xattrs(&area, &xattr_entry(1, b"a", b"shared")).open();
    let inode = image.inode(nid(80)).unwrap();
    assert_eq!(image.xattrs(&inode).unwrap(), [xattr(b"user.a", b"inline")]);
    assert_eq!(image.xattr(&inode, b"user.a").unwrap().as_deref(), Some(&b"inline"[..]));
}

#[test]
fn long_prefixes_complete_names() {
    let prefixes: Vec<u8> = [&b"\x04\0\x04ovl"[..], b"\0\0", b"\x01\0\x01", b"\0"].concat();
    let area = xattr_area(0, &[], &[(0x80, b".x", b"1"), (0x81, b"y", b"2"), (0x82, b"z", b"no such prefix")]);
    let expected = [xattr(b"trusted.ovl.x", b"1"), xattr(b"user.y", b"2")];

    // In the image itself.
    let mut draft = with_xattrs(&area, b"");
    draft.superblock.feature_incompat = incompat::XATTR_PREFIXES;
    draft.superblock.feature_compat |= compat::PLAIN_XATTR_PFX;
    draft.superblock.xattr_prefix_count = 2;
    draft.superblock.xattr_prefix_start = 8192 / 4;
    draft.put(8192, &prefixes);
    let image = draft.open();
    assert_eq!(image.xattrs(&image.inode(nid(80)).unwrap()).unwrap(), expected);

    // In the packed inode.
    let mut packed = with_xattrs(&area, b"");
    packed.superblock.feature_incompat = incompat::XATTR_PREFIXES | incompat::FRAGMENTS;
    packed.superblock.xattr_prefix_count = 2;
    packed.superblock.xattr_prefix_start = 1;
    packed.superblock.packed_nid = 100;
    let data = [&b"skip"[..], &prefixes].concat();
    packed.compact(100, compact(FILE, DataLayout::FlatInline, u32::try_from(data.len()).unwrap(), 0), &data);
    let image = packed.open();
    assert_eq!(image.xattrs(&image.inode(nid(80)).unwrap()).unwrap(), expected);

    // Cut off, empty, too long.
    packed.compact(100, compact(FILE, DataLayout::FlatInline, 13, 0), &data);
    assert_eq!(defect(Image::open(packed.bytes())), Defect::XattrOverrun);
    draft.put(8192, &[0, 0]);
    assert_eq!(defect(Image::open(draft.bytes())), Defect::PrefixLength(0));
    draft.put(8192, &[1, 1]);
    assert_eq!(defect(Image::open(draft.bytes())), Defect::PrefixLength(257));
}

#[test]
fn the_name_filter_is_believed_where_it_is_defined() {
    let bit = xattr_filter_bit(1, b"a");
    let area = xattr_area(1 << bit, &[], &[(1, b"a", b"here")]);
    let mut draft = with_xattrs(&area, b"");
    let find = |draft: &Draft| {
        let image = draft.open();
        let found = image.xattr(&image.inode(nid(80)).unwrap(), b"user.a").unwrap();
        found.is_some()
    };
    assert!(find(&draft));
    draft.superblock.feature_compat |= compat::XATTR_FILTER;
    assert!(!find(&draft));
    draft.superblock.xattr_filter_reserved = 1;
    assert!(find(&draft));
}

#[test]
fn attributes_that_reach_out_are_refused() {
    let all = |area: &[u8], shared: &[u8]| {
        let image = with_xattrs(area, shared).open();
        image.xattrs(&image.inode(nid(80)).unwrap())
    };
    // A header alone is no attribute.
    assert_eq!(all(&xattr_area(0, &[], &[]), b"").unwrap(), []);
    let mut area = xattr_area(0, &[], &[(1, b"ab", b"cd")]);
    area[14] = 3;
    assert_eq!(defect(all(&area, b"")), Defect::XattrOverrun);
    let mut area = xattr_area(0, &[], &[(1, b"ab", b"cd")]);
    area[4] = 3;
    assert_eq!(defect(all(&area, b"")), Defect::XattrOverrun);
    // Shared ones outside of the image, or reaching out of it.
    assert!(matches!(defect(all(&xattr_area(0, &[u32::MAX], &[]), b"")), Defect::OutOfBounds { .. }));
    let mut last = vec![0; 8192 - 4];
    last.extend([200, 1, 255, 255]);
    assert!(matches!(defect(all(&xattr_area(0, &[2047], &[]), &last)), Defect::OutOfBounds { .. }));
    // Names that cannot be.
    let long = [b'n'; 255];
    assert!(matches!(defect(all(&xattr_area(0, &[], &[(1, &long, b"")]), b"")), Defect::XattrName(_)));
    assert!(matches!(defect(all(&xattr_area(0, &[], &[(1, b"a\0b", b"")]), b"")), Defect::XattrName(_)));
    // An area larger than the image.
    let mut draft = Draft::new(12, 2);
    let mut inode = compact(FILE, DataLayout::FlatPlain, 0, 0);
    inode.xattr_count = u16::MAX;
    draft.compact(80, inode, b"");
    let image = draft.open();
    assert!(matches!(defect(image.xattrs(&image.inode(nid(80)).unwrap())), Defect::OutOfBounds { .. }));
}

#[test]
fn every_known_prefix_is_shown_or_hidden_on_purpose() {
    let hidden: Vec<_> =
        XATTR_PREFIXES.iter().filter(|(index, _)| ondisk::visible_xattr_prefix(*index).is_none()).collect();
    assert_eq!(hidden, [&(5, &b"lustre."[..])]);
}

// ---- absence ----

/// Bytes of which blocks are missing until they were asked for.
struct Lazy {
    bytes: Vec<u8>,
    present: Mutex<Vec<bool>>,
}

impl Lazy {
    const BLOCK: usize = 512;

    fn new(bytes: Vec<u8>) -> Self {
        let blocks = bytes.len().div_ceil(Self::BLOCK);
        Self { bytes, present: Mutex::new(vec![false; blocks]) }
    }

    fn fetch(&self, range: ByteRange) {
        let blocks = usize::try_from(range.start()).unwrap() / Self::BLOCK
            ..usize::try_from(range.end()).unwrap().div_ceil(Self::BLOCK);
        self.present.lock().unwrap()[blocks].fill(true);
    }
}

impl ReadAt for Lazy {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
        self.bytes.read_exact_at(offset, buf)?;
        let start = usize::try_from(offset).unwrap();
        let blocks = start / Self::BLOCK..(start + buf.len()).div_ceil(Self::BLOCK);
        match blocks.clone().find(|block| !self.present.lock().unwrap()[*block]) {
            None => Ok(()),
            Some(block) => {
                let first = (block * Self::BLOCK) as u64;
                Err(ReadAtError::Absent(ByteRange::new(first, (first + 512).min(self.size())).unwrap()))
            }
        }
    }
}

/// Runs an operation until nothing is missing. It must never need the same bytes twice.
#[track_caller]
fn persist<T>(source: &Lazy, operation: impl Fn() -> Result<T, Error>) -> T {
    loop {
        match operation() {
            Ok(value) => return value,
            Err(Error::Absent { device: 0, range }) => {
                let block = usize::try_from(range.start()).unwrap() / Lazy::BLOCK;
                assert!(!source.present.lock().unwrap()[block], "{range} was fetched before");
                source.fetch(range);
            }
            Err(other) => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_is_absent_is_named_and_the_operation_run_again() {
    let mut draft = big_directory(9, 0, 40, 15);
    draft.superblock.xattr_block = 5;
    draft.put(5 * 512, &xattr_entry(1, b"shared", &[5; 1500]));
    let mut inode = compact(FileKind::Symlink, DataLayout::FlatInline, 300, 0);
    let area = xattr_area(0, &[0], &[(1, b"inline", &[6; 100])]);
    inode.xattr_count = xattr_count(area.len());
    // Begins in one block and ends in the next one.
    let at = (8192 + 41 * 512) / 32 + 12;
    draft.compact(at, inode, &[area, vec![b't'; 300]].concat());
    let whole = draft.open();
    let link = whole.inode(nid(at)).unwrap();

    let lazy = Lazy::new(draft.bytes());
    let image = persist(&lazy, || Image::open(&lazy));
    let root = persist(&lazy, || image.root_inode());
    let found = persist(&lazy, || image.lookup(&root, b"name-000333")).unwrap();
    assert_eq!(found.name.as_bytes(), b"name-000333");
    let fetched = lazy.present.lock().unwrap().iter().filter(|present| **present).count();
    assert!(fetched <= 12, "a search by halves fetched {fetched} blocks");
    assert_eq!(persist(&lazy, || image.entries(&root)), whole.entries(&whole.root_inode().unwrap()).unwrap());
    assert_eq!(persist(&lazy, || image.inode(nid(at))), link);
    assert_eq!(persist(&lazy, || image.xattrs(&link)), whole.xattrs(&link).unwrap());
    assert_eq!(&*persist(&lazy, || image.read_link(&link)), [b't'; 300]);
}

// ---- the verifier and the dump ----

fn finding(path: &str, number: u64, problem: Problem) -> (String, Option<Nid>, Problem) {
    (path.to_owned(), Some(nid(number)), problem)
}

#[track_caller]
fn findings(draft: &mut Draft, inodes: u64) -> Vec<(String, Option<Nid>, Problem)> {
    draft.superblock.inodes = inodes;
    let report = check(&draft.open()).unwrap();
    report.findings.into_iter().map(|finding| (finding.path, finding.nid, finding.problem)).collect()
}

fn small() -> Draft {
    let mut draft = Draft::new(12, 4);
    draft.root(&[(b"dir", 80, DIR), (b"file", 100, FILE)]);
    draft.directory(80, &[(b".", 80, DIR), (b"..", 64, DIR), (b"link", 110, FileKind::Symlink)]);
    draft.compact(100, compact(FILE, DataLayout::FlatPlain, 5000, 2), b"");
    draft.compact(110, compact(FileKind::Symlink, DataLayout::FlatInline, 4, 0), b"file");
    draft
}

#[test]
fn nothing_is_found_in_a_good_image() {
    let mut draft = small();
    assert_eq!(findings(&mut draft, 4), []);
    let report = check(&draft.open()).unwrap();
    assert_eq!((report.inodes, report.directories, report.content, report.more), (4, 2, 5000, 0));
}

#[test]
fn everything_wrong_is_found_with_its_place() {
    type Case = (&'static str, fn(&mut Draft), Vec<(String, Option<Nid>, Problem)>);
    let range = |start, end| ByteRange::new(start, end).unwrap();
    let cases: Vec<Case> = vec![
        ("count of inodes", |_| {}, vec![(String::new(), None, Problem::InodeCount { found: 3, counted: 4 })]),
        (
            "a loop to the root",
            |draft| {
                draft.directory(80, &[(b".", 80, DIR), (b"..", 64, DIR), (b"again", 64, DIR)]);
            },
            vec![
                finding("/dir/again", 64, Problem::DirectoryTwice("/".into())),
                finding("/dir", 80, Problem::LinkCount { found: 3, counted: 2 }),
            ],
        ),
        (
            "a directory in itself",
            |draft| {
                draft.directory(80, &[(b".", 80, DIR), (b"..", 64, DIR), (b"self", 80, DIR)]);
            },
            vec![
                finding("/dir/self", 80, Problem::DirectoryTwice("/dir".into())),
                finding("/dir", 80, Problem::LinkCount { found: 3, counted: 2 }),
            ],
        ),
        (
            "names that are none, and not sorted",
            |draft| {
                draft.directory(
                    80,
                    &[(b".", 80, DIR), (b"..", 64, DIR), (b"b/c", 110, FileKind::Symlink), (b"a", 100, FILE)],
                );
            },
            vec![
                finding("/dir/b/c", 80, Problem::Defect(NameError::Separator("b/c".into()).into())),
                finding("/dir", 80, Problem::Defect(Defect::Unsorted("a".into()))),
                finding("/file", 100, Problem::LinkCount { found: 1, counted: 2 }),
            ],
        ),
        (
            "dots that lead astray or are missing",
            |draft| {
                draft.directory(80, &[(b"..", 80, DIR), (b"link", 110, FileKind::Symlink)]);
            },
            vec![
                finding("/dir", 80, Problem::DotWrong { name: "..", found: 80, expected: 64 }),
                finding("/dir", 80, Problem::DotMissing(".")),
            ],
        ),
        (
            "types that differ",
            |draft| {
                draft.directory(80, &[(b".", 80, DIR), (b"..", 64, DIR), (b"link", 110, FILE)]);
            },
            vec![finding("/dir/link", 110, Problem::FileType { listed: 1, found: FileKind::Symlink })],
        ),
        (
            "data behind the end",
            |draft| {
                draft.compact(100, compact(FILE, DataLayout::FlatPlain, 5000, 3), b"");
            },
            vec![finding(
                "/file",
                100,
                Problem::Defect(Defect::OutOfBounds { range: range(12_288, 17_288), size: 16_384 }),
            )],
        ),
        (
            "data over metadata",
            |draft| {
                draft.compact(100, compact(FILE, DataLayout::FlatPlain, 3000, 0), b"");
            },
            vec![
                (
                    String::new(),
                    None,
                    Problem::Overlap { device: 0, range: range(1024, 1152), other: "data of inode 100".into() },
                ),
                finding(
                    "/",
                    64,
                    Problem::Overlap { device: 0, range: range(2048, 2080), other: "data of inode 100".into() },
                ),
                finding(
                    "/",
                    64,
                    Problem::Overlap { device: 0, range: range(2080, 2138), other: "data of inode 100".into() },
                ),
                finding(
                    "/dir",
                    80,
                    Problem::Overlap { device: 0, range: range(2560, 2592), other: "data of inode 100".into() },
                ),
                finding(
                    "/dir",
                    80,
                    Problem::Overlap { device: 0, range: range(2592, 2635), other: "data of inode 100".into() },
                ),
            ],
        ),
        (
            "a chunk over metadata",
            |draft| {
                draft.chunked(100, 3000, 0, &[(0, 0)]);
            },
            vec![finding(
                "/file",
                100,
                Problem::Overlap { device: 0, range: range(1024, 1152), other: "the superblock".into() },
            )],
        ),
        (
            "a chunk over a directory",
            |draft| {
                draft.compact(80, compact(DIR, DataLayout::FlatPlain, 43, 3), b"");
                draft.put(3 * 4096, &dir_block(&[(b".", 80, 2), (b"..", 64, 2), (b"link", 110, 7)]));
                draft.chunked(100, 4000, 0, &[(0, 3)]);
            },
            vec![finding(
                "/file",
                100,
                Problem::Overlap { device: 0, range: range(12_288, 12_331), other: "inode 80".into() },
            )],
        ),
        (
            "a chunk table that is not there",
            |draft| {
                draft.chunked(100, 1 << 40, 0, &[(0, 2)]);
            },
            vec![finding(
                "/file",
                100,
                Problem::Defect(Defect::OutOfBounds { range: range(3264, 3264 + (8 << 28)), size: 16_384 }),
            )],
        ),
        (
            "an inode that is none",
            |draft| {
                draft.put(110 * 32, &[0xff; 32]);
            },
            vec![finding("/dir/link", 110, Problem::Defect(Defect::InodeFormat(0xffff)))],
        ),
        (
            "compression",
            |draft| {
                draft.compact(100, compact(FILE, DataLayout::CompressedCompact, 5000, 2), b"");
            },
            vec![finding("/file", 100, Problem::Compressed)],
        ),
        (
            "a symlink that is none",
            |draft| {
                draft.compact(110, compact(FileKind::Symlink, DataLayout::FlatInline, 0, 0), b"");
            },
            vec![finding("/dir/link", 110, Problem::Defect(Defect::SymlinkSize(0)))],
        ),
        (
            "fewer bytes than blocks",
            |draft| draft.superblock.blocks_lo = 5,
            vec![(String::new(), None, Problem::Truncated { expected: 20_480, found: 16_384 })],
        ),
    ];
    for (name, change, expected) in cases {
        let mut draft = small();
        change(&mut draft);
        // Only the first case has the wrong number; a broken inode is not counted.
        assert_eq!(findings(&mut draft, if name == "count of inodes" { 3 } else { 4 }), expected, "{name}");
    }
    let shown = check(&small().open()).unwrap().findings[0].to_string();
    assert_eq!(shown, "image (byte 1024): the superblock counts 0 inodes, but there are 4");
}

#[test]
fn deep_trees_are_walked_in_linear_work() {
    // A chain of directories, one slot of 96 bytes each.
    const DEPTH: u64 = 20_000;
    let mut draft = Draft::new(12, 1);
    for level in 0..DEPTH {
        let this = 64 + level * 4;
        let parent = if level == 0 { 64 } else { this - 4 };
        let entries = [(&b"."[..], this, DIR), (b"..", parent, DIR), (b"d", this + 4, DIR)];
        draft.directory(this, if level + 1 == DEPTH { &entries[..2] } else { &entries });
    }
    assert_eq!(findings(&mut draft, DEPTH), []);
    // The path of something wrong at the bottom is told by its end.
    let bottom = draft.position(64 + (DEPTH - 1) * 4);
    draft.put(bottom + 6, &9_u16.to_le_bytes());
    let found = findings(&mut draft, DEPTH);
    assert_eq!(found.len(), 1);
    assert!(found[0].0.starts_with(".../d/d/d") && found[0].0.len() < 5000, "{}", found[0].0.len());
}

#[test]
fn structures_over_each_other_are_not_read_over_and_over() {
    // Every name leads to another slot, and every slot claims the rest of the image as its attributes.
    let mut draft = Draft::new(12, 64);
    let names: Vec<_> = (0..200_u64).map(|i| (format!("{i:04}"), 2048 + i * 4)).collect();
    let mut entries: Vec<_> = names.iter().map(|(name, nid)| (name.as_bytes(), *nid, 1)).collect();
    entries.splice(0..0, [(&b"."[..], 64, 2), (b"..", 64, 2)]);
    let block = dir_block(&entries);
    draft.compact(64, compact(DIR, DataLayout::FlatPlain, u32::try_from(block.len()).unwrap(), 1), b"");
    draft.put(4096, &block);
    for (_, nid) in &names {
        let mut inode = compact(FILE, DataLayout::FlatPlain, 0, 0);
        inode.xattr_count = 40_000;
        draft.compact(*nid, inode, b"");
    }
    struct Counting(Vec<u8>, Mutex<usize>);
    impl ReadAt for Counting {
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
            *self.1.lock().unwrap() += buf.len();
            self.0.read_exact_at(offset, buf)
        }
    }
    let source = Counting(draft.bytes(), Mutex::new(0));
    let report = check(&Image::open(&source).unwrap()).unwrap();
    assert!(report.findings.len() >= 199);
    let read = *source.1.lock().unwrap();
    assert!(read < 3 * source.0.len(), "{read} bytes of {} were read", source.0.len());
}

#[test]
fn findings_are_limited() {
    let mut draft = Draft::new(16, 4);
    let names: Vec<_> = (0..3000).map(|i| format!("{i:04}")).collect();
    let mut entries: Vec<_> = names.iter().map(|name| (name.as_bytes(), u64::MAX >> 1, 1)).collect();
    entries.splice(0..0, [(&b"."[..], 64, 2), (b"..", 64, 2)]);
    let block = dir_block(&entries);
    draft.compact(64, compact(DIR, DataLayout::FlatPlain, u32::try_from(block.len()).unwrap(), 1), b"");
    draft.put(1 << 16, &block);
    let report = check(&draft.open()).unwrap();
    assert_eq!((report.findings.len(), report.more), (MAX_FINDINGS, 3000 - MAX_FINDINGS as u64));
}

#[test]
fn a_dump_tells_everything() {
    let mut draft = small();
    draft.superblock.inodes = 4;
    draft.superblock.volume_name[..5].copy_from_slice(b"hello");
    let area = xattr_area(0, &[], &[(1, b"k\n", b"\x00v")]);
    let mut inode = extended(FILE, DataLayout::FlatPlain, 5000, 2);
    inode.xattr_count = xattr_count(area.len());
    inode.mtime = 7;
    inode.mtime_nsec = 8;
    inode.nlink = 2;
    draft.extended(104, inode, &area);
    draft.root(&[(b"dir", 80, DIR), (b"file", 104, FILE), (b"null", 100, FileKind::CharDevice), (b"same", 104, FILE)]);
    draft.compact(100, compact(FileKind::CharDevice, DataLayout::FlatPlain, 0, 0x103), b"");
    let mut text = Vec::new();
    dump(&draft.open(), &mut text).unwrap();
    let expected = "\
block-size 4096
directory-block-size 4096
blocks 4
inodes 4
root 64
epoch 0.000000000
build-time 0
metadata-block 0
xattr-block 0
uuid 00000000000000000000000000000000
name hello
compatible sb_chksum
incompatible 
/ nid=64 at=0x800 compact inline 040644 0:0 0.000000000 links=3 size=90
  0..90 at 0:0x820
/dir nid=80 at=0xa00 compact inline 040644 0:0 0.000000000 links=2 size=43
  0..43 at 0:0xa20
/dir/link nid=110 at=0xdc0 compact inline 120644 0:0 0.000000000 links=1 size=4 -> file
  0..4 at 0:0xde0
/file nid=104 at=0xd00 extended plain 100644 0:0 7.000000008 links=2 size=5000
  user.k\\n = \\x00v
  0..5000 at 0:0x2000
/null nid=100 at=0xc80 compact plain 020644 0:0 0.000000000 links=1 size=0 rdev=1:3
/same nid=104 as before
";
    assert_eq!(String::from_utf8(text).unwrap(), expected);
}

#[test]
fn the_default_superblock_is_empty() {
    assert_eq!(RawSuperblock::default().encode(), [0; 128]);
}
