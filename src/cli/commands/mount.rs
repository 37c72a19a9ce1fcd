//! `headstart mount`, `umount` and `status`: processes that serve, and those who talk to them.
//!
//! `mount` starts this program again as a session of its own and waits on a pipe for one line of JSON: that the mount is
//! usable, or the failure, which it tells as if it had happened here.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use indicatif::HumanBytes;
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

use super::Context;
use crate::cli::args;
use crate::cli::exit::{Problem, Told};
use crate::cli::output;
use crate::cli::report::{Failure, Relayed};
use crate::control::{self, ControlError, LayerState, MountStatus, Unmount, Unmounted};
use crate::daemon::image;
use crate::daemon::mounts::{Entry, MountRecord, Mounts};
use crate::daemon::serving::{self, MountRequest};
use crate::sys::mount::{self as kernel, MountError};

/// How long a serving process may take to end when its mount is gone: it syncs what it fetched.
const LAST_WORK: Duration = Duration::from_secs(30);

/// What a serving process says to the one that started it, once.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Readiness {
    Ready,
    Failed(Failure),
}

pub(crate) fn mount(context: &Context, arguments: &args::Mount) -> anyhow::Result<ExitCode> {
    let args::Driver::Fuse = arguments.driver;
    if arguments.upper.is_some() && !rustix::process::geteuid().is_root() {
        let message = "cannot stack a writable layer: --upper needs root".to_owned();
        return Err(Told { problem: Problem::Denied, message }.into());
    }
    let request = MountRequest {
        image: image::absolute(&arguments.image)?,
        platform: arguments.platform.clone(),
        mount_point: kernel::check_mount_point(&arguments.dir)?,
        upper: arguments.upper.as_deref().map(std::path::absolute).transpose()?,
    };
    if arguments.serving_process {
        return serve_in_background(context, &request);
    }
    if arguments.foreground {
        let runtime = context.runtime()?;
        serving::serve(&context.config, &request, runtime.handle(), || Ok(()))?;
        return Ok(ExitCode::SUCCESS);
    }
    start(context, &request)?;
    Ok(ExitCode::SUCCESS)
}

/// Starts the serving process and waits until it is ready.
fn start(context: &Context, request: &MountRequest) -> anyhow::Result<()> {
    let log = Mounts::open(&context.config.root)?.log(&request.mount_point);
    let output = File::create(&log).with_context(|| format!("cannot write the log {}", log.display()))?;
    let program = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new(program);
    command.arg("--root").arg(&context.config.root);
    if let Some(config) = &context.config_file {
        command.arg("--config").arg(config);
    }
    command.args(["--log-level", context.serving_log_level().name()]);
    command.arg("mount").arg("--serving-process");
    if let Some(platform) = &request.platform {
        command.arg("--platform").arg(platform.to_string());
    }
    if let Some(upper) = &request.upper {
        command.arg("--upper").arg(upper);
    }
    command.arg("--").arg(request.image.to_string()).arg(&request.mount_point);
    let mut child = command
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(output)
        .spawn()
        .context("cannot start the serving process")?;
    let mut line = String::new();
    if let Some(pipe) = child.stdout.take() {
        BufReader::new(pipe).read_line(&mut line).context("cannot hear from the serving process")?;
    }
    match serde_json::from_str(&line) {
        Ok(Readiness::Ready) => Ok(()),
        Ok(Readiness::Failed(failure)) => {
            child.wait().context("cannot wait for the serving process")?;
            // What it had to say was said; a log without a word is of no use.
            if fs::metadata(&log).is_ok_and(|metadata| metadata.len() == 0) {
                fs::remove_file(&log).ok();
            }
            Err(Relayed(failure).into())
        }
        Err(_) => {
            let status = child.wait().context("cannot wait for the serving process")?;
            anyhow::bail!("the serving process ended before it was ready ({status}); its log is {}", log.display())
        }
    }
}

/// What the process that [`start`] started does.
fn serve_in_background(context: &Context, request: &MountRequest) -> anyhow::Result<ExitCode> {
    // A session of its own, so that the end of the terminal or a Ctrl-C there is not meant for it.
    rustix::process::setsid().context("cannot leave the session of the terminal")?;
    let runtime = context.runtime()?;
    match serving::serve(&context.config, request, runtime.handle(), || tell(&Readiness::Ready)) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            let failure = Failure::of(&error);
            let code = failure.problem.exit_code();
            // If the other side is gone, the log has it.
            if tell(&Readiness::Failed(failure)).is_err() {
                return Err(error);
            }
            Ok(code)
        }
    }
}

/// Says `readiness` and lets go of the pipe.
fn tell(readiness: &Readiness) -> io::Result<()> {
    let mut line = serde_json::to_vec(readiness)?;
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line)?;
    out.flush()?;
    let nowhere = File::options().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&nowhere)?;
    Ok(())
}

pub(crate) fn umount(context: &Context, arguments: &args::Umount) -> anyhow::Result<ExitCode> {
    let mount_point = place_of(&arguments.dir)?;
    let entry = Mounts::look(&context.config.root)?.into_iter().find(|entry| entry.record.mount_point == mount_point);
    let how = Unmount { lazy: arguments.lazy };
    match entry {
        Some(entry) if entry.alive => {
            let process = entry.process().context("cannot watch the serving process")?;
            match context.runtime()?.block_on(control::unmount(&entry.socket(), how)) {
                Ok(Unmounted::Done) => {
                    // With files open a mount that was taken away lazily is served until they are closed.
                    let process = process.filter(|_| !arguments.lazy);
                    if process.map_or(Ok(true), |process| process.wait_for_end(LAST_WORK))? {
                        return Ok(ExitCode::SUCCESS);
                    }
                    anyhow::bail!("the process that served {} does not end", mount_point.display());
                }
                Ok(Unmounted::Busy) => return Err(MountError::InUse(mount_point).into()),
                Ok(Unmounted::Refused(why)) => anyhow::bail!("cannot unmount {}: {why}", mount_point.display()),
                // It ended at this moment, or it hangs: the kernel can still take the mount away.
                Err(ControlError::Gone { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            unmount_stale(&mount_point, arguments.lazy, Some(&entry))
        }
        entry => unmount_stale(&mount_point, arguments.lazy, entry.as_ref()),
    }
}

/// Takes away what a dead process left: its mount, then its record.
fn unmount_stale(mount_point: &Path, lazy: bool, entry: Option<&Entry>) -> anyhow::Result<ExitCode> {
    let table = kernel::mount_table().context("cannot read the mounts of this machine")?;
    let top = table.iter().rev().find(|found| found.mount_point == mount_point);
    let ours = top.is_some_and(|found| found.kind == crate::sys::fuse::MOUNT_KIND || found.source == "headstart");
    match (ours, entry) {
        (true, _) => serving::unmount_orphan(mount_point, lazy)?,
        (false, Some(_)) => {}
        (false, None) => {
            let message = format!("cannot unmount {}: it is no mount of headstart", mount_point.display());
            return Err(Told { problem: Problem::NotFound, message }.into());
        }
    }
    if let Some(entry) = entry {
        entry.clear()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The absolute name of a mount point without links, found without touching what is mounted there: that may be dead.
fn place_of(dir: &Path) -> anyhow::Result<PathBuf> {
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
    log: PathBuf,
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
    match runtime.block_on(control::status(&entry.socket())) {
        Ok(status) => Ok(Some(Seen { state: State::Serving, log: entry.log(), status })),
        // A process that lives and does not listen any more has unmounted.
        Err(ControlError::Gone { .. }) => {
            Ok(entry.look_again()?.filter(|entry| !entry.alive).map(|entry| dead(&entry)))
        }
        // It may have died over the question.
        Err(error) => match entry.look_again()? {
            Some(entry) if entry.alive => Err(error.into()),
            Some(entry) => Ok(Some(dead(&entry))),
            None => Ok(None),
        },
    }
}

fn dead(entry: &Entry) -> Seen {
    let MountRecord { image, manifest, mount_point, driver, pid, upper } = entry.record.clone();
    let status = MountStatus {
        image,
        manifest,
        mount_point,
        driver,
        pid,
        upper,
        layers: vec![],
        bytes_fetched: 0,
        bytes_demanded: 0,
    };
    Seen { state: State::Dead, log: entry.log(), status }
}

fn table(mounts: &[Seen]) -> String {
    if mounts.is_empty() {
        return "nothing is mounted".to_owned();
    }
    let mut lines = Vec::new();
    for Seen { state, log, status } in mounts {
        lines.push(format!("{} on {}", status.image, status.mount_point.display()));
        match state {
            State::Serving => lines.push(format!(
                "  served by process {} (driver {}), {} fetched, {} demanded",
                status.pid,
                status.driver,
                HumanBytes(status.bytes_fetched),
                HumanBytes(status.bytes_demanded)
            )),
            State::Dead => lines.push(format!(
                "  process {} is gone: end it with `headstart umount {}`; its log is {}",
                status.pid,
                status.mount_point.display(),
                log.display()
            )),
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
