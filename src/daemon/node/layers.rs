//! What a node needs of others about the layers of images: which of them can be served before they are here, and
//! directories that show them.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use futures::future::BoxFuture;

use crate::chain::{Key, Labels, Layer, LayerSlot};
use crate::fetch::LayerImage;

/// Labels of this program's own: they stay when containerd replaces the others, and nobody else sets them.
pub const OWN_LABELS: &str = "headstart.";

/// A preparation that may be of a layer.
#[derive(Debug, Clone)]
pub struct Asked {
    /// The key of the snapshot.
    pub key: String,
    /// The snapshot below; none in parallel mode, whatever the layer.
    pub parent: Option<Key>,
    /// All labels: a stranger's words.
    pub labels: Labels,
}

/// What to do about a preparation.
#[derive(Debug)]
pub enum Offer {
    /// containerd downloads and applies it, for this reason.
    Ordinary(String),
    /// A layer that can be served at once.
    Layer(Offered),
}

/// A layer that can be served at once.
#[derive(Debug)]
pub struct Offered {
    /// The layer.
    pub image: Arc<LayerImage>,
    /// The ChainID under which it is committed.
    pub name: Key,
    /// How containerd is told.
    pub how: How,
    /// What is noted besides what containerd says, under names that begin with [`OWN_LABELS`]: whatever
    /// [`Layers::again`] needs.
    pub labels: Labels,
}

/// How containerd is told that a layer is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// It is committed, and the answer is that it exists already.
    Commit,
    /// It is answered with mounts that can only be read; containerd commits it with its parent.
    Staged,
}

/// Where layers that can be served come from.
pub trait Layers: fmt::Debug + Send + Sync + 'static {
    /// What to do about a preparation. Given up after a while: dropped, it changes nothing.
    fn offer(&self, asked: Asked) -> BoxFuture<'_, Offer>;

    /// A layer that was served before, from what was kept of its image, without its registry. `labels` are those of the
    /// snapshots that it holds.
    fn again<'a>(&'a self, layer: &'a Layer, labels: &'a [Labels]) -> BoxFuture<'a, anyhow::Result<Arc<LayerImage>>>;
}

/// Where layers are shown, each in a directory that overlayfs can take as it is.
pub trait Shelves: fmt::Debug + Send + Sync + 'static {
    /// Shows a layer until what is returned is dropped. `slot` names the directory: the same one after a restart. Waits
    /// for the kernel.
    ///
    /// # Errors
    /// The kernel's, or the layer's.
    fn hold(&self, layer: &Arc<LayerImage>, slot: LayerSlot) -> anyhow::Result<Box<dyn Held>>;
}

/// A layer that is shown. Dropping it waits for the kernel.
pub trait Held: fmt::Debug + Send + Sync {
    /// Where.
    fn path(&self) -> &Path;

    /// From now on it stays when it is dropped, for the next daemon, if it goes on without this one.
    fn leave(&self);
}

/// No layer is served: containerd brings them all.
#[derive(Debug, Clone, Copy)]
pub struct Nothing;

impl Layers for Nothing {
    fn offer(&self, _: Asked) -> BoxFuture<'_, Offer> {
        Box::pin(async { Offer::Ordinary("lazy layers are switched off".to_owned()) })
    }

    fn again<'a>(&'a self, _: &'a Layer, _: &'a [Labels]) -> BoxFuture<'a, anyhow::Result<Arc<LayerImage>>> {
        Box::pin(async { anyhow::bail!("lazy layers are switched off") })
    }
}

impl Shelves for Nothing {
    fn hold(&self, _: &Arc<LayerImage>, _: LayerSlot) -> anyhow::Result<Box<dyn Held>> {
        anyhow::bail!("lazy layers are switched off")
    }
}
