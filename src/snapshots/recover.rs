//! What a start finds: directories that nobody records, records whose directory is gone, layers that became local, or
//! ceased to be, while nobody listened.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::{Snapshots, SnapshotsError};
use crate::chain::{Content, Key, Layer, SnapshotSlot};
use crate::model::DiffId;
use crate::store::{self, Anchor, Verdict};

/// What a start found and did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Recovery {
    /// Directories without record: they are being deleted.
    pub removed: Vec<SnapshotSlot>,
    /// Snapshots whose directory is gone. They stay as they are: their files are lost, and somebody has to know.
    pub missing: Vec<Key>,
    /// Things among the directories of snapshots that are none. They stay.
    pub strange: Vec<PathBuf>,
    /// Snapshots that could be committed, each after its parent.
    pub committed: Vec<Key>,
    /// Layers that were local and are not here any more.
    pub lost: Vec<DiffId>,
}

/// True if a layer that was recorded as local still is: the cache may have been emptied since.
pub fn is_local(root: &Path, layer: &Layer) -> bool {
    let verified = |verdict| matches!(verdict, Verdict::Verified(_));
    layer.local.is_some() && store::noted_verdict(root, &layer.id.blob, &layer.id.anchor).is_some_and(verified)
}

impl Snapshots {
    pub(super) fn recover(&self) -> Result<Recovery, SnapshotsError> {
        let mut recovery = Recovery::default();
        let recorded: Vec<(SnapshotSlot, Key)> = self.records.read(|chain| {
            let with_files = chain.walk().filter(|snapshot| snapshot.content == Content::Files);
            with_files.map(|snapshot| (snapshot.slot, snapshot.key.clone())).collect()
        });
        let known: BTreeSet<SnapshotSlot> = recorded.iter().map(|(slot, _)| *slot).collect();
        let (found, strange) = self.files.found()?;
        recovery.strange = strange;
        for slot in found.into_iter().filter(|slot| !known.contains(slot)) {
            self.files.discard(slot);
            recovery.removed.push(slot);
        }
        recovery.missing =
            recorded.into_iter().filter(|(slot, _)| !self.files.is_there(*slot)).map(|(_, key)| key).collect();
        for layer in self.layers().into_iter().filter(|layer| layer.local.is_some()) {
            if !is_local(self.store.root(), &layer) {
                self.layer_lost(&layer.id)?;
                recovery.lost.push(layer.id.diff_id);
            }
        }
        recovery.committed = self.find_local()?;
        for (path, what) in recovery.strange.iter().map(|path| (path.display().to_string(), "is no snapshot's")) {
            tracing::warn!("{path} {what}");
        }
        for key in &recovery.missing {
            tracing::error!(%key, "the files of a snapshot are gone");
        }
        Ok(recovery)
    }

    /// Looks in the store which layers have become local.
    pub(super) fn find_local(&self) -> Result<Vec<Key>, SnapshotsError> {
        let mut committed = Vec::new();
        for layer in self.layers().into_iter().filter(|layer| layer.local.is_none()) {
            if let Some(size) = self.verified_size(&layer)? {
                committed.append(&mut self.layer_local(&layer.id, size)?);
            }
        }
        Ok(committed)
    }

    /// The size of a layer's image, if all of it is here and is what its diffID says.
    fn verified_size(&self, layer: &Layer) -> Result<Option<u64>, SnapshotsError> {
        let Ok(anchor) = layer.id.anchor.parse::<Anchor>() else { return Ok(None) };
        let Some(file) = self.store.existing(&layer.id.blob, anchor)? else { return Ok(None) };
        let verified = match (anchor, file.verdict()) {
            // It is there only if the tar had its diffID; the image made of it has another.
            (Anchor::Tar(_), Verdict::Verified(_)) => true,
            (_, Verdict::Verified(found)) => found == layer.id.diff_id,
            (_, Verdict::Unverified | Verdict::Quarantined(_) | Verdict::Contradicted(_)) => false,
        };
        Ok(verified.then(|| file.spec().image_size))
    }
}
