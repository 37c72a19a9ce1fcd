//! `headstart daemon`, and the way of other commands to it.

use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use super::Context;
use crate::cli::args;
use crate::cli::logging;
use crate::cli::report::fault;
use crate::control::{Client, ControlError};
use crate::daemon::config::Surroundings;
use crate::daemon::keeper::hold as hold_until_the_end;
use crate::daemon::place::{self, Holder};
use crate::daemon::service::{self, Above, Ended};

/// How long a daemon may take from its first sign of life until it listens. It opens a store meanwhile.
const BEGINNING: Duration = Duration::from_secs(10);
/// How often it is looked for meanwhile.
const GLANCE: Duration = Duration::from_millis(20);
/// How long work of the daemon that nobody waits for may hold up its end.
const LAST_WORK: Duration = Duration::from_secs(2);

pub(crate) fn run(context: &Context) -> anyhow::Result<ExitCode> {
    let runtime = context.runtime()?;
    let again = context.clone();
    let around = Surroundings::of_this_process();
    let above = Above {
        judge: fault,
        reload: Box::new(move || {
            let config = again.load()?;
            Ok(crate::daemon::config::Config { log_level: again.serving_log_level(&config), ..config })
        }),
        set_log_level: logging::set_level,
        notify_socket: around.notify_socket,
        has_store: around.descriptor_store.is_some_and(|room| room > 0),
        announced: around.announced,
        program: std::env::current_exe().context("cannot find this program")?,
    };
    let mut config = context.config.clone();
    config.log_level = context.serving_log_level(&config);
    logging::set_level(config.log_level);
    let done = service::run(&config, &above, runtime.handle());
    if matches!(done, Ok(Ended::Left)) {
        // Requests that wait for bytes are the next daemon's to answer.
        std::process::exit(0);
    }
    runtime.shutdown_timeout(LAST_WORK);
    done.map(|_| ExitCode::SUCCESS)
}

/// `headstart hold`: what the daemon gave over the standard input is kept beyond it.
pub(crate) fn hold(arguments: &args::Hold) -> anyhow::Result<ExitCode> {
    let first = std::io::stdin().as_fd().try_clone_to_owned().context("cannot use the standard input")?;
    let patience = Duration::from_secs(arguments.patience);
    // What ends the daemon's session is none of its business. A leader of a group already is as good.
    rustix::process::setsid().ok();
    hold_until_the_end(&arguments.run, patience, first)
        .with_context(|| format!("cannot hold descriptors for {}", arguments.run.display()))?;
    Ok(ExitCode::SUCCESS)
}

/// The daemon of this root, if there is one: its process, and how to ask it.
pub(crate) fn find(context: &Context) -> anyhow::Result<Option<(Holder, Client)>> {
    let runtime = context.runtime()?;
    let deadline = Instant::now() + BEGINNING;
    while let Some(holder) = place::find(&context.config.root)? {
        let client = Client::new(&holder.socket);
        match runtime.block_on(client.health()) {
            Ok(_) => return Ok(Some((holder, client))),
            // It begins, or ends, at this moment.
            Err(ControlError::Gone { .. }) if Instant::now() < deadline => std::thread::sleep(GLANCE),
            Err(error) => return Err(error).with_context(|| format!("cannot use the daemon (process {})", holder.pid)),
        }
    }
    Ok(None)
}
