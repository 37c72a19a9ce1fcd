//! Names of what can be observed: spans, and what is counted. Nothing else invents such a name.

/// One range request for chunks of a layer. Fields: `blob`, `chunk` (the first), `chunks`, `cause`, `attempt`.
pub const FETCH_SPAN: &str = "fetch";

/// What a number counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Chunks of a layer.
    Chunks,
    /// Requests to a source of blobs.
    Requests,
    /// Seconds.
    Seconds,
    /// Mounts.
    Mounts,
    /// Calls of containerd.
    Calls,
    /// Yes (1) or no (0).
    Truth,
}

impl Unit {
    /// The word behind the name of what it counts, in Prometheus's text; chunks, requests and mounts name themselves.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::Bytes => "_bytes",
            Self::Chunks => "_chunks",
            Self::Requests => "_requests",
            Self::Calls => "_calls",
            Self::Seconds => "_seconds",
            Self::Mounts | Self::Truth => "",
        }
    }
}

/// A number that only grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Metric {
    /// Its name, as it appears wherever numbers are shown.
    pub name: &'static str,
    /// What it counts.
    pub unit: Unit,
    /// One sentence about it.
    pub meaning: &'static str,
}

const fn metric(name: &'static str, unit: Unit, meaning: &'static str) -> Metric {
    Metric { name, unit, meaning }
}

/// What fetching a layer has cost; the names are those of `fetch::Counters`.
pub const FETCH_METRICS: [Metric; 9] = [
    metric("fetched", Unit::Bytes, "bytes that came from the source, chunk index included"),
    metric("needed", Unit::Bytes, "stored bytes of the chunks that readers have touched"),
    metric("read", Unit::Bytes, "bytes of the image that readers asked for and got"),
    metric("chunks", Unit::Chunks, "chunks that arrived and were verified"),
    metric("requests", Unit::Requests, "requests sent"),
    metric("retries", Unit::Requests, "requests sent again because the one before broke off"),
    metric("corrupt", Unit::Chunks, "chunks whose bytes were wrong"),
    metric("disk_full", Unit::Chunks, "chunks that found the disk full"),
    metric("evicted", Unit::Chunks, "chunks that were evicted to make room"),
];

/// How many numbers tell how a serving process stands. A number of its own, because an optimising build cannot take the
/// length of a constant that a function makes in the type of an argument.
pub const HOST_METRICS_LEN: usize = 4;

/// How a serving process stands at a moment; these go up and down.
pub const HOST_METRICS: [Metric; HOST_METRICS_LEN] = [
    metric("mounts", Unit::Mounts, "mounts that are served"),
    metric("uptime", Unit::Seconds, "time since the daemon began"),
    metric("resident", Unit::Bytes, "memory that the daemon occupies"),
    metric("ready", Unit::Truth, "whether the mounts of a daemon before this one are back"),
];

/// The calls of containerd's snapshots and diff services, by the name that they have in logs and as label `call` of metrics.
pub const CALLS: [&str; CALLS_LEN] =
    ["prepare", "view", "mounts", "commit", "remove", "stat", "update", "list", "usage", "cleanup", "apply"];

/// How many they are.
pub const CALLS_LEN: usize = 11;

/// Bounds of the histogram of how long calls take, in seconds: from what a record takes to what a registry may, and then what
/// a large layer does.
pub const CALL_SECONDS: [f64; 7] = [0.001, 0.005, 0.025, 0.1, 1.0, 10.0, 100.0];

/// What containerd's calls cost; the second is a histogram.
pub const CALL_METRICS: [Metric; 2] = [
    metric("containerd_failed", Unit::Calls, "calls of containerd that were refused or failed"),
    metric("containerd_call", Unit::Seconds, "how long calls of containerd took"),
];
