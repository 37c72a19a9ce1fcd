//! The kernel's FUSE protocol, translated.
//!
//! [`serve`] mounts a [`FileSystem`] and answers the kernel until it is unmounted, by whomever. The threads that read requests
//! never wait for bytes: what is local is answered at once, everything else leaves its reply in a ticket and is
//! answered by whoever brings the bytes, or refused with EIO after a deadline. So listing a directory never queues
//! behind a download, and no number of waiting reads uses up the threads.
//!
//! The kernel is told to believe everything for ever (names, also those that do not exist; attributes; pages;
//! listings; link targets), because nothing in an image changes. Of what does change, names of snapshots and layers, it
//! is told ([`KernelCache`](crate::vfs::KernelCache)).
//!
//! A connection may outlive its process: what it takes to serve on is in [`Server::kept`], and [`serve_link`] does it. What was
//! asked and not answered is asked again by the kernel (Linux 6.9), or refused with EINTR, which means to ask again.
//!
//! It refuses to know where bytes come from ([`Bring`](crate::vfs::Bring)).

mod adapter;
mod attr;
mod counters;
mod errno;
mod invalidate;
mod link;
mod lost;
mod requests;
mod tickets;

use std::fmt;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::sys::fuse::{resend, set_read_ahead};
use crate::sys::mount::{MountError, Unmount, drop_unused, unmount};
use crate::vfs::{FileSystem, KernelMemory};

use adapter::{Adapter, Connection};
use counters::Counting;
use invalidate::Invalidations;
use tickets::Deadlines;

pub use counters::Counters;
pub use errno::Failure;
pub use link::{Kept, Link, LinkError};

/// How far the kernel reads ahead, in KiB, if root says so: the largest read there is. With the default of 128, reading
/// a whole image takes about twice as long.
const READ_AHEAD_KIB: u32 = 1024;

/// How a file system is served.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// What the mount table shows as source: the image's name.
    pub source: String,
    /// Other users may use the mount.
    pub allow_other: bool,
    /// The kernel checks owners, modes and POSIX ACLs. Without it everybody who may use the mount may read all of it.
    pub default_permissions: bool,
    /// Threads that read requests.
    pub threads: usize,
    /// How long a request may wait for bytes before it is refused with EIO.
    pub patience: Duration,
}

impl ServeOptions {
    /// What fits the user this process runs as: root serves everybody and lets the kernel check permissions, as for a
    /// container's root file system; anybody else serves themselves alone, and may read all that they could have
    /// downloaded anyway.
    pub fn for_this_user(source: impl Into<String>) -> Self {
        let is_root = rustix::process::geteuid().is_root();
        Self {
            source: source.into(),
            allow_other: is_root,
            default_permissions: is_root,
            // Requests are short and do not wait: two processors are kept busy by two, and a third answers while both
            // copy 1 MiB each.
            threads: thread::available_parallelism().map_or(2, usize::from).clamp(2, 8) + 1,
            patience: Duration::from_secs(120),
        }
    }
}

/// Why a file system could not be served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// It could not be mounted.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The kernel and this program did not agree.
    #[error("cannot start the FUSE session on {mount_point}", mount_point = mount_point.display())]
    Session {
        /// Where.
        mount_point: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

/// A file system being served. Dropping it unmounts lazily and refuses whoever waits for bytes, so that the process can
/// end: what is open stays readable as far as it is local, until it is closed or the process is gone.
pub struct Server {
    mount_point: PathBuf,
    end: Arc<End>,
    /// None while it begins.
    connection: Option<Arc<dyn Steer>>,
    invalidations: Option<Arc<Invalidations>>,
    /// None when it is over: a connection that nobody serves must not be kept by this process.
    kept: Arc<Mutex<Option<Kept>>>,
    /// It stays mounted when this is dropped: others have it in use, and somebody else may serve them.
    is_spared: bool,
}

/// What can be asked of a connection without knowing where its bytes come from.
trait Steer: Send + Sync {
    fn waiting(&self) -> usize;
    fn counters(&self) -> Counters;
    fn close(&self);
    fn look_again(&self);
    fn is_complete(&self);
}

impl<F: FileSystem> Steer for Connection<F> {
    fn waiting(&self) -> usize {
        self.deadlines.waiting()
    }

    fn counters(&self) -> Counters {
        self.counting.snapshot()
    }

    fn close(&self) {
        self.deadlines.close();
    }

    fn look_again(&self) {
        self.look_again();
    }

    fn is_complete(&self) {
        self.is_complete();
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("mount_point", &self.mount_point).field("ended", &self.is_over()).finish()
    }
}

/// Mounts `fs` on the directory `mount_point` and serves it. The mount is usable when this returns.
///
/// # Errors
/// See [`ServeError`]; nothing is mounted then.
pub fn serve<F: FileSystem>(fs: F, mount_point: &Path, options: &ServeOptions) -> Result<Server, ServeError> {
    serve_link(fs, Link::mount(mount_point, options)?, options)
}

/// Serves `fs` on a connection that is mounted already. If a process served it before, `fs` must get everything that was
/// shown then, under the same numbers: the kernel goes on where it was. Who asks for a file that is not there yet waits for
/// [`Server::is_complete`], at most for the patience of `options`.
///
/// # Errors
/// See [`ServeError`]; nothing is mounted then, but for a connection that was served before, which is left as it was.
pub fn serve_link<F: FileSystem>(fs: F, link: Link, options: &ServeOptions) -> Result<Server, ServeError> {
    let mount_point = link.mount_point().to_owned();
    let end = Arc::new(End::default());
    // From here on dropping it unmounts.
    let mut server = Server {
        mount_point: mount_point.clone(),
        end: Arc::clone(&end),
        connection: None,
        invalidations: None,
        kept: Arc::default(),
        is_spared: link.was_served(),
    };
    let failed = |source| ServeError::Session { mount_point: mount_point.clone(), source };
    let deadlines = Deadlines::start().map_err(failed)?;
    let acl = options.default_permissions && fs.may_show_xattrs();
    let counting = Counting::default();
    let first = OnceLock::new();
    let early = Mutex::new(link.was_served().then(Vec::new));
    let (patience, looks) = (options.patience, AtomicU64::new(0));
    let connection = Arc::new(Connection { fs, deadlines, patience, counting, first, early, looks });
    server.connection = Some(Arc::<Connection<F>>::clone(&connection));
    let mut config = fuser::Config::default();
    config.n_threads = Some(options.threads.max(1));
    let adapter = Adapter { connection: Arc::clone(&connection), acl, stateless: adapter::Stateless::default() };
    let (session, kept) = link.introduce(adapter, config).map_err(failed)?;
    *server.kept() = Some(kept);
    let invalidations = Invalidations::start(session.notifier()).map_err(failed)?;
    server.invalidations = Some(Arc::clone(&invalidations));
    let memory = if link.was_served() { KernelMemory::Unknown } else { KernelMemory::Blank };
    connection.fs.connect(Arc::<Invalidations>::clone(&invalidations), memory);
    let sent_again = !link.was_served() || link.can_resend && resend(session.as_fd()).map_err(failed)?;
    let kept = Arc::clone(&server.kept);
    thread::Builder::new()
        .name("fuse-session".into())
        .spawn(move || {
            let _said = Said { end: &end, invalidations: &invalidations, kept: &kept };
            if let Err(error) = session.run() {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(error, "the FUSE session ended with an error");
            }
        })
        .map_err(failed)?;
    if !sent_again {
        lost::refuse_lost(link.into_device(), Arc::clone(&connection), mount_point.clone()).map_err(failed)?;
    }
    if rustix::process::geteuid().is_root()
        && let Err(error) = set_read_ahead(&mount_point, READ_AHEAD_KIB)
    {
        let error: &dyn std::error::Error = &error;
        tracing::debug!(error, "reading ahead stays at the kernel's default");
    }
    server.is_spared = false;
    Ok(server)
}

impl Server {
    /// Where it is mounted, absolute and without links.
    pub fn mount_point(&self) -> &Path {
        &self.mount_point
    }

    /// How many requests wait for bytes.
    pub fn waiting(&self) -> usize {
        self.connection.as_ref().map_or(0, |connection| connection.waiting())
    }

    /// How many requests the kernel has made, except opens, `statfs` and what writes.
    pub fn requests(&self) -> u64 {
        self.counters().about_files()
    }

    /// The same by what they asked for.
    pub fn counters(&self) -> Counters {
        self.connection.as_ref().map(|connection| connection.counters()).unwrap_or_default()
    }

    /// Says that more of what a process before this one showed is there again.
    pub fn look_again(&self) {
        if let Some(connection) = &self.connection {
            connection.look_again();
        }
    }

    /// Says that what a process before this one showed is there again: what is not never will be.
    pub fn is_complete(&self) {
        if let Some(connection) = &self.connection {
            connection.is_complete();
        }
    }

    /// What another process needs to serve on when this one is gone; none when the connection is over.
    pub fn kept(&self) -> MutexGuard<'_, Option<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the kernel believes nothing any more that has changed, at most for `patience`; false if it does then.
    pub fn settle(&self, patience: Duration) -> bool {
        self.invalidations.as_ref().is_none_or(|invalidations| invalidations.settle(patience))
    }

    /// True if nothing is served any more, because somebody unmounted it.
    pub fn is_over(&self) -> bool {
        *self.end.over()
    }

    /// Waits until it is unmounted and the last file is closed.
    pub fn wait(&self) {
        let mut over = self.end.over();
        while !*over {
            over = self.end.changed.wait(over).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits likewise, at most for `patience`; false if it is still being served then.
    pub fn wait_for(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let mut over = self.end.over();
        while !*over {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            (over, _) = self.end.changed.wait_timeout(over, left).unwrap_or_else(PoisonError::into_inner);
        }
        true
    }

    /// Lets the kernel drop every name and file of the mount that nobody uses at the moment, and with them the references
    /// that keep what was removed. What it drops it asks for again, pages included, so this is for those who need
    /// something back. Blocks; not for a thread that serves.
    ///
    /// # Errors
    /// See [`MountError`].
    pub fn drop_unused(&self) -> Result<(), MountError> {
        drop_unused(&self.mount_point)
    }

    /// Unmounts. After [`Unmount::Strict`] succeeded the session ends at once: see [`Server::wait`].
    ///
    /// # Errors
    /// See [`MountError`]. That it was unmounted by somebody else is no error.
    pub fn unmount(&self, how: Unmount) -> Result<(), MountError> {
        if self.is_over() {
            return Ok(());
        }
        match unmount(&self.mount_point, how) {
            Err(MountError::NotMounted(_)) => Ok(()),
            other => other,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if !self.is_spared
            && let Err(error) = self.unmount(Unmount::Lazy)
        {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "the mount stays behind");
        }
        if let Some(connection) = &self.connection {
            connection.close();
        }
        if let Some(invalidations) = &self.invalidations {
            invalidations.close();
        }
    }
}

/// Whether the session is over, and a way to wait for it.
#[derive(Default)]
struct End {
    over: Mutex<bool>,
    changed: Condvar,
}

impl End {
    fn over(&self) -> MutexGuard<'_, bool> {
        self.over.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says that the session is over when it is dropped, by whatever way.
struct Said<'a> {
    end: &'a End,
    invalidations: &'a Invalidations,
    kept: &'a Mutex<Option<Kept>>,
}

impl Drop for Said<'_> {
    fn drop(&mut self) {
        self.invalidations.close();
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(kept);
        *self.end.over() = true;
        self.end.changed.notify_all();
    }
}
