//! Extended attributes: beside the inode, shared between inodes, and the long prefixes of their names.

use std::ops::ControlFlow;

use super::ondisk::{
    self, XATTR_ALIGN, XATTR_ENTRY_SIZE, XATTR_HEADER_SIZE, XATTR_LONG_PREFIX, XattrEntry, XattrHeader, compat,
};
use super::{Defect, Error, Image, Inode, Place};
use crate::model::{ByteRange, ReadAt, Xattr};

/// Longest full name (Linux `XATTR_NAME_MAX`).
const MAX_NAME: usize = 255;

/// How much of a shared attribute is read at first: enough for nearly all (capabilities, SELinux labels), inside of
/// one block.
const SHARED_GUESS: u64 = 256;

/// A name prefix that the image defines: a short one, and what follows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LongPrefix {
    pub(crate) base: u8,
    pub(crate) infix: Box<[u8]>,
}

/// What a visitor wants after each attribute: to see more, or no more.
type Visit = ControlFlow<()>;

/// Sees full names and values.
type Visitor<'a> = dyn FnMut(&[u8], &[u8]) -> Visit + 'a;

/// The bytes between an inode and its tail: a header, the ids of shared attributes, and entries.
pub(crate) struct XattrArea {
    header: XattrHeader,
    bytes: Vec<u8>,
    /// Where the entries begin; inside of `bytes`.
    entries: usize,
}

impl XattrArea {
    /// The ids of the shared attributes.
    pub(crate) fn shared_ids(&self) -> impl Iterator<Item = u32> {
        let ids = self.bytes.get(XATTR_HEADER_SIZE..self.entries).unwrap_or_default();
        ids.as_chunks::<4>().0.iter().map(|id| u32::from_le_bytes(*id))
    }
}

impl<R: ReadAt> Image<R> {
    /// All extended attributes of an inode, sorted by name, no name twice. Those whose prefix the format does not
    /// define are left out, as the kernel leaves them out.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn xattrs(&self, inode: &Inode) -> Result<Vec<Xattr>, Error> {
        let mut found = Vec::new();
        self.visit_xattrs(inode, None, &mut |name, value| {
            found.push(Xattr { name: name.into(), value: value.into() });
            ControlFlow::Continue(())
        })?;
        // Stable: of two with one name the first is kept, which is the one that a search by name finds.
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found.dedup_by(|later, earlier| later.name == earlier.name);
        Ok(found)
    }

    /// The value of one extended attribute. Costs no read if the inode has none, and one if the name filter knows
    /// that this one is not there.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn xattr(&self, inode: &Inode, name: &[u8]) -> Result<Option<Box<[u8]>>, Error> {
        let Some((index, rest)) = ondisk::split_xattr_name(name) else { return Ok(None) };
        let mut found = None;
        self.visit_xattrs(inode, Some(ondisk::xattr_filter_bit(index, rest)), &mut |candidate, value| {
            if candidate != name {
                return ControlFlow::Continue(());
            }
            found = Some(value.into());
            ControlFlow::Break(())
        })?;
        Ok(found)
    }

    /// Shows every attribute to `visit`: first those beside the inode, then the shared ones. With `filter_bit`, none
    /// if the inode's name filter says that nothing with this hash is there.
    fn visit_xattrs(&self, inode: &Inode, filter_bit: Option<u32>, visit: &mut Visitor<'_>) -> Result<(), Error> {
        let Some(area) = self.xattr_area(inode)? else { return Ok(()) };
        if let Some(bit) = filter_bit
            && self.superblock().has_xattr_filter()
            && area.header.name_filter & (1 << bit) != 0
        {
            return Ok(());
        }
        if self.visit_inline_xattrs(inode, &area, visit)?.is_break() {
            return Ok(());
        }
        for id in area.shared_ids() {
            if self.visit_shared_xattr(inode, id, visit)?.0.is_break() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// The attribute area behind an inode, if it has one.
    pub(crate) fn xattr_area(&self, inode: &Inode) -> Result<Option<XattrArea>, Error> {
        if !inode.has_xattrs() {
            return Ok(None);
        }
        let overrun = || inode.corrupt(Defect::XattrOverrun);
        let position = inode.xattr_position().ok_or_else(|| inode.corrupt(Defect::Overflow))?;
        let size = usize::try_from(inode.xattr_size).map_err(|_| overrun())?;
        let bytes = self.read_vec(inode.place(), inode.position, position, size)?;
        let header = bytes.first_chunk().map(XattrHeader::decode).ok_or_else(overrun)?;
        let entries = XATTR_HEADER_SIZE + usize::from(header.shared_count) * 4;
        if entries > bytes.len() {
            return Err(overrun());
        }
        Ok(Some(XattrArea { header, bytes, entries }))
    }

    /// Shows the attributes beside the inode.
    pub(crate) fn visit_inline_xattrs(
        &self,
        inode: &Inode,
        area: &XattrArea,
        visit: &mut Visitor<'_>,
    ) -> Result<Visit, Error> {
        let overrun = || inode.corrupt(Defect::XattrOverrun);
        let mut rest = area.bytes.get(area.entries..).unwrap_or_default();
        while !rest.is_empty() {
            let (entry, after) = rest.split_first_chunk::<XATTR_ENTRY_SIZE>().ok_or_else(overrun)?;
            let entry = XattrEntry::decode(entry);
            let (name, value) = entry_parts(entry, after).ok_or_else(overrun)?;
            if self.show(inode, entry, name, value, visit)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
            rest = rest.get(entry.padded_len()..).ok_or_else(overrun)?;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Shows one shared attribute, and tells where it lies.
    pub(crate) fn visit_shared_xattr(
        &self,
        inode: &Inode,
        id: u32,
        visit: &mut Visitor<'_>,
    ) -> Result<(Visit, ByteRange), Error> {
        let overrun = || inode.corrupt(Defect::XattrOverrun);
        let position = self
            .block_position(self.superblock().raw().xattr_block.into())
            .and_then(|start| start.checked_add(u64::from(id) * XATTR_ALIGN))
            .ok_or_else(|| inode.corrupt(Defect::Overflow))?;
        let bytes = self.read_shared(inode, position)?;
        let (entry, after) = bytes.split_first_chunk::<XATTR_ENTRY_SIZE>().ok_or_else(overrun)?;
        let entry = XattrEntry::decode(entry);
        let (name, value) = entry_parts(entry, after).ok_or_else(overrun)?;
        let len = XATTR_ENTRY_SIZE + name.len() + value.len();
        let range = ByteRange::at(position, len as u64).map_err(|_| overrun())?;
        Ok((self.show(inode, entry, name, value, visit)?, range))
    }

    /// Completes the name of an attribute and shows it, unless its prefix means nothing.
    fn show(
        &self,
        inode: &Inode,
        entry: XattrEntry,
        rest: &[u8],
        value: &[u8],
        visit: &mut Visitor<'_>,
    ) -> Result<Visit, Error> {
        let (base, infix) = if entry.name_index & XATTR_LONG_PREFIX == 0 {
            (entry.name_index, &[][..])
        } else {
            match self.prefixes.get(usize::from(entry.name_index & !XATTR_LONG_PREFIX)) {
                Some(long) => (long.base, &*long.infix),
                None => return Ok(ControlFlow::Continue(())),
            }
        };
        let Some(prefix) = ondisk::visible_xattr_prefix(base) else { return Ok(ControlFlow::Continue(())) };
        let name = [prefix, infix, rest].concat();
        if name.len() > MAX_NAME || name.contains(&0) {
            return Err(inode.corrupt(Defect::XattrName(String::from_utf8_lossy(&name).into_owned())));
        }
        Ok(visit(&name, value))
    }

    /// The entry of a shared attribute at `position` with its name and value.
    fn read_shared(&self, inode: &Inode, position: u64) -> Result<Vec<u8>, Error> {
        let block = self.superblock().block_size();
        let at_hand = (block - position % block).min(self.primary_size().saturating_sub(position)).min(SHARED_GUESS);
        let guess = usize::try_from(at_hand).unwrap_or(0).max(XATTR_ENTRY_SIZE);
        let mut bytes = self.read_vec(inode.place(), inode.position, position, guess)?;
        let entry = bytes.first_chunk().map(XattrEntry::decode).ok_or_else(|| inode.corrupt(Defect::XattrOverrun))?;
        let len = XATTR_ENTRY_SIZE + usize::from(entry.name_len) + usize::from(entry.value_len);
        if len > bytes.len() {
            bytes = self.read_vec(inode.place(), inode.position, position, len)?;
        }
        Ok(bytes)
    }

    /// The long prefixes of the image: in the packed inode, or in the image itself.
    pub(crate) fn read_long_prefixes(&self) -> Result<Vec<LongPrefix>, Error> {
        let raw = self.superblock().raw();
        let packed = match self.superblock().packed_inode() {
            Some(nid) if raw.xattr_prefix_count > 0 && !self.superblock().has_compat(compat::PLAIN_XATTR_PFX) => {
                Some(self.inode(nid)?)
            }
            _ => None,
        };
        let start = u64::from(raw.xattr_prefix_start) * XATTR_ALIGN;
        let read = |offset: u64, buf: &mut [u8]| match &packed {
            None => self.read_primary(Place::Superblock, start, offset, buf),
            Some(inode) => {
                let len = self.read(inode, offset, buf)?;
                if len == buf.len() { Ok(()) } else { Err(inode.corrupt(Defect::XattrOverrun)) }
            }
        };
        let mut position = start;
        let mut prefixes = Vec::new();
        for _ in 0..raw.xattr_prefix_count {
            let mut len = [0; 2];
            read(position, &mut len)?;
            let len = u16::from_le_bytes(len);
            if !(1..=256).contains(&len) {
                return Err(Error::corrupt(Place::Superblock, position, Defect::PrefixLength(len)));
            }
            let mut bytes = vec![0; usize::from(len)];
            read(position + 2, &mut bytes)?;
            let (base, infix) = bytes.split_first().expect("its length was checked");
            prefixes.push(LongPrefix { base: *base, infix: infix.into() });
            position = (position + 2 + u64::from(len)).next_multiple_of(XATTR_ALIGN);
        }
        Ok(prefixes)
    }
}

/// Name and value of an entry, which lie at the start of `after`.
fn entry_parts(entry: XattrEntry, after: &[u8]) -> Option<(&[u8], &[u8])> {
    let (name, after) = after.split_at_checked(entry.name_len.into())?;
    Some((name, after.get(..entry.value_len.into())?))
}
