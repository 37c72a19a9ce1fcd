//! Why bytes of a layer did not come.

use std::time::Duration;

use crate::chunked::{ChunkError, IndexError, SequentialError};
use crate::model::{BlobDigest, ByteRange, DiffId, Digest, SourceError};
use crate::store::StoreError;

/// Why bytes of a layer did not come. Shared by everybody who waited for them.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The source gave no bytes.
    #[error("cannot fetch chunk {chunk} of layer {blob}")]
    Source {
        /// The layer's blob.
        blob: BlobDigest,
        /// The first chunk that is missing.
        chunk: u32,
        /// What the source says.
        #[source]
        source: Box<SourceError>,
    },
    /// The source fell silent, or stopped short of what was asked for.
    #[error("cannot fetch bytes {range} of blob {blob} from {origin}: {what}")]
    Interrupted {
        /// The blob.
        blob: BlobDigest,
        /// What was still missing.
        range: ByteRange,
        /// Where from, without credentials.
        origin: String,
        /// What happened.
        what: &'static str,
    },
    /// The bytes that came are not the chunk, twice.
    #[error("chunk {chunk} of layer {blob} from {origin} is corrupt")]
    Corrupt {
        /// The layer's blob.
        blob: BlobDigest,
        /// Which chunk.
        chunk: u32,
        /// Where from, without credentials.
        origin: String,
        /// Where it lies, what was expected, what was found.
        #[source]
        source: ChunkError,
    },
    /// The chunk index did not come.
    #[error("cannot fetch the chunk index of layer {blob}")]
    IndexSource {
        /// The layer's blob.
        blob: BlobDigest,
        /// What the source says.
        #[source]
        source: Box<SourceError>,
    },
    /// The chunk index that came is not to be used.
    #[error("cannot use the chunk index of layer {blob} from {origin}")]
    Index {
        /// The layer's blob.
        blob: BlobDigest,
        /// Where from, without credentials.
        origin: String,
        /// What is wrong with it.
        #[source]
        source: IndexError,
    },
    /// A layer that is read from start to end did not come.
    #[error("cannot fetch layer {blob}")]
    WholeSource {
        /// The layer's blob.
        blob: BlobDigest,
        /// What the source says.
        #[source]
        source: Box<SourceError>,
    },
    /// A layer that is read from start to end cannot be inflated or written.
    #[error("cannot unpack layer {blob}")]
    Unpack {
        /// The layer's blob.
        blob: BlobDigest,
        /// Why.
        #[source]
        source: SequentialError,
    },
    /// The blob's bytes are not those its digest names.
    #[error("blob {blob} from {origin} is corrupt: its bytes have digest {found}")]
    BlobDigest {
        /// The blob.
        blob: BlobDigest,
        /// Where from, without credentials.
        origin: String,
        /// What its bytes hash to.
        found: Box<Digest>,
    },
    /// The layer is not the one the image's config names.
    #[error("layer {blob} is not what its image says: it has diffID {found}, not {expected}")]
    DiffId {
        /// The layer's blob.
        blob: BlobDigest,
        /// What the image says.
        expected: Box<DiffId>,
        /// What its bytes hash to.
        found: Box<DiffId>,
    },
    /// The store failed.
    #[error("cannot keep layer {blob}")]
    Store {
        /// The layer's blob.
        blob: BlobDigest,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// Chunks of the layer were evicted while the rest was being brought.
    #[error("cannot keep all of layer {blob}: the cache has no room for it")]
    NoRoom {
        /// The layer's blob.
        blob: BlobDigest,
    },
    /// It took too long.
    #[error("cannot fetch bytes {range} of layer {blob} within {deadline:?}")]
    Deadline {
        /// The layer's blob.
        blob: BlobDigest,
        /// Which bytes of the image.
        range: ByteRange,
        /// The time there was.
        deadline: Duration,
    },
    /// All of the layer is here, and hashing it broke off.
    #[error("cannot verify layer {blob}, all of which is here")]
    Verify {
        /// The layer's blob.
        blob: BlobDigest,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// Whoever fetched is gone: the process is shutting down.
    #[error("fetching layer {blob} was given up: the process is shutting down")]
    Abandoned {
        /// The layer's blob.
        blob: BlobDigest,
    },
}
