//! The bytes of one chunk have arrived: verify, inflate, write, answer.

use std::cell::RefCell;
use std::sync::Arc;

use super::budget::Permit;
use super::counters::add;
use super::cpu::Urgency;
use super::queue::Key;
use super::shared::Shared;
use super::{Cause, FetchError, LayerImage};
use crate::chunked::{Chunk, decode_chunk};
use crate::model::BlobSource as _;
use crate::store::StoreError;

/// How often the bytes of a chunk are fetched before a read of it fails.
const ATTEMPTS: u32 = 2;

/// The largest buffer a thread keeps from one chunk to the next. Our writer's chunks have 4 MiB at most.
const KEPT_BUFFER: usize = 4 << 20;

thread_local! {
    static IMAGE_BYTES: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A chunk between the network and the store. Dropped unfinished, it answers a failure to whoever waits.
pub(super) struct Landing {
    layer: Arc<LayerImage>,
    key: Key,
    chunk: Chunk,
    /// Stored bytes and the room they take.
    cargo: Option<(Vec<u8>, Permit)>,
    settled: bool,
}

impl Landing {
    pub(super) fn new(layer: Arc<LayerImage>, key: Key, chunk: Chunk, stored: Vec<u8>, permit: Permit) -> Self {
        Self { layer, key, chunk, cargo: Some((stored, permit)), settled: false }
    }

    /// Hands the chunk to the CPU pool.
    pub(super) fn queue(self, cause: Cause) {
        if let Some(chunked) = self.layer.chunked() {
            if matches!(cause, Cause::ReadAhead | Cause::Replay) {
                chunked.guessed(self.key.chunk);
            }
            // It came for somebody who has not read it yet.
            if cause != Cause::Fill {
                chunked.recent.used(self.key.chunk..self.key.chunk + 1);
            }
        }
        let shared = Arc::clone(&self.layer.shared);
        shared.cpu.run(Urgency::Chunk(cause), move || self.land());
    }

    fn land(mut self) {
        let result = IMAGE_BYTES.with_borrow_mut(|out| {
            let result = self.decode_and_keep(out).map(|kept| {
                if kept {
                    self.layer.hash_landed(self.key.chunk, out);
                }
            });
            if out.capacity() > KEPT_BUFFER {
                *out = Vec::new();
            }
            result
        });
        // Those who are answered now may want the room at once.
        drop(self.cargo.take());
        let shared = Arc::clone(&self.layer.shared);
        match result {
            Ok(()) => self.settle(&Ok(())),
            Err(error) => {
                let again = shared.lock().queue.again(self.key, ATTEMPTS);
                let shown: &dyn std::error::Error = &error;
                if again {
                    tracing::warn!(error = shown, "a chunk came with wrong bytes, fetching it once more");
                    self.settled = true;
                    shared.pump();
                } else {
                    tracing::debug!(error = shown, "a chunk came with wrong bytes again, its readers get an error");
                    self.settle(&Err(Arc::new(error)));
                }
            }
        }
        self.layer.check_complete();
    }

    /// True if it was written, so that it can be read back.
    fn decode_and_keep(&self, out: &mut Vec<u8>) -> Result<bool, FetchError> {
        let (layer, counting) = (&self.layer, &self.layer.counting);
        let (Some(chunked), Some((stored, _))) = (layer.chunked(), &self.cargo) else {
            return Err(FetchError::Abandoned { blob: layer.spec.blob });
        };
        decode_chunk(&self.chunk, chunked.index.compression(), stored, out).map_err(|source| {
            add(&counting.corrupt, 1);
            let (blob, chunk, origin) = (layer.spec.blob, self.key.chunk, layer.source.origin());
            FetchError::Corrupt { blob, chunk, origin, source }
        })?;
        add(&counting.chunks, 1);
        let spare = &layer.shared.spare;
        let written = chunked.file.write_chunk(self.key.chunk, self.chunk.image.start(), out);
        match &written {
            Ok(true) => spare.remove(self.key),
            // What cannot be kept is served all the same.
            Ok(false) => {
                spare.insert(self.key, out);
                spare.refused(self.key);
            }
            Err(_) => spare.insert(self.key, out),
        }
        written.or_else(|error| {
            if error.is_full() {
                add(&counting.disk_full, 1);
            }
            layer.complain_about_store(&error);
            Ok(false)
        })
    }

    fn settle(&mut self, result: &Result<(), Arc<FetchError>>) {
        self.settled = true;
        self.layer.shared.settle(self.key, result);
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        if !self.settled {
            let blob = self.layer.spec.blob;
            self.settle(&Err(Arc::new(FetchError::Abandoned { blob })));
        }
    }
}

/// Has chunks written that came while their place was being evicted.
pub(super) fn land_refused(shared: &Arc<Shared>) {
    for (key, content) in shared.spare.take_refused() {
        let Some(layer) = shared.layer(key.layer) else { continue };
        shared.cpu.run(Urgency::Chunk(Cause::Fill), move || layer.land_later(key, &content));
    }
}

impl LayerImage {
    fn land_later(&self, key: Key, content: &[u8]) {
        let (spare, Some(chunked)) = (&self.shared.spare, self.chunked()) else { return };
        let Some(chunk) = chunked.index.chunk(key.chunk) else { return };
        let written = match chunked.file.is_present(key.chunk) {
            true => Ok(true),
            false => chunked.file.write_chunk(key.chunk, chunk.image.start(), content),
        };
        match written {
            Ok(true) => spare.remove(key),
            Ok(false) => spare.refused(key),
            // It stays where it is: the disk may be full.
            Err(error) => self.complain_about_store(&error),
        }
        self.check_complete();
    }

    /// Says once per layer and reason that the store does not take chunks.
    fn complain_about_store(&self, error: &StoreError) {
        let first = if error.is_full() { &self.said_full } else { &self.said_broken };
        if !first.swap(true, std::sync::atomic::Ordering::Relaxed) {
            let shown: &dyn std::error::Error = error;
            tracing::warn!(blob = %self.spec.blob, error = shown, "fetched chunks are kept in memory only");
        }
    }
}
