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

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::super::tarfile::header;
    use super::*;
    use crate::layout::LayoutReader;
    use crate::model::Digest;
    use crate::oci::Document;

    fn sha256(bytes: &[u8]) -> Digest {
        Digest::of(Algorithm::Sha256, bytes)
    }

    fn member(name: &str, content: &[u8]) -> Vec<u8> {
        let (header, padding) = header(name, content.len() as u64).unwrap();
        [&header[..], content, &vec![0; padding]].concat()
    }

    fn link(name: &str, target: &str) -> Vec<u8> {
        let (mut header, _) = header(name, 0).unwrap();
        header[156] = b'2';
        header[157..157 + target.len()].copy_from_slice(target.as_bytes());
        header[148..156].fill(b' ');
        let sum: u64 = header.iter().map(|b| u64::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header.to_vec()
    }

    fn archive(members: &[Vec<u8>]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&members.concat()).unwrap();
        file.write_all(&[0; 1024]).unwrap();
        file
    }

    fn config(layers: &[&[u8]]) -> String {
        let ids: Vec<String> = layers.iter().map(|layer| sha256(layer).to_string()).collect();
        serde_json::json!({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": ids}}).to_string()
    }

    #[test]
    fn layers_named_twice_linked_and_compressed_are_found() {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(b"three").unwrap();
        let gzip = gzip.finish().unwrap();
        let config = config(&[b"one", b"two", b"one", b"three", b"three"]);
        let listing = r#"[{"Config":"c.json","RepoTags":["busybox:1"],
            "Layers":["a/layer.tar","b/layer.tar","c/layer.tar","d.tar","d.tar"]}]"#;
        let file = archive(&[
            member("a/layer.tar", b"one"),
            member("b/layer.tar", b"two"),
            link("c/layer.tar", "../a/layer.tar"),
            member("d.tar", &gzip),
            member("c.json", config.as_bytes()),
            member("manifest.json", listing.as_bytes()),
        ]);
        for image in [
            ArchiveImage::Only,
            ArchiveImage::Index(0),
            ArchiveImage::Named("docker.io/library/busybox:1".parse().unwrap()),
        ] {
            let reader = LayoutReader::docker_archive(file.path(), &image).unwrap();
            let bytes = reader.document(reader.top()).unwrap();
            let Document::Manifest(manifest) = Document::parse_verified(&bytes, reader.top()).unwrap() else {
                panic!()
            };
            let found: Vec<(Digest, &str)> =
                manifest.layers.iter().map(|layer| (layer.digest.0, layer.media_type.as_str())).collect();
            let (one, two) = ((sha256(b"one"), media::OCI_LAYER_TAR), (sha256(b"two"), media::OCI_LAYER_TAR));
            let three = (sha256(&gzip), media::OCI_LAYER_GZIP);
            assert_eq!(found, [one, two, one, three, three]);
            for layer in &manifest.layers {
                assert_eq!(reader.blob_size(&layer.digest).unwrap(), layer.size);
            }
            assert_eq!(reader.document(&manifest.config).unwrap(), config.as_bytes());
        }
    }

    #[test]
    fn archives_that_lie_are_refused() {
        let good = config(&[b"one"]);
        let entry = |layers: &str| format!(r#"{{"Config":"c.json","RepoTags":["a:1"],"Layers":{layers}}}"#);
        let (one, two) = (entry(r#"["a.tar"]"#), entry(r#"["a.tar","a.tar"]"#));
        let missing = ArchiveImage::Named("b:1".parse().unwrap());
        for (listing, image, message) in [
            (format!("[{two}]"), ArchiveImage::Only, "it lists 2 layers, its config 1 diffIDs"),
            (format!("[{}]", entry(r#"["x.tar"]"#)), ArchiveImage::Only, "the layer \"x.tar\" is missing"),
            (format!("[{one},{one}]"), ArchiveImage::Only, "name one of: a:1, a:1, @0 to @1"),
            (format!("[{one}]"), ArchiveImage::Index(1), "there is no image @1"),
            (format!("[{one}]"), missing, "there is no image docker.io/library/b:1"),
            ("{}".to_owned(), ArchiveImage::Only, "manifest.json cannot be understood"),
        ] {
            let file = archive(&[
                member("a.tar", b"one"),
                member("c.json", good.as_bytes()),
                member("manifest.json", listing.as_bytes()),
            ]);
            let error = LayoutReader::docker_archive(file.path(), &image).expect_err(message).to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
