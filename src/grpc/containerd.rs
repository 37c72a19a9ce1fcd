//! What is asked of containerd itself: which version it is, and what it knows of blobs that it has fetched.
//!
//! Every question has a deadline. Answers are containerd's word about what it did; the bytes of a blob are compared with
//! their digest here.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Request, Status};

use super::client::connect_counted;
use super::proto::containerd::services::content::v1::content_client::ContentClient;
use super::proto::containerd::services::content::v1::{InfoRequest, ListContentRequest, ReadContentRequest};
use super::proto::containerd::services::version::v1::version_client::VersionClient;
use super::status::is_not_found;
use super::version::{ContainerdVersion, VersionError};
use crate::model::{BlobDigest, Digest};
use crate::oci::DOCUMENT_LIMIT;

/// Longest time for an answer. Each question is a look into containerd's database: milliseconds, unless it hangs; and a
/// pull waits meanwhile.
const PATIENCE: Duration = Duration::from_secs(2);

/// How long an answer about the version holds on one connection. A containerd that was replaced has closed it, which shows
/// with the next question of any kind.
const VERSION_HOLDS: Duration = Duration::from_secs(60);

/// Which metadata names the namespace.
const NAMESPACE: &str = "containerd-namespace";

/// Labels with which containerd notes where it got a blob from: the host without its port, then the repositories.
const SOURCE: &str = "containerd.io/distribution.source.";

/// Label of an index for each of its manifests, numbered from 0.
const MANIFEST_OF_INDEX: &str = "containerd.io/gc.ref.content.m.";

/// How many manifests of an index are looked at. The largest public indexes have some forty, attestations included.
const MANIFESTS: usize = 128;

/// Why containerd's word is not known.
#[derive(Debug, thiserror::Error)]
pub enum ContainerdError {
    /// It did not answer, or not what was asked.
    #[error("cannot ask containerd at {} for {what}", .socket.display())]
    Asked {
        /// Where it is.
        socket: PathBuf,
        /// What was asked.
        what: &'static str,
        /// Why.
        #[source]
        source: Box<Status>,
    },
    /// It did not answer in time.
    #[error("containerd at {} did not tell {what} within {PATIENCE:?}", .socket.display())]
    Silent {
        /// Where it is.
        socket: PathBuf,
        /// What was asked.
        what: &'static str,
    },
    /// It would refuse the name.
    #[error("cannot ask containerd about namespace {namespace:?}: that is no name of one")]
    Namespace {
        /// The name.
        namespace: String,
    },
    /// It calls itself something that is no version.
    #[error("cannot understand which containerd answers at {}", .socket.display())]
    Version {
        /// Where it is.
        socket: PathBuf,
        /// Why.
        #[source]
        source: VersionError,
    },
    /// It gave other bytes than the digest names, or too many.
    #[error("containerd at {} gave bytes that are not blob {blob}", .socket.display())]
    Bytes {
        /// Where it is.
        socket: PathBuf,
        /// Which blob.
        blob: BlobDigest,
    },
}

/// A containerd. Cheap to clone.
#[derive(Clone)]
pub struct Containerd {
    socket: PathBuf,
    channel: Channel,
    connections: Arc<AtomicU64>,
    /// The version, on which connection it was asked, and when.
    version: Arc<Mutex<Option<(ContainerdVersion, u64, Instant)>>>,
}

/// What containerd knows of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    /// Which blob.
    pub digest: BlobDigest,
    /// Its notes about it.
    labels: HashMap<String, String>,
}

impl Content {
    /// True if containerd got it from this repository itself. `host` may have a port, which containerd does not note.
    pub fn is_from(&self, host: &str, repository: &str) -> bool {
        let name = match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
            _ => host,
        };
        let name = name.trim_start_matches('[').trim_end_matches(']');
        let sources = self.labels.get(&format!("{SOURCE}{name}"));
        sources.is_some_and(|sources| sources.split(',').any(|source| source == repository))
    }
}

impl fmt::Debug for Containerd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Containerd").field("socket", &self.socket).finish_non_exhaustive()
    }
}

impl Containerd {
    /// The containerd that listens at `socket`. It is not spoken to before it is asked something. Has to be called inside
    /// of a tokio runtime.
    pub fn at(socket: &Path) -> Self {
        let connections = Arc::new(AtomicU64::new(0));
        let channel = connect_counted(socket, Arc::clone(&connections));
        Self { socket: socket.to_owned(), channel, connections, version: Arc::default() }
    }

    /// Which containerd it is; asked once a connection, and again after a while.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn version(&self) -> Result<ContainerdVersion, ContainerdError> {
        let known = *self.version.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((version, connection, asked)) = known
            && connection == self.connections.load(Ordering::Acquire)
            && asked.elapsed() < VERSION_HOLDS
        {
            return Ok(version);
        }
        let mut client = VersionClient::new(self.channel.clone());
        let answer = self.within("its version", client.version(())).await?;
        let version = answer
            .into_inner()
            .version
            .parse()
            .map_err(|source| ContainerdError::Version { socket: self.socket.clone(), source })?;
        let known = (version, self.connections.load(Ordering::Acquire), Instant::now());
        *self.version.lock().unwrap_or_else(PoisonError::into_inner) = Some(known);
        Ok(version)
    }

    /// What it knows of a blob; none if it does not have it in that namespace.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn content(&self, namespace: &str, blob: BlobDigest) -> Result<Option<Content>, ContainerdError> {
        let request = self.request(namespace, InfoRequest { digest: blob.to_string() })?;
        let mut client = ContentClient::new(self.channel.clone());
        let answer = match self.within("a blob", client.info(request)).await {
            Err(ContainerdError::Asked { source, .. }) if is_not_found(&source) => return Ok(None),
            answer => answer?.into_inner(),
        };
        Ok(answer.info.map(|info| Content { digest: blob, labels: info.labels }))
    }

    /// The indexes that name `manifest`, as far as it has them in that namespace.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn indexes_of(&self, namespace: &str, manifest: BlobDigest) -> Result<Vec<Content>, ContainerdError> {
        let filter = |number| format!("labels.\"{MANIFEST_OF_INDEX}{number}\"=={manifest}");
        let request = self.request(namespace, ListContentRequest { filters: (0..MANIFESTS).map(filter).collect() })?;
        let mut client = ContentClient::new(self.channel.clone());
        let listing = async {
            let mut answers = client.list(request).await?.into_inner();
            let mut found = Vec::new();
            while let Some(answer) = answers.message().await? {
                found.extend(answer.info.into_iter().filter_map(|info| {
                    let digest = info.digest.parse().ok()?;
                    Some(Content { digest, labels: info.labels })
                }));
            }
            Ok(found)
        };
        self.within("the indexes of an image", listing).await
    }

    /// The bytes of a document, which have its digest; none if it does not have it in that namespace.
    ///
    /// # Errors
    /// It does not answer, or gives other bytes.
    pub async fn document(&self, namespace: &str, blob: BlobDigest) -> Result<Option<Vec<u8>>, ContainerdError> {
        let request = ReadContentRequest { digest: blob.to_string(), offset: 0, size: 0 };
        let request = self.request(namespace, request)?;
        let mut client = ContentClient::new(self.channel.clone());
        let wrong = || ContainerdError::Bytes { socket: self.socket.clone(), blob };
        let reading = async {
            let mut answers = client.read(request).await?.into_inner();
            let mut bytes = Vec::new();
            while let Some(answer) = answers.message().await? {
                bytes.extend_from_slice(&answer.data);
                if bytes.len() as u64 > DOCUMENT_LIMIT {
                    break;
                }
            }
            Ok(bytes)
        };
        match self.within("a document", reading).await {
            Ok(bytes) if bytes.len() as u64 <= DOCUMENT_LIMIT => {
                let found = Digest::of(blob.0.algorithm(), &bytes);
                if found == blob.0 { Ok(Some(bytes)) } else { Err(wrong()) }
            }
            Ok(_) => Err(wrong()),
            Err(ContainerdError::Asked { source, .. }) if is_not_found(&source) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn request<T>(&self, namespace: &str, message: T) -> Result<Request<T>, ContainerdError> {
        let mut request = Request::new(message);
        let value = MetadataValue::try_from(namespace)
            .map_err(|_| ContainerdError::Namespace { namespace: namespace.to_owned() })?;
        request.metadata_mut().insert(NAMESPACE, value);
        Ok(request)
    }

    async fn within<T>(
        &self,
        what: &'static str,
        asking: impl Future<Output = Result<T, Status>>,
    ) -> Result<T, ContainerdError> {
        let socket = || self.socket.clone();
        match tokio::time::timeout(PATIENCE, asking).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(source)) => Err(ContainerdError::Asked { socket: socket(), what, source: Box::new(source) }),
            Err(_) => Err(ContainerdError::Silent { socket: socket(), what }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_is_from_where_containerd_noted() {
        let note = |host: &str, repositories: &str| (format!("{SOURCE}{host}"), repositories.to_owned());
        let labels = HashMap::from([
            note("docker.io", "library/busybox,library/other"),
            note("127.0.0.1", "a"),
            note("::1", "b"),
        ]);
        let digest = BlobDigest(Digest::of(crate::model::Algorithm::Sha256, b""));
        let content = Content { digest, labels };
        for (host, repository, from) in [
            ("docker.io", "library/busybox", true),
            ("docker.io", "library/other", true),
            ("docker.io", "library", false),
            ("docker.io", "library/busybox,library/other", false),
            ("docker.io", "", false),
            ("evil.example", "library/busybox", false),
            ("127.0.0.1:5000", "a", true),
            ("127.0.0.1", "a", true),
            ("127.0.0.1:5000", "b", false),
            ("[::1]:5000", "b", true),
            ("[::1]", "b", true),
        ] {
            assert_eq!(content.is_from(host, repository), from, "{host}/{repository}");
        }
    }
}
