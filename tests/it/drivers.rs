//! Layers mounted by the kernel, and handed over under load. Needs root, /dev/fuse, loop devices, EROFS and overlayfs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use headstart::chain::LayerId;
use headstart::drivers::{Backing, DriverError, KernelMounts, LayerBacking, Presented, RunDirectory};
use headstart::erofs::writer::LayerRole;
use headstart::fuse::Server;
use headstart::model::{Algorithm, BlobDigest, DiffId, Digest};
use headstart::sys::loopdev::loop_devices;
use headstart::sys::mount::{Unmount, mount_table};
use headstart::tar::decompress::Compression;
use headstart::testkit::images::{EntryWithContent, directory, file, image_of, whiteout};
use headstart::testkit::layers::{Options, stacks};
use headstart::testkit::layouts::{TestLayer, write_layout};
use headstart::testkit::lazy::{LazyBytes, Reaction};
use headstart::testkit::tar::{RawHeader, TarWriter};
use headstart::testkit::tree::{Listing, pattern};
use headstart::testkit::waiting::PATIENCE;
pub(crate) use headstart::testkit::waiting::wait_until as eventually;
use headstart::vfs::Purpose;
use proptest::prelude::*;

use crate::convert_image::converted;
use crate::mounts::{lazy, mount, run};

fn diff_id(image: &[u8]) -> DiffId {
    DiffId(Digest::of(Algorithm::Sha256, image))
}

/// Layer images as files: lazily filled ones of a FUSE server, and complete ones. And a place to mount them.
struct Stage {
    dir: tempfile::TempDir,
    images: Vec<Vec<u8>>,
}

impl Stage {
    /// The lowest image first.
    fn new(images: Vec<Vec<u8>>) -> Self {
        let stage = Self { dir: tempfile::tempdir().unwrap(), images };
        for name in ["fuse", "local", "mnt", "mnt2", "upper"] {
            fs::create_dir(stage.path(name)).unwrap();
        }
        for (number, image) in stage.images.iter().enumerate() {
            fs::write(stage.local(number), image).unwrap();
        }
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn local(&self, number: usize) -> PathBuf {
        self.path("local").join(number.to_string())
    }

    fn lazy(&self, number: usize) -> PathBuf {
        self.path("fuse").join(number.to_string())
    }

    /// A file system in memory that has the images as files. Its metadata and its bytes come when they are read.
    fn source(&self) -> Arc<LazyBytes> {
        let files: Vec<EntryWithContent> =
            self.images.iter().enumerate().map(|(number, image)| file(&number.to_string(), image)).collect();
        LazyBytes::new(image_of(LayerRole::Bottom, &files).unwrap(), 4096)
    }

    fn serve(&self) -> Server {
        mount(&[self.source()], &self.path("fuse"))
    }

    fn mounts(&self) -> KernelMounts {
        self.impatient_mounts(PATIENCE)
    }

    fn impatient_mounts(&self, patience: Duration) -> KernelMounts {
        KernelMounts::new(RunDirectory::claim(&self.path("run")).unwrap(), patience, true)
    }

    fn layer(&self, number: usize) -> LayerBacking {
        let image = &self.images[number];
        let id = diff_id(image);
        let id = LayerId { diff_id: id, blob: BlobDigest(id.0), anchor: "whole".to_owned() };
        let number = u32::try_from(number).unwrap();
        LayerBacking { number, id, size: image.len() as u64, lazy: None, local: None, tree: None }
    }

    fn lazy_layers(&self) -> Vec<LayerBacking> {
        (0..self.images.len()).map(|n| LayerBacking { lazy: Some(self.lazy(n)), ..self.layer(n) }).collect()
    }

    fn local_layers(&self) -> Vec<LayerBacking> {
        (0..self.images.len()).map(|n| LayerBacking { local: Some(self.local(n)), ..self.layer(n) }).collect()
    }

    fn present(&self, mounts: &KernelMounts, layers: &[LayerBacking]) -> Presented {
        mounts.present(layers, &self.path("mnt"), None).unwrap()
    }

    /// Mounts and loop devices that have to do with this stage.
    fn leftovers(&self) -> Vec<String> {
        let table = mount_table().unwrap().into_iter().map(|entry| entry.mount_point);
        let devices = loop_devices().unwrap().into_iter().map(|device| device.backing);
        table.chain(devices).filter(|path| path.starts_with(self.dir.path())).map(|p| p.display().to_string()).collect()
    }

    /// Checks that nothing is mounted any more. A loop device may be looked at by others when its last mount goes.
    #[track_caller]
    fn assert_clean(&self) {
        eventually("mounts or loop devices are left", || self.leftovers().is_empty());
        assert!(!self.path("run").exists());
    }
}

/// The root of an overlay has as many links as overlayfs likes.
fn listing(path: &Path) -> Listing {
    let mut listing = Listing::of_overlay(path).unwrap();
    listing.nodes.get_mut(&b""[..]).unwrap().attributes.nlink = 0;
    listing
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn all_drivers_show_the_same_tree(stack in stacks(Options { bare: true, ..Options::default() })) {
        let stage = Stage::new(converted(&stack));
        let by_fuse = {
            let server = mount(&lazy(stage.images.clone()), &stage.path("mnt"));
            let listing = listing(&stage.path("mnt"));
            server.unmount(Unmount::Lazy).unwrap();
            server.wait();
            listing
        };
        let server = stage.serve();
        let mounts = stage.mounts();
        for layers in [stage.lazy_layers(), stage.local_layers()] {
            let presented = stage.present(&mounts, &layers);
            prop_assert_eq!(listing(presented.target()).difference(&by_fuse), None);
            prop_assert_eq!(devices(presented.target()).len(), 1);
            drop(presented);
        }
        drop((mounts, server));
        stage.assert_clean();
    }
}

/// What the files below a directory, and it, have as their device. overlayfs lists names of whiteouts now and then.
fn devices(path: &Path) -> BTreeSet<u64> {
    let metadata = match fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return BTreeSet::new(),
        metadata => metadata.unwrap(),
    };
    let entries = metadata.is_dir().then(|| fs::read_dir(path).unwrap());
    let below = entries.into_iter().flatten().flat_map(|entry| devices(&entry.unwrap().path()));
    below.chain([metadata.dev()]).collect()
}

/// Files with their contents, some small and some large, in a layer of its own.
pub(crate) fn contents(layer: u8, count: u8) -> BTreeMap<String, Vec<u8>> {
    let content = |number: u8| {
        let mut bytes = pattern(if number.is_multiple_of(8) { 300_000 } else { 9_000 });
        bytes.iter_mut().for_each(|byte| *byte ^= layer.wrapping_mul(31) ^ number);
        bytes
    };
    (0..count).map(|number| (format!("dir{layer}/file{number}"), content(number))).collect()
}

pub(crate) fn layer_of(files: &BTreeMap<String, Vec<u8>>) -> Vec<u8> {
    let first = files.keys().next().unwrap().split('/').next().unwrap();
    let mut entries = vec![directory(first)];
    entries.extend(files.iter().map(|(path, content)| file(path, content)));
    image_of(LayerRole::Upper, &entries).unwrap()
}

/// Reads all files in a loop until it is dropped, past what is cached, and compares them.
pub(crate) struct Readers {
    stop: Arc<AtomicBool>,
    reads: Arc<AtomicU64>,
    longest: Arc<AtomicU64>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Readers {
    pub(crate) fn start(below: &Path, files: &BTreeMap<String, Vec<u8>>, count: usize) -> Self {
        let (stop, reads, longest) = (Arc::<AtomicBool>::default(), Arc::default(), Arc::default());
        let files: Arc<Vec<(PathBuf, Vec<u8>)>> =
            Arc::new(files.iter().map(|(path, content)| (below.join(path), content.clone())).collect());
        let reader = |number: usize| {
            let (stop, files) = (Arc::clone(&stop), Arc::clone(&files));
            let (reads, longest): (Arc<AtomicU64>, Arc<AtomicU64>) = (Arc::clone(&reads), Arc::clone(&longest));
            thread::spawn(move || {
                let mut bytes = Vec::new();
                // Each begins elsewhere.
                for (path, content) in files.iter().cycle().skip(number * files.len() / 2) {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let begin = Instant::now();
                    let mut file = File::open(path).unwrap();
                    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                    bytes.clear();
                    file.read_to_end(&mut bytes).unwrap();
                    longest.fetch_max(u64::try_from(begin.elapsed().as_micros()).unwrap(), Ordering::Relaxed);
                    assert!(bytes == *content, "wrong bytes in {}", path.display());
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let threads = (0..count).map(reader).collect();
        Self { stop, reads, longest, threads }
    }

    /// Waits until there have been `more` reads of all readers together.
    #[track_caller]
    pub(crate) fn wait_for(&self, more: u64) {
        let goal = self.reads.load(Ordering::Relaxed) + more;
        eventually("the readers stand still", || {
            assert!(self.threads.iter().all(|thread| !thread.is_finished()), "a reader failed");
            self.reads.load(Ordering::Relaxed) >= goal
        });
    }

    /// How many reads there were, and how long the longest took.
    pub(crate) fn finish(mut self) -> (u64, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            thread.join().expect("no read failed");
        }
        (self.reads.load(Ordering::Relaxed), Duration::from_micros(self.longest.load(Ordering::Relaxed)))
    }
}

#[test]
fn layers_change_hands_a_hundred_times_while_they_are_read() {
    const SWAPS: usize = 100;
    let files: Vec<_> = (0..3).map(|layer| contents(layer, 24)).collect();
    let stage = Stage::new(files.iter().map(layer_of).collect());
    let all: BTreeMap<_, _> = files.into_iter().flatten().collect();
    let server = stage.serve();
    let mounts = stage.mounts();
    let presented = stage.present(&mounts, &stage.lazy_layers());
    assert!(!presented.is_local());
    let readers = Readers::start(presented.target(), &all, 2);
    readers.wait_for(all.len() as u64);
    let (mut longest_swap, mut swaps) = (Duration::ZERO, 0);
    for round in 0..SWAPS {
        for (number, layer) in (0..stage.images.len()).zip(0..) {
            let begin = Instant::now();
            if round % 2 == 0 {
                mounts.hand_over(layer, &stage.local(number)).unwrap();
            } else {
                mounts.take_back(layer, &stage.lazy(number)).unwrap();
            }
            longest_swap = longest_swap.max(begin.elapsed());
            swaps += 1;
        }
        readers.wait_for(4);
        assert_eq!(presented.is_local(), round % 2 == 0);
    }
    for (number, layer) in (0..stage.images.len()).zip(0..) {
        mounts.hand_over(layer, &stage.local(number)).unwrap();
    }
    for (number, report) in presented.layers().into_iter().rev().enumerate() {
        assert_eq!(report.file, stage.local(number).canonicalize().unwrap());
        assert!(matches!(report.backing, Backing::Local(_)), "{report:?}");
        // The temporary directory is on a disk that can.
        assert!(report.direct_io && report.failure.is_none(), "{report:?}");
        let device = report.device.unwrap();
        let named = loop_devices().unwrap().into_iter().find(|entry| entry.number == device).unwrap();
        assert_eq!(named.backing, report.file);
    }
    // From here on nobody asks the server for anything.
    let requests = server.requests();
    readers.wait_for(3 * all.len() as u64);
    assert_eq!(server.requests(), requests);
    let (reads, longest) = readers.finish();
    eprintln!("{swaps} swaps, longest {longest_swap:?}; {reads} reads, longest {longest:?}");
    assert!(longest < Duration::from_secs(5), "a read took {longest:?}");
    drop((presented, mounts, server));
    stage.assert_clean();
}

/// The program serving a file system that has `images` as files 0, 1, ….
fn serving_process(stage: &Stage) -> Child {
    let mut tar = TarWriter::new();
    for (number, image) in stage.images.iter().enumerate() {
        tar.sized(&RawHeader::new(b'0', number.to_string()), image);
    }
    let layer = TestLayer::of_tar(&tar.finish(), Compression::Plain);
    write_layout(&stage.path("source"), &[layer]).unwrap();
    let program = env!("CARGO_BIN_EXE_headstart");
    let reference = |name: &str| format!("oci:{}:latest", stage.path(name).display());
    let root = stage.path("root").display().to_string();
    run(program, &["--root", &root, "convert", &reference("source"), &reference("converted")]);
    let target = stage.path("fuse");
    let child = Command::new(program)
        .args(["--root", &root, "mount", "--driver", "fuse", "--foreground", &reference("converted")])
        .arg(&target)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    eventually("the program does not serve", || target.join("0").exists());
    child
}

#[test]
fn the_server_of_lazy_files_may_be_killed_once_all_is_handed_over() {
    let files: Vec<_> = (0..2).map(|layer| contents(layer, 16)).collect();
    let stage = Stage::new(files.iter().map(layer_of).collect());
    let all: BTreeMap<_, _> = files.into_iter().flatten().collect();
    let mut server = serving_process(&stage);
    let mounts = stage.mounts();
    let presented = stage.present(&mounts, &stage.lazy_layers());
    let readers = Readers::start(presented.target(), &all, 2);
    readers.wait_for(10);
    for (number, layer) in (0..stage.images.len()).zip(0..) {
        mounts.hand_over(layer, &stage.local(number)).unwrap();
    }
    assert!(presented.is_local());
    server.kill().unwrap();
    server.wait().unwrap();
    readers.wait_for(4 * all.len() as u64);
    let (_, longest) = readers.finish();
    assert!(longest < Duration::from_secs(5), "a read took {longest:?}");
    // And the whole tree, with nothing cached of it.
    rustix::mount::unmount(stage.path("fuse"), rustix::mount::UnmountFlags::DETACH).unwrap();
    let shown = Listing::of_overlay(presented.target()).unwrap();
    assert_eq!(shown.nodes.len(), all.len() + 3);
    drop((presented, mounts));
    stage.assert_clean();
}

#[test]
fn stacks_share_the_mounts_of_their_layers() {
    let files: Vec<_> = (0..3).map(|layer| contents(layer, 2)).collect();
    let stage = Stage::new(files.iter().map(layer_of).collect());
    let server = stage.serve();
    let mounts = stage.mounts();
    let layers = stage.lazy_layers();
    let one = mounts.present(&layers[..2], &stage.path("mnt"), None).unwrap();
    // Twice in a stack, and in two stacks.
    let shared = [layers[1].clone(), layers[2].clone(), layers[1].clone()];
    let two = mounts.present(&shared, &stage.path("mnt2"), None).unwrap();
    assert_eq!(mounts.layers().len(), 3);
    let devices = |report: &[headstart::drivers::LayerReport]| report.iter().map(|r| r.device).collect::<Vec<_>>();
    let (first, second) = (devices(&one.layers()), devices(&two.layers()));
    assert_eq!((first.len(), second.len()), (2, 2));
    assert_eq!(first[0], second[0], "layer 1 is the topmost of both");
    one.take_away(Unmount::Strict).unwrap();
    assert!(one.is_over().unwrap() && !two.is_over().unwrap());
    drop(one);
    assert_eq!(mounts.layers().len(), 2);
    for number in [1, 2] {
        for (path, content) in &files[number] {
            assert!(fs::read(stage.path("mnt2").join(path)).unwrap() == *content);
        }
    }
    assert!(!stage.path("mnt2/dir0").exists());
    // Somebody else takes it away.
    rustix::mount::unmount(stage.path("mnt2"), rustix::mount::UnmountFlags::empty()).unwrap();
    assert!(two.is_over().unwrap());
    two.take_away(Unmount::Strict).unwrap();
    drop((two, mounts, server));
    stage.assert_clean();
}

#[test]
fn a_layer_that_somebody_else_shows_is_the_kernels_for_those_who_come_later() {
    let stage = Stage::new(vec![image_of(LayerRole::Bottom, &[file("who", b"the kernel")]).unwrap()]);
    let tree = stage.path("tree");
    fs::create_dir(&tree).unwrap();
    // What differs so that it can be told apart.
    fs::write(tree.join("who"), "somebody else").unwrap();
    let mounts = stage.mounts();
    let layer = LayerBacking { tree: Some(tree), ..stage.layer(0) };
    let before = mounts.present(std::slice::from_ref(&layer), &stage.path("mnt"), None).unwrap();
    let held = mounts.hold(&layer).unwrap();
    for _ in 0..2 {
        mounts.hand_over(0, &stage.local(0)).unwrap();
    }
    assert!(matches!(held.report().backing, Backing::Local(_)), "{:?}", held.report());
    let after = mounts.stack(std::slice::from_ref(&held), &stage.path("mnt2"), None).unwrap();
    let who = |presented: &Presented| fs::read_to_string(presented.target().join("who")).unwrap();
    assert_eq!([who(&before), who(&after)], ["somebody else", "the kernel"]);
    assert!(!before.is_local() && after.is_local(), "only one of them needs nobody");
    drop((before, after, held, mounts));
    stage.assert_clean();
}

#[test]
fn whiteouts_of_a_single_layer_do_not_show() {
    let image = image_of(LayerRole::Upper, &[file("kept", b"x"), whiteout("gone")]).unwrap();
    let stage = Stage::new(vec![image]);
    let mounts = stage.mounts();
    let presented = stage.present(&mounts, &stage.local_layers());
    let names: Vec<_> = fs::read_dir(presented.target()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["kept"]);
    drop((presented, mounts));
    stage.assert_clean();
}

#[test]
fn a_stack_with_a_writable_layer_keeps_what_is_written() {
    let stage = Stage::new(vec![image_of(LayerRole::Upper, &[file("old", b"old"), file("gone", b"")]).unwrap()]);
    let mounts = stage.mounts();
    let (target, upper) = (stage.path("mnt"), stage.path("upper"));
    for round in 0..2 {
        let presented = mounts.present(&stage.local_layers(), &target, Some(&upper)).unwrap();
        if round == 0 {
            fs::write(target.join("new"), "new").unwrap();
            fs::write(target.join("old"), "changed").unwrap();
            fs::remove_file(target.join("gone")).unwrap();
        }
        assert_eq!(fs::read_to_string(target.join("new")).unwrap(), "new");
        assert_eq!(fs::read_to_string(target.join("old")).unwrap(), "changed");
        assert!(!target.join("gone").exists());
        presented.take_away(Unmount::Strict).unwrap();
    }
    assert_eq!(fs::read_to_string(upper.join("upper/new")).unwrap(), "new");
    drop(mounts);
    stage.assert_clean();
}

#[test]
fn files_that_are_no_layers_are_refused_and_leave_nothing() {
    let mut images = vec![layer_of(&contents(0, 2)), layer_of(&contents(1, 2))];
    images.push(vec![7; 8192]);
    let stage = Stage::new(images);
    let server = stage.serve();
    let mounts = stage.mounts();
    for layers in [stage.lazy_layers(), stage.local_layers()] {
        let refused = mounts.present(&layers, &stage.path("mnt"), None);
        assert!(matches!(&refused, Err(DriverError::Refused { diff_id: id, .. }) if *id == diff_id(&stage.images[2])));
        eventually("layers stay mounted", || mounts.layers().is_empty());
    }
    let mut layers = stage.local_layers();
    layers.truncate(2);
    layers[1].local = Some(stage.local(2));
    let refused = mounts.present(&layers, &stage.path("mnt"), None);
    assert!(matches!(refused, Err(DriverError::Size { .. })), "{refused:?}");
    assert!(matches!(mounts.present(&[], &stage.path("mnt"), None), Err(DriverError::Empty)));
    let gone = mounts.present(&stage.lazy_layers()[..2], &stage.path("no/such/target"), None);
    assert!(matches!(gone, Err(DriverError::Stack(_))), "{gone:?}");

    // A hand-over to what is not the layer leaves it as it was.
    let presented = stage.present(&mounts, &stage.lazy_layers()[..2]);
    for wrong in [stage.local(2), stage.path("local/none"), stage.path("local")] {
        mounts.hand_over(0, &wrong).unwrap_err();
        assert!(presented.layers()[1].failure.is_some());
        assert!(!presented.is_local());
    }
    assert!(matches!(mounts.hand_over(7, &stage.local(0)), Err(DriverError::NotMounted(7))));
    let other = LayerBacking { number: 0, ..stage.local_layers()[1].clone() };
    assert!(matches!(mounts.hold(&other), Err(DriverError::Taken { number: 0, .. })));
    for (path, content) in contents(0, 2).iter().chain(&contents(1, 2)) {
        assert!(fs::read(presented.target().join(path)).unwrap() == *content);
    }
    drop((presented, mounts, server));
    stage.assert_clean();
}

#[test]
fn a_lazy_file_whose_bytes_do_not_come_holds_nobody_for_ever() {
    let stage = Stage::new(vec![layer_of(&contents(0, 2))]);
    let source = stage.source();
    source.script(|_, purpose| if purpose == Purpose::Read { Reaction::Hold } else { Reaction::Soon });
    let server = mount(&[Arc::clone(&source)], &stage.path("fuse"));
    let mounts = stage.impatient_mounts(Duration::from_millis(200));
    let slow = mounts.present(&stage.lazy_layers(), &stage.path("mnt"), None);
    assert!(matches!(slow, Err(DriverError::Slow { .. })), "{slow:?}");
    // What the kernel was told to mount is there in the end, and goes again.
    source.script(|_, _| Reaction::Soon);
    source.release();
    drop(mounts);
    stage_goes(&stage, &server);
}

/// Waits until nothing but the server's own mount is left.
#[track_caller]
fn stage_goes(stage: &Stage, server: &Server) {
    let own = stage.path("fuse").display().to_string();
    eventually("mounts stay", || stage.leftovers().iter().all(|left| *left == own) && !stage.path("run").exists());
    server.unmount(Unmount::Lazy).unwrap();
    server.wait();
    stage.assert_clean();
}
