//! Chunks that could not be written, kept in memory until they are read: what makes a full disk bearable.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

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
    chunks: HashMap<Key, (u64, Arc<[u8]>)>,
    bytes: usize,
    clock: u64,
}

impl Spare {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, len: AtomicUsize::new(0), held: Mutex::default() }
    }

    pub(super) fn insert(&self, key: Key, data: &[u8]) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.clock += 1;
        let clock = held.clock;
        held.bytes += data.len();
        if let Some((_, old)) = held.chunks.insert(key, (clock, Arc::from(data))) {
            held.bytes -= old.len();
        }
        while held.bytes > self.limit && held.chunks.len() > 1 {
            let oldest = held.chunks.iter().min_by_key(|(_, (used, _))| *used).map(|(key, _)| *key);
            let Some((_, gone)) = oldest.and_then(|key| held.chunks.remove(&key)) else { break };
            held.bytes -= gone.len();
        }
        self.len.store(held.chunks.len(), Ordering::Release);
    }

    pub(super) fn get(&self, key: Key) -> Option<Arc<[u8]>> {
        if self.len.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.clock += 1;
        let clock = held.clock;
        held.chunks.get_mut(&key).map(|(used, data)| {
            *used = clock;
            Arc::clone(data)
        })
    }

    /// Forgets everything of `layer`.
    pub(super) fn forget(&self, layer: u32) {
        if self.len.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.chunks.retain(|key, _| key.layer != layer);
        held.bytes = held.chunks.values().map(|(_, data)| data.len()).sum();
        self.len.store(held.chunks.len(), Ordering::Release);
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
}
