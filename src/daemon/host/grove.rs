//! The daemon's one FUSE connection, and the images that are shown from it.
//!
//! ```text
//! <run>/fs/snapshots/<number>/   a mounted image, bound to its mount point
//! <run>/fs/layers/<diffid>       a layer as one file
//! ```
//!
//! Images that share layers share the kernel's pages of them. A layer is shared only if it comes from the same blob: a diffID
//! is a claim of the image's config until all of the layer is here, and an image must not be shown what another one claims.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use futures::future::BoxFuture;
use tokio::sync::watch;

use super::lookout::Watch;
use super::shown::{Driver, Shown};
use crate::daemon::image::Lazy;
use crate::fuse;
use crate::model::{BlobDigest, DiffId, Name};
use crate::sys::fuse::MOUNT_KIND;
use crate::sys::mount::{self, MountEntry, MountError, Unmount};
use crate::sys::stack::mount_bind;
use crate::vfs::{Forest, Layer, LayerSlot, SnapshotSlot};

/// So many removed images may stay because the kernel remembers them. Making it forget costs the others their cached pages,
/// which is worse than some ten kilobytes of tables for each.
const REMEMBERED: usize = 16;

/// The connection.
pub struct Grove {
    place: PathBuf,
    forest: Arc<Forest<Lazy>>,
    server: fuse::Server,
    next: AtomicU64,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// Where the bytes of each layer come from that was listed.
    blobs: HashMap<DiffId, (BlobDigest, LayerSlot)>,
    /// How many images are shown.
    shown: usize,
    /// Images that are not, but may still be remembered by the kernel.
    gone: Vec<SnapshotSlot>,
}

/// A layer to be shown.
pub struct Shoot {
    /// What it claims to be.
    pub diff_id: DiffId,
    /// Where its bytes come from.
    pub blob: BlobDigest,
    /// It.
    pub layer: Arc<Layer<Lazy>>,
}

/// A layer is there already, and its bytes come from elsewhere.
#[derive(Debug, thiserror::Error)]
#[error("layer {diff_id} is shown from blob {shown} already, and nobody knows yet whether {blob} is the same")]
pub struct OtherBlob {
    diff_id: DiffId,
    shown: BlobDigest,
    blob: BlobDigest,
}

impl fmt::Debug for Grove {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grove").field("forest", &self.forest).field("server", &self.server).finish_non_exhaustive()
    }
}

impl Grove {
    /// Mounts the connection on `place`, which is made if it is missing; what a dead process left there is taken away.
    ///
    /// # Errors
    /// The kernel refuses, or this user may not.
    pub fn plant(place: &Path, patience: Duration) -> anyhow::Result<Arc<Self>> {
        while mount::is_ours(place)? {
            mount::unmount(place, Unmount::Lazy)?;
        }
        let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(place);
        made.with_context(|| format!("cannot create {}", place.display()))?;
        let forest = Arc::new(Forest::new());
        let options = fuse::ServeOptions { patience, ..fuse::ServeOptions::for_this_user("headstart") };
        let server = fuse::serve(Arc::clone(&forest), place, &options)?;
        let place = server.mount_point().to_owned();
        Ok(Arc::new(Self { place, forest, server, next: AtomicU64::new(1), table: Mutex::default() }))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether these layers can be shown here.
    ///
    /// # Errors
    /// [`OtherBlob`].
    pub fn admits(&self, layers: impl IntoIterator<Item = (DiffId, BlobDigest)>) -> Result<(), OtherBlob> {
        let table = self.table();
        layers.into_iter().try_for_each(|(diff_id, blob)| self.check(&table, diff_id, blob))
    }

    fn check(&self, table: &Table, diff_id: DiffId, blob: BlobDigest) -> Result<(), OtherBlob> {
        match table.blobs.get(&diff_id) {
            Some((shown, slot)) if *shown != blob && self.forest.has_layer(*slot) => {
                Err(OtherBlob { diff_id, shown: *shown, blob })
            }
            _ => Ok(()),
        }
    }

    /// Lists an image of `layers`, the lowest first.
    ///
    /// # Errors
    /// [`OtherBlob`], or the forest refuses.
    pub fn grow(self: &Arc<Self>, layers: Vec<Shoot>) -> anyhow::Result<Planted> {
        let name = self.next.fetch_add(1, Ordering::Relaxed).to_string();
        let mut planted = Planted { grove: Arc::clone(self), name, layers: Vec::new(), snapshot: None };
        for Shoot { diff_id, blob, layer } in layers {
            // Held over both, so that nobody lists another blob in between.
            let mut table = self.table();
            self.check(&table, diff_id, blob)?;
            let slot = self.forest.add_layer(diff_id, layer, None)?;
            table.blobs.insert(diff_id, (blob, slot));
            planted.layers.push(slot);
        }
        let name = Name::new(planted.name.as_bytes()).context("a number is a name")?;
        planted.snapshot = Some(self.forest.add_snapshot(&name, &planted.layers, None)?);
        self.table().shown += 1;
        Ok(planted)
    }

    /// Ends the connection when the last file is closed; false if some is open for longer than `patience`.
    pub fn close(&self, patience: Duration) -> bool {
        if let Err(error) = self.server.unmount(Unmount::Lazy) {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "the FUSE connection stays behind");
            return true;
        }
        let over = self.server.wait_for(patience);
        if let Err(error) = fs::remove_dir(&self.place) {
            tracing::debug!(%error, "cannot remove {}", self.place.display());
        }
        over
    }

    fn ungrow(&self, planted: &Planted) {
        if let Some(snapshot) = planted.snapshot {
            if let Err(error) = self.forest.remove_snapshot(snapshot) {
                tracing::error!(%error, "an image was removed twice");
            }
            let mut table = self.table();
            table.shown -= 1;
            table.gone.push(snapshot);
        }
        for layer in &planted.layers {
            if let Err(error) = self.forest.remove_layer(*layer) {
                tracing::error!(%error, "a layer was removed twice");
            }
        }
        let forget = {
            let mut table = self.table();
            table.gone.retain(|snapshot| self.forest.has_snapshot(*snapshot));
            table.blobs.retain(|_, (_, slot)| self.forest.has_layer(*slot));
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

/// An image that is listed; dropped, it is not any more. Whoever uses it goes on doing so.
#[derive(Debug)]
pub struct Planted {
    grove: Arc<Grove>,
    name: String,
    layers: Vec<LayerSlot>,
    snapshot: Option<SnapshotSlot>,
}

impl Planted {
    /// Its root directory.
    pub fn directory(&self) -> PathBuf {
        self.grove.place.join("snapshots").join(&self.name)
    }

    /// The file that is a layer.
    pub fn layer_file(&self, diff_id: &DiffId) -> PathBuf {
        self.grove.place.join("layers").join(Forest::<Lazy>::layer_name(diff_id))
    }
}

impl Drop for Planted {
    fn drop(&mut self) {
        self.grove.ungrow(self);
    }
}

/// A listed image bound to a mount point, or below a writable layer there.
#[derive(Debug)]
pub(super) struct Bound {
    mount_point: PathBuf,
    over: watch::Receiver<bool>,
    /// It was taken away by this process: what is mounted there now is something else.
    taken: Arc<AtomicBool>,
    watch: Watch,
    /// Goes when nothing is mounted any more.
    _planted: Planted,
}

/// Mounts a listed image on `mount_point`, below the writable layer `upper` if there is one.
///
/// # Errors
/// The kernel refuses.
pub(super) fn bind(planted: Planted, mount_point: &Path, upper: Option<&Path>, watch: &Watch) -> anyhow::Result<Bound> {
    match upper {
        None => mount_bind(&planted.directory(), mount_point)?,
        Some(upper) => mount::mount_writable(&planted.directory(), upper, mount_point)?,
    }
    let (place, writable) = (mount_point.to_owned(), upper.is_some());
    let is_it = move |entry: &MountEntry| {
        let kind = if writable { entry.source == "headstart" } else { entry.kind == MOUNT_KIND };
        kind && entry.mount_point == place
    };
    let taken = Arc::new(AtomicBool::new(false));
    let is_taken = Arc::clone(&taken);
    match watch.until(move |table| is_taken.load(Ordering::Acquire) || !table.iter().any(&is_it)) {
        Ok(over) => {
            let (mount_point, watch) = (mount_point.to_owned(), watch.clone());
            Ok(Bound { mount_point, over, taken, watch, _planted: planted })
        }
        Err(error) => {
            mount::unmount(mount_point, Unmount::Lazy)?;
            Err(error)
        }
    }
}

impl Shown for Bound {
    fn driver(&self) -> Driver {
        Driver { name: "fuse", why: None }
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
