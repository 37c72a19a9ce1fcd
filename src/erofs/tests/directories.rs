//! Symbolic links and directories.

use super::*;

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
