//! Layers as they are shown to containers: who shows them, since when, and until when.
//!
//! A layer is shown once, under the number that the records give it, for as long as a recorded snapshot is made of it.
//! Refuses to know what snapshots are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Inner;
use super::layers::Held;
use crate::chain::{Content, Labels, Layer, LayerSlot};
use crate::daemon::recorder::spec;
use crate::fetch::LayerImage;
use crate::unpack::Fill;

/// How long to wait for somebody who still uses a layer that is to be deleted, the first time and at most: the kernel lets a
/// device go soon after the last container's end, an image that was just opened is remembered for some minutes.
const TIDY_AGAIN: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];

/// A layer that is shown. Dropping it waits for the kernel.
#[derive(Debug)]
pub(super) struct Shown {
    pub(super) held: Box<dyn Held>,
    /// Ends before the layer does.
    _fill: Option<Fill>,
    pub(super) image: Arc<LayerImage>,
}

impl Inner {
    pub(super) fn shown(&self) -> MutexGuard<'_, BTreeMap<LayerSlot, Arc<Shown>>> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes down the layers that are shown and that nothing uses; afterwards they are gone, whoever does it. Waits for the
    /// kernel.
    pub(super) fn take_down_unused(&self) {
        let _one = self.taking_down.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.unused());
    }

    /// Layers that are shown and that nothing uses, taken out of the table.
    fn unused(&self) -> Vec<Arc<Shown>> {
        let mut shown = self.shown();
        // Looked at while the table is locked: a layer is recorded before it is in there.
        let used: BTreeSet<LayerSlot> = self.snapshots.layers().into_iter().map(|layer| layer.slot).collect();
        let gone: Vec<LayerSlot> = shown.keys().filter(|slot| !used.contains(slot)).copied().collect();
        gone.into_iter().filter_map(|slot| shown.remove(&slot)).collect()
    }

    /// Shows a layer that is recorded under `slot`. Waits for the kernel.
    pub(super) fn show(&self, image: &Arc<LayerImage>, slot: LayerSlot) -> anyhow::Result<Arc<Shown>> {
        if let Some(shown) = self.shown().get(&slot) {
            return Ok(Arc::clone(shown));
        }
        let held = self.shelves.hold(image, slot)?;
        let snapshots = Arc::clone(&self.snapshots);
        image.when_local(move |layer, local| {
            if let Err(error) = snapshots.layer_local(&spec(layer).id(), local.size) {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(diff_id = %local.diff_id, error, "cannot write down that a layer is local");
            }
        });
        let fill = self.options.fill.map(|options| Fill::start(&self.runtime, std::slice::from_ref(image), options));
        let fresh = Arc::new(Shown { held, _fill: fill, image: Arc::clone(image) });
        // Whoever was faster has the same directory.
        let kept = Arc::clone(self.shown().entry(slot).or_insert_with(|| Arc::clone(&fresh)));
        Ok(kept)
    }

    /// Shows a layer of earlier, from what was kept of it, if that can be opened until then.
    pub(super) async fn show_again(self: &Arc<Self>, layer: &Layer, until: Instant) -> anyhow::Result<Arc<Shown>> {
        let labels: Vec<Labels> = {
            let all = self.snapshots.all();
            let of_it = all.walk().filter(|snapshot| snapshot.content == Content::Layer(layer.slot));
            of_it.map(|snapshot| snapshot.labels.clone()).collect()
        };
        let again = self.layers.again(layer, &labels);
        let image = tokio::time::timeout_at(until, again)
            .await
            .with_context(|| format!("layer {} does not come in time", layer.id))??;
        anyhow::ensure!(
            spec(&image).id() == layer.id,
            "what was kept for layer {} is layer {}",
            layer.id,
            spec(&image).id()
        );
        let (inner, slot) = (Arc::clone(self), layer.slot);
        let showing = self.runtime.spawn_blocking(move || inner.show(&image, slot));
        showing.await.context("the thread that shows a layer broke down")?
    }
}

/// Unmounts layers that no snapshot uses any more, and deletes what was fetched of them, as long as the node is there.
pub(super) async fn keep_tidy(node: Weak<Inner>, untidy: Arc<Notify>) {
    let [soon, at_most] = TIDY_AGAIN;
    let mut again = soon;
    loop {
        let Some(inner) = node.upgrade() else { return };
        let tidying = tokio::task::spawn_blocking(move || {
            inner.take_down_unused();
            inner.snapshots.free_released()
        });
        let left = match tidying.await {
            Ok(Ok(left)) => left,
            Ok(Err(error)) => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(error, "what removed snapshots were made of is not deleted yet");
                1
            }
            Err(_) => 1,
        };
        if left == 0 {
            untidy.notified().await;
            again = soon;
        } else if tokio::time::timeout(again, untidy.notified()).await.is_ok() {
            again = soon;
        } else {
            // Whoever still uses them may be done now.
            again = (again * 2).min(at_most);
        }
    }
}
