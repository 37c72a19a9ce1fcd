//! Manifests and indexes: untrusted JSON in, checked values out, and back to the same bytes every time.
//!
//! The media type of a document agrees with what announced it, and it is either a manifest or an index, never both. Unknown
//! members are ignored.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::descriptor::{DOCUMENT_LIMIT, Descriptor, DocumentError, null_is_empty, to_json};
use super::media;

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::platform::Platform;

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
}
