//! One layer of a forest as it is: nothing merged, nothing hidden.
//!
//! What overlayfs needs of a lower directory: whiteouts are character devices 0/0, and `trusted.overlay.*` attributes show
//! under the names they are stored by. Numbers are the layer's own, apart from those of merged trees: a file of the same
//! layer has other attributes there.

use std::ops::ControlFlow;

use super::directory::{self, DOTS};
use super::file::File;
use super::slots::raw_file;
use super::{Error, Item, ItemKind, Layer, Stat, TakeItem};
use crate::erofs::Nid;
use crate::model::{ReadAt, Xattr};
use crate::overlay::{LayerView as _, NodeId};

/// A layer and its slot.
pub(super) struct Raw<'a, R> {
    pub(super) layer: &'a Layer<R>,
    pub(super) slot: u32,
}

fn of_layer(source: crate::erofs::Error) -> Error {
    Error::of_layer(0, source)
}

impl<'a, R: ReadAt> Raw<'a, R> {
    fn ino(&self, nid: u64) -> Result<u64, Error> {
        raw_file(self.slot, nid).ok_or(Error::NumberTooLarge { layer: 0, nid })
    }

    pub(super) fn file(&self, nid: u64) -> Result<File<'a, R>, Error> {
        Ok(File { layer: self.layer, node: NodeId { layer: 0, nid }, ino: self.ino(nid)? })
    }

    pub(super) fn lookup(&self, dir: u64, name: &[u8]) -> Result<Option<Stat>, Error> {
        if crate::model::Name::check(name).is_err() {
            return Ok(None);
        }
        match self.layer.lookup(dir, name).map_err(of_layer)? {
            Some(nid) => Ok(Some(self.file(nid)?.stat()?)),
            None => Ok(None),
        }
    }

    pub(super) fn xattrs(&self, nid: u64) -> Result<Vec<Xattr>, Error> {
        self.layer.xattrs(nid).map_err(of_layer)
    }

    pub(super) fn xattr(&self, nid: u64, name: &[u8]) -> Result<Option<Box<[u8]>>, Error> {
        self.layer.xattr(nid, name).map_err(of_layer)
    }

    /// As [`super::Vfs::read_dir`].
    pub(super) fn read_dir(&self, dir: u64, offset: u64, take: &mut TakeItem<'_>) -> Result<(), Error> {
        let image = self.layer.image();
        let parent = image.inode(Nid(dir)).and_then(|inode| image.parent(&inode)).map_err(of_layer)?;
        for (index, name, nid) in [(0, &b"."[..], dir), (1, b"..", parent.0)] {
            let kind = ItemKind::Dot { ino: self.ino(nid)? };
            if offset <= index && take(Item { name, next_offset: index + 1, kind }).is_break() {
                return Ok(());
            }
        }
        let mut taken = offset < DOTS;
        let node = NodeId { layer: 0, nid: dir };
        let listed = directory::entries(self.layer, node, offset.saturating_sub(DOTS), &mut |entry, next| {
            let stat = match self.file(entry.nid.0)?.stat() {
                Err(absent @ Error::Absent { .. }) => return Err(absent),
                other => other,
            };
            let kind = match stat {
                Ok(stat) => ItemKind::File(stat),
                Err(error) => {
                    let kind = self.layer.kind(entry.nid, entry.kind).map_err(of_layer)?;
                    ItemKind::Broken { ino: self.ino(entry.nid.0)?, kind, error }
                }
            };
            taken = true;
            Ok(take(Item { name: entry.name.as_bytes(), next_offset: next + DOTS, kind }))
        });
        match listed {
            Err(_) if taken => Ok(()),
            Err(error) => Err(error),
            Ok(ControlFlow::Break(()) | ControlFlow::Continue(())) => Ok(()),
        }
    }
}
