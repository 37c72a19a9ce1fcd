//! Ranges of blobs as streams that survive broken connections, expired addresses and servers that ignore ranges.
//!
//! A stream that is cut goes on where it stopped, from the next server if there is one. A redirect's target is remembered
//! for its blob until it fails or its time is over. The bytes are not verified here.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _};
use reqwest::header::{ACCEPT_ENCODING, CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Method, Response};
use url::Url;

use super::auth::Scope;
use super::client::{Client, Need, pull_scope};
use super::endpoint::{Ask, Endpoint};
use super::error::{Attempts, RegistryError, TryError};
use super::exchange::Body;
use super::retry::{Verdict, is_transient, judge, may_succeed_later};
use crate::model::{BlobDigest, BlobSource, ByteRange, ByteStream, SourceError};
use crate::oci::ImageName;

/// How long a redirect's target is remembered if it does not tell its own time: object stores sign for 15 to 20 minutes.
const REMEMBER: Duration = Duration::from_secs(300);
/// Bytes that have to arrive between two cuts for the first one to be forgiven.
const FORGIVEN_AFTER: u64 = 1 << 20;

/// The blobs of one repository.
#[derive(Debug, Clone)]
pub struct RemoteBlobs {
    client: Client,
    name: ImageName,
}

impl RemoteBlobs {
    /// The blobs behind `name`; its tag and digest do not matter.
    pub fn new(client: Client, name: ImageName) -> Self {
        Self { client, name }
    }
}

impl BlobSource for RemoteBlobs {
    fn open(&self, blob: BlobDigest, range: ByteRange, attempt: u32) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
        self.client.blob_stream(&self.name, blob, range, attempt).boxed()
    }

    fn origin(&self) -> String {
        format!("{}/{}", self.name.host(), self.name.repository())
    }
}

impl Client {
    /// The bytes `range` of `blob` in the repository of `name`. See [`BlobSource::open`].
    ///
    /// # Errors
    /// No server could be brought to send the first byte.
    pub async fn blob_stream(
        &self,
        name: &ImageName,
        blob: BlobDigest,
        range: ByteRange,
        attempt: u32,
    ) -> Result<ByteStream, SourceError> {
        let mut reader = Reader {
            client: self.clone(),
            name: name.clone(),
            blob,
            range,
            at: range.start(),
            skip: attempt,
            fresh: attempt > 0,
            open: None,
            cuts: 0,
            since_cut: 0,
            attempts: Attempts::default(),
        };
        if !range.is_empty() {
            reader.open().await?;
        }
        let pieces = futures::stream::unfold(Some(reader), |reader| async {
            let mut reader = reader?;
            match reader.next().await {
                Ok(Some(piece)) => Some((Ok(piece), Some(reader))),
                Ok(None) => None,
                Err(error) => Some((Err(error), None)),
            }
        });
        Ok(pieces.boxed())
    }

    /// Asks the servers for the bytes `range`.
    async fn open_blob(
        &self,
        name: &ImageName,
        blob: BlobDigest,
        range: ByteRange,
        skip: u32,
        fresh: bool,
    ) -> Result<Open, RegistryError> {
        let (action, object) = ("fetch", format!("bytes {range} of {blob} of {}/{}", name.host(), name.repository()));
        let servers = self.servers(name, Need::Pull, action, &object, skip).await?;
        let scope = &pull_scope(name);
        let attempt = |server: Arc<Endpoint>| self.open_at(server, scope, blob, range, fresh).boxed();
        self.try_all(servers, action, &object, attempt).await
    }

    async fn open_at(
        &self,
        server: Arc<Endpoint>,
        scope: &Scope,
        blob: BlobDigest,
        range: ByteRange,
        fresh: bool,
    ) -> Result<Open, TryError> {
        let headers = range_headers(range);
        if let Some(url) = self.remembered(&server, blob).filter(|_| !fresh) {
            match server.ask_stranger(url, &headers).await.and_then(|response| check(response, range)) {
                Ok(checked) => return Ok(Open::new(checked, server)),
                // Expired, moved or gone: the registry knows.
                Err(error) => {
                    tracing::debug!(%blob, %error, "a remembered redirect failed");
                    self.forget(&server, blob);
                }
            }
        }
        let mut ask = Ask::new(Method::GET, format!("/{}/blobs/{blob}", scope.repository), scope);
        ask.headers = headers;
        let answer = server.ask(&ask).await?;
        let checked = check(answer.response, range)?;
        if let Some(url) = answer.redirected {
            self.remember(&server, blob, url);
        }
        Ok(Open::new(checked, server))
    }
}

fn range_headers(range: ByteRange) -> HeaderMap {
    let mut headers = HeaderMap::new();
    // The bytes as they are: a cache that compresses on the way would shift every offset.
    headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
    // Both numbers are inclusive; the callers ask for no empty range.
    let last = range.end().saturating_sub(1);
    let value = format!("bytes={}-{last}", range.start());
    headers.insert(RANGE, HeaderValue::from_str(&value).expect("digits and a dash make a header"));
    headers
}

/// An answer that holds the wanted bytes: from `skip` bytes after its beginning, up to `end` of the blob.
struct Checked {
    response: Response,
    skip: u64,
    end: u64,
}

fn check(response: Response, asked: ByteRange) -> Result<Checked, TryError> {
    let wrong = |answer: &str| TryError::Range { asked, answer: super::secret::printable(answer) };
    let headers = response.headers();
    if headers.get(reqwest::header::CONTENT_ENCODING).is_some_and(|encoding| encoding.as_bytes() != b"identity") {
        return Err(wrong("a compressed body"));
    }
    match response.status().as_u16() {
        206 => {
            let text = headers.get(CONTENT_RANGE).and_then(|value| value.to_str().ok()).unwrap_or("no Content-Range");
            let sent = parse_content_range(text).ok_or_else(|| wrong(text))?;
            // Fewer bytes than asked for are legal, others are not.
            if sent.start() != asked.start() || sent.end() > asked.end() {
                return Err(wrong(text));
            }
            Ok(Checked { response, skip: 0, end: sent.end() })
        }
        200 => {
            if response.content_length().is_some_and(|whole| whole < asked.end()) {
                return Err(wrong("the whole blob, which is shorter"));
            }
            if asked.start() > 0 {
                tracing::warn!(skipped = asked.start(), "a server ignores ranges; the bytes before are thrown away");
            }
            Ok(Checked { response, skip: asked.start(), end: asked.end() })
        }
        other => Err(wrong(&format!("status {other}"))),
    }
}

/// `bytes 0-99/1000` or `bytes 0-99/*`.
fn parse_content_range(text: &str) -> Option<ByteRange> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let sent = ByteRange::new(first.trim().parse().ok()?, last.trim().parse::<u64>().ok()?.checked_add(1)?).ok()?;
    let fits = match total.trim() {
        "*" => true,
        total => sent.end() <= total.parse().ok()?,
    };
    (fits && !sent.is_empty()).then_some(sent)
}

/// How long the target of a redirect may be used: three quarters of what its signature says, else [`REMEMBER`].
pub(super) fn lifetime_of(url: &Url, now: SystemTime) -> Duration {
    let mut lifetime = REMEMBER;
    for (name, value) in url.query_pairs() {
        let Ok(seconds) = value.parse::<u64>() else { continue };
        let left = match &*name {
            "X-Amz-Expires" | "X-Goog-Expires" => seconds,
            "Expires" => seconds.saturating_sub(now.duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs())),
            _ => continue,
        };
        lifetime = lifetime.min(Duration::from_secs(left / 4 * 3));
    }
    lifetime
}

/// A body in flight.
struct Open {
    body: Body,
    server: Arc<Endpoint>,
    skip: u64,
    end: u64,
}

impl Open {
    fn new(checked: Checked, server: Arc<Endpoint>) -> Self {
        let body = Body::new(checked.response, server.wait());
        Self { body, server, skip: checked.skip, end: checked.end }
    }
}

/// Reads a range across as many bodies as it takes.
struct Reader {
    client: Client,
    name: ImageName,
    blob: BlobDigest,
    range: ByteRange,
    /// The next byte of the blob to hand out.
    at: u64,
    /// How many servers to pass over.
    skip: u32,
    /// True to ask the registry anew for the blob's place.
    fresh: bool,
    open: Option<Open>,
    cuts: u32,
    since_cut: u64,
    attempts: Attempts,
}

impl Reader {
    async fn open(&mut self) -> Result<(), SourceError> {
        let left = ByteRange::new(self.at, self.range.end()).map_err(|error| self.failed(false, error))?;
        match self.client.open_blob(&self.name, self.blob, left, self.skip, self.fresh).await {
            Ok(open) => {
                self.open = Some(open);
                Ok(())
            }
            Err(error) => Err(self.failed(is_transient(&error), error)),
        }
    }

    fn failed(&self, transient: bool, source: impl std::error::Error + Send + Sync + 'static) -> SourceError {
        let origin = format!("{}/{}", self.name.host(), self.name.repository());
        SourceError { blob: self.blob, range: self.range, origin, transient, source: Box::new(source) }
    }

    async fn next(&mut self) -> Result<Option<Bytes>, SourceError> {
        loop {
            if self.at >= self.range.end() {
                return Ok(None);
            }
            let open = match &mut self.open {
                Some(open) => open,
                None => {
                    self.open().await?;
                    continue;
                }
            };
            let expected = open.skip.saturating_add(open.end.saturating_sub(self.at));
            let error = match open.body.next(expected).await {
                Ok(Some(mut piece)) => {
                    let length = piece.len() as u64;
                    let skipped = open.skip.min(length);
                    open.skip -= skipped;
                    // Bytes behind the wanted ones are not ours.
                    let wanted = (length - skipped).min(open.end.saturating_sub(self.at));
                    let (Ok(from), Ok(count)) = (usize::try_from(skipped), usize::try_from(wanted)) else { continue };
                    if count == 0 {
                        continue;
                    }
                    let piece = piece.split_off(from).split_to(count);
                    self.at = self.at.saturating_add(wanted);
                    self.since_cut = self.since_cut.saturating_add(wanted);
                    if self.at >= open.end {
                        // The whole answer was used, or more of it than we want follows: either way done with it.
                        self.open = None;
                    }
                    return Ok(Some(piece));
                }
                Ok(None) => TryError::Cut { received: open.body.received(), expected, source: None },
                Err(error) => error,
            };
            self.cut(error).await?;
        }
    }

    /// A body ended early: go on elsewhere, or give up.
    async fn cut(&mut self, error: TryError) -> Result<(), SourceError> {
        let Some(open) = self.open.take() else { return Ok(()) };
        tracing::debug!(blob = %self.blob, server = open.server.name(), %error, at = self.at, "a body was cut");
        if self.since_cut >= FORGIVEN_AFTER {
            self.cuts = 0;
        }
        self.since_cut = 0;
        let verdict = judge(&error);
        self.attempts.push(&open.server.name(), error);
        self.cuts += 1;
        self.skip = self.skip.saturating_add(1);
        self.fresh = true;
        let patience = self.client.patience();
        if self.cuts >= patience.rounds.max(1) || verdict == Verdict::Elsewhere {
            let error = RegistryError::Failed {
                action: "fetch",
                object: format!("the rest of a range from byte {}", self.at),
                attempts: std::mem::take(&mut self.attempts),
            };
            let transient = match &error {
                RegistryError::Failed { attempts, .. } => may_succeed_later(attempts),
                _ => false,
            };
            return Err(self.failed(transient, error));
        }
        if self.cuts > 1 {
            tokio::time::sleep(patience.wait(self.cuts - 2, None)).await;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_strictly() {
        let range = |start, end| ByteRange::new(start, end).ok();
        for (text, expected) in [
            ("bytes 0-99/1000", range(0, 100)),
            ("bytes 5-5/*", range(5, 6)),
            ("bytes 5-5/5", None),
            ("bytes 5-4/10", None),
            ("bytes */1000", None),
            ("items 0-9/10", None),
            ("bytes 0-18446744073709551615/*", None),
            ("bytes -5/10", None),
            ("no Content-Range", None),
        ] {
            assert_eq!(parse_content_range(text), expected, "{text}");
        }
    }

    #[test]
    fn a_redirect_is_remembered_no_longer_than_its_signature_lives() {
        let now = UNIX_EPOCH + Duration::from_secs(1000);
        for (query, seconds) in [
            ("", 300),
            ("X-Amz-Expires=1200", 300),
            ("X-Amz-Expires=100", 75),
            ("Expires=1100", 75),
            ("Expires=900", 0),
            ("Expires=soon", 300),
        ] {
            let url = Url::parse(&format!("https://s.example/b?{query}")).unwrap();
            assert_eq!(lifetime_of(&url, now), Duration::from_secs(seconds), "{query}");
        }
    }
}
