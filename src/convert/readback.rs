//! The image inside of a converted blob that lies in a local file, read at random.
//!
//! Used for the few questions that a layer asks the layers below it while an image is converted. A handful of inflated
//! chunks is kept; nothing else is.

use std::fs::File;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

use lru::LruCache;

use crate::chunked::{
    BlobSummary, ChunkIndex, Compression, Framing, IndexError, IndexFamily, IndexSection, decode_chunk,
};
use crate::model::{ByteRange, ReadAt, ReadAtError};

/// Chunks that are kept: directories and inodes of a walk lie close together, and a file is read from start to end.
const KEPT_CHUNKS: NonZeroUsize = NonZeroUsize::new(8).expect("eight is not zero");

/// The image in a blob.
pub(super) struct BlobImage {
    file: Arc<File>,
    index: ChunkIndex,
    chunks: Mutex<LruCache<u32, Arc<Vec<u8>>>>,
}

impl BlobImage {
    /// Reads the index of a zstd blob that was just written.
    pub(super) fn open(file: Arc<File>, summary: &BlobSummary) -> Result<Self, BlobError> {
        let range = summary.index_range;
        let mut section = vec![0; usize::try_from(range.len()).map_err(|_| BlobError::TooLarge(range))?];
        ReadAt::read_exact_at(&*file, range.start(), &mut section)?;
        let reader = IndexSection {
            family: IndexFamily::ImageSpec,
            framing: Framing::Frame,
            compression: Compression::Zstd,
            digest: Some(summary.index_digest),
            data_end: range.start(),
        };
        let index = reader.read(&section)?;
        Ok(Self { file, index, chunks: Mutex::new(LruCache::new(KEPT_CHUNKS)) })
    }

    fn chunk(&self, number: u32) -> Result<Arc<Vec<u8>>, ReadAtError> {
        let mut kept = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(image) = kept.get(&number) {
            return Ok(Arc::clone(image));
        }
        let chunk = self
            .index
            .chunk(number)
            .ok_or(ReadAtError::OutOfBounds { range: ByteRange::to(u64::MAX), size: self.size() })?;
        let failed = |source| ReadAtError::Io { range: chunk.image, source };
        let len = usize::try_from(chunk.blob.len()).map_err(|error| failed(std::io::Error::other(error)))?;
        let mut stored = vec![0; len];
        ReadAt::read_exact_at(&*self.file, chunk.blob.start(), &mut stored)?;
        let mut image = Vec::new();
        decode_chunk(&chunk, self.index.compression(), &stored, &mut image)
            .map_err(|error| failed(std::io::Error::other(error)))?;
        let image = Arc::new(image);
        kept.put(number, Arc::clone(&image));
        Ok(image)
    }
}

impl ReadAt for BlobImage {
    fn size(&self) -> u64 {
        self.index.image_size()
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
        let outside = |range| ReadAtError::OutOfBounds { range, size: self.size() };
        let range = ByteRange::at(offset, buf.len() as u64).map_err(|_| outside(ByteRange::to(u64::MAX)))?;
        if range.end() > self.size() {
            return Err(outside(range));
        }
        for number in self.index.chunks_in(range) {
            let image = self.chunk(number)?;
            let covers = self.index.chunk(number).ok_or_else(|| outside(range))?.image;
            let Some(common) = covers.intersection(range) else { continue };
            let at = |base: u64, from: u64| usize::try_from(from - base).map_err(|_| outside(range));
            let from = image.get(at(covers.start(), common.start())?..at(covers.start(), common.end())?);
            let to = buf.get_mut(at(range.start(), common.start())?..at(range.start(), common.end())?);
            let (Some(from), Some(to)) = (from, to) else { return Err(outside(range)) };
            to.copy_from_slice(from);
        }
        Ok(())
    }
}

/// Why a converted blob cannot be read back.
#[derive(Debug, thiserror::Error)]
pub(super) enum BlobError {
    /// The index.
    #[error("cannot read the chunk index of a layer that was just converted")]
    Index(#[from] IndexError),
    /// The file.
    #[error("cannot read back a layer that was just converted")]
    Read(#[from] ReadAtError),
    /// More than fits this machine.
    #[error("the chunk index at {0} is too large for this machine")]
    TooLarge(ByteRange),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunked::{BlobAssembler, compress_chunk};

    #[test]
    fn any_range_reads_back() {
        let chunks: Vec<Vec<u8>> = (1..20_u8).map(|n| vec![n; usize::from(n) * 37]).collect();
        let file = tempfile::tempfile().unwrap();
        let mut assembler = BlobAssembler::new(file.try_clone().unwrap(), Compression::Zstd);
        for chunk in &chunks {
            assembler.append(&compress_chunk(1, chunk), chunk.len() as u64).unwrap();
        }
        let (_, summary) = assembler.finish().unwrap();
        let whole = chunks.concat();
        let image = BlobImage::open(Arc::new(file), &summary).unwrap();
        assert_eq!(image.size(), whole.len() as u64);
        for start in (0..whole.len()).step_by(31) {
            for len in [0, 1, 36, 37, 38, 500, whole.len() - start] {
                let len = len.min(whole.len() - start);
                let mut found = vec![0; len];
                image.read_exact_at(start as u64, &mut found).unwrap();
                assert_eq!(found, whole[start..start + len]);
            }
        }
        let error = image.read_exact_at(whole.len() as u64, &mut [0]).unwrap_err();
        assert!(matches!(error, ReadAtError::OutOfBounds { .. }), "{error}");
    }
}
