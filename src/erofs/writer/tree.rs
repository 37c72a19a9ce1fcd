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

use std::collections::{HashMap, HashSet};

use super::content::{self, ChunkMap, FileData};
use super::intern::Interner;
use super::xattrs::{XattrPool, XattrSet};
use super::{BLOCK_SIZE, DataBlock};
use crate::erofs::ondisk::{split_xattr_name, visible_xattr_prefix};
use crate::model::{EntryKind, FileKind, LayerEntry, Metadata, Name, NameError, RelPath, Timestamp, Xattr};

/// Longest path in bytes (Linux `PATH_MAX`, without the closing NUL). Longer ones could never be opened, and each of
/// their bytes could become a directory.
const MAX_PATH: usize = 4095;
/// Longest target of a symlink in bytes.
const MAX_TARGET: usize = 4095;
/// Symlinks that are followed on one path, as Linux does.
const MAX_FOLLOWED: usize = 40;
/// Largest file: with the largest chunks its map still has no more than 1,024 entries.
const MAX_FILE_SIZE: u64 = 1 << 53;
/// Directories without entry that each entry may need on average, beyond [`FREE_IMPLIED`]. Layers without any
/// directory entries need about one; symlinks to long paths could make thousands.
const MAX_IMPLIED: u64 = 16;
/// Directories without entry that cost nothing.
const FREE_IMPLIED: u64 = 10_000;

/// Where a layer stands in its image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerRole {
    /// The lowest one: there is nothing to hide, so it holds no whiteouts.
    Bottom,
    /// Above others.
    Upper,
}

/// Why a layer cannot become an EROFS image.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TreeError {
    /// The root of a layer is a directory.
    #[error("the layer has an entry for its root that is no directory")]
    RootNotDirectory,
    /// A path beyond what Linux opens.
    #[error("path {path} has {len} bytes, Linux allows {MAX_PATH}")]
    PathTooLong {
        /// The path.
        path: RelPath,
        /// Its length.
        len: usize,
    },
    /// Symlinks that lead in a circle, on the way to an entry.
    #[error("more than {MAX_FOLLOWED} symlinks on the way to {path}")]
    SymlinkLoop {
        /// The entry.
        path: RelPath,
    },
    /// A symlink to nothing, or to more than Linux follows.
    #[error("symlink {path} has a target of {len} bytes, 1 to {MAX_TARGET} are possible")]
    SymlinkTarget {
        /// The symlink.
        path: RelPath,
        /// Bytes of its target.
        len: usize,
    },
    /// A link to a directory.
    #[error("{path} is a hard link to {target}, which is a directory")]
    LinkToDirectory {
        /// The link.
        path: RelPath,
        /// What it names.
        target: RelPath,
    },
    /// Links whose target is in no layer.
    #[error("hard link {path} names {target}, which is not in this layer")]
    DanglingLink {
        /// One of the links.
        path: RelPath,
        /// What it names.
        target: RelPath,
    },
    /// A device number beyond 12 and 20 bits.
    #[error("device {path} has the number {major}:{minor}, Linux allows 12 and 20 bits")]
    DeviceNumber {
        /// The device.
        path: RelPath,
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// A time whose nanoseconds are a second or more.
    #[error("the modification time of {path} has {nanos} nanoseconds")]
    Time {
        /// The entry.
        path: RelPath,
        /// The nanoseconds.
        nanos: u32,
    },
    /// A file larger than any file system holds.
    #[error("file {path} has {size} bytes, more than the limit of {MAX_FILE_SIZE}")]
    FileTooLarge {
        /// The file.
        path: RelPath,
        /// Its size.
        size: u64,
    },
    /// An attribute that EROFS cannot hold.
    #[error("extended attribute {name:?} of {path} cannot be kept: {reason}")]
    Xattr {
        /// The entry.
        path: RelPath,
        /// The attribute.
        name: String,
        /// Why.
        reason: &'static str,
    },
    /// Attributes that are too large together.
    #[error("the extended attributes of {path} take {size} bytes, EROFS allows {limit}")]
    XattrsTooLarge {
        /// The entry.
        path: RelPath,
        /// What they take.
        size: usize,
        /// What they may.
        limit: usize,
    },
    /// A component that cannot be a name, met in a symlink on the way.
    #[error("a symlink on the way to {path} leads through an impossible name")]
    Name {
        /// The entry.
        path: RelPath,
        /// What is wrong.
        #[source]
        source: NameError,
    },
    /// Far more directories are needed than the layer has entries.
    #[error("the layer needs {implied} directories that it does not list for its {entries} entries")]
    TooManyImplied {
        /// Directories without entry.
        implied: u64,
        /// Entries.
        entries: u64,
    },
    /// A layer beyond 4 Gi entries, 4 GiB of names or 16 TiB of data.
    #[error("the layer is larger than an EROFS image with blocks of {BLOCK_SIZE} bytes can be")]
    TooLarge,
}

/// What was left out on purpose, with how often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Dropped {
    /// Attributes whose names the kernel cannot show from EROFS (`com.apple.…`, `lustre.…`). No Linux file system that containers are
    /// unpacked to would hold them either.
    pub foreign_xattrs: u64,
    /// `trusted.overlay.…` attributes of the tar but an `opaque` of a directory, which counts like an opaque mark:
    /// they would make overlayfs fetch or redirect files.
    pub overlay_xattrs: u64,
    /// Whiteouts and opaque marks of a bottom layer.
    pub bottom_whiteouts: u64,
}

/// What is in a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TreeStatistics {
    /// Inodes.
    pub inodes: u64,
    /// Regular files (inodes).
    pub files: u64,
    /// Directories, the root included.
    pub directories: u64,
    /// Symlinks.
    pub symlinks: u64,
    /// Devices and pipes.
    pub specials: u64,
    /// Names of files beyond each one's first.
    pub hard_links: u64,
    /// Whiteouts.
    pub whiteouts: u64,
    /// Opaque directories.
    pub opaque_directories: u64,
    /// Bytes of all regular files as `stat` tells them, each inode once.
    pub bytes: u64,
    /// How much of that is holes.
    pub hole_bytes: u64,
    /// What was left out.
    pub dropped: Dropped,
}

/// A hard link target that the layer does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnresolvedLink {
    /// The path that the link names.
    pub target: RelPath,
    /// A link that names it (there may be more).
    pub path: RelPath,
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
#[derive(Debug, Clone, Copy)]
pub(super) enum Body {
    Directory {
        /// It has no entry of its own.
        implied: bool,
    },
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

impl Node {
    pub(super) fn kind(&self) -> FileKind {
        match self.body {
            Body::Directory { .. } => FileKind::Directory,
            Body::Flat { .. } | Body::Mapped { .. } | Body::Pending { .. } | Body::Alias(_) => FileKind::Regular,
            Body::Symlink { .. } => FileKind::Symlink,
            Body::CharDevice(_) => FileKind::CharDevice,
            Body::BlockDevice(_) => FileKind::BlockDevice,
            Body::Fifo => FileKind::Fifo,
        }
    }

    fn is_directory(&self) -> bool {
        matches!(self.body, Body::Directory { .. })
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

/// The tree of a layer.
#[derive(Debug)]
pub struct Tree {
    pub(super) role: LayerRole,
    pub(super) nodes: Vec<Node>,
    pub(super) links: Vec<Link>,
    /// (directory, name) -> link.
    index: HashMap<(u32, u32), u32>,
    /// Names, targets of symlinks and hard links.
    pub(super) strings: Interner,
    pub(super) xattrs: XattrPool,
    pub(super) maps: Vec<ChunkMap>,
    map_entries: u64,
    pub(super) root_opaque: bool,
    pub(super) dropped: Dropped,
    unresolved: Vec<u32>,
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
            dropped: Dropped::default(),
            unresolved: Vec::new(),
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
        let parent = self.directory(path, path.components().split_last().map_or(&[][..], |(_, above)| above))?;
        let link = self.link(parent, name.as_bytes())?;
        match &entry.kind {
            EntryKind::Whiteout => self.hide(link),
            EntryKind::CharDevice(number) if number.encode() == 0 && number.is_representable() => self.hide(link),
            EntryKind::Opaque => {
                self.make_directory(link)?;
                self.hide(link);
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
                self.dropped.bottom_whiteouts += 1;
                Ok(())
            }
            EntryKind::Opaque => {
                self.root_opaque = true;
                Ok(())
            }
            _ => Err(TreeError::RootNotDirectory),
        }
    }

    /// Directories that have no entry of their own but are needed for others, outermost first.
    pub fn implied_directories(&self) -> Vec<RelPath> {
        let mut found: Vec<RelPath> = Vec::new();
        let implied = |node: u32| matches!(self.nodes[node as usize].body, Body::Directory { implied: true });
        if implied(ROOT) {
            found.push(RelPath::root());
        }
        let ways = self.ways();
        let reachable = self.links.iter().filter(|link| link.node != NONE && implied(link.node));
        found.extend(reachable.filter_map(|link| self.path_of(link, &ways)));
        found.sort();
        found
    }

    /// Gives a directory that [`Self::implied_directories`] listed the metadata it has in the layers below.
    ///
    /// # Errors
    /// See [`TreeError`].
    pub fn set_implied_directory(&mut self, path: &RelPath, metadata: &Metadata) -> Result<(), TreeError> {
        let (node, link) = match path.components().split_last() {
            None => (ROOT, None),
            Some((name, above)) => {
                let parent = self.directory(path, above)?;
                let link = self.link(parent, name.as_bytes())?;
                (self.make_directory(link)?, Some(link))
            }
        };
        self.set_directory(node, link, path, metadata)
    }

    /// Resolves hard links to entries that came after them, and lists what is still missing: one element for each
    /// target, in the order the links came. To be asked when all entries were added.
    ///
    /// # Errors
    /// [`TreeError::LinkToDirectory`].
    pub fn unresolved_links(&mut self) -> Result<Vec<UnresolvedLink>, TreeError> {
        let pending = std::mem::take(&mut self.unresolved);
        if pending.is_empty() {
            return Ok(Vec::new());
        }
        // One name for each placeholder; those that lost all their names need nothing.
        let ways = self.ways();
        let mut named: HashMap<u32, RelPath> = HashMap::new();
        for link in self.links.iter().filter(|link| link.node != NONE) {
            let is_pending = matches!(self.nodes[link.node as usize].body, Body::Pending { .. });
            if is_pending
                && !named.contains_key(&link.node)
                && let Some(path) = self.path_of(link, &ways)
            {
                named.insert(link.node, path);
            }
        }
        for placeholder in pending {
            let Body::Pending { target } = self.nodes[placeholder as usize].body else { continue };
            let Some(path) = named.get(&placeholder) else { continue };
            let target = RelPath::parse(self.strings.get(target)).expect("the path of a link target was valid before");
            match self.find(&target)?.map(|node| self.resolve(node)) {
                Some(node) if self.nodes[node as usize].is_directory() => {
                    return Err(TreeError::LinkToDirectory { path: path.clone(), target });
                }
                Some(node) if node != placeholder => self.nodes[placeholder as usize].body = Body::Alias(node),
                _ => self.unresolved.push(placeholder),
            }
        }
        let mut seen = HashSet::new();
        let mut missing = Vec::new();
        for placeholder in &self.unresolved {
            let Body::Pending { target } = self.nodes[*placeholder as usize].body else { continue };
            if let Some(path) = named.remove(placeholder)
                && seen.insert(target)
            {
                let target = RelPath::parse(self.strings.get(target)).expect("the target was valid before");
                missing.push(UnresolvedLink { target, path });
            }
        }
        Ok(missing)
    }

    /// Brings the file that unresolved links to `target` name: a copy of what the layers below have there. The
    /// `entry`'s path means nothing.
    ///
    /// # Errors
    /// See [`TreeError`].
    pub fn bring(&mut self, target: &RelPath, entry: &LayerEntry, data: &FileData) -> Result<(), TreeError> {
        let Some(string) = self.strings.find(&target.to_bytes()) else { return Ok(()) };
        let mut brought = None;
        for placeholder in std::mem::take(&mut self.unresolved) {
            let wanted = match self.nodes[placeholder as usize].body {
                Body::Pending { target: wanted } => wanted == string,
                _ => false,
            };
            if !wanted {
                self.unresolved.push(placeholder);
                continue;
            }
            let node = match brought {
                Some(node) => node,
                None => {
                    let body = self.body_of(target, &entry.kind, data.clone())?;
                    *brought.insert(self.new_node(target, &entry.metadata, body)?)
                }
            };
            self.nodes[placeholder as usize].body = Body::Alias(node);
        }
        Ok(())
    }

    /// The node behind aliases, which form no circle: each names a node that was resolved before.
    pub(super) fn resolve(&self, mut node: u32) -> u32 {
        while let Body::Alias(other) = self.nodes[node as usize].body {
            node = other;
        }
        node
    }

    /// What `path` names in this layer.
    fn find(&self, path: &RelPath) -> Result<Option<u32>, TreeError> {
        let Some((name, above)) = path.components().split_last() else { return Ok(Some(ROOT)) };
        let mut walk = Walk::new(path, above);
        while let Some(step) = walk.next() {
            match step {
                Step::Up => walk.leave(),
                Step::Into(name) => match self.child(walk.current(), &name) {
                    Some(node) => match self.nodes[node as usize].body {
                        Body::Directory { .. } => walk.enter(node),
                        Body::Symlink { target } => walk.follow(self.strings.get(target))?,
                        _ => return Ok(None),
                    },
                    None => return Ok(None),
                },
            }
        }
        Ok(self.child(walk.current(), name.as_bytes()))
    }

    /// The directory that `above` leads to, made as far as it is missing.
    fn directory(&mut self, path: &RelPath, above: &[Name]) -> Result<u32, TreeError> {
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

    fn child(&self, directory: u32, name: &[u8]) -> Option<u32> {
        let name = self.strings.find(name)?;
        let link = self.index.get(&(directory, name))?;
        Some(self.links[*link as usize].node).filter(|node| *node != NONE)
    }

    /// The link for `name` in a directory, new (naming nothing) if need be.
    fn link(&mut self, parent: u32, name: &[u8]) -> Result<u32, TreeError> {
        let name = self.strings.intern(name).ok_or(TreeError::TooLarge)?;
        let next = u32::try_from(self.links.len()).map_err(|_| TreeError::TooLarge)?;
        let link = *self.index.entry((parent, name)).or_insert(next);
        if link == next {
            self.links.push(Link { parent, name, node: NONE, hides: false });
        }
        Ok(link)
    }

    fn hide(&mut self, link: u32) {
        if self.role == LayerRole::Bottom {
            self.dropped.bottom_whiteouts += 1;
        } else {
            self.links[link as usize].hides = true;
        }
    }

    /// The directory behind a link. What else was there is replaced.
    fn make_directory(&mut self, link: u32) -> Result<u32, TreeError> {
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

    fn set_directory(
        &mut self,
        node: u32,
        link: Option<u32>,
        path: &RelPath,
        metadata: &Metadata,
    ) -> Result<(), TreeError> {
        if metadata.xattrs.iter().any(is_opaque_mark) {
            match link {
                Some(link) => self.hide(link),
                None => self.root_opaque |= self.role == LayerRole::Upper,
            }
        }
        self.nodes[node as usize] = self.node(path, metadata, Body::Directory { implied: false })?;
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

    fn body_of(&mut self, path: &RelPath, kind: &EntryKind, data: FileData) -> Result<Body, TreeError> {
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

    fn new_node(&mut self, path: &RelPath, metadata: &Metadata, body: Body) -> Result<u32, TreeError> {
        let node = self.node(path, metadata, body)?;
        self.push_node(node)
    }

    fn node(&mut self, path: &RelPath, metadata: &Metadata, body: Body) -> Result<Node, TreeError> {
        let Metadata { permissions, uid, gid, mtime, xattrs } = metadata;
        if mtime.nanos >= 1_000_000_000 {
            return Err(TreeError::Time { path: path.clone(), nanos: mtime.nanos });
        }
        let kept: Vec<&Xattr> = xattrs.iter().filter(|xattr| self.keeps(xattr, &body)).collect();
        let xattrs = self.xattrs.set_of(path, &kept)?;
        Ok(Node { mtime: *mtime, uid: *uid, gid: *gid, xattrs, permissions: permissions & 0o7777, body })
    }

    fn keeps(&mut self, xattr: &Xattr, body: &Body) -> bool {
        if xattr.name.starts_with(b"trusted.overlay.") {
            let counts_as_mark = is_opaque_mark(xattr) && matches!(body, Body::Directory { .. });
            self.dropped.overlay_xattrs += u64::from(!counts_as_mark);
            return false;
        }
        let known = split_xattr_name(&xattr.name).is_some_and(|(index, _)| visible_xattr_prefix(index).is_some());
        self.dropped.foreign_xattrs += u64::from(!known);
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

    /// For each directory the link that leads there; [`NONE`] for other nodes and directories that were replaced.
    fn ways(&self) -> Vec<u32> {
        let mut ways = vec![NONE; self.nodes.len()];
        for (number, link) in (0..).zip(&self.links) {
            if link.node != NONE && self.nodes[link.node as usize].is_directory() {
                ways[link.node as usize] = number;
            }
        }
        ways
    }

    /// The path of a link; none if it hangs on a directory that was replaced.
    fn path_of(&self, link: &Link, ways: &[u32]) -> Option<RelPath> {
        let mut names = vec![link.name];
        let mut at = link.parent;
        while at != ROOT {
            let above = self.links.get(*ways.get(at as usize)? as usize)?;
            names.push(above.name);
            at = above.parent;
        }
        let names = names.iter().rev().map(|name| self.strings.get(*name));
        Some(RelPath::parse(&names.collect::<Vec<_>>().join(&b'/')).expect("names of the tree are valid"))
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
        body: Body::Directory { implied: true },
    }
}

/// The next thing to do on a way.
enum Step {
    /// To the directory above.
    Up,
    /// Into an entry.
    Into(Box<[u8]>),
}

/// A way down the tree, component by component, with the symlinks that are met put in.
struct Walk<'a> {
    path: &'a RelPath,
    /// What is left, last component first.
    left: Vec<Box<[u8]>>,
    /// Directories from the root to where we are.
    entered: Vec<u32>,
    followed: usize,
}

impl<'a> Walk<'a> {
    fn new(path: &'a RelPath, components: &[Name]) -> Self {
        let left = components.iter().rev().map(|name| name.as_bytes().into()).collect();
        Self { path, left, entered: Vec::new(), followed: 0 }
    }

    fn next(&mut self) -> Option<Step> {
        let name = self.left.pop()?;
        Some(if &*name == b".." { Step::Up } else { Step::Into(name) })
    }

    fn current(&self) -> u32 {
        self.entered.last().copied().unwrap_or(ROOT)
    }

    fn enter(&mut self, directory: u32) {
        self.entered.push(directory);
    }

    fn leave(&mut self) {
        self.entered.pop();
    }

    fn follow(&mut self, target: &[u8]) -> Result<(), TreeError> {
        self.followed += 1;
        if self.followed > MAX_FOLLOWED {
            return Err(TreeError::SymlinkLoop { path: self.path.clone() });
        }
        if target.first() == Some(&b'/') {
            self.entered.clear();
        }
        for part in target.rsplit(|b| *b == b'/').filter(|part| !matches!(*part, b"" | b".")) {
            if part != b".." {
                Name::check(part).map_err(|source| TreeError::Name { path: self.path.clone(), source })?;
            }
            self.left.push(part.into());
        }
        Ok(())
    }
}
