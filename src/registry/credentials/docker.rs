//! Docker's `config.json` and its credential helpers.
//!
//! The order is Docker's: a helper named for the host, then the general helper, then what the file itself holds. The file
//! is read each time it is needed, so that a login made later counts. No error holds what a file or a helper said.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use serde::Deserialize;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{CredentialConfig, CredentialError, Credentials, is_docker, place, same_host};
use crate::oci::DEFAULT_HOST;
use crate::registry::secret::Secret;

/// The key under which Docker keeps the login of docker.io.
const DOCKER_KEY: &str = "https://index.docker.io/v1/";
/// Most bytes of a config file or of a helper's answer; real ones have a few kilobytes.
const LIMIT: u64 = 1 << 20;

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct DockerConfig {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
    #[serde(default)]
    cred_helpers: BTreeMap<String, String>,
    #[serde(default)]
    creds_store: Option<String>,
}

/// What stands under one key of `auths`. It is never shown.
#[derive(Deserialize, Default)]
pub(super) struct Entry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

#[derive(Deserialize)]
struct HelperAnswer {
    #[serde(rename = "Username")]
    username: String,
    #[serde(rename = "Secret")]
    secret: String,
}

impl CredentialConfig {
    /// What Docker would use for `repository` at `host`, if it knows anything.
    pub(super) async fn ask_docker(
        &self,
        host: &str,
        repository: &str,
    ) -> Result<Option<Credentials>, CredentialError> {
        let Some(path) = &self.docker_config else { return Ok(None) };
        let config = read_config(path).await?;
        let names = names_of(host);
        let helper = names
            .iter()
            .find_map(|name| config.cred_helpers.get(*name))
            .or(config.creds_store.as_ref())
            .filter(|helper| !helper.is_empty());
        if let Some(helper) = helper {
            let server = if is_docker(host) { DOCKER_KEY } else { host };
            if let Some(found) = self.ask_helper(helper, server).await? {
                return Ok(Some(found));
            }
        }
        match best_entry(&config.auths, host, repository) {
            Some((key, entry)) => {
                let bad = || CredentialError::Auth { path: path.clone(), host: key.to_owned() };
                entry.credentials().map_err(|NoLogin| bad())
            }
            None => Ok(None),
        }
    }

    async fn ask_helper(&self, helper: &str, server: &str) -> Result<Option<Credentials>, CredentialError> {
        let name_is_safe = helper.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
        if !name_is_safe {
            return Err(CredentialError::HelperName(helper.to_owned()));
        }
        let program = format!("docker-credential-{helper}");
        let path = match &self.helper_directory {
            Some(directory) if directory.join(&program).is_file() => directory.join(&program),
            _ => PathBuf::from(&program),
        };
        let limit = self.helper_timeout.unwrap_or(Duration::from_secs(20));
        match tokio::time::timeout(limit, run_helper(&path, &program, server)).await {
            Ok(answer) => answer,
            Err(_) => Err(CredentialError::HelperTimeout { program, limit }),
        }
    }
}

/// Runs a helper's `get`. Dropping the future kills it.
async fn run_helper(path: &Path, program: &str, server: &str) -> Result<Option<Credentials>, CredentialError> {
    let start = |source| CredentialError::HelperStart { program: program.to_owned(), source };
    let mut child = tokio::process::Command::new(path)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .map_err(start)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A helper that needs no question may have closed its end already.
        match stdin.write_all(server.as_bytes()).await {
            Err(source) if source.kind() != std::io::ErrorKind::BrokenPipe => return Err(start(source)),
            _ => {}
        }
    }
    let mut answer = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        stdout.take(LIMIT).read_to_end(&mut answer).await.map_err(start)?;
    }
    let status = child.wait().await.map_err(start)?;
    if !status.success() {
        // The protocol has no code for it, only this sentence on the standard output.
        if String::from_utf8_lossy(&answer).contains("credentials not found") {
            return Ok(None);
        }
        return Err(CredentialError::HelperFailed { program: program.to_owned(), server: server.to_owned(), status });
    }
    let answer: HelperAnswer =
        serde_json::from_slice(&answer).map_err(|_| CredentialError::HelperAnswer(program.to_owned()))?;
    let secret = Secret::new(answer.secret);
    Ok(match answer.username.as_str() {
        "" => None,
        "<token>" => Some(Credentials::IdentityToken(secret)),
        _ => Some(Credentials::Basic { username: answer.username, password: secret }),
    })
}

async fn read_config(path: &Path) -> Result<DockerConfig, CredentialError> {
    let read = |source| CredentialError::Read { path: path.to_owned(), source };
    let mut text = Vec::new();
    match tokio::fs::File::open(path).await {
        Ok(file) => file.take(LIMIT).read_to_end(&mut text).await.map_err(read)?,
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(DockerConfig::default()),
        Err(source) => return Err(read(source)),
    };
    serde_json::from_slice(&text).map_err(|error| CredentialError::Parse { path: path.to_owned(), line: error.line() })
}

/// An entry's `auth` that is not the Base64 of `user:password`.
#[derive(Debug)]
pub(super) struct NoLogin;

/// The two halves of an `auth`.
pub(super) fn user_and_password(auth: &str) -> Result<(String, Secret), NoLogin> {
    let decoded = base64::engine::general_purpose::STANDARD.decode(auth.trim()).map_err(|_| NoLogin)?;
    let decoded = String::from_utf8(decoded).map_err(|_| NoLogin)?;
    let (username, password) = decoded.split_once(':').ok_or(NoLogin)?;
    // Docker pads the password with NUL bytes in very old files.
    Ok((username.to_owned(), Secret::new(password.trim_end_matches('\0'))))
}

impl Entry {
    /// What the entry holds; nothing if it is empty.
    pub(super) fn credentials(&self) -> Result<Option<Credentials>, NoLogin> {
        let filled = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        if let Some(token) = filled(&self.identitytoken) {
            return Ok(Some(Credentials::IdentityToken(Secret::new(token))));
        }
        if let Some(token) = filled(&self.registrytoken) {
            return Ok(Some(Credentials::RegistryToken(Secret::new(token))));
        }
        if let (Some(username), Some(password)) = (filled(&self.username), filled(&self.password)) {
            return Ok(Some(Credentials::Basic { username, password: Secret::new(password) }));
        }
        let Some(auth) = filled(&self.auth) else { return Ok(None) };
        let (username, password) = user_and_password(&auth)?;
        Ok(Some(Credentials::Basic { username, password }))
    }
}

/// The keys under which the host may stand.
fn names_of(host: &str) -> Vec<&str> {
    if is_docker(host) { vec![DOCKER_KEY, DEFAULT_HOST, "index.docker.io", "registry-1.docker.io"] } else { vec![host] }
}

/// How well the key of an entry fits, by the length of the part of the repository that it names (podman's extension); none
/// if it is for something else.
pub(super) fn fit(key: &str, host: &str, repository: &str) -> Option<usize> {
    let (of, scope) = place(key);
    let in_scope =
        scope.is_empty() || repository.strip_prefix(scope).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    (same_host(of, host) && in_scope).then_some(scope.len())
}

/// The entry that fits best, the first of those that fit alike.
fn best_entry<'a>(auths: &'a BTreeMap<String, Entry>, host: &str, repository: &str) -> Option<(&'a str, &'a Entry)> {
    let mut best: Option<(usize, &str, &Entry)> = None;
    for (key, entry) in auths {
        if let Some(length) = fit(key, host, repository)
            && best.is_none_or(|(longest, ..)| length > longest)
        {
            best = Some((length, key, entry));
        }
    }
    best.map(|(_, key, entry)| (key, entry))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn basic(username: &str, password: &str) -> Credentials {
        Credentials::Basic { username: username.to_owned(), password: Secret::new(password) }
    }

    fn config(directory: &Path, text: &str) -> CredentialConfig {
        let path = directory.join("config.json");
        std::fs::write(&path, text).unwrap();
        CredentialConfig {
            docker_config: Some(path),
            helper_directory: Some(directory.to_owned()),
            ..CredentialConfig::default()
        }
    }

    fn helper(directory: &Path, name: &str, script: &str) {
        let path = directory.join(format!("docker-credential-{name}"));
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[tokio::test]
    async fn the_file_is_read_as_docker_and_podman_do() {
        let directory = tempfile::tempdir().unwrap();
        // bTE6cDE= is m1:p1, and so on.
        let config = config(
            directory.path(),
            r#"{"auths": {
                "https://index.docker.io/v1/": {"auth": "bTE6cDE="},
                "quay.io": {"auth": "bTI6cDI="},
                "quay.io/team": {"auth": "bTM6cDM="},
                "r.example:5000": {"username": "m4", "password": "p4"},
                "https://id.example/v2/": {"auth": "bTU6cDU=", "identitytoken": "tok"},
                "raw.example": {"registrytoken": "bearer"},
                "empty.example": {}
            }}"#,
        );
        for (host, repository, expected) in [
            ("docker.io", "library/x", Some(basic("m1", "p1"))),
            ("registry-1.docker.io", "library/x", Some(basic("m1", "p1"))),
            ("quay.io", "x", Some(basic("m2", "p2"))),
            ("quay.io", "team/x", Some(basic("m3", "p3"))),
            ("quay.io", "teamwork/x", Some(basic("m2", "p2"))),
            ("r.example:5000", "x", Some(basic("m4", "p4"))),
            ("r.example", "x", None),
            ("id.example", "x", Some(Credentials::IdentityToken(Secret::new("tok")))),
            ("raw.example", "x", Some(Credentials::RegistryToken(Secret::new("bearer")))),
            ("empty.example", "x", None),
        ] {
            assert_eq!(config.ask_docker(host, repository).await.unwrap(), expected, "{host}/{repository}");
        }
    }

    #[tokio::test]
    async fn helpers_are_asked_first() {
        let directory = tempfile::tempdir().unwrap();
        helper(directory.path(), "good", r#"read s; echo "{\"Username\":\"$s\",\"Secret\":\"pw\"}""#);
        helper(directory.path(), "token", r#"echo '{"Username":"<token>","Secret":"tok"}'"#);
        helper(directory.path(), "none", "echo credentials not found in native keychain; exit 1");
        let config = config(
            directory.path(),
            r#"{"credsStore": "none", "credHelpers": {"a.example": "good", "b.example": "token", "docker.io": "good"},
                "auths": {"c.example": {"auth": "bTE6cDE="}}}"#,
        );
        for (host, expected) in [
            ("a.example", Some(basic("a.example", "pw"))),
            ("b.example", Some(Credentials::IdentityToken(Secret::new("tok")))),
            ("docker.io", Some(basic("https://index.docker.io/v1/", "pw"))),
            ("c.example", Some(basic("m1", "p1"))),
            ("d.example", None),
        ] {
            assert_eq!(config.ask_docker(host, "x").await.unwrap(), expected, "{host}");
        }
    }

    #[tokio::test]
    async fn what_goes_wrong_is_told_without_secrets() {
        let directory = tempfile::tempdir().unwrap();
        helper(directory.path(), "fails", "echo hunter2; echo hunter2 >&2; exit 3");
        helper(directory.path(), "babbles", "echo hunter2");
        helper(directory.path(), "sleeps", "exec sleep 60");
        for (text, message) in [
            (r#"{"credsStore": "fails"}"#, "failed (exit status: 3)"),
            (r#"{"credsStore": "babbles"}"#, "cannot understand the answer"),
            (r#"{"credsStore": "sleeps"}"#, "did not answer within 0 s"),
            (r#"{"credsStore": "missing"}"#, "cannot run the credential helper docker-credential-missing"),
            (r#"{"credsStore": "../../bin/sh"}"#, "no name of a credential helper"),
            (r#"{"auths": {"h.example": {"auth": "hunter2"}}}"#, "not the Base64"),
            (r#"{"auths": "hunter2"}"#, "cannot understand the credentials file"),
        ] {
            let config =
                CredentialConfig { helper_timeout: Some(Duration::from_millis(300)), ..config(directory.path(), text) };
            let error = config.ask_docker("h.example", "x").await.expect_err(text);
            let shown = format!("{error} {error:?}");
            assert!(shown.contains(message), "{text} gave {shown}");
            assert!(!shown.contains("hunter2"), "{shown} shows a secret");
        }
        let missing = CredentialConfig { docker_config: Some("/nowhere/config.json".into()), ..Default::default() };
        assert_eq!(missing.ask_docker("h.example", "x").await.unwrap(), None);
    }
}
