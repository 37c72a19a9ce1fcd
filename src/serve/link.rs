//! A link that is slower than loopback: one capacity shared by all connections, and a round trip for each new connection.
//!
//! Guarantees: over any stretch of time no more bytes leave than the bandwidth allows, plus [`QUEUE`] of it; connections
//! take turns write by write. Not modelled: TCP's slow start, loss, and the upstream direction.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, Sleep};

/// How far the link's transmitter may be booked ahead before writers wait. The timer's resolution is a millisecond, so a shorter
/// queue runs dry between wake-ups: measured at 1 Gbit/s, 0.5 ms gives 49 % of the rate, 1 ms 88 %, 2 ms and more all of it.
/// Twice the least that suffices.
const QUEUE: Duration = Duration::from_millis(4);
/// Most bytes one connection sends in its turn.
const TURN: usize = 64 << 10;

/// Bytes in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bandwidth(u64);

/// Why a text is not a bandwidth.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a bandwidth: write a number and bit, kbit, Mbit, Gbit (per second), or B, kB, MB, GB, KiB, MiB, GiB"
)]
pub struct BandwidthError(String);

impl Bandwidth {
    /// Bytes in a second.
    pub const fn bytes_per_second(self) -> u64 {
        self.0
    }

    fn time_for(self, bytes: usize) -> Duration {
        Duration::from_nanos(u64::try_from(bytes as u128 * 1_000_000_000 / u128::from(self.0)).unwrap_or(u64::MAX))
    }
}

impl FromStr for Bandwidth {
    type Err = BandwidthError;

    fn from_str(text: &str) -> Result<Self, BandwidthError> {
        let bad = || BandwidthError(text.to_owned());
        let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
        let (number, unit) = text.split_at(split);
        let number: u64 = number.parse().map_err(|_| bad())?;
        let unit = unit.strip_suffix("/s").or_else(|| unit.strip_suffix("ps")).unwrap_or(unit);
        let (factor, divisor) = match unit {
            "bit" => (1, 8),
            "kbit" => (1_000, 8),
            "Mbit" => (1_000_000, 8),
            "Gbit" => (1_000_000_000, 8),
            "B" => (1, 1),
            "kB" => (1_000, 1),
            "MB" => (1_000_000, 1),
            "GB" => (1_000_000_000, 1),
            "KiB" => (1 << 10, 1),
            "MiB" => (1 << 20, 1),
            "GiB" => (1 << 30, 1),
            _ => return Err(bad()),
        };
        let bytes = number.checked_mul(factor).ok_or_else(bad)? / divisor;
        if bytes == 0 { Err(bad()) } else { Ok(Self(bytes)) }
    }
}

/// The shared transmitter.
#[derive(Debug, Clone)]
pub(super) struct Link {
    shared: Option<Arc<Transmitter>>,
}

#[derive(Debug)]
struct Transmitter {
    bandwidth: Bandwidth,
    /// When the last byte accepted so far will have left.
    free_at: Mutex<Instant>,
}

impl Link {
    pub(super) fn new(bandwidth: Option<Bandwidth>) -> Self {
        let shared =
            bandwidth.map(|bandwidth| Arc::new(Transmitter { bandwidth, free_at: Mutex::new(Instant::now()) }));
        Self { shared }
    }

    /// When the transmitter will take more, if it does not now.
    fn busy_until(&self, now: Instant) -> Option<Instant> {
        let free_at = *self.shared.as_ref()?.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        (free_at > now + QUEUE).then(|| free_at - QUEUE)
    }

    /// Books the time `bytes` take.
    fn book(&self, now: Instant, bytes: usize) {
        if let Some(shared) = &self.shared {
            let mut free_at = shared.free_at.lock().unwrap_or_else(PoisonError::into_inner);
            *free_at = (*free_at).max(now) + shared.bandwidth.time_for(bytes);
        }
    }
}

/// Accepts connections at the far end of the link.
#[derive(Debug)]
pub(super) struct LinkListener {
    inner: TcpListener,
    link: Link,
    latency: Duration,
}

impl LinkListener {
    pub(super) const fn new(inner: TcpListener, link: Link, latency: Duration) -> Self {
        Self { inner, link, latency }
    }
}

impl Listener for LinkListener {
    type Io = LinkStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (LinkStream, SocketAddr) {
        // The inner listener's own `accept` logs and retries.
        let (stream, peer) = Listener::accept(&mut self.inner).await;
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%peer, %error, "cannot turn off delayed sending");
        }
        // The handshake of a far connection takes a round trip; on loopback it took none, so the first read waits for it.
        let handshake = (!self.latency.is_zero()).then(|| Box::pin(tokio::time::sleep(self.latency)));
        (LinkStream { inner: stream, link: self.link.clone(), handshake, turn: None }, peer)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }
}

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer(pub(super) SocketAddr);

impl Connected<IncomingStream<'_, LinkListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, LinkListener>) -> Self {
        Self(*stream.remote_addr())
    }
}

/// A connection whose writes wait for their turn on the link.
#[derive(Debug)]
pub(super) struct LinkStream {
    inner: TcpStream,
    link: Link,
    handshake: Option<Pin<Box<Sleep>>>,
    turn: Option<Pin<Box<Sleep>>>,
}

impl AsyncRead for LinkStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(handshake) = &mut self.handshake {
            ready!(handshake.as_mut().poll(cx));
            self.handshake = None;
        }
        Pin::new(&mut self.inner).poll_read(cx, buf)
    }
}

impl AsyncWrite for LinkStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            if let Some(turn) = &mut self.turn {
                ready!(turn.as_mut().poll(cx));
                self.turn = None;
            }
            let now = Instant::now();
            let Some(until) = self.link.busy_until(now) else {
                let piece = buf.get(..TURN).unwrap_or(buf);
                let written = ready!(Pin::new(&mut self.inner).poll_write(cx, piece))?;
                self.link.book(now, written);
                return Poll::Ready(Ok(written));
            };
            self.turn = Some(Box::pin(tokio::time::sleep_until(until)));
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bandwidths_are_read_in_bits_and_bytes() {
        for (text, bytes) in [
            ("1Gbit", 125_000_000),
            ("1Gbit/s", 125_000_000),
            ("100Mbps", 0),
            ("100Mbit", 12_500_000),
            ("8bit", 1),
            ("12MB", 12_000_000),
            ("12MBps", 12_000_000),
            ("3MiB/s", 3 << 20),
            ("5", 0),
            ("", 0),
            ("0GB", 0),
            ("7bit", 0),
            ("-1MB", 0),
            ("1 MB", 0),
            ("99999999999GiB", 0),
        ] {
            assert_eq!(text.parse().map_or(0, Bandwidth::bytes_per_second), bytes, "{text:?}");
        }
    }

    #[test]
    fn writers_wait_once_the_queue_is_full() {
        let link = Link::new(Some("1000B".parse().unwrap()));
        let start = Instant::now();
        assert_eq!(link.busy_until(start), None);
        link.book(start, 4);
        assert_eq!(link.busy_until(start), None, "4 ms of bytes are what the queue holds");
        link.book(start, 96);
        assert_eq!(link.busy_until(start), Some(start + Duration::from_millis(96)));
        assert_eq!(link.busy_until(start + Duration::from_millis(96)), None);
        // An idle link does not save up capacity.
        let later = start + Duration::from_secs(60);
        link.book(later, 1000);
        assert_eq!(link.busy_until(later), Some(later + Duration::from_millis(996)));
    }
}
