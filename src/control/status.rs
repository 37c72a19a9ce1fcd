//! What is told over the socket. The field names are a promise to those who read `headstart status --json`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::drivers::Wanted;
use crate::model::{BlobDigest, DiffId};

/// How much of a layer is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LayerState {
    /// Chunks are fetched when they are read.
    Lazy,
    /// Something is completing it now.
    Filling,
    /// Every chunk is present and the whole has been verified.
    Local,
}

/// One layer of a mount, lowest first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerStatus {
    /// The blob in the registry.
    pub digest: BlobDigest,
    /// The decompressed image, if the image's config names it.
    pub diff_id: Option<DiffId>,
    /// How much of it is here.
    pub state: LayerState,
    /// Why it is in that state, if there is more to say.
    #[serde(default)]
    pub why: Option<String>,
    /// What the kernel reads it from, if it is the kernel that presents it.
    #[serde(default)]
    pub presented: Option<String>,
    /// Number of chunks.
    pub chunks: u64,
    /// How many of them are here.
    pub present: u64,
    /// Size of the decompressed image in bytes.
    pub bytes: u64,
    /// How much of it is here.
    pub bytes_present: u64,
    /// When it was found to be local, in seconds since 1970.
    #[serde(default)]
    pub local_since: Option<u64>,
    /// Stored bytes of what readers have reached.
    #[serde(default)]
    pub bytes_demanded: u64,
    /// Stored bytes that were fetched because somebody might read them; background fills are not counted.
    #[serde(default)]
    pub bytes_prefetched: u64,
    /// How many of those nobody has read so far.
    #[serde(default)]
    pub bytes_wasted: u64,
    /// The reads that waited longest, the longest first.
    #[serde(default)]
    pub slowest_reads: Vec<SlowRead>,
}

/// A read that had to wait for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlowRead {
    /// Where in the layer's image.
    pub offset: u64,
    /// How many bytes.
    pub bytes: u64,
    /// How long.
    pub milliseconds: u64,
}

/// What is known of a mount even when its process is gone: its record on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountRecord {
    /// The image as it was asked for.
    pub image: String,
    /// The manifest that it stood for.
    pub manifest: BlobDigest,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// How it is presented: `fuse`, `kernel` or `local`.
    pub driver: String,
    /// How it was asked to be presented.
    #[serde(default)]
    pub driver_wanted: Wanted,
    /// The serving process.
    pub pid: u32,
    /// Directory of the writable layer on top, if there is one.
    pub upper: Option<PathBuf>,
    /// It brings only what is read.
    #[serde(default)]
    pub no_fill: bool,
    /// The daemon's control socket, if the daemon serves it; else it has a process and a socket of its own.
    #[serde(default)]
    pub daemon: Option<PathBuf>,
}

/// One mount and how it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountStatus {
    /// What is mounted where, and by whom.
    #[serde(flatten)]
    pub record: MountRecord,
    /// Why it is presented this way, if there is more to say.
    #[serde(default)]
    pub driver_why: Option<String>,
    /// The layers, lowest first.
    pub layers: Vec<LayerStatus>,
    /// Bytes fetched for its layers since they were opened, as they came over the network.
    pub bytes_fetched: u64,
    /// Bytes that were asked for by readers and had to be waited for, decompressed.
    pub bytes_demanded: u64,
}

impl MountStatus {
    /// Of a mount of which no more is known than its record.
    pub const fn of_record(record: MountRecord) -> Self {
        Self { record, driver_why: None, layers: Vec::new(), bytes_fetched: 0, bytes_demanded: 0 }
    }
}

/// That a process is there and what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// The version of the program.
    pub version: String,
    /// The process.
    pub pid: u32,
    /// The root it keeps everything in.
    pub root: PathBuf,
    /// False while it still brings back the mounts of a daemon before it.
    pub ready: bool,
}

/// How a serving process stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonStatus {
    /// What it is.
    #[serde(flatten)]
    pub health: Health,
    /// Since when it runs, in seconds.
    pub uptime_seconds: u64,
    /// Memory that it occupies, in bytes.
    pub resident_bytes: u64,
    /// FUSE connections that it serves.
    pub connections: u64,
}

/// Everything that a process serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    /// The process.
    pub daemon: DaemonStatus,
    /// Its mounts, in the order of their mount points.
    pub mounts: Vec<MountStatus>,
}
