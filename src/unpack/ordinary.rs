//! Ordinary images: tar layers, each streamed once from its source through the tar reader into an EROFS image in the
//! store, many at the same time.
//!
//! What a layer's image holds depends on the layers below it where its tar does not say all (directories without an entry
//! of their own, hard links to files of lower layers, whiteouts that hide nothing in a bottom layer). So an image is kept
//! under its blob and its ChainID, which is also how containers share layers. Layers wait for lower ones only where they
//! have to ask; they are begun from the lowest up, so somebody always moves. Layers between them that are images already stay
//! as they are: what a tar above has to know of them is read as it is asked for.
//!
//! Guarantees: an image appears in the store when it is complete, safe on disk, and its tar had its diffID; never before.
//! An unpacking that is dropped ends at its next byte and leaves nothing. Refuses to know mounts and references.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;

use super::UnpackError;
use super::tar::{TarImage, Told, identity_of};
use crate::convert::below::{Below, LayerBelow};
use crate::fetch::{BlobStream, Fetcher, LayerImage};
use crate::model::{BlobDigest, ChainId, DiffId};
use crate::oci::Descriptor;
use crate::transport::ImageSource;

/// Layers at a time. Each takes a core for inflating and most of one for the tar, and holds its tree in memory (some 150
/// bytes for each entry) and 4 MiB of buffers.
fn jobs() -> usize {
    std::thread::available_parallelism().map_or(2, std::num::NonZero::get).clamp(2, 8)
}

/// How often a blob is read from its start before its layer fails. A connection that breaks is replaced where it broke.
const ATTEMPTS: u32 = 3;

fn complain(error: &UnpackError) {
    let error: &dyn std::error::Error = error;
    tracing::warn!(error, "a tar layer did not come as it should, fetching it once more");
}

/// How much of each layer's blob has been read.
#[derive(Debug)]
pub struct Progress {
    layers: Vec<(u64, AtomicU64)>,
}

impl Progress {
    /// Of an image with these layers.
    pub fn new(layers: &[Descriptor]) -> Self {
        Self { layers: layers.iter().map(|layer| (layer.size, AtomicU64::new(0))).collect() }
    }

    /// Bytes read and bytes in all.
    pub fn bytes(&self) -> (u64, u64) {
        let read = self.layers.iter().map(|(_, read)| read.load(Ordering::Relaxed)).sum();
        (read, self.layers.iter().map(|(size, _)| size).sum())
    }

    fn set(&self, layer: usize, read: u64) {
        if let Some((_, counted)) = self.layers.get(layer) {
            counted.store(read, Ordering::Relaxed);
        }
    }
}

/// Tells the threads to end when nobody waits any more.
#[derive(Default)]
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A layer of a stack in which there are tars.
#[derive(Debug)]
pub enum Part {
    /// A tar.
    Tar {
        /// Its blob.
        descriptor: Box<Descriptor>,
        /// The place of that in the manifest.
        position: usize,
        /// What the config says it is.
        diff_id: DiffId,
    },
    /// An image that is open.
    Image(Arc<LayerImage>),
}

impl Part {
    /// What the tars above are unpacked upon, as far as that says what becomes of them.
    fn identity(&self) -> DiffId {
        match self {
            Self::Tar { diff_id, .. } => *diff_id,
            Self::Image(layer) => identity_of(layer.diff_id(), layer.blob(), &layer.anchor().to_string()),
        }
    }

    fn blob(&self) -> BlobDigest {
        match self {
            Self::Tar { descriptor, .. } => descriptor.digest,
            Self::Image(layer) => *layer.blob(),
        }
    }
}

/// Unpacks the tars of a stack, the lowest layer first, and gives all of its layers.
///
/// # Errors
/// Of the first layer that fails.
pub async fn unpack_tars(
    fetcher: &Fetcher,
    runtime: &Handle,
    source: &ImageSource,
    parts: &[Part],
    progress: Arc<Progress>,
) -> Result<Vec<Arc<LayerImage>>, UnpackError> {
    let stop = Stop::default();
    let permits = Arc::new(Semaphore::new(jobs()));
    let mut tasks = JoinSet::new();
    let mut below: Vec<LayerBelow> = Vec::new();
    let mut done: Vec<Option<Arc<LayerImage>>> = vec![None; parts.len()];
    let identities: Vec<DiffId> = parts.iter().map(Part::identity).collect();
    for (number, (part, chain_id)) in parts.iter().zip(ChainId::of_stack(&identities)).enumerate() {
        let (descriptor, position, diff_id) = match part {
            Part::Tar { descriptor, position, diff_id } => (descriptor, *position, *diff_id),
            Part::Image(layer) => {
                below.push(Told::known(Below::Lazy { layer: Arc::clone(layer) }).below());
                if let Some(place) = done.get_mut(number) {
                    *place = Some(Arc::clone(layer));
                }
                continue;
            }
        };
        let told = Told::default();
        let above = told.below();
        let image = TarImage {
            fetcher: fetcher.clone(),
            runtime: runtime.clone(),
            blob: descriptor.digest,
            size: descriptor.size,
            name: chain_id,
            identity: diff_id,
            source: Some(source.clone()),
            below: below.clone(),
            told,
            stop: Arc::clone(&stop.0),
        };
        below.push(above);
        let work = Work { number, position, diff_id, image, source: source.clone(), progress: Arc::clone(&progress) };
        // Layers are begun in order: whoever waits for a lower one waits for somebody who works.
        let permit = loop {
            tokio::select! {
                permit = Arc::clone(&permits).acquire_owned() => break permit,
                Some(finished) = tasks.join_next() => take(&mut done, finished)?,
            }
        };
        let permit = permit.map_err(|_| UnpackError::Abandoned { blob: descriptor.digest })?;
        tasks.spawn_on(work.run(permit), runtime);
    }
    while let Some(finished) = tasks.join_next().await {
        take(&mut done, finished)?;
    }
    let missing = |part: &Part| UnpackError::Abandoned { blob: part.blob() };
    done.into_iter().zip(parts).map(|(layer, part)| layer.ok_or_else(|| missing(part))).collect()
}

type Finished = Result<Result<(usize, Arc<LayerImage>), UnpackError>, tokio::task::JoinError>;

/// Notes a finished layer; a panic goes on here. Of a task that was cancelled nothing is noted.
fn take(done: &mut [Option<Arc<LayerImage>>], finished: Finished) -> Result<(), UnpackError> {
    let (number, layer) = match finished {
        Ok(result) => result?,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => return Ok(()),
    };
    if let Some(place) = done.get_mut(number) {
        *place = Some(layer);
    }
    Ok(())
}

/// One layer.
struct Work {
    /// Place in the stack.
    number: usize,
    /// Place in the manifest.
    position: usize,
    diff_id: DiffId,
    image: TarImage,
    source: ImageSource,
    progress: Arc<Progress>,
}

impl Work {
    async fn run(self, permit: OwnedSemaphorePermit) -> Result<(usize, Arc<LayerImage>), UnpackError> {
        let (blob, size) = (self.image.blob, self.image.size);
        let (work, found) = self.blocking(|work| work.image.existing(Some(work.diff_id))).await?;
        if let Some((layer, _)) = found? {
            work.progress.set(work.position, size);
            return Ok((work.number, layer));
        }
        let (mut work, permit) = (work, Arc::new(permit));
        let mut attempt = 0;
        loop {
            let reader = work.image.fetcher.stream(blob, size, work.source.blobs(), attempt);
            // The thread holds the permit as well: it works until it has noticed that it should not.
            let permit = Arc::clone(&permit);
            let (back, unpacked) = work
                .blocking(move |work| {
                    let _permit = permit;
                    work.unpack(reader)
                })
                .await?;
            work = back;
            let error = match unpacked {
                Ok(layer) => return Ok((work.number, layer)),
                Err(error) => error,
            };
            attempt += 1;
            // Bytes that were wrong, or that came no further: the whole stream is asked for once more.
            if !matches!(error, UnpackError::Read { .. }) || attempt == ATTEMPTS {
                return Err(error);
            }
            complain(&error);
        }
    }

    async fn blocking<T: Send + 'static>(
        self,
        job: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Result<(Self, T), UnpackError> {
        let blob = self.image.blob;
        let working = tokio::task::spawn_blocking(move || {
            let result = job(&self);
            (self, result)
        });
        match working.await {
            Ok(done) => Ok(done),
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(UnpackError::Abandoned { blob }),
        }
    }

    fn unpack(&self, reader: BlobStream) -> Result<Arc<LayerImage>, UnpackError> {
        let (blob, expected) = (self.image.blob, self.diff_id);
        let counted = Counted { inner: reader, progress: Arc::clone(&self.progress), layer: self.position, read: 0 };
        let (layer, _) = self.image.make(counted, expected.0.algorithm(), |summary| match summary.diff_id {
            found if found == expected => Ok(()),
            found => Err(UnpackError::DiffId { blob, expected, found }),
        })?;
        tracing::info!(%blob, "the tar layer is unpacked and verified");
        Ok(layer)
    }
}

/// A blob whose progress is told.
struct Counted<R> {
    inner: R,
    progress: Arc<Progress>,
    layer: usize,
    read: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buf)?;
        self.read += read as u64;
        self.progress.set(self.layer, self.read);
        Ok(read)
    }
}
