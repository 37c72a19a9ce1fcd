//! An image opened for writing: blobs first, then the manifests that name them, then the name itself.

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use tempfile::NamedTempFile;

use super::source::ImageSource;
use super::{TransportError, blocking};
use crate::layout::LayoutWriter;
use crate::model::{BlobDigest, ByteRange, Hasher};
use crate::oci::{Descriptor, ImageName, Reference};
use crate::registry::{BlobContent, Client, Pushed, is_transient};

/// A file that waits to become a blob. It vanishes with its owner.
pub type Spool = NamedTempFile;

/// An image opened for writing. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ImageSink {
    reference: Arc<Reference>,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Registry { client: Client, name: ImageName, spool: Arc<PathBuf> },
    Layout(Arc<LayoutWriter>),
}

impl ImageSink {
    pub(super) fn registry(client: Client, name: ImageName, spool: Arc<PathBuf>) -> Self {
        let reference = Arc::new(Reference::Registry(name.clone()));
        Self { reference, kind: Kind::Registry { client, name, spool } }
    }

    pub(super) fn layout(reference: Reference, writer: LayoutWriter) -> Self {
        Self { reference: Arc::new(reference), kind: Kind::Layout(Arc::new(writer)) }
    }

    /// What is written.
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// An empty file for a blob in the making, where [`put_blob`](Self::put_blob) takes it over without copying if that
    /// is possible. Blocks on the disk.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn spool(&self) -> Result<Spool, TransportError> {
        match &self.kind {
            Kind::Layout(writer) => Ok(writer.spool()?),
            Kind::Registry { spool, .. } => {
                let fail = |source| {
                    let directory = spool.as_ref().clone();
                    TransportError::Spool { blob: "in the making".to_owned(), directory, source }
                };
                std::fs::create_dir_all(spool.as_ref()).map_err(fail)?;
                tempfile::Builder::new().prefix(".headstart-").tempfile_in(spool.as_ref()).map_err(fail)
            }
        }
    }

    /// True if the blob is there already.
    ///
    /// # Errors
    /// The registry or the disk did not say.
    pub async fn has_blob(&self, blob: &BlobDigest, size: u64) -> Result<bool, TransportError> {
        match &self.kind {
            Kind::Registry { client, name, .. } => Ok(client.blob_exists(name, blob).await?),
            Kind::Layout(writer) => {
                let (writer, blob) = (Arc::clone(writer), *blob);
                Ok(blocking(move || writer.has_blob(&blob, size)).await?)
            }
        }
    }

    /// Stores a finished file as `blob`. Whoever wrote it computed the digest.
    ///
    /// # Errors
    /// The registry or the disk did not take it.
    pub async fn put_blob(&self, spooled: Spool, blob: &BlobDigest, size: u64) -> Result<(), TransportError> {
        match &self.kind {
            Kind::Registry { client, name, spool } => {
                let fail = |source| {
                    let directory = spool.as_ref().clone();
                    TransportError::Spool { blob: blob.to_string(), directory, source }
                };
                let file = Arc::new(spooled.as_file().try_clone().map_err(fail)?);
                client.push_blob(name, blob, &BlobContent::File { file, size }, None).await?;
                // The file goes when the registry has it, on a thread that may wait for the disk.
                blocking(move || spooled.close()).await.map_err(fail)
            }
            Kind::Layout(writer) => {
                let (writer, blob) = (Arc::clone(writer), *blob);
                Ok(blocking(move || writer.put_blob(spooled, &blob, size)).await?)
            }
        }
    }

    /// Stores a small blob, a config for example.
    ///
    /// # Errors
    /// The registry or the disk did not take it.
    pub async fn put_bytes(&self, blob: &BlobDigest, bytes: Bytes) -> Result<(), TransportError> {
        match &self.kind {
            Kind::Registry { client, name, .. } => {
                client.push_blob(name, blob, &BlobContent::Bytes(bytes), None).await?;
                Ok(())
            }
            Kind::Layout(writer) => {
                let (writer, blob) = (Arc::clone(writer), *blob);
                Ok(blocking(move || writer.put_bytes(&blob, &bytes)).await?)
            }
        }
    }

    /// Brings a blob over from another image: not at all if it is here, by a mount inside a registry, else by copying,
    /// checked against its descriptor.
    ///
    /// # Errors
    /// It cannot be read, is damaged, or is not taken.
    pub async fn copy_blob(&self, source: &ImageSource, descriptor: &Descriptor) -> Result<Pushed, TransportError> {
        let blob = &descriptor.digest;
        if let (Kind::Registry { client, name, .. }, Some(from)) = (&self.kind, source.name())
            && from.host() == name.host()
        {
            match client.mount_blob(name, blob, from.repository()).await {
                Ok(true) => return Ok(Pushed::Mounted),
                Ok(false) => {}
                Err(error) if is_transient(&error) => return Err(error.into()),
                // A registry may forbid what it need not do; copying always works.
                Err(error) => tracing::debug!(%blob, %error, "a blob could not be mounted"),
            }
        }
        if self.has_blob(blob, descriptor.size).await? {
            return Ok(Pushed::Present);
        }
        let sink = self.clone();
        let mut spooled = blocking(move || sink.spool()).await?;
        let blobs = source.blobs();
        let mut stream = blobs.open(*blob, ByteRange::to(descriptor.size), 0).await?;
        let mut hasher = Hasher::new(blob.0.algorithm());
        let mut size = 0_u64;
        while let Some(piece) = stream.next().await {
            let piece = piece?;
            size += piece.len() as u64;
            let wrote = blocking(move || {
                hasher.update(&piece);
                spooled.write_all(&piece).map(|()| (spooled, hasher))
            });
            (spooled, hasher) = wrote.await.map_err(|source| {
                let directory = self.reference.path().map(std::path::Path::to_owned).unwrap_or_default();
                TransportError::Spool { blob: blob.to_string(), directory, source }
            })?;
        }
        let found = BlobDigest(hasher.finish());
        if found != *blob || size != descriptor.size {
            return Err(TransportError::Damaged { expected: *blob, origin: blobs.origin(), size, found });
        }
        self.put_blob(spooled, blob, size).await?;
        Ok(Pushed::Uploaded)
    }

    /// Stores a manifest that an index will name. `descriptor` is about `bytes`.
    ///
    /// # Errors
    /// The registry or the disk did not take it.
    pub async fn put_manifest(&self, descriptor: &Descriptor, bytes: &Bytes) -> Result<(), TransportError> {
        match &self.kind {
            Kind::Registry { client, name, .. } => {
                client.push_manifest(&name.with_digest(descriptor.digest), &descriptor.media_type, bytes).await?;
                Ok(())
            }
            Kind::Layout(_) => self.put_bytes(&descriptor.digest, bytes.clone()).await,
        }
    }

    /// Stores the manifest or index that the reference shall stand for, and finishes: an archive appears only now.
    ///
    /// # Errors
    /// The registry or the disk did not take it.
    pub async fn finish(&self, top: &Descriptor, bytes: &Bytes) -> Result<(), TransportError> {
        match &self.kind {
            Kind::Registry { client, name, .. } => {
                client.push_manifest(name, &top.media_type, bytes).await?;
                Ok(())
            }
            Kind::Layout(writer) => {
                self.put_bytes(&top.digest, bytes.clone()).await?;
                let (writer, top) = (Arc::clone(writer), top.clone());
                Ok(blocking(move || {
                    writer.list(&top)?;
                    writer.finish()
                })
                .await?)
            }
        }
    }
}
