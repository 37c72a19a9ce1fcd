//! The command line: arguments in, text or JSON and an exit code out.
//!
//! Guarantees: a failure is told once, as what was attempted, on what, why, and what can be done; data goes to the standard
//! output, everything else to the standard error; each kind of failure has its exit code (`exit`).
//! Refuses to know formats and mechanisms: commands compose the rooms below.

mod args;
mod commands;
mod exit;
mod logging;
mod output;
mod progress;
mod report;

use std::process::ExitCode;

use clap::Parser as _;
use clap::error::ErrorKind;

use args::{Arguments, Command};
use commands::Context;
use exit::Problem;
use report::Failure;

/// Runs the command that this process was started for.
pub fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return answer_clap(&error),
    };
    let json = arguments.global.json;
    match Context::new(&arguments.global).and_then(|context| run(&context, arguments.command)) {
        Ok(code) => code,
        // Whoever read the output has seen enough.
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let failure = Failure::of(&error);
            report::print(&failure, json);
            failure.problem.exit_code()
        }
    }
}

fn run(context: &Context, command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Doctor(arguments) => commands::doctor::doctor(context, &arguments),
        Command::ContainerdConfig(arguments) => commands::doctor::containerd_config(context, &arguments),
        Command::Mount(arguments) => commands::mount::mount(context, &arguments),
        Command::Umount(arguments) => commands::umount::umount(context, &arguments),
        Command::Daemon(_) => commands::daemon::run(context),
        Command::Hold(arguments) => commands::daemon::hold(&arguments),
        Command::Cleanup(arguments) => commands::cleanup::cleanup(context, &arguments),
        Command::Status(_) => commands::status::status(context),
        Command::Snapshots(_) => commands::snapshots::snapshots(context),
        Command::Pull(arguments) => commands::pull::pull(context, &arguments),
        Command::Wait(arguments) => commands::pull::wait(context, &arguments),
        Command::Prune(arguments) => commands::prune::run(context, &arguments),
        Command::Forget(arguments) => commands::snapshots::forget(context, &arguments),
        Command::Inspect(arguments) => commands::look::inspect(context, &arguments),
        Command::Check(arguments) => commands::look::check(context, &arguments),
        Command::Ls(arguments) => commands::files::ls(context, &arguments),
        Command::Cat(arguments) => commands::files::cat(context, &arguments),
        Command::Serve(arguments) => commands::serve::run(context, arguments),
        Command::Completions(arguments) => commands::manual::completions(&arguments),
        Command::Man(arguments) => commands::manual::man(&arguments),
        Command::Convert(arguments) => commands::convert::run(context, arguments),
    }
}

/// Help and versions are answers; everything else that the parser says is a mistake in the command line.
fn answer_clap(error: &clap::Error) -> ExitCode {
    // If the terminal is gone there is nobody to tell.
    error.print().ok();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
        _ => Problem::Usage.exit_code(),
    }
}
