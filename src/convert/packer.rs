//! Cuts file data into chunks, compresses them on the pool and spools them, while the tar still streams.
//!
//! Files of the start-up profile wait uncompressed until the tar has ended, since their order is the profile's.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use rayon::ThreadPool;

use super::layer::{ChunkSizes, LayerError, LayerOptions, READ_SIZE};
use super::ordered::Ordered;
use crate::chunked::compress_chunk_into;
use crate::erofs::writer::{Area, BLOCK_SIZE, DataBlock, EarlyLayout, Extents, FileData, Tree, TreeError};
use crate::model::{Algorithm, ChunkDigest, Digest, RelPath};

/// Where the blocks of files go.
pub(super) trait BlockStore {
    /// Begins a file of `size` bytes.
    fn begin(&mut self, size: u64, tree: &Tree) -> Result<Extents, LayerError>;

    /// Takes whole blocks of the current file.
    fn put(&mut self, blocks: &[u8]) -> Result<(), LayerError>;

    /// Ends the current file.
    fn end(&mut self, extents: Extents) -> Result<FileData, LayerError>;
}

/// Cuts file data into chunks, has them compressed, and spools them.
pub(super) struct Packer<'p> {
    sizes: ChunkSizes,
    level: i32,
    directory: &'p Path,
    /// The chunk that is being filled.
    chunk: Vec<u8>,
    /// Blocks of file data so far.
    blocks: u64,
    jobs: Ordered<'p, Frame>,
    spool: BufWriter<File>,
    frames: Vec<FrameEntry>,
    /// Buffers to use again.
    free: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A compressed chunk, with the bytes it was made from.
pub(super) struct Frame {
    pub(super) image: Vec<u8>,
    pub(super) stored: Vec<u8>,
    pub(super) checksum: ChunkDigest,
}

/// A chunk in the spool.
#[derive(Clone, Copy)]
pub(super) struct FrameEntry {
    pub(super) image: u32,
    pub(super) stored: u32,
    pub(super) checksum: ChunkDigest,
}

/// What a packer leaves behind.
pub(super) struct Spooled {
    pub(super) file: File,
    pub(super) frames: Vec<FrameEntry>,
    pub(super) blocks: u32,
}

impl Frame {
    pub(super) fn of(level: i32, image: Vec<u8>, mut stored: Vec<u8>) -> Self {
        compress_chunk_into(level, &image, &mut stored);
        let checksum = ChunkDigest(Digest::of(Algorithm::Sha256, &stored));
        Self { image, stored, checksum }
    }
}

impl<'p> Packer<'p> {
    pub(super) fn new(options: &'p LayerOptions, pool: &'p ThreadPool) -> Result<Self, LayerError> {
        let directory = &options.spool;
        let spool = temporary(directory)?;
        Ok(Self {
            sizes: options.chunks,
            level: options.level,
            directory,
            chunk: Vec::new(),
            blocks: 0,
            jobs: Ordered::new(pool),
            spool,
            frames: Vec::new(),
            free: Vec::new(),
        })
    }

    /// Begins a row of `len` bytes, in a new chunk if it does not fit beside those in the current one.
    fn begin_row(&mut self, len: u64) -> Result<(), LayerError> {
        if len.saturating_add(self.chunk.len() as u64) > self.sizes.shared as u64 {
            self.cut()?;
        }
        Ok(())
    }

    /// Takes whole blocks of the current row.
    fn row(&mut self, mut data: &[u8]) -> Result<(), LayerError> {
        self.blocks += data.len() as u64 / BLOCK_SIZE;
        if self.blocks > u64::from(u32::MAX) {
            return Err(TreeError::TooLarge.into());
        }
        while !data.is_empty() {
            let (head, rest) = data.split_at(data.len().min(self.sizes.large - self.chunk.len()));
            self.chunk.extend_from_slice(head);
            data = rest;
            if self.chunk.len() == self.sizes.large {
                self.cut()?;
            }
        }
        Ok(())
    }

    fn end_row(&mut self) -> Result<(), LayerError> {
        if self.chunk.len() >= self.sizes.shared { self.cut() } else { Ok(()) }
    }

    /// Ends the current chunk.
    fn cut(&mut self) -> Result<(), LayerError> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        while self.jobs.is_full() {
            self.store_next()?;
        }
        let (mut next, stored) = self.free.pop().unwrap_or_default();
        next.clear();
        let image = std::mem::replace(&mut self.chunk, next);
        let level = self.level;
        self.jobs.start(image.len(), move || Frame::of(level, image, stored));
        Ok(())
    }

    /// Spools the oldest chunk; false if there is none.
    fn store_next(&mut self) -> Result<bool, LayerError> {
        let Some(Frame { image, stored, checksum }) = self.jobs.take() else { return Ok(false) };
        self.spool
            .write_all(&stored)
            .map_err(|source| LayerError::Spool { directory: self.directory.to_owned(), source })?;
        let size = |bytes: &Vec<u8>| u32::try_from(bytes.len()).expect("a chunk is smaller than 4 GiB");
        self.frames.push(FrameEntry { image: size(&image), stored: size(&stored), checksum });
        self.free.push((image, stored));
        Ok(true)
    }

    pub(super) fn finish(mut self) -> Result<Spooled, LayerError> {
        self.cut()?;
        while self.store_next()? {}
        let failed = |source| LayerError::Spool { directory: self.directory.to_owned(), source };
        let mut file = self.spool.into_inner().map_err(|error| failed(error.into_error()))?;
        file.rewind().map_err(failed)?;
        let blocks = u32::try_from(self.blocks).map_err(|_| TreeError::TooLarge)?;
        Ok(Spooled { file, frames: self.frames, blocks })
    }
}

impl BlockStore for Packer<'_> {
    fn begin(&mut self, size: u64, tree: &Tree) -> Result<Extents, LayerError> {
        self.begin_row(size.div_ceil(BLOCK_SIZE).saturating_mul(BLOCK_SIZE))?;
        let block = u32::try_from(self.blocks).map_err(|_| TreeError::TooLarge)?;
        Ok(Extents::new(size, DataBlock { area: Area::Late, block }, tree.map_entries()))
    }

    fn put(&mut self, blocks: &[u8]) -> Result<(), LayerError> {
        self.row(blocks)
    }

    fn end(&mut self, extents: Extents) -> Result<FileData, LayerError> {
        let (data, _) = extents.finish(&mut |blocks| self.put(blocks))?;
        self.end_row()?;
        Ok(data)
    }
}

/// The files of a start-up profile.
pub(super) struct EarlyFiles<'p> {
    options: &'p LayerOptions,
    /// Path -> place in the profile.
    ranks: HashMap<&'p RelPath, usize>,
    raw: Option<BufWriter<File>>,
    rows: Vec<Row>,
    /// Blocks so far.
    blocks: u64,
    rank: usize,
}

/// The stored blocks of one file.
struct Row {
    rank: usize,
    first: u32,
    len: u32,
}

impl<'p> EarlyFiles<'p> {
    pub(super) fn new(options: &'p LayerOptions) -> Self {
        // Of a path that is named twice the first place counts.
        let ranks = options.early.iter().enumerate().rev().map(|(rank, path)| (path, rank)).collect();
        Self { options, ranks, raw: None, rows: Vec::new(), blocks: 0, rank: 0 }
    }

    /// True if the file at `path` comes here.
    pub(super) fn wants(&mut self, path: &RelPath) -> bool {
        match self.ranks.get(path) {
            Some(rank) => {
                self.rank = *rank;
                true
            }
            None => false,
        }
    }

    /// The files that have come here, in the order of the tar.
    pub(super) fn found(&self) -> Vec<RelPath> {
        self.rows.iter().filter_map(|row| self.options.early.get(row.rank)).cloned().collect()
    }

    /// Packs all files in the order of the profile.
    pub(super) fn finish(mut self, pool: &ThreadPool) -> Result<Option<(EarlyLayout, Spooled)>, LayerError> {
        let Some(raw) = self.raw else { return Ok(None) };
        let failed = |source| LayerError::Spool { directory: self.options.spool.clone(), source };
        let mut raw =
            BufReader::with_capacity(READ_SIZE, raw.into_inner().map_err(|error| failed(error.into_error()))?);
        self.rows.sort_by_key(|row| (row.rank, row.first));
        let layout = EarlyLayout::of_rows(self.rows.iter().map(|row| (row.first, row.len)));
        let layout = layout.ok_or(TreeError::TooLarge)?;
        let mut packer = Packer::new(self.options, pool)?;
        let mut buffer = vec![0; READ_SIZE];
        for Row { first, len, .. } in self.rows {
            let mut left = u64::from(len) * BLOCK_SIZE;
            packer.begin_row(left)?;
            raw.seek(SeekFrom::Start(u64::from(first) * BLOCK_SIZE)).map_err(failed)?;
            while left > 0 {
                let part = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
                raw.read_exact(&mut buffer[..part]).map_err(failed)?;
                packer.row(&buffer[..part])?;
                left -= part as u64;
            }
            packer.end_row()?;
        }
        Ok(Some((layout, packer.finish()?)))
    }
}

impl BlockStore for EarlyFiles<'_> {
    fn begin(&mut self, size: u64, tree: &Tree) -> Result<Extents, LayerError> {
        let block = u32::try_from(self.blocks).map_err(|_| TreeError::TooLarge)?;
        self.rows.push(Row { rank: self.rank, first: block, len: 0 });
        Ok(Extents::new(size, DataBlock { area: Area::Early, block }, tree.map_entries()))
    }

    fn put(&mut self, blocks: &[u8]) -> Result<(), LayerError> {
        let directory = &self.options.spool;
        let raw = match &mut self.raw {
            Some(raw) => raw,
            None => self.raw.insert(temporary(directory)?),
        };
        raw.write_all(blocks).map_err(|source| LayerError::Spool { directory: directory.clone(), source })?;
        self.blocks += blocks.len() as u64 / BLOCK_SIZE;
        Ok(())
    }

    fn end(&mut self, extents: Extents) -> Result<FileData, LayerError> {
        let (data, stored) = extents.finish(&mut |blocks| self.put(blocks))?;
        if let Some(row) = self.rows.last_mut() {
            row.len = u32::try_from(stored).map_err(|_| TreeError::TooLarge)?;
        }
        Ok(data)
    }
}

/// A temporary file that vanishes with its owner.
fn temporary(directory: &Path) -> Result<BufWriter<File>, LayerError> {
    let file = tempfile::tempfile_in(directory)
        .map_err(|source| LayerError::Spool { directory: directory.to_owned(), source })?;
    Ok(BufWriter::with_capacity(1 << 20, file))
}
