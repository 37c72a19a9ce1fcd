//! What the service serves: the ten calls, in our own words.

use std::error::Error;

use tonic::async_trait;

use crate::chain::{Labels, Snapshot, Usage};
use crate::snapshots::SnapshotsError;

/// A mount as whoever asked is to make it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// The kind of file system, or `bind`.
    pub kind: &'static str,
    /// What is mounted.
    pub source: String,
    /// Options, as in a line of fstab.
    pub options: Vec<String>,
}

/// What a snapshot that was asked for is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prepared {
    /// Ready to be written to, through these mounts.
    Mounts(Vec<Mount>),
    /// Not needed: what it would become is there, under this name. Whoever asked looks it up.
    There(String),
}

/// Snapshots as containerd asks for them. Keys, names and parents are any text; the empty parent is none.
///
/// Every call ends in bounded time. Whoever calls may hold a lock that stops every image and container of the machine:
/// `commit` and `remove` do no more than write a record and rename a directory.
#[async_trait]
pub trait Snapshotter: Send + Sync + 'static {
    /// A snapshot that can be written to, on `parent`.
    async fn prepare(&self, key: String, parent: String, labels: Labels) -> Result<Prepared, SnapshotterError>;

    /// A snapshot that shows `parent` and cannot be written to.
    async fn view(&self, key: String, parent: String, labels: Labels) -> Result<Vec<Mount>, SnapshotterError>;

    /// The mounts of one that is active or a view, as they were when it was made.
    async fn mounts(&self, key: String) -> Result<Vec<Mount>, SnapshotterError>;

    /// Finishes the active snapshot `key`: it is `name` from then on. One that has no parent gets `parent`.
    async fn commit(&self, name: String, key: String, parent: String, labels: Labels) -> Result<(), SnapshotterError>;

    /// Ends a snapshot on which nothing stands.
    async fn remove(&self, key: String) -> Result<(), SnapshotterError>;

    /// What is known of a snapshot.
    async fn stat(&self, key: String) -> Result<Snapshot, SnapshotterError>;

    /// Changes labels: all of them, or those that `fields` names.
    async fn update(&self, key: String, labels: Labels, fields: Vec<String>) -> Result<Snapshot, SnapshotterError>;

    /// The snapshots that match one of `filters`, or all if there is none.
    async fn list(&self, filters: Vec<String>) -> Result<Vec<Snapshot>, SnapshotterError>;

    /// What a snapshot takes on disk, without its parents.
    async fn usage(&self, key: String) -> Result<Usage, SnapshotterError>;

    /// Frees what removed snapshots still hold.
    async fn cleanup(&self) -> Result<(), SnapshotterError>;
}

/// Why a call fails.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotterError {
    /// The rules say no, or the disk does.
    #[error(transparent)]
    Snapshots(#[from] SnapshotsError),
    /// A layer below cannot be shown; later it may be.
    #[error("cannot show the layers of snapshot {key:?}")]
    Layers {
        /// Of which snapshot.
        key: String,
        /// Why.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// The kernel does not show what is below under the ids of a user namespace.
    #[error(
        "cannot map the ids of what is below snapshot {key:?}: take `remap-ids` out of the capabilities of this proxy plugin, and \
         containerd changes the owners of all files itself"
    )]
    Unmapped {
        /// Of which snapshot.
        key: String,
        /// Why.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// A label has a value that cannot be followed.
    #[error("cannot follow label {label} of snapshot {key:?}: {why}")]
    Label {
        /// Of which snapshot.
        key: String,
        /// Which label.
        label: &'static str,
        /// What is wrong with its value.
        why: &'static str,
    },
    /// The call could not be finished.
    #[error("the thread that worked for the call broke down")]
    Broken,
}
