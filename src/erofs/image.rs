//! An open image: its devices, and the way from a nid to an inode.
//!
//! Every operation is a function of the image's bytes: it keeps no state, and after [`Error::Absent`] it may be run
//! again from its beginning. Every operation is bounded on its own, whatever the bytes say; loops between directories
//! are the business of whoever walks them.

use super::inode::InodeRecord;
use super::ondisk::{
    COMPACT_SIZE, DEVICE_SLOT_SIZE, DeviceSlot, EXTENDED_SIZE, INODE_SLOT_BITS, InodeFormat, incompat,
};
use super::recent::SourceId;
use super::xattr::LongPrefix;
use super::{Defect, Error, Inode, Nid, Place, Superblock, ondisk, recent};
use crate::model::{ByteRange, ReadAt, ReadAtError};

/// Bytes of one device and how many they are.
#[derive(Debug)]
struct Source<R> {
    bytes: R,
    size: u64,
    id: SourceId,
}

impl<R: ReadAt> Source<R> {
    fn new(bytes: R) -> Self {
        let size = bytes.size();
        Self { bytes, size, id: SourceId::new() }
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
        recent::read(self.id, &self.bytes, self.size, offset, buf)
    }
}

/// A device besides the primary one, as the image's table describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// The tag up to its first NUL.
    pub tag: Box<[u8]>,
    /// Its size in blocks.
    pub blocks: u64,
    /// Its first block in the flat form of the image; 0 for none.
    pub flat_start: u64,
}

/// An EROFS image that can be read.
#[derive(Debug)]
pub struct Image<R> {
    primary: Source<R>,
    /// Empty if the image is in flat form: the devices lie inside of the primary one, one after the other.
    devices: Vec<Source<R>>,
    table: Vec<Device>,
    superblock: Superblock,
    pub(crate) prefixes: Vec<LongPrefix>,
}

impl<R: ReadAt> Image<R> {
    /// Opens an image that is complete in `source`: without further devices, or with their data at the places of the
    /// flat form.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn open(source: R) -> Result<Self, Error> {
        Self::open_with(source, None)
    }

    /// Opens an image together with all devices of its table, in the order of the table.
    ///
    /// # Errors
    /// [`Error::DeviceCount`] if they are not as many as the table has; else see [`Error`].
    pub fn open_with_devices(source: R, devices: Vec<R>) -> Result<Self, Error> {
        Self::open_with(source, Some(devices))
    }

    fn open_with(source: R, devices: Option<Vec<R>>) -> Result<Self, Error> {
        let primary = Source::new(source);
        let superblock = Superblock::read(&primary.bytes, primary.size)?;
        let expected = superblock.extra_devices();
        if let Some(devices) = &devices
            && devices.len() != usize::from(expected)
        {
            return Err(Error::DeviceCount { expected, given: devices.len() });
        }
        let devices = devices.unwrap_or_default().into_iter().map(Source::new).collect();
        let mut image = Self { primary, devices, table: Vec::new(), superblock, prefixes: Vec::new() };
        image.table = image.read_device_table()?;
        image.prefixes = image.read_long_prefixes()?;
        Ok(image)
    }

    fn read_device_table(&self) -> Result<Vec<Device>, Error> {
        let count = usize::from(self.superblock.extra_devices());
        if count == 0 {
            return Ok(Vec::new());
        }
        let start = u64::from(self.superblock.raw().device_slot) * DEVICE_SLOT_SIZE as u64;
        let table = self.read_vec(Place::Superblock, start, start, count * DEVICE_SLOT_SIZE)?;
        let wide = self.superblock.has_incompat(incompat::BITS_48);
        let join = |high: u16, low: u32| u64::from(if wide { high } else { 0 }) << 32 | u64::from(low);
        let (slots, _) = table.as_chunks::<DEVICE_SLOT_SIZE>();
        Ok(slots
            .iter()
            .map(|slot| {
                let slot = DeviceSlot::decode(slot);
                Device {
                    tag: slot.tag.split(|byte| *byte == 0).next().unwrap_or_default().into(),
                    blocks: join(slot.blocks_hi, slot.blocks_lo),
                    flat_start: join(slot.flat_hi, slot.flat_lo),
                }
            })
            .collect())
    }

    /// What the image says about itself.
    pub const fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The devices besides the primary one.
    pub fn devices(&self) -> &[Device] {
        &self.table
    }

    /// True if the bytes of every device were given on their own, false if they all lie in the primary one.
    pub const fn has_separate_devices(&self) -> bool {
        !self.devices.is_empty()
    }

    /// The bytes of the primary device (0) or of another one (from 1), if they were given on their own.
    pub fn source(&self, device: u16) -> Option<&R> {
        self.device_source(device).map(|source| &source.bytes)
    }

    /// The root directory.
    pub const fn root(&self) -> Nid {
        self.superblock.root()
    }

    /// The root directory's inode.
    ///
    /// # Errors
    /// [`Error::WrongKind`] if the image's root is no directory; else see [`Image::inode`].
    pub fn root_inode(&self) -> Result<Inode, Error> {
        let inode = self.inode(self.root())?;
        inode.expect_directory()?;
        Ok(inode)
    }

    /// Reads an inode.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn inode(&self, nid: Nid) -> Result<Inode, Error> {
        let place = Place::Inode(nid);
        if nid.0 & ondisk::NID_METABOX_BIT != 0 {
            return Err(Error::corrupt(place, 0, Defect::MetaboxNid(nid.0)));
        }
        let position = self
            .block_position(self.superblock.raw().meta_block.into())
            .zip(nid.0.checked_mul(1 << INODE_SLOT_BITS))
            .and_then(|(start, distance)| start.checked_add(distance))
            .ok_or_else(|| Error::corrupt(place, 0, Defect::Overflow))?;
        // Both kinds of inode in one read, without touching a block that a compact inode has nothing to do with.
        let block = self.superblock.block_size();
        let in_block = (block - position % block).min(self.primary.size.saturating_sub(position));
        let whole = in_block >= EXTENDED_SIZE as u64;
        let mut bytes = [0; EXTENDED_SIZE];
        let wanted = if whole { EXTENDED_SIZE } else { COMPACT_SIZE };
        self.read_primary(place, position, position, bytes.split_at_mut(wanted).0)?;
        let [low, high, ..] = bytes;
        let record = if InodeFormat(u16::from_le_bytes([low, high])).is_extended() {
            if !whole {
                self.read_primary(place, position, position, &mut bytes)?;
            }
            InodeRecord::Extended(bytes)
        } else {
            InodeRecord::Compact(*bytes.first_chunk().expect("64 bytes hold 32"))
        };
        Inode::decode(&self.superblock, nid, position, &record)
    }

    /// Bytes from the start of a device to its block `block`.
    pub(crate) fn block_position(&self, block: u64) -> Option<u64> {
        block.checked_mul(self.superblock.block_size())
    }

    /// Bytes of the primary device.
    pub(crate) const fn primary_size(&self) -> u64 {
        self.primary.size
    }

    /// Bytes of all devices that were given.
    pub(crate) fn total_size(&self) -> u64 {
        self.devices.iter().fold(self.primary.size, |sum, device| sum.saturating_add(device.size))
    }

    /// Bytes of the primary device (0) or of another one (from 1), if it was given on its own.
    pub(crate) fn device_size(&self, device: u16) -> Option<u64> {
        self.device_source(device).map(|source| source.size)
    }

    fn device_source(&self, device: u16) -> Option<&Source<R>> {
        match device.checked_sub(1) {
            None => Some(&self.primary),
            Some(index) => self.devices.get(usize::from(index)),
        }
    }

    /// Fills `buf` from the primary device. `origin` is where the structure lies that pointed at `offset`.
    pub(crate) fn read_primary(&self, place: Place, origin: u64, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        self.primary.read_exact_at(offset, buf).map_err(|source| Error::of_read(source, 0, place, origin))
    }

    /// Fills `buf` from a device.
    pub(crate) fn read_device(&self, inode: &Inode, device: u16, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        let source = self.device_source(device).ok_or(Error::DeviceMissing { nid: inode.nid, device })?;
        source
            .read_exact_at(offset, buf)
            .map_err(|source| Error::of_read(source, device, inode.place(), inode.position))
    }

    /// Reads `len` bytes of the primary device; allocates only if it has them.
    pub(crate) fn read_vec(&self, place: Place, origin: u64, offset: u64, len: usize) -> Result<Vec<u8>, Error> {
        let range = ByteRange::at(offset, len as u64).map_err(|_| Error::corrupt(place, origin, Defect::Overflow))?;
        if range.end() > self.primary.size {
            return Err(Error::corrupt(place, origin, Defect::OutOfBounds { range, size: self.primary.size }));
        }
        let mut bytes = vec![0; len];
        self.read_primary(place, origin, offset, &mut bytes)?;
        Ok(bytes)
    }
}
