//! What a layer needs from those below it: targets of hard links, and the looks of directories it has no entry for.

use std::collections::{HashMap, HashSet};

use super::content::FileData;
use super::error::TreeError;
use super::tree::{Body, Link, NONE, ROOT, Tree};
use crate::model::{LayerEntry, Metadata, RelPath};

/// A hard link target that the layer does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnresolvedLink {
    /// The path that the link names.
    pub target: RelPath,
    /// A link that names it (there may be more).
    pub path: RelPath,
}

impl Tree {
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
