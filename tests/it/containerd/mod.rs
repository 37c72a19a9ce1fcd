//! Real containerd (1.6, 1.7 and 2.1 as Debian packages them) with real runc and a real docker-registry, on our snapshots.
//!
//! Every test has a containerd, a daemon and a registry of its own, and judges by what containers see: a tree is right if it
//! equals the tree that containerd's own overlayfs snapshotter shows of the same image. The registry's access log is witness of
//! who fetched what. Needs root, overlayfs, runc, docker-registry and `tools/containerd-versions`.

mod advice;
mod applied;
mod container;
mod cri;
mod image;
mod judged;
mod lazy;
mod life;
mod load;
mod logins;
mod ordinary;
mod stage;
mod users;
