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

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

use super::UnpackError;
use crate::convert::below::{Below, LayerBelow, Lower, ReadAhead, Root};
use crate::convert::direct::{ImageOut, unpack_layer};
use crate::convert::layer::LayerError;
use crate::erofs::writer::LayerRole;
use crate::fetch::{BlobStream, Fetcher, LayerImage, TarLayer};
use crate::model::{Algorithm, BlobDigest, ChainId, DiffId, Digest};
use crate::oci::Descriptor;
use crate::store::{Anchor, BlobFile, StoreError, Verdict, WholeWriter};
use crate::tar::Problem;
use crate::tar::decompress::{self, BlobCheck};
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

/// What all layers of an image share.
struct Shop {
    fetcher: Fetcher,
    runtime: Handle,
    source: ImageSource,
    progress: Arc<Progress>,
    stop: AtomicBool,
}

/// Tells the threads to end when nobody waits any more.
struct Stop(Arc<Shop>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::Relaxed);
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
    /// What the tars above are unpacked upon, as far as that says what becomes of them. Of an image its diffID is a claim as
    /// long as not all of it was seen, and who makes another claim true must not find what was unpacked upon this one.
    fn identity(&self) -> DiffId {
        match self {
            Self::Tar { diff_id, .. } => *diff_id,
            Self::Image(layer) => {
                let said = format!("headstart image\n{}\n{}\n{}\n", layer.diff_id(), layer.blob(), layer.anchor());
                DiffId(Digest::of(Algorithm::Sha256, said.as_bytes()))
            }
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
    let shop = Arc::new(Shop {
        fetcher: fetcher.clone(),
        runtime: runtime.clone(),
        source: source.clone(),
        progress,
        stop: AtomicBool::new(false),
    });
    let _stop = Stop(Arc::clone(&shop));
    let permits = Arc::new(Semaphore::new(jobs()));
    let mut tasks = JoinSet::new();
    let mut below: Vec<LayerBelow> = Vec::new();
    let mut done: Vec<Option<Arc<LayerImage>>> = vec![None; parts.len()];
    let identities: Vec<DiffId> = parts.iter().map(Part::identity).collect();
    for (number, (part, chain_id)) in parts.iter().zip(ChainId::of_stack(&identities)).enumerate() {
        let (image, image_receiver) = watch::channel(None);
        let (root, root_receiver) = watch::channel(None);
        let (descriptor, position, diff_id) = match part {
            Part::Tar { descriptor, position, diff_id } => (descriptor, *position, diff_id),
            Part::Image(layer) => {
                image.send_replace(Some(Below::Lazy { layer: Arc::clone(layer) }));
                root.send_replace(Some(Root::InImage));
                below.push(LayerBelow { image: image_receiver, root: root_receiver });
                if let Some(place) = done.get_mut(number) {
                    *place = Some(Arc::clone(layer));
                }
                continue;
            }
        };
        let role = if number == 0 { LayerRole::Bottom } else { LayerRole::Upper };
        let work = Work {
            shop: Arc::clone(&shop),
            number,
            position,
            descriptor: Descriptor::clone(descriptor),
            diff_id: *diff_id,
            chain_id,
            role,
            below: below.clone(),
            image,
            root,
        };
        below.push(LayerBelow { image: image_receiver, root: root_receiver });
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
    shop: Arc<Shop>,
    /// Place in the stack.
    number: usize,
    /// Place in the manifest.
    position: usize,
    descriptor: Descriptor,
    diff_id: DiffId,
    chain_id: ChainId,
    role: LayerRole,
    below: Vec<LayerBelow>,
    /// Tells those above how to look into this layer.
    image: watch::Sender<Option<Below>>,
    /// Tells those above what the root looks like up to here.
    root: watch::Sender<Option<Root>>,
}

impl Work {
    async fn run(self, permit: OwnedSemaphorePermit) -> Result<(usize, Arc<LayerImage>), UnpackError> {
        let blob = self.descriptor.digest;
        let (work, found) = self.blocking(|work| work.existing()).await?;
        if let Some(layer) = found? {
            work.shop.progress.set(work.position, work.descriptor.size);
            return Ok((work.number, layer));
        }
        let (mut work, permit) = (work, Arc::new(permit));
        let mut attempt = 0;
        loop {
            let (descriptor, source) = (&work.descriptor, work.shop.source.blobs());
            let reader = work.shop.fetcher.stream(blob, descriptor.size, source, attempt);
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
        let blob = self.descriptor.digest;
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

    fn stored(&self, source: StoreError) -> UnpackError {
        UnpackError::Store { blob: self.descriptor.digest, source: Arc::new(source) }
    }

    /// The name of the image: not the tar's, since the image depends on the layers below.
    fn identity(&self) -> DiffId {
        DiffId(self.chain_id.0)
    }

    /// The layer as it was unpacked before.
    fn existing(&self) -> Result<Option<Arc<LayerImage>>, UnpackError> {
        let store = self.shop.fetcher.store();
        let found = store.existing(&self.descriptor.digest, Anchor::Tar(self.chain_id)).map_err(|e| self.stored(e))?;
        let found = found.filter(|file| file.verdict() == Verdict::Verified(self.identity()));
        found.map(|file| self.show(file, 0, Some(Root::InImage))).transpose()
    }

    /// Lets those above look into the finished image, and opens it as a layer.
    fn show(&self, file: Arc<BlobFile>, fetched: u64, root: Option<Root>) -> Result<Arc<LayerImage>, UnpackError> {
        let path = file.image_path();
        let image = File::open(&path).map_err(|error| self.stored(StoreError::io("open", &path, error)))?;
        self.image.send_replace(Some(Below::Local { image: Arc::new(image) }));
        if let Some(root) = root {
            self.root.send_replace(Some(root));
        }
        let layer = TarLayer {
            blob: self.descriptor.digest,
            blob_size: self.descriptor.size,
            identity: self.identity(),
            diff_id: self.diff_id,
            fetched,
        };
        Ok(self.shop.fetcher.unpacked_layer(layer, file))
    }

    fn unpack(&self, reader: BlobStream) -> Result<Arc<LayerImage>, UnpackError> {
        let blob = self.descriptor.digest;
        let read = |source| UnpackError::Read { blob, source: Arc::new(source) };
        let store = self.shop.fetcher.store();
        let mut image = store.write_image(&blob, Anchor::Tar(self.chain_id)).map_err(|error| self.stored(error))?;
        let counted = Counted { inner: reader, shop: Arc::clone(&self.shop), layer: self.position, read: 0 };
        let source = decompress::open(counted, BlobCheck::Done(blob), self.diff_id.0.algorithm()).map_err(read)?;
        let mut source = ReadAhead::new(source).map_err(read)?;
        let mut lower = Lower::new(
            self.shop.runtime.clone(),
            Some(self.shop.source.clone()),
            self.below.clone(),
            self.root.clone(),
        );
        let unpacked = unpack_layer(&mut source, self.role, self.diff_id, Some(&mut lower), &mut Out(&mut image));
        // Read to the end in any case: a blob that is not what it should be explains a broken tar better.
        let summary = match (source.finish(), &unpacked) {
            (Ok(summary), _) => summary,
            (Err(_), _) if self.shop.stop.load(Ordering::Relaxed) => return Err(UnpackError::Abandoned { blob }),
            // Unless it was reading that broke the tar: then the cause went to the tar's reader, and only it can tell.
            (Err(source), Err(LayerError::Tar(error))) if !matches!(error.problem, Problem::Io(_)) => {
                return Err(read(source));
            }
            (Err(source), Ok(_)) => return Err(read(source)),
            (Err(_), Err(_)) => {
                unpacked.map_err(|error| self.failed(error))?;
                return Err(UnpackError::Abandoned { blob });
            }
        };
        if summary.diff_id != self.diff_id {
            return Err(UnpackError::DiffId { blob, expected: self.diff_id, found: summary.diff_id });
        }
        unpacked.map_err(|error| self.failed(error))?;
        let file = store.keep_tar(&image, self.identity(), self.diff_id).map_err(|error| self.stored(error))?;
        let layer = self.show(file, self.descriptor.size, None)?;
        tracing::info!(%blob, "the tar layer is unpacked and verified");
        Ok(layer)
    }

    /// A disk that fails is told as what it is.
    fn failed(&self, error: LayerError) -> UnpackError {
        let (blob, root) = (self.descriptor.digest, self.shop.fetcher.store().root());
        match error {
            LayerError::Image { source } => self.stored(StoreError::io("write into", root, source)),
            source => UnpackError::Tar { blob, source: Arc::new(source) },
        }
    }
}

/// A store's image as the writer of layers sees it.
pub(super) struct Out<'a>(pub(super) &'a mut WholeWriter);

impl io::Write for Out<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl ImageOut for Out<'_> {
    fn write_first_block(&mut self, block: &[u8]) -> io::Result<()> {
        self.0.write_first(block)
    }
}

/// A blob whose progress is told, and that ends with an error when the unpacking is stopped.
struct Counted<R> {
    inner: R,
    shop: Arc<Shop>,
    layer: usize,
    read: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.shop.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("unpacking was stopped"));
        }
        let read = self.inner.read(buf)?;
        self.read += read as u64;
        self.shop.progress.set(self.layer, self.read);
        Ok(read)
    }
}
