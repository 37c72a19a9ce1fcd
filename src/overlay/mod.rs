//! The merge of layers: the only place that knows whiteouts and opaque directories.
//!
//! A stack of read-only layers, each seen through [`LayerView`], becomes one tree. What it shows is what the kernel's
//! overlayfs shows for the same layers mounted as lower directories with default options
//! (`Documentation/filesystems/overlayfs.rst`); a property test holds the two against each other. In short:
//!
//! - A whiteout (character device 0/0, or an empty regular file with `trusted.overlay.whiteout`) hides the name in all
//!   layers below and is never shown itself.
//! - A file that is no directory hides everything below; directories of the same name merge, and the topmost one gives
//!   the attributes. `trusted.overlay.opaque` = `y` ends the merge (except on a layer's root, where overlayfs does not
//!   look for it).
//! - `trusted.overlay.redirect` on a directory says under which name the layers below know it.
//! - A file with `trusted.overlay.metacopy` has its content elsewhere; with default options it is not followed and
//!   every access fails.
//! - A directory that is merged from several has a link count of 1; every other file keeps its layer's.
//! - `trusted.overlay.*` attributes are invisible; `trusted.overlay.overlay.x` shows as `trusted.overlay.x`.
//!
//! A file is a [`NodeId`]: a layer and a number in it. That of a merged directory is its topmost part's, and what lies
//! below can be found again from it alone ([`Overlay::parts`]), so nothing has to be remembered between requests.
//!
//! Pure: no cache, no I/O but the views', no clock. It refuses to know where layers come from and what inode numbers
//! the kernel is shown.

mod find;
mod list;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers of a test's own making")]
mod tests;
mod xattr;

use std::ops::ControlFlow;

use crate::model::{Attributes, FileKind, Xattr};

pub use list::{Entry, Listing};

/// A file: which layer it comes from, counted from the lowest (0), and its number there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId {
    /// Index of the layer, 0 is the lowest.
    pub layer: u16,
    /// Number of the file within the layer.
    pub nid: u64,
}

/// Takes name, number and type of an entry, and says whether it wants more.
pub type EachEntry<'a> = dyn FnMut(&[u8], u64, FileKind) -> ControlFlow<()> + 'a;

/// What a layer tells of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// What `stat` would tell.
    pub attributes: Attributes,
    /// False if the file certainly has no extended attributes.
    pub has_xattrs: bool,
}

/// One read-only layer, as the merge sees it. All answers are the layer's own, unmerged.
pub trait LayerView {
    /// Why a layer could not answer.
    type Error: std::error::Error + Send + Sync + 'static;

    /// The root directory.
    fn root(&self) -> u64;

    /// What is to be seen of a file.
    ///
    /// # Errors
    /// The layer could not be read.
    fn look(&self, nid: u64) -> Result<Look, Self::Error>;

    /// The file that `name` names in directory `dir`. Never asked for `.` and `..`.
    ///
    /// # Errors
    /// The layer could not be read.
    fn lookup(&self, dir: u64, name: &[u8]) -> Result<Option<u64>, Self::Error>;

    /// Calls `each` with name, number and type of every entry of `dir`, in the layer's order, without `.` and `..`,
    /// until it breaks.
    ///
    /// # Errors
    /// The layer could not be read.
    fn for_each(&self, dir: u64, each: &mut EachEntry<'_>) -> Result<(), Self::Error>;

    /// The directory that holds directory `dir`: its `..`. The root's is the root.
    ///
    /// # Errors
    /// The layer could not be read.
    fn parent(&self, dir: u64) -> Result<u64, Self::Error>;

    /// The value of one extended attribute under its stored name.
    ///
    /// # Errors
    /// The layer could not be read.
    fn xattr(&self, nid: u64, name: &[u8]) -> Result<Option<Box<[u8]>>, Self::Error>;

    /// All extended attributes under their stored names.
    ///
    /// # Errors
    /// The layer could not be read.
    fn xattrs(&self, nid: u64) -> Result<Vec<Xattr>, Self::Error>;
}

/// Why the merge has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error<E: std::error::Error + 'static> {
    /// A layer could not be read.
    #[error("cannot read layer {layer}")]
    Layer {
        /// Index of the layer, 0 is the lowest.
        layer: u16,
        /// Why not.
        #[source]
        source: E,
    },
    /// A file whose content lies in another file.
    #[error("file {nid} of layer {layer} has trusted.overlay.metacopy: its content lies elsewhere and is not followed")]
    Metacopy {
        /// Index of the layer.
        layer: u16,
        /// Number of the file.
        nid: u64,
    },
    /// A redirect that is no path.
    #[error("directory {nid} of layer {layer} has the invalid redirect {redirect:?}")]
    Redirect {
        /// Index of the layer.
        layer: u16,
        /// Number of the directory.
        nid: u64,
        /// What its `trusted.overlay.redirect` says.
        redirect: String,
    },
    /// A redirect through a name that is none.
    #[error("a redirect leads from directory {nid} of layer {layer} to {redirect:?}, which is no name to look up")]
    Dots {
        /// Index of the layer it leads through, below the one that has it.
        layer: u16,
        /// Number of the directory there.
        nid: u64,
        /// `.` or `..`.
        redirect: String,
    },
    /// The way from a directory up to its root has no end, or a step of it is missing.
    #[error("directory {nid} of layer {layer} cannot be reached from the layer's root")]
    Detached {
        /// Index of the layer.
        layer: u16,
        /// Number of the directory.
        nid: u64,
    },
    /// A directory too large to be merged.
    #[error("directory {nid} of layer {layer} has more than {limit} bytes of names")]
    TooLarge {
        /// Index of the layer.
        layer: u16,
        /// Number of the directory.
        nid: u64,
        /// How many bytes of names can be merged.
        limit: u32,
    },
    /// A number of layers that cannot be stacked.
    #[error("cannot stack {0} layers: 1 to 65535 are possible")]
    LayerCount(usize),
    /// A file of a layer that does not exist.
    #[error("there is no layer {0}")]
    NoLayer(u16),
}

/// What a name stands for in the merged tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The file; of a merged directory the topmost part.
    pub node: NodeId,
    /// What `stat` tells.
    pub attributes: Attributes,
    /// The lower parts of a merged directory, topmost first. Empty for everything else.
    pub below: Vec<NodeId>,
}

impl Found {
    /// True for a directory that has parts in several layers.
    pub const fn is_merged(&self) -> bool {
        !self.below.is_empty()
    }

    /// All parts of a directory, topmost first.
    pub fn parts(&self) -> Vec<NodeId> {
        std::iter::once(self.node).chain(self.below.iter().copied()).collect()
    }
}

/// The layers of one image, merged.
#[derive(Debug)]
pub struct Overlay<V> {
    layers: Vec<V>,
}

impl<V: LayerView> Overlay<V> {
    /// Stacks `layers`, the lowest first.
    ///
    /// # Errors
    /// [`Error::LayerCount`].
    pub fn new(layers: Vec<V>) -> Result<Self, Error<V::Error>> {
        if layers.is_empty() || layers.len() > usize::from(u16::MAX) {
            return Err(Error::LayerCount(layers.len()));
        }
        Ok(Self { layers })
    }

    /// The layers, the lowest first.
    pub fn layers(&self) -> &[V] {
        &self.layers
    }

    /// Layer `index`.
    ///
    /// # Errors
    /// [`Error::NoLayer`].
    pub fn layer(&self, index: u16) -> Result<&V, Error<V::Error>> {
        self.layers.get(usize::from(index)).ok_or(Error::NoLayer(index))
    }

    /// The root of the tree. Every layer's root is part of it.
    ///
    /// # Errors
    /// The topmost layer could not be read.
    pub fn root(&self) -> Result<Found, Error<V::Error>> {
        let mut parts = self.root_parts();
        let node = parts.remove(0);
        let mut attributes = self.attributes(node)?;
        if !parts.is_empty() {
            attributes.nlink = 1;
        }
        Ok(Found { node, attributes, below: parts })
    }

    /// All parts of the root, topmost first.
    pub fn root_parts(&self) -> Vec<NodeId> {
        self.roots(u16::MAX)
    }

    /// The attributes of a file in its layer: for a merged directory all but the link count.
    ///
    /// # Errors
    /// The layer could not be read.
    pub fn attributes(&self, node: NodeId) -> Result<Attributes, Error<V::Error>> {
        self.look(node).map(|look| look.attributes)
    }

    fn look(&self, node: NodeId) -> Result<Look, Error<V::Error>> {
        self.ask(node.layer, |view| view.look(node.nid))
    }

    /// The extended attributes of a file, under the names that are shown, in the layer's order.
    ///
    /// # Errors
    /// The layer could not be read.
    pub fn xattrs(&self, node: NodeId) -> Result<Vec<Xattr>, Error<V::Error>> {
        self.ask(node.layer, |view| shown_xattrs(view, node.nid))
    }

    /// The extended attribute shown as `name`.
    ///
    /// # Errors
    /// The layer could not be read.
    pub fn xattr(&self, node: NodeId, name: &[u8]) -> Result<Option<Box<[u8]>>, Error<V::Error>> {
        self.ask(node.layer, |view| shown_xattr(view, node.nid, name))
    }

    /// The roots of the layers up to `highest`, topmost first.
    fn roots(&self, highest: u16) -> Vec<NodeId> {
        (0..=highest).zip(&self.layers).map(|(layer, view)| NodeId { layer, nid: view.root() }).rev().collect()
    }

    fn ask<T>(&self, layer: u16, question: impl FnOnce(&V) -> Result<T, V::Error>) -> Result<T, Error<V::Error>> {
        question(self.layer(layer)?).map_err(|source| Error::Layer { layer, source })
    }
}

/// The extended attributes of file `nid` of a layer, under the names that the merge shows, in the layer's order.
///
/// # Errors
/// The layer could not be read.
pub fn shown_xattrs<V: LayerView>(view: &V, nid: u64) -> Result<Vec<Xattr>, V::Error> {
    let shown = view.xattrs(nid)?.into_iter().filter_map(|attribute| {
        let name = xattr::shown(&attribute.name)?.into();
        Some(Xattr { name, value: attribute.value })
    });
    Ok(shown.collect())
}

/// The extended attribute of file `nid` of a layer that the merge shows as `name`.
///
/// # Errors
/// The layer could not be read.
pub fn shown_xattr<V: LayerView>(view: &V, nid: u64, name: &[u8]) -> Result<Option<Box<[u8]>>, V::Error> {
    match xattr::stored(name) {
        Some(stored) => view.xattr(nid, &stored),
        None => Ok(None),
    }
}

impl<V: LayerView> LayerView for std::sync::Arc<V> {
    type Error = V::Error;

    fn root(&self) -> u64 {
        (**self).root()
    }

    fn look(&self, nid: u64) -> Result<Look, Self::Error> {
        (**self).look(nid)
    }

    fn lookup(&self, dir: u64, name: &[u8]) -> Result<Option<u64>, Self::Error> {
        (**self).lookup(dir, name)
    }

    fn for_each(&self, dir: u64, each: &mut EachEntry<'_>) -> Result<(), Self::Error> {
        (**self).for_each(dir, each)
    }

    fn parent(&self, dir: u64) -> Result<u64, Self::Error> {
        (**self).parent(dir)
    }

    fn xattr(&self, nid: u64, name: &[u8]) -> Result<Option<Box<[u8]>>, Self::Error> {
        (**self).xattr(nid, name)
    }

    fn xattrs(&self, nid: u64) -> Result<Vec<Xattr>, Self::Error> {
        (**self).xattrs(nid)
    }
}
