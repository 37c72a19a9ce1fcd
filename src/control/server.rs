//! The answering side, in the process that serves.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use tokio::net::unix::SocketAddr;
use tokio::net::{UnixListener, UnixStream};

use super::cache::{ForgetAsked, Forgotten, PruneAsked, Pruned, SnapshotsSeen};
use super::fault::Fault;
use super::message::{MountAsked, PullAsked, PullLine, UmountAsked, WaitAsked};
use super::status::{Health, HostStatus, MountStatus};
use super::{Done, VERSION};

/// Largest request. Paths and references have a few thousand bytes at most.
const BODY_LIMIT: usize = 64 << 10;

/// How long to wait when the process has no descriptors left for a new connection.
const BREATH: Duration = Duration::from_millis(100);

/// What can be asked of a process that serves mounts. A future that is dropped gives up what it was about to do.
pub trait Served: Send + Sync + 'static {
    /// That it is there.
    fn health(&self) -> Health;

    /// How everything stands. May wait for a disk; called on a thread that may.
    fn status(&self) -> HostStatus;

    /// Mounts an image.
    fn mount(&self, asked: MountAsked) -> BoxFuture<'static, Result<MountStatus, Fault>>;

    /// Ends a mount.
    fn umount(&self, asked: UmountAsked) -> BoxFuture<'static, Result<(), Fault>>;

    /// Brings all of an image here; the last line tells the end. Dropped, it begins nothing more.
    fn pull(&self, asked: PullAsked) -> BoxStream<'static, PullLine>;

    /// Waits until all of a mount is here.
    fn wait(&self, asked: WaitAsked) -> BoxFuture<'static, Result<MountStatus, Fault>>;

    /// Makes room in the cache.
    fn prune(&self, asked: PruneAsked) -> BoxFuture<'static, Result<Pruned, Fault>>;

    /// Forgets a pulled image.
    fn forget(&self, asked: ForgetAsked) -> BoxFuture<'static, Result<Forgotten, Fault>>;

    /// Everything that is recorded.
    fn snapshots(&self) -> BoxFuture<'static, Result<SnapshotsSeen, Fault>>;
}

/// A bound socket. Its file goes when this is dropped.
#[derive(Debug)]
pub struct ControlServer {
    listener: Option<UnixListener>,
    path: PathBuf,
}

impl ControlServer {
    /// Binds `path`, replacing the socket of a process that is gone. Only its owner may talk to it. The caller knows (by its
    /// lock) that no living process uses the path, and runs inside of a tokio runtime.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn bind(path: &Path) -> io::Result<Self> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = super::client::with_short_path(path, |short| UnixListener::bind(short))?;
        let server = Self { listener: Some(listener), path: path.to_owned() };
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        Ok(server)
    }

    /// Answers until `stop` is done, and then those who have asked before.
    ///
    /// # Errors
    /// The socket failed for good.
    pub async fn run(
        mut self,
        served: Arc<dyn Served>,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        match self.listener.take() {
            Some(listener) => axum::serve(Guarded(listener), router(served)).with_graceful_shutdown(stop).await,
            None => Ok(()),
        }
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %self.path.display(), %error, "cannot remove the control socket");
            }
            _ => {}
        }
    }
}

/// Listens to this user and root alone: the mode of the socket says so too, but can be changed.
struct Guarded(UnixListener);

impl axum::serve::Listener for Guarded {
    type Io = UnixStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (UnixStream, SocketAddr) {
        loop {
            match self.0.accept().await {
                Ok((stream, address)) => {
                    let ours = rustix::process::geteuid().as_raw();
                    match stream.peer_cred() {
                        Ok(peer) if peer.uid() == ours || peer.uid() == 0 => return (stream, address),
                        Ok(peer) => tracing::warn!(uid = peer.uid(), "another user asked, and is not answered"),
                        Err(error) => tracing::warn!(%error, "cannot tell who asks: not answered"),
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot take a connection of the control socket");
                    tokio::time::sleep(BREATH).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

type Host = State<Arc<dyn Served>>;

fn router(served: Arc<dyn Served>) -> Router {
    Router::new()
        .route("/v1/health", get(async |State(served): Host| Json(served.health())))
        .route("/v1/status", get(status))
        .route("/v1/mount", post(mount))
        .route("/v1/umount", post(umount))
        .route("/v1/wait", post(wait))
        .route("/v1/pull", post(pull))
        .route("/v1/prune", post(prune))
        .route("/v1/forget", post(forget))
        .route("/v1/snapshots", get(snapshots))
        .method_not_allowed_fallback(unknown)
        .fallback(unknown)
        .with_state(served)
}

async fn status(State(served): Host) -> Response {
    match tokio::task::spawn_blocking(move || served.status()).await {
        Ok(status) => Json(status).into_response(),
        Err(_) => refuse(StatusCode::INTERNAL_SERVER_ERROR, Fault::internal("cannot tell the status".to_owned())),
    }
}

async fn mount(State(served): Host, body: Body) -> Response {
    answer(body, |asked| served.mount(asked)).await
}

async fn umount(State(served): Host, body: Body) -> Response {
    answer(body, |asked| {
        let done = served.umount(asked);
        Box::pin(async { done.await.map(|()| Done {}) })
    })
    .await
}

async fn wait(State(served): Host, body: Body) -> Response {
    answer(body, |asked| served.wait(asked)).await
}

async fn prune(State(served): Host, body: Body) -> Response {
    answer(body, |asked| served.prune(asked)).await
}

async fn forget(State(served): Host, body: Body) -> Response {
    answer(body, |asked| served.forget(asked)).await
}

async fn snapshots(State(served): Host) -> Response {
    tell(served.snapshots().await)
}

async fn pull(State(served): Host, body: Body) -> Response {
    let asked = match read(body).await {
        Ok(asked) => asked,
        Err((status, fault)) => return refuse(status, fault),
    };
    let lines = served.pull(asked).map(|line| {
        let mut bytes = serde_json::to_vec(&line)?;
        bytes.push(b'\n');
        Ok::<_, serde_json::Error>(bytes)
    });
    ([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

async fn answer<Q, A>(body: Body, ask: impl FnOnce(Q) -> BoxFuture<'static, Result<A, Fault>>) -> Response
where
    Q: serde::de::DeserializeOwned,
    A: serde::Serialize,
{
    let asked = match read(body).await {
        Ok(asked) => asked,
        Err((status, fault)) => return refuse(status, fault),
    };
    tell(ask(asked).await)
}

fn tell(answer: Result<impl serde::Serialize, Fault>) -> Response {
    match answer {
        Ok(answer) => Json(answer).into_response(),
        Err(fault) => refuse(StatusCode::UNPROCESSABLE_ENTITY, fault),
    }
}

async fn read<Q: serde::de::DeserializeOwned>(body: Body) -> Result<Q, (StatusCode, Fault)> {
    let Ok(bytes) = to_bytes(body, BODY_LIMIT).await else {
        let fault = Fault::usage(format!("cannot read the request: it is broken or has more than {BODY_LIMIT} bytes"));
        return Err((StatusCode::PAYLOAD_TOO_LARGE, fault));
    };
    serde_json::from_slice(&bytes)
        .map_err(|error| (StatusCode::BAD_REQUEST, Fault::usage(format!("cannot understand the request: {error}"))))
}

/// What is not in the list, most often the question of another version.
async fn unknown(method: Method, uri: Uri) -> Response {
    let path = uri.path();
    let version = path.strip_prefix("/v").and_then(|rest| rest.split('/').next()).and_then(|v| v.parse::<u32>().ok());
    let fault = match version {
        Some(VERSION) | None => Fault::usage(format!("cannot answer {method} {path}: there is no such question")),
        Some(other) => Fault::unsupported(format!(
            "cannot answer {method} {path}: this process speaks version {VERSION} of the control protocol, not {other}; \
             use a headstart of its version ({})",
            env!("CARGO_PKG_VERSION")
        )),
    };
    refuse(StatusCode::NOT_FOUND, fault)
}

fn refuse(status: StatusCode, fault: Fault) -> Response {
    (status, Json(fault)).into_response()
}
