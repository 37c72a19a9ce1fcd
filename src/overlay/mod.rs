//! The merge of layers: the only place that knows whiteouts and opaque directories.
