//! One tar that becomes an image in the store, on top of layers that are known or are made at the same moment: what is the
//! same whoever brings the tar.
//!
//! Guarantees: an image appears in the store when it is complete, safe on disk, and whoever asked has seen the tar's
//! diffID; those above can look into it from then on. Refuses to know where bytes come from, and what the stack is called.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::runtime::Handle;
use tokio::sync::watch;

use super::UnpackError;
use crate::convert::below::{Below, LayerBelow, Lower, ReadAhead, Root};
use crate::convert::direct::{ImageOut, unpack_layer};
use crate::convert::layer::LayerError;
use crate::erofs::writer::LayerRole;
use crate::fetch::{Fetcher, LayerImage, TarLayer};
use crate::model::{Algorithm, BlobDigest, ChainId, DiffId, Digest};
use crate::store::{Anchor, BlobFile, StoreError, Verdict, WholeWriter};
use crate::tar::decompress::{self, BlobCheck, Summary};
use crate::tar::{Problem, TarError};
use crate::transport::ImageSource;

/// What tars are unpacked upon where that is an image: its diffID is a claim as long as not all of it was seen, and who makes
/// another claim true must not find what was unpacked upon this one.
pub(crate) fn identity_of(diff_id: DiffId, blob: &BlobDigest, anchor: &str) -> DiffId {
    let said = format!("headstart image\n{diff_id}\n{blob}\n{anchor}\n");
    DiffId(Digest::of(Algorithm::Sha256, said.as_bytes()))
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

/// A tar and its place.
pub(super) struct TarImage {
    pub(super) fetcher: Fetcher,
    pub(super) runtime: Handle,
    /// The blob, as whoever delivers it verifies it.
    pub(super) blob: BlobDigest,
    /// Its size.
    pub(super) size: u64,
    /// What the image is kept under.
    pub(super) name: ChainId,
    /// What names it in its superblock.
    pub(super) identity: DiffId,
    /// Where layers below come from that are not here.
    pub(super) source: Option<ImageSource>,
    /// The layers below, the lowest first.
    pub(super) below: Vec<LayerBelow>,
    /// Tells those above how to look into this layer, and what the root looks like up to here.
    pub(super) told: Told,
    /// Set when nobody waits any more.
    pub(super) stop: Arc<AtomicBool>,
}

impl TarImage {
    /// The layer as it was made before, and the diffID of its tar, which is `known` if the store does not say.
    pub(super) fn existing(&self, known: Option<DiffId>) -> Result<Option<(Arc<LayerImage>, DiffId)>, UnpackError> {
        let found = made_before(&self.fetcher, &self.blob, self.name).map_err(|error| self.stored(error))?;
        let Some(file) = found else { return Ok(None) };
        let Some(diff_id) = file.tar().or(known) else { return Ok(None) };
        Ok(Some((self.show(file, diff_id, 0, Some(Root::InImage))?, diff_id)))
    }

    /// Makes the image of the tar in `blob`, if `check` agrees with what the blob turns out to be; its diffID is computed with
    /// `algorithm`. Waits for the blob, for the disk, and for layers below.
    pub(super) fn make(
        &self,
        blob: impl Read + Send + 'static,
        algorithm: Algorithm,
        check: impl FnOnce(&Summary) -> Result<(), UnpackError>,
    ) -> Result<(Arc<LayerImage>, Summary), UnpackError> {
        let digest = self.blob;
        let read = |source| UnpackError::Read { blob: digest, source: Arc::new(source) };
        let store = self.fetcher.store();
        let mut image = store.write_image(&digest, Anchor::Tar(self.name)).map_err(|error| self.stored(error))?;
        let stoppable = Stoppable { inner: blob, stop: Arc::clone(&self.stop) };
        let source = decompress::open(stoppable, BlobCheck::Done(digest), algorithm).map_err(read)?;
        let mut source = ReadAhead::new(source).map_err(read)?;
        let role = if self.below.is_empty() { LayerRole::Bottom } else { LayerRole::Upper };
        let (below, root) = (self.below.clone(), self.told.root.clone());
        let mut lower = Lower::new(self.runtime.clone(), self.source.clone(), below, root);
        let unpacked = unpack_layer(&mut source, role, self.identity, Some(&mut lower), &mut Out(&mut image));
        // Read to the end in any case: a blob that is not what it should be explains a broken tar better.
        let (summary, unpacked) = match (source.finish(), unpacked) {
            (Ok(summary), unpacked) => (summary, unpacked),
            (Err(_), _) if self.stop.load(Ordering::Relaxed) => return Err(UnpackError::Abandoned { blob: digest }),
            // Unless it was reading that broke the tar: then the cause went to the tar's reader, and only it can tell.
            (Err(_), Err(LayerError::Tar(TarError { problem: Problem::Io(source), .. }))) => return Err(read(source)),
            // Neither the disk nor the layers below have anything to do with the blob.
            (Err(_), Err(error @ (LayerError::Image { .. } | LayerError::Lower { .. }))) => {
                return Err(self.failed(error));
            }
            (Err(source), _) => return Err(read(source)),
        };
        check(&summary)?;
        unpacked.map_err(|error| self.failed(error))?;
        let (name, diff_id) = (DiffId(self.name.0), summary.diff_id);
        let file = store.keep_tar(&image, name, diff_id).map_err(|error| self.stored(error))?;
        Ok((self.show(file, diff_id, self.size, None)?, summary))
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
        // Nothing of the image of a tar is ever evicted while it is open.
        self.told.image.send_replace(Some(Below::Local { image: Arc::new(image), pin: None }));
        if let Some(root) = root {
            self.told.root.send_replace(Some(root));
        }
        let identity = DiffId(self.name.0);
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

/// The image of a tar that is kept under `name`, if all of it is as it should be.
pub(super) fn made_before(
    fetcher: &Fetcher,
    blob: &BlobDigest,
    name: ChainId,
) -> Result<Option<Arc<BlobFile>>, StoreError> {
    let file = fetcher.store().existing(blob, Anchor::Tar(name))?;
    Ok(file.filter(|file| file.verdict() == Verdict::Verified(DiffId(name.0))))
}

/// A store's image as the writer of layers sees it.
struct Out<'a>(&'a mut WholeWriter);

impl io::Write for Out<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl ImageOut for Out<'_> {
    fn write_first_block(&mut self, block: &[u8]) -> io::Result<()> {
        self.0.write_first(block)
    }
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
