//! Secrets of a cluster: an API server in this process, behind nginx's TLS where that matters.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use futures::StreamExt as _;
use headstart::registry::{ClusterSecrets, CredentialConfig};
use headstart::testkit::waiting::until;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::{SECRETS, assert_discreet, client, name};
use crate::registry_real::{Registry, certificates, htpasswd, nginx, put_tiny};

const TOKEN: &str = "cluster-token";

#[derive(Default)]
struct Content {
    version: u64,
    /// By namespace and name.
    secrets: BTreeMap<(String, String), Value>,
    watchers: Vec<(Option<String>, mpsc::UnboundedSender<Value>)>,
    /// Versions before this one are forgotten.
    oldest: u64,
    lists: usize,
    /// Whether requests must bring the token.
    wants_token: bool,
}

/// An API server that knows secrets.
#[derive(Clone, Default)]
struct Server(Arc<Mutex<Content>>);

struct Listening {
    address: std::net::SocketAddr,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl Listening {
    /// Ends, connections included, as a server that is restarted.
    async fn end(self) -> std::net::SocketAddr {
        self.stop.send_replace(true);
        self.task.await.unwrap();
        self.address
    }
}

fn registry_secret(namespace: &str, name: &str, auths: &Value) -> Value {
    let config = base64::engine::general_purpose::STANDARD.encode(json!({ "auths": auths }).to_string());
    json!({
        "metadata": { "name": name, "namespace": namespace },
        "type": "kubernetes.io/dockerconfigjson",
        "data": { ".dockerconfigjson": config },
    })
}

impl Server {
    fn content(&self) -> std::sync::MutexGuard<'_, Content> {
        self.0.lock().unwrap()
    }

    fn change(&self, kind: &str, mut secret: Value) {
        let mut content = self.content();
        content.version += 1;
        secret["metadata"]["resourceVersion"] = content.version.to_string().into();
        let text = |field: &str| secret["metadata"][field].as_str().unwrap().to_owned();
        let key = (text("namespace"), text("name"));
        match kind {
            "DELETED" => drop(content.secrets.remove(&key)),
            _ => drop(content.secrets.insert(key.clone(), secret.clone())),
        }
        let event = json!({ "type": kind, "object": secret });
        content.watchers.retain(|(namespace, watcher)| {
            let ours = namespace.as_ref().is_none_or(|namespace| *namespace == key.0);
            !ours || watcher.send(event.clone()).is_ok()
        });
    }

    fn put(&self, namespace: &str, name: &str, host: &str, user: &str, password: &str) {
        let auth = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
        self.change("ADDED", registry_secret(namespace, name, &json!({ host: { "auth": auth } })));
    }

    /// Ends all watches.
    fn end_watches(&self) {
        self.content().watchers.clear();
    }

    fn watchers(&self) -> usize {
        let mut content = self.content();
        content.watchers.retain(|(_, watcher)| !watcher.is_closed());
        content.watchers.len()
    }

    /// Listens on this address, or on a free port.
    async fn listen(&self, address: Option<std::net::SocketAddr>) -> Listening {
        let address = address.unwrap_or_else(|| "127.0.0.1:0".parse().unwrap());
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = watch::channel(false);
        let mut stopping = stopped.clone();
        let state = (self.clone(), stopped);
        let app = axum::Router::new().fallback(answer).with_state(state);
        let task = tokio::spawn(async move {
            axum::serve(listener, app)
                .with_graceful_shutdown(async move { drop(stopping.wait_for(|stopped| *stopped).await) })
                .await
                .unwrap();
        });
        Listening { address, stop, task }
    }
}

fn status(code: u16) -> Response {
    let body = json!({ "kind": "Status", "message": "hunter2 is what the server says", "code": code });
    (StatusCode::from_u16(code).unwrap(), axum::Json(body)).into_response()
}

async fn answer(
    State((server, mut stopped)): State<(Server, watch::Receiver<bool>)>,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    let query: HashMap<String, String> =
        url::form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()).into_owned().collect();
    let mut content = server.content();
    let bearer = format!("Bearer {TOKEN}");
    if content.wants_token && headers.get("authorization").is_none_or(|header| *header != *bearer) {
        return status(403);
    }
    let namespace = match uri.path() {
        "/api/v1/secrets" => None,
        path => match path.strip_prefix("/api/v1/namespaces/").and_then(|rest| rest.strip_suffix("/secrets")) {
            Some(namespace) => Some(namespace.to_owned()),
            None => return status(404),
        },
    };
    assert_eq!(query["fieldSelector"], "type=kubernetes.io/dockerconfigjson");
    let number = |key: &str| query.get(key).and_then(|text| text.parse::<u64>().ok());
    if query.contains_key("watch") {
        let since = number("resourceVersion").unwrap();
        if since < content.oldest {
            return status(410);
        }
        let (sender, receiver) = mpsc::unbounded_channel();
        // What changed between the list and the watch.
        for secret in content.secrets.values() {
            let version: u64 = secret["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap();
            let ours = namespace.as_ref().is_none_or(|namespace| secret["metadata"]["namespace"] == **namespace);
            if version > since && ours {
                sender.send(json!({ "type": "MODIFIED", "object": secret })).unwrap();
            }
        }
        let bookmark = json!({ "kind": "Secret", "metadata": { "resourceVersion": content.version.to_string() } });
        sender.send(json!({ "type": "BOOKMARK", "object": bookmark })).unwrap();
        content.watchers.push((namespace, sender));
        let events = UnboundedReceiverStream::new(receiver).map(|event| {
            // In pieces, as networks do.
            let line = format!("{event}\n").into_bytes();
            let (one, other) = line.split_at(line.len() / 2);
            tokio_stream::iter([one.to_vec(), other.to_vec()])
        });
        let pieces = events.flatten().map(|piece| Ok::<_, std::io::Error>(Bytes::from(piece)));
        // Cut when the server ends.
        let cut = async move { drop(stopped.wait_for(|stopped| *stopped).await) };
        let pieces = pieces.take_until(Box::pin(cut));
        return Response::new(Body::from_stream(pieces));
    }
    content.lists += 1;
    let start: usize = query.get("continue").map_or(0, |text| text.parse().unwrap());
    let limit = usize::try_from(number("limit").unwrap()).unwrap();
    let ours = |key: &&(String, String)| namespace.as_ref().is_none_or(|namespace| key.0 == *namespace);
    let all: Vec<&Value> = content.secrets.keys().filter(ours).map(|key| &content.secrets[key]).collect();
    let items: Vec<&Value> = all.iter().skip(start).take(limit).copied().collect();
    let next = if start + limit < all.len() { (start + limit).to_string() } else { String::new() };
    let metadata = json!({ "resourceVersion": content.version.to_string(), "continue": next });
    axum::Json(json!({ "kind": "SecretList", "metadata": metadata, "items": items })).into_response()
}

fn kubeconfig(directory: &Path, cluster: &Value, user: &Value) -> PathBuf {
    let path = directory.join("kubeconfig");
    let text = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "here",
        "contexts": [{ "name": "here", "context": { "cluster": "c", "user": "u" } }],
        "clusters": [{ "name": "c", "cluster": cluster }],
        "users": [{ "name": "u", "user": user }],
    });
    std::fs::write(&path, text.to_string()).unwrap();
    path
}

struct Following {
    secrets: Arc<ClusterSecrets>,
    task: tokio::task::JoinHandle<()>,
}

impl Following {
    fn start(kubeconfig: PathBuf, namespaces: &[&str]) -> Self {
        let namespaces: Vec<String> = namespaces.iter().map(|&name| name.to_owned()).collect();
        let secrets = Arc::new(ClusterSecrets::new(kubeconfig, &namespaces));
        let following = Arc::clone(&secrets);
        Self { secrets, task: tokio::spawn(async move { following.follow().await }) }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_registry_opens_to_a_secret_behind_tls() {
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::start(directory.path(), &htpasswd(directory.path()));
    let host = registry.host();
    put_tiny(&host, directory.path()).await;
    let server = Server::default();
    server.content().wants_token = true;
    server.put("team", "one", "other.example", "me", "stale-password");
    server.put("team", "wrong", &host, "me", "stale-password");
    server.put("team", "zright", &host, "me", "hunter2");
    let listening = server.listen(None).await;
    certificates(directory.path());
    let (_front, port) = nginx(directory.path(), &listening.address.to_string());
    let token = directory.path().join("token");
    std::fs::write(&token, format!("{TOKEN}\n")).unwrap();
    let data = |name: &str| {
        base64::engine::general_purpose::STANDARD.encode(std::fs::read(directory.path().join(name)).unwrap())
    };
    // Files beside the kubeconfig, and contents.
    for (authority, certificate, key) in [
        (json!({"certificate-authority": "ca.pem"}), "client-certificate", "client-key"),
        (json!({"certificate-authority-data": data("ca.pem")}), "client-certificate-data", "client-key-data"),
    ] {
        let mut cluster = authority;
        cluster["server"] = format!("https://127.0.0.1:{port}").into();
        let value = |key: &str, file: &str| if key.ends_with("data") { data(file) } else { file.to_owned() };
        let user = json!({
            "tokenFile": token, certificate: value(certificate, "client.pem"), key: value(key, "client.key"),
        });
        let following = Following::start(kubeconfig(directory.path(), &cluster, &user), &[]);
        let secrets = Arc::clone(&following.secrets);
        // The lookup waits for the first list by itself.
        let client = client(CredentialConfig { cluster: Some(Arc::clone(&secrets)), ..CredentialConfig::default() });
        until("the list", || secrets.count() == 3).await;
        client.manifest(&name(&host, "app:v1")).await.unwrap();
        assert_discreet(&format!("{secrets:?}"));
    }
    // Without our certificate nginx says no, and with another authority we do.
    for (cluster, user) in [
        (
            json!({"server": format!("https://127.0.0.1:{port}"), "certificate-authority": "ca.pem"}),
            json!({"token": TOKEN}),
        ),
        (
            json!({"server": format!("https://127.0.0.1:{port}"), "certificate-authority": "client.pem"}),
            json!({"token": TOKEN}),
        ),
    ] {
        let following = Following::start(kubeconfig(directory.path(), &cluster, &user), &[]);
        let asking = CredentialConfig { cluster: Some(Arc::clone(&following.secrets)), ..CredentialConfig::default() };
        let error = client(asking).manifest(&name(&host, "app:v1")).await.unwrap_err().to_string();
        assert!(error.contains("none is known for it"), "{error}");
        assert_eq!(following.secrets.count(), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_restarts_and_forgotten_versions_are_kept_up_with() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::default();
    // More than a page.
    for number in 0..50 {
        server.put("team", &format!("s{number}"), &format!("r{number}.example"), "me", "hunter2");
    }
    server.change("ADDED", json!({"metadata": {"name": "odd", "namespace": "team"}, "type": "Opaque", "data": {}}));
    server.change("ADDED", registry_secret("team", "empty", &json!({})));
    let listening = server.listen(None).await;
    let cluster = json!({ "server": format!("http://{}", listening.address) });
    let following = Following::start(kubeconfig(directory.path(), &cluster, &json!({})), &[]);
    let count = || following.secrets.count();
    until("the first list", || count() == 50 && server.watchers() == 1).await;
    assert_eq!(server.content().lists, 3);

    server.put("other", "new", "new.example", "me", "hunter2");
    until("a new one", || count() == 51).await;
    server.change("DELETED", registry_secret("other", "new", &json!({})));
    until("one less", || count() == 50).await;
    server.change("MODIFIED", registry_secret("team", "s0", &json!({})));
    until("one that became empty", || count() == 49).await;
    server.change(
        "ADDED",
        json!({"metadata": {"name": "broken", "namespace": "team"},
        "type": "kubernetes.io/dockerconfigjson", "data": {".dockerconfigjson": "hunter2"}}),
    );
    server.put("team", "after", "after.example", "me", "hunter2");
    until("one behind a broken one", || count() == 50).await;

    // A watch that ends in good order goes on where it was.
    let lists = server.content().lists;
    server.end_watches();
    server.put("team", "between", "between.example", "me", "hunter2");
    until("what came between two watches", || count() == 51).await;
    assert_eq!(server.content().lists, lists);

    // A version that is forgotten means a new list.
    server.end_watches();
    let oldest = server.content().version + 1;
    server.content().oldest = oldest;
    server.change("DELETED", registry_secret("team", "between", &json!({})));
    until("the list after 410", || count() == 50).await;
    until("the watch after 410", || server.watchers() == 1).await;

    // The server goes away, and comes back without some and with others.
    let address = listening.end().await;
    server.end_watches();
    server.change("DELETED", registry_secret("team", "s1", &json!({})));
    server.change("DELETED", registry_secret("team", "s2", &json!({})));
    // Nobody remembers what was before.
    let oldest = server.content().version + 1;
    server.content().oldest = oldest;
    assert_eq!(count(), 50, "what was known counts while the server is away");
    let _again = server.listen(Some(address)).await;
    server.put("team", "first", "first.example", "me", "hunter2");
    until("the list after a restart", || count() == 49).await;
    server.put("team", "last", "last.example", "me", "hunter2");
    until("the watch after a restart", || count() == 50).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaces_are_followed_apart() {
    let directory = tempfile::tempdir().unwrap();
    let server = Server::default();
    for namespace in ["a", "b", "c"] {
        server.put(namespace, "s", "r.example", "me", "hunter2");
    }
    let listening = server.listen(None).await;
    let cluster = json!({ "server": format!("http://{}", listening.address) });
    let following = Following::start(kubeconfig(directory.path(), &cluster, &json!({"token": TOKEN})), &["a", "b"]);
    until("both lists", || following.secrets.count() == 2 && server.watchers() == 2).await;
    server.put("c", "t", "r.example", "me", "hunter2");
    server.put("b", "t", "r.example", "me", "hunter2");
    until("a change", || following.secrets.count() == 3).await;
    let listed = format!("{:?}", following.secrets);
    assert!(SECRETS.iter().all(|secret| !listed.contains(secret)), "{listed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_that_is_not_there_delays_nobody_for_long() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("missing");
    let following = Following::start(path, &[]);
    let asking = CredentialConfig { cluster: Some(Arc::clone(&following.secrets)), ..CredentialConfig::default() };
    let registry = headstart::testkit::registry::FaultyRegistry::start().await;
    registry.set_door(headstart::testkit::registry::Door::Basic { user: "me".into(), password: "hunter2".into() });
    let error = client(asking).manifest(&name(&registry.host(), "app:v1")).await.unwrap_err().to_string();
    assert!(error.contains("none is known for it"), "{error}");
    // It comes later.
    let server = Server::default();
    server.put("team", "s", &registry.host(), "me", "hunter2");
    let listening = server.listen(None).await;
    let written =
        kubeconfig(directory.path(), &json!({ "server": format!("http://{}", listening.address) }), &json!({}));
    std::fs::rename(written, directory.path().join("missing")).unwrap();
    until("the cluster", || following.secrets.count() == 1).await;
}
