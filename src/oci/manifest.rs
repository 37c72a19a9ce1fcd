//! Manifests, indexes and configs: untrusted JSON in, checked values out, and back to the same bytes every time.
//!
//! A document is at most [`DOCUMENT_LIMIT`] bytes, its digest is compared before it is parsed, its media type agrees
//! with what announced it, and it is either a manifest or an index, never both. Digests are typed: what this program
//! could not check is refused here. Unknown members are ignored when read; a [`Config`] keeps them when it is edited.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::media;
use super::platform::{EROFS_FEATURE, Platform, PlatformRecord};
use crate::model::{BlobDigest, DiffId, Digest};

/// Largest manifest, index or config that is read, in bytes. The distribution specification lets registries refuse
/// manifests above 4 MiB; the largest configs of public images are below 100 KiB.
pub const DOCUMENT_LIMIT: u64 = 4 << 20;

/// Why bytes are no usable document.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Larger than [`DOCUMENT_LIMIT`].
    #[error("document {digest} of {size} bytes is larger than the {DOCUMENT_LIMIT} bytes allowed")]
    TooLarge {
        /// Which document, as announced.
        digest: BlobDigest,
        /// Its size, as announced or found.
        size: u64,
    },
    /// The size is not what the descriptor says.
    #[error("document {digest} has {found} bytes where its descriptor says {expected}")]
    Size {
        /// Which document, as announced.
        digest: BlobDigest,
        /// Size in the descriptor.
        expected: u64,
        /// Size found.
        found: u64,
    },
    /// The bytes are not those the digest names.
    #[error("document {expected} has the digest {found}")]
    Digest {
        /// Which document, as announced.
        expected: BlobDigest,
        /// What was computed.
        found: BlobDigest,
    },
    /// Not JSON, or not of the shape its kind has.
    #[error("cannot read {what}")]
    Json {
        /// Kind of document.
        what: &'static str,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// Docker's first manifest form.
    #[error(
        "the image has a Docker schema1 manifest, which names no config and no diffIDs; push it again with a current \
         tool"
    )]
    Schema1,
    /// A type that is neither a manifest nor an index.
    #[error("a document of type {0:?} is no image manifest and no index")]
    MediaType(String),
    /// The announcement and the document disagree.
    #[error("a document announced as {declared:?} calls itself {found:?}")]
    Contradiction {
        /// Type in the descriptor or the `Content-Type`.
        declared: String,
        /// Type or kind found in the document.
        found: String,
    },
    /// Members of a manifest and of an index in one document (CVE-2021-41190).
    #[error("a document has the members of both a manifest and an index")]
    Ambiguous,
    /// `schemaVersion` is not 2.
    #[error("a document has schemaVersion {0} where only 2 is known")]
    SchemaVersion(u64),
    /// The config does not have one diffID a layer.
    #[error("the config has {diff_ids} diffIDs for the {layers} layers of the manifest")]
    LayerCount {
        /// In `rootfs.diff_ids`.
        diff_ids: usize,
        /// In the manifest.
        layers: usize,
    },
    /// The config is not that of an image.
    #[error("the manifest's config has type {0:?}: it describes no container image")]
    NoImage(String),
}

/// What another document says of a blob: its type, digest and size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Media type of the content.
    pub media_type: String,
    /// Digest of the content.
    pub digest: BlobDigest,
    /// Size of the content in bytes.
    pub size: u64,
    /// Annotations, ordered so that the text form is always the same.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// For which platform, in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<PlatformRecord>,
    /// Type of the artifact behind a manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Where else the content may be; kept, never followed.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
}

impl Descriptor {
    /// A descriptor with the required members alone.
    pub fn new(media_type: &str, digest: BlobDigest, size: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size,
            annotations: BTreeMap::new(),
            platform: None,
            artifact_type: None,
            urls: Vec::new(),
        }
    }

    /// The descriptor of `bytes`, by SHA-256.
    pub fn of(media_type: &str, bytes: &[u8]) -> Self {
        let digest = BlobDigest(Digest::of(crate::model::Algorithm::Sha256, bytes));
        Self::new(media_type, digest, bytes.len() as u64)
    }

    /// Refuses a document that is announced with more than [`DOCUMENT_LIMIT`] bytes, before it is fetched.
    ///
    /// # Errors
    /// [`DocumentError::TooLarge`].
    pub fn check_document_size(&self) -> Result<(), DocumentError> {
        if self.size > DOCUMENT_LIMIT {
            return Err(DocumentError::TooLarge { digest: self.digest, size: self.size });
        }
        Ok(())
    }

    /// True if `bytes` are what this descriptor describes.
    ///
    /// # Errors
    /// Size, digest or limit do not fit.
    pub fn verify(&self, bytes: &[u8]) -> Result<(), DocumentError> {
        self.check_document_size()?;
        let found = bytes.len() as u64;
        if found != self.size {
            return Err(DocumentError::Size { digest: self.digest, expected: self.size, found });
        }
        verify_digest(&self.digest, bytes)
    }
}

/// True if `bytes` are a document of digest `expected`.
///
/// # Errors
/// The digest or the limit do not fit.
pub fn verify_digest(expected: &BlobDigest, bytes: &[u8]) -> Result<(), DocumentError> {
    let size = bytes.len() as u64;
    if size > DOCUMENT_LIMIT {
        return Err(DocumentError::TooLarge { digest: *expected, size });
    }
    let found = BlobDigest(Digest::of(expected.0.algorithm(), bytes));
    if found != *expected {
        return Err(DocumentError::Digest { expected: *expected, found });
    }
    Ok(())
}

fn null_is_empty<'de, T: Default + Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// The manifest of one image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    schema_version: u64,
    /// Its own media type. Filled in when the document does not say.
    #[serde(default)]
    pub media_type: String,
    /// Type of the artifact, where it is no image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The config.
    pub config: Descriptor,
    /// Layers, the lowest first.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub layers: Vec<Descriptor>,
    /// The manifest this one is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Annotations.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Manifest {
    /// A manifest of the image specification.
    pub fn new(config: Descriptor, layers: Vec<Descriptor>) -> Self {
        Self {
            schema_version: 2,
            media_type: media::OCI_MANIFEST.to_owned(),
            artifact_type: None,
            config,
            layers,
            subject: None,
            annotations: BTreeMap::new(),
        }
    }

    /// The text form; the same value gives the same bytes.
    pub fn to_json(&self) -> Vec<u8> {
        to_json(self)
    }
}

/// An index: descriptors of manifests and of further indexes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    schema_version: u64,
    /// Its own media type. Filled in when the document does not say.
    #[serde(default)]
    pub media_type: String,
    /// Type of the artifact, where it is no image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The entries.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub manifests: Vec<Descriptor>,
    /// The manifest this one is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Annotations.
    #[serde(default, deserialize_with = "null_is_empty", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Index {
    /// An index of the image specification.
    pub fn new(manifests: Vec<Descriptor>) -> Self {
        Self {
            schema_version: 2,
            media_type: media::OCI_INDEX.to_owned(),
            artifact_type: None,
            manifests,
            subject: None,
            annotations: BTreeMap::new(),
        }
    }

    /// The text form; the same value gives the same bytes.
    pub fn to_json(&self) -> Vec<u8> {
        to_json(self)
    }
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("strings, numbers and maps with text keys always have a JSON form")
}

/// What a tag or a digest can stand for.
#[expect(clippy::large_enum_variant, reason = "there is one at a time, and it is taken apart at once")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// One image.
    Manifest(Manifest),
    /// Several.
    Index(Index),
}

/// The members that tell the kinds of documents apart, without their contents.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Probe {
    schema_version: Option<u64>,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
    config: Option<serde::de::IgnoredAny>,
    layers: Option<serde::de::IgnoredAny>,
    fs_layers: Option<serde::de::IgnoredAny>,
}

impl Document {
    /// Reads a manifest or an index. `declared` is the media type of the descriptor or the `Content-Type` that
    /// announced it; a type that says nothing (`application/json`, `text/plain`) is ignored.
    ///
    /// # Errors
    /// See [`DocumentError`].
    pub fn parse(bytes: &[u8], declared: Option<&str>) -> Result<Self, DocumentError> {
        if bytes.len() as u64 > DOCUMENT_LIMIT {
            let digest = Descriptor::of("", bytes).digest;
            return Err(DocumentError::TooLarge { digest, size: bytes.len() as u64 });
        }
        let json = |what| move |source| DocumentError::Json { what, source };
        let probe: Probe = serde_json::from_slice(bytes).map_err(json("a manifest or index"))?;
        let declared = declared.map(media::essence).filter(|declared| {
            !matches!(*declared, "" | "application/json" | "text/plain" | "text/html" | "application/octet-stream")
        });
        let is_schema1 = |media_type: &str| matches!(media_type, media::DOCKER_SCHEMA1 | media::DOCKER_SCHEMA1_SIGNED);
        if probe.schema_version == Some(1)
            || probe.fs_layers.is_some()
            || probe.media_type.as_deref().or(declared).is_some_and(is_schema1)
        {
            return Err(DocumentError::Schema1);
        }
        match probe.schema_version {
            Some(2) => {}
            other => return Err(DocumentError::SchemaVersion(other.unwrap_or(0))),
        }
        if probe.manifests.is_some() && (probe.layers.is_some() || probe.config.is_some()) {
            return Err(DocumentError::Ambiguous);
        }
        let own = probe.media_type.as_deref().filter(|own| !own.is_empty());
        if let (Some(own), Some(declared)) = (own, declared)
            && own != declared
        {
            return Err(DocumentError::Contradiction { declared: declared.to_owned(), found: own.to_owned() });
        }
        let looks_like_index = probe.manifests.is_some();
        let effective =
            own.or(declared).unwrap_or(if looks_like_index { media::OCI_INDEX } else { media::OCI_MANIFEST });
        if media::is_index(effective) {
            if probe.config.is_some() || probe.layers.is_some() {
                return Err(DocumentError::Contradiction {
                    declared: effective.to_owned(),
                    found: "a manifest".into(),
                });
            }
            let mut index: Index = serde_json::from_slice(bytes).map_err(json("an index"))?;
            index.media_type = effective.to_owned();
            Ok(Self::Index(index))
        } else if media::is_manifest(effective) {
            if looks_like_index {
                return Err(DocumentError::Contradiction { declared: effective.to_owned(), found: "an index".into() });
            }
            let mut manifest: Manifest = serde_json::from_slice(bytes).map_err(json("a manifest"))?;
            manifest.media_type = effective.to_owned();
            Ok(Self::Manifest(manifest))
        } else {
            Err(DocumentError::MediaType(effective.to_owned()))
        }
    }

    /// Checks `bytes` against their descriptor, then reads them.
    ///
    /// # Errors
    /// See [`DocumentError`].
    pub fn parse_verified(bytes: &[u8], descriptor: &Descriptor) -> Result<Self, DocumentError> {
        descriptor.verify(bytes)?;
        Self::parse(bytes, Some(&descriptor.media_type))
    }

    /// The document's media type.
    pub fn media_type(&self) -> &str {
        match self {
            Self::Manifest(manifest) => &manifest.media_type,
            Self::Index(index) => &index.media_type,
        }
    }
}

/// The configuration of an image: what was read, and the few members that this program understands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    bytes: Vec<u8>,
    platform: PlatformRecord,
    diff_ids: Vec<DiffId>,
    created: Option<String>,
}

/// Old images lack the architecture, which a descriptor's platform must have.
#[derive(Deserialize)]
struct ConfigProbe {
    #[serde(default, deserialize_with = "null_is_empty")]
    architecture: String,
    #[serde(default, deserialize_with = "null_is_empty")]
    os: String,
    #[serde(rename = "os.version", default)]
    os_version: Option<String>,
    #[serde(rename = "os.features", default)]
    os_features: Option<Vec<String>>,
    #[serde(default)]
    variant: Option<String>,
    created: Option<String>,
    /// The EROFS image layer format specification lets it be absent (section 5.2).
    #[serde(default, deserialize_with = "null_is_empty")]
    rootfs: RootFs,
}

#[derive(Default, Deserialize)]
struct RootFs {
    #[serde(default, deserialize_with = "null_is_empty")]
    diff_ids: Vec<DiffId>,
}

impl Config {
    /// Checks `bytes` against their descriptor, then reads them.
    ///
    /// # Errors
    /// See [`DocumentError`].
    pub fn parse_verified(bytes: Vec<u8>, descriptor: &Descriptor) -> Result<Self, DocumentError> {
        if !media::is_config(&descriptor.media_type) {
            return Err(DocumentError::NoImage(descriptor.media_type.clone()));
        }
        descriptor.verify(&bytes)?;
        Self::parse(bytes)
    }

    /// Reads a config.
    ///
    /// # Errors
    /// See [`DocumentError`].
    pub fn parse(bytes: Vec<u8>) -> Result<Self, DocumentError> {
        let probe: ConfigProbe = serde_json::from_slice(&bytes)
            .map_err(|source| DocumentError::Json { what: "an image configuration", source })?;
        let platform = PlatformRecord {
            architecture: probe.architecture,
            // Docker's oldest images leave it out and are for Linux.
            os: if probe.os.is_empty() { "linux".to_owned() } else { probe.os },
            os_version: probe.os_version,
            os_features: probe.os_features,
            variant: probe.variant,
        };
        Ok(Self { bytes, platform, diff_ids: probe.rootfs.diff_ids, created: probe.created })
    }

    /// The bytes as read.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The platform, as written.
    pub const fn platform_record(&self) -> &PlatformRecord {
        &self.platform
    }

    /// The platform, normalised.
    pub fn platform(&self) -> Platform {
        Platform::from(&self.platform)
    }

    /// The diffIDs, lowest layer first.
    pub fn diff_ids(&self) -> &[DiffId] {
        &self.diff_ids
    }

    /// When the image was made, as written.
    pub fn created(&self) -> Option<&str> {
        self.created.as_deref()
    }

    /// True if the config says that the layers are EROFS.
    pub fn has_erofs_feature(&self) -> bool {
        self.platform.os_features.iter().flatten().any(|feature| feature == EROFS_FEATURE)
    }

    /// One diffID for each layer of `manifest`?
    ///
    /// # Errors
    /// [`DocumentError::LayerCount`].
    pub fn check_layers(&self, manifest: &Manifest) -> Result<(), DocumentError> {
        if self.diff_ids.len() != manifest.layers.len() {
            return Err(DocumentError::LayerCount { diff_ids: self.diff_ids.len(), layers: manifest.layers.len() });
        }
        Ok(())
    }

    /// The config with other layers: `rootfs.diff_ids` replaced and `erofs` added to or taken from `os.features`.
    /// Everything else is kept; members are written in the order of their names.
    ///
    /// # Errors
    /// The bytes are no JSON object, which a config that was parsed always is.
    pub fn with_layers(&self, diff_ids: &[DiffId], erofs: bool) -> Result<Self, DocumentError> {
        let mut members: BTreeMap<String, Value> = serde_json::from_slice(&self.bytes)
            .map_err(|source| DocumentError::Json { what: "an image configuration", source })?;
        let ids: Vec<Value> = diff_ids.iter().map(|id| Value::String(id.to_string())).collect();
        members.insert("rootfs".to_owned(), serde_json::json!({ "type": "layers", "diff_ids": ids }));
        let mut features: Vec<String> = self.platform.os_features.clone().unwrap_or_default();
        features.retain(|feature| feature != EROFS_FEATURE);
        if erofs {
            features.push(EROFS_FEATURE.to_owned());
        }
        if features.is_empty() {
            members.remove("os.features");
        } else {
            members.insert("os.features".to_owned(), features.into());
        }
        if members.get("os").is_none_or(|os| os.as_str().is_none_or(str::is_empty)) {
            members.insert("os".to_owned(), self.platform.os.clone().into());
        }
        Self::parse(to_json(&members))
    }

    /// The descriptor of this config.
    pub fn descriptor(&self) -> Descriptor {
        Descriptor::of(media::OCI_CONFIG, &self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn manifest_json(media_type: &str) -> String {
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{media_type}","config":{{"mediaType":"{}","digest":"{HEX}","size":2}},
            "layers":[{{"mediaType":"{}","digest":"{HEX}","size":7,"annotations":null}}],"annotations":null}}"#,
            media::OCI_CONFIG,
            media::OCI_LAYER_GZIP
        )
    }

    #[test]
    fn manifests_and_indexes_are_read() {
        let text = manifest_json(media::OCI_MANIFEST);
        for declared in [None, Some(media::OCI_MANIFEST), Some("application/json"), Some("text/plain; charset=utf-8")] {
            let Document::Manifest(manifest) = Document::parse(text.as_bytes(), declared).unwrap() else { panic!() };
            assert_eq!(manifest.layers[0].size, 7);
        }
        let docker = manifest_json(media::DOCKER_MANIFEST);
        assert_eq!(Document::parse(docker.as_bytes(), None).unwrap().media_type(), media::DOCKER_MANIFEST);

        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{}","digest":"{HEX}","size":7,
            "platform":{{"os":"linux","architecture":"amd64","os.features":["erofs"]}}}}]}}"#,
            media::OCI_MANIFEST
        );
        let Document::Index(index) = Document::parse(index.as_bytes(), None).unwrap() else { panic!() };
        let platform = Platform::from(index.manifests[0].platform.as_ref().unwrap());
        assert_eq!(platform.to_string(), "linux(+erofs)/amd64");
        let again = Document::parse(&index.to_json(), Some(media::OCI_INDEX)).unwrap();
        assert_eq!(again, Document::Index(index));
    }

    #[test]
    fn documents_that_lie_are_refused() {
        let manifest = manifest_json(media::OCI_MANIFEST);
        let untyped = manifest.replace(&format!(r#""mediaType":"{}","#, media::OCI_MANIFEST), "");
        let md5 = manifest.replace(HEX, "md5:d41d8cd98f00b204e9800998ecf8427e");
        let deep = "[".repeat(100_000);
        let negative = manifest.replace(r#""size":7"#, r#""size":-7"#);
        for (text, declared, message) in [
            (manifest.as_str(), Some(media::OCI_INDEX), "calls itself"),
            (manifest.as_str(), Some(media::DOCKER_MANIFEST), "calls itself"),
            (untyped.as_str(), Some(media::OCI_INDEX), "calls itself \"a manifest\""),
            (r#"{"schemaVersion":2,"manifests":[]}"#, Some(media::OCI_MANIFEST), "calls itself \"an index\""),
            (r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#, None, "both a manifest and an index"),
            (r#"{"schemaVersion":1,"fsLayers":[],"signatures":[]}"#, None, "schema1"),
            (r#"{"schemaVersion":2}"#, Some(media::DOCKER_SCHEMA1_SIGNED), "schema1"),
            (r#"{"schemaVersion":3}"#, None, "schemaVersion 3"),
            (r#"{"layers":[]}"#, None, "schemaVersion 0"),
            (r#"{"schemaVersion":2,"mediaType":"application/vnd.cncf.helm.config"}"#, None, "no image manifest"),
            (r#"{"schemaVersion":2}"#, None, "cannot read a manifest"),
            (md5.as_str(), None, "cannot read a manifest"),
            (negative.as_str(), None, "cannot read a manifest"),
            (deep.as_str(), None, "cannot read a manifest or index"),
            ("<html>", Some("text/html"), "cannot read a manifest or index"),
        ] {
            let error = Document::parse(text.as_bytes(), declared).expect_err(text).to_string();
            assert!(error.contains(message), "{text:.80} as {declared:?} gave {error}");
        }
    }

    #[test]
    fn bytes_are_verified_before_they_are_parsed() {
        let text = manifest_json(media::OCI_MANIFEST);
        let good = Descriptor::of(media::OCI_MANIFEST, text.as_bytes());
        assert!(Document::parse_verified(text.as_bytes(), &good).is_ok());
        let other = Descriptor { digest: HEX.parse().unwrap(), ..good.clone() };
        assert!(matches!(Document::parse_verified(text.as_bytes(), &other), Err(DocumentError::Digest { .. })));
        let longer = Descriptor { size: good.size + 1, ..good.clone() };
        assert!(matches!(Document::parse_verified(text.as_bytes(), &longer), Err(DocumentError::Size { .. })));
        let huge = Descriptor { size: DOCUMENT_LIMIT + 1, ..good };
        assert!(matches!(huge.check_document_size(), Err(DocumentError::TooLarge { .. })));
    }

    #[test]
    fn an_edited_config_keeps_what_it_does_not_know() {
        let text = format!(
            r#"{{"os":"linux","architecture":"amd64","docker_version":"20","created":"2024-01-01T00:00:00Z",
            "config":{{"Cmd":["sh"],"Healthcheck":{{}}}},"rootfs":{{"type":"layers","diff_ids":["{HEX}"]}},"history":null}}"#
        );
        let config = Config::parse(text.into_bytes()).unwrap();
        assert_eq!(config.diff_ids().len(), 1);
        let layer = DiffId(Digest::of(crate::model::Algorithm::Sha256, b"x"));
        let edited = config.with_layers(&[layer, layer], true).unwrap();
        assert_eq!(edited.diff_ids(), [layer, layer]);
        assert!(edited.has_erofs_feature());
        assert_eq!(edited.platform().to_string(), "linux(+erofs)/amd64");
        let value: Value = serde_json::from_slice(edited.as_bytes()).unwrap();
        assert_eq!(value["docker_version"], "20");
        assert_eq!(value["config"]["Cmd"][0], "sh");
        assert!(!edited.with_layers(&[layer], false).unwrap().has_erofs_feature());
        assert_eq!(config.with_layers(&[layer, layer], true).unwrap().as_bytes(), edited.as_bytes());
    }

    #[test]
    fn a_config_without_a_diff_id_for_each_layer_is_refused() {
        let config = Config::parse(br#"{"rootfs":{"diff_ids":null}}"#.to_vec()).unwrap();
        assert_eq!(config.platform_record().os, "linux");
        let Document::Manifest(manifest) =
            Document::parse(manifest_json(media::OCI_MANIFEST).as_bytes(), None).unwrap()
        else {
            panic!()
        };
        let error = config.check_layers(&manifest).unwrap_err().to_string();
        assert_eq!(error, "the config has 0 diffIDs for the 1 layers of the manifest");
        let attestation = Descriptor::of("application/vnd.in-toto+json", b"{}");
        assert!(matches!(Config::parse_verified(b"{}".to_vec(), &attestation), Err(DocumentError::NoImage(_))));
    }
}
