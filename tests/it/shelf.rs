//! Layers on directories of their own, stacked by overlayfs as a container engine does. Needs root, /dev/fuse, loop devices,
//! EROFS and overlayfs.

use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use headstart::chain::LayerSlot;
use headstart::daemon::config::{Config, Surroundings};
use headstart::daemon::host::{Host, Seat, ShelfDir};
use headstart::daemon::image::OpenImage;
use headstart::daemon::place::Place;
use headstart::drivers::{Backing, Driver, Wanted};
use headstart::sys::loopdev::loop_devices;
use headstart::sys::mount::{Unmount, mount_table, mounted_on, unmount};
use headstart::testkit::tree::Listing;
use headstart::unpack::{Fill, FillOptions, Persistence};
use rustix::mount::MountFlags;
use tokio::runtime::Runtime;

use crate::cli::stage::{Stage, noise, reference, tar, wait_until};

/// A daemon's rooms in this process.
pub(crate) struct Rooms {
    pub(crate) host: Arc<Host>,
    runtime: Runtime,
}

impl Rooms {
    pub(crate) fn open(stage: &Stage) -> Self {
        let config = stage.path("rooms.toml");
        let text = format!("root = {:?}\nrun = {:?}\n[fill]\nenabled = false\n", stage.root(), stage.path("run"));
        fs::write(&config, text).unwrap();
        let settings = Config::load(Some(&config), &Surroundings { is_root: true, ..Surroundings::default() }).unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let place = Place::take(&settings.root, &settings.run).unwrap();
        let host =
            Host::open(&settings, runtime.handle().clone(), Some(Seat { place, keeper: None, link: None })).unwrap();
        Self { host, runtime }
    }

    pub(crate) fn image(&self, reference: &str) -> OpenImage {
        let house = self.host.house();
        self.runtime.block_on(async {
            let documents = house.documents(&reference.parse().unwrap(), None).await.unwrap();
            house.open_image(documents).await.unwrap()
        })
    }

    fn hold(&self, image: &OpenImage, wanted: Driver) -> Vec<ShelfDir> {
        let slots = (1..).map(LayerSlot);
        let shelf = self.host.shelf();
        let hold = |(layer, slot)| shelf.hold_as(layer, Some(slot), Wanted::Driver(wanted)).unwrap();
        image.layers.iter().zip(slots).map(hold).collect()
    }

    fn fill(&self, image: &OpenImage) {
        let options = FillOptions { start_delay: Duration::ZERO, persistence: Persistence::Once };
        let fill = Fill::start(self.runtime.handle(), &image.layers, options);
        self.runtime.block_on(fill.finished()).unwrap();
    }

    /// As a daemon ends.
    pub(crate) fn end(self) {
        self.runtime.block_on(self.host.shut_down(Duration::from_secs(60)));
        drop(self.host);
        self.runtime.shutdown_timeout(Duration::from_secs(60));
    }
}

/// An overlay that a container engine mounts.
struct Overlay(PathBuf);

impl Overlay {
    fn mount(dirs: &[ShelfDir], target: PathBuf) -> Self {
        let lowers: Vec<String> = dirs.iter().rev().map(|dir| dir.path().display().to_string()).collect();
        let options = CString::new(format!("lowerdir={}", lowers.join(":"))).unwrap();
        rustix::mount::mount("overlay", &target, "overlay", MountFlags::RDONLY, options.as_c_str()).unwrap();
        Self(target)
    }

    fn listing(&self) -> Listing {
        listing(&self.0)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        unmount(&self.0, Unmount::Lazy).unwrap();
    }
}

/// The root of an overlay has as many links as overlayfs likes.
fn listing(path: &Path) -> Listing {
    let mut listing = Listing::of_overlay(path).unwrap();
    listing.nodes.get_mut(&b""[..]).unwrap().attributes.nlink = 0;
    listing
}

fn layers(seed: u64) -> Vec<Vec<u8>> {
    vec![
        tar(&[("bin/", b""), ("bin/tool", &noise(seed, 700_000)), ("etc/", b""), ("etc/a", b"1"), ("etc/gone", b"x")]),
        tar(&[("etc/", b""), ("etc/.wh.gone", b""), ("etc/a", b"2"), ("var/", b""), ("var/old", b"o")]),
        tar(&[("var/", b""), ("var/.wh..wh..opq", b""), ("var/new", b"n"), ("large", &noise(seed + 1, 3 << 20))]),
    ]
}

/// What of the stage is mounted, and loop devices on files of it.
fn leftovers(stage: &Stage) -> Vec<String> {
    let below = stage.root().parent().unwrap().to_owned();
    let table = mount_table().unwrap().into_iter().map(|entry| entry.mount_point);
    let devices = loop_devices().unwrap().into_iter().map(|device| device.backing);
    table.chain(devices).filter(|path| path.starts_with(&below)).map(|path| path.display().to_string()).collect()
}

#[test]
fn layers_on_the_shelf_stack_to_their_image_with_every_driver() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&layers(1));
    let registry = stage.serve(&converted, &[]);
    let rooms = Rooms::open(&stage);
    let image = rooms.image(&registry.image());
    let run = stage.path("run").canonicalize().unwrap();
    let mut seen = Vec::new();
    for driver in [Driver::Fuse, Driver::Kernel, Driver::Local] {
        if driver == Driver::Local {
            rooms.fill(&image);
        }
        let dirs = rooms.hold(&image, driver);
        for (number, dir) in (1..).zip(&dirs) {
            assert_eq!(dir.path(), run.join(format!("l/{number}")));
            let (is, why) = dir.driver();
            // A layer that is small enough is local as soon as it was looked at.
            let fits = is == driver || (is, driver) == (Driver::Local, Driver::Kernel);
            assert!(dir.number() == number && fits, "{is} and not {driver}: {why}");
        }
        let overlay = Overlay::mount(&dirs, stage.make(&driver.to_string()));
        assert_eq!(fs::read(overlay.0.join("etc/a")).unwrap(), b"2");
        for gone in ["etc/gone", "var/old"] {
            assert!(!overlay.0.join(gone).exists(), "{gone} with driver {driver}");
        }
        seen.push(overlay.listing());
        // What stands on a layer keeps it, though nobody holds it any more.
        let paths: Vec<PathBuf> = dirs.iter().map(|dir| dir.path().to_owned()).collect();
        drop(dirs);
        // Whoever hands a layer over at this moment holds it for as long.
        let is_gone = |path: &PathBuf| mounted_on(path).unwrap().is_none() && !path.exists();
        wait_until("the layers are unmounted", || paths.iter().all(is_gone));
        assert_eq!(overlay.listing().difference(&seen[0]), None);
    }
    for other in &seen[1..] {
        other.assert_equals(&seen[0]);
    }
    // The merge of this program is of the same opinion.
    let request = headstart::daemon::host::MountRequest {
        image: registry.image().parse().unwrap(),
        platform: None,
        mount_point: stage.make("merged").canonicalize().unwrap(),
        upper: None,
        driver: Wanted::Driver(Driver::Fuse),
        fill: false,
    };
    let claim = rooms.host.claim(&request.mount_point, None).unwrap();
    let merged = request.mount_point.clone();
    rooms.runtime.block_on(rooms.host.mount(claim, request)).unwrap();
    listing(&merged).assert_equals(&seen[0]);
    drop(image);
    rooms.end();
    wait_until("everything is unmounted", || leftovers(&stage).is_empty());
}

#[test]
fn a_layer_is_handed_over_under_its_readers() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&layers(3));
    let registry = stage.serve(&converted, &["--latency", "5"]);
    let rooms = Rooms::open(&stage);
    let image = rooms.image(&registry.image());
    let dirs = rooms.hold(&image, Driver::Kernel);
    let again = rooms.hold(&image, Driver::Kernel);
    assert!(dirs.iter().zip(&again).all(|(one, other)| one.path() == other.path()));
    let overlay = Overlay::mount(&dirs, stage.make("merged"));
    let contents = [("bin/tool", noise(3, 700_000)), ("large", noise(4, 3 << 20)), ("etc/a", b"2".to_vec())];
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut rounds = 0_u64;
            while !stop.load(Ordering::Relaxed) || rounds < 3 {
                for (path, content) in &contents {
                    let file = fs::File::open(overlay.0.join(path)).unwrap();
                    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                    assert!(fs::read(overlay.0.join(path)).unwrap() == *content, "{path} in round {rounds}");
                }
                rounds += 1;
            }
        });
        rooms.fill(&image);
        let is_local = |dir: &ShelfDir| matches!(dir.report().backing, Backing::Local(_));
        wait_until("the hand-over", || dirs.iter().chain(&again).all(is_local) || reader.is_finished());
        stop.store(true, Ordering::Relaxed);
        reader.join().unwrap();
    });
    for dir in &dirs {
        assert_eq!(dir.driver(), (Driver::Local, "handed over to the kernel".to_owned()));
        assert!(dir.report().file.starts_with(stage.root().canonicalize().unwrap()), "{:?}", dir.report());
    }
    drop(dirs);
    assert!(again.iter().all(|dir| mounted_on(dir.path()).unwrap().is_some()), "somebody holds them");
    drop((overlay, again, image));
    rooms.end();
    wait_until("everything is unmounted", || leftovers(&stage).is_empty());
}

#[test]
fn layers_that_claim_the_same_are_kept_apart() {
    let stage = Stage::new();
    let content = noise(5, 2 << 20);
    let (_, one) = stage.images(&[tar(&[("a", &content)])]);
    let two = stage.path("two");
    stage.ok(&["convert", "--level", "1", &reference(&stage.path("source")), &reference(&two)]);
    let rooms = Rooms::open(&stage);
    let images = [rooms.image(&reference(&one)), rooms.image(&reference(&two))];
    let [a, b] = [&images[0].layers[0], &images[1].layers[0]];
    assert!(a.diff_id() == b.diff_id() && a.blob() != b.blob(), "the same layer, stored in two ways");
    for driver in [Driver::Kernel, Driver::Fuse] {
        let shelf = rooms.host.shelf();
        let hold = |layer, slot| shelf.hold_as(layer, slot, Wanted::Driver(driver));
        let dirs = [hold(a, None).unwrap(), hold(b, Some(LayerSlot(9))).unwrap()];
        assert!(dirs[0].path() != dirs[1].path());
        assert_eq!(hold(a, None).unwrap().path(), dirs[0].path());
        assert!(hold(a, Some(LayerSlot(9))).is_err(), "the number is the other's");
        let mut files: Vec<_> =
            fs::read_dir(stage.path("run/fs/layers")).unwrap().map(|e| e.unwrap().file_name()).collect();
        files.sort();
        assert_eq!(files.len(), 2, "{files:?}");
        for dir in &dirs {
            assert!(fs::read(dir.path().join("a")).unwrap() == content);
        }
    }
    drop(images);
    rooms.end();
    wait_until("everything is unmounted", || leftovers(&stage).is_empty());
}
