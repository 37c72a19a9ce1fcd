//! The whole of an image verified against its source: every blob, index, chunk, diffID and inode.
//!
//! Nothing of the store is believed and nothing is put there: each layer is streamed from the source into temporary files,
//! hashed as it comes, taken apart chunk by chunk, and its file system walked. What is wrong is collected, not the first thing
//! alone. Memory stays at a chunk or two; the disk must hold the largest layer and its image.

use std::fs::File;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use futures::StreamExt as _;
use serde::Serialize;

use super::image::Documents;
use crate::chunked::{MAX_INDEX_SIZE, SequentialError, SequentialReader, decode_chunk};
use crate::erofs;
use crate::model::{BlobDigest, BlobSource, ByteRange, Hasher, ReadAt as _, ReadAtError};
use crate::oci::{ImagePlan, LayerPlan, StackedLayer};

/// Most findings kept for one layer; the rest is counted.
const FINDINGS: usize = 1000;
/// The largest image a layer without an index may inflate to, as on the fetch path.
const IMAGE_LIMIT: u64 = 256 << 30;

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The layer's blob.
    pub layer: BlobDigest,
    /// Where in it: the blob, the index, a chunk, a file.
    pub place: String,
    /// What.
    pub problem: String,
}

/// What was looked at, and what is wrong with it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Examination {
    /// Layers.
    pub layers: u64,
    /// Bytes of blobs.
    pub bytes: u64,
    /// Chunks.
    pub chunks: u64,
    /// Inodes.
    pub inodes: u64,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// How many more things are wrong.
    pub more: u64,
}

impl Examination {
    fn find(&mut self, layer: BlobDigest, place: impl Into<String>, problem: impl Into<String>) {
        if self.findings.len() < FINDINGS {
            self.findings.push(Finding { layer, place: place.into(), problem: problem.into() });
        } else {
            self.more += 1;
        }
    }

    fn take_in(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.chunks += other.chunks;
        self.inodes += other.inodes;
        self.more += other.more;
        for Finding { layer, place, problem } in other.findings {
            self.find(layer, place, problem);
        }
    }
}

/// Verifies every layer of `plan`. `progress` is told the bytes of blobs that have been looked at.
///
/// # Errors
/// The source does not deliver, or the local disk fails: then nothing is known of the image.
pub async fn examine(
    documents: &Documents,
    plan: &ImagePlan,
    spool: &Path,
    progress: &(dyn Fn(u64) + Sync),
) -> anyhow::Result<Examination> {
    std::fs::create_dir_all(spool).with_context(|| format!("cannot create {}", spool.display()))?;
    let source = documents.source().blobs();
    let mut examination = Examination::default();
    let mut images: Vec<Option<Arc<File>>> = Vec::with_capacity(plan.layers.len());
    for layer in &plan.layers {
        let blob = fetch(&*source, layer, spool, &mut examination, progress).await?;
        let index = match layer.index.filter(|index| index.blob != layer.blob) {
            Some(index) => Some(collect(&*source, index.blob, index.range).await?),
            None => None,
        };
        let (layer, spool) = (layer.clone(), spool.to_owned());
        let (checked, image) =
            blocking(move |checked| take_apart(&layer, blob, index.as_deref(), &spool, checked)).await?;
        examination.layers += 1;
        examination.take_in(checked);
        images.push(image.map(Arc::new));
    }
    for stacked in &plan.stack {
        let (stacked, plan, images) = (stacked.clone(), plan.clone(), images.clone());
        let walk = move |checked: &mut Examination| {
            walk_files(&stacked, &plan, &images, checked);
            Ok(())
        };
        let (checked, ()) = blocking(walk).await?;
        examination.take_in(checked);
    }
    Ok(examination)
}

/// Does work that keeps a thread busy where that hurts nobody.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce(&mut Examination) -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<(Examination, T)> {
    let work = move || {
        let mut checked = Examination::default();
        let done = work(&mut checked)?;
        anyhow::Ok((checked, done))
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(broken) => std::panic::resume_unwind(broken.into_panic()),
    }
}

/// Streams a blob into a temporary file and holds it against its digest.
async fn fetch(
    source: &dyn BlobSource,
    layer: &LayerPlan,
    spool: &Path,
    examination: &mut Examination,
    progress: &(dyn Fn(u64) + Sync),
) -> anyhow::Result<File> {
    let kept = || format!("cannot keep blob {} in {}", layer.blob, spool.display());
    let mut file = tempfile::tempfile_in(spool).with_context(kept)?;
    let mut hasher = Hasher::new(layer.blob.0.algorithm());
    let mut stream = source.open(layer.blob, ByteRange::to(layer.blob_size), 0).await?;
    while let Some(piece) = stream.next().await {
        let piece = piece?;
        hasher.update(&piece);
        // The page cache takes it at once; a disk that cannot keep up slows the download down, and nothing else runs here.
        file.write_all(&piece).with_context(kept)?;
        examination.bytes += piece.len() as u64;
        progress(piece.len() as u64);
    }
    let found = hasher.finish();
    if found != layer.blob.0 {
        examination.find(layer.blob, "blob", format!("its bytes have the digest {found}"));
    }
    Ok(file)
}

async fn collect(source: &dyn BlobSource, blob: BlobDigest, range: ByteRange) -> anyhow::Result<Vec<u8>> {
    anyhow::ensure!(
        range.len() <= MAX_INDEX_SIZE,
        "the chunk index {blob} has {} bytes, which is too large",
        range.len()
    );
    let mut bytes = Vec::new();
    let mut stream = source.open(blob, range, 0).await?;
    while let Some(piece) = stream.next().await {
        bytes.extend_from_slice(&piece?);
    }
    Ok(bytes)
}

/// The image of a layer, from its chunks if it has a usable index, else from start to end.
fn take_apart(
    layer: &LayerPlan,
    mut blob: File,
    standalone: Option<&[u8]>,
    spool: &Path,
    examination: &mut Examination,
) -> anyhow::Result<Option<File>> {
    let kept = || format!("cannot keep the image of {} in {}", layer.blob, spool.display());
    if let Some(ignored) = layer.ignored_index {
        examination.find(layer.blob, "chunk index", format!("it cannot be used: {ignored:?}"));
    }
    if let Some(location) = &layer.index {
        let section = match standalone {
            Some(bytes) => Ok(bytes.to_vec()),
            None => read_range(&blob, location.range),
        };
        match section.map_err(anyhow::Error::new).and_then(|section| Ok(location.section.read(&section)?)) {
            Ok(index) => {
                examination.chunks += u64::from(index.len());
                for (number, chunk) in index.iter().enumerate() {
                    let mut image = Vec::new();
                    let place = || format!("chunk {number} (image bytes {})", chunk.image);
                    match read_range(&blob, chunk.blob) {
                        Err(error) => examination.find(layer.blob, place(), error.to_string()),
                        Ok(stored) => {
                            if let Err(error) = decode_chunk(&chunk, index.compression(), &stored, &mut image) {
                                let why =
                                    std::error::Error::source(&error).map_or_else(String::new, |e| format!(": {e}"));
                                examination.find(layer.blob, place(), format!("{error}{why}"));
                            }
                        }
                    }
                }
            }
            Err(error) => examination.find(layer.blob, "chunk index", format!("{error:#}")),
        }
    }
    // The image as somebody sees it who knows nothing of chunks: both must be the same bytes.
    blob.seek(SeekFrom::Start(0)).with_context(kept)?;
    let image = tempfile::tempfile_in(spool).with_context(kept)?;
    let reader = SequentialReader::new(image, layer.compression, IMAGE_LIMIT);
    let (image, summary) = match reader.run(blob) {
        Ok(finished) => finished,
        Err(error) => return unpacked_badly(layer, error, examination),
    };
    if summary.diff_id != layer.diff_id {
        let problem =
            format!("the image has the diffID {}, the image's config says {}", summary.diff_id, layer.diff_id);
        examination.find(layer.blob, "image", problem);
    }
    Ok(Some(image))
}

/// A blob that is no image, as opposed to a disk that cannot hold one.
fn unpacked_badly(
    layer: &LayerPlan,
    error: SequentialError,
    examination: &mut Examination,
) -> anyhow::Result<Option<File>> {
    match error {
        SequentialError::Write { .. } | SequentialError::Read { .. } => Err(error.into()),
        SequentialError::Inflate { .. } | SequentialError::Truncated(_) | SequentialError::TooLarge(_) => {
            examination.find(layer.blob, "blob", error.to_string());
            Ok(None)
        }
    }
}

/// Bytes of a file, all of them or an error; never more than are there.
fn read_range(file: &File, range: ByteRange) -> Result<Vec<u8>, ReadAtError> {
    let size = file.size();
    if range.end() > size {
        return Err(ReadAtError::OutOfBounds { range, size });
    }
    let mut bytes = vec![0; usize::try_from(range.len()).unwrap_or(0)];
    file.read_exact_at(range.start(), &mut bytes)?;
    Ok(bytes)
}

/// Walks the file system of one EROFS layer of the stack.
fn walk_files(stacked: &StackedLayer, plan: &ImagePlan, images: &[Option<Arc<File>>], examination: &mut Examination) {
    let Some(layer) = plan.layers.get(stacked.layer) else { return };
    let file = |number: &usize| images.get(*number).cloned().flatten();
    // A layer whose image could not be made has its finding already.
    let Some(image) = file(&stacked.layer) else { return };
    let Some(devices) = stacked.devices.iter().map(file).collect::<Option<Vec<_>>>() else { return };
    let opened =
        if devices.is_empty() { erofs::Image::open(image) } else { erofs::Image::open_with_devices(image, devices) };
    match opened.and_then(|image| erofs::check(&image)) {
        Ok(report) => {
            examination.inodes += report.inodes;
            examination.more += report.more;
            for finding in report.findings {
                examination.find(layer.blob, "file system", finding.to_string());
            }
        }
        Err(error) => examination.find(layer.blob, "file system", format!("{:#}", anyhow::Error::new(error))),
    }
    for data in &stacked.data {
        walk_files(data, plan, images, examination);
    }
}
