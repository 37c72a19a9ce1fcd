//! The program from end to end, as a user starts it. Needs root, /dev/fuse, overlayfs and umoci.

mod bad_input;
mod caches;
mod commands;
mod convert;
mod doctor;
mod drivers;
mod mixed;
mod mounts;
mod pulls;
mod real_registry;
pub(crate) mod stage;
