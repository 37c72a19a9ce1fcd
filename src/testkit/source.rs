//! A source of blobs that does what a script says: late, wrong, short, too long, refused. Stricter than a real one: it
//! refuses ranges outside of a blob and remembers every request, and which of them asked for the same bytes at once.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt as _};
use tokio::sync::watch;

use crate::chunked::{BlobAssembler, Compression, Framing, IndexFamily, IndexSection, compress_chunk};
use crate::fetch::LayerSpec;
use crate::model::{
    Algorithm, BlobDigest, BlobSource, ByteRange, ByteStream, DiffId, Digest, IndexDigest, SourceError,
};
use crate::oci::IndexLocation;

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Asked {
    /// For which blob.
    pub blob: BlobDigest,
    /// For which bytes.
    pub range: ByteRange,
    /// For the how manieth time their bytes were wrong.
    pub attempt: u32,
    /// Which request of this source it is, from 0.
    pub number: usize,
}

/// Holds bytes back until it is opened.
#[derive(Debug, Clone)]
pub struct Gate(watch::Sender<bool>);

impl Gate {
    /// A closed gate.
    pub fn closed() -> Self {
        Self(watch::Sender::new(false))
    }

    /// Opens it for good.
    pub fn open(&self) {
        self.0.send_replace(true);
    }

    async fn passed(self) {
        let mut open = self.0.subscribe();
        // The sender lives as long as `self`.
        drop(open.wait_for(|open| *open).await);
    }
}

/// How one request is answered. Offsets are those of the blob.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// Refuses, for good or for now.
    pub refuse: Option<Refusal>,
    /// Says nothing before this gate opens.
    pub gate: Option<Gate>,
    /// Holds back the bytes from this offset on until the gate opens.
    pub hold: Option<(u64, Gate)>,
    /// Flips a bit of the byte at this offset.
    pub corrupt: Option<u64>,
    /// Ends before this offset.
    pub end: Option<(u64, Ending)>,
    /// Sends that many bytes more than were asked for.
    pub surplus: usize,
}

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Try again later.
    Transient,
    /// Never.
    Final,
}

/// How an answer ends too early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// As if it were complete.
    Silent,
    /// With an error that may pass.
    Transient,
    /// With an error that will not pass.
    Final,
    /// Not at all: nothing more comes.
    Stall,
}

type Script = Box<dyn Fn(&Asked) -> Answer + Send + Sync>;

/// The source.
pub struct ScriptedSource {
    blobs: Mutex<HashMap<BlobDigest, Bytes>>,
    script: Mutex<Script>,
    log: Mutex<Log>,
    piece: usize,
}

#[derive(Default)]
struct Log {
    asked: Vec<Asked>,
    open: Vec<Asked>,
    overlaps: Vec<(Asked, Asked)>,
    most_open: usize,
}

impl fmt::Debug for ScriptedSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScriptedSource").finish_non_exhaustive()
    }
}

impl ScriptedSource {
    /// A source without blobs that answers every request as it should, `piece` bytes at a time.
    pub fn new(piece: usize) -> Arc<Self> {
        Arc::new(Self {
            blobs: Mutex::default(),
            script: Mutex::new(Box::new(|_| Answer::default())),
            log: Mutex::default(),
            piece: piece.max(1),
        })
    }

    /// Adds a blob.
    pub fn add(&self, blob: &[u8]) -> BlobDigest {
        let digest = BlobDigest(Digest::of(Algorithm::Sha256, blob));
        self.add_as(digest, blob);
        digest
    }

    /// Adds a blob under a digest that may not be its own.
    pub fn add_as(&self, digest: BlobDigest, blob: &[u8]) {
        lock(&self.blobs).insert(digest, Bytes::copy_from_slice(blob));
    }

    /// From now on answers as `script` says.
    pub fn script(&self, script: impl Fn(&Asked) -> Answer + Send + Sync + 'static) {
        *lock(&self.script) = Box::new(script);
    }

    /// Every request so far.
    pub fn asked(&self) -> Vec<Asked> {
        lock(&self.log).asked.clone()
    }

    /// Forgets the requests so far.
    pub fn forget(&self) {
        *lock(&self.log) = Log::default();
    }

    /// Pairs of requests that were under way at the same time and asked for the same bytes.
    pub fn overlaps(&self) -> Vec<(Asked, Asked)> {
        lock(&self.log).overlaps.clone()
    }

    /// The most requests that were under way at the same time.
    pub fn most_open(&self) -> usize {
        lock(&self.log).most_open
    }

    fn enter(&self, blob: BlobDigest, range: ByteRange, attempt: u32) -> Asked {
        let mut log = lock(&self.log);
        let asked = Asked { blob, range, attempt, number: log.asked.len() };
        let same = |other: &&Asked| other.blob == blob && other.range.intersection(range).is_some();
        let overlaps: Vec<_> = log.open.iter().filter(same).map(|other| (*other, asked)).collect();
        log.overlaps.extend(overlaps);
        log.asked.push(asked);
        log.open.push(asked);
        log.most_open = log.most_open.max(log.open.len());
        asked
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Says when a request is over, however it ends.
struct Open {
    source: Arc<ScriptedSource>,
    asked: Asked,
}

impl Drop for Open {
    fn drop(&mut self) {
        lock(&self.source.log).open.retain(|open| open.number != self.asked.number);
    }
}

/// Lets a shared script be a source: what is under way outlives the borrow of `open`.
#[derive(Debug, Clone)]
pub struct Scripted(pub Arc<ScriptedSource>);

impl BlobSource for Scripted {
    fn open(&self, blob: BlobDigest, range: ByteRange, attempt: u32) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
        let source = Arc::clone(&self.0);
        Box::pin(async move {
            let asked = source.enter(blob, range, attempt);
            let open = Open { source: Arc::clone(&source), asked };
            let answer = lock(&source.script)(&asked);
            let failed = move |transient, what: &'static str| SourceError {
                blob,
                range,
                origin: "the script".to_owned(),
                transient,
                source: what.into(),
            };
            if let Some(gate) = answer.gate.clone() {
                gate.passed().await;
            }
            if let Some(refusal) = answer.refuse {
                return Err(failed(refusal == Refusal::Transient, "refused"));
            }
            let data = lock(&source.blobs).get(&blob).cloned().ok_or_else(|| failed(false, "no such blob"))?;
            if range.is_empty() || range.end() > data.len() as u64 {
                return Err(failed(false, "no such range"));
            }
            Ok(answer_stream(data, open, answer, source.piece, failed))
        })
    }

    fn origin(&self) -> String {
        "the script".to_owned()
    }
}

fn answer_stream(
    data: Bytes,
    open: Open,
    answer: Answer,
    piece: usize,
    failed: impl Fn(bool, &'static str) -> SourceError + Send + 'static,
) -> ByteStream {
    let end = open.asked.range.end() + answer.surplus as u64;
    let state = (open.asked.range.start(), Some(open));
    stream::unfold(state, move |(at, open)| {
        let (data, answer, open) = (data.clone(), answer.clone(), open);
        let stop = answer.end.map_or(end, |(offset, _)| offset.min(end)).max(at);
        let error = match answer.end {
            Some((_, Ending::Transient)) => Some(failed(true, "broken off")),
            Some((_, Ending::Final)) => Some(failed(false, "broken off for good")),
            _ => None,
        };
        async move {
            let open = open?;
            if at >= stop {
                if stop == end {
                    return None;
                }
                if answer.end.is_some_and(|(_, ending)| ending == Ending::Stall) {
                    std::future::pending::<()>().await;
                }
                return error.map(|error| (Err(error), (at, None)));
            }
            let mut until = stop.min(at + piece as u64);
            if let Some((offset, gate)) = answer.hold {
                if at >= offset {
                    gate.passed().await;
                } else {
                    until = until.min(offset);
                }
            }
            let index = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
            let mut bytes = vec![0x5a; index(until - at)];
            let there = data.len().min(index(until)).saturating_sub(index(at));
            bytes[..there].copy_from_slice(&data[index(at)..index(at) + there]);
            if let Some(offset) = answer.corrupt.filter(|offset| (at..until).contains(offset)) {
                bytes[index(offset - at)] ^= 0x20;
            }
            Some((Ok(Bytes::from(bytes)), (until, Some(open))))
        }
    })
    .boxed()
}

/// A layer made for a test.
#[derive(Debug, Clone)]
pub struct TestLayer {
    /// Its image.
    pub image: Vec<u8>,
    /// Its blob.
    pub bytes: Vec<u8>,
    /// How to open it.
    pub spec: LayerSpec,
    /// Where each chunk lies in the blob.
    pub chunks: Vec<ByteRange>,
}

impl TestLayer {
    /// A layer of chunks with the given sizes and an embedded index.
    pub fn new(sizes: &[usize], compression: Compression) -> Self {
        Self::seeded(sizes, compression, 1)
    }

    /// The same, with other bytes for each seed.
    pub fn seeded(sizes: &[usize], compression: Compression, seed: u64) -> Self {
        let mut image = Vec::new();
        let mut chunks = Vec::new();
        let mut assembler = BlobAssembler::new(Vec::new(), compression);
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for size in sizes {
            let start = image.len();
            // Half noise, half repetition: frames of about half the size.
            image.extend((0..*size).map(|i| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let [noise, .., steady] = state.to_be_bytes();
                if i % 128 < 64 { noise } else { steady & 1 }
            }));
            let plain = &image[start..];
            let stored = match compression {
                Compression::None => plain.to_vec(),
                Compression::Zstd => compress_chunk(1, plain),
            };
            let before = assembler.written();
            assembler.append(&stored, plain.len() as u64).expect("writing to memory cannot fail");
            chunks.push(ByteRange::new(before, assembler.written()).expect("blobs grow"));
        }
        let (bytes, summary) = assembler.finish().expect("writing to memory cannot fail");
        let framing = match compression {
            Compression::None => Framing::Bare,
            Compression::Zstd => Framing::Frame,
        };
        let section = IndexSection {
            family: IndexFamily::ImageSpec,
            framing,
            compression,
            digest: Some(summary.index_digest),
            data_end: summary.index_range.start(),
        };
        let whole = if compression == Compression::None { &bytes } else { &image };
        let spec = LayerSpec {
            blob: summary.digest,
            blob_size: summary.size,
            compression,
            diff_id: DiffId(Digest::of(Algorithm::Sha256, whole)),
            index: Some(IndexLocation { blob: summary.digest, range: summary.index_range, section }),
        };
        Self { image, bytes, spec, chunks }
    }

    /// The same layer, with its index in a blob of its own. Gives that blob, too.
    #[must_use]
    pub fn with_standalone_index(mut self) -> (Self, Vec<u8>) {
        let location = self.spec.index.as_mut().expect("test layers have an index");
        let (start, end) = (location.range.start(), location.range.end());
        let index = |offset: u64| usize::try_from(offset).expect("test blobs are small");
        let section = self.bytes[index(start)..index(end)].to_vec();
        let payload = location.section.payload(&section).expect("test layers are well-formed").to_vec();
        self.bytes.truncate(index(start));
        let digest = Digest::of(Algorithm::Sha256, &payload);
        location.blob = BlobDigest(digest);
        location.range = ByteRange::to(payload.len() as u64);
        location.section.framing = Framing::Bare;
        location.section.digest = Some(IndexDigest(digest));
        self.spec.blob = BlobDigest(Digest::of(Algorithm::Sha256, &self.bytes));
        self.spec.blob_size = self.bytes.len() as u64;
        self.spec.diff_id = DiffId(Digest::of(Algorithm::Sha256, &self.image));
        (self, payload)
    }

    /// The same layer without an index in its description.
    #[must_use]
    pub fn without_index(mut self) -> Self {
        self.spec.index = None;
        self
    }
}
