//! Headstart: a lazy container file system.
//!
//! The map of the house. A room uses rooms of lower floors and, without cycles, of its own floor; never a higher one.
//! `tests/it/architecture.rs` holds this table against the code.
//!
//! | floor | room | what it is |
//! |---|---|---|
//! | 0 | `model` | pure words: digests, names, attributes, ranges, layer entries, the ports bytes come through |
//! | 0 | `observe` | the names of spans and counters |
//! | 1 | `chunked` | chunk index and zstd frames of a layer blob |
//! | 1 | `erofs` | the EROFS on-disk format, reader and writer |
//! | 1 | `tar` | a layer tar as a stream of entries |
//! | 1 | `oci` | manifests, indexes, configs, references, annotations |
//! | 2 | `overlay` | the merge of layers: whiteouts and opaque directories |
//! | 2 | `chain` | the rules of snapshots: what may be prepared, committed, rebased, removed |
//! | 3 | `sys` | system calls; the only unsafe code |
//! | 3 | `registry` | the OCI distribution client |
//! | 3 | `layout` | images on the local disk: OCI layouts and archives |
//! | 3 | `store` | blob files, presence bitmaps, recovery |
//! | 4 | `transport` | any reference opened for reading or writing: registry, layout, archive |
//! | 4 | `fetch` | single flight, range merging, priorities, budgets: the only download path |
//! | 5 | `vfs` | inodes, lookups, directories, reads of a merged snapshot |
//! | 5 | `unpack` | layers brought to local: background fills and pulls |
//! | 5 | `snapshots` | snapshots of a node: rules, records, directories, layers |
//! | 5 | `convert` | pull, rebuild, push |
//! | 5 | `drivers` | layer images mounted by the kernel and handed over to local files |
//! | 6 | `fuse` | the kernel's FUSE protocol |
//! | 6 | `grpc` | containerd's protocol: snapshots served, its own services called |
//! | 6 | `serve` | a read-only distribution endpoint for experiments |
//! | 6 | `control` | the local socket the command line talks to |
//! | 7 | `daemon` | configuration, wiring, shutdown |
//! | 7 | `doctor` | what has to be done on this machine so that everything works |
//! | 7 | `testkit` | generators, faulty peers and judges for tests (feature `testkit`) |
//! | 8 | `cli` | arguments, commands, exit codes |

pub mod chain;
pub mod chunked;
pub mod cli;
pub mod control;
pub mod convert;
pub mod daemon;
pub mod doctor;
pub mod drivers;
pub mod erofs;
pub mod fetch;
pub mod fuse;
pub mod grpc;
pub mod layout;
pub mod model;
pub mod observe;
pub mod oci;
pub mod overlay;
pub mod registry;
pub mod serve;
pub mod snapshots;
pub mod store;
pub mod sys;
pub mod tar;
#[cfg(feature = "testkit")]
pub mod testkit;
pub mod transport;
pub mod unpack;
pub mod vfs;
