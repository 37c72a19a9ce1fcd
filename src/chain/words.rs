//! The words of the rules: keys, kinds, slots, and the three things that are recorded.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{ChainError, Invalid};
use crate::model::{BlobDigest, DiffId, Timestamp};

/// The longest key; containerd's own database takes no longer one.
pub const MAX_KEY: usize = 32_768;

/// The most that the labels of one snapshot may take, names and values together. containerd bounds one label to 4 KiB
/// and sets about ten of them.
pub const MAX_LABELS: usize = 256 << 10;

/// Labels of a snapshot. An empty value is no label.
pub type Labels = BTreeMap<String, String>;

/// What a snapshot is called: the key of one that is active or a view, the name of one that is committed; they share one
/// space. Any text that is not empty, spaces, slashes and colons included: never a path.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Key(Arc<str>);

impl Key {
    /// A key.
    ///
    /// # Errors
    /// A text that is empty or longer than [`MAX_KEY`].
    pub fn new(text: &str) -> Result<Self, ChainError> {
        match text.len() {
            0 => Err(Invalid::EmptyKey.into()),
            1..=MAX_KEY => Ok(Self(text.into())),
            length => Err(Invalid::LongKey { length }.into()),
        }
    }

    /// A key, or none for the empty text, which is how protocols say that there is no parent.
    ///
    /// # Errors
    /// As [`Key::new`].
    pub fn optional(text: &str) -> Result<Option<Self>, ChainError> {
        if text.is_empty() { Ok(None) } else { Self::new(text).map(Some) }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Key {
    type Error = ChainError;

    fn try_from(text: String) -> Result<Self, ChainError> {
        Self::new(&text)
    }
}

impl From<Key> for String {
    fn from(key: Key) -> Self {
        key.as_str().to_owned()
    }
}

impl Borrow<str> for Key {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&*self.0, f)
    }
}

/// What may be done with a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Read only, never committed, parent of nothing.
    View,
    /// Being made: may be committed, is parent of nothing.
    Active,
    /// Finished: never changes, may be a parent.
    Committed,
}

impl Kind {
    /// As filters and people write it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

/// A small number that is a snapshot's (or an image's) as long as it exists, whatever its key becomes. Paths and inode
/// numbers are made from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SnapshotSlot(pub u32);

impl fmt::Display for SnapshotSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// The same for a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LayerSlot(pub u32);

impl fmt::Display for LayerSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Bytes and inodes that a snapshot takes on disk, without its parents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Allocated bytes.
    pub bytes: u64,
    /// Inodes.
    pub inodes: u64,
}

/// Which layer: two layers that claim the same diffID and come from other blobs, or were verified against other
/// indexes, are two layers until both have been hashed as a whole. Else whoever can name a diffID could put bytes of
/// his choice under somebody else's image.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LayerId {
    /// What its decompressed bytes have to hash to.
    pub diff_id: DiffId,
    /// The blob it comes from.
    pub blob: BlobDigest,
    /// What its bytes are verified against, as the store writes it.
    pub anchor: String,
}

impl fmt::Display for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.diff_id, self.anchor)
    }
}

/// Where the files of a snapshot are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// In a directory of its own, named by its slot.
    Files,
    /// In the image of a layer.
    Layer(LayerSlot),
}

/// Who ends a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Owner {
    /// Whoever made it removes it.
    Client,
    /// It was brought for images and is garbage when no image names it.
    Images,
}

/// What an active snapshot becomes as soon as its layer is local and its parent is committed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// The name to commit it under.
    pub name: Key,
    /// The parent it gets then.
    pub parent: Option<Key>,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// What it is called.
    pub key: Key,
    /// Its number.
    pub slot: SnapshotSlot,
    /// What may be done with it.
    pub kind: Kind,
    /// What it stands on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Key>,
    /// Notes of whoever made it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: Labels,
    /// When it got its kind.
    pub created: Timestamp,
    /// When it was changed last.
    pub updated: Timestamp,
    /// Where its files are.
    pub content: Content,
    /// Who ends it.
    pub owner: Owner,
    /// What it takes on disk, once it is committed and was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Set while its layer fills: active then, without parent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filling: Option<Target>,
}

/// What is to be known of a snapshot besides its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// It has a directory of its own.
    Open,
    /// Its layer is being brought; it is committed when that is local.
    Filling,
    /// Its layer is local; it is committed when its parent is.
    Waiting,
    /// Its layer is not, or not all, on this machine.
    Lazy,
    /// All of it is on this machine.
    Local,
}

impl Snapshot {
    /// What is to be known of it; `layer` is the one that holds its files, if one does.
    pub fn state(&self, layer: Option<&Layer>) -> State {
        let local = layer.is_none_or(|layer| layer.local.is_some());
        match (&self.filling, self.content, self.kind) {
            (Some(_), _, _) if local => State::Waiting,
            (Some(_), _, _) => State::Filling,
            (None, Content::Files, Kind::Active | Kind::View) => State::Open,
            (None, Content::Files, Kind::Committed) => State::Local,
            (None, Content::Layer(_), _) if local => State::Local,
            (None, Content::Layer(_), _) => State::Lazy,
        }
    }
}

/// A layer that snapshots or images use.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Its number.
    pub slot: LayerSlot,
    /// Which one it is.
    #[serde(flatten)]
    pub id: LayerId,
    /// Size of its image in bytes, once that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Since when all of it is on this machine and known to be what its diffID says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<Timestamp>,
}

/// An image that was pulled: what keeps its snapshots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// As its user names it.
    pub name: String,
    /// Which manifest it was when it was pulled.
    pub manifest: BlobDigest,
    /// The number of its merged tree.
    pub slot: SnapshotSlot,
    /// Its layers, lowest first.
    pub layers: Vec<ImageLayer>,
    /// When it was pulled.
    pub pulled: Timestamp,
}

/// A layer of an image, and the snapshot it becomes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageLayer {
    /// Which layer.
    pub layer: LayerSlot,
    /// The name under which it is committed.
    pub name: Key,
}
