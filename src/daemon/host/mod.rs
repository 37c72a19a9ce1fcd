//! A process that serves mounts: the rooms below, opened once, and any number of mounts on top of them.
//!
//! The daemon is a host that stays; `headstart mount` without a daemon starts one for a single mount, which ends with it.
//!
//! Guarantees: a mount that was announced is usable and recorded; however a mount ends (asked, unmounted by somebody else,
//! its host told to stop) neither it nor its record is left, unless the process is killed, and then the record tells.
//! Whoever waits for an image to open holds no thread. Nothing here looks into a mount of this process on a thread that
//! serves one. Refuses to know how it was started and how it is asked.

mod bounds;
mod grove;
mod kernel;
mod lookout;
mod mounted;
mod shelf;
mod shown;
mod succession;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::config::Config as Settings;
use super::image::{Documents, House, Lazy, OpenImage};
use super::keeper::Keeper;
use super::mounts::{Claim, Mounts};
use super::place::Place;
use super::pulls::Pulls;
use super::recorder::WrittenMount;
use crate::chain::LayerSlot;
use crate::control::MountRecord;
use crate::drivers::{RunDirectory, Wanted};
use crate::fetch::{Counters, LayerImage};
use crate::fuse;
use crate::oci::{Platform, Reference};
use crate::snapshots::SnapshotsConfig;
use crate::sys::mount;
use crate::unpack::{Fill, FillOptions, Persistence};
use crate::vfs::{Layer, Vfs};

use lookout::Watch;

pub use grove::{Grove, Listed, Planted, Shoot};
pub use kernel::{left_behind, sweep, take_away_left};
pub use mounted::{Mounted, NeverLocal, layer_state};
pub use shelf::{Shelf, ShelfDir, layer_id};
pub use shown::{Driver, Shown};

/// What to mount where.
#[derive(Debug, Clone)]
pub struct MountRequest {
    /// The image.
    pub image: Reference,
    /// Which of a multi-platform image; none is this machine's.
    pub platform: Option<Platform>,
    /// The mount point, absolute and without links: see [`mount::check_mount_point`].
    pub mount_point: PathBuf,
    /// Directory of a writable layer on top.
    pub upper: Option<PathBuf>,
    /// How it is presented.
    pub driver: Wanted,
    /// Bring all of it in the background, if the configuration does not say otherwise.
    pub fill: bool,
}

/// A mount that is not there.
#[derive(Debug, thiserror::Error)]
#[error("cannot find a mount of this process on {}", .0.display())]
pub struct NoSuchMount(pub PathBuf);

/// Too late for a mount.
#[derive(Debug, thiserror::Error)]
#[error("cannot mount: the process that would serve it is about to end")]
pub struct Closed;

/// What makes a host the daemon.
#[derive(Debug)]
pub struct Seat {
    /// That there is no other one.
    pub place: Place,
    /// Who keeps its connection beyond it, if anybody is to.
    pub keeper: Option<Keeper>,
    /// The connection of a daemon before it.
    pub link: Option<fuse::Link>,
}

impl Seat {
    /// Has the connection kept. Without that it ends with this process, as it did when there was nobody to keep it.
    fn keep(&self, grove: &Grove) {
        let kept = grove.kept();
        let Some((keeper, kept)) = self.keeper.as_ref().zip(kept.as_ref()) else { return };
        if let Err(error) = keeper.keep(kept, !grove.was_taken_over()) {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "nobody keeps the FUSE connection should this process end: mounts end with it");
        }
    }
}

/// A process that serves mounts.
#[derive(Debug)]
pub struct Host {
    settings: Settings,
    house: House,
    records: Mounts,
    shelf: Arc<Shelf>,
    runtime: Handle,
    /// The seat of the daemon, if this is it.
    daemon: Option<Seat>,
    /// The common connection, or why there is none, if there is more to say.
    grove: Result<Arc<Grove>, Option<String>>,
    watch: Watch,
    since: Instant,
    table: Mutex<Table>,
    /// How many mounts are there or still served; tells each change.
    count: watch::Sender<usize>,
}

/// Mounts by number, in the order in which they were made; those that were taken away and are still in use included.
#[derive(Debug, Default)]
struct Table {
    next: u64,
    doors: Doors,
    mounts: BTreeMap<u64, Arc<Mounted>>,
    /// What the layers of mounts that are gone have cost.
    retired: Counters,
}

/// Whether anything is mounted any more.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Doors {
    #[default]
    Open,
    /// Nothing, and what there is will be taken away.
    Closed,
    /// Nothing, and what there is stays for the next daemon, also what comes late.
    Left,
}

impl Host {
    /// Opens the rooms below, and for the daemon, which has a place, the connection that its mounts have in common.
    ///
    /// # Errors
    /// A root that cannot be used, or a connection that cannot be mounted.
    pub fn open(settings: &Settings, runtime: Handle, daemon: Option<Seat>) -> anyhow::Result<Arc<Self>> {
        let mut house = House::open(settings, runtime.clone())?;
        if daemon.is_some() {
            house.open_snapshots(SnapshotsConfig { sync: settings.containerd.sync })?;
        }
        sweep(&settings.root);
        let mut daemon = daemon;
        let link = daemon.as_mut().and_then(|seat| seat.link.take());
        let records = Mounts::open(&settings.root)?;
        // The connection comes last: behind what may fail, because it may be one that others have in use.
        let (grove, shelf) = match &daemon {
            None => (Err(None), Shelf::of_process(settings, runtime.clone())),
            Some(_) if !rustix::process::geteuid().is_root() => {
                let why = "only root binds mounts: it has a connection of its own".to_owned();
                (Err(Some(why)), Shelf::of_process(settings, runtime.clone()))
            }
            Some(seat) => {
                let run = RunDirectory::claim(&settings.run)?;
                let place = seat.place.file_system();
                let grove = Grove::plant_on(&place, settings.fetch.deadline, "headstart", link)?;
                seat.keep(&grove);
                let shelf = Shelf::of_daemon(settings, runtime.clone(), run, &grove);
                (Ok(grove), shelf)
            }
        };
        let host = Arc::new(Self {
            settings: settings.clone(),
            house,
            records,
            shelf,
            runtime,
            daemon,
            grove,
            watch: Watch::default(),
            since: Instant::now(),
            table: Mutex::default(),
            count: watch::Sender::new(0),
        });
        host.runtime.spawn(bounds::keep_in_bounds(Arc::downgrade(&host)));
        Ok(host)
    }

    /// The rooms below.
    pub const fn house(&self) -> &House {
        &self.house
    }

    /// The layers that it has mounted.
    pub const fn shelf(&self) -> &Arc<Shelf> {
        &self.shelf
    }

    /// The configuration this was opened with.
    pub const fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Where the daemon writes down what it pulls for others, if this is it.
    pub(super) fn pulls(&self) -> Option<Pulls> {
        self.daemon.is_some().then(|| Pulls::new(&self.settings.root))
    }

    /// How long this has been here.
    pub fn uptime(&self) -> Duration {
        self.since.elapsed()
    }

    /// Takes a mount point, and the directory that a writable layer is kept in, for a mount of this process. Waits for the
    /// disk.
    ///
    /// # Errors
    /// Somebody has one of them, or it is no free directory, or one of this program's own.
    pub fn claim(&self, mount_point: &Path, upper: Option<&Path>) -> anyhow::Result<Claim> {
        self.records.check(mount_point, upper, [&self.settings.root, &self.settings.run])?;
        let claim = self.records.claim(mount_point)?;
        // Nobody may have mounted anything since the caller looked.
        mount::check_mount_point(mount_point)?;
        Ok(claim)
    }

    /// Opens the image and mounts it on the mount point of `claim`. It is usable when this is done. Dropped before, it
    /// leaves nothing behind.
    ///
    /// # Errors
    /// Anything on the way there.
    pub async fn mount(self: &Arc<Self>, claim: Claim, request: MountRequest) -> anyhow::Result<Arc<Mounted>> {
        let documents = self.house.documents(&request.image, request.platform.as_ref()).await?;
        self.mount_documents(claim, request, documents, false).await
    }

    async fn mount_documents(
        self: &Arc<Self>,
        mut claim: Claim,
        request: MountRequest,
        documents: Documents,
        adopt: bool,
    ) -> anyhow::Result<Arc<Mounted>> {
        let image = self.house.bring_image(documents, None).await?;
        let layers = image.open_stack().await?;
        let host = Arc::clone(self);
        let mounting = self.runtime.spawn_blocking(move || {
            let fills = request.fill && host.settings.fill.enabled;
            let written = WrittenMount::new(&host.house, &image, &request.mount_point)?;
            let shown = host.show(&image, layers, &request, &claim, (written.as_ref(), adopt))?;
            let record = MountRecord {
                image: request.image.to_string(),
                manifest: image.documents.digest,
                mount_point: request.mount_point,
                driver: shown.driver().name.to_owned(),
                driver_wanted: request.driver,
                pid: std::process::id(),
                upper: request.upper,
                no_fill: !request.fill,
                daemon: host.socket(),
            };
            claim.publish(&record)?;
            let fill = fills.then(|| Fill::start(&host.runtime, &image.layers, host.fill_options()));
            let mounted = Arc::new(Mounted::new(image, shown, record, (claim, written), fill));
            host.enter(&mounted)?;
            anyhow::Ok(mounted)
        });
        let mounted = mounting.await.context("cannot mount: the thread that does it broke down")??;
        tracing::info!(
            image = %mounted.record().image,
            mount_point = %mounted.record().mount_point.display(),
            driver = mounted.record().driver,
            "mounted"
        );
        Ok(mounted)
    }

    /// Shows an image at its mount point. Waits for the kernel.
    fn show(
        &self,
        image: &OpenImage,
        layers: Vec<Layer<Lazy>>,
        request: &MountRequest,
        claim: &Claim,
        (written, adopt): (Option<&WrittenMount>, bool),
    ) -> anyhow::Result<Box<dyn Shown>> {
        let slots = written.map(|written| written.layer_slots(image)).unwrap_or_default();
        match kernel::show(&self.shelf, image, request, &slots, adopt) {
            Ok(shown) => Ok(shown),
            Err(why) => {
                if adopt && mount::is_ours(&request.mount_point)? {
                    mount::unmount(&request.mount_point, mount::Unmount::Lazy)?;
                }
                let slot = written.map(|written| written.slot().0);
                let shown = self.show_through_fuse(image, layers, request, claim, (slot, &slots))?;
                Ok(Box::new(shown::Explained(shown, why)))
            }
        }
    }

    fn show_through_fuse(
        &self,
        image: &OpenImage,
        layers: Vec<Layer<Lazy>>,
        request: &MountRequest,
        claim: &Claim,
        (slot, layer_slots): (Option<u32>, &[Option<LayerSlot>]),
    ) -> anyhow::Result<Box<dyn Shown>> {
        let why = match &self.grove {
            // Without a common connection there is nothing to explain.
            Err(why) => why.clone(),
            Ok(_) if !image.is_of_single_blobs() => {
                Some("a layer keeps data in other blobs: it has a connection of its own".to_owned())
            }
            Ok(grove) => {
                let shoots = self.shoots(image, layers, layer_slots);
                let planted = grove.grow(shoots, slot)?;
                let bound = grove::bind(planted, &request.mount_point, request.upper.as_deref(), &self.watch)?;
                return Ok(Box::new(bound));
            }
        };
        shown::own_connection(Vfs::new(layers)?, why, request, claim, &self.settings)
    }

    /// How many FUSE connections are served.
    pub fn connections(&self) -> u64 {
        let own: u64 = self.mounts().iter().map(|mounted| mounted.own_connections()).sum();
        own + u64::from(self.grove.is_ok()) + self.shelf.own_connections()
    }

    /// How images and layers are completed in the background.
    pub(super) fn fill_options(&self) -> FillOptions {
        FillOptions { start_delay: self.settings.fill.start_delay, persistence: Persistence::Forever }
    }

    /// The layers of a stack, to be listed under their numbers.
    fn shoots(&self, image: &OpenImage, layers: Vec<Layer<Lazy>>, slots: &[Option<LayerSlot>]) -> Vec<Shoot> {
        let numbers = slots.iter().copied().chain(std::iter::repeat(None));
        let shoot = |((layer, of), slot): ((Layer<Lazy>, &Arc<LayerImage>), Option<LayerSlot>)| Shoot {
            number: self.shelf.number(&layer_id(of), slot),
            diff_id: of.diff_id(),
            layer: Arc::new(layer),
        };
        layers.into_iter().zip(image.stack()).zip(numbers).map(shoot).collect()
    }

    /// The daemon's control socket, if this is it.
    fn socket(&self) -> Option<PathBuf> {
        self.daemon.as_ref().map(|seat| seat.place.socket())
    }

    /// Keeps `mounted` in the table until it is over.
    fn enter(self: &Arc<Self>, mounted: &Arc<Mounted>) -> anyhow::Result<()> {
        let number = {
            let mut table = self.table();
            if table.doors == Doors::Left {
                // Recorded it is. Dropped, it would be taken away.
                std::mem::forget(Arc::clone(mounted));
            }
            anyhow::ensure!(table.doors == Doors::Open, Closed);
            let number = table.next;
            table.next += 1;
            table.mounts.insert(number, Arc::clone(mounted));
            number
        };
        self.tell_count();
        let (host, mounted) = (Arc::clone(self), Arc::clone(mounted));
        self.runtime.spawn(async move {
            mounted.ended().await;
            let removing = tokio::task::spawn_blocking({
                let host = Arc::clone(&host);
                move || {
                    mounted.release();
                    host.retire(number);
                    tracing::info!(mount_point = %mounted.record().mount_point.display(), "unmounted");
                }
            });
            removing.await.ok();
            host.tell_count();
        });
        Ok(())
    }

    /// Takes a mount out of the table, and keeps in mind what its layers have cost.
    fn retire(&self, number: u64) {
        let mut table = self.table();
        let Some(mounted) = table.mounts.remove(&number) else { return };
        for layer in &mounted.image().layers {
            let mut others = table.mounts.values().flat_map(|other| &other.image().layers);
            if !others.any(|other| Arc::ptr_eq(other, layer)) {
                table.retired.add(&layer.counters());
            }
        }
    }

    /// What fetching has cost so far, all mounts together, those that are gone included.
    pub fn counters(&self) -> Counters {
        let table = self.table();
        let mut sum = table.retired;
        let mut seen: Vec<&Arc<LayerImage>> = Vec::new();
        for layer in table.mounts.values().flat_map(|mounted| &mounted.image().layers) {
            if !seen.iter().any(|other| Arc::ptr_eq(other, layer)) {
                sum.add(&layer.counters());
                seen.push(layer);
            }
        }
        sum
    }

    fn tell_count(&self) {
        self.count.send_modify(|count| *count = self.table().mounts.len());
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every mount that is there, in the order in which they were made.
    pub fn mounts(&self) -> Vec<Arc<Mounted>> {
        self.table().mounts.values().filter(|mounted| !mounted.is_released()).cloned().collect()
    }

    /// The mount on `mount_point`.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, mount_point: &Path) -> Result<Arc<Mounted>, NoSuchMount> {
        let mut mounts = self.mounts().into_iter();
        let found = mounts.find(|mounted| mounted.record().mount_point == mount_point);
        found.ok_or_else(|| NoSuchMount(mount_point.to_owned()))
    }

    /// Ends the mount on `mount_point`. When this is done its record is gone; with [`mount::Unmount::Lazy`] it may still
    /// be served to those who have files open. Waits for the kernel.
    ///
    /// # Errors
    /// There is none, it is in use, or the kernel refuses.
    pub fn unmount(&self, mount_point: &Path, how: mount::Unmount) -> anyhow::Result<()> {
        let mounted = self.find(mount_point)?;
        mounted.take_away(how)?;
        mounted.release();
        Ok(())
    }

    /// Waits until nothing is served any more.
    pub async fn empty(&self) {
        // The sender is ours, so it is not gone.
        self.count.subscribe().wait_for(|count| *count == 0).await.ok();
    }
}
