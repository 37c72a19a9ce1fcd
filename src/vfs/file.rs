//! One file of one layer: what does not depend on the layers above and below it.

use super::{Error, Layer, Seek, Stat};
use crate::erofs::{ExtentSource, Inode, Nid};
use crate::model::{Attributes, ByteRange, FileKind, ReadAt, Xattr};
use crate::overlay::{NodeId, shown_xattr, shown_xattrs};

/// Most extents that one seek looks at: 256 MiB of a file whose every second 4 KiB block is a hole. Beyond, everything
/// counts as data, which is always a right answer.
const SEEK_EXTENTS: usize = 1 << 16;

/// A file, where it lies, and the inode number it was asked for by.
pub(super) struct File<'a, R> {
    pub(super) layer: &'a Layer<R>,
    pub(super) node: NodeId,
    pub(super) ino: u64,
}

impl<R: ReadAt> File<'_, R> {
    fn inode(&self) -> Result<Inode, Error> {
        self.layer.image().inode(Nid(self.node.nid)).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: crate::erofs::Error) -> Error {
        Error::of_layer(self.node.layer, source)
    }

    pub(super) fn stat(&self) -> Result<Stat, Error> {
        Ok(self.describe(*self.inode()?.attributes()))
    }

    pub(super) fn describe(&self, attributes: Attributes) -> Stat {
        let block_size = self.layer.image().superblock().block_size();
        let whole = attributes.size.div_ceil(block_size).saturating_mul(block_size);
        Stat { ino: self.ino, attributes, block_size: u32::try_from(block_size).unwrap_or(4096), blocks: whole / 512 }
    }

    pub(super) fn read_link(&self) -> Result<Box<[u8]>, Error> {
        let inode = self.inode()?;
        self.layer.image().read_link(&inode).map_err(|source| self.failed(source))
    }

    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<usize, Error> {
        let inode = self.inode()?;
        match inode.attributes().kind {
            FileKind::Regular => {}
            FileKind::Directory => return Err(Error::IsADirectory(self.ino)),
            _ => return Err(Error::NotRegular(self.ino)),
        }
        self.layer.image().read(&inode, offset, buf).map_err(|source| self.failed(source))
    }

    pub(super) fn seek(&self, offset: u64, seek: Seek) -> Result<Option<u64>, Error> {
        let inode = self.inode()?;
        let size = inode.attributes().size;
        let Ok(rest) = ByteRange::new(offset, size) else { return Ok(None) };
        if rest.is_empty() {
            return Ok(None);
        }
        for (count, extent) in self.layer.image().extents(&inode, rest).enumerate() {
            let extent = extent.map_err(|source| self.failed(source))?;
            let is_hole = extent.source == ExtentSource::Hole && count < SEEK_EXTENTS;
            if is_hole == (seek == Seek::Hole) {
                return Ok(Some(extent.file.start()));
            }
            if count >= SEEK_EXTENTS {
                break;
            }
        }
        Ok((seek == Seek::Hole).then_some(size))
    }

    pub(super) fn xattrs(&self) -> Result<Vec<Xattr>, Error> {
        if !self.layer.may_show_xattrs() {
            return Ok(Vec::new());
        }
        shown_xattrs(self.layer, self.node.nid).map_err(|source| self.failed(source))
    }

    pub(super) fn xattr(&self, name: &[u8]) -> Result<Option<Box<[u8]>>, Error> {
        if !self.layer.may_show_xattrs() {
            return Ok(None);
        }
        shown_xattr(self.layer, self.node.nid, name).map_err(|source| self.failed(source))
    }
}
