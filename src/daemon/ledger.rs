//! What is recorded, and what of the cache may go: snapshots and pulled images as people see them, room made with regard to
//! them, images forgotten.
//!
//! Guarantees. A layer that a snapshot or a pulled image is made of goes after all others; if it was a tar, and so does not
//! come again by being read, only when everything is to go and no client's snapshot is made of it. What is in use never goes.
//! Refuses to know who asks.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::sync::Arc;

use super::config::Config as Settings;
use super::image::House;
use super::recorder::PATIENCE;
use crate::chain::{Chain, Content, Image, Key, Kind, Layer, Owner, Snapshot};
use crate::control::{Forgotten, Pruned, SeenImage, SeenLayer, SeenSnapshot, SnapshotsSeen};
use crate::snapshots::{Snapshots, SnapshotsConfig, SnapshotsError, is_local, usage_of};
use crate::store::records::{self, RecordsError};
use crate::store::{CacheGoal, Evicted, ImageName, Recorded, RecordedBy, StoreError};

/// Why the cache or what is recorded could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The records cannot be read.
    #[error("cannot tell what is recorded")]
    Records(#[source] RecordsError),
    /// The records cannot be changed.
    #[error(transparent)]
    Snapshots(#[from] SnapshotsError),
    /// The cache cannot be read or changed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Everything that is recorded below `root`.
pub fn seen(root: &Path, chain: &Chain) -> SnapshotsSeen {
    SnapshotsSeen {
        snapshots: chain.walk().map(|snapshot| seen_snapshot(root, chain, snapshot)).collect(),
        images: chain.images().map(|image| seen_image(chain, image)).collect(),
    }
}

fn seen_snapshot(root: &Path, chain: &Chain, snapshot: &Snapshot) -> SeenSnapshot {
    let layer = match snapshot.content {
        Content::Layer(slot) => chain.layer(slot).cloned(),
        Content::Files => None,
    };
    // The cache may have been emptied since it was written down.
    let layer = layer.map(|layer| Layer { local: layer.local.filter(|_| is_local(root, &layer)), ..layer });
    let layer = layer.as_ref();
    let usage = usage_of(root, snapshot, layer);
    SeenSnapshot {
        key: snapshot.key.clone(),
        kind: snapshot.kind,
        parent: snapshot.parent.clone(),
        state: snapshot.state(layer),
        bytes: usage.bytes,
        inodes: usage.inodes,
        created: snapshot.created.to_string(),
        updated: snapshot.updated.to_string(),
        labels: snapshot.labels.clone(),
        slot: snapshot.slot.0,
        becomes: snapshot.filling.as_ref().map(|target| target.name.clone()),
        layer: layer.map(seen_layer),
    }
}

fn seen_layer(layer: &Layer) -> SeenLayer {
    SeenLayer {
        slot: layer.slot.0,
        diff_id: layer.id.diff_id,
        blob: layer.id.blob,
        anchor: layer.id.anchor.clone(),
        bytes: layer.size,
        local: layer.local.map(|since| since.to_string()),
    }
}

fn seen_image(chain: &Chain, image: &Image) -> SeenImage {
    let committed = |name: &Key| chain.stat(name.as_str()).is_ok_and(|of| of.kind == Kind::Committed);
    SeenImage {
        image: image.name.clone(),
        manifest: image.manifest,
        pulled: image.pulled.to_string(),
        layers: image.layers.len(),
        committed: image.layers.iter().filter(|layer| committed(&layer.name)).count(),
    }
}

/// The images of all layers that are recorded.
fn recorded(chain: &Chain) -> Recorded {
    let mut recorded: Recorded = chain.layers().map(|layer| (image_of(layer), RecordedBy::Pull)).collect();
    for snapshot in chain.walk().filter(|snapshot| snapshot.owner == Owner::Client) {
        if let Content::Layer(slot) = snapshot.content
            && let Some(layer) = chain.layer(slot)
        {
            recorded.insert(image_of(layer), RecordedBy::Client);
        }
    }
    recorded
}

fn image_of(layer: &Layer) -> ImageName {
    (layer.id.blob.to_string(), layer.id.anchor.clone())
}

impl House {
    /// Everything that is recorded, as it is now.
    ///
    /// # Errors
    /// The records cannot be read.
    pub fn recorded(&self) -> Result<Chain, LedgerError> {
        match self.snapshots() {
            Some(snapshots) => Ok(snapshots.all()),
            None => records::look(self.store.root()).map_err(LedgerError::Records),
        }
    }

    /// The records, to change them.
    fn records(&self) -> Result<Arc<Snapshots>, SnapshotsError> {
        match self.snapshots() {
            Some(snapshots) => Ok(Arc::clone(snapshots)),
            None => Snapshots::open_patiently(&self.store, SnapshotsConfig::default(), PATIENCE).map(Arc::new),
        }
    }

    /// Brings the cache to `goal`, as far as that is possible. Waits for the disk.
    ///
    /// # Errors
    /// See [`LedgerError`].
    pub fn prune(&self, goal: &CacheGoal, dry_run: bool) -> Result<Pruned, LedgerError> {
        let chain = self.recorded()?;
        let (mut evicted, chunks) = self.make_room(goal, &recorded(&chain), dry_run)?;
        evicted.left = evicted.left.saturating_sub(chunks.bytes);
        if let Some(snapshots) = self.snapshots().filter(|_| !dry_run) {
            self.note_lost(snapshots, &chain, &evicted)?;
        }
        Ok(Pruned { dry_run, evicted, chunks })
    }

    /// Whoever asks the records hears that these layers are not here any more.
    fn note_lost(&self, snapshots: &Snapshots, chain: &Chain, evicted: &Evicted) -> Result<(), SnapshotsError> {
        let gone: HashSet<ImageName> =
            evicted.images.iter().map(|image| (image.blob.clone(), image.anchor.clone())).collect();
        let was_local = |layer: &&Layer| layer.local.is_some() && gone.contains(&image_of(layer));
        chain.layers().filter(was_local).try_for_each(|layer| {
            // Somebody may have brought it again.
            if is_local(self.store.root(), layer) { Ok(()) } else { snapshots.layer_lost(&layer.id) }
        })
    }

    /// Forgets a pulled image, with the snapshots that nobody else needs; with `prune` also its layers, as far as nothing
    /// that is recorded is made of them and nobody uses them. Waits for the disk.
    ///
    /// # Errors
    /// See [`LedgerError`]; among them that no such image was pulled.
    pub fn forget(&self, image: &str, prune: bool) -> Result<Forgotten, LedgerError> {
        let records = self.records()?;
        let before = recorded(&records.all());
        records.forget(image)?;
        let snapshots = records.collect(&BTreeSet::new())?;
        let after = recorded(&records.all());
        let gone: HashSet<ImageName> = before.into_keys().filter(|image| !after.contains_key(image)).collect();
        let evicted = if prune { self.store.evict_these(&gone)? } else { Evicted::default() };
        Ok(Forgotten { image: image.to_owned(), snapshots, evicted })
    }
}

/// What `prune` is to bring the cache to.
pub fn prune_goal(settings: &Settings, all: bool) -> CacheGoal {
    CacheGoal { all, ..settings.cache_goal() }
}
