//! Snapshots as a node has them: the rules, their records, the directories of those that are written to, and the
//! layers of the store.
//!
//! ```text
//! <root>/state/snapshots.redb             the records (see `store::records`)
//! <root>/snapshots/<slot>/{upper,work}    files of a snapshot that is no layer; named by its number, never by its key
//! <root>/trash/                           directories of snapshots that are gone, until they are deleted
//! ```
//!
//! A command is one transaction. A directory is made before the record that names it, and moved away after the record is
//! gone; so a crash leaves directories without record, never the contrary, and whoever opens the root next removes
//! them. Deleting is done by a thread of its own: a removal is a rename.
//!
//! Images that are pulled are recorded as snapshots that fill; [`Snapshots::layer_local`] commits them in the order of
//! their chain, each with its parent. What became local while nobody listened is found at the next start.
//!
//! Asking what a snapshot takes counts blocks on disk; it reads no file and fetches nothing. The room refuses to know how
//! a stack is mounted, who asks, and how a layer is filled.

mod error;
mod files;
mod recover;
mod usage;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub use error::SnapshotsError;
use files::Files;
pub use recover::{Recovery, is_local};
pub use usage::usage_of;

use crate::chain::{
    Change, Command, Content, Effect, Filters, Image, Key, Kind, Labels, Layer, LayerId, PulledLayer, Snapshot, Usage,
};
use crate::model::{BlobDigest, ChainId, DiffId, Timestamp};
use crate::store::records::{Records, RecordsError};
use crate::store::{self, Anchor, Store};

/// How often to try again what somebody else has open: less than a person notices, more than a step takes.
const AGAIN: Duration = Duration::from_millis(10);

/// How snapshots are kept.
#[derive(Debug, Clone, Copy)]
pub struct SnapshotsConfig {
    /// Write the files of a snapshot to disk before it is committed. Without it a power cut can leave a committed
    /// snapshot whose files are empty.
    pub sync: bool,
}

impl Default for SnapshotsConfig {
    fn default() -> Self {
        Self { sync: true }
    }
}

/// The snapshots of one root, open to change them. One process at a time has them open.
#[derive(Debug)]
pub struct Snapshots {
    records: Records,
    store: Arc<Store>,
    files: Files,
    config: SnapshotsConfig,
    /// Layers that nothing recorded is made of any more, and whose images may still be there. Held for the time of a look.
    released: Mutex<BTreeSet<LayerId>>,
}

/// What a snapshot is mounted from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stack {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// Where its own files are, if it has any: written to while it is active, shown as they are if it is a view of
    /// nothing.
    pub own: Option<Own>,
    /// What is below, the nearest first.
    pub lowers: Vec<Lower>,
}

/// Directories of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Own {
    /// Its files.
    pub upper: PathBuf,
    /// For overlayfs to work in, on the same file system.
    pub work: PathBuf,
}

/// Something below.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lower {
    /// Files of a committed snapshot.
    Files(PathBuf),
    /// A layer.
    Layer(Layer),
}

/// A layer of an image that is to be recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerSpec {
    /// What its decompressed bytes have to hash to.
    pub diff_id: DiffId,
    /// The blob it comes from.
    pub blob: BlobDigest,
    /// What its bytes are verified against.
    pub anchor: Anchor,
    /// Size of its image, if it is known.
    pub size: Option<u64>,
}

impl LayerSpec {
    /// As records name it.
    pub fn id(&self) -> LayerId {
        LayerId { diff_id: self.diff_id, blob: self.blob, anchor: self.anchor.to_string() }
    }
}

/// An image as it was recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recorded {
    /// The image, with the numbers of its tree and of its layers.
    pub image: Image,
    /// Names of the snapshots that were committed at once, each after its parent.
    pub committed: Vec<Key>,
}

impl Snapshots {
    /// Opens the snapshots of a store, and repairs what a crash left.
    ///
    /// # Errors
    /// See [`SnapshotsError`]; among them that another process has them open.
    pub fn open(store: Arc<Store>, config: SnapshotsConfig) -> Result<(Self, Recovery), SnapshotsError> {
        let records = Records::open(store.root())?;
        let files = Files::open(store.root())?;
        let snapshots = Self { records, store, files, config, released: Mutex::default() };
        let recovery = snapshots.recover()?;
        Ok((snapshots, recovery))
    }

    /// [`Snapshots::open`] as soon as nobody else has them open, at most after `patience`.
    ///
    /// # Errors
    /// As [`Snapshots::open`].
    pub fn open_patiently(
        store: &Arc<Store>,
        config: SnapshotsConfig,
        patience: Duration,
    ) -> Result<Self, SnapshotsError> {
        let deadline = Instant::now() + patience;
        loop {
            match Self::open(Arc::clone(store), config) {
                Ok((snapshots, _)) => return Ok(snapshots),
                Err(SnapshotsError::Records(RecordsError::InUse { .. })) if Instant::now() < deadline => {
                    std::thread::sleep(AGAIN);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Where everything is kept.
    pub fn root(&self) -> &std::path::Path {
        self.store.root()
    }

    fn command(&self, command: &Command) -> Result<Change, SnapshotsError> {
        let change = self.records.apply(command, now(), |change| {
            for effect in &change.effects {
                if let Effect::MakeFiles(slot) = effect {
                    self.files.make(*slot)?;
                }
            }
            Ok::<_, SnapshotsError>(())
        })?;
        for effect in &change.effects {
            if let Effect::DropFiles(slot) = effect {
                self.files.discard(*slot);
            }
        }
        Ok(change)
    }

    /// A snapshot that can be written to, on `parent`.
    ///
    /// # Errors
    /// See [`SnapshotsError`].
    pub fn prepare(&self, key: &str, parent: &str, labels: Labels) -> Result<Stack, SnapshotsError> {
        let (key, parent) = (Key::new(key)?, Key::optional(parent)?);
        self.command(&Command::Prepare { key: key.clone(), parent, labels, layer: None })?;
        self.stack(key.as_str())
    }

    /// A snapshot whose files are a layer: nothing is written to it, and it can be committed.
    ///
    /// # Errors
    /// See [`SnapshotsError`].
    pub fn prepare_layer(
        &self,
        key: &str,
        parent: &str,
        labels: Labels,
        layer: &LayerSpec,
    ) -> Result<Stack, SnapshotsError> {
        let (key, parent) = (Key::new(key)?, Key::optional(parent)?);
        let layer = Some((layer.id(), layer.size));
        self.command(&Command::Prepare { key: key.clone(), parent, labels, layer })?;
        self.stack(key.as_str())
    }

    /// Makes the files of the active snapshot `key` a layer. What it had is gone. Again is as good as once.
    ///
    /// # Errors
    /// See [`SnapshotsError`].
    pub fn become_layer(&self, key: &str, layer: &LayerSpec) -> Result<Snapshot, SnapshotsError> {
        self.command(&Command::Become { key: Key::new(key)?, layer: layer.id(), size: layer.size })?;
        self.stat(key)
    }

    /// The snapshot whose own files are, or were, in the directory `upper`.
    pub fn owner_of(&self, upper: &std::path::Path) -> Option<Snapshot> {
        let slot = self.files.slot_of(upper)?;
        self.records.read(|chain| chain.walk().find(|snapshot| snapshot.slot == slot).cloned())
    }

    /// The directory of a snapshot whose files are no layer.
    pub fn files_of(&self, snapshot: &Snapshot) -> PathBuf {
        self.files.own(snapshot.slot).upper
    }

    /// A snapshot that shows `parent` and cannot be written to.
    ///
    /// # Errors
    /// See [`SnapshotsError`].
    pub fn view(&self, key: &str, parent: &str, labels: Labels) -> Result<Stack, SnapshotsError> {
        let (key, parent) = (Key::new(key)?, Key::optional(parent)?);
        self.command(&Command::View { key: key.clone(), parent, labels })?;
        self.stack(key.as_str())
    }

    /// What the active snapshot or view `key` is mounted from.
    ///
    /// # Errors
    /// See [`SnapshotsError`].
    pub fn stack(&self, key: &str) -> Result<Stack, SnapshotsError> {
        self.records.read(|chain| {
            let mut stack = chain.stack(key)?.into_iter();
            let snapshot = stack.next().expect("a stack begins with the snapshot itself").clone();
            let lower = |of: &Snapshot| match of.content {
                Content::Files => Some(Lower::Files(self.files.own(of.slot).upper)),
                Content::Layer(slot) => chain.layer(slot).cloned().map(Lower::Layer),
            };
            let mut lowers: Vec<Lower> = stack.filter_map(lower).collect();
            // A view has nothing of its own to show, unless it is a view of nothing.
            let own = match (snapshot.content, snapshot.kind) {
                (Content::Files, Kind::View) if !lowers.is_empty() => None,
                (Content::Files, _) => Some(self.files.own(snapshot.slot)),
                (Content::Layer(_), _) => {
                    lowers.splice(0..0, lower(&snapshot));
                    None
                }
            };
            Ok(Stack { snapshot, own, lowers })
        })
    }

    /// Finishes the active snapshot `key`: from then on it is `name`, on `parent` if it had none. What it takes on disk is
    /// not known before it is measured: that takes as long as it has files.
    ///
    /// # Errors
    /// See [`SnapshotsError`].
    pub fn commit(&self, name: &str, key: &str, parent: &str, labels: Labels) -> Result<(), SnapshotsError> {
        let (name, key, parent) = (Key::new(name)?, Key::new(key)?, Key::optional(parent)?);
        let snapshot = self.stat(key.as_str()).ok();
        let own = snapshot.filter(|of| of.kind == Kind::Active && of.content == Content::Files);
        if let Some(snapshot) = own.filter(|_| self.config.sync) {
            self.files.sync(snapshot.slot)?;
        }
        self.command(&Command::Commit { key, name, parent, labels, usage: None })?;
        Ok(())
    }

    /// Measures what a committed snapshot takes on disk, and notes it: it does not change any more. Looks at every file.
    ///
    /// # Errors
    /// See [`SnapshotsError`].
    pub fn measure(&self, name: &str) -> Result<Usage, SnapshotsError> {
        let usage = self.usage(name)?;
        let snapshot = self.stat(name)?;
        if snapshot.content == Content::Files && snapshot.usage.is_none() {
            self.command(&Command::Measured { key: snapshot.key, usage })?;
        }
        Ok(usage)
    }

    /// Ends a snapshot on which nothing stands.
    ///
    /// # Errors
    /// See [`SnapshotsError`].
    pub fn remove(&self, key: &str) -> Result<(), SnapshotsError> {
        let change = self.command(&Command::Remove { key: Key::new(key)? })?;
        let released = change.effects.into_iter().filter_map(|effect| match effect {
            Effect::ReleaseLayer(layer) => Some(layer.id),
            _ => None,
        });
        self.released().extend(released);
        Ok(())
    }

    fn released(&self) -> MutexGuard<'_, BTreeSet<LayerId>> {
        self.released.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Deletes the images of layers that removed snapshots were made of, as far as nothing else that is recorded is made of
    /// them and nobody uses them. How many are left for another time.
    ///
    /// # Errors
    /// Directories that cannot be read or moved.
    pub fn free_released(&self) -> Result<usize, SnapshotsError> {
        let looked_at = self.released().clone();
        let is_there = |id: &LayerId| {
            store::image_path(self.store.root(), &id.blob, &id.anchor).is_some_and(|image| image.exists())
        };
        let mut left: BTreeSet<LayerId> = looked_at.iter().filter(|id| is_there(id)).cloned().collect();
        self.records.read(|chain| {
            for layer in chain.layers() {
                left.remove(&layer.id);
            }
        });
        if !left.is_empty() {
            // Who has begun to need one again has it open.
            self.store.evict_these(&left.iter().map(|id| (id.blob.to_string(), id.anchor.clone())).collect())?;
            left.retain(is_there);
        }
        let mut released = self.released();
        released.retain(|id| left.contains(id) || !looked_at.contains(id));
        Ok(left.len())
    }

    /// The snapshot with this key or name.
    ///
    /// # Errors
    /// See [`SnapshotsError`].
    pub fn stat(&self, key: &str) -> Result<Snapshot, SnapshotsError> {
        Ok(self.records.read(|chain| chain.stat(key).cloned())?)
    }

    /// Changes labels: all of them, or those that `fields` names (`labels.x`).
    ///
    /// # Errors
    /// See [`SnapshotsError`].
    pub fn update(&self, key: &str, labels: Labels, fields: Vec<String>) -> Result<Snapshot, SnapshotsError> {
        self.command(&Command::Update { key: Key::new(key)?, labels, fields })?;
        self.stat(key)
    }

    /// The snapshots that match one of `filters`, or all if there is none, by key.
    ///
    /// # Errors
    /// A filter that cannot be understood.
    pub fn list<S: AsRef<str>>(&self, filters: &[S]) -> Result<Vec<Snapshot>, SnapshotsError> {
        let filters = Filters::parse(filters)?;
        Ok(self.records.read(|chain| chain.list(&filters).cloned().collect()))
    }

    /// What a snapshot takes on disk, without its parents: allocated blocks of its files, or of the image of its layer
    /// as far as it is here.
    ///
    /// # Errors
    /// See [`SnapshotsError`].
    pub fn usage(&self, key: &str) -> Result<Usage, SnapshotsError> {
        let (snapshot, layer) = self.records.read(|chain| {
            let snapshot = chain.stat(key)?;
            let layer = match snapshot.content {
                Content::Layer(slot) => chain.layer(slot),
                Content::Files => None,
            };
            Ok::<_, SnapshotsError>((snapshot.clone(), layer.cloned()))
        })?;
        Ok(usage_of(self.store.root(), &snapshot, layer.as_ref()))
    }

    /// What of a layer is on disk.
    pub fn layer_usage(&self, layer: &Layer) -> Usage {
        usage::of_layer(self.store.root(), layer)
    }

    /// Records an image: each of its layers that is not committed yet becomes a snapshot that fills. Again is as good as
    /// once. What is local already is committed at once.
    ///
    /// # Errors
    /// See [`SnapshotsError`].
    pub fn pull(&self, image: &str, manifest: BlobDigest, layers: &[LayerSpec]) -> Result<Recorded, SnapshotsError> {
        let diff_ids: Vec<DiffId> = layers.iter().map(|layer| layer.diff_id).collect();
        let named = ChainId::of_stack(&diff_ids).into_iter().zip(layers).map(|(name, layer)| {
            Ok(PulledLayer { id: layer.id(), size: layer.size, name: Key::new(&name.to_string())? })
        });
        let layers = named.collect::<Result<_, SnapshotsError>>()?;
        let change = self.command(&Command::Pull { image: image.to_owned(), manifest, layers })?;
        let mut committed: Vec<Key> = change.committed().cloned().collect();
        committed.append(&mut self.find_local()?);
        let image = self.records.read(|chain| chain.image(image).cloned())?;
        Ok(Recorded { image, committed })
    }

    /// Takes note that all of a layer is here and has been verified. What waited for it is committed: the names, each
    /// after its parent. Again is as good as once; a layer that nothing uses any more is no error.
    ///
    /// # Errors
    /// See [`SnapshotsError`].
    pub fn layer_local(&self, layer: &LayerId, size: u64) -> Result<Vec<Key>, SnapshotsError> {
        if !self.records.read(|chain| chain.layers().any(|known| known.id == *layer)) {
            return Ok(Vec::new());
        }
        let change = self.command(&Command::LayerLocal { layer: layer.clone(), size })?;
        Ok(change.committed().cloned().collect())
    }

    /// Takes note that a layer that was local is not complete any more.
    ///
    /// # Errors
    /// See [`SnapshotsError`].
    pub fn layer_lost(&self, layer: &LayerId) -> Result<(), SnapshotsError> {
        self.command(&Command::LayerLost { layer: layer.clone() })?;
        Ok(())
    }

    /// Layers that something waits for.
    pub fn waiting(&self) -> Vec<Layer> {
        self.records.read(|chain| {
            let fill = chain.walk().filter(|snapshot| snapshot.filling.is_some());
            let slots: BTreeSet<_> = fill
                .filter_map(|snapshot| match snapshot.content {
                    Content::Layer(slot) => Some(slot),
                    Content::Files => None,
                })
                .collect();
            slots.into_iter().filter_map(|slot| chain.layer(slot).cloned()).filter(|of| of.local.is_none()).collect()
        })
    }

    /// All layers that snapshots or images use.
    pub fn layers(&self) -> Vec<Layer> {
        self.records.read(|chain| chain.layers().cloned().collect())
    }

    /// All images.
    pub fn images(&self) -> Vec<Image> {
        self.records.read(|chain| chain.images().cloned().collect())
    }

    /// All that is recorded, as it is now.
    pub fn all(&self) -> crate::chain::Chain {
        self.records.read(Clone::clone)
    }

    /// Forgets an image; its snapshots go with the next [`Snapshots::collect`], unless others need them.
    ///
    /// # Errors
    /// See [`SnapshotsError`].
    pub fn forget(&self, image: &str) -> Result<(), SnapshotsError> {
        self.command(&Command::Forget { image: image.to_owned() })?;
        Ok(())
    }

    /// Removes snapshots that were brought for images that nobody names any more, except those in `pinned`.
    ///
    /// # Errors
    /// See [`SnapshotsError`].
    pub fn collect(&self, pinned: &BTreeSet<Key>) -> Result<Vec<Key>, SnapshotsError> {
        let plan = self.records.read(|chain| chain.garbage(pinned));
        let mut removed = Vec::new();
        for key in plan.snapshots {
            match self.command(&Command::Remove { key: key.clone() }) {
                Ok(_) => removed.push(key),
                // Somebody has begun to need it, or has removed it himself.
                Err(error) if error.is_refusal() => tracing::debug!(%key, "garbage stays: {error}"),
                Err(error) => return Err(error),
            }
        }
        Ok(removed)
    }

    /// Waits until the files of all snapshots that were removed before are deleted.
    pub fn cleaned(&self) {
        self.files.cleaned();
    }
}

fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp { seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX), nanos: since.subsec_nanos() }
}

#[cfg(test)]
mod tests;
