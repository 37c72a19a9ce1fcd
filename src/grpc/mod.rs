//! containerd's protocol: the snapshots service, translated to and from the words of this program, and the way to
//! containerd's own services; and the image service of CRI, passed on to see what kubelets pull with.
//!
//! ```text
//! containerd ── unix socket ── service ── Snapshotter      ten calls in our own words
//!                                 └────── status           what a failure is called, the only place of codes
//! ```
//!
//! Guarantees: a call that was begun is finished, whether or not its caller still waits; a call that breaks down fails
//! alone. Keys and parents are opaque: they come back as they were given. The name of the snapshotter in a request is
//! ignored: there is one.
//!
//! Translation only: it decides nothing, and what it serves is behind a trait.

mod ask;
mod calls;
mod client;
mod containerd;
mod cri;
mod diff;
pub mod proto;
mod server;
mod service;
mod snapshotter;
mod status;
mod translate;
mod version;

pub use ask::snapshotter_answers;
pub use calls::{Calls, Tally};
pub use client::connect;
pub use containerd::{Containerd, ContainerdError, Content};
pub use cri::CriProxy;
pub use diff::{Differ, DifferError, Given, Order, Uncompressed, read_content};
pub use server::{ServeError, Services, adopt, bind, serve};
pub use snapshotter::{Mount, Prepared, Snapshotter, SnapshotterError};
/// What makes `async fn` of a trait that is used behind a pointer.
pub use tonic::async_trait;
pub use version::{ContainerdVersion, VersionError};
