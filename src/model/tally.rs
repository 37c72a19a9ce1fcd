//! Counting what is noteworthy.

use super::RelPath;

/// How often something happened to a file, and to which first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Tally {
    /// How often.
    pub count: u64,
    /// The first file; none if it never happened.
    pub first: Option<RelPath>,
}

impl Tally {
    /// It happened to the file at `path`.
    pub fn add(&mut self, path: &RelPath) {
        self.count += 1;
        self.first.get_or_insert_with(|| path.clone());
    }
}
