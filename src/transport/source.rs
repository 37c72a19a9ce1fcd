//! An image opened for reading.

use std::sync::Arc;

use bytes::Bytes;
use tokio::runtime::Handle;

use super::stream::BlobReader;
use super::{TransportError, blocking};
use crate::layout::{LayoutBlobs, LayoutReader};
use crate::model::{BlobSource, ByteRange};
use crate::oci::{Descriptor, Document, ImageName, Reference};
use crate::registry::{Client, RemoteBlobs};

/// An image opened for reading. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ImageSource {
    reference: Reference,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Registry { client: Client, name: ImageName },
    Layout(LayoutReader),
}

impl ImageSource {
    pub(super) fn registry(client: Client, name: ImageName) -> Self {
        Self { reference: Reference::Registry(name.clone()), kind: Kind::Registry { client, name } }
    }

    pub(super) fn layout(reference: Reference, reader: LayoutReader) -> Self {
        Self { reference, kind: Kind::Layout(reader) }
    }

    /// What was opened.
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// The name in a registry, of an image that is in one: what a push to the same registry can mount blobs from.
    pub fn name(&self) -> Option<&ImageName> {
        match &self.kind {
            Kind::Registry { name, .. } => Some(name),
            Kind::Layout(_) => None,
        }
    }

    /// What the reference stands for at this moment: a manifest or an index.
    ///
    /// # Errors
    /// The registry does not know it or did not answer.
    pub async fn top(&self) -> Result<Descriptor, TransportError> {
        match &self.kind {
            Kind::Registry { client, name } => Ok(client.resolve(name).await?),
            Kind::Layout(reader) => Ok(reader.top().clone()),
        }
    }

    /// What the reference stands for at this moment, read: a manifest or an index.
    ///
    /// # Errors
    /// It cannot be had, or is unusable.
    pub async fn named(&self) -> Result<Document, TransportError> {
        match self.fetch_top().await? {
            (top, Some(bytes)) => self.parse(&bytes, &top),
            (top, None) => Ok(self.parsed(&top).await?.0),
        }
    }

    /// As [`top`](Self::top), with the bytes: one question to a registry instead of two.
    pub(super) async fn fetch_top(&self) -> Result<(Descriptor, Option<Bytes>), TransportError> {
        match &self.kind {
            Kind::Registry { client, name } => {
                let fetched = client.manifest(name).await?;
                Ok((fetched.descriptor, Some(fetched.bytes)))
            }
            Kind::Layout(reader) => Ok((reader.top().clone(), None)),
        }
    }

    /// The bytes of a manifest, index or config, at most 4 MiB, checked against the descriptor.
    ///
    /// # Errors
    /// It cannot be had, or is not what the descriptor says.
    pub async fn document(&self, descriptor: &Descriptor) -> Result<Bytes, TransportError> {
        match &self.kind {
            Kind::Registry { client, name } => Ok(client.document(name, descriptor).await?),
            Kind::Layout(reader) => {
                let (reader, descriptor) = (reader.clone(), descriptor.clone());
                Ok(blocking(move || reader.document(&descriptor)).await?)
            }
        }
    }

    /// A manifest or index, read.
    ///
    /// # Errors
    /// It cannot be had, or is unusable.
    pub async fn parsed(&self, descriptor: &Descriptor) -> Result<(Document, Bytes), TransportError> {
        let bytes = self.document(descriptor).await?;
        Ok((self.parse(&bytes, descriptor)?, bytes))
    }

    /// Reads a manifest or index that was fetched.
    pub(super) fn parse(&self, bytes: &[u8], descriptor: &Descriptor) -> Result<Document, TransportError> {
        Document::parse_verified(bytes, descriptor).map_err(|source| TransportError::Document {
            reference: Box::new(self.reference.clone()),
            document: descriptor.digest,
            source,
        })
    }

    /// The blobs beside the image, for random access. Their bytes are not verified.
    pub fn blobs(&self) -> Arc<dyn BlobSource> {
        match &self.kind {
            Kind::Registry { client, name } => Arc::new(RemoteBlobs::new(client.clone(), name.clone())),
            Kind::Layout(reader) => Arc::new(LayoutBlobs::new(reader.clone())),
        }
    }

    /// A whole blob as a blocking reader, for a thread that may wait. The bytes are hashed as they pass; the end of the
    /// file is an error if they are not what the descriptor says. `runtime` does the fetching.
    ///
    /// # Errors
    /// The first byte could not be had.
    pub async fn reader(&self, runtime: &Handle, descriptor: &Descriptor) -> Result<BlobReader, TransportError> {
        let blobs = self.blobs();
        let stream = blobs.open(descriptor.digest, ByteRange::to(descriptor.size), 0).await?;
        Ok(BlobReader::new(runtime, stream, descriptor, blobs.origin()))
    }
}
