//! The process that serves one mount: a host that ends when its mount ends.
//!
//! Guarantees: when it is ready the mount is usable; see [`Host`] for how it ends. Refuses to know how it was started.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};

use super::api::{Api, Judge};
use super::config::Config as Settings;
use super::host::{Host, MountRequest};
use crate::control::ControlServer;
use crate::sys::mount::{self, MountError};

/// How long a mount that was taken away lazily at the end of the process is still served for those who have files open.
const LAST_FILES: Duration = Duration::from_secs(5);

/// Mounts and serves until the mount ends. `ready` is called when it is usable. Blocks; `runtime` does the waiting.
///
/// # Errors
/// Anything on the way to being ready; afterwards nothing is one.
pub fn serve(
    settings: &Settings,
    request: MountRequest,
    runtime: &Handle,
    judge: Judge,
    ready: impl FnOnce() -> io::Result<()>,
) -> anyhow::Result<()> {
    let host = Host::open(settings, runtime.clone(), None)?;
    let claim = host.claim(&request.mount_point, request.upper.as_deref())?;
    runtime.block_on(async {
        let socket = ControlServer::bind(&claim.socket()).context("cannot open the control socket")?;
        let mut signals = Signals::listen()?;
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let answering = tokio::spawn(socket.run(Arc::new(Api::new(Arc::clone(&host), judge)), async {
            // A sender that is gone stops it as well.
            stopped.await.ok();
        }));
        host.mount(claim, request).await?;
        let told = ready().context("cannot tell that the mount is ready");
        if told.is_ok() {
            tokio::select! { () = host.empty() => (), () = signals.next() => () }
        }
        host.shut_down(LAST_FILES).await;
        drop(stop);
        if let Err(error) = answering.await {
            tracing::warn!(%error, "the control socket ended with a fault");
        }
        told
    })
}

/// The signals that ask a process to end.
struct Signals([tokio::signal::unix::Signal; 3]);

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self([listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?, listen(SignalKind::hangup())?]))
    }

    async fn next(&mut self) {
        let [interrupt, terminate, hang_up] = &mut self.0;
        tokio::select! { _ = interrupt.recv() => (), _ = terminate.recv() => (), _ = hang_up.recv() => () }
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
