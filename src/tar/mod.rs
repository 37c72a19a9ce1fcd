//! Layer tars as a stream of entries.
