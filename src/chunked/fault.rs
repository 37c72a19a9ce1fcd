//! What can be wrong with a chunk index: damage, or merely something that this program does not read.

use super::{Compression, MAX_CHUNK_SIZE, MAX_CHUNKS, MAX_INDEX_SIZE, MAX_STORED_CHUNK_SIZE, Mismatch};
use crate::model::IndexDigest;

/// Why an index gives no chunks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// The index breaks a rule of its format: the layer is damaged and must not be used.
    #[error("the chunk index is corrupt")]
    Corrupt(#[source] CorruptIndex),
    /// The index is of a kind this program does not know, or beyond its limits: the layer is read without it, from
    /// start to end.
    #[error("the chunk index is not usable, the layer has to be read from start to end")]
    Unreadable(#[source] UnreadableIndex),
}

impl From<CorruptIndex> for IndexError {
    fn from(fault: CorruptIndex) -> Self {
        Self::Corrupt(fault)
    }
}

impl From<UnreadableIndex> for IndexError {
    fn from(fault: UnreadableIndex) -> Self {
        Self::Unreadable(fault)
    }
}

/// A rule of the format that an index breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CorruptIndex {
    /// The bytes are not those the manifest promises.
    #[error("its digest is {}, {} was promised", .0.found, .0.expected)]
    DigestMismatch(Box<Mismatch<IndexDigest>>),
    /// There is no skippable frame where the index should be.
    #[error("no zstd skippable frame at its place")]
    NoFrame,
    /// The skippable frame is longer or shorter than the place for it.
    #[error("its skippable frame holds {frame} bytes where there are {section}")]
    FrameLength {
        /// What the frame header says.
        frame: u64,
        /// What is there.
        section: u64,
    },
    /// Not even a header.
    #[error("{0} bytes are too few for a header")]
    NoHeader(u64),
    /// Other bytes where the magic should be.
    #[error("it begins with {0:02x?}, which is not its magic")]
    BadMagic([u8; 4]),
    /// The payload's length is not header plus entries.
    #[error("{found} bytes long, header and entries need {expected}")]
    Length {
        /// What header and entries need; `u64::MAX` if that is beyond 64 bits.
        expected: u64,
        /// What is there.
        found: u64,
    },
    /// A reserved byte is in use.
    #[error("a reserved byte of its header is not zero")]
    Reserved,
    /// The checksum length does not belong to the hash family.
    #[error("checksums of {size} bytes do not belong to hash family {family}")]
    HashSize {
        /// `HashAlgo`.
        family: u8,
        /// `HashSize`.
        size: u8,
    },
    /// The header's compression is not the media type's.
    #[error("it says {found:?} for a layer whose media type says {expected:?}")]
    CompressionMismatch {
        /// What the media type says.
        expected: Compression,
        /// What the header says.
        found: Compression,
    },
    /// Chunks of no bytes.
    #[error("its chunk size is zero")]
    ZeroChunkSize,
    /// Chunks and image size contradict each other: one is zero, the other is not.
    #[error("{chunks} chunks for an image of {image_size} bytes")]
    EmptyMismatch {
        /// How many chunks.
        chunks: u32,
        /// Image size.
        image_size: u64,
    },
    /// The image does not begin in the first chunk.
    #[error("its first chunk begins at image offset {0}")]
    FirstChunk(u64),
    /// Image offsets do not increase strictly, or the last reaches the image size.
    #[error("chunk {chunk} covers no range of the image: {start} to {end}")]
    ImageOrder {
        /// Which chunk.
        chunk: u32,
        /// Its image offset.
        start: u64,
        /// Where the next begins, or the image ends.
        end: u64,
    },
    /// Blob offsets do not increase strictly, or the last reaches the end of the chunks.
    #[error("chunk {chunk} covers no range of the blob: {start} to {end}")]
    BlobOrder {
        /// Which chunk.
        chunk: u32,
        /// Its blob offset.
        start: u64,
        /// Where the next begins, or the chunks end.
        end: u64,
    },
    /// A raw blob is its image, so both offsets of a chunk are the same.
    #[error("raw chunk {chunk} is stored at {blob} but begins the image at {image}")]
    RawOffset {
        /// Which chunk.
        chunk: u32,
        /// Its blob offset.
        blob: u64,
        /// Its image offset.
        image: u64,
    },
    /// A raw blob is its image, so both end at the same place.
    #[error("a raw image of {image_size} bytes in {data_end} bytes of blob")]
    RawSize {
        /// Image size.
        image_size: u64,
        /// Blob offset where the chunks end.
        data_end: u64,
    },
}

/// What about an index this program does not understand or not accept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnreadableIndex {
    /// A later or unknown version.
    #[error("its version is {0}, only 1 is known")]
    Version(u32),
    /// An unknown compression.
    #[error("compression type {0} is not known")]
    Compression(u8),
    /// Unknown flags.
    #[error("flags {0:#06x} are not known")]
    Flags(u16),
    /// An unknown hash family.
    #[error("hash family {0} is not known")]
    HashFamily(u8),
    /// The byte-swapped magic of an abandoned draft.
    #[error("it is in the form of containerd pull request 12764, which is not read")]
    AbandonedDraft,
    /// More bytes than [`MAX_INDEX_SIZE`].
    #[error("{0} bytes are more than the limit of {MAX_INDEX_SIZE}")]
    TooLarge(u64),
    /// More chunks than [`MAX_CHUNKS`].
    #[error("{0} chunks are more than the limit of {MAX_CHUNKS}")]
    TooManyChunks(u64),
    /// A chunk that inflates to more than [`MAX_CHUNK_SIZE`].
    #[error("chunk {chunk} has {size} bytes, more than the limit of {MAX_CHUNK_SIZE}")]
    ChunkSize {
        /// Which chunk.
        chunk: u32,
        /// How many bytes of image.
        size: u64,
    },
    /// A chunk that takes more than [`MAX_STORED_CHUNK_SIZE`].
    #[error("chunk {chunk} is stored in {size} bytes, more than the limit of {MAX_STORED_CHUNK_SIZE}")]
    StoredChunkSize {
        /// Which chunk.
        chunk: u32,
        /// How many bytes of blob.
        size: u64,
    },
}
