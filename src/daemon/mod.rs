//! Configuration and wiring: what the rooms below are told, and how they stand together in a process that serves a mount.

pub mod browse;
pub mod config;
pub mod examine;
pub mod image;
pub mod mounts;
pub mod serving;
