//! Where a file's bytes lie, and the bytes themselves.

use super::inode::Data;
use super::ondisk::{BLOCK_MAP_ENTRY_SIZE, CHUNK_INDEX_SIZE, ChunkFormat, ChunkIndexEntry, NULL_BLOCK};
use super::{Defect, Error, Image, Inode};
use crate::model::{ByteRange, FileKind, ReadAt};

/// How many entries of a chunk table are read at once: with 8 bytes each, one page of the image. A 1 MiB read of
/// 4 KiB chunks needs 256 of them.
const TABLE_BATCH: u64 = 512;

/// Longest target of a symbolic link (Linux `PATH_MAX` without the final NUL).
const MAX_SYMLINK: u64 = 4095;

/// Where the bytes of an extent come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExtentSource {
    /// From nowhere: they are zeros.
    Hole,
    /// From a device.
    Data {
        /// 0 for the image itself, else a separate device counted from 1.
        device: u16,
        /// First byte.
        offset: u64,
    },
}

/// A run of a file's bytes that lie together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Which bytes of the file; never empty.
    pub file: ByteRange,
    /// Where they come from.
    pub source: ExtentSource,
}

impl Extent {
    /// Joins `next` to this extent if it continues it in the file and on the device.
    fn absorb(&mut self, next: Self) -> bool {
        let continues = match (self.source, next.source) {
            (ExtentSource::Hole, ExtentSource::Hole) => true,
            (ExtentSource::Data { device: a, offset: x }, ExtentSource::Data { device: b, offset: y }) => {
                a == b && x.checked_add(self.file.len()) == Some(y)
            }
            _ => false,
        };
        let together = self.file.end() == next.file.start() && continues;
        if together && let Ok(file) = ByteRange::new(self.file.start(), next.file.end()) {
            self.file = file;
        }
        together
    }
}

/// The extents of a range of a file, in order and without gaps. After an error it ends.
#[derive(Debug)]
pub struct Extents<'a, R> {
    image: &'a Image<R>,
    inode: Inode,
    /// Next byte of the file.
    next: u64,
    /// End of the range, at most the file's size.
    end: u64,
    /// Entries of the chunk table, raw, from chunk `batch_start` on.
    batch: Vec<u8>,
    batch_start: u64,
}

impl<R: ReadAt> Iterator for Extents<'_, R> {
    type Item = Result<Extent, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.next >= self.end {
            return None;
        }
        let mut extent = match self.piece(true) {
            Ok(piece) => piece.expect("the table may be read for the first piece"),
            Err(error) => {
                self.next = self.end;
                return Some(Err(error));
            }
        };
        self.next = extent.file.end();
        // Join what follows as far as the table is at hand: the work of one step stays bounded. An error shows itself
        // in the next step.
        while self.next < self.end
            && let Ok(Some(piece)) = self.piece(false)
            && extent.absorb(piece)
        {
            self.next = piece.file.end();
        }
        Some(Ok(extent))
    }
}

impl<R: ReadAt> Extents<'_, R> {
    /// The extent that begins at `next`; none if the chunk table would have to be read but may not.
    fn piece(&mut self, may_read: bool) -> Result<Option<Extent>, Error> {
        let (start, end, owned) = (self.next, self.end, self.inode);
        let inode = &owned;
        let overflow = || inode.corrupt(Defect::Overflow);
        let (until, source) = match inode.data {
            Data::None => return Ok(None),
            Data::Hole => (end, ExtentSource::Hole),
            Data::Plain { start: block } => (end, self.image.locate(inode, 0, block, start)?),
            Data::Inline { start: block } => {
                let block_size = self.image.superblock().block_size();
                let tail = inode.attributes.size.div_ceil(block_size).saturating_sub(1) * block_size;
                if start < tail {
                    (end.min(tail), self.image.locate(inode, 0, block, start)?)
                } else {
                    let offset = self.image.inline_position(inode, tail)?;
                    let offset = offset.checked_add(start - tail).ok_or_else(overflow)?;
                    (end, ExtentSource::Data { device: 0, offset })
                }
            }
            Data::Chunks(format) => {
                let shift = u32::from(self.image.superblock().block_bits()) + u32::from(format.chunk_bits());
                let chunk = start >> shift;
                if !self.batch_holds(format, chunk) {
                    if !may_read {
                        return Ok(None);
                    }
                    self.read_batch(format, chunk, (end - 1) >> shift)?;
                }
                let chunk_start = chunk << shift;
                let until = end.min(chunk_start.saturating_add(1 << shift));
                (until, self.chunk_source(format, chunk, start - chunk_start)?)
            }
            Data::Compressed => return Err(Error::Compressed { nid: inode.nid }),
        };
        let file = ByteRange::new(start, until).map_err(|_| inode.corrupt(Defect::Overflow))?;
        Ok(Some(Extent { file, source }))
    }

    fn batch_holds(&self, format: ChunkFormat, chunk: u64) -> bool {
        let held = (self.batch.len() / entry_size(format)) as u64;
        chunk >= self.batch_start && chunk - self.batch_start < held
    }

    /// Brings the table's entries from `first` on, `last` included if it is not too far.
    fn read_batch(&mut self, format: ChunkFormat, first: u64, last: u64) -> Result<(), Error> {
        let unit = entry_size(format) as u64;
        let count = (last - first).saturating_add(1).min(TABLE_BATCH);
        let overflow = || self.inode.corrupt(Defect::Overflow);
        let position = self
            .image
            .chunk_table(&self.inode, format)
            .zip(first.checked_mul(unit))
            .and_then(|((table, _), distance)| table.checked_add(distance))
            .ok_or_else(overflow)?;
        let len = usize::try_from(count * unit).map_err(|_| overflow())?;
        self.batch = self.image.read_vec(self.inode.place(), self.inode.position, position, len)?;
        self.batch_start = first;
        Ok(())
    }

    /// Where byte `within` of chunk `chunk` lies, whose entry is in the batch.
    fn chunk_source(&self, format: ChunkFormat, chunk: u64, within: u64) -> Result<ExtentSource, Error> {
        let size = entry_size(format);
        let entry = usize::try_from(chunk - self.batch_start)
            .ok()
            .and_then(|index| self.batch.get(index.checked_mul(size)?..)?.get(..size))
            .expect("the batch holds the chunk's entry");
        let (device, block, mask) = if let Some(entry) = entry.first_chunk::<CHUNK_INDEX_SIZE>() {
            let entry = ChunkIndexEntry::decode(entry);
            let mask: u64 = if format.is_wide() { (1 << 48) - 1 } else { u32::MAX.into() };
            let block = (u64::from(entry.start_hi) << 32 | u64::from(entry.start_lo)) & mask;
            (entry.device & self.image.device_mask(), block, mask)
        } else {
            let entry = entry.first_chunk::<BLOCK_MAP_ENTRY_SIZE>().expect("an entry has 4 bytes or 8");
            (0, u32::from_le_bytes(*entry).into(), u32::MAX.into())
        };
        if (block ^ NULL_BLOCK) & mask == 0 {
            return Ok(ExtentSource::Hole);
        }
        self.image.locate(&self.inode, device, block, within)
    }
}

/// Bytes of an entry of the chunk table.
const fn entry_size(format: ChunkFormat) -> usize {
    if format.has_indexes() { CHUNK_INDEX_SIZE } else { BLOCK_MAP_ENTRY_SIZE }
}

impl<R: ReadAt> Image<R> {
    /// Where the bytes of `range` of a file lie; what is behind the file's end is left out.
    pub fn extents(&self, inode: &Inode, range: ByteRange) -> Extents<'_, R> {
        let end = match inode.data {
            Data::None => 0,
            _ => range.end().min(inode.attributes.size),
        };
        Extents { image: self, inode: *inode, next: range.start(), end, batch: Vec::new(), batch_start: 0 }
    }

    /// Reads a file's bytes from `offset` on: as many as `buf` takes and the file has. Holes are zeros.
    ///
    /// # Errors
    /// See [`Error`]; `buf` then holds anything.
    pub fn read(&self, inode: &Inode, offset: u64, buf: &mut [u8]) -> Result<usize, Error> {
        let wanted = ByteRange::at(offset, buf.len() as u64)
            .or_else(|_| ByteRange::new(offset, u64::MAX))
            .expect("offset <= max");
        let mut filled = 0;
        for extent in self.extents(inode, wanted) {
            let extent = extent?;
            let len = usize::try_from(extent.file.len()).map_err(|_| inode.corrupt(Defect::Overflow))?;
            let target = buf.get_mut(filled..).and_then(|rest| rest.get_mut(..len));
            let target = target.expect("extents stay inside of the range that was asked for");
            match extent.source {
                ExtentSource::Hole => target.fill(0),
                ExtentSource::Data { device, offset } => self.read_device(inode, device, offset, target)?,
            }
            filled += len;
        }
        Ok(filled)
    }

    /// The target of a symbolic link, 1 to 4,095 bytes without NUL.
    ///
    /// # Errors
    /// [`Error::WrongKind`] if it is none; else see [`Error`].
    pub fn read_link(&self, inode: &Inode) -> Result<Box<[u8]>, Error> {
        let found = inode.attributes.kind;
        if found != FileKind::Symlink {
            return Err(Error::WrongKind { nid: inode.nid, wanted: "symbolic link", found });
        }
        let size = inode.attributes.size;
        if !(1..=MAX_SYMLINK).contains(&size) {
            return Err(inode.corrupt(Defect::SymlinkSize(size)));
        }
        let mut target = vec![0; usize::try_from(size).expect("4,095 fits")];
        self.read(inode, 0, &mut target)?;
        if target.contains(&0) {
            return Err(inode.corrupt(Defect::SymlinkNul));
        }
        Ok(target.into())
    }

    /// Where a chunk table starts, and how many bytes it has.
    pub(crate) fn chunk_table(&self, inode: &Inode, format: ChunkFormat) -> Option<(u64, u64)> {
        let unit = entry_size(format) as u64;
        let table = inode.tail_position()?.checked_next_multiple_of(unit)?;
        let shift = u32::from(self.superblock().block_bits()) + u32::from(format.chunk_bits());
        Some((table, inode.attributes.size.div_ceil(1 << shift).checked_mul(unit)?))
    }

    /// Where the tail that starts at file offset `tail` lies. It must not leave the block it starts in.
    fn inline_position(&self, inode: &Inode, tail: u64) -> Result<u64, Error> {
        let block = self.superblock().block_size();
        let position = inode.tail_position().ok_or_else(|| inode.corrupt(Defect::Overflow))?;
        if position % block + (inode.attributes.size - tail) > block {
            return Err(inode.corrupt(Defect::InlineCrossesBlock));
        }
        Ok(position)
    }

    /// The device bits of a chunk index that count.
    fn device_mask(&self) -> u16 {
        match self.superblock().extra_devices() {
            0 => 0,
            // All bits up to the highest that a device number has.
            count => u16::MAX >> count.leading_zeros(),
        }
    }

    /// Where byte `within` behind block `block` of `device` lies among the devices that were given.
    ///
    /// Device 0 is also the address space of the flat form: if devices were given on their own, an address in the part
    /// of one of them means that device. If they were not, they are parts of the primary one.
    fn locate(&self, inode: &Inode, device: u16, block: u64, within: u64) -> Result<ExtentSource, Error> {
        let overflow = || inode.corrupt(Defect::Overflow);
        let offset = self.block_position(block).and_then(|start| start.checked_add(within)).ok_or_else(overflow)?;
        if let Some(index) = device.checked_sub(1) {
            let slot = self.devices().get(usize::from(index)).ok_or_else(|| {
                inode.corrupt(Defect::NoSuchDevice { device, devices: self.superblock().extra_devices() })
            })?;
            if self.has_separate_devices() {
                return Ok(ExtentSource::Data { device, offset });
            }
            let start = self.block_position(slot.flat_start).ok_or_else(overflow)?;
            let offset = start.checked_add(offset).ok_or_else(overflow)?;
            if offset >= self.primary_size() {
                return Err(Error::DeviceMissing { nid: inode.nid, device });
            }
            return Ok(ExtentSource::Data { device: 0, offset });
        }
        if self.has_separate_devices() {
            for (slot, number) in self.devices().iter().zip(1_u16..) {
                let part = self.block_position(slot.flat_start).zip(self.block_position(slot.blocks));
                let Some((start, len)) = part.filter(|(start, _)| *start != 0) else { continue };
                if offset.checked_sub(start).is_some_and(|distance| distance < len) {
                    return Ok(ExtentSource::Data { device: number, offset: offset - start });
                }
            }
        }
        Ok(ExtentSource::Data { device: 0, offset })
    }
}
