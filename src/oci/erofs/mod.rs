//! What a manifest says about EROFS layers, and what the converter writes there.
//!
//! The names are those of the EROFS image layer format specification, of containerd 2.3 and of containerd's pull
//! request 12703. [`ImagePlan`] reads them, [`layer_descriptor`] and [`layer_role`] are the way back. No byte of a
//! layer is looked at here.

use std::collections::BTreeMap;
use std::str::FromStr;

use super::descriptor::Descriptor;
use super::media;
use crate::chunked::{BlobSummary, Compression};
use crate::model::{BlobDigest, DiffId};

mod plan;

pub use plan::{
    IgnoredIndex, ImagePlan, IndexLocation, LayerFault, LayerPlan, MAX_LAYERS, PlanError, StackedLayer, Verity,
};

/// A raw EROFS layer (specification, section 2.1).
pub const EROFS_LAYER: &str = "application/vnd.erofs";
/// A zstd-compressed EROFS layer.
pub const EROFS_LAYER_ZSTD: &str = "application/vnd.erofs+zstd";
/// A chunk index in a blob of its own, and the form of embedded ones (section 2.2).
pub const CHUNK_INDEX: &str = "application/vnd.erofs.chunk-index.v1";
/// A raw EROFS layer as containerd 2.3 names it.
pub const CONTAINERD_LAYER: &str = "application/vnd.erofs.layer.v1";
/// A zstd-compressed EROFS layer as containerd 2.3 names it.
pub const CONTAINERD_LAYER_ZSTD: &str = "application/vnd.erofs.layer.v1+zstd";

const INDEX_RANGE: &str = "org.erofs.chunk-index.range";
const INDEX_DIGEST: &str = "org.erofs.chunk-index.digest";
const INDEX_MEDIA_TYPE: &str = "org.erofs.chunk-index.mediaType";
const INDEX_TARGET: &str = "org.erofs.chunk-index.target";
const UNCOMPRESSED_DIGEST: &str = "org.erofs.uncompressed-digest";
const VERITY_HASH_OFFSET: &str = "org.erofs.dmverity.hash_offset";
const VERITY_ROOT_DIGEST: &str = "org.erofs.dmverity.root_digest";
const VERITY_BLOCK_SIZE: &str = "org.erofs.dmverity.block_size";
const ROLE: &str = "org.erofs.role";
const PR_TABLE_OFFSET: &str = "dev.containerd.erofs.zstd.chunk_table_offset";
const PR_TABLE_DIGEST: &str = "dev.containerd.erofs.zstd.chunk_digest";
const PR_VERITY: &str = "dev.containerd.erofs.dmverity.root_digest";

/// Tars that are ordinary layers.
const TAR_MEDIA_TYPES: [(&str, TarCompression); 9] = [
    (media::OCI_LAYER_TAR, TarCompression::None),
    (media::OCI_LAYER_GZIP, TarCompression::Gzip),
    (media::OCI_LAYER_ZSTD, TarCompression::Zstd),
    (media::DOCKER_LAYER_GZIP, TarCompression::Gzip),
    ("application/vnd.docker.image.rootfs.diff.tar", TarCompression::None),
    ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", TarCompression::Gzip),
    ("application/vnd.oci.image.layer.nondistributable.v1.tar", TarCompression::None),
    ("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", TarCompression::Gzip),
    ("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", TarCompression::Zstd),
];

/// How a layer tar is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TarCompression {
    /// Not at all.
    None,
    /// gzip.
    Gzip,
    /// zstd, one or more frames.
    Zstd,
}

/// What a layer descriptor's media type stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LayerKind {
    /// An EROFS image.
    Erofs(Compression),
    /// The chunk index of the layer before it.
    ChunkIndex,
    /// A tar: an ordinary layer.
    Tar(TarCompression),
    /// Anything else.
    Unknown,
}

impl LayerKind {
    /// The kind a media type stands for. Docker's gzip type often holds plain tars, too, as any tar type may hold
    /// another compression in practice: whoever reads one looks at its first bytes.
    pub fn of(media_type: &str) -> Self {
        match media_type {
            EROFS_LAYER | CONTAINERD_LAYER => Self::Erofs(Compression::None),
            EROFS_LAYER_ZSTD | CONTAINERD_LAYER_ZSTD => Self::Erofs(Compression::Zstd),
            CHUNK_INDEX => Self::ChunkIndex,
            other => TAR_MEDIA_TYPES
                .iter()
                .find(|(media_type, _)| *media_type == other)
                .map_or(Self::Unknown, |(_, compression)| Self::Tar(*compression)),
        }
    }
}

/// What a layer does in the image (section 2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// `overlay-lower`: part of the overlay stack; layers above it may hold whiteouts.
    OverlayLower,
    /// `overlay-data`: file contents for the metadata layer that follows.
    OverlayData,
    /// `device`: bytes that the EROFS layer that follows addresses as an extra device.
    Device,
}

impl Role {
    /// The annotation's value.
    pub const fn name(self) -> &'static str {
        match self {
            Self::OverlayLower => "overlay-lower",
            Self::OverlayData => "overlay-data",
            Self::Device => "device",
        }
    }
}

impl FromStr for Role {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Self::OverlayLower, Self::OverlayData, Self::Device]
            .into_iter()
            .find(|role| role.name() == text)
            .ok_or("known roles are device, overlay-lower and overlay-data")
    }
}

/// Under which names converted layers are published. The bytes of the blobs are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Form {
    /// Those of the EROFS image layer format specification.
    #[default]
    ImageSpec,
    /// Media types that containerd 2.3 knows. The annotations stay, so that the layers are lazy here as well.
    Containerd23,
}

/// The media type of a converted layer.
pub const fn layer_media_type(form: Form, compression: Compression) -> &'static str {
    match (form, compression) {
        (Form::ImageSpec, Compression::None) => EROFS_LAYER,
        (Form::ImageSpec, Compression::Zstd) => EROFS_LAYER_ZSTD,
        (Form::Containerd23, Compression::None) => CONTAINERD_LAYER,
        (Form::Containerd23, Compression::Zstd) => CONTAINERD_LAYER_ZSTD,
    }
}

/// The role of layer `position` of `count` in a plain stack: a layer may hold whiteouts only above one that is
/// `overlay-lower` (section 3.6), so every layer of a stack is; a single layer is the root file system and has none.
pub const fn layer_role(position: usize, count: usize) -> Option<Role> {
    if count > 1 && position < count { Some(Role::OverlayLower) } else { None }
}

/// The annotations of a converted layer with an embedded index.
pub fn layer_annotations(summary: &BlobSummary, diff_id: DiffId, role: Option<Role>) -> BTreeMap<String, String> {
    let range = format!("{}:{}", summary.index_range.start(), summary.index_range.end());
    let mut annotations = vec![
        (INDEX_RANGE, range),
        (INDEX_DIGEST, summary.index_digest.to_string()),
        (UNCOMPRESSED_DIGEST, diff_id.to_string()),
    ];
    annotations.extend(role.map(|role| (ROLE, role.name().to_owned())));
    annotations.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
}

/// The descriptor of a converted layer with an embedded index.
pub fn layer_descriptor(form: Form, summary: &BlobSummary, diff_id: DiffId, role: Option<Role>) -> Descriptor {
    let media_type = layer_media_type(form, summary.compression);
    let mut descriptor = Descriptor::new(media_type, summary.digest, summary.size);
    descriptor.annotations = layer_annotations(summary, diff_id, role);
    descriptor
}

/// The descriptor of a standalone index of the layer `target`, which must stand right before it in the manifest.
pub fn index_descriptor(payload: &[u8], target: BlobDigest) -> Descriptor {
    let mut descriptor = Descriptor::of(CHUNK_INDEX, payload);
    descriptor.annotations.insert(INDEX_TARGET.to_owned(), target.to_string());
    descriptor.annotations.insert(INDEX_DIGEST.to_owned(), descriptor.digest.to_string());
    descriptor
}
