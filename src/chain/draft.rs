//! A state in the making: the one that was, seen through what a command has changed so far.

use std::collections::BTreeMap;

use super::{
    Chain, ChainError, Content, Cursors, Image, Key, Kind, Layer, LayerId, LayerSlot, MAX_LAYER_SLOT,
    MAX_SNAPSHOT_SLOT, Snapshot, SnapshotSlot, Subject, Unmet, slots,
};

/// What a command changes, all or nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Change {
    /// Records to write, in this order.
    pub writes: Vec<Write>,
    /// What is to be done on disk: what makes, before the records are written; what destroys, after.
    pub effects: Vec<Effect>,
}

impl Change {
    /// Names of the snapshots that this commits, each after its parent.
    pub fn committed(&self) -> impl Iterator<Item = &Key> {
        self.effects.iter().filter_map(|effect| match effect {
            Effect::Committed(name) => Some(name),
            _ => None,
        })
    }
}

/// A record that is written or dropped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Under its key.
    PutSnapshot(Snapshot),
    /// The one with this key.
    DropSnapshot(Key),
    /// Under its number.
    PutLayer(Layer),
    /// The one with this number.
    DropLayer(LayerSlot),
    /// Under its name.
    PutImage(Image),
    /// The one with this name.
    DropImage(String),
    /// Where the search for free numbers goes on.
    Cursors(Cursors),
}

/// Something outside of the records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// A directory for the files of a snapshot is needed.
    MakeFiles(SnapshotSlot),
    /// The directory is needed no more.
    DropFiles(SnapshotSlot),
    /// A snapshot was committed under this name.
    Committed(Key),
    /// No snapshot and no image uses this layer any more.
    ReleaseLayer(Layer),
}

pub(super) struct Draft<'a> {
    base: &'a Chain,
    snapshots: BTreeMap<Key, Option<Snapshot>>,
    layers: BTreeMap<LayerSlot, Option<Layer>>,
    images: BTreeMap<String, Option<Image>>,
    cursors: Cursors,
    effects: Vec<Effect>,
}

impl<'a> Draft<'a> {
    pub(super) const fn new(base: &'a Chain) -> Self {
        Self {
            base,
            snapshots: BTreeMap::new(),
            layers: BTreeMap::new(),
            images: BTreeMap::new(),
            cursors: base.cursors,
            effects: Vec::new(),
        }
    }

    pub(super) fn finish(self) -> Change {
        // What is dropped comes first: what is put may take its number.
        let mut dropped = Vec::new();
        let mut put = Vec::new();
        for (key, snapshot) in self.snapshots {
            match snapshot {
                Some(snapshot) => put.push(Write::PutSnapshot(snapshot)),
                None => dropped.push(Write::DropSnapshot(key)),
            }
        }
        for (slot, layer) in self.layers {
            match layer {
                Some(layer) => put.push(Write::PutLayer(layer)),
                None => dropped.push(Write::DropLayer(slot)),
            }
        }
        for (name, image) in self.images {
            match image {
                Some(image) => put.push(Write::PutImage(image)),
                None => dropped.push(Write::DropImage(name)),
            }
        }
        if self.cursors != self.base.cursors {
            put.push(Write::Cursors(self.cursors));
        }
        dropped.append(&mut put);
        Change { writes: dropped, effects: self.effects }
    }

    pub(super) fn effect(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    pub(super) fn get(&self, key: &Key) -> Option<&Snapshot> {
        match self.snapshots.get(key) {
            Some(changed) => changed.as_ref(),
            None => self.base.snapshots.get(key),
        }
    }

    pub(super) fn named(&self, key: &Key, subject: Subject) -> Result<&Snapshot, ChainError> {
        self.get(key).ok_or_else(|| ChainError::NotFound { subject, name: key.to_string() })
    }

    pub(super) fn is_committed(&self, key: &Key) -> bool {
        self.get(key).is_some_and(|snapshot| snapshot.kind == Kind::Committed)
    }

    pub(super) fn snapshots(&self) -> impl Iterator<Item = &Snapshot> {
        let kept = self.base.snapshots.iter().filter(|(key, _)| !self.snapshots.contains_key(*key));
        kept.map(|(_, snapshot)| snapshot).chain(self.snapshots.values().flatten())
    }

    pub(super) fn put(&mut self, snapshot: Snapshot) {
        self.snapshots.insert(snapshot.key.clone(), Some(snapshot));
    }

    pub(super) fn drop_snapshot(&mut self, key: &Key) {
        if self.base.snapshots.contains_key(key) {
            self.snapshots.insert(key.clone(), None);
        } else {
            self.snapshots.remove(key);
        }
    }

    /// One of the snapshots that stand on `key`.
    pub(super) fn child(&self, key: &Key) -> Option<Key> {
        let from_here = |snapshot: &&Snapshot| snapshot.parent.as_ref() == Some(key);
        if let Some(child) = self.snapshots.values().flatten().find(from_here) {
            return Some(child.key.clone());
        }
        let known = self.base.children.get(key)?;
        known.iter().find(|child| !self.snapshots.contains_key(*child)).cloned()
    }

    pub(super) fn image(&self, name: &str) -> Option<&Image> {
        match self.images.get(name) {
            Some(changed) => changed.as_ref(),
            None => self.base.images.get(name),
        }
    }

    pub(super) fn images(&self) -> impl Iterator<Item = &Image> {
        let kept = self.base.images.iter().filter(|(name, _)| !self.images.contains_key(*name));
        kept.map(|(_, image)| image).chain(self.images.values().flatten())
    }

    pub(super) fn put_image(&mut self, image: Image) {
        self.images.insert(image.name.clone(), Some(image));
    }

    pub(super) fn drop_image(&mut self, name: &str) {
        self.images.insert(name.to_owned(), None);
    }

    pub(super) fn layer(&self, slot: LayerSlot) -> Option<&Layer> {
        match self.layers.get(&slot) {
            Some(changed) => changed.as_ref(),
            None => self.base.layers.get(&slot),
        }
    }

    pub(super) fn layer_of(&self, id: &LayerId) -> Option<&Layer> {
        let changed = self.layers.values().flatten().find(|layer| layer.id == *id);
        changed.or_else(|| self.layer(*self.base.by_id.get(id)?))
    }

    pub(super) fn put_layer(&mut self, layer: Layer) {
        self.layers.insert(layer.slot, Some(layer));
    }

    /// Drops the layer if nothing uses it any more.
    pub(super) fn release_layer(&mut self, slot: LayerSlot) {
        let used = self.snapshots().any(|snapshot| snapshot.content == Content::Layer(slot))
            || self.images().any(|image| image.layers.iter().any(|of| of.layer == slot));
        if used {
            return;
        }
        let Some(layer) = self.layer(slot).cloned() else { return };
        if self.base.layers.contains_key(&slot) {
            self.layers.insert(slot, None);
        } else {
            self.layers.remove(&slot);
        }
        self.effect(Effect::ReleaseLayer(layer));
    }

    pub(super) fn snapshot_slot(&mut self, for_what: &str) -> Result<SnapshotSlot, ChainError> {
        let is_free = |slot| {
            let slot = SnapshotSlot(slot);
            !self.base.slots.contains(&slot)
                && !self.snapshots.values().flatten().any(|snapshot| snapshot.slot == slot)
                && !self.images.values().flatten().any(|image| image.slot == slot)
        };
        let found = slots::next_free(self.cursors.snapshot, MAX_SNAPSHOT_SLOT, is_free);
        self.cursors.snapshot = found.ok_or_else(|| no_slot(for_what))?;
        Ok(SnapshotSlot(self.cursors.snapshot))
    }

    pub(super) fn layer_slot(&mut self, for_what: &str) -> Result<LayerSlot, ChainError> {
        let is_free = |slot| {
            let slot = LayerSlot(slot);
            !self.base.layers.contains_key(&slot) && !self.layers.contains_key(&slot)
        };
        let found = slots::next_free(self.cursors.layer, MAX_LAYER_SLOT, is_free);
        self.cursors.layer = found.ok_or_else(|| no_slot(for_what))?;
        Ok(LayerSlot(self.cursors.layer))
    }
}

fn no_slot(name: &str) -> ChainError {
    ChainError::FailedPrecondition { attempted: "number", name: name.to_owned(), unmet: Unmet::NoSlot }
}
