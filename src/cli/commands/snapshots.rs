//! `headstart snapshots` and `headstart forget`.

use std::process::ExitCode;

use indicatif::HumanBytes;

use super::{Context, daemon};
use crate::chain::State;
use crate::cli::args;
use crate::cli::output::{self, printable};
use crate::control::{ForgetAsked, SeenImage, SnapshotsSeen};
use crate::daemon::image::{self, House};
use crate::daemon::ledger;
use crate::store::records;

pub(crate) fn snapshots(context: &Context) -> anyhow::Result<ExitCode> {
    let seen = match daemon::find(context)? {
        Some((_, client)) => context.runtime()?.block_on(client.snapshots())?,
        None => ledger::seen(&context.config.root, &records::look(&context.config.root)?),
    };
    if context.json {
        output::json(&seen)?;
    } else {
        output::line(&table(&seen))?;
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn forget(context: &Context, arguments: &args::Forget) -> anyhow::Result<ExitCode> {
    let image = image::absolute(&arguments.image)?.to_string();
    let asked = ForgetAsked { image, prune: arguments.prune };
    let runtime = context.runtime()?;
    let forgotten = match daemon::find(context)? {
        Some((_, client)) => runtime.block_on(client.forget(&asked))?,
        None => House::open(&context.config, runtime.handle().clone())?.forget(&asked.image, asked.prune)?,
    };
    if context.json {
        output::json(&forgotten)?;
        return Ok(ExitCode::SUCCESS);
    }
    let (snapshots, layers) = (forgotten.snapshots.len(), forgotten.evicted.images.len());
    let bytes = HumanBytes(forgotten.evicted.bytes);
    output::line(&format!(
        "{} forgotten: {snapshots} snapshots and {layers} layers removed, {bytes}",
        forgotten.image
    ))?;
    Ok(ExitCode::SUCCESS)
}

fn table(seen: &SnapshotsSeen) -> String {
    let mut lines = Vec::new();
    for SeenImage { image, pulled, layers, committed, .. } in &seen.images {
        lines.push(format!("{}: {committed} of {layers} layers committed, pulled {pulled}", printable(image)));
    }
    if seen.snapshots.is_empty() {
        lines.push("there are no snapshots".to_owned());
    }
    for of in &seen.snapshots {
        lines.push(printable(of.becomes.as_ref().unwrap_or(&of.key).as_str()).into_owned());
        lines.push(format!(
            "  {:9}  {:7}  {:>10}  {}",
            of.kind.name(),
            state_name(of.state),
            HumanBytes(of.bytes).to_string(),
            of.created
        ));
        if let Some(parent) = &of.parent {
            lines.push(format!("  on {}", printable(parent.as_str())));
        }
        for (name, value) in &of.labels {
            lines.push(format!("  {}={}", printable(name), printable(value)));
        }
    }
    lines.join("\n")
}

const fn state_name(state: State) -> &'static str {
    match state {
        State::Open => "open",
        State::Filling => "filling",
        State::Waiting => "waiting",
        State::Lazy => "lazy",
        State::Local => "local",
    }
}
