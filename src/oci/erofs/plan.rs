//! Reads the layer descriptors of an image.
//!
//! A plan that exists obeys the specification's order of layers (section 3.8), every layer in it has a SHA-256 diffID,
//! and every index in it lies where an index can lie and has a digest that vouches for it.

mod reader;

use self::reader::LayerReader;
use super::{LayerKind, ROLE, Role, UNCOMPRESSED_DIGEST};
use crate::chunked::{Compression, IndexSection};
use crate::model::{BlobDigest, ByteRange, DiffId, Digest};
use crate::oci::{Config, Descriptor, Manifest};

/// The most layers an image may have: what the kernel's overlayfs stacks (`OVL_MAX_STACK`).
pub const MAX_LAYERS: usize = 500;

/// Why an image cannot be planned.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// It has no layers.
    #[error("the image has no layers")]
    NoLayers,
    /// It has more than [`MAX_LAYERS`].
    #[error("the image has {0} layers, more than the limit of {MAX_LAYERS}")]
    TooManyLayers(usize),
    /// Its layers are tars.
    #[error("the image's layers are tar archives, not EROFS: convert it first")]
    Tar,
    /// Something about one layer.
    #[error("layer {position} of the image ({digest}) cannot be used")]
    Layer {
        /// Place in the manifest, counted from 0.
        position: usize,
        /// The blob.
        digest: BlobDigest,
        /// What is wrong.
        #[source]
        fault: Box<LayerFault>,
    },
}

/// What is wrong with a layer's descriptor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayerFault {
    /// A tar between EROFS layers.
    #[error("it is a tar archive ({0}) among EROFS layers")]
    Tar(String),
    /// Not a layer this program knows.
    #[error("its media type {0:?} is not known")]
    MediaType(String),
    /// A device in an encoding that is not read.
    #[error("a device of media type {0:?} is not supported: it has to be stored raw or with zstd")]
    DeviceEncoding(String),
    /// An annotation that is not in its grammar, or that cannot be true.
    #[error("its annotation {key} = {value:?} is wrong: {reason}")]
    Annotation {
        /// The annotation's name.
        key: &'static str,
        /// What it says.
        value: String,
        /// What it should say.
        reason: String,
    },
    /// An annotation that another one needs.
    #[error("its annotation {0} is missing")]
    Missing(&'static str),
    /// It stands where it must not.
    #[error("{0}")]
    Order(&'static str),
    /// No annotation, and the config does not have one diffID a layer.
    #[error(
        "its diffID is not known: it has no annotation {UNCOMPRESSED_DIGEST} and the config has {diff_ids} diffIDs for {layers} layers"
    )]
    NoDiffId {
        /// In the config.
        diff_ids: usize,
        /// In the manifest.
        layers: usize,
    },
    /// A diffID that is no SHA-256.
    #[error("its diffID {0} is not a SHA-256 digest")]
    DiffIdAlgorithm(DiffId),
    /// A form of dm-verity in which the diffID says nothing about the image's bytes.
    #[error("it carries dm-verity in the form of containerd pull request 12703, which is not supported")]
    DraftVerity,
}

/// Where the chunk index of a layer is, and how to read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexLocation {
    /// The blob that holds it: the layer's own, or one beside it.
    pub blob: BlobDigest,
    /// Where in that blob; what to hand to [`IndexSection::read`].
    pub range: ByteRange,
    /// How to read it. Its digest is always there: an index that nothing vouches for is not planned.
    pub section: IndexSection,
}

/// Why a layer that has an index is planned without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IgnoredIndex {
    /// Nothing in the manifest says what the index's bytes are, so that no byte read through it could be trusted.
    NoDigest,
    /// It is of a form that is not known.
    MediaType,
    /// It is larger than [`MAX_INDEX_SIZE`](crate::chunked::MAX_INDEX_SIZE).
    TooLarge,
}

/// The kernel's dm-verity parameters of a layer (section 3.5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verity {
    /// Where the tree begins in the image: the size of the EROFS file system.
    pub hash_offset: u64,
    /// Root digest.
    pub root_digest: Digest,
    /// Block size.
    pub block_size: u32,
}

/// One layer with bytes of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerPlan {
    /// Place in the manifest, counted from 0.
    pub position: usize,
    /// The blob.
    pub blob: BlobDigest,
    /// Its size.
    pub blob_size: u64,
    /// Its media type.
    pub media_type: String,
    /// It is a tar, which has to be unpacked: what is said of how it is stored does not count.
    pub is_tar: bool,
    /// How it is stored.
    pub compression: Compression,
    /// SHA-256 of the image. For a raw blob that is of the whole blob, an index at its end included (section 5.2).
    pub diff_id: DiffId,
    /// Its role, if it has one.
    pub role: Option<Role>,
    /// Its chunk index. Without one the layer is read from start to end.
    pub index: Option<IndexLocation>,
    /// Why there is no index although the manifest names one.
    pub ignored_index: Option<IgnoredIndex>,
    /// dm-verity, if it has it.
    pub verity: Option<Verity>,
}

/// One EROFS layer of the stack, and what it needs beside it. The numbers are places in [`ImagePlan::layers`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StackedLayer {
    /// The layer itself.
    pub layer: usize,
    /// Its extra devices in order; device 1 first.
    pub devices: Vec<usize>,
    /// The layers that hold contents of its files, with their own devices; lowest first.
    pub data: Vec<Self>,
}

/// What an image consists of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImagePlan {
    /// All layers with bytes of their own, in the manifest's order; standalone indexes are part of what they index.
    pub layers: Vec<LayerPlan>,
    /// The overlay stack, lowest layer first. Never empty.
    pub stack: Vec<StackedLayer>,
    /// The diffID of every layer in the manifest, standalone indexes included: what ChainIDs are made of.
    pub diff_ids: Vec<DiffId>,
}

impl ImagePlan {
    /// Reads the layers of an image.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub fn new(manifest: &Manifest, config: &Config) -> Result<Self, PlanError> {
        Self::of_layers(&manifest.layers, config.diff_ids())
    }

    /// Reads layer descriptors and the config's diffIDs.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub fn of_layers(descriptors: &[Descriptor], diff_ids: &[DiffId]) -> Result<Self, PlanError> {
        if descriptors.iter().all(is_tar) && !descriptors.is_empty() && descriptors.len() <= MAX_LAYERS {
            return Err(PlanError::Tar);
        }
        Self::read(descriptors, diff_ids, false)
    }

    /// The same for an image some or all layers of which are tars.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub fn with_tars(manifest: &Manifest, config: &Config) -> Result<Self, PlanError> {
        Self::read(&manifest.layers, config.diff_ids(), true)
    }

    fn read(descriptors: &[Descriptor], diff_ids: &[DiffId], tars: bool) -> Result<Self, PlanError> {
        if descriptors.is_empty() {
            return Err(PlanError::NoLayers);
        }
        if descriptors.len() > MAX_LAYERS {
            return Err(PlanError::TooManyLayers(descriptors.len()));
        }
        let mut plan = Self { layers: Vec::new(), stack: Vec::new(), diff_ids: Vec::new() };
        let mut composer = Composer::default();
        for (position, descriptor) in descriptors.iter().enumerate() {
            let previous = position.checked_sub(1).and_then(|previous| descriptors.get(previous));
            let reader = LayerReader { position, descriptor, previous, count: descriptors.len(), diff_ids, tars };
            reader.read(&mut plan, &mut composer).map_err(|fault| PlanError::Layer {
                position,
                digest: descriptor.digest,
                fault: Box::new(fault),
            })?;
        }
        Ok(plan)
    }
}

fn is_tar(layer: &Descriptor) -> bool {
    matches!(LayerKind::of(&layer.media_type), LayerKind::Tar(_)) && !layer.annotations.contains_key(ROLE)
}

/// Layers that wait for the one that uses them.
#[derive(Default)]
struct Composer {
    devices: Vec<usize>,
    data: Vec<StackedLayer>,
}

#[cfg(test)]
mod tests;
