//! From a name to a file, and from a directory back to its parts.

use std::ops::ControlFlow;

use crate::model::{Attributes, FileKind, Name};

use super::{Error, Found, LayerView, Look, NodeId, Overlay};

/// Deepest directory whose lower parts can be found again. A path of `PATH_MAX` has at most 2,048 components; trees can
/// be made deeper by steps, but layers come as tars, whose paths are written out.
const MAX_DEPTH: usize = 2048;

/// How the layers below know what is looked for.
enum Target {
    /// By this name in the parts of the directory.
    Name(Vec<u8>),
    /// By this path from each layer's root: a redirect said so.
    Path(Vec<Vec<u8>>),
}

/// What is known on the way down the layers.
struct Search {
    target: Target,
    /// A directory was found: below, only directories count.
    is_dir: bool,
    /// Layers below have no say.
    stop: bool,
}

impl<V: LayerView> Overlay<V> {
    /// What `name` stands for in the directory whose parts are `parts` (topmost first, as [`Found::parts`] and
    /// [`Self::parts`] give them). None also for a whiteout. Never ask for `.` and `..`.
    ///
    /// # Errors
    /// A layer could not be read, or the file is one that overlayfs refuses, too.
    pub fn lookup(&self, parts: &[NodeId], name: &[u8]) -> Result<Option<Found>, Error<V::Error>> {
        let mut search = Search { target: Target::Name(name.to_vec()), is_dir: false, stop: false };
        let mut found: Vec<(NodeId, Attributes)> = Vec::new();
        let mut from_roots = false;
        let mut parts = std::borrow::Cow::Borrowed(parts);
        let mut at = 0;
        while let Some(&part) = parts.get(at) {
            if let Some(hit) = self.step(part, &mut search)? {
                found.push(hit);
            }
            if search.stop {
                break;
            }
            at += 1;
            if !from_roots && matches!(search.target, Target::Path(_)) {
                // From here on all layers below take part, not only those that have a part of this directory.
                from_roots = true;
                parts = match part.layer.checked_sub(1) {
                    Some(next) => self.roots(next).into(),
                    None => Vec::new().into(),
                };
                at = 0;
            }
        }
        let mut found = found.into_iter();
        let Some((node, mut attributes)) = found.next() else { return Ok(None) };
        let below: Vec<NodeId> = found.map(|(node, _)| node).collect();
        if !below.is_empty() {
            attributes.nlink = 1;
        }
        Ok(Some(Found { node, attributes, below }))
    }

    /// Looks for the target in one layer.
    fn step(&self, base: NodeId, search: &mut Search) -> Result<Option<(NodeId, Attributes)>, Error<V::Error>> {
        let names = match &search.target {
            Target::Name(name) => vec![name.clone()],
            Target::Path(names) => names.clone(),
        };
        let mut here = base;
        let mut hit = None;
        for (depth, name) in names.iter().enumerate() {
            let is_last = depth + 1 == names.len();
            // How many names follow: a redirect on the way may change those before, never those behind.
            let behind = names.len() - depth - 1;
            let Some((node, attributes)) = self.single(here, name, behind, is_last, search)? else { return Ok(None) };
            if !is_last && attributes.kind != FileKind::Directory {
                return Ok(None);
            }
            here = node;
            hit = Some((node, attributes));
        }
        Ok(hit)
    }

    /// Looks for one name in one directory of one layer.
    fn single(
        &self,
        dir: NodeId,
        name: &[u8],
        behind: usize,
        is_last: bool,
        search: &mut Search,
    ) -> Result<Option<(NodeId, Attributes)>, Error<V::Error>> {
        if let b"." | b".." = name {
            let redirect = String::from_utf8_lossy(name).into_owned();
            return Err(Error::Dots { layer: dir.layer, nid: dir.nid, redirect });
        }
        if name.len() > Name::MAX_LEN {
            return Ok(None);
        }
        let Some(nid) = self.ask(dir.layer, |view| view.lookup(dir.nid, name))? else { return Ok(None) };
        let node = NodeId { layer: dir.layer, nid };
        let look = self.look(node)?;
        let attributes = look.attributes;
        if self.is_whiteout(node, &look)? {
            search.stop = true;
            return Ok(None);
        }
        if attributes.kind != FileKind::Directory {
            search.stop = true;
            if search.is_dir || !is_last {
                return Ok(None);
            }
            if self.is_marked(node, &look, b"metacopy")? {
                return Err(Error::Metacopy { layer: node.layer, nid });
            }
            return Ok(Some((node, attributes)));
        }
        if is_last {
            search.is_dir = true;
        }
        if node.layer > 0 {
            let marks = self.marks(node, &look)?;
            if marks.opaque {
                search.stop = true;
            } else if let Some(redirect) = marks.redirect {
                self.redirect(node, &redirect, behind, search)?;
            }
        }
        Ok(Some((node, attributes)))
    }

    /// Follows the redirect of directory `node`, which is followed by `behind` more names of the target.
    fn redirect(
        &self,
        node: NodeId,
        redirect: &[u8],
        behind: usize,
        search: &mut Search,
    ) -> Result<(), Error<V::Error>> {
        let redirect = redirect.split(|b| *b == 0).next().unwrap_or_default();
        let invalid = || Error::Redirect {
            layer: node.layer,
            nid: node.nid,
            redirect: String::from_utf8_lossy(redirect).into_owned(),
        };
        // What the names are shows where they are looked up, as in the kernel.
        let check = |name: &[u8]| match name {
            [] => Err(invalid()),
            name if name.contains(&b'/') => Err(invalid()),
            name => Ok(name.to_vec()),
        };
        if let Some(path) = redirect.strip_prefix(b"/") {
            let mut names = path.split(|b| *b == b'/').map(check).collect::<Result<Vec<_>, _>>()?;
            if let Target::Path(old) = &search.target {
                names.extend(old.iter().skip(old.len() - behind).cloned());
            }
            // An opaque directory on the way here says nothing about the place that is meant now.
            search.stop = false;
            search.target = Target::Path(names);
        } else {
            let name = check(redirect)?;
            match &mut search.target {
                Target::Name(old) => *old = name,
                Target::Path(old) => {
                    let at = old.len().checked_sub(behind + 1).ok_or_else(invalid)?;
                    if let Some(old) = old.get_mut(at) {
                        *old = name;
                    }
                }
            }
        }
        Ok(())
    }

    /// True if a file of a layer is overlayfs's mark of a removed one.
    pub(super) fn is_whiteout(&self, node: NodeId, look: &Look) -> Result<bool, Error<V::Error>> {
        let is_empty = look.attributes.size == 0;
        Ok(look.attributes.is_whiteout() || (is_empty && self.is_marked(node, look, b"whiteout")?))
    }

    /// All parts of the directory whose topmost part is `top`, topmost first: what [`Found::parts`] said when it was
    /// looked up. Costs a walk from the layer's root; callers remember the answer where they can.
    ///
    /// # Errors
    /// A layer could not be read, or [`Error::Detached`].
    pub fn parts(&self, top: NodeId) -> Result<Vec<NodeId>, Error<V::Error>> {
        let mut parts = self.roots(top.layer);
        for name in self.path_in_layer(top)?.iter().rev() {
            parts = match self.lookup(&parts, name)? {
                Some(found) if found.node.layer == top.layer => found.parts(),
                _ => return Err(Error::Detached { layer: top.layer, nid: top.nid }),
            };
        }
        match parts.first() {
            Some(first) if *first == top => Ok(parts),
            _ => Err(Error::Detached { layer: top.layer, nid: top.nid }),
        }
    }

    /// The names that lead from a layer's root to directory `dir`, innermost first.
    fn path_in_layer(&self, dir: NodeId) -> Result<Vec<Vec<u8>>, Error<V::Error>> {
        let detached = || Error::Detached { layer: dir.layer, nid: dir.nid };
        let root = self.layer(dir.layer)?.root();
        let mut path = Vec::new();
        let mut here = dir.nid;
        while here != root {
            if path.len() == MAX_DEPTH {
                return Err(detached());
            }
            let parent = self.ask(dir.layer, |view| view.parent(here))?;
            let mut name = None;
            self.ask(dir.layer, |view| {
                view.for_each(parent, &mut |entry, nid, _| {
                    if nid == here {
                        name = Some(entry.to_vec());
                        return ControlFlow::Break(());
                    }
                    ControlFlow::Continue(())
                })
            })?;
            path.push(name.ok_or_else(detached)?);
            here = parent;
        }
        Ok(path)
    }
}
