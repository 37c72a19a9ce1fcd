//! The sources of credentials that live as long as the daemon: what kubelets pull with, and secrets of a cluster.
//!
//! Both are off unless the configuration wants them. Refuses to know how credentials are used: that is the registry room's.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::config::Config as Settings;
use crate::grpc;
use crate::registry::{ClusterSecrets, PulledLogins};

/// The sources that the configuration wants. Nothing is asked of them before [`Sources::start`].
#[derive(Debug, Clone, Default)]
pub(super) struct Sources {
    /// What kubelets pull with.
    pub(super) pulled: Option<Arc<PulledLogins>>,
    /// Secrets of a cluster.
    pub(super) cluster: Option<Arc<ClusterSecrets>>,
}

/// Sources at work. They end with this.
#[derive(Debug)]
pub(super) struct Running {
    tasks: Vec<JoinHandle<()>>,
    /// Dropped, it ends the proxy.
    _stop: Option<oneshot::Sender<()>>,
    socket: Option<PathBuf>,
}

impl Sources {
    /// Those of `settings`.
    pub(super) fn new(settings: &Settings) -> Self {
        let said = &settings.credentials;
        let cluster = said.kubeconfig.as_ref();
        Self {
            pulled: said.cri_proxy.then(Arc::default),
            cluster: cluster.map(|file| Arc::new(ClusterSecrets::new(file.clone(), &said.namespaces))),
        }
    }

    /// Begins to listen and to follow. Has to be called inside of a tokio runtime.
    ///
    /// # Errors
    /// A socket that cannot be bound.
    pub(super) fn start(&self, settings: &Settings) -> anyhow::Result<Running> {
        let mut running = Running { tasks: Vec::new(), _stop: None, socket: None };
        if let Some(pulled) = &self.pulled {
            let socket = cri_socket(&settings.run);
            let listener = grpc::bind(&socket)?;
            let upstream = grpc::connect(&settings.containerd.address);
            let proxy = grpc::CriProxy::new(upstream, Arc::clone(pulled));
            let (stop, stopped) = oneshot::channel::<()>();
            tracing::info!(socket = %socket.display(), "kubelets can be told --image-service-endpoint");
            running._stop = Some(stop);
            running.socket = Some(socket);
            running.tasks.push(tokio::spawn(async move {
                // A sender that is gone stops it as well.
                let until = async { drop(stopped.await) };
                if let Err(error) = proxy.serve(listener, until).await {
                    let error: &dyn std::error::Error = &error;
                    tracing::error!(error, "the image service for kubelets ended with a fault");
                }
            }));
        }
        if let Some(cluster) = &self.cluster {
            let cluster = Arc::clone(cluster);
            running.tasks.push(tokio::spawn(async move { cluster.follow().await }));
        }
        Ok(running)
    }
}

/// Where kubelets find the image service.
pub(super) fn cri_socket(run: &Path) -> PathBuf {
    run.join("cri.sock")
}

impl Drop for Running {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
        if let Some(socket) = &self.socket
            && let Err(error) = std::fs::remove_file(socket)
        {
            tracing::warn!(socket = %socket.display(), %error, "the socket for kubelets stays behind");
        }
    }
}
