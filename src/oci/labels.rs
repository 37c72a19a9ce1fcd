//! The labels of a snapshot that say which layer of which image it is to become.
//!
//! containerd sets `containerd.io/snapshot.ref` itself. The others come from a handler that its user switches on; while
//! that is off, **any of them can come from the author of the image**, because a layer's annotations whose names begin
//! with `containerd.io/snapshot/` arrive as labels, too. So everything here is read as a stranger's: bounded, digests
//! parsed, and an image is a name in a registry, written out in full, and nothing else. Whether the name can be trusted is
//! not for this file to say.

use std::collections::BTreeMap;
use std::str::FromStr;

use super::reference::{ImageName, ReferenceError};
use crate::model::{BlobDigest, ChainId, DigestError};

/// The ChainID that the snapshot will stand for. Set by containerd's unpacker, on layers alone.
pub const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";
/// The image as it was asked for.
pub const IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";
/// The manifest, not the index, in which the layer stands.
pub const MANIFEST_DIGEST: &str = "containerd.io/snapshot/cri.manifest-digest";
/// The layer's blob.
pub const LAYER_DIGEST: &str = "containerd.io/snapshot/cri.layer-digest";

/// Longest name and value of a label together: containerd refuses longer ones (`labels.Validate`), so one that is longer
/// did not come through it.
pub const LABEL_LIMIT: usize = 4096;

/// Which layer a snapshot is to become.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SnapshotLabels {
    /// What the stack up to this layer is called.
    pub chain: ChainId,
    /// The image, as somebody says: see the room's head.
    pub image: ImageName,
    /// Its manifest, as the same somebody says.
    pub manifest: BlobDigest,
    /// The layer's blob, if they say it.
    pub layer: Option<BlobDigest>,
}

/// Why labels do not say which layer is meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LabelError {
    /// A label that a layer needs is not there: the switch that sets it is off.
    #[error("there is no label {0}")]
    Missing(&'static str),
    /// It is longer than containerd lets through.
    #[error("label {name} has {length} bytes, {LABEL_LIMIT} are allowed")]
    TooLong {
        /// Which label.
        name: &'static str,
        /// Of name and value.
        length: usize,
    },
    /// No digest where one must be.
    #[error("label {name} is no digest")]
    Digest {
        /// Which label.
        name: &'static str,
        /// Why.
        #[source]
        source: DigestError,
    },
    /// No image name in a registry.
    #[error("label {IMAGE_REF} names no image in a registry")]
    Reference(#[source] ReferenceError),
    /// A short name, which containerd would understand otherwise than docker does.
    #[error("label {IMAGE_REF} names {said:?}, which written out in full is {full}")]
    NotInFull {
        /// What it says.
        said: String,
        /// As docker would understand it.
        full: Box<ImageName>,
    },
}

impl SnapshotLabels {
    /// Reads the labels of a snapshot; none if it is not to become a layer.
    ///
    /// # Errors
    /// It is to become a layer, and the labels do not say which one in a way that can be followed.
    pub fn parse(labels: &BTreeMap<String, String>) -> Result<Option<Self>, LabelError> {
        let Some(chain) = digest(labels, SNAPSHOT_REF)? else { return Ok(None) };
        let said = value(labels, IMAGE_REF)?.ok_or(LabelError::Missing(IMAGE_REF))?;
        let manifest = digest(labels, MANIFEST_DIGEST)?.ok_or(LabelError::Missing(MANIFEST_DIGEST))?;
        let image: ImageName = said.parse().map_err(LabelError::Reference)?;
        if image.to_string() != said {
            return Err(LabelError::NotInFull { said: said.to_owned(), full: Box::new(image) });
        }
        Ok(Some(Self { chain, image, manifest, layer: digest(labels, LAYER_DIGEST)? }))
    }
}

/// The value of a label, if there is one; an empty value is none.
fn value<'a>(labels: &'a BTreeMap<String, String>, name: &'static str) -> Result<Option<&'a str>, LabelError> {
    let Some(value) = labels.get(name).filter(|value| !value.is_empty()) else { return Ok(None) };
    match name.len() + value.len() {
        0..=LABEL_LIMIT => Ok(Some(value)),
        length => Err(LabelError::TooLong { name, length }),
    }
}

fn digest<T: FromStr<Err = DigestError>>(
    labels: &BTreeMap<String, String>,
    name: &'static str,
) -> Result<Option<T>, LabelError> {
    let parse = |text: &str| text.parse().map_err(|source| LabelError::Digest { name, source });
    value(labels, name)?.map(parse).transpose()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HEX: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn labels(of: &[(&str, &str)]) -> BTreeMap<String, String> {
        of.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn complete(image: &str) -> BTreeMap<String, String> {
        labels(&[(SNAPSHOT_REF, HEX), (IMAGE_REF, image), (MANIFEST_DIGEST, HEX), (LAYER_DIGEST, HEX)])
    }

    #[test]
    fn labels_of_a_pull_say_which_layer_is_meant() {
        let digested = format!("registry.example:5000/a/b:t@{HEX}");
        for image in
            ["docker.io/library/busybox:latest", "127.0.0.1:5000/x:1", "[::1]:5000/x", "localhost/x", &digested]
        {
            let read = SnapshotLabels::parse(&complete(image)).unwrap().unwrap();
            assert_eq!(read.image.to_string(), image);
            assert_eq!((read.chain.to_string(), read.manifest.to_string()), (HEX.to_owned(), HEX.to_owned()));
            assert_eq!(read.layer.unwrap().to_string(), HEX);
        }
        let mut without = complete("a.b/c");
        without.remove(LAYER_DIGEST);
        assert_eq!(SnapshotLabels::parse(&without).unwrap().unwrap().layer, None);
    }

    #[test]
    fn what_is_no_layer_has_nothing_to_say() {
        for other in
            [labels(&[]), labels(&[(IMAGE_REF, "a.b/c"), (MANIFEST_DIGEST, HEX)]), labels(&[(SNAPSHOT_REF, "")])]
        {
            assert_eq!(SnapshotLabels::parse(&other), Ok(None), "{other:?}");
        }
    }

    #[test]
    fn hostile_labels_are_refused_with_the_reason() {
        let long = "x".repeat(LABEL_LIMIT);
        let long_path = format!("a.b/{}", "x/".repeat(200));
        let with = |name: &str, value: &str| {
            let mut labels = complete("a.b/c:t");
            labels.insert(name.to_owned(), value.to_owned());
            labels
        };
        for (case, reason) in [
            (labels(&[(SNAPSHOT_REF, HEX)]), "no label containerd.io/snapshot/cri.image-ref"),
            (
                labels(&[(SNAPSHOT_REF, HEX), (IMAGE_REF, "a.b/c")]),
                "no label containerd.io/snapshot/cri.manifest-digest",
            ),
            (with(SNAPSHOT_REF, "sha256:../../etc/passwd"), "snapshot.ref is no digest"),
            (with(SNAPSHOT_REF, &long), "4096 are allowed"),
            (with(MANIFEST_DIGEST, "md5:d41d8cd98f00b204e9800998ecf8427e"), "manifest-digest is no digest"),
            (with(MANIFEST_DIGEST, &HEX.to_uppercase()), "manifest-digest is no digest"),
            (with(MANIFEST_DIGEST, &long), "4096 are allowed"),
            (with(LAYER_DIGEST, "/etc/passwd"), "layer-digest is no digest"),
            (with(LAYER_DIGEST, &long), "4096 are allowed"),
            (with(IMAGE_REF, &long), "4096 are allowed"),
            (with(IMAGE_REF, &long_path), "names no image"),
            (with(IMAGE_REF, "oci:/var/lib/secret"), "names no image"),
            (with(IMAGE_REF, "oci-archive:/etc/shadow"), "names no image"),
            (with(IMAGE_REF, "docker-archive:/x.tar"), "names no image"),
            (with(IMAGE_REF, "docker://a.b/c"), "names no image"),
            (with(IMAGE_REF, "http://169.254.169.254/latest"), "names no image"),
            (with(IMAGE_REF, "a.b/../c"), "names no image"),
            (with(IMAGE_REF, "../../c"), "names no image"),
            (with(IMAGE_REF, "/etc/passwd"), "names no image"),
            (with(IMAGE_REF, "user:password@a.b/c"), "names no image"),
            (with(IMAGE_REF, "a.b/c:t?x=y"), "names no image"),
            (with(IMAGE_REF, "a.b/c:t\0"), "names no image"),
            (with(IMAGE_REF, "a.b/c:t\nHost: x"), "names no image"),
            (with(IMAGE_REF, "a.b%2f@x/c"), "names no image"),
            (with(IMAGE_REF, "busybox"), "written out in full is docker.io/library/busybox"),
            (with(IMAGE_REF, "evil/busybox:1"), "written out in full is docker.io/evil/busybox:1"),
            (with(IMAGE_REF, "docker.io/busybox"), "written out in full is docker.io/library/busybox"),
            (with(IMAGE_REF, "index.docker.io/library/busybox"), "written out in full is docker.io/library/busybox"),
        ] {
            let error = SnapshotLabels::parse(&case).expect_err(reason).to_string();
            assert!(error.contains(reason), "{case:?} gave {error:?}, not {reason:?}");
        }
    }

    fn text() -> impl Strategy<Value = String> {
        prop_oneof![
            Just(HEX.to_owned()),
            "[a-c./:@]{0,20}",
            "(docker://|oci:|)[a-z.:0-9]{1,10}/[a-z/._-]{1,10}(:[a-z]{1,4})?(@sha256:[0-9a-f]{64})?",
            ".{0,40}",
            Just("x".repeat(LABEL_LIMIT + 1)),
        ]
    }

    proptest! {
        #[test]
        fn whatever_labels_hold_only_registries_are_named(values in prop::collection::vec(text(), 4)) {
            let names = [SNAPSHOT_REF, IMAGE_REF, MANIFEST_DIGEST, LAYER_DIGEST];
            let labels: BTreeMap<String, String> =
                names.iter().zip(values).map(|(name, value)| ((*name).to_owned(), value)).collect();
            if let Ok(Some(read)) = SnapshotLabels::parse(&labels) {
                prop_assert_eq!(read.image.to_string(), labels[IMAGE_REF].as_str());
                prop_assert_eq!(read.chain.to_string(), labels[SNAPSHOT_REF].as_str());
                prop_assert_eq!(read.manifest.to_string(), labels[MANIFEST_DIGEST].as_str());
                prop_assert!(!read.image.host().contains(['/', '@']));
                prop_assert!(!read.image.repository().split('/').any(|part| matches!(part, "" | "." | "..")));
            }
        }
    }
}
