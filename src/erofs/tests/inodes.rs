//! The superblock and inodes.

use super::*;

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
