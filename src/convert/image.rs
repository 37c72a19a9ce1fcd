//! Whole images: a reference is read, its layers become EROFS layers, and the result is published under another.
//!
//! Layers, configs and manifests go to the destination in that order and the name comes last, so that a conversion that
//! fails leaves at most blobs that nothing names. The same source gives the same digests: nothing of the machine, the
//! clock or the number of jobs gets into the result.
//!
//! It refuses to know what a registry or a layout is.

mod error;

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

use super::events::{Event, Observer};
use super::layer::{ChunkSizes, DEFAULT_LEVEL};
use super::stack::{Memory, Stack, Workshop, is_erofs};
use crate::model::{BlobDigest, RelPath};
use crate::oci::{
    Config, Descriptor, Document, DocumentError, EROFS_FEATURE, Form, Index, Manifest, Platform, PlatformRecord,
    Prefer, TWIN_OF, media,
};
use crate::transport::{ImageSink, ImageSource, ResolvedImage};

pub use error::ImageError;

/// Annotations of an index entry that say how a layout or a store calls it, not what it is.
const NAMES: [&str; 3] =
    ["org.opencontainers.image.ref.name", "io.containerd.image.name", "org.opencontainers.image.base.name"];

/// Which images of a source are converted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Platforms {
    /// One: for this platform, or the host's if none is given.
    One(Option<Platform>),
    /// All of them.
    All,
}

/// How an image is converted.
#[derive(Debug, Clone)]
pub struct ImageOptions {
    /// Which images.
    pub platforms: Platforms,
    /// Publish an index with each original before its EROFS twin, instead of the twins alone.
    pub append: bool,
    /// Under which names the layers are published.
    pub form: Form,
    /// Where blobs are cut.
    pub chunks: ChunkSizes,
    /// zstd level.
    pub level: i32,
    /// Files to lay out first, in this order: what a start-up profile names.
    pub profile: Vec<RelPath>,
    /// Layers and chunks that are worked on at a time.
    pub jobs: NonZeroUsize,
}

impl Default for ImageOptions {
    fn default() -> Self {
        Self {
            platforms: Platforms::One(None),
            append: false,
            form: Form::default(),
            chunks: ChunkSizes::default(),
            level: DEFAULT_LEVEL,
            profile: Vec::new(),
            jobs: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
        }
    }
}

/// A converted image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConvertedImage {
    /// For which platform.
    pub platform: Platform,
    /// The source's manifest.
    pub source: Descriptor,
    /// The new manifest; the source's own if that was EROFS already.
    pub manifest: Descriptor,
    /// Its layers.
    pub layers: Vec<Descriptor>,
}

/// What was published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Converted {
    /// What the destination stands for now: a manifest or an index.
    pub top: Descriptor,
    /// The images in it that were converted.
    pub images: Vec<ConvertedImage>,
}

/// Converts the image `source` and publishes it as `sink`. To be called on a runtime of several threads; dropping the
/// future stops the work.
///
/// # Errors
/// See [`ImageError`]. The destination's name then stands for what it stood for before.
pub async fn convert_image(
    source: &ImageSource,
    sink: &ImageSink,
    options: &ImageOptions,
    observer: Arc<dyn Observer>,
) -> Result<Converted, ImageError> {
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(options.jobs.get())
        .thread_name(|number| format!("headstart-zstd-{number}"))
        .build()
        .map_err(ImageError::Threads)?;
    let workshop = Arc::new(Workshop {
        runtime: Handle::current(),
        source: source.clone(),
        sink: sink.clone(),
        options: options.clone(),
        observer,
        pool,
        jobs: Arc::new(Semaphore::new(options.jobs.get())),
        stop: Arc::new(AtomicBool::new(false)),
    });
    // Threads see this flag when the future is dropped.
    let _stop = StopOnDrop(Arc::clone(&workshop.stop));
    let converted = Conversion { workshop: Arc::clone(&workshop), memory: Memory::default() }.run().await;
    if converted.is_err() {
        workshop.wind_down().await;
    }
    converted
}

struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, std::sync::atomic::Ordering::Relaxed);
    }
}

struct Conversion {
    workshop: Arc<Workshop>,
    memory: Memory,
}

/// A manifest that is ready to be named, with its bytes.
struct Entry {
    descriptor: Descriptor,
    bytes: Bytes,
}

impl Conversion {
    async fn run(mut self) -> Result<Converted, ImageError> {
        let (source, options) = (&self.workshop.source.clone(), &self.workshop.options.clone());
        let images = match &options.platforms {
            Platforms::One(platform) => vec![source.image(platform.as_ref(), Prefer::Ordinary).await?],
            Platforms::All => source.images().await?,
        };
        let all = options.platforms == Platforms::All;
        self.check_losses(&images, all)?;
        let Choice { chosen, others } = choose(images, all)?;
        if chosen.is_empty() {
            return Err(ImageError::NoImage { reference: Box::new(source.reference().clone()) });
        }
        let mut made: Vec<(usize, Entry, ConvertedImage)> = Vec::new();
        for (number, (place, image)) in chosen.iter().enumerate() {
            let platform = image.platform();
            let (images, layers) = (chosen.len(), image.manifest.layers.len());
            let event = Event::Image { image: number, images, platform: &platform, layers };
            self.workshop.observer.event(&event);
            let (entry, converted) = self.image(number, image).await?;
            made.push((*place, entry, converted));
        }
        let images: Vec<ConvertedImage> = made.iter().map(|(_, _, converted)| converted.clone()).collect();
        let index = chosen.iter().find_map(|(_, image)| image.index.clone());
        let is_index = options.append || (all && index.is_some());
        if !is_index && let Some((_, entry, _)) = made.pop() {
            let top = bare(entry.descriptor);
            self.workshop.sink.finish(&top, &entry.bytes).await?;
            return Ok(Converted { top, images });
        }
        let entries = self.entries(made, &chosen, others).await?;
        let mut published = Index::new(entries);
        if let Some(index) = index {
            (published.annotations, published.artifact_type) = (index.annotations, index.artifact_type);
        }
        let bytes = Bytes::from(published.to_json());
        let top = Descriptor::of(&published.media_type, &bytes);
        self.workshop.sink.finish(&top, &bytes).await?;
        Ok(Converted { top, images })
    }

    /// Refuses to replace an index by a part of it.
    fn check_losses(&self, images: &[ResolvedImage], all: bool) -> Result<(), ImageError> {
        let reference = self.workshop.source.reference();
        let loses = !all && reference == self.workshop.sink.reference() && {
            let index = images.iter().find_map(|image| image.index.as_ref());
            index.is_some_and(|index| {
                let platforms: Vec<PlatformRecord> =
                    index.manifests.iter().filter_map(|entry| entry.platform.as_ref()).map(ordinary).collect();
                platforms.iter().any(|platform| platform.os != "unknown" && Some(platform) != platforms.first())
            })
        };
        if loses { Err(ImageError::WouldLose { reference: Box::new(reference.clone()) }) } else { Ok(()) }
    }

    /// Converts one image and stores its blobs; its manifest is stored by whoever names it.
    async fn image(&mut self, number: usize, image: &ResolvedImage) -> Result<(Entry, ConvertedImage), ImageError> {
        let platform = image.platform();
        let ResolvedImage { manifest, config, descriptor: source, .. } = image;
        let report = |manifest: &Descriptor, layers: &[Descriptor]| ConvertedImage {
            platform: platform.clone(),
            source: source.clone(),
            manifest: bare(manifest.clone()),
            layers: layers.to_vec(),
        };
        if is_erofs(&manifest.layers)? {
            self.copy(image).await?;
            self.tell_misses(number, &HashSet::new());
            let mut descriptor = unnamed(source.clone());
            descriptor.platform = Some(with_erofs(&record(image)));
            let converted = report(&descriptor, &manifest.layers);
            return Ok((Entry { descriptor, bytes: image.manifest_bytes.clone() }, converted));
        }
        // An image without layers gets an empty one: the topmost must be a file system (EROFS image layer format, 3.8).
        let is_bare = manifest.layers.is_empty();
        let Stack { layers, diff_ids, early } = if is_bare {
            Arc::clone(&self.workshop).empty().await?
        } else {
            self.workshop.stack(number, &manifest.layers, config.diff_ids(), &mut self.memory).await?
        };
        self.tell_misses(number, &early);
        let config = if is_bare { with_empty_layer(config)? } else { config.clone() };
        let config = config.with_layers(&diff_ids, true).map_err(ImageError::Config)?;
        let config_descriptor = config.descriptor();
        let bytes = Bytes::copy_from_slice(config.as_bytes());
        self.workshop.sink.put_bytes(&config_descriptor.digest, bytes).await?;
        let mut new = Manifest::new(config_descriptor, layers);
        new.annotations.clone_from(&manifest.annotations);
        new.artifact_type.clone_from(&manifest.artifact_type);
        new.subject.clone_from(&manifest.subject);
        let bytes = Bytes::from(new.to_json());
        let mut descriptor = Descriptor::of(&new.media_type, &bytes);
        descriptor.annotations = unnamed(source.clone()).annotations;
        descriptor.platform = Some(with_erofs(&record(image)));
        let converted = report(&descriptor, &new.layers);
        Ok((Entry { descriptor, bytes }, converted))
    }

    /// Tells which files of the profile were not in image number `image`.
    fn tell_misses(&self, image: usize, found: &HashSet<RelPath>) {
        let Workshop { options, observer, .. } = &*self.workshop;
        let paths: Vec<RelPath> = options.profile.iter().filter(|path| !found.contains(path)).cloned().collect();
        if !paths.is_empty() {
            observer.event(&Event::NotLaidOut { image, paths: &paths });
        }
    }

    /// Brings over what the manifest of `image` names.
    async fn copy(&self, image: &ResolvedImage) -> Result<(), ImageError> {
        let Workshop { source, sink, observer, .. } = &*self.workshop;
        copy_named(source, sink, &image.manifest).await?;
        observer.event(&Event::Copied { manifest: image.descriptor.digest });
        Ok(())
    }

    /// Stores all manifests of the index and gives its entries, in the order of the source's index.
    async fn entries(
        &self,
        made: Vec<(usize, Entry, ConvertedImage)>,
        chosen: &[(usize, ResolvedImage)],
        others: Vec<(usize, Descriptor)>,
    ) -> Result<Vec<Descriptor>, ImageError> {
        let Workshop { source, sink, observer, options, .. } = &*self.workshop;
        let mut entries: Vec<(usize, Descriptor)> = Vec::new();
        for ((place, mut entry, _), (_, image)) in made.into_iter().zip(chosen) {
            let original = &image.descriptor;
            if options.append && original.digest != entry.descriptor.digest {
                self.copy(image).await?;
                sink.put_manifest(original, &image.manifest_bytes).await?;
                let mut original = unnamed(original.clone());
                original.platform = Some(record(image));
                // Who has been given the original can find this one, and that they are the same is the publisher's word.
                entry.descriptor.annotations.insert(TWIN_OF.to_owned(), original.digest.to_string());
                entries.push((place, original));
            }
            sink.put_manifest(&entry.descriptor, &entry.bytes).await?;
            entries.push((place, entry.descriptor));
        }
        for (place, other) in others {
            let (document, bytes) = source.parsed(&other).await?;
            if let Document::Manifest(manifest) = document {
                copy_named(source, sink, &manifest).await?;
                sink.put_manifest(&other, &bytes).await?;
                observer.event(&Event::Copied { manifest: other.digest });
                entries.push((place, other));
            }
        }
        entries.sort_by_key(|(place, _)| *place);
        Ok(entries.into_iter().map(|(_, entry)| entry).collect())
    }
}

/// What is done with the images of a source, each with its place in the source's index.
struct Choice {
    /// To be converted.
    chosen: Vec<(usize, ResolvedImage)>,
    /// To be copied as they are: images for other systems, attestations, signatures.
    others: Vec<(usize, Descriptor)>,
}

/// An EROFS image that stands beside its original is left out: it is made again.
fn choose(images: Vec<ResolvedImage>, all: bool) -> Result<Choice, ImageError> {
    let index = images.iter().find_map(|image| image.index.clone()).filter(|_| all);
    let listed = index.map(|index| index.manifests).unwrap_or_default();
    let place_of = |digest: BlobDigest| listed.iter().position(|entry| entry.digest == digest).unwrap_or(listed.len());
    let mut others: Vec<(usize, Descriptor)> = Vec::new();
    for (place, entry) in listed.iter().enumerate() {
        let is_image = images.iter().any(|image| image.descriptor.digest == entry.digest);
        if !is_image && media::is_manifest(&entry.media_type) {
            others.push((place, entry.clone()));
        }
    }
    let mut originals: Vec<PlatformRecord> = Vec::new();
    for image in &images {
        if !is_erofs(&image.manifest.layers)? {
            originals.push(ordinary(&record(image)));
        }
    }
    let mut chosen = Vec::new();
    for image in images {
        let platform = image.platform();
        let is_twin = is_erofs(&image.manifest.layers)? && originals.contains(&ordinary(&record(&image)));
        if platform.os != "linux" {
            if !all {
                return Err(ImageError::NotLinux(platform));
            }
            others.push((place_of(image.descriptor.digest), image.descriptor));
        } else if !is_twin {
            chosen.push((place_of(image.descriptor.digest), image));
        }
    }
    Ok(Choice { chosen, others })
}

/// Brings over the config and the layers of a manifest, but for layers that nobody may hand on.
async fn copy_named(source: &ImageSource, sink: &ImageSink, manifest: &Manifest) -> Result<(), ImageError> {
    for descriptor in manifest.layers.iter().chain([&manifest.config]) {
        let is_foreign = descriptor.media_type.contains(".nondistributable.")
            || descriptor.media_type.contains(".image.rootfs.foreign.");
        if !is_foreign || descriptor.urls.is_empty() {
            sink.copy_blob(source, descriptor).await?;
        }
    }
    Ok(())
}

/// The platform of an image as its index says, else as its config does.
fn record(image: &ResolvedImage) -> PlatformRecord {
    image.descriptor.platform.clone().unwrap_or_else(|| image.config.platform_record().clone())
}

/// The platform without the mark of EROFS.
fn ordinary(platform: &PlatformRecord) -> PlatformRecord {
    let mut platform = platform.clone();
    let features = platform.os_features.take().unwrap_or_default();
    let features: Vec<String> = features.into_iter().filter(|feature| feature != EROFS_FEATURE).collect();
    platform.os_features = (!features.is_empty()).then_some(features);
    platform
}

/// The platform with the mark of EROFS.
fn with_erofs(platform: &PlatformRecord) -> PlatformRecord {
    let mut platform = ordinary(platform);
    platform.os_features.get_or_insert_default().push(EROFS_FEATURE.to_owned());
    platform
}

/// A descriptor without the names that a layout or store gave it.
fn unnamed(mut descriptor: Descriptor) -> Descriptor {
    descriptor.annotations.retain(|key, _| !NAMES.contains(&key.as_str()));
    descriptor
}

/// The descriptor of a manifest that stands alone.
fn bare(mut descriptor: Descriptor) -> Descriptor {
    descriptor.platform = None;
    descriptor.annotations.clear();
    descriptor
}

/// The config of an image without layers, with a line of history for the empty one it gets.
fn with_empty_layer(config: &Config) -> Result<Config, ImageError> {
    let json = |source| ImageError::Config(DocumentError::Json { what: "an image configuration", source });
    let mut members: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(config.as_bytes()).map_err(json)?;
    if let Some(serde_json::Value::Array(history)) = members.get_mut("history") {
        history
            .push(serde_json::json!({ "created_by": "headstart convert: an empty layer, for an image without any" }));
    }
    let bytes = serde_json::to_vec(&members).map_err(json)?;
    Config::parse(bytes).map_err(ImageError::Config)
}
