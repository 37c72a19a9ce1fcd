//! The merge held against the kernel's overlayfs: random stacks of layers, and chosen ones, mounted by both. Needs root.

use std::collections::BTreeMap;

use headstart::erofs::writer::LayerRole;
use headstart::model::{DeviceNumber, EntryKind};
use headstart::sys::mount::Unmount;
use headstart::testkit::images::{EntryWithContent, entry, image_of, xattr};
use headstart::testkit::tree::Listing;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};

use crate::mounts::{Kernel, lazy, mount};

/// What a path of a layer is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Directory,
    Opaque,
    File(u8),
    Empty,
    Symlink,
    Device,
    Whiteout,
    /// Another name of the first regular file of the layer.
    Link,
}

/// A path and what stands there, with attributes.
#[derive(Debug, Clone)]
struct Line {
    path: Vec<&'static str>,
    kind: Kind,
    xattrs: Vec<(&'static str, &'static str)>,
}

fn line() -> impl Strategy<Value = Line> {
    let kind = prop_oneof![
        6 => Just(Kind::Directory),
        2 => Just(Kind::Opaque),
        5 => any::<u8>().prop_map(Kind::File),
        1 => Just(Kind::Empty),
        1 => Just(Kind::Symlink),
        1 => Just(Kind::Device),
        4 => Just(Kind::Whiteout),
        2 => Just(Kind::Link),
    ];
    let xattrs = vec(
        select(vec![
            ("user.a", "1"),
            ("trusted.b", "2"),
            ("trusted.overlay.overlay.opaque", "y"),
            ("trusted.overlay.origin", "0"),
            ("user.overlay.opaque", "y"),
            ("trusted.overlay.opaque", "x"),
            ("trusted.overlay.whiteout", "y"),
            ("trusted.overlay.metacopy", ""),
        ]),
        0..2,
    );
    let xattrs = prop_oneof![4 => Just(Vec::new()), 1 => xattrs];
    (vec(select(vec!["a", "b", "c"]), 1..4), kind, xattrs).prop_map(|(path, kind, xattrs)| Line { path, kind, xattrs })
}

/// The image of a layer with these lines. A line whose parent is no directory is left out; a later line replaces an
/// earlier one, and what lay below it.
fn image(lines: &[Line]) -> Vec<u8> {
    let mut files: BTreeMap<String, EntryWithContent> = BTreeMap::new();
    let is_directory = |files: &BTreeMap<String, EntryWithContent>, path: &str| {
        matches!(files.get(path), None | Some((headstart::model::LayerEntry { kind: EntryKind::Directory, .. }, _)))
    };
    let mut opaque = Vec::new();
    let mut links = Vec::new();
    for line in lines {
        let path = line.path.join("/");
        let parents: Vec<String> = (1..line.path.len()).map(|depth| line.path[..depth].join("/")).collect();
        if parents.iter().any(|parent| !is_directory(&files, parent) || links.contains(parent)) {
            continue;
        }
        for parent in parents {
            files.entry(parent.clone()).or_insert_with(|| entry(&parent, EntryKind::Directory));
        }
        let stays = matches!(line.kind, Kind::Directory | Kind::Opaque) && is_directory(&files, &path);
        let below = format!("{path}/");
        if !stays {
            files.retain(|other, _| !other.starts_with(&below));
            links.retain(|other: &String| !other.starts_with(&below));
        }
        links.retain(|other| *other != path);
        opaque.retain(|other: &String| *other != path && (stays || !other.starts_with(&below)));
        let (kind, content) = match &line.kind {
            Kind::Directory => (EntryKind::Directory, Vec::new()),
            Kind::Opaque => {
                opaque.push(path.clone());
                (EntryKind::Directory, Vec::new())
            }
            Kind::File(byte) => (EntryKind::Regular { size: 3 }, vec![*byte; 3]),
            Kind::Empty => (EntryKind::Regular { size: 0 }, Vec::new()),
            Kind::Symlink => (EntryKind::Symlink { target: (*b"a/b").into() }, Vec::new()),
            Kind::Device => (EntryKind::CharDevice(DeviceNumber { major: 1, minor: 3 }), Vec::new()),
            Kind::Whiteout => (EntryKind::Whiteout, Vec::new()),
            Kind::Link => {
                files.remove(&path);
                links.push(path);
                continue;
            }
        };
        let mut made = entry(&path, kind);
        made.1 = content;
        if line.kind != Kind::Whiteout {
            let mut xattrs: Vec<_> = line.xattrs.iter().map(|(name, value)| xattr(name, value.as_bytes())).collect();
            // The mark of an opaque directory is made from the entry below.
            xattrs.retain(|xattr| line.kind != Kind::Opaque || &*xattr.name != b"trusted.overlay.opaque");
            // Linux shows attributes of users on files and directories alone, whatever the image has.
            let plain = !matches!(line.kind, Kind::Symlink | Kind::Device);
            xattrs.retain(|xattr| plain || !xattr.name.starts_with(b"user."));
            xattrs.sort();
            xattrs.dedup_by(|a, b| a.name == b.name);
            made.0.metadata.xattrs = xattrs;
        }
        files.insert(path, made);
    }
    let mut entries: Vec<EntryWithContent> = files.into_values().collect();
    let first = entries.iter().find(|(entry, _)| matches!(entry.kind, EntryKind::Regular { .. }));
    if let Some(target) = first.map(|(entry, _)| entry.path.clone()) {
        for link in links {
            entries.push(entry(&link, EntryKind::HardLink { target: target.clone() }));
            entries.last_mut().unwrap().0.metadata = headstart::model::Metadata::default();
        }
    }
    for path in opaque {
        entries.push(entry(&path, EntryKind::Opaque));
        entries.last_mut().unwrap().0.metadata = headstart::model::Metadata::default();
    }
    image_of(LayerRole::Upper, &entries).unwrap()
}

/// What the kernel and this program show for the same layers, the lowest first.
fn both(images: Vec<Vec<u8>>) -> (Listing, Listing) {
    let kernel = Kernel::stack(&images);
    let target = tempfile::tempdir().unwrap();
    let server = mount(&lazy(images), target.path());
    let shown = Listing::of_overlay(target.path()).unwrap();
    server.unmount(Unmount::Lazy).unwrap();
    server.wait();
    (Listing::of_overlay(kernel.tree()).unwrap(), shown)
}

#[test]
fn random_stacks_look_as_in_overlayfs() {
    let mut runner = TestRunner::new(Config { cases: 100, failure_persistence: None, ..Config::default() });
    let stack = vec(vec(line(), 0..12), 2..5);
    runner
        .run(&stack, |layers| {
            let (kernel, shown) = both(layers.iter().map(|lines| image(lines)).collect());
            prop_assert_eq!(kernel.difference(&shown), None);
            Ok(())
        })
        .unwrap();
}

/// A directory with a redirect.
fn moved(path: &'static str, redirect: &'static str) -> Line {
    Line {
        path: path.split('/').collect(),
        kind: Kind::Directory,
        xattrs: vec![("trusted.overlay.redirect", redirect)],
    }
}

fn plain(path: &'static str, kind: Kind) -> Line {
    Line { path: path.split('/').collect(), kind, xattrs: Vec::new() }
}

#[test]
fn redirects_lead_where_overlayfs_follows_them() {
    let file = |path| plain(path, Kind::File(1));
    let gone = |path| plain(path, Kind::Whiteout);
    let cases: Vec<Vec<Vec<Line>>> = vec![
        // To a path, past a layer that has nothing there.
        vec![vec![file("a/b/deep")], vec![file("x")], vec![moved("new", "/a/b"), file("new/own"), gone("a")]],
        // To a name beside it.
        vec![vec![file("old/x")], vec![moved("new", "old"), gone("old")]],
        // Out of a directory that the lower layer does not have.
        vec![vec![file("a/x")], vec![moved("only/moved", "/a"), gone("a")]],
        // Through a whiteout, through a file, to nothing.
        vec![vec![file("a/b/low")], vec![gone("a")], vec![moved("new", "/a/b")]],
        vec![vec![file("a/b/low")], vec![file("a")], vec![moved("new", "/a/b"), gone("a")]],
        vec![vec![file("a")], vec![moved("new", "/nothing/here")]],
        // A redirect on the way of a redirect, relative and absolute.
        vec![
            vec![file("c/b/low")],
            vec![moved("a", "c"), file("a/b/mid"), gone("c")],
            vec![moved("n", "/a/b"), gone("a")],
        ],
        vec![
            vec![file("z/y/b/low")],
            vec![moved("a", "/z/y"), file("a/b/mid"), gone("z")],
            vec![moved("n", "/a/b"), gone("a")],
        ],
        // An opaque directory on the way of a redirect, and a redirect below it.
        vec![
            vec![file("a/b/low")],
            vec![plain("a", Kind::Opaque), file("a/b/mid")],
            vec![moved("n", "/a/b"), gone("a")],
        ],
        vec![
            vec![file("q/low")],
            vec![plain("a", Kind::Opaque), moved("a/b", "/q"), gone("q")],
            vec![moved("n", "/a/b"), gone("a")],
        ],
        // Nonsense, also where nobody looks at it.
        vec![vec![moved("low", "/a//b"), file("a/b/x")], vec![moved("bad", "/a//b"), moved("worse", "a/b")]],
        vec![
            vec![file("a/b/x")],
            vec![moved("empty", ""), moved("root", "/"), moved("end", "/a/"), moved("dots", "..")],
        ],
    ];
    for (number, layers) in cases.into_iter().enumerate() {
        let (kernel, shown) = both(layers.iter().map(|lines| image(lines)).collect());
        if let Some(difference) = kernel.difference(&shown) {
            panic!("case {number}: {difference}");
        }
    }
}
