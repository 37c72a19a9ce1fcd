//! Single chunks of an image given back to the disk, under whoever reads and writes it.
//!
//! Guarantees. What a reader was given by [`BlobFile::read_present`] is what was written, whatever goes meanwhile, in this
//! process or another. A mark that lasts never speaks of a hole: a chunk is taken out of `present`, which is synced, before
//! the first byte of it goes. Of an image that somebody was promised as a whole ([`BlobFile::pin`]), or that the kernel
//! shows, nothing goes.
//!
//! How. Each step is seen by all processes of the root:
//!
//! 1. The chunks are marked as going, while nobody writes: from now on nobody begins to read or to write them.
//! 2. The evictions are counted: whoever had begun to read finds another number when he has read, and begins anew.
//! 3. That the image was verified as a whole, and the chunks' durable marks, are taken back on disk.
//! 4. The holes are punched; the chunks are marked as not there.
//!
//! Whoever is killed in between leaves chunks marked as going. They are not there for the next one who has the guard: no
//! hole may have been punched, and none is needed.

use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::sync::PoisonError;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use super::{BlobFile, GUARD, IMAGE, LIVE, META, META_LIMIT, PRESENT, read_present};
use crate::model::ByteRange;
use crate::store::StoreError;
use crate::store::bits::{self, GOING, NOT_THERE, THERE};
use crate::store::evict::shown_by_the_kernel;
use crate::store::files::{self, Durability};
use crate::store::meta::{Meta, Verdict};
use crate::sys::{FileLock, LockMode};

/// Held shared by whoever was promised the whole image, exclusively while chunks of it go.
pub(super) const PIN: &str = "pin";
/// Held shared while a chunk is written, exclusively while chunks are marked as going.
pub(super) const WRITING: &str = "writing";

/// Holes begin and end at multiples of this: the block size of nearly every file system. A part of a block frees nothing.
const BLOCK: u64 = 4096;

/// How often, and how long apart, it is looked whether nobody writes. A chunk is written in a millisecond or so; who fills
/// an image without a pause needs it more than whoever wants room.
const LOOKS: u32 = 50;
const BETWEEN: Duration = Duration::from_millis(2);

/// Nothing of the image goes as long as this exists.
#[derive(Debug)]
pub struct Pin {
    _held: FileLock,
}

/// What has gone of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Punched {
    /// How many chunks.
    pub chunks: u32,
    /// How many bytes of holes there are now in their place.
    pub bytes: u64,
}

impl BlobFile {
    /// How often chunks of the image have gone, in this boot.
    pub fn evictions(&self) -> u64 {
        let mut bytes = [0; bits::EVICTIONS_LEN];
        for (at, byte) in (bits::EVICTIONS..).zip(&mut bytes) {
            *byte = self.live.load(at).unwrap_or(0);
        }
        u64::from_le_bytes(bytes)
    }

    /// Reads all of `buf` from `offset` of the image, which `chunks` cover, if they are there from the first byte to the
    /// last. If not this is false, and `buf` holds anything.
    ///
    /// # Errors
    /// [`StoreError::OutOfBounds`], or what the system says.
    pub fn read_present(&self, chunks: Range<u32>, offset: u64, buf: &mut [u8]) -> Result<bool, StoreError> {
        loop {
            let before = self.evictions();
            if !chunks.clone().all(|chunk| self.is_present(chunk)) {
                return Ok(false);
            }
            self.read_exact_at(offset, buf)?;
            // What was read was read before it is looked whether it had gone.
            fence(Ordering::SeqCst);
            if self.evictions() == before {
                return Ok(true);
            }
        }
    }

    /// Keeps the image whole as long as the answer is held; none if it is not whole. Whoever lets the kernel show the image
    /// needs this until it does. Waits for evictions under way.
    ///
    /// # Errors
    /// What the system says.
    pub fn pin(&self) -> Result<Option<Pin>, StoreError> {
        let pin = Pin { _held: self.lock_file(PIN, LockMode::Shared)? };
        Ok(self.is_complete().then_some(pin))
    }

    /// Gives back the space of those of `chunks` that are there; each comes with its bytes in the image. None if nothing
    /// goes, because somebody needs all of the image or writes it without a pause. Waits for the disk.
    ///
    /// # Errors
    /// What the system says. What has not gone then can be read as before, unless marking that failed as well.
    pub fn punch(&self, chunks: &[(u32, ByteRange)]) -> Result<Option<Punched>, StoreError> {
        for (_, range) in chunks {
            self.check_range(range.start(), range.len())?;
        }
        let Some(_pin) = self.try_lock_file(PIN)? else { return Ok(None) };
        let _guard = self.guard()?;
        let verified = match self.noted()? {
            Some(meta) if matches!(meta.verdict, Verdict::Verified(_)) => true,
            Some(_) => false,
            // Somebody damages it while we use it: nothing that is written there would help.
            None => return Ok(None),
        };
        if verified && shown_by_the_kernel().has(&self.image_path()) {
            return Ok(None);
        }
        let Some(gone) = self.mark_as_going(chunks)? else { return Ok(None) };
        if gone.is_empty() {
            return Ok(Some(Punched::default()));
        }
        if let Err(error) = self.take_back(&gone, verified) {
            // Nothing has happened to their bytes.
            self.mark_all(&gone, THERE)?;
            return Err(error);
        }
        let punched = self.make_holes(&gone);
        self.mark_all(&gone, NOT_THERE)?;
        let bytes = punched?;
        Ok(Some(Punched { chunks: u32::try_from(gone.len()).unwrap_or(u32::MAX), bytes }))
    }

    /// Marks those of `chunks` that are there as going, and counts that. None if somebody writes without a pause.
    fn mark_as_going(&self, chunks: &[(u32, ByteRange)]) -> Result<Option<Vec<(u32, ByteRange)>>, StoreError> {
        let Some(_nobody_writes) = self.when_nobody_writes()? else { return Ok(None) };
        self.settle_interrupted()?;
        let mut going: Vec<_> = chunks.iter().copied().filter(|(chunk, _)| self.is_present(*chunk)).collect();
        going.sort_unstable_by_key(|(_, range)| (range.start(), range.end()));
        going.dedup_by_key(|(chunk, _)| *chunk);
        let marked = self.mark_all(&going, GOING).and_then(|()| {
            let count = self.evictions().wrapping_add(1).to_le_bytes();
            let counted = self.live_file.write_all_at(&count, bits::EVICTIONS as u64);
            counted.map_err(|error| StoreError::io("write", self.dir.join(LIVE), error))
        });
        if let Err(error) = marked {
            self.mark_all(&going, THERE)?;
            return Err(error);
        }
        Ok(Some(going))
    }

    /// Takes back on disk that `gone` are there and that all of it is. Only then may their bytes go.
    fn take_back(&self, gone: &[(u32, ByteRange)], verified: bool) -> Result<(), StoreError> {
        if verified {
            let meta = Meta::new(&self.spec, Verdict::Unverified).to_bytes();
            files::replace(&self.dir.join(META), &meta, Durability::Synced)?;
        }
        let mut verdict = self.verdict.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(*verdict, Verdict::Verified(_)) {
            *verdict = Verdict::Unverified;
        }
        drop(verdict);
        let path = self.dir.join(PRESENT);
        let Some(mut durable) = read_present(&path, self.spec.chunks)? else { return Ok(()) };
        for (chunk, _) in gone {
            durable.remove(*chunk);
        }
        files::replace(&path, &durable.to_present(), Durability::Synced)
    }

    /// Punches as few holes as there are runs of neighbours.
    fn make_holes(&self, gone: &[(u32, ByteRange)]) -> Result<u64, StoreError> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (_, range) in gone {
            match runs.last_mut() {
                Some(last) if range.start() <= last.end => last.end = last.end.max(range.end()),
                _ => runs.push(range.start()..range.end()),
            }
        }
        let mut bytes = 0;
        for run in runs {
            // Behind the end of the image is nobody.
            let end = if run.end == self.spec.image_size { run.end.next_multiple_of(BLOCK) } else { run.end };
            let (start, end) = (run.start.next_multiple_of(BLOCK), end - end % BLOCK);
            let Some(len) = end.checked_sub(start).filter(|len| *len > 0) else { continue };
            self.disk
                .punch(start, len)
                .map_err(|error| StoreError::io("punch a hole into", self.dir.join(IMAGE), error))?;
            bytes += len;
        }
        Ok(bytes)
    }

    fn mark_all(&self, chunks: &[(u32, ByteRange)], value: u8) -> Result<(), StoreError> {
        chunks.iter().try_for_each(|(chunk, _)| self.mark(*chunk, value))
    }

    /// Chunks that somebody who is dead by now was about to evict are not there. Whoever calls this has the guard.
    pub(super) fn settle_interrupted(&self) -> Result<(), StoreError> {
        for chunk in 0..self.spec.chunks {
            if self.live.load(bits::live_offset(chunk)) == Some(GOING) {
                self.mark(chunk, NOT_THERE)?;
            }
        }
        Ok(())
    }

    /// The same if whoever was about to evict them is dead, which is the answer. Whoever calls this writes.
    pub(super) fn settle_abandoned(&self) -> Result<bool, StoreError> {
        // Who evicts has the guard to the end.
        let Some(_guard) = self.try_lock_file(GUARD)? else { return Ok(false) };
        self.settle_interrupted()?;
        Ok(true)
    }

    /// What is written down of the image.
    fn noted(&self) -> Result<Option<Meta>, StoreError> {
        let path = self.dir.join(META);
        let Some(bytes) = files::read_bounded(&path, META_LIMIT)? else { return Ok(None) };
        Meta::parse(&path, &bytes)
    }

    /// Waits until nobody writes chunks, and lets nobody.
    fn when_nobody_writes(&self) -> Result<Option<FileLock>, StoreError> {
        for _ in 0..LOOKS {
            if let Some(lock) = self.try_lock_file(WRITING)? {
                return Ok(Some(lock));
            }
            std::thread::sleep(BETWEEN);
        }
        Ok(None)
    }

    /// As long as the answer is held, no chunk becomes one that is going.
    pub(super) fn lock_for_writing(&self) -> Result<FileLock, StoreError> {
        self.lock_file(WRITING, LockMode::Shared)
    }

    pub(super) fn is_going(&self, chunk: u32) -> bool {
        self.live.load(bits::live_offset(chunk)) == Some(GOING)
    }

    fn lock_file(&self, name: &'static str, mode: LockMode) -> Result<FileLock, StoreError> {
        let path = self.dir.join(name);
        let lock = match FileLock::acquire(&path, mode) {
            // It was made before there were such locks.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                files::touch(&path)?;
                FileLock::acquire(&path, mode)
            }
            locked => locked,
        };
        lock.map_err(|error| StoreError::io("lock", path, error))
    }

    /// The lock for us alone, if nobody has it.
    fn try_lock_file(&self, name: &'static str) -> Result<Option<FileLock>, StoreError> {
        let path = self.dir.join(name);
        let lock = match FileLock::try_acquire(&path, LockMode::Exclusive) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                files::touch(&path)?;
                FileLock::try_acquire(&path, LockMode::Exclusive)
            }
            locked => locked,
        };
        lock.map_err(|error| StoreError::io("lock", path, error))
    }
}
