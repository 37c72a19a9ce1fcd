//! The superblock, judged: what the image is, and whether this program may read it.

use super::ondisk::{
    self, MAX_BLOCK_BITS, MIN_BLOCK_BITS, RawSuperblock, SUPER_MAGIC, SUPER_OFFSET, SUPER_SIZE, compat, incompat,
};
use super::{Defect, Error, Nid, Place};
use crate::model::{ReadAt, Timestamp};

/// Incompatible features that the reader knows.
const SUPPORTED: u32 = incompat::CHUNKED_FILE | incompat::DEVICE_TABLE | incompat::XATTR_PREFIXES | incompat::BITS_48;

/// Features that only images with compressed files or metadata have. `mkfs.erofs` from 1.5 on sets none of them
/// otherwise (tried with 1.5, 1.8.6 and 1.9.4).
const COMPRESSION: u32 =
    incompat::LZ4_0PADDING | incompat::COMPR_CFGS | incompat::ZTAILPACKING | incompat::FRAGMENTS | incompat::METABOX;

/// The volume name of the images that this program writes.
pub(crate) const WRITER_NAME: &[u8] = b"headstart";

/// What an image says about itself. All values are checked against each other, not against the image's size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    raw: RawSuperblock,
}

impl Superblock {
    /// Reads and judges the superblock of `source`, whose size is `size`.
    pub(crate) fn read<R: ReadAt>(source: &R, size: u64) -> Result<Self, Error> {
        let failed = |source| Error::of_read(source, 0, Place::Superblock, SUPER_OFFSET);
        let corrupt = |defect| Error::corrupt(Place::Superblock, SUPER_OFFSET, defect);
        if size < SUPER_OFFSET + SUPER_SIZE as u64 {
            return Err(Error::TooShort { size });
        }
        // One read serves the commonest block size, checksum included.
        let mut bytes = vec![0; usize::try_from(size - SUPER_OFFSET).unwrap_or(usize::MAX).min(3072)];
        source.read_exact_at(SUPER_OFFSET, &mut bytes).map_err(failed)?;
        let record = bytes.first_chunk().expect("at least a superblock was read");
        let raw = RawSuperblock::decode(record);
        if raw.magic != SUPER_MAGIC {
            return Err(Error::NotErofs { found: raw.magic });
        }
        if !(MIN_BLOCK_BITS..=MAX_BLOCK_BITS).contains(&raw.block_bits) {
            return Err(corrupt(Defect::BlockSize(raw.block_bits.into())));
        }
        let dir_bits = u32::from(raw.block_bits) + u32::from(raw.dir_block_bits);
        if dir_bits > u32::from(MAX_BLOCK_BITS) {
            return Err(corrupt(Defect::BlockSize(dir_bits)));
        }
        if raw.feature_compat & compat::SB_CHKSUM != 0 {
            let covered = ondisk::checksummed_len(raw.block_bits);
            if covered > bytes.len() {
                bytes.resize(covered, 0);
                source.read_exact_at(SUPER_OFFSET, &mut bytes).map_err(failed)?;
            }
            let computed = ondisk::superblock_checksum(bytes.get(..covered).unwrap_or_default());
            if computed != raw.checksum {
                return Err(corrupt(Defect::Checksum { found: raw.checksum, computed }));
            }
        }
        let superblock = Self { raw };
        let refused = raw.feature_incompat & !superblock.readable_features();
        if refused != 0 {
            let names = ondisk::feature_names(refused, &incompat::NAMES);
            let hint = if refused & COMPRESSION != 0 { " (compression inside of the image)" } else { "" };
            return Err(Error::Features { names: format!("{names}{hint}") });
        }
        if raw.fixed_nsec >= 1_000_000_000 {
            return Err(corrupt(Defect::Nanoseconds(raw.fixed_nsec)));
        }
        Ok(superblock)
    }

    /// Images made with long attribute prefixes keep them in the packed inode and say "fragments" for its sake: there
    /// the bit means no more than the inode does. Everywhere else it means compression.
    const fn readable_features(&self) -> u32 {
        let packed_holds_prefixes = self.raw.feature_incompat & incompat::XATTR_PREFIXES != 0;
        if packed_holds_prefixes { SUPPORTED | incompat::FRAGMENTS } else { SUPPORTED }
    }

    /// The record as it stands in the image.
    pub const fn raw(&self) -> &RawSuperblock {
        &self.raw
    }

    /// log2 of the block size.
    pub(crate) const fn block_bits(&self) -> u8 {
        self.raw.block_bits
    }

    /// Bytes of a block.
    pub const fn block_size(&self) -> u64 {
        1 << self.raw.block_bits
    }

    /// Bytes of a directory block.
    pub const fn dir_block_size(&self) -> u64 {
        1 << (self.raw.block_bits + self.raw.dir_block_bits)
    }

    /// Blocks of the primary device.
    pub const fn blocks(&self) -> u64 {
        let high = if self.is_wide() { self.raw.root_nid_2b as u64 } else { 0 };
        high << 32 | self.raw.blocks_lo as u64
    }

    /// Number of inodes as the maker counted them.
    pub const fn inodes(&self) -> u64 {
        self.raw.inodes
    }

    /// The root directory.
    pub const fn root(&self) -> Nid {
        Nid(if self.is_wide() { self.raw.root_nid_8b } else { self.raw.root_nid_2b as u64 })
    }

    /// The packed inode, if there is one.
    pub(crate) fn packed_inode(&self) -> Option<Nid> {
        (self.raw.packed_nid != 0).then_some(Nid(self.raw.packed_nid))
    }

    /// The name filter of attributes may be believed.
    pub(crate) const fn has_xattr_filter(&self) -> bool {
        self.has_compat(compat::XATTR_FILTER) && self.raw.xattr_filter_reserved == 0
    }

    /// True if the compatible feature bit is set.
    pub const fn has_compat(&self, bit: u32) -> bool {
        self.raw.feature_compat & bit != 0
    }

    /// True if the incompatible feature bit is set.
    pub const fn has_incompat(&self, bit: u32) -> bool {
        self.raw.feature_incompat & bit != 0
    }

    /// The number of devices besides the primary one.
    pub const fn extra_devices(&self) -> u16 {
        if self.has_incompat(incompat::DEVICE_TABLE) { self.raw.extra_devices } else { 0 }
    }

    /// The modification time of a compact inode that holds `seconds`.
    pub(crate) const fn compact_time(&self, seconds: u32) -> Timestamp {
        Timestamp { seconds: self.raw.epoch.cast_signed().wrapping_add(seconds as i64), nanos: self.raw.fixed_nsec }
    }

    /// The volume's name, up to its first NUL.
    pub fn volume_name(&self) -> &[u8] {
        let name = &self.raw.volume_name;
        name.split(|byte| *byte == 0).next().unwrap_or(name)
    }

    /// True if the image promises that no file shows an extended attribute: our writer leaves the name filter out of such
    /// images, and it names its images so that this can be told from writers that know no filter.
    pub fn shows_no_xattrs(&self) -> bool {
        self.volume_name() == WRITER_NAME && !self.has_compat(compat::XATTR_FILTER)
    }

    const fn is_wide(&self) -> bool {
        self.has_incompat(incompat::BITS_48) && self.raw.root_nid_8b != 0
    }
}
