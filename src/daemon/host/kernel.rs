//! Images that the kernel presents: their layers on the [shelf](super::shelf), stacked by overlayfs.
//!
//! Guarantees: what the kernel cannot present is shown through FUSE, with the reason; it is over when nobody reads lazy
//! layers through it any more. Refuses to know how layers become local.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use futures::future::BoxFuture;
use tokio::sync::watch;

use super::MountRequest;
use super::grove::Listed;
use super::shelf::{Ground, Shelf, ShelfDir, facts, run_directories};
use super::shown::{Driver, Shown};
use crate::chain::LayerSlot;
use crate::daemon::image::OpenImage;
use crate::drivers::leftovers::{self, Leftover, Outcome};
use crate::drivers::{self, Backing, Capabilities, Choice, DriverError, HeldLayer, Presented, Wanted, choose};
use crate::fetch::LayerImage;
use crate::model::DiffId;
use crate::sys::loopdev::backing_of;
use crate::sys::mount::{MountError, Unmount, unmount};
use crate::sys::stack::MountWatch;

/// The pause after the mount table could not be watched.
const PAUSE: Duration = Duration::from_secs(2);

/// How long the mount table is believed without a look at it.
const BELIEF: Duration = Duration::from_secs(60);

/// How often a device that somebody still reads is looked at.
const GLANCE: Duration = Duration::from_millis(50);

/// Mounts `image` with the driver that is asked for or the next one that works, or takes the mount of a daemon before this
/// one up if it may `adopt` that; `slots` are the numbers of its stack's
/// layers, as far as they have any. Waits for the kernel, which may wait for the network.
///
/// # Errors
/// Why it is to be shown through FUSE.
pub(super) fn show(
    shelf: &Arc<Shelf>,
    image: &OpenImage,
    request: &MountRequest,
    slots: &[Option<LayerSlot>],
    adopt: bool,
) -> Result<Box<dyn Shown>, String> {
    let choice = match request.driver {
        // Nothing to ask the machine.
        Wanted::Driver(drivers::Driver::Fuse) => choose(request.driver, &Capabilities::unknown(), &[]),
        wanted => {
            let needs_more = image.plan.stack.iter().map(|of| !of.devices.is_empty() || !of.data.is_empty());
            let facts: Vec<_> = image.stack().zip(needs_more).map(|(layer, more)| facts(layer, more)).collect();
            choose(wanted, shelf.capabilities(), &facts)
        }
    };
    if choice.driver == drivers::Driver::Fuse {
        return Err(choice.why);
    }
    match present(shelf, image, request, slots, choice.clone(), adopt) {
        Ok(shown) => Ok(Box::new(shown)),
        Err(error) => {
            let why = choice.after(error.as_ref()).why;
            tracing::warn!(mount_point = %request.mount_point.display(), "{why}");
            Err(why)
        }
    }
}

fn present(
    shelf: &Arc<Shelf>,
    image: &OpenImage,
    request: &MountRequest,
    slots: &[Option<LayerSlot>],
    choice: Choice,
    adopt: bool,
) -> anyhow::Result<KernelShown> {
    let ground = shelf.ground()?;
    let dirs = hold_all(shelf, image, slots, &choice)?;
    let watch = MountWatch::start().context("cannot watch the mount table")?;
    let held: Vec<HeldLayer> = dirs.iter().map(|dir| dir.held().clone()).collect();
    let target = &request.mount_point;
    let adopted = if adopt { ground.mounts.adopt(&held, target)? } else { None };
    let presented = match adopted {
        Some(adopted) => {
            tracing::info!(mount_point = %target.display(), "the mount of the daemon before is taken up");
            adopted
        }
        None => {
            while adopt && ground.mounts.has_stack_on(target)? {
                unmount(target, Unmount::Lazy)?;
            }
            ground.mounts.stack(&held, target, request.upper.as_deref())?
        }
    };
    drop(held);
    let inner = Arc::new(Inner {
        presented: Mutex::new(Some(Arc::new(presented))),
        dirs: Mutex::new(dirs),
        choice,
        devices: Mutex::default(),
        listed: Mutex::default(),
        ground,
    });
    let (say, over) = watch::channel(false);
    let watched = Arc::downgrade(&inner);
    thread::Builder::new()
        .name("mount-watch".into())
        .spawn(move || {
            wait_for_end(&watched, &watch);
            say.send_replace(true);
        })
        .context("cannot start a thread")?;
    Ok(KernelShown { inner, over })
}

/// The layers of the stack on the shelf, the lowest first, all mounted at the same time.
fn hold_all(
    shelf: &Shelf,
    image: &OpenImage,
    slots: &[Option<LayerSlot>],
    choice: &Choice,
) -> anyhow::Result<Vec<ShelfDir>> {
    thread::scope(|scope| {
        let hold = |(index, layer): (usize, &Arc<LayerImage>)| {
            let (layer, slot) = (Arc::clone(layer), slots.get(index).copied().flatten());
            thread::Builder::new()
                .name("shelf".into())
                .spawn_scoped(scope, move || shelf.hold_in_kernel(&layer, slot, choice.driver, &choice.why))
        };
        let holding =
            image.stack().enumerate().map(hold).collect::<io::Result<Vec<_>>>().context("cannot start a thread")?;
        let held = holding
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a thread that mounts a layer broke down"))?);
        held.collect()
    })
}

/// An image that the kernel presents.
struct KernelShown {
    inner: Arc<Inner>,
    over: watch::Receiver<bool>,
}

/// No lock is held over a system call.
struct Inner {
    /// None when it is over.
    presented: Mutex<Option<Arc<Presented>>>,
    /// None when it is over.
    dirs: Mutex<Vec<ShelfDir>>,
    choice: Choice,
    /// Devices on lazy files that were in use when it was over, and those files.
    devices: Mutex<Vec<(u32, PathBuf)>>,
    /// What the FUSE connection shows to those devices, as long as they are read.
    listed: Mutex<Vec<Arc<Listed>>>,
    ground: Arc<Ground>,
}

impl std::fmt::Debug for KernelShown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("KernelShown").field(&self.inner.presented).finish()
    }
}

impl Inner {
    fn presented(&self) -> Option<Arc<Presented>> {
        lock(&self.presented).clone()
    }

    /// Lets go of what was presented. Those who have files open keep what they need of it.
    fn detach(&self) {
        let Some(presented) = self.presented() else { return };
        let lazy = presented.layers().into_iter().filter(|layer| layer.backing == Backing::Lazy);
        *lock(&self.devices) = lazy.filter_map(|layer| Some((layer.device?, layer.file))).collect();
        drop(presented);
        let taken = lock(&self.presented).take();
        drop(taken);
        let dirs = std::mem::take(&mut *lock(&self.dirs));
        *lock(&self.listed) = dirs.iter().filter_map(ShelfDir::listed).collect();
        drop(dirs);
    }

    /// True if a lazy file is still read that goes with this: through what was detached, which was in use when it was taken
    /// away, or through another stack that shows the layer. A connection that stays serves whoever is left.
    fn is_read(&self) -> bool {
        let devices = if self.ground.stays() { Vec::new() } else { lock(&self.devices).clone() };
        devices.iter().any(|(number, file)| backing_of(*number).is_ok_and(|backing| backing.as_ref() == Some(file)))
    }

    /// Nobody reads lazy files any more.
    fn let_go(&self) {
        let listed = std::mem::take(&mut *lock(&self.listed));
        drop(listed);
    }
}

/// Waits until it is unmounted, by whomever, and nobody reads through it any more.
fn wait_for_end(inner: &Weak<Inner>, watch: &MountWatch) {
    loop {
        let Some(inner) = inner.upgrade() else { return };
        match inner.presented().map(|presented| presented.is_over()) {
            Some(Ok(false)) => {}
            None | Some(Ok(true)) => {
                inner.detach();
                while inner.is_read() {
                    thread::sleep(GLANCE);
                }
                return inner.let_go();
            }
            Some(Err(error)) => tracing::warn!(%error, "cannot read the mount table"),
        }
        drop(inner);
        if let Err(error) = watch.wait(BELIEF) {
            tracing::warn!(%error, "cannot watch the mount table");
            thread::sleep(PAUSE);
        }
    }
}

impl Shown for KernelShown {
    fn driver(&self) -> Driver {
        let Choice { driver, why } = &self.inner.choice;
        let handed_over = self.inner.presented().is_some_and(|presented| presented.is_local());
        match (driver, handed_over) {
            (drivers::Driver::Kernel, true) => {
                Driver { name: "local", why: Some("all layers were handed over to the kernel".to_owned()) }
            }
            (drivers::Driver::Kernel, false) => Driver { name: "kernel", why: Some(why.clone()) },
            _ => Driver { name: "local", why: Some(why.clone()) },
        }
    }

    fn layer(&self, diff_id: &DiffId) -> Option<String> {
        let layers = self.inner.presented()?.layers();
        let layer = layers.into_iter().find(|layer| layer.diff_id == *diff_id)?;
        let device = layer.device.map(|number| format!(" through loop{number}")).unwrap_or_default();
        let from = match layer.backing {
            Backing::Lazy => "lazy file",
            Backing::Local(_) => "local file",
            Backing::Tree => "directory of the FUSE connection",
        };
        let failure = layer.failure.map(|failure| format!("; not handed over: {failure}")).unwrap_or_default();
        Some(format!("the kernel reads the {from}{device}{failure}"))
    }

    fn take_away(&self, how: Unmount) -> Result<(), MountError> {
        let Some(presented) = self.inner.presented() else { return Ok(()) };
        presented.take_away(how)?;
        drop(presented);
        self.inner.detach();
        if !self.inner.is_read() {
            self.inner.let_go();
        }
        Ok(())
    }

    fn leave(&self) -> bool {
        self.inner.presented().is_some_and(|presented| presented.leave())
    }

    fn own_connections(&self) -> u64 {
        0
    }

    fn ended(&self) -> BoxFuture<'static, ()> {
        let mut over = self.over.clone();
        Box::pin(async move {
            // A sender that is gone without a word has ended as well.
            over.wait_for(|over| *over).await.ok();
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What killed processes of a root left of kernel mounts, by run directory; `run` is the daemon's.
///
/// # Errors
/// The system cannot be asked.
pub fn left_behind(root: &Path, run: &Path) -> Result<Vec<(PathBuf, Vec<Leftover>)>, DriverError> {
    let mut found = Vec::new();
    for run in all_runs(root, run)? {
        if let Some(left) = leftovers::look(&run)? {
            found.push((run, left));
        }
    }
    Ok(found)
}

/// Takes away what killed processes of a root left of kernel mounts; with [`Unmount::Strict`] not what is in use.
///
/// # Errors
/// The system cannot be asked.
pub fn take_away_left(root: &Path, run: &Path, how: Unmount) -> Result<Outcome, DriverError> {
    let mut all = Outcome::default();
    for run in all_runs(root, run)? {
        if let Some(outcome) = leftovers::remove(&run, how)? {
            all.removed.extend(outcome.removed);
            all.kept.extend(outcome.kept);
        }
    }
    Ok(all)
}

/// Takes away what killed processes of a root left for mounts that are gone.
///
/// What a daemon left is the next daemon's.
pub fn sweep(root: &Path) {
    let swept = listed(&run_directories(root)).and_then(|runs| {
        let is_mount = |left: &Leftover| matches!(left, Leftover::Overlay { .. });
        for run in runs {
            if leftovers::look(&run)?.is_some_and(|left| !left.iter().any(is_mount)) {
                leftovers::remove(&run, Unmount::Strict)?;
            }
        }
        Ok(())
    });
    if let Err(error) = swept {
        let error: &dyn std::error::Error = &error;
        tracing::warn!(error, "what a killed process left stays: see `headstart cleanup`");
    }
}

/// The run directories of a root's processes, and the daemon's.
fn all_runs(root: &Path, run: &Path) -> Result<Vec<PathBuf>, DriverError> {
    let mut all = listed(&run_directories(root))?;
    all.push(run.to_owned());
    Ok(all)
}

fn listed(base: &Path) -> Result<Vec<PathBuf>, DriverError> {
    let failed = |source| DriverError::Io { action: "list", path: base.to_owned(), source };
    match fs::read_dir(base) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        listing => {
            let entries = listing.map_err(failed)?.map(|entry| entry.map(|entry| entry.path()).map_err(failed));
            let mut paths = entries.collect::<Result<Vec<_>, _>>()?;
            paths.sort();
            Ok(paths)
        }
    }
}
