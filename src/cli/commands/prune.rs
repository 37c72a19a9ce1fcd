//! `headstart prune`: by the daemon if there is one, since only whoever has an image open knows which of its chunks are
//! needed. Without one whole layers go; who uses one holds its lock.

use std::process::ExitCode;

use indicatif::HumanBytes;

use super::{Context, daemon};
use crate::cli::args;
use crate::cli::output;
use crate::control::{PruneAsked, Pruned};
use crate::daemon::image::House;
use crate::daemon::ledger::prune_goal;

pub(crate) fn run(context: &Context, arguments: &args::Prune) -> anyhow::Result<ExitCode> {
    let asked = PruneAsked { all: arguments.all, dry_run: arguments.dry_run };
    let runtime = context.runtime()?;
    let pruned = match daemon::find(context)? {
        Some((_, client)) => runtime.block_on(client.prune(&asked))?,
        None => {
            let house = House::open(&context.config, runtime.handle().clone())?;
            house.prune(&prune_goal(&context.config, asked.all), asked.dry_run)?
        }
    };
    if context.json {
        output::json(&pruned)?;
        return Ok(ExitCode::SUCCESS);
    }
    let Pruned { evicted, chunks, .. } = pruned;
    for image in &evicted.images {
        output::line(&format!("{}  {}  {}", image.blob, image.anchor, HumanBytes(image.bytes)))?;
    }
    let done = if arguments.dry_run { "would be removed" } else { "removed" };
    output::line(&format!("{} layers {done}, {}", evicted.images.len(), HumanBytes(evicted.bytes)))?;
    if chunks.chunks > 0 {
        output::line(&format!("{} chunks of layers in use {done}, {}", chunks.chunks, HumanBytes(chunks.bytes)))?;
    }
    Ok(ExitCode::SUCCESS)
}
