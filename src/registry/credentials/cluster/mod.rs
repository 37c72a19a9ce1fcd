//! Secrets of a Kubernetes cluster as a source of credentials: those of type `kubernetes.io/dockerconfigjson` that a
//! kubeconfig may list and watch, of all namespaces or of some.
//!
//! [`ClusterSecrets::follow`] lists them, and then watches. When the server goes away it is asked again, with waits that
//! grow and differ between nodes, and everything is listed anew: what was known counts until then.
//!
//! Guarantees: memory is bounded ([`MOST`] secrets of [`LARGEST`] bytes); only what a lookup needs is kept, and none of it
//! is shown. Refuses to know pods: whatever names a registry is tried there.

mod api;
mod kubeconfig;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use futures::future::join_all;
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Credentials;
use super::docker::{Entry, fit};
use crate::registry::error::TryError;
use crate::registry::retry::Patience;
use api::{Api, Event, SecretObject, Version};
use kubeconfig::Server;

/// Most secrets that are kept. With [`LARGEST`] this is 64 MiB in the worst case; a real secret has some 200 bytes.
const MOST: usize = 4096;
/// Largest `config.json` in a secret that is looked at; more than a hundred logins fit.
const LARGEST: usize = 16 << 10;
/// How long a lookup waits for the first list, if somebody is getting it.
const FIRST_LIST: Duration = Duration::from_secs(3);
/// A watch that ends sooner than this is begun again with a wait.
const SHORT_WATCH: Duration = Duration::from_secs(5);

/// Why the secrets of a cluster are not known.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// A file could not be read.
    #[error("cannot read {}", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The kubeconfig is none. The parser's message could quote it and is left out.
    #[error("cannot understand the kubeconfig {} (line {line})", .path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// Where; 0 if the parser does not say.
        line: usize,
    },
    /// The kubeconfig cannot be used.
    #[error("cannot use the kubeconfig {}: {what}", .path.display())]
    Unusable {
        /// Which.
        path: PathBuf,
        /// Why.
        what: String,
    },
    /// A token with characters that no header can have.
    #[error("the token for the API server is no token")]
    Token,
    /// A request to the API server failed.
    #[error("cannot list or watch the secrets of {server} (its role needs both verbs on secrets)")]
    Ask {
        /// Which.
        server: String,
        /// Why.
        #[source]
        source: TryError,
    },
    /// A watch broke.
    #[error("the watch on secrets ended early")]
    Watch(#[source] TryError),
    /// The server does not remember what we have seen; listing anew helps.
    #[error("the API server has forgotten the version that was seen last")]
    Expired,
    /// The server ended the watch with a status.
    #[error("the API server ended the watch with status {0}")]
    Told(u16),
    /// An answer of another form.
    #[error("cannot understand the API server's answer")]
    Answer,
    /// An event or list beyond all bounds.
    #[error("the API server sends more than any secret can have")]
    Large,
}

/// Namespace and name.
type Name = (String, String);

/// One secret.
#[derive(Deserialize, Default)]
struct Config {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

/// How far the secrets of one namespace are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Nobody follows them.
    Idle,
    /// They are being listed for the first time.
    Listing,
    /// They are known, or could not be had for once.
    Known,
}

/// The secrets of a cluster.
pub struct ClusterSecrets {
    kubeconfig: PathBuf,
    /// None is all.
    namespaces: Vec<Option<String>>,
    secrets: Mutex<BTreeMap<Name, Config>>,
    phase: watch::Sender<Vec<Phase>>,
}

impl fmt::Debug for ClusterSecrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterSecrets")
            .field("kubeconfig", &self.kubeconfig)
            .field("namespaces", &self.namespaces)
            .field("secrets", &self.secrets().len())
            .finish_non_exhaustive()
    }
}

impl ClusterSecrets {
    /// The secrets that `kubeconfig` may see in `namespaces`, or in all if none is named. Nothing is asked before
    /// [`ClusterSecrets::follow`].
    pub fn new(kubeconfig: PathBuf, namespaces: &[String]) -> Self {
        let namespaces: Vec<Option<String>> = match namespaces {
            [] => vec![None],
            some => some.iter().cloned().map(Some).collect(),
        };
        let phase = watch::Sender::new(vec![Phase::Idle; namespaces.len()]);
        Self { kubeconfig, namespaces, secrets: Mutex::default(), phase }
    }

    fn secrets(&self) -> MutexGuard<'_, BTreeMap<Name, Config>> {
        self.secrets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many secrets are known.
    pub fn count(&self) -> usize {
        self.secrets().len()
    }

    /// Keeps up with the cluster for as long as it is polled.
    pub async fn follow(&self) {
        self.phase.send_replace(vec![Phase::Listing; self.namespaces.len()]);
        join_all((0..self.namespaces.len()).map(|number| self.follow_one(number))).await;
    }

    async fn follow_one(&self, number: usize) {
        let backoff = Patience {
            backoff: Duration::from_millis(500),
            backoff_limit: Duration::from_secs(30),
            ..Patience::default()
        };
        let mut failures = 0_u32;
        let mut complained = String::new();
        loop {
            let began = Instant::now();
            let listed = &mut false;
            let Err(error) = self.list_and_watch(number, listed).await;
            // Nobody waits for a server that is away.
            self.set_phase(number, Phase::Known);
            failures = if *listed && began.elapsed() > SHORT_WATCH { 0 } else { failures.saturating_add(1) };
            let text = error.to_string();
            if *listed || text != complained {
                let error: &dyn std::error::Error = &error;
                match error.downcast_ref() {
                    // What servers do every few minutes, or when they are restarted.
                    Some(ClusterError::Expired | ClusterError::Watch(_)) => {
                        tracing::debug!(error, "the secrets of the cluster are listed again");
                    }
                    _ => tracing::warn!(error, "the secrets of the cluster are not up to date"),
                }
                complained = text;
            }
            tokio::time::sleep(backoff.wait(failures.saturating_sub(1), None)).await;
        }
    }

    fn set_phase(&self, number: usize, to: Phase) {
        self.phase.send_modify(|phases| {
            if let Some(phase) = phases.get_mut(number) {
                *phase = to;
            }
        });
    }

    async fn list_and_watch(&self, number: usize, listed: &mut bool) -> Result<std::convert::Infallible, ClusterError> {
        let path = self.kubeconfig.clone();
        let server = match tokio::task::spawn_blocking(move || Server::open(&path)).await {
            Ok(server) => server?,
            Err(broken) => std::panic::resume_unwind(broken.into_panic()),
        };
        let namespace = self.namespaces.get(number).and_then(Option::as_deref);
        let api = Api { server: &server, namespace };
        let mut version = self.list(&api).await?;
        *listed = true;
        self.set_phase(number, Phase::Known);
        loop {
            let began = Instant::now();
            let mut watch = api.watch(&version).await?;
            while let Some(event) = watch.next(&mut version).await? {
                match event {
                    Event::Put(secret) => self.put(&secret),
                    Event::Gone(secret) => drop(self.secrets().remove(&name(&secret))),
                    Event::Nothing => {}
                }
            }
            if began.elapsed() < SHORT_WATCH {
                tokio::time::sleep(Patience::default().wait(2, None)).await;
            }
        }
    }

    /// Replaces what is known by what the server has.
    async fn list(&self, api: &Api<'_>) -> Result<Version, ClusterError> {
        let mut found = BTreeMap::new();
        let mut after = String::new();
        for _ in 0..api::MOST_PAGES {
            let (page, next, version) = api.page(&after).await?;
            for secret in &page.items {
                if let Some(config) = config_of(secret)
                    && found.len() < MOST
                {
                    found.insert(name(secret), config);
                }
            }
            match next {
                Some(next) => after = next,
                None => {
                    if found.len() == MOST {
                        tracing::warn!(most = MOST, "the cluster has more registry secrets than are kept");
                    }
                    let mut secrets = self.secrets();
                    let ours = |of: &Name| api.namespace.is_none_or(|namespace| of.0 == namespace);
                    secrets.retain(|of, _| !ours(of));
                    secrets.extend(found);
                    return Ok(version);
                }
            }
        }
        Err(ClusterError::Large)
    }

    fn put(&self, secret: &SecretObject) {
        let mut secrets = self.secrets();
        let name = name(secret);
        match config_of(secret) {
            Some(config) if secrets.len() < MOST || secrets.contains_key(&name) => {
                secrets.insert(name, config);
            }
            _ => drop(secrets.remove(&name)),
        }
    }

    /// What the secrets have for `repository` at `host`, what names it best first.
    pub(super) async fn find(&self, host: &str, repository: &str) -> Vec<Credentials> {
        let mut phase = self.phase.subscribe();
        let known = phase.wait_for(|phases| !phases.contains(&Phase::Listing));
        // A sender that is gone cannot be: it is ours.
        tokio::time::timeout(FIRST_LIST, known).await.ok();
        let secrets = self.secrets();
        let mut found: Vec<(usize, Credentials)> = Vec::new();
        for config in secrets.values() {
            for (key, entry) in &config.auths {
                let fits = fit(key, host, repository).or_else(|| fit_pattern(key, host));
                if let Some(length) = fits
                    && let Ok(Some(credentials)) = entry.credentials()
                {
                    found.push((length, credentials));
                }
            }
        }
        // Stable: of those that fit alike the order of the names counts, on every node the same.
        found.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
        found.into_iter().map(|(_, credentials)| credentials).collect()
    }
}

fn name(secret: &SecretObject) -> Name {
    (secret.metadata.namespace.clone(), secret.metadata.name.clone())
}

/// What of a secret is kept; none if it is of no use.
fn config_of(secret: &SecretObject) -> Option<Config> {
    let text = secret.config().filter(|text| text.len() <= LARGEST.saturating_mul(4) / 3)?;
    let json = base64::engine::general_purpose::STANDARD.decode(text.trim()).ok()?;
    serde_json::from_slice(&json).ok().filter(|config: &Config| !config.auths.is_empty())
}

/// The kubelet's patterns: `*` stands for a part of a host's name, as in `*.registry.example`. Worse than any other fit.
fn fit_pattern(key: &str, host: &str) -> Option<usize> {
    let (pattern, scope) = super::place(key);
    let mut host = host.split('.');
    let mut parts = pattern.split('.');
    loop {
        match (parts.next(), host.next()) {
            (None, None) => return (pattern.contains('*') && scope.is_empty()).then_some(0),
            (Some("*"), Some(_)) => {}
            (Some(part), Some(name)) if part.eq_ignore_ascii_case(name) => {}
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_those_of_the_kubelet() {
        for (key, host, fits) in [
            ("*.r.example", "a.r.example", true),
            ("https://*.r.example/v2/", "a.r.example", true),
            ("*.*.example", "a.r.example", true),
            ("*.r.example", "r.example", false),
            ("*.r.example", "b.a.r.example", false),
            ("*.r.example:5000", "a.r.example", false),
            ("*.r.example/team", "a.r.example", false),
            ("r.example", "r.example", false),
            ("*", "example", true),
        ] {
            assert_eq!(fit_pattern(key, host).is_some(), fits, "{key} for {host}");
        }
    }
}
