//! A kubeconfig: which API server, how it is trusted, and who we are there.
//!
//! Understood: server, authority (file or inline), `insecure-skip-tls-verify`, client certificate and key (files or inline),
//! `token`, `tokenFile`, user and password, `proxy-url`. Refused, because ignoring it would be wrong: `exec` and
//! `auth-provider`, which run programs (a service account's `tokenFile` does the same on a node), `tls-server-name`,
//! impersonation. The file and those that it names are read for every new connection, so what is renewed counts.

use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use serde::Deserialize;
use url::Url;

use super::ClusterError;
use crate::registry::secret::Secret;

/// Largest file that is read; real ones have some kilobytes.
const LIMIT: u64 = 1 << 20;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct File {
    #[serde(default)]
    clusters: Vec<Named<Cluster>>,
    #[serde(default)]
    users: Vec<Named<User>>,
    #[serde(default)]
    contexts: Vec<Named<Context>>,
    #[serde(default)]
    current_context: String,
}

#[derive(Deserialize)]
struct Named<T> {
    name: String,
    #[serde(alias = "cluster", alias = "user", alias = "context")]
    value: T,
}

#[derive(Deserialize)]
struct Context {
    cluster: String,
    #[serde(default)]
    user: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cluster {
    server: String,
    certificate_authority: Option<PathBuf>,
    certificate_authority_data: Option<String>,
    #[serde(default)]
    insecure_skip_tls_verify: bool,
    tls_server_name: Option<String>,
    proxy_url: Option<String>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
struct User {
    client_certificate: Option<PathBuf>,
    client_certificate_data: Option<String>,
    client_key: Option<PathBuf>,
    client_key_data: Option<String>,
    token: Option<String>,
    #[serde(rename = "tokenFile")]
    token_file: Option<PathBuf>,
    username: Option<String>,
    password: Option<String>,
    exec: Option<serde::de::IgnoredAny>,
    auth_provider: Option<serde::de::IgnoredAny>,
    #[serde(rename = "as")]
    impersonate: Option<serde::de::IgnoredAny>,
}

/// How requests prove who we are, beside a client certificate.
pub(super) enum Proof {
    /// The certificate says all.
    Nothing,
    /// A token.
    Token(Secret),
    /// A token in a file, which is read for each request: somebody renews it.
    TokenFile(PathBuf),
    /// User and password.
    Basic(String, Secret),
}

/// An API server that can be asked.
pub(super) struct Server {
    pub(super) url: Url,
    pub(super) http: reqwest::Client,
    pub(super) proof: Proof,
}

impl Server {
    /// The server of the kubeconfig's current context. Reads files, so not for the reactor.
    pub(super) fn open(path: &Path) -> Result<Self, ClusterError> {
        let text = read(path)?;
        let unusable = |what: String| ClusterError::Unusable { path: path.to_owned(), what };
        // The parser's message could quote a token and is reduced to a place.
        let file: File = serde_yaml_ng::from_slice(&text).map_err(|error| ClusterError::Parse {
            path: path.to_owned(),
            line: error.location().map_or(0, |location| location.line()),
        })?;
        let none = |kind: &str, name: &str| unusable(format!("it has no {kind} {name:?}"));
        let File { clusters, users, contexts, current_context } = file;
        let context = named(contexts, &current_context).ok_or_else(|| none("context", &current_context))?;
        let cluster = named(clusters, &context.cluster).ok_or_else(|| none("cluster", &context.cluster))?;
        let user = match context.user.as_str() {
            "" => User::default(),
            name => named(users, name).ok_or_else(|| none("user", name))?,
        };
        let refused = [
            (cluster.tls_server_name.is_some(), "tls-server-name"),
            (user.exec.is_some(), "exec (a tokenFile is what is understood)"),
            (user.auth_provider.is_some(), "auth-provider (a tokenFile is what is understood)"),
            (user.impersonate.is_some(), "impersonation"),
        ];
        if let Some((_, what)) = refused.iter().find(|(found, _)| *found) {
            return Err(unusable(format!("this program does not understand {what}")));
        }
        let url = Url::parse(&cluster.server).ok().filter(|url| {
            matches!(url.scheme(), "http" | "https")
                && url.has_host()
                && url.username().is_empty()
                && url.password().is_none()
        });
        let url = url.ok_or_else(|| unusable("the server is no address".to_owned()))?;
        let http = client(&url, &cluster, &user, path)?;
        let filled = |text: Option<String>| text.filter(|text| !text.is_empty());
        // kubectl's order: a token file goes before a token, because it can be renewed.
        let proof = match (user.token_file, filled(user.token), filled(user.username)) {
            (Some(file), ..) => Proof::TokenFile(beside(path, &file)),
            (_, Some(token), _) => Proof::Token(Secret::new(token)),
            (_, _, Some(name)) => Proof::Basic(name, Secret::new(user.password.unwrap_or_default())),
            (None, None, None) => Proof::Nothing,
        };
        if url.scheme() == "http" && !matches!(proof, Proof::Nothing) && !crate::registry::hosts::is_loopback(&url) {
            return Err(unusable("the token would travel over plain HTTP".to_owned()));
        }
        Ok(Self { url, http, proof })
    }
}

fn named<T>(list: Vec<Named<T>>, name: &str) -> Option<T> {
    list.into_iter().find(|entry| entry.name == name).map(|entry| entry.value)
}

/// Paths in the file are seen from where it lies.
fn beside(kubeconfig: &Path, path: &Path) -> PathBuf {
    kubeconfig.parent().unwrap_or(Path::new("/")).join(path)
}

/// A small file, whole.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, ClusterError> {
    use std::io::Read as _;
    let failed = |source| ClusterError::Read { path: path.to_owned(), source };
    let mut text = Vec::new();
    std::fs::File::open(path).map_err(failed)?.take(LIMIT).read_to_end(&mut text).map_err(failed)?;
    Ok(text)
}

fn client(url: &Url, cluster: &Cluster, user: &User, path: &Path) -> Result<reqwest::Client, ClusterError> {
    // Whoever installed a provider before us decides; an error says just that.
    drop(rustls::crypto::ring::default_provider().install_default());
    let unusable = |what: &str| ClusterError::Unusable { path: path.to_owned(), what: what.to_owned() };
    let pem = |file: &Option<PathBuf>, inline: &Option<String>, what: &str| match (inline, file) {
        // Inline data goes before a file, as with kubectl.
        (Some(text), _) => {
            let decoded = base64::engine::general_purpose::STANDARD.decode(text.trim());
            decoded.map(Some).map_err(|_| unusable(&format!("{what} is no Base64")))
        }
        (None, Some(file)) => read(&beside(path, file)).map(Some),
        (None, None) => Ok(None),
    };
    let mut builder = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        .user_agent(concat!("headstart/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(Duration::from_secs(10))
        .tcp_keepalive(Duration::from_secs(30));
    builder = match &cluster.proxy_url {
        Some(proxy) => {
            builder.proxy(reqwest::Proxy::all(proxy).map_err(|_| unusable("proxy-url is no address of a proxy"))?)
        }
        None if crate::registry::hosts::is_loopback(url) => builder.no_proxy(),
        None => builder,
    };
    if let Some(authority) =
        pem(&cluster.certificate_authority, &cluster.certificate_authority_data, "certificate-authority-data")?
    {
        let certificates = reqwest::Certificate::from_pem_bundle(&authority)
            .ok()
            .filter(|certificates| !certificates.is_empty())
            .ok_or_else(|| unusable("the certificate authority is no PEM certificate"))?;
        builder = builder.tls_certs_only(certificates);
    } else if url.scheme() == "http" {
        builder = builder.tls_certs_only([]);
    }
    if cluster.insecure_skip_tls_verify {
        builder = builder.tls_danger_accept_invalid_certs(true);
    }
    let certificate = pem(&user.client_certificate, &user.client_certificate_data, "client-certificate-data")?;
    let key = pem(&user.client_key, &user.client_key_data, "client-key-data")?;
    if let Some(mut identity) = certificate {
        // Some keep both in one file.
        if let Some(key) = key {
            identity.push(b'\n');
            identity.extend(key);
        }
        let identity = reqwest::Identity::from_pem(&identity)
            .map_err(|_| unusable("the client certificate and its key are no PEM"))?;
        builder = builder.identity(identity);
    }
    builder.build().map_err(|_| unusable("its certificates cannot be used for TLS"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(text: &str) -> Result<Server, ClusterError> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config");
        std::fs::write(&path, text).unwrap();
        Server::open(&path)
    }

    fn config(cluster: &str, user: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: here\npreferences: {{}}\n\
             contexts: [{{name: there, context: {{cluster: x}}}}, {{name: here, context: {{cluster: c, user: u}}}}]\n\
             clusters:\n- name: c\n  cluster:\n    {cluster}\nusers:\n- name: u\n  user:\n    {user}\n"
        )
    }

    #[test]
    fn the_forms_of_a_proof_are_understood() {
        for (user, expected) in [
            ("token: hunter2", "token hunter2"),
            ("{token: hunter2, tokenFile: t}", "file t"),
            ("{tokenFile: /var/t}", "file /var/t"),
            ("{username: me, password: hunter2}", "basic me:hunter2"),
            ("{}", "nothing"),
        ] {
            let server = open(&config("server: https://k.example:6443", user)).unwrap();
            assert_eq!(server.url.as_str(), "https://k.example:6443/");
            let found = match &server.proof {
                Proof::Nothing => "nothing".to_owned(),
                Proof::Token(token) => format!("token {}", token.expose()),
                Proof::TokenFile(path) if path.starts_with("/var") => format!("file {}", path.display()),
                Proof::TokenFile(path) => format!("file {}", path.file_name().unwrap().display()),
                Proof::Basic(name, password) => format!("basic {name}:{}", password.expose()),
            };
            assert_eq!(found, expected, "{user}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_without_showing_it() {
        let server = "server: https://k.example";
        for (text, message) in [
            (config(server, "exec: {command: hunter2}"), "does not understand exec"),
            (config(server, "auth-provider: {name: hunter2}"), "does not understand auth-provider"),
            (config(server, "as: hunter2"), "does not understand impersonation"),
            (config(&format!("{{{server}, tls-server-name: hunter2}}"), "{}"), "does not understand tls-server-name"),
            (config(server, "client-certificate-data: hunter2!"), "client-certificate-data is no Base64"),
            (config(server, "client-certificate-data: aHVudGVyMg=="), "are no PEM"),
            (config(&format!("{{{server}, certificate-authority-data: aHVudGVyMg==}}"), "{}"), "no PEM certificate"),
            (config(&format!("{{{server}, certificate-authority: hunter}}"), "{}"), "cannot read"),
            (config("server: http://k.example", "token: hunter2"), "plain HTTP"),
            (config("server: 'https://me:hunter2@k.example'", "{}"), "the server is no address"),
            (config("server: [hunter2]", "{}"), "cannot understand the kubeconfig"),
            (config(server, "token: [hunter2]"), "cannot understand the kubeconfig"),
            (config(server, "{}").replace("current-context: here", "current-context: away"), "no context \"away\""),
            (config(server, "{}").replace("user: u}", "user: x}"), "no user \"x\""),
            ("a: [".to_owned(), "cannot understand the kubeconfig"),
            (String::new(), "no context \"\""),
        ] {
            let error = open(&text).err().unwrap_or_else(|| panic!("{text} was taken"));
            let shown = format!("{error} {error:?}");
            assert!(shown.contains(message), "{text} gave {shown}");
            assert!(!shown.contains("hunter2"), "{shown} shows a secret");
        }
        assert!(matches!(Server::open(Path::new("/nowhere/config")), Err(ClusterError::Read { .. })));
    }
}
