//! Images that nobody converted: containerd downloads and applies their layers, into the mounts that we return.

use super::judged::{pull_both_ways, start_judged};
use super::stage::{OURS, Stage, Version};

/// Pulled through the runtime interface and through `ctr`, run, and seen as under overlayfs.
fn is_seen_as_under_overlayfs(version: Version) {
    let stage = Stage::new(version);
    for (namespace, image) in pull_both_ways(&stage, 60) {
        let container = start_judged(&stage, namespace, &image);
        // What is written stays in the container.
        container.exec("echo changed > /etc/passwd; test \"$(cat /etc/passwd)\" = changed");
        let other = stage.start(namespace, OURS, &image);
        assert!(other.exec("cat /etc/passwd").starts_with("root:"));
        other.end();
        container.end();
    }
}

#[test]
fn containerd_1_6_applies_layers_into_our_mounts() {
    is_seen_as_under_overlayfs(Version::V1_6);
}

#[test]
fn containerd_1_7_applies_layers_into_our_mounts() {
    is_seen_as_under_overlayfs(Version::V1_7);
}

#[test]
fn containerd_2_1_applies_layers_into_our_mounts() {
    is_seen_as_under_overlayfs(Version::V2_1);
}
