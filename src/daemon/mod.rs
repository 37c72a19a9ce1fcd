//! Configuration and wiring: what the rooms below are told, and how they stand together in a process that serves mounts.

pub mod api;
pub mod browse;
pub mod config;
pub mod examine;
pub mod host;
pub mod image;
pub mod keeper;
pub mod ledger;
pub mod left;
mod listener;
pub mod logins;
mod metrics;
pub mod mounts;
pub mod node;
pub mod notify;
pub mod place;
pub mod pull;
mod pulls;
mod recorder;
pub mod service;
pub mod serving;
