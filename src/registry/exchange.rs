//! One HTTP exchange: sent with a deadline, refused in typed words, its body read within bounds.
//!
//! Knows nothing of authentication, redirects or retries.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Request, Response};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::error::TryError;
use super::retry::classify;
use super::secret::printable;

/// Most bytes of a refusal's body that are looked at.
const REFUSAL_LIMIT: u64 = 64 << 10;
/// Most bytes of a token server's answer.
const JSON_LIMIT: u64 = 1 << 20;

/// In each idle span a body must bring this many bytes, or end: slower than any link that could still carry an image, and
/// more than a peer sends by accident to keep a connection alive.
pub const MIN_PROGRESS: u64 = 4 << 10;

/// How long is waited for the parts of an answer.
#[derive(Debug, Clone)]
pub(super) struct Wait {
    pub(super) response: Duration,
    pub(super) idle: Duration,
}

/// Sends `request` and waits for the head of the answer.
pub(super) async fn send(http: &reqwest::Client, request: Request, wait: &Wait) -> Result<Response, TryError> {
    match tokio::time::timeout(wait.response, http.execute(request)).await {
        Ok(answer) => answer.map_err(classify),
        Err(_) => Err(TryError::Timeout { what: "the answer", limit: wait.response }),
    }
}

/// The pieces of a body, with the patience of [`Wait::idle`].
pub(super) struct Body {
    response: Response,
    window: Duration,
    window_ends: tokio::time::Instant,
    window_bytes: u64,
    received: u64,
}

impl Body {
    pub(super) fn new(response: Response, wait: &Wait) -> Self {
        let window_ends = tokio::time::Instant::now() + wait.idle;
        Self { response, window: wait.idle, window_ends, window_bytes: 0, received: 0 }
    }

    /// Bytes that came so far.
    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// The next piece, or none at the end. `expected` is for the message alone.
    pub(super) async fn next(&mut self, expected: u64) -> Result<Option<Bytes>, TryError> {
        // Time in which nobody asked is not the peer's.
        let now = tokio::time::Instant::now();
        if self.window_ends < now {
            self.window_ends = now + self.window;
            self.window_bytes = 0;
        }
        loop {
            match tokio::time::timeout_at(self.window_ends, self.response.chunk()).await {
                Ok(Ok(Some(piece))) => {
                    self.received = self.received.saturating_add(piece.len() as u64);
                    self.window_bytes = self.window_bytes.saturating_add(piece.len() as u64);
                    return Ok(Some(piece));
                }
                Ok(Ok(None)) => return Ok(None),
                Ok(Err(error)) => {
                    let source = Some(std::sync::Arc::new(error.without_url()));
                    return Err(TryError::Cut { received: self.received, expected, source });
                }
                Err(_) if self.window_bytes >= MIN_PROGRESS => {
                    self.window_ends = tokio::time::Instant::now() + self.window;
                    self.window_bytes = 0;
                }
                Err(_) => return Err(TryError::Trickle { received: self.window_bytes, window: self.window }),
            }
        }
    }
}

/// A whole body of at most `limit` bytes.
pub(super) async fn read_bounded(response: Response, limit: u64, wait: &Wait) -> Result<Bytes, TryError> {
    let announced = response.content_length();
    if announced.is_some_and(|length| length > limit) {
        return Err(TryError::TooLarge(limit));
    }
    let mut body = Body::new(response, wait);
    let mut whole = BytesMut::new();
    while let Some(piece) = body.next(announced.unwrap_or(0)).await? {
        if body.received() > limit {
            return Err(TryError::TooLarge(limit));
        }
        whole.extend_from_slice(&piece);
    }
    Ok(whole.freeze())
}

/// A small JSON body. The parser's message could quote it and is reduced to a place.
pub(super) async fn read_json<T: DeserializeOwned>(response: Response, wait: &Wait) -> Result<T, TryError> {
    let body = read_bounded(response, JSON_LIMIT, wait).await?;
    serde_json::from_slice(&body).map_err(|error| TryError::Json { line: error.line(), column: error.column() })
}

#[derive(Deserialize)]
struct Refusals {
    errors: Vec<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: Option<String>,
}

/// The error behind an answer that is no success: its status, and the code and message of the distribution
/// specification's error body. Other bodies (pages of proxies) are not shown.
pub(super) async fn refusal(response: Response, wait: &Wait) -> TryError {
    let status = response.status().as_u16();
    let retry_after = retry_after(response.headers(), SystemTime::now());
    let message = match read_bounded(response, REFUSAL_LIMIT, wait).await {
        Ok(body) => match serde_json::from_slice::<Refusals>(&body).ok().and_then(|r| r.errors.into_iter().next()) {
            Some(Refusal { code, message: Some(message) }) => printable(&format!("{code}: {message}")),
            Some(Refusal { code, message: None }) => printable(&code),
            None => String::new(),
        },
        Err(_) => String::new(),
    };
    TryError::Status { status, message, retry_after }
}

/// `Retry-After` in seconds or as a date.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let then = http_date(text)?;
    let now = now.duration_since(UNIX_EPOCH).ok()?.as_secs();
    Some(Duration::from_secs(then.saturating_sub(now)))
}

/// Seconds since 1970 of RFC 9110's preferred form: `Sun, 06 Nov 1994 08:49:37 GMT`.
fn http_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let mut words = text.split_once(", ")?.1.split(' ');
    let day: u64 = words.next()?.parse().ok()?;
    let month_name = words.next()?;
    let month = u64::try_from(MONTHS.iter().position(|month| *month == month_name)?).ok()? + 1;
    let year: u64 = words.next()?.parse().ok()?;
    let mut clock = words.next()?.split(':');
    let mut part = || clock.next()?.parse::<u64>().ok();
    let (hour, minute, second) = (part()?, part()?, part()?);
    if !(1970..=9999).contains(&year) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // Days from civil, counted from March so that leap days come last.
    let (y, m) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1;
    // 719,468 days lie between the start of that count and 1970-01-01.
    Some((days.checked_sub(719_468)?) * 86_400 + hour * 3_600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_read() {
        for (text, expected) in [
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(784_111_777)),
            ("Thu, 01 Jan 1970 00:00:00 GMT", Some(0)),
            ("Thu, 29 Feb 2024 12:00:00 GMT", Some(1_709_208_000)),
            ("Thu, 29 Foo 2024 12:00:00 GMT", None),
            ("tomorrow", None),
            ("Thu, 99 Feb 2024 12:00:00 GMT", None),
        ] {
            assert_eq!(http_date(text), expected, "{text}");
        }
    }

    #[test]
    fn a_server_may_ask_for_patience_in_two_ways() {
        let now = UNIX_EPOCH + Duration::from_secs(784_111_770);
        for (text, expected) in [
            ("7", Some(7)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(7)),
            ("Sun, 06 Nov 1994 08:49:00 GMT", Some(0)),
            ("-7", None),
            ("soon", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, text.parse().unwrap());
            assert_eq!(retry_after(&headers, now), expected.map(Duration::from_secs), "{text}");
        }
    }
}
