//! A registry in this process that does what it is told, the wrong thing included.
//!
//! It speaks the distribution API over plain HTTP on loopback, holds everything in memory, can want basic or bearer
//! authentication (it is its own token server), can stand in for an object store (`/store/DIGEST`), follows a script of
//! faults, and writes down every request.

mod door;
mod faults;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::response::Response;
use futures::StreamExt as _;
use tokio::net::{TcpListener, TcpStream};

use crate::model::{Algorithm, BlobDigest, Digest};

pub use door::Door;
pub use faults::Fault;

use door::{give_token, keep_out};
use faults::spoil;

/// A fault and when it happens.
struct Rule {
    method: Method,
    path: String,
    fault: Fault,
    left: usize,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Method.
    pub method: Method,
    /// Path without query.
    pub path: String,
    /// Query, or nothing.
    pub query: String,
    /// All headers.
    pub headers: HeaderMap,
}

impl Seen {
    /// A header's text.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

#[derive(Default)]
struct Content {
    blobs: HashMap<BlobDigest, Bytes>,
    /// (repository, tag or digest) -> (media type, bytes).
    manifests: BTreeMap<(String, String), (String, Bytes)>,
    uploads: HashMap<String, Vec<u8>>,
    /// How many uploads were begun: those that ended give nobody their names.
    begun: usize,
    /// Token -> the scopes it is good for.
    tokens: HashMap<String, String>,
    issued: usize,
    rules: Vec<Rule>,
    seen: Vec<Seen>,
}

struct Shared {
    address: SocketAddr,
    door: Mutex<Door>,
    content: Mutex<Content>,
    connections: AtomicUsize,
}

/// The registry. It stops when it is dropped.
pub struct FaultyRegistry {
    shared: Arc<Shared>,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for FaultyRegistry {
    fn drop(&mut self) {
        self.server.abort();
    }
}

struct Counted {
    listener: TcpListener,
    shared: Arc<Shared>,
}

impl axum::serve::Listener for Counted {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TcpStream, SocketAddr) {
        loop {
            if let Ok(accepted) = self.listener.accept().await {
                self.shared.connections.fetch_add(1, Ordering::Relaxed);
                return accepted;
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl FaultyRegistry {
    /// Starts one on a free port.
    ///
    /// # Panics
    /// If loopback has no free port.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback has a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let shared = Arc::new(Shared {
            address,
            door: Mutex::new(Door::Open),
            content: Mutex::default(),
            connections: AtomicUsize::new(0),
        });
        let app = axum::Router::new().fallback(handle).with_state(Arc::clone(&shared));
        let listener = Counted { listener, shared: Arc::clone(&shared) };
        let server = tokio::spawn(async move {
            drop(axum::serve(listener, app).await);
        });
        Self { shared, server }
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        self.shared.address.to_string()
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.shared.address)
    }

    /// Decides who is let in.
    pub fn set_door(&self, door: Door) {
        *lock(&self.shared.door) = door;
    }

    /// Stores a blob.
    pub fn put_blob(&self, bytes: impl Into<Bytes>) -> BlobDigest {
        let bytes = bytes.into();
        let digest = BlobDigest(Digest::of(Algorithm::Sha256, &bytes));
        lock(&self.shared.content).blobs.insert(digest, bytes);
        digest
    }

    /// The bytes of a blob, if it is here.
    pub fn blob(&self, digest: &BlobDigest) -> Option<Bytes> {
        lock(&self.shared.content).blobs.get(digest).cloned()
    }

    /// Stores a manifest under its digest and a tag.
    pub fn put_manifest(&self, repository: &str, tag: &str, media_type: &str, bytes: impl Into<Bytes>) -> BlobDigest {
        let bytes = bytes.into();
        let digest = BlobDigest(Digest::of(Algorithm::Sha256, &bytes));
        let mut content = lock(&self.shared.content);
        for name in [tag.to_owned(), digest.to_string()] {
            content.manifests.insert((repository.to_owned(), name), (media_type.to_owned(), bytes.clone()));
        }
        digest
    }

    /// The bytes of a manifest, if it is here.
    pub fn manifest(&self, repository: &str, name: &str) -> Option<Bytes> {
        let key = (repository.to_owned(), name.to_owned());
        lock(&self.shared.content).manifests.get(&key).map(|(_, bytes)| bytes.clone())
    }

    /// The next `times` requests with this method whose path contains `path` go wrong.
    pub fn script(&self, method: Method, path: &str, fault: Fault, times: usize) {
        lock(&self.shared.content).rules.push(Rule { method, path: path.to_owned(), fault, left: times });
    }

    /// Forgets all faults that have not happened.
    pub fn clear_script(&self) {
        lock(&self.shared.content).rules.clear();
    }

    /// From now on no token given out before is good.
    pub fn expire_tokens(&self) {
        lock(&self.shared.content).tokens.clear();
    }

    /// How many tokens were given out.
    pub fn tokens_issued(&self) -> usize {
        lock(&self.shared.content).issued
    }

    /// Every request so far.
    pub fn seen(&self) -> Vec<Seen> {
        lock(&self.shared.content).seen.clone()
    }

    /// Requests whose method and path fit.
    pub fn seen_at(&self, method: &Method, path: &str) -> Vec<Seen> {
        self.seen().into_iter().filter(|seen| seen.method == *method && seen.path.contains(path)).collect()
    }

    /// Forgets the requests so far.
    pub fn forget_seen(&self) {
        lock(&self.shared.content).seen.clear();
    }

    /// How many connections were made.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Relaxed)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn answer(status: u16, headers: &[(HeaderName, String)], body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    *response.status_mut() = StatusCode::from_u16(status).expect("scripts name real statuses");
    for (name, value) in headers {
        let value = HeaderValue::from_str(value).expect("scripts name real header values");
        response.headers_mut().append(name.clone(), value);
    }
    response
}

fn refuse(status: u16, code: &str) -> Response {
    let body = format!(r#"{{"errors":[{{"code":"{code}","message":"{}"}}]}}"#, code.to_lowercase().replace('_', " "));
    answer(status, &[(CONTENT_TYPE, "application/json".to_owned())], body)
}

async fn handle(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let seen = Seen {
        method: parts.method,
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        headers: parts.headers,
    };
    let fault = {
        let mut content = lock(&shared.content);
        content.seen.push(seen.clone());
        let fits = |rule: &&mut Rule| rule.left > 0 && rule.method == seen.method && seen.path.contains(&rule.path);
        content.rules.iter_mut().find(fits).map(|rule| {
            rule.left -= 1;
            rule.fault.clone()
        })
    };
    match fault {
        Some(Fault::Hang) => {
            std::future::pending::<()>().await;
            unreachable!("what is pending for ever does not end")
        }
        Some(Fault::Status(status, headers)) => {
            let headers: Vec<_> =
                headers.into_iter().map(|(name, value)| (HeaderName::from_static(name), value)).collect();
            return answer(status, &headers, Body::empty());
        }
        Some(Fault::Body(status, body)) => return answer(status, &[], body),
        Some(Fault::Redirect(base)) => {
            let digest = seen.path.rsplit('/').next().unwrap_or_default();
            return answer(307, &[(LOCATION, format!("{base}/store/{digest}?sig=secret"))], Body::empty());
        }
        Some(Fault::DropUpload(after)) => {
            let mut body = body.into_data_stream();
            let mut taken = 0;
            while let Some(Ok(piece)) = body.next().await {
                taken += piece.len();
                if taken >= after {
                    break;
                }
            }
            // An error in the answer's body ends the connection.
            let broken = futures::stream::iter([Err::<Bytes, _>(io::Error::other("scripted"))]);
            return answer(200, &[(CONTENT_LENGTH, "1".to_owned())], Body::from_stream(broken));
        }
        _ => {}
    }
    if seen.path == "/token" {
        let body = axum::body::to_bytes(body, 1 << 20).await.unwrap_or_default();
        return give_token(&shared, &seen, &body);
    }
    if !seen.path.starts_with("/store/")
        && let Some(refusal) = keep_out(&shared, &seen)
    {
        return refusal;
    }
    let Ok(body) = axum::body::to_bytes(body, usize::MAX).await else { return refuse(400, "SIZE_INVALID") };
    let ignore_range = matches!(fault, Some(Fault::IgnoreRange));
    let response = route(&shared, &seen, body, ignore_range);
    match fault {
        Some(fault) => spoil(response, fault).await,
        None => response,
    }
}

/// The repository of an API path.
fn repository_of(path: &str) -> Option<&str> {
    let rest = path.strip_prefix("/v2/")?;
    let end = ["/blobs/", "/manifests/"].iter().filter_map(|part| rest.find(part)).min()?;
    rest.get(..end)
}

fn route(shared: &Shared, seen: &Seen, body: Bytes, ignore_range: bool) -> Response {
    let digest_header = HeaderName::from_static("docker-content-digest");
    if let Some(digest) = seen.path.strip_prefix("/store/") {
        return send_blob(shared, seen, digest, ignore_range);
    }
    let Some(repository) = repository_of(&seen.path) else { return refuse(404, "NOT_FOUND") };
    let rest = &seen.path["/v2/".len() + repository.len()..];
    if let Some(name) = rest.strip_prefix("/manifests/") {
        let key = (repository.to_owned(), name.to_owned());
        if seen.method == Method::PUT {
            let media_type = seen.header("content-type").unwrap_or_default().to_owned();
            let digest = BlobDigest(Digest::of(Algorithm::Sha256, &body));
            let mut content = lock(&shared.content);
            content.manifests.insert((repository.to_owned(), digest.to_string()), (media_type.clone(), body.clone()));
            content.manifests.insert(key, (media_type, body));
            return answer(201, &[(digest_header, digest.to_string())], Body::empty());
        }
        return match lock(&shared.content).manifests.get(&key) {
            None => refuse(404, "MANIFEST_UNKNOWN"),
            Some((media_type, bytes)) => {
                let digest = Digest::of(Algorithm::Sha256, bytes).to_string();
                let headers = [
                    (CONTENT_TYPE, media_type.clone()),
                    (digest_header, digest),
                    (CONTENT_LENGTH, bytes.len().to_string()),
                ];
                answer(200, &headers, if seen.method == Method::HEAD { Bytes::new() } else { bytes.clone() })
            }
        };
    }
    match rest.strip_prefix("/blobs/uploads/") {
        Some(id) => upload(shared, seen, repository, id, &body),
        None => send_blob(shared, seen, rest.strip_prefix("/blobs/").unwrap_or_default(), ignore_range),
    }
}

fn send_blob(shared: &Shared, seen: &Seen, digest: &str, ignore_range: bool) -> Response {
    let found = digest.parse().ok().and_then(|digest| lock(&shared.content).blobs.get(&digest).cloned());
    let Some(bytes) = found else { return refuse(404, "BLOB_UNKNOWN") };
    let total = bytes.len();
    let range = seen.header(RANGE.as_str()).filter(|_| !ignore_range).and_then(|range| {
        let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some((first.parse::<usize>().ok()?, last.parse::<usize>().ok()?))
    });
    match range {
        _ if seen.method == Method::HEAD => answer(200, &[(CONTENT_LENGTH, total.to_string())], Body::empty()),
        None => answer(200, &[], bytes),
        Some((first, _)) if first >= total => refuse(416, "RANGE_INVALID"),
        Some((first, last)) => {
            let last = last.min(total - 1);
            let range = format!("bytes {first}-{last}/{total}");
            answer(206, &[(CONTENT_RANGE, range)], bytes.slice(first..=last))
        }
    }
}

fn upload(shared: &Shared, seen: &Seen, repository: &str, id: &str, body: &Bytes) -> Response {
    let pairs: HashMap<String, String> = url::form_urlencoded::parse(seen.query.as_bytes()).into_owned().collect();
    let mut content = lock(&shared.content);
    let place = |id: &str| (LOCATION, format!("/v2/{repository}/blobs/uploads/{id}?state=secret-state"));
    let upto = |bytes: &[u8]| (RANGE, format!("0-{}", bytes.len().saturating_sub(1)));
    match seen.method {
        Method::POST => {
            if let Some(digest) = pairs.get("mount").and_then(|digest| digest.parse().ok())
                && content.blobs.contains_key(&digest)
                && pairs.contains_key("from")
            {
                return answer(201, &[(LOCATION, format!("/v2/{repository}/blobs/{digest}"))], Body::empty());
            }
            content.begun += 1;
            let id = format!("u{}", content.begun);
            content.uploads.insert(id.clone(), Vec::new());
            answer(202, &[place(&id)], Body::empty())
        }
        _ if pairs.get("state").map(String::as_str) != Some("secret-state") => refuse(400, "BLOB_UPLOAD_INVALID"),
        Method::PATCH => {
            let Some(bytes) = content.uploads.get_mut(id) else { return refuse(404, "BLOB_UPLOAD_UNKNOWN") };
            let starts = seen.header(CONTENT_RANGE.as_str()).and_then(|range| range.split_once('-')?.0.parse().ok());
            if starts.is_some_and(|start: usize| start != bytes.len()) {
                return answer(416, &[place(id), upto(bytes)], Body::empty());
            }
            bytes.extend_from_slice(body);
            answer(202, &[place(id), upto(bytes)], Body::empty())
        }
        Method::GET => match content.uploads.get(id) {
            Some(bytes) => answer(204, &[place(id), upto(bytes)], Body::empty()),
            None => refuse(404, "BLOB_UPLOAD_UNKNOWN"),
        },
        Method::DELETE => {
            content.uploads.remove(id);
            answer(204, &[], Body::empty())
        }
        Method::PUT => {
            let Some(mut bytes) = content.uploads.remove(id) else { return refuse(404, "BLOB_UPLOAD_UNKNOWN") };
            bytes.extend_from_slice(body);
            let digest = BlobDigest(Digest::of(Algorithm::Sha256, &bytes));
            if pairs.get("digest") != Some(&digest.to_string()) {
                return refuse(400, "DIGEST_INVALID");
            }
            content.blobs.insert(digest, bytes.into());
            answer(201, &[(LOCATION, format!("/v2/{repository}/blobs/{digest}"))], Body::empty())
        }
        _ => refuse(405, "UNSUPPORTED"),
    }
}
