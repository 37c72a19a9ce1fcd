//! The rules of snapshots, as a state machine that does nothing but answer.
//!
//! A snapshot is active or a view (it has a key), or committed (it has a name); keys and names share one space. What is
//! committed never changes and may be a parent. A snapshot without parent may get one when it is committed: the
//! *rebase*, by which layers are prepared at the same time and put into order afterwards.
//!
//! ```text
//!            prepare                commit (parent)                remove
//!   nothing ────────▶ active ──────────────────────▶ committed ────────────▶ nothing
//!            view     (no parent, or a committed one)  ▲  (while nothing stands on it and no image needs it)
//!   nothing ────────▶ view ──▶ nothing                 │
//!            pull                  the layer is local and the parent committed
//!   nothing ────────▶ active, filling ─────────────────┘
//! ```
//!
//! The semantics are containerd's: which errors come when is held against its conformance cases in `tests.rs`. What is
//! added: layers, which snapshots share; images, which hold snapshots; and snapshots that fill and commit themselves.
//!
//! [`Chain::plan`] looks at the state and a [`Command`] and gives a [`Change`]: records to write and deeds to do, or an
//! error. [`Chain::accept`] makes a change part of the state. Between the two somebody can write the change down, so
//! that state and records never differ. Time is an argument.
//!
//! It refuses to know where records are kept, what a path is, and how a layer becomes local.

mod draft;
mod error;
mod fill;
mod filter;
mod garbage;
mod rules;
mod slots;
mod words;

use std::collections::{BTreeMap, BTreeSet};

pub use draft::{Change, Effect, Write};
pub use error::{ChainError, Damage, Invalid, Subject, Unmet};
pub use fill::PulledLayer;
pub use filter::{FilterError, Filters};
pub use garbage::Garbage;
pub use rules::Command;
pub use slots::{MAX_LAYER_SLOT, MAX_SNAPSHOT_SLOT};
pub use words::{
    Content, Image, ImageLayer, Key, Kind, Labels, Layer, LayerId, LayerSlot, MAX_KEY, MAX_LABELS, Owner, Snapshot,
    SnapshotSlot, State, Target, Usage,
};

/// All snapshots, layers and images of one root.
#[derive(Debug, Clone, Default)]
pub struct Chain {
    snapshots: BTreeMap<Key, Snapshot>,
    layers: BTreeMap<LayerSlot, Layer>,
    images: BTreeMap<String, Image>,
    cursors: Cursors,
    /// By parent.
    children: BTreeMap<Key, BTreeSet<Key>>,
    /// Numbers of snapshots and images.
    slots: BTreeSet<SnapshotSlot>,
    by_id: BTreeMap<LayerId, LayerSlot>,
}

/// Where the search for a free number goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cursors {
    /// The number that the last snapshot or image got.
    pub snapshot: u32,
    /// The number that the last layer got.
    pub layer: u32,
}

impl Chain {
    /// The state that records say.
    ///
    /// # Errors
    /// Records that contradict each other.
    pub fn restore(
        snapshots: impl IntoIterator<Item = Snapshot>,
        layers: impl IntoIterator<Item = Layer>,
        images: impl IntoIterator<Item = Image>,
        cursors: Cursors,
    ) -> Result<Self, Damage> {
        let mut chain = Self { cursors, ..Self::default() };
        for layer in layers {
            let name = layer.id.to_string();
            let known = chain.by_id.insert(layer.id.clone(), layer.slot).is_some();
            if chain.layers.insert(layer.slot, layer).is_some() || known {
                return Err(Damage::SharedSlot(name));
            }
        }
        for image in images {
            if !chain.slots.insert(image.slot) {
                return Err(Damage::SharedSlot(image.name));
            }
            chain.images.insert(image.name.clone(), image);
        }
        for snapshot in snapshots {
            if !chain.slots.insert(snapshot.slot) {
                return Err(Damage::SharedSlot(snapshot.key.to_string()));
            }
            chain.adopt(&snapshot);
            chain.snapshots.insert(snapshot.key.clone(), snapshot);
        }
        chain.check()?;
        Ok(chain)
    }

    /// Holds every record against those it names.
    fn check(&self) -> Result<(), Damage> {
        let missing = |of: &str, needs: String| Damage::Missing { of: of.to_owned(), needs };
        for snapshot in self.snapshots.values() {
            let of = snapshot.key.as_str();
            if let Content::Layer(slot) = snapshot.content
                && !self.layers.contains_key(&slot)
            {
                return Err(missing(of, format!("layer {slot}")));
            }
            if snapshot.filling.is_some() && (snapshot.kind != Kind::Active || snapshot.parent.is_some()) {
                let what = "fills and is not active without parent";
                return Err(Damage::Contradiction { of: of.to_owned(), what });
            }
            let mut below = snapshot.parent.as_ref();
            let mut steps = 0_usize;
            while let Some(key) = below {
                let Some(parent) = self.snapshots.get(key) else { return Err(missing(of, key.to_string())) };
                if parent.kind != Kind::Committed {
                    return Err(Damage::Contradiction {
                        of: of.to_owned(),
                        what: "has a parent that is not committed",
                    });
                }
                steps += 1;
                if steps > self.snapshots.len() {
                    return Err(Damage::Circle(of.to_owned()));
                }
                below = parent.parent.as_ref();
            }
        }
        for image in self.images.values() {
            for ImageLayer { layer, name } in &image.layers {
                if !self.layers.contains_key(layer) {
                    return Err(missing(&image.name, format!("layer {layer}")));
                }
                if !self.is_committed(name) && self.filling_for(name).is_none() {
                    return Err(missing(&image.name, name.to_string()));
                }
            }
        }
        Ok(())
    }

    /// What `command`, given at `now`, changes.
    ///
    /// # Errors
    /// See [`ChainError`]; then nothing is to change.
    pub fn plan(&self, command: &Command, now: crate::model::Timestamp) -> Result<Change, ChainError> {
        rules::plan(self, command, now)
    }

    /// Makes `change`, which was planned for exactly this state, part of it.
    pub fn accept(&mut self, change: &Change) {
        for write in &change.writes {
            self.write(write);
        }
    }

    /// [`Chain::plan`] and [`Chain::accept`] in one, for those who keep no records.
    ///
    /// # Errors
    /// As [`Chain::plan`].
    pub fn apply(&mut self, command: &Command, now: crate::model::Timestamp) -> Result<Change, ChainError> {
        let change = self.plan(command, now)?;
        self.accept(&change);
        Ok(change)
    }

    fn write(&mut self, write: &Write) {
        match write {
            Write::PutSnapshot(snapshot) => {
                self.forget_snapshot(&snapshot.key);
                self.slots.insert(snapshot.slot);
                self.adopt(snapshot);
                self.snapshots.insert(snapshot.key.clone(), snapshot.clone());
            }
            Write::DropSnapshot(key) => self.forget_snapshot(key),
            Write::PutLayer(layer) => {
                self.by_id.insert(layer.id.clone(), layer.slot);
                self.layers.insert(layer.slot, layer.clone());
            }
            Write::DropLayer(slot) => {
                if let Some(layer) = self.layers.remove(slot) {
                    self.by_id.remove(&layer.id);
                }
            }
            Write::PutImage(image) => {
                self.forget_image(&image.name);
                self.slots.insert(image.slot);
                self.images.insert(image.name.clone(), image.clone());
            }
            Write::DropImage(name) => self.forget_image(name),
            Write::Cursors(cursors) => self.cursors = *cursors,
        }
    }

    fn forget_snapshot(&mut self, key: &Key) {
        let Some(old) = self.snapshots.remove(key) else { return };
        self.slots.remove(&old.slot);
        if let Some(parent) = old.parent
            && let Some(children) = self.children.get_mut(&parent)
        {
            children.remove(&old.key);
            if children.is_empty() {
                self.children.remove(&parent);
            }
        }
    }

    fn adopt(&mut self, child: &Snapshot) {
        if let Some(parent) = &child.parent {
            self.children.entry(parent.clone()).or_default().insert(child.key.clone());
        }
    }

    fn forget_image(&mut self, name: &str) {
        if let Some(old) = self.images.remove(name) {
            self.slots.remove(&old.slot);
        }
    }

    /// The snapshot with this key or name.
    ///
    /// # Errors
    /// [`ChainError::NotFound`].
    pub fn stat(&self, key: &str) -> Result<&Snapshot, ChainError> {
        self.snapshots.get(key).ok_or_else(|| ChainError::NotFound { subject: Subject::Snapshot, name: key.to_owned() })
    }

    /// The active snapshot or view `key` and what it stands on, from its parent down: what its mounts are made of.
    ///
    /// # Errors
    /// [`ChainError::NotFound`]; [`ChainError::FailedPrecondition`] for one that is committed.
    pub fn stack(&self, key: &str) -> Result<Vec<&Snapshot>, ChainError> {
        let snapshot = self.stat(key)?;
        if snapshot.kind == Kind::Committed {
            return Err(ChainError::FailedPrecondition {
                attempted: "mount",
                name: key.to_owned(),
                unmet: Unmet::Kind(snapshot.kind),
            });
        }
        Ok(self.with_parents(snapshot))
    }

    /// `snapshot` and all below it.
    fn with_parents<'a>(&'a self, snapshot: &'a Snapshot) -> Vec<&'a Snapshot> {
        let below = |of: &&'a Snapshot| self.snapshots.get(of.parent.as_ref()?);
        std::iter::successors(Some(snapshot), below).collect()
    }

    /// All snapshots that match, by key.
    pub fn list(&self, filters: &Filters) -> impl Iterator<Item = &Snapshot> {
        self.snapshots.values().filter(|snapshot| filters.matches(snapshot))
    }

    /// All snapshots, by key.
    pub fn walk(&self) -> impl Iterator<Item = &Snapshot> {
        self.snapshots.values()
    }

    /// All layers, by number.
    pub fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.layers.values()
    }

    /// The layer with this number.
    pub fn layer(&self, slot: LayerSlot) -> Option<&Layer> {
        self.layers.get(&slot)
    }

    /// All images, by name.
    pub fn images(&self) -> impl Iterator<Item = &Image> {
        self.images.values()
    }

    /// The image of this name.
    ///
    /// # Errors
    /// [`ChainError::NotFound`].
    pub fn image(&self, name: &str) -> Result<&Image, ChainError> {
        self.images.get(name).ok_or_else(|| ChainError::NotFound { subject: Subject::Image, name: name.to_owned() })
    }

    /// Where the search for free numbers goes on.
    pub const fn cursors(&self) -> Cursors {
        self.cursors
    }

    fn is_committed(&self, key: &Key) -> bool {
        self.snapshots.get(key).is_some_and(|snapshot| snapshot.kind == Kind::Committed)
    }

    /// A snapshot that will be `name` when its layer is local.
    fn filling_for(&self, name: &Key) -> Option<&Snapshot> {
        self.snapshots.values().find(|snapshot| snapshot.filling.as_ref().is_some_and(|target| target.name == *name))
    }
}

#[cfg(test)]
mod model_tests;
#[cfg(test)]
mod tests;
