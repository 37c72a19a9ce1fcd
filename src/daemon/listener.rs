//! HTTP for anybody who can reach an address: few connections at once, and none that says nothing.
//!
//! Guarantees: more than [`Limits::connections`] wait until others have gone, in the kernel's queue; a connection on which
//! the head of a request does not come in time is closed, and so is one that has become old. What is answered is not its
//! business.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// How long to wait when the process has no descriptors left for a new connection.
const BREATH: Duration = Duration::from_millis(100);

/// How much is granted to whoever connects.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Connections at once.
    pub(super) connections: usize,
    /// Time for the head of a request, also for the next one on the same connection.
    pub(super) head: Duration,
    /// Time for a connection as a whole.
    pub(super) age: Duration,
}

impl Limits {
    /// For collectors of metrics and probes: a handful of them ask every few seconds.
    pub(super) const FEW: Self =
        Self { connections: 32, head: Duration::from_secs(10), age: Duration::from_secs(15 * 60) };
}

/// Answers with `router` for as long as it is polled.
pub(super) async fn answer(listener: TcpListener, router: Router, limits: Limits) {
    let places = Arc::new(Semaphore::new(limits.connections));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot take a connection for metrics");
                tokio::time::sleep(BREATH).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let mut builder = Builder::new(TokioExecutor::new()).http1_only();
            builder.http1().timer(TokioTimer::new()).header_read_timeout(limits.head);
            // How a connection ends is the matter of whoever made it.
            drop(tokio::time::timeout(limits.age, builder.serve_connection(TokioIo::new(stream), service)).await);
            drop(place);
        });
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use axum::routing::get;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;

    use super::*;

    /// Longer than anything takes here.
    const LONG: Duration = Duration::from_secs(60);

    async fn listening(limits: Limits) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(answer(listener, Router::new().route("/", get(async || "hello")), limits));
        address
    }

    async fn ask(stream: &mut TcpStream) -> String {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn who_says_nothing_is_shown_out() {
        for (limits, words) in [
            (Limits { connections: 1, head: Duration::from_millis(20), age: LONG }, "GET / HT"),
            (Limits { connections: 1, head: LONG, age: Duration::from_millis(20) }, ""),
        ] {
            let mut stream = TcpStream::connect(listening(limits).await).await.unwrap();
            stream.write_all(words.as_bytes()).await.unwrap();
            let mut said = Vec::new();
            let ended = tokio::time::timeout(LONG, stream.read_to_end(&mut said)).await;
            assert!(ended.is_ok(), "{words:?} was waited for");
        }
    }

    #[tokio::test]
    async fn who_comes_when_all_places_are_taken_waits_for_one() {
        let address = listening(Limits { connections: 1, head: LONG, age: LONG }).await;
        let mut first = TcpStream::connect(address).await.unwrap();
        first.write_all(b"GET").await.unwrap();
        let second = tokio::spawn(async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            ask(&mut stream).await
        });
        tokio::task::yield_now().await;
        assert!(!second.is_finished());
        drop(first);
        let answer = tokio::time::timeout(LONG, second).await.unwrap().unwrap();
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello"), "{answer}");
    }
}
