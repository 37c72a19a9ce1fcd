//! The snapshots of a node, as containerd asks for them: records and directories from `snapshots`, layers from wherever they
//! are served, and mounts made of both.
//!
//! Guarantees:
//!
//! * What waits for a disk or the kernel does so on threads that may. The preparation of a layer waits for a registry no longer
//!   than is configured, then containerd is left to bring the layer itself.
//! * A commit writes a record, a removal writes a record and renames a directory: containerd makes both while it holds locks
//!   that stop the machine. How much a committed snapshot takes is measured afterwards.
//! * A layer is shown before a snapshot of it is recorded as committed, and as long as one is. After a restart the layers of
//!   all snapshots are shown again before anything is answered, from what was kept; one that cannot be is tried again when
//!   somebody needs it.
//! * Keys are nobody's paths.
//!
//! Refuses to know which layers can be served and how they are shown: see [`layers`].

mod calls;
pub mod diff;
pub mod layers;
pub(crate) mod lazy;
mod links;
mod mapped;
mod mounts;
mod serving;
mod showing;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt as _;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::chain::{Content, Kind, Layer, LayerSlot, Owner, Snapshot};
use crate::grpc::{Mount, SnapshotterError};
use crate::snapshots::{Lower, Snapshots, SnapshotsError, Stack};
use crate::sys::FileError;
use crate::unpack::FillOptions;

use layers::{Layers, Shelves};
use links::Links;
use mapped::{BadLabel, Ids, Mapped};
use mounts::Kernel;
use showing::Shown;

/// How much of a file system a container may write. Nothing here can hold it to that.
const MAX_SIZE: &str = "containerd.io/snapshot/max-size";

/// How many layers are brought back at once. Each mounts and reads a few blocks.
const AT_ONCE: usize = 8;

/// How a node behaves.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// How long the preparation of a layer may wait for others.
    pub prepare_timeout: Duration,
    /// How layers that are served are completed in the background, if they are.
    pub fill: Option<FillOptions>,
    /// A directory for short names, on a file system that forgets at boot.
    pub links: PathBuf,
    /// Whether the files of a container have one device although its layers are file systems of their own.
    pub xino: bool,
    /// A directory for mounts with the ids of user namespaces, likewise.
    pub mapped: PathBuf,
}

/// The snapshots of a node.
#[derive(Debug, Clone)]
pub struct Node(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Goes first: what it shows is shown by the others.
    mapped: Mapped,
    snapshots: Arc<Snapshots>,
    layers: Arc<dyn Layers>,
    shelves: Arc<dyn Shelves>,
    options: NodeOptions,
    links: Links,
    kernel: Kernel,
    runtime: Handle,
    /// Told when something may have become garbage.
    untidy: Arc<Notify>,
    /// Layers that are shown, by number. Never locked while somebody waits for anything.
    shown: Mutex<BTreeMap<LayerSlot, Arc<Shown>>>,
    /// Held by who takes layers down that nothing uses, until they are gone.
    taking_down: Mutex<()>,
    applies: diff::Applies,
}

impl Node {
    /// The node of these snapshots. Nothing is shown yet: see [`Node::bring_back`].
    ///
    /// # Errors
    /// A root whose name cannot stand in the options of a mount.
    pub fn new(
        snapshots: Arc<Snapshots>,
        layers: Arc<dyn Layers>,
        shelves: Arc<dyn Shelves>,
        options: NodeOptions,
        runtime: Handle,
    ) -> anyhow::Result<Self> {
        for path in [snapshots.root(), &options.links, &options.mapped] {
            let clean = path
                .to_str()
                .is_some_and(|path| !path.contains([':', ',', '\\', '"']) && !path.contains(char::is_control));
            anyhow::ensure!(
                clean,
                "cannot serve containerd from {}: its name cannot stand in the options of a mount",
                path.display()
            );
        }
        let links = Links::new(options.links.clone());
        let mapped = Mapped::new(options.mapped.clone());
        let kernel = Kernel::of_this_machine(options.xino);
        let (shown, applies) = (Mutex::default(), diff::Applies::default());
        let untidy = Arc::<Notify>::default();
        let inner = Arc::new(Inner {
            mapped,
            snapshots,
            layers,
            shelves,
            options,
            links,
            kernel,
            runtime,
            untidy: Arc::clone(&untidy),
            shown,
            taking_down: Mutex::default(),
            applies,
        });
        inner.runtime.spawn(showing::keep_tidy(Arc::downgrade(&inner), untidy));
        Ok(Self(inner))
    }

    /// Shows the layers of all snapshots that containerd knows, from what was kept. What cannot be shown is logged.
    pub async fn bring_back(&self) {
        let chain = self.0.snapshots.all();
        let mut wanted = BTreeSet::new();
        for snapshot in chain.walk().filter(|snapshot| is_for_containerd(snapshot)) {
            let mut next = Some(snapshot);
            while let Some(at) = next {
                if let Content::Layer(slot) = at.content {
                    wanted.insert(slot);
                }
                next = at.parent.as_ref().and_then(|parent| chain.stat(parent.as_str()).ok());
            }
        }
        let layers: Vec<Layer> = wanted.into_iter().filter_map(|slot| chain.layer(slot).cloned()).collect();
        let count = layers.len();
        let patience = self.0.options.prepare_timeout;
        let bring = async |layer: Layer| match self.0.show_again(&layer, Instant::now() + patience).await {
            Ok(_) => 1,
            Err(error) => {
                let error: &dyn std::error::Error = error.as_ref();
                tracing::error!(layer = %layer.id, error, "a layer of a snapshot is not shown: who needs it tries again");
                0
            }
        };
        let shown: usize = futures::stream::iter(layers)
            .map(bring)
            .buffer_unordered(AT_ONCE)
            .fold(0, async |sum, one| sum + one)
            .await;
        tracing::info!(snapshots = chain.walk().count(), layers = count, shown, "snapshots are back");
    }

    /// What is known of the layers that are shown: their slots.
    pub fn shown(&self) -> Vec<LayerSlot> {
        self.0.shown().keys().copied().collect()
    }

    /// True if containerd has snapshots whose layers are shown. Those of removed ones are taken down before.
    pub async fn shows_anything(&self) -> bool {
        let looking = self.blocking(|inner| {
            inner.take_down_unused();
            Ok(!inner.shown().is_empty())
        });
        looking.await.unwrap_or(true)
    }

    /// Leaves the layers of snapshots to the next daemon, as far as they go on by themselves.
    pub async fn leave(&self) {
        let leaving = self.blocking(|inner| {
            // What nobody needs any more is not for the next one to find.
            inner.take_down_unused();
            inner.shown().values().for_each(|shown| shown.held.leave());
            Ok(())
        });
        if let Err(error) = leaving.await {
            let error: &dyn std::error::Error = &error;
            tracing::error!(error, "the layers of snapshots are taken away");
        }
    }

    /// Does work that waits for the disk where it may.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, SnapshotterError> + Send + 'static,
    ) -> Result<T, SnapshotterError> {
        let inner = Arc::clone(&self.0);
        let working = self.0.runtime.spawn_blocking(move || work(&inner));
        working.await.unwrap_or(Err(SnapshotterError::Broken))
    }

    /// The mounts of `stack`, when what is below is shown; `is_new` if nobody was told any of it before.
    async fn mounts_of(&self, stack: Stack, is_new: bool) -> Result<Vec<Mount>, SnapshotterError> {
        let missing: Vec<Layer> = {
            let shown = self.0.shown();
            let layers = stack.lowers.iter().filter_map(|lower| match lower {
                Lower::Layer(layer) => Some(layer),
                Lower::Files(_) => None,
            });
            layers.filter(|layer| !shown.contains_key(&layer.slot)).cloned().collect()
        };
        let until = Instant::now() + self.0.options.prepare_timeout;
        let inner = &self.0;
        let show = |layer: Layer| async move { inner.show_again(&layer, until).await };
        let mut showing = futures::stream::iter(missing.into_iter().map(show)).buffer_unordered(AT_ONCE);
        while let Some(shown) = showing.next().await {
            shown.map_err(|error| SnapshotterError::Layers {
                key: stack.snapshot.key.to_string(),
                source: error.into(),
            })?;
        }
        self.blocking(move |inner| inner.mounts(&stack, is_new)).await
    }

    /// Takes away a snapshot that was recorded and cannot be used.
    async fn undo(&self, key: &str) {
        let undone = key.to_owned();
        let undoing = self.blocking(move |inner| {
            let slot = inner.snapshots.stat(&undone)?.slot;
            inner.snapshots.remove(&undone)?;
            inner.mapped.forget(slot);
            Ok(())
        });
        if let Err(error) = undoing.await {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(key, error, "a snapshot that failed stays behind until it is removed");
        }
    }

    /// Makes a snapshot and its mounts, or neither.
    async fn make(
        &self,
        key: String,
        make: impl FnOnce(&Snapshots, &str) -> Result<Stack, SnapshotsError> + Send + 'static,
    ) -> Result<Vec<Mount>, SnapshotterError> {
        let name = key.clone();
        let stack = self.blocking(move |inner| Ok(make(&inner.snapshots, &name)?)).await?;
        let mounts = self.mounts_of(stack.clone(), true).await;
        let owned = match mounts {
            Ok(mounts) => self.blocking(move |inner| inner.own(&stack).map(|()| mounts)).await,
            Err(error) => Err(error),
        };
        if owned.is_err() {
            self.undo(&key).await;
        }
        owned
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.untidy.notify_one();
    }
}

/// Snapshots that containerd has to do with: those it made, and those it found. What was brought for images of this
/// program's own is not its to see: its garbage collection would take everything that it does not know.
fn is_for_containerd(snapshot: &Snapshot) -> bool {
    snapshot.owner == Owner::Client || mounts::is_extraction(&snapshot.labels)
}

impl Inner {
    /// Where what is below `stack` is shown, the nearest first.
    fn lowers(&self, stack: &Stack) -> Result<Vec<PathBuf>, SnapshotterError> {
        let shown = self.shown();
        let lower = |lower: &Lower| match lower {
            Lower::Files(path) => Ok(path.clone()),
            Lower::Layer(layer) => match shown.get(&layer.slot) {
                Some(shown) => Ok(shown.held.path().to_owned()),
                None => Err(SnapshotterError::Layers {
                    key: stack.snapshot.key.to_string(),
                    source: format!("layer {} is not shown", layer.id).into(),
                }),
            },
        };
        stack.lowers.iter().map(lower).collect()
    }

    fn mounts(&self, stack: &Stack, is_new: bool) -> Result<Vec<Mount>, SnapshotterError> {
        let mut lowers = self.lowers(stack)?;
        if let Some(ids) = ids_of(&stack.snapshot)?.filter(|_| !lowers.is_empty() && !self.is_remapped(stack)) {
            lowers = self.mapped.show(stack.snapshot.slot, &ids, &lowers, is_new).map_err(|error| {
                SnapshotterError::Unmapped { key: stack.snapshot.key.to_string(), source: error.into() }
            })?;
        }
        let own = stack.own.as_ref().map_or(0, |own| 2 * own.work.as_os_str().len() + 64);
        if mounts::are_long(own, &lowers) {
            lowers = lowers.into_iter().map(|lower| self.links.short(lower)).collect();
        }
        Ok(mounts::mounts(stack, &lowers, self.kernel))
    }

    /// True if containerd has given the files below to the ids of the user namespace.
    fn is_remapped(&self, stack: &Stack) -> bool {
        let below = stack.snapshot.parent.as_ref().and_then(|parent| self.snapshots.stat(parent.as_str()).ok());
        below.is_some_and(|below| below.labels.contains_key(calls::REMAPPED))
    }

    /// Gives the directory of a new snapshot to whoever has the root of what is below, or to the root of its user namespace,
    /// as containerd's own snapshotters do: the root of a container is what its topmost layer says.
    fn own(&self, stack: &Stack) -> Result<(), SnapshotterError> {
        let Some(own) = stack.own.as_ref().filter(|_| stack.snapshot.kind == Kind::Active) else { return Ok(()) };
        if let Some(limit) = stack.snapshot.labels.get(MAX_SIZE) {
            let key = stack.snapshot.key.as_str();
            tracing::warn!(key, limit, "the size of a snapshot is not limited: label {MAX_SIZE} is ignored");
        }
        let below = || match self.lowers(stack)?.first() {
            // Not a thread that serves it.
            Some(nearest) => {
                let found = std::fs::metadata(nearest).map_err(|error| SnapshotterError::Layers {
                    key: stack.snapshot.key.to_string(),
                    source: FileError::of("look at", nearest)(error).into(),
                })?;
                Ok::<_, SnapshotterError>(Some((found.uid(), found.gid())))
            }
            None => Ok(None),
        };
        let root = match ids_of(&stack.snapshot)? {
            Some(ids) => Some(ids.root),
            None => below()?,
        };
        let Some((user, group)) = root.filter(|root| *root != (0, 0)) else { return Ok(()) };
        std::os::unix::fs::lchown(&own.upper, Some(user), Some(group)).map_err(|source| {
            SnapshotsError::from(crate::store::StoreError::io("change the owner of", &own.upper, source)).into()
        })
    }
}

/// The ids of the user namespace whose container a snapshot is for. What a layer is extracted into is for no container: its
/// labels are the words of whoever made the image.
fn ids_of(snapshot: &Snapshot) -> Result<Option<Ids>, SnapshotterError> {
    if mounts::is_extraction(&snapshot.labels) {
        return Ok(None);
    }
    Ids::asked(&snapshot.labels).map_err(|BadLabel { label, why }| SnapshotterError::Label {
        key: snapshot.key.to_string(),
        label,
        why,
    })
}
