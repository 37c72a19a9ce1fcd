//! The verifier and the dump.

use super::*;

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
