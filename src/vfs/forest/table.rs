//! What stands in a forest, and what keeps it there.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use super::super::raw::Raw;
use super::super::slots::{SLOTS, layer_file};
use super::super::{KernelMemory, Layer, Stat, Vfs};
use super::{ForestError, LayerSlot};
use crate::model::{Attributes, DeviceNumber, DiffId, FileKind, Name, ReadAt, Timestamp};

/// A snapshot.
pub(super) struct Tree<R> {
    pub(super) slot: u32,
    pub(super) name: Name,
    pub(super) vfs: Vfs<R>,
    /// What `stat` tells of its root.
    pub(super) root: Stat,
    /// Its layers, the lowest first.
    pub(super) leaves: Vec<Arc<Leaf<R>>>,
    /// To its root.
    pub(super) references: References,
}

/// A layer.
pub(super) struct Leaf<R> {
    pub(super) slot: u32,
    pub(super) diff_id: DiffId,
    pub(super) layer: Arc<Layer<R>>,
    /// What `stat` tells of its file.
    pub(super) file: Stat,
    /// What `stat` tells of its root directory as it is, if that has a number.
    pub(super) raw: Option<Stat>,
    /// To its file.
    pub(super) references: References,
    /// To that root.
    pub(super) raw_references: References,
}

pub(super) struct LayerRecord<R> {
    pub(super) leaf: Arc<Leaf<R>>,
    /// How often it was added and not removed.
    pub(super) listed: u32,
    /// What its file is called while it is listed.
    pub(super) name: String,
    /// How often snapshots have it.
    shown: u32,
    /// The kernel may remember files of it when nothing keeps it any more.
    cut: bool,
}

pub(super) struct TreeRecord<R> {
    pub(super) tree: Arc<Tree<R>>,
    pub(super) listed: bool,
}

/// All of it. What is here is served.
pub(super) struct Tables<R> {
    pub(super) layers: BTreeMap<u32, LayerRecord<R>>,
    pub(super) trees: BTreeMap<u32, TreeRecord<R>>,
    /// The listed snapshots.
    pub(super) names: BTreeMap<Name, u32>,
    /// The kernel remembers what another process told it.
    is_remembered: bool,
    /// What is listed at this moment may be what it remembers.
    pub(super) presumes: bool,
    /// The files of listed layers.
    pub(super) files: BTreeMap<String, u32>,
    /// Every layer that ever was, so that it has its numbers again when it comes again. Some 100 bytes each.
    slots: HashMap<DiffId, u32>,
    /// Every slot that was ever given to a layer, and the layer that had it last.
    diff_ids: HashMap<u32, DiffId>,
    /// Slots of which the kernel may remember files of a layer that went.
    burnt: HashSet<u32>,
    next_layer: u32,
    next_tree: u32,
    /// When the list of layers and that of snapshots changed.
    pub(super) layers_changed: Timestamp,
    pub(super) trees_changed: Timestamp,
}

impl<R> Default for Tables<R> {
    fn default() -> Self {
        Self {
            layers: BTreeMap::new(),
            trees: BTreeMap::new(),
            names: BTreeMap::new(),
            is_remembered: false,
            presumes: false,
            files: BTreeMap::new(),
            slots: HashMap::new(),
            diff_ids: HashMap::new(),
            burnt: HashSet::new(),
            next_layer: 0,
            next_tree: 0,
            layers_changed: now(),
            trees_changed: now(),
        }
    }
}

/// A slot for a snapshot, and its layers.
type Reserved<R> = (u32, Vec<Arc<Leaf<R>>>);

/// What is served no more and has to be dropped where that may take time.
pub(super) struct Garbage<R> {
    trees: Vec<Arc<Tree<R>>>,
    leaves: Vec<Arc<Leaf<R>>>,
}

impl<R> Garbage<R> {
    pub(super) const fn none() -> Self {
        Self { trees: Vec::new(), leaves: Vec::new() }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.trees.is_empty() && self.leaves.is_empty()
    }
}

/// References that the kernel has to a file.
#[derive(Debug, Default)]
pub(super) struct References {
    counted: AtomicU64,
    /// It may have more, from before anybody counted here.
    presumed: AtomicBool,
}

impl References {
    /// A lookup took one.
    pub(super) fn take(&self) {
        self.counted.fetch_add(1, Ordering::Relaxed);
    }

    /// Gives `count` back that lookups took; true if none is left.
    ///
    /// The kernel gives all references to a file back at once when it drops it, so what it may have had before is gone as
    /// well.
    pub(super) fn give_back(&self, count: u64) -> bool {
        if self.presumed.swap(false, Ordering::Relaxed) {
            self.counted.store(0, Ordering::Relaxed);
            return true;
        }
        let given = |now: u64| Some(now.saturating_sub(count));
        self.counted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, given).is_ok_and(|before| before <= count)
    }

    fn any(&self) -> bool {
        self.presumed.load(Ordering::Relaxed) || self.counted.load(Ordering::Relaxed) > 0
    }

    /// From now on there are none, or nobody knows.
    fn set(&self, presumed: bool) {
        self.counted.store(0, Ordering::Relaxed);
        self.presumed.store(presumed, Ordering::Relaxed);
    }
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: i64::try_from(since.as_secs()).unwrap_or(0), nanos: since.subsec_nanos() }
}

impl<R: ReadAt> Tables<R> {
    /// Takes up a layer or counts it once more.
    pub(super) fn list_layer(
        &mut self,
        diff_id: DiffId,
        layer: Arc<Layer<R>>,
        root: Option<Attributes>,
        wanted: Option<u32>,
    ) -> Result<u32, ForestError> {
        let slot = self.layer_slot(diff_id, wanted)?;
        let presumes = self.presumes;
        let record = self.layers.entry(slot).or_insert_with(|| {
            let file = layer_stat(slot, &layer);
            let nid = layer.image().root().0;
            let raw = Raw { layer: &layer, slot }.file(nid).ok().zip(root).map(|(file, root)| file.describe(root));
            let leaf = Arc::new(Leaf {
                slot,
                diff_id,
                layer,
                file,
                raw,
                references: References::default(),
                raw_references: References::default(),
            });
            leaf.references.set(presumes);
            leaf.raw_references.set(presumes);
            LayerRecord { leaf, listed: 0, name: String::new(), shown: 0, cut: false }
        });
        if record.listed == 0 {
            let plain = diff_id.to_string();
            // A name that the kernel may know from another process must lead to the same file: with its number it does.
            let taken = self.is_remembered || self.files.contains_key(&plain);
            record.name = if taken { format!("{plain}.{slot}") } else { plain };
            self.files.insert(record.name.clone(), slot);
        }
        record.listed = record.listed.saturating_add(1);
        self.layers_changed = now();
        Ok(slot)
    }

    fn layer_slot(&mut self, diff_id: DiffId, wanted: Option<u32>) -> Result<u32, ForestError> {
        let slot = match (wanted, self.slots.get(&diff_id)) {
            (Some(slot), _) if slot >= SLOTS => return Err(ForestError::NoSuchSlot(slot)),
            (Some(slot), _) => {
                let other = self.layers.get(&slot).map(|record| record.leaf.diff_id).filter(|other| *other != diff_id);
                let other = other.or_else(|| self.diff_ids.get(&slot).copied().filter(|_| self.burnt.contains(&slot)));
                if let Some(other) = other {
                    let (to, taken_by) = (format!("layer {diff_id}"), format!("layer {other}"));
                    return Err(ForestError::SlotTaken { slot, to, taken_by });
                }
                slot
            }
            (None, Some(slot)) => *slot,
            (None, None) => {
                while self.diff_ids.contains_key(&self.next_layer) {
                    self.next_layer += 1;
                }
                if self.next_layer >= SLOTS {
                    return Err(ForestError::Full);
                }
                self.next_layer
            }
        };
        if let Some(before) = self.diff_ids.insert(slot, diff_id)
            && before != diff_id
            && self.slots.get(&before) == Some(&slot)
        {
            self.slots.remove(&before);
        }
        self.slots.entry(diff_id).or_insert(slot);
        Ok(slot)
    }

    /// Takes back one addition: the name that goes, if it was the last, and what is served no more.
    pub(super) fn unlist_layer(&mut self, slot: u32) -> Result<(Option<String>, Garbage<R>), ForestError> {
        let record = self.layers.get_mut(&slot).filter(|record| record.listed > 0);
        let record = record.ok_or(ForestError::NoSuchLayer(slot))?;
        record.listed -= 1;
        if record.listed > 0 {
            return Ok((None, Garbage::none()));
        }
        let name = std::mem::take(&mut record.name);
        self.files.remove(&name);
        self.layers_changed = now();
        Ok((Some(name), self.reap_layer(slot)))
    }

    /// A slot for a snapshot, and its layers.
    pub(super) fn reserve(
        &mut self,
        name: &Name,
        layers: &[LayerSlot],
        wanted: Option<u32>,
    ) -> Result<Reserved<R>, ForestError> {
        if self.names.contains_key(name) {
            return Err(ForestError::NameTaken(name.clone()));
        }
        let leaf = |slot: &LayerSlot| {
            let record = self.layers.get(&slot.0).ok_or(ForestError::NoSuchLayer(slot.0))?;
            Ok(Arc::clone(&record.leaf))
        };
        let leaves = layers.iter().map(leaf).collect::<Result<_, ForestError>>()?;
        let slot = match wanted {
            Some(slot) if slot >= SLOTS => return Err(ForestError::NoSuchSlot(slot)),
            Some(slot) => slot,
            None => {
                // Round and round, so that a number is not given anew soon.
                let mut free = (0..SLOTS).map(|step| (self.next_tree + step) % SLOTS);
                free.find(|slot| !self.trees.contains_key(slot)).ok_or(ForestError::Full)?
            }
        };
        if wanted.is_none() {
            self.next_tree = (slot + 1) % SLOTS;
        }
        Ok((slot, leaves))
    }

    /// Takes up a snapshot.
    pub(super) fn list_snapshot(&mut self, tree: Tree<R>) -> Result<(), ForestError> {
        if self.names.contains_key(&tree.name) {
            return Err(ForestError::NameTaken(tree.name));
        }
        if let Some(other) = self.trees.get(&tree.slot) {
            let (to, taken_by) = (format!("snapshot {}", tree.name), format!("snapshot {}", other.tree.name));
            return Err(ForestError::SlotTaken { slot: tree.slot, to, taken_by });
        }
        for leaf in &tree.leaves {
            // One that was taken away in between comes back with its snapshot, in its own slot.
            let record = self.layers.entry(leaf.slot);
            let record = record.or_insert_with(|| {
                let leaf = Arc::clone(leaf);
                LayerRecord { leaf, listed: 0, name: String::new(), shown: 0, cut: false }
            });
            record.shown = record.shown.saturating_add(1);
        }
        tree.references.set(self.presumes);
        self.names.insert(tree.name.clone(), tree.slot);
        self.trees.insert(tree.slot, TreeRecord { tree: Arc::new(tree), listed: true });
        self.trees_changed = now();
        Ok(())
    }

    /// Takes a snapshot from the list: its name, and what is served no more.
    pub(super) fn unlist_snapshot(&mut self, slot: u32) -> Result<(Name, Garbage<R>), ForestError> {
        let record = self.trees.get_mut(&slot).filter(|record| record.listed);
        let record = record.ok_or(ForestError::NoSuchSnapshot(slot))?;
        record.listed = false;
        let name = record.tree.name.clone();
        self.names.remove(&name);
        self.trees_changed = now();
        Ok((name, self.reap_snapshot(slot)))
    }

    /// Stops to serve a snapshot that nothing keeps.
    pub(super) fn reap_snapshot(&mut self, slot: u32) -> Garbage<R> {
        let mut garbage = Garbage::none();
        let Some(record) = self.trees.get(&slot) else { return garbage };
        if record.listed || record.tree.references.any() {
            return garbage;
        }
        let Some(record) = self.trees.remove(&slot) else { return garbage };
        for leaf in &record.tree.leaves {
            if let Some(layer) = self.layers.get_mut(&leaf.slot) {
                layer.shown = layer.shown.saturating_sub(1);
            }
            garbage.leaves.extend(self.reap_layer(leaf.slot).leaves);
        }
        garbage.trees.push(record.tree);
        garbage
    }

    /// Stops to serve a snapshot that is not listed, whoever keeps it.
    pub(super) fn cut_snapshot(&mut self, slot: u32) -> Garbage<R> {
        if let Some(record) = self.trees.get(&slot).filter(|record| !record.listed) {
            record.tree.references.set(false);
            for leaf in &record.tree.leaves {
                if let Some(layer) = self.layers.get_mut(&leaf.slot) {
                    layer.cut = true;
                }
            }
        }
        self.reap_snapshot(slot)
    }

    /// Stops to serve a layer that nothing keeps.
    pub(super) fn reap_layer(&mut self, slot: u32) -> Garbage<R> {
        let mut garbage = Garbage::none();
        let kept = |record: &LayerRecord<R>| {
            let known = record.leaf.references.any() || record.leaf.raw_references.any();
            record.listed > 0 || record.shown > 0 || known
        };
        if self.layers.get(&slot).is_some_and(|record| !kept(record))
            && let Some(record) = self.layers.remove(&slot)
        {
            if record.cut {
                // Should other bytes ever come under this name, what the kernel remembers must not be taken for them.
                self.burnt.insert(slot);
                if self.slots.get(&record.leaf.diff_id) == Some(&slot) {
                    self.slots.remove(&record.leaf.diff_id);
                }
            }
            garbage.leaves.push(record.leaf);
        }
        garbage
    }

    /// Begins with a kernel that remembers nothing, or nobody knows what.
    pub(super) fn start_over(&mut self, memory: KernelMemory) -> Vec<Garbage<R>> {
        let presumed = memory == KernelMemory::Unknown;
        self.is_remembered = presumed;
        self.presumes = presumed;
        for record in self.trees.values() {
            record.tree.references.set(presumed);
        }
        for record in self.layers.values() {
            record.leaf.references.set(presumed);
            record.leaf.raw_references.set(presumed);
        }
        let trees: Vec<u32> = self.trees.keys().copied().collect();
        let layers: Vec<u32> = self.layers.keys().copied().collect();
        let mut garbage: Vec<_> = trees.into_iter().map(|slot| self.reap_snapshot(slot)).collect();
        garbage.extend(layers.into_iter().map(|slot| self.reap_layer(slot)));
        garbage
    }
}

/// What `stat` tells of a layer's file. A function of the layer alone, so that the kernel never takes it for changed.
fn layer_stat<R: ReadAt>(slot: u32, layer: &Layer<R>) -> Stat {
    let size = layer.image().source(0).map_or(0, ReadAt::size);
    let attributes = Attributes {
        kind: FileKind::Regular,
        permissions: 0o400,
        uid: 0,
        gid: 0,
        mtime: Timestamp::default(),
        nlink: 1,
        size,
        rdev: DeviceNumber::default(),
    };
    Stat { ino: layer_file(slot), attributes, block_size: 4096, blocks: size.div_ceil(4096).saturating_mul(8) }
}
