//! The distribution client against Debian's docker-registry: open, behind passwords, behind nginx's TLS, behind tokens.
//! skopeo judges what was pushed. Everything runs on free ports of loopback and ends with its test.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::extract::{RawQuery, State};
use base64::Engine as _;
use headstart::oci::{Platform, Reference};
use headstart::registry::{Client, ClientConfig, CredentialConfig, Credentials, Patience, Pushed, Secret, Upload};
use headstart::testkit::waiting::{PATIENCE, until};
use headstart::transport::{TransportError, Transports};
use rustix::process::{Pid, Signal, kill_process};

use crate::transport::{Tiny, assert_holds, skopeo, tiny};

/// A process that ends with its owner.
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

impl Drop for Process {
    fn drop(&mut self) {
        // An error says that it is gone already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl Process {
    pub(crate) fn start(command: &mut Command, log: &Path) -> Self {
        let file = std::fs::File::create(log).unwrap();
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().unwrap())
            .stderr(file)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
        Self { child, log: log.to_owned() }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends `signal` and waits for the end.
    pub(crate) fn end(mut self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
        self.child.wait().unwrap();
    }

    /// Waits until it listens. False if it ended, for example because somebody took the port.
    fn listens(&mut self, port: u16) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            assert!(Instant::now() < deadline, "nothing listens: {}", std::fs::read_to_string(&self.log).unwrap());
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A docker-registry with its own storage.
pub(crate) struct Registry {
    process: Process,
    port: u16,
}

impl Registry {
    /// `auth` is the part of its configuration by that name, or nothing.
    pub(crate) fn start(directory: &Path, auth: &str) -> Self {
        for _ in 0..5 {
            let port = free_port();
            let config = directory.join("registry.yml");
            let text = format!(
                "version: 0.1\nlog: {{level: info, accesslog: {{disabled: false}}}}\nstorage: {{filesystem: \
                 {{rootdirectory: {}}}, delete: {{enabled: true}}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n{auth}",
                directory.join("storage").display()
            );
            std::fs::write(&config, text).unwrap();
            let mut command = Command::new("docker-registry");
            let mut process = Process::start(command.arg("serve").arg(&config), &directory.join("registry.log"));
            if process.listens(port) {
                return Self { process, port };
            }
        }
        panic!("docker-registry did not start five times: {}", directory.display());
    }

    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Its access log so far.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.process.log).unwrap()
    }
}

fn config() -> ClientConfig {
    let patience = Patience { rounds: 2, backoff: Duration::from_millis(1), ..Patience::default() };
    ClientConfig { patience, ..ClientConfig::default() }
}

fn with_login(host: &str, user: &str, password: &str) -> ClientConfig {
    let login = Credentials::Basic { username: user.to_owned(), password: Secret::new(password) };
    let credentials = CredentialConfig { given: [(host.to_owned(), login)].into(), ..CredentialConfig::default() };
    ClientConfig { credentials, ..config() }
}

fn transports(config: ClientConfig, spool: &Path) -> Transports {
    Transports::new(Client::new(config), spool.join("spool"))
}

fn reference(text: &str) -> Reference {
    text.parse().unwrap()
}

fn image() -> Tiny {
    // Bytes that do not compress, so that a layer is larger than a piece of an upload.
    let mut state = 1_u32;
    let mut noise = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    let content: Vec<u8> = std::iter::repeat_with(&mut noise).take(400_000).collect();
    tiny(&Platform::host().architecture, &content)
}

async fn push(transports: &Transports, text: &str, tiny: &Tiny) -> Result<(), TransportError> {
    let sink = transports.create(&reference(text)).await?;
    for (layer, descriptor) in tiny.layers.iter().zip(&tiny.manifest.layers) {
        let mut spooled = sink.spool()?;
        spooled.write_all(layer).unwrap();
        sink.put_blob(spooled, &descriptor.digest, descriptor.size).await?;
    }
    tiny.write_all(&sink).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn images_go_there_and_back() {
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::start(directory.path(), "");
    let tiny = image();
    for (name, upload) in [("whole", Upload::Auto), ("pieces", Upload::Chunked(100_000))] {
        let transports = transports(ClientConfig { upload, ..config() }, directory.path());
        let text = format!("docker://{}/team/{name}:v1", registry.host());
        push(&transports, &text, &tiny).await.unwrap();
        assert_holds(&transports, &text, &tiny).await;
        let raw = skopeo(&["inspect", "--tls-verify=false", "--raw", &text]);
        assert_eq!(raw.as_bytes(), tiny.manifest.to_json());
        let copy = format!("oci:{}:v1", directory.path().join(name).display());
        skopeo(&["copy", "-q", "--src-tls-verify=false", &text, &copy]);
        assert_holds(&transports, &copy, &tiny).await;
    }
    assert!(registry.log().contains("PATCH /v2/team/pieces/blobs/uploads/"), "nothing was sent in pieces");
    assert!(!registry.log().contains("PATCH /v2/team/whole/blobs/uploads/"), "the whole blob was sent in pieces");

    // What skopeo pushed is read, Docker's types too.
    let transports = transports(config(), directory.path());
    let from = format!("oci:{}:v1", directory.path().join("whole").display());
    let to = format!("docker://{}/team/docker:v1", registry.host());
    skopeo(&["copy", "-q", "--dest-tls-verify=false", "--format", "v2s2", &from, &to]);
    let found = assert_holds(&transports, &to, &tiny).await;
    assert_eq!(found.top.media_type, headstart::oci::media::DOCKER_MANIFEST);

    // A blob of another repository is mounted; nothing travels.
    let source = transports.open(&reference(&to)).await.unwrap();
    let sink = transports.create(&reference(&format!("{}/other/app:v1", registry.host()))).await.unwrap();
    assert_eq!(sink.copy_blob(&source, &found.manifest.layers[1]).await.unwrap(), Pushed::Mounted);
    assert!(registry.log().contains("POST /v2/other/app/blobs/uploads/?mount="), "{}", registry.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_are_ranges_and_missing_tags_are_missing() {
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::start(directory.path(), "");
    let transports = transports(config(), directory.path());
    let tiny = image();
    let text = format!("{}/app:v1", registry.host());
    push(&transports, &text, &tiny).await.unwrap();
    let source = transports.open(&reference(&text)).await.unwrap();
    let layer = &tiny.manifest.layers[1];
    let range = headstart::model::ByteRange::new(1000, 5000).unwrap();
    let stream = source.blobs().open(layer.digest, range, 0).await.unwrap();
    let pieces: Vec<bytes::Bytes> = futures::TryStreamExt::try_collect(stream).await.unwrap();
    assert_eq!(pieces.concat(), tiny.layers[1][1000..5000]);
    // Combined log format: "GET /v2/…" status length.
    let line = format!("\"GET /v2/app/blobs/{} HTTP/1.1\" 206 4000 ", layer.digest);
    until(&format!("{line} in the log"), || registry.log().contains(&line)).await;

    let missing = transports.open(&reference(&format!("{}/app:v2", registry.host()))).await.unwrap();
    let error = missing.top().await.unwrap_err().to_string();
    assert!(error.contains("app:v2: there is no such image or blob"), "{error}");
}

/// The `auth` of a registry that wants `me` with the password `hunter2`.
pub(crate) fn htpasswd(directory: &Path) -> String {
    let output = Command::new("htpasswd").args(["-Bbn", "me", "hunter2"]).output().unwrap();
    assert!(output.status.success());
    let path = directory.join("htpasswd");
    std::fs::write(&path, output.stdout).unwrap();
    format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", path.display())
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_come_from_the_file_that_a_login_writes() {
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::start(directory.path(), &htpasswd(directory.path()));
    let tiny = image();
    let text = format!("docker://{}/app:v1", registry.host());
    let auth_file = directory.path().join("auth.json");
    skopeo(&[
        "login",
        "--tls-verify=false",
        "--authfile",
        &auth_file.display().to_string(),
        "-u",
        "me",
        "-p",
        "hunter2",
        &registry.host(),
    ]);
    let credentials = CredentialConfig { docker_config: Some(auth_file), ..CredentialConfig::default() };
    let transports_in = transports(ClientConfig { credentials, ..config() }, directory.path());
    push(&transports_in, &text, &tiny).await.unwrap();
    assert_holds(&transports_in, &text, &tiny).await;
    skopeo(&["inspect", "--tls-verify=false", "--creds", "me:hunter2", &text]);

    for (config, message) in [
        (with_login(&registry.host(), "me", "wrong-hunter2"), "does not accept the user name and password"),
        (config(), "wants a user name and password, and none is known"),
    ] {
        let transports = transports(config, directory.path());
        let error = push(&transports, &text, &tiny).await.unwrap_err().to_string();
        assert!(error.contains(message) && !error.contains("hunter2"), "{error}");
    }
}

/// Puts a small image as `app:v1` behind the password of [`htpasswd`].
pub(crate) async fn put_tiny(host: &str, spool: &Path) {
    let transports = transports(with_login(host, "me", "hunter2"), spool);
    push(&transports, &format!("docker://{host}/app:v1"), &image()).await.unwrap();
}

/// Runs openssl in `directory`.
fn openssl(directory: &Path, arguments: &[&str]) {
    let output = Command::new("openssl").args(arguments).current_dir(directory).output().unwrap();
    assert!(output.status.success(), "openssl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// An authority, and a certificate of it for 127.0.0.1 and a client: `ca.pem`, `server.pem`, `server.key`, `client.*`.
pub(crate) fn certificates(directory: &Path) {
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"];
    let make = |arguments: &[&str]| openssl(directory, &[&["req"][..], &key, arguments].concat());
    make(&["-x509", "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test authority"]);
    for (name, extension) in [
        ("server", "subjectAltName=IP:127.0.0.1,DNS:localhost\nextendedKeyUsage=serverAuth\n"),
        ("client", "extendedKeyUsage=clientAuth\n"),
    ] {
        let (file_key, request) = (format!("{name}.key"), format!("{name}.csr"));
        make(&["-keyout", &file_key, "-out", &request, "-subj", &format!("/CN={name}")]);
        let extensions = format!("{name}.ext");
        std::fs::write(directory.join(&extensions), format!("basicConstraints=CA:FALSE\n{extension}")).unwrap();
        let certificate = format!("{name}.pem");
        openssl(
            directory,
            &[
                "x509",
                "-req",
                "-in",
                &request,
                "-CA",
                "ca.pem",
                "-CAkey",
                "ca.key",
                "-CAcreateserial",
                "-days",
                "2",
                "-extfile",
                &extensions,
                "-out",
                &certificate,
            ],
        );
    }
}

/// nginx with TLS in front of whoever listens at `host`; only those with our certificate come in.
pub(crate) fn nginx(directory: &Path, host: &str) -> (Process, u16) {
    for _ in 0..5 {
        let port = free_port();
        let text = format!(
            "daemon off; master_process off; user root; pid {d}/nginx.pid; error_log stderr; events {{}}
             http {{ access_log {d}/nginx.access; client_max_body_size 0; proxy_temp_path {d}/t1;
             client_body_temp_path {d}/t2; fastcgi_temp_path {d}/t3; uwsgi_temp_path {d}/t4; scgi_temp_path {d}/t5;
             server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {d}/server.pem; ssl_certificate_key {d}/server.key;
             ssl_client_certificate {d}/ca.pem; ssl_verify_client on; location / {{ proxy_pass http://{host}; proxy_set_header Host $http_host;
             proxy_http_version 1.1; proxy_buffering off;
             proxy_set_header X-Forwarded-Proto https; }} }} }}",
            d = directory.display(),
        );
        let config = directory.join("nginx.conf");
        std::fs::write(&config, text).unwrap();
        let mut command = Command::new("/usr/sbin/nginx");
        command.arg("-p").arg(directory).arg("-c").arg(&config);
        let mut process = Process::start(&mut command, &directory.join("nginx.log"));
        if process.listens(port) {
            return (process, port);
        }
    }
    panic!("nginx did not start five times: {}", std::fs::read_to_string(directory.join("nginx.log")).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_own_authority_and_a_client_certificate_are_configured_as_for_containerd() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    certificates(directory.path());
    let registry = Registry::start(directory.path(), &htpasswd(directory.path()));
    let (_nginx, port) = nginx(directory.path(), &registry.host());
    let host = format!("127.0.0.1:{port}");
    let text = format!("docker://{host}/app:v1");
    let tiny = image();
    let with_hosts = |text: String| {
        let certs = directory.path().join("certs.d");
        let place = certs.join(&host);
        std::fs::create_dir_all(&place).unwrap();
        std::fs::write(place.join("hosts.toml"), text).unwrap();
        transports(ClientConfig { certs_d: vec![certs], ..with_login(&host, "me", "hunter2") }, directory.path())
    };
    let server = format!("server = 'https://{host}'\n");
    let client = format!("client = [['{}', '{}']]\n", at("client.pem"), at("client.key"));
    let authority = format!("ca = '{}'\n", at("ca.pem"));
    let good = with_hosts(format!("{server}{authority}{client}"));
    push(&good, &text, &tiny).await.unwrap();
    assert_holds(&good, &text, &tiny).await;
    let unverified = with_hosts(format!("{server}{client}skip_verify = true\n"));
    assert_holds(&unverified, &text, &tiny).await;
    let access = std::fs::read_to_string(directory.path().join("nginx.access")).unwrap();
    assert!(access.contains("PUT /v2/app/blobs/uploads/"), "{access}");

    for (hosts, message) in [
        (format!("{server}{client}"), "cannot agree on TLS"),
        (format!("{server}{authority}"), "the server answered 400"),
        (format!("{server}{authority}client = '{}'\n", at("ca.pem")), "no PEM client certificate"),
        (format!("{server}ca = '{}'\n", at("missing.pem")), "cannot read"),
        (format!("server = 'https://{}'", registry.host()), "cannot agree on TLS"),
    ] {
        let error = with_hosts(hosts.clone()).open(&reference(&text)).await.unwrap().top().await.unwrap_err();
        assert!(error.to_string().contains(message), "{hosts} gave {error}");
        assert!(!error.is_transient(), "{error}");
    }
}

/// Signs tokens for docker-registry as its own token servers do.
struct TokenServer {
    directory: PathBuf,
    /// The queries of all requests.
    asked: Mutex<Vec<String>>,
}

fn base64url(bytes: &[u8]) -> String {
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes)
}

async fn token(
    State(server): State<Arc<TokenServer>>,
    RawQuery(query): RawQuery,
    headers: axum::http::HeaderMap,
) -> Result<String, axum::http::StatusCode> {
    let query = query.unwrap_or_default();
    let pairs: Vec<(String, String)> = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
    server.asked.lock().unwrap().push(format!("{pairs:?}"));
    if headers.get("authorization").is_none_or(|login| login != "Basic bWU6aHVudGVyMg==") {
        return Err(axum::http::StatusCode::UNAUTHORIZED);
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let access: Vec<serde_json::Value> = pairs
        .iter()
        .filter(|(name, _)| name == "scope")
        .map(|(_, scope)| {
            let (kind, rest) = scope.split_once(':').unwrap();
            let (name, actions) = rest.rsplit_once(':').unwrap();
            serde_json::json!({"type": kind, "name": name, "actions": actions.split(',').collect::<Vec<_>>()})
        })
        .collect();
    let certificate = std::fs::read_to_string(server.directory.join("token.pem")).unwrap();
    let der: String = certificate.lines().filter(|line| !line.starts_with('-')).collect();
    let header = serde_json::json!({"typ": "JWT", "alg": "RS256", "x5c": [der]});
    let claims = serde_json::json!({
        "iss": "issuer", "sub": "me", "aud": "service", "exp": now + 60, "nbf": now - 10, "iat": now,
        "jti": "1", "access": access,
    });
    let signed = format!("{}.{}", base64url(header.to_string().as_bytes()), base64url(claims.to_string().as_bytes()));
    let mut sign = Command::new("openssl")
        .args(["dgst", "-sha256", "-sign", "token.key"])
        .current_dir(&server.directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    sign.stdin.take().unwrap().write_all(signed.as_bytes()).unwrap();
    let mut signature = Vec::new();
    sign.stdout.take().unwrap().read_to_end(&mut signature).unwrap();
    assert!(sign.wait().unwrap().success());
    Ok(serde_json::json!({"token": format!("{signed}.{}", base64url(&signature)), "expires_in": 60}).to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_open_the_registry() {
    let directory = tempfile::tempdir().unwrap();
    let subject = ["-subj", "/CN=issuer", "-days", "2", "-nodes"];
    let make = ["req", "-x509", "-newkey", "rsa:2048", "-keyout", "token.key", "-out", "token.pem"];
    openssl(directory.path(), &[&make[..], &subject].concat());
    let server = Arc::new(TokenServer { directory: directory.path().to_owned(), asked: Mutex::new(Vec::new()) });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let realm = format!("http://{}/token", listener.local_addr().unwrap());
    let app = axum::Router::new().route("/token", axum::routing::get(token)).with_state(Arc::clone(&server));
    let serving = tokio::spawn(async move { axum::serve(listener, app).await });
    let bundle = directory.path().join("token.pem");
    let auth = format!(
        "auth: {{token: {{realm: '{realm}', service: service, issuer: issuer, rootcertbundle: {}}}}}\n",
        bundle.display()
    );
    let registry = Registry::start(directory.path(), &auth);
    let tiny = image();
    let text = format!("docker://{}/app:v1", registry.host());
    let transports_in = transports(with_login(&registry.host(), "me", "hunter2"), directory.path());
    push(&transports_in, &text, &tiny).await.unwrap();
    let asked = server.asked.lock().unwrap().len();
    assert_eq!(asked, 1, "a whole push needs one token: {:?}", server.asked.lock().unwrap());
    assert_holds(&transports_in, &text, &tiny).await;
    assert_eq!(server.asked.lock().unwrap().len(), 2, "reading needs one more");
    // A mount needs the right to read the other repository.
    let source = transports_in.open(&reference(&text)).await.unwrap();
    let sink = transports_in.create(&reference(&format!("{}/other:v1", registry.host()))).await.unwrap();
    assert_eq!(sink.copy_blob(&source, &tiny.manifest.layers[0]).await.unwrap(), Pushed::Mounted);
    let asked = server.asked.lock().unwrap().last().unwrap().clone();
    assert!(asked.contains("repository:app:pull") && asked.contains("repository:other:pull,push"), "{asked}");

    let stranger = transports(config(), directory.path());
    let error = stranger.open(&reference(&text)).await.unwrap().top().await.unwrap_err().to_string();
    assert!(error.contains("it wants a login, and none is known"), "{error}");
    serving.abort();
}
