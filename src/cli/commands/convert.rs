//! `headstart convert`.

use std::num::NonZeroUsize;
use std::process::ExitCode;
use std::sync::Arc;

use indicatif::HumanBytes;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::Context;
use crate::cli::args::{self, Compat};
use crate::cli::exit;
use crate::cli::output;
use crate::cli::progress::ConversionBar;
use crate::convert::{Converted, ConvertedImage, ImageOptions, Platforms, convert_image};
use crate::daemon::image::transports;
use crate::model::BlobDigest;
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
}

pub(crate) fn run(context: &Context, arguments: args::Convert) -> anyhow::Result<ExitCode> {
    let args::Convert { source, dest, platform, all_platforms, append, compat, chunk_size, level, jobs } = arguments;
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
    bar.finish();
    let converted = match converted? {
        Ok(converted) => converted,
        Err(signal) => return Ok(exit::interrupted(signal)),
    };
    if context.json {
        output::json(&published(dest.to_string(), &converted))?;
    } else {
        output::line(&text(&dest.to_string(), &converted))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn bytes(layers: &[Descriptor]) -> u64 {
    layers.iter().map(|layer| layer.size).sum()
}

fn published(destination: String, converted: &Converted) -> Published {
    let image = |image: &ConvertedImage| Image {
        platform: image.platform.to_string(),
        source: image.source.digest,
        manifest: image.manifest.digest,
        bytes: bytes(&image.layers),
        layers: image.layers.iter().map(|layer| layer.digest).collect(),
    };
    let Descriptor { digest, media_type, .. } = converted.top.clone();
    Published { destination, digest, media_type, images: converted.images.iter().map(image).collect() }
}

fn text(destination: &str, converted: &Converted) -> String {
    let mut lines = vec![format!("{destination} is {}", converted.top.digest)];
    for image in &converted.images {
        let (layers, size) = (image.layers.len(), HumanBytes(bytes(&image.layers)));
        lines.push(format!("  {}: {} with {layers} layers, {size}", image.platform, image.manifest.digest));
    }
    lines.join("\n")
}
