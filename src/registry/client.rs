//! The client: which servers to ask in which order, how often, and what to say when none delivered.
//!
//! Servers are asked in the configured order, those that could not be reached a moment ago last. A server that fails for
//! good is not asked again; the others are, after a wait that grows, until the rounds or the time are used up.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use lru::LruCache;
use reqwest::Method;
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue};
use url::Url;

use super::auth::Scope;
use super::credentials::CredentialConfig;
use super::endpoint::{Ask, Endpoint};
use super::error::{Attempts, RegistryError, TryError};
use super::exchange::read_bounded;
use super::hosts::hosts_for;
use super::retry::{Patience, Verdict, judge};
use crate::model::{Algorithm, BlobDigest, Digest};
use crate::oci::{DOCUMENT_LIMIT, Descriptor, ImageName, Selector, media, verify_digest};

/// Most redirect targets that are remembered: the layers of some hundred images, a few hundred bytes each.
const REDIRECTS: NonZeroUsize = NonZeroUsize::new(4096).expect("4096 is not zero");

/// Everything the client is told; it reads no environment (but for proxies, which the HTTP library does).
#[derive(Debug, Clone, Default)]
pub struct ClientConfig {
    /// Directories laid out like containerd's `/etc/containerd/certs.d`, first match wins.
    pub certs_d: Vec<PathBuf>,
    /// Where credentials come from.
    pub credentials: CredentialConfig,
    /// How long to wait and how often to try.
    pub patience: Patience,
    /// How blobs are pushed.
    pub upload: super::push::Upload,
    /// What we call ourselves; empty is `headstart/VERSION`.
    pub user_agent: String,
}

/// A client of all registries. Cheap to clone; clones share connections, tokens and what was learned.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("certs_d", &self.0.config.certs_d).finish_non_exhaustive()
    }
}

struct Inner {
    config: ClientConfig,
    user_agent: String,
    credentials: Arc<CredentialConfig>,
    registries: Mutex<HashMap<String, Arc<[Arc<Endpoint>]>>>,
    redirects: Mutex<LruCache<(String, BlobDigest), Remembered>>,
}

/// Where a blob's bytes really are.
#[derive(Clone)]
struct Remembered {
    url: Url,
    until: Instant,
}

/// What a server may be asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    Pull,
    Resolve,
    Push,
}

/// A manifest or index as a registry gave it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fetched {
    /// Media type, digest and size. The digest was computed, or checked against the one asked for.
    pub descriptor: Descriptor,
    /// The bytes.
    pub bytes: Bytes,
}

/// One try against one server.
pub(super) type Try<'a, T> = BoxFuture<'a, Result<T, TryError>>;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Client {
    /// A client that has not spoken to anyone.
    pub fn new(config: ClientConfig) -> Self {
        let user_agent = match config.user_agent.as_str() {
            "" => concat!("headstart/", env!("CARGO_PKG_VERSION")).to_owned(),
            other => other.to_owned(),
        };
        Self(Arc::new(Inner {
            user_agent,
            credentials: Arc::new(config.credentials.clone()),
            registries: Mutex::default(),
            redirects: Mutex::new(LruCache::new(REDIRECTS)),
            config,
        }))
    }

    /// Forgets what was read of servers' settings, their tokens and connections, so that changed files count from now on.
    /// Requests that are under way are not touched.
    pub fn forget_servers(&self) {
        lock(&self.0.registries).clear();
        lock(&self.0.redirects).clear();
    }

    pub(super) fn patience(&self) -> &Patience {
        &self.0.config.patience
    }

    pub(super) fn upload(&self) -> super::push::Upload {
        self.0.config.upload
    }

    /// The servers of a registry, read once.
    async fn endpoints(&self, registry: &str) -> Result<Arc<[Arc<Endpoint>]>, RegistryError> {
        if let Some(known) = lock(&self.0.registries).get(registry) {
            return Ok(Arc::clone(known));
        }
        let inner = Arc::clone(&self.0);
        let name = registry.to_owned();
        let read = tokio::task::spawn_blocking(move || {
            let specs = hosts_for(&inner.config.certs_d, &name)?;
            let endpoint = |spec| {
                let credentials = Arc::clone(&inner.credentials);
                Endpoint::new(spec, &name, credentials, &inner.config.patience, &inner.user_agent).map(Arc::new)
            };
            specs.into_iter().map(endpoint).collect::<Result<Arc<[_]>, _>>()
        });
        let endpoints = match read.await {
            Ok(endpoints) => endpoints?,
            Err(broken) => std::panic::resume_unwind(broken.into_panic()),
        };
        Ok(Arc::clone(lock(&self.0.registries).entry(registry.to_owned()).or_insert(endpoints)))
    }

    /// The servers that may be asked, best first. `skip` moves that many to the end: they gave wrong bytes.
    pub(super) async fn servers(
        &self,
        name: &ImageName,
        need: Need,
        action: &'static str,
        object: &str,
        skip: u32,
    ) -> Result<Vec<Arc<Endpoint>>, RegistryError> {
        let mut servers = self.servers_in_order(name, need, action, object).await?;
        let count = servers.len();
        servers.rotate_left(usize::try_from(skip).unwrap_or(0) % count);
        servers.sort_by_key(|server| server.is_sick());
        Ok(servers)
    }

    /// The servers that may be asked, at least one, in the configured order.
    pub(super) async fn servers_in_order(
        &self,
        name: &ImageName,
        need: Need,
        action: &'static str,
        object: &str,
    ) -> Result<Vec<Arc<Endpoint>>, RegistryError> {
        let endpoints = self.endpoints(name.host()).await?;
        let able = |endpoint: &&Arc<Endpoint>| match need {
            Need::Pull => endpoint.capabilities.pull,
            Need::Resolve => endpoint.capabilities.resolve,
            Need::Push => endpoint.capabilities.push,
        };
        let servers: Vec<Arc<Endpoint>> = endpoints.iter().filter(able).cloned().collect();
        if servers.is_empty() {
            let registry = name.host().to_owned();
            return Err(RegistryError::NoServer { action, object: object.to_owned(), registry });
        }
        Ok(servers)
    }

    /// Does `attempt` against the servers until one delivers.
    pub(super) async fn try_all<'a, T>(
        &self,
        mut servers: Vec<Arc<Endpoint>>,
        action: &'static str,
        object: &str,
        attempt: impl Fn(Arc<Endpoint>) -> Try<'a, T>,
    ) -> Result<T, RegistryError> {
        let patience = self.patience();
        let started = Instant::now();
        let mut attempts = Attempts::default();
        for round in 0..patience.rounds.max(1) {
            let mut asked_to_wait: Option<Duration> = None;
            let mut later = Vec::new();
            for server in servers {
                match attempt(Arc::clone(&server)).await {
                    Ok(done) => {
                        server.note(true);
                        return Ok(done);
                    }
                    Err(error) => {
                        tracing::debug!(server = server.name(), %error, round, "request failed");
                        let verdict = judge(&error);
                        server.note(!matches!(error, TryError::Connect(_) | TryError::Timeout { .. }));
                        attempts.push(&server.name(), error);
                        if let Verdict::Again(after) = verdict {
                            asked_to_wait = asked_to_wait.max(after);
                            later.push(server);
                        }
                    }
                }
            }
            servers = later;
            let wait = patience.wait(round, asked_to_wait);
            let last = round + 1 >= patience.rounds.max(1);
            if servers.is_empty() || last || started.elapsed().saturating_add(wait) > patience.deadline {
                break;
            }
            tokio::time::sleep(wait).await;
        }
        let object = object.to_owned();
        let missing = |error: &TryError| matches!(error, TryError::Status { status: 404 | 410, .. });
        if attempts.iter().all(|attempt| missing(&attempt.error)) {
            return Err(RegistryError::NotFound { action, object, attempts });
        }
        Err(RegistryError::Failed { action, object, attempts })
    }

    /// What a name stands for at this moment: media type, digest and size of its manifest or index.
    ///
    /// # Errors
    /// Every server that may resolve failed.
    pub async fn resolve(&self, name: &ImageName) -> Result<Descriptor, RegistryError> {
        let (action, object) = ("resolve", name.to_string());
        let servers = self.servers(name, Need::Resolve, action, &object, 0).await?;
        let scope = &pull_scope(name);
        let selector = name.selector();
        let attempt = move |server: Arc<Endpoint>| head_manifest(server, scope, selector).boxed();
        match self.try_all(servers, action, &object, attempt).await? {
            Some(descriptor) => Ok(descriptor),
            // Some servers do not name the digest; the manifest itself tells.
            None => Ok(self.manifest(name).await?.descriptor),
        }
    }

    /// The manifest or index that a name stands for. One asked for by digest is checked against it.
    ///
    /// # Errors
    /// Every server that may be asked failed, or gave other bytes.
    pub async fn manifest(&self, name: &ImageName) -> Result<Fetched, RegistryError> {
        let (action, object) = ("fetch the manifest of", name.to_string());
        let selector = name.selector();
        let need = if matches!(selector, Selector::Tag(_)) { Need::Resolve } else { Need::Pull };
        let servers = self.servers(name, need, action, &object, 0).await?;
        let scope = &pull_scope(name);
        self.try_all(servers, action, &object, move |server| get_manifest(server, scope, selector).boxed()).await
    }

    /// A small blob or manifest by its descriptor, checked against it.
    ///
    /// # Errors
    /// It is announced larger than a document may be, or every server failed or gave other bytes.
    pub async fn document(&self, name: &ImageName, descriptor: &Descriptor) -> Result<Bytes, RegistryError> {
        descriptor.check_document_size()?;
        let (action, object) = ("fetch", format!("{} of {}/{}", descriptor.digest, name.host(), name.repository()));
        if media::is_index(&descriptor.media_type) || media::is_manifest(&descriptor.media_type) {
            let fetched = self.manifest(&name.with_digest(descriptor.digest)).await?;
            descriptor.verify(&fetched.bytes)?;
            return Ok(fetched.bytes);
        }
        let servers = self.servers(name, Need::Pull, action, &object, 0).await?;
        let scope = &pull_scope(name);
        self.try_all(servers, action, &object, move |server| get_document(server, scope, descriptor).boxed()).await
    }

    /// The remembered place of a blob behind `server`.
    pub(super) fn remembered(&self, server: &Endpoint, blob: BlobDigest) -> Option<Url> {
        let mut redirects = lock(&self.0.redirects);
        let key = (server.name(), blob);
        let found = redirects.get(&key)?;
        if Instant::now() < found.until {
            return Some(found.url.clone());
        }
        redirects.pop(&key);
        None
    }

    pub(super) fn remember(&self, server: &Endpoint, blob: BlobDigest, url: Url) {
        let until = Instant::now() + super::blob::lifetime_of(&url, std::time::SystemTime::now());
        lock(&self.0.redirects).put((server.name(), blob), Remembered { url, until });
    }

    pub(super) fn forget(&self, server: &Endpoint, blob: BlobDigest) {
        lock(&self.0.redirects).pop(&(server.name(), blob));
    }
}

/// Reading from the repository of `name`.
pub(super) fn pull_scope(name: &ImageName) -> Scope {
    Scope { repository: name.repository().to_owned(), push: false, from: None }
}

fn accept() -> HeaderValue {
    HeaderValue::from_str(&media::ACCEPTED.join(", ")).expect("media types are plain ASCII")
}

fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok().map(str::trim).filter(|text| !text.is_empty())
}

/// The digest a server names for what it sends.
fn named_digest(headers: &HeaderMap) -> Option<BlobDigest> {
    text(headers, "docker-content-digest")?.parse().ok()
}

async fn head_manifest(
    server: Arc<Endpoint>,
    scope: &Scope,
    selector: Selector<'_>,
) -> Result<Option<Descriptor>, TryError> {
    let path = format!("/{}/manifests/{selector}", scope.repository);
    let ask = Ask::new(Method::HEAD, path, scope).header(ACCEPT, accept());
    let answer = match server.ask(&ask).await {
        Ok(answer) => answer.response,
        // The method is not known, so the question was not answered.
        Err(TryError::Status { status: 405 | 501, .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let headers = answer.headers();
    let digest = match selector {
        Selector::Digest(digest) => Some(digest),
        Selector::Tag(_) => named_digest(headers),
    };
    // A body of a HEAD has no length of its own; the header tells what a GET would bring.
    let size = text(headers, "content-length").and_then(|length| length.parse::<u64>().ok());
    let media_type = text(headers, CONTENT_TYPE.as_str()).map(media::essence);
    Ok(match (digest, size, media_type) {
        (Some(digest), Some(size), Some(media_type)) if size > 0 => Some(Descriptor::new(media_type, digest, size)),
        _ => None,
    })
}

async fn get_manifest(server: Arc<Endpoint>, scope: &Scope, selector: Selector<'_>) -> Result<Fetched, TryError> {
    let path = format!("/{}/manifests/{selector}", scope.repository);
    let ask = Ask::new(Method::GET, path, scope).header(ACCEPT, accept());
    let response = server.ask(&ask).await?.response;
    let media_type = text(response.headers(), CONTENT_TYPE.as_str()).map_or("", media::essence).to_owned();
    let named = named_digest(response.headers());
    let bytes = read_bounded(response, DOCUMENT_LIMIT, server.wait()).await?;
    let expected = match selector {
        Selector::Digest(digest) => Some(digest),
        Selector::Tag(_) => named,
    };
    if let Some(expected) = expected {
        verify_digest(&expected, &bytes).map_err(|error| TryError::Document(Arc::new(error)))?;
    }
    let digest = expected.unwrap_or_else(|| BlobDigest(Digest::of(Algorithm::Sha256, &bytes)));
    let size = bytes.len() as u64;
    Ok(Fetched { descriptor: Descriptor::new(&media_type, digest, size), bytes })
}

async fn get_document(server: Arc<Endpoint>, scope: &Scope, descriptor: &Descriptor) -> Result<Bytes, TryError> {
    let path = format!("/{}/blobs/{}", scope.repository, descriptor.digest);
    let response = server.ask(&Ask::new(Method::GET, path, scope)).await?.response;
    let bytes = read_bounded(response, DOCUMENT_LIMIT, server.wait()).await?;
    descriptor.verify(&bytes).map_err(|error| TryError::Document(Arc::new(error)))?;
    Ok(bytes)
}
