//! What the cache takes, and what of it goes first when it takes too much: whole layer images, the least recently used
//! first. Single chunks of those that are in use go after them: see [`BlobFile::punch`](super::BlobFile::punch).
//!
//! Guarantees. An image that a process uses is never touched: whoever uses one holds its lock. Neither is one that the
//! kernel shows through a loop device or a mount of its own, which may outlive every process. An image disappears by one
//! rename, so a crash leaves it whole or leaves rubbish in `tmp/`.
//!
//! When an image was used last is the modification time of its lock file, set when somebody begins and ceases to use it:
//! two system calls a use, and a crash costs at most the end of one.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::{Anchor, Store, StoreError, blob};
use crate::sys::loopdev::{LoopDevice, loop_devices};
use crate::sys::mount::mount_table;
use crate::sys::{FileLock, LockMode};

/// One layer image in the cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheEntry {
    /// The blob it comes from, as `ALGORITHM:HEX`.
    pub blob: String,
    /// What it was verified against.
    pub anchor: String,
    /// Bytes on disk.
    pub bytes: u64,
    /// When it was used last.
    pub last_used: SystemTime,
    /// A process uses it, or the kernel shows it.
    pub in_use: bool,
    /// A snapshot or a pulled image is made of it.
    pub recorded: bool,
    #[serde(skip)]
    stays: bool,
    #[serde(skip)]
    place: PathBuf,
}

/// What a cache is to be brought to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CacheGoal {
    /// At most so many bytes of images; none is no limit.
    pub quota: Option<u64>,
    /// At least so many bytes of the disk are free.
    pub reserve: u64,
    /// Everything that is not in use goes.
    pub all: bool,
}

/// An image: its blob, as `ALGORITHM:HEX`, and its anchor.
pub type ImageName = (String, String);

/// Images that snapshots and pulled images are made of. They go after all others. Those that only unpacking a tar would bring
/// again go with everything at most, and not even then if somebody counts on them who may not be able to bring them.
pub type Recorded = HashMap<ImageName, RecordedBy>;

/// Who needs a recorded image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RecordedBy {
    /// Images that were pulled, and can be pulled again.
    Pull,
    /// A client's snapshot.
    Client,
}

impl CacheEntry {
    /// One for tests.
    #[cfg(any(test, feature = "testkit"))]
    pub fn example() -> Self {
        Self {
            blob: "sha256:1".to_owned(),
            anchor: "whole".to_owned(),
            bytes: 2,
            last_used: SystemTime::UNIX_EPOCH,
            in_use: false,
            recorded: true,
            stays: false,
            place: PathBuf::new(),
        }
    }

    /// True if it comes again by itself when it is read.
    fn comes_again(&self) -> bool {
        !matches!(self.anchor.parse(), Ok(Anchor::Tar(_)))
    }
}

/// What has gone, or would go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct Evicted {
    /// The images, in the order in which they went.
    pub images: Vec<CacheEntry>,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes of the images that stay.
    pub left: u64,
}

impl CacheGoal {
    /// How many bytes too many a cache of `bytes` takes on a disk with `free` free ones.
    pub fn excess(&self, bytes: u64, free: u64) -> u64 {
        let above = self.quota.map_or(0, |quota| bytes.saturating_sub(quota));
        above.max(self.reserve.saturating_sub(free))
    }
}

/// Which of `entries` go, in order. `free` are the free bytes of the disk.
fn choose(entries: &[CacheEntry], goal: &CacheGoal, free: u64) -> Vec<usize> {
    let wanted = goal.excess(entries.iter().map(|entry| entry.bytes).sum(), free);
    let may_go =
        |entry: &CacheEntry| !entry.in_use && (!entry.recorded || entry.comes_again() || (goal.all && !entry.stays));
    let mut candidates: Vec<usize> =
        entries.iter().enumerate().filter(|(_, entry)| may_go(entry)).map(|(number, _)| number).collect();
    candidates
        .sort_by_key(|number| entries.get(*number).map(|entry| (entry.recorded, entry.last_used, entry.place.clone())));
    let mut gained = 0_u64;
    candidates.retain(|number| {
        let goes = goal.all || gained < wanted;
        gained = gained.saturating_add(if goes { entries.get(*number).map_or(0, |entry| entry.bytes) } else { 0 });
        goes
    });
    candidates
}

impl Store {
    /// Every image in the cache.
    ///
    /// # Errors
    /// Directories that cannot be read.
    pub fn cache(&self) -> Result<Vec<CacheEntry>, StoreError> {
        let shown = shown_by_the_kernel();
        let mut entries = Vec::new();
        for algorithm in subdirectories(&self.root.join("blobs"))? {
            for hex in subdirectories(&algorithm)? {
                for place in subdirectories(&hex)? {
                    let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                    // What disappears meanwhile is not there.
                    let Ok(lock) = fs::metadata(place.join(blob::LOCK)) else { continue };
                    entries.push(CacheEntry {
                        blob: format!("{}:{}", name(&algorithm), name(&hex)),
                        anchor: name(&place),
                        bytes: bytes_on_disk(&place),
                        last_used: lock.modified().unwrap_or(SystemTime::UNIX_EPOCH),
                        in_use: shown.has(&place.join(blob::IMAGE)) || is_locked(&place),
                        recorded: false,
                        stays: false,
                        place,
                    });
                }
            }
        }
        entries.sort_by(|a, b| (&a.blob, &a.anchor).cmp(&(&b.blob, &b.anchor)));
        Ok(entries)
    }

    /// Free bytes of the disk, as they are for this process.
    ///
    /// # Errors
    /// What the system says.
    pub fn free_bytes(&self) -> Result<u64, StoreError> {
        let said = rustix::fs::statvfs(&self.root);
        let said = said.map_err(|error| StoreError::io("ask for the free space of", &self.root, error.into()))?;
        Ok(said.f_bavail.saturating_mul(said.f_frsize))
    }

    /// True if less of the disk is free than is to be kept free.
    pub fn is_below_reserve(&self) -> bool {
        self.reserve > 0 && self.free_bytes().is_ok_and(|free| free < self.reserve)
    }

    /// Brings the cache to `goal`, as far as what is not in use suffices for it.
    ///
    /// # Errors
    /// Directories that cannot be read or moved.
    pub fn evict(&self, goal: &CacheGoal, recorded: &Recorded, dry_run: bool) -> Result<Evicted, StoreError> {
        let mut entries = self.cache()?;
        for entry in &mut entries {
            let by = recorded.get(&(entry.blob.clone(), entry.anchor.clone()));
            (entry.recorded, entry.stays) = (by.is_some(), by == Some(&RecordedBy::Client));
        }
        let chosen = choose(&entries, goal, self.free_bytes()?);
        self.remove_all(&entries, &chosen, dry_run)
    }

    /// Removes those of `images` that are not in use.
    ///
    /// # Errors
    /// Directories that cannot be read or moved.
    pub fn evict_these(&self, images: &HashSet<ImageName>) -> Result<Evicted, StoreError> {
        let entries = self.cache()?;
        let wanted = |entry: &CacheEntry| !entry.in_use && images.contains(&(entry.blob.clone(), entry.anchor.clone()));
        let chosen: Vec<usize> =
            entries.iter().enumerate().filter(|(_, entry)| wanted(entry)).map(|(number, _)| number).collect();
        self.remove_all(&entries, &chosen, false)
    }

    fn remove_all(&self, entries: &[CacheEntry], chosen: &[usize], dry_run: bool) -> Result<Evicted, StoreError> {
        let mut evicted = Evicted { left: entries.iter().map(|entry| entry.bytes).sum(), ..Evicted::default() };
        for number in chosen {
            let Some(entry) = entries.get(*number) else { continue };
            if !dry_run && !self.remove(&entry.place)? {
                continue;
            }
            evicted.bytes += entry.bytes;
            evicted.left = evicted.left.saturating_sub(entry.bytes);
            evicted.images.push(entry.clone());
        }
        Ok(evicted)
    }

    /// Removes an image. False if somebody uses it by now.
    fn remove(&self, place: &Path) -> Result<bool, StoreError> {
        match self.discard(place) {
            Ok(()) => {}
            Err(StoreError::DamagedInUse { .. }) => return Ok(false),
            Err(error) => return Err(error),
        }
        tracing::info!(image = %place.display(), "removed from the cache");
        // Only if nothing else of the blob is there.
        if let Some(above) = place.parent() {
            fs::remove_dir(above).ok();
        }
        Ok(true)
    }
}

fn is_locked(place: &Path) -> bool {
    matches!(FileLock::try_acquire(&place.join(blob::LOCK), LockMode::Exclusive), Ok(None))
}

/// Files that back loop devices or are mounted themselves.
pub(super) struct Shown {
    paths: HashSet<PathBuf>,
    /// Device and inode, for files whose names the kernel tells otherwise.
    inodes: HashSet<(u64, u64)>,
}

impl Shown {
    pub(super) fn has(&self, image: &Path) -> bool {
        let inode = || fs::metadata(image).is_ok_and(|m| self.inodes.contains(&(m.dev(), m.ino())));
        self.paths.contains(image) || inode()
    }
}

pub(super) fn shown_by_the_kernel() -> Shown {
    let loops = loop_devices().unwrap_or_default();
    // Only those that can be on an image: to open others may wait for somebody else's registry.
    let images = loops.iter().filter(|device| device.file_name() == blob::IMAGE.as_bytes());
    let of_loop = |number| LoopDevice::open(number).and_then(|device| device.status()).ok();
    let inodes = images.filter_map(|device| of_loop(device.number)).map(|status| (status.device, status.inode));
    let inodes = inodes.collect();
    let mounts = mount_table().unwrap_or_default().into_iter().map(|mount| PathBuf::from(mount.source));
    let paths =
        loops.into_iter().map(|device| device.backing).chain(mounts).filter(|path| path.is_absolute()).collect();
    Shown { paths, inodes }
}

/// The directories in `path`; none if it is gone.
fn subdirectories(path: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let failed = |error| StoreError::io("list", path, error);
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// What the files of an image take.
fn bytes_on_disk(place: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(place) else { return 0 };
    entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn entries(of: &[(u64, u64, bool)]) -> Vec<CacheEntry> {
        let entry = |(number, (bytes, used, in_use)): (usize, &(u64, u64, bool))| CacheEntry {
            blob: format!("sha256:{number}"),
            anchor: "whole".to_owned(),
            bytes: *bytes,
            last_used: SystemTime::UNIX_EPOCH + Duration::from_secs(*used),
            in_use: *in_use,
            recorded: false,
            stays: false,
            place: PathBuf::from(format!("/{number}")),
        };
        of.iter().enumerate().map(entry).collect()
    }

    #[test]
    fn the_least_recently_used_go_until_it_is_enough() {
        let entries = entries(&[(10, 5, false), (20, 1, true), (30, 3, false), (40, 2, false), (50, 9, false)]);
        let goal = |quota, reserve, all| CacheGoal { quota, reserve, all };
        for (goal, free, expected) in [
            (goal(None, 0, false), 0, vec![]),
            (goal(Some(150), 0, false), 0, vec![]),
            (goal(Some(149), 0, false), 0, vec![3]),
            (goal(Some(100), 0, false), 0, vec![3, 2]),
            (goal(Some(80), 0, false), 0, vec![3, 2]),
            (goal(Some(79), 0, false), 0, vec![3, 2, 0]),
            (goal(Some(0), 0, false), 0, vec![3, 2, 0, 4]),
            (goal(None, 100, false), 100, vec![]),
            (goal(None, 100, false), 60, vec![3]),
            (goal(None, 100, false), 59, vec![3, 2]),
            (goal(Some(149), 100, false), 59, vec![3, 2]),
            (goal(None, 0, true), 0, vec![3, 2, 0, 4]),
        ] {
            assert_eq!(choose(&entries, &goal, free), expected, "{goal:?} with {free} free");
        }
    }

    #[test]
    fn what_is_recorded_goes_last_and_what_would_not_come_again_stays() {
        let mut entries = entries(&[(10, 1, false), (20, 2, false), (30, 3, false), (40, 4, false), (50, 0, true)]);
        let hex = "ab".repeat(32);
        for (number, anchor) in [(0, format!("tar-{hex}")), (1, format!("index-{hex}")), (4, format!("index-{hex}"))] {
            entries[number].recorded = true;
            entries[number].anchor = anchor;
        }
        entries[3].anchor = format!("tar-{hex}");
        let goal = |quota, all| CacheGoal { quota, reserve: 0, all };
        for (goal, expected) in [
            (goal(Some(149), false), vec![2]),
            (goal(Some(100), false), vec![2, 3]),
            (goal(Some(0), false), vec![2, 3, 1]),
            (goal(None, true), vec![2, 3, 0, 1]),
        ] {
            assert_eq!(choose(&entries, &goal, 0), expected, "{goal:?}");
        }
        // A client may not be able to bring what it counts on.
        entries[0].stays = true;
        entries[1].stays = true;
        assert_eq!(choose(&entries, &goal(None, true), 0), [2, 3, 1]);
    }
}
