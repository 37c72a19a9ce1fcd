//! The threads that verify, inflate and hash: a few, the most urgent work first.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use super::Cause;

type Job = Box<dyn FnOnce() + Send>;

/// The pool. Dropped, it finishes what it was given.
pub(super) struct Cpu {
    pool: rayon::ThreadPool,
    jobs: Arc<Mutex<Jobs>>,
}

#[derive(Default)]
struct Jobs {
    waiting: BTreeMap<(Urgency, u64), Job>,
    next: u64,
}

/// What to do first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Urgency {
    /// A chunk that was wanted for this.
    Chunk(Cause),
    /// Hashing a layer as a whole: before the chunks of fills, because it is serial and would else be what is left at
    /// the end.
    Verify,
}

impl Urgency {
    fn rank(self) -> (Cause, bool) {
        match self {
            Self::Verify => (Cause::Fill, false),
            Self::Chunk(cause) => (cause, true),
        }
    }
}

impl PartialOrd for Urgency {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Urgency {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.rank().cmp(&other.rank())
    }
}

impl Cpu {
    pub(super) fn new(threads: usize) -> std::io::Result<Self> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|number| format!("fetch-cpu-{number}"))
            .build()
            .map_err(std::io::Error::other)?;
        Ok(Self { pool, jobs: Arc::default() })
    }

    /// Does `job` when a thread is free and nothing more urgent is left.
    pub(super) fn run(&self, urgency: Urgency, job: impl FnOnce() + Send + 'static) {
        {
            let mut jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
            jobs.next += 1;
            let key = (urgency, jobs.next);
            jobs.waiting.insert(key, Box::new(job));
        }
        // One turn per job: each turn does the most urgent job of its time.
        let jobs = Arc::clone(&self.jobs);
        self.pool.spawn(move || {
            let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).waiting.pop_first();
            let Some((_, job)) = job else { return };
            // An unwinding job would abort the process; what it promised is answered by the drop of its promises.
            if catch_unwind(AssertUnwindSafe(job)).is_err() {
                tracing::error!("a job of the fetch path has panicked");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn the_most_urgent_job_is_next() {
        let cpu = Cpu::new(1).unwrap();
        let (gate, wait) = mpsc::channel::<()>();
        let (started, is_running) = mpsc::channel();
        cpu.run(Urgency::Verify, move || {
            started.send(()).unwrap();
            wait.recv().unwrap();
        });
        is_running.recv().unwrap();
        let (sender, order) = mpsc::channel();
        for (urgency, name) in [
            (Urgency::Verify, "verify"),
            (Urgency::Chunk(Cause::Fill), "fill"),
            (Urgency::Chunk(Cause::Read), "read"),
            (Urgency::Chunk(Cause::Read), "second read"),
        ] {
            let sender = sender.clone();
            cpu.run(urgency, move || sender.send(name).unwrap());
        }
        drop(sender);
        gate.send(()).unwrap();
        assert_eq!(order.iter().collect::<Vec<_>>(), ["read", "second read", "verify", "fill"]);
    }

    #[test]
    fn a_panic_ends_one_job_only() {
        let cpu = Cpu::new(1).unwrap();
        cpu.run(Urgency::Verify, || panic!("on purpose"));
        let (sender, receiver) = mpsc::channel();
        cpu.run(Urgency::Verify, move || sender.send(7).unwrap());
        assert_eq!(receiver.recv().unwrap(), 7);
    }
}
