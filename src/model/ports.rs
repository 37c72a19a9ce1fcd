//! The two ports through which bytes reach the rooms that make sense of them.

use std::io;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;

use super::{BlobDigest, ByteRange};

/// Why bytes could not be read at once.
#[derive(Debug, thiserror::Error)]
pub enum ReadAtError {
    /// They are not local. Whoever reads brings at least this range and tries again.
    #[error("bytes {0} are not local yet")]
    Absent(ByteRange),
    /// They lie behind the end: the structure that pointed there is wrong.
    #[error("bytes {range} lie outside of the {size} bytes there are")]
    OutOfBounds {
        /// What was asked for.
        range: ByteRange,
        /// How much there is.
        size: u64,
    },
    /// The local file failed.
    #[error("cannot read bytes {range} of the local copy")]
    Io {
        /// What was asked for.
        range: ByteRange,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Random access to bytes of which some may still be missing. Never waits for a network: what is absent is an answer.
pub trait ReadAt: Send + Sync {
    /// How many bytes there are in all, present or not.
    fn size(&self) -> u64;

    /// Fills `buf` with the bytes from `offset`. All or nothing; an empty `buf` within bounds succeeds.
    ///
    /// # Errors
    /// See [`ReadAtError`].
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError>;
}

impl ReadAt for [u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
        let range = ByteRange::at(offset, buf.len() as u64)
            .map_err(|_| ReadAtError::OutOfBounds { range: ByteRange::to(u64::MAX), size: self.size() })?;
        let found = usize::try_from(range.start())
            .ok()
            .zip(usize::try_from(range.end()).ok())
            .and_then(|(start, end)| self.get(start..end))
            .ok_or(ReadAtError::OutOfBounds { range, size: self.size() })?;
        buf.copy_from_slice(found);
        Ok(())
    }
}

impl ReadAt for Vec<u8> {
    fn size(&self) -> u64 {
        self.as_slice().size()
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
        self.as_slice().read_exact_at(offset, buf)
    }
}

impl<T: ReadAt + ?Sized> ReadAt for &T {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
        (**self).read_exact_at(offset, buf)
    }
}

impl<T: ReadAt + ?Sized> ReadAt for std::sync::Arc<T> {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
        (**self).read_exact_at(offset, buf)
    }
}

impl ReadAt for std::fs::File {
    fn size(&self) -> u64 {
        self.metadata().map_or(0, |metadata| metadata.len())
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
        let range = ByteRange::at(offset, buf.len() as u64)
            .map_err(|_| ReadAtError::OutOfBounds { range: ByteRange::to(u64::MAX), size: self.size() })?;
        std::os::unix::fs::FileExt::read_exact_at(self, buf, offset).map_err(|source| {
            if source.kind() == io::ErrorKind::UnexpectedEof {
                ReadAtError::OutOfBounds { range, size: self.size() }
            } else {
                ReadAtError::Io { range, source }
            }
        })
    }
}

/// Why a source of blobs did not deliver.
#[derive(Debug, thiserror::Error)]
#[error("cannot fetch bytes {range} of blob {blob} from {origin}")]
pub struct SourceError {
    /// Which blob.
    pub blob: BlobDigest,
    /// Which of its bytes.
    pub range: ByteRange,
    /// Where from, without credentials: a host and repository, or a directory.
    pub origin: String,
    /// True if the same request may succeed later (a time-out, a refused connection, 429, 5xx), false if it is final.
    pub transient: bool,
    /// What happened.
    #[source]
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// The bytes of a range, in order, as they arrive.
pub type ByteStream = BoxStream<'static, Result<Bytes, SourceError>>;

/// Where blobs come from: a registry with its mirrors, or an image layout on disk.
pub trait BlobSource: Send + Sync + 'static {
    /// Opens `range` of `blob`. The stream ends after exactly `range.len()` bytes or with an error; the bytes are
    /// not verified. Retries, mirrors and credentials are the implementation's affair; `attempt` 0 is the first try,
    /// a higher one says that the bytes of the last try were wrong and another mirror is preferred.
    fn open(&self, blob: BlobDigest, range: ByteRange, attempt: u32) -> BoxFuture<'_, Result<ByteStream, SourceError>>;

    /// A name for messages, without credentials.
    fn origin(&self) -> String;
}
