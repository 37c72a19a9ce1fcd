//! What an owner of kernel mounts left behind when it was killed: found from the mount table and the list of loop devices
//! alone, and taken away in the order in which it hangs together.
//!
//! Guarantees: nothing of an owner that lives is touched, nor anything that is none of its mounts; a mount that somebody
//! uses stays, with all that it needs, unless it is to be taken away lazily.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::error::in_one_line;
use super::run::{clear, layers, mapped, overlay_source, take};
use super::{DriverError, timely};
use crate::sys::LockMode;
use crate::sys::fuse::MOUNT_KIND;
use crate::sys::loopdev::{LoopDevice, loop_devices};
use crate::sys::mount::{MountEntry, Unmount, mount_table, unmount};

/// How long a loop device may take to go when the last mount on it is gone: others who look at devices hold it for
/// moments.
const LAST_LOOKS: Duration = Duration::from_secs(5);

/// How long a loop device may be read without a pause before it counts as one that hangs. Readers in a loop leave pauses
/// of some microseconds after each request.
const REST: Duration = Duration::from_millis(500);

/// How long the kernel may take to unmount: it may wait for a server that is gone.
const PATIENCE: Duration = Duration::from_secs(30);

/// Something that was left behind.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Leftover {
    /// A stack.
    Overlay {
        /// Where.
        path: PathBuf,
    },
    /// A layer, or what else is below a container.
    Erofs {
        /// Where.
        path: PathBuf,
    },
    /// A loop device.
    Loop {
        /// Its number.
        number: u32,
        /// The file behind it.
        backing: PathBuf,
    },
    /// A FUSE connection.
    Fuse {
        /// Where.
        path: PathBuf,
    },
    /// The run directory itself.
    Directory {
        /// Which.
        path: PathBuf,
    },
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Overlay { path } => write!(f, "overlay {}", path.display()),
            Self::Erofs { path } => write!(f, "layer mount {}", path.display()),
            Self::Loop { number, backing } => write!(f, "loop device {number} ({})", backing.display()),
            Self::Fuse { path } => write!(f, "FUSE mount {}", path.display()),
            Self::Directory { path } => write!(f, "run directory {}", path.display()),
        }
    }
}

/// A loop device as [`find`] wants to know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LabelledLoop {
    /// Its number.
    pub number: u32,
    /// The file behind it.
    pub backing: PathBuf,
    /// What its maker called it.
    pub label: String,
}

/// What came of an attempt to remove everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct Outcome {
    /// What is gone, in the order in which it went.
    pub removed: Vec<Leftover>,
    /// What is still there, and why.
    pub kept: Vec<(Leftover, String)>,
}

/// What belongs to the owner of `run` (absolute, without links), in the order in which it can be taken away: stacks,
/// layers, loop devices, FUSE connections, what was mounted last before what was mounted first.
pub fn find(run: &Path, table: &[MountEntry], loops: &[LabelledLoop]) -> Vec<Leftover> {
    let source = overlay_source(run);
    let (layers, mapped, label) = (layers(run), mapped(run), format!("{source}:"));
    let mounts = |which: &dyn Fn(&MountEntry) -> bool| -> Vec<PathBuf> {
        table.iter().rev().filter(|entry| which(entry)).map(|entry| entry.mount_point.clone()).collect()
    };
    let overlays = mounts(&|entry| entry.kind == "overlay" && entry.source.as_os_str() == source.as_str());
    let erofs = mounts(&|entry| entry.kind == "erofs" && entry.mount_point.starts_with(&layers));
    // Copies of mounts of any kind.
    let copies = mounts(&|entry| entry.mount_point.starts_with(&mapped));
    let is_fuse = |entry: &MountEntry| entry.kind == MOUNT_KIND && !entry.mount_point.starts_with(&mapped);
    let fuse = mounts(&|entry| is_fuse(entry) && entry.mount_point.starts_with(run));
    let nodes: Vec<&OsStr> =
        table.iter().filter(|entry| erofs.contains(&entry.mount_point)).map(|entry| entry.source.as_os_str()).collect();
    let is_mounted = |number: u32| nodes.contains(&OsStr::new(&format!("/dev/loop{number}")));
    let ours = |device: &&LabelledLoop| {
        device.label.starts_with(&label) || device.backing.starts_with(run) || is_mounted(device.number)
    };
    let devices = loops.iter().filter(ours).map(|device| (device.number, device.backing.clone()));
    let mut found: Vec<Leftover> = overlays.into_iter().map(|path| Leftover::Overlay { path }).collect();
    found.extend(copies.into_iter().chain(erofs).map(|path| Leftover::Erofs { path }));
    found.extend(devices.map(|(number, backing)| Leftover::Loop { number, backing }));
    found.extend(fuse.into_iter().map(|path| Leftover::Fuse { path }));
    found
}

/// What the dead owner of `run` left; none if there is no such directory, or if its owner lives.
///
/// # Errors
/// The system cannot be asked.
pub fn look(run: &Path) -> Result<Option<Vec<Leftover>>, DriverError> {
    held(run, LockMode::Shared, |run| found_now(run).map(Some))
}

/// Takes away what the dead owner of `run` left; none as for [`look`]. With [`Unmount::Strict`] stacks that somebody
/// uses stay.
///
/// # Errors
/// The system cannot be asked.
pub fn remove(run: &Path, how: Unmount) -> Result<Option<Outcome>, DriverError> {
    held(run, LockMode::Exclusive, |run| {
        let mut outcome = Outcome::default();
        for leftover in found_now(run)? {
            let stays = outcome.kept.iter().any(|(kept, _)| matches!(kept, Leftover::Overlay { .. }));
            let removed = match &leftover {
                Leftover::Directory { .. } if !outcome.kept.is_empty() => Err("something in it stays".to_owned()),
                _ if stays && !matches!(leftover, Leftover::Overlay { .. }) => {
                    Err("a stack that is in use needs it".to_owned())
                }
                _ => take_away(&leftover, how),
            };
            match removed {
                Ok(()) => outcome.removed.push(leftover),
                Err(why) => outcome.kept.push((leftover, why)),
            }
        }
        Ok(Some(outcome))
    })
}

/// Does `with` with the name of `run` without links, while its owner is known to be dead.
fn held<T>(
    run: &Path,
    mode: LockMode,
    with: impl FnOnce(&Path) -> Result<Option<T>, DriverError>,
) -> Result<Option<T>, DriverError> {
    let run = match run.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        found => found.map_err(DriverError::io("find", run))?,
    };
    // A directory that never had an owner is none of ours.
    if !run.join("owner").exists() {
        return Ok(None);
    }
    let Some(_owner) = take(&run, mode)? else { return Ok(None) };
    with(&run)
}

fn found_now(run: &Path) -> Result<Vec<Leftover>, DriverError> {
    let table = mount_table().map_err(DriverError::io("read", "/proc/self/mountinfo".as_ref()))?;
    let devices = loop_devices().map_err(DriverError::io("read", "/sys/block".as_ref()))?;
    let loops: Vec<LabelledLoop> = devices
        .into_iter()
        .map(|device| {
            // One that goes at this moment has no label any more, and one that hangs cannot be asked: it is known by what
            // is mounted on it, or stays.
            let open = || LoopDevice::open(device.number).and_then(|open| open.status()).ok();
            let status = device.rests_within(REST).then(open).flatten();
            let label = status.map(|status| status.label).unwrap_or_default();
            LabelledLoop { number: device.number, backing: device.backing, label }
        })
        .collect();
    let mut found = find(run, &table, &loops);
    found.push(Leftover::Directory { path: run.to_owned() });
    Ok(found)
}

fn take_away(leftover: &Leftover, how: Unmount) -> Result<(), String> {
    let unmounted = |path: &Path, how| {
        let path = path.to_owned();
        let attempted = format!("unmount {}", path.display());
        timely::within(PATIENCE, attempted, move || unmount(&path, how).map_err(DriverError::Stack))
            .map_err(|error| in_one_line(&error))
    };
    match leftover {
        Leftover::Overlay { path } => unmounted(path, how),
        // Who uses a layer does so through a stack.
        Leftover::Erofs { path } | Leftover::Fuse { path } => {
            unmounted(path, Unmount::Lazy)?;
            match fs::remove_dir(path) {
                // It covered another one, whose turn will come.
                Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(()),
                removed => removed.map_err(|error| error.to_string()),
            }
        }
        Leftover::Loop { number, backing } => end_loop(*number, backing),
        Leftover::Directory { path } => empty(path).map_err(|error| in_one_line(&error)),
    }
}

/// Removes directories on which nothing is mounted any more, then the rest.
fn empty(run: &Path) -> Result<(), DriverError> {
    remove_directories(&layers(run))?;
    for place in fs::read_dir(mapped(run)).into_iter().flatten().flatten() {
        remove_directories(&place.path())?;
    }
    remove_directories(&mapped(run))?;
    // Others than these may have been made to mount something, and nothing was.
    remove_directories(run).ok();
    clear(run)
}

fn remove_directories(below: &Path) -> Result<(), DriverError> {
    match fs::read_dir(below) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        listing => {
            for entry in listing.map_err(DriverError::io("list", below))? {
                let path = entry.map_err(DriverError::io("list", below))?.path();
                if path.is_dir() {
                    fs::remove_dir(&path).map_err(DriverError::io("remove", &path))?;
                }
            }
        }
    }
    Ok(())
}

/// Waits until the device is gone, which it should be by itself.
fn end_loop(number: u32, backing: &Path) -> Result<(), String> {
    let is_there = || -> Result<bool, String> {
        let devices = loop_devices().map_err(|error| error.to_string())?;
        Ok(devices.iter().any(|device| device.number == number && device.backing == backing))
    };
    let deadline = Instant::now() + LAST_LOOKS;
    while is_there()? {
        if Instant::now() >= deadline {
            // Not one that clears itself, or one in use: then this says that it shall.
            return LoopDevice::open(number).and_then(|device| device.detach()).map_err(|error| in_one_line(&error));
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: &str, source: &str, mount_point: &str) -> MountEntry {
        MountEntry {
            major: 0,
            minor: 1,
            mount_point: mount_point.into(),
            options: "ro".into(),
            kind: kind.into(),
            source: source.into(),
        }
    }

    #[test]
    fn what_is_found_is_ours_and_in_order() {
        let run = Path::new("/run/headstart");
        let source = overlay_source(run);
        let other = overlay_source(Path::new("/run/other"));
        let table = [
            entry("fuse.headstart", "daemon", "/run/headstart/fs"),
            entry("erofs", "/dev/loop3", "/run/headstart/l/a-0"),
            entry("erofs", "/dev/loop4", "/run/headstart/l/b-1"),
            entry("erofs", "/dev/loop7", "/run/headstart/l/c-1"),
            entry("erofs", "/dev/loop9", "/run/headstartling/l/b-1"),
            entry("erofs", "/dev/loop8", "/mnt"),
            entry("overlay", &source, "/c/1"),
            entry("overlay", &other, "/c/2"),
            entry("overlay", "overlay", "/c/3"),
            entry("overlay", &source, "/c/4"),
            entry("tmpfs", "tmpfs", "/run/headstart/l/c"),
            entry("fuse.headstart", "image", "/c/5"),
            entry("erofs", "/dev/loop3", "/run/headstart/m/7/0"),
            entry("fuse.headstart", "daemon", "/run/headstart/m/7/1"),
            entry("ext4", "/dev/sda1", "/run/headstart/m/7/2"),
        ];
        let device = |number, backing: &str, label: &str| LabelledLoop {
            number,
            backing: backing.into(),
            label: label.to_owned(),
        };
        let loops = [
            device(1, "/home/disk.img", ""),
            device(3, "/run/headstart/fs/layers/a", ""),
            device(4, "/layers/b", &format!("{source}:b")),
            // On one that hangs, of which no label is known.
            device(7, "/layers/c", ""),
            device(5, "/layers/b", &format!("{other}:b")),
        ];
        let path = |path: &str| PathBuf::from(path);
        assert_eq!(
            find(run, &table, &loops),
            [
                Leftover::Overlay { path: path("/c/4") },
                Leftover::Overlay { path: path("/c/1") },
                Leftover::Erofs { path: path("/run/headstart/m/7/2") },
                Leftover::Erofs { path: path("/run/headstart/m/7/1") },
                Leftover::Erofs { path: path("/run/headstart/m/7/0") },
                Leftover::Erofs { path: path("/run/headstart/l/c-1") },
                Leftover::Erofs { path: path("/run/headstart/l/b-1") },
                Leftover::Erofs { path: path("/run/headstart/l/a-0") },
                Leftover::Loop { number: 3, backing: path("/run/headstart/fs/layers/a") },
                Leftover::Loop { number: 4, backing: path("/layers/b") },
                Leftover::Loop { number: 7, backing: path("/layers/c") },
                Leftover::Fuse { path: path("/run/headstart/fs") },
            ]
        );
    }

    #[test]
    fn directories_without_a_dead_owner_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(look(dir.path()).unwrap(), None);
        assert_eq!(look(&dir.path().join("gone")).unwrap(), None);
        let run = super::super::RunDirectory::claim(&dir.path().join("run")).unwrap();
        let path = run.path().to_owned();
        assert_eq!(look(&path).unwrap(), None);
        assert_eq!(remove(&path, Unmount::Lazy).unwrap(), None);
        drop(run);
        assert!(!path.exists());
        // What is left of one that was killed.
        fs::create_dir_all(path.join("l/a")).unwrap();
        fs::create_dir_all(path.join("m/7/0")).unwrap();
        fs::write(path.join("owner"), "").unwrap();
        let directory = Leftover::Directory { path: path.clone() };
        assert_eq!(look(&path).unwrap(), Some(vec![directory.clone()]));
        let outcome = remove(&path, Unmount::Strict).unwrap().unwrap();
        assert_eq!(outcome, Outcome { removed: vec![directory], kept: vec![] });
        assert!(!path.exists());
    }
}
