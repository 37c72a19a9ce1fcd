//! What a blob directory is about: `meta.json`.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::StoreError;
use crate::chunked::IndexFamily;
use crate::model::{BlobDigest, ChainId, DiffId, Digest, IndexDigest};

const FORMAT: &str = "headstart-blob";
const VERSION: u32 = 1;

/// What the bytes of an image were verified against. Two images of the same blob digest that rest on different indexes
/// share nothing: whoever can name a blob and bring an index of his own could else put bytes of his choice into an
/// image that somebody else mounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Anchor {
    /// The whole blob was read and hashed.
    Whole,
    /// The blob is a tar, which was read and hashed as a whole and unpacked on top of the layers below it: this is the
    /// stack that it is the top of.
    Tar(ChainId),
    /// Each chunk has its checksum in the index with this digest, which is of the image specification's form.
    ImageSpec(IndexDigest),
    /// The same with an index in the form of containerd pull request 12703.
    Pr12703(IndexDigest),
}

impl Anchor {
    /// The anchor that an index is.
    pub const fn index(family: IndexFamily, digest: IndexDigest) -> Self {
        match family {
            IndexFamily::ImageSpec => Self::ImageSpec(digest),
            IndexFamily::Pr12703 => Self::Pr12703(digest),
        }
    }

    const fn kind(self) -> &'static str {
        match self {
            Self::Whole => "whole",
            Self::Tar(_) => "tar",
            Self::ImageSpec(_) => "index",
            Self::Pr12703(_) => "pr12703",
        }
    }
}

impl fmt::Display for Anchor {
    /// As a file name.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole => f.write_str(self.kind()),
            Self::Tar(chain) => write!(f, "{}-{}", self.kind(), chain.0.hex()),
            Self::ImageSpec(digest) | Self::Pr12703(digest) => write!(f, "{}-{}", self.kind(), digest.0.hex()),
        }
    }
}

/// A text that names no anchor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not what an image can be verified against")]
pub struct NoAnchor(String);

impl FromStr for Anchor {
    type Err = NoAnchor;

    fn from_str(text: &str) -> Result<Self, NoAnchor> {
        let none = || NoAnchor(text.to_owned());
        if text == Self::Whole.kind() {
            return Ok(Self::Whole);
        }
        let (kind, hex) = text.split_once('-').ok_or_else(none)?;
        let digest = hex::decode(hex).ok().and_then(|bytes| Digest::from_bytes(&bytes).ok()).ok_or_else(none)?;
        let index = IndexDigest(digest);
        let known = [Self::Tar(ChainId(digest)), Self::ImageSpec(index), Self::Pr12703(index)];
        // Written as it would be written, or not at all: it becomes a path.
        known.into_iter().find(|anchor| anchor.kind() == kind && anchor.to_string() == text).ok_or_else(none)
    }
}

/// Names an image in the store and says how large it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobSpec {
    /// The blob the image comes from.
    pub blob: BlobDigest,
    /// What its bytes are verified against.
    pub anchor: Anchor,
    /// Size of the image in bytes.
    pub image_size: u64,
    /// Number of chunks.
    pub chunks: u32,
}

/// What has been found out about an image as a whole, in the order of trust.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Not hashed yet.
    Unverified,
    /// All of it is there, safe on disk, and hashes to this.
    Verified(DiffId),
    /// All of it was there once and hashed to this, which was not what the manifest says; its chunks were forgotten.
    Quarantined(DiffId),
    /// It hashed to this again after its chunks were fetched anew: the chunks are what the index says, the
    /// manifest's diffID is not.
    Contradicted(DiffId),
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Meta {
    format: String,
    version: u32,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    incompatible: Vec<String>,
    blob: BlobDigest,
    anchor: String,
    image_size: u64,
    chunks: u32,
    pub(super) verdict: Verdict,
    /// Of the image of a tar: the tar's diffID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) tar: Option<DiffId>,
}

/// The part that has to be understood before the rest is.
#[derive(Deserialize)]
struct Preamble {
    format: String,
    version: u32,
    #[serde(default)]
    incompatible: Vec<String>,
}

impl Meta {
    pub(super) fn new(spec: &BlobSpec, verdict: Verdict) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            incompatible: Vec::new(),
            blob: spec.blob,
            anchor: spec.anchor.to_string(),
            image_size: spec.image_size,
            chunks: spec.chunks,
            verdict,
            tar: None,
        }
    }

    /// The same for the image that was made from this tar.
    pub(super) fn of_tar(self, tar: Option<DiffId>) -> Self {
        Self { tar, ..self }
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("plain fields always have a JSON form");
        bytes.push(b'\n');
        bytes
    }

    /// Reads `meta.json`; none if it is damaged.
    pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Option<Self>, StoreError> {
        let Ok(preamble) = serde_json::from_slice::<Preamble>(bytes) else { return Ok(None) };
        if preamble.format != FORMAT {
            return Ok(None);
        }
        let unsupported = |needs| StoreError::Unsupported { path: path.to_owned(), needs };
        if preamble.version > VERSION {
            return Err(unsupported(format!("version {}", preamble.version)));
        }
        if let Some(feature) = preamble.incompatible.first() {
            return Err(unsupported(format!("feature {feature:?}")));
        }
        Ok(serde_json::from_slice(bytes).ok())
    }

    pub(super) fn is_about(&self, blob: &BlobDigest, anchor: Anchor) -> bool {
        self.blob == *blob && self.anchor == anchor.to_string()
    }

    pub(super) fn spec(&self, anchor: Anchor) -> BlobSpec {
        BlobSpec { blob: self.blob, anchor, image_size: self.image_size, chunks: self.chunks }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Algorithm, Digest};

    fn spec() -> BlobSpec {
        BlobSpec {
            blob: BlobDigest(Digest::of(Algorithm::Sha256, b"blob")),
            anchor: Anchor::ImageSpec(IndexDigest(Digest::of(Algorithm::Sha256, b"index"))),
            image_size: 5000,
            chunks: 2,
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let found = DiffId(Digest::of(Algorithm::Sha256, b"image"));
        for verdict in
            [Verdict::Unverified, Verdict::Verified(found), Verdict::Quarantined(found), Verdict::Contradicted(found)]
        {
            let bytes = Meta::new(&spec(), verdict).to_bytes();
            let meta = Meta::parse(Path::new("meta.json"), &bytes).unwrap().unwrap();
            assert_eq!((meta.spec(spec().anchor), meta.verdict), (spec(), verdict));
            assert!(meta.is_about(&spec().blob, spec().anchor));
            assert!(!meta.is_about(&spec().blob, Anchor::Whole));
        }
    }

    #[test]
    fn anchors_are_read_as_they_are_written_and_nothing_else_is_one() {
        let hex = "ab".repeat(32);
        for text in ["whole".to_owned(), format!("index-{hex}"), format!("pr12703-{hex}"), format!("index-{hex}{hex}")]
        {
            assert_eq!(text.parse::<Anchor>().unwrap().to_string(), text);
        }
        let long = Digest::of(Algorithm::Sha512, b"");
        for anchor in [Anchor::Whole, spec().anchor, Anchor::Pr12703(IndexDigest(long)), Anchor::Tar(ChainId(long))] {
            assert_eq!(anchor.to_string().parse(), Ok(anchor));
        }
        for text in ["", "whole-", "index", "index-", "index-ab", "other-", "../whole", "whole/..", "Index-abab"] {
            assert!(text.parse::<Anchor>().is_err(), "{text:?} was taken");
        }
        let upper = format!("index-{}", hex.to_uppercase());
        assert!(upper.parse::<Anchor>().is_err(), "an anchor has one form");
    }

    #[test]
    fn damage_is_absence_and_the_future_is_refused() {
        let good = String::from_utf8(Meta::new(&spec(), Verdict::Unverified).to_bytes()).unwrap();
        let parse = |text: &str| Meta::parse(Path::new("meta.json"), text.as_bytes());
        for damaged in ["", "{", "[]", "{\"format\":\"else\",\"version\":9}", &good.replace("5000", "-1")] {
            assert!(parse(damaged).unwrap().is_none(), "{damaged:?} was believed");
        }
        for (newer, needs) in [
            (good.replace("\"version\": 1", "\"version\": 2"), "version 2"),
            (good.replace("\"version\": 1", "\"version\": 1, \"incompatible\": [\"holes\"]"), "feature \"holes\""),
        ] {
            assert!(
                matches!(parse(&newer), Err(StoreError::Unsupported { needs: said, .. }) if said == needs),
                "{needs} was not refused"
            );
        }
        let extended = good.replace("\"version\": 1", "\"version\": 1, \"colour\": \"green\"");
        assert!(parse(&extended).unwrap().is_some(), "an unknown compatible field was refused");
    }
}
