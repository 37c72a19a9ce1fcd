//! The socket, and what is served behind it.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::Stream;
use rustix::net::AddressFamily;
use tokio::net::{UnixListener, UnixStream};
use tonic::transport::Server;

use super::diff::DiffService;
use super::proto::containerd::services::diff::v1::diff_server::DiffServer;
use super::proto::containerd::services::snapshots::v1::snapshots_server::SnapshotsServer;
use super::service::Service;
use super::{Calls, Differ, Snapshotter};

/// How long to wait when the process has no descriptors left for a new connection.
const BREATH: Duration = Duration::from_millis(100);

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// No socket.
    #[error("cannot open the socket {}", .path.display())]
    Bind {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What was handed over is no such socket.
    #[error("cannot use the socket that the service manager handed over")]
    Adopt(#[source] io::Error),
    /// The server ended by itself.
    #[error("the service on the socket ended")]
    Ended(#[source] tonic::transport::Error),
}

/// What is served.
#[derive(Clone)]
pub struct Services {
    /// The snapshots.
    pub snapshotter: Arc<dyn Snapshotter>,
    /// Who applies layers to them, if anybody does.
    pub differ: Option<Arc<dyn Differ>>,
    /// Where calls are counted.
    pub calls: Arc<Calls>,
}

impl std::fmt::Debug for Services {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Services").finish_non_exhaustive()
    }
}

/// A socket on which only root (or whoever runs this) is heard. What a process that is gone left there is replaced; the
/// caller knows that no living one uses the path, and runs inside of a tokio runtime.
///
/// # Errors
/// What the kernel says.
pub fn bind(path: &Path) -> Result<UnixListener, ServeError> {
    let failed = |source| ServeError::Bind { path: path.to_owned(), source };
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(failed)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

/// A socket that somebody else has opened and bound, such as a service manager. Runs inside of a tokio runtime.
///
/// # Errors
/// It is no Unix socket that connections come to.
pub fn adopt(socket: OwnedFd) -> Result<UnixListener, ServeError> {
    let listens = rustix::net::sockopt::socket_acceptconn(&socket).map_err(|error| ServeError::Adopt(error.into()))?;
    let is_unix = rustix::net::sockopt::socket_domain(&socket) == Ok(AddressFamily::UNIX);
    if !(listens && is_unix) {
        return Err(ServeError::Adopt(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is no Unix socket that listens",
        )));
    }
    let listener = std::os::unix::net::UnixListener::from(socket);
    listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener)).map_err(ServeError::Adopt)
}

/// Answers on `listener` until `shutdown` is done, and then those who have asked before.
///
/// # Errors
/// The server ended by itself.
pub async fn serve(
    listener: UnixListener,
    services: Services,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), ServeError> {
    let diff = |differ| DiffServer::new(DiffService::new(differ, Arc::clone(&services.calls)));
    let diff = services.differ.map(diff);
    let snapshots = SnapshotsServer::new(Service::new(services.snapshotter, services.calls));
    let server = Server::builder().add_service(snapshots).add_optional_service(diff);
    let serving = server.serve_with_incoming_shutdown(accepted(listener), shutdown);
    serving.await.map_err(ServeError::Ended)
}

/// Connections as they come. Being out of descriptors passes.
pub(super) fn accepted(listener: UnixListener) -> impl Stream<Item = io::Result<UnixStream>> {
    futures::stream::unfold(listener, async |listener| {
        loop {
            match listener.accept().await {
                Ok((connection, _)) => return Some((Ok(connection), listener)),
                Err(error) => {
                    tracing::warn!(%error, "a connection is not taken yet");
                    tokio::time::sleep(BREATH).await;
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_sockets_that_listen_are_adopted() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listening = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let connected = std::os::unix::net::UnixStream::connect(&path).unwrap();
        let tcp = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let file = fs::File::open(directory.path()).unwrap();
        for other in [OwnedFd::from(connected), OwnedFd::from(tcp), OwnedFd::from(file)] {
            assert!(matches!(adopt(other), Err(ServeError::Adopt(_))));
        }
        let listener = adopt(listening.into()).unwrap();
        let (asked, taken) = tokio::join!(UnixStream::connect(&path), listener.accept());
        assert!(asked.is_ok() && taken.is_ok());
    }
}
