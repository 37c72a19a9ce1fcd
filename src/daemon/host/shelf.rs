//! Layers, each on a directory of its own, as it is: what overlays of a container are stacked from.
//!
//! ```text
//! <run>/l/<number>     a layer: whiteouts are character devices 0/0, opaque directories have `trusted.overlay.opaque`
//! ```
//!
//! | driver | what is mounted there |
//! |---|---|
//! | `local` | kernel EROFS on the complete file |
//! | `kernel` | kernel EROFS on a loop device on the lazily filled file of the FUSE connection |
//! | `fuse` | a directory of the FUSE connection |
//!
//! Guarantees: a layer is mounted once, whoever holds it, and unmounted when nobody does any more; what an overlay still
//! shows of it then goes with the overlay. When a layer becomes local, the kernel is handed its file under the live mount; one
//! that FUSE shows because the kernel cannot be given lazy files it shows from then on to whoever stacks anew, and FUSE goes on
//! with what is stacked already.
//! Two layers are one only if blob and anchor are the same as well as the diffID.
//!
//! Calls wait for the kernel, which may wait for the network: they belong on threads that serve nothing. Refuses to know how
//! layers become local, and who stacks them.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use tokio::runtime::Handle;

use super::grove::{Grove, Listed, Shoot};
use crate::chain::{LayerId, LayerSlot, MAX_LAYER_SLOT};
use crate::daemon::config::Config as Settings;
use crate::daemon::image::Lazy;
use crate::daemon::node::layers::{self as node, Shelves};
use crate::drivers::{
    Backing, Capabilities, Driver, HeldLayer, KernelMounts, LayerBacking, LayerFacts, LayerReport, RunDirectory,
    Wanted, choose,
};
use crate::fetch::{LayerImage, LocalLayer};
use crate::model::ReadAt as _;
use crate::vfs;

/// How much longer than a reader the kernel may wait, so that the reason is the reader's.
const LONGER: Duration = Duration::from_secs(5);

/// Loop devices read complete files through their page cache. Past it, a layer would be cached once and not twice, and 759 MiB
/// in sequence come in 3.5 s instead of 3.9 s; but a layer that was just filled is in that cache, and from there 6000 random
/// reads of 4 KiB take 0.1 s, past it 3.5 s (1 GiB image, virtual disk, two cores).
const DIRECT_IO: bool = false;

/// How often a hand-over is tried, and the pause between. It fails when the machine is short of something.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_secs(2);

/// The layers that a process has mounted.
#[derive(Debug)]
pub struct Shelf {
    runtime: Handle,
    /// Where it may try what the machine can.
    scratch: PathBuf,
    patience: Duration,
    place: Place,
    wanted: Wanted,
    capabilities: OnceLock<Capabilities>,
    ground: Mutex<Weak<Ground>>,
    numbers: Mutex<Numbers>,
}

/// Where a process mounts.
#[derive(Debug)]
enum Place {
    /// The daemon: in its run directory, with its connection, as long as it lives.
    Kept(Arc<Ground>),
    /// Others: in a new directory in this one, with a connection of its own, both while there is something in them.
    Fresh(PathBuf),
}

/// A run directory, as long as there is a mount in it.
#[derive(Debug)]
pub(super) struct Ground {
    pub(super) mounts: KernelMounts,
    files: Files,
}

impl Ground {
    /// True if the connection of lazy files is there as long as the process.
    pub(super) fn stays(&self) -> bool {
        matches!(self.files, Files::Common(_))
    }

    /// True while the connection was taken over and does not yet show everything again.
    fn is_restoring(&self) -> bool {
        matches!(&self.files, Files::Common(grove) if grove.is_restoring())
    }
}

/// Where lazily filled files are.
#[derive(Debug)]
enum Files {
    /// In the daemon's connection.
    Common(Arc<Grove>),
    /// In a connection that is there while one of them is needed.
    Own(Mutex<Weak<Grove>>),
}

/// Numbers of layers that nobody has written down: those beyond the numbers of the records.
#[derive(Debug, Default)]
struct Numbers {
    given: HashMap<LayerId, u32>,
}

/// A layer on its directory, which is there as long as this or a copy of it is.
#[derive(Debug, Clone)]
pub struct ShelfDir(Arc<Held>);

#[derive(Debug)]
struct Held {
    held: HeldLayer,
    driver: Driver,
    why: String,
    /// What the FUSE connection shows of it, while that is read.
    listed: Mutex<Option<Arc<Listed>>>,
    /// Others may read that as long as this is held, though it is not what is mounted any more.
    stays_listed: bool,
    ground: Arc<Ground>,
    layer: Arc<LayerImage>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Which layer it is, as records name it.
pub fn layer_id(layer: &LayerImage) -> LayerId {
    LayerId { diff_id: layer.claimed_diff_id(), blob: *layer.blob(), anchor: layer.anchor().to_string() }
}

/// What decides how one layer is presented.
pub(super) fn facts(layer: &LayerImage, needs_more: bool) -> LayerFacts {
    let (size, local) = (layer.size(), layer.is_local());
    let obstacle = if needs_more {
        Some("it keeps contents in further layers".to_owned())
    } else {
        (!local && !size.is_multiple_of(512)).then(|| format!("its {size} bytes are no multiple of 512"))
    };
    LayerFacts { diff_id: layer.diff_id(), local, lazy: layer.comes_in_pieces(), obstacle }
}

/// Where processes other than the daemon mount.
pub(super) fn run_directories(root: &Path) -> PathBuf {
    root.join("run")
}

impl Shelf {
    /// The shelf of the daemon, which mounts in `run` and shows lazy layers in `grove`.
    pub(super) fn of_daemon(settings: &Settings, runtime: Handle, run: RunDirectory, grove: &Arc<Grove>) -> Arc<Self> {
        let mounts = KernelMounts::new(run, patience(settings), DIRECT_IO);
        let place = Place::Kept(Arc::new(Ground { mounts, files: Files::Common(Arc::clone(grove)) }));
        Self::new(settings, runtime, place)
    }

    /// The shelf of another process of the root, or of a daemon that may not mount.
    pub(super) fn of_process(settings: &Settings, runtime: Handle) -> Arc<Self> {
        Self::new(settings, runtime, Place::Fresh(run_directories(&settings.root)))
    }

    fn new(settings: &Settings, runtime: Handle, place: Place) -> Arc<Self> {
        Arc::new(Self {
            runtime,
            scratch: settings.root.clone(),
            patience: settings.fetch.deadline,
            place,
            wanted: settings.containerd.driver,
            capabilities: OnceLock::new(),
            ground: Mutex::default(),
            numbers: Mutex::default(),
        })
    }

    /// Mounts `layer` on its directory, or gives the mount that is there. `slot` is its number in the records; without one
    /// it gets a number that lasts as long as this process.
    ///
    /// # Errors
    /// The kernel refuses, and there is no FUSE connection that could show it; or the slot is another layer's.
    pub fn hold(&self, layer: &Arc<LayerImage>, slot: Option<LayerSlot>) -> anyhow::Result<ShelfDir> {
        self.hold_as(layer, slot, self.wanted)
    }

    /// [`Shelf::hold`] with a driver of the caller's choice, or what comes nearest. A layer that is held already stays as it is.
    ///
    /// # Errors
    /// As [`Shelf::hold`].
    pub fn hold_as(
        &self,
        layer: &Arc<LayerImage>,
        slot: Option<LayerSlot>,
        wanted: Wanted,
    ) -> anyhow::Result<ShelfDir> {
        let mut choice = choose(wanted, self.capabilities(), &[facts(layer, false)]);
        if choice.driver != Driver::Fuse {
            match self.hold_in_kernel(layer, slot, choice.driver, &choice.why) {
                Ok(dir) => return Ok(dir),
                Err(error) => {
                    choice = choice.after(error.as_ref());
                    tracing::warn!(layer = %layer.diff_id(), "{}", choice.why);
                }
            }
        }
        self.hold_tree(layer, slot, wanted, &choice.why)
    }

    /// What this machine can; asked once.
    pub(super) fn capabilities(&self) -> &Capabilities {
        self.capabilities.get_or_init(|| Capabilities::probe(&self.scratch))
    }

    /// The number of a layer that nobody has written down, always the same in this process.
    pub(super) fn number(&self, id: &LayerId, slot: Option<LayerSlot>) -> u32 {
        if let Some(slot) = slot {
            return slot.0;
        }
        let mut numbers = lock(&self.numbers);
        let next =
            MAX_LAYER_SLOT.saturating_add(1).saturating_add(u32::try_from(numbers.given.len()).unwrap_or(u32::MAX));
        *numbers.given.entry(id.clone()).or_insert(next)
    }

    /// Mounts a layer so that the kernel reads it itself.
    pub(super) fn hold_in_kernel(
        &self,
        layer: &Arc<LayerImage>,
        slot: Option<LayerSlot>,
        driver: Driver,
        why: &str,
    ) -> anyhow::Result<ShelfDir> {
        let ground = self.ground()?;
        let id = layer_id(layer);
        let number = self.number(&id, slot);
        // The kernel may still wait for what it asked a daemon before this one, and takes no other file before it has that; and
        // overlays may be stacked on what that one showed. Nobody can tell, so it is listed as long as it is held.
        let is_inherited = ground.is_restoring();
        let (lazy, local, listed) = match layer.local() {
            Some(local) => {
                let listed = is_inherited.then(|| self.list(&ground, layer, number)).transpose()?;
                (None, Some(local.image), listed)
            }
            None => {
                let listed = self.list(&ground, layer, number)?;
                (Some(listed.file()), None, Some(listed))
            }
        };
        let size = layer.local().map_or_else(|| layer.size(), |local| local.size);
        let held = ground.mounts.hold(&LayerBacking { number, id, size, lazy, local, tree: None })?;
        // It may have been mounted already, in another way.
        let listed = listed.filter(|_| is_inherited || !matches!(held.report().backing, Backing::Local(_)));
        let (why, layer) = (why.to_owned(), Arc::clone(layer));
        let listed = Mutex::new(listed.map(Arc::new));
        let dir = ShelfDir(Arc::new(Held { held, driver, why, listed, stays_listed: is_inherited, ground, layer }));
        dir.wait_for_local();
        Ok(dir)
    }

    /// Lets the FUSE connection show a layer.
    fn hold_tree(
        &self,
        layer: &Arc<LayerImage>,
        slot: Option<LayerSlot>,
        wanted: Wanted,
        why: &str,
    ) -> anyhow::Result<ShelfDir> {
        let ground = self.ground()?;
        let id = layer_id(layer);
        let number = self.number(&id, slot);
        let listed = self.list(&ground, layer, number)?;
        let (size, tree) = (layer.size(), Some(listed.tree()));
        let held = ground.mounts.hold(&LayerBacking { number, id, size, lazy: None, local: None, tree })?;
        let (why, of, listed) = (why.to_owned(), Arc::clone(layer), Mutex::new(Some(Arc::new(listed))));
        let driver = Driver::Fuse;
        let dir = ShelfDir(Arc::new(Held { held, driver, why, listed, stays_listed: true, ground, layer: of }));
        // There may be a kernel that shows complete files and cannot be given lazy ones.
        let capabilities = self.capabilities();
        let will_be =
            choose(wanted, capabilities, &[LayerFacts { local: true, obstacle: None, ..facts(layer, false) }]);
        if will_be.driver == Driver::Local && capabilities.file_backed.reason().is_none() {
            dir.wait_for_local();
        }
        Ok(dir)
    }

    /// Where this process mounts.
    pub(super) fn ground(&self) -> anyhow::Result<Arc<Ground>> {
        let base = match &self.place {
            Place::Kept(ground) => return Ok(Arc::clone(ground)),
            Place::Fresh(base) => base,
        };
        let mut known = lock(&self.ground);
        if let Some(ground) = known.upgrade() {
            return Ok(ground);
        }
        let mounts = KernelMounts::new(RunDirectory::claim_new(base)?, self.patience.saturating_add(LONGER), DIRECT_IO);
        let ground = Arc::new(Ground { mounts, files: Files::Own(Mutex::default()) });
        *known = Arc::downgrade(&ground);
        Ok(ground)
    }

    /// True if a stack that a daemon before this one made is mounted on `target`.
    pub(super) fn has_stack_on(&self, target: &Path) -> anyhow::Result<bool> {
        match &self.place {
            Place::Kept(ground) => Ok(ground.mounts.has_stack_on(target)?),
            Place::Fresh(_) => Ok(false),
        }
    }

    /// Takes away what a daemon before this one left and nobody has taken up; `targets` are mounts that are there.
    pub(super) fn settle(&self, targets: &BTreeSet<PathBuf>) {
        if let Place::Kept(ground) = &self.place {
            ground.mounts.settle(targets);
        }
    }

    /// How many FUSE connections there are for its lazy layers alone.
    pub(super) fn own_connections(&self) -> u64 {
        let own = lock(&self.ground).upgrade().is_some_and(|ground| match &ground.files {
            Files::Common(_) => false,
            Files::Own(grove) => lock(grove).strong_count() > 0,
        });
        u64::from(own)
    }

    fn list(&self, ground: &Ground, layer: &Arc<LayerImage>, number: u32) -> anyhow::Result<Listed> {
        // The superblock and the root have been brought for whoever looked at the layer first, or are brought now.
        let opened = self.runtime.block_on(vfs::open_layer(0, Lazy::new(layer), Vec::new()))?;
        let shoot = Shoot { number, diff_id: layer.diff_id(), layer: Arc::new(opened) };
        match &ground.files {
            Files::Common(grove) => grove.list(shoot),
            Files::Own(known) => {
                let mut known = lock(known);
                let grove = match known.upgrade() {
                    Some(grove) => grove,
                    None => {
                        let grove = self.plant(ground.mounts.run())?;
                        *known = Arc::downgrade(&grove);
                        grove
                    }
                };
                grove.list(shoot)
            }
        }
    }

    fn plant(&self, run: &Path) -> anyhow::Result<Arc<Grove>> {
        // One that is about to go may still have the name.
        let free = (0..).map(|number: u32| run.join(format!("fs{number}"))).find(|path| !path.exists());
        Grove::plant(&free.context("there are more numbers than connections")?, self.patience, "headstart")
    }
}

fn patience(settings: &Settings) -> Duration {
    settings.fetch.deadline.saturating_add(LONGER)
}

impl ShelfDir {
    /// Where the layer is.
    pub fn path(&self) -> &Path {
        self.0.held.path()
    }

    /// Its number: the last part of its path.
    pub fn number(&self) -> u32 {
        self.0.held.number()
    }

    /// The layer.
    pub fn layer(&self) -> &Arc<LayerImage> {
        &self.0.layer
    }

    /// How the layer is presented at this moment, and why.
    pub fn driver(&self) -> (Driver, String) {
        match (self.0.driver, self.0.held.report().backing) {
            (Driver::Kernel | Driver::Fuse, Backing::Local(_)) => {
                (Driver::Local, "handed over to the kernel".to_owned())
            }
            (driver, _) => (driver, self.0.why.clone()),
        }
    }

    /// How it stands.
    pub fn report(&self) -> LayerReport {
        self.0.held.report()
    }

    pub(super) fn held(&self) -> &HeldLayer {
        &self.0.held
    }

    /// What the FUSE connection shows of it, if it is read through that. The connection stays as long as this does.
    pub(super) fn listed(&self) -> Option<Arc<Listed>> {
        lock(&self.0.listed).clone()
    }

    /// Hands the layer over when it is local.
    fn wait_for_local(&self) {
        if !matches!(self.0.held.report().backing, Backing::Local(_)) {
            let held = Arc::downgrade(&self.0);
            self.0.layer.when_local(move |_, local| hand_over(&held, local));
        }
    }
}

/// Lets the kernel read a layer from its complete file. On a thread that may wait.
fn hand_over(held: &Weak<Held>, local: &LocalLayer) {
    for attempt in 1..=TRIES {
        // It may have been let go of meanwhile.
        let Some(held) = held.upgrade() else { return };
        let is_shown = held.held.report().backing == Backing::Tree;
        let Err(error) = held.ground.mounts.hand_over(held.held.number(), &local.image) else {
            let listed = if held.stays_listed { None } else { lock(&held.listed).take() };
            drop(listed);
            tracing::info!(layer = %local.diff_id, "the kernel reads the layer from its local file");
            return;
        };
        drop(held);
        let error: &dyn std::error::Error = &error;
        if is_shown {
            return tracing::warn!(layer = %local.diff_id, error, "the kernel does not show the layer itself: FUSE goes on");
        }
        if attempt == TRIES {
            tracing::error!(layer = %local.diff_id, attempt, error, "the layer is not handed over: it stays lazy");
        } else {
            tracing::warn!(layer = %local.diff_id, attempt, error, "the layer is not handed over yet");
            thread::sleep(PAUSE);
        }
    }
}

impl Shelves for Shelf {
    fn hold(&self, layer: &Arc<LayerImage>, slot: LayerSlot) -> anyhow::Result<Box<dyn node::Held>> {
        Ok(Box::new(self.hold(layer, Some(slot))?))
    }
}

impl node::Held for ShelfDir {
    fn path(&self) -> &Path {
        self.path()
    }

    fn leave(&self) {
        self.0.held.leave();
    }
}
