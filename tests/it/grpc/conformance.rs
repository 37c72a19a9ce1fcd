//! The cases of containerd's suite for snapshotters (`core/snapshots/testsuite`), each under its name there. Where a case
//! depends on the snapshotter, this one is held to what is asked of overlayfs, on which it stands.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, lchown};
use std::path::Path;
use std::time::SystemTime;

use headstart::grpc::proto::containerd::services::snapshots::v1::{Info, Kind};
use headstart::testkit::tree::Listing;
use prost_types::Timestamp;
use tonic::Code;

use super::{Mounted, ROOT_LABEL, Stage, assert_code, owned};

/// A change of a tree.
enum Step {
    File(&'static str, &'static str, u32),
    Numbered(String, String, u32),
    Dir(&'static str, u32),
    Remove(&'static str),
    Chown(&'static str, u32, u32),
    Rename(&'static str, &'static str),
    Link(&'static str, &'static str),
}

use Step::{Chown, Dir, File, Link, Numbered, Remove, Rename};

fn apply(steps: &[Step], root: &Path) {
    let write = |path: &str, content: &str, mode: u32| {
        fs::write(root.join(path), content).unwrap();
        fs::set_permissions(root.join(path), fs::Permissions::from_mode(mode)).unwrap();
    };
    for step in steps {
        match step {
            File(path, content, mode) => write(path, content, *mode),
            Numbered(path, content, mode) => write(path, content, *mode),
            Dir(path, mode) => {
                fs::create_dir(root.join(path)).unwrap();
                fs::set_permissions(root.join(path), fs::Permissions::from_mode(*mode)).unwrap();
            }
            Remove(path) if root.join(path).is_dir() => fs::remove_dir_all(root.join(path)).unwrap(),
            Remove(path) => fs::remove_file(root.join(path)).unwrap(),
            Chown(path, user, group) => lchown(root.join(path), Some(*user), Some(*group)).unwrap(),
            Rename(from, to) => fs::rename(root.join(from), root.join(to)).unwrap(),
            Link(from, to) => fs::hard_link(root.join(from), root.join(to)).unwrap(),
        }
    }
}

/// What can be seen of a tree, but for times: both trees were made one after the other.
fn seen(root: &Path) -> Listing {
    let listing = Listing::of_directory(root).unwrap();
    let mut listing = listing.without_directory_sizes().without_directory_links().without_xattrs(b"trusted.overlay.");
    for node in listing.nodes.values_mut() {
        node.attributes.mtime = headstart::model::Timestamp { seconds: 0, nanos: 0 };
        // Links of one file that lies in two layers are two files for overlayfs.
        node.attributes.nlink = 0;
        node.same_file_as.clear();
    }
    listing
}

#[track_caller]
fn assert_equal(root: &Path, flat: &Path) {
    if let Some(difference) = seen(root).difference(&seen(flat)) {
        panic!("{difference}");
    }
}

/// Applies each change to a snapshot on the one before, and to one directory; both have to look the same each time.
fn check_snapshots(stage: &Stage, name: &str, layers: &[&[Step]]) {
    let flat = stage.path(&format!("flat-{name}"));
    fs::create_dir(&flat).unwrap();
    let mut parent = String::new();
    for (number, steps) in layers.iter().enumerate() {
        let (key, committed) = (format!("{name}-{number}-prepare"), format!("{name}-{number}"));
        apply(steps, &stage.mount(&stage.prepare(&key, &parent)).0);
        stage.commit(&committed, &key);
        apply(steps, &flat);
        let view = format!("{committed}-view");
        let shown = stage.mount(&stage.view(&view, &committed));
        assert_equal(&shown.0, &flat);
        drop(shown);
        stage.remove(&view).unwrap();
        parent = committed;
    }
}

fn kind(info: &Info) -> Kind {
    info.kind()
}

#[test]
fn basic() {
    let initial = [File("foo", "foo\n", 0o777), Dir("a", 0o755), Dir("a/b", 0o755), Dir("a/b/c", 0o755)];
    let change = [File("bar", "bar\n", 0o777), File("foo", "bar\n", 0o777), Remove("a/b")];
    let stage = Stage::new();
    let flat = stage.path("flat");
    fs::create_dir(&flat).unwrap();
    let preparing = stage.mount(&stage.prepare("/snapshots/preparing", ""));
    apply(&initial, &preparing.0);
    drop(preparing);
    stage.commit("/snapshots/committed", "/snapshots/preparing");
    let first = stage.stat("/snapshots/committed").unwrap();
    assert_eq!((kind(&first), first.parent.as_str()), (Kind::Committed, ""));
    assert_code(stage.stat("/snapshots/preparing"), Code::NotFound);

    let next = stage.mount(&stage.prepare("/snapshots/nextlayer", "/snapshots/committed"));
    apply(&initial, &flat);
    assert_equal(&next.0, &flat);
    apply(&change, &next.0);
    drop(next);
    let active = stage.stat("/snapshots/nextlayer").unwrap();
    assert_eq!((kind(&active), active.parent.as_str()), (Kind::Active, "/snapshots/committed"));
    stage.commit("/snapshots/committed-next", "/snapshots/nextlayer");
    let second = stage.stat("/snapshots/committed-next").unwrap();
    assert_eq!((kind(&second), second.parent.as_str()), (Kind::Committed, "/snapshots/committed"));
    assert_code(stage.stat("/snapshots/nextlayer"), Code::NotFound);
    let walked: BTreeMap<String, Info> =
        stage.list(&[]).unwrap().into_iter().map(|info| (info.name.clone(), info)).collect();
    for info in [&first, &second] {
        assert_eq!(walked.get(&info.name), Some(info));
    }

    let view = stage.mount(&stage.view("/snapshots/nextnextlayer", "/snapshots/committed-next"));
    apply(&change, &flat);
    assert_equal(&view.0, &flat);
    drop(view);
    stage.remove("/snapshots/nextnextlayer").unwrap();
    let refused = stage.remove("/snapshots/committed").unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("remove"), "{refused:?}");
    stage.remove("/snapshots/committed-next").unwrap();
    stage.remove("/snapshots/committed").unwrap();
    assert_eq!(stage.names(&[]), [""; 0]);
}

#[test]
fn stat_active_and_stat_committed() {
    let stage = Stage::new();
    drop(stage.mount(&stage.prepare("preparing", "")));
    let info = stage.stat("preparing").unwrap();
    assert_eq!((info.name.as_str(), kind(&info), info.parent.as_str()), ("preparing", Kind::Active, ""));
    stage.commit("committed", "preparing");
    let info = stage.stat("committed").unwrap();
    assert_eq!((info.name.as_str(), kind(&info), info.parent.as_str()), ("committed", Kind::Committed, ""));
}

#[test]
fn transitivity() {
    let stage = Stage::new();
    apply(&[File("foo", "foo\n", 0o777)], &stage.mount(&stage.prepare("preparing", "")).0);
    stage.commit("snapA", "preparing");
    apply(&[File("foo", "foo bar\n", 0o777)], &stage.mount(&stage.prepare("next", "snapA")).0);
    stage.commit("snapB", "next");
    let (a, b) = (stage.stat("snapA").unwrap(), stage.stat("snapB").unwrap());
    assert_eq!((a.parent.as_str(), b.parent.as_str()), ("", "snapA"));
    assert_eq!(stage.stat(&b.parent).unwrap().parent, "");
}

#[test]
fn prepare_and_view_with_the_same_key_fail() {
    let stage = Stage::new();
    stage.prepare("preparing", "");
    stage.commit("snapA", "preparing");
    stage.prepare("newlayer", "snapA");
    assert_code(stage.view_with("newlayer", "snapA", &[]), Code::AlreadyExists);
    stage.prepare("prepLayer", "snapA");
    assert_code(stage.prepare_with("prepLayer", "snapA", &[]), Code::AlreadyExists);
    stage.view("viewLayer", "snapA");
    assert_code(stage.view_with("viewLayer", "snapA", &[]), Code::AlreadyExists);
}

/// c1 (committed) <- c2 (committed) <- a1 (active), v1 (view); a2 and v2 on nothing.
fn base(stage: &Stage) {
    stage.prepare("c1-a", "");
    stage.commit("c1", "c1-a");
    stage.prepare("c2-a", "c1");
    stage.commit("c2", "c2-a");
    stage.prepare("a1", "c2");
    stage.prepare("a2", "");
    stage.view("v1", "c2");
    stage.view("v2", "");
}

fn now() -> Timestamp {
    Timestamp::from(SystemTime::now())
}

fn at(time: &Option<Timestamp>) -> (i64, i32) {
    let time = time.as_ref().unwrap();
    (time.seconds, time.nanos)
}

#[test]
fn update() {
    let stage = Stage::new();
    let begin = Some(now());
    base(&stage);
    let end = Some(now());
    for (name, expected, parent) in [
        ("c1", Kind::Committed, ""),
        ("c2", Kind::Committed, "c1"),
        ("a1", Kind::Active, "c2"),
        ("a2", Kind::Active, ""),
        ("v1", Kind::View, "c2"),
        ("v2", Kind::View, ""),
    ] {
        let found = stage.stat(name).unwrap();
        assert!(at(&begin) <= at(&found.created_at) && at(&found.created_at) <= at(&end), "{found:?}");
        assert_eq!(found.created_at, found.updated_at, "{name}");
        assert_eq!((kind(&found), found.parent.as_str(), found.name.as_str()), (expected, parent, name));

        let labels = owned(&[("l1", "v1"), ("l2", "v2"), ("l3", "v3"), ROOT_LABEL]);
        let wanted = Info { parent: "doesnotexist".to_owned(), labels: labels.clone(), ..found.clone() };
        let before = Some(now());
        let updated = stage.update(wanted, &[]).unwrap();
        let after = Some(now());
        assert_eq!(updated.created_at, found.created_at, "{name}");
        assert!(at(&before) <= at(&updated.updated_at) && at(&updated.updated_at) <= at(&after), "{updated:?}");
        assert_eq!((kind(&updated), updated.parent.as_str(), updated.name.as_str()), (expected, parent, name));
        assert_eq!(updated.labels, labels);

        let some = Info { labels: owned(&[("l1", "updated"), ("l4", "v4")]), ..updated.clone() };
        let updated = stage.update(some, &["labels.l1", "labels.l2"]).unwrap();
        assert_eq!(updated.labels, owned(&[("l1", "updated"), ("l3", "v3"), ROOT_LABEL]), "{name}");

        let others = owned(&[("l4", "v4"), ROOT_LABEL]);
        let updated = stage.update(Info { labels: others.clone(), ..updated }, &["labels"]).unwrap();
        assert_eq!(updated.labels, others, "{name}");
        let wrong = Info { parent: "doesnotexist".to_owned(), ..updated };
        assert_code(stage.update(wrong, &["parent"]), Code::InvalidArgument);
    }
}

#[test]
fn remove() {
    let stage = Stage::new();
    stage.prepare("committed-a", "");
    stage.commit("committed-1", "committed-a");
    stage.prepare("reuse-1", "committed-1");
    stage.remove("reuse-1").unwrap();
    stage.view("reuse-1", "committed-1");
    stage.remove("reuse-1").unwrap();
    stage.prepare("reuse-1", "");
    stage.remove("committed-1").unwrap();
    stage.commit("committed-1", "reuse-1");
}

#[test]
fn walk() {
    let stage = Stage::new();
    let root = ("containerd.io/gc.root", "check-walk");
    let with = |value: &'static str| [root, ("l", value)];
    stage.prepare_with("a-np", "", &[root]).unwrap();
    stage.prepare_with("p-tmp", "", &[root]).unwrap();
    stage.commit_with("p", "p-tmp", "", &[root]).unwrap();
    stage.prepare_with("a", "p", &[root]).unwrap();
    stage.view_with("v", "p", &[root]).unwrap();
    stage.prepare_with("p-wl-tmp", "", &[root]).unwrap();
    stage.commit_with("p-wl", "p-wl-tmp", "", &with("1")).unwrap();
    stage.prepare_with("a-wl", "p-wl", &with("2")).unwrap();
    stage.view_with("v-wl", "p-wl", &with("3")).unwrap();
    stage.prepare_with("a-np-wl", "", &with("2")).unwrap();
    for (filters, matches) in [
        (
            &["labels.\"containerd.io/gc.root\"==check-walk"][..],
            &["a-np", "p", "a", "v", "p-wl", "a-wl", "v-wl", "a-np-wl"][..],
        ),
        (&["kind==active,labels.\"containerd.io/gc.root\"==check-walk"], &["a-np", "a", "a-wl", "a-np-wl"]),
        (&["kind==view,labels.\"containerd.io/gc.root\"==check-walk"], &["v", "v-wl"]),
        (&["kind==committed,labels.\"containerd.io/gc.root\"==check-walk"], &["p", "p-wl"]),
        (&["name==p", "name==a-np-wl"], &["p", "a-np-wl"]),
        (&["name==a-wl,labels.l"], &["a-wl"]),
        (&["parent==p"], &["a", "v"]),
        (&["parent!=\"\",labels.\"containerd.io/gc.root\"==check-walk"], &["a", "v", "a-wl", "v-wl"]),
        (&["labels.l"], &["p-wl", "a-wl", "v-wl", "a-np-wl"]),
        (&["labels.l==2"], &["a-wl", "a-np-wl"]),
    ] {
        let (mut found, mut expected) = (stage.names(filters), matches.to_vec());
        found.sort();
        expected.sort_unstable();
        assert_eq!(found, expected, "{filters:?}");
    }
    assert_code(stage.list(&["name="]), Code::InvalidArgument);
}

#[test]
fn layer_file_update() {
    let stage = Stage::new();
    // The suite tries five times in case of luck with the clock.
    for time in 0..5 {
        check_snapshots(
            &stage,
            &format!("update{time}"),
            &[
                &[
                    Dir("etc", 0o700),
                    File("etc/hosts", "mydomain 10.0.0.1", 0o644),
                    File("etc/profile", "PATH=/usr/bin", 0o644),
                ],
                &[
                    File("etc/hosts", "mydomain 10.0.0.2", 0o644),
                    File("etc/profile", "PATH=/usr/bin", 0o666),
                    Dir("root", 0o700),
                    File("root/.bashrc", "PATH=/usr/sbin:/usr/bin", 0o644),
                ],
            ],
        );
    }
}

#[test]
fn trees_of_several_layers() {
    let stage = Stage::new();
    let cases: [(&str, Vec<Vec<Step>>); 6] = [
        (
            "remove-directory-in-lower-layer",
            vec![
                vec![Dir("lib", 0o700), File("lib/hidden", "", 0o644)],
                vec![Remove("lib"), Dir("lib", 0o700), File("lib/not-hidden", "", 0o644)],
                vec![File("lib/newfile", "", 0o644)],
            ],
        ),
        (
            "chown",
            vec![
                vec![
                    Dir("opt", 0o700),
                    Dir("opt/a", 0o700),
                    Dir("opt/a/b", 0o700),
                    File("opt/a/b/file.txt", "hello", 0o644),
                ],
                vec![Chown("opt", 1, 1), Chown("opt/a", 1, 1), Chown("opt/a/b", 1, 1), Chown("opt/a/b/file.txt", 1, 1)],
            ],
        ),
        (
            "directory-permission-on-commit",
            vec![
                vec![
                    Dir("dir1", 0o700),
                    Dir("dir2", 0o700),
                    Dir("dir3", 0o700),
                    Dir("dir4", 0o700),
                    File("dir4/f1", "...", 0o644),
                    Dir("dir5", 0o700),
                    File("dir5/f1", "...", 0o644),
                    Chown("dir1", 1, 1),
                    Chown("dir2", 1, 1),
                    Chown("dir3", 1, 1),
                    Chown("dir5", 1, 1),
                    Chown("dir5/f1", 1, 1),
                ],
                vec![Chown("dir2", 0, 0), Remove("dir3"), Chown("dir4", 1, 1), Chown("dir4/f1", 1, 1)],
                vec![Dir("dir3", 0o700), Chown("dir3", 1, 1), Remove("dir5"), Dir("dir5", 0o700), Chown("dir5", 1, 1)],
            ],
        ),
        (
            "deleted-files-in-child-snapshot",
            vec![vec![File("foo", "foo\n", 0o777), File("foobar", "foobar\n", 0o777)], vec![Remove("foobar")], vec![]],
        ),
        (
            "move-file-from-lower-layer",
            vec![
                vec![
                    Dir("dir1", 0o700),
                    File("dir1/f1", "Hello", 0o644),
                    Dir("dir2", 0o700),
                    File("dir2/f2", "...", 0o644),
                ],
                vec![
                    Dir("dir3", 0o700),
                    File("dir3/f1", "Hello", 0o644),
                    Remove("dir1"),
                    Link("dir2/f2", "dir3/f2"),
                    Remove("dir2/f2"),
                ],
            ],
        ),
        (
            // Renaming a directory of a lower layer is not asked of overlayfs.
            "rename",
            vec![
                vec![
                    Dir("dir1", 0o700),
                    Dir("somefiles", 0o700),
                    File("somefiles/f1", "was here first!", 0o644),
                    File("somefiles/f2", "nothing interesting", 0o644),
                ],
                vec![
                    File("somefiles/f1-overwrite", "new content 1", 0o644),
                    Rename("somefiles/f1-overwrite", "somefiles/f1"),
                    Rename("somefiles/f2", "somefiles/f3"),
                ],
            ],
        ),
    ];
    for (name, layers) in &cases {
        check_snapshots(&stage, name, &layers.iter().map(Vec::as_slice).collect::<Vec<_>>());
    }
}

#[test]
fn remove_intermediate_snapshot() {
    let stage = Stage::new();
    stage.prepare("base", "");
    stage.commit("committed-base", "base");
    stage.prepare("intermediate", "committed-base");
    stage.commit("committed-inter", "intermediate");
    stage.prepare("toplayer", "committed-inter");
    assert_code(stage.remove("committed-inter"), Code::FailedPrecondition);
    for name in ["toplayer", "committed-inter", "committed-base"] {
        stage.remove(name).unwrap();
    }
}

#[test]
fn view_readonly() {
    let stage = Stage::new();
    for (name, parent) in [("one", ""), ("two", "one")] {
        stage.prepare("preparing", parent);
        stage.commit(name, "preparing");
        let view = stage.mount(&stage.view("view", name));
        let refused = fs::write(view.0.join("testfile"), "testcontent").unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
        drop(view);
        stage.remove("view").unwrap();
    }
}

#[test]
fn stat_in_walk() {
    let stage = Stage::new();
    base(&stage);
    let walked = stage.list(&[]).unwrap();
    assert_eq!(walked.len(), 6);
    for info in walked {
        assert_eq!(stage.stat(&info.name).unwrap(), info);
    }
}

#[test]
fn close_twice() {
    let stage = Stage::new();
    for _ in 0..2 {
        stage.prepare("a", "");
        stage.commit("c", "a");
        stage.remove("c").unwrap();
        stage.stop();
        stage.start();
    }
    assert_eq!(stage.names(&[]), [""; 0]);
}

#[test]
fn root_permission() {
    let stage = Stage::new();
    let mounted: Mounted = stage.mount(&stage.prepare("preparing", ""));
    assert_eq!(fs::metadata(&mounted.0).unwrap().permissions().mode() & 0o7777, 0o755);
}

#[test]
fn mounts_of_128_layers() {
    let stage = Stage::new();
    let flat = stage.path("flat");
    fs::create_dir(&flat).unwrap();
    let mut parent = String::new();
    for number in 0..128 {
        let steps = match number {
            0 => vec![
                File("bottom", "way at the bottom\n", 0o777),
                File("overwriteme", "FIRST!\n", 0o777),
                Dir("addhere", 0o755),
                Dir("onlyme", 0o755),
                File("onlyme/bottom", "bye!\n", 0o777),
            ],
            _ => vec![
                Numbered("overwriteme".to_owned(), format!("{number} WAS HERE!\n"), 0o777),
                Numbered(format!("addhere/file-{number}"), "same\n".to_owned(), 0o755),
                Remove("onlyme"),
                Dir("onlyme", 0o755),
                Numbered(format!("onlyme/file-{number}"), "only me!\n".to_owned(), 0o777),
            ],
        };
        let key = format!("prepare-layer-{number}");
        let mounts = stage.prepare(&key, &parent);
        // containerd shortens what it can; what is left has to fit into a page.
        assert!(mounts[0].options.join(",").len() < 4096, "{} bytes", mounts[0].options.join(",").len());
        let preparing = stage.mount(&mounts);
        assert_equal(&preparing.0, &flat);
        apply(&steps, &flat);
        apply(&steps, &preparing.0);
        drop(preparing);
        parent = format!("committed-{number}");
        stage.commit(&parent, &key);
    }
    let view = stage.mount(&stage.view("fullview", &parent));
    assert_equal(&view.0, &flat);
}
