//! Credentials from every source, against registries that want them.

mod cluster;
mod cri;
mod cri_fake;
mod sources;

use std::path::Path;
use std::time::Duration;

use headstart::oci::ImageName;
use headstart::registry::{Client, ClientConfig, CredentialConfig, Patience};

/// Everything that must never be seen in a message.
const SECRETS: [&str; 4] = ["hunter2", "bWU6aHVudGVyMg==", "stale-password", "identity-secret"];

fn client(credentials: CredentialConfig) -> Client {
    let patience = Patience { rounds: 2, backoff: Duration::from_millis(1), ..Patience::default() };
    Client::new(ClientConfig { credentials, patience, ..ClientConfig::default() })
}

fn name(host: &str, rest: &str) -> ImageName {
    format!("{host}/{rest}").parse().unwrap()
}

/// Fails if something secret is in `text`.
#[track_caller]
fn assert_discreet(text: &str) {
    for secret in SECRETS {
        assert!(!text.contains(secret), "{secret} stands in: {text}");
    }
}

/// A `config.json` with one login.
fn docker_config(path: &Path, host: &str, user: &str, password: &str) {
    let text = serde_json::json!({ "auths": { host: { "username": user, "password": password } } });
    std::fs::write(path, text.to_string()).unwrap();
}
