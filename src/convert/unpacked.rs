//! Files that somebody else has unpacked into a directory, as a layer of the merge: what overlayfs takes for a lower directory.
//!
//! Guarantees: a file is read only when it is asked for, and nothing is looked at that is not in the directory: every name on
//! the way is one, and no link is followed. Whoever gives the directory knows that nobody writes there any more. Refuses to know
//! what marks mean: that is the merge's.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::DirEntryExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::model::Xattr;
use crate::overlay::{EachEntry, LayerView, Look};
use crate::sys::{FileError, look};

/// A directory. Files are called by their inodes.
#[derive(Debug)]
pub(super) struct Unpacked {
    root: u64,
    /// One name of each file that was come across.
    known: RefCell<HashMap<u64, PathBuf>>,
}

impl Unpacked {
    /// The layer that lies in `directory`.
    pub(super) fn open(directory: &Path) -> Result<Self, FileError> {
        let (_, id) = look::attributes(directory)?;
        let known = HashMap::from([(id.inode, directory.to_owned())]);
        Ok(Self { root: id.inode, known: RefCell::new(known) })
    }

    fn path(&self, nid: u64) -> Result<PathBuf, FileError> {
        let unknown =
            || FileError::of("find a name of", PathBuf::from(format!("inode {nid}")))(io::ErrorKind::NotFound.into());
        self.known.borrow().get(&nid).cloned().ok_or_else(unknown)
    }

    fn found(&self, nid: u64, path: PathBuf) -> u64 {
        self.known.borrow_mut().entry(nid).or_insert(path);
        nid
    }

    /// Where a symbolic link leads.
    pub(super) fn read_link(&self, nid: u64) -> Result<Vec<u8>, FileError> {
        let path = self.path(nid)?;
        fs::read_link(&path).map(|target| target.into_os_string().into_vec()).map_err(FileError::of("read", path))
    }

    /// A regular file, open.
    pub(super) fn read(&self, nid: u64) -> Result<File, FileError> {
        let path = self.path(nid)?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let open = rustix::fs::open(&path, flags, Mode::empty()).map_err(io::Error::from);
        open.map(File::from).map_err(FileError::of("open", path))
    }
}

impl LayerView for Unpacked {
    type Error = FileError;

    fn root(&self) -> u64 {
        self.root
    }

    fn look(&self, nid: u64) -> Result<Look, FileError> {
        let (attributes, _) = look::attributes(&self.path(nid)?)?;
        Ok(Look { attributes, has_xattrs: true })
    }

    fn lookup(&self, dir: u64, name: &[u8]) -> Result<Option<u64>, FileError> {
        let path = self.path(dir)?.join(OsStr::from_bytes(name));
        match look::attributes(&path) {
            Ok((_, id)) => Ok(Some(self.found(id.inode, path))),
            Err(error) if error.source.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn for_each(&self, dir: u64, each: &mut EachEntry<'_>) -> Result<(), FileError> {
        let path = self.path(dir)?;
        for entry in fs::read_dir(&path).map_err(FileError::of("list", &path))? {
            let entry = entry.map_err(FileError::of("list", &path))?;
            let name = entry.file_name();
            let inside = path.join(&name);
            let kind = look::kind_of(entry.file_type().map_err(FileError::of("look at", &inside))?);
            if each(name.as_bytes(), self.found(entry.ino(), inside), kind).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn parent(&self, dir: u64) -> Result<u64, FileError> {
        if dir == self.root {
            return Ok(dir);
        }
        let path = self.path(dir)?;
        let above = path.parent().unwrap_or(&path);
        let (_, id) = look::attributes(above)?;
        Ok(self.found(id.inode, above.to_owned()))
    }

    fn xattr(&self, nid: u64, name: &[u8]) -> Result<Option<Box<[u8]>>, FileError> {
        let found = self.xattrs(nid)?.into_iter().find(|xattr| *xattr.name == *name);
        Ok(found.map(|xattr| xattr.value))
    }

    fn xattrs(&self, nid: u64) -> Result<Vec<Xattr>, FileError> {
        look::xattrs(&self.path(nid)?)
    }
}
