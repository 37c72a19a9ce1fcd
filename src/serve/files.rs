//! The files of an image layout as a registry's names see them: tags to manifests, digests to files.
//!
//! Guarantees that no request names a file outside of `blobs/`: a path is built from a parsed digest alone.
//! Refuses to know what is in an image; of manifests it reads the media type and nothing else.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::model::BlobDigest;

/// Largest `index.json` or manifest that is read, 4 MiB: the size up to which the distribution specification asks registries
/// to take manifests.
const MANIFEST_LIMIT: u64 = 4 << 20;

/// Media type of a manifest that does not name its own.
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of an index that does not name its own.
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const REF_NAME: &str = "org.opencontainers.image.ref.name";

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    manifests: Vec<Entry>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Entry {
    digest: BlobDigest,
    #[serde(default)]
    annotations: std::collections::BTreeMap<String, String>,
}

/// What of a document tells its media type.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Typed {
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
}

/// A manifest or an index, ready to be sent.
#[derive(Debug)]
pub(super) struct Document {
    pub(super) digest: BlobDigest,
    pub(super) media_type: String,
    pub(super) bytes: Vec<u8>,
}

#[derive(Debug, Clone)]
pub(super) struct LayoutFiles {
    directory: PathBuf,
}

impl LayoutFiles {
    /// A layout whose `oci-layout` exists and whose `index.json` can be read.
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        File::open(directory.join("oci-layout"))?;
        let files = Self { directory: directory.to_owned() };
        files.index()?;
        Ok(files)
    }

    fn index(&self) -> io::Result<Index> {
        Ok(serde_json::from_slice(&read_bounded(&self.directory.join("index.json"))?)?)
    }

    fn blob_path(&self, digest: &BlobDigest) -> PathBuf {
        self.directory.join("blobs").join(digest.0.algorithm().name()).join(digest.0.hex())
    }

    /// The tags of the layout in their order, each once. A layout with one nameless image shows it as `latest`.
    pub(super) fn tags(&self) -> io::Result<Vec<String>> {
        let index = self.index()?;
        let mut tags: Vec<String> = index.manifests.iter().filter_map(tag).map(str::to_owned).collect();
        if tags.is_empty() && index.manifests.len() == 1 {
            tags.push("latest".to_owned());
        }
        tags.sort_unstable();
        tags.dedup();
        Ok(tags)
    }

    /// The manifest a tag or a digest names.
    pub(super) fn manifest(&self, reference: &str) -> io::Result<Document> {
        let digest = match reference.parse::<BlobDigest>() {
            Ok(digest) => digest,
            Err(_) => self.tagged(reference)?,
        };
        let bytes = read_bounded(&self.blob_path(&digest))?;
        let typed: Typed = serde_json::from_slice(&bytes)?;
        if typed.manifests.is_none() && typed.layers.is_none() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "the blob is not a manifest"));
        }
        let implied = if typed.manifests.is_some() { INDEX } else { MANIFEST };
        let media_type = typed.media_type.unwrap_or_else(|| implied.to_owned());
        Ok(Document { digest, media_type, bytes })
    }

    fn tagged(&self, wanted: &str) -> io::Result<BlobDigest> {
        let index = self.index()?;
        let named = index.manifests.iter().find(|entry| tag(entry) == Some(wanted));
        let nameless = || match index.manifests.as_slice() {
            [only] if tag(only).is_none() && wanted == "latest" => Some(only),
            _ => None,
        };
        named
            .or_else(nameless)
            .map(|entry| entry.digest)
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the layout has no such tag"))
    }

    /// The file of a blob and its size.
    pub(super) fn blob(&self, digest: &BlobDigest) -> io::Result<(File, u64)> {
        let file = File::open(self.blob_path(digest))?;
        let size = file.metadata()?.len();
        Ok((file, size))
    }
}

/// The tag of an entry. Some tools write a whole reference where others write the tag alone.
fn tag(entry: &Entry) -> Option<&str> {
    let name = entry.annotations.get(REF_NAME)?;
    match name.rsplit_once('/') {
        None => Some(name.as_str()),
        Some((_, last)) => last.split_once(':').map(|(_, tag)| tag),
    }
}

fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let size = fs::metadata(path)?.len();
    if size > MANIFEST_LIMIT {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("{size} bytes are too many for a manifest")));
    }
    fs::read(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Algorithm, Digest};

    fn put(directory: &Path, text: &str) -> BlobDigest {
        let digest = BlobDigest(Digest::of(Algorithm::Sha256, text.as_bytes()));
        fs::create_dir_all(directory.join("blobs/sha256")).unwrap();
        fs::write(directory.join("blobs/sha256").join(digest.0.hex()), text).unwrap();
        digest
    }

    fn layout(entries: &[(BlobDigest, Option<&str>)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("oci-layout"), "{}").unwrap();
        let manifests: Vec<_> = entries
            .iter()
            .map(|(digest, name)| match name {
                Some(name) => serde_json::json!({"digest": digest, "size": 1, "annotations": {REF_NAME: name}}),
                None => serde_json::json!({"digest": digest, "size": 1}),
            })
            .collect();
        fs::write(directory.path().join("index.json"), serde_json::json!({"manifests": manifests}).to_string())
            .unwrap();
        directory
    }

    #[test]
    fn tags_come_from_names_of_either_form() {
        let digest = BlobDigest(Digest::of(Algorithm::Sha256, b"x"));
        let other = BlobDigest(Digest::of(Algorithm::Sha256, b"y"));
        let directory = layout(&[(digest, Some("v1")), (other, Some("docker.io/library/debian:12")), (digest, None)]);
        let files = LayoutFiles::open(directory.path()).unwrap();
        assert_eq!(files.tags().unwrap(), ["12", "v1"]);
        assert_eq!(files.tagged("v1").unwrap(), digest);
        assert_eq!(files.tagged("12").unwrap(), other);
        assert_eq!(files.tagged("latest").unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn one_nameless_image_is_latest() {
        let digest = BlobDigest(Digest::of(Algorithm::Sha256, b"x"));
        let directory = layout(&[(digest, None)]);
        let files = LayoutFiles::open(directory.path()).unwrap();
        assert_eq!(files.tags().unwrap(), ["latest"]);
        assert_eq!(files.tagged("latest").unwrap(), digest);
    }

    #[test]
    fn media_types_are_the_documents_own_or_implied() {
        let directory = layout(&[]);
        let files = LayoutFiles::open(directory.path()).unwrap();
        for (text, expected) in [
            (r#"{"layers":[]}"#, Some(MANIFEST)),
            (r#"{"manifests":[]}"#, Some(INDEX)),
            (r#"{"mediaType":"a/b","layers":[]}"#, Some("a/b")),
            (r#"{"rootfs":{}}"#, None),
        ] {
            let digest = put(directory.path(), text);
            let found = files.manifest(&digest.to_string()).ok();
            assert_eq!(found.as_ref().map(|document| document.media_type.as_str()), expected, "{text}");
            if let Some(document) = found {
                assert_eq!(document.bytes, text.as_bytes());
                assert_eq!(document.digest, digest);
            }
        }
    }

    #[test]
    fn a_directory_without_an_index_is_no_layout() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(LayoutFiles::open(directory.path()).unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::write(directory.path().join("oci-layout"), "{}").unwrap();
        fs::write(directory.path().join("index.json"), "[").unwrap();
        assert!(LayoutFiles::open(directory.path()).is_err());
    }
}
