//! What can go wrong between this program and a registry. Whether trying again helps is decided in `retry`.
//!
//! A [`TryError`] is about one request to one server, a [`RegistryError`] about the whole undertaking and tells every
//! server that was tried. Neither shows a password, a token, or the query of an address.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::credentials::CredentialError;
use super::hosts::HostsError;
use super::secret::SafeUrl;
use crate::model::ByteRange;
use crate::oci::DocumentError;

/// Why one request to one server failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TryError {
    /// No connection.
    #[error("cannot connect")]
    Connect(#[source] Arc<reqwest::Error>),
    /// A connection, but no trust.
    #[error(
        "cannot agree on TLS (a server with an own authority or plain HTTP is described in certs.d/HOST/hosts.toml)"
    )]
    Tls(#[source] Arc<reqwest::Error>),
    /// The connection broke before the answer began.
    #[error("the connection broke before an answer came")]
    Broken(#[source] Arc<reqwest::Error>),
    /// Something took too long.
    #[error("{what} took longer than {} ms", .limit.as_millis())]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long.
        limit: Duration,
    },
    /// The answer's body ended or broke early.
    #[error("the answer was cut after {received} of {expected} bytes")]
    Cut {
        /// Bytes that came.
        received: u64,
        /// Bytes that should have come.
        expected: u64,
        /// How it broke; none if it simply ended.
        #[source]
        source: Option<Arc<reqwest::Error>>,
    },
    /// The body comes too slowly to be of use.
    #[error("only {received} bytes came within {} ms", .window.as_millis())]
    Trickle {
        /// Bytes that came.
        received: u64,
        /// The time they took.
        window: Duration,
    },
    /// The server said no.
    #[error("the server answered {status}{}{message}", if .message.is_empty() { "" } else { ": " })]
    Status {
        /// The status code.
        status: u16,
        /// The server's own words, made printable.
        message: String,
        /// When to come back.
        retry_after: Option<Duration>,
    },
    /// We are not who we have to be.
    #[error("access was denied: {0}")]
    Denied(&'static str),
    /// The token server failed us.
    #[error("cannot get a token from {realm}")]
    Token {
        /// Which.
        realm: SafeUrl,
        /// Why.
        #[source]
        source: Box<TryError>,
    },
    /// The credentials could not be had.
    #[error("cannot get credentials")]
    Credentials(#[source] Arc<CredentialError>),
    /// A redirect that is not followed.
    #[error("the server redirects {0}")]
    Redirect(String),
    /// Another range than the one asked for.
    #[error("the server was asked for bytes {asked} and answered {answer:?}")]
    Range {
        /// What was asked for.
        asked: ByteRange,
        /// Its `Content-Range`, or what stood in its place.
        answer: String,
    },
    /// More than any document may have.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(u64),
    /// A header that has to be there is missing or unusable.
    #[error("the answer's header {0} is missing or makes no sense")]
    Header(&'static str),
    /// The bytes are not those that were asked for, or no document.
    #[error("the answer is not what was asked for")]
    Document(#[source] Arc<DocumentError>),
    /// The answer is no JSON of the agreed form.
    #[error("cannot understand the answer (line {line}, column {column})")]
    Json {
        /// Where.
        line: usize,
        /// Where in the line.
        column: usize,
    },
    /// The server could not be spoken to at all, for reasons on our side.
    #[error(transparent)]
    Setup(Arc<HostsError>),
    /// The file that is pushed could not be read.
    #[error("cannot read the file that is sent")]
    File(#[source] Arc<std::io::Error>),
}

/// One server that was tried, and how that ended.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// The server: scheme, host, port.
    pub server: String,
    /// How often in a row it ended like this.
    pub times: u32,
    /// How it ended.
    pub error: TryError,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.server, self.error)?;
        let mut cause = std::error::Error::source(&self.error);
        let mut last = self.error.to_string();
        while let Some(error) = cause {
            let text = error.to_string();
            // Layers of HTTP libraries repeat each other.
            if text != last {
                write!(f, ": {text}")?;
            }
            last = text;
            cause = error.source();
        }
        if self.times > 1 { write!(f, " ({} times)", self.times) } else { Ok(()) }
    }
}

/// The attempts in the order of their first occurrence.
#[derive(Debug, Clone, Default)]
pub struct Attempts(Vec<Attempt>);

impl Attempts {
    /// Notes one more.
    pub(super) fn push(&mut self, server: &str, error: TryError) {
        let text = error.to_string();
        match self.0.iter_mut().find(|known| known.server == server && known.error.to_string() == text) {
            Some(known) => {
                known.times = known.times.saturating_add(1);
                known.error = error;
            }
            None => self.0.push(Attempt { server: server.to_owned(), times: 1, error }),
        }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Attempt> {
        self.0.iter()
    }
}

impl fmt::Display for Attempts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, attempt) in self.0.iter().enumerate() {
            let comma = if place == 0 { "" } else { "; " };
            write!(f, "{comma}{attempt}")?;
        }
        Ok(())
    }
}

/// Why something could not be had from or brought to a registry.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Every server failed.
    #[error("cannot {action} {object}: {attempts}")]
    Failed {
        /// What was attempted.
        action: &'static str,
        /// On what.
        object: String,
        /// Where, and what came of it.
        attempts: Attempts,
    },
    /// The image is not there: all servers that answered say so.
    #[error("cannot {action} {object}: there is no such image or blob ({attempts})")]
    NotFound {
        /// What was attempted.
        action: &'static str,
        /// On what.
        object: String,
        /// Where, and what came of it.
        attempts: Attempts,
    },
    /// Nobody may be asked.
    #[error("cannot {action} {object}: certs.d allows no server of {registry} to do that")]
    NoServer {
        /// What was attempted.
        action: &'static str,
        /// On what.
        object: String,
        /// The registry.
        registry: String,
    },
    /// The registry's servers are not known.
    #[error(transparent)]
    Hosts(#[from] HostsError),
    /// A document is announced too large.
    #[error(transparent)]
    Document(#[from] DocumentError),
}
