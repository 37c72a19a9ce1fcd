//! Layers that are applied through the diff service, asked for as containerd asks: one after the other, and all at once.
//! Needs root: the kernel mounts what came of them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use headstart::chain::{Content, Kind, LayerSlot, Snapshot};
use headstart::daemon::node::diff::{ContentStore, NodeDiffer, WithTars};
use headstart::daemon::node::layers::{Held, Nothing, Shelves};
use headstart::daemon::node::{Node, NodeOptions};
use headstart::fetch::{FetchConfig, Fetcher, LayerImage};
use headstart::grpc::proto::containerd::services::diff::v1::diff_client::DiffClient;
use headstart::grpc::proto::containerd::services::diff::v1::{ApplyRequest, DiffRequest};
use headstart::grpc::proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use headstart::grpc::proto::containerd::services::snapshots::v1::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
};
use headstart::grpc::proto::containerd::types::{Descriptor, Mount};
use headstart::grpc::{Calls, Services, bind, connect, serve};
use headstart::model::{Algorithm, BlobDigest, ChainId, DiffId, Digest};
use headstart::snapshots::{Snapshots, SnapshotsConfig};
use headstart::store::{Store, image_path};
use headstart::tar::decompress::Compression;
use headstart::testkit::containerd::FakeContainerd;
use headstart::testkit::layers::{Options, Stack, compress, plain_tar, stacks};
use headstart::testkit::tree::Listing;
use proptest::prelude::*;
use proptest::sample::Index;
use tokio::sync::oneshot;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::convert_image::comparable;
use super::mounts::{Kernel, run};

const MIXED: [Compression; 3] = [Compression::Gzip, Compression::Plain, Compression::Zstd];

/// Directories that show nothing.
#[derive(Debug)]
struct Empty(PathBuf);

#[derive(Debug)]
struct Shown(PathBuf);

impl Shelves for Empty {
    fn hold(&self, layer: &Arc<LayerImage>, slot: LayerSlot) -> anyhow::Result<Box<dyn Held>> {
        anyhow::ensure!(layer.is_complete(), "the layer is not here");
        let path = self.0.join(slot.0.to_string());
        std::fs::create_dir_all(&path)?;
        Ok(Box::new(Shown(path)))
    }
}

impl Held for Shown {
    fn path(&self) -> &Path {
        &self.0
    }

    fn leave(&self) {}
}

/// A node and whoever asks it.
struct Stage {
    dir: tempfile::TempDir,
    containerd: FakeContainerd,
    node: Option<Serving>,
}

struct Serving {
    node: Node,
    snapshots: Arc<Snapshots>,
    channel: Channel,
    stop: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<()>,
}

/// A layer as containerd knows it.
#[derive(Clone)]
struct Layer {
    blob: Vec<u8>,
    media_type: &'static str,
    diff_id: DiffId,
    chain: ChainId,
    below: Option<ChainId>,
}

impl Layer {
    fn all(tars: &[Vec<u8>]) -> Vec<Self> {
        let digest = |bytes: &[u8]| Digest::of(Algorithm::Sha256, bytes);
        let mut below = None;
        let layers = tars.iter().zip(MIXED.iter().cycle()).map(|(tar, compression)| {
            let diff_id = DiffId(digest(tar));
            let chain = ChainId::on(below, diff_id);
            let media_type = match compression {
                Compression::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
                Compression::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
                Compression::Plain => "application/vnd.docker.image.rootfs.diff.tar",
            };
            Self { blob: compress(tar, *compression), media_type, diff_id, chain, below: below.replace(chain) }
        });
        layers.collect()
    }

    fn digest(&self) -> BlobDigest {
        BlobDigest(Digest::of(Algorithm::Sha256, &self.blob))
    }

    fn descriptor(&self) -> Descriptor {
        Descriptor {
            media_type: self.media_type.to_owned(),
            digest: self.digest().to_string(),
            size: i64::try_from(self.blob.len()).unwrap(),
            ..Descriptor::default()
        }
    }

    fn key(&self) -> String {
        format!("default/1/extract-1 {}", self.chain)
    }

    fn name(&self) -> String {
        format!("default/2/{}", self.chain)
    }
}

impl Stage {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let containerd = FakeContainerd::start(&dir.path().join("containerd.sock"), "2.4.0");
        let mut stage = Self { dir, containerd, node: None };
        stage.start().await;
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts the node, anew if it was there.
    async fn start(&mut self) {
        if let Some(Serving { node, snapshots, channel, stop, task }) = self.node.take() {
            drop((channel, stop));
            task.await.unwrap();
            drop((node, snapshots));
        }
        let runtime = tokio::runtime::Handle::current();
        let store = Arc::new(Store::open(&self.path("root")).unwrap());
        let fetcher = Fetcher::new(Arc::clone(&store), runtime.clone(), FetchConfig::default()).unwrap();
        let patience = Duration::from_secs(60);
        let open = move || Snapshots::open_patiently(&store, SnapshotsConfig::default(), patience).unwrap();
        let snapshots = Arc::new(tokio::task::spawn_blocking(open).await.unwrap());
        let (links, mapped) = (self.path("f"), self.path("m"));
        let options = NodeOptions { prepare_timeout: patience, fill: None, links, mapped, xino: true };
        let layers = Arc::new(WithTars::new(fetcher.clone(), Arc::new(Nothing)));
        let shelves = Arc::new(Empty(self.path("shown")));
        let node = Node::new(Arc::clone(&snapshots), layers, shelves, options, runtime).unwrap();
        node.bring_back().await;
        let content = ContentStore { containerd: connect(self.containerd.socket()), directory: self.path("content") };
        let differ = NodeDiffer::new(node.clone(), fetcher, content);
        let services = Services {
            snapshotter: Arc::new(node.clone()),
            differ: Some(Arc::new(differ)),
            calls: Arc::<Calls>::default(),
        };
        let socket = self.path("node.sock");
        let listener = bind(&socket).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(async move { serve(listener, services, async { drop(stopped.await) }).await.unwrap() });
        self.node = Some(Serving { node, snapshots, channel: connect(&socket), stop, task });
    }

    fn node(&self) -> &Serving {
        self.node.as_ref().unwrap()
    }

    fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.node().channel.clone())
    }

    /// Puts the blob where containerd has it: into its directory, or behind its service.
    fn download(&self, layer: &Layer, as_file: bool) {
        if as_file {
            let directory = self.path("content/blobs/sha256");
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(directory.join(layer.digest().0.hex()), &layer.blob).unwrap();
        } else {
            self.containerd.put("default", &layer.blob, ("r.example", "app"));
        }
    }

    async fn prepare(&self, key: String, parent: String, labels: &[(&str, String)]) -> Vec<Mount> {
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        let request = PrepareSnapshotRequest { snapshotter: "headstart".to_owned(), key, parent, labels };
        self.snapshots().prepare(request).await.unwrap().into_inner().mounts
    }

    async fn apply(&self, diff: Descriptor, mounts: Vec<Mount>) -> Result<Descriptor, Status> {
        let request = ApplyRequest { diff: Some(diff), mounts, ..ApplyRequest::default() };
        let answer = DiffClient::new(self.node().channel.clone()).apply(request).await?;
        Ok(answer.into_inner().applied.unwrap())
    }

    async fn commit(&self, layer: &Layer, parent: String, labels: &[(&str, String)]) {
        let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        let (name, key) = (layer.name(), layer.key());
        let request = CommitSnapshotRequest { snapshotter: "headstart".to_owned(), name, key, labels, parent };
        self.snapshots().commit(request).await.unwrap();
    }

    async fn remove(&self, key: String) {
        let request = RemoveSnapshotRequest { snapshotter: "headstart".to_owned(), key };
        self.snapshots().remove(request).await.unwrap();
    }

    fn stat(&self, key: &str) -> Snapshot {
        self.node().snapshots.stat(key).unwrap()
    }

    /// Unpacks as another differ does, whose layers are these directories.
    async fn unpack_elsewhere(&self, layers: &[Layer], directories: &[PathBuf]) {
        let mut parent = String::new();
        for (layer, directory) in layers.iter().zip(directories) {
            let labels = labels(layer, false);
            let mounts = self.prepare(layer.key(), parent.clone(), &labels).await;
            copy_tree(directory, &upper_of(&mounts));
            self.commit(layer, parent, &labels).await;
            parent = layer.name();
        }
    }

    /// Unpacks as containerd does one layer after the other.
    async fn unpack(&self, layers: &[Layer]) {
        self.unpack_on(String::new(), layers).await;
    }

    async fn unpack_on(&self, mut parent: String, layers: &[Layer]) {
        for (number, layer) in layers.iter().enumerate() {
            self.download(layer, number % 2 == 0);
            let labels = labels(layer, false);
            let mounts = self.prepare(layer.key(), parent.clone(), &labels).await;
            let applied = self.apply(layer.descriptor(), mounts).await.unwrap();
            assert_eq!(applied.digest, layer.diff_id.to_string());
            self.commit(layer, parent, &labels).await;
            parent = layer.name();
        }
    }

    /// Unpacks as containerd does all layers at once, the last one first.
    async fn unpack_at_once(&self, layers: &[Layer]) {
        let mut prepared = Vec::new();
        for layer in layers {
            prepared.push(self.prepare(layer.key(), String::new(), &labels(layer, true)).await);
        }
        let applies = layers.iter().zip(prepared).enumerate().rev().map(|(number, (layer, mounts))| {
            self.download(layer, number % 2 == 1);
            self.apply(layer.descriptor(), mounts)
        });
        let applied = futures::future::join_all(applies).await;
        for (layer, applied) in layers.iter().rev().zip(applied) {
            assert_eq!(applied.unwrap().digest, layer.diff_id.to_string());
        }
        let mut parent = String::new();
        for layer in layers {
            self.commit(layer, parent, &labels(layer, true)).await;
            parent = layer.name();
        }
    }

    /// The images that the committed snapshots of `layers` show.
    fn images(&self, layers: &[Layer]) -> Vec<Vec<u8>> {
        let all = self.node().snapshots.all();
        let mut below: Option<String> = None;
        let images = layers.iter().map(|layer| {
            let snapshot = all.stat(&layer.name()).unwrap();
            assert_eq!(snapshot.kind, Kind::Committed);
            assert_eq!(snapshot.parent.as_ref().map(|parent| parent.as_str().to_owned()), below);
            below = Some(layer.name());
            self.image(layer)
        });
        images.collect()
    }

    /// The image that the committed snapshot of `layer` shows.
    fn image(&self, layer: &Layer) -> Vec<u8> {
        let all = self.node().snapshots.all();
        let snapshot = all.stat(&layer.name()).unwrap();
        let Content::Layer(slot) = snapshot.content else { panic!("{snapshot:?} is no layer") };
        let id = &all.layer(slot).unwrap().id;
        assert_eq!((id.diff_id, id.blob), (layer.diff_id, layer.digest()));
        let path = image_path(&self.path("root"), &id.blob, &id.anchor).unwrap();
        std::fs::read(path).unwrap()
    }
}

/// The directory that is written to through `mounts`.
fn upper_of(mounts: &[Mount]) -> PathBuf {
    let [Mount { source, options, .. }] = mounts else { panic!("{mounts:?}") };
    options.iter().find_map(|option| option.strip_prefix("upperdir=")).unwrap_or(source).into()
}

/// Copies everything that a layer may say of its files: marks, attributes, links, times.
fn copy_tree(from: &Path, to: &Path) {
    run("cp", &["-a", &format!("{}/.", from.display()), to.to_str().unwrap()]);
}

fn labels(layer: &Layer, at_once: bool) -> Vec<(&'static str, String)> {
    let mut labels = vec![("containerd.io/snapshot.ref", layer.chain.to_string())];
    if at_once {
        labels.extend(layer.below.map(|below| ("containerd.io/snapshot/parent-chain-id", below.to_string())));
    }
    labels
}

fn difference(stack: &Stack, images: &[Vec<u8>]) -> Option<String> {
    let kernel = Kernel::stack(images);
    let shown = Listing::of_overlay(kernel.tree()).unwrap();
    comparable(stack.expected()).difference(&comparable(shown))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn applied_layers_show_what_they_say(stack in stacks(Options::default()), at_once in any::<bool>()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let images = runtime.block_on(async {
            let stage = Stage::new().await;
            let layers = Layer::all(&stack.tars());
            if at_once {
                stage.unpack_at_once(&layers).await;
            } else {
                stage.unpack(&layers).await;
            }
            stage.images(&layers)
        });
        let difference = difference(&stack, &images);
        prop_assert!(difference.is_none(), "{}", difference.unwrap_or_default());
    }

    /// It makes no difference for a layer who has applied those below it.
    #[test]
    fn layers_on_what_another_differ_has_unpacked(stack in stacks(Options::default()), split in any::<Index>()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (expected, found) = runtime.block_on(async {
            let stage = Stage::new().await;
            let layers = Layer::all(&stack.tars());
            stage.unpack(&layers).await;
            let images = stage.images(&layers);
            let split = split.index(layers.len()) + 1;
            let (elsewhere, ours) = layers.split_at(split);
            let other = Stage::new().await;
            other.unpack_elsewhere(elsewhere, Kernel::stack(&images).layers()).await;
            other.unpack_on(elsewhere.last().unwrap().name(), ours).await;
            (images[split..].to_vec(), ours.iter().map(|layer| other.image(layer)).collect::<Vec<_>>())
        });
        prop_assert!(expected == found, "another image came of the same tar");
    }
}

fn three() -> Vec<Layer> {
    Layer::all(&[
        plain_tar(&[("etc/passwd", b"root"), ("etc/big", &[7; 100_000])]),
        plain_tar(&[("etc/.wh.passwd", b""), ("bin/sh", b"shell")]),
        plain_tar(&[("bin/sh", b"other shell")]),
    ])
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_ours_is_left_to_others() {
    let stage = Stage::new().await;
    let layers = three();
    let lower = &layers[0];
    let mounts = stage.prepare(lower.key(), String::new(), &labels(lower, false)).await;
    let mount = |kind: &str, source: &str, options: &[&str]| {
        let options = options.iter().map(|&option| option.to_owned()).collect();
        vec![Mount { r#type: kind.to_owned(), source: source.to_owned(), target: String::new(), options }]
    };
    let erofs = Descriptor { media_type: "application/vnd.erofs.layer.v1".to_owned(), ..lower.descriptor() };
    let strange = Descriptor { media_type: "application/x-strange".to_owned(), ..lower.descriptor() };
    let nameless = Descriptor { digest: "../../etc".to_owned(), ..lower.descriptor() };
    let root = stage.path("root").display().to_string();
    for (diff, mounts) in [
        (erofs, mounts.clone()),
        (strange, mounts.clone()),
        (nameless, mounts.clone()),
        (lower.descriptor(), Vec::new()),
        (lower.descriptor(), mounts.iter().cloned().chain(mounts.clone()).collect()),
        (lower.descriptor(), mount("bind", "/etc", &["rw"])),
        (lower.descriptor(), mount("bind", &format!("{root}/snapshots/77/upper"), &["rw"])),
        (lower.descriptor(), mount("bind", &format!("{root}/snapshots/1/../1/upper"), &["rw"])),
        (lower.descriptor(), mount("overlay", "overlay", &["upperdir=/var/lib/containerd/x/fs"])),
        (lower.descriptor(), mount("erofs", "/dev/loop0", &[])),
    ] {
        let error = stage.apply(diff.clone(), mounts.clone()).await.unwrap_err();
        assert_eq!(error.code(), Code::Unimplemented, "{diff:?} {mounts:?}: {error:?}");
    }
    let error = DiffClient::new(stage.node().channel.clone()).diff(DiffRequest::default()).await.unwrap_err();
    assert_eq!(error.code(), Code::Unimplemented);
}

/// Who waits for a layer that another differ applies waits for its commit.
#[tokio::test(flavor = "multi_thread")]
async fn a_layer_above_one_that_another_differ_applies() {
    let stage = Stage::new().await;
    let layers = three();
    let [lower, upper, _] = &layers[..] else { unreachable!() };
    let below = stage.prepare(lower.key(), String::new(), &labels(lower, true)).await;
    let mounts = stage.prepare(upper.key(), String::new(), &labels(upper, true)).await;
    stage.download(upper, true);
    let strange = Descriptor { media_type: "application/x-strange".to_owned(), ..lower.descriptor() };
    assert_eq!(stage.apply(strange, below.clone()).await.unwrap_err().code(), Code::Unimplemented);
    let elsewhere = async {
        let directory = upper_of(&below);
        std::fs::create_dir(directory.join("etc")).unwrap();
        std::fs::write(directory.join("etc/passwd"), "root").unwrap();
        stage.commit(lower, String::new(), &labels(lower, true)).await;
    };
    let (applied, ()) = tokio::join!(stage.apply(upper.descriptor(), mounts), elsewhere);
    assert_eq!(applied.unwrap().digest, upper.diff_id.to_string());
    stage.commit(upper, lower.name(), &labels(upper, true)).await;
    assert_eq!(stage.stat(&lower.name()).content, Content::Files);
    assert!(!stage.image(upper).is_empty());
}

/// What one pull gives up is not taken from another of the same image.
#[tokio::test(flavor = "multi_thread")]
async fn pulls_of_one_image_in_two_namespaces_go_on_alone() {
    let stage = Stage::new().await;
    let layers = three();
    let [lower, upper, _] = &layers[..] else { unreachable!() };
    let other = |layer: &Layer| format!("other/1/extract-2 {}", layer.chain);
    let below = stage.prepare(lower.key(), String::new(), &labels(lower, true)).await;
    let mounts = stage.prepare(upper.key(), String::new(), &labels(upper, true)).await;
    for layer in [lower, upper] {
        stage.prepare(other(layer), String::new(), &labels(layer, true)).await;
        stage.download(layer, true);
    }
    // The upper one waits; meanwhile the other pull ends, and only then the lower one comes.
    let goes_on = async {
        stage.remove(other(lower)).await;
        stage.remove(other(upper)).await;
        stage.apply(lower.descriptor(), below).await
    };
    let (above, below) = tokio::join!(stage.apply(upper.descriptor(), mounts), goes_on);
    assert_eq!(below.unwrap().digest, lower.diff_id.to_string());
    assert_eq!(above.unwrap().digest, upper.diff_id.to_string());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_not_what_it_should_be_leaves_the_snapshot_as_it_was() {
    let stage = Stage::new().await;
    let layers = three();
    let [lower, upper, _] = &layers[..] else { unreachable!() };
    // Parallel unpacking without the label that says what is below: containerd 2.2.
    let mounts = stage.prepare(upper.key(), String::new(), &labels(upper, false)).await;
    stage.download(upper, true);
    let error = stage.apply(upper.descriptor(), mounts.clone()).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.message().contains("does not belong where it is to be applied"), "{error:?}");
    // A layer of another image in its place.
    stage.download(lower, false);
    let error = stage.apply(lower.descriptor(), mounts.clone()).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
    // A blob that containerd does not have, one that is no tar, one that is cut.
    let missing = Layer { blob: b"nowhere".to_vec(), ..upper.clone() };
    assert_eq!(stage.apply(missing.descriptor(), mounts.clone()).await.unwrap_err().code(), Code::Unavailable);
    let noise = Layer { blob: vec![0x5a; 10_000], ..upper.clone() };
    stage.download(&noise, true);
    assert_eq!(stage.apply(noise.descriptor(), mounts.clone()).await.unwrap_err().code(), Code::FailedPrecondition);
    let cut = Layer { blob: lower.blob[..lower.blob.len() / 2].to_vec(), ..upper.clone() };
    stage.download(&cut, false);
    assert_eq!(stage.apply(cut.descriptor(), mounts.clone()).await.unwrap_err().code(), Code::Unavailable);
    let snapshot = stage.stat(&upper.key());
    assert_eq!((snapshot.kind, snapshot.content), (Kind::Active, Content::Files));
    assert!(upper_of(&mounts).is_dir());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_a_layer_that_is_given_up_is_told() {
    let stage = Stage::new().await;
    let layers = three();
    let [lower, upper, _] = &layers[..] else { unreachable!() };
    stage.prepare(lower.key(), String::new(), &labels(lower, true)).await;
    let mounts = stage.prepare(upper.key(), String::new(), &labels(upper, true)).await;
    stage.download(upper, true);
    let waiting = stage.apply(upper.descriptor(), mounts.clone());
    let (failed, ()) = tokio::join!(waiting, stage.remove(lower.key()));
    assert!(matches!(failed.unwrap_err().code(), Code::FailedPrecondition | Code::Unavailable));
    // And everything from the beginning.
    stage.remove(upper.key()).await;
    stage.unpack_at_once(&layers).await;
    assert_eq!(stage.images(&layers).len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn applied_layers_are_shared_and_survive_a_restart() {
    let mut stage = Stage::new().await;
    let layers = three();
    stage.unpack(&layers).await;
    let before = stage.images(&layers);
    let shown = stage.node().node.shown();
    assert_eq!(shown.len(), 3);
    stage.start().await;
    assert_eq!(stage.node().node.shown(), shown, "not all layers are shown again");
    assert_eq!(stage.images(&layers), before);
    // Again, in another namespace: nothing is read, because the blob is not there any more.
    std::fs::remove_dir_all(stage.path("content")).unwrap();
    let [lower, upper, _] = &layers[..] else { unreachable!() };
    let mounts = stage.prepare("other/7/x".to_owned(), lower.name(), &labels(upper, false)).await;
    for _ in 0..2 {
        let applied = stage.apply(upper.descriptor(), mounts.clone()).await.unwrap();
        assert_eq!(applied.digest, upper.diff_id.to_string());
    }
    assert_eq!(stage.node().node.shown(), shown);
    // A layer of which nobody says where it belongs is nobody else's.
    stage.download(lower, true);
    let mounts = stage.prepare("default/8/loose".to_owned(), String::new(), &[]).await;
    stage.apply(lower.descriptor(), mounts).await.unwrap();
    assert_eq!(stage.node().node.shown().len(), 4);
    for key in ["other/7/x", "default/8/loose"] {
        stage.remove(key.to_owned()).await;
    }
    let layers = stage.node().snapshots.layers();
    assert_eq!(layers.len(), 3);
}
