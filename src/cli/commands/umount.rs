//! `headstart umount`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;

use super::Context;
use crate::cli::args;
use crate::cli::exit::{Problem, Told};
use crate::control::{Client, ControlError, UmountAsked};
use crate::daemon::host;
use crate::daemon::mounts::{Entry, Mounts};
use crate::daemon::serving;
use crate::sys::mount as kernel;

/// How long a serving process may take to end when its mount is gone: it syncs what it fetched.
const LAST_WORK: Duration = Duration::from_secs(30);

pub(crate) fn umount(context: &Context, arguments: &args::Umount) -> anyhow::Result<ExitCode> {
    let mount_point = place_of(&arguments.dir)?;
    let entry = Mounts::look(&context.config.root)?.into_iter().find(|entry| entry.record.mount_point == mount_point);
    let asked = UmountAsked { mount_point: mount_point.clone(), lazy: arguments.lazy };
    match entry {
        Some(entry) if entry.alive => {
            let process = entry.process().context("cannot watch the serving process")?;
            let client = Client::new(entry.socket());
            // Asked first whether it answers at all: what it is asked then may take its time.
            let answer = context.runtime()?.block_on(async {
                client.health().await?;
                client.umount(&asked).await
            });
            match answer {
                Ok(()) => {
                    // A daemon goes on. With files open a mount that was taken away lazily is served until they are closed.
                    let process = process.filter(|_| !arguments.lazy && entry.record.daemon.is_none());
                    if process.map_or(Ok(true), |process| process.wait_for_end(LAST_WORK))? {
                        return Ok(ExitCode::SUCCESS);
                    }
                    anyhow::bail!("the process that served {} does not end", mount_point.display());
                }
                // It ended at this moment, or it hangs: the kernel can still take the mount away.
                Err(ControlError::Gone { .. } | ControlError::NoAnswer { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            unmount_stale(context, &mount_point, arguments.lazy, Some(&entry))
        }
        entry => unmount_stale(context, &mount_point, arguments.lazy, entry.as_ref()),
    }
}

/// Takes away what a dead process left: its mount, then its record.
fn unmount_stale(context: &Context, mount_point: &Path, lazy: bool, entry: Option<&Entry>) -> anyhow::Result<ExitCode> {
    match (kernel::is_ours(mount_point)?, entry) {
        (true, _) => serving::unmount_orphan(mount_point, lazy)?,
        (false, Some(_)) => {}
        (false, None) => {
            let message = format!("cannot unmount {}: it is no mount of headstart", mount_point.display());
            return Err(Told { problem: Problem::NotFound, message }.into());
        }
    }
    host::sweep(&context.config.root);
    if let Some(entry) = entry {
        entry.clear()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The absolute name of a mount point without links, found without touching what is mounted there: that may be dead.
pub(crate) fn place_of(dir: &Path) -> anyhow::Result<PathBuf> {
    let dir = std::path::absolute(dir)?;
    let (Some(above), Some(name)) = (dir.parent(), dir.file_name()) else { return Ok(dir) };
    let above = above.canonicalize().with_context(|| format!("cannot find {}", dir.display()))?;
    let place = above.join(name);
    if kernel::mounted_on(&place).context("cannot read the mounts of this machine")?.is_some() {
        return Ok(place);
    }
    // Nothing is mounted under the name itself, so it can be looked at: it may be a link.
    Ok(place.canonicalize().unwrap_or(place))
}
