//! What is asked over the socket.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::fault::Fault;
use crate::drivers::Wanted;
use crate::model::{BlobDigest, DiffId};

/// An image to be mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountAsked {
    /// The reference; paths in it are absolute.
    pub image: String,
    /// The mount point, absolute.
    pub mount_point: PathBuf,
    /// Which of a multi-platform image; none is the serving machine's.
    #[serde(default)]
    pub platform: Option<String>,
    /// Directory of a writable layer on top.
    #[serde(default)]
    pub upper: Option<PathBuf>,
    /// How it is presented.
    #[serde(default)]
    pub driver: Wanted,
    /// Bring only what is read.
    #[serde(default)]
    pub no_fill: bool,
}

/// A mount to be ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UmountAsked {
    /// Where it is mounted, as its status says.
    pub mount_point: PathBuf,
    /// Take it away even while files are open; it ends when the last one is closed.
    #[serde(default)]
    pub lazy: bool,
}

/// A mount that somebody waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaitAsked {
    /// Where it is mounted, as its status says.
    pub mount_point: PathBuf,
}

/// An image to be brought as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PullAsked {
    /// The reference; paths in it are absolute.
    pub image: String,
    /// Which of a multi-platform image; none is the serving machine's.
    #[serde(default)]
    pub platform: Option<String>,
}

/// One line of the answer to a [`PullAsked`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PullLine {
    /// How far it is, in bytes.
    Progress {
        /// What is here.
        bytes: u64,
        /// What there will be, as far as is known.
        of: u64,
    },
    /// All of it is here.
    Done(Pulled),
    /// It does not come.
    Failed(Fault),
}

/// An image that was brought.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pulled {
    /// The image as it was asked for.
    pub image: String,
    /// The manifest that it stood for.
    pub manifest: BlobDigest,
    /// Bytes that came from the registry since its layers were opened.
    pub bytes_fetched: u64,
    /// Bytes of all layer images.
    pub bytes: u64,
    /// The layers, lowest first.
    pub layers: Vec<PulledLayer>,
}

/// A layer of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PulledLayer {
    /// The blob.
    pub digest: BlobDigest,
    /// The layer image.
    pub diff_id: DiffId,
    /// Its bytes.
    pub bytes: u64,
    /// Bytes that came from the registry since it was opened.
    pub bytes_fetched: u64,
}

/// That something was done, where there is nothing more to tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}
