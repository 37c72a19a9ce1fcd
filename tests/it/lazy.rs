//! Lazy layers over the socket, as containerd's unpackers ask for them: one layer after the other, all at the same time, from
//! two namespaces, with labels that lie. A real daemon; a registry that does what it is told; a containerd that answers what it
//! is asked. Needs root, /dev/fuse and overlayfs.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use axum::http::Method;
use headstart::grpc::connect;
use headstart::grpc::proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use headstart::grpc::proto::containerd::services::snapshots::v1::{
    CommitSnapshotRequest, Info, Kind, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
    RemoveSnapshotRequest, StatSnapshotRequest,
};
use headstart::grpc::proto::containerd::types::Mount;
use headstart::model::{BlobDigest, ChainId};
use headstart::oci::labels::{IMAGE_REF, LAYER_DIGEST, MANIFEST_DIGEST, SNAPSHOT_REF};
use headstart::oci::{Config, Descriptor, Document, Manifest};
use headstart::sys::mount::{Unmount, unmount};
use headstart::testkit::containerd::FakeContainerd;
use headstart::testkit::registry::{Fault, FaultyRegistry};
use rustix::mount::MountFlags;
use tokio::runtime::Runtime;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::daemon::Daemon;
use crate::cli::stage::{Stage, noise, reference, tar};

/// How long the daemon lets a registry think before containerd has to bring a layer.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A stage with everything but the daemon.
struct Play {
    stage: Stage,
    registry: FaultyRegistry,
    containerd: FakeContainerd,
    runtime: Runtime,
}

/// An image as containerd pulls it: the original of a twin.
struct Image {
    reference: String,
    repository: String,
    manifest: BlobDigest,
    parsed: Manifest,
    chain: Vec<ChainId>,
    /// The twin's layers.
    served: Vec<BlobDigest>,
}

/// What an unpacker sees of the daemon.
struct Unpacker<'a> {
    runtime: &'a Runtime,
    client: SnapshotsClient<Channel>,
    namespace: &'static str,
    /// What of its snapshots is called how.
    number: u32,
}

impl Play {
    fn new(version: &str) -> Self {
        let stage = Stage::new();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let socket = stage.path("containerd.sock");
        let config = format!(
            "run = {:?}\n[registry]\ncerts_d = [{:?}]\ndocker_config = {:?}\nrounds = 2\n[fill]\nenabled = false\n\
             [containerd]\naddress = {socket:?}\nprepare_timeout = '{}s'\n",
            stage.path("run"),
            stage.path("certs.d"),
            stage.path("docker-config.json"),
            TIMEOUT.as_secs()
        );
        fs::write(stage.path("config.toml"), config).unwrap();
        let (registry, containerd) =
            runtime.block_on(async { (FaultyRegistry::start().await, FakeContainerd::start(&socket, version)) });
        Self { stage, registry, containerd, runtime }
    }

    /// Publishes an image of these layers as `repository:latest`, the original and its twin.
    fn publish(&self, repository: &str, tars: &[Vec<u8>]) -> Image {
        let name = format!("{}/{repository}:latest", self.registry.host());
        let (source, converted) = (format!("source-{repository}"), format!("converted-{repository}"));
        self.stage.images_at(&source, &converted, tars);
        self.stage.ok(&["convert", "--append", &reference(&self.stage.path(&source)), &format!("docker://{name}")]);
        self.registry.forget_seen();
        let top = self.registry.manifest(repository, "latest").unwrap();
        let Document::Index(index) = Document::parse(&top, None).unwrap() else { panic!("no index") };
        let manifest = |number: usize| {
            let digest = index.manifests[number].digest;
            let bytes = self.registry.manifest(repository, &digest.to_string()).unwrap();
            let Document::Manifest(parsed) = Document::parse(&bytes, None).unwrap() else { panic!("no manifest") };
            (digest, parsed)
        };
        let ((digest, parsed), (_, twin)) = (manifest(0), manifest(1));
        let config = Config::parse(self.registry.blob(&parsed.config.digest).unwrap().to_vec()).unwrap();
        let chain = ChainId::of_stack(config.diff_ids());
        let served = twin.layers.iter().map(|layer| layer.digest).collect();
        Image { reference: name, repository: repository.to_owned(), manifest: digest, parsed, chain, served }
    }

    /// What containerd has when it has fetched the documents of an image.
    fn pull(&self, namespace: &str, image: &Image) {
        let from = ("127.0.0.1", image.repository.as_str());
        let name = image.manifest.to_string();
        self.containerd.put(namespace, &self.registry.manifest(&image.repository, "latest").unwrap(), from);
        self.containerd.put(namespace, &self.registry.manifest(&image.repository, &name).unwrap(), from);
        self.containerd.put(namespace, &self.registry.blob(&image.parsed.config.digest).unwrap(), from);
    }

    fn unpacker(&self, namespace: &'static str) -> Unpacker<'_> {
        let _inside = self.runtime.enter();
        let client = SnapshotsClient::new(connect(&self.stage.path("run/headstart.sock")));
        Unpacker { runtime: &self.runtime, client, namespace, number: 0 }
    }

    /// Bytes of layers of an image that were asked for; whole blobs count more than any.
    fn fetched(&self, image: &Image) -> u64 {
        let tars = image.parsed.layers.iter().map(|layer| &layer.digest);
        let seen: Vec<_> = tars
            .chain(&image.served)
            .flat_map(|blob| self.registry.seen_at(&Method::GET, &format!("/blobs/{blob}")))
            .collect();
        let bytes = |range: Option<&str>| {
            let (first, last) = range?.strip_prefix("bytes=")?.split_once('-')?;
            Some(last.parse::<u64>().ok()? + 1 - first.parse::<u64>().ok()?)
        };
        seen.iter().map(|seen| bytes(seen.header("range")).unwrap_or(1 << 40)).sum()
    }
}

impl Image {
    fn labels(&self, layer: usize) -> HashMap<String, String> {
        HashMap::from([
            (SNAPSHOT_REF.to_owned(), self.chain[layer].to_string()),
            (IMAGE_REF.to_owned(), self.reference.clone()),
            (MANIFEST_DIGEST.to_owned(), self.manifest.to_string()),
            (LAYER_DIGEST.to_owned(), self.parsed.layers[layer].digest.to_string()),
        ])
    }
}

impl Unpacker<'_> {
    /// A key as containerd's metadata makes them.
    fn key(&mut self, name: &str) -> String {
        self.number += 1;
        format!("{}/{}/{name}", self.namespace, self.number)
    }

    fn prepare(&mut self, key: &str, parent: &str, labels: HashMap<String, String>) -> Result<Vec<Mount>, Box<Status>> {
        let (key, parent) = (key.to_owned(), parent.to_owned());
        let request = PrepareSnapshotRequest { snapshotter: "headstart".to_owned(), key, parent, labels };
        let answer = self.runtime.block_on(self.client.prepare(request)).map_err(Box::new)?;
        Ok(answer.into_inner().mounts)
    }

    fn extract(&mut self, image: &Image, layer: usize, parent: &str) -> (String, Result<Vec<Mount>, Box<Status>>) {
        let key = self.key(&format!("extract-{layer} {}", image.chain[layer]));
        let prepared = self.prepare(&key, parent, image.labels(layer));
        (key, prepared)
    }

    fn commit(&mut self, name: &str, key: &str, parent: &str, labels: HashMap<String, String>) {
        let (name, key, parent) = (name.to_owned(), key.to_owned(), parent.to_owned());
        let request = CommitSnapshotRequest { snapshotter: "headstart".to_owned(), name, key, labels, parent };
        self.runtime.block_on(self.client.commit(request)).unwrap();
    }

    fn mounts(&mut self, key: &str) -> Vec<Mount> {
        let request = MountsRequest { snapshotter: "headstart".to_owned(), key: key.to_owned() };
        self.runtime.block_on(self.client.mounts(request)).unwrap().into_inner().mounts
    }

    fn list(&mut self, filters: &[String]) -> Vec<Info> {
        let request = ListSnapshotsRequest { snapshotter: "headstart".to_owned(), filters: filters.to_vec() };
        self.runtime.block_on(async {
            let mut answers = self.client.list(request).await.unwrap().into_inner();
            let mut found = Vec::new();
            while let Some(answer) = answers.message().await.unwrap() {
                found.extend(answer.info);
            }
            found
        })
    }

    fn remove(&mut self, key: &str) -> Result<(), Code> {
        let request = RemoveSnapshotRequest { snapshotter: "headstart".to_owned(), key: key.to_owned() };
        self.runtime.block_on(self.client.remove(request)).map(drop).map_err(|status| status.code())
    }

    /// What containerd does when it is told that a layer exists: looks for it, and takes note of its name.
    #[track_caller]
    fn find(&mut self, chain: &ChainId, parent: &str) -> String {
        let filter = format!("labels.\"{SNAPSHOT_REF}\"=={chain},parent=={parent:?}");
        let mut found = self.list(&[filter]);
        found.retain(|info| info.kind == i32::from(Kind::Committed));
        let [only] = &found[..] else { panic!("{found:?}") };
        assert_eq!(only.parent, parent);
        assert_eq!(only.labels[SNAPSHOT_REF], chain.to_string());
        let request = StatSnapshotRequest { snapshotter: "headstart".to_owned(), key: only.name.clone() };
        let stat = self.runtime.block_on(self.client.stat(request)).unwrap().into_inner().info.unwrap();
        assert_eq!(stat, *only);
        only.name.clone()
    }

    /// Unpacks an image as every containerd does that goes one by one. All layers have to be served.
    #[track_caller]
    fn unpack(&mut self, image: &Image) -> Vec<String> {
        let mut names: Vec<String> = Vec::new();
        for layer in 0..image.chain.len() {
            let parent = names.last().cloned().unwrap_or_default();
            let (_, prepared) = self.extract(image, layer, &parent);
            let status = prepared.expect_err("a layer is to be unpacked");
            assert_eq!(status.code(), Code::AlreadyExists, "{status:?}");
            names.push(self.find(&image.chain[layer], &parent));
        }
        names
    }

    /// A container on `parent`: its key and its mounts.
    fn container(&mut self, parent: &str) -> (String, Vec<Mount>) {
        let key = self.key("container");
        let mounts = self.prepare(&key, parent, HashMap::new()).unwrap();
        assert_eq!(self.mounts(&key), mounts);
        (key, mounts)
    }
}

/// Mounts as containerd does it, looks, and unmounts.
#[track_caller]
fn look<T>(stage: &Stage, mounts: &[Mount], look: impl FnOnce(&Path) -> T) -> T {
    let [mount] = mounts else { panic!("{mounts:?}") };
    assert_eq!((mount.r#type.as_str(), mount.target.as_str()), ("overlay", ""));
    let at = stage.path("container");
    fs::create_dir_all(&at).unwrap();
    let options = std::ffi::CString::new(mount.options.join(",")).unwrap();
    rustix::mount::mount(mount.source.as_str(), &at, "overlay", MountFlags::empty(), options.as_c_str()).unwrap();
    let seen = look(&at);
    unmount(&at, Unmount::Strict).unwrap();
    seen
}

fn names(of: &Path) -> BTreeSet<String> {
    fs::read_dir(of).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// As containerd decides whether a preparation is staged: its last mount cannot be written to.
fn is_read_only(mounts: &[Mount]) -> bool {
    let Some(last) = mounts.last() else { return false };
    let has = |option: &str| last.options.iter().any(|found| found == option);
    match last.r#type.rsplit('/').next().unwrap() {
        "erofs" => true,
        "overlay" => has("ro") || !last.options.iter().any(|option| option.starts_with("upperdir=")),
        _ => has("ro"),
    }
}

/// The mounts that a differ fills.
#[track_caller]
fn assert_ordinary(prepared: Result<Vec<Mount>, Box<Status>>) {
    let mounts = prepared.expect("the layer is to be unpacked");
    assert!(!is_read_only(&mounts), "{mounts:?}");
}

fn large() -> Vec<u8> {
    noise(7, 4 << 20)
}

fn three_layers() -> Vec<Vec<u8>> {
    vec![
        tar(&[("dir/", b""), ("dir/large", &large()), ("dir/gone", b"x"), ("old/", b""), ("old/file", b"x")]),
        tar(&[("dir/.wh.gone", b""), ("old/", b""), ("old/.wh..wh..opq", b""), ("old/new", b"y")]),
        tar(&[("top", b"top"), ("dir/changed", b"changed")]),
    ]
}

#[track_caller]
fn assert_tree(play: &Play, mounts: &[Mount]) {
    look(&play.stage, mounts, |at| {
        assert_eq!(names(at), ["dir", "old", "top"].map(str::to_owned).into());
        assert_eq!(names(&at.join("dir")), ["changed", "large"].map(str::to_owned).into());
        assert_eq!(names(&at.join("old")), ["new".to_owned()].into());
        assert_eq!(fs::read(at.join("dir/large")).unwrap(), large());
        fs::write(at.join("written"), b"by the container").unwrap();
        fs::remove_file(at.join("written")).unwrap();
    });
}

#[test]
fn layers_exist_already_in_every_namespace_and_after_a_restart() {
    let play = Play::new("1.7.24");
    let image = play.publish("app", &three_layers());
    play.pull("k8s.io", &image);
    play.pull("default", &image);
    let daemon = Daemon::start(&play.stage);
    let mut kubernetes = play.unpacker("k8s.io");
    let names = kubernetes.unpack(&image);
    let chain: Vec<String> = image.chain.iter().map(ChainId::to_string).collect();
    assert_eq!(names, chain, "a name is the ChainID, so that namespaces share it");
    let stored: u64 = 4 << 20;
    assert!(
        play.fetched(&image) < stored / 2,
        "{} bytes were fetched to prepare {:?}",
        play.fetched(&image),
        play.registry.seen()
    );
    // Another namespace, at the same time as this one's container.
    let (key, mounts) = kubernetes.container(&names[2]);
    let before = play.registry.seen().len();
    let mut other = play.unpacker("default");
    assert_eq!(other.unpack(&image), names);
    assert_eq!(play.registry.seen().len(), before, "nothing is fetched twice");
    assert_tree(&play, &mounts);
    // Nothing is asked of anybody after a restart.
    daemon.kill();
    play.registry.script(Method::GET, "/", Fault::Status(503, Vec::new()), usize::MAX);
    play.containerd.set_hangs(true);
    let daemon = Daemon::start(&play.stage);
    let mut again = play.unpacker("k8s.io");
    again.number = 100;
    for (layer, name) in names.iter().enumerate() {
        let parent = layer.checked_sub(1).map_or("", |below| &names[below]);
        assert_eq!(again.find(&image.chain[layer], parent), *name);
    }
    assert_eq!(again.mounts(&key), mounts);
    assert_tree(&play, &again.mounts(&key));
    // Garbage: children before parents.
    assert_eq!(again.remove(&names[2]), Err(Code::FailedPrecondition));
    for name in [&key, &names[2], &names[1], &names[0]] {
        assert_eq!(again.remove(name), Ok(()), "{name}");
    }
    assert_eq!(again.list(&[]), Vec::new());
    daemon.end();
    play.stage.assert_clean();
}

#[test]
fn layers_are_staged_where_parents_are_missing() {
    let play = Play::new("v2.4.0-beta.0");
    let image = play.publish("app", &three_layers());
    play.pull("default", &image);
    let daemon = Daemon::start(&play.stage);
    let mut unpacker = play.unpacker("default");
    let prepared: Vec<_> = (0..3).map(|layer| unpacker.extract(&image, layer, "")).collect();
    let (_, lowest) = &prepared[0];
    assert_eq!(lowest.as_ref().unwrap_err().code(), Code::AlreadyExists);
    let mut parent = unpacker.find(&image.chain[0], "");
    for (layer, (key, prepared)) in prepared.iter().enumerate().skip(1) {
        assert!(is_read_only(prepared.as_ref().unwrap()), "{prepared:?}");
        let name = unpacker.key(&image.chain[layer].to_string());
        unpacker.commit(&name, key, &parent, image.labels(layer));
        parent = unpacker.find(&image.chain[layer], &parent);
        assert_eq!(parent, name);
    }
    let (_, mounts) = unpacker.container(&parent);
    assert_tree(&play, &mounts);
    // What was committed with its labels alone is back as well.
    daemon.kill();
    let daemon = Daemon::start(&play.stage);
    let mut again = play.unpacker("default");
    again.number = 100;
    let (_, mounts) = again.container(&parent);
    assert_tree(&play, &mounts);
    daemon.end();
}

#[test]
fn old_containerds_that_leave_out_parents_unpack_all_but_the_lowest() {
    let play = Play::new("2.2.7");
    let image = play.publish("app", &three_layers());
    play.pull("default", &image);
    let daemon = Daemon::start(&play.stage);
    let mut unpacker = play.unpacker("default");
    let (_, lowest) = unpacker.extract(&image, 0, "");
    assert_eq!(lowest.unwrap_err().code(), Code::AlreadyExists);
    for layer in 1..3 {
        let (_, prepared) = unpacker.extract(&image, layer, "");
        let mounts = prepared.expect("the layer is to be unpacked");
        // A bind mount would be filled without turning whiteouts.
        let [Mount { r#type, options, .. }] = &mounts[..] else { panic!("{mounts:?}") };
        assert_eq!((r#type.as_str(), options.len()), ("overlay", 1), "{mounts:?}");
        assert!(options[0].starts_with("upperdir="), "{mounts:?}");
    }
    let log = daemon.end();
    assert!(log.contains("rebase"), "what is to be done about it is told: {log}");
}

#[test]
fn labels_that_lie_lead_nowhere() {
    let play = Play::new("2.1.9");
    let image = play.publish("app", &three_layers());
    play.pull("default", &image);
    let other = play.runtime.block_on(FaultyRegistry::start());
    let daemon = Daemon::start(&play.stage);
    let mut unpacker = play.unpacker("default");
    let elsewhere = format!("localhost:{}/app:latest", other.host().rsplit(':').next().unwrap());
    let layout = format!("oci:{}", play.stage.path("source-app").display());
    let digest = Descriptor::of("", b"something else").digest.to_string();
    let hostile = [
        (IMAGE_REF, "x".repeat(5000)),
        (IMAGE_REF, elsewhere),
        (IMAGE_REF, layout),
        (IMAGE_REF, "oci-archive:/etc/passwd".to_owned()),
        (IMAGE_REF, "../../../etc/passwd".to_owned()),
        (IMAGE_REF, format!("{}/../app:latest", play.registry.host())),
        (IMAGE_REF, "app".to_owned()),
        (IMAGE_REF, format!("{}/app:a\nb", play.registry.host())),
        (MANIFEST_DIGEST, digest.clone()),
        (MANIFEST_DIGEST, "sha256:../../x".to_owned()),
        (MANIFEST_DIGEST, image.parsed.config.digest.to_string()),
        (LAYER_DIGEST, digest.clone()),
        (SNAPSHOT_REF, digest),
        (SNAPSHOT_REF, "/etc/passwd".to_owned()),
        (SNAPSHOT_REF, "y".repeat(5000)),
    ];
    for (label, value) in hostile {
        let mut labels = image.labels(0);
        labels.insert(label.to_owned(), value.clone());
        let key = unpacker.key("extract");
        let prepared = unpacker.prepare(&key, "", labels);
        let mounts = prepared.unwrap_or_else(|status| panic!("{label} = {value:?} gave {status:?}"));
        assert!(!is_read_only(&mounts), "{label} = {value:?} gave {mounts:?}");
    }
    // A layer that is prepared on something else than what is below it.
    let key = unpacker.key("extract");
    let prepared = unpacker.prepare(&key, "", HashMap::new());
    assert_ordinary(prepared);
    let odd = unpacker.key("odd");
    unpacker.commit(&odd, &key, "", HashMap::new());
    let (_, prepared) = unpacker.extract(&image, 1, &odd);
    assert_ordinary(prepared);
    assert_eq!(other.connections(), 0, "{:?}", other.seen());
    assert!(play.fetched(&image) < 2 << 20, "{} bytes were fetched", play.fetched(&image));
    // What does not lie is served.
    unpacker.unpack(&image);
    assert!(image.served.iter().all(|blob| !play.registry.seen_at(&Method::GET, &blob.to_string()).is_empty()));
    let tars = image.parsed.layers.iter().map(|layer| layer.digest.to_string());
    assert!(tars.into_iter().all(|blob| play.registry.seen_at(&Method::GET, &blob).is_empty()));
    daemon.end();
}

#[test]
fn a_registry_that_does_not_answer_costs_one_wait() {
    let play = Play::new("2.1.9");
    let image = play.publish("app", &three_layers());
    play.pull("default", &image);
    let daemon = Daemon::start(&play.stage);
    let mut unpacker = play.unpacker("default");
    play.registry.script(Method::GET, "/", Fault::Hang, usize::MAX);
    let begun = Instant::now();
    let (_, first) = unpacker.extract(&image, 0, "");
    assert_ordinary(first);
    assert!(begun.elapsed() >= TIMEOUT, "{:?}", begun.elapsed());
    let asked = play.registry.seen().len();
    for layer in 1..3 {
        let (_, prepared) = unpacker.extract(&image, layer, "");
        assert_ordinary(prepared);
    }
    assert_eq!(play.registry.seen().len(), asked, "it is asked again for every layer");
    // Another image of a registry that is there is not kept from being served.
    play.registry.clear_script();
    let other = play.publish("other", &[tar(&[("file", b"other")])]);
    play.pull("default", &other);
    unpacker.unpack(&other);
    daemon.end();
}
