//! `headstart status`.

use std::path::PathBuf;
use std::process::ExitCode;

use indicatif::HumanBytes;
use serde::Serialize;
use tokio::runtime::Runtime;

use super::Context;
use crate::cli::output;
use crate::control::{Client, ControlError, LayerState, MountRecord, MountStatus};
use crate::daemon::mounts::{Entry, Mounts};

pub(crate) fn status(context: &Context) -> anyhow::Result<ExitCode> {
    let entries = Mounts::look(&context.config.root)?;
    let runtime = context.runtime()?;
    let mut mounts = Vec::with_capacity(entries.len());
    for entry in entries {
        if let Some(seen) = see(&runtime, &entry)? {
            mounts.push(seen);
        }
    }
    if context.json {
        output::json(&Mounted { mounts })?;
    } else {
        output::line(&table(&mounts))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What `status --json` prints.
#[derive(Debug, Serialize)]
struct Mounted {
    mounts: Vec<Seen>,
}

/// One mount as `status` tells it.
#[derive(Debug, Serialize)]
struct Seen {
    state: State,
    /// None if the log is the daemon's.
    log: Option<PathBuf>,
    #[serde(flatten)]
    status: MountStatus,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// Its process answers.
    Serving,
    /// Its process is gone without having unmounted.
    Dead,
}

/// What there is to tell of a mount; nothing if it is about to end.
fn see(runtime: &Runtime, entry: &Entry) -> anyhow::Result<Option<Seen>> {
    if !entry.alive {
        return Ok(Some(dead(entry)));
    }
    let told = match runtime.block_on(Client::new(entry.socket()).status()) {
        Ok(told) => told,
        // A process that lives and does not listen any more has unmounted.
        Err(ControlError::Gone { .. }) => {
            return Ok(entry.look_again()?.filter(|entry| !entry.alive).map(|entry| dead(&entry)));
        }
        // It may have died over the question.
        Err(error) => {
            return match entry.look_again()? {
                Some(entry) if entry.alive => Err(error.into()),
                Some(entry) => Ok(Some(dead(&entry))),
                None => Ok(None),
            };
        }
    };
    let status = told.mounts.into_iter().find(|mount| mount.record.mount_point == entry.record.mount_point);
    Ok(status.map(|status| Seen { state: State::Serving, log: entry.log(), status }))
}

fn dead(entry: &Entry) -> Seen {
    Seen { state: State::Dead, log: entry.log(), status: MountStatus::of_record(entry.record.clone()) }
}

fn table(mounts: &[Seen]) -> String {
    if mounts.is_empty() {
        return "nothing is mounted".to_owned();
    }
    let mut lines = Vec::new();
    for Seen { state, log, status } in mounts {
        let MountRecord { image, mount_point, driver, pid, .. } = &status.record;
        lines.push(format!("{image} on {}", mount_point.display()));
        match state {
            State::Serving => lines.push(format!(
                "  served by process {pid} (driver {driver}), {} fetched, {} demanded",
                HumanBytes(status.bytes_fetched),
                HumanBytes(status.bytes_demanded)
            )),
            State::Dead => {
                let log = log.as_ref().map(|log| format!("; its log is {}", log.display())).unwrap_or_default();
                let point = mount_point.display();
                lines.push(format!("  process {pid} is gone: end it with `headstart umount {point}`{log}"));
            }
        }
        for layer in &status.layers {
            lines.push(format!(
                "  {}  {:7}  {:>6} of {:<6} chunks  {:>10} of {}",
                short(&layer.digest.to_string()),
                state_name(layer.state),
                layer.present,
                layer.chunks,
                HumanBytes(layer.bytes_present).to_string(),
                HumanBytes(layer.bytes)
            ));
            if let Some(why) = &layer.why {
                lines.push(format!("      {why}"));
            }
        }
    }
    lines.join("\n")
}

const fn state_name(state: LayerState) -> &'static str {
    match state {
        LayerState::Lazy => "lazy",
        LayerState::Filling => "filling",
        LayerState::Local => "local",
    }
}

/// Enough of a digest for people to tell layers apart.
fn short(digest: &str) -> &str {
    digest.get(..19).unwrap_or(digest)
}
