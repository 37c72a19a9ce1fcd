//! One layer, mounted by the kernel: on a loop device whose file can be exchanged, straight on its complete file, or as a
//! directory that somebody else shows.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::error::in_one_line;
use super::{DriverError, LayerBacking, RunDirectory};
use crate::chain::LayerId;
use crate::model::{Algorithm, DiffId, Digest};
use crate::sys::loopdev::{LoopDevice, LoopError};
use crate::sys::mount::{Unmount, unmount};
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
    /// The last to go.
    _run: Arc<RunDirectory>,
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
}

#[derive(Debug)]
struct State {
    backing: Backing,
    file: PathBuf,
    direct_io: bool,
    failure: Option<String>,
}

/// How layers are attached.
#[derive(Debug, Clone)]
pub(super) struct Manner {
    /// What loop devices are called.
    pub(super) label: String,
    /// Complete files are read past their page cache.
    pub(super) direct_io: bool,
}

impl Attached {
    /// Mounts `layer` in `run`. Blocks as long as a lazy file does. Nobody else holds `ground`.
    pub(super) fn new(
        layer: &LayerBacking,
        run: Arc<RunDirectory>,
        ground: Arc<Mutex<()>>,
        manner: &Manner,
    ) -> Result<Self, DriverError> {
        let directory = || Directory::make(run.layer(layer.number));
        let (mount_point, device, backing, file, opened) = match (&layer.local, &layer.lazy, &layer.tree) {
            (Some(path), ..) => {
                let (file, path) = open_layer(layer.id.diff_id, layer.size, path)?;
                let directory = directory()?;
                let device = match mount_erofs(&path, &directory.0) {
                    Ok(()) => None,
                    // An image that the kernel refuses as a file is refused on a device too, with a reason that is worth
                    // telling.
                    Err(_) => Some(on_device(layer, &file, &path, &directory.0, manner)?),
                };
                (directory.keep(), device, Backing::Local(SystemTime::now()), path, Some(file))
            }
            (None, Some(path), _) => {
                let (file, path) = open_layer(layer.id.diff_id, layer.size, path)?;
                let directory = directory()?;
                let device = on_device(layer, &file, &path, &directory.0, manner)?;
                (directory.keep(), Some(device), Backing::Lazy, path, None)
            }
            (None, None, Some(tree)) => {
                let directory = directory()?;
                mount_bind(tree, &directory.0).map_err(DriverError::Stack)?;
                (directory.keep(), None, Backing::Tree, tree.clone(), None)
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
            ground,
            _run: run,
        };
        if let Some(file) = opened.filter(|_| manner.direct_io) {
            attached.switch_to_direct_io(&file);
        }
        Ok(attached)
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

    /// Lets the kernel read the file at `path` from now on, which holds the same bytes. Of a layer that has no device nothing
    /// changes.
    pub(super) fn exchange(&self, path: &Path, backing: Backing, direct_io: bool) -> Result<(), DriverError> {
        let Some(device) = &self.device else { return Ok(()) };
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
        let gone = unmount(&self.mount_point, Unmount::Lazy).map_err(io::Error::other);
        if let Err(error) = gone.and_then(|()| fs::remove_dir(&self.mount_point)) {
            tracing::warn!(layer = %self.id, %error, "the mount of a layer stays behind");
        }
    }
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
    mount_point: &Path,
    manner: &Manner,
) -> Result<LoopDevice, DriverError> {
    if !layer.size.is_multiple_of(512) {
        return Err(DriverError::Uneven { diff_id: layer.id.diff_id, size: layer.size });
    }
    let device = LoopDevice::attach(file, path, &label(&layer.id, manner))
        .map_err(|source: LoopError| DriverError::Loop { diff_id: layer.id.diff_id, source })?;
    mount_erofs(device.node(), mount_point)
        .map_err(|source| DriverError::Refused { diff_id: layer.id.diff_id, source })?;
    Ok(device)
}

/// What a layer's loop device is called: another name for every layer, also for those of one diffID.
fn label(id: &LayerId, manner: &Manner) -> String {
    let LayerId { diff_id, blob, anchor } = id;
    let hash = Digest::of(Algorithm::Sha256, format!("{diff_id} {blob} {anchor}").as_bytes()).hex();
    format!("{}:{}", manner.label, hash.get(..16).unwrap_or(&hash))
}

/// A new directory, removed again unless it is kept.
struct Directory(PathBuf);

impl Directory {
    fn make(path: PathBuf) -> Result<Self, DriverError> {
        DirBuilder::new().mode(0o700).create(&path).map_err(DriverError::io("create", &path))?;
        Ok(Self(path))
    }

    fn keep(mut self) -> PathBuf {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if !self.0.as_os_str().is_empty()
            && let Err(error) = fs::remove_dir(&self.0)
        {
            tracing::warn!(path = %self.0.display(), %error, "a directory stays behind");
        }
    }
}
