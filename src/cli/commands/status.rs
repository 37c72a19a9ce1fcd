//! `headstart status`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use indicatif::{HumanBytes, HumanDuration};
use serde::Serialize;
use tokio::runtime::Runtime;

use super::{Context, daemon};
use crate::cli::{output, report};
use crate::control::{Client, ControlError, DaemonStatus, HostStatus, LayerState, MountRecord, MountStatus};
use crate::daemon::left::{Left, is_kept};
use crate::daemon::mounts::{Entry, Mounts};
use crate::daemon::place;

pub(crate) fn status(context: &Context) -> anyhow::Result<ExitCode> {
    let entries = Mounts::look(&context.config.root)?;
    let mut hosts = Hosts {
        runtime: context.runtime()?,
        told: BTreeMap::new(),
        silent: BTreeSet::new(),
        kept: BTreeMap::new(),
        next: place::find(&context.config.root)?.is_some(),
    };
    let daemon = match daemon::find(context) {
        Ok(Some((holder, _))) => match hosts.ask(&holder.socket)? {
            Heard::Told(told) => Some(told.daemon.clone()),
            // It has ended, or begun to hang, since it was found.
            Heard::Nothing | Heard::Nobody => None,
        },
        Ok(None) => None,
        Err(error) if matches!(error.downcast_ref(), Some(ControlError::NoAnswer { .. })) => {
            report::note(&format!("{error}: it does not answer"));
            hosts.silent.extend(place::find(&context.config.root)?.map(|holder| holder.socket));
            None
        }
        Err(error) => return Err(error),
    };
    let mut mounts = Vec::with_capacity(entries.len());
    for entry in entries {
        mounts.extend(see(&mut hosts, &entry)?);
    }
    if context.json {
        output::json(&Mounted { daemon, mounts })?;
    } else {
        output::line(&table(daemon.as_ref(), &mounts))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What `status --json` prints.
#[derive(Debug, Serialize)]
struct Mounted {
    /// Null if none runs, or none that answers.
    daemon: Option<DaemonStatus>,
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
    /// Its process lives and does not answer.
    Silent,
    /// Its daemon is gone and its connection is kept: reads that need it wait for the next daemon.
    Kept,
    /// Its daemon is gone, and it needs none: the kernel reads local files.
    Alone,
    /// Its process is gone without having unmounted.
    Dead,
}

/// The serving processes, each asked once.
struct Hosts {
    runtime: Runtime,
    told: BTreeMap<PathBuf, HostStatus>,
    /// Nobody waits for them a second time.
    silent: BTreeSet<PathBuf>,
    /// Run directories of daemons that are gone, and whether their connections are kept.
    kept: BTreeMap<PathBuf, bool>,
    /// There is a daemon again: what it has not taken up it could not.
    next: bool,
}

/// What a process said.
enum Heard<'a> {
    Told(&'a HostStatus),
    /// It is there and does not answer.
    Nothing,
    /// Nobody listens.
    Nobody,
}

impl Hosts {
    fn ask(&mut self, socket: &Path) -> Result<Heard<'_>, ControlError> {
        if !self.told.contains_key(socket) && !self.silent.contains(socket) {
            match self.runtime.block_on(Client::new(socket).status()) {
                Ok(told) => {
                    self.told.insert(socket.to_owned(), told);
                }
                Err(ControlError::NoAnswer { .. }) => {
                    self.silent.insert(socket.to_owned());
                }
                Err(ControlError::Gone { .. }) => return Ok(Heard::Nobody),
                Err(error) => return Err(error),
            }
        }
        Ok(self.told.get(socket).map_or(Heard::Nothing, Heard::Told))
    }

    /// A mount whose process is gone.
    fn left(&mut self, entry: &Entry) -> Seen {
        let (kept, next) = (&mut self.kept, self.next);
        let is_kept = |run: &Path| *kept.entry(run.to_owned()).or_insert_with(|| !next && is_kept(run));
        let state = match Left::of(entry, is_kept) {
            Left::Kept => State::Kept,
            Left::Alone if !next => State::Alone,
            Left::Alone | Left::Dead => State::Dead,
        };
        known(entry, state)
    }
}

/// What there is to tell of a mount; nothing if it is about to end.
fn see(hosts: &mut Hosts, entry: &Entry) -> anyhow::Result<Option<Seen>> {
    if !entry.alive {
        return Ok(Some(hosts.left(entry)));
    }
    let told = match hosts.ask(&entry.socket()) {
        Ok(Heard::Told(told)) => told,
        // A process that lives and does not listen any more has unmounted.
        Ok(Heard::Nobody) => {
            return Ok(entry.look_again()?.filter(|entry| !entry.alive).map(|entry| hosts.left(&entry)));
        }
        // It may have died over the question.
        silent => {
            let silent = silent.map(drop);
            return match entry.look_again()? {
                Some(entry) if entry.alive => silent.map(|()| Some(known(&entry, State::Silent))).map_err(Into::into),
                Some(entry) => Ok(Some(hosts.left(&entry))),
                None => Ok(None),
            };
        }
    };
    let status = told.mounts.iter().find(|mount| mount.record.mount_point == entry.record.mount_point);
    Ok(status.map(|status| Seen { state: State::Serving, log: entry.log(), status: status.clone() }))
}

/// What is known of a mount without asking its process.
fn known(entry: &Entry, state: State) -> Seen {
    Seen { state, log: entry.log(), status: MountStatus::of_record(entry.record.clone()) }
}

fn table(daemon: Option<&DaemonStatus>, mounts: &[Seen]) -> String {
    let mut lines = Vec::new();
    if let Some(DaemonStatus { health, uptime_seconds, resident_bytes, connections }) = daemon {
        lines.push(format!(
            "daemon {} (process {}) for {}, {} of memory, {connections} FUSE connections{}",
            health.version,
            health.pid,
            HumanDuration(Duration::from_secs(*uptime_seconds)),
            HumanBytes(*resident_bytes),
            if health.ready { "" } else { ", not ready" }
        ));
    }
    if mounts.is_empty() {
        lines.push("nothing is mounted".to_owned());
    }
    for Seen { state, log, status } in mounts {
        let MountRecord { image, mount_point, driver, pid, .. } = &status.record;
        lines.push(format!("{image} on {}", mount_point.display()));
        match state {
            State::Serving => lines.push(format!(
                "  served by {} {pid} (driver {driver}), {} fetched, {} demanded",
                if status.record.daemon.is_some() { "daemon" } else { "process" },
                HumanBytes(status.bytes_fetched),
                HumanBytes(status.bytes_demanded)
            )),
            State::Kept => lines.push(format!(
                "  its daemon (process {pid}) is gone and its connection is kept: reads wait for the next daemon"
            )),
            State::Alone => lines.push(format!("  its daemon (process {pid}) is gone, and it goes on without one")),
            State::Dead | State::Silent => {
                let what = if *state == State::Dead { "is gone" } else { "does not answer" };
                let log = log.as_ref().map(|log| format!("; its log is {}", log.display())).unwrap_or_default();
                let point = mount_point.display();
                lines.push(format!("  process {pid} {what}: end it with `headstart umount {point}`{log}"));
            }
        }
        if let Some(why) = &status.driver_why {
            lines.push(format!("  driver {driver}: {why}"));
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
            let said = [&layer.why, &layer.presented].into_iter().flatten().map(String::as_str).collect::<Vec<_>>();
            if !said.is_empty() {
                lines.push(format!("      {}", said.join("; ")));
            }
            if layer.bytes_demanded + layer.bytes_prefetched > 0 {
                lines.push(format!(
                    "      {} demanded, {} prefetched of which {} wasted",
                    HumanBytes(layer.bytes_demanded),
                    HumanBytes(layer.bytes_prefetched),
                    HumanBytes(layer.bytes_wasted)
                ));
            }
            let slow: Vec<String> =
                layer.slowest_reads.iter().map(|read| format!("{} ms", read.milliseconds)).collect();
            if !slow.is_empty() {
                lines.push(format!("      slowest reads: {}", slow.join(", ")));
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
