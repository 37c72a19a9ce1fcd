//! One file per command, or per pair of commands that belong together.

pub(crate) mod manual;
pub(crate) mod serve;

use anyhow::Context as _;
use tokio::runtime::{Builder, Runtime};

use super::args::Global;
use super::logging;
use crate::daemon::config::{Config, Surroundings};

/// What every command gets: the configuration with the options applied, and how to print.
#[derive(Debug)]
pub(crate) struct Context {
    pub(crate) config: Config,
    #[expect(dead_code, reason = "the commands that print data follow")]
    pub(crate) json: bool,
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
        Ok(Self { config, json: global.json })
    }

    /// The runtime of a command: two workers are enough to keep a link busy, hashing and inflating happen elsewhere.
    pub(crate) fn runtime(&self) -> anyhow::Result<Runtime> {
        // An earlier command of this process (a test) may have installed it already.
        rustls::crypto::ring::default_provider().install_default().ok();
        Builder::new_multi_thread().worker_threads(2).enable_all().build().context("cannot start the runtime")
    }
}
