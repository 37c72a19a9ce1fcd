//! Who is the daemon: one per root and one per run directory, and how others find it.
//!
//! ```text
//! <root>/daemon.lock   held by the root's daemon as long as it lives; inside: its process and its socket
//! <run>/daemon.lock    the same for the run directory, which belongs to one daemon
//! <run>/control.sock   the daemon's control socket
//! ```
//!
//! Guarantees: that a daemon lives is what its lock says, so what a dead one left deceives nobody.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::sys::{FileError, FileLock, LockMode};

const LOCK: &str = "daemon.lock";

/// How long a lock is held by a daemon alone: whoever looks for one ([`find`]) holds it for a moment.
const MOMENT: Duration = Duration::from_secs(1);

/// What a lock says of its holder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The daemon's process.
    pub pid: u32,
    /// Its control socket.
    pub socket: PathBuf,
}

/// Why this process cannot be the daemon.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// Another one lives.
    #[error("cannot be the daemon of {}: process {} is", .place.display(), PidOr(.holder.as_ref()))]
    Taken {
        /// The root or the run directory.
        place: PathBuf,
        /// What is known of it.
        holder: Option<Holder>,
    },
    /// The system refused.
    #[error(transparent)]
    Io(#[from] FileError),
}

struct PidOr<'a>(Option<&'a Holder>);

impl std::fmt::Display for PidOr<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(holder) => write!(f, "{}", holder.pid),
            None => f.write_str("another one"),
        }
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PlaceError {
    let error = FileError::of(action, path);
    move |source| PlaceError::Io(error(source))
}

/// That this process is the daemon of a root and a run directory, until it is dropped.
#[derive(Debug)]
pub struct Place {
    run: PathBuf,
    _locks: [FileLock; 2],
}

impl Place {
    /// Becomes the daemon of `root` and `run`. Both are made if they are missing.
    ///
    /// # Errors
    /// See [`PlaceError`].
    pub fn take(root: &Path, run: &Path) -> Result<Self, PlaceError> {
        fs::create_dir_all(root).map_err(io_error("create", root))?;
        // Others have no business in it: the socket and the layers are there.
        fs::DirBuilder::new().recursive(true).mode(0o700).create(run).map_err(io_error("create", run))?;
        let holder = Holder { pid: std::process::id(), socket: run.join("control.sock") };
        Ok(Self { run: run.to_owned(), _locks: [hold(root, &holder)?, hold(run, &holder)?] })
    }

    /// The control socket.
    pub fn socket(&self) -> PathBuf {
        self.run.join("control.sock")
    }

    /// Where the daemon's FUSE connection is mounted.
    pub fn file_system(&self) -> PathBuf {
        file_system(&self.run)
    }
}

/// Where the FUSE connection of the daemon of this run directory is mounted.
pub(super) fn file_system(run: &Path) -> PathBuf {
    run.join("fs")
}

fn hold(place: &Path, holder: &Holder) -> Result<FileLock, PlaceError> {
    let path = place.join(LOCK);
    fs::File::options().write(true).create(true).truncate(false).open(&path).map_err(io_error("create", &path))?;
    match FileLock::acquire_within(&path, LockMode::Exclusive, MOMENT).map_err(io_error("lock", &path))? {
        Some(lock) => {
            let text = serde_json::to_vec(holder).expect("plain fields always have a JSON form");
            // In place: the lock belongs to this very file, which is never removed.
            fs::write(&path, text).map_err(io_error("write", &path))?;
            Ok(lock)
        }
        None => Err(PlaceError::Taken { place: place.to_owned(), holder: read(&path) }),
    }
}

fn read(path: &Path) -> Option<Holder> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

/// The living daemon of `root`, if there is one.
///
/// # Errors
/// A lock that cannot be looked at.
pub fn find(root: &Path) -> Result<Option<Holder>, PlaceError> {
    let path = root.join(LOCK);
    match FileLock::try_acquire(&path, LockMode::Shared) {
        // One that has written nothing yet has begun at this moment.
        Ok(None) => Ok(read(&path)),
        Ok(Some(_)) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(io_error("lock", &path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_root_and_a_run_directory_have_one_daemon() {
        let temporary = tempfile::tempdir().unwrap();
        let path = |name: &str| temporary.path().join(name);
        assert_eq!(find(&path("root")).unwrap(), None);
        let place = Place::take(&path("root"), &path("run")).unwrap();
        let holder = Holder { pid: std::process::id(), socket: place.socket() };
        assert_eq!(find(&path("root")).unwrap(), Some(holder.clone()));
        for (root, run, taken) in [("root", "other-run", "root"), ("other-root", "run", "run")] {
            let error = Place::take(&path(root), &path(run)).unwrap_err();
            assert!(error.to_string().ends_with(&format!("process {} is", holder.pid)), "{error}");
            match error {
                PlaceError::Taken { place, holder: Some(found) } => {
                    assert_eq!((place, found), (path(taken), holder.clone()));
                }
                other => panic!("{other}"),
            }
        }
        drop(place);
        assert_eq!(find(&path("root")).unwrap(), None);
        Place::take(&path("root"), &path("run")).unwrap();
    }
}
