//! Where log lines go: the standard error, in words on a terminal and with times elsewhere.

use std::io::IsTerminal as _;
use std::sync::OnceLock;

use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::reload::{self, Handle};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Layer as _, Registry};

use crate::daemon::config::LogLevel;

/// Changes how much this process logs, once it does.
static FILTER: OnceLock<Handle<EnvFilter, Registry>> = OnceLock::new();

/// Begins logging for this process. Libraries are heard only when they warn; their chatter is no operator's business.
pub(crate) fn start(level: LogLevel) {
    let (filter, handle) = reload::Layer::new(filter(level));
    let terminal = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(terminal);
    let lines = match terminal {
        true => lines.with_target(false).without_time().boxed(),
        false => lines.with_target(true).boxed(),
    };
    // A second start in one process (tests) keeps the first one's settings.
    if tracing_subscriber::registry().with(filter).with(lines).try_init().is_ok() {
        FILTER.set(handle).ok();
    }
}

/// Changes how much is logged from now on.
pub(crate) fn set_level(level: LogLevel) {
    if let Some(handle) = FILTER.get()
        && let Err(error) = handle.reload(filter(level))
    {
        tracing::warn!(%error, "the log level stays what it was");
    }
}

fn filter(level: LogLevel) -> EnvFilter {
    EnvFilter::new(match level {
        LogLevel::Trace => "trace".to_owned(),
        other => format!("warn,headstart={}", other.name()),
    })
}
