//! What `docker save` writes, shown as an image of the image specification.
//!
//! The config is kept byte for byte. A manifest is made up for it: a layer that lies there as a plain tar has its diffID
//! for digest, a compressed one is hashed. Layers named twice and layers behind links are found.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;

use super::blob::BlobAt;
use super::error::LayoutError;
use super::tarfile::TarFile;
use crate::model::{Algorithm, BlobDigest, ByteRange, DiffId, Hasher};
use crate::oci::{ArchiveImage, Config, DOCUMENT_LIMIT, Descriptor, ImageName, Manifest, media};

/// A `docker save` archive with one image chosen.
#[derive(Debug)]
pub(super) struct DockerArchive {
    blobs: HashMap<BlobDigest, BlobAt>,
    manifest: Descriptor,
}

/// An entry of `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

impl DockerArchive {
    pub(super) fn open(path: &Path, image: &ArchiveImage) -> Result<Self, LayoutError> {
        let archive = TarFile::open(path, &["manifest.json"])?;
        let bad = |reason: String| LayoutError::Archive { path: path.to_owned(), reason };
        let listing = archive.find("manifest.json")?;
        let listing = listing.ok_or_else(|| bad("it has no manifest.json, so docker save did not write it".into()))?;
        let listing = listing.read_all(DOCUMENT_LIMIT).map_err(LayoutError::io("read manifest.json of", path))?;
        let entries: Vec<Entry> = serde_json::from_slice(&listing)
            .map_err(|error| bad(format!("its manifest.json cannot be understood ({error})")))?;
        let entry = choose(path, &entries, image)?;

        let config = archive.find(&entry.config)?;
        let config = config.ok_or_else(|| bad(format!("the config {:?} is missing", entry.config)))?;
        let config = config.read_all(DOCUMENT_LIMIT).map_err(LayoutError::io("read the config of", path))?;
        let config = Config::parse(config).map_err(|source| LayoutError::Document {
            path: path.to_owned(),
            document: entry.config.clone(),
            source,
        })?;
        let layers = entry.layers.as_deref().unwrap_or_default();
        let diff_ids = config.diff_ids();
        if layers.len() != diff_ids.len() {
            return Err(bad(format!("it lists {} layers, its config {} diffIDs", layers.len(), diff_ids.len())));
        }

        let mut blobs = HashMap::new();
        let mut hashed: HashMap<u64, Descriptor> = HashMap::new();
        let mut descriptors = Vec::with_capacity(layers.len());
        for (name, diff_id) in layers.iter().zip(diff_ids) {
            let found = archive.find(name)?.ok_or_else(|| bad(format!("the layer {name:?} is missing")))?;
            // The same compressed bytes are hashed once, however often they are named.
            let known = start_of(&found).and_then(|start| hashed.get(&start).cloned());
            let descriptor = match known {
                Some(descriptor) => descriptor,
                None => describe(&found, diff_id).map_err(LayoutError::io("read a layer of", path))?,
            };
            if let Some(start) = start_of(&found).filter(|_| descriptor.media_type != media::OCI_LAYER_TAR) {
                hashed.insert(start, descriptor.clone());
            }
            blobs.insert(descriptor.digest, found);
            descriptors.push(descriptor);
        }
        let config_descriptor = config.descriptor();
        blobs.insert(config_descriptor.digest, BlobAt::Memory(config.as_bytes().to_vec().into()));
        let manifest = Manifest::new(config_descriptor, descriptors).to_json();
        let mut descriptor = Descriptor::of(media::OCI_MANIFEST, &manifest);
        descriptor.platform = Some(config.platform_record().clone());
        blobs.insert(descriptor.digest, BlobAt::Memory(manifest.into()));
        Ok(Self { blobs, manifest: descriptor })
    }

    pub(super) fn manifest_descriptor(&self) -> &Descriptor {
        &self.manifest
    }

    pub(super) fn blob(&self, blob: &BlobDigest) -> Option<BlobAt> {
        self.blobs.get(blob).cloned()
    }
}

fn start_of(blob: &BlobAt) -> Option<u64> {
    match blob {
        BlobAt::File { range, .. } => Some(range.start()),
        BlobAt::Memory(_) => None,
    }
}

/// The descriptor of a layer as it lies in the archive.
fn describe(blob: &BlobAt, diff_id: &DiffId) -> std::io::Result<Descriptor> {
    let magic = match blob {
        BlobAt::File { file, range } => {
            let head = ByteRange::new(range.start(), range.start().saturating_add(4).min(range.end()));
            let head = head.map_err(std::io::Error::other)?;
            BlobAt::File { file: std::sync::Arc::clone(file), range: head }.read_all(4)?
        }
        BlobAt::Memory(bytes) => bytes.iter().take(4).copied().collect(),
    };
    let media_type = match magic.as_slice() {
        [0x1f, 0x8b, ..] => media::OCI_LAYER_GZIP,
        [0x28, 0xb5, 0x2f, 0xfd] => media::OCI_LAYER_ZSTD,
        _ => return Ok(Descriptor::new(media::OCI_LAYER_TAR, BlobDigest(diff_id.0), blob.size())),
    };
    let mut hasher = Hasher::new(Algorithm::Sha256);
    blob.for_each(|piece| hasher.update(piece))?;
    Ok(Descriptor::new(media_type, BlobDigest(hasher.finish()), blob.size()))
}

fn choose<'a>(path: &Path, entries: &'a [Entry], image: &ArchiveImage) -> Result<&'a Entry, LayoutError> {
    let tags = |entry: &Entry| entry.repo_tags.clone().unwrap_or_default();
    let known = || {
        let mut all: Vec<String> = entries.iter().flat_map(tags).take(20).collect();
        all.push(format!("@0 to @{}", entries.len().saturating_sub(1)));
        all.join(", ")
    };
    let missing = |wanted: String| LayoutError::NoImage { path: path.to_owned(), wanted, known: known() };
    match image {
        ArchiveImage::Only => match entries {
            [only] => Ok(only),
            [] => Err(LayoutError::Archive { path: path.to_owned(), reason: "its manifest.json is empty".to_owned() }),
            _ => Err(LayoutError::Ambiguous { path: path.to_owned(), known: known() }),
        },
        ArchiveImage::Index(index) => entries.get(*index).ok_or_else(|| missing(format!("@{index}"))),
        ArchiveImage::Named(name) => {
            let named = |tag: &String| {
                let found = tag.parse::<ImageName>().ok();
                found.is_some_and(|found| {
                    (found.host(), found.repository(), found.selector())
                        == (name.host(), name.repository(), name.selector())
                })
            };
            entries.iter().find(|entry| tags(entry).iter().any(named)).ok_or_else(|| missing(name.to_string()))
        }
    }
}
