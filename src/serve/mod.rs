//! A read-only OCI distribution endpoint over an image layout on the local disk: for experiments, tests and air-gapped
//! machines.
//!
//! Guarantees: every repository name shows the same layout; the layout is read anew for each request, so what a
//! conversion adds appears at once; blobs answer single byte ranges. With a latency and a bandwidth the endpoint behaves
//! like a registry at the far end of one link, so that a lazy pull can be measured on one machine.
//! Refuses to know: authentication, TLS, uploads, deletion.

mod endpoint;
mod files;
mod link;

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::TcpListener;

pub use link::{Bandwidth, BandwidthError};

use endpoint::Endpoint;
use files::LayoutFiles;
use link::{Link, LinkListener};

/// What to serve, where, and how slowly.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// Directory of the OCI image layout.
    pub layout: PathBuf,
    /// Address to listen on; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Round-trip time of the link: each request and each new connection waits for it once.
    pub latency: Duration,
    /// Capacity of the link, shared by all responses.
    pub bandwidth: Option<Bandwidth>,
    /// File to which a line per request is appended.
    pub access_log: Option<PathBuf>,
}

/// Why nothing can be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The directory is not an OCI image layout.
    #[error("cannot serve {path}: it is not an OCI image layout")]
    NotALayout {
        /// The directory.
        path: PathBuf,
        /// What was wrong with `oci-layout` or `index.json`.
        #[source]
        source: io::Error,
    },
    /// The address is taken or not of this machine.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address asked for.
        address: SocketAddr,
        /// Why the kernel refused.
        #[source]
        source: io::Error,
    },
    /// The access log cannot be written.
    #[error("cannot open the access log {path}")]
    AccessLog {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Accepting connections failed for good.
    #[error("cannot serve on {address} any longer")]
    Serve {
        /// The address served on.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A bound endpoint that does not answer yet.
#[derive(Debug)]
pub struct Server {
    listener: LinkListener,
    endpoint: Endpoint,
    address: SocketAddr,
}

impl Server {
    /// Checks the layout and binds the address.
    ///
    /// # Errors
    /// See [`ServeError`].
    pub async fn bind(config: ServeConfig) -> Result<Self, ServeError> {
        let files = LayoutFiles::open(&config.layout)
            .map_err(|source| ServeError::NotALayout { path: config.layout.clone(), source })?;
        let log = config.access_log.as_deref().map(open_log).transpose()?;
        let listen = |source| ServeError::Listen { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let listener = LinkListener::new(listener, Link::new(config.bandwidth), config.latency);
        Ok(Self { listener, endpoint: Endpoint::new(files, config.latency, log), address })
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop` is done; requests that are under way are finished.
    ///
    /// # Errors
    /// [`ServeError::Serve`].
    pub async fn run(self, stop: impl Future<Output = ()> + Send + 'static) -> Result<(), ServeError> {
        let service = self.endpoint.into_router().into_make_service_with_connect_info::<link::Peer>();
        axum::serve(self.listener, service)
            .with_graceful_shutdown(stop)
            .await
            .map_err(|source| ServeError::Serve { address: self.address, source })
    }
}

fn open_log(path: &Path) -> Result<File, ServeError> {
    File::options()
        .append(true)
        .create(true)
        .open(path)
        .map_err(|source| ServeError::AccessLog { path: path.to_owned(), source })
}
