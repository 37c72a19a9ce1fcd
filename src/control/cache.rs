//! What is said of the cache and of what is recorded.

use serde::{Deserialize, Serialize};

use crate::chain::{Key, Kind, Labels, State};
use crate::fetch::Room;
use crate::model::{BlobDigest, DiffId};
use crate::store::Evicted;

/// The cache is to be brought within its bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PruneAsked {
    /// Everything goes that nobody uses.
    #[serde(default)]
    pub all: bool,
    /// Nothing goes: only what would.
    #[serde(default)]
    pub dry_run: bool,
}

/// What has gone of the cache, or would go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pruned {
    /// Nothing has gone.
    pub dry_run: bool,
    /// Whole images.
    #[serde(flatten)]
    pub evicted: Evicted,
    /// Chunks of images that are in use.
    pub chunks: Room,
}

/// A pulled image is to be forgotten.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForgetAsked {
    /// The reference it was pulled by; paths in it are absolute.
    pub image: String,
    /// Its layers go from the cache as well, unless somebody else needs them.
    #[serde(default)]
    pub prune: bool,
}

/// A pulled image that was forgotten.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forgotten {
    /// The image.
    pub image: String,
    /// The snapshots that went with it.
    pub snapshots: Vec<Key>,
    /// The layers that went with it.
    #[serde(flatten)]
    pub evicted: Evicted,
}

/// Everything that is recorded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotsSeen {
    /// Snapshots, each after its parent.
    pub snapshots: Vec<SeenSnapshot>,
    /// Pulled images.
    pub images: Vec<SeenImage>,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenSnapshot {
    /// Its key, or its name if it is committed.
    pub key: Key,
    /// What it is to its client.
    pub kind: Kind,
    /// What it stands on.
    pub parent: Option<Key>,
    /// How it stands.
    pub state: State,
    /// Allocated on disk, without parents.
    pub bytes: u64,
    /// Files, where that is known.
    pub inodes: u64,
    /// When it was made.
    pub created: String,
    /// When it was changed.
    pub updated: String,
    /// What its client says of it.
    pub labels: Labels,
    /// Its number.
    pub slot: u32,
    /// The name that it is committed under when its layer is local.
    pub becomes: Option<Key>,
    /// Its content, if that is a layer.
    pub layer: Option<SeenLayer>,
}

/// A layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenLayer {
    /// Its number.
    pub slot: u32,
    /// What its image says it is.
    pub diff_id: DiffId,
    /// Where it comes from.
    pub blob: BlobDigest,
    /// What it is verified against.
    pub anchor: String,
    /// Size of the image, if it is known.
    pub bytes: Option<u64>,
    /// Since when all of it is here and verified.
    pub local: Option<String>,
}

/// A pulled image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenImage {
    /// The reference it was pulled by.
    pub image: String,
    /// The manifest that stood for.
    pub manifest: BlobDigest,
    /// When.
    pub pulled: String,
    /// How many layers it has.
    pub layers: usize,
    /// How many of them are committed.
    pub committed: usize,
}
