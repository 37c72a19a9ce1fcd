//! Puts the blob together: metadata, then spooled chunks, each proved on the way, then the index.

use std::io::{self, BufReader, Read, Write};
use std::path::Path;

use rayon::ThreadPool;

use super::layer::{LayerError, LayerOptions, READ_SIZE};
use super::ordered::Ordered;
use super::packer::{Frame, Spooled};
use crate::chunked::{BlobAssembler, Chunk, ChunkError, Compression, decode_chunk};
use crate::erofs::writer::{EarlyLayout, Plan, TreeError};
use crate::model::{Algorithm, ByteRange, Hasher};

/// The blob in the making.
pub(super) struct Blob<'p, W> {
    level: i32,
    metadata_size: usize,
    directory: &'p Path,
    pool: &'p ThreadPool,
    pub(super) assembler: BlobAssembler<W>,
    pub(super) hasher: Hasher,
    pub(super) chunks: u32,
}

impl<'p, W: Write> Blob<'p, W> {
    pub(super) fn new(options: &'p LayerOptions, pool: &'p ThreadPool, sink: W) -> Self {
        Self {
            level: options.level,
            metadata_size: options.chunks.metadata,
            directory: &options.spool,
            pool,
            assembler: BlobAssembler::new(sink, Compression::Zstd),
            hasher: Hasher::new(Algorithm::Sha256),
            chunks: 0,
        }
    }

    /// Writes the metadata in chunks of its own.
    pub(super) fn metadata(&mut self, plan: &Plan, early: &EarlyLayout, late: u32) -> Result<(), LayerError> {
        let jobs = Ordered::new(self.pool);
        let mut out = MetadataChunks { blob: self, jobs, chunk: Vec::new(), error: None };
        let written = plan.write_metadata(early, late, &mut out);
        if let Some(error) = out.error.take() {
            return Err(error);
        }
        // What cannot be written has left its error above; the rest is about sizes.
        written.map_err(|_| TreeError::TooLarge)?;
        out.cut()?;
        while out.append_next()? {}
        Ok(())
    }

    /// Copies the spooled chunks behind the metadata, inflating each to prove it and for the diffID.
    pub(super) fn data(&mut self, spooled: Spooled) -> Result<(), LayerError> {
        let directory = self.directory;
        let mut jobs: Ordered<'_, Result<Frame, ChunkError>> = Ordered::new(self.pool);
        let mut spool = BufReader::with_capacity(READ_SIZE, spooled.file);
        let (mut stored_at, mut image_at) = (0, 0);
        let mut free: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        let append = |blob: &mut Self, result: Result<Frame, ChunkError>| -> Result<_, LayerError> {
            let frame = result.map_err(|source| LayerError::Damaged { directory: directory.to_owned(), source })?;
            blob.append(&frame)?;
            Ok((frame.image, frame.stored))
        };
        for entry in spooled.frames {
            while jobs.is_full() {
                let Some(result) = jobs.take() else { break };
                free.push(append(self, result)?);
            }
            let (mut image, mut stored) = free.pop().unwrap_or_default();
            stored.resize(entry.stored as usize, 0);
            spool
                .read_exact(&mut stored)
                .map_err(|source| LayerError::Spool { directory: directory.to_owned(), source })?;
            let chunk = Chunk {
                blob: ByteRange::at(stored_at, entry.stored.into())?,
                image: ByteRange::at(image_at, entry.image.into())?,
                checksum: Some(entry.checksum),
            };
            (stored_at, image_at) = (chunk.blob.end(), chunk.image.end());
            jobs.start(entry.image as usize, move || {
                decode_chunk(&chunk, Compression::Zstd, &stored, &mut image)?;
                Ok(Frame { image, stored, checksum: entry.checksum })
            });
        }
        while let Some(result) = jobs.take() {
            append(self, result)?;
        }
        Ok(())
    }

    fn append(&mut self, frame: &Frame) -> Result<(), LayerError> {
        self.hasher.update(&frame.image);
        self.assembler.append_hashed(&frame.stored, frame.image.len() as u64, frame.checksum)?;
        self.chunks += 1;
        Ok(())
    }
}

/// Takes metadata as it is written and cuts it into chunks.
struct MetadataChunks<'b, 'p, W> {
    blob: &'b mut Blob<'p, W>,
    jobs: Ordered<'p, Frame>,
    chunk: Vec<u8>,
    /// Why writing failed, since an `io::Error` has no place for it.
    error: Option<LayerError>,
}

impl<W: Write> MetadataChunks<'_, '_, W> {
    fn cut(&mut self) -> Result<(), LayerError> {
        while self.jobs.is_full() {
            self.append_next()?;
        }
        if !self.chunk.is_empty() {
            let (level, image) = (self.blob.level, std::mem::take(&mut self.chunk));
            self.jobs.start(image.len(), move || Frame::of(level, image, Vec::new()));
        }
        Ok(())
    }

    fn append_next(&mut self) -> Result<bool, LayerError> {
        let Some(frame) = self.jobs.take() else { return Ok(false) };
        self.blob.append(&frame)?;
        Ok(true)
    }
}

impl<W: Write> Write for MetadataChunks<'_, '_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(self.blob.metadata_size - self.chunk.len());
        self.chunk.extend_from_slice(&bytes[..taken]);
        if self.chunk.len() == self.blob.metadata_size
            && let Err(error) = self.cut()
        {
            self.error = Some(error);
            return Err(io::ErrorKind::Other.into());
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
