//! The bandwidth that fills may take: a bucket that fills up with time and lets bytes pass.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
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
    changed: Notify,
}

impl Limit {
    pub(super) fn new(rate: Option<u64>) -> Self {
        let limit = Self { rate: AtomicU64::new(0), until: Mutex::new(None), changed: Notify::new() };
        limit.set(rate);
        limit
    }

    /// Counts from now on, also for who waits already: a limit that was much too low does not last.
    pub(super) fn set(&self, rate: Option<u64>) {
        let rate = rate.map_or(0, |rate| rate.max(1));
        if self.rate.swap(rate, Ordering::Relaxed) != rate {
            *self.until.lock().unwrap_or_else(PoisonError::into_inner) = None;
            self.changed.notify_waiters();
        }
    }

    /// Waits until `bytes` may pass.
    pub(super) async fn pass(&self, bytes: u64) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // From here on no change is missed.
            changed.as_mut().enable();
            let Some(begin) = self.turn(bytes, Instant::now()) else { return };
            tokio::select! {
                () = sleep_until(begin) => return,
                () = changed => {}
            }
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
    use futures::FutureExt as _;

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

    #[test]
    fn another_limit_counts_for_those_who_wait() {
        for other in [None, Some(u64::MAX)] {
            let limit = Limit::new(Some(1));
            limit.pass(u64::MAX).now_or_never().expect("what comes first waits for nothing");
            let mut waits = Box::pin(limit.pass(1_000_000));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
            runtime.block_on(async {
                assert!((&mut waits).now_or_never().is_none());
                limit.set(other);
                waits.await;
            });
        }
    }
}
