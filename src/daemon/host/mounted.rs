//! One mount of a host: an open image, how it is shown, and its record on disk.

use std::sync::{Mutex, PoisonError};

use super::shown::Shown;
use crate::control::{LayerState, LayerStatus, MountRecord, MountStatus};
use crate::daemon::image::OpenImage;
use crate::daemon::mounts::Claim;
use crate::fetch;
use crate::sys::mount::{MountError, Unmount};

/// One mount.
#[derive(Debug)]
pub struct Mounted {
    image: OpenImage,
    shown: Box<dyn Shown>,
    record: MountRecord,
    /// None when the mount point may be used again.
    claim: Mutex<Option<Claim>>,
}

impl Mounted {
    pub(super) fn new(image: OpenImage, shown: Box<dyn Shown>, record: MountRecord, claim: Claim) -> Self {
        Self { image, shown, record, claim: Mutex::new(Some(claim)) }
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
        MountStatus {
            record: MountRecord { driver: driver.name.to_owned(), ..self.record.clone() },
            driver_why: driver.why,
            bytes_fetched: sum(|counters| counters.fetched),
            bytes_demanded: sum(|counters| counters.needed),
            layers: layers.iter().map(told).collect(),
        }
    }

    /// True if all of it is here and verified.
    pub fn is_local(&self) -> bool {
        self.image.layers.iter().all(|layer| layer.state() == fetch::LayerState::Local)
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

    pub(super) fn is_released(&self) -> bool {
        self.claim.lock().unwrap_or_else(PoisonError::into_inner).is_none()
    }
}

/// A layer's status as the control socket tells it.
fn told(layer: &fetch::LayerStatus) -> LayerStatus {
    LayerStatus {
        digest: layer.blob,
        diff_id: Some(layer.diff_id),
        state: layer_state(layer.state),
        why: None,
        chunks: layer.chunks.into(),
        present: layer.present.into(),
        bytes: layer.bytes,
        bytes_present: layer.bytes_present,
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
