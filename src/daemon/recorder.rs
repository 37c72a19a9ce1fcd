//! Writes down an image that is brought here: as snapshots that fill, and that are committed as its layers become local.
//!
//! A daemon has the records open; another process opens them for as long as a step takes, so that several can bring images
//! at the same time. A process that dies in between leaves what whoever opens the records next takes up.

use std::sync::Arc;
use std::time::Duration;

use super::image::House;
use crate::fetch::LayerImage;
use crate::model::BlobDigest;
use crate::snapshots::{LayerSpec, Snapshots, SnapshotsConfig, SnapshotsError};
use crate::store::Store;

/// How long to wait for others. A step of theirs takes some milliseconds, on a slow disk some hundred.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// An image, and where it is written down.
#[derive(Debug, Clone)]
pub(super) struct Recorder {
    store: Arc<Store>,
    /// Those of the daemon, if this is it.
    records: Option<Arc<Snapshots>>,
    image: String,
    manifest: BlobDigest,
    layers: Vec<LayerSpec>,
}

impl Recorder {
    /// For the image called `image`, whose layers are `layers`, lowest first.
    pub(super) fn new(house: &House, image: String, manifest: BlobDigest, layers: &[Arc<LayerImage>]) -> Self {
        let (store, records) = (Arc::clone(&house.store), house.snapshots().cloned());
        Self { store, records, image, manifest, layers: layers.iter().map(|layer| spec(layer)).collect() }
    }

    /// Writes down the image, and commits what is local of it. Again is as good as once. Waits for the disk.
    pub(super) fn record(&self) -> Result<(), SnapshotsError> {
        self.with(|records| records.pull(&self.image, self.manifest, &self.layers).map(drop))
    }

    /// Commits what a layer that became local makes possible. Waits for the disk.
    pub(super) fn local(&self, layer: &LayerImage, size: u64) -> Result<(), SnapshotsError> {
        for name in self.with(|records| records.layer_local(&spec(layer).id(), size))? {
            tracing::debug!(image = self.image, %name, "committed");
        }
        Ok(())
    }

    fn with<T>(&self, step: impl FnOnce(&Snapshots) -> Result<T, SnapshotsError>) -> Result<T, SnapshotsError> {
        match &self.records {
            Some(records) => step(records),
            None => step(&Snapshots::open_patiently(&self.store, SnapshotsConfig::default(), PATIENCE)?),
        }
    }
}

/// A layer as records name it.
pub(super) fn spec(layer: &LayerImage) -> LayerSpec {
    let diff_id = layer.status().diff_id;
    LayerSpec { diff_id, blob: *layer.blob(), anchor: layer.anchor(), size: layer.image_size() }
}
