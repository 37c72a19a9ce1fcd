//! What is said over the socket. The field names are a promise to those who read `headstart status --json`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

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
    /// Number of chunks.
    pub chunks: u64,
    /// How many of them are here.
    pub present: u64,
    /// Size of the decompressed image in bytes.
    pub bytes: u64,
    /// How much of it is here.
    pub bytes_present: u64,
}

/// One mount and the process that serves it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountStatus {
    /// The image as it was asked for.
    pub image: String,
    /// The manifest that it stood for.
    pub manifest: BlobDigest,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// How it is presented: `fuse`.
    pub driver: String,
    /// The serving process.
    pub pid: u32,
    /// Directory of the writable layer on top, if there is one.
    pub upper: Option<PathBuf>,
    /// The layers, lowest first.
    pub layers: Vec<LayerStatus>,
    /// Bytes this process fetched for its mount, as they came over the network.
    pub bytes_fetched: u64,
    /// Bytes that were asked for by readers and had to be waited for, decompressed.
    pub bytes_demanded: u64,
}

/// How to end a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unmount {
    /// Take it away even while files are open; it ends when the last one is closed.
    pub lazy: bool,
}

/// What became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unmounted {
    /// It is gone, and the process is about to end.
    Done,
    /// Files are open or a process stands in it.
    Busy,
    /// The kernel refused.
    Refused(String),
}
