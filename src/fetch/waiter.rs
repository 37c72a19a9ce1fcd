//! A promise to whoever asked for bytes. It is answered exactly once; dropped, it is answered with a failure.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::FetchError;
use crate::model::{BlobDigest, ByteRange};

/// What is called with the answer.
pub(super) type Done = Box<dyn FnOnce(Result<(), Arc<FetchError>>) + Send>;

/// Somebody who waits for a number of chunks.
pub(super) struct Waiter {
    blob: BlobDigest,
    range: ByteRange,
    /// When the answer is due, if it ever is.
    due: Option<(Instant, Duration)>,
    left: AtomicUsize,
    done: Mutex<Option<Done>>,
}

impl Waiter {
    /// A waiter for `chunks` chunks, with `deadline` from now if there is one.
    pub(super) fn new(
        blob: BlobDigest,
        range: ByteRange,
        chunks: usize,
        deadline: Option<Duration>,
        done: impl FnOnce(Result<(), Arc<FetchError>>) + Send + 'static,
    ) -> Arc<Self> {
        let due = deadline.map(|deadline| (Instant::now() + deadline, deadline));
        Arc::new(Self { blob, range, due, left: AtomicUsize::new(chunks), done: Mutex::new(Some(Box::new(done))) })
    }

    /// One of the chunks is there, or will not come.
    pub(super) fn settle(&self, result: Result<(), Arc<FetchError>>) {
        match result {
            Err(error) => self.answer(Err(error)),
            Ok(()) => {
                if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    self.answer(Ok(()));
                }
            }
        }
    }

    /// True if the answer is overdue.
    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        self.due.is_some_and(|(due, _)| due <= now)
    }

    /// Answers that time is up.
    pub(super) fn expire(&self) {
        if let Some((_, deadline)) = self.due {
            self.answer(Err(Arc::new(FetchError::Deadline { blob: self.blob, range: self.range, deadline })));
        }
    }

    fn answer(&self, result: Result<(), Arc<FetchError>>) {
        let done = self.done.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(done) = done {
            done(result);
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let blob = self.blob;
        self.answer(Err(Arc::new(FetchError::Abandoned { blob })));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Algorithm, Digest};

    fn waiter(chunks: usize) -> (Arc<Waiter>, std::sync::mpsc::Receiver<Result<(), Arc<FetchError>>>) {
        let (sender, receiver) = std::sync::mpsc::channel();
        let blob = BlobDigest(Digest::of(Algorithm::Sha256, b""));
        let done = move |result| sender.send(result).unwrap();
        (Waiter::new(blob, ByteRange::to(1), chunks, Some(Duration::ZERO), done), receiver)
    }

    #[test]
    fn the_last_chunk_answers() {
        let (waiter, answers) = waiter(2);
        waiter.settle(Ok(()));
        assert!(answers.try_recv().is_err());
        waiter.settle(Ok(()));
        assert!(answers.recv().unwrap().is_ok());
        drop(waiter);
        assert!(answers.recv().is_err(), "answered twice");
    }

    #[test]
    fn the_first_failure_answers() {
        let (waiter, answers) = waiter(2);
        let failure = Arc::new(FetchError::Abandoned { blob: waiter.blob });
        waiter.settle(Err(Arc::clone(&failure)));
        waiter.settle(Ok(()));
        waiter.settle(Err(failure));
        assert!(answers.recv().unwrap().is_err());
        drop(waiter);
        assert!(answers.recv().is_err(), "answered twice");
    }

    #[test]
    fn a_dropped_promise_is_a_failure() {
        let (waiter, answers) = waiter(1);
        drop(waiter);
        assert!(matches!(*answers.recv().unwrap().unwrap_err(), FetchError::Abandoned { .. }));
    }

    #[test]
    fn time_runs_out_once() {
        let (waiter, answers) = waiter(1);
        assert!(waiter.is_overdue(Instant::now()));
        waiter.expire();
        assert!(matches!(*answers.recv().unwrap().unwrap_err(), FetchError::Deadline { .. }));
        waiter.settle(Ok(()));
        drop(waiter);
        assert!(answers.recv().is_err(), "answered twice");
    }
}
