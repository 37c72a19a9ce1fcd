//! One layer image that is partly here: what is here is read, what is not can be requested.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Instant;

use tokio::sync::watch;

use super::counters::{Counting, add};
use super::origins::Origins;
use super::pieces::Chunked;
use super::queue::{Key, LayerId};
use super::readahead::Reach;
use super::shared::Shared;
use super::slowest::SlowRead;
use super::standing::Standing;
use super::waiter::Waiter;
use super::whole::Whole;
use super::{Cause, Counters, FetchError, LayerSpec};
use crate::model::{BlobDigest, ByteRange, DiffId, ReadAt, ReadAtError};
use crate::store::{Anchor, BlobFile, StoreError};

/// A layer image whose bytes come when they are wanted.
///
/// [`ReadAt`] answers from what is here, at once. What it says is absent can be [requested](Self::request). Dropped, it
/// answers a failure to whoever still waits for it.
pub struct LayerImage {
    pub(super) me: Weak<Self>,
    pub(super) id: LayerId,
    pub(super) spec: LayerSpec,
    pub(super) source: Origins,
    pub(super) shared: Arc<Shared>,
    pub(super) body: Body,
    pub(super) counting: Counting,
    pub(super) standing: watch::Sender<Standing>,
    pub(super) said_full: AtomicBool,
    pub(super) said_broken: AtomicBool,
    /// Of the image of a tar: the tar's diffID.
    pub(super) tar: Option<DiffId>,
}

pub(super) enum Body {
    Chunked(Box<Chunked>),
    Whole(Whole),
}

impl LayerImage {
    /// The blob it comes from.
    pub fn blob(&self) -> &BlobDigest {
        &self.spec.blob
    }

    /// What names its bytes: what all of it has to hash to; of the image of a tar, a name of its own.
    pub fn diff_id(&self) -> DiffId {
        self.spec.diff_id
    }

    /// What the image's config says that it is: of a tar, the tar's diffID.
    pub fn claimed_diff_id(&self) -> DiffId {
        self.tar.unwrap_or(self.spec.diff_id)
    }

    /// True if parts of it can be had; else it is read from start to end.
    pub fn comes_in_pieces(&self) -> bool {
        self.chunked().is_some_and(|chunked| !chunked.index.is_empty())
    }

    /// What the bytes of its image are verified against.
    pub fn anchor(&self) -> Anchor {
        match &self.body {
            Body::Chunked(chunked) => chunked.file.spec().anchor,
            Body::Whole(whole) => whole.file().map_or(Anchor::Whole, |file| file.spec().anchor),
        }
    }

    /// Size of its image in bytes, once that is known.
    pub fn image_size(&self) -> Option<u64> {
        match &self.body {
            Body::Chunked(chunked) => Some(chunked.index.image_size()),
            Body::Whole(whole) => whole.file().map(|file| file.spec().image_size),
        }
    }

    /// Size of the blob in bytes.
    pub fn stored_size(&self) -> u64 {
        self.spec.blob_size
    }

    /// True if nothing of it is missing.
    pub fn is_complete(&self) -> bool {
        match &self.body {
            Body::Whole(whole) => whole.file().is_some(),
            Body::Chunked(chunked) => (0..chunked.index.len()).all(|chunk| chunked.file.is_present(chunk)),
        }
    }

    /// Asks for the bytes of `range` of the image; what lies behind its end is not asked for. `done` is called once:
    /// when all of them can be read, or when some will not come. That may be at once, on the calling thread, and is
    /// else on a thread of the fetch path, which `done` should not keep. Never blocks.
    pub fn request(
        self: &Arc<Self>,
        range: ByteRange,
        cause: Cause,
        done: impl FnOnce(Result<(), Arc<FetchError>>) + Send + 'static,
    ) {
        match &self.body {
            Body::Whole(whole) => whole.request(self, range, cause, done),
            Body::Chunked(chunked) => self.request_chunks(chunked, range, cause, done),
        }
    }

    fn request_chunks(
        self: &Arc<Self>,
        chunked: &Chunked,
        range: ByteRange,
        cause: Cause,
        done: impl FnOnce(Result<(), Arc<FetchError>>) + Send + 'static,
    ) {
        let wanted = range
            .intersection(ByteRange::to(chunked.index.image_size()))
            .map_or(0..0, |range| chunked.index.chunks_in(range));
        if cause.is_demand() {
            chunked.recent.used(wanted.clone());
            self.reached(chunked, wanted.clone(), Reach::Miss(cause));
        }
        if cause == Cause::Metadata {
            chunked.recent.is_metadata(wanted.clone());
        }
        // A fill is after what is kept: what the disk had no room for when it was read, it may have room for now.
        let has = |chunk| if cause == Cause::Fill { chunked.file.is_present(chunk) } else { self.has(chunked, chunk) };
        let missing: Vec<u32> = wanted.filter(|chunk| !has(*chunk)).collect();
        if missing.is_empty() {
            self.check_complete();
            return done(Ok(()));
        }
        let deadline = cause.is_demand().then_some(self.shared.config.deadline);
        let (begin, me) = (Instant::now(), cause.is_demand().then(|| Weak::clone(&self.me)));
        let done = move |result| {
            if let Some(layer) = me.and_then(|me| me.upgrade())
                && let Some(chunked) = layer.chunked()
            {
                chunked.slowest.note(SlowRead { range, waited: begin.elapsed() });
            }
            done(result);
        };
        // One more than there are chunks: the wishes count as a chunk until all of them are made.
        let waiter = Waiter::new(self.spec.blob, range, missing.len() + 1, deadline, done);
        let mut here = 1;
        let mut missed: Option<Range<u32>> = None;
        {
            let mut state = self.shared.lock();
            for chunk in missing {
                let key = Key { layer: self.id, chunk };
                // Whoever lands a chunk marks it before it takes its entry away, so a chunk without either is missing.
                if state.queue.knows(key) || !has(chunk) {
                    if state.want(key, cause, Some(Arc::clone(&waiter))) {
                        missed = Some(missed.map_or(chunk, |missed| missed.start)..chunk + 1);
                    }
                } else {
                    here += 1;
                }
            }
        }
        if let (Some(missed), Cause::Read) = (missed, cause) {
            self.look_around(chunked, missed);
        }
        self.shared.pump();
        (0..here).for_each(|_| waiter.settle(Ok(())));
    }

    /// True if `chunk` can be read now.
    fn has(&self, chunked: &Chunked, chunk: u32) -> bool {
        chunked.file.is_present(chunk) || self.shared.spare.get(Key { layer: self.id, chunk }).is_some()
    }

    /// A reader has reached `chunks`. Those it is the first to reach count as needed and may give reason to read ahead.
    fn reached(&self, chunked: &Chunked, chunks: Range<u32>, reach: Reach) {
        let mut fresh: Option<Range<u32>> = None;
        for chunk in chunks.filter(|chunk| chunked.touched.set(*chunk)) {
            add(&self.counting.needed, chunked.index.chunk(chunk).map_or(0, |chunk| chunk.blob.len()));
            fresh = Some(fresh.map_or(chunk, |fresh| fresh.start)..chunk + 1);
        }
        let Some(fresh) = fresh else { return };
        let ahead = {
            let mut ahead = chunked.ahead.lock().unwrap_or_else(PoisonError::into_inner);
            ahead.reached(fresh, reach, chunked.index.len(), |chunk| chunked.chunk_size(chunk))
        };
        let Some(ahead) = ahead else { return };
        let missing: Vec<u32> = ahead.filter(|chunk| !self.has(chunked, *chunk)).collect();
        if missing.is_empty() {
            return;
        }
        {
            let mut state = self.shared.lock();
            for chunk in missing {
                state.want(Key { layer: self.id, chunk }, Cause::ReadAhead, None);
            }
        }
        self.shared.pump();
    }

    /// Asks for what lies around chunks that a read has missed.
    fn look_around(&self, chunked: &Chunked, missed: Range<u32>) {
        let Some(around) = &chunked.around else { return };
        let mut around = around.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = self.shared.lock();
        around.missed(missed, chunked.index.len(), |chunk| {
            let fresh = !self.has(chunked, chunk) && state.want(Key { layer: self.id, chunk }, Cause::ReadAhead, None);
            if fresh { chunked.index.chunk(chunk).map_or(0, |chunk| chunk.blob.len()) } else { 0 }
        });
    }

    /// What it has cost so far.
    pub fn counters(&self) -> Counters {
        self.counting.snapshot()
    }

    pub(super) fn chunked(&self) -> Option<&Chunked> {
        match &self.body {
            Body::Chunked(chunked) => Some(chunked),
            Body::Whole(_) => None,
        }
    }

    fn read_chunks(&self, chunked: &Chunked, range: ByteRange, buf: &mut [u8]) -> Result<(), ReadAtError> {
        let wanted = chunked.index.chunks_in(range);
        let mut on_disk = true;
        for chunk in wanted.clone() {
            if !chunked.file.is_present(chunk) {
                if self.shared.spare.get(Key { layer: self.id, chunk }).is_none() {
                    return Err(ReadAtError::Absent(range));
                }
                on_disk = false;
            }
        }
        chunked.recent.used(wanted.clone());
        self.reached(chunked, wanted.clone(), Reach::Hit);
        // The last chunk may have come through somebody else who has the image open.
        self.check_complete();
        if on_disk {
            return match read_present(&chunked.file, wanted, range, buf)? {
                true => Ok(()),
                false => Err(ReadAtError::Absent(range)),
            };
        }
        for number in wanted {
            let Some(chunk) = chunked.index.chunk(number) else { return Err(ReadAtError::Absent(range)) };
            let Some(part) = chunk.image.intersection(range) else { continue };
            let target = slice_mut(buf, part.start() - range.start(), part.len()).ok_or(ReadAtError::Absent(range))?;
            if !read_present(&chunked.file, number..number + 1, part, target)? {
                let data = self.shared.spare.get(Key { layer: self.id, chunk: number });
                let data = data.ok_or(ReadAtError::Absent(range))?;
                let data = slice(&data, part.start() - chunk.image.start(), part.len());
                target.copy_from_slice(data.ok_or(ReadAtError::Absent(range))?);
            }
        }
        Ok(())
    }
}

fn slice(bytes: &[u8], start: u64, len: u64) -> Option<&[u8]> {
    let start = usize::try_from(start).ok()?;
    bytes.get(start..start.checked_add(usize::try_from(len).ok()?)?)
}

fn slice_mut(bytes: &mut [u8], start: u64, len: u64) -> Option<&mut [u8]> {
    let start = usize::try_from(start).ok()?;
    bytes.get_mut(start..start.checked_add(usize::try_from(len).ok()?)?)
}

fn read_file(file: &BlobFile, range: ByteRange, buf: &mut [u8]) -> Result<(), ReadAtError> {
    file.read_exact_at(range.start(), buf).map_err(|error| unreadable(range, error))
}

/// False if not all of `chunks`, which cover `range`, are there.
fn read_present(file: &BlobFile, chunks: Range<u32>, range: ByteRange, buf: &mut [u8]) -> Result<bool, ReadAtError> {
    file.read_present(chunks, range.start(), buf).map_err(|error| unreadable(range, error))
}

fn unreadable(range: ByteRange, error: StoreError) -> ReadAtError {
    match error {
        StoreError::OutOfBounds { size, .. } => ReadAtError::OutOfBounds { range, size },
        error => ReadAtError::Io { range, source: io::Error::other(error) },
    }
}

impl ReadAt for LayerImage {
    /// The size of the image. Of a compressed layer that is read from start to end it is not known before it is here:
    /// until then nothing is out of bounds, everything is absent.
    fn size(&self) -> u64 {
        match &self.body {
            Body::Chunked(chunked) => chunked.index.image_size(),
            Body::Whole(whole) => whole.size(&self.spec),
        }
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
        let size = self.size();
        let range = ByteRange::at(offset, buf.len() as u64)
            .map_err(|_| ReadAtError::OutOfBounds { range: ByteRange::to(u64::MAX), size })?;
        if range.end() > size {
            return Err(ReadAtError::OutOfBounds { range, size });
        }
        match &self.body {
            Body::Chunked(_) if range.is_empty() => {}
            Body::Chunked(chunked) => self.read_chunks(chunked, range, buf)?,
            Body::Whole(whole) => match whole.file() {
                Some(file) => read_file(file, range, buf)?,
                None => return Err(ReadAtError::Absent(range)),
            },
        }
        add(&self.counting.read, buf.len() as u64);
        Ok(())
    }
}

impl Drop for LayerImage {
    fn drop(&mut self) {
        if let Some(chunked) = self.chunked() {
            chunked.hashing.forget(&self.shared.hold);
        }
        self.shared.leave(self.id, self.chunked().map_or(0, |chunked| chunked.index.len()));
    }
}

impl fmt::Debug for LayerImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerImage").field("blob", &self.spec.blob).finish_non_exhaustive()
    }
}
