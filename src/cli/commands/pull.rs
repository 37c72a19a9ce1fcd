//! `headstart pull` and `headstart wait`: images brought here as a whole.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use indicatif::HumanBytes;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::Context;
use super::umount::place_of;
use crate::cli::args;
use crate::cli::exit::{self, Problem, Told};
use crate::cli::output;
use crate::cli::progress;
use crate::control::{Client, WaitAsked};
use crate::daemon::image;
use crate::daemon::mounts::Mounts;
use crate::daemon::pull::Pull;
use crate::model::{BlobDigest, DiffId};
use crate::unpack::Progress;

/// Time between two looks at how far a pull is.
const LOOK: Duration = Duration::from_millis(200);

/// What `pull --json` prints.
#[derive(Debug, Serialize)]
struct Pulled {
    image: String,
    manifest: BlobDigest,
    /// Bytes that came from the registry.
    bytes_fetched: u64,
    /// Bytes of all layer images.
    bytes: u64,
    seconds: f64,
    layers: Vec<PulledLayer>,
}

#[derive(Debug, Serialize)]
struct PulledLayer {
    digest: BlobDigest,
    diff_id: DiffId,
    bytes: u64,
    bytes_fetched: u64,
}

pub(crate) fn pull(context: &Context, arguments: &args::Pull) -> anyhow::Result<ExitCode> {
    let reference = image::absolute(&arguments.image)?;
    let runtime = context.runtime()?;
    let begin = Instant::now();
    let pulled = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            pulled = bring(context, &reference, arguments.platform.as_ref()) => pulled.map(Ok),
            _ = interrupt.recv() => Ok(Err(SignalKind::interrupt())),
            _ = terminate.recv() => Ok(Err(SignalKind::terminate())),
        }
    })?;
    let pull = match pulled {
        Ok(pull) => pull,
        Err(signal) => return Ok(exit::interrupted(signal)),
    };
    let layers: Vec<PulledLayer> = pull
        .status()
        .iter()
        .map(|layer| PulledLayer {
            digest: layer.blob,
            diff_id: layer.diff_id,
            bytes: layer.bytes,
            bytes_fetched: layer.counters.fetched,
        })
        .collect();
    let pulled = Pulled {
        image: reference.to_string(),
        manifest: pull.manifest(),
        bytes_fetched: layers.iter().map(|layer| layer.bytes_fetched).sum(),
        bytes: layers.iter().map(|layer| layer.bytes).sum(),
        seconds: begin.elapsed().as_secs_f64(),
        layers,
    };
    if context.json {
        output::json(&pulled)?;
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

async fn bring(
    context: &Context,
    reference: &crate::oci::Reference,
    platform: Option<&crate::oci::Platform>,
) -> anyhow::Result<Pull> {
    let house = image::House::open(&context.config, tokio::runtime::Handle::current())?;
    let documents = house.documents(reference, platform).await?;
    let bar = progress::bytes("pulling", 0);
    let mut ticks = interval(LOOK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let read = Arc::new(Progress::new(documents.layers()));
    let pull = {
        let begun = Pull::begin(&house, documents, &read);
        tokio::pin!(begun);
        loop {
            tokio::select! {
                pull = &mut begun => break pull?,
                _ = ticks.tick() => {
                    let (now, all) = read.bytes();
                    bar.set_length(all);
                    bar.set_position(now);
                }
            }
        }
    };
    {
        let finished = pull.finished();
        tokio::pin!(finished);
        loop {
            tokio::select! {
                result = &mut finished => {
                    bar.finish_and_clear();
                    result?;
                    break;
                }
                _ = ticks.tick() => {
                    let status = pull.status();
                    bar.set_length(status.iter().map(|layer| layer.bytes).sum());
                    bar.set_position(status.iter().map(|layer| layer.bytes_present).sum());
                }
            }
        }
    }
    Ok(pull)
}

pub(crate) fn wait(context: &Context, arguments: &args::Wait) -> anyhow::Result<ExitCode> {
    let mount_point = place_of(&arguments.dir)?;
    let entry = Mounts::look(&context.config.root)?.into_iter().find(|entry| entry.record.mount_point == mount_point);
    let Some(entry) = entry else {
        let message = format!("cannot wait for {}: it is no mount of headstart", mount_point.display());
        return Err(Told { problem: Problem::NotFound, message }.into());
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
        return Err(Told { problem: Problem::Unreachable, message }.into());
    }
    Ok(ExitCode::SUCCESS)
}
