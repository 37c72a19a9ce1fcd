//! Who is let in, and the tokens that let in.

use axum::body::Body;
use axum::http::Method;
use axum::http::header::{CONTENT_TYPE, WWW_AUTHENTICATE};
use axum::response::Response;
use base64::Engine as _;

use super::{Seen, Shared, answer, lock, refuse, repository_of};

/// Who is let in.
#[derive(Debug, Clone)]
pub enum Door {
    /// Everybody.
    Open,
    /// Who knows the password.
    Basic {
        /// User.
        user: String,
        /// Password.
        password: String,
    },
    /// Who brings a token of ours.
    Bearer {
        /// Who gets one: anybody, or who knows this user and password.
        login: Option<(String, String)>,
        /// Or who posts this identity token.
        identity: Option<String>,
        /// What a token is said to live, in seconds.
        expires_in: Option<u64>,
        /// Where tokens are given out, if not here.
        realm: Option<String>,
    },
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}")))
}

pub(super) fn keep_out(shared: &Shared, seen: &Seen) -> Option<Response> {
    let brought = seen.header("authorization").unwrap_or_default().to_owned();
    match &*lock(&shared.door) {
        Door::Open => None,
        Door::Basic { user, password } => {
            let wanted = (WWW_AUTHENTICATE, "Basic realm=\"test\"".to_owned());
            (brought != basic(user, password)).then(|| answer(401, &[wanted], Body::empty()))
        }
        Door::Bearer { realm, .. } => {
            let repository = repository_of(&seen.path).unwrap_or_default();
            let writes = !matches!(seen.method, Method::GET | Method::HEAD);
            let needed = format!("repository:{repository}:{}", if writes { "pull,push" } else { "pull" });
            let content = lock(&shared.content);
            let granted = brought.strip_prefix("Bearer ").and_then(|token| content.tokens.get(token));
            let covers = |granted: &String| {
                granted.split(' ').any(|one| one == needed || one == format!("repository:{repository}:pull,push"))
            };
            if granted.is_some_and(covers) {
                return None;
            }
            let realm = realm.clone().unwrap_or_else(|| format!("http://{}/token", shared.address));
            let wanted = format!("Bearer realm=\"{realm}\",service=\"test\",scope=\"{needed}\"");
            Some(answer(401, &[(WWW_AUTHENTICATE, wanted)], Body::empty()))
        }
    }
}

pub(super) fn give_token(shared: &Shared, seen: &Seen, body: &[u8]) -> Response {
    let door = lock(&shared.door).clone();
    let Door::Bearer { login, identity, expires_in, .. } = door else { return refuse(404, "UNSUPPORTED") };
    let text =
        if seen.method == Method::POST { String::from_utf8_lossy(body).into_owned() } else { seen.query.clone() };
    let pairs: Vec<(String, String)> =
        url::form_urlencoded::parse(text.as_bytes()).map(|(n, v)| (n.into_owned(), v.into_owned())).collect();
    let all = |name: &str| pairs.iter().filter(|(n, _)| n == name).map(|(_, v)| v.clone()).collect::<Vec<_>>();
    let welcome = if seen.method == Method::POST {
        identity.is_some() && all("refresh_token").first() == identity.as_ref()
    } else {
        login.is_none_or(|(user, password)| seen.header("authorization") == Some(basic(&user, &password).as_str()))
    };
    if !welcome || all("service") != ["test"] {
        return refuse(401, "UNAUTHORIZED");
    }
    let mut content = lock(&shared.content);
    content.issued += 1;
    let token = format!("secret-token-{}-{}", shared.address.port(), content.issued);
    content.tokens.insert(token.clone(), all("scope").join(" "));
    let key = if seen.method == Method::POST { "access_token" } else { "token" };
    let mut body = serde_json::json!({ key: token });
    if let Some(seconds) = expires_in {
        body["expires_in"] = seconds.into();
    }
    answer(200, &[(CONTENT_TYPE, "application/json".to_owned())], body.to_string())
}
