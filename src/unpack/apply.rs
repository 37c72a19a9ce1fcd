//! One tar layer that somebody else brings: its bytes become an EROFS image in the store, on top of layers that are known
//! or are being applied at the same moment.
//!
//! The stack that the image belongs to is what others call it; it is believed when the diffID of the tar, which comes out
//! at the end, and the stack below make it. A layer of which nobody says where it belongs is kept under a name that
//! nobody else will ever ask for.
//!
//! Guarantees: as [`unpack_tars`](super::unpack_tars). Refuses to know who asks, and where bytes come from.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::runtime::Handle;
use tokio::sync::watch;

use super::UnpackError;
use super::ordinary::Out;
use crate::convert::below::{Below, LayerBelow, Lower, ReadAhead, Root};
use crate::convert::direct::unpack_layer;
use crate::convert::layer::LayerError;
use crate::erofs::writer::LayerRole;
use crate::fetch::{Fetcher, LayerImage, TarLayer};
use crate::model::{Algorithm, BlobDigest, ChainId, DiffId};
use crate::store::{Anchor, BlobFile, StoreError, Verdict};
use crate::tar::decompress::{self, BlobCheck};
use crate::tar::{Problem, TarError};

/// Where a layer belongs.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    /// It is the top of this stack, and this is the stack below it.
    Known {
        /// With the layer.
        chain: ChainId,
        /// Without it; none for the lowest layer.
        below: Option<ChainId>,
    },
    /// Nobody says. The name is nobody else's.
    Private(ChainId),
}

impl Place {
    /// What the image is kept under.
    const fn name(self) -> ChainId {
        match self {
            Self::Known { chain, .. } | Self::Private(chain) => chain,
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

/// What those above want to know of a layer.
#[derive(Debug, Clone)]
pub(crate) struct Told {
    pub(crate) image: watch::Sender<Option<Below>>,
    pub(crate) root: watch::Sender<Option<Root>>,
}

impl Default for Told {
    fn default() -> Self {
        Self { image: watch::Sender::new(None), root: watch::Sender::new(None) }
    }
}

impl Told {
    /// Of a layer that is finished.
    pub(crate) fn known(below: Below) -> Self {
        let told = Self::default();
        told.tell(below);
        told
    }

    /// Tells those above that the layer is finished.
    pub(crate) fn tell(&self, below: Below) {
        self.image.send_replace(Some(below));
        self.root.send_replace(Some(Root::InImage));
    }

    /// For those above.
    pub(crate) fn below(&self) -> LayerBelow {
        LayerBelow { image: self.image.subscribe(), root: self.root.subscribe() }
    }
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
    /// The layer as it was applied before, if it was.
    pub(crate) fn existing(&self) -> Result<Option<Applied>, UnpackError> {
        let Place::Known { chain, .. } = self.place else { return Ok(None) };
        let store = self.fetcher.store();
        let found = verified(store.existing(&self.blob, Anchor::Tar(chain)).map_err(|e| self.stored(e))?, chain);
        let Some((file, diff_id)) = found else { return Ok(None) };
        let layer = self.show(file, diff_id, 0, Some(Root::InImage))?;
        Ok(Some(Applied { layer, diff_id, size: None }))
    }

    /// Applies `blob`. Waits for it, for the disk, and for layers below.
    pub(crate) fn run(self, blob: impl Read + Send + 'static) -> Result<Applied, UnpackError> {
        let digest = self.blob;
        let read = |source| UnpackError::Read { blob: digest, source: Arc::new(source) };
        let store = self.fetcher.store();
        let anchor = Anchor::Tar(self.place.name());
        let mut image = store.write_image(&digest, anchor).map_err(|error| self.stored(error))?;
        let counted = Stoppable { inner: blob, stop: Arc::clone(&self.stop) };
        let source = decompress::open(counted, BlobCheck::Done(digest), Algorithm::Sha256).map_err(read)?;
        let mut source = ReadAhead::new(source).map_err(read)?;
        let role = match self.place {
            Place::Known { below: None, .. } => LayerRole::Bottom,
            Place::Private(_) if self.below.is_empty() => LayerRole::Bottom,
            Place::Known { .. } | Place::Private(_) => LayerRole::Upper,
        };
        let mut lower = Lower::new(self.runtime.clone(), None, self.below.clone(), self.told.root.clone());
        // The diffID is known at the end; what names the image in its superblock is its stack.
        let identity = DiffId(self.place.name().0);
        let unpacked = unpack_layer(&mut source, role, identity, Some(&mut lower), &mut Out(&mut image));
        // Read to the end in any case: a blob that is not what it should be explains a broken tar better.
        let (summary, unpacked) = match (source.finish(), unpacked) {
            (Ok(summary), unpacked) => (summary, unpacked),
            (Err(_), _) if self.stop.load(Ordering::Relaxed) => return Err(UnpackError::Abandoned { blob: digest }),
            // Unless it was reading that broke the tar: then the cause went to the tar's reader, and only it can tell.
            (Err(_), Err(LayerError::Tar(TarError { problem: Problem::Io(source), .. }))) => return Err(read(source)),
            (Err(source), _) => return Err(read(source)),
        };
        if let Place::Known { chain, below } = self.place {
            let found = ChainId::on(below, summary.diff_id);
            if found != chain {
                return Err(UnpackError::Misplaced { blob: digest, expected: chain, found });
            }
        }
        unpacked.map_err(|error| self.failed(error))?;
        let file = store.keep_tar(&image, identity, summary.diff_id).map_err(|error| self.stored(error))?;
        let layer = self.show(file, summary.diff_id, self.size, None)?;
        tracing::info!(blob = %digest, "a tar layer is applied");
        Ok(Applied { layer, diff_id: summary.diff_id, size: Some(summary.diff_size) })
    }

    /// Lets those above look into the finished image, and opens it as a layer.
    fn show(
        &self,
        file: Arc<BlobFile>,
        diff_id: DiffId,
        fetched: u64,
        root: Option<Root>,
    ) -> Result<Arc<LayerImage>, UnpackError> {
        let path = file.image_path();
        let image = File::open(&path).map_err(|error| self.stored(StoreError::io("open", &path, error)))?;
        self.told.image.send_replace(Some(Below::Local { image: Arc::new(image) }));
        if let Some(root) = root {
            self.told.root.send_replace(Some(root));
        }
        let identity = DiffId(self.place.name().0);
        let layer = TarLayer { blob: self.blob, blob_size: self.size, identity, diff_id, fetched };
        Ok(self.fetcher.unpacked_layer(layer, file))
    }

    fn stored(&self, source: StoreError) -> UnpackError {
        UnpackError::Store { blob: self.blob, source: Arc::new(source) }
    }

    /// A disk that fails is told as what it is.
    fn failed(&self, error: LayerError) -> UnpackError {
        match error {
            LayerError::Image { source } => {
                self.stored(StoreError::io("write into", self.fetcher.store().root(), source))
            }
            source => UnpackError::Tar { blob: self.blob, source: Arc::new(source) },
        }
    }
}

/// The image of a tar and its diffID, if all of it is as it should be.
fn verified(file: Option<Arc<BlobFile>>, chain: ChainId) -> Option<(Arc<BlobFile>, DiffId)> {
    let file = file.filter(|file| file.verdict() == Verdict::Verified(DiffId(chain.0)))?;
    let tar = file.tar()?;
    Some((file, tar))
}

/// The layer that the tar `blob` on top of the stack `chain` became earlier, if it is in the store.
///
/// # Errors
/// See [`StoreError`].
pub fn applied_before(
    fetcher: &Fetcher,
    blob: BlobDigest,
    chain: ChainId,
) -> Result<Option<Arc<LayerImage>>, StoreError> {
    let found = verified(fetcher.store().existing(&blob, Anchor::Tar(chain))?, chain);
    Ok(found.map(|(file, diff_id)| {
        // Nothing of it is ever fetched, so the size of its blob does not matter any more.
        let blob_size = file.spec().image_size;
        let layer = TarLayer { blob, blob_size, identity: DiffId(chain.0), diff_id, fetched: 0 };
        fetcher.unpacked_layer(layer, file)
    }))
}

/// A blob that ends with an error when nobody waits for it any more.
struct Stoppable<R> {
    inner: R,
    stop: Arc<AtomicBool>,
}

impl<R: Read> Read for Stoppable<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("nobody waits for the layer any more"));
        }
        self.inner.read(buf)
    }
}
