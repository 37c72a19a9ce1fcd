//! The protocol's requests, one method each.
//!
//! No method waits. A panic below is caught here: the reply it dropped says EIO, and the mount lives on.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, FileHandle, Filesystem, FopenFlags, INodeNo, InitFlags, IoctlFlags,
    KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr,
    Request as Caller, TimeOrNow, WriteFlags,
};

use super::counters::{Counting, Kind};
use super::errno::Failure;
use super::requests::{
    GetAttr, GetXattr, ListXattr, Lookup, Lseek, Read, ReadDir, ReadDirPlus, ReadLink, Refuse, Request,
};
use super::tickets::{Deadlines, Redeemer, Ticket, Verdict};
use crate::vfs::{self, FileSystem, Missing};

/// How often one request may meet absent bytes. A read of 1 MiB touches 256 blocks and as many entries of a chunk
/// table; a listing of 32 KiB some 200 inodes.
const MAX_ROUNDS: u32 = 4096;

/// Largest read (Linux `fs.fuse.max_pages_limit`, 256 pages of 4 KiB). What is negotiated for writes also bounds reads.
const MAX_TRANSFER: u32 = 1 << 20;

/// How many requests that nobody waits for directly (read-ahead) the kernel may have under way before it queues more.
/// Those that wait for a download must not hold up those that do not; the protocol's default is 12.
const MAX_BACKGROUND: u16 = 4096;

/// What all threads of a connection share.
pub(super) struct Connection<F> {
    pub(super) fs: F,
    pub(super) deadlines: Deadlines,
    pub(super) patience: Duration,
    pub(super) counting: Counting,
    /// The kernel's number of the first request that came.
    pub(super) first: OnceLock<u64>,
    /// Those who asked for files that are not there yet; none if everything is.
    pub(super) early: Mutex<Option<Vec<Redeemer>>>,
    /// How often there was more of them than before. Changed under the lock of `early`.
    pub(super) looks: AtomicU64,
}

/// A request on its way to an answer.
struct Parcel<Q: Request> {
    request: Q,
    reply: Q::Reply,
    /// The thread that asked.
    caller: u32,
    /// How often it met absent bytes, and when that was first.
    rounds: u32,
    since: Option<Instant>,
}

impl<F: FileSystem> Connection<F> {
    /// Answers `request`, now if its bytes are local, else when they have arrived. Never waits.
    fn handle<Q: Request>(self: &Arc<Self>, caller: &Caller, request: Q, reply: Q::Reply) {
        self.met(caller);
        self.counting.count(Q::KIND);
        self.go_on(Parcel { request, reply, caller: caller.pid(), rounds: 0, since: None });
    }

    fn met(&self, caller: &Caller) {
        self.first.get_or_init(|| caller.unique().0);
    }

    /// Tells the kernel never to ask for extended attributes again.
    fn no_xattrs(&self, reply: impl Refuse) {
        self.counting.count(Kind::Xattr);
        reply.refuse(Failure::NotNeeded.errno());
    }

    fn go_on<Q: Request>(self: &Arc<Self>, parcel: Parcel<Q>) {
        let ino = parcel.request.ino();
        // Unwinding drops the reply, which answers EIO. What is shared keeps no half-made state: see the locks.
        if panic::catch_unwind(AssertUnwindSafe(|| self.rounds(parcel))).is_err() {
            tracing::error!(op = Q::NAME, ino, "a request failed by a bug in this program");
        }
    }

    /// Attempts a request again and again, as long as what it lacks comes at once.
    fn rounds<Q: Request>(self: &Arc<Self>, mut parcel: Parcel<Q>) {
        loop {
            let Parcel { request, reply, caller, rounds, since } = parcel;
            let looks = self.looks.load(Ordering::Acquire);
            let (reply, missing) = match request.attempt(&self.fs, reply) {
                Ok(()) => return,
                Err((reply, Failure::Vfs(vfs::Error::Absent { layer, device, range }))) => {
                    (reply, Missing { layer, device, range })
                }
                Err((reply, failure @ (Failure::NoName | Failure::Vfs(vfs::Error::NoSuchInode(_))))) => {
                    return self.put_off(Parcel { request, reply, caller, rounds, since }, failure, looks);
                }
                Err((reply, failure)) => return self.refuse::<Q>(&request, reply, &failure),
            };
            let since = since.unwrap_or_else(Instant::now);
            let waiting = Parcel { request, reply, caller, rounds: rounds + 1, since: Some(since) };
            let Some(next) = self.ask(waiting, missing, since + self.patience) else { return };
            parcel = next;
        }
    }

    /// Lets a request that fails wait until there is more than when it was tried (`looks`), and tries it again then; refuses it
    /// if everything is there, or if it waits for too long.
    fn put_off<Q: Request>(self: &Arc<Self>, parcel: Parcel<Q>, failure: Failure, looks: u64) {
        let (ticket, redeemer) = Ticket::new();
        {
            let mut early = self.early();
            if self.looks.load(Ordering::Acquire) != looks {
                drop(early);
                return self.go_on(parcel);
            }
            let Some(early) = early.as_mut() else {
                return self.refuse::<Q>(&parcel.request, parcel.reply, &failure);
            };
            early.push(redeemer);
        }
        let since = parcel.since.unwrap_or_else(Instant::now);
        let watch = self.deadlines.watch(&ticket, parcel.caller, since + self.patience);
        let decide = |connection: &Arc<Self>, parcel: Parcel<Q>, failure: &Failure, verdict| match verdict {
            Verdict::Arrived => connection.go_on(parcel),
            _ => connection.refuse::<Q>(&parcel.request, parcel.reply, failure),
        };
        let parcel = Parcel { since: Some(since), ..parcel };
        let early = ticket.park((parcel, failure, watch), |(parcel, failure, watch)| {
            let connection = Arc::clone(self);
            Box::new(move |verdict| {
                drop(watch);
                decide(&connection, parcel, &failure, verdict);
            })
        });
        if let Some((verdict, (parcel, failure, watch))) = early {
            drop(watch);
            decide(self, parcel, &failure, verdict);
        }
    }

    fn early(&self) -> MutexGuard<'_, Option<Vec<Redeemer>>> {
        self.early.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is more than before: those who came too early are tried again.
    pub(super) fn look_again(&self) {
        let early = {
            let mut early = self.early();
            self.looks.fetch_add(1, Ordering::AcqRel);
            early.as_mut().map(std::mem::take)
        };
        early.into_iter().flatten().for_each(|redeemer| redeemer.redeem(Ok(())));
    }

    /// Everything is there: what is still not never will be.
    pub(super) fn is_complete(&self) {
        self.fs.is_complete();
        let early = {
            let mut early = self.early();
            self.looks.fetch_add(1, Ordering::AcqRel);
            early.take()
        };
        early.into_iter().flatten().for_each(|redeemer| redeemer.redeem(Ok(())));
    }

    /// Asks for what a request lacks and lets it wait in a ticket. Gives it back if it can go on at once.
    fn ask<Q: Request>(self: &Arc<Self>, parcel: Parcel<Q>, missing: Missing, deadline: Instant) -> Option<Parcel<Q>> {
        if parcel.rounds >= MAX_ROUNDS {
            let Missing { layer, range, .. } = missing;
            self.refuse::<Q>(&parcel.request, parcel.reply, &Failure::StillAbsent { layer, range });
            return None;
        }
        let (ticket, redeemer) = Ticket::new();
        let done = Box::new(move |result| redeemer.redeem(result));
        self.fs.bring(parcel.request.ino(), missing, Q::PURPOSE, done);
        let watch = self.deadlines.watch(&ticket, parcel.caller, deadline);
        let early = ticket.park((parcel, watch), |(parcel, watch)| {
            let connection = Arc::clone(self);
            Box::new(move |verdict| {
                drop(watch);
                if let Some(parcel) = connection.judge(parcel, missing, verdict) {
                    connection.go_on(parcel);
                }
            })
        });
        let (verdict, (parcel, _)) = early?;
        self.judge(parcel, missing, verdict)
    }

    /// Refuses a request whose bytes do not come.
    fn judge<Q: Request>(&self, parcel: Parcel<Q>, missing: Missing, verdict: Verdict) -> Option<Parcel<Q>> {
        let Missing { layer, range, .. } = missing;
        let failure = match verdict {
            Verdict::Arrived => return Some(parcel),
            Verdict::Failed(source) => Failure::Bring { layer, range, source },
            Verdict::Forgotten => Failure::Forgotten { layer, range },
            Verdict::Abandoned => Failure::Abandoned { layer, range },
            Verdict::Closed => Failure::Closed { layer, range },
            Verdict::Expired => Failure::Deadline { layer, range, seconds: self.patience.as_secs() },
        };
        self.refuse::<Q>(&parcel.request, parcel.reply, &failure);
        None
    }

    /// Answers with an errno, and tells the operator if something is broken.
    fn refuse<Q: Request>(&self, request: &Q, reply: Q::Reply, failure: &Failure) {
        if failure.is_fault() {
            let error: &dyn std::error::Error = failure;
            let ino = request.ino();
            let of = failure.layer().and_then(|layer| self.fs.describe(ino, layer));
            tracing::warn!(op = Q::NAME, ino, of, error, "a request is answered with an I/O error");
        }
        reply.refuse(failure.errno());
    }
}

/// The face towards the kernel.
pub(super) struct Adapter<F> {
    pub(super) connection: Arc<Connection<F>>,
    /// Negotiate that the kernel enforces POSIX ACLs.
    pub(super) acl: bool,
    /// The kernel takes "not needed" for an answer to `open` and `opendir`.
    pub(super) stateless: Stateless,
}

/// Which opens the kernel can do without asking.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Stateless {
    files: bool,
    directories: bool,
}

impl<F> Adapter<F> {
    fn negotiate(&mut self, config: &mut KernelConfig) {
        let offered = config.capabilities();
        let mut wanted = InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_CACHE_SYMLINKS
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_NO_OPEN_SUPPORT
            | InitFlags::FUSE_NO_OPENDIR_SUPPORT
            | InitFlags::FUSE_ASYNC_DIO;
        if self.acl {
            wanted |= InitFlags::FUSE_POSIX_ACL;
        }
        // Not FUSE_ALLOW_IDMAP (Linux 6.12), for mounts that show other ids: the kernel would not tell any more who asks, and
        // `trusted.*` is listed for the superuser alone.
        config.add_capabilities(wanted & offered).expect("only what was offered is asked for");
        config.set_max_write(MAX_TRANSFER).expect("1 MiB is less than 16 MiB");
        config.set_max_background(MAX_BACKGROUND).expect("it is not 0");
        config.set_congestion_threshold(MAX_BACKGROUND).expect("it is not 0");
        self.stateless = Stateless {
            files: offered.contains(InitFlags::FUSE_NO_OPEN_SUPPORT),
            directories: offered.contains(InitFlags::FUSE_NO_OPENDIR_SUPPORT),
        };
    }
}

impl<F: FileSystem> Filesystem for Adapter<F> {
    fn init(&mut self, _caller: &Caller, config: &mut KernelConfig) -> io::Result<()> {
        self.negotiate(config);
        Ok(())
    }

    fn forget(&self, _caller: &Caller, ino: INodeNo, count: u64) {
        self.connection.fs.forget(ino.0, count);
    }

    fn lookup(&self, caller: &Caller, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.connection.handle(caller, Lookup { parent: parent.0, name: name.as_bytes().into() }, reply);
    }

    fn getattr(&self, caller: &Caller, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.connection.handle(caller, GetAttr { ino: ino.0 }, reply);
    }

    fn readlink(&self, caller: &Caller, ino: INodeNo, reply: ReplyData) {
        self.connection.handle(caller, ReadLink { ino: ino.0 }, reply);
    }

    // Open is answered with "not needed" once; the kernel then opens files and directories by itself, and keeps their
    // pages and listings (`fuse_file_open` sets FOPEN_KEEP_CACHE and FOPEN_CACHE_DIR in that case).
    fn open(&self, _caller: &Caller, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if self.stateless.files {
            return reply.error(Failure::NotNeeded.errno());
        }
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE);
    }

    fn opendir(&self, _caller: &Caller, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if self.stateless.directories {
            return reply.error(Failure::NotNeeded.errno());
        }
        reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR);
    }

    fn read(
        &self,
        caller: &Caller,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let size = usize::try_from(size).unwrap_or(0);
        self.connection.handle(caller, Read { ino: ino.0, offset, size }, reply);
    }

    fn readdir(&self, caller: &Caller, ino: INodeNo, _fh: FileHandle, offset: u64, reply: ReplyDirectory) {
        self.connection.handle(caller, ReadDir { ino: ino.0, offset }, reply);
    }

    fn readdirplus(&self, caller: &Caller, ino: INodeNo, _fh: FileHandle, offset: u64, reply: ReplyDirectoryPlus) {
        self.connection.handle(caller, ReadDirPlus { ino: ino.0, offset }, reply);
    }

    fn getxattr(&self, caller: &Caller, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        if !self.connection.fs.may_show_xattrs() {
            return self.connection.no_xattrs(reply);
        }
        self.connection.handle(caller, GetXattr { ino: ino.0, name: name.as_bytes().into(), size }, reply);
    }

    fn listxattr(&self, caller: &Caller, ino: INodeNo, size: u32, reply: ReplyXattr) {
        if !self.connection.fs.may_show_xattrs() {
            return self.connection.no_xattrs(reply);
        }
        self.connection.handle(caller, ListXattr { ino: ino.0, size, trusted: caller.uid() == 0 }, reply);
    }

    fn lseek(&self, caller: &Caller, ino: INodeNo, _fh: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        self.connection.handle(caller, Lseek { ino: ino.0, offset, whence }, reply);
    }

    fn statfs(&self, caller: &Caller, ino: INodeNo, reply: ReplyStatfs) {
        const BLOCK: u32 = 4096;
        self.connection.met(caller);
        self.connection.counting.count(Kind::Totals);
        let totals = self.connection.fs.totals(ino.0);
        reply.statfs(totals.bytes.div_ceil(BLOCK.into()), 0, 0, totals.files, 0, BLOCK, 255, BLOCK);
    }

    // Without the option default_permissions only the mount's owner gets here, who may read everything.
    fn access(&self, _caller: &Caller, _ino: INodeNo, _mask: AccessFlags, reply: ReplyEmpty) {
        reply.error(Failure::NotNeeded.errno());
    }

    fn flush(&self, _caller: &Caller, _ino: INodeNo, _fh: FileHandle, _lock_owner: LockOwner, reply: ReplyEmpty) {
        reply.error(Failure::NotNeeded.errno());
    }

    fn fsync(&self, _caller: &Caller, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.error(Failure::NotNeeded.errno());
    }

    fn fsyncdir(&self, _caller: &Caller, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        reply.error(Failure::NotNeeded.errno());
    }

    fn ioctl(
        &self,
        _caller: &Caller,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Failure::NotNeeded.errno());
    }

    // The mount is read-only, so the kernel refuses all of these itself, unless somebody remounted it.

    fn setattr(
        &self,
        _caller: &Caller,
        _ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        _size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(Failure::ReadOnly.errno());
    }

    fn mknod(
        &self,
        _caller: &Caller,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Failure::ReadOnly.errno());
    }

    fn mkdir(&self, _caller: &Caller, _parent: INodeNo, _name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
        reply.error(Failure::ReadOnly.errno());
    }

    fn unlink(&self, _caller: &Caller, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Failure::ReadOnly.errno());
    }

    fn rmdir(&self, _caller: &Caller, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Failure::ReadOnly.errno());
    }

    fn symlink(&self, _caller: &Caller, _parent: INodeNo, _name: &OsStr, _target: &Path, reply: ReplyEntry) {
        reply.error(Failure::ReadOnly.errno());
    }

    fn rename(
        &self,
        _caller: &Caller,
        _parent: INodeNo,
        _name: &OsStr,
        _new_parent: INodeNo,
        _new_name: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Failure::ReadOnly.errno());
    }

    fn link(&self, _caller: &Caller, _ino: INodeNo, _parent: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        reply.error(Failure::ReadOnly.errno());
    }

    fn write(
        &self,
        _caller: &Caller,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(Failure::ReadOnly.errno());
    }

    fn create(
        &self,
        _caller: &Caller,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Failure::ReadOnly.errno());
    }

    fn fallocate(
        &self,
        _caller: &Caller,
        _ino: INodeNo,
        _fh: FileHandle,
        _offset: u64,
        _length: u64,
        _mode: i32,
        reply: ReplyEmpty,
    ) {
        reply.error(Failure::ReadOnly.errno());
    }

    fn copy_file_range(
        &self,
        _caller: &Caller,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        _offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        _offset_out: u64,
        _len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(Failure::ReadOnly.errno());
    }

    fn setxattr(
        &self,
        _caller: &Caller,
        _ino: INodeNo,
        _name: &OsStr,
        _value: &[u8],
        _flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Failure::ReadOnly.errno());
    }

    fn removexattr(&self, _caller: &Caller, _ino: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Failure::ReadOnly.errno());
    }
}
