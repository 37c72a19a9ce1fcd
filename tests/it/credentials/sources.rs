//! Which source is used first, and what happens when a registry does not like what it gave.

use std::path::PathBuf;
use std::sync::Arc;

use axum::http::Method;
use headstart::registry::{Client, CredentialConfig, PullLogin, PulledLogins, Secret};
use headstart::testkit::registry::{Door, FaultyRegistry};
use tempfile::TempDir;

use super::{assert_discreet, client, docker_config, name};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

fn login(user: &str, password: &str) -> PullLogin {
    PullLogin { username: user.to_owned(), password: Secret::new(password), ..PullLogin::default() }
}

fn basic_door() -> Door {
    Door::Basic { user: "me".to_owned(), password: "hunter2".to_owned() }
}

fn bearer_door() -> Door {
    let login = Some(("me".to_owned(), "hunter2".to_owned()));
    Door::Bearer { login, identity: Some("identity-secret".to_owned()), expires_in: Some(300), realm: None }
}

/// A registry with an image behind a door, and a `config.json` that has a login for it.
struct Behind {
    registry: FaultyRegistry,
    host: String,
    docker: PathBuf,
    _directory: TempDir,
}

impl Behind {
    async fn door(door: Door, password: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let registry = FaultyRegistry::start().await;
        registry.put_manifest("app", "v1", MANIFEST, "{}");
        registry.set_door(door);
        let (host, docker) = (registry.host(), directory.path().join("config.json"));
        docker_config(&docker, &host, "me", password);
        Self { registry, host, docker, _directory: directory }
    }

    /// Who asks `config.json` first, and then those who were seen to pull.
    fn client(&self, pulled: Option<&Arc<PulledLogins>>) -> Client {
        client(CredentialConfig {
            docker_config: Some(self.docker.clone()),
            pulled: pulled.map(Arc::clone),
            ..CredentialConfig::default()
        })
    }
}

#[tokio::test]
async fn a_stale_login_does_not_hide_a_good_one() {
    for door in [basic_door(), bearer_door()] {
        let behind = Behind::door(door, "stale-password").await;
        let pulled = Arc::new(PulledLogins::default());
        let client = behind.client(Some(&pulled));
        let Behind { registry, host, .. } = &behind;
        let image = name(host, "app:v1");
        let error = client.manifest(&image).await.unwrap_err().to_string();
        assert!(error.contains("does not accept"), "{error}");
        assert_discreet(&error);
        // Another one that is wrong, then a good one; the latest is asked first.
        pulled.pulling(&image.to_string(), &login("me", "hunter2")).unwrap().done("sha256:1");
        let _other = pulled.pulling(&format!("{host}/app:v2"), &login("you", "stale-password"));
        client.manifest(&image).await.unwrap();
        // What was found is used at once from then on.
        registry.forget_seen();
        client.manifest(&image).await.unwrap();
        assert_eq!(registry.seen().len(), 1);
        pulled.forget("sha256:1");
        registry.expire_tokens();
        assert_discreet(&format!("{client:?} {pulled:?}"));
    }
}

#[tokio::test]
async fn docker_is_asked_before_the_others() {
    let behind = Behind::door(basic_door(), "hunter2").await;
    let Behind { registry, host, docker, .. } = &behind;
    let pulled = Arc::new(PulledLogins::default());
    let _pull = pulled.pulling(&format!("{host}/app:v1"), &login("you", "stale-password")).unwrap();
    let client = behind.client(Some(&pulled));
    client.manifest(&name(host, "app:v1")).await.unwrap();
    assert_eq!(registry.seen_at(&Method::GET, "/manifests/").len(), 2, "once without, once with the first source");
    // A source that fails does not hide the others, and is told only if they know nothing.
    std::fs::write(docker, "{ hunter2").unwrap();
    let error = client.manifest(&name(host, "other:v1")).await.unwrap_err().to_string();
    assert!(error.contains("cannot understand the credentials file"), "{error}");
    assert_discreet(&error);
}

#[tokio::test]
async fn a_renewed_login_counts_without_anybody_being_told() {
    for (door, next) in [
        (basic_door(), Door::Basic { user: "me".to_owned(), password: "renewed".to_owned() }),
        (
            bearer_door(),
            Door::Bearer {
                login: Some(("me".to_owned(), "renewed".to_owned())),
                identity: None,
                expires_in: Some(300),
                realm: None,
            },
        ),
    ] {
        let behind = Behind::door(door, "hunter2").await;
        let Behind { registry, host, docker, .. } = &behind;
        let client = behind.client(None);
        let image = name(host, "app:v1");
        client.manifest(&image).await.unwrap();
        registry.set_door(next);
        registry.expire_tokens();
        docker_config(docker, host, "me", "renewed");
        client.manifest(&image).await.unwrap();
    }
}

#[tokio::test]
async fn tokens_belong_to_a_repository() {
    let registry = FaultyRegistry::start().await;
    for repository in ["one", "two"] {
        registry.put_manifest(repository, "v1", MANIFEST, "{}");
    }
    registry.set_door(bearer_door());
    let host = registry.host();
    let pulled = Arc::new(PulledLogins::default());
    let identity = PullLogin { identity_token: Secret::new("identity-secret"), ..PullLogin::default() };
    let _one = pulled.pulling(&format!("{host}/one:v1"), &login("me", "hunter2")).unwrap();
    let _two = pulled.pulling(&format!("{host}/two:v1"), &identity).unwrap();
    let client = client(CredentialConfig { pulled: Some(pulled), ..CredentialConfig::default() });
    for _ in 0..3 {
        client.manifest(&name(&host, "one:v1")).await.unwrap();
        client.manifest(&name(&host, "two:v1")).await.unwrap();
    }
    assert_eq!(registry.tokens_issued(), 2);
    assert_eq!(registry.seen_at(&Method::POST, "/token").len(), 1);
}
