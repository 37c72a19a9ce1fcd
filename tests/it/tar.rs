//! The tar reader against archives of our own writer, correct and broken, and of other programs (`archivers`).

mod archivers;

use std::io::Read;

use headstart::model::{DeviceNumber, EntryKind, LayerEntry, Metadata, RelPath, Timestamp};
use headstart::tar::{self, Part, Problem, Reader, Run, TarError};
use headstart::testkit::layers::{Layer, Marks, Piece, layer_tars};
use headstart::testkit::tar::{BLOCK, Magic, RawHeader, TarWriter};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

/// All entries with their contents.
fn read_all(source: impl Read) -> Result<Vec<(LayerEntry, Vec<u8>)>, TarError> {
    let mut reader = Reader::new(source);
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        let mut content = Vec::new();
        let mut buf = [0; 700];
        loop {
            match reader.read_body(&mut buf)? {
                0 => break,
                read => content.extend_from_slice(&buf[..read]),
            }
        }
        match entry.kind {
            EntryKind::Regular { size } => assert_eq!(content.len() as u64, size, "{}", entry.path),
            _ => assert!(content.is_empty(), "{}", entry.path),
        }
        entries.push((entry, content));
    }
    assert_eq!(reader.next_entry()?, None, "the end is not the end");
    Ok(entries)
}

fn path(text: &str) -> RelPath {
    RelPath::parse(text.as_bytes()).expect("a test's path is a path")
}

fn one(tar: &[u8]) -> (LayerEntry, Vec<u8>) {
    let mut entries = read_all(tar).expect("this tar is whole");
    assert_eq!(entries.len(), 1, "{entries:?}");
    entries.pop().expect("there is one")
}

fn refused(tar: &[u8]) -> TarError {
    read_all(tar).expect_err("this tar is broken")
}

#[test]
fn types_flags_and_slashes() {
    let mut dir_v7 = RawHeader::new(0, "d/");
    dir_v7.magic = Magic::V7;
    let mut link = RawHeader::new(b'1', "l");
    link.link = b"./a/../b".to_vec();
    let mut symlink = RawHeader::new(b'2', "s");
    symlink.link = b"../../anywhere".to_vec();
    let mut char_device = RawHeader::new(b'3', "c");
    char_device.device = Some((4095, 1_048_575));
    let mut block_device = RawHeader::new(b'4', "b");
    block_device.device = Some((8, 17));
    let device = |major, minor| DeviceNumber { major, minor };
    for (header, name, kind) in [
        (dir_v7, "d", EntryKind::Directory),
        (RawHeader::new(0, "f"), "f", EntryKind::Regular { size: 0 }),
        (RawHeader::new(b'0', "./x//f"), "x/f", EntryKind::Regular { size: 0 }),
        (RawHeader::new(b'7', "/f"), "f", EntryKind::Regular { size: 0 }),
        (RawHeader::new(b'0', "a/../f"), "f", EntryKind::Regular { size: 0 }),
        (RawHeader::new(b'5', "./"), "", EntryKind::Directory),
        (RawHeader::new(b'5', "d"), "d", EntryKind::Directory),
        (RawHeader::new(b'6', "p"), "p", EntryKind::Fifo),
        (link, "l", EntryKind::HardLink { target: path("b") }),
        (symlink, "s", EntryKind::Symlink { target: (*b"../../anywhere").into() }),
        (char_device, "c", EntryKind::CharDevice(device(4095, 1_048_575))),
        (block_device, "b", EntryKind::BlockDevice(device(8, 17))),
        (RawHeader::new(b'0', "a/.wh.b"), "a/b", EntryKind::Whiteout),
        (RawHeader::new(b'5', ".wh.b/"), "b", EntryKind::Whiteout),
        (RawHeader::new(b'0', ".wh..wh..opq"), "", EntryKind::Opaque),
        (RawHeader::new(b'0', "a/.wh..wh..opq"), "a", EntryKind::Opaque),
        (RawHeader::new(b'0', "a/.wh...x"), "a/..x", EntryKind::Whiteout),
    ] {
        let tar = TarWriter::new().raw(&header, b"").finish();
        let (entry, _) = one(&tar);
        let permissions = match kind {
            EntryKind::Symlink { .. } => 0o777,
            EntryKind::HardLink { .. } | EntryKind::Whiteout | EntryKind::Opaque => 0,
            _ => 0o644,
        };
        assert_eq!((entry.path, entry.kind, entry.metadata.permissions), (path(name), kind, permissions), "{header:?}");
    }
}

#[test]
fn entries_of_aufs_and_global_headers_are_passed_over() {
    let tar = TarWriter::new()
        .sized(&RawHeader::new(b'g', "pax_global_header"), b"11 uid=123\n")
        .sized(&RawHeader::new(b'0', ".wh..wh.aufs"), &[1; 600])
        .raw(&RawHeader::new(b'5', ".wh..wh.plnk/"), b"")
        .sized(&RawHeader::new(b'0', ".wh..wh.plnk/1.2"), b"x")
        .sized(&RawHeader::new(b'0', ".wh.gone"), b"content of a whiteout")
        .sized(&RawHeader::new(b'0', "f"), b"hello")
        .finish();
    let mut reader = Reader::new(&tar[..]);
    assert_eq!(reader.next_entry().unwrap().unwrap().kind, EntryKind::Whiteout);
    assert_eq!((reader.next_run(), reader.read_body(&mut [0; 9]).unwrap()), (None, 0));
    let entry = reader.next_entry().unwrap().unwrap();
    assert_eq!((entry.path, entry.metadata.uid), (path("f"), 0));
    assert_eq!(reader.next_entry().unwrap(), None);
    assert_eq!(reader.dropped().aufs_entries, 3);
}

#[test]
fn numbers_beyond_octal() {
    let mut header = RawHeader::new(b'0', "f");
    (header.uid, header.gid, header.mtime) = (0xffff_fffe, 70_000, -1);
    header.mode = 0o107_755;
    header.magic = Magic::Gnu;
    let (entry, _) = one(&TarWriter::new().raw(&header, b"").finish());
    let mtime = Timestamp { seconds: -1, nanos: 0 };
    assert_eq!(
        entry.metadata,
        Metadata { permissions: 0o7755, uid: 0xffff_fffe, gid: 70_000, mtime, xattrs: Vec::new() }
    );
}

#[test]
fn pax_records_override_the_header() {
    let long = format!("{}/{}", "d".repeat(255), "é".repeat(127));
    let tar = TarWriter::new()
        .pax([
            (&b"path"[..], long.as_bytes()),
            (b"uid", b"4294967294"),
            (b"gid", b"3"),
            (b"mtime", b"-1.5"),
            (b"hdrcharset", b"BINARY"),
            (b"SCHILY.xattr.user.z", b"1\n2"),
            (b"SCHILY.xattr.security.capability", b"\x01\0\0\x02"),
            (b"LIBARCHIVE.xattr.user.y", b"AAE"),
            (b"SCHILY.acl.access", b"user::rwx,user:9:r-x,group::r-x,mask::r-x,other::---"),
            (b"size", b"3"),
        ])
        .raw(&RawHeader::new(b'0', "short"), b"abc")
        .sized(&RawHeader::new(b'0', "next"), b"n")
        .finish();
    let entries = read_all(&tar[..]).unwrap();
    let (entry, content) = &entries[0];
    assert_eq!(entry.path, path(&long));
    assert_eq!(content, b"abc");
    assert_eq!((entry.metadata.uid, entry.metadata.gid), (4_294_967_294, 3));
    assert_eq!(entry.metadata.mtime, Timestamp { seconds: -2, nanos: 500_000_000 });
    let names: Vec<&[u8]> = entry.metadata.xattrs.iter().map(|xattr| &xattr.name[..]).collect();
    assert_eq!(names, [&b"security.capability"[..], b"system.posix_acl_access", b"user.y", b"user.z"]);
    assert_eq!(&entry.metadata.xattrs[1].value[..12], b"\x02\0\0\0\x01\0\x07\0\xff\xff\xff\xff");
    assert_eq!(entries[1].0.path, path("next"), "records speak of one entry only");
    assert_eq!(entries[1].0.metadata.xattrs, []);
}

#[test]
fn devices_above_octal_come_from_pax() {
    let tar = TarWriter::new()
        .pax([(&b"SCHILY.devmajor"[..], &b"4095"[..]), (b"SCHILY.devminor", b"1048575")])
        .raw(&RawHeader::new(b'3', "c"), b"")
        .finish();
    assert_eq!(one(&tar).0.kind, EntryKind::CharDevice(DeviceNumber { major: 4095, minor: 1_048_575 }));
}

#[test]
fn unresolvable_acls_are_counted() {
    let tar = TarWriter::new()
        .pax([(&b"SCHILY.acl.access"[..], &b"user::rw-,user:lisa:r--,group::r--,mask::r--,other::r--"[..])])
        .raw(&RawHeader::new(b'0', "f"), b"")
        .finish();
    let mut reader = Reader::new(&tar[..]);
    assert_eq!(reader.next_entry().unwrap().unwrap().metadata.xattrs, []);
    let unresolved = &reader.dropped().unresolved_acls;
    assert_eq!((unresolved.count, &unresolved.first), (1, &Some(path("f"))));
}

#[test]
fn hard_links_may_have_a_size_and_may_have_content() {
    let mut link = RawHeader::new(b'1', "l");
    link.link = b"f".to_vec();
    let next = RawHeader::new(b'0', "next");
    for size in [1_usize, 511, 512, 513, 1024, 5000] {
        let content = vec![b'c'; size];
        let with_size = RawHeader { size: size as i128, ..link.clone() };
        // A size and no content: any writer, then a PAX writer.
        let plain = TarWriter::new().raw(&with_size, b"").sized(&next, b"n").finish();
        let pax = TarWriter::new().pax([(&b"mtime"[..], &b"1.5"[..])]).raw(&with_size, b"").sized(&next, b"n").finish();
        let last = TarWriter::new().pax([(&b"mtime"[..], &b"1.5"[..])]).raw(&with_size, b"").finish();
        let end = TarWriter::new().pax([(&b"mtime"[..], &b"1.5"[..])]).raw(&with_size, b"").unfinished();
        // A size and content.
        let data =
            TarWriter::new().pax([(&b"mtime"[..], &b"1.5"[..])]).raw(&with_size, &content).sized(&next, b"n").finish();
        for (tar, entries) in [(plain, 2), (pax, 2), (data, 2), (last, 1), (end, 1)] {
            let found = read_all(&tar[..]).unwrap();
            assert_eq!(found.len(), entries);
            assert_eq!(found[0].0.kind, EntryKind::HardLink { target: path("f") });
            if let Some((entry, content)) = found.get(1) {
                assert_eq!((&entry.path, &content[..]), (&path("next"), &b"n"[..]));
            }
        }
    }
}

#[test]
fn sparse_files_come_as_runs_in_every_spelling() {
    // 1 MiB hole, "abc" at 1 MiB, a hole, 600 bytes at 3 MiB, a hole to 20 GiB.
    const MIB: u64 = 1 << 20;
    let size = 20 << 30;
    let tail = vec![b't'; 600];
    let stored = [b"abc", &tail[..]].concat();
    let text = |n: u64| n.to_string().into_bytes();
    let list = format!("{MIB},3,{},600,{size},0", 3 * MIB).into_bytes();
    let mut map_lines = format!("3\n{MIB}\n3\n{}\n600\n{size}\n0\n", 3 * MIB).into_bytes();
    map_lines.resize(512, 0);
    let pieces = [number12(MIB), number12(3), number12(3 * MIB), number12(600)].concat();
    let mut old = RawHeader::new(b'S', "f");
    old.magic = Magic::Gnu;
    old.patches = vec![(386, pieces.clone()), (483, number12(size))];
    let mut extended = old.clone();
    extended.patches = vec![(386, pieces[..24].to_vec()), (482, vec![1]), (483, number12(size))];
    let mut extension = [0; 512];
    extension[..24].copy_from_slice(&pieces[24..]);
    let extended_size = RawHeader { size: 603, ..extended };
    let tars = [
        ("old", TarWriter::new().sized(&old, &stored).finish()),
        ("old extended", TarWriter::new().bytes(&extended_size.block()).bytes(&extension).raw_body(&stored)),
        (
            "0.0",
            TarWriter::new()
                .pax([
                    (&b"GNU.sparse.size"[..], &text(size)[..]),
                    (b"GNU.sparse.numblocks", b"2"),
                    (b"GNU.sparse.offset", &text(MIB)),
                    (b"GNU.sparse.numbytes", b"3"),
                    (b"GNU.sparse.offset", &text(3 * MIB)),
                    (b"GNU.sparse.numbytes", b"600"),
                ])
                .sized(&RawHeader::new(b'0', "f"), &stored)
                .finish(),
        ),
        (
            "0.1",
            TarWriter::new()
                .pax([
                    (&b"GNU.sparse.map"[..], &list[..]),
                    (b"GNU.sparse.size", &text(size)),
                    (b"GNU.sparse.name", b"f"),
                ])
                .sized(&RawHeader::new(b'0', "GNUSparseFile.0/f"), &stored)
                .finish(),
        ),
        (
            "1.0",
            TarWriter::new()
                .pax([
                    (&b"GNU.sparse.major"[..], &b"1"[..]),
                    (b"GNU.sparse.minor", b"0"),
                    (b"GNU.sparse.name", b"f"),
                    (b"GNU.sparse.realsize", &text(size)),
                ])
                .sized(&RawHeader::new(b'0', "GNUSparseFile.0/f"), &[&map_lines[..], &stored].concat())
                .finish(),
        ),
    ];
    for (name, tar) in tars {
        let mut reader = Reader::new(&tar[..]);
        let entry = reader.next_entry().unwrap().unwrap();
        assert_eq!((entry.path, entry.kind), (path("f"), EntryKind::Regular { size }), "{name}");
        let mut zeros = [9; 16];
        assert_eq!(reader.read_body(&mut zeros).unwrap(), 16);
        assert_eq!(zeros, [0; 16]);
        assert_eq!(reader.next_run(), Some(Run::Hole(MIB - 16)), "{name}");
        assert_eq!(reader.next_run(), Some(Run::Data(3)), "{name}");
        let mut data = [0; 16];
        assert_eq!(reader.read_body(&mut data[..1]).unwrap(), 1);
        assert_eq!(reader.next_run(), Some(Run::Data(2)), "{name}");
        assert_eq!(reader.read_body(&mut data[1..]).unwrap(), 2);
        assert_eq!(&data[..3], b"abc");
        assert_eq!(reader.next_run(), Some(Run::Hole(2 * MIB - 3)), "{name}");
        let mut whole = vec![0; 600];
        let mut filled = 0;
        while filled < 600 {
            filled += reader.read_body(&mut whole[filled..]).unwrap();
        }
        assert_eq!(whole, tail, "{name}");
        assert_eq!(reader.next_run(), Some(Run::Hole(size - 3 * MIB - 600)), "{name}");
        assert_eq!(reader.next_run(), None, "{name}");
        assert_eq!(reader.next_entry().unwrap(), None, "{name}");
    }
}

fn number12(value: u64) -> Vec<u8> {
    headstart::testkit::tar::number(value.into(), 12)
}

trait RawBody {
    fn raw_body(&mut self, body: &[u8]) -> Vec<u8>;
}

impl RawBody for TarWriter {
    fn raw_body(&mut self, body: &[u8]) -> Vec<u8> {
        let mut padded = body.to_vec();
        padded.resize(body.len().next_multiple_of(BLOCK), 0);
        self.bytes(&padded).finish()
    }
}

#[test]
fn ends_in_all_their_forms() {
    let file = RawHeader::new(b'0', "f");
    let whole = TarWriter::new().sized(&file, b"abc").finish();
    let len = whole.len();
    for (tar, what) in [
        (whole.clone(), "two blocks"),
        ([&whole[..], &[0; 10240]].concat(), "more zeros"),
        ([&whole[..], b"anything at all"].concat(), "garbage behind the end"),
        (whole[..len - 512].to_vec(), "one block"),
        (whole[..len - 1024].to_vec(), "no block"),
        (whole[..512 + 3].to_vec(), "no padding"),
    ] {
        assert_eq!(one(&tar).1, b"abc", "{what}");
    }
    assert_eq!(read_all(&b""[..]).unwrap(), []);
    assert_eq!(read_all(&[0; 1024][..]).unwrap(), []);
}

#[test]
fn broken_tars_are_refused_with_the_place() {
    let file = RawHeader::new(b'0', "f");
    let first = TarWriter::new().sized(&file, &[b'x'; 600]).unfinished();
    let after = |header: &RawHeader, body: &[u8]| TarWriter::new().bytes(&first).raw(header, body).finish();
    let named = |flag, name: &str| after(&RawHeader::new(flag, name), b"");
    let linked = |flag, link: &str| after(&RawHeader { link: link.into(), ..RawHeader::new(flag, "l") }, b"");
    let pax = |records: &[(&[u8], &[u8])]| {
        TarWriter::new().bytes(&first).pax(records.iter().copied()).sized(&file, b"").finish()
    };
    let mut damaged = TarWriter::new().bytes(&first).sized(&file, b"").finish();
    damaged[1536 + 3] ^= 1;
    let huge = RawHeader { size: i128::from(tar::MAX_RECORDS) + 1, ..RawHeader::new(b'x', "x") };
    let endless = RawHeader { size: (1 << 63), ..file.clone() };
    let cases: Vec<(Vec<u8>, u64, &str)> = vec![
        (first[..100].to_vec(), 100, "in the middle of a header"),
        (first[..600].to_vec(), 600, "in the middle of a file's content"),
        (damaged, 1536, "checksum"),
        (TarWriter::new().bytes(&first).bytes(&[b'z'; 512]).finish(), 1536, "checksum"),
        (TarWriter::new().bytes(&first).bytes(&[0; 512]).sized(&file, b"").finish(), 2048, "single block of zeros"),
        (named(b'V', "label"), 1536, "its type V"),
        (named(b'D', "dump"), 1536, "its type D"),
        (named(0xff, "x"), 1536, "its type \\xff"),
        (named(b'0', "../f"), 1536, "climbs out"),
        (named(b'0', "a/../../f"), 1536, "climbs out"),
        (named(b'0', "."), 1536, "root a regular file"),
        (named(b'0', ""), 1536, "root a regular file"),
        (named(b'0', ".wh."), 1536, "reserved"),
        (named(b'0', ".wh..."), 1536, "reserved"),
        (named(b'0', ".wh.a/b"), 1536, "reserved"),
        (linked(b'1', "../f"), 1536, "climbs out"),
        (linked(b'2', ""), 1536, "without a target"),
        (after(&huge, b""), 1536, "more than the"),
        (after(&endless, b""), 1536, "outside of what can be kept"),
        (after(&RawHeader { uid: 1 << 32, ..file.clone() }, b""), 1536, "its uid is 4294967296"),
        (after(&RawHeader { gid: -1, ..file.clone() }, b""), 1536, "its gid is -1"),
        (after(&RawHeader { patches: vec![(100, b"rwxr-xr-x".to_vec())], ..file.clone() }, b""), 1536, "mode"),
        (after(&RawHeader { device: Some((4096, 0)), ..RawHeader::new(b'3', "c") }, b""), 1536, "devmajor"),
        (pax(&[(b"uid", b"4294967295")]), 2560, "uid"),
        (pax(&[(b"size", b"18446744073709551615")]), 2560, "size"),
        (pax(&[(b"path", b"a\0b")]), 2560, "impossible"),
        (pax(&[(b"path", &[b'x'; 256])]), 2560, "impossible"),
        (pax(&[(b"path", &b"x/".repeat(2048))]), 6656, "path has 4096 bytes"),
        (pax(&[(b"mtime", b"yesterday")]), 1536, "mtime"),
        (pax(&[(b"SCHILY.xattr.", b"x")]), 2560, "attribute"),
        (pax(&[(b"SCHILY.xattr.user.x", &[0; 65_537])]), 68_096, "attribute"),
        (pax(&[(b"SCHILY.acl.access", b"nonsense")]), 2560, "ACL"),
        (pax(&[(b"GNU.sparse.major", b"2"), (b"GNU.sparse.minor", b"0")]), 2560, "version 2.0"),
        (pax(&[(b"GNU.sparse.map", b"0,1"), (b"GNU.sparse.size", b"5")]), 2560, "differ in length"),
        (pax(&[(b"GNU.sparse.map", b"0,0")]), 2560, "size is missing"),
        (TarWriter::new().bytes(&first).pax([(&b"path"[..], &b"x"[..])]).unfinished(), 2560, "last thing there is"),
        (TarWriter::new().bytes(&first).pax([(&b"path"[..], &b"x"[..])]).finish(), 3584, "last thing there is"),
        (TarWriter::new().bytes(&first).sized(&RawHeader::new(b'x', "x"), b"12 path=\n").finish(), 1536, "record"),
    ];
    for (tar, offset, what) in cases {
        let error = refused(&tar);
        assert!(error.to_string().contains(what), "{error} does not say {what:?}");
        assert_eq!(error.offset, offset, "{error}");
    }
}

#[test]
fn an_error_ends_the_reader() {
    let tar = TarWriter::new().raw(&RawHeader::new(b'V', "v"), b"").sized(&RawHeader::new(b'0', "f"), b"").finish();
    let mut reader = Reader::new(&tar[..]);
    assert!(matches!(reader.next_entry(), Err(TarError { problem: Problem::UnknownType(b'V'), .. })));
    assert_eq!(reader.next_entry().unwrap(), None);
}

#[test]
fn every_cut_is_clean_or_an_error() {
    let whole = TarWriter::new()
        .pax([(&b"mtime"[..], &b"1.5"[..])])
        .sized(&RawHeader::new(b'0', "f"), &[b'x'; 700])
        .raw(&RawHeader::new(b'5', "d/"), b"")
        .finish();
    for cut in 0..whole.len() {
        match read_all(&whole[..cut]) {
            Ok(entries) => assert!(
                cut == 0 || (1536 + 700..=2560).contains(&cut) || cut % 512 == 0,
                "{cut} bytes gave {} entries",
                entries.len()
            ),
            Err(TarError { offset, problem: Problem::Cut(part), .. }) => {
                assert_eq!(offset, cut as u64, "{part}");
                assert_ne!((part, cut), (Part::Content, 0));
            }
            Err(other) => panic!("{cut}: {other}"),
        }
    }
}

/// What a generated layer must read back as.
fn content_of(layer: &Layer) -> Vec<(LayerEntry, Vec<u8>)> {
    let content = |pieces: &[Piece]| pieces.iter().flat_map(|piece| piece.bytes()).collect();
    layer.files.iter().map(|file| (file.entry.clone(), content(&file.pieces))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn generated_layers_read_back_as_they_were((layer, tar) in layer_tars()) {
        let mut found = read_all(&tar[..]).unwrap();
        let mut expected = content_of(&layer);
        if layer.marks != Marks::Among {
            // Both keep the order among marks and among others.
            let is_mark = |(entry, _): &(LayerEntry, Vec<u8>)| {
                matches!(entry.kind, EntryKind::Whiteout | EntryKind::Opaque)
            };
            found.sort_by_key(is_mark);
            expected.sort_by_key(is_mark);
        }
        prop_assert_eq!(found, expected);
    }

    #[test]
    fn damaged_layers_never_panic_nor_hang(
        (_, mut tar) in layer_tars(),
        damage in vec((any::<Index>(), any::<u8>()), 1..8),
        repair in any::<bool>(),
    ) {
        for (at, byte) in damage {
            let at = at.index(tar.len());
            tar[at] = byte;
            if repair {
                repair_checksum(&mut tar, at / BLOCK * BLOCK);
            }
        }
        let mut reader = Reader::new(&tar[..]);
        while let Ok(Some(_)) = reader.next_entry() {
            let mut buf = [0; 65536];
            for _ in 0..50 {
                match reader.read_body(&mut buf) {
                    Ok(0) | Err(_) => break,
                    Ok(_) => {}
                }
                reader.next_run();
            }
        }
        prop_assert!(reader.offset() <= tar.len() as u64);
    }
}

/// Makes the block at `start` pass for a header.
fn repair_checksum(tar: &mut [u8], start: usize) {
    let block = &mut tar[start..start + BLOCK];
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}
