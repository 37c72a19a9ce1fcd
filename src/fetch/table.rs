//! The layers of a process that are open: each is opened once, whoever wants it, so that mounts which share layers share
//! what is under way and what it cost.
//!
//! Two wishes are for the same layer if they agree in everything its bytes are verified against: blob, how it is stored,
//! index and diffID. An image that tells lies about a diffID so shares nothing with an honest one.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::{LayerImage, LayerSpec};
use crate::chunked::{Compression, IndexFamily};
use crate::model::{BlobDigest, DiffId, IndexDigest};

/// What makes two wishes the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct LayerKey {
    blob: BlobDigest,
    raw: bool,
    diff_id: DiffId,
    index: Option<(bool, IndexDigest)>,
}

impl LayerKey {
    pub(super) fn of(spec: &LayerSpec) -> Self {
        let index = spec.index.and_then(|location| {
            let digest = location.section.digest?;
            Some((location.section.family == IndexFamily::ImageSpec, digest))
        });
        Self { blob: spec.blob, raw: spec.compression == Compression::None, diff_id: spec.diff_id, index }
    }
}

/// One entry: held while the layer is being opened, so that others wait for it.
pub(super) type Slot = Arc<tokio::sync::Mutex<Weak<LayerImage>>>;

/// The table.
#[derive(Default)]
pub(super) struct Table {
    open: Mutex<HashMap<LayerKey, Slot>>,
}

impl Table {
    /// The entry of `key`. Entries of layers that are gone go as well.
    pub(super) fn slot(&self, key: LayerKey) -> Slot {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.retain(|_, slot| {
            Arc::strong_count(slot) > 1 || slot.try_lock().map_or(true, |layer| layer.strong_count() > 0)
        });
        Arc::clone(open.entry(key).or_default())
    }
}
