//! Everything that needs a real kernel, a real registry or more than one room.

#![expect(clippy::unwrap_used, reason = "a test whose stage cannot be set has failed")]

mod architecture;
mod chunked;
mod cli;
mod containerd;
mod convert_image;
mod convert_layer;
mod credentials;
mod daemon;
mod differ;
mod docs;
mod drivers;
mod erofs_abuse;
mod erofs_reader;
mod erofs_writer;
mod fetch;
mod forest;
mod grpc;
mod layers;
mod lazy;
mod mount;
mod mount_judge;
mod mounts;
mod overlay_judge;
mod registry;
mod registry_real;
mod restart;
mod serve;
mod shelf;
mod snapshots;
mod takeover;
mod tar;
mod transport;
