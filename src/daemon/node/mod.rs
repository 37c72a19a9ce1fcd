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

pub mod diff;
pub mod layers;
pub(crate) mod lazy;
mod links;
mod mapped;
mod mounts;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use anyhow::Context as _;
use futures::StreamExt as _;
use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::recorder::spec;
use crate::chain::{ChainError, Content, Key, Kind, Labels, Layer, LayerSlot, Owner, Snapshot, Unmet, Usage};
use crate::fetch::LayerImage;
use crate::grpc::{Mount, Prepared, Snapshotter, SnapshotterError, async_trait};
use crate::snapshots::{Lower, Snapshots, SnapshotsError, Stack};
use crate::unpack::{Fill, FillOptions};

use layers::{Asked, Held, How, Layers, OWN_LABELS, Offer, Offered, Shelves};
use links::Links;
use mapped::{BadLabel, Ids, Mapped};
use mounts::Kernel;

/// Noted on a snapshot whose files containerd itself gave to the ids of a user namespace: what stands on it is not to be
/// mapped once more.
const REMAPPED: &str = "headstart.remapped";

/// How containerd calls the snapshot in which it changes the ids of files, for a snapshotter that is not declared to map
/// them: the name under which it commits it, and this.
const REMAP_SUFFIX: &str = "-remap";

/// How much of a file system a container may write. Nothing here can hold it to that.
const MAX_SIZE: &str = "containerd.io/snapshot/max-size";

/// How many layers are brought back at once after a restart. Each mounts and reads a few blocks.
const AT_ONCE: usize = 8;

/// How long to wait for somebody who still uses a layer that is to be deleted: an image that was just opened is remembered
/// for some minutes.
const TIDY_AGAIN: Duration = Duration::from_secs(30);

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
    applies: diff::Applies,
}

/// A layer that is shown. Dropping it waits for the kernel.
#[derive(Debug)]
struct Shown {
    held: Box<dyn Held>,
    /// Ends before the layer does.
    _fill: Option<Fill>,
    image: Arc<LayerImage>,
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
            applies,
        });
        inner.runtime.spawn(keep_tidy(Arc::downgrade(&inner), untidy));
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
        let bring = async |layer: Layer| match self.0.show_again(&layer).await {
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

    /// Leaves the layers of snapshots to the next daemon, as far as they go on by themselves.
    pub async fn leave(&self) {
        let leaving = self.blocking(|inner| {
            // What nobody needs any more is not for the next one to find.
            drop(inner.unused());
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

    /// What `offered` becomes; none if somebody else must bring the layer.
    async fn serve(&self, asked: &Asked, offered: Offered) -> Result<Option<Prepared>, SnapshotterError> {
        let (key, labels, parent) = (asked.key.clone(), asked.labels.clone(), asked.parent.clone());
        self.blocking(move |inner| inner.serve(&key, parent.as_ref(), labels, offered)).await
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
        for layer in missing {
            self.0.show_again(&layer).await.map_err(|error| SnapshotterError::Layers {
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

/// Unmounts layers that no snapshot uses any more, and deletes what was fetched of them, as long as the node is there.
async fn keep_tidy(node: Weak<Inner>, untidy: Arc<Notify>) {
    loop {
        let Some(inner) = node.upgrade() else { return };
        let tidying = tokio::task::spawn_blocking(move || {
            drop(inner.unused());
            inner.snapshots.free_released()
        });
        let left = match tidying.await {
            Ok(Ok(left)) => left,
            Ok(Err(error)) => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(error, "what removed snapshots were made of is not deleted yet");
                1
            }
            Err(_) => 1,
        };
        match left {
            0 => untidy.notified().await,
            // Whoever still uses them may be done then.
            _ => drop(tokio::time::timeout(TIDY_AGAIN, untidy.notified()).await),
        }
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
    fn shown(&self) -> MutexGuard<'_, BTreeMap<LayerSlot, Arc<Shown>>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Layers that are shown and that nothing uses, taken out of the table.
    fn unused(&self) -> Vec<Arc<Shown>> {
        let mut shown = self.shown();
        // Looked at while the table is locked: a layer is recorded before it is in there.
        let used: BTreeSet<LayerSlot> = self.snapshots.layers().into_iter().map(|layer| layer.slot).collect();
        let gone: Vec<LayerSlot> = shown.keys().filter(|slot| !used.contains(slot)).copied().collect();
        gone.into_iter().filter_map(|slot| shown.remove(&slot)).collect()
    }

    /// Shows a layer that is recorded under `slot`. Waits for the kernel.
    fn show(&self, image: &Arc<LayerImage>, slot: LayerSlot) -> anyhow::Result<Arc<Shown>> {
        if let Some(shown) = self.shown().get(&slot) {
            return Ok(Arc::clone(shown));
        }
        let held = self.shelves.hold(image, slot)?;
        let snapshots = Arc::clone(&self.snapshots);
        image.when_local(move |layer, local| {
            if let Err(error) = snapshots.layer_local(&spec(layer).id(), local.size) {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(diff_id = %local.diff_id, error, "cannot write down that a layer is local");
            }
        });
        let fill = self.options.fill.map(|options| Fill::start(&self.runtime, std::slice::from_ref(image), options));
        let fresh = Arc::new(Shown { held, _fill: fill, image: Arc::clone(image) });
        // Whoever was faster has the same directory.
        let kept = Arc::clone(self.shown().entry(slot).or_insert_with(|| Arc::clone(&fresh)));
        Ok(kept)
    }

    /// Shows a layer of earlier, from what was kept of it.
    async fn show_again(self: &Arc<Self>, layer: &Layer) -> anyhow::Result<Arc<Shown>> {
        let labels: Vec<Labels> = {
            let all = self.snapshots.all();
            let of_it = all.walk().filter(|snapshot| snapshot.content == Content::Layer(layer.slot));
            of_it.map(|snapshot| snapshot.labels.clone()).collect()
        };
        let again = self.layers.again(layer, &labels);
        let image = tokio::time::timeout(self.options.prepare_timeout, again)
            .await
            .with_context(|| format!("layer {} does not come in time", layer.id))??;
        anyhow::ensure!(
            spec(&image).id() == layer.id,
            "what was kept for layer {} is layer {}",
            layer.id,
            spec(&image).id()
        );
        let (inner, slot) = (Arc::clone(self), layer.slot);
        let showing = self.runtime.spawn_blocking(move || inner.show(&image, slot));
        showing.await.context("the thread that shows a layer broke down")?
    }

    fn serve(
        &self,
        key: &str,
        parent: Option<&Key>,
        mut labels: Labels,
        offered: Offered,
    ) -> Result<Option<Prepared>, SnapshotterError> {
        let Offered { image, name, how, labels: noted } = offered;
        labels.extend(noted);
        if how == How::Commit
            && let Ok(there) = self.snapshots.stat(name.as_str())
        {
            return self.serve_known(&there, parent, &labels, &image);
        }
        let parent = parent.map_or("", Key::as_str);
        let stack = self.snapshots.prepare_layer(key, parent, labels.clone(), &spec(&image))?;
        let Content::Layer(slot) = stack.snapshot.content else { return Err(SnapshotterError::Broken) };
        let shown = self.show(&image, slot);
        let served = match (shown, how) {
            (Err(error), _) => Err(SnapshotterError::Layers { key: key.to_owned(), source: error.into() }),
            (Ok(_), How::Staged) => return self.mounts(&stack, true).map(Prepared::Mounts).map(Some),
            (Ok(_), How::Commit) => match self.snapshots.commit(name.as_str(), key, parent, labels.clone()) {
                Ok(()) => return Ok(Some(Prepared::There(name.to_string()))),
                Err(error) => Err(error.into()),
            },
        };
        self.snapshots.remove(key)?;
        match served {
            // Another namespace was faster.
            Err(SnapshotterError::Snapshots(error))
                if matches!(error.refusal(), Some(ChainError::AlreadyExists { .. })) =>
            {
                let there = self.snapshots.stat(name.as_str())?;
                let parent = Key::optional(parent).map_err(SnapshotsError::from)?;
                self.serve_known(&there, parent.as_ref(), &labels, &image)
            }
            other => other,
        }
    }

    /// The layer is there already, by another namespace or by a pull of this program.
    fn serve_known(
        &self,
        there: &Snapshot,
        parent: Option<&Key>,
        labels: &Labels,
        image: &LayerImage,
    ) -> Result<Option<Prepared>, SnapshotterError> {
        if !self.is_as_good(there, image) {
            tracing::warn!(name = %there.key, "a layer is known from another blob and was not verified: containerd brings it");
            return Ok(None);
        }
        if there.kind != Kind::Committed || there.parent.as_ref() != parent {
            let found = there.parent.as_ref().map(Key::as_str);
            tracing::warn!(name = %there.key, found, "a layer is known with another parent: containerd brings it again");
            return Ok(None);
        }
        // containerd looks for what it said: the label of the layer, which a pull of ours did not have.
        let new: Vec<String> = labels
            .iter()
            .filter(|(name, value)| there.labels.get(*name) != Some(value))
            .map(|(name, _)| format!("labels.{name}"))
            .collect();
        if !mounts::is_extraction(&there.labels) && !new.is_empty() {
            self.snapshots.update(there.key.as_str(), labels.clone(), new)?;
        }
        Ok(Some(Prepared::There(there.key.to_string())))
    }

    /// True if the files of `there` are those of `image`. What a ChainID stands for is the word of whoever published an
    /// image until its layers were hashed as a whole; one publisher's does not hold for another's image.
    fn is_as_good(&self, there: &Snapshot, image: &LayerImage) -> bool {
        let Content::Layer(slot) = there.content else { return true };
        let (wanted, all) = (spec(image).id(), self.snapshots.all());
        all.layer(slot)
            .is_some_and(|layer| layer.id == wanted || (layer.local.is_some() && layer.id.diff_id == wanted.diff_id))
    }

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
        below.is_some_and(|below| below.labels.contains_key(REMAPPED))
    }

    /// Gives the directory of a new snapshot to whoever has the root of what is below, or to the root of its user namespace,
    /// as containerd's own snapshotters do: the root of a container is what its topmost layer says.
    fn own(&self, stack: &Stack) -> Result<(), SnapshotterError> {
        let Some(own) = stack.own.as_ref().filter(|_| stack.snapshot.kind == Kind::Active) else { return Ok(()) };
        if let Some(limit) = stack.snapshot.labels.get(MAX_SIZE) {
            let key = stack.snapshot.key.as_str();
            tracing::warn!(key, limit, "the size of a snapshot is not limited: label {MAX_SIZE} is ignored");
        }
        let root = match ids_of(&stack.snapshot)? {
            Some(ids) => Some(ids.root),
            // Not a thread that serves it.
            None => self.lowers(stack)?.first().and_then(|nearest| {
                let found = std::fs::metadata(nearest).ok()?;
                Some((found.uid(), found.gid()))
            }),
        };
        let Some((user, group)) = root.filter(|root| *root != (0, 0)) else { return Ok(()) };
        std::os::unix::fs::lchown(&own.upper, Some(user), Some(group)).map_err(|source| {
            SnapshotsError::from(crate::store::StoreError::io("change the owner of", &own.upper, source)).into()
        })
    }

    fn commit(&self, name: &str, key: &str, parent: &str, mut labels: Labels) -> Result<(), SnapshotterError> {
        let active = self.snapshots.stat(key).ok();
        if let Some(active) = &active {
            let own = active.labels.iter().filter(|(label, _)| label.starts_with(OWN_LABELS));
            labels.extend(own.map(|(label, value)| (label.clone(), value.clone())));
        }
        if is_remap(name, key) {
            labels.insert(REMAPPED.to_owned(), "containerd".to_owned());
        }
        self.snapshots.commit(name, key, parent, labels)?;
        if let Some(active) = active {
            self.mapped.forget(active.slot);
        }
        Ok(())
    }

    fn remove(&self, key: &str) -> Result<(), SnapshotterError> {
        match self.snapshots.remove(key) {
            // An image of this program's own needs it: containerd forgets it all the same.
            Err(error)
                if matches!(
                    error.refusal(),
                    Some(ChainError::FailedPrecondition { unmet: Unmet::Held { .. }, .. })
                ) && self.forgotten(key)? =>
            {
                Ok(())
            }
            other => Ok(other?),
        }
    }

    /// Takes away what makes a snapshot of this program's own one of containerd's. False if it is containerd's.
    fn forgotten(&self, key: &str) -> Result<bool, SnapshotsError> {
        let is_ours = self.snapshots.stat(key)?.owner == Owner::Images;
        if is_ours {
            self.snapshots.update(key, Labels::new(), Vec::new())?;
        }
        Ok(is_ours)
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

/// True if containerd commits a snapshot in which it changed the ids of files. Both are `NAMESPACE/NUMBER/NAME`.
fn is_remap(name: &str, key: &str) -> bool {
    let own = |key: &str| key.splitn(3, '/').nth(2).unwrap_or(key).to_owned();
    own(key) == own(name) + REMAP_SUFFIX
}

#[async_trait]
impl Snapshotter for Node {
    async fn prepare(&self, key: String, parent: String, labels: Labels) -> Result<Prepared, SnapshotterError> {
        if mounts::is_extraction(&labels) {
            let below = Key::optional(&parent).map_err(SnapshotsError::from)?;
            let asked = Asked { key: key.clone(), parent: below, labels: labels.clone() };
            let offered =
                tokio::time::timeout(self.0.options.prepare_timeout, self.0.layers.offer(asked.clone())).await;
            match offered {
                Ok(Offer::Layer(offered)) => match self.serve(&asked, offered).await {
                    Ok(Some(prepared)) => return Ok(prepared),
                    Ok(None) => {}
                    // What is refused is refused to containerd's own layer as well.
                    Err(SnapshotterError::Snapshots(error)) if error.is_refusal() => return Err(error.into()),
                    Err(error) => {
                        let error: &dyn std::error::Error = &error;
                        tracing::error!(key, error, "a layer cannot be served: containerd brings it");
                    }
                },
                Ok(Offer::Ordinary(why)) => tracing::info!(key, why, "containerd brings a layer"),
                Err(_) => tracing::warn!(key, "the registry takes too long: containerd brings a layer"),
            }
        }
        let make = move |snapshots: &Snapshots, key: &str| snapshots.prepare(key, &parent, labels);
        self.make(key, make).await.map(Prepared::Mounts)
    }

    async fn view(&self, key: String, parent: String, labels: Labels) -> Result<Vec<Mount>, SnapshotterError> {
        self.make(key, move |snapshots, key| snapshots.view(key, &parent, labels)).await
    }

    async fn mounts(&self, key: String) -> Result<Vec<Mount>, SnapshotterError> {
        let stack = self.0.snapshots.stack(&key)?;
        self.mounts_of(stack, false).await
    }

    async fn commit(&self, name: String, key: String, parent: String, labels: Labels) -> Result<(), SnapshotterError> {
        let committed = name.clone();
        self.blocking(move |inner| inner.commit(&committed, &key, &parent, labels)).await?;
        // Nobody waits for it.
        let inner = Arc::clone(&self.0);
        let measuring = self.0.runtime.spawn_blocking(move || {
            if let Err(error) = inner.snapshots.measure(&name)
                && !error.is_refusal()
            {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(name, error, "a snapshot cannot be measured");
            }
        });
        drop(measuring);
        Ok(())
    }

    async fn remove(&self, key: String) -> Result<(), SnapshotterError> {
        self.blocking(move |inner| {
            let before = inner.snapshots.stat(&key).ok();
            inner.remove(&key)?;
            if let Some(before) = before {
                inner.mapped.forget(before.slot);
                if before.kind == Kind::Active {
                    inner.applies.gone(&before);
                }
            }
            Ok(())
        })
        .await?;
        self.0.untidy.notify_one();
        Ok(())
    }

    async fn stat(&self, key: String) -> Result<Snapshot, SnapshotterError> {
        Ok(self.0.snapshots.stat(&key)?)
    }

    async fn update(&self, key: String, labels: Labels, fields: Vec<String>) -> Result<Snapshot, SnapshotterError> {
        self.blocking(move |inner| Ok(inner.snapshots.update(&key, labels, fields)?)).await
    }

    async fn list(&self, filters: Vec<String>) -> Result<Vec<Snapshot>, SnapshotterError> {
        // A filter may be slow on many.
        self.blocking(move |inner| {
            let mut found = inner.snapshots.list(&filters)?;
            found.retain(is_for_containerd);
            Ok(found)
        })
        .await
    }

    async fn usage(&self, key: String) -> Result<Usage, SnapshotterError> {
        self.blocking(move |inner| Ok(inner.snapshots.usage(&key)?)).await
    }

    async fn cleanup(&self) -> Result<(), SnapshotterError> {
        self.0.untidy.notify_one();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
