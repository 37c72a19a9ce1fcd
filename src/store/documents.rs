//! Small blobs kept whole, and what references last pointed to: with both, a second mount needs no registry.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::files::{self, Durability};
use super::{Store, StoreError};
use crate::model::{Algorithm, BlobDigest, Digest};

/// More than any manifest or config that a registry accepts (4 MiB is the usual limit there).
const DOCUMENT_LIMIT: u64 = 16 << 20;
/// More than any record of a reference takes.
const REFERENCE_LIMIT: u64 = 64 << 10;

/// What a reference pointed to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reference {
    /// The reference as it was resolved.
    pub reference: String,
    /// The manifest or index it named.
    pub manifest: BlobDigest,
    /// When, in seconds since 1970.
    pub seen: u64,
}

impl Store {
    /// The document with this digest, if it is kept. It has been hashed.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn document(&self, digest: &BlobDigest) -> Result<Option<Vec<u8>>, StoreError> {
        let path = self.document_path(digest);
        let Some(bytes) = files::read_bounded(&path, DOCUMENT_LIMIT)? else { return Ok(None) };
        if Digest::of(digest.0.algorithm(), &bytes) != digest.0 {
            tracing::warn!(path = %path.display(), "document counts as absent: it does not have its digest");
            return Ok(None);
        }
        Ok(Some(bytes))
    }

    /// Keeps a document under its digest, which it must have: else nothing is kept and the answer is false.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn keep_document(&self, digest: &BlobDigest, bytes: &[u8]) -> Result<bool, StoreError> {
        if bytes.len() as u64 > DOCUMENT_LIMIT || Digest::of(digest.0.algorithm(), bytes) != digest.0 {
            return Ok(false);
        }
        let path = self.document_path(digest);
        if let Some(above) = path.parent() {
            files::make_dirs(above)?;
        }
        files::replace(&path, bytes, Durability::Relaxed)?;
        Ok(true)
    }

    /// What `reference` pointed to when it was last seen.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn reference(&self, reference: &str) -> Result<Option<Reference>, StoreError> {
        let path = self.reference_path(reference);
        let Some(bytes) = files::read_bounded(&path, REFERENCE_LIMIT)? else { return Ok(None) };
        let known: Option<Reference> = serde_json::from_slice(&bytes).ok();
        if known.is_none() {
            tracing::warn!(path = %path.display(), "reference counts as unknown: its record is damaged");
        }
        Ok(known.filter(|known| known.reference == reference))
    }

    /// Keeps what `reference` points to now.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub fn keep_reference(&self, reference: &str, manifest: &BlobDigest) -> Result<(), StoreError> {
        let seen = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let record = Reference { reference: reference.to_owned(), manifest: *manifest, seen };
        let bytes = serde_json::to_vec(&record).expect("plain fields always have a JSON form");
        files::replace(&self.reference_path(reference), &bytes, Durability::Relaxed)
    }

    fn document_path(&self, digest: &BlobDigest) -> PathBuf {
        self.root.join("documents").join(digest.0.algorithm().name()).join(digest.0.hex())
    }

    /// References hold slashes and are of any length, file names are not.
    fn reference_path(&self, reference: &str) -> PathBuf {
        let name = Digest::of(Algorithm::Sha256, reference.as_bytes()).hex();
        self.root.join("refs").join(format!("{name}.json"))
    }
}
