//! One way to read and one way to write images, wherever a reference points: a registry, an image layout, an archive.
//!
//! Who uses [`Transports`] never asks what kind of reference it has. An [`ImageSource`] gives documents that were checked
//! against their descriptors, and blobs; an [`ImageSink`] takes blobs first and the manifest that names them last.

mod error;
mod image;
mod sink;
mod source;
mod stream;

pub use error::TransportError;
pub use image::ResolvedImage;
pub use sink::{ImageSink, Spool};
pub use source::ImageSource;
pub use stream::BlobReader;

use std::path::PathBuf;
use std::sync::Arc;

use crate::layout::{LayoutReader, LayoutWriter};
use crate::oci::{LayoutImage, Reference};
use crate::registry::Client;

/// Opens references.
#[derive(Debug, Clone)]
pub struct Transports {
    client: Client,
    spool: Arc<PathBuf>,
}

impl Transports {
    /// Registries are reached through `client`; blobs on their way to one wait in the directory `spool`.
    pub fn new(client: Client, spool: PathBuf) -> Self {
        Self { client, spool: Arc::new(spool) }
    }

    /// Forgets what was read of registries' settings and logins, so that changed files count from now on.
    pub fn forget_registries(&self) {
        self.client.forget_servers();
    }

    /// Opens a reference for reading. Registries are not contacted yet.
    ///
    /// # Errors
    /// The layout or archive cannot be read or has no such image.
    pub async fn open(&self, reference: &Reference) -> Result<ImageSource, TransportError> {
        let reader = match reference {
            Reference::Registry(name) => return Ok(ImageSource::registry(self.client.clone(), name.clone())),
            Reference::Layout { path, image } => {
                let (path, image) = (path.clone(), image.clone());
                blocking(move || LayoutReader::directory(&path, &image)).await?
            }
            Reference::OciArchive { path, image } => {
                let (path, image) = (path.clone(), image.clone());
                blocking(move || LayoutReader::archive(&path, &image)).await?
            }
            Reference::DockerArchive { path, image } => {
                let (path, image) = (path.clone(), image.clone());
                blocking(move || LayoutReader::docker_archive(&path, &image)).await?
            }
        };
        Ok(ImageSource::layout(reference.clone(), reader))
    }

    /// Opens a reference for writing. Registries are not contacted yet.
    ///
    /// # Errors
    /// The reference cannot be written to: it names a digest, is a Docker archive, or the disk refuses.
    pub async fn create(&self, reference: &Reference) -> Result<ImageSink, TransportError> {
        let unwritable = |reason| TransportError::Unwritable { reference: Box::new(reference.clone()), reason };
        let tag_of = |image: &LayoutImage| match image {
            LayoutImage::Only => Ok(None),
            LayoutImage::Named(tag) => Ok(Some(tag.clone())),
            LayoutImage::Digest(_) => Err(unwritable("an image's digest is known only when it is written; name a tag")),
        };
        match reference {
            Reference::Registry(name) if name.digest().is_some() => {
                Err(unwritable("an image's digest is known only when it is written; name a tag"))
            }
            Reference::Registry(name) => {
                Ok(ImageSink::registry(self.client.clone(), name.clone(), Arc::clone(&self.spool)))
            }
            Reference::Layout { path, image } => {
                let (path, tag) = (path.clone(), tag_of(image)?);
                let writer = blocking(move || LayoutWriter::directory(&path, tag.as_deref())).await?;
                Ok(ImageSink::layout(reference.clone(), writer))
            }
            Reference::OciArchive { path, image } => {
                let (path, tag) = (path.clone(), tag_of(image)?);
                let writer = blocking(move || LayoutWriter::archive(&path, tag.as_deref())).await?;
                Ok(ImageSink::layout(reference.clone(), writer))
            }
            Reference::DockerArchive { .. } => {
                Err(unwritable("docker archives are only read; write an oci-archive: instead"))
            }
        }
    }
}

/// Runs work that blocks on the disk where that hurts nobody. A panic inside goes on outside.
async fn blocking<T: Send + 'static, E: Send + 'static>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, E> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(broken) => std::panic::resume_unwind(broken.into_panic()),
    }
}
