//! The merge held against the kernel's overlayfs: random stacks of layers, and chosen ones, mounted by both. Needs root.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use headstart::sys::mount::Unmount;
use headstart::testkit::tree::Listing;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};
use rustix::fs::{CWD, FileType, Mode, XattrFlags};

use crate::forest::{Made, Served};
use crate::mounts::{Kernel, lazy, mkfs, mount};

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

/// The image of a layer with these lines, made by `mkfs.erofs`: our own writer would not write overlayfs's attributes.
/// A line whose parent is no directory is left out; a later line replaces an earlier one, and what lay below it.
fn image(lines: &[Line]) -> Vec<u8> {
    let root = tempfile::tempdir().unwrap();
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut first_file: Option<PathBuf> = None;
    for line in lines {
        let path = root.path().join(line.path.join("/"));
        let parent = path.parent().unwrap();
        if fs::create_dir_all(parent).is_err() || (parent != root.path() && parent.is_symlink()) {
            continue;
        }
        let is_directory = fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_dir());
        let wants_directory = matches!(line.kind, Kind::Directory | Kind::Opaque);
        match (is_directory, wants_directory) {
            (true, true) => {}
            (true, false) => fs::remove_dir_all(&path).unwrap(),
            (false, _) => drop(fs::remove_file(&path)),
        }
        let node = |major, minor| {
            let (kind, mode) = (FileType::CharacterDevice, Mode::from_raw_mode(0o600));
            rustix::fs::mknodat(CWD, &path, kind, mode, rustix::fs::makedev(major, minor)).unwrap();
        };
        match &line.kind {
            Kind::Directory | Kind::Opaque => drop(fs::create_dir(&path)),
            Kind::File(byte) => fs::write(&path, [*byte; 3]).unwrap(),
            Kind::Empty => fs::write(&path, "").unwrap(),
            Kind::Symlink => std::os::unix::fs::symlink("a/b", &path).unwrap(),
            Kind::Device => node(1, 3),
            Kind::Whiteout => node(0, 0),
            Kind::Link => match first_file.as_ref().filter(|file| file.is_file()) {
                Some(file) => fs::hard_link(file, &path).unwrap(),
                None => continue,
            },
        }
        if matches!(line.kind, Kind::File(_)) && first_file.as_ref().is_none_or(|file| !file.is_file()) {
            first_file = Some(path.clone());
        }
        let opaque = (line.kind == Kind::Opaque).then_some(("trusted.overlay.opaque", "y"));
        for (name, value) in line.xattrs.iter().copied().chain(opaque) {
            // Linux has no attributes of users on anything but files and directories.
            if !(name.starts_with("user.") && matches!(line.kind, Kind::Symlink | Kind::Device | Kind::Whiteout)) {
                rustix::fs::lsetxattr(&path, name, value.as_bytes(), XattrFlags::empty()).unwrap();
            }
        }
    }
    mkfs(root.path(), &["--quiet"])
}

/// What the kernel and this program show for the same layers, the lowest first. A forest must show the same, also of the
/// layers without the topmost one, which it shares the files of.
fn both(images: Vec<Vec<u8>>) -> (Listing, Listing) {
    let kernel = Kernel::stack(&images);
    let served = Served::start();
    let slots: Vec<_> = images.iter().map(|image| served.layer(&Made::of_image(image.clone()))).collect();
    let (_, below) = slots.split_last().unwrap();
    if below.len() > 1 {
        served.snapshot("below", below);
        let judge = Kernel::stack(&images[..below.len()]);
        let judged = Listing::of_overlay(judge.tree()).unwrap();
        judged.assert_equals(&Listing::of_overlay(&served.tree("below")).unwrap());
    }
    served.snapshot("all", &slots);
    let in_forest = Listing::of_overlay(&served.tree("all")).unwrap();
    drop(served);
    let target = tempfile::tempdir().unwrap();
    let server = mount(&lazy(images), target.path());
    let shown = Listing::of_overlay(target.path()).unwrap();
    server.unmount(Unmount::Lazy).unwrap();
    server.wait();
    in_forest.assert_equals(&shown);
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

/// 256 bytes.
const LONG: &str = concat!(
    "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef",
    "0123456789abcdef0123456789abcdef",
);

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
        vec![vec![file("a/b/x")], vec![moved("empty", ""), moved("root", "/"), moved("end", "/a/")]],
        // Names that nobody looks up: refused where a lower layer is asked for them, and only there.
        vec![vec![file("a/b/x")], vec![moved("up", ".."), moved("here", "."), moved("three", "...")]],
        vec![vec![file("a/b/x")], vec![moved("a", "..")], vec![file("a/own")]],
        vec![
            vec![file("a/b/x")],
            vec![
                moved("over", "/a/../a/b"),
                moved("top", "/.."),
                moved("last", "/a/b/."),
                moved("never", "/absent/../a"),
                moved("file", "/a/b/x/.."),
            ],
        ],
        vec![vec![moved("a", ".."), file("a/x")], vec![plain("a", Kind::Directory)]],
        vec![vec![file("x/y")], vec![moved("only/moved", "..")]],
        // Names that no directory has.
        vec![vec![file("a/b/x")], vec![moved("long", LONG), moved("a", "/a/b")]],
        vec![vec![file("a/b/x")], vec![moved("n", LONG)], vec![moved("m", "/n")]],
    ];
    for (number, layers) in cases.into_iter().enumerate() {
        let (kernel, shown) = both(layers.iter().map(|lines| image(lines)).collect());
        if let Some(difference) = kernel.difference(&shown) {
            panic!("case {number}: {difference}");
        }
    }
}
