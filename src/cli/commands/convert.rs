//! `headstart convert`.

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use indicatif::HumanBytes;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::Context;
use crate::cli::args::{self, Compat};
use crate::cli::exit;
use crate::cli::output;
use crate::cli::progress::{ConversionBar, Told};
use crate::convert::{Converted, ConvertedImage, ImageOptions, LeftOut, Platforms, convert_image};
use crate::daemon::image::transports;
use crate::model::{BlobDigest, RelPath};
use crate::oci::{Descriptor, Form};

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Published {
    destination: String,
    digest: BlobDigest,
    media_type: String,
    images: Vec<Image>,
}

#[derive(Debug, Serialize)]
struct Image {
    platform: String,
    /// The source's manifest.
    source: BlobDigest,
    /// The new one.
    manifest: BlobDigest,
    /// Bytes of all layers.
    bytes: u64,
    layers: Vec<BlobDigest>,
    /// What of the source is not in it.
    left_out: Vec<Omission>,
    /// Paths of the profile that are no regular files of the layers that were converted.
    not_laid_out: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Omission {
    layer: usize,
    what: &'static str,
    count: u64,
    first: Option<String>,
}

pub(crate) fn run(context: &Context, arguments: args::Convert) -> anyhow::Result<ExitCode> {
    let args::Convert { source, dest, platform, all_platforms, append, compat, chunk_size, level, profile, jobs } =
        arguments;
    let usual = ImageOptions::default();
    let options = ImageOptions {
        platforms: if all_platforms { Platforms::All } else { Platforms::One(platform) },
        append,
        form: match compat {
            Some(Compat::Containerd23) => Form::Containerd23,
            None => Form::ImageSpec,
        },
        chunks: chunk_size.map_or(usual.chunks, |size| usual.chunks.with_data(size)),
        level: level.unwrap_or(usual.level),
        profile: profile.as_deref().map(read_profile).transpose()?.unwrap_or_default(),
        jobs: jobs.and_then(|jobs| NonZeroUsize::new(jobs.into())).unwrap_or(usual.jobs),
    };
    let transports = transports(&context.config);
    let (bar, runtime) = (Arc::new(ConversionBar::new()), context.runtime()?);
    let converted = runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let work = async {
            let source = transports.open(&source).await?;
            let sink = transports.create(&dest).await?;
            let observer: Arc<ConversionBar> = Arc::clone(&bar);
            anyhow::Ok(convert_image(&source, &sink, &options, observer).await?)
        };
        // Dropped work takes its temporary files along.
        tokio::select! {
            converted = work => converted.map(Ok),
            _ = interrupt.recv() => Ok(Err(SignalKind::interrupt())),
            _ = terminate.recv() => Ok(Err(SignalKind::terminate())),
        }
    });
    let told = bar.finish();
    let converted = match converted? {
        Ok(converted) => converted,
        Err(signal) => return Ok(exit::interrupted(signal)),
    };
    if context.json {
        output::json(&published(dest.to_string(), &converted, &told))?;
    } else {
        output::line(&text(&dest.to_string(), &converted))?;
        output::notes(&notes(&converted, &told));
    }
    Ok(ExitCode::SUCCESS)
}

fn bytes(layers: &[Descriptor]) -> u64 {
    layers.iter().map(|layer| layer.size).sum()
}

fn published(destination: String, converted: &Converted, told: &Told) -> Published {
    let omission = |(_, layer, left_out): &(usize, usize, LeftOut)| Omission {
        layer: *layer,
        what: left_out.what.name(),
        count: left_out.count,
        first: left_out.first.as_ref().map(RelPath::to_string),
    };
    let image = |(number, image): (usize, &ConvertedImage)| Image {
        platform: image.platform.to_string(),
        source: image.source.digest,
        manifest: image.manifest.digest,
        bytes: bytes(&image.layers),
        layers: image.layers.iter().map(|layer| layer.digest).collect(),
        left_out: told.left_out.iter().filter(|(of, ..)| *of == number).map(omission).collect(),
        not_laid_out: told
            .not_laid_out
            .iter()
            .filter(|(of, _)| *of == number)
            .flat_map(|(_, paths)| paths.iter().map(RelPath::to_string))
            .collect(),
    };
    let Descriptor { digest, media_type, .. } = converted.top.clone();
    Published { destination, digest, media_type, images: converted.images.iter().enumerate().map(image).collect() }
}

fn text(destination: &str, converted: &Converted) -> String {
    let mut lines = vec![format!("{destination} is {}", converted.top.digest)];
    for image in &converted.images {
        let (layers, size) = (image.layers.len(), HumanBytes(bytes(&image.layers)));
        lines.push(format!("  {}: {} with {layers} layers, {size}", image.platform, image.manifest.digest));
    }
    lines.join("\n")
}

/// The paths of a start-up profile: one a line, each counting where it stands first.
fn read_profile(path: &Path) -> anyhow::Result<Vec<RelPath>> {
    let bytes = std::fs::read(path)
        .map_err(|error| anyhow::Error::new(error).context(format!("cannot read {}", path.display())))?;
    let (mut paths, mut known) = (Vec::new(), HashSet::new());
    for (number, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if line.is_empty() {
            continue;
        }
        let found = RelPath::parse(line).map_err(|error| exit::Told {
            problem: exit::Problem::Usage,
            message: format!("{}, line {}: {error}", path.display(), number + 1),
        })?;
        if known.insert(found.clone()) {
            paths.push(found);
        }
    }
    Ok(paths)
}

/// How many paths are told by name.
const SHOWN: usize = 5;

/// What there is to tell beside the result, a line each.
fn notes(converted: &Converted, told: &Told) -> Vec<String> {
    let platform = |image: usize| match converted.images.get(image) {
        Some(of) if converted.images.len() > 1 => format!("{}: ", of.platform),
        _ => String::new(),
    };
    let mut notes = Vec::new();
    for (image, layer, left_out) in &told.left_out {
        notes.push(format!("{}left out of layer {layer}: {left_out}", platform(*image)));
    }
    for (image, paths) in &told.not_laid_out {
        let mut names: Vec<String> = paths.iter().take(SHOWN).map(RelPath::to_string).collect();
        if let Some(more) = paths.len().checked_sub(SHOWN).filter(|more| *more > 0) {
            names.push(format!("and {more} more"));
        }
        let names = names.join(", ");
        notes
            .push(format!("{}in the profile, but no regular files of the converted layers: {names}", platform(*image)));
    }
    notes
}
