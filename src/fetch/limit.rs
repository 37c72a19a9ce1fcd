//! The bandwidth that fills may take: a bucket that fills up with time and lets bytes pass.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// What may pass at once after a pause, in time: short enough that nobody feels it, long enough for a chunk.
const BURST: Duration = Duration::from_millis(50);

/// No single piece counts as longer than this.
const LONGEST: Duration = Duration::from_secs(3600);

/// A limit, or none.
#[derive(Debug)]
pub(super) struct Limit {
    /// Bytes a second; 0 is as many as come.
    rate: AtomicU64,
    /// When everything that was let pass so far will have passed at this rate.
    until: Mutex<Option<Instant>>,
}

impl Limit {
    pub(super) fn new(rate: Option<u64>) -> Self {
        let limit = Self { rate: AtomicU64::new(0), until: Mutex::new(None) };
        limit.set(rate);
        limit
    }

    /// Counts for what comes from now on; who waits already waits as long as was said.
    pub(super) fn set(&self, rate: Option<u64>) {
        self.rate.store(rate.map_or(0, |rate| rate.max(1)), Ordering::Relaxed);
    }

    /// Waits until `bytes` may pass.
    pub(super) async fn pass(&self, bytes: u64) {
        if let Some(begin) = self.turn(bytes, Instant::now()) {
            sleep_until(begin).await;
        }
    }

    /// When `bytes` more may pass, if that is not now.
    fn turn(&self, bytes: u64, now: Instant) -> Option<Instant> {
        let rate = match self.rate.load(Ordering::Relaxed) {
            0 => return None,
            rate => u128::from(rate),
        };
        let takes = u128::from(bytes) * 1_000_000 / rate;
        let takes = Duration::from_micros(u64::try_from(takes).unwrap_or(u64::MAX)).min(LONGEST);
        let mut until = self.until.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = until.map_or(now, |until| until.max(now));
        *until = Some(begin + takes);
        begin.checked_sub(BURST).filter(|begin| *begin > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_pass_as_fast_as_they_may() {
        let limit = Limit::new(Some(1_000_000));
        let start = Instant::now();
        let mut now = start;
        let pass = |limit: &Limit, now: &mut Instant, bytes| {
            if let Some(begin) = limit.turn(bytes, *now) {
                *now = begin;
            }
        };
        for _ in 0..100 {
            pass(&limit, &mut now, 100_000);
        }
        let took = now - start;
        assert!((Duration::from_millis(9_800)..=Duration::from_secs(10)).contains(&took), "{took:?}");
        // A pause is not saved up.
        now += Duration::from_secs(60);
        let start = now;
        for _ in 0..20 {
            pass(&limit, &mut now, 100_000);
        }
        assert!(now - start >= Duration::from_millis(1_800));
        limit.set(None);
        assert_eq!(limit.turn(u64::MAX, now), None);
        assert_eq!(Limit::new(None).turn(u64::MAX, now), None);
        assert!(Limit::new(Some(1)).turn(u64::MAX, now).is_none(), "what comes first waits for nothing");
    }
}
