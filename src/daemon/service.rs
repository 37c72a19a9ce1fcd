//! The daemon: a host that stays.
//!
//! Guarantees: one daemon per root and run directory. It begins without any registry: what a dead daemon left goes on under
//! its readers if its FUSE connection was kept, else it is taken away and mounted again from what was kept of the images; a
//! beginning that fails changes nothing of it. It ends when it is asked to. What outlives it stays for the next one, if that is
//! wanted; everything else is taken away, the latest mount first, also if it is in use, and is then served for
//! [`DaemonSettings::stop_timeout`](super::config::DaemonSettings) to those who have files open. A second request to end does
//! not wait for them.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use futures::future::join_all;
use tokio::net::UnixListener;
use tokio::runtime::Handle;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use super::api::{Api, Judge};
use super::config::{Config as Settings, LogLevel};
use super::host::{Host, Seat, Shelf};
use super::keeper::{Keeper, KeeperOptions};
use super::listener::{self, Limits};
use super::metrics;
use super::mounts::{Entry, Mounts};
use super::node::diff::{ContentStore, NodeDiffer, WithTars};
use super::node::layers::Shelves;
use super::node::lazy::Lazy;
use super::node::{Node, NodeOptions};
use super::notify::Notify;
use super::place::Place;
use crate::control::ControlServer;
use crate::fuse;
use crate::grpc::{self, Calls, Differ, Services};
use crate::sys::descriptors::{Announced, Inherited, inherited};

/// What the unit of the socket for containerd calls it (`FileDescriptorName=`).
const CONTAINERD_SOCKET: &str = "snapshots";

/// How long questions that are under way may take when everything else has ended.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// What the daemon needs of the floor above.
pub struct Above {
    /// Which kind of failure an error is.
    pub judge: Judge,
    /// Reads the configuration again.
    pub reload: Box<dyn Fn() -> anyhow::Result<Settings> + Send + Sync>,
    /// Changes how much is logged.
    pub set_log_level: fn(LogLevel),
    /// `NOTIFY_SOCKET`.
    pub notify_socket: Option<OsString>,
    /// The service manager keeps descriptors, as it says.
    pub has_store: bool,
    /// What the service manager has passed on.
    pub announced: Announced,
    /// This program.
    pub program: PathBuf,
}

/// What became of the daemon's mounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// They were taken away.
    Over,
    /// They are there for the next daemon. This process must end at once and close nothing by itself: what it still holds
    /// would be taken for given up.
    Left,
}

impl std::fmt::Debug for Above {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Above").field("notify_socket", &self.notify_socket).finish_non_exhaustive()
    }
}

/// Serves until a signal asks for the end. Blocks; `runtime` does the waiting.
///
/// # Errors
/// Anything on the way to being ready; afterwards nothing is one.
pub fn run(settings: &Settings, above: &Above, runtime: &Handle) -> anyhow::Result<Ended> {
    let notify = Notify::new(above.notify_socket.as_deref()).context("cannot use NOTIFY_SOCKET")?;
    let place = Place::take(&settings.root, &settings.run)?;
    let socket = place.socket();
    let keeper = Keeper::new(KeeperOptions {
        run: settings.run.clone(),
        program: above.program.clone(),
        patience: settings.daemon.keep_for,
        notify: notify.clone(),
        has_store: above.has_store,
    });
    let (mut sockets, kept): (Vec<Inherited>, Vec<Inherited>) =
        inherited(&above.announced).into_iter().partition(|inherited| inherited.name == CONTAINERD_SOCKET);
    let link = take_over(&keeper, kept, &place);
    let host = Host::open(settings, runtime.clone(), Some(Seat { place, keeper: Some(keeper), link }))?;
    let ended = runtime.block_on(async {
        let mut end = [listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?];
        let mut hang_up = listen(SignalKind::hangup())?;
        let control = ControlServer::bind(&socket)
            .with_context(|| format!("cannot open the control socket {}", socket.display()))?;
        let api = Arc::new(Api::new(Arc::clone(&host), above.judge));
        api.set_ready(false);
        let (stop, stopped) = oneshot::channel::<()>();
        let answering = tokio::spawn(control.run(Arc::<Api>::clone(&api), async {
            // A sender that is gone stops it as well.
            stopped.await.ok();
        }));
        let calls = Arc::<Calls>::default();
        let listening = match settings.daemon.metrics_listen {
            Some(address) => {
                let served = &settings.containerd;
                let snapshotter = served.enabled.then(|| served.socket.clone());
                Some(tokio::spawn(
                    listen_for_metrics(address, Arc::clone(&api), Arc::clone(&calls), snapshotter).await?,
                ))
            }
            None => None,
        };
        let _logins = host.house().sources().start(settings)?;
        let node = containerd_node(&host)?;
        // Who calls before everything is back waits, and is not turned away.
        let listener = node.is_some().then(|| open_socket(settings, sockets.pop())).transpose()?;
        let (close, closed) = oneshot::channel::<()>();
        let shown = node.clone();
        let until_end = async {
            tokio::join!(bring_back(&host), async {
                if let Some(node) = &node {
                    node.bring_back().await;
                }
            });
            settle(&host).await;
            if let Some((node, listener)) = node.zip(listener) {
                let services =
                    Services { differ: differ(&host, &node), snapshotter: Arc::new(node), calls: Arc::clone(&calls) };
                tokio::spawn(serve_containerd(listener, services, async { closed.await.unwrap_or_default() }));
                tracing::info!(socket = %settings.containerd.socket.display(), "snapshots are served to containerd");
            }
            host.is_complete();
            api.set_ready(true);
            notify.say("READY=1");
            tracing::info!(
                root = %settings.root.display(),
                socket = %socket.display(),
                version = env!("CARGO_PKG_VERSION"),
                "the daemon is ready"
            );
            go_on_with_pulls(&host, above.judge).await;
            let mut now = settings.clone();
            loop {
                hang_up.recv().await;
                now = reload(&host, above, now);
            }
        };
        tokio::select! { () = until_end => (), () = any(&mut end) => () }
        tracing::info!("the daemon ends");
        drop(close);
        api.ends();
        notify.say("STOPPING=1");
        drop(stop);
        let elsewhere = match &shown {
            // What cannot be taken down is shown.
            Some(shown) => tokio::time::timeout(LAST_ANSWERS, shown.shows_anything()).await.unwrap_or(true),
            None => false,
        };
        if settings.daemon.keep_mounts && leave(&host, elsewhere).await {
            tokio::time::timeout(LAST_ANSWERS, answering).await.ok();
            // What it shows would be taken away with it.
            std::mem::forget(shown);
            tracing::info!("mounts stay for the next daemon");
            return Ok(Ended::Left);
        }
        if let Some(shown) = shown.filter(|_| settings.daemon.keep_mounts) {
            shown.leave().await;
        }
        tokio::select! { () = host.shut_down(settings.daemon.stop_timeout) => (), () = any(&mut end) => () }
        let abort = answering.abort_handle();
        if tokio::time::timeout(LAST_ANSWERS, answering).await.is_err() {
            abort.abort();
        }
        if let Some(listening) = listening {
            listening.abort();
        }
        anyhow::Ok(Ended::Over)
    });
    // A start that fails is no reason to end what a daemon before this one has left.
    let left = match &ended {
        Ok(ended) => *ended == Ended::Left,
        Err(_) => host.leave(true),
    };
    if left {
        // Its mounts would be taken away with it.
        std::mem::forget(host);
    }
    ended
}

/// [`Host::leave`], on a thread that may wait.
async fn leave(host: &Arc<Host>, elsewhere: bool) -> bool {
    let host = Arc::clone(host);
    tokio::task::spawn_blocking(move || host.leave(elsewhere)).await.unwrap_or(false)
}

/// The connection of a daemon before this one, if it was kept and can be used.
fn take_over(keeper: &Keeper, inherited: Vec<Inherited>, place: &Place) -> Option<fuse::Link> {
    match fuse::Link::take_up(keeper.found(inherited)?, &place.file_system()) {
        Ok(link) => {
            tracing::info!("the FUSE connection of the daemon before this one is taken over");
            Some(link)
        }
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "mounts of the daemon before this one are mounted again");
            None
        }
    }
}

/// Where containerd calls: the socket that the service manager has opened, else one of this process's own.
fn open_socket(settings: &Settings, inherited: Option<Inherited>) -> anyhow::Result<UnixListener> {
    match inherited {
        Some(inherited) => Ok(grpc::adopt(inherited.descriptor)?),
        None => Ok(grpc::bind(&settings.containerd.socket)?),
    }
}

/// The snapshots that containerd is served, if it is.
fn containerd_node(host: &Arc<Host>) -> anyhow::Result<Option<Node>> {
    let settings = host.settings();
    let Some(snapshots) = host.house().snapshots().filter(|_| settings.containerd.enabled) else { return Ok(None) };
    let options = NodeOptions {
        prepare_timeout: settings.containerd.prepare_timeout,
        fill: (settings.fill.enabled && settings.containerd.fill).then(|| host.fill_options()),
        links: settings.run.join("f"),
        xino: settings.containerd.xino,
        mapped: settings.run.join("m"),
    };
    let runtime = host.house().runtime().clone();
    let lazy = Lazy::new(host.house(), (&settings.containerd).into(), &settings.containerd.address);
    let layers = WithTars::new(host.house().fetcher()?.clone(), lazy);
    let shelves: Arc<dyn Shelves> = Arc::<Shelf>::clone(host.shelf());
    Node::new(Arc::clone(snapshots), Arc::new(layers), shelves, options, runtime).map(Some)
}

/// Who applies layers that containerd has downloaded.
fn differ(host: &Host, node: &Node) -> Option<Arc<dyn Differ>> {
    let settings = &host.settings().containerd;
    let content = ContentStore { containerd: grpc::connect(&settings.address), directory: settings.content.clone() };
    // The node would not be there if its threads could not be started.
    let fetcher = host.house().fetcher().ok()?.clone();
    Some(Arc::new(NodeDiffer::new(node.clone(), fetcher, content)))
}

async fn serve_containerd(listener: UnixListener, services: Services, closed: impl Future<Output = ()> + Send) {
    if let Err(error) = grpc::serve(listener, services, closed).await {
        let error: &dyn std::error::Error = &error;
        tracing::error!(error, "containerd is not served any more");
    }
}

fn listen(kind: SignalKind) -> anyhow::Result<Signal> {
    signal(kind).context("cannot listen for signals")
}

async fn any(signals: &mut [Signal; 2]) {
    let [one, other] = signals;
    tokio::select! { _ = one.recv() => (), _ = other.recv() => () }
}

async fn listen_for_metrics(
    address: SocketAddr,
    api: Arc<Api>,
    calls: Arc<Calls>,
    snapshotter: Option<PathBuf>,
) -> anyhow::Result<impl Future<Output = ()> + Send + 'static> {
    let listener = tokio::net::TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot listen for metrics on {address}"))?;
    Ok(listener::answer(listener, metrics::router(api, calls, snapshotter), Limits::FEW))
}

/// Applies what can change while the daemon runs, and says what cannot.
fn reload(host: &Host, above: &Above, mut now: Settings) -> Settings {
    let fresh = match (above.reload)() {
        Ok(fresh) => fresh,
        Err(error) => {
            let error: &dyn std::error::Error = error.as_ref();
            tracing::error!(error, "the configuration is not read again: the old one stays");
            return now;
        }
    };
    (above.set_log_level)(fresh.log_level);
    host.house().forget_registries();
    if let Err(error) = host.house().set_fill_bandwidth(fresh.fill.bandwidth) {
        let error: &dyn std::error::Error = error.as_ref();
        tracing::error!(error, "the bandwidth of fills stays what it was");
    }
    for key in fresh.differences(&now) {
        tracing::warn!(key, "a changed setting counts when the daemon is started again");
    }
    tracing::info!("log level, logins, hosts and the bandwidth of fills are read again");
    now.log_level = fresh.log_level;
    now.fill.bandwidth = fresh.fill.bandwidth;
    now
}

/// Mounts again what a dead daemon of this root had mounted. What cannot be is logged and stays recorded.
async fn bring_back(host: &Arc<Host>) {
    let entries = match Mounts::look(&host.settings().root) {
        Ok(entries) => entries,
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            tracing::error!(error, "mounts of a daemon before this one are not brought back");
            return;
        }
    };
    let dead = entries.into_iter().filter(|entry| !entry.alive && entry.record.daemon.is_some());
    join_all(dead.map(|entry| bring_back_one(host, entry))).await;
}

/// Goes on with what a daemon before this one did not come to the end of, each pull by itself.
async fn go_on_with_pulls(host: &Arc<Host>, judge: Judge) {
    let Some(pulls) = host.pulls() else { return };
    match tokio::task::spawn_blocking(move || pulls.left()).await {
        Ok(Ok(left)) => left.into_iter().for_each(|one| drop(tokio::spawn(one.go_on(host.house().clone(), judge)))),
        Ok(Err(error)) => {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "pulls that a daemon before this one began are not gone on with");
        }
        Err(error) => tracing::error!(%error, "the thread that looks for pulls broke down"),
    }
}

async fn settle(host: &Arc<Host>) {
    let settling = Arc::clone(host);
    if let Ok(Err(error)) = tokio::task::spawn_blocking(move || settling.settle()).await {
        let error: &dyn std::error::Error = error.as_ref();
        tracing::warn!(error, "what a daemon before this one left is not all taken away");
    }
}

async fn bring_back_one(host: &Arc<Host>, entry: Entry) {
    let record = entry.record.clone();
    let mount_point = record.mount_point.display();
    match host.bring_back(&entry).await {
        Ok(()) => tracing::info!(%mount_point, image = record.image, "brought back"),
        Err(error) => {
            let error: &dyn std::error::Error = error.as_ref();
            tracing::error!(%mount_point, image = record.image, error, "cannot be brought back");
        }
    }
}
