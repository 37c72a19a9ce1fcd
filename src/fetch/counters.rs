//! What fetching a layer has cost so far.

use std::sync::atomic::{AtomicU64, Ordering};

/// What fetching a layer has cost, in this process, since it was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Counters {
    /// Bytes that came from the source, chunk index included.
    pub fetched: u64,
    /// Stored bytes of the chunks that readers have touched: what would have sufficed.
    pub needed: u64,
    /// Bytes of the image that readers asked for and got.
    pub read: u64,
    /// Chunks that arrived and were verified.
    pub chunks: u64,
    /// Requests sent.
    pub requests: u64,
    /// Requests sent again because the one before broke off.
    pub retries: u64,
    /// Chunks whose bytes were wrong.
    pub corrupt: u64,
    /// Chunks that found the disk full.
    pub disk_full: u64,
    /// Chunks that were evicted to make room.
    #[serde(default)]
    pub evicted: u64,
}

impl Counters {
    /// Adds what somebody else has counted.
    pub fn add(&mut self, other: &Self) {
        let Self { fetched, needed, read, chunks, requests, retries, corrupt, disk_full, evicted } = other;
        for (sum, more) in [
            (&mut self.fetched, fetched),
            (&mut self.needed, needed),
            (&mut self.read, read),
            (&mut self.chunks, chunks),
            (&mut self.requests, requests),
            (&mut self.retries, retries),
            (&mut self.corrupt, corrupt),
            (&mut self.disk_full, disk_full),
            (&mut self.evicted, evicted),
        ] {
            *sum = sum.saturating_add(*more);
        }
    }
}

/// The same, being counted.
#[derive(Debug, Default)]
pub(super) struct Counting {
    pub(super) fetched: AtomicU64,
    pub(super) needed: AtomicU64,
    pub(super) read: AtomicU64,
    pub(super) chunks: AtomicU64,
    pub(super) requests: AtomicU64,
    pub(super) retries: AtomicU64,
    pub(super) corrupt: AtomicU64,
    pub(super) disk_full: AtomicU64,
    pub(super) evicted: AtomicU64,
}

impl Counting {
    pub(super) fn snapshot(&self) -> Counters {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            fetched: of(&self.fetched),
            needed: of(&self.needed),
            read: of(&self.read),
            chunks: of(&self.chunks),
            requests: of(&self.requests),
            retries: of(&self.retries),
            corrupt: of(&self.corrupt),
            disk_full: of(&self.disk_full),
            evicted: of(&self.evicted),
        }
    }
}

pub(super) fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observe::FETCH_METRICS;

    #[test]
    fn every_counter_stands_in_the_table_of_names() {
        let counters = serde_json::to_value(Counters::default()).unwrap();
        let mut counted: Vec<&str> = counters.as_object().unwrap().keys().map(String::as_str).collect();
        let mut named: Vec<&str> = FETCH_METRICS.iter().map(|metric| metric.name).collect();
        counted.sort_unstable();
        named.sort_unstable();
        assert_eq!(counted, named);
    }
}
