//! The ten calls of containerd, as the snapshots of a node answer them.
//!
//! Guarantees: a commit writes a record, a removal writes a record and renames a directory; labels of this program's own are
//! never containerd's to set or to lose.

use std::sync::Arc;

use super::layers::{Asked, OWN_LABELS, Offer};
use super::{Inner, Node, is_for_containerd, mounts};
use crate::chain::{ChainError, Key, Kind, Labels, Owner, Snapshot, Unmet, Usage};
use crate::grpc::{Mount, Prepared, Snapshotter, SnapshotterError, async_trait};
use crate::snapshots::{Snapshots, SnapshotsError};

/// Noted on a snapshot whose files containerd itself gave to the ids of a user namespace: what stands on it is not to be
/// mapped once more.
pub(super) const REMAPPED: &str = "headstart.remapped";

/// How containerd calls the snapshot in which it changes the ids of files, for a snapshotter that is not declared to map
/// them: the name under which it commits it, and this.
const REMAP_SUFFIX: &str = "-remap";

impl Inner {
    fn commit(&self, name: &str, key: &str, parent: &str, labels: Labels) -> Result<(), SnapshotterError> {
        let active = self.snapshots.stat(key).ok();
        let noted = active.as_ref().map(|active| active.labels.clone()).unwrap_or_default();
        let mut labels = with_own(labels, noted);
        if is_remap(name, key) {
            labels.insert(REMAPPED.to_owned(), "containerd".to_owned());
        }
        self.snapshots.commit(name, key, parent, labels)?;
        if let Some(active) = active {
            self.mapped.forget(active.slot);
            self.applies.committed(&active, self.snapshots.files_of(&active));
        }
        Ok(())
    }

    fn remove(&self, key: &str) -> Result<(), SnapshotterError> {
        match self.snapshots.remove(key) {
            // An image of this program's own needs it: containerd forgets it all the same.
            Err(error)
                if matches!(
                    error.refusal(),
                    Some(ChainError::FailedPrecondition { unmet: Unmet::Held { .. }, .. })
                ) && self.forgotten(key)? =>
            {
                Ok(())
            }
            other => Ok(other?),
        }
    }

    /// Takes away what makes a snapshot of this program's own one of containerd's. False if it is containerd's.
    fn forgotten(&self, key: &str) -> Result<bool, SnapshotsError> {
        let is_ours = self.snapshots.stat(key)?.owner == Owner::Images;
        if is_ours {
            self.snapshots.update(key, Labels::new(), Vec::new())?;
        }
        Ok(is_ours)
    }

    fn update(&self, key: &str, labels: Labels, fields: Vec<String>) -> Result<Snapshot, SnapshotterError> {
        let known = self.snapshots.stat(key)?.labels;
        Ok(self.snapshots.update(key, with_own(labels, known), fields)?)
    }
}

/// What containerd says, and of what is noted already what is this program's own. containerd passes on only labels that it
/// knows, so it would lose the others; and nobody else sets them.
fn with_own(mut said: Labels, noted: Labels) -> Labels {
    let is_own = |label: &str| label.starts_with(OWN_LABELS);
    said.retain(|label, _| !is_own(label));
    said.extend(noted.into_iter().filter(|(label, _)| is_own(label)));
    said
}

/// True if containerd commits a snapshot in which it changed the ids of files. Both are `NAMESPACE/NUMBER/NAME`.
fn is_remap(name: &str, key: &str) -> bool {
    let own = |key: &str| key.splitn(3, '/').nth(2).unwrap_or(key).to_owned();
    own(key) == own(name) + REMAP_SUFFIX
}

#[async_trait]
impl Snapshotter for Node {
    async fn prepare(&self, key: String, parent: String, labels: Labels) -> Result<Prepared, SnapshotterError> {
        let labels = with_own(labels, Labels::new());
        if mounts::is_extraction(&labels) {
            let below = Key::optional(&parent).map_err(SnapshotsError::from)?;
            let asked = Asked { key: key.clone(), parent: below, labels: labels.clone() };
            let offered =
                tokio::time::timeout(self.0.options.prepare_timeout, self.0.layers.offer(asked.clone())).await;
            match offered {
                Ok(Offer::Layer(offered)) => match self.serve(&asked, offered).await {
                    Ok(Some(prepared)) => return Ok(prepared),
                    Ok(None) => {}
                    // What is refused is refused to containerd's own layer as well.
                    Err(SnapshotterError::Snapshots(error)) if error.is_refusal() => return Err(error.into()),
                    Err(error) => {
                        let error: &dyn std::error::Error = &error;
                        tracing::error!(key, error, "a layer cannot be served: containerd brings it");
                    }
                },
                Ok(Offer::Ordinary(why)) => tracing::info!(key, why, "containerd brings a layer"),
                Err(_) => tracing::warn!(key, "the registry takes too long: containerd brings a layer"),
            }
        }
        let make = move |snapshots: &Snapshots, key: &str| snapshots.prepare(key, &parent, labels);
        self.make(key, make).await.map(Prepared::Mounts)
    }

    async fn view(&self, key: String, parent: String, labels: Labels) -> Result<Vec<Mount>, SnapshotterError> {
        let labels = with_own(labels, Labels::new());
        self.make(key, move |snapshots, key| snapshots.view(key, &parent, labels)).await
    }

    async fn mounts(&self, key: String) -> Result<Vec<Mount>, SnapshotterError> {
        let stack = self.0.snapshots.stack(&key)?;
        self.mounts_of(stack, false).await
    }

    async fn commit(&self, name: String, key: String, parent: String, labels: Labels) -> Result<(), SnapshotterError> {
        let committed = name.clone();
        self.blocking(move |inner| inner.commit(&committed, &key, &parent, labels)).await?;
        // Nobody waits for it.
        let inner = Arc::clone(&self.0);
        let measuring = self.0.runtime.spawn_blocking(move || {
            if let Err(error) = inner.snapshots.measure(&name)
                && !error.is_refusal()
            {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(name, error, "a snapshot cannot be measured");
            }
        });
        drop(measuring);
        Ok(())
    }

    async fn remove(&self, key: String) -> Result<(), SnapshotterError> {
        self.blocking(move |inner| {
            let before = inner.snapshots.stat(&key).ok();
            inner.remove(&key)?;
            if let Some(before) = before {
                inner.mapped.forget(before.slot);
                if before.kind == Kind::Active {
                    inner.applies.gone(&before);
                }
            }
            Ok(())
        })
        .await?;
        self.0.untidy.notify_one();
        Ok(())
    }

    async fn stat(&self, key: String) -> Result<Snapshot, SnapshotterError> {
        Ok(self.0.snapshots.stat(&key)?)
    }

    async fn update(&self, key: String, labels: Labels, fields: Vec<String>) -> Result<Snapshot, SnapshotterError> {
        self.blocking(move |inner| inner.update(&key, labels, fields)).await
    }

    async fn list(&self, filters: Vec<String>) -> Result<Vec<Snapshot>, SnapshotterError> {
        // A filter may be slow on many.
        self.blocking(move |inner| {
            let mut found = inner.snapshots.list(&filters)?;
            found.retain(is_for_containerd);
            Ok(found)
        })
        .await
    }

    async fn usage(&self, key: String) -> Result<Usage, SnapshotterError> {
        self.blocking(move |inner| Ok(inner.snapshots.usage(&key)?)).await
    }

    async fn cleanup(&self) -> Result<(), SnapshotterError> {
        self.0.untidy.notify_one();
        Ok(())
    }
}
