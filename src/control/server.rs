//! The answering side, in the process that serves the mount.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use tokio::net::UnixListener;

use super::status::{MountStatus, Unmount, Unmounted};

/// What can be asked of a mount.
pub trait Served: Send + Sync + 'static {
    /// How things stand.
    fn status(&self) -> MountStatus;

    /// Ends the mount. May wait for the kernel; called on a thread that may.
    fn unmount(&self, how: Unmount) -> Unmounted;
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

    /// Answers until `stop` is done.
    ///
    /// # Errors
    /// The socket failed for good.
    pub async fn run(
        mut self,
        served: Arc<dyn Served>,
        stop: impl Future<Output = ()> + Send + 'static,
    ) -> io::Result<()> {
        let router = Router::new().route("/status", get(answer_status)).route("/unmount", post(answer_unmount));
        match self.listener.take() {
            Some(listener) => axum::serve(listener, router.with_state(served)).with_graceful_shutdown(stop).await,
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

async fn answer_status(State(served): State<Arc<dyn Served>>) -> Result<Json<MountStatus>, StatusCode> {
    let status = tokio::task::spawn_blocking(move || served.status()).await;
    status.map(Json).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}

async fn answer_unmount(
    State(served): State<Arc<dyn Served>>,
    Json(how): Json<Unmount>,
) -> Result<Json<Unmounted>, StatusCode> {
    let done = tokio::task::spawn_blocking(move || served.unmount(how)).await;
    done.map(Json).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}
