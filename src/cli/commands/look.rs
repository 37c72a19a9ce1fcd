//! `headstart inspect` and `headstart check`.

use std::process::ExitCode;

use indicatif::HumanBytes;
use serde::Serialize;

use super::Context;
use crate::cli::args;
use crate::cli::exit::Problem;
use crate::cli::output;
use crate::cli::progress;
use crate::control::LayerState;
use crate::daemon::examine::examine;
use crate::daemon::host::layer_state;
use crate::daemon::image::{Documents, House, absolute};
use crate::model::{BlobDigest, DiffId};
use crate::oci::{Descriptor, LayerKind};

/// An image as `inspect` shows it.
#[derive(Debug, Serialize)]
struct Shown {
    image: String,
    manifest: BlobDigest,
    platform: String,
    /// True if all of its layers are EROFS, so that it can be mounted before it has arrived.
    mountable: bool,
    bytes_stored: u64,
    layers: Vec<Layer>,
}

#[derive(Debug, Serialize)]
struct Layer {
    digest: BlobDigest,
    diff_id: Option<DiffId>,
    media_type: String,
    /// Size in the registry.
    bytes_stored: u64,
    /// What is known of an EROFS layer.
    #[serde(flatten)]
    erofs: Option<Erofs>,
}

#[derive(Debug, Serialize)]
struct Erofs {
    /// Size of the image.
    bytes: u64,
    /// Stored bytes of one of the image.
    ratio: Option<f64>,
    chunks: u32,
    present: u32,
    bytes_present: u64,
    state: LayerState,
    /// `chunk-index`: each chunk is verified alone; `whole`: the layer is read and verified from start to end first.
    verified_by: &'static str,
}

pub(crate) fn inspect(context: &Context, arguments: &args::Inspect) -> anyhow::Result<ExitCode> {
    let runtime = context.runtime()?;
    let house = House::open(&context.config, runtime.handle().clone())?;
    let shown = runtime.block_on(async {
        let documents = house.documents(&absolute(&arguments.image)?, arguments.platform.as_ref()).await?;
        match documents.plan() {
            // Tars can be mounted too, but nothing is known of what they will become.
            Err(_) if documents.layers().iter().any(is_tar) => Ok(shown(&documents, |_| None)),
            Err(error) => Err(error.into()),
            Ok(_) => {
                let image = house.open_image(documents).await?;
                Ok::<_, anyhow::Error>(shown(&image.documents, |digest| {
                    let layer = image.layers.iter().find(|layer| layer.blob() == digest)?;
                    let has_index = image.plan.layers.iter().any(|plan| plan.blob == *digest && plan.index.is_some());
                    let status = layer.status();
                    Some(Erofs {
                        bytes: status.bytes,
                        ratio: None,
                        chunks: status.chunks,
                        present: status.present,
                        bytes_present: status.bytes_present,
                        state: layer_state(status.state),
                        verified_by: if has_index && status.chunks > 0 { "chunk-index" } else { "whole" },
                    })
                }))
            }
        }
    })?;
    if context.json {
        output::json(&shown)?;
    } else {
        output::line(&text(&shown))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn is_tar(layer: &Descriptor) -> bool {
    matches!(LayerKind::of(&layer.media_type), LayerKind::Tar(_))
}

fn shown(documents: &Documents, erofs: impl Fn(&BlobDigest) -> Option<Erofs>) -> Shown {
    let diff_ids = documents.config.diff_ids();
    let layers: Vec<Layer> = documents
        .layers()
        .iter()
        .enumerate()
        .map(|(place, layer)| Layer {
            digest: layer.digest,
            diff_id: diff_ids.get(place).copied(),
            media_type: layer.media_type.clone(),
            bytes_stored: layer.size,
            erofs: erofs(&layer.digest).map(|erofs| Erofs { ratio: ratio(layer.size, erofs.bytes), ..erofs }),
        })
        .collect();
    Shown {
        image: documents.reference.to_string(),
        manifest: documents.digest,
        platform: documents.config.platform().to_string(),
        mountable: documents.plan().is_ok(),
        bytes_stored: layers.iter().map(|layer| layer.bytes_stored).sum(),
        layers,
    }
}

fn ratio(stored: u64, bytes: u64) -> Option<f64> {
    let thousandths = u32::try_from(u128::from(stored).saturating_mul(1000).checked_div(u128::from(bytes))?).ok()?;
    Some(f64::from(thousandths) / 1000.0)
}

fn text(shown: &Shown) -> String {
    let mut lines = vec![
        format!("image     {}", shown.image),
        format!("manifest  {}", shown.manifest),
        format!("platform  {}", shown.platform),
        format!("stored    {} in {} layers", HumanBytes(shown.bytes_stored), shown.layers.len()),
    ];
    if !shown.mountable {
        lines.push(
            "not lazy  all of it comes before it is mounted, since not all layers are EROFS: see `headstart convert`"
                .to_owned(),
        );
    }
    for (place, layer) in shown.layers.iter().enumerate() {
        lines.push(format!("layer {place}   {}", layer.digest));
        lines.push(format!("  {}, {}", layer.media_type, HumanBytes(layer.bytes_stored)));
        if let Some(diff_id) = &layer.diff_id {
            lines.push(format!("  diffID {diff_id}"));
        }
        if let Some(Erofs { bytes, ratio, chunks, present, bytes_present, state, verified_by }) = &layer.erofs {
            let ratio = ratio.map_or_else(String::new, |ratio| format!(" (ratio {ratio:.3})"));
            lines.push(format!(
                "  {} unpacked{ratio} in {chunks} chunks, verified by {verified_by}",
                HumanBytes(*bytes)
            ));
            let state = match state {
                LayerState::Lazy => "lazy",
                LayerState::Filling => "filling",
                LayerState::Local => "local: verified as a whole",
            };
            lines.push(format!("  here: {present} chunks, {} ({state})", HumanBytes(*bytes_present)));
        }
    }
    lines.join("\n")
}

pub(crate) fn check(context: &Context, arguments: &args::Check) -> anyhow::Result<ExitCode> {
    let runtime = context.runtime()?;
    let house = House::open(&context.config, runtime.handle().clone())?;
    let examination = runtime.block_on(async {
        let documents = house.documents(&absolute(&arguments.image)?, arguments.platform.as_ref()).await?;
        let plan = documents.plan()?;
        let total = plan.layers.iter().map(|layer| layer.blob_size).sum();
        let bar = progress::bytes("checking", total);
        let examined = examine(&documents, &plan, &context.config.root.join("tmp"), &|bytes| bar.inc(bytes)).await;
        bar.finish_and_clear();
        examined
    })?;
    let is_right = examination.findings.is_empty();
    if context.json {
        output::json(&examination)?;
    } else {
        for finding in &examination.findings {
            output::line(&format!("{}: {}: {}", finding.layer, finding.place, finding.problem))?;
        }
        if examination.more > 0 {
            output::line(&format!("and {} places more", examination.more))?;
        }
        let verdict = if is_right { "nothing is wrong" } else { "these places are wrong" };
        output::line(&format!(
            "{verdict}: looked at {} layers, {} in {} chunks, {} inodes",
            examination.layers,
            HumanBytes(examination.bytes),
            examination.chunks,
            examination.inodes
        ))?;
    }
    Ok(if is_right { ExitCode::SUCCESS } else { Problem::Wrong.exit_code() })
}
