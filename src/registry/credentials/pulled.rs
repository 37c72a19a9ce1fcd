//! What somebody else pulls images with: a kubelet tells containerd with each pull, and whoever stands between the two can
//! remember it (see the `grpc` room).
//!
//! Guarantees: it is in memory alone and ends with the process; it counts from the moment a pull begins, is forgotten when
//! the pull fails or the image is removed, and goes to the registry of the image alone, or to the server that the login
//! itself names. The oldest are forgotten beyond [`MOST`].

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::docker::user_and_password;
use super::{Credentials, place, same_host};
use crate::oci::ImageName;
use crate::registry::secret::Secret;

/// Most pulls that are remembered: the images of a large node several times over.
const MOST: usize = 1024;
/// Longest part of a login; tokens of cloud registries have some kilobytes.
const LONGEST: usize = 64 << 10;

/// A login as CRI says it (`runtime.v1.AuthConfig`).
#[derive(Debug, Clone, Default)]
pub struct PullLogin {
    /// User.
    pub username: String,
    /// Password.
    pub password: Secret,
    /// Base64 of `user:password`.
    pub auth: Secret,
    /// The server it is for; empty is that of the image.
    pub server_address: String,
    /// OAuth2 refresh token.
    pub identity_token: Secret,
    /// Bearer token.
    pub registry_token: Secret,
}

impl PullLogin {
    /// As registries are told, in containerd's order; none if nothing of use is in it.
    fn credentials(&self) -> Option<Credentials> {
        let parts = [&self.password, &self.auth, &self.identity_token, &self.registry_token];
        let lengths = parts.iter().map(|part| part.expose().len()).chain([self.username.len()]);
        if lengths.into_iter().any(|length| length > LONGEST) {
            return None;
        }
        let filled = |secret: &Secret| (!secret.expose().is_empty()).then(|| secret.clone());
        if !self.username.is_empty() {
            return Some(Credentials::Basic { username: self.username.clone(), password: self.password.clone() });
        }
        if let Some(token) = filled(&self.identity_token) {
            return Some(Credentials::IdentityToken(token));
        }
        if let Some(auth) = filled(&self.auth) {
            let (username, password) = user_and_password(auth.expose()).ok()?;
            return Some(Credentials::Basic { username, password });
        }
        filled(&self.registry_token).map(Credentials::RegistryToken)
    }
}

/// What is remembered of pulls.
#[derive(Default)]
pub struct PulledLogins(Mutex<Table>);

#[derive(Default)]
struct Table {
    next: u64,
    /// The latest last.
    pulls: Vec<Pull>,
}

struct Pull {
    number: u64,
    /// The server that may see it.
    host: String,
    repository: String,
    /// In full.
    reference: String,
    /// As CRI names the image, when it is here.
    id: Option<String>,
    credentials: Credentials,
}

impl fmt::Debug for PulledLogins {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PulledLogins").field("pulls", &self.table().pulls.len()).finish_non_exhaustive()
    }
}

/// A pull under way. Dropped without [`Pulling::done`] it has failed, and what it logged in with is forgotten.
#[derive(Debug)]
pub struct Pulling {
    logins: Arc<PulledLogins>,
    number: u64,
}

impl PulledLogins {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note that `image` is being pulled with `login`; nothing if one of them is of no use.
    pub fn pulling(self: &Arc<Self>, image: &str, login: &PullLogin) -> Option<Pulling> {
        let name: ImageName = image.parse().ok()?;
        let credentials = login.credentials()?;
        let (server, _) = place(&login.server_address);
        let host = if server.is_empty() { name.host() } else { server };
        let mut table = self.table();
        let number = table.next;
        table.next += 1;
        if table.pulls.len() >= MOST {
            table.pulls.remove(0);
        }
        table.pulls.push(Pull {
            number,
            host: host.to_owned(),
            repository: name.repository().to_owned(),
            reference: name.to_string(),
            id: None,
            credentials,
        });
        Some(Pulling { logins: Arc::clone(self), number })
    }

    /// Forgets what the image `image` was pulled with, by reference or by the number that CRI gave it.
    pub fn forget(&self, image: &str) {
        let reference = image.parse::<ImageName>().ok().map(|name| name.to_string());
        let is_it = |pull: &Pull| pull.id.as_deref() == Some(image) || Some(&pull.reference) == reference.as_ref();
        // A pull under way that begins anew what is being removed stays.
        self.table().pulls.retain(|pull| pull.id.is_none() || !is_it(pull));
    }

    /// What was used for `repository` at `host`, the latest first.
    pub(super) fn find(&self, host: &str, repository: &str) -> Vec<Credentials> {
        let table = self.table();
        let fits = |pull: &&Pull| same_host(&pull.host, host) && pull.repository == repository;
        table.pulls.iter().rev().filter(fits).map(|pull| pull.credentials.clone()).collect()
    }
}

impl Pulling {
    /// The image is here, and is called `id` from now on. What it was pulled with before is forgotten.
    pub fn done(self, id: &str) {
        let mut table = self.logins.table();
        let Some(at) = table.pulls.iter().position(|pull| pull.number == self.number) else { return };
        let reference = table.pulls.get(at).map(|pull| pull.reference.clone()).unwrap_or_default();
        table.pulls.retain(|pull| pull.number == self.number || pull.id.is_none() || pull.reference != reference);
        for pull in table.pulls.iter_mut().filter(|pull| pull.number == self.number) {
            pull.id = Some(id.to_owned());
        }
    }
}

impl Drop for Pulling {
    fn drop(&mut self) {
        self.logins.table().pulls.retain(|pull| pull.number != self.number || pull.id.is_some());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn login() -> PullLogin {
        PullLogin { username: "me".to_owned(), password: Secret::new("hunter2"), ..PullLogin::default() }
    }

    fn basic(username: &str, password: &str) -> Credentials {
        Credentials::Basic { username: username.to_owned(), password: Secret::new(password) }
    }

    #[test]
    fn every_form_of_a_login_is_understood_in_containerds_order() {
        let secret = Secret::new;
        let all = PullLogin {
            auth: secret("bTE6cDE="),
            identity_token: secret("id"),
            registry_token: secret("reg"),
            ..login()
        };
        for (case, login, expected) in [
            ("nothing", PullLogin::default(), None),
            ("user", login(), Some(basic("me", "hunter2"))),
            ("all", all.clone(), Some(basic("me", "hunter2"))),
            (
                "no user",
                PullLogin { username: String::new(), ..all.clone() },
                Some(Credentials::IdentityToken(secret("id"))),
            ),
            ("auth", PullLogin { auth: secret("bTE6cDE="), ..PullLogin::default() }, Some(basic("m1", "p1"))),
            ("padded", PullLogin { auth: secret("bTE6cDEAAA=="), ..PullLogin::default() }, Some(basic("m1", "p1"))),
            ("no Base64", PullLogin { auth: secret("%"), ..PullLogin::default() }, None),
            (
                "bearer",
                PullLogin { registry_token: secret("reg"), ..PullLogin::default() },
                Some(Credentials::RegistryToken(secret("reg"))),
            ),
            ("huge", PullLogin { password: Secret::new("x".repeat(LONGEST + 1)), ..login() }, None),
        ] {
            assert_eq!(login.credentials(), expected, "{case}");
        }
    }

    #[test]
    fn a_login_goes_to_its_server_and_repository_alone() {
        let at = |address: &str| PullLogin { server_address: address.to_owned(), ..login() };
        for (image, address, host, repository, found) in [
            ("r.example/a/b:1", "", "r.example", "a/b", true),
            ("r.example/a/b:1", "", "r.example", "a", false),
            ("r.example/a/b:1", "", "mirror.example", "a/b", false),
            ("r.example/a/b:1", "https://r.example", "r.example", "a/b", true),
            ("r.example/a/b:1", "r.example", "r.example", "a/b", true),
            ("r.example/a/b:1", "https://R.example/v2/", "r.example", "a/b", true),
            ("r.example/a/b:1", "other.example", "r.example", "a/b", false),
            ("r.example/a/b:1", "r.example:5000", "r.example", "a/b", false),
            ("r.example/a/b:1", "https://mirror.example", "mirror.example", "a/b", true),
            ("busybox", "", "docker.io", "library/busybox", true),
            ("busybox", "https://index.docker.io/v1/", "registry-1.docker.io", "library/busybox", true),
        ] {
            let logins = Arc::new(PulledLogins::default());
            let _pull = logins.pulling(image, &at(address));
            assert_eq!(!logins.find(host, repository).is_empty(), found, "{image} {address} at {host}/{repository}");
        }
        assert!(Arc::new(PulledLogins::default()).pulling("no reference!", &login()).is_none());
    }

    #[test]
    fn what_failed_or_was_removed_is_forgotten() {
        let logins = Arc::new(PulledLogins::default());
        let known = || logins.find("r.example", "a").len();
        drop(logins.pulling("r.example/a:1", &login()));
        assert_eq!(known(), 0);
        for by in ["r.example/a:1", "sha256:1", "r.example/a:2"] {
            logins.pulling("r.example/a:1", &login()).unwrap().done("sha256:1");
            assert_eq!(known(), 1);
            logins.forget(by);
            assert_eq!(known(), usize::from(by == "r.example/a:2"), "removed as {by}");
        }
        let again = logins.pulling("r.example/a:1", &PullLogin { username: "you".to_owned(), ..login() }).unwrap();
        assert_eq!(logins.find("r.example", "a"), [basic("you", "hunter2"), basic("me", "hunter2")]);
        again.done("sha256:2");
        assert_eq!(logins.find("r.example", "a"), [basic("you", "hunter2")]);
        for number in 0..2 * MOST {
            logins.pulling(&format!("r.example/b:{number}"), &login()).unwrap().done("x");
        }
        assert_eq!(logins.table().pulls.len(), MOST);
        assert!(!format!("{logins:?} {:?}", login()).contains("hunter2"));
    }
}
