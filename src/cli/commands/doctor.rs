//! `headstart doctor` and `headstart containerd-config`: what to do on this machine.

use std::process::ExitCode;

use serde::Serialize;

use super::Context;
use crate::cli::args;
use crate::cli::exit::{Problem, Told};
use crate::cli::output;
use crate::daemon::config::Surroundings;
use crate::doctor::{self, Finding, Reader, Remedy, Severity, Whereabouts};
use crate::oci::Platform;

/// What `doctor --json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    findings: Vec<&'a Finding>,
    /// How many of them have to be acted on.
    must: usize,
}

pub(crate) fn doctor(context: &Context, arguments: &args::Doctor) -> anyhow::Result<ExitCode> {
    let whereabouts = Whereabouts {
        containerd_config: arguments.containerd_config.clone(),
        containerd_version: arguments.containerd_version.or(context.config.containerd.version),
        containerd_socket: context.config.containerd.address.clone(),
        snapshotter: context.config.containerd.enabled.then(|| context.config.containerd.socket.clone()),
        config: context.config_file.clone().unwrap_or_else(|| Surroundings::of_this_process().config_file()),
    };
    let runtime = context.runtime()?;
    let all = doctor::examine(&context.config, &whereabouts, runtime.handle());
    let must = all.iter().filter(|finding| finding.severity == Severity::Must).count();
    let findings: Vec<&Finding> =
        all.iter().filter(|finding| !arguments.quiet || finding.severity >= Severity::Should).collect();
    if context.json {
        output::json(&Report { findings, must })?;
    } else {
        for finding in findings {
            output::line(&text(finding))?;
        }
    }
    Ok(if must == 0 { ExitCode::SUCCESS } else { Problem::Wrong.exit_code() })
}

fn text(finding: &Finding) -> String {
    let Finding { check, severity, what, remedy } = finding;
    let severity = match severity {
        Severity::Good => "good",
        Severity::Note => "note",
        Severity::Should => "should",
        Severity::Must => "MUST",
    };
    let mut text = format!("{severity:<7} {check:<23} {what}");
    let (head, lines) = match remedy {
        None => return text,
        Some(Remedy::Write { file, lines }) => (format!("write into {}:", file.display()), lines.as_str()),
        Some(Remedy::Remove { file, lines }) => (format!("remove from {}:", file.display()), lines.as_str()),
        Some(Remedy::Run { command }) => ("run:".to_owned(), command.as_str()),
    };
    text.push_str(&format!("\n          {head}"));
    for line in lines.lines() {
        text.push_str(&format!("\n            {line}"));
    }
    text
}

pub(crate) fn containerd_config(context: &Context, arguments: &args::ContainerdConfig) -> anyhow::Result<ExitCode> {
    let version = match arguments.version.or(context.config.containerd.version) {
        Some(version) => version,
        None => {
            let none = || Err("there is no containerd here".to_owned());
            let asked = doctor::ask_version(&context.config.containerd.address, context.runtime()?.handle())
                .unwrap_or_else(none);
            asked.map_err(|why| {
                let message = format!("{why}; name the version with --version, for example --version 2.1");
                Told { problem: Problem::NotFound, message }
            })?
        }
    };
    let reader = Reader {
        version,
        file_version: doctor::main_file_version(&arguments.file),
        socket: &context.config.containerd.socket,
        root: &context.config.root,
        architecture: &Platform::host().architecture,
        maps_ids: doctor::maps_ids(&context.config),
    };
    let text = match arguments.drop_in {
        true => doctor::containerd_drop_in(&reader),
        false => doctor::containerd_config(&reader),
    };
    match context.json {
        true => output::json(&toml::from_str::<toml::Table>(&text)?)?,
        false => output::line(text.trim_end())?,
    }
    Ok(ExitCode::SUCCESS)
}
