//! How far a layer is, as a person wants to see it.

use std::sync::atomic::Ordering;

use super::layer::Body;
use super::pieces::Chunked;
use super::{Counters, LayerImage, SlowRead, Standing};
use crate::model::{BlobDigest, DiffId};
use crate::store::Verdict;

/// How far a layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerState {
    /// Chunks come when they are read.
    Lazy,
    /// The rest is being fetched.
    Filling,
    /// All of it is here and has been verified as a whole.
    Local,
}

/// A layer as a person wants to see it.
#[derive(Debug, Clone)]
pub struct LayerStatus {
    /// The blob.
    pub blob: BlobDigest,
    /// What the image says the layer is.
    pub diff_id: DiffId,
    /// True if it was a tar and was unpacked.
    pub is_tar: bool,
    /// How far it is.
    pub state: LayerState,
    /// What is known of it as a whole.
    pub standing: Standing,
    /// Number of chunks; 0 for a layer that is read from start to end.
    pub chunks: u32,
    /// How many of them are here.
    pub present: u32,
    /// Size of the image in bytes, as far as it is known.
    pub bytes: u64,
    /// How many of them are here.
    pub bytes_present: u64,
    /// What the whole was found to hash to, if that is not what the image says.
    pub contradiction: Option<DiffId>,
    /// Stored bytes that came because somebody might read them, background fills not counted.
    pub prefetched: u64,
    /// How many of those nobody has read so far.
    pub wasted: u64,
    /// The reads that waited longest, the longest first.
    pub slowest: Vec<SlowRead>,
    /// What it has cost.
    pub counters: Counters,
}

impl LayerImage {
    /// How far it is.
    pub fn state(&self) -> LayerState {
        match &self.body {
            Body::Whole(whole) => whole.state(),
            Body::Chunked(_) if self.is_local() => LayerState::Local,
            Body::Chunked(chunked) if chunked.filling.load(Ordering::Relaxed) > 0 => LayerState::Filling,
            Body::Chunked(_) => LayerState::Lazy,
        }
    }

    /// Everything there is to say about it. Looks at every chunk.
    pub fn status(&self) -> LayerStatus {
        let (chunks, present, bytes, bytes_present, verdict) = match &self.body {
            Body::Whole(whole) => {
                let (bytes, present) = whole.progress(&self.spec);
                (0, 0, bytes, present, Verdict::Unverified)
            }
            Body::Chunked(chunked) => (
                chunked.index.len(),
                chunked.file.present_count(),
                chunked.index.image_size(),
                chunked.bytes_present(),
                chunked.file.verdict(),
            ),
        };
        let (prefetched, wasted) = self.chunked().map_or((0, 0), Chunked::guesses);
        let contradiction = match verdict {
            Verdict::Verified(found) | Verdict::Quarantined(found) | Verdict::Contradicted(found) => {
                (found != self.spec.diff_id).then_some(found)
            }
            Verdict::Unverified => None,
        };
        LayerStatus {
            blob: self.spec.blob,
            diff_id: self.claimed_diff_id(),
            is_tar: self.tar.is_some(),
            state: self.state(),
            standing: self.standing.borrow().clone(),
            chunks,
            present,
            bytes,
            bytes_present,
            contradiction,
            prefetched,
            wasted,
            slowest: self.chunked().map(|chunked| chunked.slowest.list()).unwrap_or_default(),
            counters: self.counters(),
        }
    }
}
