//! A failure in words, on its way from the process it happened in to the one that tells it.

use serde::{Deserialize, Serialize};

/// A failure in words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// Which kind of failure, by the names in `docs/operations.md`.
    pub kind: String,
    /// What was attempted, on what.
    pub message: String,
    /// Why, the nearest cause first.
    pub causes: Vec<String>,
}

impl Fault {
    /// A request that makes no sense.
    pub(super) fn usage(message: String) -> Self {
        Self { kind: "usage".to_owned(), message, causes: Vec::new() }
    }

    /// A request that is not understood here.
    pub(super) fn unsupported(message: String) -> Self {
        Self { kind: "unsupported".to_owned(), message, causes: Vec::new() }
    }

    /// A fault of this program.
    pub(super) fn internal(message: String) -> Self {
        Self { kind: "internal".to_owned(), message, causes: Vec::new() }
    }
}
