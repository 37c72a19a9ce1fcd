//! The memory that stored bytes under way may take. Whoever reads bytes from the network holds a permit for them until
//! they are written, and stops reading without one: that is how a slow disk slows the network down.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Cause;

/// The budget.
#[derive(Debug)]
pub(super) struct Budget {
    all: Arc<Semaphore>,
    total: u32,
    background: Arc<Semaphore>,
    background_total: u32,
}

/// Given back when dropped.
#[derive(Debug)]
pub(super) struct Permit {
    _all: OwnedSemaphorePermit,
    _background: Option<OwnedSemaphorePermit>,
}

impl Budget {
    /// A budget of `bytes`, a quarter of which is kept for those who wait.
    pub(super) fn new(bytes: u32) -> Self {
        let total = bytes.max(4);
        let background_total = total - total / 4;
        let semaphore = |permits: u32| Arc::new(Semaphore::new(usize::try_from(permits).unwrap_or(usize::MAX >> 3)));
        Self { all: semaphore(total), total, background: semaphore(background_total), background_total }
    }

    /// Waits for `bytes`, or for everything there is if that is less: a huge chunk travels alone.
    pub(super) async fn take(&self, bytes: u64, cause: Cause) -> Permit {
        let capped = |limit: u32| u32::try_from(bytes).unwrap_or(limit).min(limit);
        let background =
            if cause.is_demand() { None } else { Some(acquire(&self.background, capped(self.background_total)).await) };
        Permit { _all: acquire(&self.all, capped(self.total)).await, _background: background }
    }

    /// Bytes that nobody holds.
    #[cfg(test)]
    pub(super) fn free(&self) -> usize {
        self.all.available_permits()
    }
}

async fn acquire(semaphore: &Arc<Semaphore>, permits: u32) -> OwnedSemaphorePermit {
    Arc::clone(semaphore).acquire_many_owned(permits).await.expect("the budget is never closed")
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[test]
    fn the_background_leaves_room_for_those_who_wait() {
        let budget = Budget::new(100);
        let first = budget.take(75, Cause::Fill).now_or_never().unwrap();
        assert!(budget.take(1, Cause::ReadAhead).now_or_never().is_none());
        let second = budget.take(25, Cause::Read).now_or_never().unwrap();
        assert!(budget.take(1, Cause::Read).now_or_never().is_none());
        drop(first);
        let third = budget.take(75, Cause::Read).now_or_never().unwrap();
        drop((second, third));
        assert_eq!(budget.free(), 100);
    }

    #[test]
    fn more_than_everything_is_everything() {
        let budget = Budget::new(100);
        for cause in [Cause::Read, Cause::Fill] {
            let all = budget.take(u64::MAX, cause).now_or_never().unwrap();
            drop(all);
        }
        assert_eq!(budget.free(), 100);
    }
}
