//! From one daemon to the next: what goes on without a process, or is kept for another one, is left and taken up again.
//!
//! Guarantees: what a daemon before this one has recorded is mounted again or goes on as it is, or stays recorded; a host that
//! leaves takes nothing away, also not what comes late. Refuses to know who starts and ends daemons.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::shown::{Driver, Shown};
use super::{Doors, Host, MountRequest, Mounted, grove, sweep};
use crate::control::MountRecord;
use crate::daemon::image::{Lazy, OpenImage};
use crate::daemon::mounts::{Entry, Mounts};
use crate::daemon::recorder::{self, WrittenMount};
use crate::oci::Reference;
use crate::sys::mount::{self, MountError};
use crate::unpack::Fill;
use crate::vfs::Layer;

impl Host {
    /// Mounts again what a dead daemon had recorded as `entry`, from what was kept of the image. What cannot be mounted
    /// stays recorded.
    ///
    /// # Errors
    /// Anything on the way there.
    pub async fn bring_back(self: &Arc<Self>, entry: &Entry) -> anyhow::Result<()> {
        if let Some(source) = self.still_shown(&entry.record)? {
            return self.take_up(&entry.record, source).await;
        }
        let record = entry.record.clone();
        let (host, dead) = (Arc::clone(self), record.clone());
        let clearing = self.runtime.spawn_blocking(move || {
            let adopt = host.shelf.has_stack_on(&dead.mount_point)?;
            if !adopt && mount::is_ours(&dead.mount_point)? {
                mount::unmount(&dead.mount_point, mount::Unmount::Lazy)?;
                sweep(&host.settings.root);
            }
            let claim = host.records.claim_dead(&dead.mount_point)?;
            if !adopt {
                mount::check_mount_point(&dead.mount_point)?;
            }
            anyhow::Ok((claim, adopt))
        });
        let (claim, adopt) = clearing.await.context("the thread that clears a mount point broke down")??;
        let image: Reference = record.image.parse()?;
        let documents = self.house.kept_documents(&image, record.manifest).await?;
        let (mount_point, upper) = (record.mount_point, record.upper);
        let (driver, fill) = (record.driver_wanted, !record.no_fill);
        let request = MountRequest { image, platform: None, mount_point, upper, driver, fill };
        self.mount_documents(claim, request, documents, adopt).await.map(drop)
    }

    /// What a daemon before this one shows on the mount point of `record`, if its connection was taken over: the source of the
    /// overlay on it, if it is one. What the kernel shows is taken up in another way.
    fn still_shown(&self, record: &MountRecord) -> anyhow::Result<Option<Option<String>>> {
        let grove = self.grove.as_ref().ok().filter(|grove| grove.was_taken_over() && record.driver == "fuse");
        let there = grove.map(|grove| grove::bound_there(grove, &record.mount_point, record.upper.is_some()));
        Ok(there.transpose()?.flatten())
    }

    /// Goes on with a mount that is there: lists again what it reads, under the numbers that it knows.
    async fn take_up(self: &Arc<Self>, record: &MountRecord, source: Option<String>) -> anyhow::Result<()> {
        let reference: Reference = record.image.parse()?;
        let documents = self.house.kept_documents(&reference, record.manifest).await?;
        let image = self.house.bring_image(documents, None).await?;
        let layers = image.open_stack().await?;
        let (host, record) = (Arc::clone(self), record.clone());
        let taking = self.runtime.spawn_blocking(move || {
            let mut claim = host.records.claim_dead(&record.mount_point)?;
            let (written, shown) = host.list_again(&image, layers, &record, source)?;
            let driver = shown.driver().name.to_owned();
            let record = MountRecord { pid: std::process::id(), driver, daemon: host.socket(), ..record };
            claim.publish(&record)?;
            let fills = !record.no_fill && host.settings.fill.enabled;
            let fill = fills.then(|| Fill::start(&host.runtime, &image.layers, host.fill_options()));
            host.enter(&Arc::new(Mounted::new(image, shown, record, (claim, Some(written)), fill)))
        });
        taking.await.context("the thread that takes a mount up broke down")?
    }

    fn list_again(
        &self,
        image: &OpenImage,
        layers: Vec<Layer<Lazy>>,
        record: &MountRecord,
        source: Option<String>,
    ) -> anyhow::Result<(WrittenMount, Box<dyn Shown>)> {
        let grove = self.grove.as_ref().ok().context("there is no connection")?;
        let written = WrittenMount::new(&self.house, image, &record.mount_point)?.context("nothing is written down")?;
        let shoots = self.shoots(image, layers, &written.layer_slots(image));
        let planted = Box::new(grove.grow(shoots, Some(written.slot().0))?);
        let driver = Driver { name: "fuse", why: Some("taken over from the daemon before this one".to_owned()) };
        let bound = grove::watch_over(planted, driver, &record.mount_point, source, &self.watch)?;
        Ok((written, Box::new(bound)))
    }

    /// Says that everything is back that a daemon before this one showed, as far as it ever will be.
    pub fn is_complete(&self) {
        if let Ok(grove) = &self.grove {
            grove.is_complete();
        }
    }

    /// Mounts no more, and leaves what there is to the next daemon. True if it can: the connection is kept beyond this
    /// process, and there is something to be shown, here or, if `elsewhere`, by whoever else has layers on the shelf. From
    /// then on nothing may be dropped, and this process has to end. Waits for another process.
    pub fn leave(&self, elsewhere: bool) -> bool {
        let (Ok(grove), Some(seat)) = (&self.grove, &self.daemon) else { return false };
        let Some(keeper) = seat.keeper.as_ref().filter(|keeper| keeper.keeps()) else { return false };
        // What a daemon before this one showed may not be listed again yet. What is listed although nobody shows it any more is
        // a layer that is just changing hands, or read by who has opened it before it was unmounted.
        let is_shown = !self.mounts().is_empty() || (elsewhere && grove.shows_anything());
        if !is_shown && !grove.is_restoring() {
            return false;
        }
        let kept = grove.kept();
        let Some(kept) = kept.as_ref() else { return false };
        self.table().doors = Doors::Left;
        if let Err(error) = keeper.leave(kept) {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "mounts that are left end if the service is stopped and not restarted");
        }
        true
    }

    /// When all that is to be brought back is: takes away what a daemon before this one left besides, and forgets what it
    /// wrote down of mounts that are there no more. Waits for the kernel and the disk.
    ///
    /// # Errors
    /// The mounts of this root cannot be looked at.
    pub fn settle(&self) -> anyhow::Result<()> {
        // What could not be brought back stays as it is, recorded and told: the kernel may show it without any process.
        let mut known: BTreeSet<PathBuf> =
            Mounts::look(&self.settings.root)?.into_iter().map(|entry| entry.record.mount_point).collect();
        known.extend(self.mounts().iter().map(|mounted| mounted.record().mount_point.clone()));
        self.shelf.settle(&known);
        if let Some(records) = self.house.snapshots() {
            recorder::forget_other_mounts(records, &known);
        }
        Ok(())
    }

    /// Ends every mount, the latest first, and mounts no more. One that goes on by itself stays, if it may. One that is in use is
    /// taken away all the same, and served to those who have files open for as long as `patience`.
    pub async fn shut_down(self: &Arc<Self>, patience: Duration) {
        let host = Arc::clone(self);
        self.table().doors = Doors::Closed;
        let taking = self.runtime.spawn_blocking(move || {
            let mounts = host.mounts();
            // The process of a single mount has no successor.
            let keep = host.settings.daemon.keep_mounts && host.daemon.is_some();
            let taken = mounts.iter().rev().filter(|mounted| !(keep && mounted.leave()));
            taken.for_each(|mounted| take_away_at_the_end(mounted));
            if keep {
                // Who has been left is waited for by nobody.
                host.table().mounts.retain(|_, mounted| !mounted.is_released());
                host.tell_count();
            }
        });
        if taking.await.is_err() {
            tracing::error!("the thread that takes the mounts away broke down");
        }
        let deadline = Instant::now() + patience;
        let mut served = tokio::time::timeout(patience, self.empty()).await.is_err();
        if let Some(keeper) = self.daemon.as_ref().and_then(|seat| seat.keeper.as_ref()) {
            keeper.forget();
        }
        if let Ok(grove) = &self.grove {
            let grove = Arc::clone(grove);
            let closing =
                self.runtime.spawn_blocking(move || grove.close(deadline.saturating_duration_since(Instant::now())));
            served |= !closing.await.unwrap_or(true);
        }
        if served {
            tracing::warn!("files are still open: whoever reads them gets errors from now on");
        }
    }
}

fn take_away_at_the_end(mounted: &Mounted) {
    let mount_point = mounted.record().mount_point.display();
    let error = match mounted.take_away(mount::Unmount::Strict) {
        Ok(()) => return,
        Err(MountError::InUse(_)) => {
            tracing::warn!(%mount_point, "the mount is in use: it is taken away, and ends when the last file is closed");
            match mounted.take_away(mount::Unmount::Lazy) {
                Ok(()) => return,
                Err(error) => error,
            }
        }
        Err(error) => error,
    };
    let error: &dyn std::error::Error = &error;
    tracing::error!(%mount_point, error, "the mount stays behind");
}
