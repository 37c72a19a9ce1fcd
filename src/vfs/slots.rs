//! Inode numbers of a forest: many snapshots and layers behind one connection.
//!
//! A layer and a snapshot each have a slot. A file that is no directory is numbered by its layer's slot, so that all
//! snapshots with that layer show one inode, and the kernel keeps its pages once; a directory is numbered by its
//! snapshot's slot and its place in it, because what it holds depends on the snapshot. Numbers are a function of slots
//! and places alone: whoever gives the same slots gets the same numbers, also after a restart.
//!
//! ```text
//! number - 5 = payload | slot (4, 8, 16 or 24 bits) | which of the four (2 bits) | sort (2 bits)
//! ```
//!
//! Few slots and small images have small numbers, so that programs with 32-bit inode numbers work on them.

use super::Error;
use super::numbers::{Place, ROOT_INO, Sort};
use crate::overlay::NodeId;

/// The directory that holds the snapshots.
pub(super) const SNAPSHOTS_INO: u64 = 2;

/// The directory that holds the layers.
pub(super) const LAYERS_INO: u64 = 3;

/// The directory that holds the layers as they are.
pub(super) const RAW_INO: u64 = 4;

/// 0 is no inode, those below have a name.
const FIRST: u64 = 5;

/// Bits of a slot. A host with a few images gets along with the first two.
const SLOT_BITS: [u32; 4] = [4, 8, 16, 24];

/// How many slots there are.
pub(super) const SLOTS: u32 = 1 << 24;

const SORT_BITS: u32 = 2;
const CLASS_BITS: u32 = 2;

const FILE: u64 = 0;
const SINGLE: u64 = 1;
const MERGED: u64 = 2;
/// A snapshot's root (payload 0), a layer as a file (payload 1), or a file of a layer that is shown as it is (its number
/// behind those).
const TOP: u64 = 3;

/// Payloads of [`TOP`] that are no numbers of files.
const TOPS: u64 = 2;

/// What a number of a forest stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spot {
    /// The root of the forest.
    Root,
    /// The directory of snapshots.
    Snapshots,
    /// The directory of layers.
    Layers,
    /// The directory of layers as they are.
    RawLayers,
    /// A file of a layer that is shown as it is.
    Raw {
        /// The layer's slot.
        layer: u32,
        /// Its number there.
        nid: u64,
    },
    /// A layer as a file.
    LayerFile {
        /// The layer's slot.
        layer: u32,
    },
    /// A file of a layer that is no directory.
    File {
        /// The layer's slot.
        layer: u32,
        /// Its number there.
        nid: u64,
    },
    /// A directory of a snapshot; which one, its own numbers tell.
    Directory {
        /// The snapshot's slot.
        snapshot: u32,
    },
    /// The root of a snapshot.
    SnapshotRoot {
        /// The snapshot's slot.
        snapshot: u32,
    },
}

impl Spot {
    /// What `ino` stands for.
    pub(super) fn of(ino: u64) -> Result<Self, Error> {
        match ino {
            ROOT_INO => return Ok(Self::Root),
            SNAPSHOTS_INO => return Ok(Self::Snapshots),
            LAYERS_INO => return Ok(Self::Layers),
            RAW_INO => return Ok(Self::RawLayers),
            _ => {}
        }
        let (sort, slot, payload) = decode(ino).ok_or(Error::NoSuchInode(ino))?;
        match (sort, payload) {
            (FILE, nid) => Ok(Self::File { layer: slot, nid }),
            (SINGLE | MERGED, _) => Ok(Self::Directory { snapshot: slot }),
            (_, 0) => Ok(Self::SnapshotRoot { snapshot: slot }),
            (_, 1) => Ok(Self::LayerFile { layer: slot }),
            (_, payload) => Ok(Self::Raw { layer: slot, nid: payload - TOPS }),
        }
    }
}

/// The number of a layer's file.
pub(super) const fn layer_file(slot: u32) -> u64 {
    encode_small(TOP, slot, 1)
}

/// The number of a file of a layer that is shown as it is, if there is room for it.
pub(super) fn raw_file(slot: u32, nid: u64) -> Option<u64> {
    encode(TOP, slot, nid.checked_add(TOPS)?)
}

/// The number of a snapshot's root.
pub(super) const fn snapshot_root(slot: u32) -> u64 {
    encode_small(TOP, slot, 0)
}

/// The index of the smallest width that holds `slot`.
const fn class(slot: u32) -> usize {
    match slot {
        0..=0xf => 0,
        0x10..=0xff => 1,
        0x100..=0xffff => 2,
        _ => 3,
    }
}

/// The bits below the payload and how many they are.
const fn low(sort: u64, slot: u32) -> (u64, u32) {
    let class = class(slot);
    let low = (slot as u64) << (SORT_BITS + CLASS_BITS) | (class as u64) << SORT_BITS | sort;
    (low, SLOT_BITS[class] + SORT_BITS + CLASS_BITS)
}

const fn encode_small(sort: u64, slot: u32, payload: u32) -> u64 {
    let (low, bits) = low(sort, slot);
    ((payload as u64) << bits | low) + FIRST
}

fn encode(sort: u64, slot: u32, payload: u64) -> Option<u64> {
    let (low, bits) = low(sort, slot);
    let shifted = payload << bits;
    (shifted >> bits == payload).then_some(shifted | low)?.checked_add(FIRST)
}

fn decode(ino: u64) -> Option<(u64, u32, u64)> {
    let number = ino.checked_sub(FIRST)?;
    let index = usize::try_from((number >> SORT_BITS) & 0b11).ok()?;
    let bits = *SLOT_BITS.get(index)?;
    let rest = number >> (SORT_BITS + CLASS_BITS);
    let slot = u32::try_from(rest & ((1 << bits) - 1)).ok()?;
    // A slot is written in one way, so that a file has one number.
    (class(slot) == index).then_some((number & 0b11, slot, rest >> bits))
}

/// The numbers of one snapshot's tree.
#[derive(Debug)]
pub(super) struct SnapshotNumbers {
    snapshot: u32,
    /// The slots of its layers, the lowest first.
    layers: Box<[u32]>,
    layer_bits: u32,
}

impl SnapshotNumbers {
    pub(super) fn new(snapshot: u32, layers: &[u32]) -> Self {
        let layer_bits = usize::BITS - layers.len().saturating_sub(1).leading_zeros();
        Self { snapshot, layers: layers.into(), layer_bits }
    }

    pub(super) const fn root(&self) -> u64 {
        snapshot_root(self.snapshot)
    }

    pub(super) fn ino(&self, node: NodeId, sort: Sort) -> Result<u64, Error> {
        let too_large = || Error::NumberTooLarge { layer: node.layer, nid: node.nid };
        let sort = match sort {
            Sort::File => {
                let slot = self.layers.get(usize::from(node.layer)).ok_or_else(too_large)?;
                return encode(FILE, *slot, node.nid).ok_or_else(too_large);
            }
            Sort::Directory { merged: false } => SINGLE,
            Sort::Directory { merged: true } => MERGED,
        };
        let shifted = node.nid << self.layer_bits;
        let payload = (shifted >> self.layer_bits == node.nid).then_some(shifted | u64::from(node.layer));
        payload.and_then(|payload| encode(sort, self.snapshot, payload)).ok_or_else(too_large)
    }

    pub(super) fn place(&self, ino: u64) -> Result<Place, Error> {
        let (sort, slot, payload) = decode(ino).ok_or(Error::NoSuchInode(ino))?;
        let layer = u16::try_from(payload & ((1 << self.layer_bits) - 1)).map_err(|_| Error::NoSuchInode(ino))?;
        if slot != self.snapshot || !matches!(sort, SINGLE | MERGED) || usize::from(layer) >= self.layers.len() {
            return Err(Error::NoSuchInode(ino));
        }
        Ok(Place { node: NodeId { layer, nid: payload >> self.layer_bits }, merged: sort == MERGED })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sorts() -> impl Strategy<Value = Sort> {
        prop_oneof![Just(Sort::File), Just(Sort::Directory { merged: false }), Just(Sort::Directory { merged: true })]
    }

    proptest! {
        #[test]
        fn numbers_lead_back_to_their_files(
            snapshot in 0..SLOTS,
            layers in proptest::collection::vec(0..SLOTS, 1..20),
            index in any::<prop::sample::Index>(),
            nid in prop_oneof![0..1_u64 << 20, any::<u64>()],
            sort in sorts(),
        ) {
            let numbers = SnapshotNumbers::new(snapshot, &layers);
            let index = index.index(layers.len());
            let node = NodeId { layer: u16::try_from(index).unwrap(), nid };
            let Ok(ino) = numbers.ino(node, sort) else {
                prop_assert!(nid > 1 << 30, "{nid} has room");
                return Ok(());
            };
            match sort {
                Sort::File => prop_assert_eq!(Spot::of(ino).unwrap(), Spot::File { layer: layers[index], nid }),
                Sort::Directory { merged } => {
                    prop_assert_eq!(Spot::of(ino).unwrap(), Spot::Directory { snapshot });
                    prop_assert_eq!(numbers.place(ino).unwrap(), Place { node, merged });
                }
            }
        }

        #[test]
        fn a_number_stands_for_one_thing(ino in any::<u64>()) {
            let back = match Spot::of(ino) {
                Err(_) => return Ok(()),
                Ok(Spot::Root) => ROOT_INO,
                Ok(Spot::Snapshots) => SNAPSHOTS_INO,
                Ok(Spot::Layers) => LAYERS_INO,
                Ok(Spot::RawLayers) => RAW_INO,
                Ok(Spot::Raw { layer, nid }) => raw_file(layer, nid).unwrap(),
                Ok(Spot::LayerFile { layer }) => layer_file(layer),
                Ok(Spot::SnapshotRoot { snapshot }) => snapshot_root(snapshot),
                Ok(Spot::File { layer, nid }) => {
                    SnapshotNumbers::new(0, &[layer]).ino(NodeId { layer: 0, nid }, Sort::File).unwrap()
                }
                Ok(Spot::Directory { snapshot }) => {
                    let numbers = SnapshotNumbers::new(snapshot, &[0]);
                    let Place { node, merged } = numbers.place(ino).unwrap();
                    numbers.ino(node, Sort::Directory { merged }).unwrap()
                }
            };
            prop_assert_eq!(back, ino);
        }
    }

    #[test]
    fn few_slots_have_small_numbers() {
        let numbers = SnapshotNumbers::new(15, &[15, 3, 255]);
        // 16 MiB of metadata are some 200,000 files.
        let last = (16 << 20) / 32;
        for sort in [Sort::File, Sort::Directory { merged: true }] {
            assert!(numbers.ino(NodeId { layer: 2, nid: last }, sort).unwrap() <= u64::from(u32::MAX), "{sort:?}");
        }
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused() {
        let numbers = SnapshotNumbers::new(SLOTS - 1, &[SLOTS - 1, 0]);
        for (layer, nid) in [(0, 1 << 36), (1, 1 << 60), (0, u64::MAX)] {
            let node = NodeId { layer, nid };
            assert!(matches!(numbers.ino(node, Sort::File), Err(Error::NumberTooLarge { .. })), "{node:?}");
        }
        let deep = NodeId { layer: 0, nid: 1 << 35 };
        assert!(matches!(numbers.ino(deep, Sort::Directory { merged: false }), Err(Error::NumberTooLarge { .. })));
        for ino in [0, layer_file(3), snapshot_root(3)] {
            assert!(matches!(numbers.place(ino), Err(Error::NoSuchInode(_))), "{ino}");
        }
    }
}
