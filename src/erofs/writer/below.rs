//! What a layer needs from those below it: targets of hard links, and the looks of directories it has no entry for.

use std::collections::{HashMap, HashSet};

use super::content::FileData;
use super::error::TreeError;
use super::tree::{Body, LayerRole, Link, NONE, ROOT, Standing, Tree};
use crate::model::{LayerEntry, Metadata, Name, RelPath};

/// A hard link target that the layer does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnresolvedLink {
    /// The path that the link names.
    pub target: RelPath,
    /// A link that names it (there may be more).
    pub path: RelPath,
}

/// A directory that a layer needs but has no entry for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImpliedDirectory {
    /// Its path.
    pub path: RelPath,
    /// There is nothing in it but removals: where the layers below have no such directory, it means nothing.
    pub only_removals: bool,
}

impl Tree {
    /// Directories that have no entry of their own but are needed for others, and that show in the layers below unless
    /// this one hides them there. Outermost first.
    pub fn implied_directories(&self) -> Vec<ImpliedDirectory> {
        let ways = self.ways();
        let real = self.with_content(&ways);
        let standing = |node: u32| match self.nodes[node as usize].body {
            Body::Directory(standing) => Some(standing),
            _ => None,
        };
        let is_implied = |node| matches!(standing(node), Some(Standing::Implied | Standing::Marked));
        let mut found: Vec<ImpliedDirectory> = Vec::new();
        if is_implied(ROOT) {
            found.push(ImpliedDirectory { path: RelPath::root(), only_removals: false });
        }
        for link in self.links.iter().filter(|link| link.node != NONE && is_implied(link.node)) {
            // What lower layers have in a hidden directory is of no interest.
            if !self.is_hidden(link.parent, &ways)
                && let Some(path) = self.path_of(link, &ways)
            {
                found.push(ImpliedDirectory { path, only_removals: !real[link.node as usize] });
            }
        }
        found.sort_by(|a, b| a.path.cmp(&b.path));
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

    /// Takes away what removes nothing: implied directories with nothing but removals in them, where `path` (one of
    /// them) has nothing below. A whiteout of the same name stays.
    pub fn drop_implied_directory(&mut self, path: &RelPath) {
        if let Some(link) = self.link_at(path) {
            self.links[link as usize].node = NONE;
        }
    }

    /// Takes away all implied directories with nothing but removals in them where this layer removes everything anyway,
    /// and in a bottom layer all of them.
    pub fn drop_pointless_directories(&mut self) {
        let ways = self.ways();
        let real = self.with_content(&ways);
        for number in 0..self.links.len() {
            let Link { node, hides, parent, .. } = self.links[number];
            let pointless = node != NONE && !real[node as usize];
            if pointless && (hides || self.role == LayerRole::Bottom || self.is_hidden(parent, &ways)) {
                self.links[number].node = NONE;
            }
        }
    }

    /// True if the layer has an opaque mark on its root.
    pub fn is_root_opaque(&self) -> bool {
        self.root_opaque
    }

    /// Hides `names` of the layers below one by one instead of marking the root: overlayfs does not look for a mark
    /// there.
    ///
    /// # Errors
    /// [`TreeError::TooLarge`].
    pub fn hide_in_root(&mut self, names: &[Name]) -> Result<(), TreeError> {
        for name in names {
            let link = self.link(ROOT, name.as_bytes())?;
            self.links[link as usize].hides = true;
        }
        self.root_opaque = false;
        Ok(())
    }

    /// Puts what lies in the implied directory `path` into the directory `to`: in the layers below, `path` is a
    /// symbolic link that leads there.
    ///
    /// # Errors
    /// See [`TreeError`].
    pub fn move_implied_directory(&mut self, path: &RelPath, to: &RelPath) -> Result<(), TreeError> {
        let Some(link) = self.link_at(path) else { return Ok(()) };
        let from = self.links[link as usize].node;
        let to = self.directory(to, to.components())?;
        // Not into itself, where symbolic links of this layer may lead.
        if from == NONE || self.is_at_or_below(to, from) {
            return Ok(());
        }
        self.links[link as usize].node = NONE;
        let mut moves = vec![(from, to)];
        while let Some((from, to)) = moves.pop() {
            let inside: Vec<u32> = (0..).zip(&self.links).filter(|(_, l)| l.parent == from).map(|(n, _)| n).collect();
            for number in inside {
                let moved = self.links[number as usize];
                self.index.remove(&(from, moved.name));
                let Some(there) = self.index.get(&(to, moved.name)).copied() else {
                    self.index.insert((to, moved.name), number);
                    self.links[number as usize].parent = to;
                    continue;
                };
                let other = self.links[there as usize];
                self.links[there as usize].hides |= moved.hides;
                let is_directory = |node: u32| node != NONE && self.nodes[node as usize].is_directory();
                if is_directory(moved.node) && is_directory(other.node) {
                    if self.nodes[other.node as usize].body == Body::Directory(Standing::Implied) {
                        self.nodes[other.node as usize] = self.nodes[moved.node as usize];
                    }
                    moves.push((moved.node, other.node));
                } else if moved.node != NONE && (other.node == NONE || number > there) {
                    self.links[there as usize].node = moved.node;
                }
                self.links[number as usize].node = NONE;
                self.links[number as usize].hides = false;
            }
        }
        Ok(())
    }

    /// What the root looks like.
    pub fn root_metadata(&self) -> Metadata {
        let mut root = self.root.clone().unwrap_or(Metadata { permissions: 0o755, ..Metadata::default() });
        root.xattrs.retain(|xattr| !xattr.name.starts_with(b"trusted.overlay."));
        root
    }

    /// Where the layer stands.
    pub fn role(&self) -> LayerRole {
        self.role
    }

    /// Hard links whose target the layer did not have when they came: one element for each target, in their order.
    /// Lower layers are asked first, since an entry that came later is not what a link means.
    pub fn pending_links(&self) -> Vec<UnresolvedLink> {
        let named = self.names_of_pending();
        let mut seen = HashSet::new();
        let mut pending = Vec::new();
        for placeholder in &self.unresolved {
            if let Body::Pending { target } = self.nodes[*placeholder as usize].body
                && let Some(path) = named.get(placeholder)
                && seen.insert(target)
            {
                pending.push(UnresolvedLink { target: self.path_among_strings(target), path: path.clone() });
            }
        }
        pending
    }

    /// One name for each placeholder; those that lost all their names need nothing.
    fn names_of_pending(&self) -> HashMap<u32, RelPath> {
        let mut named: HashMap<u32, RelPath> = HashMap::new();
        if self.unresolved.is_empty() {
            return named;
        }
        let ways = self.ways();
        for link in self.links.iter().filter(|link| link.node != NONE) {
            let is_pending = matches!(self.nodes[link.node as usize].body, Body::Pending { .. });
            if is_pending
                && !named.contains_key(&link.node)
                && let Some(path) = self.path_of(link, &ways)
            {
                named.insert(link.node, path);
            }
        }
        named
    }

    fn path_among_strings(&self, target: u32) -> RelPath {
        RelPath::parse(self.strings.get(target)).expect("the path of a link target was valid before")
    }

    /// Resolves hard links to entries that came after them, and lists what is still missing: one element for each
    /// target, in the order the links came. To be asked when all entries were added.
    ///
    /// # Errors
    /// [`TreeError::LinkToDirectory`].
    pub fn unresolved_links(&mut self) -> Result<Vec<UnresolvedLink>, TreeError> {
        let mut named = self.names_of_pending();
        let pending = std::mem::take(&mut self.unresolved);
        for placeholder in pending {
            let Body::Pending { target } = self.nodes[placeholder as usize].body else { continue };
            let Some(path) = named.get(&placeholder) else { continue };
            let target = self.path_among_strings(target);
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
                missing.push(UnresolvedLink { target: self.path_among_strings(target), path });
            }
        }
        Ok(missing)
    }

    /// Brings the file that pending links to `target` name: a copy of what the layers below have there. `names` are
    /// the paths under which it shows there; those that this layer neither has nor hides become names of the copy, so
    /// that all of them still name one file. What was brought before under one of them is not brought again. The
    /// `entry`'s path means nothing.
    ///
    /// # Errors
    /// See [`TreeError`].
    pub fn bring(
        &mut self,
        target: &RelPath,
        entry: &LayerEntry,
        data: &FileData,
        names: &[RelPath],
    ) -> Result<(), TreeError> {
        let Some(string) = self.strings.find(&target.to_bytes()) else { return Ok(()) };
        let mut brought = names.first().and_then(|name| self.brought.get(name)).copied();
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
        let Some(node) = brought else { return Ok(()) };
        for name in names {
            self.claim(name, node)?;
            self.brought.insert(name.clone(), node);
        }
        Ok(())
    }

    /// True if the lower file that shows at `name` was brought before.
    pub fn has_brought(&self, name: &RelPath) -> bool {
        self.brought.contains_key(name)
    }

    /// Makes `path` a name of `node`, unless this layer has or hides something there.
    fn claim(&mut self, path: &RelPath, node: u32) -> Result<(), TreeError> {
        let Some((name, above)) = path.components().split_last() else { return Ok(()) };
        let mut at = Some(ROOT);
        for (part, is_last) in above.iter().map(|part| (part, false)).chain([(name, true)]) {
            let link = at.zip(self.strings.find(part.as_bytes())).and_then(|key| self.index.get(&key));
            let Some(Link { node, hides, .. }) = link.map(|link| self.links[*link as usize]) else {
                at = None;
                continue;
            };
            let is_directory = node == NONE || self.nodes[node as usize].is_directory();
            if hides || !is_directory || (is_last && node != NONE) {
                return Ok(());
            }
            at = (node != NONE).then_some(node);
        }
        let parent = self.directory(path, above)?;
        let link = self.link(parent, name.as_bytes())?;
        self.links[link as usize].node = node;
        Ok(())
    }

    /// The link at `path`, no symbolic links followed.
    fn link_at(&self, path: &RelPath) -> Option<u32> {
        let (name, above) = path.components().split_last()?;
        let mut parent = ROOT;
        for part in above {
            parent = self.child(parent, part.as_bytes())?;
        }
        self.index.get(&(parent, self.strings.find(name.as_bytes())?)).copied()
    }

    /// For each node whether there is more to it than removals: it is no directory, it has an entry or a mark, or
    /// something of that sort lies in it.
    fn with_content(&self, ways: &[u32]) -> Vec<bool> {
        let mut real: Vec<bool> =
            self.nodes.iter().map(|node| node.body != Body::Directory(Standing::Implied)).collect();
        real[ROOT as usize] = true;
        for link in self.links.iter().filter(|link| link.node != NONE) {
            let mut at = link;
            while real[at.node as usize] && !real[at.parent as usize] {
                real[at.parent as usize] = true;
                let Some(above) = self.links.get(ways[at.parent as usize] as usize) else { break };
                at = above;
            }
        }
        real
    }

    /// Whether directory `node` is `above` or lies in it.
    fn is_at_or_below(&self, mut node: u32, above: u32) -> bool {
        let ways = self.ways();
        while node != above && node != ROOT {
            let Some(link) = self.links.get(ways[node as usize] as usize) else { return true };
            node = link.parent;
        }
        node == above
    }

    /// Whether this layer hides what lower ones have in the directory `node`.
    fn is_hidden(&self, mut node: u32, ways: &[u32]) -> bool {
        while node != ROOT {
            let Some(link) = self.links.get(ways[node as usize] as usize) else { return true };
            if link.hides {
                return true;
            }
            node = link.parent;
        }
        false
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
