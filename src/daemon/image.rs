//! From a reference to open layers: what is mounted, listed and inspected.
//!
//! The manifest and the config of an image are kept in the store with what named them. So an image named by digest opens
//! without its registry once it was opened before, and one named by tag opens as it was last seen while the registry
//! cannot be reached, which is logged. Layers need their registry only for chunks that are not here.
//!
//! Refuses to know what a layer holds and how it is shown.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use anyhow::Context as _;
use futures::future::{join_all, try_join_all};
use tokio::runtime::Handle;

use super::config::Config as Settings;
use super::logins::Sources;
use super::recorder::PATIENCE;
use crate::fetch::{FetchConfig, FetchError, Fetcher, LayerImage, Room};
use crate::model::{BlobDigest, ByteRange, ReadAt, ReadAtError};
use crate::oci::{
    self, Descriptor, Document, ImagePlan, LayerFault, LayerPlan, LayoutImage, Manifest, PlanError, Platform, Prefer,
    Reference, StackedLayer,
};
use crate::registry::{Client, ClientConfig, CredentialConfig, Patience};
use crate::snapshots::{Snapshots, SnapshotsConfig};
use crate::store::{CacheGoal, Evicted, Recorded, Store, StoreConfig, StoreError};
use crate::transport::{ImageSource, ResolvedImage, Transports};
use crate::unpack::{Part, Progress, unpack_tars};
use crate::vfs::{self, Bring, Layer, Purpose, Vfs};

/// The rooms below, as the configuration wants them.
#[derive(Clone)]
pub struct House {
    /// Opens references.
    pub transports: Transports,
    /// Where everything is kept.
    pub store: Arc<Store>,
    runtime: Handle,
    fetch: FetchConfig,
    fetcher: Arc<OnceLock<Fetcher>>,
    sources: Sources,
    snapshots: Option<Arc<Snapshots>>,
}

/// An image whose documents have been read.
#[derive(Debug, Clone)]
pub struct Documents {
    /// The reference, for messages and status.
    pub reference: Reference,
    /// Digest of the manifest.
    pub digest: BlobDigest,
    /// The manifest.
    pub manifest: Manifest,
    /// The config.
    pub config: oci::Config,
    source: ImageSource,
}

/// An image whose layers are open.
#[derive(Debug, Clone)]
pub struct OpenImage {
    /// Its documents.
    pub documents: Documents,
    /// What its layers are.
    pub plan: ImagePlan,
    /// The layers of `plan.layers`, in that order.
    pub layers: Vec<Arc<LayerImage>>,
}

/// A layer as the file system reads it.
#[derive(Debug, Clone)]
pub struct Lazy(Arc<LayerImage>);

impl std::fmt::Debug for House {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("House").field("root", &self.store.root()).finish_non_exhaustive()
    }
}

/// A client of registries as the configuration describes it, for a process that does not stay.
pub fn transports(settings: &Settings) -> Transports {
    transports_with(settings, &Sources::default())
}

fn transports_with(settings: &Settings, sources: &Sources) -> Transports {
    let registry = &settings.registry;
    let client = Client::new(ClientConfig {
        certs_d: registry.certs_d.clone(),
        credentials: CredentialConfig {
            docker_config: Some(registry.docker_config.clone()),
            pulled: sources.pulled.clone(),
            cluster: sources.cluster.clone(),
            ..CredentialConfig::default()
        },
        patience: Patience {
            connect: registry.connect_timeout,
            response: registry.response_timeout,
            idle: registry.idle_timeout,
            deadline: registry.deadline,
            rounds: registry.rounds,
            ..Patience::default()
        },
        ..ClientConfig::default()
    });
    Transports::new(client, settings.root.join("tmp"))
}

/// A reference whose path, if it has one, does not depend on the working directory.
///
/// # Errors
/// The working directory is gone.
pub fn absolute(reference: &Reference) -> std::io::Result<Reference> {
    let absolute = |path: &Path| std::path::absolute(path);
    Ok(match reference {
        Reference::Registry(_) => reference.clone(),
        Reference::Layout { path, image } => Reference::Layout { path: absolute(path)?, image: image.clone() },
        Reference::OciArchive { path, image } => Reference::OciArchive { path: absolute(path)?, image: image.clone() },
        Reference::DockerArchive { path, image } => {
            Reference::DockerArchive { path: absolute(path)?, image: image.clone() }
        }
    })
}

impl House {
    /// Opens the root and prepares everything that fetches.
    ///
    /// # Errors
    /// A root that cannot be used.
    pub fn open(settings: &Settings, runtime: Handle) -> anyhow::Result<Self> {
        let store =
            StoreConfig { sync_interval: settings.sync_interval, reserve: settings.reserve, ..StoreConfig::default() };
        let store = Store::open_with(&settings.root, store)?;
        let said = &settings.fetch;
        let connections = usize::try_from(said.connections).unwrap_or(usize::MAX);
        let fetch = FetchConfig {
            connections,
            // Some connections stay free for those who wait, as long as there is more than one.
            background_connections: usize::try_from(settings.fill.connections)
                .unwrap_or(usize::MAX)
                .clamp(1, connections.saturating_sub(1).max(1)),
            fill_bandwidth: settings.fill.bandwidth,
            memory: u32::try_from(said.memory).unwrap_or(u32::MAX),
            read_ahead: said.read_ahead,
            deadline: said.deadline,
            ..FetchConfig::default()
        };
        let sources = Sources::new(settings);
        Ok(Self {
            transports: transports_with(settings, &sources),
            store: Arc::new(store),
            runtime,
            fetch,
            fetcher: Arc::default(),
            sources,
            snapshots: None,
        })
    }

    /// Has the records of snapshots open from now on, as the one process that changes them. Waits for others to close
    /// them.
    ///
    /// # Errors
    /// They cannot be had.
    pub fn open_snapshots(&mut self, config: SnapshotsConfig) -> anyhow::Result<()> {
        self.snapshots = Some(Arc::new(Snapshots::open_patiently(&self.store, config, PATIENCE)?));
        Ok(())
    }

    /// The snapshots, if this process has their records open.
    pub const fn snapshots(&self) -> Option<&Arc<Snapshots>> {
        self.snapshots.as_ref()
    }

    /// The one download path. Its threads begin here, so that commands that only read documents start none.
    pub(super) fn fetcher(&self) -> anyhow::Result<&Fetcher> {
        if let Some(fetcher) = self.fetcher.get() {
            return Ok(fetcher);
        }
        let fetcher = Fetcher::new(Arc::clone(&self.store), self.runtime.clone(), self.fetch)
            .context("cannot start the threads that fetch")?;
        Ok(self.fetcher.get_or_init(|| fetcher))
    }

    /// Reads the documents of an image: from its registry, or from what was kept of it.
    ///
    /// # Errors
    /// It is nowhere to be had, or its documents are unusable.
    pub async fn documents(&self, reference: &Reference, platform: Option<&Platform>) -> anyhow::Result<Documents> {
        let source = self.transports.open(reference).await?;
        let key = |name: &str| key(name, platform);
        if let Some(digest) = named_digest(reference)
            && let Some(kept) = self.kept(reference, &source, &key(&digest.to_string()))?
        {
            return Ok(kept);
        }
        let by_name = key(&reference.to_string());
        let known = self.store.reference(&by_name)?.is_some();
        let resolved = match known {
            // What a tag stands for may not have changed: one question instead of three.
            true => match source.top().await {
                Ok(top) => match self.kept(reference, &source, &key(&top.digest.to_string()))? {
                    Some(kept) => return Ok(kept),
                    None => source.image(platform, Prefer::Erofs).await,
                },
                Err(error) => Err(error),
            },
            false => source.image(platform, Prefer::Erofs).await,
        };
        match resolved {
            Ok(image) => {
                self.keep(&image, &[&by_name, &key(&image.top.digest.to_string())])?;
                let ResolvedImage { descriptor, manifest, config, .. } = image;
                Ok(Documents { reference: reference.clone(), digest: descriptor.digest, manifest, config, source })
            }
            Err(error) if known && error.is_transient() => match self.kept(reference, &source, &by_name)? {
                Some(kept) => {
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(
                        image = %reference,
                        manifest = %kept.digest,
                        error,
                        "the registry does not answer: the image is taken as it was last seen"
                    );
                    Ok(kept)
                }
                None => Err(error.into()),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// The documents of an image that was open before, from what was kept of it alone.
    ///
    /// # Errors
    /// They are not kept any more, or are unusable.
    pub async fn kept_documents(&self, reference: &Reference, manifest: BlobDigest) -> anyhow::Result<Documents> {
        let source = self.transports.open(reference).await?;
        let documents = self.documents_of(reference, &source, manifest)?;
        documents.with_context(|| format!("cannot open {reference} without its registry: {manifest} is not kept"))
    }

    /// Changes the bytes a second that fills may bring.
    ///
    /// # Errors
    /// Threads that cannot be started.
    pub fn set_fill_bandwidth(&self, rate: Option<u64>) -> anyhow::Result<()> {
        self.fetcher()?.set_fill_bandwidth(rate);
        Ok(())
    }

    /// Brings the cache to `goal`, as far as that is possible: images that nobody uses go as a whole, those of them that are
    /// recorded last, then chunks of those that this process has open. Waits for the disk.
    pub(super) fn make_room(
        &self,
        goal: &CacheGoal,
        recorded: &Recorded,
        dry_run: bool,
    ) -> Result<(Evicted, Room), StoreError> {
        let evicted = self.store.evict(goal, recorded, dry_run)?;
        let freed = if dry_run { evicted.bytes } else { 0 };
        let excess = goal.excess(evicted.left, self.store.free_bytes()?.saturating_add(freed));
        let room = match self.fetcher.get() {
            Some(fetcher) if excess > 0 => fetcher.make_room(excess, dry_run)?,
            _ => Room::default(),
        };
        Ok((evicted, room))
    }

    /// The sources of credentials that somebody has to start.
    pub(super) const fn sources(&self) -> &Sources {
        &self.sources
    }

    /// Lets changed logins and hosts count from now on.
    pub fn forget_registries(&self) {
        self.transports.forget_registries();
    }

    /// Opens the layers of an image for lazy reading.
    ///
    /// # Errors
    /// Layers that are not EROFS, or an index that does not come.
    pub async fn open_image(&self, documents: Documents) -> anyhow::Result<OpenImage> {
        let plan = ImagePlan::new(&documents.manifest, &documents.config)
            .with_context(|| format!("cannot mount or read {}", documents.reference))?;
        let fetcher = self.fetcher()?;
        let blobs = documents.source.blobs();
        let open = plan.layers.iter().map(|layer| fetcher.open_layer(layer.into(), Arc::clone(&blobs)));
        let layers = try_join_all(open).await?;
        Ok(OpenImage { documents, plan, layers })
    }

    /// Opens some layers of an image, each for itself: one that does not open leaves the others open.
    ///
    /// # Errors
    /// Threads that cannot be started.
    pub async fn open_each(
        &self,
        documents: &Documents,
        layers: &[&LayerPlan],
    ) -> anyhow::Result<Vec<Result<Arc<LayerImage>, Arc<FetchError>>>> {
        let (fetcher, blobs) = (self.fetcher()?, documents.source.blobs());
        Ok(join_all(layers.iter().map(|layer| fetcher.open_layer((*layer).into(), Arc::clone(&blobs)))).await)
    }

    /// Keeps a manifest and the config that it names, which somebody else has fetched. What has not its digest is not
    /// kept.
    ///
    /// # Errors
    /// A store that fails.
    pub fn adopt(&self, manifest: BlobDigest, bytes: &[u8], config: (BlobDigest, &[u8])) -> anyhow::Result<()> {
        if self.store.keep_document(&manifest, bytes)? && self.store.keep_document(&config.0, config.1)? {
            self.store.keep_reference(&key(&manifest.to_string(), None), &manifest)?;
        }
        Ok(())
    }

    /// Where asynchronous work runs.
    pub const fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// Opens the layers of any image: those that are tars are unpacked first, which takes as long as all of it needs
    /// to come; `progress` tells how far that is.
    ///
    /// # Errors
    /// As [`House::open_image`], and what keeps a tar layer from being unpacked.
    pub async fn bring_image(
        &self,
        documents: Documents,
        progress: Option<Arc<Progress>>,
    ) -> anyhow::Result<OpenImage> {
        match documents.plan() {
            Err(PlanError::Tar) => {}
            Err(PlanError::Layer { fault, .. }) if matches!(*fault, LayerFault::Tar(_)) => {}
            _ => return self.open_image(documents).await,
        }
        let plan = ImagePlan::with_tars(&documents.manifest, &documents.config)
            .with_context(|| format!("cannot mount or read {}", documents.reference))?;
        let progress = progress.unwrap_or_else(|| Arc::new(Progress::new(documents.layers())));
        let (fetcher, blobs) = (self.fetcher()?, documents.source.blobs());
        let open = plan.layers.iter().map(async |layer| match layer.is_tar {
            true => Ok(None),
            false => fetcher.open_layer(layer.into(), Arc::clone(&blobs)).await.map(Some),
        });
        let mut layers = try_join_all(open).await?;
        let part = |stacked: &StackedLayer| match layers.get(stacked.layer)? {
            Some(layer) => Some(Part::Image(Arc::clone(layer))),
            None => {
                let layer = plan.layers.get(stacked.layer)?;
                let descriptor = Box::new(documents.layers().get(layer.position)?.clone());
                Some(Part::Tar { descriptor, position: layer.position, diff_id: layer.diff_id })
            }
        };
        let parts: Vec<Part> = plan.stack.iter().filter_map(part).collect();
        let unpacked = unpack_tars(fetcher, &self.runtime, &documents.source, &parts, progress).await?;
        for (stacked, layer) in plan.stack.iter().zip(unpacked) {
            if let Some(place) = layers.get_mut(stacked.layer) {
                *place = Some(layer);
            }
        }
        let layers = layers.into_iter().flatten().collect();
        Ok(OpenImage { documents, plan, layers })
    }

    /// What was kept under `key`, if all of it is still there.
    fn kept(&self, reference: &Reference, source: &ImageSource, key: &str) -> anyhow::Result<Option<Documents>> {
        match self.store.reference(key)? {
            Some(record) => self.documents_of(reference, source, record.manifest),
            None => Ok(None),
        }
    }

    /// The documents behind a manifest that is kept.
    fn documents_of(
        &self,
        reference: &Reference,
        source: &ImageSource,
        digest: BlobDigest,
    ) -> anyhow::Result<Option<Documents>> {
        let Some(bytes) = self.store.document(&digest)? else { return Ok(None) };
        let Document::Manifest(manifest) = Document::parse(&bytes, None)? else { return Ok(None) };
        let Some(bytes) = self.store.document(&manifest.config.digest)? else { return Ok(None) };
        let config = oci::Config::parse_verified(bytes, &manifest.config)?;
        Ok(Some(Documents { reference: reference.clone(), digest, manifest, config, source: source.clone() }))
    }

    fn keep(&self, image: &ResolvedImage, keys: &[&str]) -> anyhow::Result<()> {
        let kept = self.store.keep_document(&image.descriptor.digest, &image.manifest_bytes)?
            && self.store.keep_document(&image.manifest.config.digest, image.config.as_bytes())?;
        if kept {
            for key in keys {
                self.store.keep_reference(key, &image.descriptor.digest)?;
            }
        }
        Ok(())
    }
}

/// Under which it is kept what a name stands for.
fn key(name: &str, platform: Option<&Platform>) -> String {
    format!("{name} {}", platform.map_or_else(|| "here".to_owned(), Platform::to_string))
}

/// The digest that a reference names, which can never stand for anything else.
fn named_digest(reference: &Reference) -> Option<BlobDigest> {
    match reference {
        Reference::Registry(name) => name.digest().copied(),
        Reference::Layout { image: LayoutImage::Digest(digest), .. }
        | Reference::OciArchive { image: LayoutImage::Digest(digest), .. } => Some(*digest),
        Reference::Layout { .. } | Reference::OciArchive { .. } | Reference::DockerArchive { .. } => None,
    }
}

impl Documents {
    /// Where the blobs of the image come from.
    pub const fn source(&self) -> &ImageSource {
        &self.source
    }

    /// The layers' descriptors, lowest first.
    pub fn layers(&self) -> &[Descriptor] {
        &self.manifest.layers
    }

    /// What the layers are.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub fn plan(&self) -> Result<ImagePlan, PlanError> {
        ImagePlan::new(&self.manifest, &self.config)
    }
}

impl OpenImage {
    /// The layers that are stacked, the lowest first.
    pub fn stack(&self) -> impl Iterator<Item = &Arc<LayerImage>> {
        self.plan.stack.iter().filter_map(|stacked| self.layers.get(stacked.layer))
    }

    /// True if each layer of the stack is a single blob.
    pub fn is_of_single_blobs(&self) -> bool {
        self.plan.stack.iter().all(|stacked| stacked.devices.is_empty())
    }

    /// The merged file system, when the superblocks have come.
    ///
    /// # Errors
    /// A layer that is no EROFS image or whose first bytes do not come.
    pub async fn file_system(&self) -> anyhow::Result<Vfs<Lazy>> {
        Ok(Vfs::new(self.open_stack().await?)?)
    }

    /// The layers of the stack as file systems, the lowest first, when their superblocks have come.
    ///
    /// # Errors
    /// See [`OpenImage::file_system`].
    pub async fn open_stack(&self) -> anyhow::Result<Vec<Layer<Lazy>>> {
        let layer = |number: &usize| {
            self.layers.get(*number).map(|layer| Lazy(Arc::clone(layer))).context("the plan names a layer there is not")
        };
        let mut stack = Vec::with_capacity(self.plan.stack.len());
        for stacked in &self.plan.stack {
            if !stacked.data.is_empty() {
                return Err(UnsupportedData(self.documents.reference.clone()).into());
            }
            let devices = stacked.devices.iter().map(layer).collect::<anyhow::Result<Vec<_>>>()?;
            stack.push((layer(&stacked.layer)?, devices));
        }
        let open = stack.into_iter().enumerate();
        Ok(try_join_all(open.map(|(index, (image, devices))| vfs::open_layer(index, image, devices))).await?)
    }
}

/// An image in a form that is read but not shown.
#[derive(Debug, thiserror::Error)]
#[error("cannot show {0}: it keeps the contents of its files in layers of their own (role overlay-data)")]
pub struct UnsupportedData(Reference);

impl Lazy {
    /// `layer` as the file system reads it.
    pub fn new(layer: &Arc<LayerImage>) -> Self {
        Self(Arc::clone(layer))
    }
}

impl ReadAt for Lazy {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
        self.0.read_exact_at(offset, buf)
    }
}

impl Bring for Lazy {
    fn bring(&self, range: ByteRange, purpose: Purpose, done: vfs::Done) {
        let cause = match purpose {
            Purpose::Read => crate::fetch::Cause::Read,
            Purpose::Metadata => crate::fetch::Cause::Metadata,
        };
        self.0.request(range, cause, move |result| done(result.map_err(|error| error as vfs::BringError)));
    }
}
