//! What has to be done on this machine so that everything works: facts, and findings made of them.
//!
//! Guarantees: nothing is changed; each finding that asks for something tells what to write where, or what to run. The
//! rules are functions of facts alone (`advice`, `config`, `containerd`, `node`); `gather` collects the facts and decides
//! nothing.

mod advice;
mod gather;
mod version;

pub use advice::{NAME, Reader, file as containerd_config};
pub use gather::{ask_version, main_file_version};
pub use version::{ContainerdVersion, VersionError};
