//! What a connection serves, as the adapter of a protocol sees it.

use std::ops::ControlFlow;
use std::sync::Arc;

use super::{Bring, Done, Error, Item, Purpose, Seek, Stat, Totals, Vfs};
use crate::model::{ByteRange, Xattr};

/// Bytes that an operation lacks: what [`Error::Absent`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Missing {
    /// Index of the layer.
    pub layer: u16,
    /// Device of its image, 0 is the image itself.
    pub device: u16,
    /// Which bytes.
    pub range: ByteRange,
}

/// Takes an entry of a directory, or breaks if it has no room for it.
pub type TakeItem<'a> = dyn FnMut(Item<'_>) -> ControlFlow<()> + 'a;

/// What a kernel remembers of a file system that may change. No method waits.
pub trait KernelCache: Send + Sync {
    /// `name` in directory `dir` does not stand any more for what it stood for.
    fn name_changed(&self, dir: u64, name: &[u8]);

    /// Directory `dir` lists something else.
    fn listing_changed(&self, dir: u64);
}

/// What a kernel remembers when a connection begins to be served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelMemory {
    /// Nothing: it is a new connection.
    Blank,
    /// What another process told it, which nobody knows any more.
    Unknown,
}

/// Files under inode numbers. No method waits: what needs bytes that are not local fails with [`Error::Absent`], has
/// changed nothing, and is run again when [`FileSystem::bring`] has brought them. The root is [`super::ROOT_INO`].
///
/// The errors are those of [`Error`].
#[expect(clippy::missing_errors_doc, reason = "the trait's own words say it for all")]
pub trait FileSystem: Send + Sync + 'static {
    /// What `name` stands for in directory `parent`. What it answers counts as a reference: see [`FileSystem::forget`].
    fn lookup(&self, parent: u64, name: &[u8]) -> Result<Option<Stat>, Error>;

    /// What `stat` tells of a file.
    fn stat(&self, ino: u64) -> Result<Stat, Error>;

    /// The target of a symbolic link.
    fn read_link(&self, ino: u64) -> Result<Box<[u8]>, Error>;

    /// Reads a regular file's bytes from `offset` on into `buf`: how many it got; fewer only at the file's end.
    fn read(&self, ino: u64, offset: u64, buf: &mut [u8]) -> Result<usize, Error>;

    /// The next data or hole at or behind `offset`; none if there is nothing.
    fn seek(&self, ino: u64, offset: u64, seek: Seek) -> Result<Option<u64>, Error>;

    /// Hands the entries of directory `ino` behind `offset` (0 at first) to `take` until it breaks; see
    /// [`Vfs::read_dir`].
    fn read_dir(&self, ino: u64, offset: u64, take: &mut TakeItem<'_>) -> Result<(), Error>;

    /// The same for a listing that is a lookup of each entry that is taken.
    fn read_dir_plus(&self, ino: u64, offset: u64, take: &mut TakeItem<'_>) -> Result<(), Error> {
        self.read_dir(ino, offset, take)
    }

    /// The extended attributes of a file.
    fn xattrs(&self, ino: u64) -> Result<Vec<Xattr>, Error>;

    /// The value of one extended attribute.
    fn xattr(&self, ino: u64, name: &[u8]) -> Result<Option<Box<[u8]>>, Error>;

    /// The size of what `ino` belongs to.
    fn totals(&self, ino: u64) -> Totals;

    /// False promises that no file shows an extended attribute, and that none ever will.
    fn may_show_xattrs(&self) -> bool;

    /// True if names may come and go in directory `dir`: that one is missing is not to be remembered.
    fn may_change(&self, dir: u64) -> bool;

    /// Asks for bytes that an operation on `ino` lacked, and returns at once. `done` is dropped if there is nobody to ask.
    fn bring(&self, ino: u64, missing: Missing, purpose: Purpose, done: Done);

    /// The kernel has dropped `count` of the references to `ino` that lookups gave it.
    fn forget(&self, _ino: u64, _count: u64) {}

    /// From now on `cache` is told what changes. What an earlier connection of this process had looked up counts no more.
    fn connect(&self, _cache: Arc<dyn KernelCache>, _memory: KernelMemory) {}

    /// What the kernel remembers from another process is there again, as far as it ever will be.
    fn is_complete(&self) {}

    /// The layer that an operation on `ino` counts as `layer`, in a person's words, if that says more than the number.
    fn describe(&self, _ino: u64, _layer: u16) -> Option<String> {
        None
    }
}

impl<R: Bring> FileSystem for Vfs<R> {
    fn lookup(&self, parent: u64, name: &[u8]) -> Result<Option<Stat>, Error> {
        self.lookup(parent, name)
    }

    fn stat(&self, ino: u64) -> Result<Stat, Error> {
        self.stat(ino)
    }

    fn read_link(&self, ino: u64) -> Result<Box<[u8]>, Error> {
        self.read_link(ino)
    }

    fn read(&self, ino: u64, offset: u64, buf: &mut [u8]) -> Result<usize, Error> {
        self.read(ino, offset, buf)
    }

    fn seek(&self, ino: u64, offset: u64, seek: Seek) -> Result<Option<u64>, Error> {
        self.seek(ino, offset, seek)
    }

    fn read_dir(&self, ino: u64, offset: u64, take: &mut TakeItem<'_>) -> Result<(), Error> {
        self.read_dir(ino, offset, take)
    }

    fn xattrs(&self, ino: u64) -> Result<Vec<Xattr>, Error> {
        self.xattrs(ino)
    }

    fn xattr(&self, ino: u64, name: &[u8]) -> Result<Option<Box<[u8]>>, Error> {
        self.xattr(ino, name)
    }

    fn totals(&self, _ino: u64) -> Totals {
        self.totals()
    }

    fn may_show_xattrs(&self) -> bool {
        self.may_show_xattrs()
    }

    fn may_change(&self, _dir: u64) -> bool {
        false
    }

    fn bring(&self, _ino: u64, missing: Missing, purpose: Purpose, done: Done) {
        if let Some(source) = self.source(missing.layer, missing.device) {
            source.bring(missing.range, purpose, done);
        }
    }
}

impl<F: FileSystem> FileSystem for Arc<F> {
    fn lookup(&self, parent: u64, name: &[u8]) -> Result<Option<Stat>, Error> {
        (**self).lookup(parent, name)
    }

    fn stat(&self, ino: u64) -> Result<Stat, Error> {
        (**self).stat(ino)
    }

    fn read_link(&self, ino: u64) -> Result<Box<[u8]>, Error> {
        (**self).read_link(ino)
    }

    fn read(&self, ino: u64, offset: u64, buf: &mut [u8]) -> Result<usize, Error> {
        (**self).read(ino, offset, buf)
    }

    fn seek(&self, ino: u64, offset: u64, seek: Seek) -> Result<Option<u64>, Error> {
        (**self).seek(ino, offset, seek)
    }

    fn read_dir(&self, ino: u64, offset: u64, take: &mut TakeItem<'_>) -> Result<(), Error> {
        (**self).read_dir(ino, offset, take)
    }

    fn read_dir_plus(&self, ino: u64, offset: u64, take: &mut TakeItem<'_>) -> Result<(), Error> {
        (**self).read_dir_plus(ino, offset, take)
    }

    fn xattrs(&self, ino: u64) -> Result<Vec<Xattr>, Error> {
        (**self).xattrs(ino)
    }

    fn xattr(&self, ino: u64, name: &[u8]) -> Result<Option<Box<[u8]>>, Error> {
        (**self).xattr(ino, name)
    }

    fn totals(&self, ino: u64) -> Totals {
        (**self).totals(ino)
    }

    fn may_show_xattrs(&self) -> bool {
        (**self).may_show_xattrs()
    }

    fn may_change(&self, dir: u64) -> bool {
        (**self).may_change(dir)
    }

    fn bring(&self, ino: u64, missing: Missing, purpose: Purpose, done: Done) {
        (**self).bring(ino, missing, purpose, done);
    }

    fn forget(&self, ino: u64, count: u64) {
        (**self).forget(ino, count);
    }

    fn connect(&self, cache: Arc<dyn KernelCache>, memory: KernelMemory) {
        (**self).connect(cache, memory);
    }

    fn is_complete(&self) {
        (**self).is_complete();
    }

    fn describe(&self, ino: u64, layer: u16) -> Option<String> {
        (**self).describe(ino, layer)
    }
}
