//! Byte strings, each kept once and named by a small number. File names, attributes and symlink targets repeat a lot
//! in a layer; this is what keeps half a million files in tens of megabytes.

use std::hash::{BuildHasher, RandomState};

/// No string.
const VACANT: u32 = u32::MAX;

/// A set of byte strings with stable numbers, counted from 0 in the order of their arrival.
#[derive(Debug, Default)]
pub(super) struct Interner {
    bytes: Vec<u8>,
    /// Where each string ends in `bytes`; it begins where the one before ends.
    ends: Vec<u32>,
    /// Open addressing with linear probing, a power of two long, at most three quarters full.
    table: Vec<u32>,
    hasher: RandomState,
}

impl Interner {
    /// The number of `string`, new or old; none if 4 GiB are exceeded.
    pub(super) fn intern(&mut self, string: &[u8]) -> Option<u32> {
        if (self.ends.len() + 1) * 4 > self.table.len() * 3 {
            self.grow();
        }
        let slot = self.slot_of(string);
        let found = self.table[slot];
        if found != VACANT {
            return Some(found);
        }
        let end = u32::try_from(self.bytes.len() + string.len()).ok()?;
        let id = u32::try_from(self.ends.len()).ok().filter(|id| *id != VACANT)?;
        self.bytes.extend_from_slice(string);
        self.ends.push(end);
        self.table[slot] = id;
        Some(id)
    }

    /// The number of `string` if it is here.
    pub(super) fn find(&self, string: &[u8]) -> Option<u32> {
        if self.table.is_empty() {
            return None;
        }
        Some(self.table[self.slot_of(string)]).filter(|id| *id != VACANT)
    }

    /// The string with number `id`, which this set must have given.
    pub(super) fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = if id == 0 { 0 } else { self.ends[id - 1] as usize };
        &self.bytes[start..self.ends[id] as usize]
    }

    /// How many strings there are.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The slot that holds `string`, or the vacant one where it belongs.
    fn slot_of(&self, string: &[u8]) -> usize {
        let mask = self.table.len() - 1;
        let [low, high] = [0, 32].map(|shift| (self.hasher.hash_one(string) >> shift) & 0xffff_ffff);
        let mut slot = usize::try_from(low ^ high).unwrap_or_default() & mask;
        while self.table[slot] != VACANT && self.get(self.table[slot]) != string {
            slot = (slot + 1) & mask;
        }
        slot
    }

    fn grow(&mut self) {
        let size = (self.table.len() * 2).max(64);
        self.table.clear();
        self.table.resize(size, VACANT);
        for id in 0..self.ends.len() {
            let id = u32::try_from(id).expect("numbers of strings have 32 bits");
            let slot = self.slot_of(self.get(id));
            self.table[slot] = id;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_keep_their_numbers() {
        let mut strings = Interner::default();
        assert_eq!(strings.find(b"a"), None);
        let numbers: Vec<u32> = (0..1000).map(|i| strings.intern(format!("{i}").as_bytes()).unwrap()).collect();
        assert_eq!(numbers, (0..1000).collect::<Vec<_>>());
        assert_eq!(strings.intern(b"17"), Some(17));
        assert_eq!(strings.intern(b""), Some(1000));
        assert_eq!(strings.find(b""), Some(1000));
        assert_eq!(strings.find(b"1000"), None);
        assert_eq!(strings.len(), 1001);
        assert!((0..1000).all(|i| strings.get(i) == format!("{i}").as_bytes()));
    }
}
