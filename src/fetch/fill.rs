//! Completing a layer in the background, without wishing for all of it at once.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::waiter::Done;
use super::{Cause, FetchError, LayerImage};
use crate::model::ByteRange;
use crate::store::StoreError;

/// Chunks that are wished for at a time. A flight takes some of them, so all connections find work in it.
const BATCH: u32 = 128;

/// Batches under way: while one lands its last chunks, the other has work left.
const BATCHES: usize = 2;

/// A fill under way. Dropped, that is when the last batch is over, it says how it went.
struct Fill {
    layer: Weak<LayerImage>,
    /// Evictions before it began.
    evictions: u64,
    progress: Mutex<Progress>,
    done: Mutex<Option<Done>>,
}

#[derive(Default)]
struct Progress {
    next: u32,
    failure: Option<Arc<FetchError>>,
}

impl LayerImage {
    /// Fetches everything that is missing, behind everything else. Chunks that fail do not keep others from coming;
    /// `done` gets the first failure.
    pub fn fill(self: &Arc<Self>, done: impl FnOnce(Result<(), Arc<FetchError>>) + Send + 'static) {
        let Some(chunked) = self.chunked() else {
            return self.request(ByteRange::to(u64::MAX), Cause::Fill, done);
        };
        self.verify_again();
        chunked.filling.fetch_add(1, Ordering::Relaxed);
        self.hash_on(chunked);
        let fill = Arc::new(Fill {
            layer: Arc::downgrade(self),
            evictions: self.evictions(),
            progress: Mutex::default(),
            done: Mutex::new(Some(Box::new(done))),
        });
        for _ in 0..BATCHES {
            fill.next_batch(self);
        }
    }
}

impl Fill {
    fn next_batch(self: &Arc<Self>, layer: &Arc<LayerImage>) {
        let Some(range) = self.take_batch(layer) else { return };
        if let Some(error) = self.no_room(layer) {
            self.progress.lock().unwrap_or_else(PoisonError::into_inner).failure.get_or_insert(Arc::new(error));
            return;
        }
        let fill = Arc::clone(self);
        layer.request(range, Cause::Fill, move |result| {
            if let Err(error) = result {
                fill.progress.lock().unwrap_or_else(PoisonError::into_inner).failure.get_or_insert(error);
            }
            if let Some(layer) = fill.layer.upgrade() {
                fill.next_batch(&layer);
            }
        });
    }

    /// Why no more should come for now.
    fn no_room(&self, layer: &LayerImage) -> Option<FetchError> {
        let blob = *layer.blob();
        if layer.evictions() != self.evictions {
            // What comes drives out what is needed more, or goes next.
            return Some(FetchError::NoRoom { blob });
        }
        layer.shared.store.is_below_reserve().then(|| {
            let path = layer.shared.store.root().to_owned();
            let source = std::io::Error::from(std::io::ErrorKind::StorageFull);
            let source = StoreError::Full { attempted: "leave the reserve of free space to", path, source };
            FetchError::Store { blob, source }
        })
    }

    /// The bytes of the next chunks that are missing, as a range without chunks that are there at either end.
    fn take_batch(&self, layer: &LayerImage) -> Option<ByteRange> {
        let chunked = layer.chunked()?;
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        let len = chunked.index.len();
        let first = (progress.next..len).find(|chunk| !chunked.file.is_present(*chunk));
        let Some(first) = first else {
            progress.next = len;
            return None;
        };
        let end = first.saturating_add(BATCH).min(len);
        progress.next = end;
        let (start, last) = (chunked.index.chunk(first)?, chunked.index.chunk(end - 1)?);
        ByteRange::new(start.image.start(), last.image.end()).ok()
    }
}

impl Drop for Fill {
    fn drop(&mut self) {
        let failure = self.progress.get_mut().unwrap_or_else(PoisonError::into_inner).failure.take();
        if let Some(layer) = self.layer.upgrade()
            && let Some(chunked) = layer.chunked()
            && chunked.filling.fetch_sub(1, Ordering::Relaxed) == 1
            && failure.is_some()
        {
            // What is held for its turn to be hashed may wait for long, and other layers have use for the room.
            chunked.hashing.forget(&layer.shared.hold);
        }
        let done = self.done.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(done) = done {
            done(failure.map_or(Ok(()), Err));
        }
    }
}
