//! Lays a finished tree out: which inodes there are, in which order, how each is stored, and where everything lies.

use std::collections::HashMap;
use std::io::{self, Write};

use super::early::EarlyLayout;
use super::emit::{Emission, FirstBlock, Places};
use super::error::TreeError;
use super::statistics::TreeStatistics;
use super::tree::{Body, NONE, Node, ROOT, Tree};
use super::xattrs::XattrSet;
use super::{Area, BLOCK_SIZE, DataBlock, LayerRole, OPAQUE_NAME, OPAQUE_VALUE};
use crate::model::{Digest, RelPath, Timestamp, Xattr};

/// What tells an image from others that hold the same tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ImageIdentity {
    /// The UUID in the superblock.
    pub uuid: [u8; 16],
}

impl ImageIdentity {
    /// The identity of an image made from the layer that `source` names: a UUID of version 8 (RFC 9562, "vendor
    /// specific") from the first bytes of the digest. So the same layer gives the same image.
    pub fn of_source(source: &Digest) -> Self {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(source.as_bytes().first_chunk::<16>().expect("a digest has at least 32 bytes"));
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        Self { uuid }
    }
}

/// A layout for a tree, ready to be written.
#[derive(Debug)]
pub struct Plan {
    pub(super) tree: Tree,
    pub(super) identity: ImageIdentity,
    /// Nodes in the order of their inodes.
    pub(super) order: Vec<u32>,
    /// Of each node: number of names, or 2 + sub-directories.
    pub(super) nlink: Vec<u32>,
    /// Of each node that is a directory: the one above.
    pub(super) parent: Vec<u32>,
    /// Of each node: where its entries start in `children`; one more element at the end.
    pub(super) first_child: Vec<u32>,
    /// Links by directory, sorted by name.
    pub(super) children: Vec<u32>,
    /// The node that all whiteouts share, if there are any.
    pub(super) whiteout: Option<u32>,
    /// Attributes that several inodes have, in the order they are stored.
    pub(super) shared: Vec<u32>,
    /// Of each attribute: its id if it is shared, else [`NONE`].
    pub(super) shared_id: Vec<u32>,
    /// The time that compact inodes have.
    pub(super) epoch: Timestamp,
    pub(super) chunked: bool,
    pub(super) places: Places,
    statistics: TreeStatistics,
}

impl Plan {
    /// Lays `tree` out.
    ///
    /// # Errors
    /// [`TreeError::DanglingLink`] if hard links are unresolved, [`TreeError::TooLarge`].
    pub fn new(tree: Tree, identity: ImageIdentity) -> Result<Self, TreeError> {
        Self::with_base(tree, identity, 0)
    }

    /// Lays `tree` out behind the `late` blocks of its files, which follow the block of the superblock: for an image whose
    /// files are written before all of its tree is known.
    ///
    /// # Errors
    /// As [`Plan::new`].
    pub fn behind(tree: Tree, identity: ImageIdentity, late: u32) -> Result<Self, TreeError> {
        Self::with_base(tree, identity, late.checked_add(1).ok_or(TreeError::TooLarge)?)
    }

    fn with_base(mut tree: Tree, identity: ImageIdentity, base: u32) -> Result<Self, TreeError> {
        if let Some(link) = tree.unresolved_links()?.into_iter().next() {
            return Err(TreeError::DanglingLink { path: link.path, target: link.target });
        }
        tree.forget_index();
        let mut plan = Self {
            tree,
            identity,
            order: Vec::new(),
            nlink: Vec::new(),
            parent: Vec::new(),
            first_child: Vec::new(),
            children: Vec::new(),
            whiteout: None,
            shared: Vec::new(),
            shared_id: Vec::new(),
            epoch: Timestamp::default(),
            chunked: false,
            places: Places::default(),
            statistics: TreeStatistics::default(),
        };
        plan.settle_links()?;
        plan.sort_children()?;
        plan.order_inodes();
        plan.share_xattrs()?;
        plan.choose_epoch();
        plan.count();
        let mut places = Places::new(plan.tree.nodes.len(), base);
        Emission::new(&plan, &mut places, io::sink()).run().map_err(|_| TreeError::TooLarge)?;
        plan.places = places;
        Ok(plan)
    }

    /// Bytes of metadata: before the first data block, or behind the last one and the superblock's block.
    pub fn metadata_size(&self) -> u64 {
        match self.places.base {
            0 => self.places.end,
            base => self.places.end - u64::from(base - 1) * BLOCK_SIZE,
        }
    }

    /// What is in the image.
    pub fn statistics(&self) -> &TreeStatistics {
        &self.statistics
    }

    /// Writes the metadata of an image that was laid out behind its files: the superblock's block, which goes to the
    /// start of the image, then what goes behind the files.
    ///
    /// # Errors
    /// Those of `out`, and `FileTooLarge` for an image beyond 2³² blocks.
    ///
    /// # Panics
    /// If the metadata was laid out in front.
    pub fn write_behind(&self, out: impl Write) -> io::Result<()> {
        assert!(self.places.base > 0, "the files come first");
        let blocks = u32::try_from(self.places.end / BLOCK_SIZE).ok().filter(|end| *end < u32::MAX);
        let mut places = self.places.clone();
        places.late = 1;
        places.blocks = blocks.ok_or(io::ErrorKind::FileTooLarge)?;
        let mut first = FirstBlock::new(out);
        Emission::new(self, &mut places, &mut first).run()?;
        assert_eq!(places.end, self.places.end, "counting and writing go the same way");
        first.finish()
    }

    /// Writes the metadata of an image that continues with the blocks of `early`, then `late` blocks.
    ///
    /// # Errors
    /// Those of `out`, and `FileTooLarge` for an image beyond 2³² blocks.
    pub fn write_metadata(&self, early: &EarlyLayout, late: u32, out: impl Write) -> io::Result<()> {
        let metadata = u32::try_from(self.places.end / BLOCK_SIZE).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let late_start = metadata.checked_add(early.blocks()).ok_or(io::ErrorKind::FileTooLarge)?;
        let blocks = late_start.checked_add(late).filter(|end| *end < u32::MAX).ok_or(io::ErrorKind::FileTooLarge)?;
        let mut places = self.places.clone();
        places.early_layout = early.clone();
        places.early = metadata;
        places.late = late_start;
        places.blocks = blocks;
        let mut first = FirstBlock::new(out);
        Emission::new(self, &mut places, &mut first).run()?;
        assert_eq!(places.end, self.places.end, "counting and writing go the same way");
        first.finish()
    }

    /// Replaces aliases, gives whiteouts their node, and directories that hide their mark.
    fn settle_links(&mut self) -> Result<(), TreeError> {
        let tree = &mut self.tree;
        let mark = Xattr { name: OPAQUE_NAME.into(), value: OPAQUE_VALUE.into() };
        let mut opaque = if tree.root_opaque { vec![ROOT] } else { Vec::new() };
        for at in 0..tree.links.len() {
            let link = tree.links[at];
            if link.node == NONE {
                if link.hides {
                    let whiteout = match self.whiteout {
                        Some(node) => node,
                        None => *self.whiteout.insert(tree.push_whiteout()?),
                    };
                    tree.links[at].node = whiteout;
                }
                continue;
            }
            let node = tree.resolve(link.node);
            tree.links[at].node = node;
            if link.hides && matches!(tree.nodes[node as usize].body, Body::Directory(_)) {
                opaque.push(node);
            }
        }
        debug_assert!(tree.role == LayerRole::Upper || (opaque.is_empty() && self.whiteout.is_none()));
        if !opaque.is_empty() {
            let root = RelPath::root();
            let mark = tree.xattrs.set_of(&root, &[&mark])?;
            for node in opaque {
                let set = tree.nodes[node as usize].xattrs;
                tree.nodes[node as usize].xattrs = tree.xattrs.union(set, mark)?;
            }
        }
        Ok(())
    }

    /// Links by directory (a counting sort), then by name.
    fn sort_children(&mut self) -> Result<(), TreeError> {
        let (links, strings) = (&self.tree.links, &self.tree.strings);
        if u32::try_from(links.len()).is_err() {
            return Err(TreeError::TooLarge);
        }
        let mut first = vec![0_u32; self.tree.nodes.len() + 1];
        for link in links.iter().filter(|link| link.node != NONE) {
            first[link.parent as usize + 1] += 1;
        }
        for at in 1..first.len() {
            first[at] += first[at - 1];
        }
        let mut next = first.clone();
        let mut children = vec![0; first.last().copied().unwrap_or(0) as usize];
        for (number, link) in (0..).zip(links).filter(|(_, link)| link.node != NONE) {
            let slot = &mut next[link.parent as usize];
            children[*slot as usize] = number;
            *slot += 1;
        }
        for range in first.windows(2).filter(|range| range[1] - range[0] > 1) {
            let name = |link: &u32| strings.get(links[*link as usize].name);
            children[range[0] as usize..range[1] as usize].sort_unstable_by(|a, b| name(a).cmp(name(b)));
        }
        (self.first_child, self.children) = (first, children);
        Ok(())
    }

    /// The links of a directory, sorted by name.
    pub(super) fn children_of(&self, directory: u32) -> &[u32] {
        let at = directory as usize;
        &self.children[self.first_child[at] as usize..self.first_child[at + 1] as usize]
    }

    /// Inodes in the order of a walk, link counts, and what is above each directory.
    fn order_inodes(&mut self) {
        let nodes = self.tree.nodes.len();
        let (mut order, mut nlink, mut parent) = (vec![ROOT], vec![0_u32; nodes], vec![NONE; nodes]);
        nlink[ROOT as usize] = 2;
        parent[ROOT as usize] = ROOT;
        let mut directories = vec![ROOT];
        while let Some(directory) = directories.pop() {
            let deeper = directories.len();
            for link in self.children_of(directory) {
                let node = self.tree.links[*link as usize].node;
                let is_directory = matches!(self.tree.nodes[node as usize].body, Body::Directory(_));
                if nlink[node as usize] == 0 {
                    order.push(node);
                }
                if is_directory {
                    nlink[node as usize] = 2;
                    nlink[directory as usize] += 1;
                    parent[node as usize] = directory;
                    directories.push(node);
                } else {
                    nlink[node as usize] += 1;
                }
            }
            directories[deeper..].reverse();
        }
        (self.order, self.nlink, self.parent) = (order, nlink, parent);
    }

    /// Attributes that several inodes have are stored once.
    fn share_xattrs(&mut self) -> Result<(), TreeError> {
        let pool = &self.tree.xattrs;
        let mut uses = vec![0_u32; pool.len()];
        self.shared_id = vec![NONE; pool.len()];
        let mut end = 0_usize;
        for node in &self.order {
            // An inode can name 255 shared ones; those that come later stand beside it.
            for id in pool.entries_of(self.tree.nodes[*node as usize].xattrs).take(u8::MAX.into()) {
                uses[id as usize] += 1;
                if uses[id as usize] == 2 {
                    self.shared_id[id as usize] = u32::try_from(end / 4).map_err(|_| TreeError::TooLarge)?;
                    self.shared.push(id);
                    end += pool.entry(id).len();
                }
            }
        }
        Ok(())
    }

    /// The most frequent time of the inodes that would fit into compact ones but for their time (the earliest of
    /// several). Times before 1970 are not chosen: the superblock's field has no sign.
    fn choose_epoch(&mut self) {
        let mut frequency: HashMap<Timestamp, u32> = HashMap::new();
        for number in &self.order {
            let node = &self.tree.nodes[*number as usize];
            if node.mtime.seconds >= 0 && self.fits_compact(*number, node) {
                *frequency.entry(node.mtime).or_default() += 1;
            }
        }
        let most = frequency.iter().max_by_key(|(time, count)| (**count, std::cmp::Reverse(**time)));
        self.epoch = most.map_or_else(Timestamp::default, |(time, _)| *time);
    }

    /// True if ids, links and size have room in 32 bytes.
    fn fits_compact(&self, number: u32, node: &Node) -> bool {
        let size = match node.body {
            Body::Flat { size, .. } | Body::Mapped { size, .. } => size,
            // Directories and symlinks are smaller than 4 GiB but for those with 10 million entries.
            Body::Directory(_) => self.children_of(number).len() as u64 * 300,
            _ => 0,
        };
        let ids = u16::try_from(node.uid).is_ok() && u16::try_from(node.gid).is_ok();
        ids && u16::try_from(self.nlink[number as usize]).is_ok() && u32::try_from(size).is_ok()
    }

    /// True if a compact inode says all there is to say.
    pub(super) fn is_compact(&self, number: u32, node: &Node) -> bool {
        node.mtime == self.epoch && self.fits_compact(number, node)
    }

    fn count(&mut self) {
        let mut s = TreeStatistics { dropped: self.tree.dropped.clone(), ..TreeStatistics::default() };
        let mark = self.tree.xattrs.find(OPAQUE_NAME, OPAQUE_VALUE);
        for number in &self.order {
            if Some(*number) == self.whiteout {
                continue;
            }
            s.inodes += 1;
            let node = &self.tree.nodes[*number as usize];
            let mut names = u64::from(self.nlink[*number as usize]);
            match node.body {
                Body::Directory(_) => {
                    s.directories += 1;
                    names = 1;
                    let marked = mark.is_some_and(|mark| self.tree.xattrs.entries_of(node.xattrs).any(|id| id == mark));
                    s.opaque_directories += u64::from(marked);
                }
                Body::Flat { size, .. } => {
                    s.files += 1;
                    s.bytes += size;
                }
                Body::Mapped { size, map } => {
                    s.files += 1;
                    s.bytes += size;
                    s.hole_bytes += size.saturating_sub(self.tree.maps[map as usize].stored_bytes());
                    self.chunked = true;
                }
                Body::Symlink { .. } => s.symlinks += 1,
                Body::CharDevice(_) | Body::BlockDevice(_) | Body::Fifo => s.specials += 1,
                Body::Pending { .. } | Body::Alias(_) => unreachable!("all links were resolved"),
            }
            s.hard_links += names - 1;
        }
        s.whiteouts = self.whiteout.map_or(0, |node| self.nlink[node as usize].into());
        self.statistics = s;
    }

    /// Sets of a node's attributes: shared ids and entries beside the inode.
    pub(super) fn split_xattrs(&self, set: XattrSet) -> (Vec<u32>, Vec<u32>) {
        let (mut shared, mut inline) = (Vec::new(), Vec::new());
        for id in self.tree.xattrs.entries_of(set) {
            match self.shared_id[id as usize] {
                NONE => inline.push(id),
                _ if shared.len() == usize::from(u8::MAX) => inline.push(id),
                place => shared.push(place),
            }
        }
        (shared, inline)
    }
}

impl Places {
    /// The number of a data block in the image.
    pub(super) fn block(&self, at: DataBlock) -> u32 {
        // In the counting run the areas have no place yet; in the writing run the sum was checked.
        match at.area {
            Area::Early => self.early.wrapping_add(self.early_layout.place(at.block)),
            Area::Late => self.late.wrapping_add(at.block),
        }
    }
}
