//! Inode numbers of an image on its own.
//!
//! The root is 1. Any other number tells layer and number within the layer, and for a directory whether layers below
//! have a part of it. So it means the same after a restart, and files that are hard links of each other share one.
//! Numbers are as small as the image allows, so that programs with 32-bit inode numbers work on images below some 10 GiB.

use super::Error;
use super::slots::SnapshotNumbers;
use crate::overlay::NodeId;

/// The root directory, as FUSE demands.
pub const ROOT_INO: u64 = 1;

/// 0 is no inode, 1 is the root.
const FIRST: u64 = 2;

/// The way between files and inode numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numbers {
    layer_bits: u32,
}

/// What an inode number says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// The file.
    pub(super) node: NodeId,
    /// It is a directory with parts in lower layers.
    pub(super) merged: bool,
}

impl Numbers {
    /// Numbers for an image of `layers` layers.
    pub const fn new(layers: usize) -> Self {
        Self { layer_bits: usize::BITS - layers.saturating_sub(1).leading_zeros() }
    }

    /// The number of a file that is not the root.
    pub(super) fn ino(self, node: NodeId, merged: bool) -> Result<u64, Error> {
        node.nid
            .checked_shl(self.layer_bits + 1)
            .filter(|shifted| shifted >> (self.layer_bits + 1) == node.nid)
            .map(|shifted| shifted | u64::from(node.layer) << 1 | u64::from(merged))
            .and_then(|number| number.checked_add(FIRST))
            .ok_or(Error::NumberTooLarge { layer: node.layer, nid: node.nid })
    }

    /// What a number says that is not the root's.
    pub(super) fn place(self, ino: u64) -> Result<Place, Error> {
        let number = ino.checked_sub(FIRST).ok_or(Error::NoSuchInode(ino))?;
        let layer = (number >> 1) & ((1 << self.layer_bits) - 1);
        let layer = u16::try_from(layer).map_err(|_| Error::NoSuchInode(ino))?;
        Ok(Place { node: NodeId { layer, nid: number >> (self.layer_bits + 1) }, merged: number & 1 == 1 })
    }
}

/// What a number is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sort {
    /// Anything but a directory.
    File,
    /// A directory; merged if it has parts in lower layers.
    Directory { merged: bool },
}

/// How a tree's files are numbered.
#[derive(Debug)]
pub(super) enum Numbering {
    /// It has all numbers for itself.
    Alone(Numbers),
    /// It shares them with others, and its files' numbers with those who show the same layers.
    Shared(SnapshotNumbers),
}

impl Numbering {
    /// The number of the root.
    pub(super) const fn root(&self) -> u64 {
        match self {
            Self::Alone(_) => ROOT_INO,
            Self::Shared(numbers) => numbers.root(),
        }
    }

    /// The number of a file that is not the root.
    pub(super) fn ino(&self, node: NodeId, sort: Sort) -> Result<u64, Error> {
        match self {
            Self::Alone(numbers) => numbers.ino(node, sort == Sort::Directory { merged: true }),
            Self::Shared(numbers) => numbers.ino(node, sort),
        }
    }

    /// What a number says that is not the root's. Of those that are shared only directories' numbers belong to a tree.
    pub(super) fn place(&self, ino: u64) -> Result<Place, Error> {
        match self {
            Self::Alone(numbers) => numbers.place(ino),
            Self::Shared(numbers) => numbers.place(ino),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_lead_back_to_their_files() {
        for layers in [1, 2, 3, 4, 5, 127, 128, 65535] {
            let numbers = Numbers::new(layers);
            let mut seen = std::collections::BTreeSet::from([0, ROOT_INO]);
            for layer in [0, layers / 2, layers - 1].map(|layer| u16::try_from(layer).unwrap()) {
                for nid in [0, 1, 36, 1 << 40] {
                    for merged in [false, true] {
                        let node = NodeId { layer, nid };
                        let ino = numbers.ino(node, merged).unwrap();
                        assert_eq!(numbers.place(ino).unwrap(), Place { node, merged });
                        seen.insert(ino);
                    }
                }
            }
            let distinct = std::collections::BTreeSet::from([0, layers / 2, layers - 1]).len();
            assert_eq!(seen.len(), 2 + distinct * 8, "{layers} layers");
        }
    }

    #[test]
    fn numbers_stay_small() {
        let numbers = Numbers::new(10);
        let last = NodeId { layer: 9, nid: (4 << 30) / 32 };
        assert!(numbers.ino(last, true).unwrap() <= u64::from(u32::MAX) + 32);
        assert_eq!(Numbers::new(1).ino(NodeId { layer: 0, nid: 36 }, false).unwrap(), 74);
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        let node = NodeId { layer: 0, nid: u64::MAX / 2 };
        assert!(matches!(Numbers::new(4).ino(node, false), Err(Error::NumberTooLarge { .. })));
        assert!(matches!(Numbers::new(4).place(0), Err(Error::NoSuchInode(0))));
    }
}
