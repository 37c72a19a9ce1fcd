//! A registry in this process that does what it is told, the wrong thing included.
//!
//! It speaks the distribution API over plain HTTP on loopback, holds everything in memory, can want basic or bearer
//! authentication (it is its own token server), can stand in for an object store (`/store/DIGEST`), follows a script of
//! faults, and writes down every request.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, RANGE, WWW_AUTHENTICATE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::response::Response;
use base64::Engine as _;
use futures::StreamExt as _;
use tokio::net::{TcpListener, TcpStream};

use crate::model::{Algorithm, BlobDigest, Digest};

/// What goes wrong with a request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// This status, with these headers and no body.
    Status(u16, Vec<(&'static str, String)>),
    /// This status, with this body.
    Body(u16, String),
    /// The range is ignored: 200 and everything.
    IgnoreRange,
    /// The connection ends after this many bytes of the body.
    Cut(usize),
    /// One byte of the body is another.
    Corrupt,
    /// `Content-Range` says this.
    ContentRange(&'static str),
    /// Only this many bytes of the range are sent, and said so.
    Short(usize),
    /// 307 to `BASE/store/DIGEST?sig=secret`.
    Redirect(String),
    /// Bytes come one at a time with this pause between them.
    Trickle(Duration),
    /// No answer at all.
    Hang,
    /// The connection ends while the request's body is still being sent.
    DropUpload(usize),
    /// An answer without this header.
    Without(HeaderName),
    /// An answer with this header changed.
    With(HeaderName, String),
}

/// A fault and when it happens.
struct Rule {
    method: Method,
    path: String,
    fault: Fault,
    left: usize,
}

/// Who is let in.
#[derive(Debug, Clone)]
pub enum Door {
    /// Everybody.
    Open,
    /// Who knows the password.
    Basic {
        /// User.
        user: String,
        /// Password.
        password: String,
    },
    /// Who brings a token of ours.
    Bearer {
        /// Who gets one: anybody, or who knows this user and password.
        login: Option<(String, String)>,
        /// Or who posts this identity token.
        identity: Option<String>,
        /// What a token is said to live, in seconds.
        expires_in: Option<u64>,
        /// Where tokens are given out, if not here.
        realm: Option<String>,
    },
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

/// Changes a good answer.
async fn spoil(mut response: Response, fault: Fault) -> Response {
    match fault {
        Fault::Without(name) => {
            response.headers_mut().remove(name);
            return response;
        }
        Fault::With(name, value) => {
            response.headers_mut().insert(name, value.parse().expect("scripts name real header values"));
            return response;
        }
        Fault::ContentRange(value) => {
            response.headers_mut().insert(CONTENT_RANGE, HeaderValue::from_static(value));
            return response;
        }
        _ => {}
    }
    let (parts, body) = response.into_parts();
    let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap_or_default();
    let length = bytes.len();
    let body = match fault {
        Fault::Corrupt => {
            let mut bytes = bytes.to_vec();
            if let Some(byte) = bytes.get_mut(length / 2) {
                *byte ^= 0xff;
            }
            Body::from(bytes)
        }
        Fault::Cut(after) => {
            let head = bytes.slice(..after.min(length));
            let pieces = [Ok(head), Err(io::Error::other("scripted"))];
            // A pause lets the head leave before the connection ends.
            Body::from_stream(futures::stream::iter(pieces).then(|piece| async {
                if piece.is_err() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                piece
            }))
        }
        Fault::Trickle(pause) => {
            let pieces = (0..length).map(move |at| bytes.slice(at..=at));
            Body::from_stream(futures::stream::iter(pieces).then(move |piece| async move {
                tokio::time::sleep(pause).await;
                Ok::<_, io::Error>(piece)
            }))
        }
        _ => Body::from(bytes),
    };
    let mut response = Response::from_parts(parts, body);
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    if let Fault::Short(count) = fault {
        return shorten(response, count).await;
    }
    response
}

async fn shorten(response: Response, count: usize) -> Response {
    let (mut parts, body) = response.into_parts();
    let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap_or_default();
    let count = count.min(bytes.len());
    let old = parts.headers.get(CONTENT_RANGE).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    if let Some((start, rest)) = old.strip_prefix("bytes ").and_then(|old| old.split_once('-'))
        && let (Ok(start), Some((_, total))) = (start.parse::<usize>(), rest.split_once('/'))
    {
        let range = format!("bytes {start}-{}/{total}", start + count - 1);
        parts.headers.insert(CONTENT_RANGE, range.parse().expect("digits make a header"));
    }
    parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(count));
    Response::from_parts(parts, Body::from(bytes.slice(..count)))
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
}

/// The repository of an API path.
fn repository_of(path: &str) -> Option<&str> {
    let rest = path.strip_prefix("/v2/")?;
    let end = ["/blobs/", "/manifests/"].iter().filter_map(|part| rest.find(part)).min()?;
    rest.get(..end)
}

fn keep_out(shared: &Shared, seen: &Seen) -> Option<Response> {
    let brought = seen.header("authorization").unwrap_or_default().to_owned();
    match &*lock(&shared.door) {
        Door::Open => None,
        Door::Basic { user, password } => {
            let wanted = (WWW_AUTHENTICATE, "Basic realm=\"test\"".to_owned());
            (brought != basic(user, password)).then(|| answer(401, &[wanted], Body::empty()))
        }
        Door::Bearer { realm, .. } => {
            let repository = repository_of(&seen.path).unwrap_or_default();
            let writes = !matches!(seen.method, Method::GET | Method::HEAD);
            let needed = format!("repository:{repository}:{}", if writes { "pull,push" } else { "pull" });
            let content = lock(&shared.content);
            let granted = brought.strip_prefix("Bearer ").and_then(|token| content.tokens.get(token));
            let covers = |granted: &String| {
                granted.split(' ').any(|one| one == needed || one == format!("repository:{repository}:pull,push"))
            };
            if granted.is_some_and(covers) {
                return None;
            }
            let realm = realm.clone().unwrap_or_else(|| format!("http://{}/token", shared.address));
            let wanted = format!("Bearer realm=\"{realm}\",service=\"test\",scope=\"{needed}\"");
            Some(answer(401, &[(WWW_AUTHENTICATE, wanted)], Body::empty()))
        }
    }
}

fn give_token(shared: &Shared, seen: &Seen, body: &[u8]) -> Response {
    let door = lock(&shared.door).clone();
    let Door::Bearer { login, identity, expires_in, .. } = door else { return refuse(404, "UNSUPPORTED") };
    let text =
        if seen.method == Method::POST { String::from_utf8_lossy(body).into_owned() } else { seen.query.clone() };
    let pairs: Vec<(String, String)> =
        url::form_urlencoded::parse(text.as_bytes()).map(|(n, v)| (n.into_owned(), v.into_owned())).collect();
    let all = |name: &str| pairs.iter().filter(|(n, _)| n == name).map(|(_, v)| v.clone()).collect::<Vec<_>>();
    let welcome = if seen.method == Method::POST {
        identity.is_some() && all("refresh_token").first() == identity.as_ref()
    } else {
        login.is_none_or(|(user, password)| seen.header("authorization") == Some(basic(&user, &password).as_str()))
    };
    if !welcome || all("service") != ["test"] {
        return refuse(401, "UNAUTHORIZED");
    }
    let mut content = lock(&shared.content);
    content.issued += 1;
    let token = format!("secret-token-{}-{}", shared.address.port(), content.issued);
    content.tokens.insert(token.clone(), all("scope").join(" "));
    let key = if seen.method == Method::POST { "access_token" } else { "token" };
    let mut body = serde_json::json!({ key: token });
    if let Some(seconds) = expires_in {
        body["expires_in"] = seconds.into();
    }
    answer(200, &[(CONTENT_TYPE, "application/json".to_owned())], body.to_string())
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
