//! One mount of a host: an open image, how it is shown, and its record on disk.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::UNIX_EPOCH;

use super::shown::Shown;
use crate::control::{LayerState, LayerStatus, MountRecord, MountStatus, SlowRead};
use crate::daemon::image::OpenImage;
use crate::daemon::mounts::Claim;
use crate::daemon::recorder::WrittenMount;
use crate::fetch::{self, Standing};
use crate::sys::mount::{MountError, Unmount};
use crate::unpack::{Fill, Phase, UnpackError, why};

/// One mount.
#[derive(Debug)]
pub struct Mounted {
    image: OpenImage,
    shown: Box<dyn Shown>,
    record: MountRecord,
    /// None when the mount point may be used again.
    claim: Mutex<Option<(Claim, Option<WrittenMount>)>>,
    /// What completes it in the background.
    fill: Option<Fill>,
}

impl Mounted {
    pub(super) fn new(
        image: OpenImage,
        shown: Box<dyn Shown>,
        record: MountRecord,
        claim: (Claim, Option<WrittenMount>),
        fill: Option<Fill>,
    ) -> Self {
        Self { image, shown, record, claim: Mutex::new(Some(claim)), fill }
    }

    /// What is mounted where.
    pub const fn record(&self) -> &MountRecord {
        &self.record
    }

    /// The image.
    pub const fn image(&self) -> &OpenImage {
        &self.image
    }

    /// How everything stands. Looks at every chunk.
    pub fn status(&self) -> MountStatus {
        let layers: Vec<fetch::LayerStatus> = self.image.layers.iter().map(|layer| layer.status()).collect();
        let sum = |of: fn(&fetch::Counters) -> u64| layers.iter().map(|layer| of(&layer.counters)).sum();
        let driver = self.shown.driver();
        let phases = self.fill.as_ref().map(Fill::phases).unwrap_or_default();
        MountStatus {
            record: MountRecord { driver: driver.name.to_owned(), ..self.record.clone() },
            driver_why: driver.why,
            bytes_fetched: sum(|counters| counters.fetched),
            bytes_demanded: sum(|counters| counters.needed),
            layers: layers
                .iter()
                .enumerate()
                .map(|(number, layer)| told(layer, phases.get(number), self.shown.layer(&layer.diff_id)))
                .collect(),
        }
    }

    /// Why it will not become local by itself, if so.
    pub fn hopeless(&self) -> Option<NeverLocal> {
        let Some(fill) = &self.fill else { return Some(NeverLocal::NotFilled(self.record.mount_point.clone())) };
        fill.phases().into_iter().find_map(|phase| match phase {
            Phase::Failed(error) => Some(NeverLocal::Failed(self.record.mount_point.clone(), error)),
            _ => None,
        })
    }

    /// True if all of it is here and verified.
    pub fn is_local(&self) -> bool {
        self.image.layers.iter().all(|layer| layer.state() == fetch::LayerState::Local)
    }

    /// How many FUSE connections it has for itself.
    pub(super) fn own_connections(&self) -> u64 {
        self.shown.own_connections()
    }

    /// Takes the mount away. That somebody else did is as good. Waits for the kernel.
    pub(super) fn take_away(&self, how: Unmount) -> Result<(), MountError> {
        self.shown.take_away(how)
    }

    /// Done when nothing is served any more.
    pub async fn ended(&self) {
        self.shown.ended().await;
    }

    /// Lets go of the mount point and removes the record.
    pub(super) fn release(&self) {
        let claim = self.claim.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(claim);
    }

    /// Leaves a mount that goes on by itself to the next daemon, with its records; false if it does not.
    pub(super) fn leave(&self) -> bool {
        if !self.shown.leave() {
            return false;
        }
        let Some((claim, written)) = self.claim.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return false;
        };
        if let Some(written) = written {
            written.stay();
        }
        let record = MountRecord { driver: self.shown.driver().name.to_owned(), ..self.record.clone() };
        if let Err(error) = claim.leave(&record) {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(mount_point = %record.mount_point.display(), error, "a mount stays without its record");
        }
        true
    }

    pub(super) fn is_released(&self) -> bool {
        self.claim.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }
}

/// Why a mount does not become local.
#[derive(Debug, thiserror::Error)]
pub enum NeverLocal {
    /// Nothing fills it.
    #[error("{} does not become local: it was mounted without a fill", .0.display())]
    NotFilled(PathBuf),
    /// Its fill has ended.
    #[error("{} does not become local", .0.display())]
    Failed(PathBuf, #[source] UnpackError),
}

/// A layer's status as the control socket tells it.
fn told(layer: &fetch::LayerStatus, phase: Option<&Phase>, presented: Option<String>) -> LayerStatus {
    LayerStatus {
        digest: layer.blob,
        diff_id: Some(layer.diff_id),
        state: layer_state(layer.state),
        why: Some(why(layer, phase)),
        presented,
        chunks: layer.chunks.into(),
        present: layer.present.into(),
        bytes: layer.bytes,
        bytes_present: layer.bytes_present,
        local_since: match layer.standing {
            Standing::Local { since } => since.duration_since(UNIX_EPOCH).ok().map(|since| since.as_secs()),
            _ => None,
        },
        bytes_demanded: layer.counters.needed,
        bytes_prefetched: layer.prefetched,
        bytes_wasted: layer.wasted,
        slowest_reads: layer.slowest.iter().map(slow_read).collect(),
    }
}

fn slow_read(read: &fetch::SlowRead) -> SlowRead {
    SlowRead {
        offset: read.range.start(),
        bytes: read.range.len(),
        milliseconds: u64::try_from(read.waited.as_millis()).unwrap_or(u64::MAX),
    }
}

/// A layer's state as it is told.
pub const fn layer_state(state: fetch::LayerState) -> LayerState {
    match state {
        fetch::LayerState::Lazy => LayerState::Lazy,
        fetch::LayerState::Filling => LayerState::Filling,
        fetch::LayerState::Local => LayerState::Local,
    }
}
