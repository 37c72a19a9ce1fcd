//! The kernel mounts of one owner: layers, each mounted once, and the stacks made of them.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use super::attached::{Attached, Backing, HeldLayer, LayerReport, Manner, unmount_all};
use super::run::RunDirectory;
use super::timely::{Started, start, within};
use super::{DriverError, LayerBacking};
use crate::chain::LayerId;
use crate::sys::mount::{MountError, Unmount, mount_table, mounted_on, unmount, writable_layer};
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
    slots: Mutex<HashMap<u32, Arc<Slot>>>,
}

/// A number, and what is mounted under it.
#[derive(Debug)]
struct Slot {
    id: LayerId,
    /// Held over the mounting, so that whoever comes second finds it mounted.
    place: Mutex<Weak<Attached>>,
    /// Held over the mounting and the unmounting. Taken after `place`.
    ground: Arc<Mutex<()>>,
}

/// A stack that is mounted; unmounted when it is dropped, though files in it may be open for longer.
#[derive(Debug)]
pub struct Presented {
    target: PathBuf,
    layers: Vec<HeldLayer>,
    /// Somebody else showed one of them when they were stacked, and does so for as long as the stack is there.
    is_shown: bool,
    /// It stays when it is let go of.
    stays: AtomicBool,
    owner: Arc<Inner>,
}

impl KernelMounts {
    /// Mounts in `run`. No call waits longer than `patience`. With `direct_io` loop devices read complete files past
    /// their page cache.
    pub fn new(run: RunDirectory, patience: Duration, direct_io: bool) -> Self {
        let adopts = AtomicBool::new(run.is_found());
        let manner = Manner { label: run.source().to_owned(), direct_io, adopts };
        Self(Arc::new(Inner { run: Arc::new(run), patience, manner, slots: Mutex::default() }))
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
        let held = self.hold_all(layers, deadline)?;
        self.stack_until(&held, target, writable, deadline)
    }

    /// Mounts a layer, or gives the mount of it that is there.
    ///
    /// # Errors
    /// See [`DriverError`]; nothing is mounted then, or will not be as soon as the kernel is done.
    pub fn hold(&self, layer: &LayerBacking) -> Result<HeldLayer, DriverError> {
        self.0.start_attaching(layer)?.wait_until(Instant::now() + self.0.patience, self.0.patience)
    }

    fn hold_all(&self, layers: &[LayerBacking], deadline: Instant) -> Result<Vec<HeldLayer>, DriverError> {
        let attaching: Vec<_> =
            layers.iter().map(|layer| self.0.start_attaching(layer)).collect::<Result<_, DriverError>>()?;
        attaching.into_iter().map(|attaching| attaching.wait_until(deadline, self.0.patience)).collect()
    }

    /// Stacks layers that are mounted, the lowest first, on the directory `target`; see [`KernelMounts::present`].
    ///
    /// # Errors
    /// See [`DriverError`]; nothing is mounted then, or will not be as soon as the kernel is done.
    pub fn stack(
        &self,
        layers: &[HeldLayer],
        target: &Path,
        writable: Option<&Path>,
    ) -> Result<Presented, DriverError> {
        self.stack_until(layers, target, writable, Instant::now() + self.0.patience)
    }

    fn stack_until(
        &self,
        layers: &[HeldLayer],
        target: &Path,
        writable: Option<&Path>,
        deadline: Instant,
    ) -> Result<Presented, DriverError> {
        // A layer that lies below itself adds nothing: every name it has is taken. Overlayfs would refuse it.
        let mut seen = HashSet::new();
        let topmost_first = layers.iter().rev().filter(|layer| seen.insert(layer.number()));
        let layers: Vec<HeldLayer> = topmost_first.cloned().collect();
        let (owner, patience) = (Arc::clone(&self.0), self.0.patience);
        let (target, writable) = (target.to_owned(), writable.map(Path::to_owned));
        let attempted = format!("stack the layers on {}", target.display());
        start(attempted, move || owner.stack(layers, target, writable.as_deref()))?.wait_until(deadline, patience)
    }

    /// Takes up the stack that an owner before this one made of these layers on `target`; none if there is none, or if one of
    /// the layers is mounted anew.
    ///
    /// # Errors
    /// `/proc` could not be read.
    pub fn adopt(&self, layers: &[HeldLayer], target: &Path) -> std::io::Result<Option<Presented>> {
        if !self.has_stack_on(target)? || !layers.iter().all(|layer| layer.0.is_adopted()) {
            return Ok(None);
        }
        let mut seen = HashSet::new();
        let layers = layers.iter().rev().filter(|layer| seen.insert(layer.number())).cloned().collect();
        Ok(Some(Presented {
            target: target.to_owned(),
            layers,
            is_shown: false,
            stays: AtomicBool::new(false),
            owner: Arc::clone(&self.0),
        }))
    }

    /// True if a stack of this run directory is the topmost mount on `target`, whoever made it.
    ///
    /// # Errors
    /// `/proc` could not be read.
    pub fn has_stack_on(&self, target: &Path) -> std::io::Result<bool> {
        let top = mounted_on(target)?;
        Ok(top.is_some_and(|top| top.kind == "overlay" && top.source == self.0.run.source()))
    }

    /// Takes away what an owner before this one left and nobody has taken up; `targets` are the stacks that somebody has or that
    /// are to stay.
    pub fn settle(&self, targets: &BTreeSet<PathBuf>) {
        self.0.manner.adopts.store(false, Ordering::Relaxed);
        let table = mount_table().unwrap_or_default();
        let stacks = table.iter().filter(|entry| entry.kind == "overlay" && entry.source == self.0.run.source());
        for stack in stacks.filter(|stack| !targets.contains(&stack.mount_point)) {
            let target = &stack.mount_point;
            tell_left(target, unmount(target, Unmount::Lazy));
        }
        for number in self.0.run.numbers().into_iter().filter(|number| !self.is_held(*number)) {
            let path = self.0.run.layer(number);
            if table.iter().any(|entry| entry.mount_point == path) {
                tell_left(&path, unmount_all(&path));
            }
            if let Err(error) = std::fs::remove_dir(&path) {
                tracing::warn!(path = %path.display(), %error, "a directory stays behind");
            }
        }
    }

    /// Lets the kernel read a layer from the complete, verified file `local`, under all live mounts of it. One that somebody else
    /// showed the kernel shows from now on to whoever comes new.
    ///
    /// # Errors
    /// See [`DriverError`]; the kernel then reads what it read before.
    pub fn hand_over(&self, number: u32, local: &Path) -> Result<(), DriverError> {
        self.exchange(number, local, Backing::Local(SystemTime::now()))
    }

    /// The way back of [`Self::hand_over`], while the server of `lazy` still stands.
    ///
    /// # Errors
    /// See [`DriverError`].
    pub fn take_back(&self, number: u32, lazy: &Path) -> Result<(), DriverError> {
        self.exchange(number, lazy, Backing::Lazy)
    }

    fn exchange(&self, number: u32, path: &Path, backing: Backing) -> Result<(), DriverError> {
        let slot = self.0.slots().get(&number).cloned().ok_or(DriverError::NotMounted(number))?;
        let path = path.to_owned();
        let direct_io = self.0.manner.direct_io && backing != Backing::Lazy;
        within(self.0.patience, format!("exchange the file of layer {}", slot.id), move || {
            let attached = slot.attached().ok_or(DriverError::NotMounted(number))?;
            attached.exchange(&path, backing, direct_io)
        })
    }

    /// True if somebody holds the layer of this number.
    pub fn is_held(&self, number: u32) -> bool {
        self.0.slots().get(&number).is_some_and(|slot| slot.is_used())
    }

    /// How the mounted layers stand, by diffID.
    pub fn layers(&self) -> Vec<LayerReport> {
        let slots: Vec<Arc<Slot>> = self.0.slots().values().cloned().collect();
        // A slot that is held is being mounted.
        let attached = slots.iter().filter_map(|slot| slot.place.try_lock().ok()?.upgrade());
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
    fn slots(&self) -> MutexGuard<'_, HashMap<u32, Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start_attaching(self: &Arc<Self>, layer: &LayerBacking) -> Result<Started<HeldLayer>, DriverError> {
        let (owner, layer) = (Arc::clone(self), layer.clone());
        start(format!("mount layer {}", layer.id), move || owner.attach(&layer).map(HeldLayer))
    }

    fn attach(&self, layer: &LayerBacking) -> Result<Arc<Attached>, DriverError> {
        let slot = self.slot(layer)?;
        let mut place = lock(&slot.place);
        if let Some(attached) = place.upgrade() {
            return Ok(attached);
        }
        let _one = lock(&slot.ground);
        let attached = Arc::new(Attached::new(layer, Arc::clone(&self.run), Arc::clone(&slot.ground), &self.manner)?);
        *place = Arc::downgrade(&attached);
        Ok(attached)
    }

    /// The slot of a layer's number, which is its alone as long as something is mounted under it.
    fn slot(&self, layer: &LayerBacking) -> Result<Arc<Slot>, DriverError> {
        let mut slots = self.slots();
        slots.retain(|_, slot| Arc::strong_count(slot) > 1 || slot.is_used());
        let fresh = || Arc::new(Slot { id: layer.id.clone(), place: Mutex::default(), ground: Arc::default() });
        let slot = slots.entry(layer.number).or_insert_with(fresh);
        if slot.id != layer.id {
            let (id, taken_by) = (Box::new(layer.id.clone()), Box::new(slot.id.clone()));
            return Err(DriverError::Taken { number: layer.number, id, taken_by });
        }
        Ok(Arc::clone(slot))
    }

    fn stack(
        self: Arc<Self>,
        layers: Vec<HeldLayer>,
        target: PathBuf,
        writable: Option<&Path>,
    ) -> Result<Presented, DriverError> {
        if layers.is_empty() {
            return Err(DriverError::Empty);
        }
        let writable = writable.map(writable_layer).transpose().map_err(DriverError::Stack)?;
        let mut lowers: Vec<PathBuf> = layers.iter().map(|layer| layer.path().to_owned()).collect();
        // Also for a single layer: whiteouts must not show, and overlayfs wants two directories.
        if lowers.len() == 1 && writable.is_none() {
            lowers.push(self.run.empty());
        }
        let upper = writable.as_ref().map(|(upper, work)| (upper.as_path(), work.as_path()));
        let is_shown = layers.iter().any(|layer| layer.report().backing == Backing::Tree);
        let overlay = OverlayMount { source: self.run.source(), lowers: &lowers, upper };
        mount_overlay(&overlay, &target).map_err(DriverError::Stack)?;
        Ok(Presented { target, layers, is_shown, stays: AtomicBool::new(false), owner: self })
    }
}

fn tell_left(path: &Path, taken: Result<(), MountError>) {
    match taken {
        Ok(()) => tracing::info!(path = %path.display(), "what an owner before this one left is taken away"),
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "what an owner before this one left stays");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Slot {
    fn attached(&self) -> Option<Arc<Attached>> {
        lock(&self.place).upgrade()
    }

    /// True if something is mounted, is being mounted, or is being taken away.
    fn is_used(&self) -> bool {
        Arc::strong_count(&self.ground) > 1 || self.place.try_lock().map_or(true, |place| place.strong_count() > 0)
    }
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
        !self.is_shown && self.layers.iter().all(|layer| matches!(layer.report().backing, Backing::Local(_)))
    }

    /// True if from now on it stays when it is let go of, for the next owner: the kernel shows it without any process.
    pub fn leave(&self) -> bool {
        let stays = self.is_local();
        if stays {
            self.layers.iter().for_each(HeldLayer::leave);
            self.stays.store(true, Ordering::Relaxed);
        }
        stays
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
        if self.stays.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = self.take_away(Unmount::Lazy) {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "the mount stays behind");
        }
    }
}
