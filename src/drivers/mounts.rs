//! The kernel mounts of one owner: layers, each mounted once, and the stacks made of them.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use super::attached::{Attached, Backing, LayerReport, Manner};
use super::run::RunDirectory;
use super::timely::{start, within};
use super::{DriverError, LayerBacking};
use crate::model::DiffId;
use crate::sys::mount::{MountError, Unmount, mount_table, unmount, writable_layer};
use crate::sys::stack::{OverlayMount, mount_overlay};

/// The kernel mounts of one owner. Its calls wait for the kernel and belong on threads that serve nothing.
#[derive(Debug, Clone)]
pub struct KernelMounts(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    run: Arc<RunDirectory>,
    patience: Duration,
    manner: Manner,
    /// Never held over a system call.
    slots: Mutex<HashMap<(DiffId, u64), Arc<Slot>>>,
    /// Gives every mount of a layer a directory of its own.
    count: AtomicU64,
}

/// Where a layer is mounted, if it is. Held over the mounting, so that whoever comes second finds it mounted.
type Slot = Mutex<Weak<Attached>>;

/// A stack that is mounted; unmounted when it is dropped, though files in it may be open for longer.
#[derive(Debug)]
pub struct Presented {
    target: PathBuf,
    layers: Vec<Arc<Attached>>,
    owner: Arc<Inner>,
}

impl KernelMounts {
    /// Mounts in `run`. No call waits longer than `patience`. With `direct_io` loop devices read complete files past
    /// their page cache.
    pub fn new(run: RunDirectory, patience: Duration, direct_io: bool) -> Self {
        let manner = Manner { label: run.source().to_owned(), direct_io };
        let (slots, count) = (Mutex::default(), AtomicU64::new(0));
        Self(Arc::new(Inner { run: Arc::new(run), patience, manner, slots, count }))
    }

    /// Stacks `layers`, the lowest first, on the directory `target`. With `writable` the stack can be written to, and the
    /// changes are kept in that directory.
    ///
    /// # Errors
    /// See [`DriverError`]; nothing is mounted then, or will not be as soon as the kernel is done.
    pub fn present(
        &self,
        layers: &[LayerBacking],
        target: &Path,
        writable: Option<&Path>,
    ) -> Result<Presented, DriverError> {
        let patience = self.0.patience;
        let deadline = Instant::now() + patience;
        self.0.slots().retain(|_, slot| Arc::strong_count(slot) > 1 || is_used(slot));
        // A layer that lies below itself adds nothing: every name it has is taken. Overlayfs would refuse it.
        let mut seen = HashSet::new();
        let mut topmost_first: Vec<&LayerBacking> =
            layers.iter().rev().filter(|layer| seen.insert((layer.diff_id, layer.source))).collect();
        let attaching = topmost_first
            .drain(..)
            .map(|layer| {
                let (owner, layer) = (Arc::clone(&self.0), layer.clone());
                start(format!("mount layer {}", layer.diff_id), move || owner.attach(&layer))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let attached: Vec<Arc<Attached>> = attaching
            .into_iter()
            .map(|attaching| attaching.wait_until(deadline, patience))
            .collect::<Result<_, _>>()?;
        let owner = Arc::clone(&self.0);
        let (target, writable) = (target.to_owned(), writable.map(Path::to_owned));
        let attempted = format!("stack the layers on {}", target.display());
        start(attempted, move || owner.stack(attached, target, writable.as_deref()))?.wait_until(deadline, patience)
    }

    /// Lets the kernel read `layer` from the complete, verified file `local`, under all live mounts of it.
    ///
    /// # Errors
    /// See [`DriverError`]; the kernel then reads what it read before.
    pub fn hand_over(&self, diff_id: &DiffId, source: u64, local: &Path) -> Result<(), DriverError> {
        self.exchange(diff_id, source, local, Backing::Local(SystemTime::now()))
    }

    /// The way back of [`Self::hand_over`], while the server of `lazy` still stands.
    ///
    /// # Errors
    /// See [`DriverError`].
    pub fn take_back(&self, diff_id: &DiffId, source: u64, lazy: &Path) -> Result<(), DriverError> {
        self.exchange(diff_id, source, lazy, Backing::Lazy)
    }

    fn exchange(&self, diff_id: &DiffId, source: u64, path: &Path, backing: Backing) -> Result<(), DriverError> {
        let slot = self.0.slots().get(&(*diff_id, source)).cloned().ok_or(DriverError::NotMounted(*diff_id))?;
        let (diff_id, path) = (*diff_id, path.to_owned());
        let direct_io = self.0.manner.direct_io && backing != Backing::Lazy;
        within(self.0.patience, format!("exchange the file of layer {diff_id}"), move || {
            let attached = lock(&slot).upgrade().ok_or(DriverError::NotMounted(diff_id))?;
            attached.exchange(&path, backing, direct_io)
        })
    }

    /// How the mounted layers stand, by diffID.
    pub fn layers(&self) -> Vec<LayerReport> {
        let slots: Vec<Arc<Slot>> = self.0.slots().values().cloned().collect();
        // A slot that is held is being mounted.
        let attached = slots.iter().filter_map(|slot| slot.try_lock().ok()?.upgrade());
        let mut reports: Vec<LayerReport> = attached.map(|attached| attached.report()).collect();
        reports.sort_by_key(|report| report.diff_id.to_string());
        reports
    }

    /// The directory in which it mounts.
    pub fn run(&self) -> &Path {
        self.0.run.path()
    }
}

impl Inner {
    fn slots(&self) -> MutexGuard<'_, HashMap<(DiffId, u64), Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn attach(&self, layer: &LayerBacking) -> Result<Arc<Attached>, DriverError> {
        let slot = Arc::clone(self.slots().entry((layer.diff_id, layer.source)).or_default());
        let mut place = lock(&slot);
        if let Some(attached) = place.upgrade() {
            return Ok(attached);
        }
        let id = layer.diff_id.0.hex();
        let name = format!("{}-{}", id.get(..16).unwrap_or(&id), self.count.fetch_add(1, Ordering::Relaxed));
        let attached = Arc::new(Attached::new(layer, Arc::clone(&self.run), &name, &self.manner)?);
        *place = Arc::downgrade(&attached);
        Ok(attached)
    }

    fn stack(
        self: Arc<Self>,
        layers: Vec<Arc<Attached>>,
        target: PathBuf,
        writable: Option<&Path>,
    ) -> Result<Presented, DriverError> {
        if layers.is_empty() {
            return Err(DriverError::Empty);
        }
        let writable = writable.map(writable_layer).transpose().map_err(DriverError::Stack)?;
        let mut lowers: Vec<PathBuf> = layers.iter().map(|layer| layer.mount_point().to_owned()).collect();
        // Also for a single layer: whiteouts must not show, and overlayfs wants two directories.
        if lowers.len() == 1 && writable.is_none() {
            lowers.push(self.run.empty());
        }
        let upper = writable.as_ref().map(|(upper, work)| (upper.as_path(), work.as_path()));
        let overlay = OverlayMount { source: self.run.source(), lowers: &lowers, upper };
        mount_overlay(&overlay, &target).map_err(DriverError::Stack)?;
        Ok(Presented { target, layers, owner: self })
    }
}

fn lock(slot: &Slot) -> MutexGuard<'_, Weak<Attached>> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_used(slot: &Slot) -> bool {
    slot.try_lock().map_or(true, |place| place.strong_count() > 0)
}

impl Presented {
    /// Where.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// How its layers stand, the topmost first.
    pub fn layers(&self) -> Vec<LayerReport> {
        self.layers.iter().map(|layer| layer.report()).collect()
    }

    /// True if the kernel reads all layers from complete files: nothing needs the server of the lazy ones.
    pub fn is_local(&self) -> bool {
        self.layers.iter().all(|layer| layer.report().backing != Backing::Lazy)
    }

    /// True if it is not mounted any more, whoever took it away.
    ///
    /// # Errors
    /// `/proc` could not be read.
    pub fn is_over(&self) -> std::io::Result<bool> {
        let is_ours = |entry: &crate::sys::mount::MountEntry| {
            entry.mount_point == self.target && entry.source == self.owner.run.source()
        };
        Ok(!mount_table()?.iter().any(is_ours))
    }

    /// Unmounts it. That somebody else did is no error.
    ///
    /// # Errors
    /// See [`MountError`].
    pub fn take_away(&self, how: Unmount) -> Result<(), MountError> {
        if self.is_over().unwrap_or(false) {
            return Ok(());
        }
        match unmount(&self.target, how) {
            Err(MountError::NotMounted(_)) => Ok(()),
            other => other,
        }
    }
}

impl Drop for Presented {
    fn drop(&mut self) {
        if let Err(error) = self.take_away(Unmount::Lazy) {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "the mount stays behind");
        }
    }
}
