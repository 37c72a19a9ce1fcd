//! What can go wrong with an answer, and how a good answer is spoilt.

use std::io;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{CONTENT_LENGTH, CONTENT_RANGE};
use axum::http::{HeaderName, HeaderValue};
use axum::response::Response;
use futures::StreamExt as _;

/// What goes wrong with a request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// This status, with these headers and no body.
    Status(u16, Vec<(&'static str, String)>),
    /// This status, with this body.
    Body(u16, String),
    /// The range is ignored: 200 and everything.
    IgnoreRange,
    /// The connection ends after this many bytes of the body.
    Cut(usize),
    /// One byte of the body is another.
    Corrupt,
    /// `Content-Range` says this.
    ContentRange(&'static str),
    /// Only this many bytes of the range are sent, and said so.
    Short(usize),
    /// 307 to `BASE/store/DIGEST?sig=secret`.
    Redirect(String),
    /// Bytes come one at a time with this pause between them.
    Trickle(Duration),
    /// No answer at all.
    Hang,
    /// The connection ends while the request's body is still being sent.
    DropUpload(usize),
    /// An answer without this header.
    Without(HeaderName),
    /// An answer with this header changed.
    With(HeaderName, String),
}

/// Changes a good answer.
pub(super) async fn spoil(mut response: Response, fault: Fault) -> Response {
    match fault {
        Fault::Without(name) => {
            response.headers_mut().remove(name);
            return response;
        }
        Fault::With(name, value) => {
            response.headers_mut().insert(name, value.parse().expect("scripts name real header values"));
            return response;
        }
        Fault::ContentRange(value) => {
            response.headers_mut().insert(CONTENT_RANGE, HeaderValue::from_static(value));
            return response;
        }
        _ => {}
    }
    let (parts, body) = response.into_parts();
    let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap_or_default();
    let length = bytes.len();
    let body = match fault {
        Fault::Corrupt => {
            let mut bytes = bytes.to_vec();
            if let Some(byte) = bytes.get_mut(length / 2) {
                *byte ^= 0xff;
            }
            Body::from(bytes)
        }
        Fault::Cut(after) => {
            let head = bytes.slice(..after.min(length));
            let pieces = [Ok(head), Err(io::Error::other("scripted"))];
            // A pause lets the head leave before the connection ends.
            Body::from_stream(futures::stream::iter(pieces).then(|piece| async {
                if piece.is_err() {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                piece
            }))
        }
        Fault::Trickle(pause) => {
            let pieces = (0..length).map(move |at| bytes.slice(at..=at));
            Body::from_stream(futures::stream::iter(pieces).then(move |piece| async move {
                tokio::time::sleep(pause).await;
                Ok::<_, io::Error>(piece)
            }))
        }
        _ => Body::from(bytes),
    };
    let mut response = Response::from_parts(parts, body);
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    if let Fault::Short(count) = fault {
        return shorten(response, count).await;
    }
    response
}

async fn shorten(response: Response, count: usize) -> Response {
    let (mut parts, body) = response.into_parts();
    let bytes = axum::body::to_bytes(body, usize::MAX).await.unwrap_or_default();
    let count = count.min(bytes.len());
    let old = parts.headers.get(CONTENT_RANGE).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    if let Some((start, rest)) = old.strip_prefix("bytes ").and_then(|old| old.split_once('-'))
        && let (Ok(start), Some((_, total))) = (start.parse::<usize>(), rest.split_once('/'))
    {
        let range = format!("bytes {start}-{}/{total}", start + count - 1);
        parts.headers.insert(CONTENT_RANGE, range.parse().expect("digits make a header"));
    }
    parts.headers.insert(CONTENT_LENGTH, HeaderValue::from(count));
    Response::from_parts(parts, Body::from(bytes.slice(..count)))
}
