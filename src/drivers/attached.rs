//! One layer, mounted by the kernel: on a loop device whose file can be exchanged, or straight on its complete file.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::error::in_one_line;
use super::{DriverError, LayerBacking, RunDirectory};
use crate::model::DiffId;
use crate::sys::loopdev::{LoopDevice, LoopError};
use crate::sys::mount::{Unmount, unmount};
use crate::sys::stack::mount_erofs;

/// What the kernel reads a layer from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// The file that is filled as it is read.
    Lazy,
    /// The complete file, since then.
    Local(SystemTime),
}

/// How a layer stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerReport {
    /// Which layer.
    pub diff_id: DiffId,
    /// What the kernel reads.
    pub backing: Backing,
    /// The file.
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
    diff_id: DiffId,
    size: u64,
    mount_point: PathBuf,
    device: Option<LoopDevice>,
    /// Held over the calls of an exchange, so that there is one at a time. Taken before `state`.
    exchange: Mutex<()>,
    state: Mutex<State>,
    /// The last to go.
    _run: Arc<RunDirectory>,
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
    /// Mounts `layer` in `run` under `name`. Blocks as long as a lazy file does.
    pub(super) fn new(
        layer: &LayerBacking,
        run: Arc<RunDirectory>,
        name: &str,
        manner: &Manner,
    ) -> Result<Self, DriverError> {
        let (path, backing) = match (&layer.local, &layer.lazy) {
            (Some(path), _) => (path, Backing::Local(SystemTime::now())),
            (None, Some(path)) => (path, Backing::Lazy),
            (None, None) => return Err(DriverError::NoFile(layer.diff_id)),
        };
        let (file, path) = open_layer(layer.diff_id, layer.size, path)?;
        let directory = Directory::make(run.layers().join(name))?;
        let state = State { backing, file: path.clone(), direct_io: false, failure: None };
        let device = match layer.local.is_some() && mount_erofs(&path, &directory.0).is_ok() {
            true => None,
            // An image that the kernel refuses as a file is refused on a device too, with a reason that is worth telling.
            false => Some(on_device(layer, &file, &path, &directory.0, manner)?),
        };
        let attached = Self {
            diff_id: layer.diff_id,
            size: layer.size,
            mount_point: directory.keep(),
            device,
            exchange: Mutex::new(()),
            state: Mutex::new(state),
            _run: run,
        };
        if layer.local.is_some() && manner.direct_io {
            attached.switch_to_direct_io(&file);
        }
        Ok(attached)
    }

    /// Where it is mounted.
    pub(super) fn mount_point(&self) -> &Path {
        &self.mount_point
    }

    pub(super) fn report(&self) -> LayerReport {
        let state = self.state();
        LayerReport {
            diff_id: self.diff_id,
            backing: state.backing,
            file: state.file.clone(),
            device: self.device.as_ref().map(LoopDevice::number),
            direct_io: state.direct_io,
            failure: state.failure.clone(),
        }
    }

    /// Lets the kernel read the file at `path` from now on, which holds the same bytes. Of a layer that is mounted on its
    /// complete file nothing changes.
    pub(super) fn exchange(&self, path: &Path, backing: Backing, direct_io: bool) -> Result<(), DriverError> {
        let Some(device) = &self.device else { return Ok(()) };
        let _one = self.exchange.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |source| DriverError::Loop { diff_id: self.diff_id, source };
        {
            // Whoever came first has done it.
            let state = self.state();
            let is_there = matches!((state.backing, backing), (Backing::Local(_), Backing::Local(_)));
            if is_there && path.canonicalize().is_ok_and(|path| path == state.file) {
                return Ok(());
            }
        }
        let exchanged = open_layer(self.diff_id, self.size, path).and_then(|(file, path)| {
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
        tracing::debug!(layer = %self.diff_id, from = %before.display(), device = device.number(), "layer changed hands");
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
            Err(error) => tracing::debug!(layer = %self.diff_id, error, "the loop device stays without direct I/O"),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let gone = unmount(&self.mount_point, Unmount::Lazy).map_err(io::Error::other);
        if let Err(error) = gone.and_then(|()| fs::remove_dir(&self.mount_point)) {
            tracing::warn!(layer = %self.diff_id, %error, "the mount of a layer stays behind");
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
        return Err(DriverError::Uneven { diff_id: layer.diff_id, size: layer.size });
    }
    let id = layer.diff_id.0.hex();
    let label = format!("{}:{}", manner.label, id.get(..16).unwrap_or(&id));
    let device = LoopDevice::attach(file, path, &label)
        .map_err(|source: LoopError| DriverError::Loop { diff_id: layer.diff_id, source })?;
    mount_erofs(device.node(), mount_point)
        .map_err(|source| DriverError::Refused { diff_id: layer.diff_id, source })?;
    Ok(device)
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
