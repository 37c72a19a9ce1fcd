//! Images that the kernel presents, and their layers handed over to it as they become local.
//!
//! ```text
//! <root>/run/<n>/      what a process of this root has mounted: see `drivers::RunDirectory`
//! <root>/run/<n>/fs    its FUSE connection with the lazily filled files, while there are any
//! ```
//!
//! Guarantees: what the kernel cannot present is shown through FUSE, with the reason; when the last lazy layer of the last
//! mount has been handed over, the FUSE connection is gone. Refuses to know how layers become local.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use futures::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::sync::watch;

use super::MountRequest;
use super::shown::{Driver, Shown};
use crate::daemon::config::Config as Settings;
use crate::daemon::image::{Lazy, OpenImage};
use crate::drivers::leftovers::{self, Leftover, Outcome};
use crate::drivers::{
    self, Backing, Capabilities, Choice, DriverError, KernelMounts, LayerBacking, LayerFacts, Presented, RunDirectory,
    Wanted, choose,
};
use crate::fetch::{LayerImage, LocalLayer};
use crate::fuse;
use crate::model::{DiffId, ReadAt as _};
use crate::sys::loopdev::backing_of;
use crate::sys::mount::{MountError, Unmount};
use crate::sys::stack::MountWatch;
use crate::vfs::{self, Forest, LayerSlot};

/// How much longer than a reader the kernel may wait, so that the reason is the reader's.
const LONGER: Duration = Duration::from_secs(5);

/// Loop devices read complete files through their page cache. Past it, a layer would be cached once and not twice, and 759 MiB
/// in sequence come in 3.5 s instead of 3.9 s; but a layer that was just filled is in that cache, and from there 6000 random
/// reads of 4 KiB take 0.1 s, past it 3.5 s (1 GiB image, virtual disk, two cores).
const DIRECT_IO: bool = false;

/// How often a hand-over is tried, and the pause between. It fails when the machine is short of something.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_secs(2);

/// How long the mount table is believed without a look at it.
const BELIEF: Duration = Duration::from_secs(60);

/// How often a device that somebody still reads is looked at.
const GLANCE: Duration = Duration::from_millis(50);

/// Where the processes of `root` mount.
fn run_directories(root: &Path) -> PathBuf {
    root.join("run")
}

/// What a host needs for images that the kernel presents: nothing until there is one.
#[derive(Debug)]
pub(super) struct KernelSide {
    runtime: Handle,
    ground: Mutex<Weak<Ground>>,
}

/// The run directory of this process, as long as there is a mount in it.
#[derive(Debug)]
struct Ground {
    mounts: KernelMounts,
    files: Mutex<Weak<LazyFiles>>,
}

/// The FUSE connection with the lazily filled files, as long as one of them is needed.
#[derive(Debug)]
struct LazyFiles {
    forest: Arc<Forest<Lazy>>,
    /// Where the bytes of each layer come from that was listed.
    sources: Mutex<HashMap<DiffId, (u64, LayerSlot)>>,
    server: Option<fuse::Server>,
    mount_point: PathBuf,
    /// The last to go.
    _ground: Arc<Ground>,
}

/// A lazily filled file.
#[derive(Debug)]
struct LazyFile {
    files: Arc<LazyFiles>,
    slot: LayerSlot,
}

impl KernelSide {
    pub(super) fn new(runtime: Handle) -> Self {
        Self { runtime, ground: Mutex::default() }
    }

    /// Mounts `image` with the driver that is asked for or the next one that works. Waits for the kernel, which may wait for
    /// the network.
    ///
    /// # Errors
    /// Why it is to be shown through FUSE.
    pub(super) fn show(
        &self,
        image: &OpenImage,
        request: &MountRequest,
        settings: &Settings,
    ) -> Result<Box<dyn Shown>, String> {
        let choice = match request.driver {
            // Nothing to ask the machine.
            Wanted::Driver(drivers::Driver::Fuse) => choose(request.driver, &Capabilities::unknown(), &[]),
            wanted => choose(wanted, &Capabilities::probe(&settings.root), &facts(image)),
        };
        if choice.driver == drivers::Driver::Fuse {
            return Err(choice.why);
        }
        match self.present(image, request, settings, choice.clone()) {
            Ok(shown) => Ok(Box::new(shown)),
            Err(error) => {
                let why = choice.after(error.as_ref()).why;
                tracing::warn!(mount_point = %request.mount_point.display(), "{why}");
                Err(why)
            }
        }
    }

    /// How many FUSE connections there are for lazy files.
    pub(super) fn connections(&self) -> u64 {
        let ground = lock(&self.ground).upgrade();
        u64::from(ground.is_some_and(|ground| lock(&ground.files).strong_count() > 0))
    }

    fn present(
        &self,
        image: &OpenImage,
        request: &MountRequest,
        settings: &Settings,
        choice: Choice,
    ) -> anyhow::Result<KernelShown> {
        let ground = self.ground(settings)?;
        let (mut backings, mut files, mut lazy) = (Vec::new(), HashMap::new(), Vec::new());
        for layer in stack(image) {
            let (diff_id, source) = (layer.diff_id(), source_of(layer));
            backings.push(match layer.local() {
                Some(local) => LayerBacking { diff_id, source, size: local.size, lazy: None, local: Some(local.image) },
                None => {
                    let file = self.lazy_file(&ground, layer, settings, &request.image.to_string())?;
                    let path = file.path(&diff_id);
                    files.insert(diff_id, file);
                    lazy.push(layer);
                    LayerBacking { diff_id, source, size: layer.size(), lazy: Some(path), local: None }
                }
            });
        }
        let watch = MountWatch::start().context("cannot watch the mount table")?;
        let presented = ground.mounts.present(&backings, &request.mount_point, request.upper.as_deref())?;
        let inner = Arc::new(Inner {
            presented: Mutex::new(Some(Arc::new(presented))),
            files: Mutex::new(files),
            ground,
            choice,
            devices: Mutex::default(),
            _layers: stack(image).cloned().collect(),
        });
        for layer in lazy {
            let inner = Arc::downgrade(&inner);
            layer.when_local(move |layer, local| hand_over(&inner, source_of(layer), local));
        }
        let (say, over) = watch::channel(false);
        let watched = Arc::downgrade(&inner);
        thread::Builder::new()
            .name("mount-watch".into())
            .spawn(move || {
                wait_for_end(&watched, &watch);
                say.send_replace(true);
            })
            .context("cannot start a thread")?;
        Ok(KernelShown { inner, over })
    }

    fn ground(&self, settings: &Settings) -> Result<Arc<Ground>, DriverError> {
        let mut known = lock(&self.ground);
        if let Some(ground) = known.upgrade() {
            return Ok(ground);
        }
        let run = RunDirectory::claim_new(&run_directories(&settings.root))?;
        let mounts = KernelMounts::new(run, settings.fetch.deadline.saturating_add(LONGER), DIRECT_IO);
        let ground = Arc::new(Ground { mounts, files: Mutex::default() });
        *known = Arc::downgrade(&ground);
        Ok(ground)
    }

    fn lazy_file(
        &self,
        ground: &Arc<Ground>,
        layer: &Arc<LayerImage>,
        settings: &Settings,
        name: &str,
    ) -> anyhow::Result<LazyFile> {
        // The superblock has been brought for the file system that is there in case the kernel will not do.
        let opened = self.runtime.block_on(vfs::open_layer(0, Lazy::new(layer), Vec::new()))?;
        let files = ground.files(settings, name)?;
        let (diff_id, source) = (layer.diff_id(), source_of(layer));
        // Held over both, so that nobody lists another one in between.
        let mut sources = lock(&files.sources);
        match sources.get(&diff_id) {
            Some((other, slot)) if *other != source && files.forest.has_layer(*slot) => {
                return Err(OtherSource(diff_id).into());
            }
            _ => {}
        }
        let slot = files.forest.add_layer(diff_id, Arc::new(opened), None)?;
        sources.insert(diff_id, (source, slot));
        drop(sources);
        Ok(LazyFile { files, slot })
    }
}

/// The layers that are stacked, the lowest first.
fn stack(image: &OpenImage) -> impl Iterator<Item = &Arc<LayerImage>> {
    image.plan.stack.iter().filter_map(|stacked| image.layers.get(stacked.layer))
}

/// What tells layers apart that claim to have the same diffID: a claim is nothing before all of a layer is here. A layer is
/// open once in a process for each blob and index.
fn source_of(layer: &Arc<LayerImage>) -> u64 {
    Arc::as_ptr(layer).addr() as u64
}

/// Another layer of the same diffID has a lazy file.
#[derive(Debug, thiserror::Error)]
#[error("layer {0} is presented from another blob already, and nobody knows yet whether they are the same")]
struct OtherSource(DiffId);

/// What decides about the layers of `image`.
fn facts(image: &OpenImage) -> Vec<LayerFacts> {
    let needs_more = image.plan.stack.iter().map(|stacked| !stacked.devices.is_empty() || !stacked.data.is_empty());
    let facts = stack(image).zip(needs_more).map(|(layer, needs_more)| {
        let (size, local) = (layer.size(), layer.local().is_some());
        let obstacle = if needs_more {
            Some("it keeps contents in further layers".to_owned())
        } else {
            (!local && !size.is_multiple_of(512)).then(|| format!("its {size} bytes are no multiple of 512"))
        };
        LayerFacts { diff_id: layer.diff_id(), local, lazy: layer.status().chunks > 0, obstacle }
    });
    facts.collect()
}

impl Ground {
    /// The connection, which is made if there is none.
    fn files(self: &Arc<Self>, settings: &Settings, source: &str) -> anyhow::Result<Arc<LazyFiles>> {
        let mut known = lock(&self.files);
        if let Some(files) = known.upgrade() {
            return Ok(files);
        }
        // One that is about to go may still have the name.
        let mut number = 0;
        let mount_point = loop {
            let path = self.mounts.run().join(format!("fs{number}"));
            match fs::create_dir(&path) {
                Ok(()) => break path,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => number += 1,
                Err(error) => return Err(error).with_context(|| format!("cannot create {}", path.display())),
            }
        };
        let forest = Arc::new(Forest::new());
        let options =
            fuse::ServeOptions { patience: settings.fetch.deadline, ..fuse::ServeOptions::for_this_user(source) };
        let mut files = LazyFiles {
            forest: Arc::clone(&forest),
            sources: Mutex::default(),
            server: None,
            mount_point,
            _ground: Arc::clone(self),
        };
        files.server = Some(fuse::serve(forest, &files.mount_point, &options)?);
        let files = Arc::new(files);
        *known = Arc::downgrade(&files);
        Ok(files)
    }
}

impl Drop for LazyFiles {
    fn drop(&mut self) {
        drop(self.server.take());
        if let Err(error) = fs::remove_dir(&self.mount_point) {
            tracing::warn!(path = %self.mount_point.display(), %error, "a directory stays behind");
        }
    }
}

impl LazyFile {
    fn path(&self, diff_id: &DiffId) -> PathBuf {
        self.files.mount_point.join("layers").join(Forest::<Lazy>::layer_name(diff_id))
    }
}

impl Drop for LazyFile {
    fn drop(&mut self) {
        if let Err(error) = self.files.forest.remove_layer(self.slot) {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "a lazily filled file stays listed");
        }
    }
}

/// An image that the kernel presents.
struct KernelShown {
    inner: Arc<Inner>,
    over: watch::Receiver<bool>,
}

/// No lock is held over a system call.
struct Inner {
    /// None when it is over.
    presented: Mutex<Option<Arc<Presented>>>,
    /// What the kernel still reads through FUSE.
    files: Mutex<HashMap<DiffId, LazyFile>>,
    choice: Choice,
    /// Devices on lazy files that were in use when it was over, and those files.
    devices: Mutex<Vec<(u32, PathBuf)>>,
    ground: Arc<Ground>,
    /// The last to go: where a layer is in memory tells mounts of it apart, see [`source_of`].
    _layers: Vec<Arc<LayerImage>>,
}

impl std::fmt::Debug for KernelShown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("KernelShown").field(&self.inner.presented).finish()
    }
}

impl Inner {
    fn presented(&self) -> Option<Arc<Presented>> {
        lock(&self.presented).clone()
    }

    /// Lets go of what was presented. Those who have files open keep what they need of it.
    fn detach(&self) {
        let Some(presented) = self.presented() else { return };
        let lazy = presented.layers().into_iter().filter(|layer| layer.backing == Backing::Lazy);
        *lock(&self.devices) = lazy.filter_map(|layer| Some((layer.device?, layer.file))).collect();
        drop(presented);
        let taken = lock(&self.presented).take();
        drop(taken);
    }

    /// True if a lazy file is still read: through what was detached, which was in use when it was taken away, or through
    /// another stack that shows the layer.
    fn is_read(&self) -> bool {
        let devices = lock(&self.devices).clone();
        devices.iter().any(|(number, file)| backing_of(*number).is_ok_and(|backing| backing.as_ref() == Some(file)))
    }

    /// Nobody reads lazy files any more.
    fn let_go(&self) {
        let files = std::mem::take(&mut *lock(&self.files));
        drop(files);
    }
}

/// Waits until it is unmounted, by whomever, and nobody reads through it any more.
fn wait_for_end(inner: &Weak<Inner>, watch: &MountWatch) {
    loop {
        let Some(inner) = inner.upgrade() else { return };
        match inner.presented().map(|presented| presented.is_over()) {
            Some(Ok(false)) => {}
            None | Some(Ok(true)) => {
                inner.detach();
                while inner.is_read() {
                    thread::sleep(GLANCE);
                }
                return inner.let_go();
            }
            Some(Err(error)) => tracing::warn!(%error, "cannot read the mount table"),
        }
        drop(inner);
        if let Err(error) = watch.wait(BELIEF) {
            tracing::warn!(%error, "cannot watch the mount table");
            thread::sleep(PAUSE);
        }
    }
}

/// Lets the kernel read a layer from its complete file. On a thread that may wait.
fn hand_over(inner: &Weak<Inner>, source: u64, local: &LocalLayer) {
    for attempt in 1..=TRIES {
        let Some(inner) = inner.upgrade() else { return };
        match inner.ground.mounts.hand_over(&local.diff_id, source, &local.image) {
            Ok(()) => {
                let file = lock(&inner.files).remove(&local.diff_id);
                drop(file);
                tracing::info!(layer = %local.diff_id, "the kernel reads the layer from its local file");
                return;
            }
            // It was unmounted meanwhile.
            Err(DriverError::NotMounted(_)) => return,
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(layer = %local.diff_id, attempt, error, "the layer is not handed over");
            }
        }
        drop(inner);
        thread::sleep(PAUSE);
    }
}

impl Shown for KernelShown {
    fn driver(&self) -> Driver {
        let Choice { driver, why } = &self.inner.choice;
        let handed_over = self.inner.presented().is_some_and(|presented| presented.is_local());
        match (driver, handed_over) {
            (drivers::Driver::Kernel, true) => {
                Driver { name: "local", why: Some("all layers were handed over to the kernel".to_owned()) }
            }
            (drivers::Driver::Kernel, false) => Driver { name: "kernel", why: Some(why.clone()) },
            _ => Driver { name: "local", why: Some(why.clone()) },
        }
    }

    fn layer(&self, diff_id: &DiffId) -> Option<String> {
        let layers = self.inner.presented()?.layers();
        let layer = layers.into_iter().find(|layer| layer.diff_id == *diff_id)?;
        let device = layer.device.map(|number| format!(" through loop{number}")).unwrap_or_default();
        let from = match layer.backing {
            Backing::Lazy => "lazy file",
            Backing::Local(_) => "local file",
        };
        let failure = layer.failure.map(|failure| format!("; not handed over: {failure}")).unwrap_or_default();
        Some(format!("the kernel reads the {from}{device}{failure}"))
    }

    fn take_away(&self, how: Unmount) -> Result<(), MountError> {
        let Some(presented) = self.inner.presented() else { return Ok(()) };
        presented.take_away(how)?;
        drop(presented);
        self.inner.detach();
        if !self.inner.is_read() {
            self.inner.let_go();
        }
        Ok(())
    }

    fn own_connections(&self) -> u64 {
        0
    }

    fn ended(&self) -> BoxFuture<'static, ()> {
        let mut over = self.over.clone();
        Box::pin(async move {
            // A sender that is gone without a word has ended as well.
            over.wait_for(|over| *over).await.ok();
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What killed processes of a root left of kernel mounts, by run directory.
///
/// # Errors
/// The system cannot be asked.
pub fn left_behind(root: &Path) -> Result<Vec<(PathBuf, Vec<Leftover>)>, DriverError> {
    let mut found = Vec::new();
    for run in listed(&run_directories(root))? {
        if let Some(left) = leftovers::look(&run)? {
            found.push((run, left));
        }
    }
    Ok(found)
}

/// Takes away what killed processes of a root left of kernel mounts; with [`Unmount::Strict`] not what is in use.
///
/// # Errors
/// The system cannot be asked.
pub fn take_away_left(root: &Path, how: Unmount) -> Result<Outcome, DriverError> {
    let mut all = Outcome::default();
    for run in listed(&run_directories(root))? {
        if let Some(outcome) = leftovers::remove(&run, how)? {
            all.removed.extend(outcome.removed);
            all.kept.extend(outcome.kept);
        }
    }
    Ok(all)
}

/// Takes away what killed processes of a root left for mounts that are gone.
pub fn sweep(root: &Path) {
    let swept = left_behind(root).and_then(|found| {
        let is_mount = |left: &Leftover| matches!(left, Leftover::Overlay { .. });
        for (run, _) in found.into_iter().filter(|(_, left)| !left.iter().any(is_mount)) {
            leftovers::remove(&run, Unmount::Strict)?;
        }
        Ok(())
    });
    if let Err(error) = swept {
        let error: &dyn std::error::Error = &error;
        tracing::warn!(error, "what a killed process left stays: see `headstart cleanup`");
    }
}

fn listed(base: &Path) -> Result<Vec<PathBuf>, DriverError> {
    let failed = |source| DriverError::Io { action: "list", path: base.to_owned(), source };
    match fs::read_dir(base) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        listing => {
            let entries = listing.map_err(failed)?.map(|entry| entry.map(|entry| entry.path()).map_err(failed));
            let mut paths = entries.collect::<Result<Vec<_>, _>>()?;
            paths.sort();
            Ok(paths)
        }
    }
}
