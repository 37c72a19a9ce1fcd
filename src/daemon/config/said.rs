//! The file as it was written: its keys, and which of them mean nothing.

use std::path::PathBuf;

use serde::Deserialize;

use super::LogLevel;
use super::values::{Size, Span};

/// Every key that may be said, by section; the empty name is the top.
pub(super) const KEYS: &[(&str, &[&str])] = &[
    ("", &["root", "run", "log_level"]),
    (
        "registry",
        &["docker_config", "certs_d", "connect_timeout", "response_timeout", "idle_timeout", "deadline", "rounds"],
    ),
    ("credentials", &["cri_proxy", "kubeconfig", "namespaces"]),
    ("fetch", &["memory", "connections", "deadline", "read_ahead"]),
    ("fill", &["enabled", "start_delay", "bandwidth", "connections"]),
    ("store", &["sync_interval", "quota", "reserve"]),
    ("daemon", &["metrics_listen", "stop_timeout", "keep_mounts", "keep_for"]),
    (
        "containerd",
        &[
            "enabled",
            "socket",
            "address",
            "content",
            "version",
            "lazy",
            "trust_labels",
            "driver",
            "xino",
            "fill",
            "prepare_timeout",
            "sync",
        ],
    ),
];

/// The file as it was written.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Said {
    pub(super) root: Option<PathBuf>,
    pub(super) run: Option<PathBuf>,
    pub(super) log_level: Option<LogLevel>,
    #[serde(default)]
    pub(super) registry: SaidRegistry,
    #[serde(default)]
    pub(super) credentials: SaidCredentials,
    #[serde(default)]
    pub(super) fetch: SaidFetch,
    #[serde(default)]
    pub(super) fill: SaidFill,
    #[serde(default)]
    pub(super) store: SaidStore,
    #[serde(default)]
    pub(super) daemon: SaidDaemon,
    #[serde(default)]
    pub(super) containerd: SaidContainerd,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct SaidContainerd {
    pub(super) enabled: Option<bool>,
    pub(super) socket: Option<PathBuf>,
    pub(super) address: Option<PathBuf>,
    pub(super) content: Option<PathBuf>,
    pub(super) version: Option<String>,
    pub(super) lazy: Option<bool>,
    pub(super) trust_labels: Option<bool>,
    pub(super) driver: Option<String>,
    pub(super) xino: Option<bool>,
    pub(super) fill: Option<bool>,
    pub(super) prepare_timeout: Option<Span>,
    pub(super) sync: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct SaidRegistry {
    pub(super) docker_config: Option<PathBuf>,
    pub(super) certs_d: Option<Vec<PathBuf>>,
    pub(super) connect_timeout: Option<Span>,
    pub(super) response_timeout: Option<Span>,
    pub(super) idle_timeout: Option<Span>,
    pub(super) deadline: Option<Span>,
    pub(super) rounds: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct SaidCredentials {
    pub(super) cri_proxy: Option<bool>,
    pub(super) kubeconfig: Option<PathBuf>,
    pub(super) namespaces: Option<Vec<String>>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct SaidFetch {
    pub(super) memory: Option<Size>,
    pub(super) connections: Option<u32>,
    pub(super) deadline: Option<Span>,
    pub(super) read_ahead: Option<Size>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct SaidFill {
    pub(super) enabled: Option<bool>,
    pub(super) start_delay: Option<Span>,
    pub(super) bandwidth: Option<Size>,
    pub(super) connections: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct SaidStore {
    pub(super) sync_interval: Option<Span>,
    pub(super) quota: Option<Size>,
    pub(super) reserve: Option<Size>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct SaidDaemon {
    pub(super) metrics_listen: Option<String>,
    pub(super) stop_timeout: Option<Span>,
    pub(super) keep_mounts: Option<bool>,
    pub(super) keep_for: Option<Span>,
}

/// The first key of `table` that means nothing.
pub(super) fn unknown_key(table: &toml::Table) -> Option<String> {
    let known = |section: &str, key: &str| KEYS.iter().any(|(name, keys)| *name == section && keys.contains(&key));
    for (key, value) in table {
        match value {
            toml::Value::Table(inside) if KEYS.iter().any(|(name, _)| name == key) => {
                if let Some(unknown) = inside.keys().find(|inner| !known(key, inner)) {
                    return Some(format!("{key}.{unknown}"));
                }
            }
            _ if known("", key) => {}
            _ => return Some(key.clone()),
        }
    }
    None
}

/// The key or section that is least different from `wrong`, unless everything is very different.
pub(super) fn nearest_key(wrong: &str) -> Option<String> {
    let sections = KEYS.iter().map(|(section, _)| (*section).to_owned()).filter(|section| !section.is_empty());
    let full = |section: &str, key: &str| if section.is_empty() { key.to_owned() } else { format!("{section}.{key}") };
    let keys = KEYS.iter().flat_map(|(section, keys)| keys.iter().map(|key| full(section, key)));
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    sections
        .chain(keys)
        // A key in the wrong section is as near as its last part.
        .map(|key| (distance(wrong, &key).min(distance(&last(wrong), &last(&key)) + 1), key))
        .min()
        .filter(|(changes, key)| *changes <= key.len() / 2)
        .map(|(_, key)| key)
}

/// How many letters have to be changed, added or removed (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut next = vec![i + 1];
        for ((y, above), diagonal) in b.iter().zip(row.iter().skip(1)).zip(&row) {
            let left = next.last().copied().unwrap_or_default();
            next.push((above + 1).min(left + 1).min(diagonal + usize::from(x != *y)));
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}
