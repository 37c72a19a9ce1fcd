//! What documents say of blobs, and why a document cannot be used.
//!
//! A document is at most [`DOCUMENT_LIMIT`] bytes, and its digest is compared before it is parsed. Digests are typed: what
//! this program could not check is refused here.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

use super::platform::PlatformRecord;
use crate::model::{BlobDigest, Digest};

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

/// A member that is `null` where it may be absent.
pub(super) fn null_is_empty<'de, T: Default + Deserialize<'de>, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<T, D::Error> {
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// The text form of a document; the same value gives the same bytes.
pub(super) fn to_json(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).expect("strings, numbers and maps with text keys always have a JSON form")
}
