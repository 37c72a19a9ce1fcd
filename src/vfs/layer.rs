//! One EROFS image as a layer of the merge.

use crate::erofs::{Error, Image, Nid};
use crate::model::{FileKind, ReadAt, Xattr};
use crate::overlay::{EachEntry, LayerView, Look};

/// An open layer.
#[derive(Debug)]
pub struct Layer<R> {
    image: Image<R>,
    /// Opaque marks and the like, which are not shown, do not count.
    may_show_xattrs: bool,
    size: u64,
}

impl<R: ReadAt> Layer<R> {
    /// The layer that `image` holds.
    pub fn new(image: Image<R>) -> Self {
        let devices = (0..).map_while(|device| image.source(device));
        let size = devices.fold(0_u64, |sum, device| sum.saturating_add(device.size()));
        Self { may_show_xattrs: !image.superblock().shows_no_xattrs(), image, size }
    }

    /// The image.
    pub const fn image(&self) -> &Image<R> {
        &self.image
    }

    /// False promises that no file of this layer shows an extended attribute.
    pub const fn may_show_xattrs(&self) -> bool {
        self.may_show_xattrs
    }

    /// Bytes of the image and its further devices.
    pub const fn size(&self) -> u64 {
        self.size
    }
}

impl<R: ReadAt> LayerView for Layer<R> {
    type Error = Error;

    fn root(&self) -> u64 {
        self.image.root().0
    }

    fn look(&self, nid: u64) -> Result<Look, Error> {
        let inode = self.image.inode(Nid(nid))?;
        Ok(Look { attributes: *inode.attributes(), has_xattrs: inode.has_xattrs() })
    }

    fn lookup(&self, dir: u64, name: &[u8]) -> Result<Option<u64>, Error> {
        let found = self.image.lookup(&self.image.inode(Nid(dir))?, name)?;
        Ok(found.map(|entry| entry.nid.0))
    }

    fn for_each(&self, dir: u64, each: &mut EachEntry<'_>) -> Result<(), Error> {
        let dir = self.image.inode(Nid(dir))?;
        let mut page = Some(0);
        while let Some(from) = page {
            let read = self.image.read_dir(&dir, from)?;
            for entry in &read.entries {
                let kind = self.kind(entry.nid, entry.kind)?;
                if each(entry.name.as_bytes(), entry.nid.0, kind).is_break() {
                    return Ok(());
                }
            }
            page = read.next;
        }
        Ok(())
    }

    fn parent(&self, dir: u64) -> Result<u64, Error> {
        Ok(self.image.parent(&self.image.inode(Nid(dir))?)?.0)
    }

    fn xattr(&self, nid: u64, name: &[u8]) -> Result<Option<Box<[u8]>>, Error> {
        self.image.xattr(&self.image.inode(Nid(nid))?, name)
    }

    fn xattrs(&self, nid: u64) -> Result<Vec<Xattr>, Error> {
        self.image.xattrs(&self.image.inode(Nid(nid))?)
    }
}

impl<R: ReadAt> Layer<R> {
    /// The type of a directory's entry, from the inode if the directory does not tell.
    pub(super) fn kind(&self, nid: Nid, listed: Option<FileKind>) -> Result<FileKind, Error> {
        match listed {
            Some(kind) => Ok(kind),
            None => self.image.inode(nid).map(|inode| inode.attributes().kind),
        }
    }
}
