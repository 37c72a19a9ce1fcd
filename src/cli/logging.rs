//! Where log lines go: the standard error, in words on a terminal and with times elsewhere.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

use crate::daemon::config::LogLevel;

/// Begins logging for this process. Libraries are heard only when they warn; their chatter is no operator's business.
pub(crate) fn start(level: LogLevel) {
    let filter = EnvFilter::new(match level {
        LogLevel::Trace => "trace".to_owned(),
        other => format!("warn,headstart={}", other.name()),
    });
    let terminal = std::io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(terminal);
    let started = if terminal {
        builder.with_target(false).without_time().try_init()
    } else {
        builder.with_target(true).try_init()
    };
    // A second start in one process (tests) keeps the first one's settings.
    started.ok();
}
