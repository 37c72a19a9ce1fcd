//! containerd's protocol: the snapshots service, translated to and from the words of this program, and the way to
//! containerd's own services.
//!
//! Translation only: it decides nothing, and what it serves is behind a trait.

mod client;
pub mod proto;

pub use client::connect;
