//! An image that containerd is pulling, opened so that its layers can be served: the documents, by digest; the layers, or
//! those of its twin; and their indexes, all at the same time.
//!
//! Documents that containerd has fetched already are taken from it, so that an image that cannot be served costs its
//! registry nothing.

use std::sync::Arc;

use anyhow::Context as _;
use futures::future::join_all;

use super::decide::Why;
use super::witness::Witness;
use crate::daemon::image::{self, Documents, House};
use crate::fetch::{FetchError, LayerImage};
use crate::model::{BlobDigest, ChainId};
use crate::oci::{Document, ImageName, ImagePlan, LayerPlan, PlanError, Reference, Selector, find_twin};
use crate::store::Anchor;
use crate::vfs;

/// Which image, and whose pull of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Pulled {
    /// containerd's namespace.
    pub(super) namespace: String,
    /// The image as it was asked for.
    pub(super) image: ImageName,
    /// Its manifest.
    pub(super) manifest: BlobDigest,
}

/// An image whose layers can be served.
#[derive(Debug)]
pub(crate) struct LazyImage {
    /// The ChainIDs of the image that is pulled.
    pub(super) chain: Vec<ChainId>,
    /// The blobs of the image that is pulled, lowest first.
    pub(super) blobs: Vec<BlobDigest>,
    /// The image, by digest, that is served: itself or its twin.
    pub(super) of: ImageName,
    /// What is served in the place of each, or why nothing is.
    pub(super) layers: Vec<Result<Arc<LayerImage>, Arc<Why>>>,
}

impl LazyImage {
    /// The layers that can be served, lowest first.
    pub(crate) fn layers(&self) -> impl Iterator<Item = &Arc<LayerImage>> {
        self.layers.iter().filter_map(|layer| layer.as_ref().ok())
    }

    /// True if a layer that cannot be served now may be soon.
    pub(super) fn may_change(&self) -> bool {
        self.layers.iter().any(|layer| layer.as_ref().is_err_and(|why| why.may_change()))
    }
}

impl Pulled {
    fn by_digest(&self, digest: BlobDigest) -> Reference {
        Reference::Registry(self.image.with_digest(digest))
    }

    /// Under which the twin is kept. The word of one repository does not hold for another.
    fn twin_key(&self) -> String {
        format!("twin of {} in {}/{}", self.manifest, self.image.host(), self.image.repository())
    }

    /// Opens the image.
    pub(super) async fn open(&self, house: &House, witness: &Witness) -> Result<LazyImage, Why> {
        witness.vouches(self).await?;
        let documents = self.documents(house, witness).await?;
        let chain = ChainId::of_stack(documents.config.diff_ids());
        let blobs = documents.layers().iter().map(|layer| layer.digest).collect();
        let (documents, plan) = match documents.plan() {
            Ok(plan) => (documents, plan),
            Err(PlanError::Tar) => self.twin(house, witness, &documents).await?,
            Err(error) => return Err(Why::Plan(error)),
        };
        let layers = open_layers(house, &documents, &plan).await?;
        Ok(LazyImage { chain, blobs, of: self.image.with_digest(documents.digest), layers })
    }

    async fn documents(&self, house: &House, witness: &Witness) -> Result<Documents, Why> {
        if let Err(error) = self.adopt(house, witness, self.manifest).await {
            tracing::debug!(manifest = %self.manifest, "containerd's copy of an image is of no use: {error:#}");
        }
        self.read(house, self.manifest).await.map_err(Why::Image)
    }

    /// Takes over what containerd has fetched of a manifest, if it has.
    async fn adopt(&self, house: &House, witness: &Witness, manifest: BlobDigest) -> anyhow::Result<()> {
        if house.store.document(&manifest)?.is_some() {
            return Ok(());
        }
        let Some(bytes) = witness.document(&self.namespace, manifest).await? else { return Ok(()) };
        let Document::Manifest(parsed) = Document::parse(&bytes, None)? else { return Ok(()) };
        let Some(config) = witness.document(&self.namespace, parsed.config.digest).await? else { return Ok(()) };
        house.adopt(manifest, &bytes, (parsed.config.digest, &config))
    }

    /// The documents of the image with this manifest.
    async fn read(&self, house: &House, manifest: BlobDigest) -> anyhow::Result<Documents> {
        let documents = house.documents(&self.by_digest(manifest), None).await?;
        anyhow::ensure!(documents.digest == manifest, "{manifest} is an index, not a manifest");
        documents.config.check_layers(&documents.manifest)?;
        Ok(documents)
    }

    /// The EROFS twin of the image, which is `ordinary`.
    async fn twin(
        &self,
        house: &House,
        witness: &Witness,
        ordinary: &Documents,
    ) -> Result<(Documents, ImagePlan), Why> {
        let store = |error: crate::store::StoreError| Why::Image(error.into());
        let kept = house.store.reference(&self.twin_key()).map_err(store)?;
        let digest = match kept {
            Some(kept) => kept.manifest,
            None => self.name_of_twin(house, witness).await?.ok_or(Why::NoTwin)?,
        };
        let twin = self.read(house, digest).await.map_err(Why::Image)?;
        let not = |reason| Why::FalseTwin { twin: digest, reason };
        if !ordinary.config.corresponds(&twin.config) {
            return Err(not("its config says something else, or has another number of layers"));
        }
        let plan = twin.plan().map_err(Why::Plan)?;
        if plan.stack.len() != ordinary.layers().len() || plan.layers.len() != plan.stack.len() {
            return Err(not("its layers do not stand one for one"));
        }
        house.store.keep_reference(&self.twin_key(), &digest).map_err(store)?;
        Ok((twin, plan))
    }

    /// The manifest of the twin, as an index says that the repository has published.
    async fn name_of_twin(&self, house: &House, witness: &Witness) -> Result<Option<BlobDigest>, Why> {
        if let Some(indexes) = witness.indexes(self).await.map_err(Why::NoWitness)? {
            let twin = |bytes: &[u8]| match Document::parse(bytes, None) {
                Ok(Document::Index(index)) => find_twin(&index, &self.manifest).map(|twin| twin.digest),
                _ => None,
            };
            return Ok(indexes.iter().find_map(|bytes| twin(bytes)));
        }
        // A manifest that was asked for by its digest stands in no index that anybody named.
        if self.image.selector() == Selector::Digest(self.manifest) {
            return Ok(None);
        }
        let reading = async {
            let source = house.transports.open(&Reference::Registry(self.image.clone())).await?;
            source.named().await
        };
        match reading.await.map_err(|error| Why::Image(error.into()))? {
            Document::Index(index) => Ok(find_twin(&index, &self.manifest).map(|twin| twin.digest)),
            Document::Manifest(_) => Ok(None),
        }
    }
}

/// Opens layer `blob` of `image`, which is named by digest, from what is kept of it alone.
pub(super) async fn reopen(house: &House, image: &ImageName, blob: BlobDigest) -> anyhow::Result<Arc<LayerImage>> {
    let digest = *image.digest().context("the image is not named by digest")?;
    let documents = house.kept_documents(&Reference::Registry(image.clone()), digest).await?;
    let plan = documents.plan()?;
    let layer = plan.layers.iter().find(|layer| layer.blob == blob).context("its manifest has no such layer")?;
    let mut opened = house.open_each(&documents, &[layer]).await?;
    Ok(opened.pop().context("nothing was opened")??)
}

/// A layer with what is read of it when it is mounted: whoever mounts it, while containerd waits, waits for no registry.
async fn mountable(opened: Result<Arc<LayerImage>, Arc<FetchError>>) -> anyhow::Result<Arc<LayerImage>> {
    let layer = opened?;
    if layer.anchor() != Anchor::Whole {
        vfs::open_layer(0, image::Lazy::new(&layer), Vec::new()).await?;
    }
    Ok(layer)
}

/// Opens the layers, each for itself: one that cannot be served keeps no other from it.
async fn open_layers(
    house: &House,
    documents: &Documents,
    plan: &ImagePlan,
) -> Result<Vec<Result<Arc<LayerImage>, Arc<Why>>>, Why> {
    let count = documents.layers().len();
    // What its bytes are checked against has to be what containerd calls it by.
    let named = |layer: &LayerPlan| documents.config.diff_ids().get(layer.position) == Some(&layer.diff_id);
    let alone: Vec<&LayerPlan> = plan
        .stack
        .iter()
        .filter(|stacked| stacked.devices.is_empty() && stacked.data.is_empty())
        .filter_map(|stacked| plan.layers.get(stacked.layer))
        .filter(|layer| layer.index.is_some() && named(layer))
        .collect();
    let opened = house.open_each(documents, &alone).await.map_err(Why::Image)?;
    let opened = join_all(opened.into_iter().map(mountable)).await;
    let mut layers: Vec<_> = (0..count).map(|layer| Err(Arc::new(Why::NotSeekable(layer)))).collect();
    for (layer, opened) in alone.iter().zip(opened) {
        let Some(place) = layers.get_mut(layer.position) else { continue };
        match opened {
            Ok(opened) if opened.anchor() != Anchor::Whole => *place = Ok(opened),
            Ok(_) => {}
            Err(error) => *place = Err(Arc::new(Why::Layer { layer: layer.position, error })),
        }
    }
    Ok(layers)
}
