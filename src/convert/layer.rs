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

use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use rayon::ThreadPool;

use super::adopt::settle;
pub use super::adopt::{LowerDirectory, LowerError, LowerFile, LowerLayers};
use super::blob::Blob;
use super::left_out::LeftOut;
use super::packer::{BlockStore, EarlyFiles, Packer};
use crate::chunked::{AssembleError, BlobSummary, ChunkError, MAX_CHUNK_SIZE};
use crate::erofs::writer::{
    BLOCK_SIZE, Extents, FileData, ImageIdentity, LayerRole, Plan, Tree, TreeError, TreeStatistics, UnresolvedLink,
};
use crate::model::{DiffId, EntryKind, RangeError, RelPath};
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

/// Chosen on an image of 716 MB of tar (six layers, Debian with Python, numpy, pandas, LLVM; 229.3 MB as gzip). CPU
/// seconds are those of the whole process: gunzip, all digests, compression, and inflating everything again. Size is
/// that of all blobs over their gzip originals. Two cores of an AMD EPYC, much else running, so the seconds are high.
///
/// | level | shared/large KiB | CPU s | size | chunks | | level | shared/large KiB | CPU s | size | chunks |
/// |---|---|---|---|---|---|---|---|---|---|---|
/// | 1 | 512/1024 | 8.1 | 1.073 | 1239 | | 3 | 128/256 | 8.5 | 1.020 | 4658 |
/// | 2 | 512/1024 | 8.1 | 1.014 | 1239 | | 3 | 256/512 | 8.6 | 0.994 | 2397 |
/// | 3 | 512/1024 | 8.6 | 0.967 | 1239 | | 3 | 1024/4096 | 8.9 | 0.942 | 571 |
/// | 4 | 512/1024 | 9.4 | 0.961 | 1239 | | 3 | 2048/4096 | 9.0 | 0.921 | 342 |
/// | 5 | 512/1024 | 11.6 | 0.930 | 1239 | | **5** | **256/512** | **11.6** | **0.960** | **2397** |
/// | 6 | 512/1024 | 13.4 | 0.909 | 1239 | | 6 | 256/512 | 13.7 | 0.943 | 2397 |
/// | 9 | 512/1024 | 16.8 | 0.900 | 1239 | | 5 | 512/2048 | 12.2 | 0.922 | 1088 |
///
/// What a lazy reader brings for a page is a whole chunk, so the chunks are as small as the size allows: halving them
/// costs 3 % of size. Metadata is read at random by look-ups and from end to end by walks; 128 KiB hold about 800 files.
impl Default for ChunkSizes {
    fn default() -> Self {
        Self { metadata: 128 << 10, shared: 256 << 10, large: 512 << 10 }
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

/// The zstd level unless told otherwise: the highest that stays well below 15 CPU seconds for 700 MB of tar. The
/// measurements stand beside [`ChunkSizes::default`].
pub const DEFAULT_LEVEL: i32 = 5;

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
    /// Files to lay out first, in this order: what a start-up profile names. Paths as the tar has them; of a file with
    /// several names the first one counts.
    pub early: Vec<RelPath>,
    /// Where temporary files go: together as large as the blob, and as the early files uncompressed.
    pub spool: PathBuf,
}

impl LayerOptions {
    /// The usual options for the layer whose uncompressed tar is `source`, with temporary files in `spool`.
    pub fn new(role: LayerRole, source: DiffId, spool: &Path) -> Self {
        let identity = ImageIdentity::of_source(&source.0);
        Self {
            role,
            identity,
            level: DEFAULT_LEVEL,
            chunks: ChunkSizes::default(),
            early: Vec::new(),
            spool: spool.to_owned(),
        }
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
    /// Far more paths lead through symbolic links of lower layers than any real layer has.
    #[error("more than {0} of the layer's directories are symbolic links in the layers below")]
    TooManyLinks(usize),
    /// The image.
    #[error("cannot write the unpacked layer")]
    Image {
        /// Why.
        #[source]
        source: io::Error,
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

/// What is in a converted layer.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
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
    /// What of the tar is not in it.
    pub left_out: Vec<LeftOut>,
    /// Which of [`LayerOptions::early`] are files of it, in the order of the tar.
    pub early: Vec<RelPath>,
}

/// How much of the tar is read, and of the spool, at once.
pub(super) const READ_SIZE: usize = 256 << 10;

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
    lower: Option<&mut dyn LowerLayers>,
    sink: W,
) -> Result<(W, ConvertedLayer), LayerError> {
    let mut packer = Packer::new(options, pool)?;
    let mut early = EarlyFiles::new(options);
    let TarTree { tree, tar_bytes, dropped } = read_tar(source, options.role, &mut packer, &mut early, lower)?;
    let late = packer.finish()?;
    let found_early = early.found();
    let (layout, early) = early.finish(pool)?.unzip();
    let plan = Plan::new(tree, options.identity)?;
    let mut blob = Blob::new(options, pool, sink);
    blob.metadata(&plan, &layout.unwrap_or_default(), late.blocks)?;
    let metadata_chunks = blob.chunks;
    for spooled in early.into_iter().chain([late]) {
        blob.data(spooled)?;
    }
    let data_chunks = blob.chunks - metadata_chunks;
    let statistics = LayerStatistics {
        tree: plan.statistics().clone(),
        metadata_bytes: plan.metadata_size(),
        data_bytes: blob.assembler.image_size() - plan.metadata_size(),
        metadata_chunks,
        data_chunks,
        tar_bytes,
    };
    let diff_id = DiffId(blob.hasher.finish());
    let (sink, summary) = blob.assembler.finish()?;
    let left_out = LeftOut::of_layer(&dropped, &statistics.tree.dropped);
    Ok((sink, ConvertedLayer { summary, diff_id, statistics, left_out, early: found_early }))
}

/// What a tar was taken apart into, beside the contents of its files.
pub(super) struct TarTree {
    /// The layer's tree.
    pub(super) tree: Tree,
    /// Bytes of the tar, up to its end mark.
    pub(super) tar_bytes: u64,
    /// What of it is not in the tree.
    pub(super) dropped: tar::Dropped,
}

/// Takes the tar `source` apart: what its files hold goes to `store`, or to `early` if that wants it; the tree is given
/// back with everything that it takes over from the layers below.
pub(super) fn read_tar(
    source: impl Read,
    role: LayerRole,
    store: &mut impl BlockStore,
    early: &mut EarlyFiles<'_>,
    lower: Option<&mut dyn LowerLayers>,
) -> Result<TarTree, LayerError> {
    let mut tree = Tree::new(role);
    let mut reader = tar::Reader::new(BufReader::with_capacity(READ_SIZE, source));
    let mut buffer = vec![0; READ_SIZE];
    while let Some(entry) = reader.next_entry()? {
        let data = match entry.kind {
            EntryKind::Regular { size } if early.wants(&entry.path) => {
                let extents = early.begin(size, &tree)?;
                store_file(&mut reader, extents, early, &mut buffer)?
            }
            EntryKind::Regular { size } => {
                let extents = store.begin(size, &tree)?;
                store_file(&mut reader, extents, store, &mut buffer)?
            }
            _ => FileData::EMPTY,
        };
        tree.add(&entry, data)?;
    }
    settle(&mut tree, store, lower, &mut buffer)?;
    Ok(TarTree { tree, tar_bytes: reader.offset(), dropped: reader.dropped().clone() })
}

/// Stores the content of the reader's current file.
fn store_file(
    reader: &mut tar::Reader<impl Read>,
    mut extents: Extents,
    store: &mut impl BlockStore,
    buffer: &mut [u8],
) -> Result<FileData, LayerError> {
    while let Some(run) = reader.next_run() {
        match run {
            tar::Run::Hole(len) => extents.hole(len, &mut |blocks| store.put(blocks))?,
            tar::Run::Data(_) => {
                let len = reader.read_body(buffer)?;
                extents.push(&buffer[..len], &mut |blocks| store.put(blocks))?;
            }
        }
    }
    store.end(extents)
}
