//! An image brought here as a whole, without being mounted, and written down as snapshots.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::runtime::Handle;
use tokio::time::{MissedTickBehavior, interval};

use super::image::{Documents, House, OpenImage};
use super::recorder::Recorder;
use crate::control::{Pulled, PulledLayer};
use crate::fetch::LayerStatus;
use crate::model::BlobDigest;
use crate::oci::{Platform, Reference};
use crate::unpack::{Fill, FillOptions, Persistence, Progress};

/// Time between two looks at how far a pull is.
const LOOK: Duration = Duration::from_millis(200);

/// Brings all of an image here. `tell` is told now and then the bytes that are here and those there will be.
///
/// # Errors
/// Why something does not come.
pub async fn bring(
    house: &House,
    reference: &Reference,
    platform: Option<&Platform>,
    mut tell: impl FnMut(u64, u64) + Send,
) -> anyhow::Result<Pulled> {
    let documents = house.documents(reference, platform).await?;
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let read = Arc::new(Progress::new(documents.layers()));
    let pull = {
        let begun = Pull::begin(house, documents, &read);
        tokio::pin!(begun);
        loop {
            tokio::select! {
                pull = &mut begun => break pull?,
                _ = ticks.tick() => {
                    let (bytes, of) = read.bytes();
                    tell(bytes, of);
                }
            }
        }
    };
    {
        let finished = pull.finished();
        tokio::pin!(finished);
        loop {
            tokio::select! {
                result = &mut finished => {
                    result?;
                    break;
                }
                _ = ticks.tick() => {
                    let status = pull.status();
                    let sum = |of: fn(&LayerStatus) -> u64| status.iter().map(of).sum();
                    tell(sum(|layer| layer.bytes_present), sum(|layer| layer.bytes));
                }
            }
        }
    }
    let layer = |layer: &LayerStatus| PulledLayer {
        digest: layer.blob,
        diff_id: layer.diff_id,
        bytes: layer.bytes,
        bytes_fetched: layer.counters.fetched,
    };
    let layers: Vec<PulledLayer> = pull.status().iter().map(layer).collect();
    Ok(Pulled {
        image: reference.to_string(),
        manifest: pull.manifest(),
        bytes_fetched: layers.iter().map(|layer| layer.bytes_fetched).sum(),
        bytes: layers.iter().map(|layer| layer.bytes).sum(),
        layers,
    })
}

/// A pull under way, or over. Dropped, it begins nothing more.
#[derive(Debug)]
pub struct Pull {
    image: OpenImage,
    fill: Fill,
    recorder: Arc<Recorder>,
    runtime: Handle,
}

impl Pull {
    /// Begins to bring all layers of an image; those that are tars have come when this is done, `progress` tells meanwhile.
    ///
    /// # Errors
    /// Layers that cannot be opened.
    pub async fn begin(house: &House, documents: Documents, progress: &Arc<Progress>) -> anyhow::Result<Self> {
        let image = house.bring_image(documents, Some(Arc::clone(progress))).await?;
        let name = image.documents.reference.to_string();
        let recorder = Arc::new(Recorder::new(house, name, image.documents.digest, &image.layers));
        record(house.runtime(), &recorder).await?;
        recorder.follow(&image.layers);
        let options = FillOptions { start_delay: Duration::ZERO, persistence: Persistence::Once };
        let fill = Fill::start(house.runtime(), &image.layers, options);
        Ok(Self { image, fill, recorder, runtime: house.runtime().clone() })
    }

    /// Waits until every layer is local, safe on disk and committed.
    ///
    /// # Errors
    /// Why one is not.
    pub async fn finished(&self) -> anyhow::Result<()> {
        self.fill.finished().await?;
        record(&self.runtime, &self.recorder).await
    }

    /// How the layers stand, lowest first.
    pub fn status(&self) -> Vec<LayerStatus> {
        self.image.layers.iter().map(|layer| layer.status()).collect()
    }

    /// The manifest that the reference stood for.
    pub const fn manifest(&self) -> BlobDigest {
        self.image.documents.digest
    }
}

async fn record(runtime: &Handle, recorder: &Arc<Recorder>) -> anyhow::Result<()> {
    let recorder = Arc::clone(recorder);
    let recording = runtime.spawn_blocking(move || recorder.record());
    recording.await.context("the thread that writes down an image broke down")??;
    Ok(())
}
