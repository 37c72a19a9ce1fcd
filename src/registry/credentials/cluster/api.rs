//! What is asked of an API server: a list of secrets, page by page, and then what changes of them.

use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderValue};
use reqwest::{Response, StatusCode};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;
use url::Url;

use super::ClusterError;
use super::kubeconfig::{Proof, Server, read};
use crate::registry::error::TryError;
use crate::registry::exchange::{Wait, read_bounded, refusal, send};
use crate::registry::retry::classify;

/// The only secrets that are asked for.
const TYPE: &str = "kubernetes.io/dockerconfigjson";
/// Secrets in a page of a list. A secret has at most 1 MiB, by Kubernetes' own rule, so [`PAGE_LIMIT`] holds a page of such.
const PAGE: u32 = 20;
/// Most bytes of a page.
const PAGE_LIMIT: u64 = 40 << 20;
/// Most pages: more secrets than a node could sensibly keep.
pub(super) const MOST_PAGES: u32 = 512;
/// Longest event of a watch: the largest secret in Base64, with what surrounds it.
const EVENT_LIMIT: usize = 4 << 20;
/// How long the server may hold a watch open: what its own clients ask for.
const WATCH: Duration = Duration::from_secs(300);
/// How long beyond that is waited for the end.
const GRACE: Duration = Duration::from_secs(30);

const WAIT: Wait = Wait { response: Duration::from_secs(30), idle: Duration::from_secs(30) };

/// One secret as the API shows it. It is never shown.
#[derive(Deserialize)]
pub(super) struct SecretObject {
    #[serde(default)]
    pub(super) metadata: ObjectMeta,
    #[serde(default, rename = "type")]
    kind: String,
    #[serde(default)]
    data: Data,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub(super) struct ObjectMeta {
    #[serde(default)]
    pub(super) name: String,
    #[serde(default)]
    pub(super) namespace: String,
    #[serde(default)]
    resource_version: String,
}

#[derive(Deserialize, Default)]
struct Data {
    #[serde(default, rename = ".dockerconfigjson")]
    config: String,
}

impl SecretObject {
    /// The Base64 of a `config.json`, if this is such a secret.
    pub(super) fn config(&self) -> Option<&str> {
        (self.kind == TYPE && !self.data.config.is_empty()).then_some(&self.data.config)
    }
}

/// A page of a list.
#[derive(Deserialize)]
pub(super) struct Page {
    #[serde(default)]
    metadata: ListMeta,
    #[serde(default = "Vec::new")]
    pub(super) items: Vec<SecretObject>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase")]
struct ListMeta {
    #[serde(default)]
    resource_version: String,
    #[serde(default, rename = "continue")]
    next: String,
}

/// What changed.
pub(super) enum Event {
    /// A secret is there, or is another.
    Put(SecretObject),
    /// A secret is gone.
    Gone(SecretObject),
    /// Nothing did.
    Nothing,
}

#[derive(Deserialize)]
struct RawEvent {
    #[serde(rename = "type")]
    kind: String,
    object: serde_json::Value,
}

#[derive(Deserialize)]
struct ErrorObject {
    #[serde(default)]
    code: u16,
}

/// Where a watch goes on.
#[derive(Clone, Default)]
pub(super) struct Version(String);

/// The secrets of one namespace, or of all.
pub(super) struct Api<'a> {
    pub(super) server: &'a Server,
    pub(super) namespace: Option<&'a str>,
}

impl Api<'_> {
    fn url(&self, query: &[(&str, &str)]) -> Url {
        let mut url = self.server.url.clone();
        let base = self.server.url.path().trim_end_matches('/').to_owned();
        let path = match self.namespace {
            Some(namespace) => format!("{base}/api/v1/namespaces/{namespace}/secrets"),
            None => format!("{base}/api/v1/secrets"),
        };
        url.set_path(&path);
        url.query_pairs_mut().append_pair("fieldSelector", &format!("type={TYPE}")).extend_pairs(query);
        url
    }

    async fn get(&self, query: &[(&str, &str)]) -> Result<Response, ClusterError> {
        let asked = |source| ClusterError::Ask { server: self.server.url.origin().ascii_serialization(), source };
        let mut request = self.server.http.get(self.url(query)).header(ACCEPT, "application/json");
        let bearer = |token: &str| {
            let mut value =
                HeaderValue::from_str(&format!("Bearer {}", token.trim())).map_err(|_| ClusterError::Token)?;
            value.set_sensitive(true);
            Ok(value)
        };
        request = match &self.server.proof {
            Proof::Nothing => request,
            Proof::Token(token) => request.header(AUTHORIZATION, bearer(token.expose())?),
            Proof::Basic(name, password) => request.basic_auth(name, Some(password.expose())),
            Proof::TokenFile(path) => {
                let path = path.clone();
                let text = match tokio::task::spawn_blocking(move || read(&path)).await {
                    Ok(text) => text?,
                    Err(broken) => std::panic::resume_unwind(broken.into_panic()),
                };
                let text = String::from_utf8(text).map_err(|_| ClusterError::Token)?;
                request.header(AUTHORIZATION, bearer(&text)?)
            }
        };
        let request = request.build().map_err(|error| asked(classify(error)))?;
        let response = send(&self.server.http, request, &WAIT).await.map_err(asked)?;
        match response.status() {
            StatusCode::GONE => Err(ClusterError::Expired),
            status if status.is_success() => Ok(response),
            _ => Err(asked(refusal(response, &WAIT).await)),
        }
    }

    /// The next page of the list, and where the one behind it begins.
    pub(super) async fn page(&self, after: &str) -> Result<(Page, Option<String>, Version), ClusterError> {
        let limit = PAGE.to_string();
        let mut query = vec![("limit", limit.as_str())];
        if !after.is_empty() {
            query.push(("continue", after));
        }
        let response = self.get(&query).await?;
        let asked = |source| ClusterError::Ask { server: self.server.url.origin().ascii_serialization(), source };
        let body = read_bounded(response, PAGE_LIMIT, &WAIT).await.map_err(asked)?;
        let page: Page = parse(&body)?;
        let next = Some(page.metadata.next.clone()).filter(|next| !next.is_empty());
        let version = Version(page.metadata.resource_version.clone());
        Ok((page, next, version))
    }

    /// Asks for everything that changes after `version`.
    pub(super) async fn watch(&self, version: &Version) -> Result<Watch, ClusterError> {
        let seconds = WATCH.as_secs().to_string();
        let query = [
            ("watch", "1"),
            ("allowWatchBookmarks", "true"),
            ("resourceVersion", version.0.as_str()),
            ("timeoutSeconds", seconds.as_str()),
        ];
        let response = self.get(&query).await?;
        Ok(Watch { response, buffer: Vec::new(), searched: 0, ends: Instant::now() + WATCH + GRACE })
    }
}

/// A stream of changes.
pub(super) struct Watch {
    response: Response,
    buffer: Vec<u8>,
    /// So much of it has no end of a line.
    searched: usize,
    ends: Instant,
}

impl Watch {
    /// The next change, none at the end; `version` moves on with it.
    pub(super) async fn next(&mut self, version: &mut Version) -> Result<Option<Event>, ClusterError> {
        loop {
            let new = self.buffer.get(self.searched..).unwrap_or_default();
            if let Some(end) = new.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=self.searched + end).collect();
                self.searched = 0;
                if line.trim_ascii().is_empty() {
                    continue;
                }
                return event(&line, version).map(Some);
            }
            self.searched = self.buffer.len();
            if self.buffer.len() > EVENT_LIMIT {
                return Err(ClusterError::Large);
            }
            match tokio::time::timeout_at(self.ends, self.response.chunk()).await {
                Ok(Ok(Some(bytes))) => self.buffer.extend_from_slice(&bytes),
                // The server's clients see its restart like this.
                Ok(Ok(None)) => return Ok(None),
                Ok(Err(error)) => return Err(ClusterError::Watch(TryError::Broken(error.without_url().into()))),
                Err(_) => {
                    return Err(ClusterError::Watch(TryError::Timeout { what: "the watch", limit: WATCH + GRACE }));
                }
            }
        }
    }
}

fn event(line: &[u8], version: &mut Version) -> Result<Event, ClusterError> {
    let RawEvent { kind, object } = parse(line)?;
    if kind == "ERROR" {
        let error: ErrorObject = value(object)?;
        return Err(if error.code == 410 { ClusterError::Expired } else { ClusterError::Told(error.code) });
    }
    let object: SecretObject = value(object)?;
    if !object.metadata.resource_version.is_empty() {
        *version = Version(object.metadata.resource_version.clone());
    }
    Ok(match kind.as_str() {
        "ADDED" | "MODIFIED" => Event::Put(object),
        "DELETED" => Event::Gone(object),
        _ => Event::Nothing,
    })
}

/// The parser's message could quote a secret and is left out.
fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ClusterError> {
    serde_json::from_slice(bytes).map_err(|_| ClusterError::Answer)
}

fn value<T: DeserializeOwned>(value: serde_json::Value) -> Result<T, ClusterError> {
    serde_json::from_value(value).map_err(|_| ClusterError::Answer)
}
