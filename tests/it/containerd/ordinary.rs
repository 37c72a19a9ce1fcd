//! Images that nobody converted: containerd downloads and applies their layers, into the mounts that we return.

use headstart::grpc::connect;
use headstart::grpc::proto::containerd::services::snapshots::v1::PrepareSnapshotRequest;
use headstart::grpc::proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;

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

/// Nothing holds a container to a size: whoever wants that is told once.
#[test]
fn a_size_that_is_not_limited_is_told() {
    let stage = Stage::new(Version::V2_1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let labels = [("containerd.io/snapshot/max-size".to_owned(), "1000000".to_owned())].into();
    let key = "default/1/limited".to_owned();
    let request = PrepareSnapshotRequest { snapshotter: OURS.to_owned(), key, parent: String::new(), labels };
    let asking = async { SnapshotsClient::new(connect(&stage.path("run/headstart.sock"))).prepare(request).await };
    let answer = runtime.block_on(asking).unwrap_or_else(|error| panic!("{error}\n{}", stage.logs())).into_inner();
    assert_eq!(answer.mounts.len(), 1, "{answer:?}");
    let logs = stage.whole_logs();
    let told: Vec<&str> = logs.lines().filter(|line| line.contains("the size of a snapshot is not limited")).collect();
    assert!(matches!(told[..], [line] if line.contains("default/1/limited") && line.contains("1000000")), "{told:?}");
}
