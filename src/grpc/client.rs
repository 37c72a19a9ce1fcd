//! The way to a service behind a Unix socket.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

/// How long a connection to a process of this machine may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A channel to the service behind `socket`. It connects when it is first used, and again when the connection broke.
/// Has to be called inside of a tokio runtime.
pub fn connect(socket: &Path) -> Channel {
    connect_counted(socket, Arc::default())
}

/// [`connect`], with a number that grows with each connection.
pub(super) fn connect_counted(socket: &Path, connections: Arc<AtomicU64>) -> Channel {
    let socket: PathBuf = socket.to_owned();
    let open = move |_: Uri| {
        let (socket, connections) = (socket.clone(), Arc::clone(&connections));
        async move {
            let stream = UnixStream::connect(socket).await?;
            connections.fetch_add(1, Ordering::AcqRel);
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    };
    // Nobody looks up the name; servers want one.
    Endpoint::from_static("http://localhost")
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector_lazy(service_fn(open))
}
