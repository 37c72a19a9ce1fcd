//! Images that are brought: snapshots that fill without parent, and are committed in order of their chain.

use std::collections::BTreeSet;

use super::draft::Draft;
use super::{
    ChainError, Content, Effect, Image, ImageLayer, Invalid, Key, Kind, Labels, Layer, LayerId, LayerSlot, Owner,
    Snapshot, SnapshotSlot, Subject, Target, Unmet, rules,
};
use crate::model::{BlobDigest, Timestamp};

/// A layer of an image that is pulled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PulledLayer {
    /// Which layer.
    pub id: LayerId,
    /// Size of its image in bytes, if it is known before the image is complete.
    pub size: Option<u64>,
    /// The name to commit it under: its ChainID.
    pub name: Key,
}

pub(super) fn pull(
    draft: &mut Draft<'_>,
    name: &str,
    manifest: BlobDigest,
    layers: &[PulledLayer],
    now: Timestamp,
) -> Result<(), ChainError> {
    let mut seen = BTreeSet::new();
    let mut parent: Option<&Key> = None;
    let mut held = Vec::with_capacity(layers.len());
    for PulledLayer { id, size, name: becomes } in layers {
        if !seen.insert(becomes) {
            return Err(Invalid::RepeatedName { image: name.to_owned(), name: becomes.to_string() }.into());
        }
        let layer = known_layer(draft, id, *size)?;
        held.push(ImageLayer { layer, name: becomes.clone() });
        match draft.get(becomes) {
            Some(there) if there.kind != Kind::Committed => {
                return Err(ChainError::FailedPrecondition {
                    attempted: "pull",
                    name: becomes.to_string(),
                    unmet: Unmet::Kind(there.kind),
                });
            }
            Some(there) => same_parent(becomes, there.parent.as_ref(), parent)?,
            None => fill(draft, (id, layer), becomes, parent, now)?,
        }
        parent = Some(becomes);
    }
    let old = draft.image(name).cloned();
    let slot = match &old {
        // The same tree keeps its number.
        Some(old) if old.layers == held => old.slot,
        _ => draft.snapshot_slot(name)?,
    };
    draft.put_image(Image { name: name.to_owned(), manifest, slot, layers: held, pulled: now });
    for layer in old.iter().flat_map(|old| &old.layers) {
        draft.release_layer(layer.layer);
    }
    settle(draft, now)
}

/// An active snapshot for `layer`, unless there is one that becomes the same.
fn fill(
    draft: &mut Draft<'_>,
    (id, layer): (&LayerId, LayerSlot),
    becomes: &Key,
    parent: Option<&Key>,
    now: Timestamp,
) -> Result<(), ChainError> {
    let target = Target { name: becomes.clone(), parent: parent.cloned() };
    for other in draft.snapshots() {
        let Some(known) = &other.filling else { continue };
        if known.name == *becomes {
            same_parent(becomes, known.parent.as_ref(), parent)?;
            if other.content == Content::Layer(layer) {
                return Ok(());
            }
        }
    }
    let key = fill_key(id, becomes)?;
    rules::free(draft, &key)?;
    let slot = draft.snapshot_slot(key.as_str())?;
    draft.put(Snapshot {
        key,
        slot,
        kind: Kind::Active,
        parent: None,
        labels: Labels::new(),
        created: now,
        updated: now,
        content: Content::Layer(layer),
        owner: Owner::Images,
        usage: None,
        filling: Some(target),
    });
    Ok(())
}

/// What a snapshot is called while it fills. Clients that go through containerd cannot give a key that begins with a
/// slash.
pub(super) fn fill_key(id: &LayerId, becomes: &Key) -> Result<Key, ChainError> {
    Key::new(&format!("/fill/{}/{}/{becomes}", id.blob, id.anchor))
}

fn same_parent(name: &Key, found: Option<&Key>, wanted: Option<&Key>) -> Result<(), ChainError> {
    if found == wanted {
        return Ok(());
    }
    let (found, wanted) = (found.map(Key::to_string), wanted.map(Key::to_string));
    Err(ChainError::FailedPrecondition {
        attempted: "pull",
        name: name.to_string(),
        unmet: Unmet::OtherParent { found, wanted },
    })
}

/// The number of the layer, which gets one if it has none.
pub(super) fn known_layer(draft: &mut Draft<'_>, id: &LayerId, size: Option<u64>) -> Result<LayerSlot, ChainError> {
    if let Some(known) = draft.layer_of(id) {
        let slot = known.slot;
        if known.size.is_none() && size.is_some() {
            let sized = Layer { size, ..known.clone() };
            draft.put_layer(sized);
        } else if let (Some(found), Some(wanted)) = (known.size, size)
            && found != wanted
        {
            return Err(Invalid::LayerSize { id: id.clone(), found, wanted }.into());
        }
        return Ok(slot);
    }
    let slot = draft.layer_slot(&id.diff_id.to_string())?;
    draft.put_layer(Layer { slot, id: id.clone(), size, local: None });
    Ok(slot)
}

pub(super) fn forget(draft: &mut Draft<'_>, name: &str) -> Result<(), ChainError> {
    let Some(old) = draft.image(name).cloned() else {
        return Err(ChainError::NotFound { subject: Subject::Image, name: name.to_owned() });
    };
    draft.drop_image(name);
    for layer in &old.layers {
        draft.release_layer(layer.layer);
    }
    Ok(())
}

fn layer_named(draft: &Draft<'_>, id: &LayerId) -> Result<Layer, ChainError> {
    let found = draft.layer_of(id).cloned();
    found.ok_or_else(|| ChainError::NotFound { subject: Subject::Layer, name: id.diff_id.to_string() })
}

pub(super) fn layer_local(draft: &mut Draft<'_>, id: &LayerId, size: u64, now: Timestamp) -> Result<(), ChainError> {
    layer_named(draft, id)?;
    known_layer(draft, id, Some(size))?;
    let layer = layer_named(draft, id)?;
    if layer.local.is_none() {
        draft.put_layer(Layer { local: Some(now), ..layer });
    }
    settle(draft, now)
}

pub(super) fn layer_lost(draft: &mut Draft<'_>, id: &LayerId) -> Result<(), ChainError> {
    let layer = layer_named(draft, id)?;
    if layer.local.is_some() {
        draft.put_layer(Layer { local: None, ..layer });
    }
    Ok(())
}

/// Commits everything that fills, whose layer is local and whose parent is committed, until nothing more is.
fn settle(draft: &mut Draft<'_>, now: Timestamp) -> Result<(), ChainError> {
    loop {
        let ready = draft.snapshots().find_map(|snapshot| {
            let target = snapshot.filling.as_ref()?;
            let Content::Layer(layer) = snapshot.content else { return None };
            let local = draft.layer(layer)?.local.is_some();
            let below = target.parent.as_ref().is_none_or(|parent| draft.is_committed(parent));
            (local && below && draft.get(&target.name).is_none()).then(|| (snapshot.clone(), target.clone()))
        });
        let Some((snapshot, target)) = ready else { return Ok(()) };
        draft.drop_snapshot(&snapshot.key);
        let lost = losers(draft, &target.name);
        draft.put(Snapshot {
            key: target.name.clone(),
            kind: Kind::Committed,
            parent: target.parent,
            created: now,
            updated: now,
            filling: None,
            ..snapshot
        });
        draft.effect(Effect::Committed(target.name));
        drop_losers(draft, lost);
    }
}

/// Takes note that somebody has committed `name` himself: what fills for it has lost, what waited for it goes on.
pub(super) fn committed(draft: &mut Draft<'_>, name: &Key, now: Timestamp) -> Result<(), ChainError> {
    let lost = losers(draft, name);
    drop_losers(draft, lost);
    settle(draft, now)
}

type Loser = (Key, SnapshotSlot, Content);

/// What fills for a name that is taken.
fn losers(draft: &Draft<'_>, name: &Key) -> Vec<Loser> {
    let fills = |other: &&Snapshot| other.filling.as_ref().is_some_and(|other| other.name == *name);
    draft.snapshots().filter(fills).map(|other| (other.key.clone(), other.slot, other.content)).collect()
}

fn drop_losers(draft: &mut Draft<'_>, lost: Vec<Loser>) {
    for (key, slot, content) in lost {
        draft.drop_snapshot(&key);
        match content {
            Content::Files => draft.effect(Effect::DropFiles(slot)),
            Content::Layer(layer) => draft.release_layer(layer),
        }
    }
}
