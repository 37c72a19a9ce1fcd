//! A layer all of whose chunks are here is hashed as a whole, once: only then is it local.
//!
//! Each chunk has been verified before, so another hash than expected means that the local copy was damaged after it
//! was written, or that index and diffID of the image contradict each other. The first time the copy is distrusted and
//! every chunk fetched anew; if the same hash comes out again, the image is what contradicts itself: its chunks are
//! still what its index says, and are served, but the layer never counts as local.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use super::LayerImage;
use super::cpu::Urgency;
use super::layer::{Chunked, Tail};
use crate::model::{ByteRange, DiffId, Hasher};
use crate::store::Verdict;

/// Bytes hashed at a time: a thread of the pool is busy for some milliseconds, then more urgent work has its turn.
const STEP: u64 = 4 << 20;

/// Bytes read at a time.
const BUFFER: usize = 256 << 10;

struct Verification {
    layer: Weak<LayerImage>,
    hasher: Hasher,
    offset: u64,
}

impl LayerImage {
    /// Begins to verify the layer if all of it is here and nobody has done so. Cheap enough for every read.
    pub(super) fn check_complete(&self) {
        let Some(chunked) = self.chunked() else { return };
        if chunked.verifying.load(Ordering::Acquire) || !chunked.is_complete() || matches!(chunked.tail, Tail::Unknown)
        {
            return;
        }
        if chunked.verifying.swap(true, Ordering::AcqRel) {
            return;
        }
        match chunked.file.verdict() {
            Verdict::Verified(_) => return,
            Verdict::Contradicted(found) if found != self.spec.diff_id => return,
            Verdict::Unverified | Verdict::Quarantined(_) | Verdict::Contradicted(_) => {}
        }
        let hasher = Hasher::new(self.spec.diff_id.0.algorithm());
        Verification { layer: Weak::clone(&self.me), hasher, offset: 0 }.queue(self);
    }

    /// The same for a layer whose verification broke off before: reads do not try that again, fills do.
    pub(super) fn verify_again(&self) {
        if let Some(chunked) = self.chunked()
            && chunked.verify_failed.swap(false, Ordering::AcqRel)
        {
            chunked.verifying.store(false, Ordering::Release);
        }
        self.check_complete();
    }

    fn verified(self: &Arc<Self>, found: DiffId) {
        let Some(chunked) = self.chunked() else { return };
        let verdict = self.judge(chunked, found);
        let layer = Arc::clone(self);
        // Waits for the disk.
        drop(self.shared.runtime.spawn_blocking(move || {
            let Some(chunked) = layer.chunked() else { return };
            let blob = layer.spec.blob;
            if let Err(error) = chunked.file.set_verdict(verdict) {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(%blob, error, "what was found out about a complete layer is not kept");
                chunked.verify_failed.store(true, Ordering::Release);
                return;
            }
            if matches!(verdict, Verdict::Quarantined(_)) {
                chunked.start_over();
                chunked.verifying.store(false, Ordering::Release);
            }
        }));
    }

    fn judge(&self, chunked: &Chunked, found: DiffId) -> Verdict {
        let (blob, expected) = (self.spec.blob, self.spec.diff_id);
        if found == expected {
            tracing::info!(%blob, "the layer is complete and verified");
            return Verdict::Verified(found);
        }
        if chunked.file.verdict() == Verdict::Quarantined(found) {
            tracing::error!(%blob, %expected, %found, "the image contradicts itself: its chunks make another diffID");
            return Verdict::Contradicted(found);
        }
        tracing::error!(%blob, %expected, %found, "a complete layer has another diffID, all of it is fetched anew");
        Verdict::Quarantined(found)
    }
}

impl Verification {
    fn queue(self, layer: &LayerImage) {
        layer.shared.cpu.run(Urgency::Verify, move || self.step());
    }

    fn step(mut self) {
        let Some(layer) = self.layer.upgrade() else { return };
        let Some(chunked) = layer.chunked() else { return };
        let size = chunked.index.image_size();
        let until = size.min(self.offset.saturating_add(STEP));
        let mut buffer = vec![0; BUFFER];
        while self.offset < until {
            let len = usize::try_from(until - self.offset).unwrap_or(BUFFER).min(BUFFER);
            let Some(part) = buffer.get_mut(..len) else { return };
            if let Err(error) = chunked.file.read_exact_at(self.offset, part) {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(blob = %layer.spec.blob, error, "a complete layer cannot be verified");
                chunked.verify_failed.store(true, Ordering::Release);
                return;
            }
            self.hasher.update(part);
            self.offset += len as u64;
        }
        if self.offset < size {
            return self.queue(&layer);
        }
        if let Tail::Bytes(tail) = &chunked.tail {
            self.hasher.update(tail);
        }
        debug_assert_eq!(ByteRange::to(size).len(), self.offset);
        layer.verified(DiffId(self.hasher.finish()));
    }
}
