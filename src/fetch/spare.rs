//! Chunks that could not be written, kept in memory until they are read: what makes a full disk bearable. Those that only
//! came while the chunk's place was being evicted are written later.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::queue::Key;

/// A bounded cache of inflated chunks; the least recently used goes first, the newest is always kept.
#[derive(Debug)]
pub(super) struct Spare {
    limit: usize,
    /// How many there are: looked at before the lock, since there are none nearly always.
    len: AtomicUsize,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    chunks: HashMap<Key, Chunk>,
    bytes: usize,
    clock: u64,
    /// Chunks that are to be written when their place is free.
    refused: HashSet<Key>,
}

#[derive(Debug)]
struct Chunk {
    used: u64,
    data: Arc<[u8]>,
}

impl Spare {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, len: AtomicUsize::new(0), held: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn insert(&self, key: Key, data: &[u8]) {
        let mut held = self.lock();
        held.clock += 1;
        let used = held.clock;
        held.bytes += data.len();
        if let Some(old) = held.chunks.insert(key, Chunk { used, data: Arc::from(data) }) {
            held.bytes -= old.data.len();
        }
        while held.bytes > self.limit && held.chunks.len() > 1 {
            let oldest = held.chunks.iter().min_by_key(|(_, chunk)| chunk.used).map(|(key, _)| *key);
            let Some(oldest) = oldest else { break };
            held.remove(oldest);
        }
        self.len.store(held.chunks.len(), Ordering::Release);
    }

    /// The place of `key`, which is held, was being evicted: it is to be written later.
    pub(super) fn refused(&self, key: Key) {
        let mut held = self.lock();
        if held.chunks.contains_key(&key) {
            held.refused.insert(key);
        }
    }

    /// What is to be written now; it stays held.
    pub(super) fn take_refused(&self) -> Vec<(Key, Arc<[u8]>)> {
        if self.len.load(Ordering::Acquire) == 0 {
            return Vec::new();
        }
        let mut held = self.lock();
        let refused = std::mem::take(&mut held.refused);
        refused.into_iter().filter_map(|key| Some((key, Arc::clone(&held.chunks.get(&key)?.data)))).collect()
    }

    /// It was written.
    pub(super) fn remove(&self, key: Key) {
        if self.len.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut held = self.lock();
        held.remove(key);
        self.len.store(held.chunks.len(), Ordering::Release);
    }

    pub(super) fn get(&self, key: Key) -> Option<Arc<[u8]>> {
        if self.len.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut held = self.lock();
        held.clock += 1;
        let clock = held.clock;
        held.chunks.get_mut(&key).map(|chunk| {
            chunk.used = clock;
            Arc::clone(&chunk.data)
        })
    }

    /// Forgets everything of `layer`.
    pub(super) fn forget(&self, layer: u32) {
        if self.len.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut held = self.lock();
        let gone: Vec<Key> = held.chunks.keys().filter(|key| key.layer == layer).copied().collect();
        gone.into_iter().for_each(|key| held.remove(key));
        self.len.store(held.chunks.len(), Ordering::Release);
    }
}

impl Held {
    fn remove(&mut self, key: Key) {
        self.refused.remove(&key);
        if let Some(gone) = self.chunks.remove(&key) {
            self.bytes -= gone.data.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(chunk: u32) -> Key {
        Key { layer: chunk / 10, chunk }
    }

    fn kept(spare: &Spare) -> Vec<u32> {
        (0..40).filter(|chunk| spare.held.lock().unwrap().chunks.contains_key(&key(*chunk))).collect()
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let spare = Spare::new(100);
        for chunk in 1..=3 {
            spare.insert(key(chunk), &[0; 33]);
        }
        assert!(spare.get(key(1)).is_some());
        spare.insert(key(4), &[0; 33]);
        assert_eq!(kept(&spare), [1, 3, 4]);
        spare.insert(key(5), &[0; 1000]);
        assert_eq!(kept(&spare), [5], "the newest is kept whatever its size");
        spare.insert(key(5), &[0; 10]);
        spare.insert(key(6), &[0; 90]);
        assert_eq!(kept(&spare), [5, 6]);
    }

    #[test]
    fn a_layer_is_forgotten_as_a_whole() {
        let spare = Spare::new(100);
        for chunk in [5, 15, 16] {
            spare.insert(key(chunk), &[0; 10]);
        }
        spare.forget(1);
        assert_eq!(kept(&spare), [5]);
        assert_eq!(spare.held.lock().unwrap().bytes, 10);
    }

    #[test]
    fn what_was_refused_is_given_once_and_held_until_it_is_written() {
        let spare = Spare::new(100);
        for chunk in 1..=3 {
            spare.insert(key(chunk), &[u8::try_from(chunk).unwrap(); 10]);
        }
        spare.refused(key(2));
        spare.refused(key(3));
        spare.refused(key(7));
        spare.remove(key(3));
        let taken = spare.take_refused();
        assert_eq!(taken.iter().map(|(key, data)| (key.chunk, data[0])).collect::<Vec<_>>(), [(2, 2)]);
        assert!(spare.take_refused().is_empty());
        assert_eq!(kept(&spare), [1, 2]);
        spare.refused(key(2));
        spare.forget(0);
        assert!(spare.take_refused().is_empty() && kept(&spare).is_empty());
    }
}
