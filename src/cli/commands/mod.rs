//! One file per command, or per pair of commands that belong together.

pub(crate) mod cleanup;
pub(crate) mod convert;
pub(crate) mod daemon;
pub(crate) mod doctor;
pub(crate) mod files;
pub(crate) mod look;
pub(crate) mod manual;
pub(crate) mod mount;
pub(crate) mod prune;
pub(crate) mod pull;
pub(crate) mod serve;
pub(crate) mod snapshots;
pub(crate) mod status;
pub(crate) mod umount;

use std::path::PathBuf;

use anyhow::Context as _;
use tokio::runtime::{Builder, Runtime};

use super::args::Global;
use super::logging;
use crate::daemon::config::{Config, LogLevel, Surroundings};

/// What every command gets: the configuration with the options applied, and how to print.
#[derive(Debug, Clone)]
pub(crate) struct Context {
    pub(crate) config: Config,
    /// The file that `--config` names, for processes that are started.
    pub(crate) config_file: Option<PathBuf>,
    pub(crate) json: bool,
    global: Global,
}

impl Context {
    pub(crate) fn new(global: &Global) -> anyhow::Result<Self> {
        let config = load(global)?;
        logging::start(config.log_level);
        let config_file = global.config.as_deref().map(std::path::absolute).transpose()?;
        Ok(Self { config, config_file, json: global.json, global: global.clone() })
    }

    /// The configuration as it is by now, with the same options applied.
    pub(crate) fn load(&self) -> anyhow::Result<Config> {
        load(&self.global)
    }

    /// How much a serving process logs: what the option says, else one line for each thing that happened at least.
    pub(crate) fn serving_log_level(&self, config: &Config) -> LogLevel {
        match config.log_level {
            LogLevel::Error | LogLevel::Warn if self.global.log_level.is_none() => LogLevel::Info,
            level => level,
        }
    }

    /// The runtime of a command: two workers are enough to keep a link busy, hashing and inflating happen elsewhere.
    pub(crate) fn runtime(&self) -> anyhow::Result<Runtime> {
        // An earlier command of this process (a test) may have installed it already.
        rustls::crypto::ring::default_provider().install_default().ok();
        Builder::new_multi_thread().worker_threads(2).enable_all().build().context("cannot start the runtime")
    }
}

fn load(global: &Global) -> anyhow::Result<Config> {
    let mut config = Config::load(global.config.as_deref(), &Surroundings::of_this_process())?;
    if let Some(root) = &global.root {
        config.root = std::path::absolute(root).with_context(|| format!("cannot use root {}", root.display()))?;
    }
    if let Some(level) = global.log_level {
        config.log_level = level.into();
    }
    Ok(config)
}
