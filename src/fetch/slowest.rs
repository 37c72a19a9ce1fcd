//! The reads of a layer that waited longest.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::model::ByteRange;

/// How many are remembered.
const REMEMBERED: usize = 5;

/// A read that had to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlowRead {
    /// The bytes of the image that were asked for.
    pub range: ByteRange,
    /// How long it took until they could be read, or would not come.
    pub waited: Duration,
}

/// The slowest ones, the slowest first.
#[derive(Debug, Default)]
pub(super) struct Slowest(Mutex<Vec<SlowRead>>);

impl Slowest {
    pub(super) fn note(&self, read: SlowRead) {
        let mut slowest = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let place = slowest.partition_point(|known| known.waited >= read.waited);
        if place < REMEMBERED {
            slowest.insert(place, read);
            slowest.truncate(REMEMBERED);
        }
    }

    pub(super) fn list(&self) -> Vec<SlowRead> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_are_remembered_in_order() {
        let slowest = Slowest::default();
        for millis in [3, 9, 1, 7, 5, 8, 2, 9] {
            slowest.note(SlowRead { range: ByteRange::to(millis), waited: Duration::from_millis(millis) });
        }
        let waited: Vec<_> = slowest.list().iter().map(|read| read.waited.as_millis()).collect();
        assert_eq!(waited, [9, 9, 8, 7, 5]);
    }
}
