//! The snapshots service over its socket, asked as containerd asks: containerd's own conformance cases, and the sequences
//! of calls that its versions make. Needs root and overlayfs.

mod conformance;
mod sequences;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::BoxFuture;
use headstart::chain::{Key, Labels, Layer, LayerSlot};
use headstart::chunked::Compression;
use headstart::daemon::node::layers::{Asked, Held, How, Layers, Offer, Offered, Shelves};
use headstart::daemon::node::{Node, NodeOptions};
use headstart::fetch::{FetchConfig, Fetcher, LayerImage};
use headstart::grpc::proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use headstart::grpc::proto::containerd::services::snapshots::v1::{
    CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
    RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest, UsageRequest, UsageResponse,
    ViewSnapshotRequest,
};
use headstart::grpc::proto::containerd::types::Mount;
use headstart::grpc::{Calls, Services, bind, connect, serve};
use headstart::model::DiffId;
use headstart::oci::labels::SNAPSHOT_REF;
use headstart::snapshots::{Snapshots, SnapshotsConfig};
use headstart::store::Store;
use headstart::sys::mount::{MountError, Unmount, unmount};
use headstart::sys::stack::{OverlayMount, mount_bind, mount_overlay};
use headstart::testkit::source::{Scripted, ScriptedSource, TestLayer};
use headstart::testkit::waiting::PATIENCE;
use headstart::testkit::waiting::wait_until;
use rustix::mount::MountFlags;
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tonic::transport::Channel;
use tonic::{Code, Status};

/// A server over a root of its own, and a client of it.
struct Stage {
    directory: TempDir,
    runtime: Runtime,
    world: Arc<World>,
    server: Mutex<Option<Server>>,
    client: SnapshotsClient<Channel>,
}

struct Server {
    close: oneshot::Sender<()>,
    serving: tokio::task::JoinHandle<()>,
    snapshots: Arc<Snapshots>,
    calls: Arc<Calls>,
}

/// Layers that can be served, by ChainID, and directories that show them.
struct World {
    fetcher: Fetcher,
    source: Arc<ScriptedSource>,
    /// With how many are below.
    served: Mutex<BTreeMap<String, (u64, Arc<LayerImage>)>>,
    /// containerd takes mounts that can only be read for a layer that need not come.
    stages: bool,
    shelf: PathBuf,
    held: Mutex<Vec<LayerSlot>>,
    offers: AtomicU64,
    /// No offer is ever made.
    silent: Mutex<bool>,
    /// Layers cannot be shown.
    broken: Mutex<bool>,
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("World")
    }
}

#[derive(Debug)]
struct Shown {
    world: Arc<World>,
    slot: LayerSlot,
    path: PathBuf,
}

impl Held for Shown {
    fn path(&self) -> &Path {
        &self.path
    }

    fn leave(&self) {}
}

impl Drop for Shown {
    fn drop(&mut self) {
        self.world.held.lock().unwrap().retain(|slot| *slot != self.slot);
        match fs::remove_dir_all(&self.path) {
            // The whole world is gone.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            removed => removed.unwrap(),
        }
    }
}

/// The world as the node sees it.
#[derive(Debug)]
struct Window(Arc<World>);

impl Layers for Window {
    fn offer(&self, asked: Asked) -> BoxFuture<'_, Offer> {
        Box::pin(async move {
            self.0.offers.fetch_add(1, Ordering::Relaxed);
            if *self.0.silent.lock().unwrap() {
                std::future::pending::<()>().await;
            }
            let reference = asked.labels.get(SNAPSHOT_REF).cloned().unwrap_or_default();
            let served = self.0.served.lock().unwrap();
            let Some((below, image)) = served.get(&reference) else { return Offer::Ordinary("unknown".to_owned()) };
            let how = match (asked.parent, *below == 0) {
                (None, false) if self.0.stages => How::Staged,
                (None, false) => return Offer::Ordinary("its parent is not known".to_owned()),
                _ => How::Commit,
            };
            let labels = Labels::from([("headstart.test".to_owned(), reference.clone())]);
            Offer::Layer(Offered { image: Arc::clone(image), name: Key::new(&reference).unwrap(), how, labels })
        })
    }

    fn again<'a>(&'a self, _: &'a Layer, labels: &'a [Labels]) -> BoxFuture<'a, anyhow::Result<Arc<LayerImage>>> {
        Box::pin(async move {
            let reference = labels.iter().find_map(|labels| labels.get("headstart.test"));
            let found =
                reference.and_then(|name| self.0.served.lock().unwrap().get(name).cloned()).map(|(_, image)| image);
            found.ok_or_else(|| anyhow::anyhow!("nothing was kept"))
        })
    }
}

impl Shelves for Window {
    fn hold(&self, layer: &Arc<LayerImage>, slot: LayerSlot) -> anyhow::Result<Box<dyn Held>> {
        anyhow::ensure!(!*self.0.broken.lock().unwrap(), "the kernel does not want to");
        let path = self.0.shelf.join(slot.to_string());
        fs::create_dir_all(&path)?;
        fs::write(path.join(format!("of-{}", layer.diff_id())), b"layer")?;
        self.0.held.lock().unwrap().push(slot);
        Ok(Box::new(Shown { world: Arc::clone(&self.0), slot, path }))
    }
}

impl Stage {
    /// containerd brings every layer that is not [`Stage::offer`]ed.
    fn new() -> Self {
        Self::with(false)
    }

    fn with(stages: bool) -> Self {
        // Sockets have short names.
        let directory = tempfile::Builder::new().prefix("hs").tempdir_in("/tmp").unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let store = Arc::new(Store::open(&directory.path().join("root")).unwrap());
        let world = Arc::new(World {
            fetcher: Fetcher::new(store, runtime.handle().clone(), FetchConfig::default()).unwrap(),
            source: ScriptedSource::new(1000),
            served: Mutex::default(),
            stages,
            shelf: directory.path().join("l"),
            held: Mutex::default(),
            offers: AtomicU64::new(0),
            silent: Mutex::new(false),
            broken: Mutex::new(false),
        });
        let client = {
            let _inside = runtime.enter();
            SnapshotsClient::new(connect(&directory.path().join("sock")))
        };
        let stage = Self { directory, runtime, world, server: Mutex::default(), client };
        stage.start();
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Serves what is recorded.
    fn start(&self) {
        let store = Arc::new(Store::open(&self.path("root")).unwrap());
        let (snapshots, _) = Snapshots::open(store, SnapshotsConfig { sync: false }).unwrap();
        let snapshots = Arc::new(snapshots);
        let window = Arc::new(Window(Arc::clone(&self.world)));
        let options = NodeOptions {
            prepare_timeout: Duration::from_secs(1),
            fill: None,
            links: self.path("f"),
            mapped: self.path("m"),
            xino: true,
        };
        let node = Node::new(Arc::clone(&snapshots), window.clone(), window, options, self.runtime.handle().clone());
        let node = node.unwrap();
        let calls = Arc::<Calls>::default();
        let services = Services { snapshotter: Arc::new(node.clone()), differ: None, calls: Arc::clone(&calls) };
        let (close, closed) = oneshot::channel::<()>();
        let listener = self.runtime.block_on(async {
            let listener = bind(&self.path("sock")).unwrap();
            node.bring_back().await;
            listener
        });
        let serving = self.runtime.spawn(async move {
            serve(listener, services, async { closed.await.unwrap_or_default() }).await.unwrap();
        });
        *self.server.lock().unwrap() = Some(Server { close, serving, snapshots, calls });
    }

    /// Ends the server, as if its process had died: nothing is tidied up.
    fn stop(&self) {
        let Server { close, serving, snapshots, .. } = self.server.lock().unwrap().take().unwrap();
        serving.abort();
        drop(close);
        self.runtime.block_on(async { serving.await.unwrap_err() });
        // Calls and measurements that were begun are finished, and have the records open until then.
        let deadline = std::time::Instant::now() + PATIENCE;
        let mut left = snapshots;
        loop {
            match Arc::try_unwrap(left) {
                Ok(snapshots) => break drop(snapshots),
                Err(shared) => left = shared,
            }
            assert!(std::time::Instant::now() < deadline, "somebody keeps the records open");
            std::thread::yield_now();
        }
    }

    fn snapshots(&self) -> Arc<Snapshots> {
        Arc::clone(&self.server.lock().unwrap().as_ref().unwrap().snapshots)
    }

    /// Lets the layer that becomes `chain`, with `below` others below it, be served from now on.
    fn offer(&self, chain: &str, below: u64) -> DiffId {
        let layer = TestLayer::seeded(&[4096, 100], Compression::Zstd, below + 1);
        self.world.source.add_as(layer.spec.blob, &layer.bytes);
        let source = Arc::new(Scripted(Arc::clone(&self.world.source)));
        let image = self.runtime.block_on(self.world.fetcher.open_layer(layer.spec.clone(), source)).unwrap();
        self.world.served.lock().unwrap().insert(chain.to_owned(), (below, image));
        layer.spec.diff_id
    }

    fn held(&self) -> Vec<LayerSlot> {
        let mut held = self.world.held.lock().unwrap().clone();
        held.sort();
        held
    }

    fn ask<T, F>(&self, call: impl FnOnce(SnapshotsClient<Channel>) -> F) -> Result<T, Status>
    where
        F: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let answer = self.runtime.block_on(async { tokio::time::timeout(PATIENCE, call(self.client.clone())).await });
        answer.expect("an answer in time").map(tonic::Response::into_inner)
    }

    fn prepare_with(&self, key: &str, parent: &str, labels: &[(&str, &str)]) -> Result<Vec<Mount>, Status> {
        let (key, parent, labels) = (key.to_owned(), parent.to_owned(), owned(labels));
        let request = PrepareSnapshotRequest { snapshotter: "headstart".to_owned(), key, parent, labels };
        self.ask(|mut client| async move { client.prepare(request).await }).map(|answer| answer.mounts)
    }

    fn prepare(&self, key: &str, parent: &str) -> Vec<Mount> {
        self.prepare_with(key, parent, &[ROOT_LABEL]).unwrap()
    }

    fn view_with(&self, key: &str, parent: &str, labels: &[(&str, &str)]) -> Result<Vec<Mount>, Status> {
        let (key, parent, labels) = (key.to_owned(), parent.to_owned(), owned(labels));
        let request = ViewSnapshotRequest { snapshotter: String::new(), key, parent, labels };
        self.ask(|mut client| async move { client.view(request).await }).map(|answer| answer.mounts)
    }

    fn view(&self, key: &str, parent: &str) -> Vec<Mount> {
        self.view_with(key, parent, &[ROOT_LABEL]).unwrap()
    }

    fn mounts(&self, key: &str) -> Result<Vec<Mount>, Status> {
        let request = MountsRequest { snapshotter: String::new(), key: key.to_owned() };
        self.ask(|mut client| async move { client.mounts(request).await }).map(|answer| answer.mounts)
    }

    /// `parent` is field 5: without it a server loses the parents of layers that were prepared at once.
    fn commit_with(&self, name: &str, key: &str, parent: &str, labels: &[(&str, &str)]) -> Result<(), Status> {
        let request = CommitSnapshotRequest {
            snapshotter: String::new(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels: owned(labels),
            parent: parent.to_owned(),
        };
        self.ask(|mut client| async move { client.commit(request).await })
    }

    fn commit(&self, name: &str, key: &str) {
        self.commit_with(name, key, "", &[ROOT_LABEL]).unwrap();
    }

    fn remove(&self, key: &str) -> Result<(), Status> {
        let request = RemoveSnapshotRequest { snapshotter: String::new(), key: key.to_owned() };
        self.ask(|mut client| async move { client.remove(request).await })
    }

    fn stat(&self, key: &str) -> Result<Info, Status> {
        let request = StatSnapshotRequest { snapshotter: String::new(), key: key.to_owned() };
        self.ask(|mut client| async move { client.stat(request).await }).map(|answer| answer.info.unwrap())
    }

    fn update(&self, info: Info, fields: &[&str]) -> Result<Info, Status> {
        let paths = fields.iter().map(|field| (*field).to_owned()).collect();
        let update_mask = (!fields.is_empty()).then_some(prost_types::FieldMask { paths });
        let request = UpdateSnapshotRequest { snapshotter: String::new(), info: Some(info), update_mask };
        self.ask(|mut client| async move { client.update(request).await }).map(|answer| answer.info.unwrap())
    }

    fn list(&self, filters: &[&str]) -> Result<Vec<Info>, Status> {
        let filters = filters.iter().map(|filter| (*filter).to_owned()).collect();
        let request = ListSnapshotsRequest { snapshotter: String::new(), filters };
        let mut client = self.client.clone();
        self.runtime.block_on(async move {
            let mut stream = client.list(request).await?.into_inner();
            let mut found = Vec::new();
            while let Some(message) = stream.message().await? {
                found.extend(message.info);
            }
            Ok(found)
        })
    }

    fn names(&self, filters: &[&str]) -> Vec<String> {
        self.list(filters).unwrap().into_iter().map(|info| info.name).collect()
    }

    fn usage(&self, key: &str) -> Result<UsageResponse, Status> {
        let request = UsageRequest { snapshotter: String::new(), key: key.to_owned() };
        self.ask(|mut client| async move { client.usage(request).await })
    }

    fn cleanup(&self) -> Result<(), Status> {
        let request = CleanupRequest { snapshotter: String::new() };
        self.ask(|mut client| async move { client.cleanup(request).await })
    }

    /// Makes the mounts on a new directory.
    fn mount(&self, mounts: &[Mount]) -> Mounted {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let target = self.path(&format!("m{}", NUMBER.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&target).unwrap();
        perform(mounts, &target);
        Mounted(target)
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(server) = self.server.lock().unwrap().take() {
            server.serving.abort();
        }
    }
}

/// What keeps containerd's garbage collection away.
const ROOT_LABEL: (&str, &str) = ("containerd.io/gc.root", "2026-11-22T00:00:00Z");

fn owned(labels: &[(&str, &str)]) -> HashMap<String, String> {
    labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

#[track_caller]
fn assert_code<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code) {
    match answer {
        Err(status) => assert_eq!(status.code(), code, "{status:?}"),
        Ok(answer) => panic!("{code:?} was expected, not {answer:?}"),
    }
}

/// A mount that ends with its owner.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        // Programs that other tests start have this one's files open for a moment.
        wait_until("the end of a mount", || match unmount(&self.0, Unmount::Strict) {
            Err(MountError::InUse(_)) => false,
            unmounted => unmounted.map(|()| true).unwrap(),
        });
        fs::remove_dir(&self.0).unwrap();
    }
}

/// Does what containerd does with mounts that it is told, and knows no option that it need not know.
fn perform(mounts: &[Mount], target: &Path) {
    let [Mount { r#type: kind, source, target: inner, options }] = mounts else { panic!("{mounts:?}") };
    assert_eq!(inner, "");
    if kind == "bind" {
        mount_bind(Path::new(source), target).unwrap();
        match &options.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            ["rw", "rbind"] => {}
            ["ro", "rbind"] => {
                rustix::mount::mount_remount(target, MountFlags::BIND | MountFlags::RDONLY, "").unwrap();
            }
            other => panic!("{other:?}"),
        }
        return;
    }
    assert_eq!((kind.as_str(), source.as_str()), ("overlay", "overlay"));
    let option = |name: &str| options.iter().find_map(|option| option.strip_prefix(name)?.strip_prefix('='));
    let known = |option: &&String| {
        ["index=", "xino=", "workdir=", "upperdir=", "lowerdir="].iter().any(|known| option.starts_with(known))
    };
    assert_eq!(options.iter().filter(known).count(), options.len(), "{options:?}");
    let lowers: Vec<PathBuf> = option("lowerdir").unwrap().split(':').map(PathBuf::from).collect();
    let upper = option("upperdir").map(|upper| (Path::new(upper), Path::new(option("workdir").unwrap())));
    mount_overlay(&OverlayMount { source: "overlay", lowers: &lowers, upper }, target).unwrap();
}
