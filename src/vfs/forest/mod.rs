//! Many snapshots and layers behind one root, which come and go while they are served.
//!
//! ```text
//! snapshots/<name>/…    the merged tree of a stack of layers
//! layers/<diffid>       a layer's image as one file
//! raw/<slot>/…          what is in a layer's image, as it is: with whiteouts and marks, for overlayfs to merge
//! ```
//!
//! A second layer that claims the same diffID and has a slot of its own is the file `layers/<diffid>.<slot>`.
//!
//! The directories are for the superuser alone: an image holds set-uid programs, so nobody sees one who was not meant to.
//! Whoever is gets a snapshot bind-mounted, and the modes above it count no more.
//!
//! All files but directories have one inode per layer, so that the kernel keeps their pages once however many snapshots
//! show them: see [`slots`](super::slots).
//!
//! **What is removed** has no name from then on, and its name may be given to something else. It is served until the
//! kernel lets go of it: a bind mount, a working directory or an open file in a snapshot keeps all of the snapshot, and a
//! loop device keeps its layer's file; a layer lives at least as long as the snapshots that show it. The kernel tells
//! when it drops the last reference to a snapshot's root or a layer's file ([`FileSystem::forget`](super::FileSystem)),
//! and what was given for it is dropped, on a thread of its own because closing a layer may wait for the disk. Behind
//! that, numbers that were given out answer [`Error::NoSuchInode`].
//!
//! If the kernel was served by another process before, nobody knows how many references it has to what is listed: it counts
//! as having some, until it says that it dropped them.
//!
//! So a snapshot that nobody uses when it is removed goes at once. Of one that was used, the kernel remembers names even
//! when its last user is gone, until memory is short or somebody makes it forget (`fuse::Server::drop_unused`), or
//! [`Forest::cut_snapshot`] ends it. One thing the kernel takes away from users at a removal: what somebody has mounted on a
//! directory of the snapshot itself (not of an overlay above it).
//!
//! No method waits but for a lock that is held for an insertion or a removal.

mod serve;
mod table;

use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;

use self::table::{Garbage, Leaf, References, Tables, Tree};
use super::numbers::Numbering;
use super::slots::{LAYERS_INO, RAW_INO, SLOTS, SNAPSHOTS_INO, SnapshotNumbers};
use super::{Error, KernelCache, Layer, Vfs};
use crate::model::{DiffId, Name, ReadAt};

/// What the inode numbers of a layer's files are made from. Never another layer's; a layer that comes again has its slot
/// again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerSlot(pub u32);

/// What the inode numbers of a snapshot's directories are made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SnapshotSlot(pub u32);

/// Why a forest could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum ForestError {
    /// A snapshot of that name is there.
    #[error("there is a snapshot {0} already")]
    NameTaken(Name),
    /// The slot is that of something else.
    #[error("cannot give slot {slot} to {to}: {taken_by} has it")]
    SlotTaken {
        /// Which slot.
        slot: u32,
        /// Who wanted it.
        to: String,
        /// Who has it.
        taken_by: String,
    },
    /// A slot that cannot be.
    #[error("there is no slot {0}: there are {SLOTS}")]
    NoSuchSlot(u32),
    /// Every slot is in use.
    #[error("all {SLOTS} slots are in use")]
    Full,
    /// No such layer is listed.
    #[error("there is no layer in slot {0}")]
    NoSuchLayer(u32),
    /// No such snapshot is listed.
    #[error("there is no snapshot in slot {0}")]
    NoSuchSnapshot(u32),
    /// The layers cannot be shown.
    #[error("cannot show snapshot {name}")]
    Layers {
        /// The snapshot.
        name: Name,
        /// Why not. Bytes of a root directory may be absent if the layer was not opened by
        /// [`open_layers`](super::open_layers).
        #[source]
        source: Error,
    },
}

/// Snapshots and layers behind one root. See the module's words.
///
/// Lock order: `cache` and `tables` are never held together.
pub struct Forest<R> {
    tables: RwLock<Tables<R>>,
    cache: Mutex<Option<Arc<dyn KernelCache>>>,
}

impl<R> std::fmt::Debug for Forest<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tables = self.tables();
        let (snapshots, layers) = (tables.trees.len(), tables.layers.len());
        f.debug_struct("Forest").field("snapshots", &snapshots).field("layers", &layers).finish_non_exhaustive()
    }
}

impl<R> Default for Forest<R> {
    fn default() -> Self {
        Self { tables: RwLock::default(), cache: Mutex::default() }
    }
}

impl<R> Forest<R> {
    /// Nothing is planted yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// What a listed layer's file is called in `layers/`.
    pub fn layer_name(&self, slot: LayerSlot) -> Option<String> {
        self.tables().layers.get(&slot.0).filter(|record| record.listed > 0).map(|record| record.name.clone())
    }

    /// True as long as anything of the layer is served: it is listed, a snapshot shows it, or its file is in use.
    pub fn has_layer(&self, slot: LayerSlot) -> bool {
        self.tables().layers.contains_key(&slot.0)
    }

    /// True as long as anything of the snapshot is served: it is listed, or the kernel holds its root.
    pub fn has_snapshot(&self, slot: SnapshotSlot) -> bool {
        self.tables().trees.contains_key(&slot.0)
    }

    /// No code runs while the lock is held that could panic half-way.
    fn tables(&self) -> RwLockReadGuard<'_, Tables<R>> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self) -> RwLockWriteGuard<'_, Tables<R>> {
        self.tables.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the kernel what changed in `dir`: the listing, and also what a name meant if one went.
    fn tell(&self, dir: u64, gone: Option<&[u8]>) {
        let cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(cache) = cache {
            if let Some(name) = gone {
                cache.name_changed(dir, name);
            }
            cache.listing_changed(dir);
        }
    }
}

impl<R: ReadAt + 'static> Forest<R> {
    /// Lists a layer under `layers/` and `raw/`, so that snapshots can be made of it. One that is listed already keeps its
    /// slot and its bytes, and has to be removed once more: the one in the `slot` that is given, or without one a layer of
    /// the same diffID. So whoever knows layers that only claim to be the same gives each a slot.
    ///
    /// A `slot` that is given must not be another layer's at the moment, and is never given to another one if the kernel
    /// may remember the first.
    ///
    /// # Errors
    /// See [`ForestError`].
    pub fn add_layer(
        &self,
        diff_id: DiffId,
        layer: Arc<Layer<R>>,
        slot: Option<LayerSlot>,
    ) -> Result<LayerSlot, ForestError> {
        // It was read when the layer was opened; should it be gone again, the layer is not shown as it is.
        let root = layer.image().root_inode().ok().map(|root| *root.attributes());
        let slot = self.change().list_layer(diff_id, layer, root, slot.map(|slot| slot.0))?;
        self.tell(LAYERS_INO, None);
        self.tell(RAW_INO, None);
        Ok(LayerSlot(slot))
    }

    /// Takes a layer from the list, if this is the last of its additions. Snapshots go on showing it.
    ///
    /// # Errors
    /// [`ForestError::NoSuchLayer`].
    pub fn remove_layer(&self, slot: LayerSlot) -> Result<(), ForestError> {
        let (gone, garbage) = self.change().unlist_layer(slot.0)?;
        if let Some(name) = gone {
            self.tell(LAYERS_INO, Some(name.as_bytes()));
            self.tell(RAW_INO, Some(slot.0.to_string().as_bytes()));
        }
        bury(garbage);
        Ok(())
    }

    /// Lists a snapshot under `snapshots/`: the merge of layers (the lowest first) that are there.
    ///
    /// A `slot` that is given must not be in use.
    ///
    /// # Errors
    /// See [`ForestError`].
    pub fn add_snapshot(
        &self,
        name: &Name,
        layers: &[LayerSlot],
        slot: Option<SnapshotSlot>,
    ) -> Result<SnapshotSlot, ForestError> {
        let (slot, leaves) = self.change().reserve(name, layers, slot.map(|slot| slot.0))?;
        // Reading the root may touch the disk, so no lock is held.
        let tree = grow(slot, name, leaves).map_err(|source| ForestError::Layers { name: name.clone(), source })?;
        self.change().list_snapshot(tree)?;
        self.tell(SNAPSHOTS_INO, None);
        Ok(SnapshotSlot(slot))
    }

    /// Takes a snapshot from the list. Whoever uses it goes on doing so.
    ///
    /// A name that is given anew at once may lead to the old snapshot until the kernel was told: the one who serves knows
    /// when it was (`Server::settle`).
    ///
    /// # Errors
    /// [`ForestError::NoSuchSnapshot`].
    pub fn remove_snapshot(&self, slot: SnapshotSlot) -> Result<(), ForestError> {
        let (name, garbage) = self.change().unlist_snapshot(slot.0)?;
        self.tell(SNAPSHOTS_INO, Some(name.as_bytes()));
        bury(garbage);
        Ok(())
    }
}

impl<R: ReadAt + 'static> Forest<R> {
    /// Serves a removed snapshot no more, whoever uses it: what is not in the kernel's caches is stale
    /// ([`Error::NoSuchInode`]). One that is listed is removed first. Layers that go with it have another slot when they come
    /// again.
    pub fn cut_snapshot(&self, slot: SnapshotSlot) {
        // It may be removed already.
        drop(self.remove_snapshot(slot));
        let garbage = self.change().cut_snapshot(slot.0);
        bury(garbage);
    }
}

/// The tree of a snapshot.
fn grow<R: ReadAt>(slot: u32, name: &Name, leaves: Vec<Arc<Leaf<R>>>) -> Result<Tree<R>, Error> {
    let slots: Vec<u32> = leaves.iter().map(|leaf| leaf.slot).collect();
    let layers = leaves.iter().map(|leaf| Arc::clone(&leaf.layer)).collect();
    let vfs = Vfs::of_shared(layers, Numbering::Shared(SnapshotNumbers::new(slot, &slots)))?;
    let root = vfs.stat(super::slots::snapshot_root(slot))?;
    Ok(Tree { slot, name: name.clone(), vfs, root, leaves, references: References::default() })
}

/// Drops what is served no more on a thread of its own: closing a layer may wait for the disk.
fn bury<R: ReadAt + 'static>(garbage: Garbage<R>) {
    if garbage.is_empty() {
        return;
    }
    if let Err(error) = thread::Builder::new().name("forest-garbage".into()).spawn(move || drop(garbage)) {
        // The closure was dropped, and the garbage with it, on this thread.
        tracing::debug!(%error, "layers are closed on a thread that may be needed");
    }
}
