//! What a Prepare that is to become a layer is answered with: the one rule that is right with every containerd.

use std::sync::Arc;
use std::time::Duration;

use crate::grpc::{ContainerdError, ContainerdVersion};
use crate::model::{BlobDigest, ChainId};
use crate::oci::{LabelError, PlanError};

/// How a layer is handed over.
#[derive(Debug, Clone)]
pub(crate) enum Decision {
    /// It is committed at once, and "exists already" is the answer.
    Commit,
    /// Mounts that cannot be written to are the answer; containerd commits it, with its parent, when it is its turn.
    Staged,
    /// Mounts that can be written to are the answer: containerd fetches the layer and unpacks it there.
    Ordinary(Arc<Why>),
}

/// Why a layer is not served lazily.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Why {
    /// Nobody wants lazy layers.
    #[error("lazy layers are switched off")]
    Off,
    /// The labels do not say which layer it is.
    #[error("its labels do not say which layer it is")]
    Labels(#[source] LabelError),
    /// containerd's word is needed and cannot be had.
    #[error("where the image came from is not known")]
    NoWitness(#[source] ContainerdError),
    /// The key does not say in which namespace to ask.
    #[error("where the image came from is not known: key {0:?} begins with no namespace")]
    NoNamespace(String),
    /// containerd did not pull the manifest that the labels name.
    #[error("its labels name manifest {manifest} of {repository}, which containerd has not pulled from there")]
    Stranger {
        /// The manifest.
        manifest: BlobDigest,
        /// The host and the repository.
        repository: String,
    },
    /// The documents of the image cannot be had or are unusable.
    #[error("the image cannot be read: {0:#}")]
    Image(anyhow::Error),
    /// It all took too long.
    #[error("the image could not be opened within {0:?}")]
    TooSlow(Duration),
    /// Something broke down.
    #[error("the task that opens the image broke down")]
    Broken,
    /// Its layers are tars, and nothing says which EROFS image is the same.
    #[error("its layers are tars and no twin with EROFS layers stands beside it")]
    NoTwin,
    /// What stands beside it is not its twin.
    #[error("manifest {twin} claims to be its twin: {reason}")]
    FalseTwin {
        /// The manifest that claims it.
        twin: BlobDigest,
        /// Why it is not.
        reason: &'static str,
    },
    /// Its layers are not what can be served.
    #[error(transparent)]
    Plan(PlanError),
    /// The layer is none that can be served alone.
    #[error("layer {0} has no chunk index or needs other blobs")]
    NotSeekable(usize),
    /// The layer cannot be opened.
    #[error("layer {layer} cannot be opened: {error:#}")]
    Layer {
        /// Which one, the lowest is 0.
        layer: usize,
        /// Why.
        error: anyhow::Error,
    },
    /// The labels name another blob than the manifest does.
    #[error("its labels name blob {labelled} as layer {layer}, the manifest names {blob}")]
    OtherBlob {
        /// Which one.
        layer: usize,
        /// By the labels.
        labelled: BlobDigest,
        /// By the manifest.
        blob: BlobDigest,
    },
    /// No layer of the image gives that ChainID.
    #[error("no layer of manifest {manifest} gives {chain}")]
    NotInImage {
        /// The manifest.
        manifest: BlobDigest,
        /// The ChainID.
        chain: ChainId,
    },
    /// It is to stand on something else than the layers below it.
    #[error("layer {layer} is to stand on {parent:?}, which is not the layer below it")]
    OtherParent {
        /// Which one.
        layer: usize,
        /// What it is to stand on.
        parent: String,
    },
    /// The layers are prepared at the same time by a containerd that cannot be told that one is there.
    #[error(
        "layer {layer} is prepared without its parent by containerd {version}, which cannot take a finished layer that \
         way (2.4 can): take `rebase` out of the capabilities of this proxy plugin"
    )]
    Parallel {
        /// Which one.
        layer: usize,
        /// Which containerd.
        version: ContainerdVersion,
    },
    /// The same, and which containerd it is is not known.
    #[error("layer {layer} is prepared without its parent, and which containerd does that is not known")]
    ParallelUnknown {
        /// Which one.
        layer: usize,
        /// Why it is not known.
        #[source]
        source: Arc<ContainerdError>,
    },
}

impl Why {
    /// True if it may be otherwise soon.
    pub(crate) const fn may_change(&self) -> bool {
        matches!(
            self,
            Self::NoWitness(_)
                | Self::Stranger { .. }
                | Self::Image(_)
                | Self::TooSlow(_)
                | Self::Broken
                | Self::Layer { .. }
        )
    }
}

/// Where in its image a layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Its number, the lowest is 0.
    pub(crate) layer: usize,
    /// What the layers below it are called together.
    pub(crate) below: Option<ChainId>,
}

impl Place {
    /// The place of the layer that makes `chain`, the ChainIDs of an image, `wanted`.
    pub(crate) fn find(chain: &[ChainId], wanted: &ChainId) -> Option<Self> {
        let layer = chain.iter().position(|id| id == wanted)?;
        Some(Self { layer, below: layer.checked_sub(1).and_then(|below| chain.get(below)).copied() })
    }

    /// True if the version of containerd decides.
    pub(crate) const fn needs_version(&self, parent: &str) -> bool {
        self.below.is_some() && parent.is_empty()
    }
}

/// The rule. `parent` is what the snapshot is to stand on, empty for nothing; `version` is asked for only where
/// [`Place::needs_version`] says so.
pub(crate) fn decide(
    place: Place,
    parent: &str,
    version: Option<Result<ContainerdVersion, Arc<ContainerdError>>>,
) -> Decision {
    let Place { layer, below } = place;
    let ordinary = |why| Decision::Ordinary(Arc::new(why));
    match (below, parent) {
        (None, "") => Decision::Commit,
        (None, parent) => ordinary(Why::OtherParent { layer, parent: parent.to_owned() }),
        (Some(_), "") => match version {
            Some(Ok(version)) if version.stages() => Decision::Staged,
            Some(Ok(version)) => ordinary(Why::Parallel { layer, version }),
            Some(Err(source)) => ordinary(Why::ParallelUnknown { layer, source }),
            None => ordinary(Why::Broken),
        },
        // containerd's own names of snapshots end with what they are called in a namespace, ours are just that.
        (Some(below), parent) if is_called(parent, &below) => Decision::Commit,
        (Some(_), parent) => ordinary(Why::OtherParent { layer, parent: parent.to_owned() }),
    }
}

/// True if the snapshot `key` is the stack `chain`, by its name.
fn is_called(key: &str, chain: &ChainId) -> bool {
    let chain = chain.to_string();
    key.strip_suffix(&chain).is_some_and(|before| before.is_empty() || before.ends_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Algorithm, Digest};

    fn chain() -> Vec<ChainId> {
        ["a", "b", "c"].map(|name| ChainId(Digest::of(Algorithm::Sha256, name.as_bytes()))).to_vec()
    }

    #[test]
    fn the_rule_is_right_with_every_containerd() {
        let chain = chain();
        let (first, second) = (chain[0].to_string(), chain[1].to_string());
        let key = |name: &str| format!("k8s.io/7/{name}");
        let old = || Some(Ok(ContainerdVersion::new(2, 3)));
        let silent = || {
            let source = ContainerdError::Silent { socket: "/s".into(), what: "its version" };
            Some(Err(Arc::new(source)))
        };
        for (what, layer, parent, version, expected) in [
            ("the lowest", 0, String::new(), None, "Commit"),
            ("the lowest, in parallel", 0, String::new(), Some(Ok(ContainerdVersion::new(2, 4))), "Commit"),
            ("the lowest on something", 0, key(&first), None, "is to stand on"),
            ("on ours", 1, first.clone(), None, "Commit"),
            ("on one of containerd's", 1, key(&first), None, "Commit"),
            ("on another", 1, key(&second), None, "is to stand on"),
            ("on one that only ends alike", 1, format!("x{first}"), None, "is to stand on"),
            ("on a container's", 2, key("extract-1 sha256:abc"), None, "is to stand on"),
            ("in parallel, 2.4", 2, String::new(), Some(Ok(ContainerdVersion::new(2, 4))), "Staged"),
            ("in parallel, newer", 1, String::new(), Some(Ok(ContainerdVersion::new(3, 0))), "Staged"),
            ("in parallel, 2.3", 1, String::new(), old(), "rebase"),
            ("in parallel, silent", 2, String::new(), silent(), "not known"),
            ("in parallel, not asked", 2, String::new(), None, "broke down"),
        ] {
            let place = Place::find(&chain, &chain[layer]).unwrap();
            assert_eq!(place.layer, layer);
            assert!(version.is_none() || layer == 0 || place.needs_version(&parent), "{what}");
            let found = match decide(place, &parent, version) {
                Decision::Ordinary(why) => why.to_string(),
                decision => format!("{decision:?}"),
            };
            assert!(found.contains(expected), "{what}: {found}");
        }
        assert_eq!(Place::find(&chain[..2], &chain[2]), None);
    }
}
