//! The one place that decides whether trying again helps, and how long to wait before.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::time::Duration;

use super::error::{Attempts, RegistryError, TryError};

/// What to do after a failed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The same server may do it later, at the earliest after the time it named.
    Again(Option<Duration>),
    /// This server will not; another one may.
    Elsewhere,
}

/// Transient or fatal.
pub(super) fn judge(error: &TryError) -> Verdict {
    match error {
        TryError::Connect(_)
        | TryError::Broken(_)
        | TryError::Timeout { .. }
        | TryError::Cut { .. }
        | TryError::Trickle { .. } => Verdict::Again(None),
        TryError::Status { status, retry_after, .. } => match status {
            408 | 425 | 429 | 500 | 502 | 503 | 504 => Verdict::Again(*retry_after),
            _ => Verdict::Elsewhere,
        },
        TryError::Token { source, .. } => judge(source),
        TryError::Tls(_)
        | TryError::Denied(_)
        | TryError::Credentials(_)
        | TryError::Redirect(_)
        | TryError::Range { .. }
        | TryError::TooLarge(_)
        | TryError::Header(_)
        | TryError::Document(_)
        | TryError::Json { .. }
        | TryError::Setup(_)
        | TryError::File(_) => Verdict::Elsewhere,
    }
}

/// True if the same undertaking may succeed later.
pub fn is_transient(error: &RegistryError) -> bool {
    match error {
        RegistryError::Failed { attempts, .. } => may_succeed_later(attempts),
        RegistryError::NotFound { .. }
        | RegistryError::NoServer { .. }
        | RegistryError::Hosts(_)
        | RegistryError::Document(_) => false,
    }
}

/// True if one of the attempts may succeed later.
pub(super) fn may_succeed_later(attempts: &Attempts) -> bool {
    attempts.iter().any(|attempt| matches!(judge(&attempt.error), Verdict::Again(_)))
}

/// Tells a failed connection's kinds apart.
pub(super) fn classify(error: reqwest::Error) -> TryError {
    let error = std::sync::Arc::new(error.without_url());
    if has_tls_cause(&*error) {
        TryError::Tls(error)
    } else if error.is_connect() {
        TryError::Connect(error)
    } else {
        TryError::Broken(error)
    }
}

fn has_tls_cause(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.is::<rustls::Error>() {
            return true;
        }
        // An I/O error's source skips the error it wraps.
        let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        if wrapped.is_some_and(|inner| inner.is::<rustls::Error>() || has_tls_cause(inner)) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// How patient a client is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Patience {
    /// Time for a connection to be made.
    pub connect: Duration,
    /// Time from the end of a request to the beginning of its answer.
    pub response: Duration,
    /// The longest silence inside a body; each such span must bring [`MIN_PROGRESS`](super::MIN_PROGRESS) bytes or the end.
    pub idle: Duration,
    /// No new try begins later than this after the first.
    pub deadline: Duration,
    /// How often each server is tried.
    pub rounds: u32,
    /// The wait before the second round, doubled for each later one; the actual wait is a random part of it.
    pub backoff: Duration,
    /// The longest wait that is not the server's own wish.
    pub backoff_limit: Duration,
}

impl Default for Patience {
    /// Values chosen for a program that somebody waits for: a registry that is down is reported within seconds, one
    /// that asks for patience is given up to the deadline.
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            response: Duration::from_secs(30),
            idle: Duration::from_secs(30),
            deadline: Duration::from_secs(90),
            rounds: 5,
            backoff: Duration::from_millis(200),
            backoff_limit: Duration::from_secs(5),
        }
    }
}

impl Patience {
    /// How long to wait after round `round` (from 0), in which servers asked for at least `asked`.
    pub(super) fn wait(&self, round: u32, asked: Option<Duration>) -> Duration {
        let full = self.backoff.saturating_mul(1 << round.min(16)).min(self.backoff_limit);
        let jittered = full.mul_f64(0.5 + random_part() / 2.0);
        asked.map_or(jittered, |asked| asked.max(jittered))
    }
}

/// A number from 0 to 1 that differs each time. The keys of the standard library's hash tables are random enough to
/// keep clients out of step, which is all that is needed here.
fn random_part() -> f64 {
    let drawn = u32::try_from(RandomState::new().build_hasher().finish() >> 32).unwrap_or(0);
    f64::from(drawn) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_are_judged() {
        let after = Some(Duration::from_secs(7));
        for (status, expected) in [
            (429, Verdict::Again(after)),
            (503, Verdict::Again(after)),
            (500, Verdict::Again(after)),
            (408, Verdict::Again(after)),
            (400, Verdict::Elsewhere),
            (401, Verdict::Elsewhere),
            (403, Verdict::Elsewhere),
            (404, Verdict::Elsewhere),
            (416, Verdict::Elsewhere),
            (501, Verdict::Elsewhere),
        ] {
            let error = TryError::Status { status, message: String::new(), retry_after: after };
            assert_eq!(judge(&error), expected, "{status}");
            let realm = super::super::SafeUrl::from(&url::Url::parse("http://x/").unwrap());
            assert_eq!(judge(&TryError::Token { realm, source: Box::new(error) }), expected, "{status} of a token");
        }
    }

    #[test]
    fn waits_grow_are_jittered_and_respect_the_server() {
        let patience = Patience::default();
        for round in 0..40 {
            let full = Duration::from_millis(200).saturating_mul(1 << round.min(10)).min(Duration::from_secs(5));
            let wait = patience.wait(round, None);
            assert!(wait >= full / 2 && wait <= full, "{wait:?} in round {round}");
        }
        assert_eq!(patience.wait(0, Some(Duration::from_secs(9))), Duration::from_secs(9));
        let different: std::collections::HashSet<Duration> = (0..20).map(|_| patience.wait(3, None)).collect();
        assert!(different.len() > 10, "no jitter: {different:?}");
    }
}
