//! containerd's protocol: the snapshots service, translated to and from the words of this program.
//!
//! Translation only: it decides nothing, and what it serves is behind a trait.

pub mod proto;
