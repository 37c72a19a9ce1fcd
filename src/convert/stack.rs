//! The layers of one image: many at a time, begun from the lowest up.
//!
//! A layer waits for lower ones only if its tar cannot be understood alone, and a lower one never waits for an upper
//! one, so the conversion always moves. What was converted once is not converted again, in this image or the next.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, BufWriter, Read, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rayon::ThreadPool;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

use super::ahead::ReadAhead;
use super::events::{Event, Observer, Outcome};
use super::image::{ImageError, ImageOptions};
use super::layer::{ConvertedLayer, LayerError, LayerOptions, LayerStatistics, convert_layer};
use super::left_out::{LeftOut, What};
use super::lower::{Asked, Below, LayerBelow, Lower, Root};
use crate::chunked::{AssembleError, BlobSummary};
use crate::erofs::writer::LayerRole;
use crate::model::{Algorithm, BlobDigest, DiffId, Digest, RelPath};
use crate::oci::{Descriptor, LayerKind, Role, layer_descriptor, layer_role, media};
use crate::tar::Problem;
use crate::tar::decompress::{self, BlobCheck};
use crate::transport::{ImageSink, ImageSource, Spool};

/// Bytes of a blob between two reports.
const REPORT_EVERY: u64 = 1 << 20;
/// How long a conversion that has failed waits for its threads to notice, so that they leave no temporary files. They
/// notice at their next byte; only a link that is silent takes longer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The annotation that names a layer's role.
const ROLE: &str = "org.erofs.role";

/// Annotations of tar layers that speak of the blob's bytes, and mean nothing beside another blob.
const OF_THE_BLOB: [&str; 4] = [
    "containerd.io/uncompressed",
    "containerd.io/snapshot/stargz/",
    "io.containers.estargz.",
    "io.github.containers.zstd-chunked.",
];

/// What all layers of a conversion share.
pub(super) struct Workshop {
    pub(super) runtime: Handle,
    pub(super) source: ImageSource,
    pub(super) sink: ImageSink,
    pub(super) options: ImageOptions,
    pub(super) observer: Arc<dyn Observer>,
    pub(super) pool: ThreadPool,
    /// As many layers at a time as there are jobs.
    pub(super) jobs: Arc<Semaphore>,
    pub(super) stop: Arc<AtomicBool>,
}

/// A layer that is at the destination.
#[derive(Debug, Clone)]
pub(super) struct Finished {
    /// As it will stand in the manifest, but for the role.
    descriptor: Descriptor,
    diff_id: DiffId,
    made: Option<Arc<Made>>,
}

/// How a layer was made.
#[derive(Debug)]
struct Made {
    source_diff_id: DiffId,
    summary: BlobSummary,
    diff_id: DiffId,
    statistics: LayerStatistics,
    left_out: Vec<LeftOut>,
    /// Files of the start-up profile that are in it.
    early: Vec<RelPath>,
    /// The blob, for layers above that ask.
    file: Arc<File>,
    /// What it asked of the layers below: a layer with the same source and the same answers is the same.
    asked: Asked,
    root: Option<Root>,
}

/// A layer in the making or made.
type Waiting = watch::Receiver<Option<Finished>>;

/// What was converted before, by source blob and by whether it was the bottom layer.
#[derive(Debug, Default)]
pub(super) struct Memory(HashMap<(BlobDigest, bool), Waiting>);

/// The layers of a converted image.
#[derive(Debug)]
pub(super) struct Stack {
    pub(super) layers: Vec<Descriptor>,
    pub(super) diff_ids: Vec<DiffId>,
    /// Files of the start-up profile that were laid out first.
    pub(super) early: HashSet<RelPath>,
}

/// What is to be done with a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Treatment {
    Convert(LayerRole),
    /// It stays as it is; true if it is part of the overlay stack.
    Keep(bool),
}

/// What is to be done with each layer.
fn treatments(layers: &[Descriptor]) -> Result<Vec<Treatment>, ImageError> {
    let mut bottom = true;
    let mut found = Vec::new();
    for (layer, descriptor) in layers.iter().enumerate() {
        let role = descriptor.annotations.get(ROLE).and_then(|role| role.parse::<Role>().ok());
        let aside = matches!(role, Some(Role::Device | Role::OverlayData));
        found.push(match LayerKind::of(&descriptor.media_type) {
            _ if aside => Treatment::Keep(false),
            LayerKind::ChunkIndex => Treatment::Keep(false),
            LayerKind::Erofs(_) => {
                bottom = false;
                Treatment::Keep(true)
            }
            LayerKind::Tar(_) => {
                let role = if bottom { LayerRole::Bottom } else { LayerRole::Upper };
                bottom = false;
                Treatment::Convert(role)
            }
            LayerKind::Unknown => {
                let media_type = descriptor.media_type.clone();
                return Err(ImageError::UnknownLayer { layer, blob: descriptor.digest, media_type });
            }
        });
    }
    Ok(found)
}

/// True if nothing in the image is to be converted: it is EROFS already.
pub(super) fn is_erofs(layers: &[Descriptor]) -> Result<bool, ImageError> {
    let treatments = treatments(layers)?;
    Ok(!treatments.is_empty() && treatments.iter().all(|treatment| matches!(treatment, Treatment::Keep(_))))
}

impl Workshop {
    /// Converts the layers of image number `image`.
    pub(super) async fn stack(
        self: &Arc<Self>,
        image: usize,
        layers: &[Descriptor],
        diff_ids: &[DiffId],
        memory: &mut Memory,
    ) -> Result<Stack, ImageError> {
        let mut tasks: JoinSet<Result<(), ImageError>> = JoinSet::new();
        let mut below: Vec<LayerBelow> = Vec::new();
        let mut waiting: Vec<Waiting> = Vec::new();
        for (layer, (treatment, descriptor)) in treatments(layers)?.into_iter().zip(layers).enumerate() {
            let diff_id = *diff_ids.get(layer).ok_or(ImageError::NoDiffId { layer })?;
            let (finished, receiver) = watch::channel(None);
            let (image_sender, image_receiver) = watch::channel(None);
            let (root_sender, root_receiver) = watch::channel(None);
            let work = Work {
                workshop: Arc::clone(self),
                image,
                layer,
                descriptor: descriptor.clone(),
                diff_id,
                below: below.clone(),
                shows: image_sender,
                root: root_sender,
            };
            waiting.push(receiver.clone());
            below.push(LayerBelow { image: image_receiver, root: root_receiver });
            let earlier = match treatment {
                Treatment::Convert(role) => {
                    let key = (descriptor.digest, role == LayerRole::Bottom);
                    memory.0.insert(key, receiver)
                }
                Treatment::Keep(_) => None,
            };
            // Layers are begun in order: whoever waits for a lower one waits for somebody who works.
            let permit = loop {
                tokio::select! {
                    permit = Arc::clone(&self.jobs).acquire_owned() => break permit.map_err(|_| ImageError::Stopped)?,
                    Some(done) = tasks.join_next() => passed(done)?,
                }
            };
            tasks.spawn(async move { work.run(treatment, earlier, permit, &finished).await });
        }
        while let Some(done) = tasks.join_next().await {
            passed(done)?;
        }
        let count = layers.len();
        let mut stack = Stack { layers: Vec::new(), diff_ids: Vec::new(), early: HashSet::new() };
        for (layer, (receiver, source)) in waiting.iter().zip(layers).enumerate() {
            let finished = receiver.borrow().clone().ok_or(ImageError::Stopped)?;
            stack.layers.push(finished.in_manifest(layer, count, source));
            stack.diff_ids.push(finished.diff_id);
            stack.early.extend(finished.made.iter().flat_map(|made| &made.early).cloned());
        }
        Ok(stack)
    }

    /// One layer with nothing in it.
    pub(super) async fn empty(self: Arc<Self>) -> Result<Stack, ImageError> {
        let source = DiffId(Digest::of(Algorithm::Sha256, b""));
        let layer = Descriptor::new(media::OCI_LAYER_TAR, BlobDigest(source.0), 0);
        let work = Work {
            workshop: Arc::clone(&self),
            image: 0,
            layer: 0,
            descriptor: layer.clone(),
            diff_id: source,
            below: Vec::new(),
            shows: watch::Sender::new(None),
            root: watch::Sender::new(None),
        };
        let converting = tokio::task::spawn_blocking(move || work.convert(LayerRole::Bottom, io::empty()));
        let (spool, made) = converting.await.map_err(|_| ImageError::Stopped)??;
        self.sink.put_blob(spool, &made.summary.digest, made.summary.size).await?;
        let descriptor = layer_descriptor(self.options.form, &made.summary, made.diff_id, None);
        Ok(Stack { layers: vec![descriptor], diff_ids: vec![made.diff_id], early: HashSet::new() })
    }

    /// Waits until no thread converts any more.
    pub(super) async fn wind_down(&self) {
        self.stop.store(true, Ordering::Relaxed);
        let all = u32::try_from(self.options.jobs.get()).unwrap_or(u32::MAX);
        // If somebody hangs, the program's end will take his temporary files away.
        let _ended = tokio::time::timeout(PATIENCE, self.jobs.acquire_many(all)).await;
    }
}

/// The outcome of a task; a panic goes on here.
fn passed(done: Result<Result<(), ImageError>, tokio::task::JoinError>) -> Result<(), ImageError> {
    match done {
        Ok(result) => result,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(ImageError::Stopped),
    }
}

impl Finished {
    /// The descriptor at its place. What the source said of the layer beyond its bytes is kept.
    fn in_manifest(&self, layer: usize, count: usize, source: &Descriptor) -> Descriptor {
        let mut descriptor = self.descriptor.clone();
        if self.made.is_some() {
            for (key, value) in &source.annotations {
                if !OF_THE_BLOB.iter().any(|prefix| key.starts_with(prefix)) {
                    descriptor.annotations.entry(key.clone()).or_insert_with(|| value.clone());
                }
            }
        }
        let stands_in_stack = matches!(LayerKind::of(&descriptor.media_type), LayerKind::Erofs(_));
        if stands_in_stack && let Some(role) = layer_role(layer, count) {
            descriptor.annotations.entry(ROLE.to_owned()).or_insert_with(|| role.name().to_owned());
        }
        descriptor
    }
}

/// One layer to be brought over.
struct Work {
    workshop: Arc<Workshop>,
    image: usize,
    layer: usize,
    descriptor: Descriptor,
    diff_id: DiffId,
    below: Vec<LayerBelow>,
    /// Tells those above how to look into this layer.
    shows: watch::Sender<Option<Below>>,
    /// Tells those above what the root looks like up to here.
    root: watch::Sender<Option<Root>>,
}

impl Work {
    async fn run(
        self,
        treatment: Treatment,
        earlier: Option<Waiting>,
        permit: OwnedSemaphorePermit,
        finished: &watch::Sender<Option<Finished>>,
    ) -> Result<(), ImageError> {
        let (image, layer, blob) = (self.image, self.layer, self.descriptor.digest);
        let observer = Arc::clone(&self.workshop.observer);
        observer.event(&Event::LayerStarted { image, layer, blob, size: self.descriptor.size });
        let role = match treatment {
            Treatment::Convert(role) => role,
            Treatment::Keep(in_stack) => {
                let descriptor = self.descriptor.clone();
                let (shown, root) =
                    if in_stack { (Below::Kept { descriptor }, Root::InImage) } else { (Below::Aside, Root::Aside) };
                self.shows.send_replace(Some(shown));
                self.root.send_replace(Some(root));
                let kept = self.keep().await?;
                finished.send_replace(Some(kept));
                observer.event(&Event::LayerDone { image, layer, outcome: Outcome::Kept });
                return Ok(());
            }
        };
        if let Some(repeated) = self.repeat(earlier).await? {
            if let Some(made) = &repeated.made {
                let (file, summary) = (Arc::clone(&made.file), made.summary.clone());
                self.shows.send_replace(Some(Below::Converted { file, summary }));
                self.root.send_replace(made.root.clone());
                self.tell_left_out(&made.left_out);
            }
            let blob = repeated.descriptor.digest;
            finished.send_replace(Some(repeated));
            observer.event(&Event::LayerDone { image, layer, outcome: Outcome::Repeated { blob } });
            return Ok(());
        }
        let workshop = Arc::clone(&self.workshop);
        let reader = workshop
            .source
            .reader(&workshop.runtime, &self.descriptor)
            .await
            .map_err(|source| ImageError::Fetch { layer, blob, source: Box::new(source) })?;
        // The thread holds the permit, so that whoever winds down waits for it.
        let converting = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            self.convert(role, reader)
        });
        let (spool, made) = match converting.await {
            Ok(result) => result?,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => return Err(ImageError::Stopped),
        };
        let (digest, size) = (made.summary.digest, made.summary.size);
        workshop.sink.put_blob(spool, &digest, size).await?;
        let descriptor = layer_descriptor(workshop.options.form, &made.summary, made.diff_id, None);
        observer.event(&Event::LayerDone {
            image,
            layer,
            outcome: Outcome::Converted { blob: digest, size, statistics: &made.statistics },
        });
        finished.send_replace(Some(Finished { descriptor, diff_id: made.diff_id, made: Some(Arc::new(made)) }));
        Ok(())
    }

    /// Brings a layer over as it is.
    async fn keep(&self) -> Result<Finished, ImageError> {
        self.workshop.sink.copy_blob(&self.workshop.source, &self.descriptor).await?;
        Ok(Finished { descriptor: self.descriptor.clone(), diff_id: self.diff_id, made: None })
    }

    /// The same layer as it was made before, if that is what it would become again.
    async fn repeat(&self, earlier: Option<Waiting>) -> Result<Option<Finished>, ImageError> {
        let Some(mut earlier) = earlier else { return Ok(None) };
        let finished = match earlier.wait_for(Option::is_some).await {
            Ok(finished) => finished.clone(),
            Err(_) => return Err(ImageError::Stopped),
        };
        let Some(finished) = finished else { return Ok(None) };
        let Some(made) = finished.made.clone() else { return Ok(None) };
        self.check(made.source_diff_id)?;
        let mut lower = self.lower();
        let same = tokio::task::spawn_blocking(move || lower.would_answer(&made.asked)).await;
        Ok(same.unwrap_or(false).then_some(finished))
    }

    fn lower(&self) -> Lower {
        let (runtime, source) = (self.workshop.runtime.clone(), self.workshop.source.clone());
        Lower::new(runtime, Some(source), self.below.clone(), self.root.clone())
    }

    /// Converts a tar; blocks.
    fn convert(&self, role: LayerRole, reader: impl Read + Send + 'static) -> Result<(Spool, Made), ImageError> {
        let (layer, blob) = (self.layer, self.descriptor.digest);
        let read = |source| ImageError::Read { layer, blob, source };
        let workshop = &self.workshop;
        let spool = workshop.sink.spool()?;
        let counted = Counted { inner: reader, work: self.reporter(), read: 0, reported: 0 };
        let source = decompress::open(counted, BlobCheck::Done(blob), self.diff_id.0.algorithm()).map_err(read)?;
        let mut source = ReadAhead::new(source).map_err(read)?;
        let directory = spool.path().parent().unwrap_or_else(|| Path::new("."));
        let mut options = LayerOptions::new(role, self.diff_id, directory);
        (options.level, options.chunks) = (workshop.options.level, workshop.options.chunks);
        options.early.clone_from(&workshop.options.profile);
        let mut lower = self.lower();
        let sink = BufWriter::with_capacity(1 << 20, spool.as_file());
        let converted = convert_layer(&mut source, &options, &workshop.pool, Some(&mut lower), sink);
        // Read to the end in any case: a blob that is not what it should be explains a broken tar better.
        let summary = match (source.finish(), &converted) {
            (Ok(summary), _) => summary,
            (Err(source), _) if workshop.stop.load(Ordering::Relaxed) => {
                drop(source);
                return Err(ImageError::Stopped);
            }
            // Unless it was reading that broke the tar: then the cause went to the tar's reader, and only it can tell.
            (Err(source), Err(LayerError::Tar(error))) if !matches!(error.problem, Problem::Io(_)) => {
                return Err(read(source));
            }
            (Err(source), Ok(_)) => return Err(read(source)),
            (Err(_), Err(_)) => {
                return Err(converted.map_or_else(|source| self.failed(source), |_| ImageError::Stopped));
            }
        };
        self.check(summary.diff_id)?;
        let (mut sink, ConvertedLayer { summary, diff_id, statistics, left_out, early }) =
            converted.map_err(|source| self.failed(source))?;
        let offset = summary.size;
        sink.flush().map_err(|source| self.failed(AssembleError::Write { offset, source }.into()))?;
        drop(sink);
        let file = Arc::new(spool.as_file().try_clone().map_err(|source| ImageError::Keep { layer, source })?);
        self.shows.send_replace(Some(Below::Converted { file: Arc::clone(&file), summary: summary.clone() }));
        let (asked, root) = (lower.into_asked(), self.root.borrow().clone());
        self.tell_left_out(&left_out);
        let source_diff_id = self.diff_id;
        Ok((spool, Made { source_diff_id, summary, diff_id, statistics, left_out, early, file, asked, root }))
    }

    /// Tells what of the layer is not in the result.
    fn tell_left_out(&self, of_tar: &[LeftOut]) {
        let Self { workshop, image, layer, .. } = self;
        let count = self.descriptor.urls.len() as u64;
        let addresses = (count > 0).then_some(LeftOut { what: What::Addresses, count, first: None });
        for what in of_tar.iter().chain(&addresses) {
            workshop.observer.event(&Event::LeftOut { image: *image, layer: *layer, what });
        }
    }

    fn failed(&self, source: LayerError) -> ImageError {
        ImageError::Layer { layer: self.layer, blob: self.descriptor.digest, source: Box::new(source) }
    }

    fn reporter(&self) -> Reporter {
        let workshop = &self.workshop;
        Reporter {
            observer: Arc::clone(&workshop.observer),
            stop: Arc::clone(&workshop.stop),
            image: self.image,
            layer: self.layer,
        }
    }

    /// The tar must be the one that the config names.
    fn check(&self, found: DiffId) -> Result<(), ImageError> {
        let (layer, blob, expected) = (self.layer, self.descriptor.digest, self.diff_id);
        if found == expected { Ok(()) } else { Err(ImageError::DiffId { layer, blob, expected, found }) }
    }
}

/// Tells how much of a layer has been read.
struct Reporter {
    observer: Arc<dyn Observer>,
    stop: Arc<AtomicBool>,
    image: usize,
    layer: usize,
}

/// A blob whose progress is told, and that ends with an error when the conversion is stopped.
struct Counted<R> {
    inner: R,
    work: Reporter,
    read: u64,
    reported: u64,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.work.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("the conversion was stopped"));
        }
        let read = self.inner.read(buf)?;
        self.read += read as u64;
        if self.read - self.reported >= REPORT_EVERY || (read == 0 && self.read > self.reported) {
            self.reported = self.read;
            let Reporter { image, layer, .. } = self.work;
            self.work.observer.event(&Event::LayerRead { image, layer, read: self.read });
        }
        Ok(read)
    }
}
