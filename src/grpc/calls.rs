//! What calls have cost: how many, how many failed, how long they took.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::observe::{CALL_SECONDS, CALLS, CALLS_LEN};

/// What calls of each name have cost since the beginning; the names are those of [`CALLS`].
#[derive(Debug, Default)]
pub struct Calls([Counted; CALLS_LEN]);

#[derive(Debug, Default)]
struct Counted {
    failed: AtomicU64,
    micros: AtomicU64,
    /// By the bounds of [`CALL_SECONDS`]; the last are those above all of them.
    within: [AtomicU64; CALL_SECONDS.len() + 1],
}

/// What calls of one name have cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Those that failed.
    pub failed: u64,
    /// Time they took, together.
    pub time: Duration,
    /// How many took no longer than each bound of [`CALL_SECONDS`]; the last number is all of them.
    pub within: [u64; CALL_SECONDS.len() + 1],
}

impl Calls {
    /// Counts a call of this name, which took `time`.
    pub(super) fn count(&self, name: &'static str, time: Duration, failed: bool) {
        let Some(counted) = CALLS.iter().position(|of| *of == name).and_then(|number| self.0.get(number)) else {
            return;
        };
        counted.failed.fetch_add(u64::from(failed), Ordering::Relaxed);
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        counted.micros.fetch_add(micros, Ordering::Relaxed);
        let bound = CALL_SECONDS.iter().position(|bound| time.as_secs_f64() <= *bound).unwrap_or(CALL_SECONDS.len());
        counted.within[bound].fetch_add(1, Ordering::Relaxed);
    }

    /// All names with what their calls have cost.
    pub fn tallies(&self) -> impl Iterator<Item = (&'static str, Tally)> {
        CALLS.iter().copied().zip(self.0.iter().map(Counted::tally))
    }
}

impl Counted {
    fn tally(&self) -> Tally {
        let mut sum = 0;
        let within = std::array::from_fn(|number| {
            sum += self.within[number].load(Ordering::Relaxed);
            sum
        });
        let time = Duration::from_micros(self.micros.load(Ordering::Relaxed));
        Tally { failed: self.failed.load(Ordering::Relaxed), time, within }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_by_name_and_time() {
        let calls = Calls::default();
        calls.count("prepare", Duration::from_micros(500), false);
        calls.count("prepare", Duration::from_millis(50), true);
        calls.count("prepare", Duration::from_secs(3600), false);
        calls.count("no such call", Duration::ZERO, false);
        let tallies: Vec<(&str, Tally)> = calls.tallies().collect();
        assert_eq!(tallies.len(), CALLS.len());
        for (name, tally) in tallies {
            if name != "prepare" {
                assert_eq!(tally, Tally::default(), "{name}");
                continue;
            }
            assert_eq!(tally.failed, 1);
            assert_eq!(tally.time, Duration::from_micros(3_600_050_500));
            let expected = CALL_SECONDS.map(|bound| u64::from(bound >= 0.0005) + u64::from(bound >= 0.05));
            assert_eq!((&tally.within[..CALL_SECONDS.len()], tally.within[CALL_SECONDS.len()]), (&expected[..], 3));
        }
    }
}
