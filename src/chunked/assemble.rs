//! Writes layer blobs: chunks in order, then the index. The blob is hashed while it is written; nothing is sought
//! back to, so that the writer may be a socket.

use std::io::{self, Write};

use super::{Compression, INDEX_MAGIC, MAX_CHUNK_SIZE, MAX_CHUNKS, MAX_STORED_CHUNK_SIZE, SKIPPABLE_MAGIC};
use crate::model::{Algorithm, BlobDigest, ByteRange, ChunkDigest, Digest, Hasher, IndexDigest};

/// Why a blob was not written.
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    /// The writer failed.
    #[error("cannot write the layer blob at offset {offset}")]
    Write {
        /// How much had been written.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// More chunks than an index may have.
    #[error("the layer has more than {MAX_CHUNKS} chunks: choose a larger chunk size")]
    TooManyChunks,
    /// A chunk that no reader would accept.
    #[error("a chunk of {image} image bytes in {stored} stored bytes is outside of what an index may hold")]
    ChunkSize {
        /// Image bytes.
        image: u64,
        /// Stored bytes.
        stored: u64,
    },
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobSummary {
    /// Digest of all its bytes.
    pub digest: BlobDigest,
    /// How many bytes.
    pub size: u64,
    /// Where the index section lies: the skippable frame of a zstd blob, the bare payload of a raw one.
    pub index_range: ByteRange,
    /// Digest of the index payload.
    pub index_digest: IndexDigest,
    /// Size of the layer image.
    pub image_size: u64,
    /// How many chunks.
    pub chunks: u32,
    /// How they are stored.
    pub compression: Compression,
}

/// A blob without index, and the index apart from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetachedIndex {
    /// Digest of the blob.
    pub digest: BlobDigest,
    /// Its size.
    pub size: u64,
    /// Size of the layer image.
    pub image_size: u64,
    /// The index: bytes of a blob of their own.
    pub payload: Vec<u8>,
}

/// Writes a blob chunk by chunk, with SHA-256 checksums unless told otherwise.
pub struct BlobAssembler<W> {
    out: W,
    compression: Compression,
    checksums: Option<Algorithm>,
    whole: Hasher,
    written: u64,
    image_size: u64,
    chunks: u32,
    entries: Vec<u8>,
}

impl<W: Write> BlobAssembler<W> {
    /// An assembler that has written nothing.
    pub fn new(out: W, compression: Compression) -> Self {
        Self::with_checksums(out, compression, Some(Algorithm::Sha256))
    }

    /// Like [`Self::new`] with other checksums, or none.
    pub fn with_checksums(out: W, compression: Compression, checksums: Option<Algorithm>) -> Self {
        let whole = Hasher::new(Algorithm::Sha256);
        Self { out, compression, checksums, whole, written: 0, image_size: 0, chunks: 0, entries: Vec::new() }
    }

    /// Appends a chunk: `stored` is one zstd frame, or the raw bytes, of the next `image_len` bytes of the image.
    ///
    /// # Errors
    /// See [`AssembleError`]. After one the blob is of no use.
    pub fn append(&mut self, stored: &[u8], image_len: u64) -> Result<(), AssembleError> {
        let checksum = self.checksums.map(|algorithm| ChunkDigest(Digest::of(algorithm, stored)));
        self.push(stored, image_len, checksum)
    }

    /// Like [`Self::append`] for a chunk whose checksum over `stored` was computed elsewhere, in parallel.
    ///
    /// # Errors
    /// See [`AssembleError`].
    ///
    /// # Panics
    /// If the checksum is of another algorithm than the blob's.
    pub fn append_hashed(&mut self, stored: &[u8], image_len: u64, checksum: ChunkDigest) -> Result<(), AssembleError> {
        assert_eq!(Some(checksum.0.algorithm()), self.checksums, "all checksums of an index are of one algorithm");
        self.push(stored, image_len, Some(checksum))
    }

    fn push(&mut self, stored: &[u8], image_len: u64, checksum: Option<ChunkDigest>) -> Result<(), AssembleError> {
        let stored_len = stored.len() as u64;
        let fits = (1..=MAX_CHUNK_SIZE).contains(&image_len) && (1..=MAX_STORED_CHUNK_SIZE).contains(&stored_len);
        let raw_fits = self.compression != Compression::None || stored_len == image_len;
        let image_size = self.image_size.checked_add(image_len).filter(|_| fits && raw_fits);
        let image_size = image_size.ok_or(AssembleError::ChunkSize { image: image_len, stored: stored_len })?;
        if self.chunks == MAX_CHUNKS {
            return Err(AssembleError::TooManyChunks);
        }
        self.entries.extend_from_slice(&self.written.to_le_bytes());
        self.entries.extend_from_slice(&self.image_size.to_le_bytes());
        if let Some(checksum) = checksum {
            self.entries.extend_from_slice(checksum.0.as_bytes());
        }
        self.write(stored)?;
        self.image_size = image_size;
        self.chunks += 1;
        Ok(())
    }

    /// Size of the image so far.
    pub fn image_size(&self) -> u64 {
        self.image_size
    }

    /// Size of the blob so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Writes the index at the end and gives the writer back, not flushed.
    ///
    /// # Errors
    /// [`AssembleError::Write`].
    pub fn finish(mut self) -> Result<(W, BlobSummary), AssembleError> {
        let payload = self.payload();
        let start = self.written;
        if self.compression == Compression::Zstd {
            let len = u32::try_from(payload.len()).expect("the limit of chunks keeps an index far below 4 GiB");
            self.write(&SKIPPABLE_MAGIC.to_le_bytes())?;
            self.write(&len.to_le_bytes())?;
        }
        self.write(&payload)?;
        let summary = BlobSummary {
            digest: BlobDigest(self.whole.finish()),
            size: self.written,
            index_range: ByteRange::new(start, self.written).expect("the index ends behind its start"),
            index_digest: IndexDigest(Digest::of(Algorithm::Sha256, &payload)),
            image_size: self.image_size,
            chunks: self.chunks,
            compression: self.compression,
        };
        Ok((self.out, summary))
    }

    /// Writes no index but hands it out, for a layer of its own beside this one.
    pub fn finish_detached(self) -> (W, DetachedIndex) {
        let payload = self.payload();
        let digest = BlobDigest(self.whole.finish());
        (self.out, DetachedIndex { digest, size: self.written, image_size: self.image_size, payload })
    }

    fn payload(&self) -> Vec<u8> {
        let (family, size) = match self.checksums {
            None => (0, 0),
            Some(Algorithm::Sha256) => (1, 32),
            Some(Algorithm::Sha512) => (1, 64),
        };
        let compression = match self.compression {
            Compression::None => 0,
            Compression::Zstd => 1,
        };
        let mut payload = Vec::with_capacity(32 + self.entries.len());
        payload.extend_from_slice(&INDEX_MAGIC);
        payload.extend_from_slice(&[1, compression, 0, 0]);
        payload.extend_from_slice(&self.image_size.to_le_bytes());
        payload.extend_from_slice(&self.chunks.to_le_bytes());
        payload.extend_from_slice(&[family, size]);
        payload.extend_from_slice(&[0; 10]);
        payload.extend_from_slice(&self.entries);
        payload
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), AssembleError> {
        let failed = |source| AssembleError::Write { offset: self.written, source };
        self.out.write_all(bytes).map_err(failed)?;
        self.whole.update(bytes);
        self.written += bytes.len() as u64;
        Ok(())
    }
}
