//! What has been fetched, on disk, shared by every process of one root.
//!
//! ```text
//! <root>/format                                    the version of this layout
//! <root>/blobs/<algorithm>/<hex>/<anchor>/         one layer image:
//!     image       sparse file, the layer image at its natural offsets
//!     present     which chunks survive a power cut: one bit a chunk, checksummed
//!     live        which chunks are there now: one byte a chunk, of this boot, mapped by every process
//!     index       the payload of the chunk index
//!     meta.json   what this is, and whether all of it has been verified
//!     lock guard  advisory locks: shared while used, exclusive for removal; exclusive for short changes
//!     pin writing the same: shared by whoever needs all of it or writes a chunk, exclusive while chunks go
//! <root>/documents/<algorithm>/<hex>               manifests, configs: small blobs kept whole
//! <root>/refs/<hex>.json                           what a reference pointed to when it was last seen
//! <root>/state/snapshots.redb                      snapshots, layers and images: see [`records`]
//! <root>/tmp/                                      things in the making
//! ```
//!
//! An anchor is what an image's bytes were verified against: see [`Anchor`].
//!
//! Guarantees. A chunk is marked after its bytes were written, and marked durably only after they were synced, so a mark
//! never lies: a killed process loses nothing, a power cut loses at most the chunks of the last seconds. Things appear
//! whole or not at all, whoever else creates them at the same moment. What is damaged counts as absent (with a
//! warning), what is newer is refused. A full disk is an error of its own.
//!
//! The store is for processes of one machine: marks are shared through memory. It refuses to know what an image holds,
//! where bytes come from, and does not verify them: whoever writes has.

mod bits;
mod blob;
mod disk;
mod documents;
mod error;
mod evict;
mod files;
mod meta;
pub mod records;
mod sync;
mod whole;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub use bits::BootId;
pub use blob::{BlobFile, Pin, Punched};
pub use documents::Reference;
pub use error::StoreError;
pub use evict::{CacheEntry, CacheGoal, Evicted, ImageName, Recorded, RecordedBy};
pub use meta::{Anchor, BlobSpec, NoAnchor, Verdict};
pub use whole::WholeWriter;

use crate::model::{BlobDigest, DiffId, Digest};
use crate::sys::{FileLock, LockMode};
use sync::Syncer;

/// The only version of the layout.
const FORMAT: &str = "headstart store 1\n";

/// Names between `blobs/` and an image: algorithm, digest, anchor.
const PLACE_LEVELS: usize = 3;

/// Things in `tmp/` that are older than this are left-overs of dead processes, unless somebody holds their lock.
const LEFT_OVER_AGE: Duration = Duration::from_secs(3600);

/// The same for things that have a lock which nobody holds: a living process takes it within milliseconds.
const UNLOCKED_AGE: Duration = Duration::from_secs(60);

/// How a store behaves.
#[derive(Debug, Clone, Copy)]
pub struct StoreConfig {
    /// Longest time that a written chunk stays unsynced: what a power cut may cost, against a `fdatasync` that often.
    pub sync_interval: Duration,
    /// Bytes written to one image that trigger a sync before that time. A disk of 200 MB/s has at most a second of them.
    pub sync_bytes: u64,
    /// Bytes of the disk that are kept free: what nobody waits for is not written when fewer are.
    pub reserve: u64,
    /// Which boot this is; none asks the kernel.
    pub boot: Option<BootId>,
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self { sync_interval: Duration::from_secs(5), sync_bytes: 256 << 20, reserve: 0, boot: None }
    }
}

/// A store's root, opened.
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    boot: BootId,
    reserve: u64,
    syncer: Arc<Syncer>,
}

impl Store {
    /// Opens the store below `root`, which is made if it is missing.
    ///
    /// # Errors
    /// A directory that cannot be made, or a layout newer than this program.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        Self::open_with(root, StoreConfig::default())
    }

    /// [`Store::open`] with other settings.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with(root: &Path, config: StoreConfig) -> Result<Self, StoreError> {
        let boot = match config.boot {
            Some(boot) => boot,
            None => this_boot()?,
        };
        files::make_dirs(root)?;
        for below in ["blobs", "documents", "refs", "tmp"] {
            files::make_dirs(&root.join(below))?;
        }
        check_format(root)?;
        let syncer = Syncer::start(config.sync_interval, config.sync_bytes)?;
        let store = Self { root: root.to_owned(), boot, reserve: config.reserve, syncer };
        store.clear_left_overs();
        Ok(store)
    }

    /// Bytes of images that this process has written so far: whether it is time to look at the size of the cache.
    pub fn bytes_written(&self) -> u64 {
        self.syncer.bytes_written()
    }

    /// The directory everything lies below.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The image of `spec`, made if it is not there yet. `index` is the (verified) payload of its chunk index.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn blob(&self, spec: &BlobSpec, index: &[u8]) -> Result<Arc<BlobFile>, StoreError> {
        let place = self.place(&spec.blob, spec.anchor);
        loop {
            if let Some(found) = self.existing(&spec.blob, spec.anchor)? {
                if found.spec() == spec {
                    found.keep_index(index)?;
                    return Ok(found);
                }
                tracing::warn!(path = %place.display(), "image is not what its index says, starting anew");
                drop(found);
                self.discard(&place)?;
            }
            blob::create(&self.tmp(), &place, spec, index)?;
        }
    }

    /// The image of `blob` with this anchor, if there is one.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn existing(&self, blob: &BlobDigest, anchor: Anchor) -> Result<Option<Arc<BlobFile>>, StoreError> {
        let place = self.place(blob, anchor);
        match BlobFile::open(&place, blob, anchor, self.boot, &self.syncer)? {
            blob::Opened::There(file) => {
                let file = Arc::<BlobFile>::from(file);
                if file.has_unsynced_marks()? {
                    self.syncer.written(&file, 0, 0);
                }
                Ok(Some(file))
            }
            blob::Opened::Absent => Ok(None),
            blob::Opened::Damaged(why) => {
                tracing::warn!(path = %place.display(), "image counts as absent: {why}");
                self.discard(&place)?;
                Ok(None)
            }
        }
    }

    /// The payload of the chunk index `anchor` of `blob` as it was kept, if it still has its digest.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn index(&self, blob: &BlobDigest, anchor: Anchor) -> Result<Option<Vec<u8>>, StoreError> {
        let (Anchor::ImageSpec(digest) | Anchor::Pr12703(digest)) = anchor else { return Ok(None) };
        let path = self.place(blob, anchor).join(blob::INDEX);
        let Some(payload) = files::read_bounded(&path, crate::chunked::MAX_INDEX_SIZE)? else { return Ok(None) };
        if Digest::of(digest.0.algorithm(), &payload) != digest.0 {
            tracing::warn!(path = %path.display(), "chunk index counts as absent: it does not have its digest");
            return Ok(None);
        }
        Ok(Some(payload))
    }

    /// Begins an image that is written from start to end and appears in the store when it is complete.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn write_whole(&self, blob: &BlobDigest) -> Result<WholeWriter, StoreError> {
        self.write_image(blob, Anchor::Whole)
    }

    /// The same for an image of `blob` that is verified otherwise.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn write_image(&self, blob: &BlobDigest, anchor: Anchor) -> Result<WholeWriter, StoreError> {
        WholeWriter::begin(&self.tmp(), self.place(blob, anchor), *blob, anchor)
    }

    /// Puts the image of `writer`, which is complete, has been verified and hashes to `diff_id`, into the store. If
    /// somebody else has put it there meanwhile, theirs stays. Waits for the disk.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn keep_whole(&self, writer: &WholeWriter, diff_id: DiffId) -> Result<Arc<BlobFile>, StoreError> {
        self.keep(writer, diff_id, None)
    }

    /// The same for the image of a tar: `identity` names the image, `tar` is the diffID of the tar.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn keep_tar(&self, writer: &WholeWriter, identity: DiffId, tar: DiffId) -> Result<Arc<BlobFile>, StoreError> {
        self.keep(writer, identity, Some(tar))
    }

    fn keep(&self, writer: &WholeWriter, diff_id: DiffId, tar: Option<DiffId>) -> Result<Arc<BlobFile>, StoreError> {
        writer.finish(diff_id, tar)?;
        self.syncer.count(writer.size());
        loop {
            let published = writer.publish()?;
            if published {
                // Somebody may count on it from now on who cannot bring it again.
                files::sync_names(writer.place(), PLACE_LEVELS)?;
            }
            match self.existing(writer.blob(), writer.anchor())? {
                Some(found) if matches!(found.verdict(), Verdict::Verified(_)) => return Ok(found),
                // Its marks were damaged, and nobody can tell what of it is there.
                Some(found) => {
                    drop(found);
                    self.discard(writer.place())?;
                }
                None => {}
            }
            if published {
                // It was there and is gone again: the writer has nothing left to publish.
                let (path, gone) = (writer.place(), io::Error::from(io::ErrorKind::NotFound));
                return Err(StoreError::io("find", path, gone));
            }
        }
    }

    fn place(&self, blob: &BlobDigest, anchor: Anchor) -> PathBuf {
        place(&self.root, blob, anchor)
    }

    fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    /// Removes an image that nobody uses.
    fn discard(&self, place: &Path) -> Result<(), StoreError> {
        let lock = place.join(blob::LOCK);
        let held = match FileLock::try_acquire(&lock, LockMode::Exclusive) {
            Ok(Some(held)) => Some(held),
            Ok(None) => return Err(StoreError::DamagedInUse { path: place.to_owned() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(StoreError::io("lock", &lock, error)),
        };
        if let Some(held) = &held
            && !held.still_names(&lock).map_err(|error| StoreError::io("look at", &lock, error))?
        {
            return Ok(());
        }
        let grave = match files::temp_dir(&self.tmp()) {
            // Who makes room on a full disk has none to begin with.
            Err(error) if error.is_full() => return remove_in_place(place),
            grave => grave?,
        };
        match std::fs::rename(place, grave.path().join("discarded")) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(StoreError::io("move away", place, error)),
        }
    }

    /// Removes what dead processes left in `tmp/`. Nothing depends on it, so nothing that goes wrong here is an error.
    fn clear_left_overs(&self) {
        let Ok(entries) = std::fs::read_dir(self.tmp()) else { return };
        for entry in entries.flatten() {
            let path = entry.path();
            let age = entry.metadata().and_then(|metadata| metadata.modified()).ok();
            let age = age.and_then(|time| SystemTime::now().duration_since(time).ok()).unwrap_or_default();
            let old_enough = match FileLock::try_acquire(&path.join(blob::LOCK), LockMode::Exclusive) {
                Ok(None) => continue,
                Ok(Some(_)) => age > UNLOCKED_AGE,
                Err(_) => age > LEFT_OVER_AGE,
            };
            if !old_enough {
                continue;
            }
            let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            if let Err(error) = removed {
                tracing::warn!(path = %path.display(), "cannot remove a left-over of a dead process: {error}");
            }
        }
    }
}

/// Removes an image where it is, which needs no room on the disk. Its lock is held, and goes last; a process that is killed
/// meanwhile leaves what is no image, since what it is goes first.
fn remove_in_place(place: &Path) -> Result<(), StoreError> {
    let gone = |path: &Path, result: io::Result<()>| match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(StoreError::io("remove", path, error)),
        _ => Ok(()),
    };
    let remove = |path: &Path| gone(path, std::fs::remove_file(path));
    remove(&place.join(blob::META))?;
    let entries = std::fs::read_dir(place).map_err(|error| StoreError::io("list", place, error))?;
    for entry in entries {
        let path = entry.map_err(|error| StoreError::io("list", place, error))?.path();
        if path.file_name().is_some_and(|name| name != blob::LOCK) {
            remove(&path)?;
        }
    }
    remove(&place.join(blob::LOCK))?;
    gone(place, std::fs::remove_dir(place))
}

impl Drop for Store {
    fn drop(&mut self) {
        self.syncer.stop();
    }
}

fn place(root: &Path, blob: &BlobDigest, anchor: Anchor) -> PathBuf {
    root.join("blobs").join(blob.0.algorithm().name()).join(blob.0.hex()).join(anchor.to_string())
}

/// Where the image of `blob` with this anchor is, if it is there at all. None if `anchor` is none.
pub fn image_path(root: &Path, blob: &BlobDigest, anchor: &str) -> Option<PathBuf> {
    Some(place(root, blob, anchor.parse().ok()?).join(blob::IMAGE))
}

/// What was found out about the image of `blob` with this anchor as a whole, as it was written down: nothing is opened,
/// locked or repaired. None if there is no such image.
pub fn noted_verdict(root: &Path, blob: &BlobDigest, anchor: &str) -> Option<Verdict> {
    let path = place(root, blob, anchor.parse().ok()?).join(blob::META);
    let bytes = files::read_bounded(&path, blob::META_LIMIT).ok()??;
    meta::Meta::parse(&path, &bytes).ok()?.map(|meta| meta.verdict)
}

fn this_boot() -> Result<BootId, StoreError> {
    let path = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(path).map_err(|error| StoreError::io("read", path, error))?;
    BootId::parse(&text).ok_or_else(|| StoreError::io("understand", path, io::Error::other("it holds no boot id")))
}

fn check_format(root: &Path) -> Result<(), StoreError> {
    let path = root.join("format");
    match std::fs::read_to_string(&path) {
        Ok(text) if text == FORMAT => Ok(()),
        Ok(text) if text.starts_with("headstart store ") => {
            Err(StoreError::Unsupported { path, needs: text.trim().to_owned() })
        }
        Ok(_) => files::replace(&path, FORMAT.as_bytes(), files::Durability::Relaxed),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            files::replace(&path, FORMAT.as_bytes(), files::Durability::Relaxed)
        }
        Err(error) => Err(StoreError::io("read", &path, error)),
    }
}

#[cfg(test)]
mod tests;
