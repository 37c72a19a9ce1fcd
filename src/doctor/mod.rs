//! What has to be done on this machine so that everything works: facts, and findings made of them.
//!
//! Guarantees: nothing is changed; each finding that asks for something tells what to write where, or what to run, where
//! that is known. The rules are functions of facts alone (`advice`, `config`, `containerd`, `node`); `gather` collects the
//! facts and decides nothing.

mod advice;
mod config;
mod containerd;
mod finding;
mod gather;
mod node;

use tokio::runtime::Handle;

use crate::daemon::config::Config;

pub use advice::{NAME, Reader, drop_in as containerd_drop_in, file as containerd_config};
pub use finding::{Finding, Remedy, Severity};
pub use gather::{Whereabouts, ask_version, main_file_version, maps_ids};

/// Looks at everything.
pub fn examine(config: &Config, whereabouts: &Whereabouts, runtime: &Handle) -> Vec<Finding> {
    let mut findings = node::examine(&gather::node(config, whereabouts, runtime));
    if !config.containerd.enabled {
        findings.push(Finding::note("containerd.version", "containerd is not served: containerd.enabled is false"));
        return findings;
    }
    findings.extend(containerd::examine(&gather::containerd(whereabouts, runtime), &gather::ours(config, whereabouts)));
    findings
}
