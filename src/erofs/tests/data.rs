//! Contents of files: plain, inline, holes, chunks, devices.

use super::*;

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
