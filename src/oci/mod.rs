//! Manifests, indexes, configs, references and the annotations of EROFS layers.
//!
//! The documents have their own types: the ones of the crate `oci-spec` lose `os.features` of an index entry, which is how
//! an EROFS image is told from its ordinary twin, and write annotations in random order.

mod config;
mod descriptor;
mod erofs;
pub mod labels;
mod manifest;
pub mod media;
mod platform;
mod reference;
mod twin;

pub use config::Config;
pub use descriptor::{DOCUMENT_LIMIT, Descriptor, DocumentError, verify_digest};
pub use erofs::{
    CHUNK_INDEX, CONTAINERD_LAYER, CONTAINERD_LAYER_ZSTD, EROFS_LAYER, EROFS_LAYER_ZSTD, Form, IgnoredIndex, ImagePlan,
    IndexLocation, LayerFault, LayerKind, LayerPlan, MAX_LAYERS, PlanError, Role, StackedLayer, TarCompression, Verity,
    index_descriptor, layer_annotations, layer_descriptor, layer_media_type, layer_role,
};
pub use labels::{LabelError, SnapshotLabels};
pub use manifest::{Document, Index, Manifest};
pub use platform::{EROFS_FEATURE, Platform, PlatformError, PlatformRecord, Prefer, select};
pub use reference::{
    ArchiveImage, DEFAULT_HOST, DEFAULT_TAG, ImageName, LayoutImage, Reason, Reference, ReferenceError, Selector,
};
pub use twin::{TWIN_OF, find_twin};
