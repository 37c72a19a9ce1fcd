//! The local socket through which the command line talks to the process that serves a mount: HTTP and JSON over a Unix
//! socket, two questions.
//!
//! ```text
//! GET  /status     -> MountStatus
//! POST /unmount    Unmount -> Unmounted
//! ```
//!
//! Guarantees: what is answered was true at that moment; every question has a deadline. The socket's directory decides who
//! may ask. Refuses to know what is mounted and how: that is behind [`Served`].

mod client;
mod server;
mod status;

pub use client::{ControlError, status, unmount};
pub use server::{ControlServer, Served};
pub use status::{LayerState, LayerStatus, MountStatus, Unmount, Unmounted};
