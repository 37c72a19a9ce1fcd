//! Proves to one server who we are: basic and bearer authentication of the distribution specification.
//!
//! The first request goes without a proof; what the 401 asks for is remembered for its scope, and later requests bring
//! it at once. Tokens are renewed shortly before they expire and when the server no longer takes them, by one request
//! however many wait for it. What is refused is read anew from its source, and the next that is known is tried: see
//! [`Refused`]. Passwords go only to the server and to the token server it names, and never over plain
//! HTTP to anyone but a server configured as plain or the machine itself.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use lru::LruCache;
use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use serde::Deserialize;
use url::Url;

use super::challenge::{self, Challenge};
use super::credentials::{CredentialConfig, Credentials};
use super::error::TryError;
use super::exchange::{Wait, read_json, refusal, send};
use super::hosts::is_loopback;
use super::secret::{SafeUrl, Secret};

/// A token is renewed this long before it expires, or when a quarter of its life is left if that is shorter: long enough
/// for a request to be sent and judged.
const RENEWAL_MARGIN: Duration = Duration::from_secs(15);
/// What a token lives if its server does not say (distribution's token specification: 60 seconds).
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);
/// A longer life is not believed, so that arithmetic on it stays sound.
const LONGEST_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Most scopes of one server whose tokens are kept: more repositories than a node has images.
const SCOPES: NonZeroUsize = NonZeroUsize::new(1024).expect("1024 is not zero");

/// What is done to which repository.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Scope {
    pub(super) repository: String,
    pub(super) push: bool,
    /// The repository a blob is mounted from.
    pub(super) from: Option<String>,
}

impl Scope {
    /// The words of the token specification.
    fn words(&self) -> Vec<String> {
        let mut words =
            vec![format!("repository:{}:{}", self.repository, if self.push { "pull,push" } else { "pull" })];
        words.extend(self.from.iter().map(|from| format!("repository:{from}:pull")));
        words
    }
}

/// Credentials that were shown for one request and not accepted.
#[derive(Default, Clone)]
pub(super) struct Refused {
    known: Vec<Credentials>,
    /// A token that was given to a stranger was not accepted.
    stranger: bool,
}

impl Refused {
    fn note(&mut self, credentials: Option<&Credentials>) {
        match credentials {
            Some(credentials) => self.known.push(credentials.clone()),
            None => self.stranger = true,
        }
    }

    fn is_empty(&self) -> bool {
        self.known.is_empty() && !self.stranger
    }

    /// Those of `found` that may be tried.
    fn without<'a>(&self, found: &'a [Credentials]) -> impl Iterator<Item = &'a Credentials> {
        found.iter().filter(|credentials| !self.known.contains(credentials))
    }
}

/// What a server wants for a scope.
#[derive(Clone)]
enum Method {
    /// The same header every time, and the credentials in it.
    Fixed(HeaderValue, Credentials),
    Bearer {
        realm: Url,
        service: Option<String>,
        scopes: BTreeSet<String>,
    },
}

struct Token {
    header: HeaderValue,
    renew_at: Instant,
    /// What it was given for.
    credentials: Option<Credentials>,
}

type PendingToken = Shared<BoxFuture<'static, Result<Arc<Token>, TryError>>>;

/// A proof that was sent along, to be shown again when it was not accepted.
#[derive(Clone)]
pub(super) struct Proof {
    header: HeaderValue,
    by: By,
}

#[derive(Clone)]
enum By {
    /// Name and password.
    Password(Credentials),
    /// A token, and whether it was got for this very request.
    Token(Arc<Token>, bool),
}

impl Proof {
    pub(super) fn header(&self) -> &HeaderValue {
        &self.header
    }
}

/// Knows how to authenticate at one server. Lock order: only one lock here, never held across an await.
pub(super) struct Authenticator {
    /// Under which name credentials are looked up.
    host: String,
    /// True if the server itself is configured as plain HTTP.
    plain: bool,
    config: Arc<CredentialConfig>,
    wait: Wait,
    state: Mutex<State>,
}

struct State {
    methods: LruCache<Scope, Method>,
    tokens: LruCache<Scope, PendingToken>,
}

impl Authenticator {
    pub(super) fn new(host: String, plain: bool, config: Arc<CredentialConfig>, wait: Wait) -> Self {
        let state = State { methods: LruCache::new(SCOPES), tokens: LruCache::new(SCOPES) };
        Self { host, plain, config, wait, state: Mutex::new(state) }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Who gives out the tokens for `scope`, if tokens are what is wanted.
    pub(super) fn token_server(&self, scope: &Scope) -> Option<Url> {
        match self.state().methods.get(scope)? {
            Method::Bearer { realm, .. } => Some(realm.clone()),
            Method::Fixed(..) => None,
        }
    }

    /// What to send along for `scope`; nothing before the server has asked. `http` reaches the token server; a new token is
    /// asked for with nothing that was refused.
    pub(super) async fn proof(
        &self,
        scope: &Scope,
        http: reqwest::Client,
        refused: &Refused,
    ) -> Result<Option<Proof>, TryError> {
        let method = self.state().methods.get(scope).cloned();
        match method {
            None => Ok(None),
            Some(Method::Fixed(header, credentials)) => Ok(Some(Proof { header, by: By::Password(credentials) })),
            Some(Method::Bearer { realm, service, scopes }) => {
                let wanted = Wanted { realm, service, scopes, refused: refused.clone() };
                let (pending, fresh) = self.pending_token(scope, http, wanted);
                let token = pending.await?;
                Ok(Some(Proof { header: token.header.clone(), by: By::Token(token, fresh) }))
            }
        }
    }

    /// The token of `scope`, had or on its way, and whether it is not an old one.
    fn pending_token(&self, scope: &Scope, http: reqwest::Client, wanted: Wanted) -> (PendingToken, bool) {
        let mut state = self.state();
        if let Some(pending) = state.tokens.get(scope) {
            match pending.peek() {
                None => return (pending.clone(), true),
                Some(Ok(token)) if Instant::now() < token.renew_at => return (pending.clone(), false),
                Some(_) => {}
            }
        }
        let request = TokenRequest {
            http,
            host: self.host.clone(),
            repository: scope.repository.clone(),
            plain: self.plain,
            config: Arc::clone(&self.config),
            wait: self.wait.clone(),
            wanted,
        };
        let pending = request.run().boxed().shared();
        state.tokens.put(scope.clone(), pending.clone());
        (pending, true)
    }

    /// Learns from a 401 what is wanted. What was `sent` in vain is added to `refused`.
    ///
    /// # Errors
    /// If asking again would change nothing.
    pub(super) async fn challenged(
        &self,
        scope: &Scope,
        headers: &HeaderMap,
        sent: Option<&Proof>,
        refused: &mut Refused,
    ) -> Result<(), TryError> {
        match sent.map(|proof| &proof.by) {
            Some(By::Password(credentials)) => {
                self.state().methods.pop(scope);
                refused.note(Some(credentials));
            }
            Some(By::Token(token, fresh)) => {
                let mut state = self.state();
                let is_same = |pending: &PendingToken| {
                    pending.peek().is_some_and(|known| known.as_ref().is_ok_and(|known| Arc::ptr_eq(known, token)))
                };
                if state.tokens.peek(scope).is_some_and(is_same) {
                    state.tokens.pop(scope);
                }
                if *fresh && !self.asks_for_more(&state, scope, headers) {
                    refused.note(token.credentials.as_ref());
                }
            }
            None => {}
        }
        let method = self.method(scope, headers, refused).await?;
        self.state().methods.put(scope.clone(), method);
        Ok(())
    }

    /// True if the server now names a scope that the token was not asked for.
    fn asks_for_more(&self, state: &State, scope: &Scope, headers: &HeaderMap) -> bool {
        let Some(Method::Bearer { scopes, .. }) = state.methods.peek(scope) else { return false };
        let wanted = challenges(headers).into_iter().find(|c| c.scheme == "bearer");
        wanted.is_some_and(|wanted| scope_words(&wanted).any(|word| !scopes.contains(word)))
    }

    async fn method(&self, scope: &Scope, headers: &HeaderMap, refused: &Refused) -> Result<Method, TryError> {
        let offered = challenges(headers);
        let by = |scheme: &str| offered.iter().find(|challenge| challenge.scheme == scheme);
        if let Some(bearer) = by("bearer") {
            let realm = bearer.parameters.get("realm").and_then(|realm| Url::parse(realm).ok());
            let realm = realm.filter(|realm| matches!(realm.scheme(), "http" | "https"));
            let realm = realm.ok_or(TryError::Header("WWW-Authenticate"))?;
            let service = bearer.parameters.get("service").cloned();
            let mut scopes: BTreeSet<String> = scope_words(bearer).map(str::to_owned).collect();
            // A pushing client meets a challenge for reading first, and would need a second token soon.
            if scope.push || scopes.is_empty() {
                scopes.extend(scope.words());
            }
            if !refused.is_empty() {
                let found = self.credentials(scope).await?;
                if refused.without(&found).next().is_none() {
                    return Err(TryError::Denied(
                        "the server does not accept a new token; the login may lack the right",
                    ));
                }
            }
            return Ok(Method::Bearer { realm, service, scopes });
        }
        if by("basic").is_some() {
            let found = self.credentials(scope).await?;
            for credentials in refused.without(&found) {
                if let Credentials::Basic { username, password } = credentials {
                    return Ok(Method::Fixed(basic(username, password)?, credentials.clone()));
                }
            }
            return Err(TryError::Denied(match (refused.is_empty(), found.is_empty()) {
                (false, _) => "the server does not accept the user name and password for it",
                (true, false) => "the server wants a user name and password, and there is only a token",
                (true, true) => "the server wants a user name and password, and none is known for it",
            }));
        }
        Err(TryError::Denied("the server offers no way of authentication that is known here"))
    }

    async fn credentials(&self, scope: &Scope) -> Result<Vec<Credentials>, TryError> {
        let found = self.config.find(&self.host, &scope.repository).await;
        found.map_err(|error| TryError::Credentials(Arc::new(error)))
    }
}

fn challenges(headers: &HeaderMap) -> Vec<Challenge> {
    let texts = headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
    texts.flat_map(challenge::parse).collect()
}

fn scope_words(challenge: &Challenge) -> impl Iterator<Item = &str> {
    challenge.parameters.get("scope").into_iter().flat_map(|scopes| scopes.split(' ')).filter(|word| !word.is_empty())
}

/// A header's value, hidden from `Debug`.
fn header(text: &str) -> Result<HeaderValue, TryError> {
    let mut value =
        HeaderValue::from_str(text).map_err(|_| TryError::Denied("the credentials hold characters no header can"))?;
    value.set_sensitive(true);
    Ok(value)
}

fn basic(username: &str, password: &Secret) -> Result<HeaderValue, TryError> {
    let pair = format!("{username}:{}", password.expose());
    header(&format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair)))
}

/// Everything one request for a token needs.
struct TokenRequest {
    http: reqwest::Client,
    host: String,
    repository: String,
    plain: bool,
    config: Arc<CredentialConfig>,
    wait: Wait,
    wanted: Wanted,
}

/// Which token is wanted of whom.
struct Wanted {
    realm: Url,
    service: Option<String>,
    scopes: BTreeSet<String>,
    /// What not to ask with.
    refused: Refused,
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl TokenRequest {
    async fn run(self) -> Result<Arc<Token>, TryError> {
        let realm = SafeUrl::from(&self.wanted.realm);
        self.ask().await.map(Arc::new).map_err(|source| TryError::Token { realm, source: Box::new(source) })
    }

    /// Asks with all that is known, one after the other, until a token is given.
    async fn ask(&self) -> Result<Token, TryError> {
        let found = self.config.find(&self.host, &self.repository).await;
        let found = found.map_err(|error| TryError::Credentials(Arc::new(error)))?;
        if found.is_empty() {
            return self.ask_as(None).await;
        }
        let mut denied = None;
        for credentials in self.wanted.refused.without(&found) {
            match self.ask_as(Some(credentials)).await {
                Err(error) if is_about_login(&error) => denied = denied.or(Some(error)),
                other => return other,
            }
        }
        Err(denied.unwrap_or(TryError::Denied("the registry accepts no token for what is known")))
    }

    async fn ask_as(&self, credentials: Option<&Credentials>) -> Result<Token, TryError> {
        let asked = Instant::now();
        if let Some(Credentials::RegistryToken(token)) = credentials {
            let header = header(&format!("Bearer {}", token.expose()))?;
            return Ok(Token { header, renew_at: asked + DEFAULT_LIFETIME, credentials: credentials.cloned() });
        }
        let guarded = self.wanted.realm.scheme() == "https" || self.plain || is_loopback(&self.wanted.realm);
        if credentials.is_some() && !guarded {
            return Err(TryError::Denied("the password would travel over plain HTTP to the token server"));
        }
        let request = match credentials {
            Some(Credentials::IdentityToken(token)) => self.refresh(token),
            Some(Credentials::Basic { username, password }) => {
                self.get(Some(username)).header(AUTHORIZATION, basic(username, password)?)
            }
            Some(Credentials::RegistryToken(_)) | None => self.get(None),
        };
        let request = request.build().map_err(super::retry::classify)?;
        let response = send(&self.http, request, &self.wait).await?;
        if !response.status().is_success() {
            return Err(match response.status().as_u16() {
                401 if credentials.is_some() => TryError::Denied("it does not accept the login"),
                401 => TryError::Denied("it wants a login, and none is known for the registry"),
                _ => refusal(response, &self.wait).await,
            });
        }
        let answer: TokenAnswer = read_json(response, &self.wait).await?;
        let text = answer.token.or(answer.access_token).filter(|text| !text.is_empty());
        let text = text.ok_or(TryError::Denied("its answer holds no token"))?;
        let lifetime = answer.expires_in.map_or(DEFAULT_LIFETIME, Duration::from_secs).min(LONGEST_LIFETIME);
        let renew_at = asked + lifetime.saturating_sub(RENEWAL_MARGIN.min(lifetime / 4));
        Ok(Token { header: header(&format!("Bearer {text}"))?, renew_at, credentials: credentials.cloned() })
    }

    /// The token specification's GET.
    fn get(&self, account: Option<&str>) -> reqwest::RequestBuilder {
        let mut url = self.wanted.realm.clone();
        {
            let mut query = url.query_pairs_mut();
            query.extend_pairs(self.wanted.service.iter().map(|service| ("service", service)));
            query.extend_pairs(self.wanted.scopes.iter().map(|scope| ("scope", scope)));
            query.extend_pairs(account.iter().map(|account| ("account", account)));
        }
        self.http.get(url)
    }

    /// The OAuth2 specification's POST with an identity token.
    fn refresh(&self, token: &Secret) -> reqwest::RequestBuilder {
        let scope: Vec<&str> = self.wanted.scopes.iter().map(String::as_str).collect();
        let body = url::form_urlencoded::Serializer::new(String::new())
            .append_pair("grant_type", "refresh_token")
            .append_pair("service", self.wanted.service.as_deref().unwrap_or_default())
            .append_pair("client_id", "headstart")
            .append_pair("scope", &scope.join(" "))
            .append_pair("refresh_token", token.expose())
            .finish();
        self.http.post(self.wanted.realm.clone()).header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(body)
    }
}

/// True if another login could have another answer: what token servers say of one that they do not like.
fn is_about_login(error: &TryError) -> bool {
    matches!(error, TryError::Denied(_) | TryError::Status { status: 400 | 403, .. })
}
