//! One layer image on disk and the marks of what is there.

mod punch;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use super::bits::{self, Bits, BootId, NOT_THERE, Rejected, THERE};
use super::disk::Disk;
use super::files::{self, Durability};
use super::meta::{Anchor, BlobSpec, Meta, Verdict};
use super::sync::Syncer;
use super::{PLACE_LEVELS, StoreError};
use crate::model::{BlobDigest, DiffId};
use crate::sys::{FileLock, LockMode, SharedBytes};

pub use punch::{Pin, Punched};

pub(super) const IMAGE: &str = "image";
pub(super) const PRESENT: &str = "present";
pub(super) const LIVE: &str = "live";
pub(super) const INDEX: &str = "index";
pub(super) const META: &str = "meta.json";
pub(super) const LOCK: &str = "lock";
pub(super) const GUARD: &str = "guard";

/// More than any `meta.json` takes.
pub(super) const META_LIMIT: u64 = 64 << 10;

/// One layer image, in use. Any number of them, in any number of processes, may be open for the same image; what one
/// writes all see.
#[derive(Debug)]
pub struct BlobFile {
    dir: PathBuf,
    spec: BlobSpec,
    disk: Box<dyn Disk>,
    live: SharedBytes,
    live_file: File,
    verdict: Mutex<Verdict>,
    /// Of the image of a tar: the tar's diffID.
    tar: Option<DiffId>,
    /// Bytes written since the last sync.
    unsynced: AtomicU64,
    syncer: Arc<Syncer>,
    /// Held shared while this exists, so that nobody removes the image.
    used: FileLock,
}

/// What was found at the place of an image.
pub(super) enum Opened {
    /// The image.
    There(Box<BlobFile>),
    /// Nothing.
    Absent,
    /// Something that cannot be used.
    Damaged(String),
}

/// Makes an image without chunks at `place`, or lets stand what somebody else made there at the same time.
pub(super) fn create(tmp: &Path, place: &Path, spec: &BlobSpec, index: &[u8]) -> Result<(), StoreError> {
    let made = files::temp_dir(tmp)?;
    let dir = made.path();
    files::touch(&dir.join(LOCK))?;
    for lock in [GUARD, punch::PIN, punch::WRITING] {
        files::touch(&dir.join(lock))?;
    }
    files::replace(&dir.join(META), &Meta::new(spec, Verdict::Unverified).to_bytes(), Durability::Relaxed)?;
    files::replace(&dir.join(INDEX), index, Durability::Relaxed)?;
    let image = dir.join(IMAGE);
    File::create_new(&image)
        .and_then(|file| file.set_len(spec.image_size))
        .map_err(|error| StoreError::io("make", &image, error))?;
    files::publish(dir, place)?;
    Ok(())
}

impl BlobFile {
    /// Opens the image at `dir`.
    pub(super) fn open(
        dir: &Path,
        blob: &BlobDigest,
        anchor: Anchor,
        boot: BootId,
        syncer: &Arc<Syncer>,
    ) -> Result<Opened, StoreError> {
        let Some(used) = lock_for_use(dir)? else {
            return Ok(if dir.exists() { Opened::Damaged("it has no lock file".to_owned()) } else { Opened::Absent });
        };
        note_use(&used, dir);
        let path = dir.join(META);
        let Some(meta) = files::read_bounded(&path, META_LIMIT)? else {
            return Ok(Opened::Damaged("meta.json is missing".to_owned()));
        };
        let Some(meta) = Meta::parse(&path, &meta)? else {
            return Ok(Opened::Damaged("meta.json is damaged".to_owned()));
        };
        if !meta.is_about(blob, anchor) {
            return Ok(Opened::Damaged("meta.json is about another image".to_owned()));
        }
        let spec = meta.spec(anchor);
        let path = dir.join(IMAGE);
        let image = match OpenOptions::new().read(true).write(true).open(&path) {
            Ok(image) => image,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(Opened::Damaged("its image is missing".to_owned()));
            }
            Err(error) => return Err(StoreError::io("open", &path, error)),
        };
        let size = image.metadata().map_err(|error| StoreError::io("look at", &path, error))?.len();
        if size != spec.image_size {
            return Ok(Opened::Damaged(format!("its image has {size} bytes instead of {}", spec.image_size)));
        }
        let (live_file, live) = open_live(dir, spec.chunks, boot)?;
        let mut file = Self {
            dir: dir.to_owned(),
            spec,
            disk: Box::new(image),
            live,
            live_file,
            verdict: Mutex::new(meta.verdict),
            tar: meta.tar,
            unsynced: AtomicU64::new(0),
            syncer: Arc::clone(syncer),
            used,
        };
        if (0..spec.chunks).any(|chunk| file.is_going(chunk)) {
            let _guard = file.guard()?;
            file.settle_interrupted()?;
        }
        if matches!(meta.verdict, Verdict::Verified(_)) && !file.is_complete() {
            file.verdict = Mutex::new(Verdict::Unverified);
        }
        Ok(Opened::There(Box::new(file)))
    }

    /// What this is.
    pub const fn spec(&self) -> &BlobSpec {
        &self.spec
    }

    /// Where the image lies. The file stays the same, and is not shortened, as long as this exists.
    pub fn image_path(&self) -> PathBuf {
        self.dir.join(IMAGE)
    }

    /// Of the image of a tar: the tar's diffID.
    pub const fn tar(&self) -> Option<DiffId> {
        self.tar
    }

    /// When what is known of the image as a whole was found out.
    pub fn judged(&self) -> Option<SystemTime> {
        std::fs::metadata(self.dir.join(META)).and_then(|metadata| metadata.modified()).ok()
    }

    /// True if `chunk` can be read.
    pub fn is_present(&self, chunk: u32) -> bool {
        chunk < self.spec.chunks && self.live.load(bits::live_offset(chunk)) == Some(THERE)
    }

    /// How many chunks can be read. Looks at all of them.
    pub fn present_count(&self) -> u32 {
        self.snapshot().count()
    }

    /// True if every chunk can be read. Looks at all of them.
    pub fn is_complete(&self) -> bool {
        (0..self.spec.chunks).all(|chunk| self.is_present(chunk))
    }

    /// Reads all of `buf` from `offset` of the image. What no present chunk covers reads as zeros or worse, and what is
    /// present may cease to be so: see [`BlobFile::read_present`].
    ///
    /// # Errors
    /// [`StoreError::OutOfBounds`], or what the system says.
    pub fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        self.check_bounds(offset, buf.len())?;
        self.disk.read_exact_at(buf, offset).map_err(|error| StoreError::io("read", self.dir.join(IMAGE), error))
    }

    /// Writes the verified bytes of `chunk`, which begins at `offset` of the image, and marks it. False if it is not kept
    /// because it is just being evicted.
    ///
    /// # Errors
    /// [`StoreError::Full`] and others; the chunk is not marked then.
    pub fn write_chunk(self: &Arc<Self>, chunk: u32, offset: u64, data: &[u8]) -> Result<bool, StoreError> {
        self.check_bounds(offset, data.len())?;
        if chunk >= self.spec.chunks {
            let (path, size) = (self.dir.clone(), u64::from(self.spec.chunks));
            return Err(StoreError::OutOfBounds { path, offset: chunk.into(), len: 1, size });
        }
        {
            let _nothing_goes = self.lock_for_writing()?;
            if self.is_going(chunk) && !self.settle_abandoned()? {
                return Ok(false);
            }
            self.disk
                .write_all_at(data, offset)
                .map_err(|error| StoreError::io("write", self.dir.join(IMAGE), error))?;
            self.mark(chunk, THERE)?;
        }
        let before = self.unsynced.fetch_add(data.len() as u64, Ordering::AcqRel);
        self.syncer.written(self, before, data.len() as u64);
        Ok(true)
    }

    /// Makes every chunk that is present now survive a power cut. Waits for the disk.
    ///
    /// # Errors
    /// What the system says. The chunks that were not safe before are forgotten then, since the system may have lost
    /// their bytes.
    pub fn sync(&self) -> Result<(), StoreError> {
        let guard = self.guard()?;
        self.sync_guarded(&guard)
    }

    fn sync_guarded(&self, _guard: &FileLock) -> Result<(), StoreError> {
        // Taken before the snapshot: what is written from here on is counted for the next sync.
        self.unsynced.store(0, Ordering::Release);
        self.settle_interrupted()?;
        let now = self.snapshot();
        let path = self.dir.join(PRESENT);
        let durable = read_present(&path, self.spec.chunks)?;
        if durable.as_ref().map_or(now.count() == 0, |durable| *durable == now) {
            return Ok(());
        }
        if let Err(error) = self.disk.sync_data() {
            let safe = durable.unwrap_or_else(|| Bits::none(self.spec.chunks));
            for chunk in (0..self.spec.chunks).filter(|chunk| now.contains(*chunk) && !safe.contains(*chunk)) {
                self.mark(chunk, NOT_THERE)?;
            }
            return Err(StoreError::io("sync", self.dir.join(IMAGE), error));
        }
        if durable.is_none() {
            // The first marks that last: what they need to be understood has to last as well.
            files::sync_file(&self.dir.join(META))?;
            files::sync_file(&self.dir.join(INDEX))?;
            files::sync_names(&self.dir, PLACE_LEVELS)?;
        }
        files::replace(&path, &now.to_present(), Durability::Synced)
    }

    /// Forgets every chunk, on disk and for all processes.
    ///
    /// # Errors
    /// What the system says.
    pub fn forget_all(&self) -> Result<(), StoreError> {
        let _guard = self.guard()?;
        self.forget_guarded()
    }

    fn forget_guarded(&self) -> Result<(), StoreError> {
        let none = Bits::none(self.spec.chunks).to_present();
        files::replace(&self.dir.join(PRESENT), &none, Durability::Synced)?;
        (0..self.spec.chunks).filter(|chunk| self.is_present(*chunk)).try_for_each(|chunk| self.mark(chunk, NOT_THERE))
    }

    /// What is known of the image as a whole.
    pub fn verdict(&self) -> Verdict {
        *self.verdict.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what was found out about the image as a whole. [`Verdict::Verified`] makes every chunk last first,
    /// [`Verdict::Quarantined`] forgets every chunk. False if all of it is said to be verified and not all of it is there
    /// any more; nothing is kept then.
    ///
    /// # Errors
    /// What the system says.
    pub fn set_verdict(&self, verdict: Verdict) -> Result<bool, StoreError> {
        let guard = self.guard()?;
        match verdict {
            Verdict::Verified(_) => {
                self.sync_guarded(&guard)?;
                // Nothing goes without the guard.
                if !self.is_complete() {
                    return Ok(false);
                }
            }
            Verdict::Quarantined(_) => self.forget_guarded()?,
            Verdict::Unverified | Verdict::Contradicted(_) => {}
        }
        files::replace(
            &self.dir.join(META),
            &Meta::new(&self.spec, verdict).of_tar(self.tar).to_bytes(),
            Durability::Synced,
        )?;
        *self.verdict.lock().unwrap_or_else(PoisonError::into_inner) = verdict;
        Ok(true)
    }

    /// Makes sure that the index is kept as well.
    pub(super) fn keep_index(&self, payload: &[u8]) -> Result<(), StoreError> {
        let path = self.dir.join(INDEX);
        let limit = payload.len() as u64;
        if files::read_bounded(&path, limit)?.as_deref() == Some(payload) {
            return Ok(());
        }
        files::replace(&path, payload, Durability::Synced)
    }

    /// True if chunks are present that would not survive a power cut: a process was killed before it synced them.
    pub(super) fn has_unsynced_marks(&self) -> Result<bool, StoreError> {
        let (durable, now) = (read_present(&self.dir.join(PRESENT), self.spec.chunks)?, self.snapshot());
        Ok(durable.map_or(now.count() > 0, |durable| durable != now))
    }

    /// Bytes written since the last sync.
    pub(super) fn unsynced(&self) -> u64 {
        self.unsynced.load(Ordering::Acquire)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn guard(&self) -> Result<FileLock, StoreError> {
        let path = self.dir.join(GUARD);
        FileLock::acquire(&path, LockMode::Exclusive).map_err(|error| StoreError::io("lock", path, error))
    }

    fn mark(&self, chunk: u32, value: u8) -> Result<(), StoreError> {
        FileExt::write_all_at(&self.live_file, &[value], bits::live_offset(chunk) as u64)
            .map_err(|error| StoreError::io("write", self.dir.join(LIVE), error))
    }

    fn snapshot(&self) -> Bits {
        let mut now = Bits::none(self.spec.chunks);
        (0..self.spec.chunks).filter(|chunk| self.is_present(*chunk)).for_each(|chunk| now.insert(chunk));
        now
    }

    fn check_bounds(&self, offset: u64, len: usize) -> Result<(), StoreError> {
        self.check_range(offset, len as u64)
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<(), StoreError> {
        let size = self.spec.image_size;
        if offset.checked_add(len).is_some_and(|end| end <= size) {
            return Ok(());
        }
        Err(StoreError::OutOfBounds { path: self.dir.join(IMAGE), offset, len, size })
    }

    /// Puts another disk under this image.
    #[cfg(test)]
    pub(super) fn with_disk(mut self, disk: Box<dyn Disk>) -> Self {
        self.disk = disk;
        self
    }
}

impl Drop for BlobFile {
    fn drop(&mut self) {
        if self.unsynced() > 0
            && let Err(error) = self.sync()
        {
            super::sync::complain(&self.dir, &error);
        }
        note_use(&self.used, &self.dir);
    }
}

/// Takes note that the image is used now: what is used least recently goes first when room is needed.
fn note_use(used: &FileLock, dir: &Path) {
    if let Err(error) = used.touch() {
        tracing::debug!(path = %dir.display(), %error, "when an image was used is not noted");
    }
}

/// Locks the image at `dir` against removal; none if there is none.
fn lock_for_use(dir: &Path) -> Result<Option<FileLock>, StoreError> {
    let path = dir.join(LOCK);
    loop {
        let lock = match FileLock::acquire(&path, LockMode::Shared) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io("lock", &path, error)),
        };
        if lock.still_names(&path).map_err(|error| StoreError::io("look at", &path, error))? {
            return Ok(Some(lock));
        }
    }
}

/// The durable marks, none if there are none or they are damaged.
fn read_present(path: &Path, chunks: u32) -> Result<Option<Bits>, StoreError> {
    let limit = bits::live_len(chunks) as u64 + 8;
    let Some(bytes) = files::read_bounded(path, limit)? else { return Ok(None) };
    match Bits::from_present(&bytes, chunks) {
        Ok(bits) => Ok(Some(bits)),
        Err(Rejected::Worthless(why)) => {
            tracing::warn!(path = %path.display(), "durable marks count as absent: {why}");
            Ok(None)
        }
        Err(Rejected::Newer(needs)) => Err(StoreError::Unsupported { path: path.to_owned(), needs }),
    }
}

/// The marks of this boot, made from the durable ones if there are none of this boot yet.
fn open_live(dir: &Path, chunks: u32, boot: BootId) -> Result<(File, SharedBytes), StoreError> {
    let path = dir.join(LIVE);
    let failed = |error| StoreError::io("open", &path, error);
    let guard = dir.join(GUARD);
    let _guard =
        FileLock::acquire(&guard, LockMode::Exclusive).map_err(|error| StoreError::io("lock", &guard, error))?;
    let taken = match OpenOptions::new().read(true).write(true).open(&path) {
        Ok(file) => {
            let mut header = [0; bits::HEADER];
            let len = file.metadata().map_err(failed)?.len();
            let read = file.read_at(&mut header, 0).map_err(failed)?;
            match bits::check_live(header.get(..read).unwrap_or_default(), len, chunks, boot) {
                Ok(()) => Some(file),
                Err(Rejected::Worthless(why)) => {
                    tracing::debug!(path = %path.display(), "live marks are made anew: {why}");
                    None
                }
                Err(Rejected::Newer(needs)) => return Err(StoreError::Unsupported { path, needs }),
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed(error)),
    };
    let file = match taken {
        Some(file) => file,
        None => {
            let durable = read_present(&dir.join(PRESENT), chunks)?.unwrap_or_else(|| Bits::none(chunks));
            // Written out in full, so that marking a chunk never needs space.
            files::replace(&path, &durable.to_live(boot), Durability::Relaxed)?;
            OpenOptions::new().read(true).write(true).open(&path).map_err(failed)?
        }
    };
    let map = SharedBytes::map(&file, bits::live_len(chunks)).map_err(|error| StoreError::io("map", &path, error))?;
    Ok((file, map))
}
