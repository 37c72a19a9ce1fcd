//! One server that answers for a registry: its trust, its headers, its way of authentication, and redirects from it.
//!
//! Credentials and configured headers go to the server itself and to no other origin, wherever it points.

use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue, LOCATION};
use reqwest::{Method, Request, Response};
use url::Url;

use super::auth::{Authenticator, Proof, Refused, Scope};
use super::credentials::{CredentialConfig, MAX_CANDIDATES};
use super::error::TryError;
use super::exchange::{Wait, refusal, send};
use super::hosts::{Capabilities, HostSpec, HostsError, authority, is_loopback};
use super::retry::{Patience, classify};
use super::secret::SafeUrl;

/// Most redirects that are followed; object stores need one or two.
const REDIRECT_LIMIT: usize = 5;
/// Most challenges of one request: one tells how, one that the token was too old, one that it was too narrow, and one for
/// each login that is known.
const CHALLENGES: usize = 3 + MAX_CANDIDATES;
/// How long a server that could not be reached is asked last.
const SICK_FOR: Duration = Duration::from_secs(30);

/// Where a request goes.
pub(super) enum Target {
    /// A path below the API's base, beginning with a slash, and query pairs.
    Api(String, Vec<(&'static str, String)>),
    /// An address the server gave, for example of an upload.
    Given(Url),
}

/// Makes the body of a request, anew for each time it is sent.
pub(super) type MakeBody<'a> = &'a (dyn Fn() -> reqwest::Body + Send + Sync);

/// One request, before it is known what it takes to be let in.
pub(super) struct Ask<'a> {
    pub(super) method: Method,
    pub(super) target: Target,
    pub(super) headers: HeaderMap,
    pub(super) body: Option<MakeBody<'a>>,
    pub(super) scope: &'a Scope,
}

impl<'a> Ask<'a> {
    pub(super) fn new(method: Method, path: String, scope: &'a Scope) -> Self {
        Self { method, target: Target::Api(path, Vec::new()), headers: HeaderMap::new(), body: None, scope }
    }

    pub(super) fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.append(name, value);
        self
    }
}

/// A success, and where it came from.
pub(super) struct Answer {
    pub(super) response: Response,
    /// The last address of a chain of redirects, if there was one.
    pub(super) redirected: Option<Url>,
}

/// One server.
pub(super) struct Endpoint {
    base: Url,
    pub(super) capabilities: Capabilities,
    mirror_of: Option<String>,
    headers: HeaderMap,
    /// For the server itself, with our client certificate.
    http: reqwest::Client,
    /// For everybody else: the same trust, no certificate of ours. Made when first needed, because it reads the
    /// system's authorities.
    stranger: OnceLock<reqwest::Client>,
    spec: HostSpec,
    connect: Duration,
    user_agent: String,
    authenticator: Authenticator,
    wait: Wait,
    sick_until: Mutex<Option<Instant>>,
}

impl Endpoint {
    /// Reads certificates, so not for the reactor.
    pub(super) fn new(
        spec: HostSpec,
        registry: &str,
        credentials: Arc<CredentialConfig>,
        patience: &Patience,
        user_agent: &str,
    ) -> Result<Self, HostsError> {
        let mut headers = HeaderMap::new();
        for (name, value) in &spec.headers {
            let bad = || HostsError::Certificate {
                server: authority(&spec.base),
                reason: format!("the configured header {name:?} is no HTTP header"),
            };
            let mut value = HeaderValue::from_str(value).map_err(|_| bad())?;
            value.set_sensitive(true);
            headers.append(HeaderName::from_bytes(name.as_bytes()).map_err(|_| bad())?, value);
        }
        let wait = Wait { response: patience.response, idle: patience.idle };
        let plain = spec.base.scheme() == "http";
        let host = if spec.mirror { authority(&spec.base) } else { registry.to_owned() };
        let http = build(&spec, patience.connect, user_agent, plain, true)?;
        Ok(Self {
            base: spec.base.clone(),
            capabilities: spec.capabilities,
            mirror_of: spec.mirror.then(|| registry.to_owned()),
            headers,
            http,
            stranger: OnceLock::new(),
            connect: patience.connect,
            user_agent: user_agent.to_owned(),
            authenticator: Authenticator::new(host, plain, credentials, wait.clone()),
            wait,
            sick_until: Mutex::new(None),
            spec,
        })
    }

    /// Scheme, host and port, for messages.
    pub(super) fn name(&self) -> String {
        self.base.origin().ascii_serialization()
    }

    pub(super) fn wait(&self) -> &Wait {
        &self.wait
    }

    /// True if it could not be reached a short while ago.
    pub(super) fn is_sick(&self) -> bool {
        let until = *self.sick_until.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }

    /// Notes how the last request went.
    pub(super) fn note(&self, reachable: bool) {
        let mut until = self.sick_until.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *until = (!reachable).then(|| Instant::now() + SICK_FOR);
    }

    /// Asks, proves who we are if that is wanted, and follows redirects. Anything but a success is an error.
    pub(super) async fn ask(&self, ask: &Ask<'_>) -> Result<Answer, TryError> {
        let url = self.url(&ask.target)?;
        let at_home = url.origin() == self.base.origin();
        let mut challenged = 0;
        let mut refused = Refused::default();
        loop {
            let proof = if at_home { self.proof(ask.scope, &refused).await? } else { None };
            let (response, redirected) = self.follow(ask, url.clone(), proof.as_ref()).await?;
            let status = response.status();
            if status.is_success() {
                return Ok(Answer { response, redirected });
            }
            if status.as_u16() == 401 && at_home && redirected.is_none() && challenged < CHALLENGES {
                challenged += 1;
                self.authenticator.challenged(ask.scope, response.headers(), proof.as_ref(), &mut refused).await?;
                continue;
            }
            return Err(refusal(response, &self.wait).await);
        }
    }

    async fn proof(&self, scope: &Scope, refused: &Refused) -> Result<Option<Proof>, TryError> {
        let http = match self.authenticator.token_server(scope) {
            Some(realm) if realm.origin() != self.base.origin() => self.http_for_strangers().await?,
            _ => self.http.clone(),
        };
        self.authenticator.proof(scope, http, refused).await
    }

    /// Asks an address that was learned from a redirect: nothing of ours goes along.
    pub(super) async fn ask_stranger(&self, url: Url, headers: &HeaderMap) -> Result<Response, TryError> {
        let mut request = Request::new(Method::GET, url);
        request.headers_mut().extend(headers.clone());
        let response = send(&self.http_for_strangers().await?, request, &self.wait).await?;
        if response.status().is_success() { Ok(response) } else { Err(refusal(response, &self.wait).await) }
    }

    fn url(&self, target: &Target) -> Result<Url, TryError> {
        match target {
            Target::Given(url) => Ok(url.clone()),
            Target::Api(path, query) => {
                let mut url = self.base.clone();
                url.set_path(&format!("{}{path}", self.base.path().trim_end_matches('/')));
                if !query.is_empty() || self.mirror_of.is_some() {
                    let mut pairs = url.query_pairs_mut();
                    pairs.extend_pairs(query);
                    pairs.extend_pairs(self.mirror_of.iter().map(|registry| ("ns", registry)));
                }
                Ok(url)
            }
        }
    }

    async fn follow(
        &self,
        ask: &Ask<'_>,
        mut url: Url,
        proof: Option<&Proof>,
    ) -> Result<(Response, Option<Url>), TryError> {
        let mut redirects = 0;
        loop {
            let at_home = url.origin() == self.base.origin();
            let mut request = Request::new(ask.method.clone(), url.clone());
            request.headers_mut().extend(ask.headers.clone());
            if at_home {
                request.headers_mut().extend(self.headers.clone());
                if let Some(proof) = proof {
                    request.headers_mut().insert(AUTHORIZATION, proof.header().clone());
                }
            }
            if let Some(body) = ask.body {
                *request.body_mut() = Some(body());
            }
            let http = if at_home { self.http.clone() } else { self.http_for_strangers().await? };
            tracing::debug!(method = %ask.method, url = %SafeUrl::from(&url), "request");
            let response = match ask.body {
                // An upload takes its time; whoever makes the body watches its progress.
                Some(_) => http.execute(request).await.map_err(classify)?,
                None => send(&http, request, &self.wait).await?,
            };
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok((response, (redirects > 0).then_some(url)));
            }
            let target = location(response.headers(), &url).ok_or(TryError::Header("Location"))?;
            if !matches!(ask.method, Method::GET | Method::HEAD) {
                let target = SafeUrl::from(&target);
                return Err(TryError::Redirect(format!("an upload to {target}; name that server in certs.d")));
            }
            redirects += 1;
            if redirects > REDIRECT_LIMIT {
                return Err(TryError::Redirect(format!("more than {REDIRECT_LIMIT} times")));
            }
            if url.scheme() == "https" && target.scheme() == "http" {
                return Err(TryError::Redirect(format!("from TLS to plain HTTP, {}", SafeUrl::from(&target))));
            }
            url = target;
        }
    }

    async fn http_for_strangers(&self) -> Result<reqwest::Client, TryError> {
        if let Some(http) = self.stranger.get() {
            return Ok(http.clone());
        }
        let (spec, connect, user_agent) = (self.spec.clone(), self.connect, self.user_agent.clone());
        let built = tokio::task::spawn_blocking(move || build(&spec, connect, &user_agent, false, false)).await;
        let http = match built {
            Ok(built) => built.map_err(|error| TryError::Setup(Arc::new(error)))?,
            Err(broken) => std::panic::resume_unwind(broken.into_panic()),
        };
        Ok(self.stranger.get_or_init(|| http).clone())
    }
}

/// The absolute form of a `Location`, if it is there and makes sense.
pub(super) fn location(headers: &HeaderMap, from: &Url) -> Option<Url> {
    let target = from.join(headers.get(LOCATION)?.to_str().ok()?).ok()?;
    let usable = matches!(target.scheme(), "http" | "https")
        && target.host().is_some()
        && target.username().is_empty()
        && target.password().is_none();
    usable.then_some(target)
}

/// The HTTP client of one server. `plain` never speaks TLS and skips reading the system's authorities.
fn build(
    spec: &HostSpec,
    connect: Duration,
    user_agent: &str,
    plain: bool,
    with_identity: bool,
) -> Result<reqwest::Client, HostsError> {
    // Whoever installed a provider before us decides; an error says just that.
    drop(rustls::crypto::ring::default_provider().install_default());
    let server = authority(&spec.base);
    let read = |path: &std::path::Path| {
        std::fs::read(path).map_err(|source| HostsError::Read { path: path.to_owned(), source })
    };
    let bad = |reason: String| HostsError::Certificate { server: server.clone(), reason };
    let mut builder = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        .user_agent(user_agent)
        .connect_timeout(connect)
        .tcp_keepalive(Duration::from_secs(30));
    // Go's programs never ask a proxy for the machine itself; a proxy could not reach it either.
    if is_loopback(&spec.base) {
        builder = builder.no_proxy();
    }
    if plain {
        builder = builder.tls_certs_only([]);
    } else {
        for path in &spec.ca {
            let certificates = reqwest::Certificate::from_pem_bundle(&read(path)?)
                .map_err(|_| bad(format!("{} holds no PEM certificates", path.display())))?;
            builder = builder.tls_certs_merge(certificates);
        }
        if spec.skip_verify {
            builder = builder.tls_danger_accept_invalid_certs(true);
        }
        // One client certificate is what a TLS client can offer here; the first configured one is.
        if let Some((certificate, key)) = spec.client.first().filter(|_| with_identity) {
            let mut pem = read(certificate)?;
            if let Some(key) = key {
                pem.push(b'\n');
                pem.extend(read(key)?);
            }
            let identity = reqwest::Identity::from_pem(&pem)
                .map_err(|_| bad(format!("{} and its key are no PEM client certificate", certificate.display())))?;
            builder = builder.identity(identity);
        }
    }
    builder.build().map_err(|error| {
        let mut reason = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            reason = error.to_string();
            cause = error.source();
        }
        bad(format!("cannot set up TLS: {reason}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_resolved_and_odd_ones_refused() {
        let from = Url::parse("https://r.example/v2/a/blobs/uploads/1?state=x").unwrap();
        for (text, expected) in [
            ("/v2/b", Some("https://r.example/v2/b")),
            ("2?x=y", Some("https://r.example/v2/a/blobs/uploads/2?x=y")),
            ("https://s.example/z?sig=1", Some("https://s.example/z?sig=1")),
            ("file:///etc/passwd", None),
            ("https://u:p@s.example/z", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(LOCATION, text.parse().unwrap());
            assert_eq!(location(&headers, &from).as_ref().map(Url::as_str), expected, "{text}");
        }
    }
}
