//! Metrics and health for machines that watch this one: HTTP on a TCP address.
//!
//! ```text
//! GET /metrics    Prometheus's text format 0.0.4
//! GET /healthz    200 while the process answers
//! GET /readyz     200 when the mounts of a daemon before it are back and as long as it is not about to end, else 503
//! ```
//!
//! Names come from `observe` alone. Nothing here changes anything, and nothing secret is told.

use std::fmt::Write as _;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;

use super::api::Api;
use crate::control::Served as _;
use crate::fetch::Counters;
use crate::observe::{FETCH_METRICS, HOST_METRICS, HOST_METRICS_LEN, Metric};

/// What the listener answers.
pub(super) fn router(api: Arc<Api>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "healthy\n"))
        .route("/readyz", get(ready))
        .with_state(api)
}

async fn ready(State(api): State<Arc<Api>>) -> (StatusCode, &'static str) {
    match api.health().ready {
        true => (StatusCode::OK, "ready\n"),
        false => (StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
    }
}

async fn metrics(State(api): State<Arc<Api>>) -> impl IntoResponse {
    let text = tokio::task::spawn_blocking(move || text(&api.counters(), &api.gauges())).await;
    match text {
        Ok(text) => (StatusCode::OK, [(CONTENT_TYPE, "text/plain; version=0.0.4")], text),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, [(CONTENT_TYPE, "text/plain")], String::new()),
    }
}

/// The numbers in the order of `FETCH_METRICS` and `HOST_METRICS`.
fn text(counters: &Counters, gauges: &[u64; HOST_METRICS_LEN]) -> String {
    let mut text = String::new();
    let Counters { fetched, needed, read, chunks, requests, retries, corrupt, disk_full, evicted } = *counters;
    let counted = [fetched, needed, read, chunks, requests, retries, corrupt, disk_full, evicted];
    for (metric, value) in FETCH_METRICS.iter().zip(counted) {
        line(&mut text, metric, "_total", "counter", value);
    }
    for (metric, value) in HOST_METRICS.iter().zip(gauges) {
        line(&mut text, metric, "", "gauge", *value);
    }
    text
}

fn line(text: &mut String, metric: &Metric, end: &str, kind: &str, value: u64) {
    let unit = Some(metric.unit.suffix()).filter(|unit| !format!("_{}", metric.name).ends_with(unit)).unwrap_or("");
    let name = format!("headstart_{}{unit}{end}", metric.name);
    writeln!(text, "# HELP {name} {}\n# TYPE {name} {kind}\n{name} {value}", metric.meaning)
        .expect("writing to a string never fails");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_with_their_names() {
        let counters = Counters {
            fetched: 1,
            needed: 2,
            read: 3,
            chunks: 4,
            requests: 5,
            retries: 6,
            corrupt: 7,
            disk_full: 8,
            evicted: 9,
        };
        let text = text(&counters, &[9, 10, 11, 1]);
        let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(
            lines,
            [
                "headstart_fetched_bytes_total 1",
                "headstart_needed_bytes_total 2",
                "headstart_read_bytes_total 3",
                "headstart_chunks_total 4",
                "headstart_requests_total 5",
                "headstart_retries_requests_total 6",
                "headstart_corrupt_chunks_total 7",
                "headstart_disk_full_chunks_total 8",
                "headstart_evicted_chunks_total 9",
                "headstart_mounts 9",
                "headstart_uptime_seconds 10",
                "headstart_resident_bytes 11",
                "headstart_ready 1",
            ]
        );
        let manual = include_str!("../../docs/metrics.md");
        for line in lines {
            let name = line.split(' ').next().unwrap();
            assert!(manual.contains(&format!("| `{name}` |")), "docs/metrics.md lacks {name}");
        }
        assert!(
            text.contains("# HELP headstart_mounts mounts that are served\n# TYPE headstart_mounts gauge\n"),
            "{text}"
        );
    }
}
