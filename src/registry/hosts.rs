//! Which servers answer for a registry: `certs.d/HOST/hosts.toml` as containerd reads it, and what holds without one.
//!
//! A server says what it may be used for, how it is trusted, and which headers it wants. The list is in the order of the
//! file, the registry's own server last. Loopback hosts speak plain HTTP unless something says otherwise.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;
use url::{Host, Url};

use crate::oci::DEFAULT_HOST;

/// Where docker.io answers.
const DOCKER_SERVER: &str = "registry-1.docker.io";

/// Largest `hosts.toml` that is read; real ones have some hundred bytes.
const FILE_LIMIT: u64 = 1 << 20;

/// Why the servers of a registry are not known.
#[derive(Debug, thiserror::Error)]
pub enum HostsError {
    /// The file could not be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is no TOML or has not the expected form. The parser's whole report quotes the line, which may hold a
    /// header with a password, and is left out.
    #[error("cannot understand {} (line {line}): {reason}", .path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// Where.
        line: usize,
        /// Why.
        reason: String,
    },
    /// A value makes no sense.
    #[error("cannot use {} for {server:?}: {reason}", .path.display())]
    Value {
        /// Which file.
        path: PathBuf,
        /// The server the value is for.
        server: String,
        /// What is wrong.
        reason: String,
    },
    /// Certificates or keys could not be used.
    #[error("cannot use the certificates for {server}: {reason}")]
    Certificate {
        /// For which server.
        server: String,
        /// What is wrong, without the contents of any file.
        reason: String,
    },
}

/// What a server may be used for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capabilities {
    /// Fetch content by digest.
    pub(super) pull: bool,
    /// Turn a tag into a digest.
    pub(super) resolve: bool,
    /// Take uploads.
    pub(super) push: bool,
}

/// One server that answers for a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HostSpec {
    /// Address up to and including the API's version part, without a slash at the end.
    pub(super) base: Url,
    pub(super) capabilities: Capabilities,
    /// Extra certificate authorities, PEM.
    pub(super) ca: Vec<PathBuf>,
    /// Client certificates, PEM, and their keys where these are in files of their own.
    pub(super) client: Vec<(PathBuf, Option<PathBuf>)>,
    pub(super) skip_verify: bool,
    pub(super) headers: Vec<(String, String)>,
    /// True for a mirror: it is told the registry's name by `?ns=`.
    pub(super) mirror: bool,
}

/// Which servers a file names. Beside this it may say a [`Table`] of the registry's own.
#[derive(Deserialize)]
struct File {
    server: Option<String>,
    #[serde(default)]
    host: HashMap<Spanned<String>, Table>,
}

/// What can be said of a server.
#[derive(Deserialize, Default)]
struct Table {
    #[serde(default)]
    capabilities: Option<Vec<String>>,
    #[serde(default)]
    ca: OneOrMany,
    #[serde(default)]
    client: ClientFiles,
    skip_verify: Option<bool>,
    #[serde(default)]
    header: HashMap<String, OneOrMany>,
    #[serde(default)]
    override_path: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl Default for OneOrMany {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl OneOrMany {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(one) => vec![one],
            Self::Many(many) => many,
        }
    }
}

#[derive(Deserialize)]
#[serde(untagged)]
enum ClientFiles {
    One(String),
    Many(Vec<String>),
    Pairs(Vec<Vec<String>>),
}

impl Default for ClientFiles {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

/// The servers of `registry`, best first. The first of `roots` that has a directory for it decides.
pub(super) fn hosts_for(roots: &[PathBuf], registry: &str) -> Result<Vec<HostSpec>, HostsError> {
    for root in roots {
        for name in directory_names(registry) {
            let directory = root.join(name);
            if !directory.is_dir() {
                continue;
            }
            let path = directory.join("hosts.toml");
            return match read_bounded(&path) {
                Ok(text) => parse_hosts(&text, &path, registry),
                Err(source) if source.kind() == std::io::ErrorKind::NotFound => docker_style(&directory, registry),
                Err(source) => Err(HostsError::Read { path, source }),
            };
        }
    }
    parse_hosts("", Path::new("the defaults"), registry)
}

/// containerd's order: `host_port_`, `host:port`, `_default`.
fn directory_names(registry: &str) -> Vec<String> {
    let mut names = Vec::new();
    if let Some((host, port)) = registry.rsplit_once(':')
        && port.bytes().all(|b| b.is_ascii_digit())
    {
        names.push(format!("{host}_{port}_"));
    }
    names.push(registry.to_owned());
    names.push("_default".to_owned());
    names
}

fn read_bounded(path: &Path) -> std::io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    let read = std::fs::File::open(path)?.take(FILE_LIMIT + 1).read_to_string(&mut text)?;
    match u64::try_from(read).is_ok_and(|read| read <= FILE_LIMIT) {
        true => Ok(text),
        false => Err(std::io::Error::new(std::io::ErrorKind::InvalidData, "the file is longer than 1 MiB")),
    }
}

/// The files of hosts below `roots` that cannot be used, with the reason: what would fail when an image of that host is
/// wanted. A root that does not exist has none.
pub fn faulty_hosts(roots: &[PathBuf]) -> Vec<(PathBuf, String)> {
    let mut faulty = Vec::new();
    for directory in roots.iter().flat_map(|root| std::fs::read_dir(root).into_iter().flatten().flatten()) {
        let path = directory.path().join("hosts.toml");
        let name = directory.file_name().to_string_lossy().into_owned();
        let why = match read_bounded(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => error.to_string(),
            Ok(text) => match parse_hosts(&text, &path, &name) {
                Err(error) => error.to_string(),
                Ok(hosts) => {
                    let client = |(cert, key): &(PathBuf, Option<PathBuf>)| [Some(cert.clone()), key.clone()];
                    let files = hosts
                        .iter()
                        .flat_map(|host| host.ca.iter().cloned().chain(host.client.iter().flat_map(client).flatten()));
                    match files.into_iter().find(|file| !file.is_file()) {
                        Some(missing) => format!("there is no {}", missing.display()),
                        None => continue,
                    }
                }
            },
        };
        faulty.push((path, why));
    }
    faulty.sort();
    faulty
}

/// Reads `text`, which stands in `path`, for `registry`.
fn parse_hosts(text: &str, path: &Path, registry: &str) -> Result<Vec<HostSpec>, HostsError> {
    let bad = |error: toml::de::Error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        HostsError::Parse { path: path.to_owned(), line, reason: without_values(error.message()) }
    };
    let file: File = toml::from_str(text).map_err(bad)?;
    let own: Table = toml::from_str(text).map_err(bad)?;
    let mut mirrors: Vec<(Spanned<String>, Table)> = file.host.into_iter().collect();
    mirrors.sort_by_key(|(server, _)| server.span().start);
    let mut hosts = Vec::new();
    for (server, table) in mirrors {
        hosts.push(spec(server.get_ref(), table, path, registry)?);
    }
    let trusted_specially = !matches!(&own.ca, OneOrMany::Many(many) if many.is_empty())
        || !matches!(&own.client, ClientFiles::Many(many) if many.is_empty());
    let server = file.server.filter(|server| !server.is_empty());
    let server = server.unwrap_or_else(|| default_server(registry, trusted_specially));
    hosts.push(spec(&server, own, path, registry)?);
    Ok(hosts)
}

/// A parser's message without the values that it quotes: one of them may be a password at the wrong place.
fn without_values(message: &str) -> String {
    match (message.find('"'), message.rfind('"')) {
        (Some(first), Some(last)) if first < last => format!("{}\"…\"{}", &message[..first], &message[last + 1..]),
        _ => message.to_owned(),
    }
}

/// The addresses of the servers that the `hosts.toml` with this `text` names for `registry`, best first.
///
/// # Errors
/// The text cannot be understood.
#[cfg(feature = "testkit")]
pub fn servers_in(text: &str, registry: &str) -> Result<Vec<Url>, HostsError> {
    let hosts = parse_hosts(text, Path::new("hosts.toml"), registry)?;
    Ok(hosts.into_iter().map(|host| host.base).collect())
}

/// A directory without `hosts.toml`, as Docker lays it out: `*.crt` are authorities, `*.cert` with `*.key` a client.
fn docker_style(directory: &Path, registry: &str) -> Result<Vec<HostSpec>, HostsError> {
    let read = |source| HostsError::Read { path: directory.to_owned(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(read)? {
        files.push(entry.map_err(read)?.path());
    }
    files.sort();
    let with = |extension: &str| {
        let extension = extension.to_owned();
        move |path: &&PathBuf| path.extension().is_some_and(|found| found.to_string_lossy() == extension)
    };
    let ca: Vec<PathBuf> = files.iter().filter(with("crt")).cloned().collect();
    let client: Vec<_> =
        files.iter().filter(with("cert")).map(|cert| (cert.clone(), Some(cert.with_extension("key")))).collect();
    let server = default_server(registry, !ca.is_empty() || !client.is_empty());
    let mut own = spec(&server, Table::default(), directory, registry)?;
    own.ca = ca;
    own.client = client;
    Ok(vec![own])
}

/// Where a registry answers when nothing is configured.
fn default_server(registry: &str, trusted_specially: bool) -> String {
    if registry == DEFAULT_HOST {
        return format!("https://{DOCKER_SERVER}");
    }
    let plain = !trusted_specially && Url::parse(&format!("http://{registry}")).is_ok_and(|url| is_loopback(&url));
    format!("{}://{registry}", if plain { "http" } else { "https" })
}

/// True for `localhost`, names below it, and loopback addresses.
pub(super) fn is_loopback(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

fn spec(server: &str, table: Table, path: &Path, registry: &str) -> Result<HostSpec, HostsError> {
    let shown = server.rsplit_once('@').map_or(server, |(_, after)| after);
    let fail = |reason: String| HostsError::Value { path: path.to_owned(), server: shown.to_owned(), reason };
    let address = if server.contains("://") { server.to_owned() } else { format!("https://{server}") };
    let mut base = Url::parse(&address).map_err(|error| fail(format!("no address: {error}")))?;
    if !matches!(base.scheme(), "http" | "https") || base.host().is_none() {
        return Err(fail("only http and https servers are known".to_owned()));
    }
    if !base.username().is_empty() || base.password().is_some() || base.query().is_some() || base.fragment().is_some() {
        return Err(HostsError::Value {
            path: path.to_owned(),
            server: base.host_str().unwrap_or_default().to_owned(),
            reason: "an address here has no user, password, query or fragment".to_owned(),
        });
    }
    let trimmed = base.path().trim_end_matches('/').to_owned();
    let complete = table.override_path || trimmed.ends_with("/v2");
    base.set_path(&if complete { trimmed } else { format!("{trimmed}/v2") });

    let capabilities = match table.capabilities {
        None => Capabilities { pull: true, resolve: true, push: true },
        Some(words) => {
            let mut capabilities = Capabilities { pull: false, resolve: false, push: false };
            for word in words {
                match word.as_str() {
                    "pull" => capabilities.pull = true,
                    "resolve" => capabilities.resolve = true,
                    "push" => capabilities.push = true,
                    _ => return Err(fail(format!("unknown capability {word:?}; known are pull, resolve and push"))),
                }
            }
            capabilities
        }
    };
    let directory = path.parent().unwrap_or(Path::new("/"));
    let file = |name: String| directory.join(name);
    let ca = table.ca.into_vec().into_iter().map(file).collect();
    let mut client = Vec::new();
    match table.client {
        ClientFiles::One(one) => client.push((file(one), None)),
        ClientFiles::Many(many) => client.extend(many.into_iter().map(|one| (file(one), None))),
        ClientFiles::Pairs(pairs) => {
            for pair in pairs {
                match <[String; 2]>::try_from(pair) {
                    Ok([cert, key]) if key.is_empty() => client.push((file(cert), None)),
                    Ok([cert, key]) => client.push((file(cert), Some(file(key)))),
                    Err(_) => return Err(fail("a client entry is one file or a pair of certificate and key".into())),
                }
            }
        }
    }
    let mut headers = Vec::new();
    for (name, values) in table.header {
        headers.extend(values.into_vec().into_iter().map(|value| (name.clone(), value)));
    }
    headers.sort();
    let own = if registry == DEFAULT_HOST { DOCKER_SERVER } else { registry };
    let mirror = !authority(&base).eq_ignore_ascii_case(own);
    Ok(HostSpec { base, capabilities, ca, client, skip_verify: table.skip_verify.unwrap_or(false), headers, mirror })
}

/// Host, and port if it is not the scheme's own.
pub(super) fn authority(url: &Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(text: &str, registry: &str) -> Vec<HostSpec> {
        parse_hosts(text, Path::new("/etc/certs.d/x/hosts.toml"), registry).unwrap()
    }

    #[test]
    fn without_a_file_the_registry_answers_for_itself() {
        for (registry, base) in [
            ("docker.io", "https://registry-1.docker.io/v2"),
            ("quay.io", "https://quay.io/v2"),
            ("a.b:5000", "https://a.b:5000/v2"),
            ("localhost", "http://localhost/v2"),
            ("localhost:5000", "http://localhost:5000/v2"),
            ("127.0.0.9:5000", "http://127.0.0.9:5000/v2"),
            ("[::1]:5000", "http://[::1]:5000/v2"),
            ("localhost.example", "https://localhost.example/v2"),
        ] {
            let hosts = hosts("", registry);
            assert_eq!(hosts.len(), 1);
            assert_eq!(hosts[0].base.as_str(), base);
            assert!(!hosts[0].mirror, "{registry}");
        }
    }

    #[test]
    fn mirrors_stand_in_the_order_of_the_file_and_the_server_last() {
        let hosts = hosts(
            r#"
            server = "https://upstream.example"
            [host."https://zz.example"]
              capabilities = ["pull"]
              [host."https://zz.example".header]
                x-one = "1"
                x-two = ["2", "3"]
            [host."http://aa.example:8080/prefix"]
              skip_verify = true
              ca = "ca.pem"
              client = [["c.cert", "c.key"], ["d.pem", ""]]
            [host."mm.example/v2/proxy"]
              override_path = true
              ca = ["/abs/a.pem", "b.pem"]
              client = "e.pem"
            "#,
            "x.example",
        );
        let bases: Vec<&str> = hosts.iter().map(|host| host.base.as_str()).collect();
        assert_eq!(
            bases,
            [
                "https://zz.example/v2",
                "http://aa.example:8080/prefix/v2",
                "https://mm.example/v2/proxy",
                "https://upstream.example/v2"
            ]
        );
        assert_eq!(hosts[0].capabilities, Capabilities { pull: true, resolve: false, push: false });
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(hosts[0].headers, [header("x-one", "1"), header("x-two", "2"), header("x-two", "3")]);
        assert!(hosts[1].skip_verify);
        assert_eq!(hosts[1].ca, [PathBuf::from("/etc/certs.d/x/ca.pem")]);
        assert_eq!(hosts[1].client[0].1.as_deref(), Some(Path::new("/etc/certs.d/x/c.key")));
        assert_eq!(hosts[1].client[1], (PathBuf::from("/etc/certs.d/x/d.pem"), None));
        assert_eq!(hosts[2].ca, [PathBuf::from("/abs/a.pem"), PathBuf::from("/etc/certs.d/x/b.pem")]);
        assert_eq!(hosts[2].client, [(PathBuf::from("/etc/certs.d/x/e.pem"), None)]);
        assert!(hosts.iter().all(|host| host.mirror));
    }

    #[test]
    fn the_top_of_the_file_is_about_the_registry_itself() {
        let hosts = hosts("ca = 'ca.pem'\ncapabilities = ['pull', 'resolve']", "localhost:5000");
        assert_eq!(hosts[0].base.as_str(), "https://localhost:5000/v2");
        assert!(!hosts[0].capabilities.push);
        let hosts = self::hosts("server = 'https://127.0.0.1:5000'", "127.0.0.1:5000");
        assert_eq!(hosts[0].base.as_str(), "https://127.0.0.1:5000/v2");
        assert!(!hosts[0].mirror);
    }

    #[test]
    fn files_that_make_no_sense_are_refused() {
        for (text, message) in [
            ("server = 3", "cannot understand /d/hosts.toml (line 1)"),
            ("server = 'https://a'\nca = 3", "cannot understand /d/hosts.toml (line 2)"),
            (
                "[host.'https://x']\nheader = 'pw'",
                "cannot understand /d/hosts.toml (line 2): invalid type: string \"…\"",
            ),
            ("[host.'https://x']\nheader = 'p\"w'", "invalid type: string \"…\""),
            ("[host.'https://me:pw@a b']", "no address"),
            ("[host.'https://x'.header]\n\nauthorization = pw", "cannot understand /d/hosts.toml (line 3)"),
            ("[host.'ftp://x']", "only http and https"),
            ("[host.'https://me:pw@x.example']", "no user, password"),
            ("[host.'https://x']\ncapabilities = ['fly']", "unknown capability"),
            ("[host.'https://x']\nclient = [['a','b','c']]", "a pair"),
            ("[host.'https://']", "no address"),
        ] {
            let error = parse_hosts(text, Path::new("/d/hosts.toml"), "r.example").expect_err(text).to_string();
            assert!(error.contains(message), "{text} gave {error}");
            assert!(!error.contains("pw"), "{error} shows a password");
        }
    }

    #[test]
    fn directories_are_found_as_containerd_finds_them() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let directory = root.path().join(name);
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(directory.join("hosts.toml"), text).unwrap();
        };
        let roots = [root.path().join("missing"), root.path().to_owned()];
        let base = |registry: &str| hosts_for(&roots, registry).unwrap()[0].base.to_string();
        assert_eq!(base("r.example:5000"), "https://r.example:5000/v2");
        write("_default", "[host.'https://default.example']");
        assert_eq!(base("r.example:5000"), "https://default.example/v2");
        write("r.example:5000", "[host.'https://colon.example']");
        assert_eq!(base("r.example:5000"), "https://colon.example/v2");
        write("r.example_5000_", "[host.'https://under.example']");
        assert_eq!(base("r.example:5000"), "https://under.example/v2");
        assert_eq!(base("other.example"), "https://default.example/v2");
    }

    #[test]
    fn a_directory_of_certificates_alone_is_read_as_docker_does() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("localhost:5000");
        std::fs::create_dir(&directory).unwrap();
        for name in ["ca.crt", "me.cert", "me.key", "README"] {
            std::fs::write(directory.join(name), "").unwrap();
        }
        let hosts = hosts_for(&[root.path().to_owned()], "localhost:5000").unwrap();
        assert_eq!(hosts[0].base.as_str(), "https://localhost:5000/v2");
        assert_eq!(hosts[0].ca, [directory.join("ca.crt")]);
        assert_eq!(hosts[0].client, [(directory.join("me.cert"), Some(directory.join("me.key")))]);
    }
}
