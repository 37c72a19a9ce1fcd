//! A FUSE connection of this process, and what is shown from it. The daemon has one for everything.
//!
//! ```text
//! <run>/fs/snapshots/<number>/   a mounted image, bound to its mount point
//! <run>/fs/layers/<diffid>       a layer as one file, for the kernel to mount
//! <run>/fs/raw/<number>/         a layer as it is, for overlayfs to merge
//! ```
//!
//! Images that share layers share the kernel's pages of them. Layers go by numbers, which whoever lists them gives: layers
//! that only claim to be the same have different ones, because a diffID is a claim of the image's config until all of the
//! layer is here, and an image must not be shown what another one claims.

use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use futures::future::BoxFuture;
use tokio::sync::watch;

use super::lookout::Watch;
use super::shown::{Driver, Shown};
use crate::chain::MAX_SNAPSHOT_SLOT;
use crate::daemon::image::Lazy;
use crate::fuse;
use crate::model::{DiffId, Name};
use crate::sys::fuse::MOUNT_KIND;
use crate::sys::mount::{self, MountEntry, MountError, Unmount};
use crate::sys::stack::mount_bind;
use crate::vfs::{Forest, Layer, LayerSlot, SnapshotSlot};

/// So many removed images may stay because the kernel remembers them. Making it forget costs the others their cached pages,
/// which is worse than some ten kilobytes of tables for each.
const REMEMBERED: usize = 16;

/// The connection. Dropped, it is taken away, and those who have files open keep what is local of them.
pub struct Grove {
    place: PathBuf,
    forest: Arc<Forest<Lazy>>,
    server: fuse::Server,
    /// Device number of its mounts.
    number: (u32, u32),
    taken_over: bool,
    /// What was taken over is listed.
    complete: AtomicBool,
    /// How many layers are listed, each as often as it is.
    listed: AtomicUsize,
    /// The next number of an image that has none of its own.
    next: AtomicU32,
    table: Mutex<Table>,
    /// Goes when nothing is mounted on it any more.
    directory: MountDirectory,
}

/// A directory for a mount, removed when this is dropped.
struct MountDirectory(PathBuf);

impl MountDirectory {
    fn remove(&self) {
        if let Err(error) = fs::remove_dir(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(%error, "cannot remove {}", self.0.display());
        }
    }
}

impl Drop for MountDirectory {
    fn drop(&mut self) {
        self.remove();
    }
}

#[derive(Default)]
struct Table {
    /// How many images are shown.
    shown: usize,
    /// Images that are not, but may still be remembered by the kernel.
    gone: Vec<SnapshotSlot>,
}

/// A layer to be shown.
pub struct Shoot {
    /// Its number: two layers are the same only if this is.
    pub number: u32,
    /// What it claims to be.
    pub diff_id: DiffId,
    /// It.
    pub layer: Arc<Layer<Lazy>>,
}

impl fmt::Debug for Grove {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grove").field("forest", &self.forest).field("server", &self.server).finish_non_exhaustive()
    }
}

impl Grove {
    /// Mounts the connection on `place`, which is made if it is missing; what a dead process left there is taken away. The
    /// mount table shows `source`.
    ///
    /// # Errors
    /// The kernel refuses, or this user may not.
    pub fn plant(place: &Path, patience: Duration, source: &str) -> anyhow::Result<Arc<Self>> {
        Self::plant_on(place, patience, source, None)
    }

    /// The same on a connection that a process before this one served, if there is one: what it showed has to be listed again
    /// under the same numbers, and until [`Grove::is_complete`] those who ask for it wait, for as long as `patience`.
    ///
    /// # Errors
    /// The kernel refuses, or this user may not. What was served before is left as it was.
    pub fn plant_on(
        place: &Path,
        patience: Duration,
        source: &str,
        link: Option<fuse::Link>,
    ) -> anyhow::Result<Arc<Self>> {
        let options = fuse::ServeOptions { patience, ..fuse::ServeOptions::for_this_user(source) };
        let forest = Arc::new(Forest::new());
        let link = match link {
            Some(link) => link,
            None => {
                while mount::is_ours(place)? {
                    mount::unmount(place, Unmount::Lazy)?;
                }
                let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(place);
                made.with_context(|| format!("cannot create {}", place.display()))?;
                fuse::Link::mount(place, &options)?
            }
        };
        let (number, taken_over) = (link.number(), link.was_served());
        let server = fuse::serve_link(Arc::clone(&forest), link, &options)?;
        let place = server.mount_point().to_owned();
        let (next, directory) = (AtomicU32::new(MAX_SNAPSHOT_SLOT + 1), MountDirectory(place.clone()));
        let table = Mutex::default();
        Ok(Arc::new(Self {
            place,
            forest,
            server,
            number,
            taken_over,
            complete: AtomicBool::new(false),
            listed: AtomicUsize::new(0),
            next,
            table,
            directory,
        }))
    }

    /// True if a process before this one served the connection.
    pub const fn was_taken_over(&self) -> bool {
        self.taken_over
    }

    /// True while what a process before this one showed is not yet all listed again.
    pub fn is_restoring(&self) -> bool {
        self.taken_over && !self.complete.load(Ordering::Acquire)
    }

    /// Says that what a process before this one showed is listed again, as far as it ever will be.
    pub fn is_complete(self: &Arc<Self>) {
        self.server.is_complete();
        if !self.taken_over || self.complete.swap(true, Ordering::AcqRel) {
            return;
        }
        let weak = Arc::downgrade(self);
        let look = move || {
            // The kernel counts as knowing what is listed. Looked at, it does, and will tell when it does not any more.
            let Some(grove) = weak.upgrade() else { return };
            for dir in ["snapshots", "layers", "raw"] {
                let names = fs::read_dir(grove.place.join(dir)).into_iter().flatten().flatten();
                names.for_each(|name| drop(fs::symlink_metadata(name.path())));
            }
        };
        if let Err(error) = thread::Builder::new().name("grove-look".into()).spawn(look) {
            tracing::debug!(%error, "the kernel may never tell that it forgot what was taken over");
        }
    }

    /// What another process needs to serve on; none when it is over.
    pub fn kept(&self) -> MutexGuard<'_, Option<fuse::Kept>> {
        self.server.kept()
    }

    /// True if something is listed.
    pub fn shows_anything(&self) -> bool {
        self.listed.load(Ordering::Relaxed) > 0
    }

    /// True if `entry` is a mount of this connection.
    fn shows(&self, entry: &MountEntry) -> bool {
        (entry.major, entry.minor) == self.number
    }

    /// The source of overlays on images that it shows. With the number of the connection, which no other one has while the
    /// overlay is there: the mount table does not tell what is below.
    fn overlay_source(&self) -> String {
        let (major, minor) = self.number;
        format!("{}:fs:{major}:{minor}", mount::NAME)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lists a layer.
    ///
    /// # Errors
    /// The forest refuses.
    pub fn list(self: &Arc<Self>, shoot: Shoot) -> anyhow::Result<Listed> {
        let slot = self.forest.add_layer(shoot.diff_id, shoot.layer, Some(LayerSlot(shoot.number)))?;
        self.listed.fetch_add(1, Ordering::Relaxed);
        self.there_is_more();
        Ok(Listed { grove: Arc::clone(self), slot })
    }

    /// Whoever asked before it was there is answered now, and need not wait for everything: what is mounted again may wait for
    /// that answer.
    fn there_is_more(&self) {
        if self.is_restoring() {
            self.server.look_again();
        }
    }

    /// Lists an image of `layers`, the lowest first, under its number if it has one.
    ///
    /// # Errors
    /// The forest refuses.
    pub fn grow(self: &Arc<Self>, layers: Vec<Shoot>, number: Option<u32>) -> anyhow::Result<Planted> {
        let number = number.unwrap_or_else(|| self.next.fetch_add(1, Ordering::Relaxed));
        let name = number.to_string();
        let layers = layers.into_iter().map(|shoot| self.list(shoot)).collect::<anyhow::Result<Vec<_>>>()?;
        let slots: Vec<LayerSlot> = layers.iter().map(|listed| listed.slot).collect();
        let listed_as = Name::new(name.as_bytes()).context("a number is a name")?;
        let snapshot = self.forest.add_snapshot(&listed_as, &slots, Some(SnapshotSlot(number)))?;
        self.table().shown += 1;
        self.there_is_more();
        Ok(Planted { grove: Arc::clone(self), name, snapshot, layers: Some(layers) })
    }

    /// Ends the connection when the last file is closed; false if some is open for longer than `patience`.
    pub fn close(&self, patience: Duration) -> bool {
        if let Err(error) = self.server.unmount(Unmount::Lazy) {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "the FUSE connection stays behind");
            return true;
        }
        let over = self.server.wait_for(patience);
        self.directory.remove();
        over
    }

    /// Where the file of a listed layer is.
    fn layer_file(&self, slot: LayerSlot) -> PathBuf {
        self.place.join("layers").join(self.forest.layer_name(slot).unwrap_or_default())
    }

    /// Lets the kernel forget images that are gone, if there is reason to.
    fn forget_gone(&self) {
        let forget = {
            let mut table = self.table();
            table.gone.retain(|snapshot| self.forest.has_snapshot(*snapshot));
            !table.gone.is_empty() && (table.shown == 0 || table.gone.len() >= REMEMBERED)
        };
        if forget
            && !self.server.is_over()
            && let Err(error) = self.server.drop_unused()
        {
            let error: &dyn std::error::Error = &error;
            tracing::debug!(error, "the kernel goes on remembering images that are gone");
        }
    }
}

/// A layer that is listed; dropped, it is not any more. Whoever uses it goes on doing so.
#[derive(Debug)]
pub struct Listed {
    grove: Arc<Grove>,
    slot: LayerSlot,
}

impl Listed {
    /// The layer as a file.
    pub fn file(&self) -> PathBuf {
        self.grove.layer_file(self.slot)
    }

    /// What is in the layer, as it is.
    pub fn tree(&self) -> PathBuf {
        self.grove.place.join("raw").join(self.slot.0.to_string())
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.grove.listed.fetch_sub(1, Ordering::Relaxed);
        if let Err(error) = self.grove.forest.remove_layer(self.slot) {
            let error: &dyn std::error::Error = &error;
            tracing::error!(error, "a layer was removed twice");
        }
    }
}

/// An image that is listed; dropped, it is not any more. Whoever uses it goes on doing so.
#[derive(Debug)]
pub struct Planted {
    grove: Arc<Grove>,
    name: String,
    snapshot: SnapshotSlot,
    /// None when they are listed no more.
    layers: Option<Vec<Listed>>,
}

impl Planted {
    /// Its root directory.
    pub fn directory(&self) -> PathBuf {
        self.grove.place.join("snapshots").join(&self.name)
    }
}

impl Drop for Planted {
    fn drop(&mut self) {
        if let Err(error) = self.grove.forest.remove_snapshot(self.snapshot) {
            let error: &dyn std::error::Error = &error;
            tracing::error!(error, "an image was removed twice");
        }
        drop(self.layers.take());
        {
            let mut table = self.grove.table();
            table.shown -= 1;
            table.gone.push(self.snapshot);
        }
        self.grove.forget_gone();
    }
}

/// What is listed, mounted on a mount point in one way or another, and watched there.
#[derive(Debug)]
pub(super) struct Bound {
    driver: Driver,
    mount_point: PathBuf,
    over: watch::Receiver<bool>,
    /// It was taken away by this process: what is mounted there now is something else.
    taken: Arc<AtomicBool>,
    watch: Watch,
    /// Goes when nothing is mounted any more.
    _listed: Box<dyn fmt::Debug + Send + Sync>,
}

/// Mounts a listed image on `mount_point`, below the writable layer `upper` if there is one.
///
/// # Errors
/// The kernel refuses.
pub(super) fn bind(planted: Planted, mount_point: &Path, upper: Option<&Path>, watch: &Watch) -> anyhow::Result<Bound> {
    let source = upper.map(|_| planted.grove.overlay_source());
    match upper.zip(source.as_deref()) {
        None => mount_bind(&planted.directory(), mount_point)?,
        Some((upper, source)) => mount::mount_writable(source, &planted.directory(), upper, mount_point)?,
    }
    match watch_over(Box::new(planted), Driver { name: "fuse", why: None }, mount_point, source, watch) {
        Ok(bound) => Ok(bound),
        Err(error) => {
            mount::unmount(mount_point, Unmount::Lazy)?;
            Err(error)
        }
    }
}

/// Takes up what a process before this one has mounted of what is listed: overlays of this `source`, or without one a part of
/// the connection itself.
///
/// # Errors
/// The mount table cannot be watched.
pub(super) fn watch_over(
    listed: Box<dyn fmt::Debug + Send + Sync>,
    driver: Driver,
    mount_point: &Path,
    source: Option<String>,
    watch: &Watch,
) -> anyhow::Result<Bound> {
    let place = mount_point.to_owned();
    let is_it = move |entry: &MountEntry| {
        let kind = match &source {
            Some(source) => entry.source == source.as_str(),
            None => entry.kind == MOUNT_KIND,
        };
        kind && entry.mount_point == place
    };
    let taken = Arc::new(AtomicBool::new(false));
    let is_taken = Arc::clone(&taken);
    let over = watch.until(move |table| is_taken.load(Ordering::Acquire) || !table.iter().any(&is_it))?;
    Ok(Bound { driver, mount_point: mount_point.to_owned(), over, taken, watch: watch.clone(), _listed: listed })
}

/// The source of an overlay on an image that the connection shows, or none for the image alone, if that is what is on
/// `mount_point`.
///
/// # Errors
/// The mount table cannot be read.
pub(super) fn bound_there(grove: &Grove, mount_point: &Path, writable: bool) -> io::Result<Option<Option<String>>> {
    let Some(entry) = mount::mounted_on(mount_point)? else { return Ok(None) };
    if !writable {
        return Ok(grove.shows(&entry).then_some(None));
    }
    let source = grove.overlay_source();
    Ok((entry.source == source.as_str()).then_some(Some(source)))
}

impl Shown for Bound {
    fn driver(&self) -> Driver {
        self.driver.clone()
    }

    fn take_away(&self, how: Unmount) -> Result<(), MountError> {
        if self.taken.load(Ordering::Acquire) || *self.over.borrow() {
            return Ok(());
        }
        match mount::unmount(&self.mount_point, how) {
            Ok(()) | Err(MountError::NotMounted(_)) => {
                self.taken.store(true, Ordering::Release);
                self.watch.ask();
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn ended(&self) -> BoxFuture<'static, ()> {
        let mut over = self.over.clone();
        Box::pin(async move {
            // A watch that is gone tells nothing any more.
            if over.wait_for(|over| *over).await.is_err() {
                std::future::pending::<()>().await;
            }
        })
    }

    fn own_connections(&self) -> u64 {
        0
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        if let Err(error) = self.take_away(Unmount::Lazy) {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "the mount stays behind");
        }
    }
}
