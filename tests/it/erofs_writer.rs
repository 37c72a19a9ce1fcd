//! The EROFS writer: its images against a plain model of the entries, with three readers as judges: our own, the
//! kernel, and `fsck.erofs` in an old and a recent version. Needs root.

use std::path::{Path, PathBuf};
use std::process::Command;

use headstart::erofs::Image;
use headstart::erofs::writer::{LayerRole, TreeError};
use headstart::model::{Algorithm, DeviceNumber, Digest, EntryKind, Metadata, Timestamp};
use headstart::testkit::images::{
    EntryWithContent, directory, entry, file, hard_link, image_behind_of, image_of, listing_of, opaque, symlink,
    whiteout, xattr,
};
use headstart::testkit::tree::{Listing, pattern};
use proptest::prelude::*;

use LayerRole::{Bottom, Upper};

/// Runs a program that must succeed and gives what it said.
#[track_caller]
pub(crate) fn run(program: &mut Command) -> String {
    let output = program.output().unwrap_or_else(|error| panic!("cannot start {program:?}: {error}"));
    let said = String::from_utf8_lossy(&[&*output.stdout, &*output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{program:?} failed: {said}");
    said
}

/// The programs that check images: the system's and recent ones.
pub(crate) fn checkers() -> Vec<PathBuf> {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/erofs-utils-recent");
    let mut found = vec![PathBuf::from("fsck.erofs")];
    for suite in ["trixie", "forky"] {
        let directory = run(Command::new(&tool).args(["--suite", suite]));
        found.push(Path::new(directory.trim()).join("fsck.erofs"));
    }
    found
}

/// A mounted file system that goes away with its owner.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

/// What the kernel shows of an image file that it mounts without a loop device.
#[track_caller]
pub(crate) fn kernel_listing(image: &Path) -> Listing {
    let at = image.with_extension("mnt");
    std::fs::create_dir_all(&at).unwrap();
    let flags = rustix::mount::MountFlags::RDONLY;
    rustix::mount::mount(image, &at, "erofs", flags, None).unwrap();
    let mounted = Mounted(at);
    Listing::of_directory(&mounted.0).unwrap()
}

/// Every judge sees in `image` what the model says.
#[track_caller]
fn judge(role: LayerRole, entries: &[EntryWithContent]) -> Vec<u8> {
    judge_image(role, entries, &image_behind_of(role, entries).unwrap());
    let image = image_of(role, entries).unwrap();
    judge_image(role, entries, &image);
    image
}

#[track_caller]
fn judge_image(role: LayerRole, entries: &[EntryWithContent], image: &[u8]) {
    let expected = listing_of(role, entries).expect("the case is a valid layer").without_directory_sizes();
    let seen = Listing::of_image(&Image::open(image).unwrap()).unwrap();
    seen.clone().without_directory_sizes().assert_equals(&expected);
    let report = headstart::erofs::check(&Image::open(image).unwrap()).unwrap();
    assert_eq!(report.findings, []);

    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("image.erofs");
    std::fs::write(&file, image).unwrap();
    kernel_listing(&file).assert_equals(&seen);
    for checker in checkers() {
        let said = run(Command::new(checker).arg("--extract").arg(&file));
        assert!(!said.contains("<E>"), "{said}");
    }
}

fn with(mut entry: EntryWithContent, change: impl FnOnce(&mut Metadata)) -> EntryWithContent {
    change(&mut entry.0.metadata);
    entry
}

#[test]
fn an_empty_layer_is_an_empty_root() {
    for role in [Bottom, Upper] {
        assert_eq!(judge(role, &[]).len(), 4096);
        judge(role, &[with(directory(""), |m| m.permissions = 0o1777)]);
    }
}

#[test]
fn all_kinds_of_files_with_all_their_metadata() {
    let number = |major, minor| DeviceNumber { major, minor };
    let entries = [
        with(directory(""), |m| (m.uid, m.gid) = (1, 2)),
        file("file", b"content"),
        file("empty", b""),
        file("block", &pattern(4096)),
        file("large", &pattern(1_000_001)),
        symlink("link", "file"),
        symlink("long", &"x/".repeat(1000)),
        symlink("longest", &"y".repeat(4095)),
        entry("char", EntryKind::CharDevice(number(1, 3))),
        entry("widest", EntryKind::CharDevice(number(4095, 1_048_575))),
        entry("disk", EntryKind::BlockDevice(number(8, 17))),
        entry("pipe", EntryKind::Fifo),
        hard_link("second", "file"),
        hard_link("third", "second"),
        hard_link("before", "later/file"),
        hard_link("chain", "before"),
        file("later/file", b"after its link"),
        with(file("setuid", b"#!"), |m| m.permissions = 0o6755),
        with(file("ids", b"1"), |m| (m.uid, m.gid) = (65_536, u32::MAX - 1)),
        with(file("old", b"1"), |m| m.mtime = Timestamp { seconds: -1_000_000_000, nanos: 999_999_999 }),
        with(file("epoch", b"1"), |m| m.mtime = Timestamp::default()),
        with(file("future", b"1"), |m| m.mtime = Timestamp { seconds: 1 << 40, nanos: 1 }),
        with(file("capable", b"1"), |m| {
            m.xattrs =
                vec![xattr("security.capability", &[1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])];
        }),
        with(directory("acl"), |m| {
            let acl = [
                2_u8, 0, 0, 0, 1, 0, 7, 0, 255, 255, 255, 255, 4, 0, 5, 0, 255, 255, 255, 255, 32, 0, 5, 0, 255, 255,
                255, 255,
            ];
            m.xattrs = vec![xattr("system.posix_acl_access", &acl), xattr("system.posix_acl_default", &acl)];
        }),
        file(&"n".repeat(255), b"longest name"),
        directory("!before the dots"),
        file(".-between the dots", b"1"),
        file("...", b"1"),
        file("caf\u{e9}\n\u{1}", b"odd"),
    ];
    judge(Bottom, &entries);
    judge(Upper, &entries);
}

#[test]
fn attributes_are_shared_where_they_repeat_and_found_where_they_do_not() {
    let label = xattr("security.selinux", b"system_u:object_r:usr_t:s0");
    let mut entries: Vec<EntryWithContent> =
        (0..50).map(|i| with(file(&format!("f{i}"), b"x"), |m| m.xattrs = vec![label.clone()])).collect();
    entries.push(with(file("own", b"x"), |m| {
        m.xattrs =
            vec![label.clone(), xattr("user.a", b""), xattr("user.b", &pattern(65_535)), xattr("user.c", &[7; 9])];
    }));
    entries.push(with(symlink("link", "x"), |m| m.xattrs = vec![xattr("trusted.large", &pattern(5000))]));
    entries.push(with(directory("dir"), |m| m.xattrs = vec![xattr("trusted.large", &pattern(4000))]));
    let many = (0..300).map(|i| xattr(&format!("user.{i:03}"), format!("{i}").as_bytes())).collect::<Vec<_>>();
    for i in 0..3 {
        entries.push(with(file(&format!("many{i}"), b"x"), |m| m.xattrs.clone_from(&many)));
    }
    judge(Bottom, &entries);
}

#[test]
fn directories_of_every_size_at_every_place() {
    // Tails that fit beside the inode, that fit nowhere, that fill blocks exactly.
    let mut entries = Vec::new();
    for count in [1, 2, 10, 60, 100, 129, 130, 131, 200, 255, 256, 257, 1000] {
        entries.push(directory(&format!("d{count}")));
        entries.extend((0..count).map(|i| file(&format!("d{count}/{i:020}"), b"")));
    }
    // 4096 = 12 + 1 + 12 + 2 + n * 32 + rest.
    entries.extend((0..126).map(|i| file(&format!("exact/{i:020}"), b"")));
    entries.push(file(&format!("exact/{}", "e".repeat(25)), b""));
    judge(Bottom, &entries);
}

#[test]
fn holes_are_kept() {
    let mut sparse = pattern(100_000);
    sparse.resize(3_000_000, 0);
    sparse.extend(pattern(77_777));
    let mut head = vec![0; 20 << 20];
    head.extend(pattern(5));
    let mut tail = pattern(5);
    tail.resize((16 << 20) + 5, 0);
    let entries = [
        file("sparse", &sparse),
        file("zeros", &vec![0; 1_000_000]),
        file("one block of zeros", &vec![0; 4096]),
        file("one zero", &[0]),
        file("head", &head),
        file("tail", &tail),
        file("after", &pattern(9000)),
    ];
    let image = judge(Bottom, &entries);
    assert!(image.len() < 400_000, "{} bytes for files full of holes", image.len());
}

#[test]
fn later_entries_replace_earlier_ones() {
    let entries = [
        file("file becomes directory", b"1"),
        directory("file becomes directory"),
        file("file becomes directory/x", b"2"),
        directory("directory becomes file/with/much"),
        file("directory becomes file/with/much/in", b"3"),
        hard_link("survivor", "directory becomes file/with/much/in"),
        file("directory becomes file", b"4"),
        file("there and back", b"5"),
        directory("there and back"),
        file("there and back/lost", b"6"),
        file("there and back", b"7"),
        directory("there and back"),
        file("twice", b"old"),
        hard_link("old of twice", "twice"),
        file("twice", b"new"),
        with(directory("merged"), |m| m.permissions = 0o700),
        file("merged/a", b"a"),
        with(directory("merged"), |m| m.permissions = 0o711),
        file("merged/b", b"b"),
        file("implied/under/file", b"x"),
        file("implied/under", b"then a file"),
        file("implied/under/file", b"then implied again"),
    ];
    judge(Bottom, &entries);
    judge(Upper, &entries);
}

#[test]
fn whiteouts_hide_lower_layers_only() {
    let entries = [
        whiteout("gone"),
        whiteout("deep/inside/gone"),
        whiteout("file"),
        file("file", b"wins"),
        file("other", b"wins"),
        whiteout("other"),
        whiteout("dir"),
        directory("dir"),
        file("dir/new", b"1"),
        directory("rid"),
        whiteout("rid"),
        file("parent/child", b"1"),
        whiteout("parent"),
        opaque("opaque"),
        directory("opaque"),
        file("opaque/a", b"1"),
        whiteout("opaque/b"),
        entry("literal", EntryKind::CharDevice(DeviceNumber::default())),
        with(directory("marked"), |m| m.xattrs = vec![xattr("user.kept", b"1")]),
        opaque("marked"),
    ];
    judge(Upper, &entries);
    let bottom = judge(Bottom, &entries);
    let listing = Listing::of_image(&Image::open(bottom.as_slice()).unwrap()).unwrap();
    assert!(!listing.nodes.contains_key(&b"gone"[..]) && !listing.nodes.contains_key(&b"literal"[..]));
    assert!(listing.nodes.values().all(|node| node.xattrs.iter().all(|x| !x.name.starts_with(b"trusted.overlay"))));
}

#[test]
fn marks_of_the_tar_itself_count_only_as_opaque_directories() {
    let marked = |name: &str, value: &[u8]| vec![xattr(name, value)];
    let entries = [
        with(directory("opaque"), |m| m.xattrs = marked("trusted.overlay.opaque", b"y")),
        with(directory("redirected"), |m| m.xattrs = marked("trusted.overlay.redirect", b"/etc")),
        with(file("metacopy", b"1"), |m| m.xattrs = marked("trusted.overlay.metacopy", b"")),
    ];
    for (role, opaque) in [(Upper, 1), (Bottom, 0)] {
        let image = image_of(role, &entries).unwrap();
        let listing = Listing::of_image(&Image::open(image.as_slice()).unwrap()).unwrap();
        let xattrs: Vec<_> = listing.nodes.values().flat_map(|node| &node.xattrs).collect();
        assert_eq!(xattrs.len(), opaque);
        assert!(xattrs.iter().all(|x| **x == xattr("trusted.overlay.opaque", b"y")));
    }
}

#[test]
fn parents_that_are_symlinks_are_followed_inside_the_layer() {
    let image = image_of(
        Bottom,
        &[
            symlink("lib", "usr/lib"),
            file("lib/a", b"1"),
            symlink("abs", "/usr/./lib/"),
            file("abs/b", b"2"),
            symlink("usr/up", "../../../usr"),
            file("usr/up/c", b"3"),
            hard_link("d", "lib/a"),
            directory("lib"),
            file("lib/e", b"4"),
        ],
    )
    .unwrap();
    let listing = Listing::of_image(&Image::open(image.as_slice()).unwrap()).unwrap();
    let paths: Vec<_> = listing.nodes.keys().map(|path| String::from_utf8_lossy(path).into_owned()).collect();
    assert_eq!(paths, ["", "abs", "d", "lib", "lib/e", "usr", "usr/c", "usr/lib", "usr/lib/a", "usr/lib/b", "usr/up"]);
    assert_eq!(listing.nodes[&b"d"[..]].attributes.nlink, 2);
}

#[test]
fn what_cannot_be_kept_is_refused() {
    let refused = |entries: &[EntryWithContent], part: &str| {
        let error = image_of(Upper, entries).map(drop).expect_err(part);
        assert!(error.to_string().contains(part), "{error}");
    };
    refused(&[hard_link("a", "missing")], "hard link /a names /missing, which is not in this layer");
    refused(&[hard_link("a", "b"), hard_link("b", "a")], "which is not in this layer");
    refused(&[directory("d"), hard_link("a", "d")], "which is a directory");
    refused(&[hard_link("a", "d"), directory("d")], "which is a directory");
    refused(&[file("", b"")], "root that is no directory");
    refused(&[file(&"d/".repeat(2049), b"")], "path /d/d");
    refused(&[symlink("a", &"x".repeat(4096))], "symlink /a has a target of 4096 bytes");
    refused(&[symlink("a", "b"), symlink("b", "a"), file("a/c", b"")], "more than 40 symlinks on the way to /a/c");
    refused(&[symlink("a", &"x".repeat(256)), file("a/c", b"")], "leads through an impossible name");
    refused(&[entry("c", EntryKind::CharDevice(DeviceNumber { major: 4096, minor: 0 }))], "number 4096:0");
    refused(&[with(file("a", b""), |m| m.mtime.nanos = 1_000_000_000)], "1000000000 nanoseconds");
    refused(&[with(file("a", b""), |m| m.xattrs = vec![xattr("user.a", &[0; 65_536])])], "\"user.a\" of /a");
    refused(
        &[with(file("a", b""), |m| m.xattrs = vec![xattr(&format!("user.{}", "n".repeat(256)), b"")])],
        "255 bytes",
    );
    let full: Vec<_> = (0..5).map(|i| xattr(&format!("user.{i}"), &[0; 60_000])).collect();
    refused(&[with(file("a", b""), |m| m.xattrs = full)], "extended attributes of /a take");
    let mut bombs: Vec<EntryWithContent> = Vec::new();
    for i in 0..20 {
        bombs.push(symlink(&format!("s{i}"), &format!("{i}{}", "/d".repeat(2000))));
        bombs.push(file(&format!("s{i}/f"), b""));
    }
    refused(&bombs, "directories that it does not list");
    assert!(matches!(image_of(Upper, &[hard_link("a", "a")]), Err(TreeError::DanglingLink { .. })));
}

#[test]
fn equal_entries_give_equal_bytes() {
    let entries = [
        with(directory("etc"), |m| m.xattrs = vec![xattr("user.x", b"1"), xattr("user.y", b"2")]),
        file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n"),
        symlink("bin", "usr/bin"),
        hard_link("etc/passwd-", "etc/passwd"),
        file("sparse", &vec![0; 100_000]),
        whiteout("var/tmp"),
    ];
    let image = image_of(Upper, &entries).unwrap();
    assert_eq!(image, image_of(Upper, &entries).unwrap());
    assert_eq!(
        Digest::of(Algorithm::Sha256, &image).to_string(),
        "sha256:5932c1c1446f7f33a6c8f8e4d50ddd45ee530155aec7440aef0bb88f47e22375"
    );
}

/// Few names, so that they collide.
fn any_path() -> impl Strategy<Value = String> {
    proptest::collection::vec(prop_oneof![Just("a"), Just("b"), Just("c"), Just("-"), Just(".x")], 1..4)
        .prop_map(|names| names.join("/"))
}

fn any_entry() -> impl Strategy<Value = EntryWithContent> {
    let kind = prop_oneof![
        3 => (any_path(), 0..20_000_usize).prop_map(|(at, len)| file(&at, &pattern(len))),
        1 => (any_path(), 0..40_000_usize).prop_map(|(at, len)| file(&at, &vec![0; len])),
        3 => any_path().prop_map(|at| directory(&at)),
        2 => (any_path(), any_path()).prop_map(|(at, target)| hard_link(&at, &target)),
        1 => any_path().prop_map(|at| entry(&at, EntryKind::Fifo)),
        1 => any_path().prop_map(|at| entry(&at, EntryKind::CharDevice(DeviceNumber::default()))),
        2 => any_path().prop_map(|at| whiteout(&at)),
        1 => any_path().prop_map(|at| opaque(&at)),
    ];
    (kind, 0..0o10000_u16, prop_oneof![Just(0), Just(1000), Just(70_000)], 0..4_u8).prop_map(
        |(mut entry, mode, id, xattrs)| {
            if !matches!(entry.0.kind, EntryKind::HardLink { .. } | EntryKind::Whiteout | EntryKind::Opaque) {
                entry.0.metadata.permissions = mode;
                entry.0.metadata.uid = id;
                entry.0.metadata.xattrs = (0..xattrs).map(|i| xattr(&format!("trusted.{i}"), &[i])).collect();
            }
            entry
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn random_layers_read_as_the_model_says(
        role in prop_oneof![Just(Bottom), Just(Upper)],
        entries in proptest::collection::vec(any_entry(), 0..25),
    ) {
        match (image_of(role, &entries), listing_of(role, &entries)) {
            (Ok(image), Some(expected)) => {
                let image = Image::open(image.as_slice()).unwrap();
                let seen = Listing::of_image(&image).unwrap().without_directory_sizes();
                let difference = seen.difference(&expected.without_directory_sizes());
                prop_assert!(difference.is_none(), "{}", difference.unwrap_or_default());
            }
            (Err(_), None) => {}
            (Ok(_), None) => prop_assert!(false, "the writer took what the model refuses"),
            (Err(error), Some(_)) => prop_assert!(false, "the writer refused: {error}"),
        }
    }
}
