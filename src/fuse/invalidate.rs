//! Telling the kernel what it must not believe any more.
//!
//! A notification may have to wait until the requests in a directory are answered, so a thread of its own sends them:
//! neither who makes a change nor who answers requests waits for the kernel.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use fuser::{INodeNo, Notifier};

use crate::vfs::KernelCache;

enum Change {
    Name { dir: u64, name: Box<[u8]> },
    Listing { dir: u64 },
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Change>,
    /// One is being sent.
    busy: bool,
    /// There is nobody left to tell.
    closed: bool,
}

/// What the kernel is still to be told.
#[derive(Default)]
pub(super) struct Invalidations {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Invalidations {
    /// Sends through `notifier` until [`Self::close`].
    pub(super) fn start(notifier: Notifier) -> io::Result<Arc<Self>> {
        let invalidations = Arc::new(Self::default());
        let sending = Arc::clone(&invalidations);
        thread::Builder::new().name("fuse-invalidate".into()).spawn(move || sending.send(&notifier))?;
        Ok(invalidations)
    }

    fn send(&self, notifier: &Notifier) {
        loop {
            let change = {
                let mut queue = self.queue();
                queue.busy = false;
                self.changed.notify_all();
                loop {
                    if queue.closed {
                        return;
                    }
                    if let Some(change) = queue.waiting.pop_front() {
                        queue.busy = true;
                        break change;
                    }
                    queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                }
            };
            let sent = match &change {
                Change::Name { dir, name } => notifier.inval_entry(INodeNo(*dir), OsStr::from_bytes(name)),
                Change::Listing { dir } => notifier.inval_inode(INodeNo(*dir), 0, 0),
            };
            if let Err(error) = sent {
                // The kernel has nothing to forget, or there is no mount any more.
                let error: &dyn std::error::Error = &error;
                tracing::debug!(error, "the kernel was not told of a change");
            }
        }
    }

    /// Waits until the kernel was told everything, at most for `patience`; false if it was not.
    pub(super) fn settle(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut queue = self.queue();
        while !queue.closed && (queue.busy || !queue.waiting.is_empty()) {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            (queue, _) = self.changed.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    /// Ends the thread.
    pub(super) fn close(&self) {
        self.queue().closed = true;
        self.changed.notify_all();
    }

    fn push(&self, change: Change) {
        let mut queue = self.queue();
        if !queue.closed {
            queue.waiting.push_back(change);
            drop(queue);
            self.changed.notify_all();
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KernelCache for Invalidations {
    fn name_changed(&self, dir: u64, name: &[u8]) {
        self.push(Change::Name { dir, name: name.into() });
    }

    fn listing_changed(&self, dir: u64) {
        self.push(Change::Listing { dir });
    }
}
