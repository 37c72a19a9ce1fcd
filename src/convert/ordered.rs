//! Jobs on a pool whose results come back in the order in which they were started, with a bound on what is under way.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, sync_channel};

use rayon::ThreadPool;

/// Bytes of input that may be under way. Enough for thirty cores at the chunk sizes of layers; what a conversion holds
/// besides its tree is about twice this.
const MAX_WEIGHT: usize = 32 << 20;

/// Jobs under way. Dropping it forgets their results.
pub(super) struct Ordered<'p, T> {
    pool: &'p ThreadPool,
    jobs: VecDeque<(usize, Ticket<T>)>,
    weight: usize,
}

enum Ticket<T> {
    Started(Receiver<T>),
    Done(T),
}

impl<'p, T: Send + 'static> Ordered<'p, T> {
    /// No jobs, to run on `pool`. On a thread of the pool itself each job is done at once: waiting there for other
    /// threads of the pool could wait for ever.
    pub(super) fn new(pool: &'p ThreadPool) -> Self {
        Self { pool, jobs: VecDeque::new(), weight: 0 }
    }

    /// True if a result should be taken before the next job is started. The number of jobs is bounded as well: small
    /// ones would otherwise pile up behind a large one.
    pub(super) fn is_full(&self) -> bool {
        self.weight >= MAX_WEIGHT || self.jobs.len() > 4 * self.pool.current_num_threads()
    }

    /// Starts a job on `weight` bytes.
    pub(super) fn start(&mut self, weight: usize, job: impl FnOnce() -> T + Send + 'static) {
        let ticket = if self.pool.current_thread_index().is_some() {
            Ticket::Done(job())
        } else {
            let (result, ticket) = sync_channel(1);
            // Nobody may be waiting any more, after an error.
            self.pool.spawn_fifo(move || result.send(job()).unwrap_or_default());
            Ticket::Started(ticket)
        };
        self.weight += weight;
        self.jobs.push_back((weight, ticket));
    }

    /// The result of the oldest job, which is waited for; none if there are no jobs.
    pub(super) fn take(&mut self) -> Option<T> {
        let (weight, ticket) = self.jobs.pop_front()?;
        self.weight -= weight;
        Some(match ticket {
            Ticket::Done(result) => result,
            Ticket::Started(ticket) => ticket.recv().expect("a job answers unless it panicked, which ends the program"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_and_no_more_than_allowed_is_under_way() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        let square_all = || {
            let mut jobs = Ordered::new(&pool);
            let mut results = Vec::new();
            for i in 0..1000_u64 {
                while jobs.is_full() {
                    results.extend(jobs.take());
                }
                jobs.start(usize::try_from(i).unwrap() << 10, move || i * i);
                assert!(jobs.jobs.len() <= 13);
            }
            while let Some(result) = jobs.take() {
                results.push(result);
            }
            assert_eq!(jobs.weight, 0);
            results
        };
        let expected: Vec<u64> = (0..1000).map(|i| i * i).collect();
        assert_eq!(square_all(), expected);
        assert_eq!(pool.install(square_all), expected, "on a thread of the pool");
    }
}
