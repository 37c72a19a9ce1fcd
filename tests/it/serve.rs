//! The read-only endpoint, asked over real sockets: what the distribution specification promises, ranges, and the slow link.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use headstart::model::{Algorithm, Digest};
use headstart::serve::{ServeConfig, ServeError, Server};
use reqwest::{Client, Method, Response, StatusCode, header};
use serde_json::{Value, json};
use tempfile::TempDir;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONTENT: &[u8] = b"0123456789abcdef";

struct Running {
    base: String,
    layout: TempDir,
    manifest: Digest,
    blob: Digest,
    client: Client,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
}

fn put(layout: &Path, bytes: &[u8]) -> Digest {
    let digest = Digest::of(Algorithm::Sha256, bytes);
    fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    fs::write(layout.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
    digest
}

async fn start(content: &[u8], change: impl FnOnce(&mut ServeConfig)) -> Running {
    let layout = tempfile::tempdir().unwrap();
    let blob = put(layout.path(), content);
    let manifest =
        json!({"schemaVersion": 2, "mediaType": MANIFEST, "layers": [{"digest": blob, "size": content.len()}]});
    let manifest = put(layout.path(), manifest.to_string().as_bytes());
    let index = json!({"schemaVersion": 2, "manifests": [
        {"digest": manifest, "size": 1, "annotations": {"org.opencontainers.image.ref.name": "v1"}},
        {"digest": manifest, "size": 1, "annotations": {"org.opencontainers.image.ref.name": "v2"}},
    ]});
    fs::write(layout.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    fs::write(layout.path().join("index.json"), index.to_string()).unwrap();
    let mut config = ServeConfig {
        layout: layout.path().to_owned(),
        listen: "127.0.0.1:0".parse().unwrap(),
        latency: Duration::ZERO,
        bandwidth: None,
        access_log: Some(layout.path().join("access.log")),
    };
    change(&mut config);
    let server = Server::bind(config).await.unwrap();
    let base = format!("http://{}", server.address());
    let (stop, stopped) = tokio::sync::oneshot::channel();
    tokio::spawn(server.run(async {
        // A dropped sender stops the server as well.
        stopped.await.ok();
    }));
    // The first test of the process installs it for all.
    rustls::crypto::ring::default_provider().install_default().ok();
    let client = Client::builder().no_proxy().build().unwrap();
    Running { base, layout, manifest, blob, client, stop: Some(stop) }
}

impl Running {
    async fn ask(&self, method: Method, path: &str, range: Option<&str>) -> Response {
        let mut request = self.client.request(method, format!("{}{path}", self.base));
        if let Some(range) = range {
            request = request.header(header::RANGE, range);
        }
        request.send().await.unwrap()
    }

    async fn get(&self, path: &str) -> Response {
        self.ask(Method::GET, path, None).await
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.take().map(|stop| stop.send(()).ok());
    }
}

fn head(response: &Response, name: &str) -> String {
    response.headers().get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default()
}

#[tokio::test]
async fn manifests_answer_by_tag_and_digest_under_any_name() {
    let running = start(CONTENT, |_| {}).await;
    for reference in ["v1".to_owned(), "v2".to_owned(), running.manifest.to_string()] {
        for name in ["library/debian", "x"] {
            for method in [Method::GET, Method::HEAD] {
                let answer = running.ask(method.clone(), &format!("/v2/{name}/manifests/{reference}"), None).await;
                assert_eq!(answer.status(), StatusCode::OK);
                assert_eq!(head(&answer, "content-type"), MANIFEST);
                assert_eq!(head(&answer, "docker-content-digest"), running.manifest.to_string());
                let length: usize = head(&answer, "content-length").parse().unwrap();
                let body = answer.bytes().await.unwrap();
                if method == Method::GET {
                    assert_eq!(body.len(), length);
                    assert_eq!(Digest::of(Algorithm::Sha256, &body), running.manifest);
                } else {
                    assert!(body.is_empty() && length > 0);
                }
            }
        }
    }
}

#[tokio::test]
async fn blobs_answer_whole_and_in_ranges() {
    let running = start(CONTENT, |_| {}).await;
    let path = format!("/v2/a/b/blobs/{}", running.blob);
    for (range, status, content_range, expected) in [
        (None, StatusCode::OK, "", CONTENT),
        (Some("bytes=2-4"), StatusCode::PARTIAL_CONTENT, "bytes 2-4/16", &CONTENT[2..5]),
        (Some("bytes=14-"), StatusCode::PARTIAL_CONTENT, "bytes 14-15/16", &CONTENT[14..]),
        (Some("bytes=-1"), StatusCode::PARTIAL_CONTENT, "bytes 15-15/16", &CONTENT[15..]),
        (Some("bytes=0-1,4-5"), StatusCode::OK, "", CONTENT),
    ] {
        let answer = running.ask(Method::HEAD, &path, range).await;
        assert_eq!(answer.status(), status, "{range:?}");
        assert_eq!(head(&answer, "content-length"), expected.len().to_string());
        let answer = running.ask(Method::GET, &path, range).await;
        assert_eq!(answer.status(), status, "{range:?}");
        assert_eq!(head(&answer, "content-range"), content_range);
        assert_eq!(head(&answer, "accept-ranges"), "bytes");
        assert_eq!(answer.bytes().await.unwrap(), expected);
    }
    let answer = running.ask(Method::GET, &path, Some("bytes=16-")).await;
    assert_eq!(answer.status(), StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(head(&answer, "content-range"), "bytes */16");

    let log = fs::read_to_string(running.layout.path().join("access.log")).unwrap();
    let lines: Vec<Vec<&str>> = log.lines().map(|line| line.split(' ').skip(2).collect()).collect();
    assert!(lines.contains(&vec!["GET", &path, "bytes=2-4", "206", "3"]), "{log}");
    assert!(lines.contains(&vec!["HEAD", &path, "-", "200", "0"]), "{log}");
    assert_eq!(lines.last().unwrap(), &vec!["GET", path.as_str(), "bytes=16-", "416", lines.last().unwrap()[4]]);
}

#[tokio::test]
async fn what_is_not_there_is_refused_with_the_specifications_codes() {
    let running = start(CONTENT, |_| {}).await;
    let absent = Digest::of(Algorithm::Sha256, b"absent");
    for (method, path, status, code) in [
        (Method::GET, "/v2/a/manifests/none".to_owned(), 404, "MANIFEST_UNKNOWN"),
        (Method::GET, format!("/v2/a/manifests/{absent}"), 404, "MANIFEST_UNKNOWN"),
        (Method::GET, format!("/v2/a/manifests/{}", running.blob), 500, "UNKNOWN"),
        (Method::GET, format!("/v2/a/blobs/{absent}"), 404, "BLOB_UNKNOWN"),
        (Method::GET, "/v2/a/blobs/..%2f..%2findex.json".to_owned(), 400, "DIGEST_INVALID"),
        (Method::GET, "/v2/a/blobs/sha256:..".to_owned(), 400, "DIGEST_INVALID"),
        (Method::GET, "/v2/a/other/x".to_owned(), 404, "NAME_UNKNOWN"),
        (Method::GET, "/index.json".to_owned(), 404, "NAME_UNKNOWN"),
        (Method::PUT, "/v2/a/manifests/v1".to_owned(), 405, "UNSUPPORTED"),
        (Method::POST, "/v2/a/blobs/uploads/".to_owned(), 405, "UNSUPPORTED"),
        (Method::DELETE, format!("/v2/a/blobs/{}", running.blob), 405, "UNSUPPORTED"),
    ] {
        let answer = running.ask(method.clone(), &path, None).await;
        assert_eq!(answer.status().as_u16(), status, "{method} {path}");
        let body: Value = answer.json().await.unwrap();
        assert_eq!(body["errors"][0]["code"], code, "{method} {path}");
    }
}

#[tokio::test]
async fn tags_and_referrers_are_listed() {
    let running = start(CONTENT, |_| {}).await;
    assert_eq!(running.get("/v2/").await.status(), StatusCode::OK);
    for (query, expected) in [("", json!(["v1", "v2"])), ("?n=1", json!(["v1"])), ("?last=v1&n=5", json!(["v2"]))] {
        let body: Value = running.get(&format!("/v2/some/name/tags/list{query}")).await.json().await.unwrap();
        assert_eq!(body, json!({"name": "some/name", "tags": expected}));
    }
    let answer = running.get(&format!("/v2/a/referrers/{}", running.manifest)).await;
    assert_eq!(head(&answer, "content-type"), "application/vnd.oci.image.index.v1+json");
    assert_eq!(answer.json::<Value>().await.unwrap()["manifests"], json!([]));
}

#[tokio::test]
async fn a_new_connection_costs_two_round_trips_and_a_kept_one_costs_one() {
    const LATENCY: Duration = Duration::from_millis(60);
    let running = start(CONTENT, |config| config.latency = LATENCY).await;
    let begin = Instant::now();
    running.get("/v2/").await.bytes().await.unwrap();
    let first = begin.elapsed();
    let begin = Instant::now();
    running.get("/v2/").await.bytes().await.unwrap();
    let second = begin.elapsed();
    assert!(first >= LATENCY * 2, "{first:?}");
    assert!(second >= LATENCY && second < LATENCY * 2, "{second:?}");
}

#[tokio::test]
async fn two_connections_share_one_bandwidth() {
    let content = vec![7; 500_000];
    let running = start(&content, |config| config.bandwidth = Some("20MB".parse().unwrap())).await;
    let path = format!("/v2/a/blobs/{}", running.blob);
    let begin = Instant::now();
    let one = async { running.get(&path).await.bytes().await.unwrap().len() };
    let two = async { running.get(&path).await.bytes().await.unwrap().len() };
    assert_eq!(tokio::join!(one, two), (content.len(), content.len()));
    // A million bytes at 20 MB/s take 50 ms, less the 4 ms that may be queued.
    assert!(begin.elapsed() >= Duration::from_millis(46), "{:?}", begin.elapsed());
}

#[tokio::test]
async fn bad_directories_and_taken_addresses_are_told_apart() {
    let running = start(CONTENT, |_| {}).await;
    let address = running.base.strip_prefix("http://").unwrap().parse().unwrap();
    let config = ServeConfig {
        layout: running.layout.path().to_owned(),
        listen: address,
        latency: Duration::ZERO,
        bandwidth: None,
        access_log: None,
    };
    assert!(matches!(Server::bind(config.clone()).await, Err(ServeError::Listen { .. })));
    let empty = tempfile::tempdir().unwrap();
    let config = ServeConfig { layout: empty.path().to_owned(), ..config };
    assert!(matches!(Server::bind(config).await, Err(ServeError::NotALayout { .. })));
}
