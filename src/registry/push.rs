//! Bringing images to a registry.

/// How blobs are pushed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Upload {
    /// In one request; in pieces where the server does not take it.
    #[default]
    Auto,
    /// In one request.
    Monolithic,
    /// In requests of this many bytes.
    Chunked(u64),
}
