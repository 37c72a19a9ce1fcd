//! Layers that can only be had from start to end: streamed once into the store, verified, then served.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::SystemTime;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::counters::add;
use super::stream::{PIECES, Streaming};
use super::waiter::Waiter;
use super::{Cause, FetchError, LayerImage, LayerSpec, LayerState, Standing};
use crate::chunked::{Compression, SequentialError, SequentialReader};
use crate::model::{BlobSource as _, ByteRange, Hasher};
use crate::store::{BlobFile, StoreError, WholeWriter};

/// The largest image that is unpacked: as large as one with an index can be at the usual chunk size.
const MAX_IMAGE_SIZE: u64 = 256 << 30;

/// How often the whole blob is fetched before its readers fail.
const ATTEMPTS: u32 = 2;

/// A layer that can only be had from start to end.
pub(super) struct Whole {
    file: OnceLock<Arc<BlobFile>>,
    received: AtomicU64,
    /// Somebody reads: what was begun as a fill is one no more.
    demanded: AtomicBool,
    /// Who waits; none while nobody fetches.
    waiting: Mutex<Option<Vec<Arc<Waiter>>>>,
}

impl Whole {
    pub(super) const fn new() -> Self {
        let (received, demanded) = (AtomicU64::new(0), AtomicBool::new(false));
        Self { file: OnceLock::new(), received, demanded, waiting: Mutex::new(None) }
    }

    pub(super) fn ready(file: Arc<BlobFile>) -> Self {
        let whole = Self::new();
        whole.file.get_or_init(|| file);
        whole
    }

    pub(super) fn file(&self) -> Option<&Arc<BlobFile>> {
        self.file.get()
    }

    pub(super) fn size(&self, spec: &LayerSpec) -> u64 {
        match (self.file(), spec.compression) {
            (Some(file), _) => file.spec().image_size,
            (None, Compression::None) => spec.blob_size,
            (None, Compression::Zstd) => u64::MAX,
        }
    }

    /// Bytes in all and bytes here: of the image when it is here, of the blob before.
    pub(super) fn progress(&self, spec: &LayerSpec) -> (u64, u64) {
        match self.file() {
            Some(file) => (file.spec().image_size, file.spec().image_size),
            None => (spec.blob_size, self.received.load(Ordering::Relaxed)),
        }
    }

    pub(super) fn state(&self) -> LayerState {
        let fetching = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        match (self.file(), fetching) {
            (Some(_), _) => LayerState::Local,
            (None, true) => LayerState::Filling,
            (None, false) => LayerState::Lazy,
        }
    }

    /// As [`LayerImage::request`]; whatever the range is, all of it comes. Such a wait has no deadline of its own: how
    /// long it takes is a question of the layer's size. A source that stalls still ends it.
    pub(super) fn request(
        &self,
        layer: &Arc<LayerImage>,
        range: ByteRange,
        cause: Cause,
        done: impl FnOnce(Result<(), Arc<FetchError>>) + Send + 'static,
    ) {
        if self.file().is_some() {
            return done(Ok(()));
        }
        let waiter = Waiter::new(layer.spec.blob, range, 1, None, done);
        let begin = {
            let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            // Looked at again: whoever fetched sets the file before it takes the list away.
            if self.file().is_none() {
                self.demanded.fetch_or(cause.is_demand(), Ordering::Relaxed);
                let first = waiting.is_none();
                waiting.get_or_insert_default().push(Arc::clone(&waiter));
                first
            } else {
                drop(waiting);
                return waiter.settle(Ok(()));
            }
        };
        if begin {
            let promise = Promise { layer: Arc::clone(layer), cause, result: None };
            layer.shared.runtime.spawn(bring(promise));
        }
    }
}

/// Answers everybody who waits for the layer when it is dropped.
struct Promise {
    layer: Arc<LayerImage>,
    /// That of the first who asked.
    cause: Cause,
    result: Option<Result<(), Arc<FetchError>>>,
}

impl Drop for Promise {
    fn drop(&mut self) {
        let super::layer::Body::Whole(whole) = &self.layer.body else { return };
        let waiters = {
            let mut waiting = whole.waiting.lock().unwrap_or_else(PoisonError::into_inner);
            whole.demanded.store(false, Ordering::Relaxed);
            waiting.take()
        };
        let blob = self.layer.spec.blob;
        let result = self.result.take().unwrap_or_else(|| Err(Arc::new(FetchError::Abandoned { blob })));
        for waiter in waiters.into_iter().flatten() {
            waiter.settle(result.clone());
        }
    }
}

async fn bring(mut promise: Promise) {
    let layer = Arc::clone(&promise.layer);
    let super::layer::Body::Whole(whole) = &layer.body else { return };
    let mut attempt = 0;
    let result = loop {
        let result = fetch(&layer, whole, attempt, promise.cause).await;
        attempt += 1;
        match result {
            Err(error @ FetchError::BlobDigest { .. }) if attempt < ATTEMPTS => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(error, "a blob came with wrong bytes, fetching it once more");
                add(&layer.counting.corrupt, 1);
            }
            result => break result,
        }
    };
    promise.result = Some(match result {
        Ok(file) => {
            let since = file.judged().unwrap_or_else(SystemTime::now);
            whole.file.get_or_init(|| file);
            layer.stands(Standing::Local { since });
            tracing::info!(blob = %layer.spec.blob, "the layer is complete and verified");
            Ok(())
        }
        Err(error) => {
            let shown: &dyn std::error::Error = &error;
            tracing::debug!(error = shown, "a layer that is read from start to end did not come");
            Err(Arc::new(error))
        }
    });
}

async fn fetch(
    layer: &Arc<LayerImage>,
    whole: &Whole,
    attempt: u32,
    cause: Cause,
) -> Result<Arc<BlobFile>, FetchError> {
    let blob = layer.spec.blob;
    let (sender, pieces) = mpsc::channel(PIECES);
    let of_worker = Arc::clone(layer);
    let worker = layer.shared.runtime.spawn_blocking(move || unpack(&of_worker, pieces));
    let (shared, source, size, counting) = (&layer.shared, &layer.source, layer.spec.blob_size, &layer.counting);
    let streaming = Streaming { shared, source, blob, size, attempt, cause, demanded: &whole.demanded, counting };
    let streamed = streaming.run(&whole.received, &sender).await;
    drop(sender);
    // The worker's complaint comes first: it is why nobody took the rest of the stream.
    let unpacked = worker.await.map_err(|_| FetchError::Abandoned { blob })?;
    match (unpacked, streamed) {
        (Ok(Some(file)), Ok(())) => Ok(file),
        (Err(error), _) | (_, Err(error)) => Err(error),
        (Ok(None), Ok(())) => Err(FetchError::Abandoned { blob }),
    }
}

/// Inflates, hashes and writes what comes. None if the blob ended early: why is known elsewhere.
fn unpack(layer: &LayerImage, mut pieces: mpsc::Receiver<Bytes>) -> Result<Option<Arc<BlobFile>>, FetchError> {
    let (blob, store) = (layer.spec.blob, &layer.shared.store);
    let stored = |source| FetchError::Store { blob, source };
    let writer = store.write_whole(&blob).map_err(stored)?;
    let unpacking = |error: SequentialError| match error {
        SequentialError::Write { source, .. } => {
            FetchError::Store { blob, source: StoreError::io("write into", store.root(), source) }
        }
        source => FetchError::Unpack { blob, source },
    };
    let mut reader: SequentialReader<WholeWriter> =
        SequentialReader::new(writer, layer.spec.compression, MAX_IMAGE_SIZE);
    let mut hasher = Hasher::new(blob.0.algorithm());
    let mut received = 0;
    // A blob with wrong bytes rarely inflates. Its digest says better what is wrong, so it is read to its end.
    let mut fault = None;
    while let Some(piece) = pieces.blocking_recv() {
        hasher.update(&piece);
        received += piece.len() as u64;
        if fault.is_none()
            && let Err(error) = reader.push(&piece)
        {
            if matches!(error, SequentialError::Write { .. } | SequentialError::TooLarge(_)) {
                return Err(unpacking(error));
            }
            fault = Some(error);
        }
    }
    if received != layer.spec.blob_size {
        return Ok(None);
    }
    let found = hasher.finish();
    if found != blob.0 {
        return Err(FetchError::BlobDigest { blob, origin: layer.source.origin(), found: Box::new(found) });
    }
    if let Some(error) = fault {
        return Err(unpacking(error));
    }
    let (writer, summary) = reader.finish().map_err(unpacking)?;
    if summary.diff_id != layer.spec.diff_id {
        return Err(FetchError::DiffId {
            blob,
            expected: Box::new(layer.spec.diff_id),
            found: Box::new(summary.diff_id),
        });
    }
    store.keep_whole(&writer, summary.diff_id).map(Some).map_err(stored)
}
