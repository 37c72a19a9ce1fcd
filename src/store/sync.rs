//! The thread that makes marks last, away from everybody who reads or writes.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{BlobFile, StoreError};

/// Owns the list of images that hold unsynced chunks.
#[derive(Debug)]
pub(super) struct Syncer {
    interval: Duration,
    bytes: u64,
    /// Bytes that were written, over all images.
    written: AtomicU64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    dirty: Vec<Arc<BlobFile>>,
    /// When the oldest entry came.
    since: Option<Instant>,
    urgent: bool,
    stopped: bool,
    thread: Option<JoinHandle<()>>,
}

impl Syncer {
    pub(super) fn start(interval: Duration, bytes: u64) -> Result<Arc<Self>, StoreError> {
        let (written, state) = (AtomicU64::new(0), Mutex::default());
        let syncer = Arc::new(Self { interval, bytes, written, state, changed: Condvar::new() });
        let of_thread = Arc::clone(&syncer);
        let thread = std::thread::Builder::new()
            .name("store-sync".to_owned())
            .spawn(move || of_thread.run())
            .map_err(|error| StoreError::io("start a thread for", "the store", error))?;
        syncer.lock().thread = Some(thread);
        Ok(syncer)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn count(&self, len: u64) {
        self.written.fetch_add(len, Ordering::Relaxed);
    }

    pub(super) fn bytes_written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Takes note of `len` bytes written to `file`, which had `before` unsynced ones.
    pub(super) fn written(&self, file: &Arc<BlobFile>, before: u64, len: u64) {
        self.count(len);
        let urgent = before < self.bytes && before.saturating_add(len) >= self.bytes;
        if before > 0 && !urgent {
            return;
        }
        let mut state = self.lock();
        if state.stopped {
            return;
        }
        if !state.dirty.iter().any(|known| Arc::ptr_eq(known, file)) {
            state.dirty.push(Arc::clone(file));
        }
        state.since.get_or_insert_with(Instant::now);
        state.urgent |= urgent;
        self.changed.notify_all();
    }

    fn run(&self) {
        let mut state = self.lock();
        loop {
            let due = state.since.map(|since| since + self.interval);
            let now = Instant::now();
            let wait = match due {
                None if state.stopped => return,
                None => None,
                Some(due) if state.urgent || state.stopped || due <= now => {
                    let dirty = std::mem::take(&mut state.dirty);
                    (state.since, state.urgent) = (None, false);
                    drop(state);
                    dirty.iter().for_each(|file| sync_one(file));
                    drop(dirty);
                    state = self.lock();
                    continue;
                }
                Some(due) => Some(due - now),
            };
            state = match wait {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(time) => self.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
    }

    /// Syncs what is left and ends the thread.
    pub(super) fn stop(&self) {
        let thread = {
            let mut state = self.lock();
            state.stopped = true;
            self.changed.notify_all();
            state.thread.take()
        };
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the thread that syncs the store has panicked");
        }
    }
}

fn sync_one(file: &BlobFile) {
    if let Err(error) = file.sync() {
        complain(file.dir(), &error);
    }
}

pub(super) fn complain(image: &Path, error: &StoreError) {
    let (path, error): (_, &dyn std::error::Error) = (image.display(), error);
    tracing::warn!(%path, error, "fetched chunks may not survive a power cut");
}
