//! Bringing images to a registry: blobs in one request or in pieces, blobs that are there already, manifests.
//!
//! Pushes go to the first server that `certs.d` lets take them, never to two. A blob in pieces goes on where the server
//! says it stopped. An upload that is given up is cancelled. Nothing is hashed here: the registry checks the digest.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Method, Response};
use url::Url;

use super::auth::Scope;
use super::client::{Client, Need};
use super::endpoint::{Ask, Endpoint, Target, location};
use super::error::{RegistryError, TryError};
use super::retry::{Verdict, judge};
use crate::model::{Algorithm, BlobDigest, ByteRange, Digest};
use crate::oci::{ImageName, Selector};

/// Bytes read from a file at a time.
const PIECE: u64 = 256 << 10;
/// Bytes of a request when a server does not take a blob as a whole: below the 100 MB that proxies commonly allow, large
/// enough that a request's round trip is nothing beside it. S3-backed registries want at least 5 MiB.
const DEFAULT_CHUNK: u64 = 32 << 20;
/// How many bytes a server may hash or move in a second before it answers; slower ones exist, but not by much.
const COMMIT_RATE: u64 = 16 << 20;

/// How blobs are pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Upload {
    /// In one request; in pieces where the server does not take it.
    #[default]
    Auto,
    /// In one request.
    Monolithic,
    /// In requests of this many bytes, or more if the server wants it.
    Chunked(u64),
}

/// What is pushed.
#[derive(Debug, Clone)]
pub enum BlobContent {
    /// Bytes in memory.
    Bytes(Bytes),
    /// The first `size` bytes of a file.
    File {
        /// The file, read by offset.
        file: Arc<File>,
        /// How many bytes.
        size: u64,
    },
}

/// What became of a body's bytes so far.
#[derive(Default)]
struct Progress {
    moved: AtomicU64,
    /// Why the file could not be read.
    broken: Mutex<Option<std::io::Error>>,
}

impl Progress {
    fn broken(&self) -> std::sync::MutexGuard<'_, Option<std::io::Error>> {
        self.broken.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// How a blob came to be in its repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pushed {
    /// It was there.
    Present,
    /// The registry had it in another repository.
    Mounted,
    /// It was sent.
    Uploaded,
}

impl BlobContent {
    /// How many bytes.
    pub fn size(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File { size, .. } => *size,
        }
    }

    /// A request body of the bytes `range`; `progress` counts what was handed over.
    fn body(&self, range: ByteRange, progress: &Arc<Progress>) -> reqwest::Body {
        match self {
            Self::Bytes(bytes) => {
                let start = usize::try_from(range.start()).unwrap_or(usize::MAX).min(bytes.len());
                let end = usize::try_from(range.end()).unwrap_or(usize::MAX).min(bytes.len());
                progress.moved.fetch_add(range.len(), Ordering::Relaxed);
                reqwest::Body::from(bytes.slice(start..end))
            }
            Self::File { file, .. } => {
                let state = (Arc::clone(file), range.start(), range.end(), Arc::clone(progress));
                reqwest::Body::wrap_stream(futures::stream::try_unfold(state, |(file, at, end, progress)| async move {
                    let length = (end - at).min(PIECE);
                    if length == 0 {
                        return Ok::<_, std::io::Error>(None);
                    }
                    let reader = Arc::clone(&file);
                    let read = tokio::task::spawn_blocking(move || {
                        let mut piece = vec![0; usize::try_from(length).map_err(std::io::Error::other)?];
                        reader.read_exact_at(&mut piece, at)?;
                        Ok::<_, std::io::Error>(Bytes::from(piece))
                    });
                    match read.await.map_err(std::io::Error::other).flatten() {
                        Ok(piece) => {
                            progress.moved.fetch_add(length, Ordering::Relaxed);
                            Ok(Some((piece, (file, at + length, end, progress))))
                        }
                        Err(error) => {
                            let kind = error.kind();
                            *progress.broken() = Some(error);
                            Err(kind.into())
                        }
                    }
                }))
            }
        }
    }
}

fn push_scope(name: &ImageName, from: Option<&str>) -> Scope {
    Scope { repository: name.repository().to_owned(), push: true, from: from.map(str::to_owned) }
}

impl Client {
    /// The one server that pushes go to.
    async fn target(
        &self,
        name: &ImageName,
        action: &'static str,
        object: &str,
    ) -> Result<Vec<Arc<Endpoint>>, RegistryError> {
        // Not in the order of health: half an image here and half there is none.
        let mut servers = self.servers_in_order(name, Need::Push, action, object).await?;
        servers.truncate(1);
        Ok(servers)
    }

    /// True if the repository of `name` has the blob.
    ///
    /// # Errors
    /// The registry did not say.
    pub async fn blob_exists(&self, name: &ImageName, blob: &BlobDigest) -> Result<bool, RegistryError> {
        let (action, object) = ("look for", format!("{blob} in {}/{}", name.host(), name.repository()));
        let servers = self.target(name, action, &object).await?;
        let scope = &push_scope(name, None);
        self.try_all(servers, action, &object, |server| async move { exists(&server, scope, blob).await }.boxed()).await
    }

    /// Brings a blob into the repository of `name`, by mounting it from the repository `from` of the same registry where
    /// that works.
    ///
    /// # Errors
    /// The registry did not take it.
    pub async fn push_blob(
        &self,
        name: &ImageName,
        blob: &BlobDigest,
        content: &BlobContent,
        from: Option<&str>,
    ) -> Result<Pushed, RegistryError> {
        let (action, object) = ("push", format!("{blob} to {}/{}", name.host(), name.repository()));
        let servers = self.target(name, action, &object).await?;
        let from = from.filter(|from| *from != name.repository());
        let scope = &push_scope(name, from);
        let attempt = |server: Arc<Endpoint>| {
            async move {
                if exists(&server, scope, blob).await? {
                    return Ok(Pushed::Present);
                }
                let pusher = Pusher { client: self, server: &server, scope, blob, content };
                pusher.push(self.upload()).await
            }
            .boxed()
        };
        self.try_all(servers, action, &object, attempt).await
    }

    /// Asks the registry to take a blob over from the repository `from`; false if it does not.
    ///
    /// # Errors
    /// The registry did not say.
    pub async fn mount_blob(&self, name: &ImageName, blob: &BlobDigest, from: &str) -> Result<bool, RegistryError> {
        let (action, object) = ("mount", format!("{blob} into {}/{}", name.host(), name.repository()));
        let servers = self.target(name, action, &object).await?;
        let scope = &push_scope(name, Some(from));
        let attempt = |server: Arc<Endpoint>| {
            async move {
                if exists(&server, scope, blob).await? {
                    return Ok(true);
                }
                let content = &BlobContent::Bytes(Bytes::new());
                let pusher = Pusher { client: self, server: &server, scope, blob, content };
                match pusher.begin().await? {
                    Begun::Mounted => Ok(true),
                    Begun::Upload { place, .. } => {
                        pusher.cancel(&place).await;
                        Ok(false)
                    }
                }
            }
            .boxed()
        };
        match self.try_all(servers, action, &object, attempt).await {
            // Some registries refuse what they cannot mount instead of offering an upload.
            Err(RegistryError::NotFound { .. }) => Ok(false),
            other => other,
        }
    }

    /// Stores a manifest or index under the tag or digest of `name` and gives back its digest.
    ///
    /// # Errors
    /// The registry did not take it, or names another digest for it.
    pub async fn push_manifest(
        &self,
        name: &ImageName,
        media_type: &str,
        bytes: &Bytes,
    ) -> Result<BlobDigest, RegistryError> {
        let (action, object) = ("push the manifest of", name.to_string());
        let servers = self.target(name, action, &object).await?;
        let scope = &push_scope(name, None);
        let selector = name.selector();
        let algorithm = match selector {
            Selector::Digest(digest) => digest.0.algorithm(),
            Selector::Tag(_) => Algorithm::Sha256,
        };
        let digest = BlobDigest(Digest::of(algorithm, bytes));
        let attempt = |server: Arc<Endpoint>| {
            async move {
                let mut ask = Ask::new(Method::PUT, format!("/{}/manifests/{selector}", scope.repository), scope);
                let media_type = HeaderValue::from_str(media_type).map_err(|_| TryError::Header("Content-Type"))?;
                ask = ask.header(CONTENT_TYPE, media_type);
                let body = || reqwest::Body::from(bytes.clone());
                ask.body = Some(&body);
                let sending = Progress::default();
                let response = watch(&server, &sending, 0, server.ask(&ask)).await?.response;
                let named = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
                match named.and_then(|named| named.parse::<BlobDigest>().ok()) {
                    Some(named) if named.0.algorithm() == algorithm && named != digest => {
                        Err(TryError::Header("Docker-Content-Digest"))
                    }
                    _ => Ok(digest),
                }
            }
            .boxed()
        };
        self.try_all(servers, action, &object, attempt).await
    }
}

async fn exists(server: &Endpoint, scope: &Scope, blob: &BlobDigest) -> Result<bool, TryError> {
    let ask = Ask::new(Method::HEAD, format!("/{}/blobs/{blob}", scope.repository), scope);
    match server.ask(&ask).await {
        Ok(_) => Ok(true),
        Err(TryError::Status { status: 404, .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Waits for an upload as long as bytes move, then for the server to make up its mind about `size` bytes.
async fn watch<T>(
    server: &Endpoint,
    progress: &Progress,
    size: u64,
    upload: impl Future<Output = Result<T, TryError>>,
) -> Result<T, TryError> {
    let wait = server.wait();
    let limit = wait.idle.max(wait.response).saturating_add(Duration::from_secs(size / COMMIT_RATE));
    let mut upload = std::pin::pin!(upload);
    let mut seen = progress.moved.load(Ordering::Relaxed);
    loop {
        if let Ok(done) = tokio::time::timeout(limit, &mut upload).await {
            return done;
        }
        let now = progress.moved.load(Ordering::Relaxed);
        if now == seen {
            return Err(TryError::Timeout { what: "the upload", limit });
        }
        seen = now;
    }
}

/// What a server answers to the wish to upload.
enum Begun {
    Mounted,
    Upload { place: Url, least: u64 },
}

/// One blob on its way to one server.
struct Pusher<'a> {
    client: &'a Client,
    server: &'a Endpoint,
    scope: &'a Scope,
    blob: &'a BlobDigest,
    content: &'a BlobContent,
}

impl Pusher<'_> {
    async fn push(&self, how: Upload) -> Result<Pushed, TryError> {
        let (mut place, least) = match self.begin().await? {
            Begun::Mounted => return Ok(Pushed::Mounted),
            Begun::Upload { place, least } => (place, least),
        };
        let sent = match how {
            Upload::Monolithic => self.monolithic(&place).await,
            Upload::Chunked(size) => self.chunked(&mut place, size.max(least)).await,
            Upload::Auto => match self.monolithic(&place).await {
                Err(TryError::Status { status: 413, .. }) => {
                    self.cancel(&place).await;
                    match self.begin().await? {
                        Begun::Mounted => return Ok(Pushed::Mounted),
                        Begun::Upload { place: anew, least } => {
                            place = anew;
                            self.chunked(&mut place, DEFAULT_CHUNK.max(least)).await
                        }
                    }
                }
                other => other,
            },
        };
        match sent {
            Ok(()) => Ok(Pushed::Uploaded),
            Err(error) => {
                self.cancel(&place).await;
                Err(error)
            }
        }
    }

    async fn begin(&self) -> Result<Begun, TryError> {
        let mut ask =
            Ask::new(Method::POST, String::new(), self.scope).header(CONTENT_LENGTH, HeaderValue::from_static("0"));
        let mut query = Vec::new();
        if let Some(from) = &self.scope.from {
            query.push(("mount", self.blob.to_string()));
            query.push(("from", from.clone()));
        }
        ask.target = Target::Api(format!("/{}/blobs/uploads/", self.scope.repository), query);
        let response = self.server.ask(&ask).await?.response;
        match response.status().as_u16() {
            201 => Ok(Begun::Mounted),
            202 => {
                let least = number(response.headers(), "oci-chunk-min-length").unwrap_or(0);
                Ok(Begun::Upload { place: self.place(&response)?, least })
            }
            status => Err(TryError::Status { status, message: String::new(), retry_after: None }),
        }
    }

    /// Where the upload goes on.
    fn place(&self, response: &Response) -> Result<Url, TryError> {
        location(response.headers(), response.url()).ok_or(TryError::Header("Location"))
    }

    /// The address that closes an upload.
    fn closing(&self, place: &Url) -> Url {
        let mut url = place.clone();
        url.query_pairs_mut().append_pair("digest", &self.blob.to_string());
        url
    }

    async fn send(&self, method: Method, url: Url, range: ByteRange, headers: HeaderMap) -> Result<Response, TryError> {
        let progress = Arc::<Progress>::default();
        let body = || self.content.body(range, &progress);
        let mut ask = Ask::new(method, String::new(), self.scope)
            .header(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"))
            .header(CONTENT_LENGTH, HeaderValue::from(range.len()));
        ask.target = Target::Given(url);
        ask.headers.extend(headers);
        ask.body = Some(&body);
        match watch(self.server, &progress, self.content.size(), self.server.ask(&ask)).await {
            Ok(answer) => Ok(answer.response),
            Err(error) => Err(progress.broken().take().map_or(error, |broken| TryError::File(Arc::new(broken)))),
        }
    }

    async fn monolithic(&self, place: &Url) -> Result<(), TryError> {
        let whole = ByteRange::to(self.content.size());
        self.send(Method::PUT, self.closing(place), whole, HeaderMap::new()).await.map(drop)
    }

    /// Sends pieces of `size` bytes; after trouble asks the server how far it came. `place` is kept up to date.
    async fn chunked(&self, place: &mut Url, size: u64) -> Result<(), TryError> {
        let patience = self.client.patience();
        let total = self.content.size();
        let size = size.max(1);
        let mut at = 0;
        let mut failures = 0;
        while at < total {
            let end = at.saturating_add(size).min(total);
            match self.piece(place, at, end).await {
                Ok(next) => {
                    *place = next;
                    at = end;
                    failures = 0;
                }
                Err(error) => {
                    let lost = matches!(error, TryError::Status { status: 416, .. });
                    let Verdict::Again(after) = (if lost { Verdict::Again(None) } else { judge(&error) }) else {
                        return Err(error);
                    };
                    failures += 1;
                    if failures >= patience.rounds.max(1) {
                        return Err(error);
                    }
                    let wait = patience.wait(failures - 1, after);
                    if wait > patience.deadline {
                        return Err(error);
                    }
                    tokio::time::sleep(wait).await;
                    let (next, arrived) = self.status(place).await?;
                    *place = next;
                    at = arrived.min(total);
                }
            }
        }
        self.send(Method::PUT, self.closing(place), ByteRange::to(0), HeaderMap::new()).await.map(drop)
    }

    async fn piece(&self, place: &Url, at: u64, end: u64) -> Result<Url, TryError> {
        let range = ByteRange::new(at, end).map_err(|_| TryError::Header("Range"))?;
        let mut headers = HeaderMap::new();
        let value = HeaderValue::from_str(&format!("{at}-{}", end.saturating_sub(1)));
        headers.insert(CONTENT_RANGE, value.map_err(|_| TryError::Header("Content-Range"))?);
        let response = self.send(Method::PATCH, place.clone(), range, headers).await?;
        // A server that took less than it was given would otherwise be found out only at the end.
        if arrived(response.headers()).is_some_and(|arrived| arrived != end && end > 1) {
            return Err(TryError::Status { status: 416, message: "it took less".to_owned(), retry_after: None });
        }
        self.place(&response)
    }

    /// Where the upload goes on, and how much of it arrived.
    async fn status(&self, place: &Url) -> Result<(Url, u64), TryError> {
        let mut ask = Ask::new(Method::GET, String::new(), self.scope);
        ask.target = Target::Given(place.clone());
        let response = self.server.ask(&ask).await?.response;
        let arrived = arrived(response.headers()).ok_or(TryError::Header("Range"))?;
        Ok((location(response.headers(), response.url()).unwrap_or_else(|| place.clone()), arrived))
    }

    /// Tells the server to forget the upload; whether it does is its affair.
    async fn cancel(&self, place: &Url) {
        let mut ask = Ask::new(Method::DELETE, String::new(), self.scope);
        ask.target = Target::Given(place.clone());
        if let Err(error) = self.server.ask(&ask).await {
            tracing::debug!(blob = %self.blob, %error, "an upload was not cancelled");
        }
    }
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.trim().parse().ok()
}

/// How many bytes of an upload arrived: one more than the end of `Range: 0-END`. Nothing is written as `0-0`, and so is
/// a single byte; nothing is meant, as no piece is that small but the only one of a tiny blob.
fn arrived(headers: &HeaderMap) -> Option<u64> {
    let text = headers.get(RANGE)?.to_str().ok()?.trim();
    let text = text.strip_prefix("bytes=").unwrap_or(text);
    let (start, end) = text.split_once('-')?;
    match (start.parse::<u64>().ok()?, end.parse::<u64>().ok()?) {
        (0, 0) => Some(0),
        (0, end) => end.checked_add(1),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arrived_part_of_an_upload_is_read() {
        for (text, expected) in
            [("0-0", Some(0)), ("0-99", Some(100)), ("bytes=0-9", Some(10)), ("5-9", None), ("x", None)]
        {
            let mut headers = HeaderMap::new();
            headers.insert(RANGE, text.parse().unwrap());
            assert_eq!(arrived(&headers), expected, "{text}");
        }
    }
}
