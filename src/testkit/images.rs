//! Small EROFS images from entries, and a plain model of what such an image must show.
//!
//! The model is written for clarity, not shared with the writer: paths in a map, rules one after the other.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;

use super::tree::{Content, Listing, Node};
use crate::erofs::writer::{
    Area, BLOCK_SIZE, DataBlock, EarlyLayout, Extents, FileData, ImageIdentity, LayerRole, Plan, Tree, TreeError,
};
use crate::model::{
    Algorithm, Attributes, DeviceNumber, Digest, EntryKind, FileKind, LayerEntry, Metadata, RelPath, Xattr,
};

/// An entry and, for a regular file, its content.
pub type EntryWithContent = (LayerEntry, Vec<u8>);

/// A path from text that must be one.
///
/// # Panics
/// If it is none.
pub fn path(text: &str) -> RelPath {
    RelPath::parse(text.as_bytes()).expect("the test gives valid paths")
}

/// A directory, 0755.
pub fn directory(at: &str) -> EntryWithContent {
    entry(at, EntryKind::Directory)
}

/// A regular file, 0755.
pub fn file(at: &str, content: &[u8]) -> EntryWithContent {
    let (entry, _) = entry(at, EntryKind::Regular { size: content.len() as u64 });
    (entry, content.to_vec())
}

/// A symlink, 0777.
pub fn symlink(at: &str, target: &str) -> EntryWithContent {
    let mut symlink = entry(at, EntryKind::Symlink { target: target.as_bytes().into() });
    symlink.0.metadata.permissions = 0o777;
    symlink
}

/// A hard link.
pub fn hard_link(at: &str, target: &str) -> EntryWithContent {
    let mut link = entry(at, EntryKind::HardLink { target: path(target) });
    link.0.metadata = Metadata::default();
    link
}

/// A whiteout.
pub fn whiteout(at: &str) -> EntryWithContent {
    let mut whiteout = entry(at, EntryKind::Whiteout);
    whiteout.0.metadata = Metadata::default();
    whiteout
}

/// An opaque mark.
pub fn opaque(at: &str) -> EntryWithContent {
    let mut opaque = entry(at, EntryKind::Opaque);
    opaque.0.metadata = Metadata::default();
    opaque
}

/// Any entry, 0755, root, with a time that depends on its path so that mixed up files are noticed.
pub fn entry(at: &str, kind: EntryKind) -> EntryWithContent {
    let seconds = 1_600_000_000 + at.bytes().map(i64::from).sum::<i64>();
    let mtime = crate::model::Timestamp { seconds, nanos: 5 };
    let metadata = Metadata { permissions: 0o755, mtime, ..Metadata::default() };
    (LayerEntry { path: path(at), kind, metadata }, Vec::new())
}

/// An extended attribute.
pub fn xattr(name: &str, value: &[u8]) -> Xattr {
    Xattr { name: name.as_bytes().into(), value: value.into() }
}

/// The EROFS image of a layer with these entries.
///
/// # Errors
/// Those of the writer.
pub fn image_of(role: LayerRole, entries: &[EntryWithContent]) -> Result<Vec<u8>, TreeError> {
    let (tree, stored, blocks) = tree_of(role, entries)?;
    let plan = Plan::new(tree, identity())?;
    let mut image = Vec::new();
    plan.write_metadata(&EarlyLayout::default(), blocks, &mut image).map_err(|_| TreeError::TooLarge)?;
    assert_eq!(image.len() as u64, plan.metadata_size(), "as much metadata is written as was counted");
    image.extend_from_slice(&stored);
    Ok(image)
}

/// The same with the metadata behind the files.
///
/// # Errors
/// Those of the writer.
pub fn image_behind_of(role: LayerRole, entries: &[EntryWithContent]) -> Result<Vec<u8>, TreeError> {
    let (tree, stored, blocks) = tree_of(role, entries)?;
    let plan = Plan::behind(tree, identity(), blocks)?;
    let mut metadata = Vec::new();
    plan.write_behind(&mut metadata).map_err(|_| TreeError::TooLarge)?;
    assert_eq!(metadata.len() as u64, plan.metadata_size(), "as much metadata is written as was counted");
    let behind = metadata.split_off(usize::try_from(BLOCK_SIZE).map_err(|_| TreeError::TooLarge)?);
    Ok([metadata, stored, behind].concat())
}

fn identity() -> ImageIdentity {
    ImageIdentity::of_source(&Digest::of(Algorithm::Sha256, b"test"))
}

/// The tree, what its files hold, and how many blocks that are.
fn tree_of(role: LayerRole, entries: &[EntryWithContent]) -> Result<(Tree, Vec<u8>, u32), TreeError> {
    let mut tree = Tree::new(role);
    let mut stored: Vec<u8> = Vec::new();
    for (entry, content) in entries {
        let data = match entry.kind {
            EntryKind::Regular { size } => {
                let block = u32::try_from(stored.len() as u64 / BLOCK_SIZE).map_err(|_| TreeError::TooLarge)?;
                let mut extents = Extents::new(size, DataBlock { area: Area::Late, block }, tree.map_entries());
                let mut sink = |blocks: &[u8]| -> Result<(), Infallible> {
                    stored.extend_from_slice(blocks);
                    Ok(())
                };
                let Ok(()) = extents.push(content, &mut sink);
                let Ok((data, _)) = extents.finish(&mut sink);
                data
            }
            _ => FileData::EMPTY,
        };
        tree.add(entry, data)?;
    }
    let blocks = u32::try_from(stored.len() as u64 / BLOCK_SIZE).map_err(|_| TreeError::TooLarge)?;
    Ok((tree, stored, blocks))
}

/// What the image of a layer with these entries must show, whiteouts and opaque marks in overlayfs form. None if the
/// entries are no valid layer (links to nothing or to directories). Symlinks among parents are not modelled: they
/// count like files.
///
/// # Panics
/// On more than 2³² links.
pub fn listing_of(role: LayerRole, entries: &[EntryWithContent]) -> Option<Listing> {
    let mut model = Model { upper: role == LayerRole::Upper, ..Model::default() };
    model.files.push(implied());
    model.names.insert(Vec::new(), 0);
    for (entry, content) in entries {
        model.add(entry, content)?;
    }
    model.finish()
}

#[derive(Default)]
struct Model {
    upper: bool,
    files: Vec<File>,
    /// Path -> file.
    names: BTreeMap<Vec<u8>, usize>,
    /// Paths under which nothing of lower layers shows.
    hidden: BTreeSet<Vec<u8>>,
    /// Links whose target may still come: path -> target.
    pending: BTreeMap<Vec<u8>, Vec<u8>>,
}

struct File {
    kind: EntryKind,
    metadata: Metadata,
    content: Vec<u8>,
}

fn implied() -> File {
    let metadata = Metadata { permissions: 0o755, ..Metadata::default() };
    File { kind: EntryKind::Directory, metadata, content: Vec::new() }
}

impl Model {
    /// True if the layer has something at `path` that is no directory and leads to none.
    fn is_file(&self, path: &[u8]) -> bool {
        let kind = self.names.get(path).map(|number| &self.files[*number].kind);
        self.pending.contains_key(path)
            || kind.is_some_and(|kind| !matches!(kind, EntryKind::Directory | EntryKind::Symlink { .. }))
    }

    fn add(&mut self, entry: &LayerEntry, content: &[u8]) -> Option<()> {
        let at = entry.path.to_bytes();
        let above: Vec<RelPath> = std::iter::successors(entry.path.parent(), RelPath::parent).collect();
        let is_mark = matches!(entry.kind, EntryKind::Whiteout | EntryKind::Opaque);
        if is_mark && above.iter().any(|path| self.is_file(&path.to_bytes())) {
            return Some(());
        }
        for directory in above.iter().rev() {
            self.make_directory(&directory.to_bytes());
        }
        match &entry.kind {
            EntryKind::Whiteout => drop(self.hidden.insert(at)),
            EntryKind::CharDevice(DeviceNumber { major: 0, minor: 0 }) => drop(self.hidden.insert(at)),
            EntryKind::Opaque => {
                self.make_directory(&at);
                self.hidden.insert(at);
            }
            EntryKind::Directory => {
                self.make_directory(&at);
                let file = &mut self.files[self.names[&at]];
                file.metadata = entry.metadata.clone();
            }
            EntryKind::HardLink { target } => {
                let mut target = target.to_bytes();
                // A link to a link that waits waits for the same.
                let waits = self.pending.contains_key(&target);
                while let Some(further) = self.pending.get(&target)
                    && *further != target
                {
                    target.clone_from(further);
                }
                let known = self.names.get(&target).copied().filter(|_| !waits);
                if known.is_some_and(|number| self.files[number].kind == EntryKind::Directory) {
                    return None;
                }
                self.remove(&at);
                match known {
                    Some(number) => drop(self.names.insert(at, number)),
                    None => drop(self.pending.insert(at, target)),
                }
            }
            kind => {
                self.remove(&at);
                self.names.insert(at, self.files.len());
                let (metadata, content) = (entry.metadata.clone(), content.to_vec());
                self.files.push(File { kind: kind.clone(), metadata, content });
            }
        }
        Some(())
    }

    fn remove(&mut self, at: &[u8]) {
        let below = [at, b"/"].concat();
        let stays = |path: &Vec<u8>| path != at && !path.starts_with(&below);
        self.names.retain(|path, _| stays(path));
        self.pending.retain(|path, _| stays(path));
        // Whiteouts inside went with the directory.
        self.hidden.retain(|path| !path.starts_with(&below));
    }

    fn make_directory(&mut self, at: &[u8]) {
        let is_directory = |number: &usize| self.files[*number].kind == EntryKind::Directory;
        if self.names.get(at).is_some_and(is_directory) {
            return;
        }
        if self.names.contains_key(at) || self.pending.contains_key(at) {
            self.hidden.insert(at.to_vec());
        }
        self.remove(at);
        self.names.insert(at.to_vec(), self.files.len());
        self.files.push(implied());
    }

    fn finish(mut self) -> Option<Listing> {
        while let Some((at, target)) = self.pending.iter().find(|(_, target)| self.names.contains_key(*target)) {
            let number = self.names[target];
            if self.files[number].kind == EntryKind::Directory {
                return None;
            }
            let at = at.clone();
            self.pending.remove(&at);
            self.names.insert(at, number);
        }
        if !self.pending.is_empty() {
            return None;
        }
        let mut listing = Listing::default();
        let mut first: BTreeMap<usize, Vec<u8>> = BTreeMap::new();
        let mut links: BTreeMap<usize, u32> = BTreeMap::new();
        for (at, number) in &self.names {
            first.entry(*number).or_insert_with(|| at.clone());
            *links.entry(*number).or_default() += 1;
        }
        for (at, number) in &self.names {
            let file = &self.files[*number];
            let mut xattrs = file.metadata.xattrs.clone();
            if file.kind == EntryKind::Directory && self.upper && self.hidden.contains(at) {
                xattrs.push(xattr("trusted.overlay.opaque", b"y"));
                xattrs.sort();
            }
            let (kind, content, size) = match &file.kind {
                EntryKind::Directory => (FileKind::Directory, Content::None, 0),
                EntryKind::Regular { size } => {
                    let digest = Digest::of(Algorithm::Sha256, &file.content);
                    (FileKind::Regular, Content::Bytes(*size, digest), *size)
                }
                EntryKind::Symlink { target } => {
                    (FileKind::Symlink, Content::Target(target.to_vec()), target.len() as u64)
                }
                EntryKind::CharDevice(_) => (FileKind::CharDevice, Content::None, 0),
                EntryKind::BlockDevice(_) => (FileKind::BlockDevice, Content::None, 0),
                EntryKind::Fifo => (FileKind::Fifo, Content::None, 0),
                EntryKind::HardLink { .. } | EntryKind::Whiteout | EntryKind::Opaque => return None,
            };
            let rdev = match file.kind {
                EntryKind::CharDevice(number) | EntryKind::BlockDevice(number) => number,
                _ => DeviceNumber::default(),
            };
            let nlink = match kind {
                FileKind::Directory => {
                    let is_child = |path: &&Vec<u8>| {
                        !path.is_empty()
                            && RelPath::parse(path).is_ok_and(|path| path.parent().is_some_and(|p| p.to_bytes() == *at))
                    };
                    let directories = self.names.iter().filter(|(path, _)| is_child(path));
                    let directories = directories.filter(|(_, n)| self.files[**n].kind == EntryKind::Directory);
                    2 + u32::try_from(directories.count()).expect("a test has few directories")
                }
                _ => links[number],
            };
            let metadata = &file.metadata;
            let attributes = Attributes {
                kind,
                permissions: metadata.permissions,
                uid: metadata.uid,
                gid: metadata.gid,
                mtime: metadata.mtime,
                nlink,
                size,
                rdev,
            };
            let same_file_as = first[number].clone();
            listing.nodes.insert(at.clone(), Node { attributes, listed_as: Some(kind), same_file_as, xattrs, content });
        }
        self.add_whiteouts(&mut listing);
        Some(listing)
    }

    /// Hidden names under which nothing new is. All whiteouts are one file.
    fn add_whiteouts(&self, listing: &mut Listing) {
        let whiteouts: Vec<&Vec<u8>> =
            self.hidden.iter().filter(|path| self.upper && !self.names.contains_key(*path)).collect();
        for at in &whiteouts {
            let attributes = Attributes {
                kind: FileKind::CharDevice,
                permissions: 0,
                uid: 0,
                gid: 0,
                mtime: crate::model::Timestamp::default(),
                nlink: u32::try_from(whiteouts.len()).expect("a test has few whiteouts"),
                size: 0,
                rdev: DeviceNumber::default(),
            };
            let node = Node {
                attributes,
                listed_as: Some(FileKind::CharDevice),
                same_file_as: whiteouts[0].clone(),
                xattrs: Vec::new(),
                content: Content::None,
            };
            listing.nodes.insert((*at).clone(), node);
        }
    }
}
