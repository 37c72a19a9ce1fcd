//! One connection with many snapshots and layers. Needs root, /dev/fuse, loop devices, and a kernel with EROFS and overlayfs.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::ops::ControlFlow;
use std::os::unix::fs::{FileExt, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use rustix::mount::{MountFlags, UnmountFlags};

use headstart::erofs::writer::LayerRole;
use headstart::fuse::{ServeOptions, Server, serve};
use headstart::model::{Algorithm, DiffId, Digest, FileKind, Name, ReadAt};
use headstart::testkit::images::{EntryWithContent, directory, file, hard_link, image_of, opaque, symlink, whiteout};
use headstart::testkit::lazy::{LazyBytes, LazyLayer, Reaction};
use headstart::testkit::tree::{Listing, pattern};
use headstart::testkit::waiting::{PATIENCE, wait_until};
use headstart::vfs::{
    Bring as _, Error, FileSystem as _, Forest, ForestError, ItemKind, Layer, LayerSlot, Purpose, ROOT_INO,
    SnapshotSlot, open_layers,
};

use crate::mounts::{mount, run};

/// A layer: its diffID and its bytes.
pub(crate) struct Made {
    pub(crate) diff_id: DiffId,
    pub(crate) bytes: Arc<LazyBytes>,
}

impl Made {
    fn new(entries: &[EntryWithContent]) -> Self {
        Self::of_image(image_of(LayerRole::Upper, entries).unwrap())
    }

    pub(crate) fn of_image(image: Vec<u8>) -> Self {
        let diff_id = DiffId(Digest::of(Algorithm::Sha256, &image));
        Self { diff_id, bytes: LazyBytes::new(image, 1 << 14) }
    }

    fn image(&self) -> Vec<u8> {
        let mut image = vec![0; usize::try_from(ReadAt::size(&*self.bytes)).unwrap()];
        let range = headstart::model::ByteRange::to(image.len() as u64);
        let (say, brought) = std::sync::mpsc::channel();
        let done = Box::new(move |result| say.send(result).expect("somebody listens"));
        LazyLayer(Arc::clone(&self.bytes)).bring(range, Purpose::Read, done);
        brought.recv().expect("an answer comes").unwrap();
        self.bytes.read_exact_at(0, &mut image).unwrap();
        image
    }

    fn open(&self) -> Arc<Layer<LazyLayer>> {
        let mut layers = open_layers(&[(LazyLayer(Arc::clone(&self.bytes)), Vec::new())]).unwrap();
        Arc::new(layers.remove(0))
    }
}

/// A forest that is served.
pub(crate) struct Served {
    pub(crate) forest: Arc<Forest<LazyLayer>>,
    pub(crate) server: Server,
    dir: tempfile::TempDir,
}

impl Served {
    pub(crate) fn start() -> Self {
        let forest = Arc::new(Forest::new());
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let server = serve(Arc::clone(&forest), dir.path(), &ServeOptions::for_this_user("forest")).unwrap();
        Self { forest, server, dir }
    }

    pub(crate) fn layer(&self, made: &Made) -> LayerSlot {
        self.forest.add_layer(made.diff_id, made.open(), None).unwrap()
    }

    pub(crate) fn snapshot(&self, name: &str, layers: &[LayerSlot]) -> SnapshotSlot {
        self.forest.add_snapshot(&Name::new(name.as_bytes()).unwrap(), layers, None).unwrap()
    }

    pub(crate) fn tree(&self, name: &str) -> PathBuf {
        self.dir.path().join("snapshots").join(name)
    }

    fn image(&self, made: &Made) -> PathBuf {
        self.dir.path().join("layers").join(made.diff_id.to_string())
    }
}

/// A mount that goes away with its owner.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

fn two_layers() -> [Made; 2] {
    let large = pattern(700_000);
    [
        Made::new(&[
            file("bin/tool", &large),
            file("etc/a", b"lower"),
            file("etc/gone", b"x"),
            hard_link("etc/again", "etc/a"),
            symlink("link", "etc/a"),
            directory("var/empty"),
        ]),
        Made::new(&[file("etc/a", b"upper"), whiteout("etc/gone"), file("usr/new", &pattern(5000))]),
    ]
}

#[test]
fn a_layer_behind_a_loop_device_shows_what_its_snapshot_shows() {
    let served = Served::start();
    let layers = two_layers();
    for (number, made) in layers.iter().enumerate() {
        let slot = served.layer(made);
        let name = format!("single-{number}");
        served.snapshot(&name, &[slot]);
        let image = served.image(made);
        let metadata = fs::metadata(&image).unwrap();
        assert_eq!((metadata.len(), metadata.mode()), (ReadAt::size(&*made.bytes), 0o100_400));
        let target = tempfile::tempdir().unwrap();
        run("mount", &["-t", "erofs", "-o", "ro,loop", image.to_str().unwrap(), target.path().to_str().unwrap()]);
        let mounted = Mounted(target.path().to_owned());
        // The kernel's view of one layer shows whiteouts; so that both views agree, an overlay merges each.
        let [below, merged] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let options = format!("lowerdir={}:{}", target.path().display(), below.path().display());
        let options = std::ffi::CString::new(options).unwrap();
        rustix::mount::mount("judge", merged.path(), "overlay", MountFlags::RDONLY, options.as_c_str()).unwrap();
        let overlay = Mounted(merged.path().to_owned());
        let mut judged = Listing::of_overlay(merged.path()).unwrap();
        let mut shown = Listing::of_overlay(&served.tree(&name)).unwrap();
        for listing in [&mut judged, &mut shown] {
            // The root is merged with the empty layer in the kernel, and with nothing in ours.
            listing.nodes.get_mut(&b""[..]).unwrap().attributes.nlink = 0;
        }
        judged.assert_equals(&shown);
        drop(overlay);
        drop(mounted);
    }
    let listed: Vec<_> = fs::read_dir(served.dir.path().join("layers"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(listed, layers.iter().map(|made| made.diff_id.to_string()).collect::<Vec<_>>());
}

#[test]
fn a_layer_as_it_is_shows_what_kernel_erofs_shows() {
    let served = Served::start();
    let marked = Made::new(&[opaque("etc"), directory("etc"), file("etc/a", b"marked"), whiteout("gone")]);
    for made in two_layers().iter().chain([&marked]) {
        let slot = served.layer(made);
        let dir = tempfile::tempdir().unwrap();
        let (image, target) = (dir.path().join("image"), dir.path().join("target"));
        fs::write(&image, made.image()).unwrap();
        fs::create_dir(&target).unwrap();
        rustix::mount::mount(&image, &target, "erofs", MountFlags::RDONLY, None).unwrap();
        let mounted = Mounted(target.clone());
        let raw = served.dir.path().join("raw").join(slot.0.to_string());
        let judged = Listing::of_directory(&target).unwrap();
        judged.assert_equals(&Listing::of_directory(&raw).unwrap());
        drop(mounted);
        served.forest.remove_layer(slot).unwrap();
        assert!(served.server.settle(PATIENCE));
        assert!(!raw.exists());
        served.server.drop_unused().unwrap();
        wait_until("the layer is gone", || !served.forest.has_layer(slot));
    }
}

#[test]
fn a_snapshot_is_what_a_mount_of_its_layers_is() {
    let served = Served::start();
    let layers = two_layers();
    let slots: Vec<LayerSlot> = layers.iter().map(|made| served.layer(made)).collect();
    served.snapshot("both", &slots);
    let target = tempfile::tempdir().unwrap();
    let bytes: Vec<_> = layers.iter().map(|made| Arc::clone(&made.bytes)).collect();
    let _alone = mount(&bytes, target.path());
    let shown = Listing::of_overlay(&served.tree("both")).unwrap();
    Listing::of_overlay(target.path()).unwrap().assert_equals(&shown);
    assert_eq!(fs::read(served.tree("both").join("etc/a")).unwrap(), b"upper");
}

#[test]
fn snapshots_with_a_layer_in_common_share_its_pages() {
    let served = Served::start();
    let layers = two_layers();
    let slots: Vec<LayerSlot> = layers.iter().map(|made| served.layer(made)).collect();
    served.snapshot("one", &slots);
    served.snapshot("two", &slots);
    served.snapshot("lower", &slots[..1]);
    let tool = |name: &str| served.tree(name).join("bin/tool");
    let content = fs::read(tool("one")).unwrap();
    let before = served.server.counters().reads;
    assert!(before > 0);
    for name in ["two", "lower"] {
        assert_eq!(fs::metadata(tool(name)).unwrap().ino(), fs::metadata(tool("one")).unwrap().ino());
        assert!(fs::read(tool(name)).unwrap() == content);
        let ino = |snapshot: &str, path: &str| fs::metadata(served.tree(snapshot).join(path)).unwrap().ino();
        for path in ["", "etc", "bin"] {
            assert_ne!(ino(name, path), ino("one", path), "directory {path:?}");
        }
    }
    assert_eq!(served.server.counters().reads, before, "a page is brought once");
}

#[test]
fn what_is_removed_is_gone_and_what_is_used_stays() {
    let served = Served::start();
    let layers = two_layers();
    let slots: Vec<LayerSlot> = layers.iter().map(|made| served.layer(made)).collect();
    let snapshot = served.snapshot("one", &slots);
    let other = served.snapshot("other", &slots[..1]);
    assert_eq!(fs::read_dir(served.dir.path().join("snapshots")).unwrap().count(), 2);
    // A bind mount and an open file keep a snapshot, also what was never looked at.
    let bound = tempfile::tempdir().unwrap();
    rustix::mount::mount_bind(served.tree("one"), bound.path()).unwrap();
    let bound = Mounted(bound.keep());
    let open = File::open(served.tree("other").join("bin/tool")).unwrap();
    served.forest.remove_snapshot(snapshot).unwrap();
    served.forest.remove_snapshot(other).unwrap();
    assert!(served.forest.remove_snapshot(other).is_err());
    for slot in &slots {
        served.forest.remove_layer(*slot).unwrap();
    }
    assert!(served.server.settle(PATIENCE));
    for name in ["snapshots", "layers"] {
        assert_eq!(fs::read_dir(served.dir.path().join(name)).unwrap().count(), 0, "{name}");
    }
    assert!(!served.tree("one").exists() && !served.image(&layers[0]).exists());
    assert_eq!(fs::read(bound.0.join("etc/a")).unwrap(), b"upper");
    assert_eq!(fs::read(bound.0.join("usr/new")).unwrap(), pattern(5000));
    let mut bytes = vec![0; 1000];
    FileExt::read_exact_at(&open, &mut bytes, 600_000).unwrap();
    assert!(bytes == pattern(700_000)[600_000..][..1000]);
    assert!(served.forest.has_snapshot(snapshot) && served.forest.has_snapshot(other));
    // The name can be given to something else.
    let layer = served.layer(&layers[1]);
    assert_eq!(layer, slots[1], "a layer has its slot for good");
    let again = served.snapshot("one", &[layer]);
    assert!(again != snapshot);
    assert!(!served.tree("one").join("bin").exists());
    assert!(bound.0.join("bin").exists());
    // When nobody uses it any more, it goes as soon as the kernel remembers no name of it.
    drop(bound);
    drop(open);
    served.server.drop_unused().unwrap();
    wait_until("nothing is left of what nobody uses", || {
        !served.forest.has_snapshot(snapshot)
            && !served.forest.has_snapshot(other)
            && !served.forest.has_layer(slots[0])
    });
    assert!(served.forest.has_layer(layer));
    assert_eq!(fs::read(served.tree("one").join("etc/a")).unwrap(), b"upper");
}

#[test]
fn what_nobody_uses_goes_when_it_is_removed() {
    let served = Served::start();
    let layers = two_layers();
    let slots: Vec<LayerSlot> = layers.iter().map(|made| served.layer(made)).collect();
    let snapshot = served.snapshot("one", &slots);
    let bound = tempfile::tempdir().unwrap();
    rustix::mount::mount_bind(served.tree("one"), bound.path()).unwrap();
    let bound = Mounted(bound.keep());
    for root in [&bound.0, &served.tree("one")] {
        assert!(Listing::of_overlay(root).unwrap().nodes.len() > 5);
    }
    assert!(fs::read(served.image(&layers[0])).unwrap().len() > 700_000);
    assert_eq!(fs::read_dir(served.dir.path().join("layers")).unwrap().count(), 2);
    drop(bound);
    served.forest.remove_snapshot(snapshot).unwrap();
    wait_until("the snapshot is gone", || !served.forest.has_snapshot(snapshot));
    for slot in slots {
        assert!(served.forest.has_layer(slot));
        served.forest.remove_layer(slot).unwrap();
        wait_until("the layer is gone", || !served.forest.has_layer(slot));
    }
    // And it is let go of: nobody else has the bytes.
    for made in layers {
        wait_until("the bytes are dropped", || Arc::strong_count(&made.bytes) == 1);
    }
}

#[test]
fn a_snapshot_that_is_cut_is_stale() {
    let served = Served::start();
    let layers = two_layers();
    let slots: Vec<LayerSlot> = layers.iter().map(|made| served.layer(made)).collect();
    let snapshot = served.snapshot("one", &slots);
    let open = File::open(served.tree("one")).unwrap();
    let at = |path: &str| rustix::fs::statat(&open, path, rustix::fs::AtFlags::empty()).map(drop);
    assert_eq!(at("usr"), Ok(()));
    served.forest.cut_snapshot(snapshot);
    assert!(!served.forest.has_snapshot(snapshot));
    assert_eq!(at("bin"), Err(rustix::io::Errno::STALE));
    // A layer that goes with it comes again under other numbers, because the kernel may remember the old ones.
    for (made, slot) in layers.iter().zip(slots) {
        served.forest.remove_layer(slot).unwrap();
        assert!(!served.forest.has_layer(slot));
        assert!(served.layer(made) != slot);
    }
    assert!(served.server.settle(PATIENCE));
    assert!(!served.tree("one").exists());
}

#[test]
fn names_that_come_later_are_found() {
    let served = Served::start();
    let layers = two_layers();
    assert!(!served.tree("late").exists());
    assert!(!served.image(&layers[0]).exists());
    assert_eq!(fs::read_dir(served.dir.path().join("snapshots")).unwrap().count(), 0);
    let slot = served.layer(&layers[0]);
    served.snapshot("late", &[slot]);
    assert!(served.tree("late").join("bin/tool").exists());
    assert!(served.image(&layers[0]).exists());
    assert!(served.server.settle(PATIENCE));
    assert_eq!(fs::read_dir(served.dir.path().join("snapshots")).unwrap().count(), 1);
    let told = rustix::fs::statvfs(served.tree("late")).unwrap();
    assert_eq!(told.f_frsize * told.f_blocks, fs::metadata(served.image(&layers[0])).unwrap().len());
}

#[test]
fn only_root_sees_snapshots_and_layers() {
    let served = Served::start();
    let slot = served.layer(&two_layers()[0]);
    served.snapshot("one", &[slot]);
    let bound = tempfile::tempdir().unwrap();
    fs::set_permissions(bound.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let may = |path: &Path| {
        let id = "65534";
        let path = path.to_str().unwrap();
        let arguments = ["--reuid", id, "--regid", id, "--clear-groups", "--", "ls", path];
        std::process::Command::new("setpriv").args(arguments).output().unwrap().status.success()
    };
    for name in ["snapshots", "layers", "raw"] {
        assert!(!may(&served.dir.path().join(name)), "{name}");
    }
    rustix::mount::mount_bind(served.tree("one"), bound.path()).unwrap();
    let bound = Mounted(bound.keep());
    assert!(may(&bound.0) && may(&bound.0.join("etc")));
}

#[test]
fn a_removal_waits_for_nobody_who_waits_for_bytes() {
    let served = Served::start();
    let [lower, upper] = two_layers();
    let slots = [served.layer(&lower), served.layer(&upper)];
    let snapshot = served.snapshot("one", &slots);
    let tool = served.tree("one").join("bin/tool");
    assert_eq!(fs::metadata(&tool).unwrap().len(), 700_000);
    lower.bytes.forget();
    lower.bytes.script(|_, _| Reaction::Hold);
    let reader = thread::spawn(move || fs::read(tool).unwrap());
    let image = served.image(&lower);
    let raw = thread::spawn(move || fs::read(image).unwrap());
    lower.bytes.wait_for_held(2);
    served.forest.remove_snapshot(snapshot).unwrap();
    for slot in slots {
        served.forest.remove_layer(slot).unwrap();
    }
    assert!(served.server.settle(PATIENCE));
    assert!(!served.tree("one").exists());
    assert!(!reader.is_finished() && !raw.is_finished());
    // What was asked for is answered all the same.
    lower.bytes.script(|_, _| Reaction::Now);
    lower.bytes.release();
    assert!(reader.join().unwrap() == pattern(700_000));
    assert!(raw.join().unwrap().len() > 700_000);
}

#[test]
fn snapshots_come_and_go_under_their_readers() {
    const ROUNDS: usize = 60;
    let served = Served::start();
    let [lower, upper] = two_layers();
    let held = served.layer(&lower);
    let names = ["a", "b", "c"];
    let over = AtomicBool::new(false);
    let seen = AtomicUsize::new(0);
    thread::scope(|scope| {
        for name in names {
            let (served, over, seen) = (&served, &over, &seen);
            scope.spawn(move || {
                let tool = served.tree(name).join("bin/tool");
                while !over.load(Ordering::Relaxed) {
                    // It is there or not; if it is there it is right.
                    match fs::read(&tool) {
                        Ok(bytes) => {
                            assert!(bytes == pattern(700_000));
                            seen.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{error}"),
                    }
                    for entry in fs::read_dir(served.dir.path().join("snapshots")).unwrap() {
                        let found = entry.unwrap().file_name();
                        assert!(names.iter().any(|name| found == *name), "{}", found.display());
                    }
                }
            });
        }
        for round in 0..ROUNDS {
            let layers = [held, served.layer(&upper)];
            let slots = names.map(|name| served.snapshot(name, &layers));
            if round % 10 == 0 {
                let before = seen.load(Ordering::Relaxed);
                wait_until("somebody reads", || seen.load(Ordering::Relaxed) > before);
            }
            for slot in slots {
                served.forest.remove_snapshot(slot).unwrap();
            }
            served.forest.remove_layer(layers[1]).unwrap();
        }
        over.store(true, Ordering::Relaxed);
    });
    served.forest.remove_layer(held).unwrap();
    assert!(served.server.settle(PATIENCE));
    served.server.drop_unused().unwrap();
    for made in [lower, upper] {
        wait_until("nothing is left", || Arc::strong_count(&made.bytes) == 1);
    }
}

/// Inode numbers of everything in a snapshot, without a kernel.
fn numbers(forest: &Forest<LazyLayer>, name: &str) -> BTreeMap<Vec<u8>, u64> {
    let look = |parent, name: &[u8]| forest.lookup(parent, name).unwrap().unwrap().ino;
    let root = look(look(ROOT_INO, b"snapshots"), name.as_bytes());
    let mut found = BTreeMap::from([(Vec::new(), root)]);
    let mut left = vec![(Vec::new(), root)];
    while let Some((path, dir)) = left.pop() {
        forest
            .read_dir(dir, 0, &mut |item| {
                if let ItemKind::File(stat) = item.kind {
                    let path = [&path[..], b"/", item.name].concat();
                    assert_eq!(forest.stat(stat.ino).unwrap(), stat);
                    found.insert(path.clone(), stat.ino);
                    if stat.attributes.kind == FileKind::Directory {
                        left.push((path, stat.ino));
                    }
                }
                ControlFlow::Continue(())
            })
            .unwrap();
    }
    found
}

#[test]
fn numbers_are_made_of_slots_alone() {
    let [lower, upper] = two_layers().map(|made| {
        made.bytes.script(|_, _| Reaction::Now);
        Made { bytes: LazyBytes::local(made.image()), ..made }
    });
    let name = Name::new(&b"s"[..]).unwrap();
    let plant = |slots: [u32; 3], other: bool| {
        let forest = Forest::new();
        if other {
            forest.add_layer(DiffId(Digest::of(Algorithm::Sha256, b"other")), upper.open(), None).unwrap();
        }
        let layers = [(&lower, slots[0]), (&upper, slots[1])]
            .map(|(made, slot)| forest.add_layer(made.diff_id, made.open(), Some(LayerSlot(slot))).unwrap());
        let snapshot = forest.add_snapshot(&name, &layers, Some(SnapshotSlot(slots[2]))).unwrap();
        assert_eq!((layers, snapshot), ([LayerSlot(slots[0]), LayerSlot(slots[1])], SnapshotSlot(slots[2])));
        numbers(&forest, "s")
    };
    let seen = plant([7, 3, 300], false);
    assert_eq!(seen.len(), 11);
    assert_eq!(seen, plant([7, 3, 300], true));
    let moved = plant([7, 3, 301], false);
    for (path, ino) in &seen {
        let is_shared = [&b"/bin/tool"[..], b"/etc/a", b"/etc/again", b"/link", b"/usr/new"].contains(&&path[..]);
        assert_eq!(moved[path] == *ino, is_shared, "{}", String::from_utf8_lossy(path));
    }
}

#[test]
fn slots_and_names_are_given_once() {
    let [lower, upper] = two_layers();
    let forest = Forest::new();
    let slot = forest.add_layer(lower.diff_id, lower.open(), Some(LayerSlot(5))).unwrap();
    assert_eq!(forest.add_layer(lower.diff_id, lower.open(), None).unwrap(), slot);
    let refused = |result: Result<LayerSlot, ForestError>| result.unwrap_err().to_string();
    let text = refused(forest.add_layer(upper.diff_id, upper.open(), Some(slot)));
    assert_eq!(text, format!("cannot give slot 5 to layer {}: layer {} has it", upper.diff_id, lower.diff_id));
    // One that only claims to be the same is another layer, and shares nothing with it.
    let twin = forest.add_layer(lower.diff_id, upper.open(), Some(LayerSlot(7))).unwrap();
    assert_eq!(twin, LayerSlot(7));
    let names = [slot, twin].map(|slot| forest.layer_name(slot).unwrap());
    assert_eq!(names, [lower.diff_id.to_string(), format!("{}.7", lower.diff_id)]);
    let inos = names.map(|name| forest.lookup(3, name.as_bytes()).unwrap().unwrap().ino);
    assert!(inos[0] != inos[1]);
    inos.into_iter().for_each(|ino| forest.forget(ino, 1));
    forest.remove_layer(twin).unwrap();
    assert!(!forest.has_layer(twin) && forest.has_layer(slot));
    // The kernel remembers nothing of it, so another may have the slot.
    assert_eq!(forest.add_layer(upper.diff_id, upper.open(), Some(twin)).unwrap(), twin);
    assert!(matches!(
        forest.add_layer(upper.diff_id, upper.open(), Some(LayerSlot(1 << 24))),
        Err(ForestError::NoSuchSlot(_))
    ));
    let name = |text: &str| Name::new(text.as_bytes()).unwrap();
    let one = forest.add_snapshot(&name("one"), &[slot], Some(SnapshotSlot(9))).unwrap();
    let again = |text: &str, layers: &[LayerSlot], slot| forest.add_snapshot(&name(text), layers, slot).unwrap_err();
    assert!(matches!(again("one", &[slot], None), ForestError::NameTaken(_)));
    assert!(matches!(again("two", &[slot], Some(one)), ForestError::SlotTaken { .. }));
    assert!(matches!(again("two", &[LayerSlot(6)], None), ForestError::NoSuchLayer(6)));
    assert!(matches!(again("two", &[], None), ForestError::Layers { .. }));
    // It takes as many removals as additions, and snapshots keep what they show.
    forest.remove_layer(slot).unwrap();
    assert!(forest.lookup(3, lower.diff_id.to_string().as_bytes()).unwrap().is_some());
    forest.remove_layer(slot).unwrap();
    assert!(matches!(forest.remove_layer(slot), Err(ForestError::NoSuchLayer(5))));
    assert_eq!(forest.lookup(3, lower.diff_id.to_string().as_bytes()).unwrap(), None);
    assert!(forest.has_layer(slot));
    assert!(numbers(&forest, "one").contains_key(&b"/bin/tool"[..]));
    // The kernel has looked it up once, and layers' file as often.
    forest.remove_snapshot(one).unwrap();
    let root = 5 + (9 << 4 | 3);
    assert!(forest.has_snapshot(one));
    forest.forget(root, 1);
    assert!(!forest.has_snapshot(one) && forest.has_layer(slot));
    assert!(matches!(forest.stat(root), Err(Error::NoSuchInode(_))));
    forest.forget(5 + (1 << 8 | 5 << 4 | 3), 1);
    assert!(!forest.has_layer(slot));
}
