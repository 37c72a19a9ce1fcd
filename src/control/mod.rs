//! The local socket through which the command line talks to a process that serves mounts: HTTP and JSON over a Unix
//! socket. The process may be the daemon, or one that `headstart mount` started for one mount; both speak the same.
//!
//! ```text
//! GET  /v1/health                    -> Health
//! GET  /v1/status                    -> HostStatus
//! POST /v1/mount      MountAsked     -> MountStatus
//! POST /v1/umount     UmountAsked    -> {}
//! POST /v1/wait       WaitAsked      -> MountStatus, when all of the mount is local
//! POST /v1/pull       PullAsked      -> PullLine, one a line, the last one tells the end
//! POST /v1/prune      PruneAsked     -> Pruned
//! POST /v1/forget     ForgetAsked    -> Forgotten
//! GET  /v1/snapshots                 -> SnapshotsSeen
//! ```
//!
//! A refusal is an HTTP status of 400 or more and a [`Fault`], which has what the command line needs to end as if the
//! failure had happened in it. Bodies are bounded, and a field that is not known is refused: somebody counts on it.
//!
//! Guarantees: what is answered was true at that moment; whoever is not the socket's owner or root is not listened to.
//! Refuses to know what is mounted and how: that is behind [`Served`].

mod cache;
mod client;
mod fault;
mod message;
mod server;
mod status;

pub use cache::{ForgetAsked, Forgotten, PruneAsked, Pruned, SeenImage, SeenLayer, SeenSnapshot, SnapshotsSeen};
pub use client::{Client, ControlError};
pub use fault::Fault;
pub use message::{Done, MountAsked, PullAsked, PullLine, Pulled, PulledLayer, UmountAsked, WaitAsked};
pub use server::{ControlServer, Served};
pub use status::{DaemonStatus, Health, HostStatus, LayerState, LayerStatus, MountRecord, MountStatus, SlowRead};

/// The version of what is said here. Another one has other paths.
pub const VERSION: u32 = 1;
