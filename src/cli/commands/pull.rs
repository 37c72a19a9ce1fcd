//! `headstart pull` and `headstart wait`: images brought here as a whole.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::HumanBytes;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use super::umount::place_of;
use super::{Context, daemon};
use crate::cli::args;
use crate::cli::exit::{self, Problem};
use crate::cli::output;
use crate::cli::progress;
use crate::cli::report;
use crate::control::{Client, PullAsked, Pulled, WaitAsked};
use crate::daemon::image;
use crate::daemon::mounts::Mounts;
use crate::daemon::pull::bring;

/// What `pull --json` prints.
#[derive(Debug, Serialize)]
struct Told {
    #[serde(flatten)]
    pulled: Pulled,
    seconds: f64,
}

pub(crate) fn pull(context: &Context, arguments: &args::Pull) -> anyhow::Result<ExitCode> {
    let reference = image::absolute(&arguments.image)?;
    let daemon = daemon::find(context)?;
    let runtime = context.runtime()?;
    let begin = Instant::now();
    let bar = progress::bytes("pulling", 0);
    let tell = |bytes, of| {
        bar.set_length(of);
        bar.set_position(bytes);
    };
    let bringing = async {
        match &daemon {
            Some((_, client)) => {
                let platform = arguments.platform.as_ref().map(ToString::to_string);
                Ok(client.pull(&PullAsked { image: reference.to_string(), platform }, tell).await?)
            }
            None => {
                let house = image::House::open(&context.config, runtime.handle().clone())?;
                bring(&house, &reference, arguments.platform.as_ref(), tell).await
            }
        }
    };
    let pulled = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            pulled = bringing => pulled.map(Ok),
            _ = interrupt.recv() => Ok(Err(SignalKind::interrupt())),
            _ = terminate.recv() => Ok(Err(SignalKind::terminate())),
        }
    });
    bar.finish_and_clear();
    let pulled = match pulled? {
        Ok(pulled) => pulled,
        Err(signal) => return Ok(exit::interrupted(signal)),
    };
    if let Some((holder, _)) = daemon {
        report::note(&format!("pulled by the daemon (process {})", holder.pid));
    }
    if context.json {
        output::json(&Told { pulled, seconds: begin.elapsed().as_secs_f64() })?;
    } else {
        output::line(&format!(
            "{} is local: {} layers, {}, {} fetched",
            pulled.image,
            pulled.layers.len(),
            HumanBytes(pulled.bytes),
            HumanBytes(pulled.bytes_fetched)
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn wait(context: &Context, arguments: &args::Wait) -> anyhow::Result<ExitCode> {
    let mount_point = place_of(&arguments.dir)?;
    let entry = Mounts::look(&context.config.root)?.into_iter().find(|entry| entry.record.mount_point == mount_point);
    let Some(entry) = entry else {
        let message = format!("cannot wait for {}: it is no mount of headstart", mount_point.display());
        return Err(exit::Told { problem: Problem::NotFound, message }.into());
    };
    let asked = WaitAsked { mount_point: mount_point.clone() };
    let client = Client::new(entry.socket());
    let local = context.runtime()?.block_on(async {
        let answer = client.wait(&asked);
        match arguments.timeout {
            None => answer.await.map(drop).map(|()| true),
            Some(seconds) => match timeout(Duration::from_secs(seconds), answer).await {
                Ok(answer) => answer.map(drop).map(|()| true),
                Err(_) => Ok(false),
            },
        }
    })?;
    if !local {
        let message = format!("{} is not local yet", mount_point.display());
        return Err(exit::Told { problem: Problem::Unreachable, message }.into());
    }
    Ok(ExitCode::SUCCESS)
}
