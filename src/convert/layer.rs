//! One layer: a tar streams in, a chunked blob with an EROFS image streams out.
//!
//! One pass over the tar. File data is cut into chunks as it comes, compressed on the pool and spooled to a temporary
//! file; the tree of the layer grows in memory. When the tar ends, the metadata is written as the blob's first
//! chunks, the spool is copied behind it, and the index follows. The diffID covers metadata and data in the order of
//! the image, so the spooled chunks are inflated again on the way (on the pool), which proves every frame before
//! anybody relies on it.
//!
//! Guarantees: memory is bounded by the tree (about 150 bytes for each entry) and what is under way on the pool,
//! whatever the sizes of files. The same tar and options give the same bytes, whatever the number of threads.
//!
//! It refuses to know where the tar comes from, how it was compressed, and where the blob goes.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};

use rayon::ThreadPool;

use super::ordered::Ordered;
use crate::chunked::{
    AssembleError, BlobAssembler, BlobSummary, Chunk, ChunkError, Compression, MAX_CHUNK_SIZE, compress_chunk_into,
    decode_chunk,
};
use crate::erofs::writer::{
    Area, BLOCK_SIZE, DataBlock, Extents, FileData, ImageIdentity, LayerRole, Plan, Tree, TreeError, TreeStatistics,
    UnresolvedLink,
};
use crate::model::{
    Algorithm, ByteRange, ChunkDigest, DiffId, Digest, EntryKind, Hasher, LayerEntry, Metadata, RangeError, RelPath,
};
use crate::tar;

/// Where a blob is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkSizes {
    /// Bytes of image in a chunk of metadata.
    pub metadata: usize,
    /// Small files share a chunk of at most this many bytes.
    pub shared: usize,
    /// Large files are cut into chunks of this many bytes.
    pub large: usize,
}

impl Default for ChunkSizes {
    fn default() -> Self {
        Self { metadata: 128 << 10, shared: 512 << 10, large: 1 << 20 }
    }
}

impl ChunkSizes {
    /// Sizes with chunks of file data of `size` bytes (small files share one of up to half that), as far as possible.
    #[must_use]
    pub fn with_data(self, size: u64) -> Self {
        let large = usize::try_from(size.clamp(BLOCK_SIZE, MAX_CHUNK_SIZE)).unwrap_or(self.large);
        Self { metadata: self.metadata, shared: large.min((large / 2).max(4096)), large }
    }
}

/// The zstd level unless told otherwise.
pub const DEFAULT_LEVEL: i32 = 3;

/// How a layer is converted.
#[derive(Debug, Clone)]
pub struct LayerOptions {
    /// Where it stands in its image.
    pub role: LayerRole,
    /// What its image is called.
    pub identity: ImageIdentity,
    /// zstd level.
    pub level: i32,
    /// Where the blob is cut.
    pub chunks: ChunkSizes,
    /// Where the temporary file goes: as large as the blob.
    pub spool: PathBuf,
}

impl LayerOptions {
    /// The usual options for the layer whose uncompressed tar is `source`, with temporary files in `spool`.
    pub fn new(role: LayerRole, source: DiffId, spool: &Path) -> Self {
        let identity = ImageIdentity::of_source(&source.0);
        Self { role, identity, level: DEFAULT_LEVEL, chunks: ChunkSizes::default(), spool: spool.to_owned() }
    }
}

/// Why a layer was not converted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The tar cannot be read.
    #[error("cannot read the layer's tar")]
    Tar(#[from] tar::TarError),
    /// Its tree cannot become an EROFS image.
    #[error("cannot build the layer's file system")]
    Tree(#[from] TreeError),
    /// Hard links name files of lower layers, and no way to reach those was given.
    #[error("{} of the layer's hard links name files of lower layers, {} names {}", .0.len(), .0[0].path, .0[0].target)]
    NeedsLower(Vec<UnresolvedLink>),
    /// A file of a lower layer was not delivered.
    #[error("cannot take {path} from the layers below")]
    Lower {
        /// Which.
        path: RelPath,
        /// Why.
        #[source]
        source: LowerError,
    },
    /// The temporary file.
    #[error("cannot use a temporary file in {}", directory.display())]
    Spool {
        /// Where.
        directory: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The temporary file did not keep what was written.
    #[error("the temporary file in {} gave back other bytes than were written", directory.display())]
    Damaged {
        /// Where.
        directory: PathBuf,
        /// Which chunk.
        #[source]
        source: ChunkError,
    },
    /// The blob cannot be written.
    #[error("cannot write the converted layer")]
    Write(#[from] AssembleError),
    /// Offsets beyond 64 bits.
    #[error("the converted layer is too large")]
    Range(#[from] RangeError),
}

/// Why a lower layer did not deliver: whoever implements [`LowerLayers`] knows.
pub type LowerError = Box<dyn std::error::Error + Send + Sync>;

/// The layers below, merged, for the rare layer that cannot stand alone.
pub trait LowerLayers {
    /// The file at `path` (never a directory) with its content, for hard links of this layer that name it; none if
    /// there is no such file.
    ///
    /// # Errors
    /// It cannot be read.
    fn file(&mut self, path: &RelPath) -> Result<Option<LowerFile<'_>>, LowerError>;

    /// The metadata of the directory at `path`, for one that this layer needs but has no entry for; none if there is
    /// no such directory.
    ///
    /// # Errors
    /// It cannot be read.
    fn directory(&mut self, path: &RelPath) -> Result<Option<Metadata>, LowerError>;
}

/// A file of a lower layer.
pub struct LowerFile<'a> {
    /// Its kind and metadata; the path means nothing.
    pub entry: LayerEntry,
    /// Of a regular file: exactly its bytes.
    pub content: Box<dyn Read + 'a>,
}

/// What is in a converted layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LayerStatistics {
    /// Files, directories, links, bytes, holes.
    pub tree: TreeStatistics,
    /// Bytes of the image before file data.
    pub metadata_bytes: u64,
    /// Bytes of the image that are file data.
    pub data_bytes: u64,
    /// Chunks of metadata.
    pub metadata_chunks: u32,
    /// Chunks of file data.
    pub data_chunks: u32,
    /// Bytes of the tar, up to its end mark.
    pub tar_bytes: u64,
}

/// A converted layer.
#[derive(Debug, Clone)]
pub struct ConvertedLayer {
    /// The blob: digest, size, index.
    pub summary: BlobSummary,
    /// The image's digest.
    pub diff_id: DiffId,
    /// What is in it.
    pub statistics: LayerStatistics,
}

/// How much of the tar is read, and of the spool, at once.
const READ_SIZE: usize = 256 << 10;

/// Converts the plain tar `source` into a blob that goes to `sink`. The caller's thread reads, hashes and writes,
/// the threads of `pool` compress and inflate.
///
/// Bytes of `source` behind the tar's end are not read; whoever wants the digest of the source reads on.
///
/// # Errors
/// See [`LayerError`]. What `sink` then has is of no use.
pub fn convert_layer<W: Write>(
    source: impl Read,
    options: &LayerOptions,
    pool: &ThreadPool,
    mut lower: Option<&mut dyn LowerLayers>,
    sink: W,
) -> Result<(W, ConvertedLayer), LayerError> {
    let mut tree = Tree::new(options.role);
    let mut packer = Packer::new(options, pool)?;
    let mut reader = tar::Reader::new(BufReader::with_capacity(READ_SIZE, source));
    let mut buffer = vec![0; READ_SIZE];
    while let Some(entry) = reader.next_entry()? {
        let data = match entry.kind {
            EntryKind::Regular { size } => {
                let mut extents = packer.begin_file(size, &tree)?;
                while let Some(run) = reader.next_run() {
                    match run {
                        tar::Run::Hole(len) => extents.hole(len, &mut |blocks| packer.put(blocks))?,
                        tar::Run::Data(_) => {
                            let len = reader.read_body(&mut buffer)?;
                            extents.push(&buffer[..len], &mut |blocks| packer.put(blocks))?;
                        }
                    }
                }
                packer.end_file(extents)?
            }
            _ => FileData::EMPTY,
        };
        tree.add(&entry, data)?;
    }
    let tar_bytes = reader.offset();

    if options.role == LayerRole::Upper
        && let Some(lower) = lower.as_deref_mut()
    {
        adopt_directories(&mut tree, lower)?;
    }
    bring_links(&mut tree, &mut packer, lower, &mut buffer)?;

    let spooled = packer.finish()?;
    let plan = Plan::new(tree, options.identity)?;
    let mut blob = Blob::new(options, pool, sink);
    blob.metadata(&plan, &spooled)?;
    let metadata_chunks = blob.chunks;
    blob.data(spooled)?;
    let data_chunks = blob.chunks - metadata_chunks;
    let statistics = LayerStatistics {
        tree: *plan.statistics(),
        metadata_bytes: plan.metadata_size(),
        data_bytes: blob.assembler.image_size() - plan.metadata_size(),
        metadata_chunks,
        data_chunks,
        tar_bytes,
    };
    let diff_id = DiffId(blob.hasher.finish());
    let (sink, summary) = blob.assembler.finish()?;
    Ok((sink, ConvertedLayer { summary, diff_id, statistics }))
}

/// Directories without entry look like those below.
fn adopt_directories(tree: &mut Tree, lower: &mut dyn LowerLayers) -> Result<(), LayerError> {
    for path in tree.implied_directories() {
        let found = lower.directory(&path).map_err(|source| LayerError::Lower { path: path.clone(), source })?;
        if let Some(metadata) = found {
            tree.set_implied_directory(&path, &metadata)?;
        }
    }
    Ok(())
}

/// Files of lower layers that hard links name are copied into this one.
fn bring_links(
    tree: &mut Tree,
    packer: &mut Packer<'_>,
    lower: Option<&mut dyn LowerLayers>,
    buffer: &mut [u8],
) -> Result<(), LayerError> {
    let missing = tree.unresolved_links()?;
    if missing.is_empty() {
        return Ok(());
    }
    let Some(lower) = lower else { return Err(LayerError::NeedsLower(missing)) };
    for UnresolvedLink { target, path } in missing {
        let failed = |source: LowerError| LayerError::Lower { path: target.clone(), source };
        let Some(LowerFile { entry, mut content }) = lower.file(&target).map_err(failed)? else {
            return Err(TreeError::DanglingLink { path, target }.into());
        };
        let data = match entry.kind {
            EntryKind::Regular { size } => {
                let mut extents = packer.begin_file(size, tree)?;
                let mut left = size;
                while left > 0 {
                    let len = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
                    content.read_exact(&mut buffer[..len]).map_err(|error| failed(error.into()))?;
                    extents.push(&buffer[..len], &mut |blocks| packer.put(blocks))?;
                    left -= len as u64;
                }
                packer.end_file(extents)?
            }
            _ => FileData::EMPTY,
        };
        tree.bring(&target, &entry, &data)?;
    }
    Ok(())
}

/// Cuts file data into chunks, has them compressed, and spools them.
struct Packer<'p> {
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
struct Frame {
    image: Vec<u8>,
    stored: Vec<u8>,
    checksum: ChunkDigest,
}

/// A chunk in the spool.
#[derive(Clone, Copy)]
struct FrameEntry {
    image: u32,
    stored: u32,
    checksum: ChunkDigest,
}

/// What a packer leaves behind.
struct Spooled {
    file: File,
    frames: Vec<FrameEntry>,
    blocks: u32,
}

impl Frame {
    fn of(level: i32, image: Vec<u8>, mut stored: Vec<u8>) -> Self {
        compress_chunk_into(level, &image, &mut stored);
        let checksum = ChunkDigest(Digest::of(Algorithm::Sha256, &stored));
        Self { image, stored, checksum }
    }
}

impl<'p> Packer<'p> {
    fn new(options: &'p LayerOptions, pool: &'p ThreadPool) -> Result<Self, LayerError> {
        let directory = &options.spool;
        let spool = tempfile::tempfile_in(directory)
            .map_err(|source| LayerError::Spool { directory: directory.clone(), source })?;
        Ok(Self {
            sizes: options.chunks,
            level: options.level,
            directory,
            chunk: Vec::new(),
            blocks: 0,
            jobs: Ordered::new(pool),
            spool: BufWriter::with_capacity(1 << 20, spool),
            frames: Vec::new(),
            free: Vec::new(),
        })
    }

    /// Begins a file, in a new chunk if it does not fit beside those in the current one.
    fn begin_file(&mut self, size: u64, tree: &Tree) -> Result<Extents, LayerError> {
        let blocks = size.div_ceil(BLOCK_SIZE).saturating_mul(BLOCK_SIZE);
        if self.chunk.len() as u64 + blocks > self.sizes.shared as u64 {
            self.cut()?;
        }
        // An area of too many blocks is noticed when the file ends.
        let block = u32::try_from(self.blocks).unwrap_or(u32::MAX);
        Ok(Extents::new(size, DataBlock { area: Area::Late, block }, tree.map_entries()))
    }

    fn end_file(&mut self, extents: Extents) -> Result<FileData, LayerError> {
        let (data, _) = extents.finish(&mut |blocks| self.put(blocks))?;
        if self.chunk.len() >= self.sizes.shared {
            self.cut()?;
        }
        Ok(data)
    }

    /// Takes whole blocks of the current file.
    fn put(&mut self, mut data: &[u8]) -> Result<(), LayerError> {
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

    fn finish(mut self) -> Result<Spooled, LayerError> {
        self.cut()?;
        while self.store_next()? {}
        let failed = |source| LayerError::Spool { directory: self.directory.to_owned(), source };
        let mut file = self.spool.into_inner().map_err(|error| failed(error.into_error()))?;
        file.rewind().map_err(failed)?;
        let blocks = u32::try_from(self.blocks).map_err(|_| TreeError::TooLarge)?;
        Ok(Spooled { file, frames: self.frames, blocks })
    }
}

/// The blob in the making.
struct Blob<'p, W> {
    level: i32,
    metadata_size: usize,
    directory: &'p Path,
    pool: &'p ThreadPool,
    assembler: BlobAssembler<W>,
    hasher: Hasher,
    chunks: u32,
}

impl<'p, W: Write> Blob<'p, W> {
    fn new(options: &'p LayerOptions, pool: &'p ThreadPool, sink: W) -> Self {
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
    fn metadata(&mut self, plan: &Plan, spooled: &Spooled) -> Result<(), LayerError> {
        let jobs = Ordered::new(self.pool);
        let mut out = MetadataChunks { blob: self, jobs, chunk: Vec::new(), error: None };
        let written = plan.write_metadata(0, spooled.blocks, &mut out);
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
    fn data(&mut self, spooled: Spooled) -> Result<(), LayerError> {
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
