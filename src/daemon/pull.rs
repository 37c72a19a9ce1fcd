//! An image brought here as a whole, without being mounted.

use std::sync::Arc;
use std::time::Duration;

use super::image::{Documents, House, OpenImage};
use crate::fetch::LayerStatus;
use crate::model::BlobDigest;
use crate::unpack::{Fill, FillOptions, Persistence, Progress, UnpackError};

/// A pull under way, or over. Dropped, it begins nothing more.
#[derive(Debug)]
pub struct Pull {
    image: OpenImage,
    fill: Fill,
}

impl Pull {
    /// Begins to bring all layers of an image; those that are tars have come when this is done, `progress` tells meanwhile.
    ///
    /// # Errors
    /// Layers that cannot be opened.
    pub async fn begin(house: &House, documents: Documents, progress: &Arc<Progress>) -> anyhow::Result<Self> {
        let image = house.bring_image(documents, Some(Arc::clone(progress))).await?;
        let options = FillOptions { start_delay: Duration::ZERO, persistence: Persistence::Once };
        let fill = Fill::start(house.runtime(), &image.layers, options);
        Ok(Self { image, fill })
    }

    /// Waits until every layer is local and safe on disk.
    ///
    /// # Errors
    /// Why one is not.
    pub async fn finished(&self) -> Result<(), UnpackError> {
        self.fill.finished().await
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
