//! The routes of the distribution specification that read: `/v2/`, manifests, blobs with ranges, tags, referrers.
//!
//! Guarantees: `HEAD` answers what `GET` would without the body; an unsatisfiable range is 416, more than one range is
//! answered as a whole, as RFC 9110 allows; errors carry the specification's codes.
//! Refuses to know where files lie (`files`) and how slow the link is (`link`), except for the round trip of a request.

use std::fs::File;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::Response;
use tokio::io::{AsyncReadExt as _, AsyncSeekExt as _};
use tokio_util::io::ReaderStream;

use super::files::{Document, LayoutFiles};
use super::link::Peer;
use crate::model::{BlobDigest, ByteRange};

/// Bytes read from a blob at once: large enough that reading costs little next to sending, small enough that a hundred
/// connections stay small.
const READ: usize = 256 << 10;

const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
const API_VERSION: HeaderName = HeaderName::from_static("docker-distribution-api-version");

/// What the handler needs.
#[derive(Debug)]
pub(super) struct Endpoint {
    files: LayoutFiles,
    latency: Duration,
    log: Option<Mutex<File>>,
}

impl Endpoint {
    pub(super) fn new(files: LayoutFiles, latency: Duration, log: Option<File>) -> Self {
        Self { files, latency, log: log.map(Mutex::new) }
    }

    /// All routes: repository names hold slashes, so paths are taken apart here and not by a pattern.
    pub(super) fn into_router(self) -> Router {
        Router::new().fallback(handle).with_state(Arc::new(self))
    }

    /// One line for one request, for people and for tests: who, what, which range, status, bytes.
    fn record(&self, peer: SocketAddr, method: &Method, path: &str, range: &str, status: StatusCode, bytes: u64) {
        let status = status.as_u16();
        tracing::info!(%peer, %method, path, range, status, bytes, "request");
        if let Some(log) = &self.log {
            let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let (seconds, millis) = (time.as_secs(), time.subsec_millis());
            let mut log = log.lock().unwrap_or_else(PoisonError::into_inner);
            let line = format!("{seconds}.{millis:03} {peer} {method} {path} {range} {status} {bytes}\n");
            if let Err(error) = log.write_all(line.as_bytes()) {
                tracing::warn!(%error, "cannot write the access log");
            }
        }
    }
}

async fn handle(
    State(endpoint): State<Arc<Endpoint>>,
    ConnectInfo(Peer(peer)): ConnectInfo<Peer>,
    request: Request,
) -> Response {
    tokio::time::sleep(endpoint.latency).await;
    let (parts, _) = request.into_parts();
    let path = parts.uri.path();
    let answer = match parts.method {
        Method::GET | Method::HEAD => {
            route(&endpoint.files, path, parts.uri.query().unwrap_or(""), &parts.headers).await
        }
        _ => Err(Refusal::Unsupported),
    };
    let mut answer = answer.unwrap_or_else(Refusal::answer);
    let bytes = if parts.method == Method::HEAD { 0 } else { answer.length };
    answer.headers.insert(header::CONTENT_LENGTH, HeaderValue::from(answer.length));
    answer.headers.insert(API_VERSION, HeaderValue::from_static("registry/2.0"));
    let range = parts.headers.get(header::RANGE).and_then(|range| range.to_str().ok()).unwrap_or("-");
    endpoint.record(peer, &parts.method, path, range, answer.status, bytes);
    let mut response = Response::new(if parts.method == Method::HEAD { Body::empty() } else { answer.body });
    *response.status_mut() = answer.status;
    *response.headers_mut() = answer.headers;
    response
}

/// An answer before it is known whether its body is wanted.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    length: u64,
    body: Body,
}

impl Answer {
    fn text(status: StatusCode, media_type: &str, text: Vec<u8>) -> Self {
        let mut headers = HeaderMap::new();
        if let Ok(media_type) = HeaderValue::from_str(media_type) {
            headers.insert(header::CONTENT_TYPE, media_type);
        }
        Self { status, headers, length: text.len() as u64, body: Body::from(text) }
    }

    fn json(status: StatusCode, value: &serde_json::Value) -> Self {
        Self::text(status, "application/json", value.to_string().into_bytes())
    }
}

/// Why a request is not answered with what it asked for.
#[derive(Debug)]
enum Refusal {
    NoSuchPath,
    Unsupported,
    ManifestUnknown(String),
    BlobUnknown(String),
    DigestInvalid(String),
    RangeUnsatisfiable { size: u64 },
    Unreadable(String),
}

impl Refusal {
    fn answer(self) -> Answer {
        let (status, code, message) = match &self {
            Self::NoSuchPath => (StatusCode::NOT_FOUND, "NAME_UNKNOWN", "no such path".to_owned()),
            Self::Unsupported => {
                (StatusCode::METHOD_NOT_ALLOWED, "UNSUPPORTED", "this endpoint is read-only".to_owned())
            }
            Self::ManifestUnknown(name) => (StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", format!("no manifest {name}")),
            Self::BlobUnknown(digest) => (StatusCode::NOT_FOUND, "BLOB_UNKNOWN", format!("no blob {digest}")),
            Self::DigestInvalid(text) => (StatusCode::BAD_REQUEST, "DIGEST_INVALID", format!("{text} is no digest")),
            Self::RangeUnsatisfiable { size } => {
                (StatusCode::RANGE_NOT_SATISFIABLE, "SIZE_INVALID", format!("the blob has {size} bytes"))
            }
            Self::Unreadable(what) => (StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", format!("{what} cannot be read")),
        };
        let errors = serde_json::json!({"errors": [{"code": code, "message": message}]});
        let mut answer = Answer::json(status, &errors);
        if let Self::RangeUnsatisfiable { size } = self
            && let Ok(value) = HeaderValue::from_str(&format!("bytes */{size}"))
        {
            answer.headers.insert(header::CONTENT_RANGE, value);
        }
        if matches!(self, Self::Unsupported) {
            answer.headers.insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        }
        answer
    }
}

/// Takes the path apart: `/v2/<name>/<kind>/<last>`, where the name may hold slashes.
async fn route(files: &LayoutFiles, path: &str, query: &str, headers: &HeaderMap) -> Result<Answer, Refusal> {
    let rest = path.strip_prefix("/v2").ok_or(Refusal::NoSuchPath)?;
    if rest.is_empty() || rest == "/" {
        return Ok(Answer::json(StatusCode::OK, &serde_json::json!({})));
    }
    let (front, last) = rest.rsplit_once('/').ok_or(Refusal::NoSuchPath)?;
    let (name, kind) = front.rsplit_once('/').ok_or(Refusal::NoSuchPath)?;
    let name = name.trim_start_matches('/');
    if name.is_empty() {
        return Err(Refusal::NoSuchPath);
    }
    match (kind, last) {
        ("manifests", reference) => manifest(files, reference),
        ("blobs", digest) => blob(files, digest, headers).await,
        ("tags", "list") => tags(files, name, query),
        ("referrers", digest) => {
            digest.parse::<BlobDigest>().map_err(|_| Refusal::DigestInvalid(digest.to_owned()))?;
            let index = serde_json::json!({
                "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": []
            });
            let text = index.to_string().into_bytes();
            Ok(Answer::text(StatusCode::OK, "application/vnd.oci.image.index.v1+json", text))
        }
        _ => Err(Refusal::NoSuchPath),
    }
}

/// A missing file is an unknown name; any other failure is this side's and goes to the log.
fn refuse(error: &io::Error, what: &str, unknown: fn(String) -> Refusal) -> Refusal {
    match error.kind() {
        io::ErrorKind::NotFound => unknown(what.to_owned()),
        _ => {
            tracing::warn!(%error, what, "cannot read from the layout");
            Refusal::Unreadable(what.to_owned())
        }
    }
}

fn manifest(files: &LayoutFiles, reference: &str) -> Result<Answer, Refusal> {
    let Document { digest, media_type, bytes } =
        files.manifest(reference).map_err(|error| refuse(&error, reference, Refusal::ManifestUnknown))?;
    let mut answer = Answer::text(StatusCode::OK, &media_type, bytes);
    name_content(&mut answer.headers, &digest);
    Ok(answer)
}

fn name_content(headers: &mut HeaderMap, digest: &BlobDigest) {
    if let (Ok(plain), Ok(quoted)) =
        (HeaderValue::from_str(&digest.to_string()), HeaderValue::from_str(&format!("\"{digest}\"")))
    {
        headers.insert(CONTENT_DIGEST, plain);
        headers.insert(header::ETAG, quoted);
    }
}

async fn blob(files: &LayoutFiles, text: &str, headers: &HeaderMap) -> Result<Answer, Refusal> {
    let digest: BlobDigest = text.parse().map_err(|_| Refusal::DigestInvalid(text.to_owned()))?;
    let (file, size) = files.blob(&digest).map_err(|error| refuse(&error, text, Refusal::BlobUnknown))?;
    let wanted =
        headers.get(header::RANGE).and_then(|value| value.to_str().ok()).map_or(Wanted::All, |v| wanted(v, size));
    let (status, range) = match wanted {
        Wanted::All => (StatusCode::OK, ByteRange::to(size)),
        Wanted::Part(range) => (StatusCode::PARTIAL_CONTENT, range),
        Wanted::Nothing => return Err(Refusal::RangeUnsatisfiable { size }),
    };
    let mut file = tokio::fs::File::from_std(file);
    file.set_max_buf_size(READ);
    file.seek(io::SeekFrom::Start(range.start())).await.map_err(|error| refuse(&error, text, Refusal::Unreadable))?;
    let body = Body::from_stream(ReaderStream::with_capacity(file.take(range.len()), READ));
    let mut answer = Answer { status, headers: HeaderMap::new(), length: range.len(), body };
    answer.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    answer.headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    if status == StatusCode::PARTIAL_CONTENT {
        let text = format!("bytes {}-{}/{size}", range.start(), range.end().saturating_sub(1));
        if let Ok(value) = HeaderValue::from_str(&text) {
            answer.headers.insert(header::CONTENT_RANGE, value);
        }
    }
    name_content(&mut answer.headers, &digest);
    Ok(answer)
}

fn tags(files: &LayoutFiles, name: &str, query: &str) -> Result<Answer, Refusal> {
    let mut tags = files.tags().map_err(|error| refuse(&error, name, Refusal::Unreadable))?;
    for (key, value) in url::form_urlencoded::parse(query.as_bytes()) {
        match key.as_ref() {
            "last" => tags.retain(|tag| tag.as_str() > value.as_ref()),
            "n" => tags.truncate(value.parse().unwrap_or(usize::MAX)),
            _ => {}
        }
    }
    Ok(Answer::json(StatusCode::OK, &serde_json::json!({"name": name, "tags": tags})))
}

/// What a `Range` header asks for of something with a size.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    All,
    Part(ByteRange),
    Nothing,
}

/// Reads a `Range` header (RFC 9110, section 14). What is not one range of bytes is answered as a whole.
fn wanted(value: &str, size: u64) -> Wanted {
    let Some((first, last)) = value.strip_prefix("bytes=").and_then(|range| range.split_once('-')) else {
        return Wanted::All;
    };
    let range = match (first.trim(), last.trim()) {
        ("", suffix) => match suffix.parse::<u64>() {
            Ok(0) => return Wanted::Nothing,
            Ok(length) => ByteRange::new(size.saturating_sub(length), size),
            Err(_) => return Wanted::All,
        },
        (first, last) => {
            let Ok(first) = first.parse::<u64>() else { return Wanted::All };
            let last = if last.is_empty() { Ok(u64::MAX) } else { last.parse::<u64>() };
            let Ok(last) = last else { return Wanted::All };
            if last < first {
                return Wanted::All;
            }
            if first >= size {
                return Wanted::Nothing;
            }
            ByteRange::new(first, last.saturating_add(1).min(size))
        }
    };
    match range {
        Ok(range) if range.is_empty() => Wanted::Nothing,
        Ok(range) => Wanted::Part(range),
        Err(_) => Wanted::All,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_rfc_9110_says() {
        let part = |start, end| Wanted::Part(ByteRange::new(start, end).unwrap());
        for (value, size, expected) in [
            ("bytes=0-0", 10, part(0, 1)),
            ("bytes=3-5", 10, part(3, 6)),
            ("bytes=3-", 10, part(3, 10)),
            ("bytes=3-99", 10, part(3, 10)),
            ("bytes=0-18446744073709551615", 10, part(0, 10)),
            ("bytes=-4", 10, part(6, 10)),
            ("bytes=-99", 10, part(0, 10)),
            ("bytes=-0", 10, Wanted::Nothing),
            ("bytes=10-", 10, Wanted::Nothing),
            ("bytes=10-11", 10, Wanted::Nothing),
            ("bytes=0-", 0, Wanted::Nothing),
            ("bytes=-1", 0, Wanted::Nothing),
            ("bytes=5-3", 10, Wanted::All),
            ("bytes=0-1,3-4", 10, Wanted::All),
            ("bytes=a-b", 10, Wanted::All),
            ("lines=0-1", 10, Wanted::All),
            ("", 10, Wanted::All),
        ] {
            assert_eq!(wanted(value, size), expected, "{value:?} of {size}");
        }
    }
}
