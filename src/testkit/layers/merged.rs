//! The reference model: one tree to which layers are applied entry by entry.

use std::collections::BTreeMap;

use super::{LayerFile, Piece};
use crate::model::{Algorithm, Attributes, DeviceNumber, EntryKind, FileKind, Hasher, Metadata, RelPath};
use crate::testkit::tree::{Content, Listing, Node};

/// A file, whatever its names.
#[derive(Debug, Clone, PartialEq, Eq)]
struct File {
    kind: EntryKind,
    metadata: Metadata,
    pieces: Vec<Piece>,
}

/// A name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    file: usize,
    /// The last layer that had an entry here or below.
    layer: usize,
}

/// The tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Merged {
    names: BTreeMap<Vec<u8>, Place>,
    files: Vec<File>,
}

impl Merged {
    pub(super) fn new() -> Self {
        let mut merged = Self { names: BTreeMap::new(), files: Vec::new() };
        merged.create(b"", 0, EntryKind::Directory, implied(), Vec::new());
        merged
    }

    pub(super) fn is_directory(&self, path: &[u8]) -> bool {
        self.names.get(path).is_some_and(|place| self.files[place.file].kind == EntryKind::Directory)
    }

    pub(super) fn exists(&self, path: &[u8]) -> bool {
        self.names.contains_key(path)
    }

    /// Whether `layer` has an entry at `path` or below.
    pub(super) fn is_touched(&self, path: &[u8], layer: usize) -> bool {
        self.names.get(path).is_some_and(|place| place.layer == layer)
    }

    pub(super) fn paths(&self) -> impl Iterator<Item = &Vec<u8>> {
        self.names.keys()
    }

    /// Applies an entry of `layer`. Parents that are missing are made.
    pub(super) fn apply(&mut self, layer: usize, file: &LayerFile) {
        let path = file.entry.path.to_bytes();
        let metadata = file.entry.metadata.clone();
        match &file.entry.kind {
            EntryKind::Whiteout => {
                self.names.retain(|name, place| place.layer == layer || !is_at_or_below(name, &path));
            }
            EntryKind::Opaque => {
                self.parents(&path, layer);
                if !self.is_directory(&path) {
                    self.create(&path, layer, EntryKind::Directory, implied(), Vec::new());
                }
                self.touch(&path, layer);
                self.names.retain(|name, place| place.layer == layer || *name == path || !is_at_or_below(name, &path));
            }
            EntryKind::Directory => {
                self.parents(&path, layer);
                if self.is_directory(&path) {
                    self.touch(&path, layer);
                    let file = self.names[&path].file;
                    self.files[file].metadata = metadata;
                } else {
                    self.create(&path, layer, EntryKind::Directory, metadata, Vec::new());
                }
            }
            EntryKind::HardLink { target } => {
                self.parents(&path, layer);
                let target = self.names[&target.to_bytes()];
                self.remove(&path);
                self.names.insert(path, Place { file: target.file, layer });
            }
            kind => {
                self.parents(&path, layer);
                self.create(&path, layer, kind.clone(), metadata, file.pieces.clone());
            }
        }
    }

    fn parents(&mut self, path: &[u8], layer: usize) {
        let mut above: Vec<RelPath> = Vec::new();
        let mut next = RelPath::parse(path).ok().and_then(|path| path.parent());
        while let Some(path) = next {
            next = path.parent();
            above.push(path);
        }
        for directory in above.iter().rev() {
            let directory = directory.to_bytes();
            if self.is_directory(&directory) {
                self.touch(&directory, layer);
            } else {
                self.create(&directory, layer, EntryKind::Directory, implied(), Vec::new());
            }
        }
    }

    fn touch(&mut self, path: &[u8], layer: usize) {
        if let Some(place) = self.names.get_mut(path) {
            place.layer = layer;
        }
    }

    fn remove(&mut self, path: &[u8]) {
        self.names.retain(|name, _| !is_at_or_below(name, path));
    }

    fn create(&mut self, path: &[u8], layer: usize, kind: EntryKind, metadata: Metadata, pieces: Vec<Piece>) {
        self.remove(path);
        self.names.insert(path.to_vec(), Place { file: self.files.len(), layer });
        self.files.push(File { kind, metadata, pieces });
    }

    pub(super) fn listing(&self) -> Listing {
        let mut listing = Listing::default();
        let mut first: BTreeMap<usize, &Vec<u8>> = BTreeMap::new();
        for (path, place) in &self.names {
            let file = &self.files[place.file];
            let (kind, rdev, content) = file.seen();
            let size = match &content {
                Content::None | Content::Refused(_) => 0,
                Content::Target(target) => target.len() as u64,
                Content::Bytes(len, _) => *len,
            };
            let names = self.names.values().filter(|other| other.file == place.file).count();
            let nlink = if kind == FileKind::Directory { 0 } else { u32::try_from(names).unwrap_or(u32::MAX) };
            let Metadata { permissions, uid, gid, mtime, ref xattrs } = file.metadata;
            let attributes = Attributes { kind, permissions, uid, gid, mtime, nlink, size, rdev };
            let same_file_as = (*first.entry(place.file).or_insert(path)).clone();
            let node = Node { attributes, listed_as: Some(kind), same_file_as, xattrs: xattrs.clone(), content };
            listing.nodes.insert(path.clone(), node);
        }
        listing
    }
}

impl File {
    fn seen(&self) -> (FileKind, DeviceNumber, Content) {
        let none = DeviceNumber::default();
        match &self.kind {
            EntryKind::Regular { size } => {
                let mut hasher = Hasher::new(Algorithm::Sha256);
                self.pieces.iter().for_each(|piece| hasher.update(&piece.bytes()));
                (FileKind::Regular, none, Content::Bytes(*size, hasher.finish()))
            }
            EntryKind::Symlink { target } => (FileKind::Symlink, none, Content::Target(target.to_vec())),
            EntryKind::CharDevice(device) => (FileKind::CharDevice, *device, Content::None),
            EntryKind::BlockDevice(device) => (FileKind::BlockDevice, *device, Content::None),
            EntryKind::Fifo => (FileKind::Fifo, none, Content::None),
            EntryKind::Directory | EntryKind::HardLink { .. } | EntryKind::Whiteout | EntryKind::Opaque => {
                (FileKind::Directory, none, Content::None)
            }
        }
    }
}

/// What a directory without an entry gets.
fn implied() -> Metadata {
    Metadata { permissions: 0o755, ..Metadata::default() }
}

fn is_at_or_below(name: &[u8], path: &[u8]) -> bool {
    path.is_empty() || name.strip_prefix(path).is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
}
