//! One tar layer that somebody else brings: its bytes become an EROFS image in the store, on top of layers that are known
//! or are being applied at the same moment.
//!
//! The stack that the image belongs to is what others call it; it is believed when the diffID of the tar, which comes out
//! at the end, and the stack below make it. A layer of which nobody says where it belongs is kept under a name that
//! nobody else will ever ask for.
//!
//! Guarantees: as [`unpack_tars`](super::unpack_tars). Refuses to know who asks, and where bytes come from.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tokio::runtime::Handle;

use super::UnpackError;
use super::tar::{TarImage, Told, made_before};
use crate::convert::below::LayerBelow;
use crate::fetch::{Fetcher, LayerImage, TarLayer};
use crate::model::{Algorithm, BlobDigest, ChainId, DiffId, Digest};
use crate::store::StoreError;

/// Where a layer belongs.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    /// It is the top of this stack.
    Known {
        /// With the layer.
        chain: ChainId,
        /// The stack below it; none for the lowest layer.
        below: Option<ChainId>,
        /// The layers below that are images, see [`identity_of`](super::identity_of), the lowest first: the stack is called by
        /// what they claim to be, and what is unpacked upon a claim is kept apart.
        images: Vec<DiffId>,
    },
    /// Nobody says. The name is nobody else's.
    Private(ChainId),
}

impl Place {
    /// What the image is kept under.
    fn name(&self) -> ChainId {
        match self {
            Self::Private(name) => *name,
            Self::Known { chain, images, .. } if images.is_empty() => *chain,
            Self::Known { chain, images, .. } => {
                let images: Vec<String> = images.iter().map(DiffId::to_string).collect();
                let said = format!("headstart stack\n{chain}\n{}\n", images.join("\n"));
                ChainId(Digest::of(Algorithm::Sha256, said.as_bytes()))
            }
        }
    }
}

/// A layer to apply.
pub(crate) struct Apply {
    pub(crate) fetcher: Fetcher,
    pub(crate) runtime: Handle,
    /// The blob, as whoever delivers it has verified it.
    pub(crate) blob: BlobDigest,
    /// Its size.
    pub(crate) size: u64,
    pub(crate) place: Place,
    /// The layers below, the lowest first.
    pub(crate) below: Vec<LayerBelow>,
    /// Tells those above how to look into this layer, and what the root looks like up to here.
    pub(crate) told: Told,
    /// Set when nobody waits any more.
    pub(crate) stop: Arc<AtomicBool>,
}

/// A layer that is applied.
#[derive(Debug)]
pub(crate) struct Applied {
    pub(crate) layer: Arc<LayerImage>,
    pub(crate) diff_id: DiffId,
    /// Bytes of the tar; none if it was applied before.
    pub(crate) size: Option<u64>,
}

impl Apply {
    /// Applies what `open` gives, unless it was applied before. Waits for the blob, for the disk, and for layers below.
    pub(crate) fn run<R: Read + Send + 'static>(self, open: impl FnOnce() -> R) -> Result<Applied, UnpackError> {
        let Self { fetcher, runtime, blob: digest, size, place, below, told, stop } = self;
        let name = place.name();
        // The diffID is known at the end; what names the image in its superblock is its stack.
        let identity = DiffId(name.0);
        let source = None;
        let image = TarImage { fetcher, runtime, blob: digest, size, name, identity, source, below, told, stop };
        if matches!(place, Place::Known { .. })
            && let Some((layer, diff_id)) = image.existing(None)?
        {
            return Ok(Applied { layer, diff_id, size: None });
        }
        let (layer, summary) = image.make(open(), Algorithm::Sha256, |summary| {
            let Place::Known { chain: expected, below, .. } = place else { return Ok(()) };
            let found = ChainId::on(below, summary.diff_id);
            if found == expected { Ok(()) } else { Err(UnpackError::Misplaced { blob: digest, expected, found }) }
        })?;
        tracing::info!(blob = %digest, "a tar layer is applied");
        Ok(Applied { layer, diff_id: summary.diff_id, size: Some(summary.diff_size) })
    }
}

/// The layer that the tar `blob` became earlier, if it is in the store under `name`.
///
/// # Errors
/// See [`StoreError`].
pub fn applied_before(
    fetcher: &Fetcher,
    blob: BlobDigest,
    name: ChainId,
) -> Result<Option<Arc<LayerImage>>, StoreError> {
    let found = made_before(fetcher, &blob, name)?;
    Ok(found.and_then(|file| {
        let diff_id = file.tar()?;
        // Nothing of it is ever fetched, so the size of its blob does not matter any more.
        let blob_size = file.spec().image_size;
        let layer = TarLayer { blob, blob_size, identity: DiffId(name.0), diff_id, fetched: 0 };
        Some(fetcher.unpacked_layer(layer, file))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unpacked_upon_a_claim_is_kept_apart() {
        let chain = |text: &str| ChainId(Digest::of(Algorithm::Sha256, text.as_bytes()));
        let place = |of: &str, images: &[&str]| Place::Known {
            chain: chain(of),
            below: None,
            images: images.iter().map(|image| DiffId(chain(image).0)).collect(),
        };
        assert_eq!(place("a", &[]).name(), chain("a"), "as a pull of the same tars keeps it");
        assert_eq!(Place::Private(chain("a")).name(), chain("a"));
        let names =
            [place("a", &[]), place("a", &["x"]), place("a", &["y"]), place("a", &["x", "y"]), place("b", &["x"])]
                .map(|place| place.name());
        let different: std::collections::BTreeSet<_> = names.iter().collect();
        assert_eq!(different.len(), names.len());
    }
}
