//! Layers that containerd has downloaded and wants applied to snapshots of this node: each becomes an EROFS image in the
//! store, and the snapshot's files become that layer.
//!
//! The stack below a layer is looked into where its tar does not say all. It is what its parents are; in parallel mode,
//! where it has no parent yet, what its labels say: layers that are being applied at the same moment, or will be, are
//! waited for. So layers of an image are applied all at once, and each ends after the one below it. What another differ has
//! applied lies in the directory of its snapshot, and is looked into there.
//!
//! Guarantees: a snapshot becomes a layer when the image is complete, safe on disk and shown, or stays as it was. Nobody waits
//! for a snapshot that is gone, or that was finished by somebody else.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Buf as _, Bytes};
use futures::future::BoxFuture;
use tokio::sync::mpsc;
use tonic::transport::Channel;

use super::Node;
use super::layers::{Asked, Layers, Offer};
use crate::chain::{Chain, Content, Kind, Labels, Layer, Snapshot, SnapshotSlot};
use crate::convert::below::{Below, LayerBelow};
use crate::daemon::recorder::spec;
use crate::fetch::{Fetcher, LayerImage};
use crate::grpc::{self, Differ, DifferError, Given, Order, Uncompressed, async_trait};
use crate::model::{Algorithm, BlobDigest, ChainId, DiffId, Digest};
use crate::oci::LayerKind;
use crate::oci::labels::SNAPSHOT_REF;
use crate::store::{Anchor, StoreError, Verdict};
use crate::unpack::{Apply, Place, Told, applied_before, identity_of};

/// The stack below, of a snapshot that has no parent yet. containerd sets it since 2.3.
const PARENT_CHAIN: &str = "containerd.io/snapshot/parent-chain-id";

/// Most layers of a stack: overlayfs takes no more.
const MOST_BELOW: usize = 500;

/// Snapshots into which layers are being applied, or whose layers are waited for. Those of two pulls are two, whatever they
/// are to become: one may be given up.
type Waited = HashMap<SnapshotSlot, Told>;

/// Locked across a look into the records, so that nobody waits for a layer that has just been finished.
#[derive(Debug, Default)]
pub(super) struct Applies(Mutex<Waited>);

impl Applies {
    fn table(&self) -> MutexGuard<'_, Waited> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A snapshot is gone: whoever waits for its layer waits in vain.
    pub(super) fn gone(&self, snapshot: &Snapshot) {
        self.table().remove(&snapshot.slot);
    }

    /// A snapshot is committed. If others have applied its layer, it is in `directory`.
    pub(super) fn committed(&self, snapshot: &Snapshot, directory: PathBuf) {
        if let Some(told) = self.table().remove(&snapshot.slot)
            && snapshot.content == Content::Files
        {
            told.tell(Below::Unpacked { directory: directory.into() });
        }
    }
}

/// Where the bytes of layers come from.
#[derive(Debug, Clone)]
pub struct ContentStore {
    /// containerd's content service.
    pub containerd: Channel,
    /// Its directory of blobs, which is faster where it can be read.
    pub directory: PathBuf,
}

/// Applies layers to the snapshots of a node.
#[derive(Clone)]
pub struct NodeDiffer {
    node: Node,
    fetcher: Fetcher,
    content: ContentStore,
}

impl std::fmt::Debug for NodeDiffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NodeDiffer").field("content", &self.content).finish_non_exhaustive()
    }
}

/// What is to be done, once it is known.
struct Plan {
    snapshot: Snapshot,
    apply: Apply,
}

/// What a snapshot stands on.
struct Ground {
    /// What the stack is called, if somebody says so.
    called: Option<ChainId>,
    /// Its layers, the lowest first.
    layers: Vec<LayerBelow>,
    /// Those of them that others may know as something else, see [`identity_of`].
    images: Vec<DiffId>,
}

/// Tells the thread to end when nobody waits any more.
#[derive(Default)]
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[async_trait]
impl Differ for NodeDiffer {
    async fn apply(&self, order: Order) -> Result<Uncompressed, DifferError> {
        if !matches!(LayerKind::of(&order.media_type), LayerKind::Tar(_)) {
            return Err(DifferError::NotOurs(format!("{:?} is no tar", order.media_type)));
        }
        let stop = Stop::default();
        let (differ, asked, stopped) = (self.clone(), order.clone(), Arc::clone(&stop.0));
        let plan = self.blocking(move || differ.plan(&asked, stopped)).await?;
        let Plan { snapshot, .. } = &plan;
        if let Content::Layer(slot) = snapshot.content {
            // It was applied, and whoever asked did not hear of it.
            let chain = self.node.0.snapshots.all();
            let known = chain.layer(slot).filter(|layer| layer.id.blob == order.blob);
            let known = known.ok_or_else(|| DifferError::NotOurs("the snapshot is another layer".to_owned()))?;
            return Ok(Uncompressed { diff_id: known.id.diff_id, size: None });
        }
        let differ = self.clone();
        let done = self.blocking(move || differ.carry_out(plan, &order)).await;
        drop(stop);
        done
    }
}

impl NodeDiffer {
    /// For the snapshots of `node`, with bytes from `content`.
    pub const fn new(node: Node, fetcher: Fetcher, content: ContentStore) -> Self {
        Self { node, fetcher, content }
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, DifferError> + Send + 'static,
    ) -> Result<T, DifferError> {
        self.node.0.runtime.spawn_blocking(work).await.unwrap_or(Err(DifferError::Broken))
    }

    /// Which snapshot is meant, and what it stands on.
    fn plan(&self, order: &Order, stop: Arc<AtomicBool>) -> Result<Plan, DifferError> {
        let inner = &self.node.0;
        let not_ours = |why: &str| DifferError::NotOurs(why.to_owned());
        let upper = upper_of(&order.mounts).ok_or_else(|| not_ours("the mounts are not written to"))?;
        let snapshot = inner.snapshots.owner_of(upper).ok_or_else(|| not_ours("the mounts are not of this program"))?;
        if snapshot.kind != Kind::Active {
            return Err(not_ours("the snapshot is finished"));
        }
        let chain = chain_of(&snapshot.labels);
        let (Ground { called, layers: below, images }, told) = {
            let mut table = inner.applies.table();
            let all = inner.snapshots.all();
            let ground = self.below(&all, &snapshot, &mut table)?;
            (ground, table.entry(snapshot.slot).or_default().clone())
        };
        let place = match chain {
            Some(chain) if below.is_empty() || called.is_some() => Place::Known { chain, below: called, images },
            _ => Place::Private(private(&snapshot)),
        };
        let apply = Apply {
            fetcher: self.fetcher.clone(),
            runtime: inner.runtime.clone(),
            blob: order.blob,
            size: order.size,
            place,
            below,
            told,
            stop,
        };
        Ok(Plan { snapshot, apply })
    }

    /// What `snapshot` stands on.
    fn below(&self, all: &Chain, snapshot: &Snapshot, table: &mut Waited) -> Result<Ground, DifferError> {
        let (mut layers, mut images) = (Vec::new(), Vec::new());
        let mut next = next_below(all, snapshot)?;
        let called = match (&next, &snapshot.parent) {
            (Some(below), Some(_)) => chain_of(&below.labels),
            _ => stated_parent(&snapshot.labels),
        };
        while let Some(at) = next {
            if layers.len() == MOST_BELOW {
                return Err(DifferError::NotOurs(format!("it stands on more than {MOST_BELOW} layers")));
            }
            layers.push(match at.content {
                Content::Layer(slot) => match all.layer(slot) {
                    Some(layer) => {
                        // A tar that is kept under its stack was unpacked upon tars alone.
                        let plain = chain_of(&at.labels).map(|chain| Anchor::Tar(chain).to_string());
                        if plain.as_ref() != Some(&layer.id.anchor) {
                            images.push(identity_of(layer.id.diff_id, &layer.id.blob, &layer.id.anchor));
                        }
                        self.known(layer)?
                    }
                    None => return Err(DifferError::Broken),
                },
                // Somebody applies it at this moment, or is about to.
                Content::Files if at.kind == Kind::Active => table.entry(at.slot).or_default().below(),
                Content::Files => {
                    let directory = self.node.0.snapshots.files_of(at).into();
                    Told::known(Below::Unpacked { directory }).below()
                }
            });
            next = next_below(all, at)?;
        }
        layers.reverse();
        images.reverse();
        Ok(Ground { called, layers, images })
    }

    /// A layer that is recorded: here, or to be read as it comes.
    fn known(&self, layer: &Layer) -> Result<LayerBelow, DifferError> {
        let unknown = |why: String| DifferError::Layers(why.into());
        let failed = |error: StoreError| DifferError::Layers(Box::new(error));
        let anchor: Anchor = layer.id.anchor.parse().map_err(|error| DifferError::Layers(Box::new(error)))?;
        let file = self.fetcher.store().existing(&layer.id.blob, anchor).map_err(failed)?;
        let file = file.filter(|file| matches!(file.verdict(), Verdict::Verified(_)));
        // What is read as a file must not lose chunks meanwhile.
        let pinned = file.map(|file| Ok(file.pin()?.map(|pin| (file, pin)))).transpose().map_err(failed)?.flatten();
        let below = match pinned {
            Some((file, pin)) => {
                let image = File::open(file.image_path()).map_err(|error| DifferError::Layers(Box::new(error)))?;
                Below::Local { image: Arc::new(image), pin: Some(Arc::new(pin)) }
            }
            None => match self.node.0.shown().get(&layer.slot) {
                Some(shown) => Below::Lazy { layer: Arc::clone(&shown.image) },
                None => return Err(unknown(format!("layer {} is neither here nor shown", layer.id))),
            },
        };
        Ok(Told::known(below).below())
    }

    fn carry_out(&self, plan: Plan, order: &Order) -> Result<Uncompressed, DifferError> {
        let inner = &self.node.0;
        let Plan { snapshot, apply } = plan;
        let namespace = order.namespace.as_deref().unwrap_or_else(|| namespace_of(snapshot.key.as_str()));
        let applied = apply.run(|| self.content.open(namespace, order.blob, order.size));
        let recorded = {
            // Whoever looks from now on finds it in the records.
            let mut table = inner.applies.table();
            table.remove(&snapshot.slot);
            applied.map_err(DifferError::from).and_then(|applied| {
                let snapshot = inner.snapshots.become_layer(snapshot.key.as_str(), &spec(&applied.layer))?;
                Ok((applied, snapshot))
            })
        };
        let (applied, snapshot) = recorded?;
        let Content::Layer(slot) = snapshot.content else { return Err(DifferError::Broken) };
        inner.show(&applied.layer, slot).map_err(|error| DifferError::Layers(error.into()))?;
        Ok(Uncompressed { diff_id: applied.diff_id, size: applied.size })
    }
}

/// What is next below `snapshot`, if there is anything.
fn next_below<'a>(all: &'a Chain, snapshot: &Snapshot) -> Result<Option<&'a Snapshot>, DifferError> {
    if let Some(parent) = &snapshot.parent {
        return all.stat(parent.as_str()).map(Some).map_err(|error| DifferError::Snapshots(error.into()));
    }
    // What is committed has all that it will ever stand on.
    let Some(chain) = stated_parent(&snapshot.labels).filter(|_| snapshot.kind == Kind::Active) else {
        return Ok(None);
    };
    let called = |of: &&Snapshot| chain_of(&of.labels) == Some(chain);
    // What is finished counts before what is being made, and what the same pull makes before what another one does.
    let namespace = namespace_of(snapshot.key.as_str());
    let best = all.walk().filter(called).max_by_key(|of| {
        let is_near = namespace_of(of.key.as_str()) == namespace;
        (of.kind == Kind::Committed, of.content != Content::Files, is_near)
    });
    let missing = || DifferError::Layers(format!("there is no snapshot of stack {chain} below").into());
    best.map(Some).ok_or_else(missing)
}

fn chain_of(labels: &Labels) -> Option<ChainId> {
    labels.get(SNAPSHOT_REF)?.parse().ok()
}

fn stated_parent(labels: &Labels) -> Option<ChainId> {
    labels.get(PARENT_CHAIN)?.parse().ok()
}

/// A name that nobody else will ask for.
fn private(snapshot: &Snapshot) -> ChainId {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let text = format!("a layer of nobody else: {} {} {}", snapshot.slot, now.as_nanos(), snapshot.key);
    ChainId(Digest::of(Algorithm::Sha256, text.as_bytes()))
}

/// The directory that is written to through `mounts`.
fn upper_of(mounts: &[Given]) -> Option<&Path> {
    let [Given { kind, source, options }] = mounts else { return None };
    let upper = match kind.as_str() {
        "bind" if !options.iter().any(|option| option == "ro") => Some(source.as_str()),
        "overlay" => options.iter().find_map(|option| option.strip_prefix("upperdir=")),
        _ => None,
    };
    upper.map(Path::new)
}

/// containerd's keys are `NAMESPACE/NUMBER/NAME`.
fn namespace_of(key: &str) -> &str {
    key.split_once('/').map_or("default", |(namespace, _)| namespace)
}

/// The bytes of a blob.
enum Blob {
    File(File),
    Pieces { pieces: mpsc::Receiver<Result<Bytes, String>>, current: Bytes },
}

impl ContentStore {
    /// The bytes of `blob`, from the directory if it has it whole. On a thread that may wait.
    fn open(&self, namespace: &str, blob: BlobDigest, size: u64) -> Blob {
        let path = self.directory.join("blobs").join(blob.0.algorithm().name()).join(blob.0.hex());
        match File::open(&path) {
            Ok(file) if file.metadata().is_ok_and(|found| found.is_file() && found.len() == size) => Blob::File(file),
            _ => {
                let pieces = grpc::read_content(self.containerd.clone(), namespace, blob, size);
                Blob::Pieces { pieces, current: Bytes::new() }
            }
        }
    }
}

impl Read for Blob {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File(file) => file.read(buf),
            Self::Pieces { pieces, current } => {
                while current.is_empty() {
                    match pieces.blocking_recv() {
                        Some(Ok(piece)) => *current = piece,
                        Some(Err(error)) => return Err(io::Error::other(error)),
                        None => return Ok(0),
                    }
                }
                let taken = buf.len().min(current.len());
                buf.split_at_mut(taken).0.copy_from_slice(current.split_to(taken).chunk());
                Ok(taken)
            }
        }
    }
}

/// Layers of tars that were unpacked earlier, and all others from somewhere else.
pub struct WithTars {
    fetcher: Fetcher,
    others: Arc<dyn Layers>,
}

impl std::fmt::Debug for WithTars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WithTars").field("others", &self.others).finish_non_exhaustive()
    }
}

impl WithTars {
    /// Tars are looked for in the store of `fetcher`.
    pub const fn new(fetcher: Fetcher, others: Arc<dyn Layers>) -> Self {
        Self { fetcher, others }
    }
}

impl Layers for WithTars {
    fn offer(&self, asked: Asked) -> BoxFuture<'_, Offer> {
        self.others.offer(asked)
    }

    fn again<'a>(&'a self, layer: &'a Layer, labels: &'a [Labels]) -> BoxFuture<'a, anyhow::Result<Arc<LayerImage>>> {
        let Ok(Anchor::Tar(chain)) = layer.id.anchor.parse() else { return self.others.again(layer, labels) };
        let (fetcher, blob) = (self.fetcher.clone(), layer.id.blob);
        Box::pin(async move {
            let opening = tokio::task::spawn_blocking(move || applied_before(&fetcher, blob, chain));
            match opening.await?? {
                Some(found) => Ok(found),
                // A pull of this program may bring it again.
                None => self.others.again(layer, labels).await,
            }
        })
    }
}
