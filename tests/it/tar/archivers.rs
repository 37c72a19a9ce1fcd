//! Archives of GNU tar and of Python's tarfile, held against the files that they were made of.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::process::Command;

use headstart::model::{DeviceNumber, EntryKind, RelPath, Timestamp, Xattr};
use headstart::tar::{Reader, Run};

use super::{path, read_all};

/// A directory of everything GNU tar can store; `wide` adds what the oldest formats cannot say.
fn oddities(wide: bool) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let script = r#"
        set -e
        mkdir -p d/sub/empty
        printf 'hello' > d/file
        head -c 100000 /dev/urandom > d/sub/big
        : > d/sub/zero
        ln d/file d/sub/again
        ln -s ../file d/sub/link
        ln -s / d/root
        mkfifo d/pipe
        mknod d/null c 1 3
        mknod d/disk b 8 17
        printf 'x' > "$(printf 'd/caf\303\251 \377\n')"
        chmod 4755 d/file; chmod 1777 d/sub; chmod 0 d/sub/zero
        chown 12:34 d/sub/big
        touch -h -d @1700000000 d/sub/link
        touch -d @1 d/sub/zero
        truncate -s 3M d/sparse; printf 'end' >> d/sparse
        printf 'middle' | dd of=d/sparse bs=1M seek=1 conv=notrunc status=none
        truncate -s 1M d/hole
    "#;
    let wide_script = r#"
        set -e
        long=$(printf 'n%.0s' $(seq 255))
        mkdir -p "d/$long/$long"
        printf 'far' > "d/$long/$long/$long"
        ln "d/$long/$long/$long" "d/$long/near"
        ln -s "$long/$long/$long$long" d/longlink
        printf 'old' > d/old; touch -d '1960-05-05 05:05:05.25 UTC' d/old
        printf 'rich' > d/rich; chown 4294967294:2097152 d/rich
        printf 'later' > d/later; touch -d @5000000000.987654321 d/later
        mknod d/wide c 4095 1048575
    "#;
    for script in [Some(script), wide.then_some(wide_script)].into_iter().flatten() {
        let done = Command::new("sh").arg("-c").arg(script).current_dir(dir.path()).status().expect("sh runs");
        assert!(done.success());
    }
    dir
}

fn gnu_tar(directory: &Path, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new("tar").current_dir(directory).args(arguments).output().expect("tar runs");
    assert!(output.status.success(), "tar {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn walk(root: &Path, below: &Path, found: &mut BTreeSet<Vec<u8>>) {
    found.insert(below.as_os_str().as_bytes().to_vec());
    let full = root.join(below);
    if full.symlink_metadata().expect("it exists").is_dir() {
        for entry in full.read_dir().expect("it is readable") {
            walk(root, &below.join(entry.expect("an entry").file_name()), found);
        }
    }
}

/// Holds every entry of `tar` against the files it was made of.
fn compare_with_files(root: &Path, tar: &[u8], nanoseconds: bool) {
    let entries = read_all(tar).expect("GNU tar writes whole tars");
    let mut expected = BTreeSet::new();
    walk(root, Path::new("d"), &mut expected);
    let found: BTreeSet<Vec<u8>> = entries.iter().map(|(entry, _)| entry.path.to_bytes()).collect();
    assert_eq!(found, expected);
    assert_eq!(entries.len(), expected.len(), "a path came twice");
    let real = |path: &RelPath| root.join(OsStr::from_bytes(&path.to_bytes()));
    for (entry, content) in &entries {
        let file = real(&entry.path);
        let stat = file.symlink_metadata().expect("it exists");
        let device = DeviceNumber { major: rustix::fs::major(stat.rdev()), minor: rustix::fs::minor(stat.rdev()) };
        let kind = match &entry.kind {
            EntryKind::HardLink { target } => {
                assert_eq!(real(target).symlink_metadata().expect("it exists").ino(), stat.ino(), "{}", entry.path);
                continue;
            }
            _ if stat.is_dir() => EntryKind::Directory,
            _ if stat.is_symlink() => {
                let target = file.read_link().expect("it is a link");
                EntryKind::Symlink { target: target.as_os_str().as_bytes().into() }
            }
            _ if stat.file_type().is_fifo() => EntryKind::Fifo,
            _ if stat.file_type().is_char_device() => EntryKind::CharDevice(device),
            _ if stat.file_type().is_block_device() => EntryKind::BlockDevice(device),
            _ => EntryKind::Regular { size: stat.len() },
        };
        assert_eq!(entry.kind, kind, "{}", entry.path);
        if stat.is_file() {
            assert!(*content == std::fs::read(&file).expect("root reads all"), "{} differs", entry.path);
        }
        let nanos = u32::try_from(stat.mtime_nsec()).expect("below a second");
        let mtime = Timestamp { seconds: stat.mtime(), nanos: if nanoseconds { nanos } else { 0 } };
        assert_eq!(
            (entry.metadata.permissions, entry.metadata.uid, entry.metadata.gid, entry.metadata.mtime),
            (u16::try_from(stat.mode() & 0o7777).expect("twelve bits"), stat.uid(), stat.gid(), mtime),
            "{}",
            entry.path
        );
        let mut names = vec![0; 4096];
        let len = rustix::fs::llistxattr(&file, &mut names[..]).expect("attributes can be listed");
        let mut xattrs: Vec<Xattr> = names[..len]
            .split(|byte| *byte == 0)
            .filter(|name| nanoseconds && !name.is_empty())
            .map(|name| {
                let mut value = vec![0; 4096];
                let len = rustix::fs::lgetxattr(&file, name, &mut value[..]).expect("it was listed");
                Xattr { name: name.into(), value: value[..len].into() }
            })
            .collect();
        xattrs.sort();
        assert_eq!(entry.metadata.xattrs, xattrs, "{}", entry.path);
    }
}

#[test]
fn archives_of_gnu_tar_hold_what_the_files_held() {
    let wide = oddities(true);
    let script = r#"
        set -e
        setfattr -n user.one -v 1 d/file
        setfattr -n user.bytes -v 0x000a3d0a d/file
        setfattr -n user.empty d/sub
        setfattr -n user.50%=x -v 1 d/sub
        setfattr -n trusted.t -v t d/root -h
        setcap cap_net_raw+ep d/sub/big
        setfacl -m u:12:rw,g:4000000000:r d/file
        setfacl -d -m u::rwx,g::rx,o::- d/sub
    "#;
    let done = Command::new("sh").arg("-c").arg(script).current_dir(wide.path()).status().expect("sh runs");
    assert!(done.success());
    for sparse in [&[][..], &["-S"], &["-S", "--sparse-version=0.0"], &["-S", "--sparse-version=0.1"]] {
        let pax = ["--format=pax", "--acls", "--xattrs", "--xattrs-include=*", "-c", "d"];
        compare_with_files(wide.path(), &gnu_tar(wide.path(), &[sparse, &pax].concat()), true);
    }
    for sparse in [&[][..], &["-S"]] {
        for format in ["--format=gnu", "--format=oldgnu"] {
            compare_with_files(wide.path(), &gnu_tar(wide.path(), &[sparse, &[format, "-c", "d"]].concat()), false);
        }
    }
    let narrow = oddities(false);
    compare_with_files(narrow.path(), &gnu_tar(narrow.path(), &["--format=ustar", "-c", "d"]), false);
    // V7 has no devices and no pipes.
    for name in ["pipe", "null", "disk"] {
        std::fs::remove_file(narrow.path().join("d").join(name)).unwrap();
    }
    compare_with_files(narrow.path(), &gnu_tar(narrow.path(), &["--format=v7", "-c", "d"]), false);
}

/// A file with 500 pieces needs blocks that continue the old GNU map, and several blocks of a PAX 1.0 map.
#[test]
fn long_sparse_maps_of_gnu_tar() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("d")).unwrap();
    let file = std::fs::File::create(dir.path().join("d/sparse")).unwrap();
    for piece in 0..500_u64 {
        let data = vec![u8::try_from(piece % 251).unwrap() + 1; 4096];
        file.write_all_at(&data, piece * 65536).unwrap();
    }
    file.set_len(1 << 30).unwrap();
    for format in [&["--format=gnu"][..], &["--format=pax", "--sparse-version=0.0"], &["--format=pax"]] {
        let tar = gnu_tar(dir.path(), &[&["-S"], format, &["-c", "d/sparse"]].concat());
        assert!(tar.len() < 4 << 20, "GNU tar found no holes");
        let mut reader = Reader::new(&tar[..]);
        assert_eq!(reader.next_entry().unwrap().unwrap().kind, EntryKind::Regular { size: 1 << 30 });
        let (mut at, mut pieces) = (0, 0);
        while let Some(run) = reader.next_run() {
            match run {
                Run::Hole(len) => at += len,
                Run::Data(len) => {
                    let mut data = vec![0; usize::try_from(len).unwrap()];
                    let mut filled = 0;
                    while filled < data.len() {
                        filled += reader.read_body(&mut data[filled..]).unwrap();
                    }
                    let expected = u8::try_from(pieces % 251).unwrap() + 1;
                    assert_eq!((at, len), (pieces * 65536, 4096));
                    assert!(data.iter().all(|byte| *byte == expected));
                    (at, pieces) = (at + len, pieces + 1);
                }
            }
        }
        assert_eq!((at, pieces), (1 << 30, 500), "{format:?}");
    }
}

#[test]
fn archives_of_python() {
    let script = r#"
import io, sys, tarfile
form = getattr(tarfile, sys.argv[1])
pax = form == tarfile.PAX_FORMAT
headers = {"comment": "global", "uid": "77"} if pax else None
out = tarfile.open(fileobj=sys.stdout.buffer, mode="w|", format=form, pax_headers=headers)
def add(name, kind=tarfile.REGTYPE, data=b"", **fields):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    out.addfile(info, io.BytesIO(data))
add("dir", tarfile.DIRTYPE, mode=0o2755)
add("dir/" + "a" * 90 + "/" + "b" * 90, data=b"long", mtime=1.5 if pax else 1)
add("dir/cont", tarfile.CONTTYPE, data=b"contiguous")
add("dir/hard", tarfile.LNKTYPE, linkname="dir/cont")
add("dir/soft", tarfile.SYMTYPE, linkname="x" * 99)
add("dir/dev", tarfile.CHRTYPE, devmajor=5, devminor=1)
add("dir/pipe", tarfile.FIFOTYPE)
if form != tarfile.USTAR_FORMAT:
    add("d" * 200 + "/" + "f" * 250, data=b"longer", uid=5000000, gid=4294967294)
    add("soft", tarfile.SYMTYPE, linkname="y" * 300)
if pax:
    add("attr", pax_headers={"SCHILY.xattr.user.k": "v\u00e9"}, mtime=-1.25)
out.close()
"#;
    for format in ["USTAR_FORMAT", "GNU_FORMAT", "PAX_FORMAT"] {
        let output = Command::new("python3").args(["-c", script, format]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let entries = read_all(&output.stdout[..]).unwrap();
        let by_path = |name: &str| entries.iter().find(|(entry, _)| entry.path == path(name)).unwrap();
        let kind = |name: &str| by_path(name).0.kind.clone();
        assert_eq!((kind("dir"), by_path("dir").0.metadata.permissions), (EntryKind::Directory, 0o2755));
        let (long, content) = by_path(&format!("dir/{}/{}", "a".repeat(90), "b".repeat(90)));
        let nanos = if format == "PAX_FORMAT" { 500_000_000 } else { 0 };
        assert_eq!((&content[..], long.metadata.mtime), (&b"long"[..], Timestamp { seconds: 1, nanos }));
        assert_eq!(by_path("dir/cont").1, b"contiguous");
        assert_eq!(kind("dir/hard"), EntryKind::HardLink { target: path("dir/cont") });
        assert_eq!(kind("dir/soft"), EntryKind::Symlink { target: [b'x'; 99].into() });
        assert_eq!(kind("dir/dev"), EntryKind::CharDevice(DeviceNumber { major: 5, minor: 1 }));
        assert_eq!(kind("dir/pipe"), EntryKind::Fifo);
        if format != "USTAR_FORMAT" {
            let (longer, content) = by_path(&format!("{}/{}", "d".repeat(200), "f".repeat(250)));
            assert_eq!(content, b"longer");
            assert_eq!((longer.metadata.uid, longer.metadata.gid), (5_000_000, 4_294_967_294));
            assert_eq!(kind("soft"), EntryKind::Symlink { target: [b'y'; 300].into() });
        }
        if format == "PAX_FORMAT" {
            let attr = &by_path("attr").0.metadata;
            assert_eq!((attr.uid, attr.mtime), (0, Timestamp { seconds: -2, nanos: 750_000_000 }));
            assert_eq!(attr.xattrs, [Xattr { name: (*b"user.k").into(), value: "vé".as_bytes().into() }]);
        }
    }
}
