//! How an image is shown at a mount point.
//!
//! Each way is a [`Shown`]; whoever makes one has mounted it. All of it waits for the kernel and runs on threads that serve
//! nothing.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use anyhow::Context as _;
use futures::future::BoxFuture;
use tokio::sync::watch;

use super::MountRequest;
use crate::daemon::config::Config as Settings;
use crate::daemon::image::Lazy;
use crate::daemon::mounts::Claim;
use crate::fuse;
use crate::model::DiffId;
use crate::sys::mount::{self, MountError, Unmount};
use crate::vfs::Vfs;

/// How an image is presented, and why so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Driver {
    /// `fuse`, `kernel` or `local`.
    pub name: &'static str,
    /// Why not another one, if there is more to say.
    pub why: Option<String>,
}

/// An image that is mounted. Dropped, it is taken away as [`Unmount::Lazy`] says.
pub trait Shown: fmt::Debug + Send + Sync {
    /// How it is presented at this moment.
    fn driver(&self) -> Driver;

    /// How one of its layers is presented, if there is anything to say.
    fn layer(&self, _diff_id: &DiffId) -> Option<String> {
        None
    }

    /// Takes it away from its mount point. That somebody else did is as good. Waits for the kernel.
    ///
    /// # Errors
    /// It is in use, or the kernel refuses.
    fn take_away(&self, how: Unmount) -> Result<(), MountError>;

    /// Done when it is gone from the mount point and the last file is closed, by whomever and also if that was before.
    fn ended(&self) -> BoxFuture<'static, ()>;

    /// Leaves it to the next daemon: from now on it stays when it is dropped. False if it does not go on without this
    /// process, or another one could not take it up.
    fn leave(&self) -> bool {
        false
    }

    /// How many FUSE connections it has for itself.
    fn own_connections(&self) -> u64;
}

/// An image on a FUSE connection of its own: the way that works for every user.
struct OwnConnection {
    why: Option<String>,
    server: Arc<fuse::Server>,
    mount_point: PathBuf,
    over: watch::Receiver<bool>,
}

impl fmt::Debug for OwnConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OwnConnection").field(&self.server).finish()
    }
}

/// Mounts a file system on a FUSE connection of its own, under a writable layer if one is asked for.
pub(super) fn own_connection(
    file_system: Vfs<Lazy>,
    why: Option<String>,
    request: &MountRequest,
    claim: &Claim,
    settings: &Settings,
) -> anyhow::Result<Box<dyn Shown>> {
    let options = fuse::ServeOptions {
        patience: settings.fetch.deadline,
        ..fuse::ServeOptions::for_this_user(request.image.to_string())
    };
    let server = match &request.upper {
        None => fuse::serve(file_system, &request.mount_point, &options)?,
        Some(upper) => {
            let lower = claim.lower()?;
            let server = fuse::serve(file_system, &lower, &options)?;
            mount::mount_writable(mount::NAME, server.mount_point(), upper, &request.mount_point)?;
            // The overlay keeps the image alive; without a mount of its own it ends with the overlay, whoever ends that.
            server.unmount(Unmount::Lazy)?;
            server
        }
    };
    let server = Arc::new(server);
    let (say, over) = watch::channel(false);
    let shown = OwnConnection { why, server: Arc::clone(&server), mount_point: request.mount_point.clone(), over };
    thread::Builder::new()
        .name("session-end".into())
        .spawn(move || {
            server.wait();
            say.send_replace(true);
        })
        .context("cannot start a thread")?;
    Ok(Box::new(shown))
}

impl Shown for OwnConnection {
    fn driver(&self) -> Driver {
        Driver { name: "fuse", why: self.why.clone() }
    }

    fn take_away(&self, how: Unmount) -> Result<(), MountError> {
        if self.server.is_over() {
            return Ok(());
        }
        match mount::unmount(&self.mount_point, how) {
            Err(MountError::NotMounted(_)) => Ok(()),
            other => other,
        }
    }

    fn ended(&self) -> BoxFuture<'static, ()> {
        let mut over = self.over.clone();
        Box::pin(async move {
            // A sender that is gone without a word has ended as well.
            over.wait_for(|over| *over).await.ok();
        })
    }

    fn own_connections(&self) -> u64 {
        1
    }
}

/// One way with a reason why it is not another.
#[derive(Debug)]
pub(super) struct Explained(pub(super) Box<dyn Shown>, pub(super) String);

impl Shown for Explained {
    fn driver(&self) -> Driver {
        let Driver { name, why } = self.0.driver();
        let more = why.map(|why| format!("; {why}")).unwrap_or_default();
        Driver { name, why: Some(format!("{}{more}", self.1)) }
    }

    fn layer(&self, diff_id: &DiffId) -> Option<String> {
        self.0.layer(diff_id)
    }

    fn take_away(&self, how: Unmount) -> Result<(), MountError> {
        self.0.take_away(how)
    }

    fn ended(&self) -> BoxFuture<'static, ()> {
        self.0.ended()
    }

    fn leave(&self) -> bool {
        self.0.leave()
    }

    fn own_connections(&self) -> u64 {
        self.0.own_connections()
    }
}

impl Drop for OwnConnection {
    fn drop(&mut self) {
        if let Err(error) = self.take_away(Unmount::Lazy) {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "the mount stays behind");
        }
    }
}
