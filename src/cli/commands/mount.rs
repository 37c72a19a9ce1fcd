//! `headstart mount`.
//!
//! `mount` starts this program again as a session of its own and waits on a pipe for one line of JSON: that the mount is
//! usable, or the failure, which it tells as if it had happened here.

use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::process::{Command, ExitCode, Stdio};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use super::{Context, daemon};
use crate::cli::args;
use crate::cli::exit::{Problem, Told};
use crate::cli::report::{self, Failure, Relayed, fault};
use crate::control::MountAsked;
use crate::daemon::host::MountRequest;
use crate::daemon::image;
use crate::daemon::mounts::Mounts;
use crate::daemon::serving;
use crate::sys::mount as kernel;

/// What a serving process says to the one that started it, once.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Readiness {
    Ready,
    Failed(Failure),
}

pub(crate) fn mount(context: &Context, arguments: &args::Mount) -> anyhow::Result<ExitCode> {
    if arguments.upper.is_some() && !rustix::process::geteuid().is_root() {
        let message = "cannot stack a writable layer: --upper needs root".to_owned();
        return Err(Told { problem: Problem::Denied, message }.into());
    }
    let request = MountRequest {
        image: image::absolute(&arguments.image)?,
        platform: arguments.platform.clone(),
        mount_point: kernel::check_mount_point(&arguments.dir)?,
        upper: arguments.upper.as_deref().map(std::path::absolute).transpose()?,
        driver: arguments.driver.into(),
        fill: !arguments.no_fill,
    };
    if arguments.serving_process {
        return serve_in_background(context, request);
    }
    if arguments.foreground {
        let runtime = context.runtime()?;
        serving::serve(&context.config, request, runtime.handle(), fault, || Ok(()))?;
        return Ok(ExitCode::SUCCESS);
    }
    let daemon = if arguments.no_daemon { None } else { daemon::find(context)? };
    match daemon {
        Some((holder, client)) => {
            let asked = MountAsked {
                image: request.image.to_string(),
                mount_point: request.mount_point,
                platform: request.platform.map(|platform| platform.to_string()),
                upper: request.upper,
                driver: request.driver,
                no_fill: !request.fill,
            };
            context.runtime()?.block_on(client.mount(&asked))?;
            report::note(&format!("mounted by the daemon (process {})", holder.pid));
        }
        None => start(context, &request)?,
    }
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
    command.args(["--log-level", context.serving_log_level(&context.config).name()]);
    command.arg("mount").arg("--serving-process");
    if let Some(platform) = &request.platform {
        command.arg("--platform").arg(platform.to_string());
    }
    if let Some(upper) = &request.upper {
        command.arg("--upper").arg(upper);
    }
    command.args(["--driver", &request.driver.to_string()]);
    if !request.fill {
        command.arg("--no-fill");
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
fn serve_in_background(context: &Context, request: MountRequest) -> anyhow::Result<ExitCode> {
    // A session of its own, so that the end of the terminal or a Ctrl-C there is not meant for it.
    rustix::process::setsid().context("cannot leave the session of the terminal")?;
    let runtime = context.runtime()?;
    match serving::serve(&context.config, request, runtime.handle(), fault, || tell(&Readiness::Ready)) {
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
