//! Listing directories.
//!
//! The offset of an entry is where to go on behind it, and stays valid for ever: a directory never changes. A directory
//! that only one layer has is read from the image's blocks as it is asked for; one that is merged is merged once and
//! its listing kept for the requests that follow.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::numbers::Sort;
use super::{Error, Layer, Stat, Vfs};
use crate::erofs::{DirEntry, Nid};
use crate::model::{FileKind, ReadAt};
use crate::overlay::{Entry, Listing, NodeId};

/// Offsets 0 to 2 belong to `.`, `..` and the first real entry.
pub(super) const DOTS: u64 = 2;

/// Bits of an offset that count the entries of one directory block: 64 KiB hold 5,041 entries at most (12 bytes and a
/// name of one byte each).
const SLOT_BITS: u32 = 13;

/// One entry of a directory.
#[derive(Debug)]
pub struct Item<'a> {
    /// Its name.
    pub name: &'a [u8],
    /// Where the listing goes on behind it.
    pub next_offset: u64,
    /// What it is.
    pub kind: ItemKind,
}

/// What an entry is.
#[derive(Debug)]
pub enum ItemKind {
    /// The directory itself or the one that holds it: not to be looked up.
    Dot {
        /// Its inode number; for `..` of a merged directory that of one of its parts.
        ino: u64,
    },
    /// A file.
    File(Stat),
    /// A name whose file cannot be read. It is listed, and any use of it fails in the same way.
    Broken {
        /// An inode number that leads to the failure again.
        ino: u64,
        /// The type as the directory tells it.
        kind: FileKind,
        /// Why.
        error: Error,
    },
}

impl<R: ReadAt> Vfs<R> {
    /// Hands the entries of directory `ino` behind `offset` (0 at first) to `take` until it breaks.
    ///
    /// If bytes are absent, what lies before them is handed out and that is a success; the next call, from the last
    /// offset on, then has nothing to hand out.
    ///
    /// # Errors
    /// See [`Error`]. Nothing has been handed out then.
    pub fn read_dir(
        &self,
        ino: u64,
        offset: u64,
        take: &mut dyn FnMut(Item<'_>) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        let parts = self.parts(ino)?;
        let mut taken = false;
        let mut take = |item: Item<'_>| {
            taken = true;
            take(item)
        };
        let flow = match self.dots(ino, &parts, offset, &mut take)? {
            ControlFlow::Break(()) => return Ok(()),
            ControlFlow::Continue(()) => {
                let position = offset.saturating_sub(DOTS);
                match &*parts {
                    [single] => self.single(*single, position, &mut take),
                    _ => self.merged(&parts, position, &mut take),
                }
            }
        };
        match flow {
            Err(_) if taken => Ok(()),
            other => other.map(drop),
        }
    }

    /// `.` and `..`.
    fn dots(
        &self,
        ino: u64,
        parts: &[NodeId],
        offset: u64,
        take: &mut dyn FnMut(Item<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, Error> {
        if offset >= DOTS {
            return Ok(ControlFlow::Continue(()));
        }
        // Fails before anything is handed out if it is no directory.
        let parent = self.parent_ino(parts)?;
        for (index, name, ino) in [(0, &b"."[..], ino), (1, b"..", parent)] {
            if offset <= index && take(Item { name, next_offset: index + 1, kind: ItemKind::Dot { ino } }).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// The number of the directory that holds the one with these parts, as the topmost part's layer knows it.
    fn parent_ino(&self, parts: &[NodeId]) -> Result<u64, Error> {
        let Some(&top) = parts.first() else { return Ok(self.numbers.root()) };
        let image = self.overlay.layer(top.layer)?.image();
        let parent = image
            .inode(Nid(top.nid))
            .and_then(|directory| image.parent(&directory))
            .map_err(|source| Error::of_layer(top.layer, source))?;
        if parent == image.root() {
            return Ok(self.numbers.root());
        }
        let sort = Sort::Directory { merged: parts.len() > 1 };
        self.numbers.ino(NodeId { layer: top.layer, nid: parent.0 }, sort)
    }

    /// A directory that only one layer has. A position is a block and an entry of it.
    fn single(
        &self,
        dir: NodeId,
        position: u64,
        take: &mut dyn FnMut(Item<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, Error> {
        let layer = self.overlay.layer(dir.layer)?;
        entries(layer, dir, position, &mut |listed, next| {
            let kind = layer.kind(listed.nid, listed.kind).map_err(|source| Error::of_layer(dir.layer, source))?;
            let node = NodeId { layer: dir.layer, nid: listed.nid.0 };
            let entry = Entry { name: listed.name.as_bytes(), node, kind, shared: false };
            self.hand_out(&[dir], &entry, next, take)
        })
    }

    /// A merged directory. A position counts the candidates of its listing.
    fn merged(
        &self,
        parts: &[NodeId],
        position: u64,
        take: &mut dyn FnMut(Item<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, Error> {
        let listing = self.listing(parts)?;
        let mut index = usize::try_from(position).unwrap_or(usize::MAX);
        while let Some(entry) = listing.get(index) {
            index += 1;
            if self.hand_out(parts, &entry, index as u64, take)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn listing(&self, parts: &[NodeId]) -> Result<Arc<Listing>, Error> {
        let Some(&top) = parts.first() else { return Ok(Arc::default()) };
        if let Some(listing) = self.caches().listing(top) {
            return Ok(listing);
        }
        let listing = Arc::new(self.overlay.list(parts)?);
        self.caches().keep_listing(top, Arc::clone(&listing));
        Ok(listing)
    }

    /// Hands out one entry, unless it is a whiteout. `next` is the position behind it.
    fn hand_out(
        &self,
        parts: &[NodeId],
        entry: &Entry<'_>,
        next: u64,
        take: &mut dyn FnMut(Item<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, Error> {
        let kind = match self.overlay.entry(parts, entry).map_err(Error::from) {
            Ok(None) => return Ok(ControlFlow::Continue(())),
            Ok(Some(found)) => ItemKind::File(self.remember(&found)?),
            Err(absent @ Error::Absent { .. }) => return Err(absent),
            Err(error) => {
                let sort = match entry.kind {
                    FileKind::Directory => Sort::Directory { merged: false },
                    _ => Sort::File,
                };
                let ino = self.numbers.ino(entry.node, sort).unwrap_or(u64::MAX);
                ItemKind::Broken { ino, kind: entry.kind, error }
            }
        };
        Ok(take(Item { name: entry.name, next_offset: next + DOTS, kind }))
    }
}

/// Takes an entry of a directory and the position behind it.
type TakeEntry<'a> = dyn FnMut(&DirEntry, u64) -> Result<ControlFlow<()>, Error> + 'a;

/// Hands the entries of a directory of one layer behind `position` (a block and an entry of it), with the position behind
/// each, to `each` until it breaks.
pub(super) fn entries<R: ReadAt>(
    layer: &Layer<R>,
    dir: NodeId,
    position: u64,
    each: &mut TakeEntry<'_>,
) -> Result<ControlFlow<()>, Error> {
    let of_layer = |source| Error::of_layer(dir.layer, source);
    let inode = layer.image().inode(Nid(dir.nid)).map_err(of_layer)?;
    let mut slot = usize::try_from(position & ((1 << SLOT_BITS) - 1)).unwrap_or(usize::MAX);
    let mut page = Some(position >> SLOT_BITS);
    while let Some(block) = page {
        let read = layer.image().read_dir(&inode, block).map_err(of_layer)?;
        for (index, listed) in read.entries.iter().enumerate().skip(slot) {
            if each(listed, (block << SLOT_BITS) + index as u64 + 1)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        slot = 0;
        page = read.next;
    }
    Ok(ControlFlow::Continue(()))
}
