//! One layer, mounted by the kernel: on a loop device whose file can be exchanged, straight on its complete file, or as a
//! directory that somebody else shows.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::error::in_one_line;
use super::{DriverError, LayerBacking, RunDirectory};
use crate::chain::LayerId;
use crate::model::{Algorithm, DiffId, Digest};
use crate::sys::loopdev::{LoopDevice, LoopEntry, LoopError, loop_devices};
use crate::sys::mount::{MountError, Unmount, mounted_on, unmount};
use crate::sys::stack::{mount_bind, mount_erofs};

/// What the kernel reads a layer from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// The file that is filled as it is read.
    Lazy,
    /// The complete file, since then.
    Local(SystemTime),
    /// Nothing: the directory is shown by somebody else.
    Tree,
}

/// How a layer stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerReport {
    /// Its number at its owner.
    pub number: u32,
    /// Which layer.
    pub diff_id: DiffId,
    /// What the kernel reads.
    pub backing: Backing,
    /// The file, or the directory that is shown.
    pub file: PathBuf,
    /// Number of the loop device, if there is one.
    pub device: Option<u32>,
    /// The device reads past the page cache of the file.
    pub direct_io: bool,
    /// Why the last hand-over failed.
    pub failure: Option<String>,
}

/// A mounted layer. Unmounted when it is dropped, which waits for no reader.
#[derive(Debug)]
pub(super) struct Attached {
    number: u32,
    id: LayerId,
    size: u64,
    mount_point: PathBuf,
    device: Option<LoopDevice>,
    /// Held over the calls of an exchange, so that there is one at a time. Taken before `state`.
    exchange: Mutex<()>,
    state: Mutex<State>,
    /// Held while something is mounted on its directory or taken away from it.
    ground: Arc<Mutex<()>>,
    /// What an owner before this one had mounted shows it.
    adopted: bool,
    /// It stays mounted when it is let go of, if nobody serves it then.
    stays: AtomicBool,
    /// The last to go.
    run: Arc<RunDirectory>,
}

/// A layer that stays mounted as long as this or a copy of it is there.
#[derive(Debug, Clone)]
pub struct HeldLayer(pub(super) Arc<Attached>);

impl HeldLayer {
    /// Its number at its owner.
    pub fn number(&self) -> u32 {
        self.0.number
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.0.mount_point
    }

    /// How it stands.
    pub fn report(&self) -> LayerReport {
        self.0.report()
    }

    /// From now on it stays mounted when the last holder lets go of it, for the next owner, if the kernel then shows it
    /// without any process.
    pub fn leave(&self) {
        self.0.run.leave();
        self.0.stays.store(true, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct State {
    backing: Backing,
    file: PathBuf,
    direct_io: bool,
    failure: Option<String>,
}

/// How layers are attached.
#[derive(Debug)]
pub(super) struct Manner {
    /// What loop devices are called.
    pub(super) label: String,
    /// Complete files are read past their page cache.
    pub(super) direct_io: bool,
    /// What an owner before this one left is taken up where it fits, and taken away where it does not.
    pub(super) adopts: AtomicBool,
}

impl Attached {
    /// Mounts `layer` in `run`. Blocks as long as a lazy file does. Nobody else holds `ground`.
    pub(super) fn new(
        layer: &LayerBacking,
        run: Arc<RunDirectory>,
        ground: Arc<Mutex<()>>,
        manner: &Manner,
    ) -> Result<Self, DriverError> {
        let adopts = manner.adopts.load(Ordering::Relaxed);
        let directory = || Directory::make(run.layer(layer.number), adopts);
        let (mount_point, device, backing, file, opened, adopted) = match (&layer.local, &layer.lazy, &layer.tree) {
            (Some(path), ..) => {
                let (file, path) = open_layer(layer.id.diff_id, layer.size, path)?;
                let directory = directory()?;
                let (device, adopted) = match on_living_device(layer, &file, &path, &directory, manner)? {
                    Some(device) => (Some(device), true),
                    None => match directory.mount(&path) {
                        Ok(adopted) => (None, adopted),
                        // An image that the kernel refuses as a file is refused on a device too, with a reason that is
                        // worth telling.
                        Err(_) => (Some(on_device(layer, &file, &path, &directory, manner)?), false),
                    },
                };
                (directory.keep(), device, Backing::Local(SystemTime::now()), path, Some(file), adopted)
            }
            (None, Some(path), _) => {
                let (file, path) = open_layer(layer.id.diff_id, layer.size, path)?;
                let directory = directory()?;
                let living = on_living_device(layer, &file, &path, &directory, manner)?;
                let adopted = living.is_some();
                let device = match living {
                    Some(device) => device,
                    None => on_device(layer, &file, &path, &directory, manner)?,
                };
                (directory.keep(), Some(device), Backing::Lazy, path, None, adopted)
            }
            (None, None, Some(tree)) => {
                let directory = directory()?;
                directory.clear();
                mount_bind(tree, &directory.path).map_err(DriverError::Stack)?;
                (directory.keep(), None, Backing::Tree, tree.clone(), None, false)
            }
            (None, None, None) => return Err(DriverError::NoFile(layer.id.diff_id)),
        };
        let attached = Self {
            number: layer.number,
            id: layer.id.clone(),
            size: layer.size,
            mount_point,
            device,
            exchange: Mutex::new(()),
            state: Mutex::new(State { backing, file, direct_io: false, failure: None }),
            adopted,
            stays: AtomicBool::new(false),
            ground,
            run,
        };
        if let Some(file) = opened.filter(|_| manner.direct_io) {
            attached.switch_to_direct_io(&file);
        }
        Ok(attached)
    }

    /// True if stacks of an owner before this one show it as it is now.
    pub(super) fn is_adopted(&self) -> bool {
        self.adopted
    }

    pub(super) fn report(&self) -> LayerReport {
        let state = self.state();
        LayerReport {
            number: self.number,
            diff_id: self.id.diff_id,
            backing: state.backing,
            file: state.file.clone(),
            device: self.device.as_ref().map(LoopDevice::number),
            direct_io: state.direct_io,
            failure: state.failure.clone(),
        }
    }

    /// Lets the kernel read the file at `path` from now on, which holds the same bytes. Of a layer that is mounted straight on
    /// its complete file nothing changes.
    pub(super) fn exchange(&self, path: &Path, backing: Backing, direct_io: bool) -> Result<(), DriverError> {
        let Some(device) = &self.device else {
            return if backing == Backing::Lazy { Ok(()) } else { self.cover(path, backing) };
        };
        let _one = self.exchange.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |source| DriverError::Loop { diff_id: self.id.diff_id, source };
        {
            // Whoever came first has done it.
            let state = self.state();
            let is_there = matches!((state.backing, backing), (Backing::Local(_), Backing::Local(_)));
            if is_there && path.canonicalize().is_ok_and(|path| path == state.file) {
                return Ok(());
            }
        }
        let exchanged = open_layer(self.id.diff_id, self.size, path).and_then(|(file, path)| {
            if self.state().direct_io {
                device.set_direct_io(false).map_err(failed)?;
                self.state().direct_io = false;
            }
            device.change_backing(&file, &path).map_err(failed)?;
            Ok((file, path))
        });
        let (file, path) = match exchanged {
            Ok(exchanged) => exchanged,
            Err(error) => {
                self.state().failure = Some(in_one_line(&error));
                return Err(error);
            }
        };
        let before = {
            let mut state = self.state();
            (state.backing, state.failure) = (backing, None);
            std::mem::replace(&mut state.file, path)
        };
        if direct_io {
            self.switch_to_direct_io(&file);
        }
        tracing::debug!(layer = %self.id.diff_id, from = %before.display(), device = device.number(), "layer changed hands");
        Ok(())
    }

    /// Lets the kernel show the layer itself where somebody else did, above that: whoever has stacked on it goes on with that,
    /// whoever comes now finds the kernel's. At no moment is there nothing.
    fn cover(&self, path: &Path, backing: Backing) -> Result<(), DriverError> {
        let _one = self.exchange.lock().unwrap_or_else(PoisonError::into_inner);
        if self.state().backing != Backing::Tree {
            return Ok(());
        }
        let covered = path.canonicalize().map_err(DriverError::io("find", path)).and_then(|path| {
            let _ground = self.ground.lock().unwrap_or_else(PoisonError::into_inner);
            let mounted = mount_erofs(&path, &self.mount_point);
            mounted.map_err(|source| DriverError::Refused { diff_id: self.id.diff_id, source })?;
            Ok(path)
        });
        let mut state = self.state();
        match covered {
            Ok(path) => {
                (state.backing, state.file, state.failure) = (backing, path, None);
                Ok(())
            }
            Err(error) => {
                state.failure = Some(in_one_line(&error));
                Err(error)
            }
        }
    }

    /// Two caches of the same bytes are one too many. A file system that cannot is no failure.
    fn switch_to_direct_io(&self, file: &File) {
        let Some(device) = &self.device else { return };
        // What is not on disk yet would be written by the kernel while readers wait.
        let switched = file.sync_data().map_err(|error| error.to_string());
        let switched = switched.and_then(|()| device.set_direct_io(true).map_err(|error| in_one_line(&error)));
        match switched {
            Ok(()) => self.state().direct_io = true,
            Err(error) => tracing::debug!(layer = %self.id.diff_id, error, "the loop device stays without direct I/O"),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // Whoever mounts the layer again waits until its directory is free.
        let _one = self.ground.lock().unwrap_or_else(PoisonError::into_inner);
        if self.stays.load(Ordering::Relaxed) && matches!(self.state().backing, Backing::Local(_)) {
            return;
        }
        let gone = unmount_all(&self.mount_point).map_err(io::Error::other);
        if let Err(error) = gone.and_then(|()| fs::remove_dir(&self.mount_point)) {
            tracing::warn!(layer = %self.id, %error, "the mount of a layer stays behind");
        }
    }
}

/// Takes everything away that is mounted on the directory of a layer: one that the kernel shows may cover what showed it before.
pub(super) fn unmount_all(mount_point: &Path) -> Result<(), MountError> {
    unmount(mount_point, Unmount::Lazy)?;
    while unmount(mount_point, Unmount::Lazy).is_ok() {}
    Ok(())
}

/// Opens a file that holds a layer, and gives its name without links.
fn open_layer(diff_id: DiffId, size: u64, path: &Path) -> Result<(File, PathBuf), DriverError> {
    let path = path.canonicalize().map_err(DriverError::io("find", path))?;
    let file = File::open(&path).map_err(DriverError::io("open", &path))?;
    let found = file.metadata().map_err(DriverError::io("look at", &path))?.len();
    if found != size {
        return Err(DriverError::Size { diff_id, path, found, wanted: size });
    }
    Ok((file, path))
}

fn on_device(
    layer: &LayerBacking,
    file: &File,
    path: &Path,
    directory: &Directory,
    manner: &Manner,
) -> Result<LoopDevice, DriverError> {
    if !layer.size.is_multiple_of(512) {
        return Err(DriverError::Uneven { diff_id: layer.id.diff_id, size: layer.size });
    }
    let device = LoopDevice::attach(file, path, &label(&layer.id, manner))
        .map_err(|source: LoopError| DriverError::Loop { diff_id: layer.id.diff_id, source })?;
    directory.mount(device.node()).map_err(|source| DriverError::Refused { diff_id: layer.id.diff_id, source })?;
    Ok(device)
}

/// The layer on the device that an owner before this one made for it, if it is still in use: it reads `file` from now on, and
/// so does whatever is mounted on it.
fn on_living_device(
    layer: &LayerBacking,
    file: &File,
    path: &Path,
    directory: &Directory,
    manner: &Manner,
) -> Result<Option<LoopDevice>, DriverError> {
    if !directory.adopts {
        return Ok(None);
    }
    let wanted = label(&layer.id, manner);
    let devices = loop_devices().map_err(DriverError::io("read", "/sys/block".as_ref()))?;
    let ours = devices.into_iter().filter(|entry| can_hold(entry, &layer.id)).find_map(|entry| {
        let device = LoopDevice::open(entry.number).ok()?;
        (device.status().ok()?.label == wanted).then_some(device)
    });
    let Some(device) = ours else { return Ok(None) };
    if device.status().is_ok_and(|status| status.direct_io) {
        device.set_direct_io(false).map_err(|source| DriverError::Loop { diff_id: layer.id.diff_id, source })?;
    }
    if let Err(error) = device.change_backing(file, path) {
        // It went at this moment, or it is none for this file.
        let error: &dyn std::error::Error = &error;
        tracing::warn!(layer = %layer.id, device = device.number(), error, "a loop device is not taken up");
        return Ok(None);
    }
    let mounted = directory.mount(device.node());
    mounted.map_err(|source| DriverError::Refused { diff_id: layer.id.diff_id, source })?;
    tracing::info!(layer = %layer.id, device = device.number(), "a loop device is taken up");
    Ok(Some(device))
}

/// False for a device on a lazy file of another layer: to open that one may wait for bytes that do not come.
fn can_hold(entry: &LoopEntry, layer: &LayerId) -> bool {
    let name = String::from_utf8_lossy(entry.file_name());
    let is_lazy = name.starts_with("sha256:") || name.starts_with("sha512:");
    !is_lazy || name.contains(&layer.diff_id.to_string())
}

/// What a layer's loop device is called: another name for every layer, also for those of one diffID.
fn label(id: &LayerId, manner: &Manner) -> String {
    let LayerId { diff_id, blob, anchor } = id;
    let hash = Digest::of(Algorithm::Sha256, format!("{diff_id} {blob} {anchor}").as_bytes()).hex();
    format!("{}:{}", manner.label, hash.get(..16).unwrap_or(&hash))
}

/// A directory for a mount, removed again unless it is kept.
struct Directory {
    path: PathBuf,
    adopts: bool,
}

impl Directory {
    /// A new one; one that is there already if `adopts`.
    fn make(path: PathBuf, adopts: bool) -> Result<Self, DriverError> {
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if adopts && error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.map_err(DriverError::io("create", &path))?,
        }
        Ok(Self { path, adopts })
    }

    /// Mounts an EROFS image; true if it was mounted already.
    fn mount(&self, source: &Path) -> Result<bool, MountError> {
        if self.adopts {
            let top = mounted_on(&self.path).ok().flatten();
            if top.is_some_and(|top| top.kind == "erofs" && top.source == source.as_os_str()) {
                return Ok(true);
            }
            self.clear();
        }
        mount_erofs(source, &self.path).map(|()| false)
    }

    /// Takes away what was left here, if anything can be.
    fn clear(&self) {
        if self.adopts {
            while unmount(&self.path, Unmount::Lazy).is_ok() {}
        }
    }

    fn keep(mut self) -> PathBuf {
        std::mem::take(&mut self.path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if self.path.as_os_str().is_empty() {
            return;
        }
        self.clear();
        if let Err(error) = fs::remove_dir(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a directory stays behind");
        }
    }
}
