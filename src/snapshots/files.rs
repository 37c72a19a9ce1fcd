//! The directories of snapshots: made before they are recorded, moved away when they are not any more, deleted by a
//! thread of their own.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::Own;
use crate::chain::SnapshotSlot;
use crate::store::StoreError;

const SNAPSHOTS: &str = "snapshots";
const TRASH: &str = "trash";
const UPPER: &str = "upper";
const WORK: &str = "work";

/// The root of a container unless somebody changes it; what containerd's own snapshotters give.
const UPPER_MODE: u32 = 0o755;

#[derive(Debug)]
pub(super) struct Files {
    snapshots: PathBuf,
    trash: PathBuf,
    reaper: Arc<Reaper>,
}

/// Directories that wait to be deleted.
#[derive(Debug, Default)]
struct Reaper {
    state: Mutex<Reaping>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Reaping {
    waiting: Vec<PathBuf>,
    busy: bool,
    over: bool,
}

impl Files {
    pub(super) fn open(root: &Path) -> Result<Self, StoreError> {
        let (snapshots, trash) = (root.join(SNAPSHOTS), root.join(TRASH));
        for path in [&snapshots, &trash] {
            directory(path)?;
        }
        let reaper = Arc::new(Reaper::default());
        let theirs = Arc::clone(&reaper);
        std::thread::Builder::new()
            .name("snapshot-reaper".to_owned())
            .spawn(move || theirs.run())
            .map_err(|error| StoreError::io("start a thread for", &trash, error))?;
        let files = Self { snapshots, trash, reaper };
        // What an earlier process did not come to delete.
        for left in entries(&files.trash)? {
            files.reaper.delete(left);
        }
        Ok(files)
    }

    pub(super) fn own(&self, slot: SnapshotSlot) -> Own {
        own_at(&self.place(slot))
    }

    /// Whose files are in the directory `upper`.
    pub(super) fn slot_of(&self, upper: &Path) -> Option<SnapshotSlot> {
        let name = upper.strip_prefix(&self.snapshots).ok()?.parent()?.to_str()?;
        let slot = SnapshotSlot(name.parse().ok()?);
        // Written as it would be written, and nothing else.
        (self.own(slot).upper.as_os_str() == upper.as_os_str()).then_some(slot)
    }

    fn place(&self, slot: SnapshotSlot) -> PathBuf {
        self.snapshots.join(slot.to_string())
    }

    /// Makes the directories of a snapshot, empty. What stands in their place has no record: a crash left it.
    pub(super) fn make(&self, slot: SnapshotSlot) -> Result<(), StoreError> {
        let place = self.place(slot);
        if place.symlink_metadata().is_ok() {
            self.discard(slot);
        }
        let own = self.own(slot);
        for path in [&place, &own.upper, &own.work] {
            DirBuilder::new().mode(0o700).create(path).map_err(|error| StoreError::io("make", path, error))?;
        }
        fs::set_permissions(&own.upper, Permissions::from_mode(UPPER_MODE))
            .map_err(|error| StoreError::io("set the mode of", &own.upper, error))
    }

    /// Moves the directories of a snapshot away. Nothing depends on it: what stays is found at the next start.
    pub(super) fn discard(&self, slot: SnapshotSlot) {
        self.discard_path(&self.place(slot));
    }

    pub(super) fn discard_path(&self, place: &Path) {
        let moved = tempfile::Builder::new().prefix("").tempdir_in(&self.trash).and_then(|grave| {
            // From here on it is the reaper who deletes.
            let grave = grave.keep();
            let moved = fs::rename(place, grave.join("gone"));
            self.reaper.delete(grave);
            moved
        });
        match moved {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %place.display(), "cannot move away the files of a removed snapshot: {error}");
            }
            _ => {}
        }
    }

    /// Numbers of the directories that are there, and the names of what is no such directory.
    pub(super) fn found(&self) -> Result<(Vec<SnapshotSlot>, Vec<PathBuf>), StoreError> {
        let (mut slots, mut strange) = (Vec::new(), Vec::new());
        for path in entries(&self.snapshots)? {
            let name = path.file_name().and_then(|name| name.to_str());
            match name.and_then(|name| name.parse().ok().filter(|slot: &u32| slot.to_string() == name)) {
                Some(slot) => slots.push(SnapshotSlot(slot)),
                None => strange.push(path),
            }
        }
        Ok((slots, strange))
    }

    pub(super) fn is_there(&self, slot: SnapshotSlot) -> bool {
        self.own(slot).upper.is_dir()
    }

    /// Returns when the files of a snapshot survive a power cut. The whole file system is written: nobody knows which of
    /// many files are not.
    pub(super) fn sync(&self, slot: SnapshotSlot) -> Result<(), StoreError> {
        let upper = self.own(slot).upper;
        let failed = |error| StoreError::io("sync", &upper, error);
        let directory = fs::File::open(&upper).map_err(failed)?;
        rustix::fs::syncfs(&directory).map_err(|error| failed(error.into()))
    }

    pub(super) fn cleaned(&self) {
        let mut state = self.reaper.lock();
        while state.busy || !state.waiting.is_empty() {
            state = self.reaper.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        self.reaper.lock().over = true;
        self.reaper.changed.notify_all();
    }
}

impl Reaper {
    fn lock(&self) -> MutexGuard<'_, Reaping> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn delete(&self, path: PathBuf) {
        self.lock().waiting.push(path);
        self.changed.notify_all();
    }

    /// Deletes until nobody is left who could ask for more. What is not deleted then is found at the next start.
    fn run(&self) {
        let mut state = self.lock();
        while !state.over {
            let Some(path) = state.waiting.pop() else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            state.busy = true;
            drop(state);
            if let Err(error) = fs::remove_dir_all(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(path = %path.display(), "cannot delete the files of a removed snapshot: {error}");
            }
            state = self.lock();
            state.busy = false;
            self.changed.notify_all();
        }
    }
}

/// The directories of a snapshot of the root.
pub(super) fn own(root: &Path, slot: SnapshotSlot) -> Own {
    own_at(&root.join(SNAPSHOTS).join(slot.to_string()))
}

fn own_at(place: &Path) -> Own {
    Own { upper: place.join(UPPER), work: place.join(WORK) }
}

fn directory(path: &Path) -> Result<(), StoreError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| StoreError::io("make", path, error))
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let failed = |error| StoreError::io("list", directory, error);
    let entries = fs::read_dir(directory).map_err(failed)?;
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(failed)).collect()
}
