//! Metrics and health for machines that watch this one: HTTP on a TCP address.
//!
//! ```text
//! GET /metrics    Prometheus's text format 0.0.4
//! GET /healthz    200 while the process answers
//! GET /readyz     200 when the mounts of a daemon before it are back, as long as it is not about to end and, if containerd is
//!                 served, while its socket answers; else 503
//! ```
//!
//! Names come from `observe` alone. Nothing here changes anything, and nothing secret is told.

use std::fmt::Write as _;
use std::path::PathBuf;
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
use crate::grpc::{Calls, Tally, snapshotter_answers};
use crate::observe::{CALL_METRICS, CALL_SECONDS, FETCH_METRICS, HOST_METRICS, HOST_METRICS_LEN, Metric};

/// What the listener answers.
pub(super) fn router(api: Arc<Api>, calls: Arc<Calls>, snapshotter: Option<PathBuf>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "healthy\n"))
        .route("/readyz", get(ready))
        .with_state(Watched { api, calls, snapshotter })
}

#[derive(Clone)]
struct Watched {
    api: Arc<Api>,
    calls: Arc<Calls>,
    /// The socket that containerd is served on, if it is.
    snapshotter: Option<PathBuf>,
}

async fn ready(State(Watched { api, snapshotter, .. }): State<Watched>) -> (StatusCode, String) {
    if !api.health().ready {
        return (
            StatusCode::SERVICE_UNAVAILABLE,
            "not ready: mounts are brought back, or the end has begun\n".to_owned(),
        );
    }
    // Whether the very socket answers, not what this process believes: another one may have taken its name.
    let answer = match &snapshotter {
        Some(socket) => snapshotter_answers(socket).await,
        None => Ok(()),
    };
    match answer {
        Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: containerd gets no answer: {why}\n")),
    }
}

async fn metrics(State(Watched { api, calls, .. }): State<Watched>) -> impl IntoResponse {
    let text = tokio::task::spawn_blocking(move || text(&api.counters(), &api.gauges(), &calls)).await;
    match text {
        Ok(text) => (StatusCode::OK, [(CONTENT_TYPE, "text/plain; version=0.0.4")], text),
        Err(_) => (StatusCode::INTERNAL_SERVER_ERROR, [(CONTENT_TYPE, "text/plain")], String::new()),
    }
}

/// The numbers in the order of `FETCH_METRICS` and `HOST_METRICS`.
fn text(counters: &Counters, gauges: &[u64; HOST_METRICS_LEN], calls: &Calls) -> String {
    let mut text = String::new();
    let Counters { fetched, needed, read, chunks, requests, retries, corrupt, disk_full, evicted } = *counters;
    let counted = [fetched, needed, read, chunks, requests, retries, corrupt, disk_full, evicted];
    for (metric, value) in FETCH_METRICS.iter().zip(counted) {
        line(&mut text, metric, "_total", "counter", value);
    }
    for (metric, value) in HOST_METRICS.iter().zip(gauges) {
        line(&mut text, metric, "", "gauge", *value);
    }
    for part in of_calls(calls) {
        text.push_str(&part);
        text.push('\n');
    }
    text
}

fn line(text: &mut String, metric: &Metric, end: &str, kind: &str, value: u64) {
    let name = name(metric, end);
    writeln!(text, "{}\n{name} {value}", head(metric, &name, kind)).expect("writing to a string never fails");
}

fn name(metric: &Metric, end: &str) -> String {
    let unit = Some(metric.unit.suffix()).filter(|unit| !format!("_{}", metric.name).ends_with(unit)).unwrap_or("");
    format!("headstart_{}{unit}{end}", metric.name)
}

fn head(metric: &Metric, name: &str, kind: &str) -> String {
    format!("# HELP {name} {}\n# TYPE {name} {kind}", metric.meaning)
}

/// Lines about containerd's calls, each with the name of the call.
fn of_calls(calls: &Calls) -> Vec<String> {
    let [failed, seconds] = &CALL_METRICS;
    let (failed_name, name) = (name(failed, "_total"), name(seconds, ""));
    let mut lines = vec![head(failed, &failed_name, "counter")];
    lines.extend(calls.tallies().map(|(call, tally)| format!("{failed_name}{{call=\"{call}\"}} {}", tally.failed)));
    lines.push(head(seconds, &name, "histogram"));
    for (call, Tally { failed: _, time, within }) in calls.tallies() {
        let bounds = CALL_SECONDS.iter().map(ToString::to_string).chain(["+Inf".to_owned()]);
        let bucket = |(bound, count)| format!("{name}_bucket{{call=\"{call}\",le=\"{bound}\"}} {count}");
        lines.extend(bounds.zip(within).map(bucket));
        lines.push(format!("{name}_sum{{call=\"{call}\"}} {}", time.as_secs_f64()));
        lines.push(format!("{name}_count{{call=\"{call}\"}} {}", within[CALL_SECONDS.len()]));
    }
    lines
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
        let text = text(&counters, &[9, 10, 11, 1], &Calls::default());
        let (calls, others): (Vec<&str>, Vec<&str>) =
            text.lines().filter(|line| !line.starts_with('#')).partition(|line| line.contains('{'));
        for line in [
            "headstart_containerd_failed_calls_total{call=\"commit\"} 0",
            "headstart_containerd_call_seconds_bucket{call=\"prepare\",le=\"0.025\"} 0",
            "headstart_containerd_call_seconds_bucket{call=\"prepare\",le=\"+Inf\"} 0",
            "headstart_containerd_call_seconds_sum{call=\"prepare\"} 0",
            "headstart_containerd_call_seconds_count{call=\"cleanup\"} 0",
        ] {
            assert!(calls.contains(&line), "{line} is not among {calls:#?}");
        }
        let lines = others;
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
        let of_calls = ["headstart_containerd_failed_calls_total", "headstart_containerd_call_seconds"];
        for line in lines.into_iter().chain(of_calls) {
            let name = line.split(' ').next().unwrap();
            assert!(manual.contains(&format!("| `{name}` |")), "docs/metrics.md lacks {name}");
        }
        assert!(
            text.contains("# HELP headstart_mounts mounts that are served\n# TYPE headstart_mounts gauge\n"),
            "{text}"
        );
    }
}
