//! The process that serves one mount: opens the image, mounts it, answers the control socket, ends it in order.
//!
//! Guarantees: when it is ready the mount is usable; however it ends (asked, interrupted, unmounted by somebody else) no
//! mount, socket or record is left, unless it is killed, and then the record tells. Refuses to know how it was started.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};

use super::config::Config as Settings;
use super::image::{House, OpenImage};
use super::mounts::{MountRecord, Mounts};
use crate::control::{ControlServer, LayerState, LayerStatus, MountStatus, Served, Unmount, Unmounted};
use crate::fetch;
use crate::fuse;
use crate::oci::{Platform, Reference};
use crate::sys::mount::{self, MountError};

/// How long a mount that was taken away lazily at the end of the process is still served for those who have files open.
const LAST_FILES: Duration = Duration::from_secs(5);

/// The only driver there is.
pub const DRIVER: &str = "fuse";

/// What to mount where.
#[derive(Debug, Clone)]
pub struct MountRequest {
    /// The image.
    pub image: Reference,
    /// Which of a multi-platform image; none is this machine's.
    pub platform: Option<Platform>,
    /// The mount point, absolute and without links: see [`mount::check_mount_point`].
    pub mount_point: PathBuf,
    /// Directory of a writable layer on top.
    pub upper: Option<PathBuf>,
}

/// Mounts and serves until the mount ends. `ready` is called when it is usable. Blocks; `runtime` does the waiting.
///
/// # Errors
/// Anything on the way to being ready; afterwards nothing is one.
pub fn serve(
    settings: &Settings,
    request: &MountRequest,
    runtime: &Handle,
    ready: impl FnOnce() -> io::Result<()>,
) -> anyhow::Result<()> {
    let claim = Mounts::open(&settings.root)?.claim(&request.mount_point)?;
    // Nobody may have mounted anything since the caller looked.
    mount::check_mount_point(&request.mount_point)?;
    let house = House::open(settings, runtime.clone())?;
    let image = runtime.block_on(async {
        let documents = house.documents(&request.image, request.platform.as_ref()).await?;
        house.open_image(documents).await
    })?;
    let file_system = image.file_system()?;
    let options = fuse::ServeOptions {
        patience: settings.fetch.deadline,
        ..fuse::ServeOptions::for_this_user(request.image.to_string())
    };
    let server = match &request.upper {
        None => fuse::serve(file_system, &request.mount_point, &options)?,
        Some(upper) => {
            let lower = claim.lower()?;
            let server = fuse::serve(file_system, &lower, &options)?;
            mount::mount_writable(server.mount_point(), upper, &request.mount_point)?;
            // The overlay keeps the image alive; without a mount of its own it ends with the overlay, whoever ends that.
            server.unmount(mount::Unmount::Lazy)?;
            server
        }
    };
    let serving =
        Arc::new(Serving { image, server, mount_point: request.mount_point.clone(), upper: request.upper.clone() });
    let (end, ended) = mpsc::channel();
    let socket = {
        let _inside = runtime.enter();
        ControlServer::bind(&claim.socket()).context("cannot open the control socket")?
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let served: Arc<dyn Served> = Arc::<Serving>::clone(&serving);
    let answering = runtime.spawn(socket.run(served, async {
        // A sender that is gone stops it as well.
        stopped.await.ok();
    }));
    watch_signals(runtime, end.clone())?;
    watch_session(&serving, end)?;
    claim.publish(&serving.record())?;
    ready().context("cannot tell that the mount is ready")?;
    tracing::info!(image = %request.image, mount_point = %request.mount_point.display(), "mounted");
    serving.stay(&ended);
    drop(stop);
    if let Err(error) = runtime.block_on(answering) {
        tracing::warn!(%error, "the control socket ended with a fault");
    }
    tracing::info!(mount_point = %request.mount_point.display(), "unmounted");
    Ok(())
}

/// Why a serving process wakes up.
enum Wake {
    /// Somebody wants it to end.
    Signal,
    /// The kernel says that the mount is gone.
    Over,
}

fn watch_signals(runtime: &Handle, wake: mpsc::Sender<Wake>) -> anyhow::Result<()> {
    let _inside = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
    let mut hang_up = signal(SignalKind::hangup()).context("cannot listen for signals")?;
    runtime.spawn(async move {
        loop {
            tokio::select! { _ = interrupt.recv() => (), _ = terminate.recv() => (), _ = hang_up.recv() => () }
            if wake.send(Wake::Signal).is_err() {
                return;
            }
        }
    });
    Ok(())
}

fn watch_session(serving: &Arc<Serving>, wake: mpsc::Sender<Wake>) -> anyhow::Result<()> {
    let serving = Arc::clone(serving);
    thread::Builder::new()
        .name("session-end".into())
        .spawn(move || {
            serving.server.wait();
            // Nobody listens any more if the end came otherwise.
            wake.send(Wake::Over).ok();
        })
        .context("cannot start a thread")?;
    Ok(())
}

/// A mount being served.
struct Serving {
    image: OpenImage,
    server: fuse::Server,
    mount_point: PathBuf,
    upper: Option<PathBuf>,
}

impl Serving {
    fn record(&self) -> MountRecord {
        MountRecord {
            image: self.image.documents.reference.to_string(),
            manifest: self.image.documents.digest,
            mount_point: self.mount_point.clone(),
            driver: DRIVER.to_owned(),
            pid: std::process::id(),
            upper: self.upper.clone(),
        }
    }

    /// Takes the mount away. That somebody else did is as good.
    fn take_away(&self, how: mount::Unmount) -> Result<(), MountError> {
        if self.server.is_over() {
            return Ok(());
        }
        match mount::unmount(&self.mount_point, how) {
            Err(MountError::NotMounted(_)) => Ok(()),
            other => other,
        }
    }

    /// Waits for the end, and brings it about when a signal asks for it.
    fn stay(&self, wake: &mpsc::Receiver<Wake>) {
        match wake.recv() {
            Ok(Wake::Over) | Err(mpsc::RecvError) => return,
            Ok(Wake::Signal) => {}
        }
        if let Err(error) = self.take_away(mount::Unmount::Strict) {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "the mount is in use: it is taken away, and ends when the last file is closed");
            if let Err(error) = self.take_away(mount::Unmount::Lazy) {
                let error: &dyn std::error::Error = &error;
                tracing::error!(error, "the mount stays behind");
                return;
            }
        }
        if !self.server.wait_for(LAST_FILES) {
            tracing::warn!("files are still open: whoever reads them gets errors from now on");
        }
    }
}

impl Served for Serving {
    fn status(&self) -> MountStatus {
        let layers: Vec<fetch::LayerStatus> = self.image.layers.iter().map(|layer| layer.status()).collect();
        let sum = |of: fn(&fetch::Counters) -> u64| layers.iter().map(|layer| of(&layer.counters)).sum();
        let MountRecord { image, manifest, mount_point, driver, pid, upper } = self.record();
        MountStatus {
            image,
            manifest,
            mount_point,
            driver,
            pid,
            upper,
            bytes_fetched: sum(|counters| counters.fetched),
            bytes_demanded: sum(|counters| counters.needed),
            layers: layers.iter().map(told).collect(),
        }
    }

    fn unmount(&self, how: Unmount) -> Unmounted {
        let how_to = if how.lazy { mount::Unmount::Lazy } else { mount::Unmount::Strict };
        match self.take_away(how_to) {
            Ok(()) => Unmounted::Done,
            Err(MountError::InUse(_)) => Unmounted::Busy,
            Err(error) => Unmounted::Refused(format!("{:#}", anyhow::Error::new(error))),
        }
    }
}

/// A layer's status as the control socket tells it.
fn told(layer: &fetch::LayerStatus) -> LayerStatus {
    LayerStatus {
        digest: layer.blob,
        diff_id: Some(layer.diff_id),
        state: layer_state(layer.state),
        chunks: layer.chunks.into(),
        present: layer.present.into(),
        bytes: layer.bytes,
        bytes_present: layer.bytes_present,
    }
}

/// A layer's state as it is told.
pub const fn layer_state(state: fetch::LayerState) -> LayerState {
    match state {
        fetch::LayerState::Lazy => LayerState::Lazy,
        fetch::LayerState::Filling => LayerState::Filling,
        fetch::LayerState::Local => LayerState::Local,
    }
}

/// Ends the mount on `mount_point` whose serving process is gone or is none of this root's.
///
/// # Errors
/// Nothing of this program is mounted there, or the kernel refuses.
pub fn unmount_orphan(mount_point: &Path, lazy: bool) -> Result<(), MountError> {
    let how = if lazy { mount::Unmount::Lazy } else { mount::Unmount::Strict };
    mount::unmount(mount_point, how)
}
