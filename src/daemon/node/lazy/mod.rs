//! Lazy layers for containerd: which layer of which image a snapshot is to become, and whether it can be served without
//! its bytes being here.
//!
//! containerd prepares the layers of an image one after another and waits for each; so all of an image is opened when its
//! first layer is asked for, once, for at most a bounded time, and what came of it holds for the layers that follow: also
//! that nothing came of it, for a while. A layer that is not served lazily is no error: containerd fetches and unpacks it, as it would
//! without this program. The reason is logged once an image.
//!
//! Guarantees: no label makes this contact a registry that containerd itself has not got the image from (`witness`); no
//! bytes of layers are fetched here but their indexes and heads; nothing waits longer than the configured time. Refuses to
//! know how a layer is mounted and recorded.

mod decide;
mod image;
mod witness;

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use lru::LruCache;

use decide::{Decision, Why};
use image::LazyImage;
use witness::Witness;

use super::layers::{Asked, How, Layers, Offer, Offered};
use crate::chain::{Key, Labels, Layer};
use crate::daemon::config::ContainerdSettings;
use crate::daemon::image::House;
use crate::daemon::recorder::spec;
use crate::fetch::LayerImage;
use crate::grpc::{Containerd, ContainerdError, ContainerdVersion};
use crate::model::ChainId;
use crate::oci::{ImageName, Reference, SnapshotLabels};
use decide::{Place, decide};
use image::Pulled;

/// Images that are remembered at a time: more than are pulled at once.
const IMAGES: NonZeroUsize = NonZeroUsize::new(64).expect("64 is not zero");

/// How long an open image is remembered after its last layer was asked for. The next image on the same layers opens them
/// from disk.
const HELD: Duration = Duration::from_secs(120);

/// How long it is remembered that an image, or a layer of it, cannot be served now: so many times as long as it took to find
/// that out. So asking again costs at most a seventh of the time of a pull whose other layers follow, and what only needs a
/// question on this machine, such as a containerd that did not answer for once, is asked again with one of the next layers.
const HOLDS: u32 = 6;

/// It is no shorter than containerd needs to prepare one layer after another, and no longer than a minute.
const HOLDS_WITHIN: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));

/// The same for what will not change by itself.
const HOLDS_LONG: Duration = Duration::from_secs(600);

/// Our own label of a snapshot that is a layer: the image that the layer comes from, by digest. It was vouched for. Further ones
/// have a number behind a dot.
const OWN_IMAGE: &str = "headstart.image";

/// How lazy layers are wanted.
#[derive(Debug, Clone)]
pub(crate) struct LazySettings {
    /// Whether they are wanted at all.
    pub(crate) enabled: bool,
    /// The longest that the first layer of an image may take.
    pub(crate) timeout: Duration,
    /// Which containerd it is; none asks.
    pub(crate) version: Option<ContainerdVersion>,
    /// Labels are believed although containerd does not vouch for them.
    pub(crate) believe: bool,
}

impl From<&ContainerdSettings> for LazySettings {
    fn from(settings: &ContainerdSettings) -> Self {
        Self {
            enabled: settings.lazy,
            timeout: settings.prepare_timeout,
            version: settings.version,
            believe: settings.trust_labels,
        }
    }
}

type Outcome = Result<Arc<LazyImage>, Arc<Why>>;

/// What is known of an image, or will be.
struct Known {
    outcome: Shared<BoxFuture<'static, Outcome>>,
    /// The same, and when it was known and how long it took.
    told: Arc<OnceLock<(Outcome, Instant, Duration)>>,
    used: Instant,
}

impl Known {
    fn is_over(&self) -> bool {
        let Some((outcome, since, took)) = self.told.get() else { return false };
        let (shortest, longest) = HOLDS_WITHIN;
        let for_now = took.saturating_mul(HOLDS).clamp(shortest, longest);
        match outcome {
            Ok(image) if image.may_change() => since.elapsed() >= for_now,
            Ok(_) => self.used.elapsed() >= HELD,
            Err(why) if why.may_change() => since.elapsed() >= for_now,
            Err(_) => since.elapsed() >= HOLDS_LONG,
        }
    }
}

/// A layer that can be served.
#[derive(Debug, Clone)]
pub(crate) struct LazyLayer {
    /// What it makes of the layers below it.
    pub(crate) chain: ChainId,
    /// The layer.
    pub(crate) layer: Arc<LayerImage>,
    /// The image.
    pub(crate) image: Arc<LazyImage>,
}

/// What becomes of a snapshot.
#[derive(Debug, Clone)]
pub(crate) enum Choice {
    /// It is no layer.
    NoLayer,
    /// It is committed at once.
    Commit(LazyLayer),
    /// It is shown, and committed when its parent is.
    Staged(LazyLayer),
    /// containerd fills it.
    Ordinary(Arc<Why>),
}

/// Opens images whose layers are to be served.
pub(crate) struct Lazy {
    me: Weak<Self>,
    house: House,
    settings: LazySettings,
    containerd: Containerd,
    witness: Witness,
    images: Mutex<LruCache<Pulled, Known>>,
}

impl std::fmt::Debug for Lazy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lazy").field("settings", &self.settings).finish_non_exhaustive()
    }
}

impl LazyLayer {
    fn offered(self, how: How) -> Offer {
        let Ok(name) = Key::new(&self.chain.to_string()) else { return Offer::Ordinary(Why::Broken.to_string()) };
        let labels = Labels::from([(OWN_IMAGE.to_owned(), self.image.of.to_string())]);
        Offer::Layer(Offered { image: self.layer, name, how, labels })
    }
}

impl Lazy {
    /// Opens images from `house`, for the containerd that listens at `socket`. Has to be called inside of a runtime.
    pub(crate) fn new(house: &House, settings: LazySettings, socket: &Path) -> Arc<Self> {
        let containerd = Containerd::at(socket);
        let witness = if settings.believe { Witness::Labels } else { Witness::Containerd(containerd.clone()) };
        Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            house: house.clone(),
            settings,
            containerd,
            witness,
            images: Mutex::new(LruCache::new(IMAGES)),
        })
    }

    /// What becomes of the snapshot `key` on `parent`, which is empty for nothing, with these labels.
    pub(crate) async fn choose(&self, key: &str, parent: &str, labels: &Labels) -> Choice {
        let chosen = match SnapshotLabels::parse(labels) {
            Ok(None) => return Choice::NoLayer,
            _ if !self.settings.enabled => Err(Arc::new(Why::Off)),
            Ok(Some(labels)) => self.choose_layer(key, parent, &labels).await,
            Err(error) => Err(Arc::new(Why::Labels(error))),
        };
        chosen.unwrap_or_else(|why| {
            if matches!(*why, Why::Parallel { .. } | Why::ParallelUnknown { .. }) {
                tracing::warn!(key, "{}", words(&*why));
            }
            Choice::Ordinary(why)
        })
    }

    async fn choose_layer(&self, key: &str, parent: &str, labels: &SnapshotLabels) -> Result<Choice, Arc<Why>> {
        let pulled = pulled(key, labels).ok_or_else(|| Arc::new(Why::NoNamespace(key.to_owned())))?;
        let image = self.open(pulled).await?;
        let (manifest, chain) = (labels.manifest, labels.chain);
        let place = Place::find(&image.chain, &chain).ok_or(Why::NotInImage { manifest, chain })?;
        let Some((blob, layer)) = image.blobs.get(place.layer).copied().zip(image.layers.get(place.layer)) else {
            return Err(Arc::new(Why::NotInImage { manifest, chain }));
        };
        if let Some(labelled) = labels.layer.filter(|labelled| *labelled != blob) {
            return Err(Arc::new(Why::OtherBlob { layer: place.layer, labelled, blob }));
        }
        let layer = Arc::clone(layer.as_ref().map_err(Arc::clone)?);
        let version = match place.needs_version(parent) {
            true => Some(self.version().await),
            false => None,
        };
        let layer = LazyLayer { chain, layer, image: Arc::clone(&image) };
        Ok(match decide(place, parent, version) {
            Decision::Commit => Choice::Commit(layer),
            Decision::Staged => Choice::Staged(layer),
            Decision::Ordinary(why) => return Err(why),
        })
    }

    /// Opens a layer again that was served before, from what is kept alone. `labels` are those of its snapshots.
    async fn reopen(&self, layer: &Layer, labels: &[Labels]) -> anyhow::Result<Arc<LayerImage>> {
        let mut last = anyhow::anyhow!("nothing says which image it is a layer of");
        let named = labels.iter().flatten().filter(|(label, _)| names_image(label));
        let named: BTreeSet<&str> = named.map(|(_, image)| image.as_str()).collect();
        // All of them: each is one more place to get it from.
        let mut opened = None;
        for image in named {
            let opening = async {
                let image: ImageName = image.parse()?;
                image::reopen(&self.house, &image, layer.id.blob).await
            };
            match opening.await {
                Ok(layer) => opened = opened.or(Some(layer)),
                Err(error) => last = error.context(format!("cannot open {image} again")),
            }
        }
        if let Some(opened) = opened {
            return Ok(opened);
        }
        // A pull of this program has brought it.
        let images = self.house.snapshots().map(|snapshots| snapshots.images()).unwrap_or_default();
        for image in images.iter().filter(|image| image.layers.iter().any(|of| of.layer == layer.slot)) {
            let opening = async {
                let reference: Reference = image.name.parse()?;
                let documents = self.house.kept_documents(&reference, image.manifest).await?;
                self.house.bring_image(documents, None).await
            };
            match opening.await {
                Ok(opened) => match opened.layers.iter().find(|opened| spec(opened).id() == layer.id) {
                    Some(opened) => return Ok(Arc::clone(opened)),
                    None => last = anyhow::anyhow!("{} has no such layer", image.name),
                },
                Err(error) => last = error.context(format!("cannot open {} again", image.name)),
            }
        }
        Err(last)
    }

    async fn version(&self) -> Result<ContainerdVersion, Arc<ContainerdError>> {
        match self.settings.version {
            Some(version) => Ok(version),
            None => self.containerd.version().await.map_err(Arc::new),
        }
    }

    /// The image, opened once for all who ask for it.
    async fn open(&self, pulled: Pulled) -> Outcome {
        let outcome = {
            let mut images = self.images();
            match images.get_mut(&pulled) {
                Some(known) if !known.is_over() => {
                    known.used = Instant::now();
                    known.outcome.clone()
                }
                _ => {
                    let known = self.begin(pulled.clone());
                    let outcome = known.outcome.clone();
                    images.put(pulled, known);
                    outcome
                }
            }
        };
        outcome.await
    }

    /// Begins to open an image. It goes on if nobody waits for it any more.
    fn begin(&self, pulled: Pulled) -> Known {
        let (house, witness, timeout) = (self.house.clone(), self.witness.clone(), self.settings.timeout);
        let opening = {
            let pulled = pulled.clone();
            async move {
                match tokio::time::timeout(timeout, pulled.open(&house, &witness)).await {
                    Ok(opened) => opened.map(Arc::new).map_err(Arc::new),
                    Err(_) => Err(Arc::new(Why::TooSlow(timeout))),
                }
            }
        };
        let (me, begun, told) = (Weak::clone(&self.me), Instant::now(), Arc::<OnceLock<_>>::default());
        let tells = Arc::clone(&told);
        let task = self.house.runtime().spawn(async move {
            // One that breaks down is caught here, so that it is remembered and then forgotten as any other.
            let outcome = tokio::spawn(opening).await.unwrap_or_else(|_| Err(Arc::new(Why::Broken)));
            let took = begun.elapsed();
            tell(&pulled, &outcome, took);
            // Nobody else tells.
            tells.set((outcome.clone(), Instant::now(), took)).ok();
            forget_later(me, pulled);
            outcome
        });
        let outcome = async { task.await.unwrap_or_else(|_| Err(Arc::new(Why::Broken))) }.boxed().shared();
        Known { outcome, told, used: begun }
    }

    fn images(&self) -> MutexGuard<'_, LruCache<Pulled, Known>> {
        self.images.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Layers for Lazy {
    fn offer(&self, asked: Asked) -> BoxFuture<'_, Offer> {
        async move {
            let parent = asked.parent.as_ref().map_or("", Key::as_str);
            match self.choose(&asked.key, parent, &asked.labels).await {
                Choice::NoLayer => Offer::Ordinary("it is no layer".to_owned()),
                Choice::Ordinary(why) => Offer::Ordinary(words(&*why)),
                Choice::Commit(layer) => layer.offered(How::Commit),
                Choice::Staged(layer) => layer.offered(How::Staged),
            }
        }
        .boxed()
    }

    fn again<'a>(&'a self, layer: &'a Layer, labels: &'a [Labels]) -> BoxFuture<'a, anyhow::Result<Arc<LayerImage>>> {
        self.reopen(layer, labels).boxed()
    }
}

/// True for our label of an image, and those of further images that have the same layer.
fn names_image(label: &str) -> bool {
    label.strip_prefix(OWN_IMAGE).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

/// An error and its causes in one line.
fn words(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        words.push_str(": ");
        words.push_str(&error.to_string());
        cause = error.source();
    }
    words
}

/// Whose pull of which image a snapshot belongs to; none if the key has no namespace.
fn pulled(key: &str, labels: &SnapshotLabels) -> Option<Pulled> {
    let (namespace, _) = key.split_once('/').filter(|(namespace, _)| !namespace.is_empty())?;
    Some(Pulled { namespace: namespace.to_owned(), image: labels.image.clone(), manifest: labels.manifest })
}

/// Lets go of an image when nobody has asked for it for a while.
fn forget_later(lazy: Weak<Lazy>, pulled: Pulled) {
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(HELD).await;
            let Some(lazy) = lazy.upgrade() else { return };
            let mut images = lazy.images();
            match images.peek(&pulled) {
                Some(known) if known.is_over() => drop(images.pop(&pulled)),
                Some(_) => continue,
                None => {}
            }
            return;
        }
    });
}

fn tell(pulled: &Pulled, outcome: &Outcome, took: Duration) {
    let Pulled { namespace, image, manifest } = pulled;
    match outcome {
        Ok(opened) => {
            let lazy = opened.layers().count();
            let layers = opened.layers.len();
            tracing::info!(namespace, %image, %manifest, layers, lazy, ?took, "the image can be served lazily");
            for why in opened.layers.iter().filter_map(|layer| layer.as_ref().err()) {
                tracing::info!(%image, %manifest, "a layer is not lazy: {}", words(&**why));
            }
        }
        Err(why) => {
            let error: &dyn std::error::Error = &**why;
            tracing::info!(namespace, %image, %manifest, ?took, error, "the image is not lazy");
        }
    }
}

#[cfg(test)]
mod tests;
