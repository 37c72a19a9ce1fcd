//! The tree of one layer, built entry by entry in the order of its tar.
//!
//! The rules, which are those of the tools that unpack layers:
//! - A later entry replaces an earlier one of the same name, with everything below it, unless both are directories:
//!   then the later one's metadata count and the content is united. A directory that replaces something else is
//!   opaque, since what lower layers have there went with what it replaced.
//! - Parents that have no entry are made: 0755, root, 1970. They are listed ([`Tree::implied_directories`]), because
//!   over a lower layer they should look like the directory there.
//! - A parent that is a symlink of the same layer is followed (inside the root); one that is any other file is
//!   replaced by a directory. The last component is never followed.
//! - Whiteouts and opaque marks hide lower layers only, whatever their order. So beside a real entry of the same name
//!   a whiteout means nothing, or, if that entry is a directory, that it is opaque. The bottom layer has neither.
//! - A literal character device 0/0 is a whiteout: every file system that knows overlayfs takes it for one.
//! - A hard link may name any entry but a directory, before or after it, or another hard link. Links whose target is
//!   not in this layer are listed ([`Tree::unresolved_links`]) for the caller to bring the file.
//!
//! It costs about 130 bytes and the name for each entry, whatever is in the files.

use std::collections::HashMap;

use super::DataBlock;
use super::content::{self, ChunkMap, FileData};
use super::error::{FREE_IMPLIED, MAX_FILE_SIZE, MAX_IMPLIED, MAX_PATH, MAX_TARGET, TreeError};
use super::intern::Interner;
use super::statistics::Dropped;
use super::walk::{Step, Walk};
use super::xattrs::{XattrPool, XattrSet};
use crate::erofs::ondisk::{split_xattr_name, visible_xattr_prefix};
use crate::model::{EntryKind, FileKind, LayerEntry, Metadata, Name, RelPath, Timestamp, Xattr};

/// Where a layer stands in its image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerRole {
    /// The lowest one: there is nothing to hide, so it holds no whiteouts.
    Bottom,
    /// Above others.
    Upper,
}

/// No node.
pub(super) const NONE: u32 = u32::MAX;
/// The root's node.
pub(super) const ROOT: u32 = 0;

/// A file, whatever its names.
#[derive(Debug, Clone, Copy)]
pub(super) struct Node {
    pub(super) mtime: Timestamp,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) xattrs: XattrSet,
    pub(super) permissions: u16,
    pub(super) body: Body,
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Body {
    Directory(Standing),
    /// A file in one row of blocks.
    Flat {
        size: u64,
        start: DataBlock,
    },
    /// A file with holes.
    Mapped {
        size: u64,
        map: u32,
    },
    Symlink {
        /// Among the strings.
        target: u32,
    },
    CharDevice(u32),
    BlockDevice(u32),
    Fifo,
    /// Hard links whose target is not known yet.
    Pending {
        /// Path among the strings.
        target: u32,
    },
    /// A pending one whose target is known: the other node.
    Alias(u32),
}

/// Why a directory is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Standing {
    /// It has an entry, or got its looks from below.
    Listed,
    /// It has an opaque mark alone.
    Marked,
    /// Something lies in it.
    Implied,
}

impl Node {
    pub(super) fn kind(&self) -> FileKind {
        match self.body {
            Body::Directory(_) => FileKind::Directory,
            Body::Flat { .. } | Body::Mapped { .. } | Body::Pending { .. } | Body::Alias(_) => FileKind::Regular,
            Body::Symlink { .. } => FileKind::Symlink,
            Body::CharDevice(_) => FileKind::CharDevice,
            Body::BlockDevice(_) => FileKind::BlockDevice,
            Body::Fifo => FileKind::Fifo,
        }
    }

    pub(super) fn is_directory(&self) -> bool {
        matches!(self.body, Body::Directory(_))
    }
}

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Link {
    /// Node of the directory.
    pub(super) parent: u32,
    /// Among the strings.
    pub(super) name: u32,
    /// What it names, [`NONE`] if only a whiteout.
    pub(super) node: u32,
    /// What lower layers have under this name is hidden.
    pub(super) hides: bool,
}

/// Where a way through a layer ends, symlinks followed.
enum Way {
    /// At this directory.
    Directory(u32),
    /// At something that is no directory.
    File,
    /// Where this layer has nothing.
    Nothing,
}

/// The tree of a layer.
#[derive(Debug)]
pub struct Tree {
    pub(super) role: LayerRole,
    pub(super) nodes: Vec<Node>,
    pub(super) links: Vec<Link>,
    /// (directory, name) -> link.
    pub(super) index: HashMap<(u32, u32), u32>,
    /// Names, targets of symlinks and hard links.
    pub(super) strings: Interner,
    pub(super) xattrs: XattrPool,
    pub(super) maps: Vec<ChunkMap>,
    map_entries: u64,
    pub(super) root_opaque: bool,
    /// What the root looks like; none while nobody has said.
    pub(super) root: Option<Metadata>,
    pub(super) dropped: Dropped,
    /// Placeholders of hard links that wait for their target.
    pub(super) unresolved: Vec<u32>,
    /// Copies of lower files, by the names they have there.
    pub(super) brought: HashMap<RelPath, u32>,
    entries: u64,
    implied: u64,
}

impl Tree {
    /// A tree with nothing but its root.
    pub fn new(role: LayerRole) -> Self {
        let mut tree = Self {
            role,
            nodes: Vec::new(),
            links: Vec::new(),
            index: HashMap::new(),
            strings: Interner::default(),
            xattrs: XattrPool::new(),
            maps: Vec::new(),
            map_entries: 0,
            root_opaque: false,
            root: None,
            dropped: Dropped::default(),
            unresolved: Vec::new(),
            brought: HashMap::new(),
            entries: 0,
            implied: 0,
        };
        tree.nodes.push(implied_directory());
        tree
    }

    /// How large the block map of the next file may get, for [`Extents::new`](super::Extents::new).
    pub fn map_entries(&self) -> u64 {
        content::map_entries(self.map_entries)
    }

    /// Takes the next entry. `data` tells where a regular file's bytes lie and means nothing for others.
    ///
    /// # Errors
    /// See [`TreeError`]. After one the tree is of no use.
    pub fn add(&mut self, entry: &LayerEntry, data: FileData) -> Result<(), TreeError> {
        let path = &entry.path;
        check_length(path)?;
        self.entries += 1;
        let Some(name) = path.file_name() else {
            return self.add_root(entry);
        };
        let above = path.components().split_last().map_or(&[][..], |(_, above)| above);
        let is_mark = matches!(entry.kind, EntryKind::Whiteout | EntryKind::Opaque);
        // What a file of this layer stands in place of is hidden already, and a mark takes nothing of this layer away.
        if is_mark && self.leads_through_file(path, above)? {
            return Ok(());
        }
        let parent = self.directory(path, above)?;
        let link = self.link(parent, name.as_bytes())?;
        match &entry.kind {
            EntryKind::Whiteout => self.hide(link, path),
            EntryKind::CharDevice(number) if number.encode() == 0 && number.is_representable() => self.hide(link, path),
            EntryKind::Opaque => {
                let node = self.make_directory(link)?;
                if let Body::Directory(standing @ Standing::Implied) = &mut self.nodes[node as usize].body {
                    *standing = Standing::Marked;
                }
                self.hide(link, path);
            }
            EntryKind::Directory => {
                let node = self.make_directory(link)?;
                self.set_directory(node, Some(link), path, &entry.metadata)?;
            }
            EntryKind::HardLink { target } => self.add_hard_link(link, path, target)?,
            kind => {
                let body = self.body_of(path, kind, data)?;
                let node = self.new_node(path, &entry.metadata, body)?;
                self.links[link as usize].node = node;
            }
        }
        Ok(())
    }

    fn add_root(&mut self, entry: &LayerEntry) -> Result<(), TreeError> {
        match entry.kind {
            EntryKind::Directory => self.set_directory(ROOT, None, &entry.path, &entry.metadata),
            EntryKind::Opaque if self.role == LayerRole::Bottom => {
                self.dropped.bottom_whiteouts.add(&entry.path);
                Ok(())
            }
            EntryKind::Opaque => {
                self.root_opaque = true;
                Ok(())
            }
            _ => Err(TreeError::RootNotDirectory),
        }
    }

    /// The node behind aliases, which form no circle: each names a node that was resolved before.
    pub(super) fn resolve(&self, mut node: u32) -> u32 {
        while let Body::Alias(other) = self.nodes[node as usize].body {
            node = other;
        }
        node
    }

    /// What `path` names in this layer.
    pub(super) fn find(&self, path: &RelPath) -> Result<Option<u32>, TreeError> {
        let Some((name, above)) = path.components().split_last() else { return Ok(Some(ROOT)) };
        Ok(match self.way(path, above)? {
            Way::Directory(parent) => self.child(parent, name.as_bytes()),
            Way::File | Way::Nothing => None,
        })
    }

    /// True if something of this layer that is no directory stands where `above` wants one.
    fn leads_through_file(&self, path: &RelPath, above: &[Name]) -> Result<bool, TreeError> {
        Ok(matches!(self.way(path, above)?, Way::File))
    }

    /// Where `above`, the directories of `path`, lead in this layer.
    fn way(&self, path: &RelPath, above: &[Name]) -> Result<Way, TreeError> {
        let mut walk = Walk::new(path, above);
        while let Some(step) = walk.next() {
            match step {
                Step::Up => walk.leave(),
                Step::Into(name) => match self.child(walk.current(), &name) {
                    Some(node) => match self.nodes[node as usize].body {
                        Body::Directory(_) => walk.enter(node),
                        Body::Symlink { target } => walk.follow(self.strings.get(target))?,
                        _ => return Ok(Way::File),
                    },
                    None => return Ok(Way::Nothing),
                },
            }
        }
        Ok(Way::Directory(walk.current()))
    }

    /// The directory that `above` leads to, made as far as it is missing.
    pub(super) fn directory(&mut self, path: &RelPath, above: &[Name]) -> Result<u32, TreeError> {
        let mut walk = Walk::new(path, above);
        while let Some(step) = walk.next() {
            match step {
                Step::Up => walk.leave(),
                Step::Into(name) => {
                    let link = self.link(walk.current(), &name)?;
                    let node = self.links[link as usize].node;
                    match (node != NONE).then(|| self.nodes[node as usize].body) {
                        Some(Body::Symlink { target }) => walk.follow(self.strings.get(target))?,
                        _ => walk.enter(self.make_directory(link)?),
                    }
                }
            }
        }
        Ok(walk.current())
    }

    pub(super) fn child(&self, directory: u32, name: &[u8]) -> Option<u32> {
        let name = self.strings.find(name)?;
        let link = self.index.get(&(directory, name))?;
        Some(self.links[*link as usize].node).filter(|node| *node != NONE)
    }

    /// The link for `name` in a directory, new (naming nothing) if need be.
    pub(super) fn link(&mut self, parent: u32, name: &[u8]) -> Result<u32, TreeError> {
        let name = self.strings.intern(name).ok_or(TreeError::TooLarge)?;
        let next = u32::try_from(self.links.len()).map_err(|_| TreeError::TooLarge)?;
        let link = *self.index.entry((parent, name)).or_insert(next);
        if link == next {
            self.links.push(Link { parent, name, node: NONE, hides: false });
        }
        Ok(link)
    }

    fn hide(&mut self, link: u32, path: &RelPath) {
        if self.role == LayerRole::Bottom {
            self.dropped.bottom_whiteouts.add(path);
        } else {
            self.links[link as usize].hides = true;
        }
    }

    /// The directory behind a link. What else was there is replaced.
    pub(super) fn make_directory(&mut self, link: u32) -> Result<u32, TreeError> {
        let Link { node, .. } = self.links[link as usize];
        if node != NONE && self.nodes[node as usize].is_directory() {
            return Ok(node);
        }
        let replaces = node != NONE;
        self.implied += 1;
        if self.implied > FREE_IMPLIED + MAX_IMPLIED * self.entries {
            return Err(TreeError::TooManyImplied { implied: self.implied, entries: self.entries });
        }
        let node = self.push_node(implied_directory())?;
        let link = &mut self.links[link as usize];
        link.node = node;
        link.hides |= replaces && self.role == LayerRole::Upper;
        Ok(node)
    }

    pub(super) fn set_directory(
        &mut self,
        node: u32,
        link: Option<u32>,
        path: &RelPath,
        metadata: &Metadata,
    ) -> Result<(), TreeError> {
        if metadata.xattrs.iter().any(is_opaque_mark) {
            match link {
                Some(link) => self.hide(link, path),
                None => self.root_opaque |= self.role == LayerRole::Upper,
            }
        }
        if link.is_none() {
            self.root = Some(metadata.clone());
        }
        self.nodes[node as usize] = self.node(path, metadata, Body::Directory(Standing::Listed))?;
        Ok(())
    }

    fn add_hard_link(&mut self, link: u32, path: &RelPath, target: &RelPath) -> Result<(), TreeError> {
        check_length(target)?;
        let node = match self.find(target)? {
            Some(node) if self.nodes[node as usize].is_directory() => {
                return Err(TreeError::LinkToDirectory { path: path.clone(), target: target.clone() });
            }
            Some(node) => node,
            None => {
                let target = self.strings.intern(&target.to_bytes()).ok_or(TreeError::TooLarge)?;
                let body = Body::Pending { target };
                let node = self.push_node(Node { body, ..implied_directory() })?;
                self.unresolved.push(node);
                node
            }
        };
        self.links[link as usize].node = node;
        Ok(())
    }

    pub(super) fn body_of(&mut self, path: &RelPath, kind: &EntryKind, data: FileData) -> Result<Body, TreeError> {
        Ok(match kind {
            EntryKind::Regular { size } => {
                if *size > MAX_FILE_SIZE {
                    return Err(TreeError::FileTooLarge { path: path.clone(), size: *size });
                }
                match data {
                    FileData::Blocks(start) => Body::Flat { size: *size, start },
                    FileData::Mapped(map) => {
                        self.map_entries += map.entries();
                        let number = u32::try_from(self.maps.len()).map_err(|_| TreeError::TooLarge)?;
                        self.maps.push(map);
                        Body::Mapped { size: *size, map: number }
                    }
                }
            }
            EntryKind::Symlink { target } => {
                if target.is_empty() || target.len() > MAX_TARGET {
                    return Err(TreeError::SymlinkTarget { path: path.clone(), len: target.len() });
                }
                Body::Symlink { target: self.strings.intern(target).ok_or(TreeError::TooLarge)? }
            }
            EntryKind::CharDevice(number) | EntryKind::BlockDevice(number) => {
                if !number.is_representable() {
                    let (major, minor) = (number.major, number.minor);
                    return Err(TreeError::DeviceNumber { path: path.clone(), major, minor });
                }
                match kind {
                    EntryKind::CharDevice(_) => Body::CharDevice(number.encode()),
                    _ => Body::BlockDevice(number.encode()),
                }
            }
            EntryKind::Fifo => Body::Fifo,
            EntryKind::Directory | EntryKind::HardLink { .. } | EntryKind::Whiteout | EntryKind::Opaque => {
                return Err(TreeError::LinkToDirectory { path: path.clone(), target: path.clone() });
            }
        })
    }

    pub(super) fn new_node(&mut self, path: &RelPath, metadata: &Metadata, body: Body) -> Result<u32, TreeError> {
        let node = self.node(path, metadata, body)?;
        self.push_node(node)
    }

    fn node(&mut self, path: &RelPath, metadata: &Metadata, body: Body) -> Result<Node, TreeError> {
        let Metadata { permissions, uid, gid, mtime, xattrs } = metadata;
        if mtime.nanos >= 1_000_000_000 {
            return Err(TreeError::Time { path: path.clone(), nanos: mtime.nanos });
        }
        let kept: Vec<&Xattr> = xattrs.iter().filter(|xattr| self.keeps(path, xattr, &body)).collect();
        let xattrs = self.xattrs.set_of(path, &kept)?;
        Ok(Node { mtime: *mtime, uid: *uid, gid: *gid, xattrs, permissions: permissions & 0o7777, body })
    }

    fn keeps(&mut self, path: &RelPath, xattr: &Xattr, body: &Body) -> bool {
        if xattr.name.starts_with(b"trusted.overlay.") {
            let counts_as_mark = is_opaque_mark(xattr) && matches!(body, Body::Directory(_));
            if !counts_as_mark {
                self.dropped.overlay_xattrs.add(path);
            }
            return false;
        }
        let known = split_xattr_name(&xattr.name).is_some_and(|(index, _)| visible_xattr_prefix(index).is_some());
        if !known {
            self.dropped.foreign_xattrs.add(path);
        }
        known
    }

    /// Gives back the memory that only adding entries needs.
    pub(super) fn forget_index(&mut self) {
        self.index = HashMap::new();
    }

    /// A node that stands for all whiteouts, as overlayfs makes them.
    pub(super) fn push_whiteout(&mut self) -> Result<u32, TreeError> {
        self.push_node(Node { permissions: 0, body: Body::CharDevice(0), ..implied_directory() })
    }

    fn push_node(&mut self, node: Node) -> Result<u32, TreeError> {
        let number = u32::try_from(self.nodes.len()).ok().filter(|number| *number != NONE);
        self.nodes.push(node);
        number.ok_or(TreeError::TooLarge)
    }
}

/// What overlayfs writes on a directory that hides those below.
fn is_opaque_mark(xattr: &Xattr) -> bool {
    &*xattr.name == super::OPAQUE_NAME && &*xattr.value == super::OPAQUE_VALUE
}

fn check_length(path: &RelPath) -> Result<(), TreeError> {
    let len = path.components().iter().map(|name| name.as_bytes().len() + 1).sum::<usize>().saturating_sub(1);
    if len > MAX_PATH { Err(TreeError::PathTooLong { path: path.clone(), len }) } else { Ok(()) }
}

fn implied_directory() -> Node {
    Node {
        mtime: Timestamp::default(),
        uid: 0,
        gid: 0,
        xattrs: XattrSet::EMPTY,
        permissions: 0o755,
        body: Body::Directory(Standing::Implied),
    }
}
