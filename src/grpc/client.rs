//! The way to a service behind a Unix socket.

use std::path::{Path, PathBuf};
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
    let socket: PathBuf = socket.to_owned();
    let open = move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    };
    // Nobody looks up the name; servers want one.
    Endpoint::from_static("http://localhost")
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector_lazy(service_fn(open))
}
