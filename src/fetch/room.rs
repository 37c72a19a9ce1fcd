//! Room made in the layers that are open: their coldest chunks go.
//!
//! Guarantees. What goes comes again when it is read. Chunks that hold metadata stay, as do those that somebody waits for,
//! those that were used since room was made the last time, and all of a layer whose image was given to the kernel. A layer
//! that lost a chunk is not local any more, and everybody who watches it hears of that. Refuses to know how much room is
//! needed, and layers that nobody has open: those go as a whole ([`Store::evict`](crate::store::Store::evict)).

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, Weak};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::counters::add;
use super::layer::Body;
use super::pieces::Chunked;
use super::queue::{Key, LayerId};
use super::shared::Shared;
use super::{LayerImage, Standing};
use crate::model::ByteRange;
use crate::store::StoreError;

/// How often others are chosen in the place of chunks that cannot go.
const ROUNDS: u32 = 8;

/// Room that was made, or would be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Room {
    /// How many chunks have gone.
    pub chunks: u64,
    /// How many bytes of the disk that gave back.
    pub bytes: u64,
}

/// Chunks of one layer.
type Victims = Vec<(u32, ByteRange)>;

pub(super) fn make_room(shared: &Arc<Shared>, wanted: u64, dry_run: bool) -> Result<Room, StoreError> {
    let layers: BTreeMap<LayerId, Arc<LayerImage>> =
        shared.open_layers().iter().filter_map(Weak::upgrade).map(|layer| (layer.id, layer)).collect();
    {
        let mut ranks = shared.ranks();
        ranks.turn(Instant::now());
        for (id, layer) in &layers {
            if let Some(chunked) = layer.chunked() {
                ranks.note(*id, chunked.recent.take_used());
            }
        }
    }
    let mut room = Room::default();
    let mut candidates = layers.clone();
    for _ in 0..ROUNDS {
        if room.bytes >= wanted || candidates.is_empty() {
            break;
        }
        let chosen = choose(shared, &candidates, wanted - room.bytes);
        if chosen.is_empty() {
            break;
        }
        for (id, victims) in chosen {
            let Some((layer, chunked)) = layers.get(&id).and_then(|layer| Some((layer, layer.chunked()?))) else {
                continue;
            };
            if dry_run {
                let chunks = u64::try_from(victims.len()).unwrap_or(u64::MAX);
                let bytes: u64 = victims.iter().map(|(_, range)| range.len()).sum();
                (room.chunks, room.bytes) = (room.chunks + chunks, room.bytes + bytes);
                candidates.remove(&id);
                continue;
            }
            let Some(punched) = chunked.file.punch(&victims)? else {
                candidates.remove(&id);
                continue;
            };
            shared.ranks().forget(victims.iter().map(|(chunk, _)| Key { layer: id, chunk: *chunk }));
            add(&layer.counting.evicted, punched.chunks.into());
            layer.notice_evictions(chunked);
            tracing::debug!(blob = %layer.spec.blob, chunks = punched.chunks, bytes = punched.bytes, "evicted chunks");
            room.chunks += u64::from(punched.chunks);
            room.bytes += punched.bytes;
        }
    }
    Ok(room)
}

/// The coldest chunks of `layers` that make up `wanted` bytes, by layer.
fn choose(shared: &Shared, layers: &BTreeMap<LayerId, Arc<LayerImage>>, wanted: u64) -> BTreeMap<LayerId, Victims> {
    let mut there = Vec::new();
    for (id, layer) in layers {
        let Some(chunked) = layer.chunked() else { continue };
        if chunked.is_pinned() {
            continue;
        }
        let may_go = |chunk: &u32| chunked.file.is_present(*chunk) && !stays(shared, chunked, *chunk);
        there.extend((0..chunked.index.len()).filter(may_go).map(|chunk| Key { layer: *id, chunk }));
    }
    {
        let state = shared.lock();
        there.retain(|key| !state.queue.knows(*key));
    }
    let order = shared.ranks().coldest_first(&there);
    let (mut chosen, mut bytes) = (BTreeMap::<LayerId, Victims>::new(), 0_u64);
    for key in order {
        if bytes >= wanted {
            break;
        }
        let chunk = layers.get(&key.layer).and_then(|layer| layer.chunked()?.index.chunk(key.chunk));
        let Some(range) = chunk.map(|chunk| chunk.image).filter(|range| !range.is_empty()) else { continue };
        bytes = bytes.saturating_add(range.len());
        chosen.entry(key.layer).or_default().push((key.chunk, range));
    }
    chosen
}

/// True for metadata: what has looked at it has asked for it, or it came along with the index.
fn stays(shared: &Shared, chunked: &Chunked, chunk: u32) -> bool {
    let in_head = || chunked.index.chunk(chunk).is_some_and(|chunk| chunk.blob.end() <= shared.config.head);
    chunked.recent.holds_metadata(chunk) || in_head()
}

impl Chunked {
    fn is_pinned(&self) -> bool {
        self.recent.pin.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Sees to it that nothing of the image goes as long as the layer is open. False if something is missing.
    pub(super) fn pin(&self) -> Result<bool, StoreError> {
        let mut pin = self.recent.pin.lock().unwrap_or_else(PoisonError::into_inner);
        if pin.is_none() {
            *pin = self.file.pin()?;
        }
        Ok(pin.is_some())
    }
}

impl LayerImage {
    /// How often chunks of the image were evicted, by anybody.
    pub fn evictions(&self) -> u64 {
        match &self.body {
            Body::Chunked(chunked) => chunked.file.evictions(),
            Body::Whole(_) => 0,
        }
    }

    /// Takes note of evictions, by this process or another: what lost a chunk is not local any more. Costs next to nothing
    /// if there were none.
    pub(super) fn notice_evictions(&self, chunked: &Chunked) {
        let now = chunked.file.evictions();
        if chunked.recent.evictions.load(Ordering::Relaxed) != now
            && chunked.recent.evictions.swap(now, Ordering::AcqRel) != now
        {
            self.is_still_local(chunked);
        }
    }

    /// A layer that is not complete is not local, and is verified anew when it is complete again.
    pub(super) fn is_still_local(&self, chunked: &Chunked) {
        let lost = |standing: &Standing| matches!(standing, Standing::Local { .. }) && !chunked.is_complete();
        if self.stands_no_more(lost) {
            self.hash_from_the_start(chunked);
            // It may have come back meanwhile.
            self.check_complete();
        }
    }
}
