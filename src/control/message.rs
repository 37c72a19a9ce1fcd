//! What is asked over the socket.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

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

/// That something was done, where there is nothing more to tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}
