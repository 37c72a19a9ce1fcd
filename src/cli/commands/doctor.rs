//! `headstart containerd-config`.

use std::path::Path;
use std::process::ExitCode;

use super::Context;
use crate::cli::args;
use crate::cli::exit::{Problem, Told};
use crate::cli::output;
use crate::doctor::{Reader, ask_version, containerd_config as lines_for, main_file_version};
use crate::oci::Platform;

pub(crate) fn containerd_config(context: &Context, arguments: &args::ContainerdConfig) -> anyhow::Result<ExitCode> {
    let version = match arguments.version {
        Some(version) => version,
        None => ask_version().map_err(|why| {
            let message = format!("{why}; name the version with --version, for example --version 2.1");
            Told { problem: Problem::NotFound, message }
        })?,
    };
    let text = lines_for(&Reader {
        version,
        file_version: main_file_version(&arguments.file),
        socket: &socket(context),
        root: &context.config.root,
        architecture: &Platform::host().architecture,
    });
    match context.json {
        true => output::json(&toml::from_str::<toml::Table>(&text)?)?,
        false => output::line(text.trim_end())?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Where the snapshotter listens.
fn socket(context: &Context) -> std::path::PathBuf {
    context.config.run.join(Path::new("headstart.sock"))
}
