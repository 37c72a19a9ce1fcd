//! The only download path. Reads of a mount, metadata, read-ahead and background fills all come here, and each chunk is
//! fetched by one of them for all.
//!
//! A wish for bytes becomes wishes for the chunks that hold them ([`LayerImage::request`]). The queue orders them by
//! [`Cause`] and joins neighbours; a *flight* brings such a run with one range request, hands every frame to the CPU
//! pool as soon as it has arrived, and goes on reading meanwhile. The pool verifies, inflates, writes to the store,
//! and answers whoever waits for that very chunk. So a read never waits for the rest of a range, nor for another
//! reader's chunks on another connection.
//!
//! Guarantees. Nothing is written or served that was not verified. A chunk whose bytes are wrong is fetched once more,
//! then the reads that wait for it fail, alone, and the next read tries again. Whoever asked is answered exactly once,
//! whatever panics or shuts down. Stored bytes under way stay within a budget. A full disk does not fail a read: what
//! was fetched stays in memory long enough to be read.
//!
//! Refuses to know registries ([`BlobSource`]), file systems inside of images, and threads that may wait: a request
//! never blocks.

mod budget;
mod cause;
mod counters;
mod cpu;
mod error;
mod fill;
mod flight;
mod land;
mod layer;
mod limit;
mod open;
mod origins;
mod pieces;
mod queue;
mod readahead;
mod recent;
mod room;
mod shared;
mod slowest;
mod spare;
mod standing;
mod status;
mod stream;
mod table;
mod verify;
mod waiter;
mod whole;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;

pub use cause::Cause;
pub use counters::Counters;
pub use error::FetchError;
pub use layer::LayerImage;
pub use room::Room;
pub use slowest::SlowRead;
pub use standing::{LocalLayer, Standing};
pub use status::{LayerState, LayerStatus};
pub use stream::BlobStream;

use crate::chunked::Compression;
use crate::model::{BlobDigest, BlobSource, DiffId};
use crate::oci::{IndexLocation, LayerPlan};
use crate::store::{BlobFile, Store, StoreError};
use shared::Shared;
use table::LayerKey;

/// How the fetch path behaves.
#[derive(Debug, Clone, Copy)]
pub struct FetchConfig {
    /// Requests at the same time, over all layers.
    pub connections: usize,
    /// How many of them may be for what nobody waits for.
    pub background_connections: usize,
    /// Bytes that have arrived and are not written yet. With the inflated chunk that each CPU thread holds this is what
    /// fetching takes: 16 MiB and 2 threads with chunks of 4 MiB stay well below 32 MiB.
    pub memory: u32,
    /// Stored bytes a second that fills may bring, over all layers; none is as many as come.
    pub fill_bandwidth: Option<u64>,
    /// Inflated bytes that are held while a fill is under way because it is not their turn yet to be hashed; what does
    /// not fit is read back from the page cache, which costs a fifth of the hashing.
    pub hold: usize,
    /// Threads that verify and inflate; none takes one a core, at least 2 and at most 32: a fill is to use all of them.
    pub cpu_threads: Option<usize>,
    /// Bytes of one request at most.
    pub range: u64,
    /// Bytes that a sequential reader is kept ahead of at most; 0 never reads ahead, and nothing around a miss either.
    pub read_ahead: u64,
    /// Bytes at the start of a blob that are fetched along with its index, since metadata is there; 0 fetches none. A
    /// blob of up to twice that size is fetched in one request. An inode with its name takes 19 to 28 bytes of compressed
    /// metadata in layers of Debian packages, so the default brings all of it for some 14,000 files.
    pub head: u64,
    /// Bytes of chunks kept in memory while the disk is full.
    pub spare: usize,
    /// Longest time until a source answers at all. Sources have their own patience, try again and go to mirrors; this is
    /// for one that never comes back, so it is longer than theirs. Who waits is answered by the deadline before.
    pub open_timeout: Duration,
    /// Longest time between two pieces of an answer, for the same case.
    pub stall_timeout: Duration,
    /// Longest time until a read or a look at metadata is answered, by an error then.
    pub deadline: Duration,
}

impl Default for FetchConfig {
    fn default() -> Self {
        Self {
            connections: 8,
            background_connections: 6,
            memory: 16 << 20,
            fill_bandwidth: None,
            hold: 16 << 20,
            cpu_threads: None,
            range: 4 << 20,
            read_ahead: 8 << 20,
            head: 320 << 10,
            spare: 16 << 20,
            open_timeout: Duration::from_secs(180),
            stall_timeout: Duration::from_secs(180),
            deadline: Duration::from_secs(60),
        }
    }
}

/// Which layer to open, and how its bytes are to be understood.
#[derive(Debug, Clone)]
pub struct LayerSpec {
    /// The blob.
    pub blob: BlobDigest,
    /// Its size.
    pub blob_size: u64,
    /// How it is stored.
    pub compression: Compression,
    /// What the whole image (for a raw blob: the whole blob) hashes to.
    pub diff_id: DiffId,
    /// Where its chunk index is; without one the layer is read from start to end before anything of it is served.
    pub index: Option<IndexLocation>,
}

impl From<&LayerPlan> for LayerSpec {
    fn from(plan: &LayerPlan) -> Self {
        Self {
            blob: plan.blob,
            blob_size: plan.blob_size,
            compression: plan.compression,
            diff_id: plan.diff_id,
            index: plan.index,
        }
    }
}

/// A layer that was a tar and is in the store as an image of its own.
#[derive(Debug, Clone, Copy)]
pub struct TarLayer {
    /// The tar's blob.
    pub blob: BlobDigest,
    /// Its size.
    pub blob_size: u64,
    /// What names the image, where a chunked layer has its diffID.
    pub identity: DiffId,
    /// The tar's diffID.
    pub diff_id: DiffId,
    /// Bytes that were fetched for it just now.
    pub fetched: u64,
}

/// Fetches layers into a store. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Fetcher {
    shared: Arc<Shared>,
}

impl Fetcher {
    /// A fetcher that keeps what it fetches in `store` and waits for the network on `runtime`.
    ///
    /// # Errors
    /// Threads that cannot be started.
    pub fn new(store: Arc<Store>, runtime: Handle, config: FetchConfig) -> io::Result<Self> {
        Ok(Self { shared: Shared::start(store, runtime, config)? })
    }

    /// Opens a layer: takes its chunk index from the store, or from `source`, and its image from the store, where it
    /// is made if it is new. Nothing of the image has to be there.
    ///
    /// A layer that is open already is given again, and `source` is one more place to get it from.
    ///
    /// # Errors
    /// An index that does not come or is corrupt; a store that fails.
    pub async fn open_layer(
        &self,
        spec: LayerSpec,
        source: Arc<dyn BlobSource>,
    ) -> Result<Arc<LayerImage>, Arc<FetchError>> {
        let slot = self.shared.table.slot(LayerKey::of(&spec));
        let mut opened = slot.lock().await;
        if let Some(layer) = opened.upgrade() {
            layer.source.add(source);
            return Ok(layer);
        }
        let layer = open::open_layer(&self.shared, spec, source).await.map_err(Arc::new)?;
        *opened = Arc::downgrade(&layer);
        Ok(layer)
    }

    /// A blob of `size` bytes from start to end, for who cannot use it in pieces. It comes as fills do: behind what
    /// somebody waits for, within their limits, and goes on where a connection broke. `attempt` is how often its bytes were wrong.
    pub fn stream(&self, blob: BlobDigest, size: u64, source: Arc<dyn BlobSource>, attempt: u32) -> BlobStream {
        stream::open(&self.shared, blob, size, source, attempt)
    }

    /// A layer all of which is in `file`.
    pub fn unpacked_layer(&self, layer: TarLayer, file: Arc<BlobFile>) -> Arc<LayerImage> {
        open::unpacked_layer(&self.shared, layer, file)
    }

    /// Makes `wanted` bytes of room in the layers that are open, as far as there are chunks that nobody needs: the least
    /// recently used go first, after those that were never read. Waits for the disk.
    ///
    /// # Errors
    /// What the disk says.
    pub fn make_room(&self, wanted: u64, dry_run: bool) -> Result<Room, StoreError> {
        room::make_room(&self.shared, wanted, dry_run)
    }

    /// Changes the bytes a second that fills may bring; none is as many as come.
    pub fn set_fill_bandwidth(&self, rate: Option<u64>) {
        self.shared.fill_limit.set(rate);
    }

    /// The store behind this.
    pub fn store(&self) -> &Arc<Store> {
        &self.shared.store
    }
}
