//! A layer is hashed as a whole, once, in the order of its image: only then is it local.
//!
//! While a fill is under way its chunks are hashed as they land, in order. What lands before its turn is held in memory
//! as far as a budget allows ([`Hold`]), and read back from the page cache otherwise; so when the last chunk has landed
//! little is left to hash, and the disk is not read again. A layer that was completed by reads alone, or by a process
//! before, is read and hashed when it is complete.
//!
//! Each chunk has been verified before, so another hash than expected means that the local copy was damaged after it
//! was written, or that index and diffID of the image contradict each other. The first time the copy is distrusted and
//! every chunk fetched anew; if the same hash comes out again, the image is what contradicts itself: its chunks are
//! still what its index says, and are served, but the layer never counts as local.
//!
//! Nobody's look is lost: whoever lands a chunk marks it before he takes the lock of [`Hashing`], and whoever stops hashing
//! for want of a chunk has looked at its mark under that lock. What other processes land is found by whoever sweeps, once a
//! second.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::SystemTime;

use super::cpu::Urgency;
use super::pieces::{Chunked, Tail};
use super::{FetchError, LayerImage, Standing};
use crate::model::{Algorithm, DiffId, Hasher};
use crate::store::{StoreError, Verdict};

/// Bytes hashed at a time: a thread of the pool is busy for some milliseconds, then more urgent work has its turn.
const STEP: u64 = 4 << 20;

/// Bytes read at a time.
const BUFFER: usize = 256 << 10;

/// Buffers kept to be used again.
const FREE_BUFFERS: usize = 4;

/// Chunks that have landed before their turn to be hashed.
#[derive(Debug)]
pub(super) struct Hold {
    left: AtomicUsize,
    free: Mutex<Vec<Vec<u8>>>,
}

impl Hold {
    /// Room for `bytes` bytes, over all layers.
    pub(super) fn new(bytes: usize) -> Self {
        Self { left: AtomicUsize::new(bytes), free: Mutex::default() }
    }

    /// Takes the content of `chunk`, for which it gives another buffer. None if there is no room.
    fn take(&self, chunk: &mut Vec<u8>) -> Option<Vec<u8>> {
        let len = chunk.len();
        self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, |left| left.checked_sub(len)).ok()?;
        let mut other = self.free.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        other.clear();
        Some(std::mem::replace(chunk, other))
    }

    fn give_back(&self, chunk: Vec<u8>) {
        self.left.fetch_add(chunk.len(), Ordering::AcqRel);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < FREE_BUFFERS {
            free.push(chunk);
        }
    }
}

/// How far a layer has been hashed.
pub(super) struct Hashing(Mutex<State>);

struct State {
    /// None while a thread hashes, and when all of it is done.
    hasher: Option<Hasher>,
    /// The first chunk that has not been hashed.
    next: u32,
    held: BTreeMap<u32, Vec<u8>>,
    /// How often hashing has begun at the start: a thread that hashes what was given up since stops.
    begun: u64,
}

impl Hashing {
    pub(super) fn new(algorithm: Algorithm) -> Self {
        Self(Mutex::new(State { hasher: Some(Hasher::new(algorithm)), next: 0, held: BTreeMap::new(), begun: 0 }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives up what is held.
    pub(super) fn forget(&self, hold: &Hold) {
        let held = std::mem::take(&mut self.lock().held);
        held.into_values().for_each(|chunk| hold.give_back(chunk));
    }
}

impl State {
    fn can_go_on(&self, chunked: &Chunked) -> bool {
        if self.next == chunked.index.len() {
            return chunked.is_complete();
        }
        self.held.contains_key(&self.next) || chunked.file.is_present(self.next)
    }
}

impl LayerImage {
    /// Begins to verify the layer if all of it is here and nobody has done so. Cheap enough for every read.
    pub(super) fn check_complete(&self) {
        let Some(chunked) = self.chunked() else { return };
        self.notice_evictions(chunked);
        if !chunked.judged.load(Ordering::Acquire) && chunked.is_complete() {
            self.hash_on(chunked);
        }
    }

    /// The same for a layer whose verification broke off before: reads do not try that again, fills do.
    pub(super) fn verify_again(&self) {
        self.stands_no_more(|standing| matches!(standing, Standing::Failed(_)));
        self.check_complete();
    }

    /// A chunk has landed while a fill is under way: it is hashed now or soon. Takes the content if that is not now.
    pub(super) fn hash_landed(&self, chunk: u32, content: &mut Vec<u8>) {
        let Some(chunked) = self.chunked() else { return };
        if chunked.filling.load(Ordering::Relaxed) == 0 {
            return;
        }
        {
            let mut state = chunked.hashing.lock();
            if chunk >= state.next
                && !state.held.contains_key(&chunk)
                && let Some(content) = self.shared.hold.take(content)
            {
                state.held.insert(chunk, content);
            }
        }
        self.hash_on(chunked);
    }

    /// Has the chunks hashed whose turn it is, if nobody does that already.
    pub(super) fn hash_on(&self, chunked: &Chunked) {
        if chunked.judged.load(Ordering::Acquire) {
            return;
        }
        let (hasher, begun) = {
            let mut state = chunked.hashing.lock();
            (if state.can_go_on(chunked) { state.hasher.take() } else { None }, state.begun)
        };
        if hasher.is_some() {
            Turn { layer: Weak::clone(&self.me), hasher, begun }.queue(self);
        }
    }

    fn verified(self: &Arc<Self>, found: DiffId) {
        let Some(chunked) = self.chunked() else { return };
        let verdict = self.judge(chunked, found);
        let layer = Arc::clone(self);
        // Waits for the disk.
        drop(self.shared.runtime.spawn_blocking(move || {
            let Some(chunked) = layer.chunked() else { return };
            let blob = layer.spec.blob;
            match chunked.file.set_verdict(verdict) {
                Ok(true) => {}
                Ok(false) => return layer.begin_anew(chunked),
                Err(error) => {
                    let shown: &dyn std::error::Error = &error;
                    tracing::warn!(%blob, error = shown, "what was found out about a complete layer is not kept");
                    layer.verification_failed(chunked, FetchError::Store { blob, source: error });
                    return;
                }
            }
            match verdict {
                Verdict::Verified(_) => {
                    tracing::info!(%blob, "the layer is complete and verified");
                    layer.stands(Standing::Local { since: SystemTime::now() });
                    layer.is_still_local(chunked);
                }
                Verdict::Contradicted(found) => layer.stands(Standing::Contradicted(found)),
                Verdict::Quarantined(_) | Verdict::Unverified => {
                    layer.hash_from_the_start(chunked);
                    layer.stands(Standing::Distrusted(found));
                }
            }
        }));
    }

    /// Chunks went before it was noted that all of it is verified.
    fn begin_anew(&self, chunked: &Chunked) {
        self.hash_from_the_start(chunked);
        self.check_complete();
    }

    pub(super) fn hash_from_the_start(&self, chunked: &Chunked) {
        chunked.start_over();
        chunked.hashing.forget(&self.shared.hold);
        let mut state = chunked.hashing.lock();
        state.next = 0;
        state.begun += 1;
        state.hasher = Some(Hasher::new(self.spec.diff_id.0.algorithm()));
    }

    fn verification_failed(&self, chunked: &Chunked, error: FetchError) {
        self.hash_from_the_start(chunked);
        self.stands(Standing::Failed(Arc::new(error)));
    }

    fn judge(&self, chunked: &Chunked, found: DiffId) -> Verdict {
        let (blob, expected) = (self.spec.blob, self.spec.diff_id);
        if found == expected {
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

/// The one thread's turn that hashes a layer. Dropped with the hasher inside, hashing has failed.
struct Turn {
    layer: Weak<LayerImage>,
    hasher: Option<Hasher>,
    /// See [`State::begun`].
    begun: u64,
}

impl Turn {
    fn queue(self, layer: &LayerImage) {
        layer.shared.cpu.run(Urgency::Verify, move || self.step());
    }

    fn step(mut self) {
        let Some(layer) = self.layer.upgrade() else { return };
        let (Some(chunked), Some(mut hasher)) = (layer.chunked(), self.hasher.take()) else { return };
        let mut hashed = 0;
        while hashed < STEP {
            let (chunk, held) = {
                let mut state = chunked.hashing.lock();
                if state.begun != self.begun {
                    return;
                }
                if !state.can_go_on(chunked) {
                    // Whoever lands the next chunk marks it first and looks here then.
                    state.hasher = Some(hasher);
                    return;
                }
                let chunk = state.next;
                (chunk, state.held.remove(&chunk))
            };
            if chunk == chunked.index.len() {
                if let Tail::Bytes(tail) = &chunked.tail {
                    hasher.update(tail);
                }
                return layer.verified(DiffId(hasher.finish()));
            }
            match held {
                Some(content) => {
                    hasher.update(&content);
                    hashed += content.len() as u64;
                    layer.shared.hold.give_back(content);
                }
                None => {
                    let before = hasher.clone();
                    match read_back(chunked, chunk, &mut hasher) {
                        Ok(Some(len)) => hashed += len,
                        // It was evicted, and is waited for.
                        Ok(None) => {
                            hasher = before;
                            continue;
                        }
                        Err(source) => {
                            let (blob, error): (_, &dyn std::error::Error) = (layer.spec.blob, &source);
                            tracing::warn!(%blob, error, "a complete layer cannot be verified");
                            return layer.verification_failed(chunked, FetchError::Verify { blob, source });
                        }
                    }
                }
            }
            let mut state = chunked.hashing.lock();
            if state.begun == self.begun {
                state.next = chunk + 1;
            }
        }
        self.hasher = Some(hasher);
        self.queue(&layer);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if self.hasher.is_some()
            && let Some(layer) = self.layer.upgrade()
            && let Some(chunked) = layer.chunked()
        {
            layer.verification_failed(chunked, FetchError::Abandoned { blob: layer.spec.blob });
        }
    }
}

/// Hashes a chunk from the disk; none if it was evicted meanwhile.
fn read_back(chunked: &Chunked, chunk: u32, hasher: &mut Hasher) -> Result<Option<u64>, StoreError> {
    let Some(range) = chunked.index.chunk(chunk).map(|chunk| chunk.image) else { return Ok(Some(0)) };
    let mut buffer = vec![0; BUFFER.min(usize::try_from(range.len()).unwrap_or(BUFFER))];
    let mut offset = range.start();
    while offset < range.end() {
        let len = usize::try_from(range.end() - offset).unwrap_or(BUFFER).min(BUFFER);
        let Some(part) = buffer.get_mut(..len) else { break };
        if !chunked.file.read_present(chunk..chunk + 1, offset, part)? {
            return Ok(None);
        }
        hasher.update(part);
        offset += len as u64;
    }
    Ok(Some(range.len()))
}
