//! Each command: what it needs, in the order in which containerd looks at it, and what it changes.

use super::draft::Draft;
use super::fill::{self, PulledLayer};
use super::{
    Chain, ChainError, Change, Content, Effect, Invalid, Key, Kind, Labels, LayerId, MAX_LABELS, Owner, Snapshot,
    Subject, Unmet, Usage,
};
use crate::model::{BlobDigest, Timestamp};

/// Something that somebody wants to happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// A snapshot that can be written to.
    Prepare {
        /// What to call it.
        key: Key,
        /// What it stands on.
        parent: Option<Key>,
        /// Notes.
        labels: Labels,
        /// The layer that holds its files, and the size of its image if it is known; without one it gets a directory of
        /// its own.
        layer: Option<(LayerId, Option<u64>)>,
    },
    /// A snapshot that can be read.
    View {
        /// What to call it.
        key: Key,
        /// What it shows.
        parent: Option<Key>,
        /// Notes.
        labels: Labels,
    },
    /// Finishes an active snapshot.
    Commit {
        /// Which.
        key: Key,
        /// What it is called from then on.
        name: Key,
        /// The parent it gets if it has none; one that it has may be repeated.
        parent: Option<Key>,
        /// Its labels from then on: those it had are gone.
        labels: Labels,
        /// What it takes on disk, if that is known already.
        usage: Option<Usage>,
    },
    /// Makes an active snapshot's files a layer: what it had is gone.
    Become {
        /// Which.
        key: Key,
        /// The layer.
        layer: LayerId,
        /// Size of its image in bytes.
        size: Option<u64>,
    },
    /// Notes what a committed snapshot takes on disk.
    Measured {
        /// Which.
        key: Key,
        /// What it takes.
        usage: Usage,
    },
    /// Ends a snapshot on which nothing stands.
    Remove {
        /// Which.
        key: Key,
    },
    /// Changes labels.
    Update {
        /// Of which snapshot.
        key: Key,
        /// The new labels.
        labels: Labels,
        /// Which of them count: `labels` is all, `labels.x` is x (gone, if it has no new value). Empty is all.
        fields: Vec<String>,
    },
    /// Brings an image: each layer that is not committed yet becomes an active snapshot that fills.
    Pull {
        /// What the image is called. If one of this name is there, this takes its place.
        image: String,
        /// Its manifest.
        manifest: BlobDigest,
        /// Its layers, lowest first.
        layers: Vec<PulledLayer>,
    },
    /// Forgets an image. Its snapshots are garbage then, unless others need them.
    Forget {
        /// The image's name.
        image: String,
    },
    /// All of a layer is on this machine and has been verified: what waited for it is committed, in order.
    LayerLocal {
        /// Which layer.
        layer: LayerId,
        /// Size of its image in bytes.
        size: u64,
    },
    /// A layer that was local is not complete any more.
    LayerLost {
        /// Which layer.
        layer: LayerId,
    },
}

pub(super) fn plan(chain: &Chain, command: &Command, now: Timestamp) -> Result<Change, ChainError> {
    let mut draft = Draft::new(chain);
    match command {
        Command::Prepare { key, parent, labels, layer } => {
            let layer = layer.as_ref();
            create(&mut draft, key, Kind::Active, parent.as_ref(), labels, layer, now)?;
        }
        Command::View { key, parent, labels } => {
            create(&mut draft, key, Kind::View, parent.as_ref(), labels, None, now)?;
        }
        Command::Commit { key, name, parent, labels, usage } => {
            commit(&mut draft, key, name, parent.as_ref(), labels, *usage, now)?;
        }
        Command::Become { key, layer, size } => become_layer(&mut draft, key, layer, *size, now)?,
        Command::Measured { key, usage } => measured(&mut draft, key, *usage)?,
        Command::Remove { key } => remove(&mut draft, key)?,
        Command::Update { key, labels, fields } => update(&mut draft, key, labels, fields, now)?,
        Command::Pull { image, manifest, layers } => fill::pull(&mut draft, image, *manifest, layers, now)?,
        Command::Forget { image } => fill::forget(&mut draft, image)?,
        Command::LayerLocal { layer, size } => fill::layer_local(&mut draft, layer, *size, now)?,
        Command::LayerLost { layer } => fill::layer_lost(&mut draft, layer)?,
    }
    Ok(draft.finish())
}

fn create(
    draft: &mut Draft<'_>,
    key: &Key,
    kind: Kind,
    parent: Option<&Key>,
    labels: &Labels,
    layer: Option<&(LayerId, Option<u64>)>,
    now: Timestamp,
) -> Result<(), ChainError> {
    if let Some(parent) = parent {
        let found = draft.named(parent, Subject::Parent)?;
        if found.kind != Kind::Committed {
            let (name, parent, kind) = (key.to_string(), parent.to_string(), found.kind);
            return Err(Invalid::ParentKind { name, parent, kind }.into());
        }
    }
    free(draft, key)?;
    let labels = checked_labels(key, labels)?;
    let slot = draft.snapshot_slot(key.as_str())?;
    let content = match layer {
        Some((id, size)) => Content::Layer(fill::known_layer(draft, id, *size)?),
        None => Content::Files,
    };
    if content == Content::Files {
        draft.effect(Effect::MakeFiles(slot));
    }
    draft.put(Snapshot {
        key: key.clone(),
        slot,
        kind,
        parent: parent.cloned(),
        labels,
        created: now,
        updated: now,
        content,
        owner: Owner::Client,
        usage: None,
        filling: None,
    });
    Ok(())
}

fn commit(
    draft: &mut Draft<'_>,
    key: &Key,
    name: &Key,
    parent: Option<&Key>,
    labels: &Labels,
    usage: Option<Usage>,
    now: Timestamp,
) -> Result<(), ChainError> {
    free(draft, name)?;
    let snapshot = draft.named(key, Subject::Snapshot)?;
    let refused = |unmet| Err(ChainError::FailedPrecondition { attempted: "commit", name: key.to_string(), unmet });
    if snapshot.kind != Kind::Active {
        return refused(Unmet::Kind(snapshot.kind));
    }
    if snapshot.filling.is_some() {
        return refused(Unmet::Filling);
    }
    let parent = match (&snapshot.parent, parent) {
        (Some(found), Some(wanted)) if found != wanted => {
            let (name, found, wanted) = (key.to_string(), found.to_string(), wanted.to_string());
            return Err(Invalid::ParentChanged { name, found, wanted }.into());
        }
        (Some(found), _) => Some(found.clone()),
        (None, wanted) => wanted.cloned(),
    };
    if let Some(parent) = parent.as_ref() {
        let found = draft.named(parent, Subject::Parent)?;
        if found.kind != Kind::Committed {
            return refused(Unmet::ParentKind { parent: parent.to_string(), kind: found.kind });
        }
    }
    let committed = Snapshot {
        key: name.clone(),
        kind: Kind::Committed,
        parent,
        labels: checked_labels(name, labels)?,
        created: now,
        updated: now,
        usage,
        ..snapshot.clone()
    };
    draft.drop_snapshot(key);
    draft.put(committed);
    draft.effect(Effect::Committed(name.clone()));
    fill::committed(draft, name, now)
}

fn measured(draft: &mut Draft<'_>, key: &Key, usage: Usage) -> Result<(), ChainError> {
    let snapshot = draft.named(key, Subject::Snapshot)?.clone();
    if snapshot.kind != Kind::Committed {
        let (name, unmet) = (key.to_string(), Unmet::Kind(snapshot.kind));
        return Err(ChainError::FailedPrecondition { attempted: "measure", name, unmet });
    }
    draft.put(Snapshot { usage: Some(usage), ..snapshot });
    Ok(())
}

fn become_layer(
    draft: &mut Draft<'_>,
    key: &Key,
    layer: &LayerId,
    size: Option<u64>,
    now: Timestamp,
) -> Result<(), ChainError> {
    let snapshot = draft.named(key, Subject::Snapshot)?.clone();
    let refused = |unmet| Err(ChainError::FailedPrecondition { attempted: "change", name: key.to_string(), unmet });
    if snapshot.kind != Kind::Active {
        return refused(Unmet::Kind(snapshot.kind));
    }
    if snapshot.filling.is_some() {
        return refused(Unmet::Filling);
    }
    let content = Content::Layer(fill::known_layer(draft, layer, size)?);
    if snapshot.content == content {
        return Ok(());
    }
    draft.put(Snapshot { content, updated: now, ..snapshot.clone() });
    match snapshot.content {
        Content::Files => draft.effect(Effect::DropFiles(snapshot.slot)),
        Content::Layer(before) => draft.release_layer(before),
    }
    Ok(())
}

fn remove(draft: &mut Draft<'_>, key: &Key) -> Result<(), ChainError> {
    let snapshot = draft.named(key, Subject::Snapshot)?;
    let refused = |unmet| Err(ChainError::FailedPrecondition { attempted: "remove", name: key.to_string(), unmet });
    if let Some(child) = draft.child(key) {
        return refused(Unmet::HasChild { child: child.to_string() });
    }
    // A snapshot that fills is needed by the images that name what it becomes.
    let name = snapshot.filling.as_ref().map_or(key, |target| &target.name);
    let needs = |image: &&super::Image| image.layers.iter().any(|layer| layer.name == *name);
    if let Some(image) = draft.images().find(needs) {
        return refused(Unmet::Held { image: image.name.clone() });
    }
    let awaits = |other: &&Snapshot| other.filling.as_ref().is_some_and(|target| target.parent.as_ref() == Some(key));
    if let Some(other) = draft.snapshots().find(awaits) {
        return refused(Unmet::Awaited { name: other.key.to_string() });
    }
    let (slot, content) = (snapshot.slot, snapshot.content);
    draft.drop_snapshot(key);
    match content {
        Content::Files => draft.effect(Effect::DropFiles(slot)),
        Content::Layer(layer) => draft.release_layer(layer),
    }
    Ok(())
}

fn update(
    draft: &mut Draft<'_>,
    key: &Key,
    labels: &Labels,
    fields: &[String],
    now: Timestamp,
) -> Result<(), ChainError> {
    let mut snapshot = draft.named(key, Subject::Snapshot)?.clone();
    if fields.is_empty() {
        snapshot.labels.clone_from(labels);
    }
    for field in fields {
        match (field.as_str(), field.strip_prefix("labels.")) {
            ("labels", _) => snapshot.labels.clone_from(labels),
            (_, Some(label)) => {
                let value = labels.get(label).cloned().unwrap_or_default();
                snapshot.labels.insert(label.to_owned(), value);
            }
            (field, None) => {
                return Err(Invalid::ImmutableField { field: field.to_owned(), name: key.to_string() }.into());
            }
        }
    }
    snapshot.labels = checked_labels(key, &snapshot.labels)?;
    snapshot.updated = now;
    draft.put(snapshot);
    Ok(())
}

pub(super) fn free(draft: &Draft<'_>, key: &Key) -> Result<(), ChainError> {
    if draft.get(key).is_some() {
        return Err(ChainError::AlreadyExists { name: key.to_string() });
    }
    Ok(())
}

/// The labels that have a value, if they are not too large.
fn checked_labels(key: &Key, labels: &Labels) -> Result<Labels, ChainError> {
    let size = labels.iter().map(|(name, value)| name.len() + value.len()).sum();
    if size > MAX_LABELS {
        return Err(Invalid::LargeLabels { name: key.to_string(), size }.into());
    }
    Ok(labels.iter().filter(|(_, value)| !value.is_empty()).map(|(n, v)| (n.clone(), v.clone())).collect())
}
