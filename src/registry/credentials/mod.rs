//! Who we are at a registry: the sources of credentials, in the order in which they are asked.
//!
//! | source | file |
//! |---|---|
//! | what is given outright; then nobody else is asked | here |
//! | Docker's `config.json` and its helpers | `docker` |
//! | what a kubelet pulls with, seen on its way to containerd | `pulled` |
//! | secrets of a Kubernetes cluster | `cluster` |
//!
//! The first that knows something is used first. What a server refuses is not shown to it again for the same request: the
//! sources are read anew, and the next that they know is tried. So a renewed login counts at once, and a stale one does not
//! hide a good one.
//!
//! Guarantees: nothing is kept on disk; no error, log line or `Debug` holds what a source said.

mod cluster;
mod docker;
mod pulled;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

pub use cluster::{ClusterError, ClusterSecrets};
pub use pulled::{PullLogin, PulledLogins, Pulling};

use super::secret::Secret;
use crate::oci::DEFAULT_HOST;

/// Most credentials that are tried at one server for one request. More than this many secrets for one repository are a
/// mistake, and each costs a request.
pub(super) const MAX_CANDIDATES: usize = 8;

/// Why credentials could not be had. That there are none is no error.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// The file could not be read.
    #[error("cannot read the credentials file {}", .path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not what Docker writes. The parser's message could quote it and is left out.
    #[error("cannot understand the credentials file {} (line {line})", .path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// Where.
        line: usize,
    },
    /// An entry's `auth` is not the Base64 of `user:password`.
    #[error("the entry of {host} in {} is not the Base64 of user:password; log in again", .path.display())]
    Auth {
        /// Which file.
        path: PathBuf,
        /// Which entry.
        host: String,
    },
    /// A helper's name could leave the search path.
    #[error("{0:?} is no name of a credential helper")]
    HelperName(String),
    /// A helper could not be started.
    #[error("cannot run the credential helper {program}")]
    HelperStart {
        /// Its program.
        program: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A helper failed.
    #[error("the credential helper {program} failed ({status}); try: echo {server} | {program} get")]
    HelperFailed {
        /// Its program.
        program: String,
        /// What it was asked for.
        server: String,
        /// How it ended.
        status: std::process::ExitStatus,
    },
    /// A helper did not end in time.
    #[error("the credential helper {program} did not answer within {} s", .limit.as_secs())]
    HelperTimeout {
        /// Its program.
        program: String,
        /// The time it had.
        limit: Duration,
    },
    /// A helper's answer is not JSON of the agreed form.
    #[error("cannot understand the answer of the credential helper {0}")]
    HelperAnswer(String),
}

/// How we prove who we are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credentials {
    /// User and password.
    Basic {
        /// Name of the user.
        username: String,
        /// The password, or a token in its place.
        password: Secret,
    },
    /// An OAuth2 refresh token.
    IdentityToken(Secret),
    /// A bearer token that is used as it is.
    RegistryToken(Secret),
}

/// Where credentials come from.
#[derive(Debug, Clone, Default)]
pub struct CredentialConfig {
    /// Given outright, by host; for such a host nothing else counts.
    pub given: BTreeMap<String, Credentials>,
    /// Docker's `config.json`, or a file of the same form; a missing file is an empty one.
    pub docker_config: Option<PathBuf>,
    /// Where helper programs are looked for before the search path.
    pub helper_directory: Option<PathBuf>,
    /// How long a helper may take; `None` is 20 s.
    pub helper_timeout: Option<Duration>,
    /// What was seen of pulls that somebody else asked for.
    pub pulled: Option<Arc<PulledLogins>>,
    /// Secrets of a cluster.
    pub cluster: Option<Arc<ClusterSecrets>>,
}

impl CredentialConfig {
    /// All credentials for `repository` at `host` that the sources know now, the best first, none twice. A source that
    /// fails is an error only if no other one knows anything.
    pub(super) async fn find(&self, host: &str, repository: &str) -> Result<Vec<Credentials>, CredentialError> {
        if let Some(given) = self.given.get(host) {
            return Ok(vec![given.clone()]);
        }
        let mut known = Vec::new();
        let failed = match self.ask_docker(host, repository).await {
            Ok(found) => {
                known.extend(found);
                None
            }
            Err(error) => Some(error),
        };
        if let Some(pulled) = &self.pulled {
            known.extend(pulled.find(host, repository));
        }
        if let Some(cluster) = &self.cluster {
            known.extend(cluster.find(host, repository).await);
        }
        let mut found: Vec<Credentials> = Vec::new();
        for credentials in known {
            if found.len() < MAX_CANDIDATES && !found.contains(&credentials) {
                found.push(credentials);
            }
        }
        match failed {
            Some(error) if found.is_empty() => Err(error),
            Some(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(host, error, "a source of credentials failed, another one is used");
                Ok(found)
            }
            None => Ok(found),
        }
    }
}

/// True for the names of Docker's registry.
fn is_docker(host: &str) -> bool {
    matches!(host, DEFAULT_HOST | "index.docker.io" | "registry-1.docker.io")
}

/// True if both name the same registry.
fn same_host(one: &str, other: &str) -> bool {
    one.eq_ignore_ascii_case(other) || (is_docker(one) && is_docker(other))
}

/// An address as logins name it: host and path, without scheme, without a slash at the end, without the version of an API.
fn place(address: &str) -> (&str, &str) {
    let bare = address.split_once("://").map_or(address, |(_, rest)| rest).trim_end_matches('/');
    match bare.split_once('/') {
        Some((host, "v1" | "v2")) => (host, ""),
        Some((host, scope)) => (host, scope),
        None => (bare, ""),
    }
}
