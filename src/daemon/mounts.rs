//! The mounts of a root: who serves what where, on disk, so that any process of the root can tell.
//!
//! ```text
//! <root>/mounts/<id>.lock   held by the serving process as long as it lives
//! <root>/mounts/<id>.json   the record: image, mount point, process
//! <root>/mounts/<id>.sock   its control socket
//! <root>/mounts/<id>.log    its log
//! <root>/mounts/<id>.lower  where the image itself is mounted while a writable layer is put on top
//! ```
//!
//! Guarantees: a mount point has one serving process per root; whether it lives is what its lock says, so a reused process
//! id cannot deceive; what a dead process left is found and removed. Refuses to know what is mounted.

use std::fs;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::control::MountRecord;
use crate::model::{Algorithm, Digest};
use crate::sys::mount;
use crate::sys::{FileError, FileLock, LockMode};

/// How long a lock is held by a serving process alone: who looks at a mount holds it for a moment.
const MOMENT: Duration = Duration::from_secs(1);

/// Why the mounts of a root could not be looked at or changed.
#[derive(Debug, thiserror::Error)]
pub enum MountsError {
    /// The system refused.
    #[error(transparent)]
    Io(#[from] FileError),
    /// Another process of this root serves the mount point, or is about to.
    #[error("cannot mount on {}: another process of this root serves it", .0.display())]
    Taken(PathBuf),
    /// What is mounted would hide files of this program, or lie among them.
    #[error("cannot mount on {}: {} is where this program keeps its own files", .mount_point.display(), .own.display())]
    Own {
        /// The mount point.
        mount_point: PathBuf,
        /// The root or the run directory.
        own: PathBuf,
    },
    /// Two overlays that write to one directory destroy each other's files.
    #[error("cannot write to {}: what is written to {} is kept there", .upper.display(), .mount_point.display())]
    UpperTaken {
        /// The directory of the writable layer.
        upper: PathBuf,
        /// The mount that has it.
        mount_point: PathBuf,
    },
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MountsError {
    let error = FileError::of(action, path);
    move |source| MountsError::Io(error(source))
}

/// The mounts of a root.
#[derive(Debug, Clone)]
pub struct Mounts {
    directory: PathBuf,
}

/// One of them.
#[derive(Debug, Clone)]
pub struct Entry {
    /// What is known.
    pub record: MountRecord,
    /// True if its process lives.
    pub alive: bool,
    place: Place,
}

/// The files of one mount.
#[derive(Debug, Clone)]
struct Place {
    base: PathBuf,
}

impl Place {
    fn file(&self, suffix: &str) -> PathBuf {
        let mut name = self.base.clone().into_os_string();
        name.push(suffix);
        name.into()
    }

    fn lock(&self) -> PathBuf {
        self.file(".lock")
    }

    fn record(&self) -> PathBuf {
        self.file(".json")
    }

    /// Holds the lock, on the file that bears its name; none if a process that serves it does.
    fn take(&self) -> Result<Option<FileLock>, MountsError> {
        let path = self.lock();
        loop {
            fs::File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
                .map_err(io_error("create", &path))?;
            let lock = match FileLock::acquire_within(&path, LockMode::Exclusive, MOMENT) {
                Ok(Some(lock)) => lock,
                Ok(None) => return Ok(None),
                // Whoever held it removed it at this moment.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(io_error("lock", &path)(error)),
            };
            if lock.still_names(&path).map_err(io_error("look at", &path))? {
                return Ok(Some(lock));
            }
        }
    }

    /// Removes everything but the log, which tells why. The lock is held, and goes last.
    fn clear(&self) -> Result<(), MountsError> {
        let lower = self.file(".lower");
        // A process that died while it put a writable layer on top left its mount there.
        if mount::is_ours(&lower).is_ok_and(|ours| ours)
            && let Err(error) = mount::unmount(&lower, mount::Unmount::Lazy)
        {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "the mount below a writable layer stays behind");
        }
        match fs::remove_dir(&lower) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error("remove", &lower)(error)),
            _ => {}
        }
        for path in [self.file(".sock"), self.record(), self.lock()] {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(io_error("remove", &path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

impl Mounts {
    /// The mounts of `root`, which is made if it is missing.
    ///
    /// # Errors
    /// A directory that cannot be made.
    pub fn open(root: &Path) -> Result<Self, MountsError> {
        let directory = root.join("mounts");
        fs::create_dir_all(&directory).map_err(io_error("create", &directory))?;
        Ok(Self { directory })
    }

    /// The mounts of `root`, none if nothing was ever mounted there.
    ///
    /// # Errors
    /// A directory that cannot be looked at.
    pub fn look(root: &Path) -> Result<Vec<Entry>, MountsError> {
        let directory = root.join("mounts");
        let mut entries = Vec::new();
        let listing = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(entries),
            listing => listing.map_err(io_error("list", &directory))?,
        };
        for found in listing {
            let path = found.map_err(io_error("list", &directory))?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            entries.extend(Entry::read(Place { base: path.with_extension("") })?);
        }
        entries.sort_by(|a, b| a.record.mount_point.cmp(&b.record.mount_point));
        Ok(entries)
    }

    fn place(&self, mount_point: &Path) -> Place {
        let id = Digest::of(Algorithm::Sha256, mount_point.as_os_str().as_bytes()).hex();
        Place { base: self.directory.join(id.get(..16).unwrap_or(&id)) }
    }

    /// Where the log of what is mounted on `mount_point` (absolute) is.
    pub fn log(&self, mount_point: &Path) -> PathBuf {
        self.place(mount_point).file(".log")
    }

    /// Refuses to mount on `mount_point` (absolute, without links) what would cover one of the directories `own`, or would
    /// lie in one, and to write to an `upper` directory that another mount of this root writes to.
    ///
    /// # Errors
    /// [`MountsError::Own`], [`MountsError::UpperTaken`].
    pub fn check(&self, mount_point: &Path, upper: Option<&Path>, own: [&Path; 2]) -> Result<(), MountsError> {
        let plain = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        for own in own.map(plain) {
            if mount_point.starts_with(&own) || own.starts_with(mount_point) {
                return Err(MountsError::Own { mount_point: mount_point.to_owned(), own });
            }
        }
        let (Some(upper), Some(root)) = (upper.map(plain), self.directory.parent()) else { return Ok(()) };
        for Entry { record, alive, .. } in Self::look(root)? {
            let same = record.mount_point != mount_point && record.upper.as_deref().map(plain).as_ref() == Some(&upper);
            // What a dead process mounted may still be there, and be written to.
            if same && (alive || mount::is_ours(&record.mount_point).unwrap_or(true)) {
                return Err(MountsError::UpperTaken { upper, mount_point: record.mount_point });
            }
        }
        Ok(())
    }

    /// Takes `mount_point` (absolute) for this process.
    ///
    /// # Errors
    /// [`MountsError::Taken`].
    pub fn claim(&self, mount_point: &Path) -> Result<Claim, MountsError> {
        let place = self.place(mount_point);
        let lock = place.take()?.ok_or_else(|| MountsError::Taken(mount_point.to_owned()))?;
        Ok(Claim { place, leaves_record: false, _lock: lock })
    }

    /// Takes `mount_point` (absolute) to go on with what a dead process has mounted there, whose record stays until another
    /// one is published.
    ///
    /// # Errors
    /// [`MountsError::Taken`].
    pub fn claim_dead(&self, mount_point: &Path) -> Result<Claim, MountsError> {
        let mut claim = self.claim(mount_point)?;
        claim.leaves_record = true;
        Ok(claim)
    }
}

impl Entry {
    /// The mount with these files; none if there is no record, or only a damaged one.
    fn read(place: Place) -> Result<Option<Self>, MountsError> {
        let path = place.record();
        // It may be removed while we look.
        let Ok(bytes) = fs::read(&path) else { return Ok(None) };
        let Ok(record) = serde_json::from_slice::<MountRecord>(&bytes) else {
            tracing::warn!(path = %path.display(), "the record of a mount is damaged and left out");
            return Ok(None);
        };
        let alive = match FileLock::try_acquire(&place.lock(), LockMode::Shared) {
            Ok(None) => true,
            Ok(Some(_)) => false,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(io_error("lock", &place.lock())(error)),
        };
        Ok(Some(Self { record, alive, place }))
    }

    /// How it stands by now; none if it has been cleared away.
    ///
    /// # Errors
    /// A lock that cannot be looked at.
    pub fn look_again(&self) -> Result<Option<Self>, MountsError> {
        Self::read(self.place.clone())
    }

    /// The control socket of its process.
    pub fn socket(&self) -> PathBuf {
        self.record.daemon.clone().unwrap_or_else(|| self.place.file(".sock"))
    }

    /// The log of its process, if that is its own.
    pub fn log(&self) -> Option<PathBuf> {
        self.record.daemon.is_none().then(|| self.place.file(".log"))
    }

    /// A handle of its process, which no later process of the same number can be mistaken for. None if it has ended.
    ///
    /// # Errors
    /// The kernel gives none.
    pub fn process(&self) -> io::Result<Option<Process>> {
        let pid = i32::try_from(self.record.pid).ok().and_then(Pid::from_raw);
        let handle = match pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) {
            Some(Ok(handle)) => handle,
            None | Some(Err(Errno::SRCH)) => return Ok(None),
            Some(Err(error)) => return Err(error.into()),
        };
        // The number may have passed to another process before we had the handle. Not if the lock is still held.
        match FileLock::try_acquire(&self.place.lock(), LockMode::Shared) {
            Ok(None) => Ok(Some(Process(handle))),
            Ok(Some(_)) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Removes what a dead process left on disk. False if it lives after all.
    ///
    /// # Errors
    /// A file that cannot be removed.
    pub fn clear(&self) -> Result<bool, MountsError> {
        match self.place.take()? {
            Some(_held) => self.place.clear().map(|()| true),
            None => Ok(false),
        }
    }
}

/// A process that serves a mount.
#[derive(Debug)]
pub struct Process(OwnedFd);

impl Process {
    /// Waits until it has ended, at most for `patience`; false if it lives on.
    ///
    /// # Errors
    /// The kernel cannot wait for it.
    pub fn wait_for_end(&self, patience: Duration) -> io::Result<bool> {
        let mut handles = [PollFd::new(&self.0, PollFlags::IN)];
        let patience = Timespec::try_from(patience).map_err(io::Error::other)?;
        let ended = rustix::io::retry_on_intr(|| poll(&mut handles, Some(&patience)))?;
        Ok(ended > 0)
    }
}

/// A mount point that belongs to this process until this is dropped, which removes its files, but for a record that is to stay.
#[derive(Debug)]
pub struct Claim {
    place: Place,
    leaves_record: bool,
    _lock: FileLock,
}

impl Claim {
    /// Lets other processes see the mount.
    ///
    /// # Errors
    /// A record that cannot be written.
    pub fn publish(&mut self, record: &MountRecord) -> Result<(), MountsError> {
        self.write(record)?;
        self.leaves_record = false;
        Ok(())
    }

    fn write(&self, record: &MountRecord) -> Result<(), MountsError> {
        let (path, fresh) = (self.place.record(), self.place.file(".new"));
        let bytes = serde_json::to_vec_pretty(record).expect("plain fields always have a JSON form");
        let Err(error) = fs::write(&fresh, &bytes).and_then(|()| fs::rename(&fresh, &path)) else { return Ok(()) };
        fs::remove_file(&fresh).ok();
        // A disk that is full takes a new record in the place of the old one, and who is followed by the next daemon has one.
        let is_full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        let in_place = || {
            let mut file = fs::File::options().write(true).open(&path)?;
            file.write_all(&bytes)?;
            file.set_len(bytes.len().try_into().unwrap_or(u64::MAX))
        };
        let written = if is_full && path.exists() { in_place() } else { Err(error) };
        written.map_err(io_error("write", &path))
    }

    /// Lets go of the mount point and leaves `record` there, as that of a mount that is dead.
    ///
    /// # Errors
    /// A record that cannot be written.
    pub fn leave(mut self, record: &MountRecord) -> Result<(), MountsError> {
        self.write(record)?;
        self.leaves_record = true;
        Ok(())
    }

    /// The control socket to listen on.
    pub fn socket(&self) -> PathBuf {
        self.place.file(".sock")
    }

    /// A new directory on which the image itself is mounted for a moment.
    ///
    /// # Errors
    /// A directory that cannot be made.
    pub fn lower(&self) -> Result<PathBuf, MountsError> {
        let path = self.place.file(".lower");
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(io_error("create", &path)(error)),
            _ => Ok(path),
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.leaves_record {
            return;
        }
        if let Err(error) = self.place.clear() {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "the state of the mount stays behind");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::BlobDigest;

    fn record(mount_point: &str) -> MountRecord {
        MountRecord {
            image: "oci:x".to_owned(),
            manifest: BlobDigest(Digest::of(Algorithm::Sha256, b"x")),
            mount_point: mount_point.into(),
            driver: "fuse".to_owned(),
            driver_wanted: crate::drivers::Wanted::Auto,
            pid: 1,
            upper: None,
            no_fill: false,
            daemon: None,
        }
    }

    fn files(root: &Path) -> Vec<String> {
        let listing = fs::read_dir(root.join("mounts")).unwrap();
        let mut names: Vec<String> =
            listing.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_mount_point_belongs_to_one_process() {
        let root = tempfile::tempdir().unwrap();
        let mounts = Mounts::open(root.path()).unwrap();
        let claim = mounts.claim(Path::new("/a")).unwrap();
        assert!(matches!(mounts.claim(Path::new("/a")), Err(MountsError::Taken(_))));
        let other = mounts.claim(Path::new("/b")).unwrap();
        drop(claim);
        mounts.claim(Path::new("/a")).unwrap();
        drop(other);
        assert_eq!(files(root.path()), Vec::<String>::new());
    }

    #[test]
    fn what_would_hide_or_destroy_files_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().canonicalize().unwrap();
        let (root, run) = (base.join("root"), base.join("run"));
        let mounts = Mounts::open(&root).unwrap();
        let check = |mount_point: &Path, upper: Option<&Path>| mounts.check(mount_point, upper, [&root, &run]);
        for (mount_point, own) in [
            (Path::new("/"), &root),
            (&base, &root),
            (&root, &root),
            (&root.join("blobs"), &root),
            (&run, &run),
            (&run.join("l/7"), &run),
        ] {
            match check(mount_point, None) {
                Err(MountsError::Own { own: found, .. }) => assert_eq!(found, *own, "{}", mount_point.display()),
                other => panic!("{}: {other:?}", mount_point.display()),
            }
        }
        let (upper, linked) = (base.join("upper"), base.join("link"));
        fs::create_dir(&upper).unwrap();
        std::os::unix::fs::symlink(&upper, &linked).unwrap();
        let other = base.join("rooted");
        check(&other, Some(&upper)).unwrap();
        let mut claim = mounts.claim(Path::new("/a")).unwrap();
        claim.publish(&MountRecord { upper: Some(upper.clone()), ..record("/a") }).unwrap();
        for name in [&upper, &linked] {
            let taken = check(&other, Some(name));
            assert!(
                matches!(&taken, Err(MountsError::UpperTaken { mount_point, .. }) if mount_point == Path::new("/a"))
            );
        }
        check(Path::new("/a"), Some(&upper)).unwrap();
        check(&other, Some(&root.join("elsewhere"))).unwrap();
        drop(claim);
        check(&other, Some(&upper)).unwrap();
    }

    #[test]
    fn a_mount_is_taken_up_on_a_full_disk() {
        let disk = tempfile::tempdir().unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", disk.path(), "tmpfs", flags, c"nr_inodes=20,mode=700").unwrap();
        let root = disk.path().join("root");
        let mounts = Mounts::open(&root).unwrap();
        let mut claim = mounts.claim(Path::new("/a")).unwrap();
        let mut other = mounts.claim(Path::new("/b")).unwrap();
        claim.publish(&MountRecord { pid: 1_000_000, ..record("/a") }).unwrap();
        let mut ballast = 0;
        while fs::write(disk.path().join(format!("ballast-{ballast}")), "").is_ok() {
            ballast += 1;
        }
        let before = files(&root);
        let next = MountRecord { pid: 7, ..record("/a") };
        claim.publish(&next).unwrap();
        assert!(other.publish(&record("/b")).unwrap_err().to_string().starts_with("cannot write"));
        assert_eq!(files(&root), before);
        let found = Mounts::look(&root).unwrap();
        assert_eq!(found.iter().map(|entry| &entry.record).collect::<Vec<_>>(), [&next]);
        drop((claim, other));
        rustix::mount::unmount(disk.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    }

    #[test]
    fn the_living_and_the_dead_are_told_apart() {
        let root = tempfile::tempdir().unwrap();
        assert!(Mounts::look(root.path()).unwrap().is_empty());
        let mounts = Mounts::open(root.path()).unwrap();
        let mut living = mounts.claim(Path::new("/a")).unwrap();
        living.publish(&record("/a")).unwrap();
        let mut dead = mounts.claim(Path::new("/b")).unwrap();
        dead.publish(&record("/b")).unwrap();
        // What a killed process leaves: its files, but not its lock.
        let kept: Vec<(PathBuf, Vec<u8>)> = ["lock", "json"]
            .map(|suffix| dead.place.file(&format!(".{suffix}")))
            .map(|path| (path.clone(), fs::read(path).unwrap()))
            .to_vec();
        drop(dead);
        for (path, bytes) in kept {
            fs::write(path, bytes).unwrap();
        }

        let found = Mounts::look(root.path()).unwrap();
        let seen: Vec<(&Path, bool)> = found.iter().map(|e| (e.record.mount_point.as_path(), e.alive)).collect();
        assert_eq!(seen, [(Path::new("/a"), true), (Path::new("/b"), false)]);
        assert!(!found[0].clear().unwrap());
        assert!(found[1].clear().unwrap());
        assert_eq!(Mounts::look(root.path()).unwrap().len(), 1);
    }

    #[test]
    fn the_record_of_the_dead_stays_until_there_is_another() {
        let root = tempfile::tempdir().unwrap();
        let mounts = Mounts::open(root.path()).unwrap();
        let told = || Mounts::look(root.path()).unwrap().iter().map(|entry| entry.record.pid).collect::<Vec<_>>();
        mounts.claim(Path::new("/a")).unwrap().leave(&record("/a")).unwrap();
        drop(mounts.claim_dead(Path::new("/a")).unwrap());
        assert_eq!(told(), [1]);
        let mut next = mounts.claim_dead(Path::new("/a")).unwrap();
        assert!(matches!(mounts.claim_dead(Path::new("/a")), Err(MountsError::Taken(_))));
        next.publish(&MountRecord { pid: 2, ..record("/a") }).unwrap();
        assert_eq!(told(), [2]);
        drop(next);
        assert_eq!(told(), [0_u32; 0]);
    }

    #[test]
    fn a_damaged_record_is_left_out() {
        let root = tempfile::tempdir().unwrap();
        Mounts::open(root.path()).unwrap();
        fs::write(root.path().join("mounts/x.json"), "{").unwrap();
        assert!(Mounts::look(root.path()).unwrap().is_empty());
    }
}
