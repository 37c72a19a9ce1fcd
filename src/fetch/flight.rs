//! One range request on its way: bytes come in, whole frames go to the CPU pool.

use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::{Buf as _, Bytes};
use futures::StreamExt as _;
use tokio::time::{Instant, timeout};
use tracing::Instrument as _;

use super::counters::add;
use super::land::Landing;
use super::queue::{Flight, Key};
use super::shared::Shared;
use super::{Cause, FetchError, LayerImage};
use crate::model::{BlobDigest, BlobSource, ByteRange, ByteStream, SourceError};
use crate::observe::FETCH_SPAN;

/// How often a request is sent again after it broke off without having brought a single chunk. The source retries by
/// itself what can be retried before the first byte; this is for connections that die in the middle.
const RETRIES: u32 = 3;

/// Pause before the first of them; doubled each time.
const PAUSE: Duration = Duration::from_millis(100);

/// How long a background flight waits before each chunk while others are under way for somebody who waits, and how often
/// it looks meanwhile whether somebody waits for itself by now. 100 ms in all are long enough to leave nearly all of a
/// slow link to the others, and short enough that a reader who never stops does not stop the background.
const GIVE_WAY_TURN: Duration = Duration::from_millis(10);
const GIVE_WAY_TURNS: u32 = 10;

/// Answers for the chunks of a flight that have not reached the CPU pool, whatever happens to the flight.
pub(super) struct FlightGuard {
    shared: Arc<Shared>,
    flight: Flight,
    /// The first chunk that has not been handed on.
    next: u32,
}

impl FlightGuard {
    pub(super) fn new(shared: Arc<Shared>, flight: Flight) -> Self {
        Self { shared, flight, next: flight.first }
    }

    fn key(&self) -> Key {
        Key { layer: self.flight.layer, chunk: self.next }
    }

    /// Takes note of how far the flight is. False if it ends here because somebody else brings the next chunk: what
    /// lies behind that one is left to another flight.
    fn advance(&self) -> bool {
        let mut state = self.shared.lock();
        let goes_on = state.queue.advance(&self.flight, self.next);
        if !goes_on {
            state.queue.requeue(&self.flight, self.next);
        }
        goes_on
    }

    /// A flight that nobody waits for leaves the link to those that somebody waits for: it reads no further while
    /// there are any, for a while.
    async fn give_way(&self) {
        if self.flight.cause.is_demand() {
            return;
        }
        let mut demand = self.shared.demand.subscribe();
        for _ in 0..GIVE_WAY_TURNS {
            if self.shared.lock().queue.is_awaited(&self.flight, self.next) {
                return;
            }
            if timeout(GIVE_WAY_TURN, demand.wait_for(|flights| *flights == 0)).await.is_ok() {
                return;
            }
        }
    }

    fn fail(&mut self, error: &Arc<FetchError>) {
        while self.next < self.flight.end {
            let mine = self.shared.lock().queue.belongs(self.key(), self.flight.id);
            if mine {
                self.shared.settle(self.key(), &Err(Arc::clone(error)));
            }
            self.next += 1;
        }
    }
}

impl Drop for FlightGuard {
    fn drop(&mut self) {
        let mut left = Vec::new();
        {
            let mut state = self.shared.lock();
            for chunk in self.next..self.flight.end {
                let key = Key { chunk, ..self.key() };
                if state.queue.belongs(key, self.flight.id) {
                    left.extend(state.queue.settle(key));
                }
            }
        }
        // Dropped promises answer for themselves.
        drop(left);
        self.shared.landed(&self.flight);
        let shared = Arc::clone(&self.shared);
        // Not called right here: a runtime that shuts down would drop the next flight at once, and so on.
        drop(self.shared.runtime.spawn(async move { shared.pump() }));
    }
}

/// What went wrong, and whether asking again for the rest makes sense.
enum Trouble {
    Final(FetchError),
    Broken(FetchError),
}

/// Brings the chunks of a flight.
pub(super) async fn fly(guard: FlightGuard, layer: Weak<LayerImage>) {
    let Some(layer) = layer.upgrade() else { return };
    let Flight { first, end, cause, attempt, .. } = guard.flight;
    let (blob, chunks, cause) = (layer.spec.blob, end - first, cause.name());
    let span = tracing::debug_span!(FETCH_SPAN, %blob, chunk = first, chunks, cause, attempt);
    fly_over(guard, layer).instrument(span).await;
}

async fn fly_over(mut guard: FlightGuard, layer: Arc<LayerImage>) {
    let mut failures = 0;
    loop {
        let before = guard.next;
        match bring(&mut guard, &layer).await {
            Ok(()) => return,
            Err(Trouble::Final(error)) => return guard.fail(&Arc::new(error)),
            Err(Trouble::Broken(error)) => {
                failures = if guard.next > before { 1 } else { failures + 1 };
                if failures > RETRIES {
                    return guard.fail(&Arc::new(error));
                }
                note_retry(&error, failures);
                add(&layer.counting.retries, 1);
                tokio::time::sleep(PAUSE * 2_u32.pow(failures - 1)).await;
            }
        }
    }
}

fn note_retry(error: &FetchError, failures: u32) {
    let error: &dyn std::error::Error = error;
    tracing::debug!(error, failures, "a range request broke off, asking for the rest again");
}

/// One request for everything that is left of the flight.
async fn bring(guard: &mut FlightGuard, layer: &Arc<LayerImage>) -> Result<(), Trouble> {
    let Some(chunked) = layer.chunked() else { return Ok(()) };
    let Flight { end, attempt, cause, .. } = guard.flight;
    // Another process may have been faster.
    while guard.next < end && attempt == 0 && chunked.file.is_present(guard.next) {
        guard.shared.settle(guard.key(), &Ok(()));
        guard.next += 1;
    }
    let (Some(first), Some(last)) =
        (chunked.index.chunk(guard.next), end.checked_sub(1).and_then(|i| chunked.index.chunk(i)))
    else {
        return Ok(());
    };
    let Ok(range) = ByteRange::new(first.blob.start(), last.blob.end()) else { return Ok(()) };
    if range.is_empty() || !guard.advance() {
        return Ok(());
    }
    let mut incoming = Incoming::open(layer, range, attempt).await.map_err(|(error, again)| {
        let (blob, chunk) = (layer.spec.blob, guard.next);
        match error {
            Gone::Source(source) if again => {
                Trouble::Broken(FetchError::Source { blob, chunk, source: Box::new(source) })
            }
            Gone::Source(source) => Trouble::Final(FetchError::Source { blob, chunk, source: Box::new(source) }),
            Gone::Silent(error) => Trouble::Final(error),
        }
    })?;
    while guard.next < end {
        let Some(chunk) = chunked.index.chunk(guard.next) else { return Ok(()) };
        if !guard.advance() {
            return Ok(());
        }
        guard.give_way().await;
        if cause == Cause::Fill {
            guard.shared.fill_limit.pass(chunk.blob.len()).await;
        }
        let permit = guard.shared.budget.take(chunk.blob.len(), cause).await;
        let begin = incoming.waited;
        let stored = incoming.take(chunk.blob.len()).await.map_err(|error| match error {
            Gone::Source(source) => {
                let (blob, transient) = (layer.spec.blob, source.transient);
                let error = FetchError::Source { blob, chunk: guard.next, source: Box::new(source) };
                if transient { Trouble::Broken(error) } else { Trouble::Final(error) }
            }
            Gone::Silent(error) => Trouble::Broken(error),
        })?;
        guard.shared.lock().note_speed(chunk.blob.len(), incoming.waited.saturating_sub(begin));
        let landing = Landing::new(Arc::clone(layer), guard.key(), chunk, stored, permit);
        guard.next += 1;
        landing.queue(cause);
    }
    Ok(())
}

/// Why no more bytes come.
pub(super) enum Gone {
    Source(SourceError),
    Silent(FetchError),
}

/// The answer to a range request, cut to pieces of the length one asks for.
pub(super) struct Incoming<'a> {
    layer: &'a LayerImage,
    blob: BlobDigest,
    stream: ByteStream,
    left: ByteRange,
    piece: Bytes,
    stall: Duration,
    /// How long nothing was there to read.
    waited: Duration,
}

impl<'a> Incoming<'a> {
    /// Sends the request. On an error also says whether asking again makes sense.
    async fn open(layer: &'a LayerImage, range: ByteRange, attempt: u32) -> Result<Self, (Gone, bool)> {
        let (shared, source, blob) = (&layer.shared, &layer.source, layer.spec.blob);
        add(&layer.counting.requests, 1);
        let opened = timeout(shared.config.open_timeout, source.open(blob, range, attempt)).await;
        let stream = match opened {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => return Err((Gone::Source(error), false)),
            Err(_) => return Err((Gone::Silent(silent(blob, range, source, "no answer in time")), false)),
        };
        let stall = shared.config.stall_timeout;
        Ok(Self { layer, blob, stream, left: range, piece: Bytes::new(), stall, waited: Duration::ZERO })
    }

    /// The next `len` bytes.
    async fn take(&mut self, len: u64) -> Result<Vec<u8>, Gone> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let mut taken = Vec::with_capacity(len);
        while taken.len() < len {
            if self.piece.is_empty() {
                self.piece = self.next_piece().await?;
            }
            let here = self.piece.len().min(len - taken.len());
            taken.extend_from_slice(&self.piece[..here]);
            self.piece.advance(here);
            self.left = ByteRange::new(self.left.start() + here as u64, self.left.end()).unwrap_or(self.left);
        }
        Ok(taken)
    }

    async fn next_piece(&mut self) -> Result<Bytes, Gone> {
        let gone = |what| Gone::Silent(silent(self.blob, self.left, &self.layer.source, what));
        let begin = Instant::now();
        let next = timeout(self.stall, self.stream.next()).await;
        self.waited += begin.elapsed();
        match next {
            Ok(Some(Ok(piece))) => {
                add(&self.layer.counting.fetched, piece.len() as u64);
                Ok(piece)
            }
            Ok(Some(Err(error))) => Err(Gone::Source(error)),
            Ok(None) => Err(gone("the answer ended early")),
            Err(_) => Err(gone("nothing came for too long")),
        }
    }
}

fn silent(blob: BlobDigest, range: ByteRange, source: &dyn BlobSource, what: &'static str) -> FetchError {
    FetchError::Interrupted { blob, range, origin: source.origin(), what }
}
