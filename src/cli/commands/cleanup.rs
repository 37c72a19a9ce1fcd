//! `headstart cleanup`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;

use super::Context;
use crate::cli::args;
use crate::cli::exit::{Problem, Told};
use crate::cli::output;
use crate::daemon::host::{left_behind, take_away_left};
use crate::daemon::mounts::{Entry, Mounts};
use crate::sys::mount::{self as kernel, Unmount};

/// What `cleanup --json` prints.
#[derive(Debug, Default, Serialize)]
struct Cleaned {
    /// What is gone, or would be.
    removed: Vec<String>,
    /// What is still there.
    kept: Vec<Kept>,
}

#[derive(Debug, Serialize)]
struct Kept {
    what: String,
    why: String,
}

pub(crate) fn cleanup(context: &Context, arguments: &args::Cleanup) -> anyhow::Result<ExitCode> {
    let (root, run) = (&context.config.root, &context.config.run);
    let mut cleaned = Cleaned::default();
    if arguments.dry_run {
        for (_, left) in left_behind(root, run)? {
            cleaned.removed.extend(left.iter().map(ToString::to_string));
        }
    } else {
        let how = if arguments.lazy { Unmount::Lazy } else { Unmount::Strict };
        let outcome = take_away_left(root, run, how)?;
        cleaned.removed.extend(outcome.removed.iter().map(ToString::to_string));
        cleaned.kept.extend(outcome.kept.into_iter().map(|(left, why)| Kept { what: left.to_string(), why }));
    }
    for entry in Mounts::look(root)?.into_iter().filter(|entry| !entry.alive) {
        clean_record(&entry, arguments, &mut cleaned)?;
    }
    let failed = !cleaned.kept.is_empty();
    if context.json {
        output::json(&cleaned)?;
    } else {
        output::line(&text(&cleaned, arguments.dry_run))?;
    }
    if failed {
        let message = format!("cannot clean {} up: something is in use (see --lazy)", root.display());
        return Err(Told { problem: Problem::MountPoint, message }.into());
    }
    Ok(ExitCode::SUCCESS)
}

/// The mount point of a process that is gone, and what it wrote down.
fn clean_record(entry: &Entry, arguments: &args::Cleanup, cleaned: &mut Cleaned) -> anyhow::Result<()> {
    let mount_point: &Path = &entry.record.mount_point;
    let mount = kernel::is_ours(mount_point)?.then(|| format!("mount {}", mount_point.display()));
    let record = format!("record of {}", mount_point.display());
    if arguments.dry_run {
        cleaned.removed.extend(mount.filter(|_| !is_known(cleaned, mount_point)));
        cleaned.removed.push(record);
        return Ok(());
    }
    if let Some(what) = mount {
        let how = if arguments.lazy { Unmount::Lazy } else { Unmount::Strict };
        if let Err(error) = kernel::unmount(mount_point, how) {
            let why = format!("{:#}", anyhow::Error::new(error));
            if !is_known(cleaned, mount_point) {
                cleaned.kept.push(Kept { what, why });
            }
            return Ok(());
        }
        cleaned.removed.push(what);
    }
    // It may have been mounted anew meanwhile.
    if entry.clear()? {
        cleaned.removed.push(record);
    }
    Ok(())
}

/// True if the mount was told as that of a run directory.
fn is_known(cleaned: &Cleaned, mount_point: &Path) -> bool {
    let overlay = crate::drivers::leftovers::Leftover::Overlay { path: PathBuf::from(mount_point) }.to_string();
    cleaned.removed.contains(&overlay) || cleaned.kept.iter().any(|kept| kept.what == overlay)
}

fn text(cleaned: &Cleaned, dry_run: bool) -> String {
    if cleaned.removed.is_empty() && cleaned.kept.is_empty() {
        return "nothing was left behind".to_owned();
    }
    let verb = if dry_run { "would remove" } else { "removed" };
    let removed = cleaned.removed.iter().map(|what| format!("{verb} {what}"));
    let kept = cleaned.kept.iter().map(|Kept { what, why }| format!("kept {what}: {why}"));
    removed.chain(kept).collect::<Vec<_>>().join("\n")
}
