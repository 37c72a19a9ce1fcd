//! Writes down an image that is brought here: as snapshots that fill, and that are committed as its layers become local.
//!
//! A daemon has the records open; another process opens them for as long as a step takes, so that several can bring images
//! at the same time. A process that dies in between leaves what whoever opens the records next takes up.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::image::{House, OpenImage};
use crate::chain::{Image, LayerSlot, SnapshotSlot};
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

    /// Writes down the image, and commits what is local of it: what was written. Again is as good as once. Waits for the
    /// disk.
    pub(super) fn record(&self) -> Result<Image, SnapshotsError> {
        self.with(|records| records.pull(&self.image, self.manifest, &self.layers).map(|recorded| recorded.image))
    }

    /// Commits `layers` as they become local.
    pub(super) fn follow(self: &Arc<Self>, layers: &[Arc<LayerImage>]) {
        for layer in layers {
            let recorder = Arc::clone(self);
            // To be written down is no reason to be kept: whoever shows the layer says so himself.
            layer.when_verified(move |layer| {
                let size = layer.image_size().expect("what was verified has been read to its end");
                if let Err(error) = recorder.local(layer, size) {
                    // Whoever opens the records next finds it.
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(diff_id = %layer.diff_id(), error, "cannot write down that a layer is local");
                }
            });
        }
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

/// A mount of the daemon that is written down, as an image that is called by its mount point: references do not begin with a
/// slash. Dropped, it is forgotten, unless it is to stay.
#[derive(Debug)]
pub(super) struct WrittenMount {
    records: Arc<Snapshots>,
    image: Image,
    stays: AtomicBool,
}

impl WrittenMount {
    /// Writes down that `image` is mounted on `mount_point`, and what becomes local of it; none if this process does not have
    /// the records open. Again is as good as once: it gets the same numbers. Waits for the disk.
    pub(super) fn new(house: &House, image: &OpenImage, mount_point: &Path) -> Result<Option<Self>, SnapshotsError> {
        let Some(records) = house.snapshots().cloned() else { return Ok(None) };
        let name = mount_point.to_string_lossy().into_owned();
        let recorder = Arc::new(Recorder::new(house, name, image.documents.digest, &image.layers));
        let written = recorder.record()?;
        recorder.follow(&image.layers);
        Ok(Some(Self { records, image: written, stays: AtomicBool::new(false) }))
    }

    /// The number of its tree.
    pub(super) const fn slot(&self) -> SnapshotSlot {
        self.image.slot
    }

    /// The numbers of the layers that are stacked, the lowest first.
    pub(super) fn layer_slots(&self, image: &OpenImage) -> Vec<Option<LayerSlot>> {
        let slot = |layer: usize| self.image.layers.get(layer).map(|layer| layer.layer);
        image.plan.stack.iter().map(|stacked| slot(stacked.layer)).collect()
    }

    /// Leaves it written down when this process ends.
    pub(super) fn stay(&self) {
        self.stays.store(true, Ordering::Relaxed);
    }
}

impl Drop for WrittenMount {
    fn drop(&mut self) {
        if !self.stays.load(Ordering::Relaxed) {
            forget(&self.records, &self.image.name);
        }
    }
}

/// Forgets a mount, and the snapshots that only it needed.
fn forget(records: &Snapshots, name: &str) {
    let forgotten = records.forget(name).and_then(|()| records.collect(&BTreeSet::new()));
    if let Err(error) = forgotten {
        let error: &dyn std::error::Error = &error;
        tracing::warn!(mount_point = name, error, "a mount that is gone stays written down");
    }
}

/// Forgets mounts that are written down and not among `mount_points`: a process that died left them.
pub(super) fn forget_other_mounts(records: &Snapshots, mount_points: &BTreeSet<PathBuf>) {
    let is_gone = |image: &Image| image.name.starts_with('/') && !mount_points.contains(Path::new(&image.name));
    for image in records.images().into_iter().filter(is_gone) {
        forget(records, &image.name);
    }
}

/// A layer as records name it.
pub(super) fn spec(layer: &LayerImage) -> LayerSpec {
    LayerSpec {
        diff_id: layer.claimed_diff_id(),
        blob: *layer.blob(),
        anchor: layer.anchor(),
        size: layer.image_size(),
    }
}
