//! Reading images from an OCI layout, a tar of one, or a `docker save` archive.
//!
//! All three become the same thing: a top document, and blobs by digest that lie somewhere in files. Documents are checked
//! against their descriptors; the bytes of layers are not, that is for whoever streams them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{FutureExt as _, StreamExt as _};
use serde::Deserialize;

use super::blob::{BlobAt, open_regular};
use super::docker::DockerArchive;
use super::error::LayoutError;
use super::tarfile::TarFile;
use crate::model::{BlobDigest, BlobSource, ByteRange, ByteStream, SourceError};
use crate::oci::{
    ArchiveImage, DOCUMENT_LIMIT, Descriptor, Document, DocumentError, Index, LayoutImage, verify_digest,
};

/// The annotation under which a layout names an image (image specification, `annotations.md`).
pub(super) const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// Where containerd keeps the full name.
const CONTAINERD_NAME: &str = "io.containerd.image.name";

/// An image on disk, opened for reading. Cheap to clone.
#[derive(Debug, Clone)]
pub struct LayoutReader(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    store: Store,
    top: Descriptor,
}

#[derive(Debug)]
enum Store {
    Directory(PathBuf),
    Archive(TarFile),
    Docker(Box<DockerArchive>),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LayoutFile {
    image_layout_version: String,
}

impl LayoutReader {
    /// Opens `image` of the layout in the directory `path`. Reads files; not for the reactor.
    ///
    /// # Errors
    /// The directory is no layout, or has no such image.
    pub fn directory(path: &Path, image: &LayoutImage) -> Result<Self, LayoutError> {
        if !path.is_dir() {
            let source = std::fs::read_dir(path).map(drop).err();
            let source = source.unwrap_or_else(|| std::io::ErrorKind::NotADirectory.into());
            return Err(LayoutError::io("open the layout", path)(source));
        }
        Self::layout(path, Store::Directory(path.to_owned()), image)
    }

    /// Opens `image` of the tarred layout in the file `path`. Reads files; not for the reactor.
    ///
    /// # Errors
    /// The file is no such archive, or has no such image.
    pub fn archive(path: &Path, image: &LayoutImage) -> Result<Self, LayoutError> {
        let archive = TarFile::open(path, &["oci-layout", "index.json"])?;
        Self::layout(path, Store::Archive(archive), image)
    }

    /// Opens `image` of the `docker save` archive in the file `path`. Reads files, those layers that are compressed in
    /// whole; not for the reactor.
    ///
    /// # Errors
    /// The file is no such archive, or has no such image.
    pub fn docker_archive(path: &Path, image: &ArchiveImage) -> Result<Self, LayoutError> {
        let archive = DockerArchive::open(path, image)?;
        let top = archive.manifest_descriptor().clone();
        Ok(Self(Arc::new(Inner { path: path.to_owned(), store: Store::Docker(Box::new(archive)), top })))
    }

    fn layout(path: &Path, store: Store, image: &LayoutImage) -> Result<Self, LayoutError> {
        let no_layout = |reason: String| LayoutError::NoLayout { path: path.to_owned(), reason };
        let control = |name: &str| match store.control(name) {
            Ok(Some(found)) => found.read_all(DOCUMENT_LIMIT).map_err(LayoutError::io("read", path.join(name))),
            Ok(None) => Err(no_layout(format!("it has no file {name}"))),
            Err(error) => Err(error),
        };
        let marker: LayoutFile = serde_json::from_slice(&control("oci-layout")?)
            .map_err(|error| no_layout(format!("its file oci-layout cannot be understood ({error})")))?;
        if !marker.image_layout_version.starts_with("1.") {
            return Err(no_layout(format!("its version is {:?}, not 1.0.0", marker.image_layout_version)));
        }
        let index = parse_index(&control("index.json")?).map_err(|source| LayoutError::Document {
            path: path.to_owned(),
            document: "index.json".into(),
            source,
        })?;
        let top = match (choose(path, &index, image), image) {
            // A manifest inside an index is not listed, and is there all the same.
            (Err(unlisted), LayoutImage::Digest(digest)) => match store.unlisted(digest)? {
                Some(descriptor) => descriptor,
                None => return Err(unlisted),
            },
            (chosen, _) => chosen?,
        };
        Ok(Self(Arc::new(Inner { path: path.to_owned(), store, top })))
    }

    /// What the name stands for.
    pub fn top(&self) -> &Descriptor {
        &self.0.top
    }

    /// The directory or file.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    fn blob(&self, blob: &BlobDigest) -> Result<BlobAt, LayoutError> {
        let found = self.0.store.blob(blob)?;
        found.ok_or_else(|| LayoutError::NoBlob { path: self.0.path.clone(), blob: *blob })
    }

    /// A manifest, index or config, checked against its descriptor. Reads files; not for the reactor.
    ///
    /// # Errors
    /// It is missing, too large, or not what the descriptor says.
    pub fn document(&self, descriptor: &Descriptor) -> Result<Bytes, LayoutError> {
        let fail = |source| LayoutError::Document {
            path: self.0.path.clone(),
            document: descriptor.digest.to_string(),
            source,
        };
        descriptor.check_document_size().map_err(fail)?;
        let blob = self.blob(&descriptor.digest)?;
        if blob.size() != descriptor.size {
            let (expected, found) = (descriptor.size, blob.size());
            let path = self.0.path.clone();
            return Err(LayoutError::Size { path, blob: descriptor.digest, expected, found });
        }
        let bytes = blob.read_all(DOCUMENT_LIMIT).map_err(LayoutError::io("read", &self.0.path))?;
        verify_digest(&descriptor.digest, &bytes).map_err(fail)?;
        Ok(bytes.into())
    }

    /// The size of a blob, if it is here.
    ///
    /// # Errors
    /// It is not.
    pub fn blob_size(&self, blob: &BlobDigest) -> Result<u64, LayoutError> {
        self.blob(blob).map(|blob| blob.size())
    }
}

impl Store {
    fn blob(&self, blob: &BlobDigest) -> Result<Option<BlobAt>, LayoutError> {
        let name = blob_path(blob);
        match self {
            Self::Directory(path) => open_blob(&path.join(&name)),
            Self::Archive(archive) => archive.find(&name),
            Self::Docker(archive) => Ok(archive.blob(blob)),
        }
    }

    /// The descriptor of a manifest or index that is here without being listed.
    fn unlisted(&self, digest: &BlobDigest) -> Result<Option<Descriptor>, LayoutError> {
        let Some(bytes) = self.blob(digest)?.and_then(|blob| blob.read_all(DOCUMENT_LIMIT).ok()) else {
            return Ok(None);
        };
        let document = verify_digest(digest, &bytes).and_then(|()| Document::parse(&bytes, None));
        Ok(document.ok().map(|document| Descriptor::new(document.media_type(), *digest, bytes.len() as u64)))
    }

    /// A file that is not a blob.
    fn control(&self, name: &str) -> Result<Option<BlobAt>, LayoutError> {
        match self {
            Self::Directory(path) => open_blob(&path.join(name)),
            Self::Archive(archive) => archive.find(name),
            Self::Docker(_) => Ok(None),
        }
    }
}

/// Where a layout keeps a blob.
pub(super) fn blob_path(blob: &BlobDigest) -> String {
    format!("blobs/{}/{}", blob.0.algorithm().name(), blob.0.hex())
}

fn open_blob(path: &Path) -> Result<Option<BlobAt>, LayoutError> {
    match open_regular(path) {
        Ok(file) => {
            let size = file.metadata().map_err(LayoutError::io("look at", path))?.len();
            Ok(Some(BlobAt::File { file: Arc::new(file), range: ByteRange::to(size) }))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(LayoutError::io("open", path)(error)),
    }
}

/// An `index.json`.
pub(super) fn parse_index(bytes: &[u8]) -> Result<Index, DocumentError> {
    match Document::parse(bytes, None)? {
        Document::Index(index) => Ok(index),
        Document::Manifest(manifest) => Err(DocumentError::MediaType(manifest.media_type)),
    }
}

fn names(entry: &Descriptor) -> impl Iterator<Item = &String> {
    [REF_NAME, CONTAINERD_NAME].into_iter().filter_map(|key| entry.annotations.get(key))
}

fn choose(path: &Path, index: &Index, image: &LayoutImage) -> Result<Descriptor, LayoutError> {
    let fits = |entry: &&Descriptor| match image {
        LayoutImage::Only => true,
        LayoutImage::Named(wanted) => names(entry).any(|name| name == wanted),
        LayoutImage::Digest(digest) => entry.digest == *digest,
    };
    let mut found: Vec<&Descriptor> = index.manifests.iter().filter(fits).collect();
    found.dedup_by_key(|entry| entry.digest);
    match (found.as_slice(), image) {
        ([only], _) => Ok((*only).clone()),
        ([], LayoutImage::Only) => {
            Err(LayoutError::NoLayout { path: path.to_owned(), reason: "its index names no image".to_owned() })
        }
        ([], wanted) => Err(LayoutError::NoImage {
            path: path.to_owned(),
            wanted: wanted.to_string().trim_start_matches([':', '@']).to_owned(),
            known: known(&index.manifests),
        }),
        (several, _) => {
            let known = known(&several.iter().map(|entry| (*entry).clone()).collect::<Vec<_>>());
            Err(LayoutError::Ambiguous { path: path.to_owned(), known })
        }
    }
}

/// The names in a layout, for messages; the first twenty of them.
fn known(entries: &[Descriptor]) -> String {
    let name = |entry: &Descriptor| match entry.annotations.get(REF_NAME) {
        Some(name) => name.clone(),
        None => format!("@{}", entry.digest),
    };
    let mut known: Vec<String> = entries.iter().take(20).map(name).collect();
    if entries.len() > known.len() {
        known.push("…".to_owned());
    }
    if known.is_empty() { "nothing".to_owned() } else { known.join(", ") }
}

/// The blobs of an image on disk.
#[derive(Debug, Clone)]
pub struct LayoutBlobs(LayoutReader);

impl LayoutBlobs {
    /// The blobs beside `reader`'s image.
    pub fn new(reader: LayoutReader) -> Self {
        Self(reader)
    }
}

impl BlobSource for LayoutBlobs {
    fn open(
        &self,
        blob: BlobDigest,
        range: ByteRange,
        _attempt: u32,
    ) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
        let reader = self.0.clone();
        let origin = self.origin();
        async move {
            let fail = {
                let origin = origin.clone();
                move |source| SourceError { blob, range, origin: origin.clone(), transient: false, source }
            };
            let opened = tokio::task::spawn_blocking(move || reader.blob(&blob)).await;
            let found = match opened {
                Ok(Ok(found)) => found,
                Ok(Err(error)) => return Err(fail(error.into())),
                Err(broken) => return Err(fail(broken.into())),
            };
            if range.end() > found.size() {
                let path = PathBuf::from(&origin);
                let short = LayoutError::Size { path, blob, expected: range.end(), found: found.size() };
                return Err(fail(short.into()));
            }
            let pieces = found.stream(range);
            Ok(pieces.map(move |piece| piece.map_err(|error| fail(error.into()))).boxed())
        }
        .boxed()
    }

    fn origin(&self) -> String {
        self.0.path().display().to_string()
    }
}
