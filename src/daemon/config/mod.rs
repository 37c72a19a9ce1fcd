//! The configuration: what was said in a file, then what it means.
//!
//! Guarantees: it is checked once, here; a key that does not exist is an error that names the nearest one; what is not said
//! has the default that `docs/config.example.toml` shows. Below this room nobody reads a file of settings or the environment.

mod said;
mod values;

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::drivers::Wanted;
use crate::grpc::ContainerdVersion;
use crate::store::CacheGoal;
use crate::sys::descriptors::Announced;
use said::{Said, nearest_key, unknown_key};
use values::{Size, Span};

pub use values::parse_size;

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is no TOML, or a value has the wrong form.
    #[error("cannot understand the configuration {}", .path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// The file has a key that means nothing.
    #[error("cannot use the configuration {}: there is no key {key:?}{}", .path.display(), Nearest(.nearest.as_deref()))]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The key with its section.
        key: String,
        /// What may have been meant.
        nearest: Option<String>,
    },
    /// A value is of the right form and still makes no sense.
    #[error("cannot use the configuration {}: {key} {why}", .path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key with its section.
        key: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
}

struct Nearest<'a>(Option<&'a str>);

impl fmt::Display for Nearest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |nearest| write!(f, "; did you mean {nearest:?}?"))
    }
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// What failed.
    Error,
    /// What was put right but should be known.
    Warn,
    /// One line per request and mount.
    Info,
    /// What helps to find a fault.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// The word it is written as.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

/// What of the machine and the user decides about defaults.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    /// True for root.
    pub is_root: bool,
    /// `HOME`.
    pub home: Option<PathBuf>,
    /// `XDG_DATA_HOME`.
    pub data_home: Option<PathBuf>,
    /// `XDG_CONFIG_HOME`.
    pub config_home: Option<PathBuf>,
    /// `DOCKER_CONFIG`, a directory.
    pub docker_config: Option<PathBuf>,
    /// `XDG_RUNTIME_DIR`.
    pub runtime_dir: Option<PathBuf>,
    /// `NOTIFY_SOCKET`, of a service manager.
    pub notify_socket: Option<OsString>,
    /// `FDSTORE`: how many descriptors the service manager keeps for the next process.
    pub descriptor_store: Option<u32>,
    /// `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES`: what the service manager has passed on.
    pub announced: Announced,
}

impl Surroundings {
    /// Those of this process: the one place that reads the environment.
    pub fn of_this_process() -> Self {
        let path = |name: &str| std::env::var_os(name).filter(|value: &OsString| !value.is_empty()).map(PathBuf::from);
        Self {
            is_root: rustix::process::geteuid().is_root(),
            home: path("HOME"),
            data_home: path("XDG_DATA_HOME"),
            config_home: path("XDG_CONFIG_HOME"),
            docker_config: path("DOCKER_CONFIG"),
            runtime_dir: path("XDG_RUNTIME_DIR"),
            notify_socket: std::env::var_os("NOTIFY_SOCKET").filter(|value| !value.is_empty()),
            descriptor_store: std::env::var("FDSTORE").ok().and_then(|number| number.parse().ok()),
            announced: Announced {
                pid: std::env::var("LISTEN_PID").ok(),
                count: std::env::var("LISTEN_FDS").ok(),
                names: std::env::var("LISTEN_FDNAMES").ok(),
            },
        }
    }

    fn home(&self) -> PathBuf {
        // Services of the machine have no `HOME`.
        self.home.clone().unwrap_or_else(|| PathBuf::from(if self.is_root { "/root" } else { "/" }))
    }

    /// The file that is read if none is named; it need not exist.
    pub fn config_file(&self) -> PathBuf {
        if self.is_root {
            return PathBuf::from("/etc/headstart/config.toml");
        }
        self.config_home.clone().unwrap_or_else(|| self.home().join(".config")).join("headstart/config.toml")
    }

    fn root(&self) -> PathBuf {
        if self.is_root {
            return PathBuf::from("/var/lib/headstart");
        }
        self.data_home.clone().unwrap_or_else(|| self.home().join(".local/share")).join("headstart")
    }

    fn run(&self, root: &Path) -> PathBuf {
        match &self.runtime_dir {
            _ if self.is_root => PathBuf::from("/run/headstart"),
            Some(directory) => directory.join("headstart"),
            None => root.join("run"),
        }
    }

    fn docker_config(&self) -> PathBuf {
        self.docker_config.clone().unwrap_or_else(|| self.home().join(".docker")).join("config.json")
    }
}

/// How registries are spoken to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryConfig {
    /// Docker's `config.json`: logins and credential helpers.
    pub docker_config: PathBuf,
    /// Directories of `HOST/hosts.toml`, first match wins.
    pub certs_d: Vec<PathBuf>,
    /// Time for a connection to be made.
    pub connect_timeout: Duration,
    /// Time from a request to the beginning of its answer.
    pub response_timeout: Duration,
    /// Longest silence inside of an answer.
    pub idle_timeout: Duration,
    /// No try begins later than this after the first.
    pub deadline: Duration,
    /// How often each server is tried.
    pub rounds: u32,
}

/// Where credentials come from, beside Docker's `config.json`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CredentialSettings {
    /// Whether the image service of CRI is passed on to containerd, to see what kubelets pull with.
    pub cri_proxy: bool,
    /// A kubeconfig that may list and watch secrets, if there is one.
    pub kubeconfig: Option<PathBuf>,
    /// The namespaces whose secrets count; none is all.
    pub namespaces: Vec<String>,
}

/// How layers are fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchSettings {
    /// Bytes that may be in memory on their way from the network to the disk.
    pub memory: u64,
    /// Requests that are under way at once.
    pub connections: u32,
    /// How long a reader waits before its read fails.
    pub deadline: Duration,
    /// How far sequential reads are fetched ahead.
    pub read_ahead: u64,
}

/// How images are filled in the background.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FillSettings {
    /// Whether mounts are filled at all.
    pub enabled: bool,
    /// Time after a mount before its fill begins, unless its readers show that they want everything.
    pub start_delay: Duration,
    /// Stored bytes a second that fills may bring; none is as many as come.
    pub bandwidth: Option<u64>,
    /// Requests that may be under way at once for what nobody waits for.
    pub connections: u32,
}

/// How the daemon behaves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DaemonSettings {
    /// Where metrics, `/healthz` and `/readyz` are served over HTTP; nowhere if none.
    pub metrics_listen: Option<SocketAddr>,
    /// How long a daemon that ends serves mounts that are in use.
    pub stop_timeout: Duration,
    /// Whether mounts that go on without the daemon stay when it ends, for the next one to take them up.
    pub keep_mounts: bool,
    /// How long those who read lazy mounts wait for the next daemon, if a process of this program keeps the connection.
    pub keep_for: Duration,
}

/// How containerd is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerdSettings {
    /// Whether it is served at all.
    pub enabled: bool,
    /// Where the service for it is.
    pub socket: PathBuf,
    /// Where its own services are.
    pub address: PathBuf,
    /// Its directory of blobs.
    pub content: PathBuf,
    /// Which containerd it is; none is asked from it.
    pub version: Option<ContainerdVersion>,
    /// Whether layers that can be read before they are here are answered without being downloaded.
    pub lazy: bool,
    /// Whether labels that name an image are believed although containerd does not vouch for them.
    pub trust_labels: bool,
    /// How layers are shown.
    pub driver: Wanted,
    /// Whether the files of a container have one device although its layers are file systems of their own.
    pub xino: bool,
    /// Whether layers that are served are completed in the background.
    pub fill: bool,
    /// How long the preparation of a layer may wait for a registry before containerd is left to download it.
    pub prepare_timeout: Duration,
    /// Whether the files of a snapshot are on disk before it counts as committed.
    pub sync: bool,
}

/// What the configuration means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where everything is kept.
    pub root: PathBuf,
    /// Where the daemon's sockets and its FUSE connection are.
    pub run: PathBuf,
    /// How much is logged.
    pub log_level: LogLevel,
    /// How registries are spoken to.
    pub registry: RegistryConfig,
    /// Where credentials come from, beside Docker's `config.json`.
    pub credentials: CredentialSettings,
    /// How layers are fetched.
    pub fetch: FetchSettings,
    /// How images are filled in the background.
    pub fill: FillSettings,
    /// Longest time a fetched chunk stays unsynced: what a power cut may cost.
    pub sync_interval: Duration,
    /// Bytes that layer images may take; none is no limit.
    pub quota: Option<u64>,
    /// Bytes of the disk that are kept free.
    pub reserve: u64,
    /// How the daemon behaves.
    pub daemon: DaemonSettings,
    /// How containerd is served.
    pub containerd: ContainerdSettings,
}

impl Config {
    /// The configuration in `file`, or in the usual place if none is named; a usual place without a file means defaults.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(file: Option<&Path>, surroundings: &Surroundings) -> Result<Self, ConfigError> {
        let path = file.map_or_else(|| surroundings.config_file(), Path::to_owned);
        match fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text, &path, surroundings),
            Err(error) if error.kind() == io::ErrorKind::NotFound && file.is_none() => {
                Self::mean(Said::default(), &path, surroundings)
            }
            Err(source) => Err(ConfigError::Read { path, source }),
        }
    }

    /// The settings in which this differs from `other`, and which a daemon takes in only when it starts.
    pub fn differences(&self, other: &Self) -> Vec<&'static str> {
        let Self {
            root,
            run,
            log_level: _,
            registry,
            credentials,
            fetch,
            fill,
            sync_interval,
            quota,
            reserve,
            daemon,
            containerd,
        } = self;
        let differ = [
            ("root", *root != other.root),
            ("run", *run != other.run),
            ("registry", *registry != other.registry),
            ("credentials", *credentials != other.credentials),
            ("fetch", *fetch != other.fetch),
            (
                "fill",
                FillSettings { bandwidth: None, ..fill.clone() }
                    != FillSettings { bandwidth: None, ..other.fill.clone() },
            ),
            ("store.sync_interval", *sync_interval != other.sync_interval),
            ("store.quota", *quota != other.quota),
            ("store.reserve", *reserve != other.reserve),
            ("daemon", *daemon != other.daemon),
            ("containerd", *containerd != other.containerd),
        ];
        differ.into_iter().filter_map(|(key, differs)| differs.then_some(key)).collect()
    }

    /// What the cache is kept to.
    pub const fn cache_goal(&self) -> CacheGoal {
        CacheGoal { quota: self.quota, reserve: self.reserve, all: false }
    }

    fn parse(text: &str, path: &Path, surroundings: &Surroundings) -> Result<Self, ConfigError> {
        let parse = |source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) };
        let table: toml::Table = toml::from_str(text).map_err(parse)?;
        if let Some(key) = unknown_key(&table) {
            let nearest = nearest_key(&key);
            return Err(ConfigError::UnknownKey { path: path.to_owned(), key, nearest });
        }
        let said: Said = toml::from_str(text).map_err(parse)?;
        Self::mean(said, path, surroundings)
    }

    fn mean(said: Said, path: &Path, surroundings: &Surroundings) -> Result<Self, ConfigError> {
        let Said { root, run, log_level, registry, credentials, fetch, fill, store, daemon, containerd } = said;
        let span = |said: Option<Span>, default: Duration| said.map_or(default, |Span(span)| span);
        let wrong = |key, why| ConfigError::Value { path: path.to_owned(), key, why };
        let metrics_listen = match daemon.metrics_listen.as_deref() {
            None | Some("") => None,
            Some(address) => {
                let parsed = address.parse();
                Some(parsed.map_err(|_| wrong("daemon.metrics_listen", "must be ADDRESS:PORT, or empty"))?)
            }
        };
        let version = match containerd.version.as_deref() {
            None | Some("auto") => None,
            Some(version) => {
                let parsed = version.parse();
                Some(parsed.map_err(|_| wrong("containerd.version", "must be auto or as 1.7"))?)
            }
        };
        let driver = containerd.driver.as_deref().map(str::parse).transpose();
        let driver = driver.map_err(|_| wrong("containerd.driver", "must be auto, fuse, kernel or local"))?;
        let root = root.unwrap_or_else(|| surroundings.root());
        let run = run.unwrap_or_else(|| surroundings.run(&root));
        let config = Self {
            containerd: ContainerdSettings {
                enabled: containerd.enabled.unwrap_or(surroundings.is_root),
                socket: containerd.socket.unwrap_or_else(|| run.join("headstart.sock")),
                address: containerd.address.unwrap_or_else(|| "/run/containerd/containerd.sock".into()),
                content: containerd
                    .content
                    .unwrap_or_else(|| "/var/lib/containerd/io.containerd.content.v1.content".into()),
                version,
                lazy: containerd.lazy.unwrap_or(true),
                trust_labels: containerd.trust_labels.unwrap_or(false),
                driver: driver.unwrap_or_default(),
                xino: containerd.xino.unwrap_or(true),
                fill: containerd.fill.unwrap_or(true),
                prepare_timeout: span(containerd.prepare_timeout, Duration::from_secs(10)),
                sync: containerd.sync.unwrap_or(false),
            },
            run,
            root,
            log_level: log_level.unwrap_or(LogLevel::Warn),
            registry: RegistryConfig {
                docker_config: registry.docker_config.unwrap_or_else(|| surroundings.docker_config()),
                certs_d: registry
                    .certs_d
                    .unwrap_or_else(|| ["/etc/containerd/certs.d", "/etc/docker/certs.d"].map(PathBuf::from).to_vec()),
                connect_timeout: span(registry.connect_timeout, Duration::from_secs(10)),
                response_timeout: span(registry.response_timeout, Duration::from_secs(30)),
                idle_timeout: span(registry.idle_timeout, Duration::from_secs(30)),
                deadline: span(registry.deadline, Duration::from_secs(90)),
                rounds: registry.rounds.unwrap_or(5),
            },
            credentials: CredentialSettings {
                cri_proxy: credentials.cri_proxy.unwrap_or(false),
                kubeconfig: credentials.kubeconfig.filter(|path| !path.as_os_str().is_empty()),
                namespaces: credentials.namespaces.unwrap_or_default(),
            },
            fetch: FetchSettings {
                memory: fetch.memory.map_or(16 << 20, |Size(bytes)| bytes),
                connections: fetch.connections.unwrap_or(8),
                deadline: span(fetch.deadline, Duration::from_secs(60)),
                read_ahead: fetch.read_ahead.map_or(8 << 20, |Size(bytes)| bytes),
            },
            fill: FillSettings {
                enabled: fill.enabled.unwrap_or(true),
                start_delay: span(fill.start_delay, Duration::from_secs(2)),
                bandwidth: fill.bandwidth.map(|Size(bytes)| bytes).filter(|bytes| *bytes > 0),
                connections: fill.connections.unwrap_or(6),
            },
            sync_interval: span(store.sync_interval, Duration::from_secs(5)),
            quota: store.quota.map(|Size(bytes)| bytes).filter(|bytes| *bytes > 0),
            reserve: store.reserve.map_or(256 << 20, |Size(bytes)| bytes),
            daemon: DaemonSettings {
                metrics_listen,
                stop_timeout: span(daemon.stop_timeout, Duration::from_secs(10)),
                keep_mounts: daemon.keep_mounts.unwrap_or(true),
                keep_for: span(daemon.keep_for, Duration::from_secs(600)),
            },
        };
        let wrong = |key, why| Err(wrong(key, why));
        if !config.root.is_absolute() {
            return wrong("root", "must be an absolute path");
        }
        if !config.run.is_absolute() {
            return wrong("run", "must be an absolute path");
        }
        // Namespaces are DNS labels, and become parts of an address.
        let is_label = |name: &String| {
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        if !config.credentials.namespaces.iter().all(is_label) {
            return wrong("credentials.namespaces", "must be names of namespaces: small letters, digits and dashes");
        }
        if !config.containerd.socket.is_absolute() {
            return wrong("containerd.socket", "must be an absolute path");
        }
        if !config.containerd.address.is_absolute() {
            return wrong("containerd.address", "must be an absolute path");
        }
        if !config.containerd.content.is_absolute() {
            return wrong("containerd.content", "must be an absolute path");
        }
        if config.containerd.enabled && !surroundings.is_root {
            return wrong("containerd.enabled", "must be false: only root can serve containerd");
        }
        if config.fetch.memory < 1 << 20 {
            return wrong("fetch.memory", "must be at least 1MiB");
        }
        if config.fetch.connections == 0 {
            return wrong("fetch.connections", "must be at least 1");
        }
        if config.fill.connections == 0 {
            return wrong("fill.connections", "must be at least 1");
        }
        if config.registry.rounds == 0 {
            return wrong("registry.rounds", "must be at least 1");
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../../../docs/config.example.toml");

    fn root() -> Surroundings {
        Surroundings { is_root: true, home: Some("/root".into()), ..Surroundings::default() }
    }

    fn parse(text: &str) -> Result<Config, ConfigError> {
        Config::parse(text, Path::new("c.toml"), &root())
    }

    #[test]
    fn the_example_shows_every_key_with_its_default() {
        let config = parse(EXAMPLE).unwrap();
        assert_eq!(config, Config::mean(Said::default(), Path::new("c.toml"), &root()).unwrap());
        let table: toml::Table = toml::from_str(EXAMPLE).unwrap();
        for (section, keys) in said::KEYS {
            let shown = if section.is_empty() { &table } else { table[*section].as_table().unwrap() };
            for key in *keys {
                assert!(shown.contains_key(*key), "the example lacks {section}.{key}");
            }
        }
    }

    #[test]
    fn every_said_value_counts() {
        let config = parse(
            "root = '/r'\nrun = '/n'\nlog_level = 'debug'\n[registry]\ndocker_config = '/d'\ncerts_d = []\nconnect_timeout = '1s'\n\
             response_timeout = '2s'\nidle_timeout = '3s'\ndeadline = '4m'\nrounds = 6\n[credentials]\ncri_proxy = true\nkubeconfig = '/k'\nnamespaces = ['a', 'b-1']\n[fetch]\nmemory = '7MiB'\n\
             connections = 8\ndeadline = '9ms'\nread_ahead = '10kB'\n[fill]\n\
             enabled = false\nstart_delay = '13s'\nbandwidth = '14MB'\nconnections = 15\n[store]\nsync_interval = '11h'\nquota = '16GiB'\n\
             reserve = '17kB'\n[daemon]\n\
             metrics_listen = '127.0.0.1:9'\nstop_timeout = '12s'\nkeep_mounts = false\nkeep_for = '19s'\n[containerd]\nenabled = false\nsocket = '/s'\n\
             address = '/a'\ncontent = '/b'\nversion = '2.4.0-beta.0'\nlazy = false\ntrust_labels = true\ndriver = 'fuse'\nxino = false\nfill = false\nprepare_timeout = '18s'\n\
             sync = true\n",
        )
        .unwrap();
        let expected = Config {
            root: "/r".into(),
            run: "/n".into(),
            log_level: LogLevel::Debug,
            registry: RegistryConfig {
                docker_config: "/d".into(),
                certs_d: vec![],
                connect_timeout: Duration::from_secs(1),
                response_timeout: Duration::from_secs(2),
                idle_timeout: Duration::from_secs(3),
                deadline: Duration::from_secs(240),
                rounds: 6,
            },
            credentials: CredentialSettings {
                cri_proxy: true,
                kubeconfig: Some("/k".into()),
                namespaces: vec!["a".to_owned(), "b-1".to_owned()],
            },
            fetch: FetchSettings {
                memory: 7 << 20,
                connections: 8,
                deadline: Duration::from_millis(9),
                read_ahead: 10_000,
            },
            fill: FillSettings {
                enabled: false,
                start_delay: Duration::from_secs(13),
                bandwidth: Some(14_000_000),
                connections: 15,
            },
            sync_interval: Duration::from_secs(11 * 3600),
            quota: Some(16 << 30),
            reserve: 17_000,
            daemon: DaemonSettings {
                metrics_listen: Some("127.0.0.1:9".parse().unwrap()),
                stop_timeout: Duration::from_secs(12),
                keep_mounts: false,
                keep_for: Duration::from_secs(19),
            },
            containerd: ContainerdSettings {
                enabled: false,
                socket: "/s".into(),
                address: "/a".into(),
                content: "/b".into(),
                version: Some(ContainerdVersion::new(2, 4)),
                lazy: false,
                trust_labels: true,
                driver: Wanted::Driver(crate::drivers::Driver::Fuse),
                xino: false,
                fill: false,
                prepare_timeout: Duration::from_secs(18),
                sync: true,
            },
        };
        assert_eq!(config, expected);
    }

    #[test]
    fn unknown_keys_are_told_with_the_nearest() {
        for (text, message) in [
            ("rot = '/r'", "there is no key \"rot\"; did you mean \"root\"?"),
            ("[fetch]\nmemroy = '1MiB'", "there is no key \"fetch.memroy\"; did you mean \"fetch.memory\"?"),
            ("connections = 3", "there is no key \"connections\"; did you mean \"fetch.connections\"?"),
            ("[registri]\nrounds = 3", "there is no key \"registri\"; did you mean \"registry\"?"),
            ("[store]\nzzzzzzzz = 3", "there is no key \"store.zzzzzzzz\""),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert_eq!(error, format!("cannot use the configuration c.toml: {message}"));
        }
    }

    #[test]
    fn values_that_make_no_sense_are_refused() {
        for text in [
            "root = 'relative'",
            "root = 5",
            "run = 'relative'",
            "[daemon]\nmetrics_listen = 'here'",
            "log_level = 'loud'",
            "[fetch]\nmemory = '1kB'",
            "[fetch]\nmemory = 5",
            "[fetch]\nconnections = 0",
            "[fill]\nconnections = 0",
            "[fetch]\ndeadline = '5'",
            "[fetch]\ndeadline = '5 s'",
            "[registry]\nrounds = 0",
            "[credentials]\nnamespaces = ['../x']",
            "[credentials]\nnamespaces = ['']",
            "[containerd]\nsocket = 'relative'",
            "[containerd]\naddress = 'relative'",
            "[containerd]\ncontent = 'relative'",
            "[containerd]\nversion = 'new'",
            "[containerd]\nversion = '2'",
            "[containerd]\ndriver = 'fast'",
            "fetch = 3",
            "[fetch",
        ] {
            assert!(parse(text).is_err(), "{text:?} was taken");
        }
    }

    #[test]
    fn the_user_decides_about_the_defaults() {
        let user = Surroundings { home: Some("/home/u".into()), ..Surroundings::default() };
        let config = Config::mean(Said::default(), Path::new("c"), &user).unwrap();
        assert_eq!(config.root, Path::new("/home/u/.local/share/headstart"));
        assert_eq!(config.registry.docker_config, Path::new("/home/u/.docker/config.json"));
        assert_eq!(config.run, Path::new("/home/u/.local/share/headstart/run"));
        assert!(!config.containerd.enabled);
        assert!(Config::parse("[containerd]\nenabled = true", Path::new("c"), &user).is_err());
        assert_eq!(user.config_file(), Path::new("/home/u/.config/headstart/config.toml"));
        let user = Surroundings {
            data_home: Some("/data".into()),
            config_home: Some("/config".into()),
            docker_config: Some("/docker".into()),
            runtime_dir: Some("/run/user/1".into()),
            ..user
        };
        let config = Config::mean(Said::default(), Path::new("c"), &user).unwrap();
        assert_eq!(config.root, Path::new("/data/headstart"));
        assert_eq!(config.registry.docker_config, Path::new("/docker/config.json"));
        assert_eq!(config.run, Path::new("/run/user/1/headstart"));
        assert_eq!(user.config_file(), Path::new("/config/headstart/config.toml"));
    }

    #[test]
    fn a_named_file_must_exist_and_the_usual_one_need_not() {
        let directory = tempfile::tempdir().unwrap();
        let user = Surroundings { home: Some(directory.path().to_owned()), ..Surroundings::default() };
        assert!(Config::load(None, &user).is_ok());
        assert!(matches!(Config::load(Some(&directory.path().join("no")), &user), Err(ConfigError::Read { .. })));
    }
}
