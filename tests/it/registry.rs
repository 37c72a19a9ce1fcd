//! The distribution client against a registry that misbehaves on request.

use std::path::Path;
use std::time::Duration;

use axum::http::Method;
use axum::http::header::{CONTENT_LENGTH, HeaderName};
use futures::{StreamExt as _, TryStreamExt as _};
use headstart::model::{BlobDigest, BlobSource, ByteRange, SourceError};
use headstart::oci::{Descriptor, ImageName, media};
use headstart::registry::{
    Client, ClientConfig, CredentialConfig, Credentials, Patience, RegistryError, RemoteBlobs, Secret, is_transient,
};
use headstart::testkit::registry::{Door, Fault, FaultyRegistry, Seen};
use proptest::prelude::*;

/// Everything that must never be seen in a message.
const SECRETS: [&str; 5] = ["hunter2", "secret-token", "sig=", "secret-state", "identity-secret"];

fn patience() -> Patience {
    Patience {
        connect: Duration::from_secs(5),
        // Long, so that a busy machine does not look like a silent server.
        response: Duration::from_secs(10),
        idle: Duration::from_secs(10),
        deadline: Duration::from_secs(20),
        rounds: 3,
        backoff: Duration::from_millis(1),
        backoff_limit: Duration::from_millis(4),
    }
}

fn config() -> ClientConfig {
    ClientConfig { patience: patience(), ..ClientConfig::default() }
}

/// For tests in which a server is silent.
fn impatient(config: ClientConfig) -> ClientConfig {
    let short = Duration::from_millis(300);
    ClientConfig { patience: Patience { response: short, idle: short, ..patience() }, ..config }
}

fn with_login(host: &str, credentials: Credentials) -> ClientConfig {
    let given = [(host.to_owned(), credentials)].into();
    ClientConfig { credentials: CredentialConfig { given, ..CredentialConfig::default() }, ..config() }
}

fn password() -> Credentials {
    Credentials::Basic { username: "me".to_owned(), password: Secret::new("hunter2") }
}

/// Writes `hosts.toml` for `registry` below `root`.
fn hosts_toml(root: &Path, registry: &str, text: &str) -> ClientConfig {
    let directory = root.join(registry);
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("hosts.toml"), text).unwrap();
    ClientConfig { certs_d: vec![root.to_owned()], ..config() }
}

fn name(host: &str, rest: &str) -> ImageName {
    format!("{host}/{rest}").parse().unwrap()
}

fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(&mut step).flatten().take(length).collect()
}

async fn read(client: &Client, host: &str, blob: BlobDigest, range: ByteRange) -> Result<Vec<u8>, SourceError> {
    read_attempt(client, host, blob, range, 0).await
}

async fn read_attempt(
    client: &Client,
    host: &str,
    blob: BlobDigest,
    range: ByteRange,
    attempt: u32,
) -> Result<Vec<u8>, SourceError> {
    let blobs = RemoteBlobs::new(client.clone(), name(host, "app:latest"));
    let stream = blobs.open(blob, range, attempt).await?;
    let pieces: Vec<bytes::Bytes> = stream.try_collect().await?;
    Ok(pieces.concat())
}

fn range(start: usize, end: usize) -> ByteRange {
    ByteRange::new(start as u64, end as u64).unwrap()
}

/// The error and all its causes, checked to hold no secret.
fn shown(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = format!("{error:?}");
    let mut cause = Some(error);
    let mut message = Vec::new();
    while let Some(error) = cause {
        message.push(error.to_string());
        cause = error.source();
    }
    let message = message.join(": ");
    text.push_str(&message);
    for secret in SECRETS {
        assert!(!text.contains(secret), "{secret:?} shows in {text}");
    }
    message
}

fn manifest() -> Vec<u8> {
    headstart::oci::Manifest::new(Descriptor::of(media::OCI_CONFIG, b"{}"), Vec::new()).to_json()
}

fn authorizations(seen: &[Seen]) -> Vec<Option<&str>> {
    seen.iter().map(|seen| seen.header("authorization")).collect()
}

#[tokio::test]
async fn a_tag_is_resolved_by_head_and_fetched_by_digest() {
    let registry = FaultyRegistry::start().await;
    let bytes = manifest();
    let digest = registry.put_manifest("app", "v1", media::OCI_MANIFEST, bytes.clone());
    let client = Client::new(config());
    let image = name(&registry.host(), "app:v1");
    let descriptor = client.resolve(&image).await.unwrap();
    assert_eq!(descriptor, Descriptor::of(media::OCI_MANIFEST, &bytes));
    assert_eq!(client.document(&image, &descriptor).await.unwrap(), bytes);
    let methods: Vec<(Method, String)> = registry.seen().into_iter().map(|seen| (seen.method, seen.path)).collect();
    let at = |name: &str| format!("/v2/app/manifests/{name}");
    assert_eq!(methods, [(Method::HEAD, at("v1")), (Method::GET, at(&digest.to_string()))]);
    assert_eq!(registry.connections(), 1, "the connection was not kept");
}

#[tokio::test]
async fn a_server_that_names_no_digest_is_asked_for_the_manifest() {
    let registry = FaultyRegistry::start().await;
    let bytes = manifest();
    registry.put_manifest("app", "v1", media::OCI_MANIFEST, bytes.clone());
    let client = Client::new(config());
    let image = name(&registry.host(), "app:v1");
    for fault in [
        Fault::Without(HeaderName::from_static("docker-content-digest")),
        Fault::Status(405, vec![]),
        Fault::Without(CONTENT_LENGTH),
    ] {
        registry.script(Method::HEAD, "/manifests/", fault, 1);
        assert_eq!(client.resolve(&image).await.unwrap(), Descriptor::of(media::OCI_MANIFEST, &bytes));
    }
}

#[tokio::test]
async fn a_missing_image_is_told_from_a_broken_registry() {
    let registry = FaultyRegistry::start().await;
    let client = Client::new(config());
    let image = name(&registry.host(), "app:v1");
    let error = client.manifest(&image).await.unwrap_err();
    assert!(matches!(error, RegistryError::NotFound { .. }) && !is_transient(&error), "{error}");
    let expected = format!(
        "cannot fetch the manifest of {image}: there is no such image or blob ({}: the server answered 404: \
         MANIFEST_UNKNOWN: manifest unknown)",
        registry.url()
    );
    assert_eq!(shown(&error), expected);
    assert_eq!(registry.seen().len(), 1, "a missing image was asked for again");

    registry.script(Method::GET, "/manifests/", Fault::Status(500, vec![]), 99);
    let error = client.manifest(&image).await.unwrap_err();
    assert!(is_transient(&error));
    assert!(shown(&error).ends_with("the server answered 500 (3 times)"), "{}", shown(&error));
}

#[tokio::test]
async fn a_registry_that_is_down_is_named() {
    let registry = FaultyRegistry::start().await;
    let host = registry.host();
    drop(registry);
    let client = Client::new(config());
    let error = loop {
        // The listener is closed by a task that ends a moment after its handle is dropped.
        match client.resolve(&name(&host, "app")).await {
            Err(error @ RegistryError::Failed { .. }) => break error,
            _ => tokio::task::yield_now().await,
        }
    };
    assert!(is_transient(&error));
    let text = shown(&error);
    assert!(text.contains(&format!("http://{host}: cannot connect: ")) && text.contains("refused"), "{text}");
}

#[tokio::test]
async fn wrong_bytes_of_a_manifest_are_refused() {
    let registry = FaultyRegistry::start().await;
    registry.put_manifest("app", "v1", media::OCI_MANIFEST, manifest());
    registry.script(Method::GET, "/manifests/", Fault::Corrupt, 1);
    let client = Client::new(config());
    let error = client.manifest(&name(&registry.host(), "app:v1")).await.unwrap_err();
    assert!(shown(&error).contains("the answer is not what was asked for: document sha256:"), "{error}");
    assert!(!is_transient(&error));
}

#[tokio::test]
async fn documents_beyond_the_limit_are_refused() {
    let registry = FaultyRegistry::start().await;
    let client = Client::new(config());
    let image = name(&registry.host(), "app:v1");
    let huge = vec![b' '; (4 << 20) + 1];
    registry.put_manifest("app", "v1", media::OCI_MANIFEST, huge.clone());
    let error = client.manifest(&image).await.unwrap_err();
    assert!(shown(&error).contains("larger than 4194304 bytes"), "{error}");
    let announced = Descriptor::of(media::OCI_CONFIG, &huge);
    assert!(matches!(client.document(&image, &announced).await, Err(RegistryError::Document(_))));
    assert!(registry.seen_at(&Method::GET, "/blobs/").is_empty());
}

#[tokio::test]
async fn a_range_is_one_range_request() {
    let registry = FaultyRegistry::start().await;
    let bytes = noise(100_000);
    let blob = registry.put_blob(bytes.clone());
    let client = Client::new(config());
    for wanted in [range(0, 100_000), range(5, 6), range(99_999, 100_000), range(1000, 70_000)] {
        let got = read(&client, &registry.host(), blob, wanted).await.unwrap();
        assert_eq!(got, bytes[usize::try_from(wanted.start()).unwrap()..usize::try_from(wanted.end()).unwrap()]);
    }
    assert_eq!(read(&client, &registry.host(), blob, range(7, 7)).await.unwrap(), b"");
    let ranges: Vec<String> =
        registry.seen().iter().map(|seen| seen.header("range").unwrap_or_default().to_owned()).collect();
    assert_eq!(ranges, ["bytes=0-99999", "bytes=5-5", "bytes=99999-99999", "bytes=1000-69999"]);
    assert!(registry.seen().iter().all(|seen| seen.header("accept-encoding") == Some("identity")));
    assert_eq!(registry.connections(), 1, "the connection was not kept");
}

#[tokio::test]
async fn a_server_that_ignores_ranges_is_read_up_to_the_wanted_bytes() {
    let registry = FaultyRegistry::start().await;
    let bytes = noise(3 << 20);
    let blob = registry.put_blob(bytes.clone());
    registry.script(Method::GET, "/blobs/", Fault::IgnoreRange, 99);
    let client = Client::new(config());
    for (start, end) in [(0, 10), (1_000_000, 1_000_100), (3_145_000, 3 << 20)] {
        let got = read(&client, &registry.host(), blob, range(start, end)).await.unwrap();
        assert_eq!(got, bytes[start..end]);
    }
    let error = read(&client, &registry.host(), blob, range(0, (3 << 20) + 1)).await.unwrap_err();
    assert!(shown(&error).contains("the whole blob, which is shorter"), "{error:?}");
}

#[tokio::test]
async fn a_cut_body_goes_on_where_it_stopped() {
    let registry = FaultyRegistry::start().await;
    let bytes = noise(500_000);
    let blob = registry.put_blob(bytes.clone());
    registry.script(Method::GET, "/blobs/", Fault::Cut(100_000), 1);
    registry.script(Method::GET, "/blobs/", Fault::Cut(50_000), 1);
    let client = Client::new(config());
    let got = read(&client, &registry.host(), blob, range(1, 500_000)).await.unwrap();
    assert_eq!(got, bytes[1..]);
    let starts: Vec<String> = registry.seen().iter().map(|seen| seen.header("range").unwrap().to_owned()).collect();
    assert_eq!(starts, ["bytes=1-499999", "bytes=100001-499999", "bytes=150001-499999"]);
}

#[tokio::test]
async fn a_body_that_is_always_cut_is_given_up() {
    let registry = FaultyRegistry::start().await;
    let blob = registry.put_blob(noise(1000));
    registry.script(Method::GET, "/blobs/", Fault::Cut(0), 99);
    let client = Client::new(config());
    let error = read(&client, &registry.host(), blob, range(0, 1000)).await.unwrap_err();
    assert!(error.transient);
    assert!(shown(&error).contains("was cut after 0 of 1000 bytes"), "{}", shown(&error));
    assert_eq!(registry.seen().len(), 3);
}

#[tokio::test]
async fn a_range_served_in_part_is_completed() {
    let registry = FaultyRegistry::start().await;
    let bytes = noise(1000);
    let blob = registry.put_blob(bytes.clone());
    registry.script(Method::GET, "/blobs/", Fault::Short(300), 1);
    let client = Client::new(config());
    assert_eq!(read(&client, &registry.host(), blob, range(100, 900)).await.unwrap(), bytes[100..900]);
    let starts: Vec<String> = registry.seen().iter().map(|seen| seen.header("range").unwrap().to_owned()).collect();
    assert_eq!(starts, ["bytes=100-899", "bytes=400-899"]);
}

#[tokio::test]
async fn a_wrong_content_range_is_refused() {
    let registry = FaultyRegistry::start().await;
    let blob = registry.put_blob(noise(1000));
    let client = Client::new(config());
    for wrong in ["bytes 0-99/1000", "bytes 100-300/1000", "bytes nonsense", "bytes 100-199/150"] {
        registry.clear_script();
        registry.script(Method::GET, "/blobs/", Fault::ContentRange(wrong), 1);
        let error = read(&client, &registry.host(), blob, range(100, 200)).await.unwrap_err();
        let text = shown(&error);
        assert!(text.contains(&format!("asked for bytes 100..200 and answered {wrong:?}")), "{text}");
        assert!(!error.transient);
    }
    let error = read(&client, &registry.host(), blob, range(2000, 2001)).await.unwrap_err();
    assert!(shown(&error).contains("the server answered 416: RANGE_INVALID"), "{error:?}");
}

#[tokio::test]
async fn a_trickle_and_a_silence_are_ended() {
    let registry = FaultyRegistry::start().await;
    let blob = registry.put_blob(noise(1000));
    let client = Client::new(impatient(config()));
    registry.script(Method::GET, "/blobs/", Fault::Trickle(Duration::from_millis(20)), 99);
    let error = read(&client, &registry.host(), blob, range(0, 1000)).await.unwrap_err();
    assert!(error.transient);
    assert!(shown(&error).contains("bytes came within 300 ms"), "{}", shown(&error));
    registry.clear_script();
    registry.script(Method::GET, "/blobs/", Fault::Hang, 1);
    assert_eq!(read(&client, &registry.host(), blob, range(0, 1000)).await.unwrap(), noise(1000));
}

#[tokio::test]
async fn servers_that_ask_for_patience_get_it() {
    let registry = FaultyRegistry::start().await;
    let blob = registry.put_blob(noise(10));
    let client = Client::new(config());
    let after = |seconds: &str| vec![("retry-after", seconds.to_owned())];
    registry.script(Method::GET, "/blobs/", Fault::Status(429, after("1")), 1);
    let started = std::time::Instant::now();
    assert_eq!(read(&client, &registry.host(), blob, range(0, 10)).await.unwrap(), noise(10));
    assert!(started.elapsed() >= Duration::from_secs(1), "asked again too soon: {:?}", started.elapsed());
    // Longer than the deadline: said at once.
    registry.script(Method::GET, "/blobs/", Fault::Status(503, after("3600")), 1);
    let error = read(&client, &registry.host(), blob, range(0, 10)).await.unwrap_err();
    assert!(error.transient);
    assert!(shown(&error).contains("the server answered 503"), "{}", shown(&error));
}

#[tokio::test]
async fn passwords_are_sent_when_asked_for_and_wrong_ones_reported() {
    let registry = FaultyRegistry::start().await;
    registry.set_door(Door::Basic { user: "me".to_owned(), password: "hunter2".to_owned() });
    let blob = registry.put_blob(noise(10));
    let host = registry.host();
    let client = Client::new(with_login(&host, password()));
    for _ in 0..2 {
        assert_eq!(read(&client, &host, blob, range(0, 10)).await.unwrap(), noise(10));
    }
    let seen = registry.seen();
    // Once without, to learn what is wanted; then at once.
    assert_eq!(authorizations(&seen), [None, Some("Basic bWU6aHVudGVyMg=="), Some("Basic bWU6aHVudGVyMg==")]);

    let wrong = Credentials::Basic { username: "me".to_owned(), password: Secret::new("other") };
    let error = read(&Client::new(with_login(&host, wrong)), &host, blob, range(0, 10)).await.unwrap_err();
    assert!(shown(&error).contains("does not accept the user name and password"), "{}", shown(&error));
    assert!(!error.transient);
    let error = read(&Client::new(config()), &host, blob, range(0, 10)).await.unwrap_err();
    assert!(shown(&error).contains("none is known for it"), "{}", shown(&error));
}

fn bearer(expires_in: Option<u64>) -> Door {
    let login = Some(("me".to_owned(), "hunter2".to_owned()));
    Door::Bearer { login, identity: Some("identity-secret".to_owned()), expires_in, realm: None }
}

#[tokio::test]
async fn tokens_are_fetched_once_kept_and_renewed() {
    let registry = FaultyRegistry::start().await;
    registry.set_door(bearer(Some(300)));
    let blob = registry.put_blob(noise(10));
    let host = registry.host();
    let client = Client::new(with_login(&host, password()));
    let all = (0..8).map(|_| read(&client, &host, blob, range(0, 10)));
    for got in futures::future::join_all(all).await {
        assert_eq!(got.unwrap(), noise(10));
    }
    assert_eq!(registry.tokens_issued(), 1, "waiting requests did not share one token");
    let asked = registry.seen_at(&Method::GET, "/token");
    assert_eq!(asked[0].query, "service=test&scope=repository%3Aapp%3Apull&account=me");
    // The server forgets the token: one 401, one new token.
    registry.expire_tokens();
    registry.forget_seen();
    assert_eq!(read(&client, &host, blob, range(0, 10)).await.unwrap(), noise(10));
    assert_eq!(registry.tokens_issued(), 2);
    let paths: Vec<String> = registry.seen().into_iter().map(|seen| seen.path).collect();
    assert_eq!(paths.len(), 3, "{paths:?}");
}

#[tokio::test]
async fn a_token_is_renewed_before_it_expires() {
    let registry = FaultyRegistry::start().await;
    registry.set_door(bearer(Some(0)));
    let blob = registry.put_blob(noise(10));
    let host = registry.host();
    let client = Client::new(with_login(&host, password()));
    for _ in 0..3 {
        assert_eq!(read(&client, &host, blob, range(0, 10)).await.unwrap(), noise(10));
    }
    assert_eq!(registry.tokens_issued(), 3);
    let denied = registry.seen().iter().filter(|s| s.path != "/token" && s.header("authorization").is_none()).count();
    assert_eq!(denied, 1, "only the first request goes without a token");
}

#[tokio::test]
async fn identity_tokens_are_posted() {
    let registry = FaultyRegistry::start().await;
    registry.set_door(bearer(None));
    let blob = registry.put_blob(noise(10));
    let host = registry.host();
    let client = Client::new(with_login(&host, Credentials::IdentityToken(Secret::new("identity-secret"))));
    assert_eq!(read(&client, &host, blob, range(0, 10)).await.unwrap(), noise(10));
    assert_eq!(registry.seen_at(&Method::POST, "/token").len(), 1);
    let wrong = Client::new(with_login(&host, Credentials::IdentityToken(Secret::new("other"))));
    let error = read(&wrong, &host, blob, range(0, 10)).await.unwrap_err();
    assert!(shown(&error).contains("does not accept the login"), "{}", shown(&error));
}

#[tokio::test]
async fn anonymous_tokens_need_no_login_and_a_useless_token_ends_the_matter() {
    let registry = FaultyRegistry::start().await;
    registry.set_door(Door::Bearer { login: None, identity: None, expires_in: None, realm: None });
    let blob = registry.put_blob(noise(10));
    let host = registry.host();
    let client = Client::new(config());
    assert_eq!(read(&client, &host, blob, range(0, 10)).await.unwrap(), noise(10));
    assert_eq!(registry.seen_at(&Method::GET, "/token")[0].header("authorization"), None);
    // Tokens of another registry are not taken here.
    let other = FaultyRegistry::start().await;
    other.set_door(Door::Bearer { login: None, identity: None, expires_in: None, realm: None });
    let realm = Some(format!("{}/token", other.url()));
    registry.set_door(Door::Bearer { login: None, identity: None, expires_in: None, realm });
    let error = read(&Client::new(config()), &host, blob, range(0, 10)).await.unwrap_err();
    assert!(shown(&error).contains("does not accept a new token"), "{}", shown(&error));
}

#[tokio::test]
async fn a_token_server_that_is_down_is_a_passing_trouble() {
    let registry = FaultyRegistry::start().await;
    registry.set_door(Door::Bearer { login: None, identity: None, expires_in: None, realm: None });
    let blob = registry.put_blob(noise(10));
    registry.script(Method::GET, "/token", Fault::Status(503, vec![]), 2);
    let client = Client::new(config());
    assert_eq!(read(&client, &registry.host(), blob, range(0, 10)).await.unwrap(), noise(10));
    registry.expire_tokens();
    registry.script(Method::GET, "/token", Fault::Status(503, vec![]), 99);
    let error = read(&client, &registry.host(), blob, range(0, 10)).await.unwrap_err();
    assert!(error.transient);
    assert!(shown(&error).contains("cannot get a token from http://127.0.0.1"), "{}", shown(&error));
}

#[tokio::test]
async fn a_redirect_is_followed_without_credentials_and_remembered() {
    let (registry, store) = (FaultyRegistry::start().await, FaultyRegistry::start().await);
    registry.set_door(Door::Basic { user: "me".to_owned(), password: "hunter2".to_owned() });
    let bytes = noise(1000);
    let blob = registry.put_blob(bytes.clone());
    store.put_blob(bytes.clone());
    let root = tempfile::tempdir().unwrap();
    let host = registry.host();
    let text = format!("server = '{}'\n[header]\nx-internal = 'hunter2'", registry.url());
    let config = ClientConfig {
        credentials: with_login(&host, password()).credentials,
        ..hosts_toml(root.path(), &host, &text)
    };
    let client = Client::new(config);
    assert_eq!(read(&client, &host, blob, range(0, 10)).await.unwrap(), bytes[..10]);
    registry.script(Method::GET, "/blobs/", Fault::Redirect(store.url()), 99);
    for start in [0, 100, 200] {
        assert_eq!(read(&client, &host, blob, range(start, 300)).await.unwrap(), bytes[start..300]);
    }
    // Two requests before the redirect, one that was redirected; the others went to the store at once.
    assert_eq!(registry.seen_at(&Method::GET, "/blobs/").len(), 3);
    assert!(registry.seen().iter().all(|seen| seen.header("x-internal") == Some("hunter2")));
    let stored = store.seen();
    assert_eq!(stored.len(), 3);
    for seen in &stored {
        assert_eq!((seen.header("authorization"), seen.header("x-internal")), (None, None), "{seen:?}");
        assert_eq!(seen.query, "sig=secret");
    }
    // The signature expires: the registry is asked again.
    store.script(Method::GET, "/store/", Fault::Status(403, vec![]), 1);
    assert_eq!(read(&client, &host, blob, range(0, 300)).await.unwrap(), bytes[..300]);
    assert_eq!(registry.seen_at(&Method::GET, "/blobs/").len(), 4);
    // It stays broken: the error shows the store's answer, and no signature.
    store.script(Method::GET, "/store/", Fault::Status(403, vec![]), 99);
    let error = read(&client, &host, blob, range(0, 300)).await.unwrap_err();
    assert!(shown(&error).contains("the server answered 403"), "{}", shown(&error));
}

#[tokio::test]
async fn redirects_in_a_circle_end() {
    let registry = FaultyRegistry::start().await;
    let blob = registry.put_blob(noise(10));
    let location = vec![("location", "?again=1".to_owned())];
    registry.script(Method::GET, "/blobs/", Fault::Status(302, location), 99);
    let error = read(&Client::new(config()), &registry.host(), blob, range(0, 10)).await.unwrap_err();
    assert!(shown(&error).contains("redirects more than 5 times"), "{}", shown(&error));
    registry.clear_script();
    registry.script(
        Method::GET,
        "/blobs/",
        Fault::Status(302, vec![("location", "file:///etc/passwd".to_owned())]),
        99,
    );
    let error = read(&Client::new(config()), &registry.host(), blob, range(0, 10)).await.unwrap_err();
    assert!(shown(&error).contains("header Location is missing or makes no sense"), "{}", shown(&error));
}

#[tokio::test]
async fn mirrors_come_first_and_the_registry_helps_out() {
    let (upstream, mirror) = (FaultyRegistry::start().await, FaultyRegistry::start().await);
    let bytes = noise(1000);
    let blob = upstream.put_blob(bytes.clone());
    mirror.put_blob(bytes.clone());
    let digest = upstream.put_manifest("app", "latest", media::OCI_MANIFEST, manifest());
    let root = tempfile::tempdir().unwrap();
    let text = format!(
        "server = '{}'\n[host.'{}']\ncapabilities = ['pull']\n[host.'{}'.header]\nx-mirror = 'yes'",
        upstream.url(),
        mirror.url(),
        mirror.url()
    );
    let client = Client::new(hosts_toml(root.path(), "registry.example", &text));
    let image = name("registry.example", "app");
    // The mirror may not resolve, and has no manifest.
    assert_eq!(client.resolve(&image).await.unwrap().digest, digest);
    assert!(mirror.seen().is_empty());
    assert_eq!(client.manifest(&image.with_digest(digest)).await.unwrap().descriptor.digest, digest);
    assert_eq!(mirror.seen().len(), 1);
    assert_eq!(mirror.seen()[0].query, "ns=registry.example");
    assert_eq!(mirror.seen()[0].header("x-mirror"), Some("yes"));

    let host = "registry.example";
    assert_eq!(read(&client, host, blob, range(0, 10)).await.unwrap(), bytes[..10]);
    assert!(upstream.seen_at(&Method::GET, "/blobs/").is_empty(), "the mirror has the blob");
    // Wrong bytes came from the first server: the second one is preferred.
    assert_eq!(read_attempt(&client, host, blob, range(0, 10), 1).await.unwrap(), bytes[..10]);
    assert_eq!(upstream.seen_at(&Method::GET, "/blobs/").len(), 1);
    // A body that is cut goes on at the other server.
    mirror.script(Method::GET, "/blobs/", Fault::Cut(400), 1);
    assert_eq!(read(&client, host, blob, range(0, 1000)).await.unwrap(), bytes);
    assert_eq!(upstream.seen_at(&Method::GET, "/blobs/")[1].header("range"), Some("bytes=400-999"));
    // Both fail: both are named.
    mirror.script(Method::GET, "/blobs/", Fault::Body(403, "<html>secret-token</html>".to_owned()), 99);
    upstream.script(Method::GET, "/blobs/", Fault::Status(500, vec![]), 99);
    let error = read(&client, host, blob, range(0, 10)).await.unwrap_err();
    let text = shown(&error);
    assert!(text.contains(&format!("{}: the server answered 403; ", mirror.url())), "{text}");
    assert!(text.contains(&format!("{}: the server answered 500 (3 times)", upstream.url())), "{text}");
}

#[tokio::test]
async fn a_mirror_that_is_down_is_asked_last_for_a_while() {
    let (upstream, mirror) = (FaultyRegistry::start().await, FaultyRegistry::start().await);
    let blob = upstream.put_blob(noise(10));
    let root = tempfile::tempdir().unwrap();
    let text = format!("server = '{}'\n[host.'{}']", upstream.url(), mirror.url());
    let client = Client::new(impatient(hosts_toml(root.path(), "registry.example", &text)));
    mirror.script(Method::GET, "/blobs/", Fault::Hang, 99);
    for _ in 0..10 {
        assert_eq!(read(&client, "registry.example", blob, range(0, 10)).await.unwrap(), noise(10));
    }
    assert_eq!(mirror.seen().len(), 1, "each request waited for the mirror");
}

#[tokio::test]
async fn an_unreadable_hosts_file_is_reported() {
    let root = tempfile::tempdir().unwrap();
    let client = Client::new(hosts_toml(root.path(), "registry.example", "server = [\n'hunter2'"));
    let error = client.resolve(&name("registry.example", "app")).await.unwrap_err();
    assert!(shown(&error).contains("registry.example/hosts.toml (line 2)"), "{}", shown(&error));
    let client = Client::new(hosts_toml(root.path(), "registry.example", "capabilities = ['pull']"));
    let error = client.resolve(&name("registry.example", "app")).await.unwrap_err();
    assert!(shown(&error).contains("certs.d allows no server of registry.example to do that"), "{}", shown(&error));
}

/// What may happen to one answer.
fn any_fault() -> impl Strategy<Value = Option<Fault>> {
    prop_oneof![
        2 => Just(None),
        1 => (0..3000_usize).prop_map(|after| Some(Fault::Cut(after))),
        1 => (1..3000_usize).prop_map(|count| Some(Fault::Short(count))),
        1 => Just(Some(Fault::IgnoreRange)),
        1 => Just(Some(Fault::Status(503, vec![]))),
        1 => Just(Some(Fault::Redirect("store".to_owned()))),
        1 => Just(Some(Fault::ContentRange("bytes 0-0/1"))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Whatever happens on the way, a stream gives the right bytes in the right order, as many as it was asked for or
    /// fewer and an error.
    #[test]
    fn streams_are_exact_or_fail(
        start in 0..4000_usize,
        length in 0..4000_usize,
        faults in proptest::collection::vec(any_fault(), 0..8),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (registry, store) = (FaultyRegistry::start().await, FaultyRegistry::start().await);
            let bytes = noise(4000);
            let blob = registry.put_blob(bytes.clone());
            store.put_blob(bytes.clone());
            let faults: Vec<Fault> = faults
                .into_iter()
                .map(|fault| match fault {
                    Some(Fault::Redirect(_)) => Fault::Redirect(store.url()),
                    Some(fault) => fault,
                    None => Fault::With(HeaderName::from_static("x-good"), "yes".to_owned()),
                })
                .collect();
            let harmless = faults.iter().all(|fault| {
                matches!(fault, Fault::With(..) | Fault::Short(_) | Fault::IgnoreRange | Fault::Redirect(_))
            });
            for fault in faults {
                registry.script(Method::GET, "/blobs/", fault, 1);
            }
            let end = (start + length).min(4000);
            let blobs = RemoteBlobs::new(Client::new(config()), name(&registry.host(), "app"));
            let mut got = Vec::new();
            let mut failed = false;
            match blobs.open(blob, range(start.min(end), end), 0).await {
                Err(_) => failed = true,
                Ok(mut stream) => {
                    while let Some(piece) = stream.next().await {
                        prop_assert!(!failed, "something followed an error");
                        match piece {
                            Ok(piece) => got.extend_from_slice(&piece),
                            Err(_) => failed = true,
                        }
                    }
                }
            }
            let wanted = &bytes[start.min(end)..end];
            prop_assert!(wanted.starts_with(&got), "wrong bytes");
            prop_assert!(failed || got.len() == wanted.len(), "the stream ended early without an error");
            prop_assert!(!(failed && harmless), "harmless answers made it fail");
            Ok(())
        })?;
    }
}
