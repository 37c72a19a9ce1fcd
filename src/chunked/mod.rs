//! The chunk index and the zstd frames of a layer blob: bytes in, values out.
//!
//! A blob holds a layer image as a row of chunks, each stored as raw bytes or as one zstd frame, and (embedded at its
//! end or in a blob of its own) a table that says where each chunk lies. [`IndexSection::read`] and [`ChunkIndex`]
//! read that table in both published forms, [`decode_chunk`] turns stored bytes into image bytes, [`SequentialReader`]
//! does so for a whole blob whose index is missing or not understood, [`BlobAssembler`] writes blobs.
//! `docs/format.md` describes the bytes and holds vectors for them.
//!
//! Guarantees: whatever the bytes say, no panic, no allocation above the limits below, and never image bytes that were
//! not checked against a checksum where there is one. It knows nothing of files, registries, manifests, or of what an
//! image holds.

mod assemble;
mod fault;
mod frame;
mod index;
mod sequential;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod vectors;

pub use assemble::{AssembleError, BlobAssembler, BlobSummary, DetachedIndex};
pub use fault::{CorruptIndex, IndexError, UnreadableIndex};
pub use frame::{ChunkError, ChunkFault, compress_chunk, compress_chunk_into, decode_chunk};
pub use index::{Chunk, ChunkIndex, Framing, IndexSection};
pub use sequential::{SequentialError, SequentialReader, SequentialSummary};

/// How the bytes of a chunk are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Compression {
    /// As they are. The blob is the image.
    None,
    /// Each chunk is one zstd frame.
    Zstd,
}

/// Which of the published forms an index has. The magic is the same in both, so it takes the names of the annotations
/// that led there to tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IndexFamily {
    /// EROFS image layer format specification, section 3.4: 32-byte header, chunk boundaries anywhere.
    ImageSpec,
    /// The draft of containerd pull request 12703: 24-byte header, one chunk size, zstd only.
    Pr12703,
}

/// Two digests that should be one. Boxed in errors, since it is large.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mismatch<D> {
    /// What was promised.
    pub expected: D,
    /// What the bytes give.
    pub found: D,
}

/// The most chunks an index may have. A layer of 256 GiB in chunks of 256 KiB stays below it, and a table of that
/// many entries with SHA-256 takes 48 MiB.
pub const MAX_CHUNKS: u32 = 1 << 20;

/// The most bytes a chunk may have inflated, since a chunk is verified and inflated in one piece of memory. Known
/// writers use up to 4 MiB; sixteen times as much leaves room for others and still bounds a hostile index.
pub const MAX_CHUNK_SIZE: u64 = 64 << 20;

/// The most bytes a chunk may take in the blob: what incompressible data of [`MAX_CHUNK_SIZE`] takes, and room for a
/// padding frame.
pub const MAX_STORED_CHUNK_SIZE: u64 = MAX_CHUNK_SIZE + MAX_CHUNK_SIZE / 128 + (64 << 10);

/// The most bytes of an index that are worth fetching: [`MAX_CHUNKS`] entries of the longest kind, the longer header
/// and a frame header.
pub const MAX_INDEX_SIZE: u64 = 8 + 32 + MAX_CHUNKS as u64 * (16 + 64);

/// The largest zstd window a sequential read accepts, as a power of two: what the `zstd` command accepts unasked.
pub const MAX_WINDOW_LOG: u32 = 27;

/// First four bytes of a chunk index of either family.
const INDEX_MAGIC: [u8; 4] = [0xCD, 0xE4, 0xEC, 0x67];

/// The same magic as another unfinished draft stores it (containerd pull request 12764). Its table is not read.
const INDEX_MAGIC_REVERSED: [u8; 4] = [0x67, 0xEC, 0xE4, 0xCD];

/// The magic of the skippable frame that is written around an embedded index (RFC 8878, section 3.1.2).
const SKIPPABLE_MAGIC: u32 = 0x184D_2A50;

/// Length of a skippable frame's magic and size.
const SKIPPABLE_HEADER: usize = 8;
