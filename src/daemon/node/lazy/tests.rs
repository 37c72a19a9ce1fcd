use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::http::Method;
use tempfile::TempDir;
use tokio::runtime::Handle;

use super::super::layers::OWN_LABELS;
use super::*;
use crate::chain::LayerSlot;
use crate::convert::{ImageOptions, Platforms, convert_image};
use crate::daemon::config::{Config, Surroundings};
use crate::fetch::Cause;
use crate::model::{BlobDigest, ByteRange, ChainId, ReadAt as _};
use crate::oci::labels::{IMAGE_REF, LAYER_DIGEST, MANIFEST_DIGEST, SNAPSHOT_REF};
use crate::oci::{Config as ImageConfig, Descriptor, Document, Form, Index, Manifest, Platform, Reference, TWIN_OF};
use crate::tar::decompress::Compression;
use crate::testkit::containerd::FakeContainerd;
use crate::testkit::layers::plain_tar;
use crate::testkit::layouts::{TestLayer, write_layout};
use crate::testkit::registry::{Fault, FaultyRegistry};
use crate::transport::Transports;

const SOME_TIME: Duration = Duration::from_secs(60);

/// A registry, a containerd that has pulled from it, and a root.
struct Stage {
    registry: FaultyRegistry,
    containerd: FakeContainerd,
    house: House,
    dir: TempDir,
}

/// An image as containerd pulls it.
struct Image {
    reference: String,
    manifest: BlobDigest,
    parsed: Manifest,
    chain: Vec<ChainId>,
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    };
    std::iter::repeat_with(byte).take(len).collect()
}

impl Stage {
    async fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let home = |name: &str| Some(dir.path().join(name));
        let around = Surroundings {
            home: home("home"),
            data_home: home("data"),
            config_home: home("config"),
            runtime_dir: home("run"),
            ..Surroundings::default()
        };
        let config = Config::load(None, &around).unwrap();
        let house = House::open(&config, Handle::current()).unwrap();
        let containerd = FakeContainerd::start(&dir.path().join("containerd.sock"), "2.1.9");
        Self { registry: FaultyRegistry::start().await, containerd, house, dir }
    }

    fn lazy(&self) -> Arc<Lazy> {
        self.lazy_with(|_| {})
    }

    fn lazy_with(&self, change: impl FnOnce(&mut LazySettings)) -> Arc<Lazy> {
        let mut settings = LazySettings { enabled: true, timeout: SOME_TIME, version: None, believe: false };
        change(&mut settings);
        Lazy::new(&self.house, settings, self.containerd.socket())
    }

    /// Publishes an image of these layers as `repository:latest`; with `append` beside its original.
    async fn publish(&self, repository: &str, tars: &[Vec<u8>], append: bool) {
        let from = self.dir.path().join(format!("from-{repository}"));
        let layers: Vec<TestLayer> = tars.iter().map(|tar| TestLayer::of_tar(tar, Compression::Gzip)).collect();
        write_layout(&from, &layers).unwrap();
        let transports: &Transports = &self.house.transports;
        let source = transports.open(&format!("oci:{}", from.display()).parse().unwrap()).await.unwrap();
        let to: Reference = format!("docker://{}/{repository}:latest", self.registry.host()).parse().unwrap();
        let sink = transports.create(&to).await.unwrap();
        let options = ImageOptions {
            platforms: Platforms::One(Some(Platform::linux("amd64", None))),
            append,
            form: Form::Containerd23,
            ..ImageOptions::default()
        };
        convert_image(&source, &sink, &options, Arc::new(())).await.unwrap();
        self.registry.forget_seen();
    }

    fn document(&self, repository: &str, name: &str) -> Vec<u8> {
        self.registry.manifest(repository, name).unwrap().to_vec()
    }

    /// The image number `number` in the index of `repository:latest`, or the image that stands there.
    fn image(&self, repository: &str, number: usize) -> Image {
        let mut bytes = self.document(repository, "latest");
        if let Document::Index(index) = Document::parse(&bytes, None).unwrap() {
            bytes = self.document(repository, &index.manifests[number].digest.to_string());
        }
        let Document::Manifest(parsed) = Document::parse(&bytes, None).unwrap() else { panic!("an index in an index") };
        let config = self.registry.blob(&parsed.config.digest).unwrap();
        let config = ImageConfig::parse(config.to_vec()).unwrap();
        Image {
            reference: format!("{}/{repository}:latest", self.registry.host()),
            manifest: Descriptor::of("", &bytes).digest,
            chain: ChainId::of_stack(config.diff_ids()),
            parsed,
        }
    }

    /// What containerd has after it has fetched an image and before it prepares the first layer.
    fn pull(&self, namespace: &str, repository: &str, image: &Image) {
        let from = ("127.0.0.1", repository);
        let top = self.document(repository, "latest");
        self.containerd.put(namespace, &top, from);
        self.containerd.put(namespace, &self.document(repository, &image.manifest.to_string()), from);
        self.containerd.put(namespace, &self.registry.blob(&image.parsed.config.digest).unwrap(), from);
    }

    /// Bytes of blobs that were asked for, and the paths of everything that was.
    fn asked(&self) -> (u64, Vec<String>) {
        let seen = self.registry.seen();
        let range = |range: &str| {
            let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
            Some(last.parse::<u64>().ok()? + 1 - first.parse::<u64>().ok()?)
        };
        let bytes = |seen: &crate::testkit::registry::Seen| range(seen.header("range")?);
        let blobs = seen.iter().filter(|seen| seen.method == Method::GET && seen.path.contains("/blobs/"));
        let sum = blobs.filter_map(bytes).sum();
        (sum, seen.into_iter().map(|seen| format!("{} {}", seen.method, seen.path)).collect())
    }
}

impl Image {
    fn labels(&self, layer: usize) -> Labels {
        BTreeMap::from([
            (SNAPSHOT_REF.to_owned(), self.chain[layer].to_string()),
            (IMAGE_REF.to_owned(), self.reference.clone()),
            (MANIFEST_DIGEST.to_owned(), self.manifest.to_string()),
            (LAYER_DIGEST.to_owned(), self.parsed.layers[layer].digest.to_string()),
        ])
    }

    /// What the snapshot of `layer` stands on when layers come one after another.
    fn parent(&self, layer: usize) -> String {
        layer.checked_sub(1).map(|below| self.chain[below].to_string()).unwrap_or_default()
    }

    async fn prepare(&self, lazy: &Lazy, layer: usize) -> Choice {
        let key = format!("k8s.io/{layer}/extract-1 {}", self.chain[layer]);
        lazy.choose(&key, &self.parent(layer), &self.labels(layer)).await
    }
}

#[track_caller]
fn committed(choice: Choice) -> LazyLayer {
    match choice {
        Choice::Commit(layer) => layer,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn ordinary(choice: Choice) -> String {
    match choice {
        Choice::Ordinary(why) => why.to_string(),
        other => panic!("{other:?}"),
    }
}

/// What is recorded of a layer that is offered, and its own labels.
async fn recorded(lazy: &Lazy, image: &Image, layer: usize) -> (Layer, Labels) {
    let asked = Asked {
        key: "k8s.io/1/x".to_owned(),
        parent: Key::optional(&image.parent(layer)).unwrap(),
        labels: image.labels(layer),
    };
    let Offer::Layer(offered) = lazy.offer(asked).await else { panic!("layer {layer} is not offered") };
    assert_eq!((offered.name.as_str(), offered.how), (image.chain[layer].to_string().as_str(), How::Commit));
    assert!(offered.labels.keys().all(|name| name.starts_with(OWN_LABELS)));
    let id = spec(&offered.image).id();
    (Layer { slot: LayerSlot(1), id, size: None, local: None }, offered.labels)
}

fn three_layers() -> Vec<Vec<u8>> {
    vec![
        plain_tar(&[("bin/a", &noise(1, 3 << 20)), ("gone", b"x")]),
        plain_tar(&[(".wh.gone", b""), ("bin/b", b"b")]),
        plain_tar(&[("bin/c", &noise(2, 2 << 20))]),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layers_of_an_erofs_image_are_served_by_themselves() {
    let stage = Stage::new().await;
    stage.publish("app", &three_layers(), false).await;
    let image = stage.image("app", 0);
    stage.pull("k8s.io", "app", &image);
    let lazy = stage.lazy();
    for layer in 0..3 {
        let served = committed(image.prepare(&lazy, layer).await);
        assert_eq!(served.chain, image.chain[layer]);
        assert_eq!(*served.layer.blob(), image.parsed.layers[layer].digest);
        assert_eq!(served.image.layers().count(), 3);
        assert_eq!(spec(&served.layer).blob, image.parsed.layers[layer].digest);
    }
    let (bytes, asked) = stage.asked();
    let stored: u64 = image.parsed.layers.iter().map(|layer| layer.size).sum();
    assert!(bytes < stored / 2, "{bytes} of {stored} bytes: {asked:?}");
    // containerd had the documents.
    assert!(asked.iter().all(|asked| asked.contains("/blobs/")), "{asked:?}");
    // Later everything is opened from what is kept.
    stage.registry.forget_seen();
    let again = stage.lazy();
    for (layer, descriptor) in image.parsed.layers.iter().enumerate() {
        let recorded = recorded(&again, &image, layer).await;
        let layer = again.again(&recorded.0, &[Labels::new(), recorded.1]).await.unwrap();
        assert_eq!(*layer.blob(), descriptor.digest);
    }
    assert_eq!(stage.asked().1, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_twin_serves_the_layers_of_its_original() {
    let stage = Stage::new().await;
    stage.publish("app", &three_layers(), true).await;
    let (original, twin) = (stage.image("app", 0), stage.image("app", 1));
    assert_ne!(original.manifest, twin.manifest);
    stage.pull("k8s.io", "app", &original);
    let lazy = stage.lazy();
    for layer in 0..3 {
        let served = committed(original.prepare(&lazy, layer).await);
        assert_eq!(served.chain, original.chain[layer]);
        assert_eq!(*served.layer.blob(), twin.parsed.layers[layer].digest);
    }
    // The tag has moved on: what was found holds.
    stage.publish("app", &[plain_tar(&[("other", b"x")])], false).await;
    let again = stage.lazy();
    assert_eq!(*committed(original.prepare(&again, 1).await).layer.blob(), twin.parsed.layers[1].digest);
    let (layer, labels) = recorded(&again, &original, 2).await;
    assert_eq!(*again.again(&layer, &[labels]).await.unwrap().blob(), twin.parsed.layers[2].digest);
    let error = again.again(&layer, &[Labels::new()]).await.unwrap_err().to_string();
    assert!(error.contains("nothing says"), "{error}");
    // Without containerd's copy the registry's index is read.
    let believing = Stage::new().await;
    believing.publish("app", &three_layers(), true).await;
    let original = believing.image("app", 0);
    let lazy = believing.lazy_with(|settings| settings.believe = true);
    assert_eq!(*committed(original.prepare(&lazy, 0).await).layer.blob(), twin.parsed.layers[0].digest);
    assert_eq!(believing.containerd.asked(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_of_another_repository_names_no_twin() {
    let stage = Stage::new().await;
    stage.publish("good", &three_layers(), true).await;
    let original = stage.image("good", 0);
    stage.pull("k8s.io", "good", &original);
    // Somebody else has published the same original with a twin of his own, and it was pulled here.
    let Document::Index(good) = Document::parse(&stage.document("good", "latest"), None).unwrap() else { panic!() };
    let mut forged = Descriptor::of(crate::oci::media::OCI_MANIFEST, b"forged");
    forged.annotations.insert(TWIN_OF.to_owned(), original.manifest.to_string());
    let evil = Index::new(vec![good.manifests[0].clone(), forged]).to_json();
    stage.containerd.put("k8s.io", &evil, ("127.0.0.1", "evil"));
    let served = committed(original.prepare(&stage.lazy(), 0).await);
    assert_eq!(*served.layer.blob(), stage.image("good", 1).parsed.layers[0].digest);
    // In its own repository it is believed as far as it can be checked: it is not there.
    let other = Stage::new().await;
    other.publish("evil", &three_layers(), true).await;
    let mut original = other.image("evil", 0);
    original.reference = format!("{}/evil:latest", other.registry.host());
    other.containerd.put("k8s.io", &other.document("evil", &original.manifest.to_string()), ("127.0.0.1", "evil"));
    other.containerd.put("k8s.io", &evil, ("127.0.0.1", "evil"));
    let why = ordinary(original.prepare(&other.lazy(), 0).await);
    assert!(why.contains("cannot be read"), "{why}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ordinary_images_cost_their_registry_nothing() {
    let stage = Stage::new().await;
    stage.publish("app", &three_layers(), true).await;
    let original = stage.image("app", 0);
    // The tag stands for the original alone.
    let bytes = stage.document("app", &original.manifest.to_string());
    stage.containerd.put("k8s.io", &bytes, ("127.0.0.1", "app"));
    let config = stage.registry.blob(&original.parsed.config.digest).unwrap();
    stage.containerd.put("k8s.io", &config, ("127.0.0.1", "app"));
    let lazy = stage.lazy();
    for layer in 0..3 {
        let why = ordinary(original.prepare(&lazy, layer).await);
        assert!(why.contains("no twin"), "{why}");
    }
    assert_eq!(stage.asked().1, Vec::<String>::new());
    let questions = stage.containerd.asked().iter().filter(|asked| asked.starts_with("info")).count();
    assert_eq!(questions, 1, "what was found out holds for all layers");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_containerd_has_not_pulled_is_not_followed() {
    let stage = Stage::new().await;
    stage.publish("app", &three_layers(), false).await;
    let image = stage.image("app", 0);
    stage.pull("k8s.io", "app", &image);
    let other = FaultyRegistry::start().await;
    let lazy = stage.lazy();
    let with = |name: &str, value: &str| {
        let mut labels = image.labels(0);
        labels.insert(name.to_owned(), value.to_owned());
        labels
    };
    let foreign = format!("localhost:{}/app:latest", other.host().rsplit(':').next().unwrap());
    let elsewhere = format!("{}/other:latest", stage.registry.host());
    let (other_blob, other_chain) = (image.parsed.layers[1].digest.to_string(), image.parsed.config.digest.to_string());
    for (what, key, labels, reason) in [
        ("another host", "k8s.io/1/x", with(IMAGE_REF, &foreign), "has not pulled"),
        ("another repository", "k8s.io/1/x", with(IMAGE_REF, &elsewhere), "has not pulled"),
        ("another manifest", "k8s.io/1/x", with(MANIFEST_DIGEST, &other_blob), "has not pulled"),
        ("another namespace", "default/1/x", image.labels(0), "has not pulled"),
        ("no namespace", "x", image.labels(0), "no namespace"),
        ("an empty namespace", "/1/x", image.labels(0), "no namespace"),
        ("a namespace that is none", "a\nb/1/x", image.labels(0), "is not known"),
        ("a path", "k8s.io/1/x", with(IMAGE_REF, "oci:/etc/secret"), "do not say which layer"),
        ("no digest", "k8s.io/1/x", with(MANIFEST_DIGEST, "sha256:../../x"), "do not say which layer"),
        ("oversized", "k8s.io/1/x", with(IMAGE_REF, &"x".repeat(10_000)), "do not say which layer"),
    ] {
        let why = ordinary(lazy.choose(key, "", &labels).await);
        assert!(why.contains(reason), "{what}: {why}");
    }
    assert_eq!((stage.asked().1, other.connections()), (Vec::new(), 0));
    for (what, labels, reason) in [
        ("another layer's blob", with(LAYER_DIGEST, &other_blob), "the manifest names"),
        ("a ChainID of another image", with(SNAPSHOT_REF, &other_chain), "no layer of manifest"),
    ] {
        let why = ordinary(lazy.choose("k8s.io/1/x", "", &labels).await);
        assert!(why.contains(reason), "{what}: {why}");
    }
    assert!(matches!(lazy.choose("k8s.io/1/x", "", &Labels::new()).await, Choice::NoLayer));
    let off = stage.lazy_with(|settings| settings.enabled = false);
    assert_eq!(ordinary(image.prepare(&off, 0).await), "lazy layers are switched off");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_version_decides_where_parents_are_missing() {
    let stage = Stage::new().await;
    stage.publish("app", &three_layers(), false).await;
    let image = stage.image("app", 0);
    stage.pull("k8s.io", "app", &image);
    let orphan = |lazy: Arc<Lazy>, layer: usize| {
        let labels = image.labels(layer);
        async move { lazy.choose("k8s.io/1/x", "", &labels).await }
    };
    let lazy = stage.lazy();
    committed(orphan(Arc::clone(&lazy), 0).await);
    let why = ordinary(orphan(Arc::clone(&lazy), 1).await);
    assert!(why.contains("containerd 2.1") && why.contains("rebase"), "{why}");
    // It is asked once a connection.
    ordinary(orphan(Arc::clone(&lazy), 2).await);
    assert_eq!(stage.containerd.asked().iter().filter(|asked| *asked == "version").count(), 1);
    let configured = stage.lazy_with(|settings| settings.version = Some(ContainerdVersion::new(2, 4)));
    assert!(matches!(orphan(Arc::clone(&configured), 1).await, Choice::Staged(_)));
    committed(image.prepare(&configured, 1).await);
    // Another one answers on a new connection.
    let path = stage.containerd.socket().to_owned();
    let Stage { containerd, house, dir, registry } = stage;
    drop(containerd);
    let stage = Stage { containerd: FakeContainerd::start(&path, "v2.4.0-beta.0-3-gabc"), house, dir, registry };
    stage.pull("default", "app", &image);
    let deadline = Instant::now() + SOME_TIME;
    loop {
        // The first question after the old one is gone may find the broken connection.
        let choice = lazy.choose("default/1/x", "", &image.labels(1)).await;
        match choice {
            Choice::Staged(_) => break,
            other => assert!(Instant::now() < deadline, "{other:?}"),
        }
        lazy.images().clear();
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_answer_is_waited_for_once() {
    let stage = Stage::new().await;
    stage.publish("app", &three_layers(), false).await;
    let image = stage.image("app", 0);
    stage.pull("k8s.io", "app", &image);
    // A containerd that hangs.
    stage.containerd.set_hangs(true);
    let lazy = stage.lazy();
    let why = ordinary(image.prepare(&lazy, 0).await);
    assert!(why.contains("is not known"), "{why}");
    stage.containerd.set_hangs(false);
    let questions = stage.containerd.asked().len();
    assert!(ordinary(image.prepare(&lazy, 1).await).contains("is not known"), "it is remembered");
    assert_eq!(stage.containerd.asked().len(), questions);
    // A registry that hangs: all who wait are answered when the time is over, and one question was asked for each blob.
    stage.registry.script(Method::GET, "/blobs/", Fault::Hang, usize::MAX);
    let slow = stage.lazy_with(|settings| settings.timeout = Duration::from_millis(300));
    let together: Vec<String> = futures::future::join_all((0..3).map(|layer| image.prepare(&slow, layer)))
        .await
        .into_iter()
        .map(ordinary)
        .collect();
    assert!(together.iter().all(|why| why.contains("within 300ms")), "{together:?}");
    let asked = stage.registry.seen().len();
    assert!(asked <= 2 * 3, "{:?}", stage.asked().1);
    assert!(ordinary(image.prepare(&slow, 2).await).contains("within 300ms"), "it is remembered");
    assert_eq!(stage.registry.seen().len(), asked);
    // A registry that is gone.
    let Stage { registry, containerd, house, dir } = stage;
    drop(registry);
    let stage = Stage { registry: FaultyRegistry::start().await, containerd, house, dir };
    let gone = stage.lazy_with(|settings| settings.timeout = Duration::from_secs(2));
    let why = ordinary(image.prepare(&gone, 0).await);
    assert!(why.contains("within 2s") || why.contains("cannot be opened"), "{why}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_failed_for_once_is_asked_again_soon() {
    let stage = Stage::new().await;
    stage.publish("app", &three_layers(), false).await;
    let image = stage.image("app", 0);
    // A containerd that is being started again.
    let path = stage.containerd.socket().to_owned();
    let Stage { containerd, house, dir, registry } = stage;
    drop(containerd);
    std::fs::remove_file(&path).unwrap();
    let lazy =
        Lazy::new(&house, LazySettings { enabled: true, timeout: SOME_TIME, version: None, believe: false }, &path);
    let why = ordinary(image.prepare(&lazy, 0).await);
    assert!(why.contains("is not known"), "{why}");
    let stage = Stage { containerd: FakeContainerd::start(&path, "2.1.9"), house, dir, registry };
    stage.pull("k8s.io", "app", &image);
    let deadline = Instant::now() + SOME_TIME / 2;
    while !matches!(image.prepare(&lazy, 1).await, Choice::Commit(_)) {
        assert!(Instant::now() < deadline, "it is remembered longer than a minute of containerd's");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // A layer that could not be opened for once keeps no other one from being served, and is tried again.
    let other = Stage::new().await;
    other.publish("app", &three_layers(), false).await;
    let image = other.image("app", 0);
    other.pull("k8s.io", "app", &image);
    let blob = image.parsed.layers[1].digest.to_string();
    other.registry.script(Method::GET, &blob, Fault::Status(404, Vec::new()), usize::MAX);
    let lazy = other.lazy();
    committed(image.prepare(&lazy, 0).await);
    assert!(ordinary(image.prepare(&lazy, 1).await).contains("cannot be opened"));
    other.registry.clear_script();
    let deadline = Instant::now() + SOME_TIME / 2;
    while !matches!(image.prepare(&lazy, 1).await, Choice::Commit(_)) {
        assert!(Instant::now() < deadline, "a layer stays what it was for as long as somebody asks");
        committed(image.prepare(&lazy, 2).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layer_is_found_again_by_any_of_its_images() {
    let stage = Stage::new().await;
    let lazy = stage.lazy();
    let mut all = Labels::new();
    let mut found = None;
    for (number, repository) in ["gone", "app"].into_iter().enumerate() {
        stage.publish(repository, &three_layers(), false).await;
        let image = stage.image(repository, 0);
        stage.pull("k8s.io", repository, &image);
        let (layer, labels) = recorded(&lazy, &image, 2).await;
        all.extend(labels.into_values().map(|image| (format!("{OWN_IMAGE}.{number}"), image)));
        found = Some(layer);
    }
    let layer = found.unwrap();
    drop(lazy);
    let again = stage.lazy();
    let opened = again.again(&layer, &[all]).await.unwrap();
    // The first repository is no more, and what is not here comes from the other one.
    stage.registry.script(Method::GET, "/v2/gone/", Fault::Status(404, Vec::new()), usize::MAX);
    stage.registry.forget_seen();
    let (tell, told) = tokio::sync::oneshot::channel();
    let all = ByteRange::to(opened.size());
    opened.request(all, Cause::Read, move |result| drop(tell.send(result.map_err(|error| error.to_string()))));
    told.await.unwrap().unwrap();
    assert!(stage.asked().1.iter().any(|asked| asked.starts_with("GET /v2/app/blobs")), "{:?}", stage.asked().1);
}
