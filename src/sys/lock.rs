//! Advisory locks between processes: `flock(2)` on a file whose only purpose is to be locked.
//!
//! A lock belongs to an open file description, so two locks of one process exclude each other as those of two processes
//! do, and the kernel gives a lock back when its process dies, however it dies.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

/// How often a lock is tried that others hold for moments only.
const GLANCE: Duration = Duration::from_millis(5);

/// With whom a lock can be held at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// With other shared locks.
    Shared,
    /// With nobody.
    Exclusive,
}

/// A lock that is held until it is dropped.
#[derive(Debug)]
pub struct FileLock {
    file: File,
}

impl FileLock {
    /// Waits for the lock on `path`. The file must exist.
    ///
    /// # Errors
    /// What `open` or `flock` says.
    pub fn acquire(path: &Path, mode: LockMode) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let operation = match mode {
            LockMode::Shared => FlockOperation::LockShared,
            LockMode::Exclusive => FlockOperation::LockExclusive,
        };
        rustix::io::retry_on_intr(|| flock(&file, operation))?;
        Ok(Self { file })
    }

    /// The lock on `path`, or none if somebody holds one that excludes it. The file must exist.
    ///
    /// # Errors
    /// What `open` or `flock` says.
    pub fn try_acquire(path: &Path, mode: LockMode) -> io::Result<Option<Self>> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let operation = match mode {
            LockMode::Shared => FlockOperation::NonBlockingLockShared,
            LockMode::Exclusive => FlockOperation::NonBlockingLockExclusive,
        };
        match rustix::io::retry_on_intr(|| flock(&file, operation)) {
            Ok(()) => Ok(Some(Self { file })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The lock on `path` as soon as it can be had, or none if that is not within `patience`: who only looks whether somebody
    /// holds a lock holds it for a moment, and is not to be taken for an owner. The file must exist.
    ///
    /// # Errors
    /// What `open` or `flock` says.
    pub fn acquire_within(path: &Path, mode: LockMode, patience: Duration) -> io::Result<Option<Self>> {
        let deadline = Instant::now() + patience;
        loop {
            match Self::try_acquire(path, mode)? {
                None if Instant::now() < deadline => thread::sleep(GLANCE),
                found => return Ok(found),
            }
        }
    }

    /// Sets the modification time of the locked file to now.
    ///
    /// # Errors
    /// What the system says.
    pub fn touch(&self) -> io::Result<()> {
        self.file.set_modified(std::time::SystemTime::now())
    }

    /// True if `path` still names the file that is locked. A lock on a file that was removed or replaced while its
    /// taker waited protects nothing.
    ///
    /// # Errors
    /// What `stat` says, except that the file is gone.
    pub fn still_names(&self, path: &Path) -> io::Result<bool> {
        let held = self.file.metadata()?;
        match std::fs::metadata(path) {
            Ok(named) => Ok((held.dev(), held.ino()) == (named.dev(), named.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_locks_live_together_and_exclude_an_exclusive_one() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path();
        let first = FileLock::acquire(path, LockMode::Shared).unwrap();
        let second = FileLock::try_acquire(path, LockMode::Shared).unwrap().expect("shared locks live together");
        assert!(FileLock::try_acquire(path, LockMode::Exclusive).unwrap().is_none());
        drop((first, second));
        let only = FileLock::try_acquire(path, LockMode::Exclusive).unwrap().expect("nobody is left");
        assert!(FileLock::try_acquire(path, LockMode::Shared).unwrap().is_none());
        drop(only);
    }

    #[test]
    fn who_only_looks_is_waited_for() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path();
        let looking = FileLock::acquire(path, LockMode::Shared).unwrap();
        let none = FileLock::acquire_within(path, LockMode::Exclusive, GLANCE * 2).unwrap();
        assert!(none.is_none(), "who stays is no passer-by");
        let (begun, begins) = std::sync::mpsc::channel();
        thread::scope(|scope| {
            let taking = scope.spawn(move || {
                begun.send(()).unwrap();
                FileLock::acquire_within(path, LockMode::Exclusive, Duration::from_secs(60)).unwrap()
            });
            begins.recv().unwrap();
            drop(looking);
            assert!(taking.join().unwrap().is_some());
        });
    }

    #[test]
    fn a_lock_notices_that_its_file_was_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        std::fs::write(&path, b"").unwrap();
        let lock = FileLock::acquire(&path, LockMode::Shared).unwrap();
        assert!(lock.still_names(&path).unwrap());
        std::fs::remove_file(&path).unwrap();
        assert!(!lock.still_names(&path).unwrap());
        std::fs::write(&path, b"").unwrap();
        assert!(!lock.still_names(&path).unwrap(), "another file of the same name was taken for the locked one");
    }
}
