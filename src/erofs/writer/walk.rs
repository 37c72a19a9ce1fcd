//! A way down a tree, through the symlinks that lie on it.

use super::error::{MAX_FOLLOWED, TreeError};
use super::tree::ROOT;
use crate::model::{Name, RelPath};

/// The next thing to do on a way.
pub(super) enum Step {
    /// To the directory above.
    Up,
    /// Into an entry.
    Into(Box<[u8]>),
}

/// A way down the tree, component by component, with the symlinks that are met put in.
pub(super) struct Walk<'a> {
    path: &'a RelPath,
    /// What is left, last component first.
    left: Vec<Box<[u8]>>,
    /// Directories from the root to where we are.
    entered: Vec<u32>,
    followed: usize,
}

impl<'a> Walk<'a> {
    pub(super) fn new(path: &'a RelPath, components: &[Name]) -> Self {
        let left = components.iter().rev().map(|name| name.as_bytes().into()).collect();
        Self { path, left, entered: Vec::new(), followed: 0 }
    }

    pub(super) fn next(&mut self) -> Option<Step> {
        let name = self.left.pop()?;
        Some(if &*name == b".." { Step::Up } else { Step::Into(name) })
    }

    pub(super) fn current(&self) -> u32 {
        self.entered.last().copied().unwrap_or(ROOT)
    }

    pub(super) fn enter(&mut self, directory: u32) {
        self.entered.push(directory);
    }

    pub(super) fn leave(&mut self) {
        self.entered.pop();
    }

    pub(super) fn follow(&mut self, target: &[u8]) -> Result<(), TreeError> {
        self.followed += 1;
        if self.followed > MAX_FOLLOWED {
            return Err(TreeError::SymlinkLoop { path: self.path.clone() });
        }
        if target.first() == Some(&b'/') {
            self.entered.clear();
        }
        for part in target.rsplit(|b| *b == b'/').filter(|part| !matches!(*part, b"" | b".")) {
            if part != b".." {
                Name::check(part).map_err(|source| TreeError::Name { path: self.path.clone(), source })?;
            }
            self.left.push(part.into());
        }
        Ok(())
    }
}
