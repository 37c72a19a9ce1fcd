//! Manifests, indexes, configs, references and the annotations of EROFS layers.
