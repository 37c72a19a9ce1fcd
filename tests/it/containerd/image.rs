//! The images that containers run from: busybox and every kind of file that a layer can bring, change and take away.

use std::fs;
use std::path::Path;

use headstart::model::{DeviceNumber, EntryKind, LayerEntry, RelPath, Xattr};
use headstart::testkit::tar::TarWriter;

use crate::cli::stage::{entry, noise};

/// How long the big file is.
pub(super) const BIG: usize = 8 << 20;

/// What runs in every container: the busybox that Debian packages, which needs no library.
fn busybox() -> Vec<u8> {
    let found = ["/usr/bin/busybox", "/bin/busybox"].map(Path::new).into_iter().find(|path| path.exists());
    fs::read(found.expect("busybox-static is installed")).unwrap()
}

fn file(path: &str, permissions: u16, content: &[u8]) -> LayerEntry {
    entry(path, EntryKind::Regular { size: content.len() as u64 }, permissions)
}

fn path(text: &str) -> RelPath {
    RelPath::parse(text.as_bytes()).unwrap()
}

fn xattr(name: &str, value: &[u8]) -> Xattr {
    Xattr { name: name.as_bytes().into(), value: value.into() }
}

/// A layer that begins with these directories and the root. Whoever applies a layer makes up the times of directories that it
/// changes without saying so.
fn layer(directories: &[&str]) -> TarWriter {
    let mut tar = TarWriter::new();
    tar.entry(&LayerEntry { path: RelPath::root(), ..entry("x", EntryKind::Directory, 0o755) }, b"");
    for name in directories {
        tar.entry(&entry(name, EntryKind::Directory, 0o755), b"");
    }
    tar
}

/// Busybox, the places where a runtime mounts, and one of each kind.
pub(super) fn base() -> Vec<u8> {
    let mut tar = layer(&[]);
    // A runtime that makes its mount points would change directories, at a time of its own.
    for name in ["bin", "dev", "etc", "proc", "run", "sys", "tmp", "kinds", "opaque", "opaque/below", "changing"] {
        tar.entry(&entry(name, EntryKind::Directory, 0o755), b"");
    }
    for name in ["etc/hosts", "etc/hostname", "etc/resolv.conf"] {
        tar.entry(&file(name, 0o644, b""), b"");
    }
    let passwd = b"root:x:0:0:root:/:/bin/sh\nsomebody:x:1000:1000::/:/bin/sh\n";
    tar.entry(&file("etc/passwd", 0o644, passwd), passwd);
    let program = busybox();
    tar.entry(&file("bin/busybox", 0o755, &program), &program);
    // As in any tar, a link repeats what its file said; containerd applies it again.
    tar.entry(&entry("bin/sh", EntryKind::HardLink { target: path("bin/busybox") }, 0o755), b"");
    for name in ["cat", "echo", "find", "ls", "sha256sum", "sleep", "sort", "stat", "test", "true"] {
        tar.entry(&entry(&format!("bin/{name}"), EntryKind::Symlink { target: b"busybox"[..].into() }, 0o777), b"");
    }

    tar.entry(&file("kinds/linked", 0o640, b"one file, two names"), b"one file, two names");
    tar.entry(&entry("kinds/link", EntryKind::HardLink { target: path("kinds/linked") }, 0o640), b"");
    let mut marked = file("kinds/marked", 0o644, b"x");
    marked.metadata.xattrs = vec![xattr("user.headstart.one", b"1"), xattr("user.headstart.two", &[0, 255, 7])];
    tar.entry(&marked, b"x");
    let mut owned = file("kinds/set-uid", 0o6755, b"#!/bin/sh\n");
    (owned.metadata.uid, owned.metadata.gid) = (1000, 70_000);
    tar.entry(&owned, b"#!/bin/sh\n");
    tar.entry(&entry("kinds/null", EntryKind::CharDevice(DeviceNumber { major: 1, minor: 3 }), 0o666), b"");
    tar.entry(&entry("kinds/block", EntryKind::BlockDevice(DeviceNumber { major: 7, minor: 200 }), 0o660), b"");
    tar.entry(&entry("kinds/fifo", EntryKind::Fifo, 0o644), b"");
    tar.entry(&entry("kinds/dangling", EntryKind::Symlink { target: b"/no/such/file"[..].into() }, 0o777), b"");
    tar.entry(&entry("kinds/sticky", EntryKind::Directory, 0o1777), b"");
    tar.entry(&file("kinds/empty", 0o000, b""), b"");

    for name in ["opaque/gone", "opaque/below/gone", "changing/removed", "changing/kept"] {
        tar.entry(&file(name, 0o644, b"of the first layer"), b"of the first layer");
    }
    let lines = noise(11, 300_000);
    tar.entry(&file("changing/changed", 0o644, &lines), &lines);
    tar.finish()
}

/// Takes away and changes what [`base`] brought.
pub(super) fn changes() -> Vec<u8> {
    let mut tar = layer(&["changing", "kinds"]);
    tar.entry(&entry("changing/removed", EntryKind::Whiteout, 0), b"");
    let words = noise(12, 90_000);
    tar.entry(&file("changing/changed", 0o600, &words), &words);
    tar.entry(&entry("opaque", EntryKind::Directory, 0o750), b"");
    tar.entry(&entry("opaque", EntryKind::Opaque, 0), b"");
    tar.entry(&file("opaque/new", 0o644, b"of the second layer"), b"of the second layer");
    // A directory becomes a file, a file a directory.
    tar.entry(&file("kinds/sticky", 0o644, b"a file now"), b"a file now");
    tar.entry(&entry("kinds/empty", EntryKind::Directory, 0o711), b"");
    tar.entry(&file("kinds/empty/inside", 0o644, b"inside"), b"inside");
    tar.finish()
}

/// A file of [`BIG`] bytes that no compressor makes smaller.
pub(super) fn big() -> Vec<u8> {
    let content = noise(13, BIG);
    let mut tar = layer(&["data"]);
    tar.entry(&file("data/big", 0o644, &content), &content);
    tar.finish()
}

/// All of the above, and a directory that changes alone. No hard links into lower layers: containerd cannot apply them.
pub(super) fn every_kind() -> Vec<Vec<u8>> {
    let mut tar = layer(&[]);
    let mut later = entry("changing", EntryKind::Directory, 0o2775);
    (later.metadata.uid, later.metadata.gid) = (1000, 1000);
    tar.entry(&later, b"");
    let long = "n".repeat(255);
    tar.entry(&file(&format!("changing/{long}"), 0o644, b"long"), b"long");
    tar.entry(&file("changing/\u{e4} b", 0o644, b"strange"), b"strange");
    vec![base(), changes(), big(), tar.finish()]
}

/// What holds a pod: the shell that the image's configuration names sleeps.
pub(super) fn pause() -> Vec<u8> {
    let mut tar = layer(&["bin", "dev", "etc", "proc", "run", "sys"]);
    let program = busybox();
    tar.entry(&file("bin/busybox", 0o755, &program), &program);
    let script = b"#!/bin/busybox sh\nexec /bin/busybox sleep 100000\n";
    tar.entry(&file("bin/sh", 0o755, script), script);
    tar.finish()
}

/// A small image of its own: `number` makes it different from any other in each of its two layers but the first.
pub(super) fn small(number: usize) -> Vec<Vec<u8>> {
    let text = format!("number {number}");
    let mut tar = layer(&[]);
    tar.entry(&file("number", 0o644, text.as_bytes()), text.as_bytes());
    vec![base(), tar.finish()]
}

/// [`base`] below `layers` layers, each of which adds a file, changes a common one and takes away its forerunner's.
pub(super) fn many(layers: usize) -> Vec<Vec<u8>> {
    let numbered = |number: usize| {
        let text = format!("layer {number}");
        let mut tar = layer(&[]);
        tar.entry(&file("last", 0o644, text.as_bytes()), text.as_bytes());
        tar.entry(&file(&format!("layer-{number}"), 0o644, text.as_bytes()), text.as_bytes());
        tar.entry(&file(&format!("passing-{number}"), 0o644, text.as_bytes()), text.as_bytes());
        if let Some(before) = number.checked_sub(1) {
            tar.entry(&entry(&format!("passing-{before}"), EntryKind::Whiteout, 0), b"");
        }
        tar.finish()
    };
    std::iter::once(base()).chain((0..layers).map(numbered)).collect()
}
