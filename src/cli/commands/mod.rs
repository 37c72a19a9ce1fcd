//! One file per command, or per pair of commands that belong together.

pub(crate) mod convert;
pub(crate) mod files;
pub(crate) mod look;
pub(crate) mod manual;
pub(crate) mod mount;
pub(crate) mod pull;
pub(crate) mod serve;
pub(crate) mod status;
pub(crate) mod umount;

use std::path::PathBuf;

use anyhow::Context as _;
use tokio::runtime::{Builder, Runtime};

use super::args::Global;
use super::logging;
use crate::daemon::config::{Config, LogLevel, Surroundings};

/// What every command gets: the configuration with the options applied, and how to print.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) config: Config,
    /// The file that `--config` names, for processes that are started.
    pub(crate) config_file: Option<PathBuf>,
    pub(crate) json: bool,
    log_level_given: bool,
}

impl Context {
    pub(crate) fn new(global: &Global) -> anyhow::Result<Self> {
        let mut config = Config::load(global.config.as_deref(), &Surroundings::of_this_process())?;
        if let Some(root) = &global.root {
            config.root = std::path::absolute(root).with_context(|| format!("cannot use root {}", root.display()))?;
        }
        if let Some(level) = global.log_level {
            config.log_level = level.into();
        }
        logging::start(config.log_level);
        let config_file = global.config.as_deref().map(std::path::absolute).transpose()?;
        Ok(Self { config, config_file, json: global.json, log_level_given: global.log_level.is_some() })
    }

    /// How much a serving process logs: what the option says, else one line for each thing that happened at least.
    pub(crate) fn serving_log_level(&self) -> LogLevel {
        match self.config.log_level {
            LogLevel::Error | LogLevel::Warn if !self.log_level_given => LogLevel::Info,
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
