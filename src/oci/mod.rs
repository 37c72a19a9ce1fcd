//! Manifests, indexes, configs, references and the annotations of EROFS layers.

mod reference;

pub use reference::{
    ArchiveImage, DEFAULT_HOST, DEFAULT_TAG, ImageName, LayoutImage, Reason, Reference, ReferenceError, Selector,
};
