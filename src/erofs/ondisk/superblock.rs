//! The superblock, its checksum, and the slots of the device table.

use super::{DEVICE_SLOT_SIZE, Fields, Record, SUPER_SIZE};

/// `struct erofs_super_block` without extension slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RawSuperblock {
    /// [`SUPER_MAGIC`](super::SUPER_MAGIC).
    pub magic: u32,
    /// See [`superblock_checksum`].
    pub checksum: u32,
    /// Bits of [`compat`](super::compat).
    pub feature_compat: u32,
    /// log2 of the block size.
    pub block_bits: u8,
    /// The superblock has `SUPER_SIZE + ext_slots * SUPER_SLOT_SIZE` bytes.
    pub ext_slots: u8,
    /// nid of the root directory; with `root_nid_8b` set: high 16 bits of the block count.
    pub root_nid_2b: u16,
    /// Number of inodes.
    pub inodes: u64,
    /// Seconds that the times of compact inodes count from.
    pub epoch: u64,
    /// Nanoseconds of all compact inodes' times.
    pub fixed_nsec: u32,
    /// Number of blocks, low 32 bits.
    pub blocks_lo: u32,
    /// Block at which nids count from 0.
    pub meta_block: u32,
    /// Block at which shared attribute ids count from 0.
    pub xattr_block: u32,
    /// Identity of the image.
    pub uuid: [u8; 16],
    /// Name, padded with NUL.
    pub volume_name: [u8; 16],
    /// Bits of [`incompat`](super::incompat).
    pub feature_incompat: u32,
    /// Compression algorithms, or LZ4's window.
    pub compression: u16,
    /// Devices besides the primary one.
    pub extra_devices: u16,
    /// The device table starts at this multiple of [`DEVICE_SLOT_SIZE`].
    pub device_slot: u16,
    /// log2 of (directory block size / block size).
    pub dir_block_bits: u8,
    /// Number of long attribute prefixes.
    pub xattr_prefix_count: u8,
    /// Where they lie, in units of 4 bytes.
    pub xattr_prefix_start: u32,
    /// nid of the packed inode.
    pub packed_nid: u64,
    /// Not zero if the name filter is of another kind than this program knows.
    pub xattr_filter_reserved: u8,
    /// Which prefix marks attributes for page cache sharing.
    pub ishare_prefix: u8,
    /// Zero.
    pub reserved: u16,
    /// Seconds to add to `epoch` for the time of making.
    pub build_time: u32,
    /// With [`incompat::BITS_48`](super::incompat::BITS_48) and not zero: nid of the root directory.
    pub root_nid_8b: u64,
    /// Zero.
    pub reserved2: u64,
}

impl RawSuperblock {
    /// Reads the record.
    pub fn decode(raw: &[u8; SUPER_SIZE]) -> Self {
        let mut f = Fields(raw);
        Self {
            magic: f.u32(),
            checksum: f.u32(),
            feature_compat: f.u32(),
            block_bits: f.u8(),
            ext_slots: f.u8(),
            root_nid_2b: f.u16(),
            inodes: f.u64(),
            epoch: f.u64(),
            fixed_nsec: f.u32(),
            blocks_lo: f.u32(),
            meta_block: f.u32(),
            xattr_block: f.u32(),
            uuid: f.bytes(),
            volume_name: f.bytes(),
            feature_incompat: f.u32(),
            compression: f.u16(),
            extra_devices: f.u16(),
            device_slot: f.u16(),
            dir_block_bits: f.u8(),
            xattr_prefix_count: f.u8(),
            xattr_prefix_start: f.u32(),
            packed_nid: f.u64(),
            xattr_filter_reserved: f.u8(),
            ishare_prefix: f.u8(),
            reserved: f.u16(),
            build_time: f.u32(),
            root_nid_8b: f.u64(),
            reserved2: f.u64(),
        }
    }

    /// Writes the record.
    pub fn encode(&self) -> [u8; SUPER_SIZE] {
        Record::new()
            .u32(self.magic)
            .u32(self.checksum)
            .u32(self.feature_compat)
            .u8(self.block_bits)
            .u8(self.ext_slots)
            .u16(self.root_nid_2b)
            .u64(self.inodes)
            .u64(self.epoch)
            .u32(self.fixed_nsec)
            .u32(self.blocks_lo)
            .u32(self.meta_block)
            .u32(self.xattr_block)
            .put(&self.uuid)
            .put(&self.volume_name)
            .u32(self.feature_incompat)
            .u16(self.compression)
            .u16(self.extra_devices)
            .u16(self.device_slot)
            .u8(self.dir_block_bits)
            .u8(self.xattr_prefix_count)
            .u32(self.xattr_prefix_start)
            .u64(self.packed_nid)
            .u8(self.xattr_filter_reserved)
            .u8(self.ishare_prefix)
            .u16(self.reserved)
            .u32(self.build_time)
            .u64(self.root_nid_8b)
            .u64(self.reserved2)
            .done()
    }
}

/// How many bytes from [`SUPER_OFFSET`](super::SUPER_OFFSET) on the superblock's checksum covers: the rest of the block that holds the
/// superblock where blocks are larger than its offset, else one block.
pub const fn checksummed_len(block_bits: u8) -> usize {
    let block = 1_usize << block_bits;
    if block > 1024 { block - 1024 } else { block }
}

/// The superblock's checksum: CRC-32C (no final inversion) over the first [`checksummed_len`] bytes from
/// [`SUPER_OFFSET`](super::SUPER_OFFSET) on, the checksum field itself taken as zero.
pub fn superblock_checksum(covered: &[u8]) -> u32 {
    let (head, tail) = covered.split_at(covered.len().min(4));
    let crc = crc32c::crc32c(head);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    !crc32c::crc32c_append(crc, tail.get(4..).unwrap_or_default())
}

/// `struct erofs_deviceslot`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSlot {
    /// Free text, often a digest.
    pub tag: [u8; 64],
    /// Blocks of the device, bits 0..32.
    pub blocks_lo: u32,
    /// Where the device lies in the flat form of the image, in blocks, bits 0..32.
    pub flat_lo: u32,
    /// Bits 32..48 of the blocks.
    pub blocks_hi: u16,
    /// Bits 32..48 of the place.
    pub flat_hi: u16,
    /// Zero.
    pub reserved: [u8; 52],
}

impl DeviceSlot {
    /// Reads the record.
    pub fn decode(raw: &[u8; DEVICE_SLOT_SIZE]) -> Self {
        let mut f = Fields(raw);
        Self {
            tag: f.bytes(),
            blocks_lo: f.u32(),
            flat_lo: f.u32(),
            blocks_hi: f.u16(),
            flat_hi: f.u16(),
            reserved: f.bytes(),
        }
    }

    /// Writes the record.
    pub fn encode(&self) -> [u8; DEVICE_SLOT_SIZE] {
        Record::new()
            .put(&self.tag)
            .u32(self.blocks_lo)
            .u32(self.flat_lo)
            .u16(self.blocks_hi)
            .u16(self.flat_hi)
            .put(&self.reserved)
            .done()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_takes_its_own_field_as_zero() {
        let mut covered = vec![7_u8; 64];
        let one = superblock_checksum(&covered);
        covered[4..8].copy_from_slice(&[9; 4]);
        assert_eq!(superblock_checksum(&covered), one);
        covered[8] = 0;
        assert_ne!(superblock_checksum(&covered), one);
        assert_eq!([9, 10, 11, 12, 16].map(checksummed_len), [512, 1024, 1024, 3072, 64512]);
    }
}
