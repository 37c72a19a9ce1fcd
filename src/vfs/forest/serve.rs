//! A forest as a file system: which tree or layer a number belongs to, and the three directories above them.

use std::sync::{Arc, PoisonError};

use super::super::file::File;
use super::super::numbers::ROOT_INO;
use super::super::raw::Raw;
use super::super::slots::{LAYERS_INO, RAW_INO, SNAPSHOTS_INO, Spot};
use super::super::{
    Bring, Done, Error, FileSystem, Item, ItemKind, KernelCache, KernelMemory, Missing, Purpose, Seek, Stat, TakeItem,
    Totals,
};
use super::table::{Leaf, Tree};
use super::{Forest, bury};
use crate::model::{Attributes, ByteRange, DeviceNumber, FileKind, Name, ReadAt, ReadAtError, Timestamp, Xattr};
use crate::overlay::NodeId;

/// Names of the root.
const SNAPSHOTS: &[u8] = b"snapshots";
const LAYERS: &[u8] = b"layers";
const RAW: &[u8] = b"raw";

/// Offsets 0 to 2 of a listing belong to `.`, `..` and what follows.
const DOTS: u64 = 2;

/// Entries that are handed out under one lock.
const PAGE: usize = 64;

/// What an operation is about.
enum Whose<R> {
    /// One of the directories above everything.
    Above,
    /// A directory of a snapshot.
    Tree(Arc<Tree<R>>),
    /// A file of a layer.
    File(Arc<Leaf<R>>, u64),
    /// A layer as a file.
    Layer(Arc<Leaf<R>>),
    /// A file of a layer that is shown as it is.
    Raw(Arc<Leaf<R>>, u64),
}

impl<R: ReadAt> Leaf<R> {
    fn file(&self, nid: u64, ino: u64) -> File<'_, R> {
        File { layer: &self.layer, node: NodeId { layer: 0, nid }, ino }
    }

    fn raw(&self) -> Raw<'_, R> {
        Raw { layer: &self.layer, slot: self.slot }
    }

    /// Reads the image itself.
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<usize, Error> {
        let size = self.file.attributes.size;
        let left = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX);
        let len = left.min(buf.len());
        let (Some(source), Some(buf)) = (self.layer.image().source(0), buf.get_mut(..len)) else { return Ok(0) };
        if len == 0 {
            return Ok(0);
        }
        source.read_exact_at(offset, buf).map_err(|error| match error {
            ReadAtError::Absent(range) => Error::Absent { layer: 0, device: 0, range },
            source => Error::Image { diff_id: self.diff_id, source },
        })?;
        Ok(len)
    }

    fn totals(&self) -> Totals {
        Totals { bytes: self.layer.size(), files: self.layer.image().superblock().inodes() }
    }
}

impl<R: ReadAt + 'static> Forest<R> {
    fn whose(&self, ino: u64) -> Result<Whose<R>, Error> {
        let gone = || Error::NoSuchInode(ino);
        let spot = Spot::of(ino)?;
        let tables = self.tables();
        let leaf = |slot| tables.layers.get(&slot).map(|record| Arc::clone(&record.leaf)).ok_or_else(gone);
        match spot {
            Spot::Root | Spot::Snapshots | Spot::Layers | Spot::RawLayers => Ok(Whose::Above),
            Spot::SnapshotRoot { snapshot } | Spot::Directory { snapshot } => {
                let record = tables.trees.get(&snapshot).ok_or_else(gone)?;
                Ok(Whose::Tree(Arc::clone(&record.tree)))
            }
            Spot::File { layer, nid } => Ok(Whose::File(leaf(layer)?, nid)),
            Spot::LayerFile { layer } => Ok(Whose::Layer(leaf(layer)?)),
            Spot::Raw { layer, nid } => Ok(Whose::Raw(leaf(layer)?, nid)),
        }
    }

    /// What `stat` tells of a directory above everything.
    fn above(&self, ino: u64) -> Stat {
        let tables = self.tables();
        let (permissions, mtime, nlink) = match ino {
            SNAPSHOTS_INO => (0o700, tables.trees_changed, 1),
            LAYERS_INO | RAW_INO => (0o700, tables.layers_changed, 1),
            _ => (0o755, Timestamp::default(), 5),
        };
        let attributes = Attributes {
            kind: FileKind::Directory,
            permissions,
            uid: 0,
            gid: 0,
            mtime,
            nlink,
            size: 0,
            rdev: DeviceNumber::default(),
        };
        Stat { ino, attributes, block_size: 4096, blocks: 0 }
    }

    /// What `name` stands for in a directory above everything. Counts as a reference.
    fn look_above(&self, dir: u64, name: &[u8]) -> Option<Stat> {
        match (dir, name) {
            (ROOT_INO, SNAPSHOTS) => return Some(self.above(SNAPSHOTS_INO)),
            (ROOT_INO, LAYERS) => return Some(self.above(LAYERS_INO)),
            (ROOT_INO, RAW) => return Some(self.above(RAW_INO)),
            _ => {}
        }
        // References are taken under the lock that a removal holds alone.
        let tables = self.tables();
        match dir {
            SNAPSHOTS_INO => {
                let tree = &tables.trees.get(tables.names.get(name)?)?.tree;
                tree.references.take();
                Some(tree.root)
            }
            LAYERS_INO => {
                let record = tables.layers.get(tables.files.get(std::str::from_utf8(name).ok()?)?)?;
                record.leaf.references.take();
                Some(record.leaf.file)
            }
            RAW_INO => {
                let slot: u32 = std::str::from_utf8(name).ok()?.parse().ok()?;
                let record = tables.layers.get(&slot)?;
                // One number may be written in several ways; a directory has one name.
                if record.listed == 0 || slot.to_string().as_bytes() != name {
                    return None;
                }
                let root = record.leaf.raw?;
                record.leaf.raw_references.take();
                Some(root)
            }
            _ => None,
        }
    }

    /// Up to a page of the entries of a directory above everything, from the first slot on: offset behind it, name, number.
    fn page(&self, dir: u64, from: u64) -> Vec<(u64, Name, Stat)> {
        let behind = |slot: u32| u64::from(slot) + DOTS + 1;
        let Ok(first) = u32::try_from(from) else { return Vec::new() };
        let tables = self.tables();
        match dir {
            ROOT_INO => {
                drop(tables);
                let fixed = [(SNAPSHOTS, SNAPSHOTS_INO), (LAYERS, LAYERS_INO), (RAW, RAW_INO)];
                let named = (0_u32..).zip(fixed).filter(|(index, _)| *index >= first);
                named
                    .filter_map(|(index, (name, ino))| Some((behind(index), Name::new(name).ok()?, self.above(ino))))
                    .collect()
            }
            SNAPSHOTS_INO => {
                let listed = tables.trees.range(first..).filter(|(_, record)| record.listed).take(PAGE);
                listed.map(|(slot, record)| (behind(*slot), record.tree.name.clone(), record.tree.root)).collect()
            }
            _ => {
                let listed = tables.layers.range(first..).filter(|(_, record)| record.listed > 0).take(PAGE);
                let entry = |(slot, record): (&u32, &super::table::LayerRecord<R>)| {
                    let (name, stat) = match dir {
                        RAW_INO => (slot.to_string(), record.leaf.raw?),
                        _ => (record.name.clone(), record.leaf.file),
                    };
                    Some((behind(*slot), Name::new(name.as_bytes()).ok()?, stat))
                };
                listed.filter_map(entry).collect()
            }
        }
    }

    /// Lists a directory above everything. `plus`: every entry that is taken is looked up.
    fn list_above(&self, dir: u64, offset: u64, plus: bool, take: &mut TakeItem<'_>) {
        for (index, name, ino) in [(0, &b"."[..], dir), (1, b"..", ROOT_INO)] {
            if offset <= index && take(Item { name, next_offset: index + 1, kind: ItemKind::Dot { ino } }).is_break() {
                return;
            }
        }
        let mut from = offset.saturating_sub(DOTS);
        loop {
            let page = self.page(dir, from);
            let Some((last, ..)) = page.last() else { return };
            from = last - DOTS;
            for (next_offset, name, stat) in page {
                // Looked up first: what is handed out without a reference could go before the kernel has it.
                let looked_up = if plus && dir != ROOT_INO {
                    match self.look_above(dir, name.as_bytes()) {
                        Some(stat) => stat,
                        None => continue,
                    }
                } else {
                    stat
                };
                let item = Item { name: name.as_bytes(), next_offset, kind: ItemKind::File(looked_up) };
                if take(item).is_break() {
                    if plus {
                        self.forget(looked_up.ino, 1);
                    }
                    return;
                }
            }
        }
    }
}

impl<R: ReadAt + 'static> Forest<R> {
    fn forget(&self, ino: u64, count: u64) {
        let Ok(spot) = Spot::of(ino) else { return };
        let tables = match spot {
            Spot::SnapshotRoot { .. } | Spot::LayerFile { .. } | Spot::Raw { .. } => self.tables(),
            _ => return,
        };
        let last = match spot {
            Spot::SnapshotRoot { snapshot } => tables
                .trees
                .get(&snapshot)
                .is_some_and(|record| record.tree.references.give_back(count) && !record.listed),
            Spot::LayerFile { layer } => tables
                .layers
                .get(&layer)
                .is_some_and(|record| record.leaf.references.give_back(count) && record.listed == 0),
            // Below a root nothing is counted: the kernel keeps the root as long as it has anything below.
            Spot::Raw { layer, nid } => tables.layers.get(&layer).is_some_and(|record| {
                nid == record.leaf.layer.image().root().0
                    && record.leaf.raw_references.give_back(count)
                    && record.listed == 0
            }),
            _ => false,
        };
        drop(tables);
        if last {
            let garbage = match spot {
                Spot::SnapshotRoot { snapshot } => self.change().reap_snapshot(snapshot),
                Spot::LayerFile { layer } | Spot::Raw { layer, .. } => self.change().reap_layer(layer),
                _ => return,
            };
            bury(garbage);
        }
    }
}

impl<R: Bring> FileSystem for Forest<R> {
    fn lookup(&self, parent: u64, name: &[u8]) -> Result<Option<Stat>, Error> {
        match self.whose(parent)? {
            Whose::Above => Ok(self.look_above(parent, name)),
            Whose::Tree(tree) => tree.vfs.lookup(parent, name),
            Whose::Raw(leaf, nid) => leaf.raw().lookup(nid, name),
            Whose::File(..) | Whose::Layer(_) => Err(Error::NotADirectory(parent)),
        }
    }

    fn stat(&self, ino: u64) -> Result<Stat, Error> {
        match self.whose(ino)? {
            Whose::Above => Ok(self.above(ino)),
            Whose::Tree(tree) => tree.vfs.stat(ino),
            Whose::File(leaf, nid) | Whose::Raw(leaf, nid) => leaf.file(nid, ino).stat(),
            Whose::Layer(leaf) => Ok(leaf.file),
        }
    }

    fn read_link(&self, ino: u64) -> Result<Box<[u8]>, Error> {
        match self.whose(ino)? {
            Whose::File(leaf, nid) | Whose::Raw(leaf, nid) => leaf.file(nid, ino).read_link(),
            Whose::Above | Whose::Tree(_) | Whose::Layer(_) => Err(Error::NotALink(ino)),
        }
    }

    fn read(&self, ino: u64, offset: u64, buf: &mut [u8]) -> Result<usize, Error> {
        match self.whose(ino)? {
            Whose::File(leaf, nid) | Whose::Raw(leaf, nid) => leaf.file(nid, ino).read(offset, buf),
            Whose::Layer(leaf) => leaf.read(offset, buf),
            Whose::Above | Whose::Tree(_) => Err(Error::IsADirectory(ino)),
        }
    }

    fn seek(&self, ino: u64, offset: u64, seek: Seek) -> Result<Option<u64>, Error> {
        match self.whose(ino)? {
            Whose::File(leaf, nid) | Whose::Raw(leaf, nid) => leaf.file(nid, ino).seek(offset, seek),
            // All of it is data.
            Whose::Layer(leaf) => {
                let size = leaf.file.attributes.size;
                Ok((offset < size).then_some(if seek == Seek::Data { offset } else { size }))
            }
            Whose::Tree(tree) => tree.vfs.seek(ino, offset, seek),
            Whose::Above => Err(Error::NotRegular(ino)),
        }
    }

    fn read_dir(&self, ino: u64, offset: u64, take: &mut TakeItem<'_>) -> Result<(), Error> {
        match self.whose(ino)? {
            Whose::Above => self.list_above(ino, offset, false, take),
            Whose::Tree(tree) => return tree.vfs.read_dir(ino, offset, take),
            Whose::Raw(leaf, nid) => return leaf.raw().read_dir(nid, offset, take),
            Whose::File(..) | Whose::Layer(_) => return Err(Error::NotADirectory(ino)),
        }
        Ok(())
    }

    fn read_dir_plus(&self, ino: u64, offset: u64, take: &mut TakeItem<'_>) -> Result<(), Error> {
        match Spot::of(ino)? {
            Spot::Root | Spot::Snapshots | Spot::Layers | Spot::RawLayers => {
                self.list_above(ino, offset, true, take);
                Ok(())
            }
            _ => self.read_dir(ino, offset, take),
        }
    }

    fn xattrs(&self, ino: u64) -> Result<Vec<Xattr>, Error> {
        match self.whose(ino)? {
            Whose::Tree(tree) => tree.vfs.xattrs(ino),
            Whose::File(leaf, nid) => leaf.file(nid, ino).xattrs(),
            Whose::Raw(leaf, nid) => leaf.raw().xattrs(nid),
            Whose::Above | Whose::Layer(_) => Ok(Vec::new()),
        }
    }

    fn xattr(&self, ino: u64, name: &[u8]) -> Result<Option<Box<[u8]>>, Error> {
        match self.whose(ino)? {
            Whose::Tree(tree) => tree.vfs.xattr(ino, name),
            Whose::File(leaf, nid) => leaf.file(nid, ino).xattr(name),
            Whose::Raw(leaf, nid) => leaf.raw().xattr(nid, name),
            Whose::Above | Whose::Layer(_) => Ok(None),
        }
    }

    /// A snapshot's for its directories, a layer's for files, which may be part of many snapshots.
    fn totals(&self, ino: u64) -> Totals {
        match self.whose(ino) {
            Ok(Whose::Tree(tree)) => tree.vfs.totals(),
            Ok(Whose::File(leaf, _) | Whose::Layer(leaf) | Whose::Raw(leaf, _)) => leaf.totals(),
            Ok(Whose::Above) | Err(_) => {
                let tables = self.tables();
                tables.layers.values().map(|record| record.leaf.totals()).fold(Totals::default(), |sum, layer| Totals {
                    bytes: sum.bytes.saturating_add(layer.bytes),
                    files: sum.files.saturating_add(layer.files),
                })
            }
        }
    }

    /// Nobody knows what will be added.
    fn may_show_xattrs(&self) -> bool {
        true
    }

    fn may_change(&self, dir: u64) -> bool {
        matches!(dir, SNAPSHOTS_INO | LAYERS_INO | RAW_INO)
    }

    fn bring(&self, ino: u64, missing: Missing, purpose: Purpose, done: Done) {
        let from = |source: Option<&R>, range: ByteRange| {
            if let Some(source) = source {
                source.bring(range, purpose, done);
            }
        };
        match self.whose(ino) {
            Ok(Whose::Tree(tree)) => from(tree.vfs.source(missing.layer, missing.device), missing.range),
            Ok(Whose::File(leaf, _) | Whose::Layer(leaf) | Whose::Raw(leaf, _)) => {
                from(leaf.layer.image().source(missing.device), missing.range);
            }
            Ok(Whose::Above) | Err(_) => {}
        }
    }

    fn forget(&self, ino: u64, count: u64) {
        self.forget(ino, count);
    }

    fn connect(&self, cache: Arc<dyn KernelCache>, memory: KernelMemory) {
        *self.cache.lock().unwrap_or_else(PoisonError::into_inner) = Some(cache);
        let garbage = self.change().start_over(memory);
        garbage.into_iter().for_each(bury);
        if memory == KernelMemory::Unknown {
            // What was listed then need not be what is listed now.
            self.tell(SNAPSHOTS_INO, None);
            self.tell(LAYERS_INO, None);
            self.tell(RAW_INO, None);
        }
    }

    fn is_complete(&self) {
        self.change().presumes = false;
    }

    fn describe(&self, ino: u64, layer: u16) -> Option<String> {
        match self.whose(ino).ok()? {
            Whose::Above => None,
            Whose::Tree(tree) => {
                let leaf = tree.leaves.get(usize::from(layer))?;
                Some(format!("layer {} of snapshot {}", leaf.diff_id, tree.name))
            }
            Whose::File(leaf, _) | Whose::Layer(leaf) | Whose::Raw(leaf, _) => Some(format!("layer {}", leaf.diff_id)),
        }
    }
}
