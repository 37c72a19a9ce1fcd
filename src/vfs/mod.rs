//! File systems over EROFS layers: inode numbers, lookups, directories, reads.
//!
//! A [`Vfs`] is one image, its layers merged; a [`Forest`] holds many snapshots and layers, which come and go, behind
//! one root. What serves either knows them as a [`FileSystem`].
//!
//! Stateless. An inode number is a function of where a file lies ([`Numbers`]), opens are not known at all, and what is
//! cached (listings and parts of merged directories, within fixed bounds) can be made again. So a server may restart
//! under a live mount, and memory does not grow with the image.
//!
//! Nothing here waits. An operation that needs bytes that are not local fails with [`Error::Absent`], has changed
//! nothing, and is run again from its beginning when somebody has brought them ([`Bring`]).
//!
//! It refuses to know the FUSE protocol, errno, and where bytes come from.

mod cache;
mod directory;
mod error;
mod file;
mod forest;
mod layer;
mod numbers;
mod open;
mod raw;
mod served;
mod slots;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::model::{Attributes, FileKind, ReadAt, Xattr};
use crate::overlay::{Found, NodeId, Overlay};

use cache::Caches;
use file::File;
use numbers::{Numbering, Sort};

pub use directory::{Item, ItemKind};
pub use error::Error;
pub use forest::{Forest, ForestError, LayerSlot, SnapshotSlot};
pub use layer::Layer;
pub use numbers::{Numbers, ROOT_INO};
pub use open::{Bring, BringError, Done, OpenError, Purpose, open_layer, open_layers};
pub use served::{FileSystem, KernelCache, KernelMemory, Missing, TakeItem};

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// The inode number.
    pub ino: u64,
    /// Type, mode, owner, times, link count, size.
    pub attributes: Attributes,
    /// Bytes of a block of its layer's image: the preferred size of reads.
    pub block_size: u32,
    /// Size in units of 512 bytes, rounded up to whole blocks. Holes count, as in kernel EROFS.
    pub blocks: u64,
}

/// Size of the whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Bytes of all layer images together.
    pub bytes: u64,
    /// Inodes of all layers together, merged or not.
    pub files: u64,
}

/// Where [`Vfs::seek`] looks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seek {
    /// The next byte that is not in a hole.
    Data,
    /// The next byte that is in a hole; the end of the file counts as one.
    Hole,
}

/// A merged image.
#[derive(Debug)]
pub struct Vfs<R> {
    overlay: Overlay<Arc<Layer<R>>>,
    numbers: Numbering,
    caches: Mutex<Caches>,
    totals: Totals,
    may_show_xattrs: bool,
}

impl<R: ReadAt> Vfs<R> {
    /// The file system that `layers` (the lowest first) make.
    ///
    /// # Errors
    /// [`Error::LayerCount`].
    pub fn new(layers: Vec<Layer<R>>) -> Result<Self, Error> {
        let numbers = Numbering::Alone(Numbers::new(layers.len()));
        Self::of_shared(layers.into_iter().map(Arc::new).collect(), numbers)
    }

    /// The same of layers that others use as well.
    fn of_shared(layers: Vec<Arc<Layer<R>>>, numbers: Numbering) -> Result<Self, Error> {
        let overlay = Overlay::new(layers)?;
        let layers = overlay.layers();
        let totals = layers.iter().fold(Totals::default(), |sum, layer| Totals {
            bytes: sum.bytes.saturating_add(layer.size()),
            files: sum.files.saturating_add(layer.image().superblock().inodes()),
        });
        Ok(Self {
            numbers,
            caches: Mutex::default(),
            totals,
            may_show_xattrs: layers.iter().any(|layer| layer.may_show_xattrs()),
            overlay,
        })
    }

    /// The bytes of a layer's device (0 is the image itself), as [`Error::Absent`] names them.
    pub fn source(&self, layer: u16, device: u16) -> Option<&R> {
        self.overlay.layer(layer).ok()?.image().source(device)
    }

    /// Size of the whole.
    pub const fn totals(&self) -> Totals {
        self.totals
    }

    /// False promises that no file shows an extended attribute.
    pub const fn may_show_xattrs(&self) -> bool {
        self.may_show_xattrs
    }

    /// What `name` stands for in directory `parent`. `.` and `..` are no names.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn lookup(&self, parent: u64, name: &[u8]) -> Result<Option<Stat>, Error> {
        if crate::model::Name::check(name).is_err() {
            return Ok(None);
        }
        let parts = self.parts(parent)?;
        match self.overlay.lookup(&parts, name)? {
            Some(found) => Ok(Some(self.remember(&found)?)),
            None => Ok(None),
        }
    }

    /// What `stat` tells of a file.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn stat(&self, ino: u64) -> Result<Stat, Error> {
        if ino == self.numbers.root() {
            let root = self.overlay.root()?;
            return self.describe(ino, root.node, root.attributes);
        }
        let place = self.numbers.place(ino)?;
        let mut attributes = self.overlay.attributes(place.node)?;
        if place.merged {
            attributes.nlink = 1;
        }
        self.describe(ino, place.node, attributes)
    }

    /// The target of a symbolic link.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn read_link(&self, ino: u64) -> Result<Box<[u8]>, Error> {
        self.file(ino)?.read_link()
    }

    /// Reads a regular file's bytes from `offset` on into `buf`: how many it got; fewer only at the file's end.
    ///
    /// # Errors
    /// See [`Error`]; `buf` then holds anything.
    pub fn read(&self, ino: u64, offset: u64, buf: &mut [u8]) -> Result<usize, Error> {
        self.file(ino)?.read(offset, buf)
    }

    /// The next data or hole at or behind `offset`; none if there is nothing (also for an offset at or behind the end).
    ///
    /// # Errors
    /// See [`Error`].
    pub fn seek(&self, ino: u64, offset: u64, seek: Seek) -> Result<Option<u64>, Error> {
        self.file(ino)?.seek(offset, seek)
    }

    /// The extended attributes of a file.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn xattrs(&self, ino: u64) -> Result<Vec<Xattr>, Error> {
        if !self.may_show_xattrs {
            return Ok(Vec::new());
        }
        self.file(ino)?.xattrs()
    }

    /// The value of one extended attribute.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn xattr(&self, ino: u64, name: &[u8]) -> Result<Option<Box<[u8]>>, Error> {
        if !self.may_show_xattrs {
            return Ok(None);
        }
        self.file(ino)?.xattr(name)
    }

    fn file(&self, ino: u64) -> Result<File<'_, R>, Error> {
        let node = if ino == self.numbers.root() {
            self.overlay.root_parts().swap_remove(0)
        } else {
            self.numbers.place(ino)?.node
        };
        Ok(File { layer: self.overlay.layer(node.layer)?, node, ino })
    }

    /// All parts of directory `ino`, topmost first.
    fn parts(&self, ino: u64) -> Result<Arc<[NodeId]>, Error> {
        if ino == self.numbers.root() {
            return Ok(self.overlay.root_parts().into());
        }
        let place = self.numbers.place(ino)?;
        if !place.merged {
            return Ok(Arc::from([place.node]));
        }
        if let Some(parts) = self.caches().parts.get(&place.node) {
            return Ok(Arc::clone(parts));
        }
        let parts: Arc<[NodeId]> = self.overlay.parts(place.node)?.into();
        self.caches().parts.put(place.node, Arc::clone(&parts));
        Ok(parts)
    }

    /// What to tell of a file that was found; the parts of a merged directory are kept for what comes next.
    fn remember(&self, found: &Found) -> Result<Stat, Error> {
        if found.is_merged() {
            let mut caches = self.caches();
            if caches.parts.get(&found.node).is_none() {
                caches.parts.put(found.node, found.parts().into());
            }
        }
        let sort = match found.attributes.kind {
            FileKind::Directory => Sort::Directory { merged: found.is_merged() },
            _ => Sort::File,
        };
        let ino = self.numbers.ino(found.node, sort)?;
        self.describe(ino, found.node, found.attributes)
    }

    fn describe(&self, ino: u64, node: NodeId, attributes: Attributes) -> Result<Stat, Error> {
        Ok(File { layer: self.overlay.layer(node.layer)?, node, ino }.describe(attributes))
    }

    /// Caches hold nothing that a panic could leave half-made.
    fn caches(&self) -> MutexGuard<'_, Caches> {
        self.caches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
