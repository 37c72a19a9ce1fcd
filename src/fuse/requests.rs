//! One kind of request each: what it asks the file system, and how the answer is put.
//!
//! A request can be attempted any number of times: an attempt either uses the reply up or gives it back with the reason
//! why not.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::ops::ControlFlow;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use fuser::{
    Errno, Generation, INodeNo, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEntry, ReplyLseek,
    ReplyXattr,
};

use super::attr::{FOREVER, attr, file_type, unknown};
use super::counters::Kind;
use super::errno::Failure;
use crate::model::FileKind;
use crate::vfs::{FileSystem, ItemKind, Purpose, Seek};

/// Inode numbers are never used for another file.
const GENERATION: Generation = Generation(0);

/// A reply that can be a refusal.
pub(super) trait Refuse: Send + 'static {
    fn refuse(self, errno: Errno);
}

macro_rules! refuse {
    ($($reply:ty),*) => {
        $(impl Refuse for $reply {
            fn refuse(self, errno: Errno) {
                self.error(errno);
            }
        })*
    };
}
refuse!(ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEntry, ReplyLseek, ReplyXattr);

/// A request of the kernel.
pub(super) trait Request: Send + 'static {
    type Reply: Refuse;
    /// Its name in the log.
    const NAME: &'static str;
    /// As what it is counted.
    const KIND: Kind;
    /// What it wants bytes for.
    const PURPOSE: Purpose = Purpose::Metadata;

    /// The file it is about.
    fn ino(&self) -> u64;

    /// Answers, or gives the reply back.
    fn attempt<F: FileSystem>(&self, fs: &F, reply: Self::Reply) -> Result<(), (Self::Reply, Failure)>;
}

/// Splits a result: the value to answer with, or the reply back with the failure.
macro_rules! answer {
    ($reply:ident, $result:expr) => {
        match $result {
            Ok(value) => value,
            Err(error) => return Err(($reply, Failure::from(error))),
        }
    };
}

pub(super) struct Lookup {
    pub(super) parent: u64,
    pub(super) name: Box<[u8]>,
}

impl Request for Lookup {
    type Reply = ReplyEntry;
    const NAME: &'static str = "lookup";
    const KIND: Kind = Kind::Lookup;

    fn ino(&self) -> u64 {
        self.parent
    }

    fn attempt<F: FileSystem>(&self, fs: &F, reply: ReplyEntry) -> Result<(), (ReplyEntry, Failure)> {
        let found = answer!(reply, fs.lookup(self.parent, &self.name));
        if found.is_none() && fs.may_change(self.parent) {
            return Err((reply, Failure::NoName));
        }
        // Inode 0 says that there is none, and that the kernel may remember it.
        let attr = found.map_or(unknown(0, FileKind::Regular), |stat| attr(&stat));
        reply.entry(&FOREVER, &attr, GENERATION);
        Ok(())
    }
}

pub(super) struct GetAttr {
    pub(super) ino: u64,
}

impl Request for GetAttr {
    type Reply = ReplyAttr;
    const NAME: &'static str = "getattr";
    const KIND: Kind = Kind::GetAttr;

    fn ino(&self) -> u64 {
        self.ino
    }

    fn attempt<F: FileSystem>(&self, fs: &F, reply: ReplyAttr) -> Result<(), (ReplyAttr, Failure)> {
        let stat = answer!(reply, fs.stat(self.ino));
        reply.attr(&FOREVER, &attr(&stat));
        Ok(())
    }
}

pub(super) struct ReadLink {
    pub(super) ino: u64,
}

impl Request for ReadLink {
    type Reply = ReplyData;
    const NAME: &'static str = "readlink";
    const KIND: Kind = Kind::ReadLink;

    fn ino(&self) -> u64 {
        self.ino
    }

    fn attempt<F: FileSystem>(&self, fs: &F, reply: ReplyData) -> Result<(), (ReplyData, Failure)> {
        let target = answer!(reply, fs.read_link(self.ino));
        reply.data(&target);
        Ok(())
    }
}

pub(super) struct Read {
    pub(super) ino: u64,
    pub(super) offset: u64,
    pub(super) size: usize,
}

thread_local! {
    /// Where bytes stay between the file and the kernel. Grows to the largest read, 1 MiB, and is then used again.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Request for Read {
    type Reply = ReplyData;
    const NAME: &'static str = "read";
    const KIND: Kind = Kind::Read;
    const PURPOSE: Purpose = Purpose::Read;

    fn ino(&self) -> u64 {
        self.ino
    }

    fn attempt<F: FileSystem>(&self, fs: &F, reply: ReplyData) -> Result<(), (ReplyData, Failure)> {
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < self.size {
                buffer.resize(self.size, 0);
            }
            let (buffer, _) = buffer.split_at_mut(self.size);
            let len = answer!(reply, fs.read(self.ino, self.offset, buffer));
            reply.data(buffer.get(..len).unwrap_or_default());
            Ok(())
        })
    }
}

pub(super) struct ReadDir {
    pub(super) ino: u64,
    pub(super) offset: u64,
}

impl Request for ReadDir {
    type Reply = ReplyDirectory;
    const NAME: &'static str = "readdir";
    const KIND: Kind = Kind::ReadDir;

    fn ino(&self) -> u64 {
        self.ino
    }

    fn attempt<F: FileSystem>(&self, fs: &F, mut reply: ReplyDirectory) -> Result<(), (ReplyDirectory, Failure)> {
        let listed = fs.read_dir(self.ino, self.offset, &mut |item| {
            let (ino, kind) = match item.kind {
                ItemKind::Dot { ino } => (ino, FileKind::Directory),
                ItemKind::File(stat) => (stat.ino, stat.attributes.kind),
                ItemKind::Broken { ino, kind, .. } => (ino, kind),
            };
            flow(reply.add(INodeNo(ino), item.next_offset, file_type(kind), OsStr::from_bytes(item.name)))
        });
        answer!(reply, listed);
        reply.ok();
        Ok(())
    }
}

/// A listing with attributes: saves the kernel a lookup for each name.
pub(super) struct ReadDirPlus {
    pub(super) ino: u64,
    pub(super) offset: u64,
}

impl Request for ReadDirPlus {
    type Reply = ReplyDirectoryPlus;
    const NAME: &'static str = "readdirplus";
    const KIND: Kind = Kind::ReadDir;

    fn ino(&self) -> u64 {
        self.ino
    }

    fn attempt<F: FileSystem>(
        &self,
        fs: &F,
        mut reply: ReplyDirectoryPlus,
    ) -> Result<(), (ReplyDirectoryPlus, Failure)> {
        let listed = fs.read_dir_plus(self.ino, self.offset, &mut |item| {
            let (attr, valid) = match item.kind {
                ItemKind::Dot { ino } => (unknown(ino, FileKind::Directory), FOREVER),
                ItemKind::File(stat) => (attr(&stat), FOREVER),
                // Believed for no time at all: whoever uses the name asks again and is told what is wrong.
                ItemKind::Broken { ino, kind, .. } => (unknown(ino, kind), Duration::ZERO),
            };
            let name = OsStr::from_bytes(item.name);
            flow(reply.add(attr.ino, item.next_offset, name, &valid, &attr, GENERATION))
        });
        answer!(reply, listed);
        reply.ok();
        Ok(())
    }
}

const fn flow(is_full: bool) -> ControlFlow<()> {
    if is_full { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
}

pub(super) struct GetXattr {
    pub(super) ino: u64,
    pub(super) name: Box<[u8]>,
    pub(super) size: u32,
}

impl Request for GetXattr {
    type Reply = ReplyXattr;
    const NAME: &'static str = "getxattr";
    const KIND: Kind = Kind::Xattr;

    fn ino(&self) -> u64 {
        self.ino
    }

    fn attempt<F: FileSystem>(&self, fs: &F, reply: ReplyXattr) -> Result<(), (ReplyXattr, Failure)> {
        let value = answer!(reply, fs.xattr(self.ino, &self.name));
        let value = answer!(reply, value.ok_or(Failure::NoAttribute));
        send(reply, self.size, &value)
    }
}

pub(super) struct ListXattr {
    pub(super) ino: u64,
    pub(super) size: u32,
    /// `trusted.*` is shown too: the kernel keeps it from everybody but the superuser, and so do its own file systems.
    pub(super) trusted: bool,
}

impl Request for ListXattr {
    type Reply = ReplyXattr;
    const NAME: &'static str = "listxattr";
    const KIND: Kind = Kind::Xattr;

    fn ino(&self) -> u64 {
        self.ino
    }

    fn attempt<F: FileSystem>(&self, fs: &F, reply: ReplyXattr) -> Result<(), (ReplyXattr, Failure)> {
        let mut names = Vec::new();
        for xattr in answer!(reply, fs.xattrs(self.ino)) {
            if self.trusted || !xattr.name.starts_with(b"trusted.") {
                names.extend_from_slice(&xattr.name);
                names.push(0);
            }
        }
        send(reply, self.size, &names)
    }
}

/// The answer to a question about attributes: their length if no room was offered.
fn send(reply: ReplyXattr, room: u32, value: &[u8]) -> Result<(), (ReplyXattr, Failure)> {
    match u32::try_from(value.len()) {
        Ok(len) if room == 0 => reply.size(len),
        Ok(len) if len <= room => reply.data(value),
        _ => return Err((reply, Failure::BufferTooSmall)),
    }
    Ok(())
}

pub(super) struct Lseek {
    pub(super) ino: u64,
    pub(super) offset: i64,
    pub(super) whence: i32,
}

impl Request for Lseek {
    type Reply = ReplyLseek;
    const NAME: &'static str = "lseek";
    const KIND: Kind = Kind::Seek;

    fn ino(&self) -> u64 {
        self.ino
    }

    fn attempt<F: FileSystem>(&self, fs: &F, reply: ReplyLseek) -> Result<(), (ReplyLseek, Failure)> {
        let seek = match self.whence {
            libc::SEEK_DATA => Ok(Seek::Data),
            libc::SEEK_HOLE => Ok(Seek::Hole),
            _ => Err(Failure::Invalid),
        };
        let seek = answer!(reply, seek);
        let offset = answer!(reply, u64::try_from(self.offset).map_err(|_| Failure::NothingBehind));
        let found = answer!(reply, fs.seek(self.ino, offset, seek));
        let found = found.and_then(|found| i64::try_from(found).ok());
        let found = answer!(reply, found.ok_or(Failure::NothingBehind));
        reply.offset(found);
        Ok(())
    }
}
