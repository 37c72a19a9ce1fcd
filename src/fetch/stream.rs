//! Blobs that are of use only from start to end: one connection at a time, replaced where it broke.
//!
//! Guarantees. A stream counts as a background flight: it takes one of the connections of the background, and not the last
//! one if there are others; it reads on after others while somebody waits for theirs, and as fast as fills may. A connection
//! that breaks is replaced by one for the rest. A stream whose reader rests gives its connection to others and takes up later
//! where it was: so readers may wait for each other. Refuses to know what the bytes are.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::counters::{Counting, add};
use super::shared::Shared;
use super::{Cause, FetchError};
use crate::model::{BlobDigest, BlobSource, ByteRange, ByteStream, Hasher};

/// How often a broken connection is replaced without a byte having come.
const RETRIES: u32 = 3;

/// Pause before the first of them; doubled each time.
const PAUSE: Duration = Duration::from_millis(100);

/// Pieces between the network and who reads. A piece is what one read of a socket gives, some 16 KiB.
pub(super) const PIECES: usize = 32;

/// How long a reader may rest before its connection goes to others. Longer than unpacking half a megabyte takes on a busy
/// machine, shorter than servers keep a silent connection.
const REST: Duration = Duration::from_secs(2);

/// A stream lets others go first, for as long, once in so many bytes: as flights do with their chunks.
const STEP: u64 = 1 << 20;
const GIVE_WAY: Duration = Duration::from_millis(100);

/// What is to come, from where.
pub(super) struct Streaming<'a> {
    pub(super) shared: &'a Arc<Shared>,
    pub(super) source: &'a dyn BlobSource,
    pub(super) blob: BlobDigest,
    pub(super) size: u64,
    /// How often its bytes were wrong.
    pub(super) attempt: u32,
    /// Why; who waits has a connection of those who wait.
    pub(super) cause: Cause,
    /// Somebody waits for it by now: it goes on with the connection that it has, as fast as it comes.
    pub(super) demanded: &'a AtomicBool,
    pub(super) counting: &'a Counting,
}

/// A connection that counts. Given back when it is dropped.
struct Slot {
    shared: Arc<Shared>,
    cause: Cause,
}

impl Slot {
    async fn take(shared: &Arc<Shared>, cause: Cause) -> Self {
        loop {
            let freed = shared.freed.notified();
            tokio::pin!(freed);
            // From here on nothing is missed.
            freed.as_mut().enable();
            if shared.begin_stream(cause) {
                return Self { shared: Arc::clone(shared), cause };
            }
            freed.await;
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.shared.end_stream(self.cause);
        let shared = Arc::clone(&self.shared);
        // Not called right here: a runtime that shuts down would drop the next flight at once, and so on.
        drop(self.shared.runtime.spawn(async move { shared.pump() }));
    }
}

/// Why a connection is not read any more.
enum End {
    /// All is there, or nobody wants the rest.
    Over,
    /// The reader rests.
    Rest(Bytes),
    Broken(FetchError),
    Final(FetchError),
}

impl Streaming<'_> {
    /// Sends the blob to `pieces`, through as many connections as it takes; `received` tells how far it is.
    pub(super) async fn run(&self, received: &AtomicU64, pieces: &mpsc::Sender<Bytes>) -> Result<(), FetchError> {
        received.store(0, Ordering::Relaxed);
        let mut failures = 0;
        while received.load(Ordering::Relaxed) < self.size {
            let slot = Slot::take(self.shared, self.cause).await;
            let before = received.load(Ordering::Relaxed);
            let end = match self.connect(before).await {
                Ok(stream) => self.read(stream, received, pieces).await,
                Err(error) => End::Final(error),
            };
            drop(slot);
            let broken = match end {
                End::Over => return Ok(()),
                End::Final(error) => return Err(error),
                End::Broken(error) => error,
                End::Rest(piece) => {
                    if pieces.send(piece).await.is_err() {
                        return Ok(());
                    }
                    continue;
                }
            };
            failures = if received.load(Ordering::Relaxed) > before { 1 } else { failures + 1 };
            if failures > RETRIES {
                return Err(broken);
            }
            note_retry(&broken, failures);
            add(&self.counting.retries, 1);
            tokio::time::sleep(PAUSE * 2_u32.pow(failures - 1)).await;
        }
        Ok(())
    }

    fn rest(&self, from: u64) -> ByteRange {
        ByteRange::new(from, self.size).unwrap_or(ByteRange::to(self.size))
    }

    fn silent(&self, from: u64, what: &'static str) -> FetchError {
        FetchError::Interrupted { blob: self.blob, range: self.rest(from), origin: self.source.origin(), what }
    }

    async fn connect(&self, from: u64) -> Result<ByteStream, FetchError> {
        add(&self.counting.requests, 1);
        let opening = self.source.open(self.blob, self.rest(from), self.attempt);
        timeout(self.shared.config.open_timeout, opening)
            .await
            .map_err(|_| self.silent(from, "no answer in time"))?
            .map_err(|source| FetchError::WholeSource { blob: self.blob, source: Box::new(source) })
    }

    async fn read(&self, mut stream: ByteStream, received: &AtomicU64, pieces: &mpsc::Sender<Bytes>) -> End {
        let failed = |source| FetchError::WholeSource { blob: self.blob, source: Box::new(source) };
        let mut here = received.load(Ordering::Relaxed);
        let mut step = 0;
        loop {
            if here == self.size {
                return End::Over;
            }
            let mut piece = match timeout(self.shared.config.stall_timeout, stream.next()).await {
                Ok(Some(Ok(piece))) => piece,
                Ok(Some(Err(error))) if error.transient => return End::Broken(failed(error)),
                Ok(Some(Err(error))) => return End::Final(failed(error)),
                Ok(None) => return End::Broken(self.silent(here, "the answer ended early")),
                Err(_) => return End::Broken(self.silent(here, "nothing came for too long")),
            };
            let len = piece.len() as u64;
            add(&self.counting.fetched, len);
            piece.truncate(usize::try_from(self.size - here).unwrap_or(usize::MAX));
            here += piece.len() as u64;
            received.store(here, Ordering::Relaxed);
            match timeout(REST, pieces.reserve()).await {
                Ok(Ok(room)) => room.send(piece),
                // Who reads has given up and says why.
                Ok(Err(_)) => return End::Over,
                Err(_) => return End::Rest(piece),
            }
            if self.cause == Cause::Fill && !self.demanded.load(Ordering::Relaxed) {
                self.shared.fill_limit.pass(len).await;
            }
            step += len;
            if !self.cause.is_demand() && !self.demanded.load(Ordering::Relaxed) && step >= STEP {
                step = 0;
                let mut demand = self.shared.demand.subscribe();
                // The others may take longer: nobody waits for ever.
                drop(timeout(GIVE_WAY, demand.wait_for(|flights| *flights == 0)).await);
            }
        }
    }
}

fn note_retry(error: &FetchError, failures: u32) {
    let error: &dyn std::error::Error = error;
    tracing::debug!(error, failures, "a stream broke off, asking for the rest");
}

/// A blob as it comes, for a thread that may wait. Its digest is computed as it passes; its end is an error if it is not
/// the blob's. Dropped, nothing more comes.
#[derive(Debug)]
pub struct BlobStream {
    pieces: mpsc::Receiver<Bytes>,
    piece: Bytes,
    failure: oneshot::Receiver<FetchError>,
    hasher: Option<Hasher>,
    /// Bytes that have not come.
    left: u64,
    blob: BlobDigest,
    origin: String,
    task: AbortHandle,
}

pub(super) fn open(
    shared: &Arc<Shared>,
    blob: BlobDigest,
    size: u64,
    source: Arc<dyn BlobSource>,
    attempt: u32,
) -> BlobStream {
    let ((sender, pieces), (failed, failure)) = (mpsc::channel(PIECES), oneshot::channel());
    let (shared_too, origin) = (Arc::clone(shared), source.origin());
    let task = shared.runtime.spawn(async move {
        let counting = Counting::default();
        let (shared, source, cause) = (&shared_too, &*source, Cause::Fill);
        let (counting, demanded) = (&counting, &AtomicBool::new(false));
        let streaming = Streaming { shared, source, blob, size, attempt, cause, demanded, counting };
        if let Err(error) = streaming.run(&AtomicU64::new(0), &sender).await {
            // Nobody may be there any more to hear it.
            drop(failed.send(error));
        }
    });
    let hasher = Some(Hasher::new(blob.0.algorithm()));
    BlobStream { pieces, piece: Bytes::new(), failure, hasher, left: size, blob, origin, task: task.abort_handle() }
}

impl BlobStream {
    /// No more comes: was that all?
    fn end(&mut self) -> io::Result<usize> {
        let Some(hasher) = self.hasher.take() else { return Ok(0) };
        if let Ok(error) = self.failure.try_recv() {
            return Err(io::Error::other(error));
        }
        if self.left > 0 {
            return Err(io::Error::other(FetchError::Abandoned { blob: self.blob }));
        }
        let found = hasher.finish();
        if found == self.blob.0 {
            return Ok(0);
        }
        let error = FetchError::BlobDigest { blob: self.blob, origin: self.origin.clone(), found: Box::new(found) };
        Err(io::Error::new(io::ErrorKind::InvalidData, error))
    }
}

impl Read for BlobStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !buf.is_empty() {
            let Some(piece) = self.pieces.blocking_recv() else { return self.end() };
            if let Some(hasher) = &mut self.hasher {
                hasher.update(&piece);
            }
            self.left = self.left.saturating_sub(piece.len() as u64);
            self.piece = piece;
        }
        let len = self.piece.len().min(buf.len());
        let (now, buf) = (self.piece.split_to(len), buf.get_mut(..len).unwrap_or_default());
        buf.copy_from_slice(&now);
        Ok(len)
    }
}

impl Drop for BlobStream {
    fn drop(&mut self) {
        self.task.abort();
    }
}
