//! Opens layers: finds the chunk index, in the store or at the source, and the image that it describes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::SystemTime;

use futures::StreamExt as _;
use futures::future::BoxFuture;
use tokio::sync::watch;
use tokio::time::timeout;

use super::counters::{Counting, add};
use super::cpu::Urgency;
use super::layer::Body;
use super::origins::Origins;
use super::pieces::{Chunked, Tail};
use super::shared::Shared;
use super::whole::Whole;
use super::{Cause, FetchError, LayerImage, LayerSpec, Standing, TarLayer};
use crate::chunked::{ChunkIndex, Compression, Framing, IndexError, IndexSection, MAX_INDEX_SIZE, decode_chunk};
use crate::model::{BlobDigest, BlobSource, ByteRange, ByteStream, DiffId, SourceError};
use crate::oci::IndexLocation;
use crate::store::{Anchor, BlobFile, BlobSpec, StoreError, Verdict};

/// How often an index is fetched before its layer cannot be opened.
const INDEX_ATTEMPTS: u32 = 2;

/// One layer being opened.
struct Opening<'a> {
    shared: &'a Arc<Shared>,
    spec: &'a LayerSpec,
    source: &'a Arc<dyn BlobSource>,
    counting: &'a Counting,
}

/// An index, and bytes from the start of the blob that came along.
struct Found {
    index: ChunkIndex,
    payload: Vec<u8>,
    head: Vec<u8>,
}

pub(super) async fn open_layer(
    shared: &Arc<Shared>,
    spec: LayerSpec,
    source: Arc<dyn BlobSource>,
) -> Result<Arc<LayerImage>, FetchError> {
    let counting = Counting::default();
    let opening = Opening { shared, spec: &spec, source: &source, counting: &counting };
    let body = match opening.chunked().await? {
        Some(chunked) => Body::Chunked(Box::new(chunked)),
        None => Body::Whole(opening.whole().await?),
    };
    let layer = assemble(shared, spec, source, body, counting, None);
    if let Some(chunked) = layer.chunked() {
        shared.enter(layer.id, Arc::clone(&chunked.index), Arc::downgrade(&layer));
    }
    layer.check_complete();
    Ok(layer)
}

pub(super) fn unpacked_layer(shared: &Arc<Shared>, tar: TarLayer, file: Arc<BlobFile>) -> Arc<LayerImage> {
    let spec = LayerSpec {
        blob: tar.blob,
        blob_size: tar.blob_size,
        compression: Compression::None,
        diff_id: tar.identity,
        index: None,
    };
    let counting = Counting::default();
    add(&counting.fetched, tar.fetched);
    // Nothing of it is missing, so nothing is ever asked for.
    let source: Arc<dyn BlobSource> = Arc::new(Nowhere);
    assemble(shared, spec, source, Body::Whole(Whole::ready(file)), counting, Some(tar.diff_id))
}

/// Where nothing comes from.
struct Nowhere;

impl BlobSource for Nowhere {
    fn open(&self, blob: BlobDigest, range: ByteRange, _: u32) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
        let source = Box::new(std::io::Error::from(std::io::ErrorKind::Unsupported));
        let error = SourceError { blob, range, origin: self.origin(), transient: false, source };
        Box::pin(async { Err(error) })
    }

    fn origin(&self) -> String {
        "an unpacked tar".to_owned()
    }
}

fn assemble(
    shared: &Arc<Shared>,
    spec: LayerSpec,
    source: Arc<dyn BlobSource>,
    body: Body,
    counting: Counting,
    tar: Option<DiffId>,
) -> Arc<LayerImage> {
    let id = shared.new_layer_id();
    let standing = standing_of(&body, spec.diff_id);
    if let Body::Chunked(chunked) = &body {
        chunked.judged.store(standing.is_over(), Ordering::Release);
    }
    Arc::new_cyclic(|me| LayerImage {
        me: Weak::clone(me),
        id,
        spec,
        source: Origins::new(source),
        shared: Arc::clone(shared),
        body,
        counting,
        standing: watch::Sender::new(standing),
        said_full: AtomicBool::new(false),
        said_broken: AtomicBool::new(false),
        tar,
    })
}

/// What the store knows of the layer as a whole.
fn standing_of(body: &Body, diff_id: DiffId) -> Standing {
    let (file, chunked) = match body {
        Body::Chunked(chunked) => (&chunked.file, Some(chunked)),
        Body::Whole(whole) => match whole.file() {
            Some(file) => (file, None),
            None => return Standing::Incomplete,
        },
    };
    match file.verdict() {
        Verdict::Verified(found) if found == diff_id && chunked.is_none_or(|chunked| chunked.is_complete()) => {
            Standing::Local { since: file.judged().unwrap_or(SystemTime::UNIX_EPOCH) }
        }
        Verdict::Contradicted(found) if found != diff_id => Standing::Contradicted(found),
        Verdict::Quarantined(found) if found != diff_id => Standing::Distrusted(found),
        _ if chunked.is_some_and(|chunked| matches!(chunked.tail, Tail::Unknown)) => Standing::Unverifiable,
        _ => Standing::Incomplete,
    }
}

impl Opening<'_> {
    /// The layer in pieces; none if it can only be had as a whole.
    async fn chunked(&self) -> Result<Option<Chunked>, FetchError> {
        let Some(location) = self.spec.index else { return Ok(None) };
        // An index that nothing vouches for verifies nothing.
        let Some(digest) = location.section.digest else { return Ok(None) };
        let anchor = Anchor::index(location.section.family, digest);
        let found = match self.kept_index(&location, anchor).await? {
            Some(found) => found,
            None => match self.fetch_index(&location).await? {
                Some(found) => found,
                None => return Ok(None),
            },
        };
        if !found.index.has_checksums() {
            tracing::info!(blob = %self.spec.blob, "the layer's index has no checksums: it is read from start to end");
            return Ok(None);
        }
        let tail = self.tail(&location, &found);
        let (index, blob) = (Arc::new(found.index), self.spec.blob);
        let spec = BlobSpec { blob, anchor, image_size: index.image_size(), chunks: index.len() };
        let store = Arc::clone(&self.shared.store);
        let file = self.blocking(move || store.blob(&spec, &found.payload)).await?;
        self.land_head(&index, &file, found.head).await;
        let algorithm = self.spec.diff_id.0.algorithm();
        Ok(Some(Chunked::new(index, tail, file, self.shared.config.read_ahead, algorithm)))
    }

    async fn whole(&self) -> Result<Whole, FetchError> {
        let (store, blob) = (Arc::clone(&self.shared.store), self.spec.blob);
        let kept = self.blocking(move || store.existing(&blob, Anchor::Whole)).await?;
        match kept.map(|file| (file.verdict(), file)) {
            Some((Verdict::Verified(found), file)) if found == self.spec.diff_id => Ok(Whole::ready(file)),
            Some((Verdict::Verified(found), _)) => {
                Err(FetchError::DiffId { blob, expected: Box::new(self.spec.diff_id), found: Box::new(found) })
            }
            _ => Ok(Whole::new()),
        }
    }

    async fn kept_index(&self, location: &IndexLocation, anchor: Anchor) -> Result<Option<Found>, FetchError> {
        let (store, blob) = (Arc::clone(&self.shared.store), self.spec.blob);
        let kept = self.blocking(move || store.index(&blob, anchor)).await?;
        let section = IndexSection { framing: Framing::Bare, ..location.section };
        Ok(kept.and_then(|payload| {
            let index = section.read(&payload).ok()?;
            Some(Found { index, payload, head: Vec::new() })
        }))
    }

    /// Fetches the index, and the head of the blob at the same time. None if the index cannot be used although
    /// nothing is wrong with it.
    async fn fetch_index(&self, location: &IndexLocation) -> Result<Option<Found>, FetchError> {
        let blob = self.spec.blob;
        if location.range.len() > MAX_INDEX_SIZE {
            return Ok(None);
        }
        let section = async {
            match self.fetch_small(location).await {
                Some(found) => Ok(found),
                None => {
                    let head = self.fetch_head(location.section.data_end.min(self.spec.blob_size));
                    let (section, head) = tokio::join!(self.fetch_section(location), head);
                    section.map(|(index, payload)| Found { index, payload, head })
                }
            }
        };
        match section.await {
            Ok(found) => Ok(Some(found)),
            Err(FetchError::Index { source: error @ IndexError::Unreadable(_), .. }) => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(%blob, error, "the layer is read from start to end");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// A blob not much larger than the head is fetched with its index in one request. None if it is larger, or if the
    /// bytes are not what they should be: the long way tells why.
    async fn fetch_small(&self, location: &IndexLocation) -> Option<Found> {
        let (spec, range) = (self.spec, location.range);
        if location.blob != spec.blob || range.end() > spec.blob_size || range.end() > self.shared.config.head * 2 {
            return None;
        }
        let mut bytes = self.collect(spec.blob, ByteRange::to(range.end()), 0).await.ok()?;
        let section = bytes.split_off(usize::try_from(range.start()).ok()?);
        let index = location.section.read(&section).ok()?;
        let payload = location.section.payload(&section).ok()?.to_vec();
        Some(Found { index, payload, head: bytes })
    }

    async fn fetch_section(&self, location: &IndexLocation) -> Result<(ChunkIndex, Vec<u8>), FetchError> {
        let blob = self.spec.blob;
        let mut attempt = 0;
        loop {
            let bytes = self.collect(location.blob, location.range, attempt).await?;
            let parsed =
                location.section.read(&bytes).and_then(|index| Ok((index, location.section.payload(&bytes)?.to_vec())));
            attempt += 1;
            match parsed {
                Ok(parsed) => return Ok(parsed),
                Err(error @ IndexError::Corrupt(_)) if attempt < INDEX_ATTEMPTS => {
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(%blob, error, "a chunk index came with wrong bytes, fetching it once more");
                    add(&self.counting.corrupt, 1);
                }
                Err(source) => return Err(FetchError::Index { blob, origin: self.source.origin(), source }),
            }
        }
    }

    /// The first bytes of the blob's chunks, as many as come. Nobody depends on them.
    async fn fetch_head(&self, data_end: u64) -> Vec<u8> {
        let range = ByteRange::to(data_end.min(self.shared.config.head));
        if range.is_empty() {
            return Vec::new();
        }
        self.collect(self.spec.blob, range, 0).await.unwrap_or_else(|error| {
            let error: &dyn std::error::Error = &error;
            tracing::debug!(blob = %self.spec.blob, error, "the head of a layer did not come along with its index");
            Vec::new()
        })
    }

    /// All bytes of a small range.
    async fn collect(&self, blob: BlobDigest, range: ByteRange, attempt: u32) -> Result<Vec<u8>, FetchError> {
        let config = &self.shared.config;
        let silent = |what| FetchError::Interrupted { blob, range, origin: self.source.origin(), what };
        let failed = |source| FetchError::IndexSource { blob: self.spec.blob, source: Box::new(source) };
        add(&self.counting.requests, 1);
        let mut stream = timeout(config.open_timeout, self.source.open(blob, range, attempt))
            .await
            .map_err(|_| silent("no answer in time"))?
            .map_err(failed)?;
        let mut bytes = Vec::new();
        let wanted = usize::try_from(range.len()).unwrap_or(usize::MAX);
        while bytes.len() < wanted {
            let piece = timeout(config.stall_timeout, stream.next())
                .await
                .map_err(|_| silent("nothing came for too long"))?
                .ok_or_else(|| silent("the answer ended early"))?
                .map_err(failed)?;
            add(&self.counting.fetched, piece.len() as u64);
            let here = piece.len().min(wanted - bytes.len());
            bytes.extend_from_slice(piece.get(..here).unwrap_or_default());
        }
        Ok(bytes)
    }

    /// Writes the chunks that lie in the head as a whole. One that is damaged will be fetched again by who needs it.
    async fn land_head(&self, index: &Arc<ChunkIndex>, file: &Arc<BlobFile>, head: Vec<u8>) {
        if head.is_empty() {
            return;
        }
        let (index, file) = (Arc::clone(index), Arc::clone(file));
        let (sender, done) = tokio::sync::oneshot::channel();
        self.shared.cpu.run(Urgency::Chunk(Cause::Metadata), move || {
            let mut out = Vec::new();
            let mut landed = 0;
            for (number, chunk) in (0_u32..).zip(index.iter()) {
                let stored = usize::try_from(chunk.blob.start())
                    .ok()
                    .zip(usize::try_from(chunk.blob.end()).ok())
                    .and_then(|(start, end)| head.get(start..end));
                let Some(stored) = stored else { break };
                if !file.is_present(number)
                    && decode_chunk(&chunk, index.compression(), stored, &mut out).is_ok()
                    && file.write_chunk(number, chunk.image.start(), &out).is_ok_and(|kept| kept)
                {
                    landed += 1;
                }
            }
            // Whoever opened the layer may have given up meanwhile.
            let _ = sender.send(landed);
        });
        add(&self.counting.chunks, done.await.unwrap_or(0));
    }

    /// What of the blob behind the image belongs to what the diffID of a raw layer covers.
    fn tail(&self, location: &IndexLocation, found: &Found) -> Tail {
        let behind = ByteRange::new(found.index.image_size(), self.spec.blob_size);
        match (self.spec.compression, behind) {
            (Compression::Zstd, _) => Tail::Nothing,
            (Compression::None, Ok(behind)) if behind.is_empty() => Tail::Nothing,
            (Compression::None, Ok(behind))
                if location.blob == self.spec.blob
                    && location.range == behind
                    && found.payload.len() as u64 == behind.len() =>
            {
                Tail::Bytes(found.payload.clone().into())
            }
            _ => Tail::Unknown,
        }
    }

    /// Waits for the disk elsewhere than on the reactor.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, FetchError> {
        let blob = self.spec.blob;
        match self.shared.runtime.spawn_blocking(work).await {
            Ok(result) => result.map_err(|source| FetchError::Store { blob, source }),
            Err(_) => Err(FetchError::Abandoned { blob }),
        }
    }
}
