//! Why a command is refused: four classes, which every protocol above knows how to say.

use super::{FilterError, Kind, LayerId, MAX_KEY, MAX_LABELS};

/// Why a command is refused. Nothing has changed then.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ChainError {
    /// Something that the command names does not exist.
    #[error("{subject} {name:?} does not exist")]
    NotFound {
        /// What was looked for.
        subject: Subject,
        /// What it was called.
        name: String,
    },
    /// The name is taken.
    #[error("snapshot {name:?} exists already")]
    AlreadyExists {
        /// The name.
        name: String,
    },
    /// It exists and is not in the state that the command needs.
    #[error("cannot {attempted} snapshot {name:?}: {unmet}")]
    FailedPrecondition {
        /// What was attempted.
        attempted: &'static str,
        /// On which snapshot.
        name: String,
        /// What stands in the way.
        unmet: Unmet,
    },
    /// The command makes no sense, whatever exists.
    #[error(transparent)]
    InvalidArgument(#[from] Invalid),
}

/// What was looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// The snapshot that the command is about.
    Snapshot,
    /// The parent it names.
    Parent,
    /// An image.
    Image,
    /// A layer, named by its diffID.
    Layer,
}

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Snapshot => "snapshot",
            Self::Parent => "parent",
            Self::Image => "image",
            Self::Layer => "layer",
        })
    }
}

/// What stands in the way.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unmet {
    /// Another snapshot stands on it.
    #[error("{child:?} stands on it")]
    HasChild {
        /// One of its children.
        child: String,
    },
    /// A layer that is being filled will stand on it.
    #[error("{name:?} will stand on it as soon as its layer is local")]
    Awaited {
        /// The snapshot that will be.
        name: String,
    },
    /// An image that was pulled needs it.
    #[error("image {image:?} needs it")]
    Held {
        /// The image.
        image: String,
    },
    /// It is of another kind.
    #[error("it is {}", .0.name())]
    Kind(Kind),
    /// The parent that it should get is not committed.
    #[error("its parent {parent:?} is {}", kind.name())]
    ParentKind {
        /// The parent.
        parent: String,
        /// What it is.
        kind: Kind,
    },
    /// It waits for its layer and is committed by itself.
    #[error("it is committed when its layer is local")]
    Filling,
    /// It exists with another parent than the one the image says.
    #[error("it stands on {found:?}, the image needs it on {wanted:?}")]
    OtherParent {
        /// The parent it has.
        found: Option<String>,
        /// The parent it should have.
        wanted: Option<String>,
    },
    /// No number is left for it.
    #[error("all numbers are in use")]
    NoSlot,
}

/// What makes no sense.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Invalid {
    /// A key or name is empty.
    #[error("the key of a snapshot is empty")]
    EmptyKey,
    /// A key or name is too long.
    #[error("the key of a snapshot has {length} bytes, {MAX_KEY} are allowed")]
    LongKey {
        /// Its length.
        length: usize,
    },
    /// The labels are too large.
    #[error("the labels of snapshot {name:?} have {size} bytes, {MAX_LABELS} are allowed")]
    LargeLabels {
        /// Of which snapshot.
        name: String,
        /// Their size.
        size: usize,
    },
    /// Only labels can be changed.
    #[error("cannot update field {field:?} of snapshot {name:?}: only labels can be changed")]
    ImmutableField {
        /// The field.
        field: String,
        /// Of which snapshot.
        name: String,
    },
    /// Only what is committed can be stood upon.
    #[error("cannot prepare snapshot {name:?} on {parent:?}: it is {}, not committed", kind.name())]
    ParentKind {
        /// The snapshot to prepare.
        name: String,
        /// The parent.
        parent: String,
        /// What it is.
        kind: Kind,
    },
    /// A parent cannot be exchanged.
    #[error("cannot commit snapshot {name:?} on {wanted:?}: it was prepared on {found:?}")]
    ParentChanged {
        /// The snapshot.
        name: String,
        /// The parent it was prepared on.
        found: String,
        /// The parent it should get.
        wanted: String,
    },
    /// One layer cannot be known with two sizes.
    #[error("layer {id} is known with {found} bytes and named with {wanted}")]
    LayerSize {
        /// Which layer.
        id: LayerId,
        /// The size it is known with.
        found: u64,
        /// The size it is named with.
        wanted: u64,
    },
    /// An image names one snapshot twice.
    #[error("image {image:?} names snapshot {name:?} twice")]
    RepeatedName {
        /// The image.
        image: String,
        /// The name.
        name: String,
    },
    /// A filter cannot be understood.
    #[error("cannot understand filter {filter:?}")]
    Filter {
        /// The filter.
        filter: String,
        /// Why.
        #[source]
        source: FilterError,
    },
}

/// Records that contradict each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// A record names something that has no record.
    #[error("{of:?} needs {needs:?}, which is not there")]
    Missing {
        /// Whose record.
        of: String,
        /// What it names.
        needs: String,
    },
    /// Snapshots stand on each other in a circle.
    #[error("{0:?} stands on itself")]
    Circle(String),
    /// Two records have one number.
    #[error("{0:?} has the number of another")]
    SharedSlot(String),
    /// A record says two things that exclude each other.
    #[error("{of:?} {what}")]
    Contradiction {
        /// Whose record.
        of: String,
        /// What it says.
        what: &'static str,
    },
}
