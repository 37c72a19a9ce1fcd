//! What all layers of a fetcher share: the queue, the connections, the pool, the budget.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::budget::Budget;
use super::cpu::Cpu;
use super::flight::{self, FlightGuard};
use super::land;
use super::limit::Limit;
use super::queue::{Flight, Key, LayerId, Layout, Queue};
use super::recent::Ranks;
use super::spare::Spare;
use super::table::Table;
use super::verify::Hold;
use super::waiter::Waiter;
use super::{Cause, FetchConfig, FetchError, LayerImage};
use crate::chunked::ChunkIndex;
use crate::store::Store;

/// How often somebody looks for overdue waiters, for background flights that have stalled, and for what others have done.
const SWEEP: Duration = Duration::from_secs(1);

/// How long somebody who waits leaves a chunk to the background flight that brings it. A request of his own takes a round
/// trip, and cutting the flight costs its connection and what is in its buffers.
const PATIENCE: Duration = Duration::from_millis(100);

/// Bounds of what [`PATIENCE`] is in bytes: less is not worth a request, more trusts too much in what was before.
const MIN_PATIENCE: u64 = 256 << 10;
const MAX_PATIENCE: u64 = 2 << 20;

/// See the module's description. The lock of `state` is never held while anything is called that may take time or
/// another lock, nor while a layer or a waiter may be dropped.
pub(super) struct Shared {
    pub(super) store: Arc<Store>,
    pub(super) runtime: Handle,
    pub(super) config: FetchConfig,
    pub(super) cpu: Cpu,
    pub(super) budget: Budget,
    pub(super) spare: Spare,
    pub(super) table: Table,
    pub(super) hold: Hold,
    pub(super) fill_limit: Limit,
    state: Mutex<State>,
    /// Nothing else is locked while this is.
    ranks: Mutex<Ranks>,
    next_layer: AtomicU32,
    /// How many flights somebody waits for.
    pub(super) demand: watch::Sender<usize>,
    /// Wakes streams when a connection is free.
    pub(super) freed: Notify,
}

pub(super) struct State {
    pub(super) queue: Queue<Arc<Waiter>>,
    layers: Layers,
    running: Running,
}

impl State {
    /// Takes note of how fast bytes came.
    pub(super) fn note_speed(&mut self, bytes: u64, waited: Duration) {
        self.layers.speed.note(bytes, waited);
    }

    /// Adds a wish. True if the chunk was not wanted before.
    pub(super) fn want(&mut self, key: Key, cause: Cause, waiter: Option<Arc<Waiter>>) -> bool {
        self.queue.want(&self.layers, key, cause, waiter)
    }
}

#[derive(Default)]
struct Layers {
    known: HashMap<LayerId, (Arc<ChunkIndex>, Weak<LayerImage>)>,
    speed: Speed,
}

impl Layout for Layers {
    fn blob_range(&self, key: Key) -> Option<(u64, u64)> {
        let (index, _) = self.known.get(&key.layer)?;
        index.chunk(key.chunk).map(|chunk| (chunk.blob.start(), chunk.blob.end()))
    }

    fn patience(&self) -> u64 {
        self.speed.0.clamp(MIN_PATIENCE, MAX_PATIENCE)
    }
}

/// How many bytes one flight brings within [`PATIENCE`] while it waits for the network, smoothed over some ten chunks.
#[derive(Debug, Default)]
struct Speed(u64);

impl Speed {
    fn note(&mut self, bytes: u64, waited: Duration) {
        // Bytes that were there already say only that the network is not what is slow.
        let waited = waited.max(Duration::from_millis(1));
        let bytes = u128::from(bytes) * PATIENCE.as_micros() / waited.as_micros();
        self.0 = self.0 - self.0 / 8 + u64::try_from(bytes / 8).unwrap_or(u64::MAX >> 8);
    }
}

/// Flights under way.
#[derive(Debug, Default)]
struct Running {
    all: usize,
    background: usize,
    /// Those of the background that last for as long as a blob takes.
    streams: usize,
}

impl Running {
    fn admits(&self, cause: Cause, config: &FetchConfig) -> bool {
        let background = config.background_connections.max(1);
        self.all < config.connections.max(1) && (cause.is_demand() || self.background < background)
    }

    /// Streams leave a connection to what comes and goes, if there is more than one.
    fn admits_stream(&self, cause: Cause, config: &FetchConfig) -> bool {
        let most = config.background_connections.saturating_sub(1).max(1);
        self.admits(cause, config) && (cause.is_demand() || self.streams < most)
    }
}

impl Shared {
    pub(super) fn start(store: Arc<Store>, runtime: Handle, config: FetchConfig) -> io::Result<Arc<Self>> {
        let cores = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let shared = Arc::new(Self {
            store,
            config,
            cpu: Cpu::new(config.cpu_threads.unwrap_or_else(|| cores.clamp(2, 32)))?,
            budget: Budget::new(config.memory),
            spare: Spare::new(config.spare),
            table: Table::default(),
            hold: Hold::new(config.hold),
            fill_limit: Limit::new(config.fill_bandwidth),
            state: Mutex::new(State { queue: Queue::new(), layers: Layers::default(), running: Running::default() }),
            ranks: Mutex::default(),
            next_layer: AtomicU32::new(0),
            demand: watch::Sender::new(0),
            freed: Notify::new(),
            runtime,
        });
        shared.runtime.spawn(sweep(Arc::downgrade(&shared)));
        Ok(shared)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn ranks(&self) -> MutexGuard<'_, Ranks> {
        self.ranks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The layers that can be had in pieces.
    pub(super) fn open_layers(&self) -> Vec<Weak<LayerImage>> {
        self.lock().layers.known.values().map(|(_, layer)| Weak::clone(layer)).collect()
    }

    /// One of them.
    pub(super) fn layer(&self, id: LayerId) -> Option<Arc<LayerImage>> {
        let layer = self.lock().layers.known.get(&id).map(|(_, layer)| Weak::clone(layer))?;
        layer.upgrade()
    }

    pub(super) fn new_layer_id(&self) -> LayerId {
        self.next_layer.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn enter(&self, id: LayerId, index: Arc<ChunkIndex>, layer: Weak<LayerImage>) {
        self.lock().layers.known.insert(id, (index, layer));
    }

    /// A layer is gone: nobody wants its chunks any more.
    pub(super) fn leave(&self, id: LayerId, chunks: u32) {
        let gone: Vec<_> = {
            let mut state = self.lock();
            state.layers.known.remove(&id);
            if state.queue.wanted(id) == 0 {
                Vec::new()
            } else {
                (0..chunks).flat_map(|chunk| state.queue.settle(Key { layer: id, chunk })).collect()
            }
        };
        drop(gone);
        self.ranks().forget((0..chunks).map(|chunk| Key { layer: id, chunk }));
        self.spare.forget(id);
    }

    /// Starts as many flights as there may be.
    pub(super) fn pump(self: &Arc<Self>) {
        let mut flights = Vec::new();
        {
            let mut state = self.lock();
            let State { queue, layers, running } = &mut *state;
            while let Some(cause) = queue.most_urgent() {
                if !running.admits(cause, &self.config) {
                    break;
                }
                let Some(flight) = queue.take_flight(layers, |_| self.config.range) else { break };
                running.all += 1;
                running.background += usize::from(!flight.cause.is_demand());
                self.demand.send_replace(running.all - running.background);
                let layer = layers.known.get(&flight.layer).map(|(_, layer)| Weak::clone(layer)).unwrap_or_default();
                flights.push((flight, layer));
            }
        }
        for (flight, layer) in flights {
            self.runtime.spawn(flight::fly(FlightGuard::new(Arc::clone(self), flight), layer));
        }
    }

    /// A flight is over.
    pub(super) fn landed(&self, flight: &Flight) {
        let mut state = self.lock();
        state.queue.landed(flight);
        state.running.all -= 1;
        state.running.background -= usize::from(!flight.cause.is_demand());
        self.demand.send_replace(state.running.all - state.running.background);
        drop(state);
        self.freed.notify_waiters();
    }

    /// Counts a stream, if there is a connection for it.
    pub(super) fn begin_stream(&self, cause: Cause) -> bool {
        let mut state = self.lock();
        let running = &mut state.running;
        if !running.admits_stream(cause, &self.config) {
            return false;
        }
        running.all += 1;
        if !cause.is_demand() {
            running.background += 1;
            running.streams += 1;
        }
        self.demand.send_replace(running.all - running.background);
        true
    }

    /// A stream is over, or rests.
    pub(super) fn end_stream(&self, cause: Cause) {
        let mut state = self.lock();
        let running = &mut state.running;
        running.all -= 1;
        if !cause.is_demand() {
            running.background -= 1;
            running.streams -= 1;
        }
        self.demand.send_replace(running.all - running.background);
        drop(state);
        self.freed.notify_waiters();
    }

    /// Answers whoever waits for `key`.
    pub(super) fn settle(&self, key: Key, result: &Result<(), Arc<FetchError>>) {
        let waiters = self.lock().queue.settle(key);
        for waiter in waiters {
            waiter.settle(result.clone());
        }
    }
}

/// Until the fetcher is gone: answers overdue waiters, and finds out what other processes have done to the layers that are
/// open here. They may have landed the last chunk of one, or evicted one of a layer that was local.
async fn sweep(shared: Weak<Shared>) {
    loop {
        tokio::time::sleep(SWEEP).await;
        let Some(shared) = shared.upgrade() else { return };
        let now = Instant::now();
        if shared.lock().queue.overtake_stalled() {
            shared.pump();
        }
        let overdue: Vec<_> =
            shared.lock().queue.waiters().filter(|waiter| waiter.is_overdue(now)).map(Arc::clone).collect();
        overdue.iter().for_each(|waiter| waiter.expire());
        land::land_refused(&shared);
        for layer in shared.open_layers() {
            // One after the other, and none of them for longer than that takes.
            if let Some(layer) = layer.upgrade() {
                layer.check_complete();
            }
        }
    }
}
