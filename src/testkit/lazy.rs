//! Bytes in memory that behave like a layer that is still in a registry: absent until they are asked for, and then
//! brought at once, later, never or wrongly, as a script says. It remembers what it was asked for.

use std::fmt;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::model::{ByteRange, ReadAt, ReadAtError};
use crate::vfs::{Bring, Done, Purpose};

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reaction {
    /// The bytes are there before the request returns.
    Now,
    /// They come from another thread.
    Soon,
    /// They come when [`LazyBytes::release`] is called.
    Hold,
    /// They do not come, and that is said.
    Fail,
    /// They do not come, and nothing is said.
    Forget,
    /// That they came is said, and they did not.
    Lie,
}

type Script = Box<dyn Fn(ByteRange, Purpose) -> Reaction + Send + Sync>;

struct State {
    present: Vec<bool>,
    asked: Vec<(ByteRange, Purpose)>,
    held: Vec<(ByteRange, Done)>,
    script: Script,
}

/// A lazy layer. Bytes come in granules.
pub struct LazyBytes {
    bytes: Vec<u8>,
    granule: u64,
    state: Mutex<State>,
    changed: Condvar,
}

impl fmt::Debug for LazyBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LazyBytes").field("size", &self.bytes.len()).finish_non_exhaustive()
    }
}

impl LazyBytes {
    /// Nothing is here; everything comes soon.
    ///
    /// # Panics
    /// If `granule` is 0.
    pub fn new(bytes: Vec<u8>, granule: u64) -> Arc<Self> {
        let granules = usize::try_from(bytes.size().div_ceil(granule)).expect("the bytes are in memory");
        let state = State {
            present: vec![false; granules],
            asked: Vec::new(),
            held: Vec::new(),
            script: Box::new(|_, _| Reaction::Soon),
        };
        Arc::new(Self { bytes, granule, state: Mutex::new(state), changed: Condvar::new() })
    }

    /// Everything is here.
    pub fn local(bytes: Vec<u8>) -> Arc<Self> {
        let lazy = Self::new(bytes, 1 << 20);
        lazy.state().present.fill(true);
        lazy
    }

    /// Says what becomes of the requests from now on. The script must not use the layer itself.
    pub fn script(&self, script: impl Fn(ByteRange, Purpose) -> Reaction + Send + Sync + 'static) {
        self.state().script = Box::new(script);
    }

    /// What was asked for so far.
    pub fn asked(&self) -> Vec<(ByteRange, Purpose)> {
        self.state().asked.clone()
    }

    /// Makes everything absent again.
    pub fn forget(&self) {
        self.state().present.fill(false);
    }

    /// Waits until `count` requests are held.
    ///
    /// # Panics
    /// If that does not happen within a minute.
    pub fn wait_for_held(&self, count: usize) {
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut state = self.state();
        while state.held.len() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{} requests are held, not {count}", state.held.len());
            (state, _) = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Brings what is held.
    pub fn release(&self) {
        let held = std::mem::take(&mut self.state().held);
        for (range, done) in held {
            self.arrive(range);
            done(Ok(()));
        }
    }

    fn arrive(&self, range: ByteRange) {
        let (first, end) = (range.start() / self.granule, range.end().div_ceil(self.granule));
        let mut state = self.state();
        for granule in first..end {
            if let Some(present) = usize::try_from(granule).ok().and_then(|granule| state.present.get_mut(granule)) {
                *present = true;
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ReadAt for LazyBytes {
    fn size(&self) -> u64 {
        self.bytes.size()
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
        let len = buf.len() as u64;
        if len == 0 || offset.checked_add(len).is_none_or(|end| end > self.size()) {
            return self.bytes.read_exact_at(offset, buf);
        }
        let (first, end) = (offset / self.granule, (offset + len).div_ceil(self.granule));
        let missing = {
            let state = self.state();
            (first..end).find(|granule| {
                let index = usize::try_from(*granule).unwrap_or(usize::MAX);
                state.present.get(index) != Some(&true)
            })
        };
        let Some(missing) = missing else { return self.bytes.read_exact_at(offset, buf) };
        buf.fill(0xa5);
        let range = ByteRange::new(missing * self.granule, (end * self.granule).min(self.size()));
        Err(ReadAtError::Absent(range.expect("granules ascend")))
    }
}

/// A layer of a test: [`LazyBytes`] that may outlive the threads it starts.
#[derive(Debug, Clone)]
pub struct LazyLayer(pub Arc<LazyBytes>);

impl ReadAt for LazyLayer {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
        self.0.read_exact_at(offset, buf)
    }
}

impl Bring for LazyLayer {
    fn bring(&self, range: ByteRange, purpose: Purpose, done: Done) {
        // Decided and held under one lock: what is held before a new script is there for `release`.
        let mut state = self.0.state();
        state.asked.push((range, purpose));
        let reaction = (state.script)(range, purpose);
        if reaction == Reaction::Hold {
            state.held.push((range, done));
            drop(state);
            self.0.changed.notify_all();
            return;
        }
        drop(state);
        match reaction {
            Reaction::Now => {
                self.0.arrive(range);
                done(Ok(()));
            }
            Reaction::Soon => {
                let lazy = Arc::clone(&self.0);
                thread::spawn(move || {
                    lazy.arrive(range);
                    done(Ok(()));
                });
            }
            Reaction::Fail => done(Err(Arc::new(io::Error::other("the script says that it fails")))),
            Reaction::Forget | Reaction::Hold => drop(done),
            Reaction::Lie => done(Ok(())),
        }
    }
}
