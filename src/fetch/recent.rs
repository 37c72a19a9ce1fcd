//! Which chunks of a layer were used of late, at the price of one load a read.
//!
//! A reader sets a bit, if it is not set; whoever needs room takes the bits of all layers now and then and puts them in
//! order ([`Ranks`]). So a chunk's rank is as exact as that is often, nobody writes anything down when he reads, and memory
//! is a few bits a chunk of an open layer and an entry a chunk that was read.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use lru::LruCache;

use super::queue::{Key, LayerId};
use crate::store::Pin;

/// A bit for each chunk of a layer.
#[derive(Debug)]
pub(super) struct ChunkBits(Box<[AtomicU64]>);

impl ChunkBits {
    pub(super) fn new(chunks: u32) -> Self {
        Self((0..chunks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, chunk: u32) -> Option<&AtomicU64> {
        usize::try_from(chunk / 64).ok().and_then(|word| self.0.get(word))
    }

    pub(super) fn has(&self, chunk: u32) -> bool {
        self.word(chunk).is_some_and(|word| word.load(Ordering::Relaxed) & (1 << (chunk % 64)) != 0)
    }

    /// True if it was not set before.
    pub(super) fn set(&self, chunk: u32) -> bool {
        let bit = 1_u64 << (chunk % 64);
        self.word(chunk).is_some_and(|word| {
            word.load(Ordering::Relaxed) & bit == 0 && word.fetch_or(bit, Ordering::Relaxed) & bit == 0
        })
    }

    /// The chunks whose bits are set; clears them.
    fn take(&self) -> Vec<u32> {
        let mut taken = Vec::new();
        for (number, word) in (0_u32..).zip(&self.0) {
            let mut bits = if word.load(Ordering::Relaxed) == 0 { 0 } else { word.swap(0, Ordering::Relaxed) };
            while bits != 0 {
                taken.push(number * 64 + bits.trailing_zeros());
                bits &= bits - 1;
            }
        }
        taken
    }
}

/// What a layer knows about the use of its chunks.
#[derive(Debug)]
pub(super) struct Recent {
    used: ChunkBits,
    metadata: ChunkBits,
    /// How many evictions have been taken note of.
    pub(super) evictions: AtomicU64,
    /// Held as soon as somebody was told where the whole image is.
    pub(super) pin: Mutex<Option<Pin>>,
}

impl Recent {
    pub(super) fn new(chunks: u32, evictions: u64) -> Self {
        Self {
            used: ChunkBits::new(chunks),
            metadata: ChunkBits::new(chunks),
            evictions: AtomicU64::new(evictions),
            pin: Mutex::new(None),
        }
    }

    pub(super) fn used(&self, chunks: Range<u32>) {
        for chunk in chunks {
            self.used.set(chunk);
        }
    }

    /// What looks at metadata has asked for these: they stay.
    pub(super) fn is_metadata(&self, chunks: Range<u32>) {
        for chunk in chunks {
            self.metadata.set(chunk);
        }
    }

    pub(super) fn holds_metadata(&self, chunk: u32) -> bool {
        self.metadata.has(chunk)
    }

    pub(super) fn take_used(&self) -> Vec<u32> {
        self.used.take()
    }
}

/// The order in which chunks were used, as far as that is known.
#[derive(Debug)]
pub(super) struct Ranks {
    /// Chunks that were used, the last one first, and the round in which that was noticed.
    used: LruCache<Key, u64>,
    round: u64,
    since: Option<Instant>,
}

/// What was used in this time may have been brought for somebody who has not read it yet.
const SHORTEST_ROUND: Duration = Duration::from_secs(1);

impl Default for Ranks {
    fn default() -> Self {
        Self { used: LruCache::unbounded(), round: 0, since: None }
    }
}

impl Ranks {
    /// Begins a new round, unless the one before has just begun.
    pub(super) fn turn(&mut self, now: Instant) {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= SHORTEST_ROUND) {
            self.round += 1;
            self.since = Some(now);
        }
    }

    /// Takes note that these were used since the last time.
    pub(super) fn note(&mut self, layer: LayerId, chunks: Vec<u32>) {
        for chunk in chunks {
            self.used.put(Key { layer, chunk }, self.round);
        }
    }

    /// Those of `there` that nobody has used, as they come, and then those that were used, the least recently used first;
    /// what was used in this round is left out.
    pub(super) fn coldest_first(&self, there: &[Key]) -> Vec<Key> {
        let mut order: Vec<Key> = there.iter().copied().filter(|key| !self.used.contains(key)).collect();
        let there: HashSet<Key> = there.iter().copied().collect();
        let used = self.used.iter().rev().take_while(|(_, round)| **round < self.round);
        order.extend(used.map(|(key, _)| *key).filter(|key| there.contains(key)));
        order
    }

    /// They are there no more.
    pub(super) fn forget(&mut self, keys: impl IntoIterator<Item = Key>) {
        for key in keys {
            self.used.pop(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bits_are_taken_once() {
        let bits = ChunkBits::new(130);
        for chunk in [0, 63, 64, 129, 129, 5000] {
            bits.set(chunk);
        }
        assert!(bits.has(64) && !bits.has(65) && !bits.has(5000));
        assert_eq!(bits.take(), [0, 63, 64, 129]);
        assert!(bits.take().is_empty());
    }

    #[derive(Debug, Clone)]
    enum Step {
        /// These are used.
        Use(Vec<u32>),
        /// The uses are noted, after so many milliseconds.
        Look(u64),
        /// The coldest so many of what is there go.
        Evict(usize),
        /// These come back.
        Bring(Vec<u32>),
    }

    const CHUNKS: u32 = 12;

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let some = || prop::collection::vec(0..CHUNKS, 0..5);
        let step = prop_oneof![
            4 => some().prop_map(Step::Use),
            2 => (0_u64..3000).prop_map(Step::Look),
            2 => (0_usize..5).prop_map(Step::Evict),
            1 => some().prop_map(Step::Bring),
        ];
        prop::collection::vec(step, 1..60)
    }

    proptest! {
        /// Against a list of all that ever happened.
        #[test]
        fn the_coldest_go_first(steps in steps()) {
            let recent = Recent::new(CHUNKS, 0);
            let (mut ranks, mut now) = (Ranks::default(), Instant::now());
            let mut there: Vec<bool> = vec![true; CHUNKS as usize];
            // When a use of each was noticed last: round, and place within it.
            let mut noticed: Vec<Option<(u64, usize)>> = vec![None; CHUNKS as usize];
            let (mut unnoticed, mut round, mut begun, mut place) = (std::collections::BTreeSet::new(), 0, None, 0);
            let at = |chunk: u32| chunk as usize;
            for step in steps {
                match step {
                    Step::Use(chunks) => {
                        for chunk in chunks {
                            recent.used(chunk..chunk + 1);
                            unnoticed.insert(chunk);
                        }
                    }
                    Step::Look(milliseconds) => {
                        now += Duration::from_millis(milliseconds);
                        ranks.turn(now);
                        ranks.note(1, recent.take_used());
                        if begun.is_none_or(|begun| now - begun >= Duration::from_secs(1)) {
                            (round, begun) = (round + 1, Some(now));
                        }
                        for chunk in std::mem::take(&mut unnoticed) {
                            place += 1;
                            noticed[at(chunk)] = Some((round, place));
                        }
                    }
                    Step::Evict(how_many) => {
                        let keys: Vec<Key> =
                            (0..CHUNKS).filter(|chunk| there[at(*chunk)]).map(|chunk| Key { layer: 1, chunk }).collect();
                        let order: Vec<u32> = ranks.coldest_first(&keys).iter().map(|key| key.chunk).collect();
                        let mut expected: Vec<u32> = (0..CHUNKS)
                            .filter(|chunk| there[at(*chunk)] && noticed[at(*chunk)].is_none_or(|(of, _)| of < round))
                            .collect();
                        expected.sort_by_key(|chunk| noticed[at(*chunk)].map_or((0, 0, *chunk), |(_, place)| (1, place, 0)));
                        prop_assert_eq!(&order, &expected);
                        for chunk in order.into_iter().take(how_many) {
                            ranks.forget([Key { layer: 1, chunk }]);
                            there[at(chunk)] = false;
                            noticed[at(chunk)] = None;
                        }
                    }
                    Step::Bring(chunks) => chunks.into_iter().for_each(|chunk| there[at(chunk)] = true),
                }
            }
        }
    }
}
