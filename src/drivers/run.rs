//! The directory in which one owner mounts layers.
//!
//! ```text
//! <run>/owner        locked as long as the owner lives
//! <run>/l/<number>    one mount a layer; short, because others name many of them in one page of options
//! <run>/empty        an empty directory: overlayfs wants two lower ones
//! <run>/m/<n>/<n>     layers and directories under other ids, of whoever put them there
//! ```
//!
//! Others see nothing of it: mode 700. What else the owner puts there is its own business.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::DriverError;
use crate::model::{Algorithm, Digest};
use crate::sys::{FileLock, LockMode};

/// How long the lock of an owner is held by those who only look at what a dead one left.
const MOMENT: Duration = Duration::from_secs(5);

/// What the source of every overlay begins with.
const SOURCE: &str = "headstart:";

/// A run directory that belongs to this process until this is dropped, which removes what was made here.
#[derive(Debug)]
pub struct RunDirectory {
    path: PathBuf,
    source: String,
    /// An owner before this one left something.
    is_found: bool,
    /// Something of it stays when this is dropped.
    leaves: AtomicBool,
    _owner: FileLock,
}

impl RunDirectory {
    /// Takes the directory at `path`, which is made if it is missing.
    ///
    /// # Errors
    /// [`DriverError::Owned`], and what the system says.
    pub fn claim(path: &Path) -> Result<Self, DriverError> {
        let mut maker = fs::DirBuilder::new();
        maker.recursive(true).mode(0o700).create(path).map_err(DriverError::io("create", path))?;
        let path = path.canonicalize().map_err(DriverError::io("find", path))?;
        let owner = take(&path, LockMode::Exclusive)?.ok_or_else(|| DriverError::Owned(path.clone()))?;
        let is_found = layers(&path).exists();
        for inner in [layers(&path), path.join("empty")] {
            maker.create(&inner).map_err(DriverError::io("create", &inner))?;
        }
        Ok(Self { source: overlay_source(&path), path, is_found, leaves: AtomicBool::new(false), _owner: owner })
    }

    /// Takes a new directory in `base`, which is made if it is missing.
    ///
    /// # Errors
    /// What the system says.
    pub fn claim_new(base: &Path) -> Result<Self, DriverError> {
        let mut maker = fs::DirBuilder::new();
        maker.mode(0o700).recursive(true).create(base).map_err(DriverError::io("create", base))?;
        maker.recursive(false);
        let mut number = 0_u64;
        loop {
            let path = base.join(number.to_string());
            match maker.create(&path) {
                Ok(()) => return Self::claim(&path),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(DriverError::io("create", &path)(error)),
            }
        }
    }

    /// Where it is, absolute and without links.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory of the layer of this number.
    pub(super) fn layer(&self, number: u32) -> PathBuf {
        layers(&self.path).join(number.to_string())
    }

    pub(super) fn empty(&self) -> PathBuf {
        self.path.join("empty")
    }

    /// True if an owner before this one left something here.
    pub(super) fn is_found(&self) -> bool {
        self.is_found
    }

    /// Something stays in it for the next owner.
    pub(super) fn leave(&self) {
        self.leaves.store(true, Ordering::Relaxed);
    }

    fn leaves(&self) -> bool {
        self.leaves.load(Ordering::Relaxed)
    }

    /// Numbers of the directories of layers that are there.
    pub(super) fn numbers(&self) -> Vec<u32> {
        let entries = fs::read_dir(layers(&self.path)).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    }

    /// What the mount table shows as the source of overlays of this owner.
    pub(super) fn source(&self) -> &str {
        &self.source
    }
}

impl Drop for RunDirectory {
    fn drop(&mut self) {
        if let Err(error) = clear(&self.path)
            && !self.leaves()
        {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "a run directory stays behind");
        }
    }
}

/// The lock of the owner of `run`, shared with others who only look if that is the `mode`; none if an owner lives.
pub(super) fn take(run: &Path, mode: LockMode) -> Result<Option<FileLock>, DriverError> {
    let path = run.join("owner");
    loop {
        let mut create = fs::File::options();
        create.write(true).create(true).truncate(false).open(&path).map_err(DriverError::io("create", &path))?;
        let taken = match mode {
            LockMode::Exclusive => FileLock::acquire_within(&path, mode, MOMENT),
            LockMode::Shared => FileLock::try_acquire(&path, mode),
        };
        let lock = match taken {
            Ok(Some(lock)) => lock,
            Ok(None) => return Ok(None),
            // Whoever held it removed it at this moment.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(DriverError::io("lock", &path)(error)),
        };
        if lock.still_names(&path).map_err(DriverError::io("look at", &path))? {
            return Ok(Some(lock));
        }
    }
}

/// Removes the directories of the owner of `run`, whose lock is held and goes last. What others put there keeps `run`.
pub(super) fn clear(run: &Path) -> Result<(), DriverError> {
    let missing = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    for inner in [layers(run), run.join("empty")] {
        match fs::remove_dir(&inner) {
            Err(error) if !missing(&error) => return Err(DriverError::io("remove", &inner)(error)),
            _ => {}
        }
    }
    let owner = run.join("owner");
    match fs::remove_file(&owner) {
        Err(error) if !missing(&error) => return Err(DriverError::io("remove", &owner)(error)),
        _ => {}
    }
    match fs::remove_dir(run) {
        Err(error) if !missing(&error) && error.kind() != io::ErrorKind::DirectoryNotEmpty => {
            Err(DriverError::io("remove", run)(error))
        }
        _ => Ok(()),
    }
}

pub(super) fn layers(run: &Path) -> PathBuf {
    run.join("l")
}

pub(super) fn mapped(run: &Path) -> PathBuf {
    run.join("m")
}

/// What the mount table shows as the source of overlays of the owner of `run` (without links): the names of mount points
/// do not tell whose they are.
pub(super) fn overlay_source(run: &Path) -> String {
    let id = Digest::of(Algorithm::Sha256, run.as_os_str().as_bytes()).hex();
    format!("{SOURCE}{}", id.get(..16).unwrap_or(&id))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_directory_has_one_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let run = RunDirectory::claim(&path).unwrap();
        assert!(matches!(RunDirectory::claim(&path), Err(DriverError::Owned(_))));
        assert_eq!(run.source(), overlay_source(run.path()));
        drop(run);
        assert!(!path.exists());
        let run = RunDirectory::claim(&path).unwrap();
        fs::write(path.join("more"), "").unwrap();
        drop(run);
        assert!(path.join("more").exists() && !path.join("owner").exists());
    }
}
