//! `headstart prune`.
//!
//! Works on the store itself, with or without a daemon: who uses an image holds its lock.

use std::process::ExitCode;

use indicatif::HumanBytes;
use serde::Serialize;

use super::Context;
use crate::cli::args;
use crate::cli::output;
use crate::store::{CacheGoal, Evicted, Store};

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Pruned {
    dry_run: bool,
    #[serde(flatten)]
    evicted: Evicted,
}

pub(crate) fn run(context: &Context, arguments: &args::Prune) -> anyhow::Result<ExitCode> {
    let store = Store::open(&context.config.root)?;
    let goal = CacheGoal { all: arguments.all, ..context.config.cache_goal() };
    let evicted = store.evict(&goal, arguments.dry_run)?;
    if context.json {
        output::json(&Pruned { dry_run: arguments.dry_run, evicted })?;
        return Ok(ExitCode::SUCCESS);
    }
    for image in &evicted.images {
        output::line(&format!("{}  {}  {}", image.blob, image.anchor, HumanBytes(image.bytes)))?;
    }
    let done = if arguments.dry_run { "would be removed" } else { "removed" };
    output::line(&format!("{} images {done}, {}", evicted.images.len(), HumanBytes(evicted.bytes)))?;
    Ok(ExitCode::SUCCESS)
}
