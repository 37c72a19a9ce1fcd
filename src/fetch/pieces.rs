//! What is known of a layer that comes in pieces: which of them are here, which were used, how far it has been hashed.
//!
//! Refuses to know requests, and what is done about chunks that are missing.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::readahead::{Around, ReadAhead};
use super::recent::{ChunkBits, Recent};
use super::slowest::Slowest;
use super::verify::Hashing;
use crate::chunked::ChunkIndex;
use crate::model::Algorithm;
use crate::store::BlobFile;

#[cfg(doc)]
use super::Standing;

/// A layer that can be had in pieces.
pub(super) struct Chunked {
    pub(super) index: Arc<ChunkIndex>,
    pub(super) tail: Tail,
    pub(super) file: Arc<BlobFile>,
    /// A bit for each chunk that a reader has reached.
    pub(super) touched: ChunkBits,
    /// A bit for each chunk that came because somebody might read it, before anybody did.
    pub(super) guessed: ChunkBits,
    /// Which chunks should stay when room is needed.
    pub(super) recent: Recent,
    pub(super) slowest: Slowest,
    pub(super) ahead: Mutex<ReadAhead>,
    pub(super) around: Option<Mutex<Around>>,
    /// Every chunk below the lower half was present when as many evictions had been counted as the upper half says.
    complete_below: AtomicU64,
    /// It is known what the whole is, or that this cannot be found out for now: see [`Standing::is_over`].
    pub(super) judged: AtomicBool,
    /// Fills that are not finished.
    pub(super) filling: AtomicU32,
    /// How far the whole has been hashed.
    pub(super) hashing: Hashing,
}

/// What the diffID covers behind the image: the index at the end of a raw blob (specification, section 5.2).
pub(super) enum Tail {
    Nothing,
    Bytes(Box<[u8]>),
    /// Something that was not fetched, so that the whole cannot be verified.
    Unknown,
}

const LOWER_HALF: u64 = 0xffff_ffff;

impl Chunked {
    pub(super) fn new(
        index: Arc<ChunkIndex>,
        tail: Tail,
        file: Arc<BlobFile>,
        read_ahead: u64,
        diff_id: Algorithm,
    ) -> Self {
        let chunks = index.len();
        Self {
            index,
            tail,
            touched: ChunkBits::new(chunks),
            guessed: ChunkBits::new(chunks),
            recent: Recent::new(chunks, file.evictions()),
            file,
            slowest: Slowest::default(),
            ahead: Mutex::new(ReadAhead::new(read_ahead)),
            around: (read_ahead > 0).then(Mutex::default),
            complete_below: AtomicU64::new(0),
            judged: AtomicBool::new(false),
            filling: AtomicU32::new(0),
            hashing: Hashing::new(diff_id),
        }
    }

    pub(super) fn chunk_size(&self, chunk: u32) -> u64 {
        self.index.chunk(chunk).map_or(0, |chunk| chunk.image.len())
    }

    /// Takes note that `chunk` came because of a guess.
    pub(super) fn guessed(&self, chunk: u32) {
        if !self.touched.has(chunk) {
            self.guessed.set(chunk);
        }
    }

    /// Stored bytes that came because of guesses, and how many of them nobody has read.
    pub(super) fn guesses(&self) -> (u64, u64) {
        let (mut all, mut wasted) = (0, 0);
        for chunk in (0..self.index.len()).filter(|chunk| self.guessed.has(*chunk)) {
            let len = self.index.chunk(chunk).map_or(0, |chunk| chunk.blob.len());
            all += len;
            wasted += if self.touched.has(chunk) { 0 } else { len };
        }
        (all, wasted)
    }

    /// True if every chunk is present. Costs nothing for the chunks that were found present before, unless some were evicted.
    pub(super) fn is_complete(&self) -> bool {
        let evictions = self.file.evictions() << 32;
        let seen = self.complete_below.load(Ordering::Relaxed);
        let mut below = if seen & !LOWER_HALF == evictions { seen & LOWER_HALF } else { 0 };
        let len = u64::from(self.index.len());
        while below < len && u32::try_from(below).is_ok_and(|chunk| self.file.is_present(chunk)) {
            below += 1;
        }
        self.complete_below.store(evictions | below, Ordering::Relaxed);
        below == len
    }

    /// Looks at every chunk again the next time. Marks are also taken back without an eviction: by a disk that fails, and by
    /// who distrusts the copy.
    pub(super) fn start_over(&self) {
        self.complete_below.store(0, Ordering::Relaxed);
    }

    pub(super) fn bytes_present(&self) -> u64 {
        (0..self.index.len()).filter(|chunk| self.file.is_present(*chunk)).map(|chunk| self.chunk_size(chunk)).sum()
    }
}
