//! What may happen around a running container without its noticing: other namespaces, removals, restarts of either side.

use super::image;
use super::stage::{K8S, OURS, Stage, Version};
use crate::cli::stage::wait_until;

/// An image leaves one of two namespaces: containers of the other go on, and new ones start.
fn namespaces_are_independent(stage: &Stage, image: &str) {
    for namespace in ["one", "two"] {
        stage.ctr_pull(namespace, OURS, image);
    }
    let (one, two) = (stage.start("one", OURS, image), stage.start("two", OURS, image));
    one.exec("echo mine > /mine");
    one.end();
    stage.remove_image("one", image);
    assert_eq!(stage.snapshots("one", OURS), Vec::<[String; 3]>::new());
    let another = stage.start("two", OURS, image);
    let seen = two.sees();
    another.sees().assert_equals(&seen);
    assert!(two.try_exec("test -e /mine").is_err(), "a file of another container is seen");
    two.end();
    another.end();
    stage.remove_image("two", image);
    stage.assert_bare(&["one", "two"]);
}

#[test]
fn two_namespaces_on_1_6() {
    let stage = Stage::new(Version::V1_6);
    namespaces_are_independent(&stage, &stage.publish("app", &image::every_kind()));
}

#[test]
fn two_namespaces_on_2_1_with_an_image_of_each_kind() {
    let stage = Stage::new(Version::V2_1);
    let twin = stage.publish_twin("app", &image::every_kind());
    namespaces_are_independent(&stage, &twin.lazy);
    namespaces_are_independent(&stage, &twin.plain);
}

/// Two images share layers. One is removed with its containers, then the other while its container runs.
fn removals_leave_the_running_alone(stage: &Stage, first: &str, second: &str) {
    for image in [first, second] {
        stage.cri_pull(image);
    }
    let (kept, removed) = (stage.start(K8S, OURS, first), stage.start(K8S, OURS, second));
    assert_eq!(removed.exec("cat /number"), "number 1");
    removed.end();
    stage.cri_remove(second);
    assert_eq!(kept.exec("cat /opaque/new"), "of the second layer");
    stage.cri_remove(first);
    let seen = kept.sees();
    assert!(stage.try_start(K8S, OURS, first).is_err(), "a removed image runs");
    kept.exec("echo new > /changing/changed && test -s /data/big");
    kept.end();
    stage.cri_pull(first);
    let again = stage.start(K8S, OURS, first);
    again.sees().assert_equals(&seen);
    again.end();
    stage.cri_remove(first);
    stage.assert_bare(&[K8S]);
}

#[test]
fn removals_leave_running_containers_alone() {
    let stage = Stage::new(Version::V1_7);
    let layers = image::every_kind();
    let more: Vec<_> = layers.iter().cloned().chain(image::small(1).pop()).collect();
    let (first, second) = (stage.publish_twin("first", &layers), stage.publish_twin("second", &more));
    removals_leave_the_running_alone(&stage, &first.lazy, &second.lazy);
    removals_leave_the_running_alone(&stage, &first.plain, &second.plain);
}

/// Our daemon goes and comes back: containers go on, and new ones start.
fn outlives_our_daemon(stage: &Stage, image: &str, away: impl Fn()) {
    stage.cri_pull(image);
    let (read, unread) = (stage.start(K8S, OURS, image), stage.start(K8S, OURS, image));
    let before = read.sees();
    away();
    // Nothing new may be needed for what runs already.
    assert_eq!(read.exec("echo still here"), "still here\n");
    stage.start_daemon();
    // containerd does not call for up to three seconds after a call has failed.
    wait_until("containerd to call again", || {
        stage.ctr(&["-n", K8S, "snapshot", "--snapshotter", OURS, "list"]).is_ok()
    });
    read.sees().assert_equals(&before);
    unread.sees().assert_equals(&before);
    unread.exec("echo new > /changing/changed && test \"$(cat /changing/changed)\" = new");
    let new = stage.start(K8S, OURS, image);
    new.sees().assert_equals(&before);
    for container in [read, unread, new] {
        container.end();
    }
    stage.cri_remove(image);
    stage.assert_bare(&[K8S]);
}

#[test]
fn containers_outlive_our_daemon() {
    let stage = Stage::new(Version::V1_7);
    let image = stage.publish("app", &image::every_kind());
    outlives_our_daemon(&stage, &image, || stage.stop_daemon());
    outlives_our_daemon(&stage, &image, || stage.kill_daemon());
}

#[test]
fn lazy_containers_outlive_our_daemon() {
    let stage = Stage::new(Version::V1_6);
    let twin = stage.publish_twin("app", &image::every_kind());
    outlives_our_daemon(&stage, &twin.lazy, || stage.stop_daemon());
    outlives_our_daemon(&stage, &twin.lazy, || stage.kill_daemon());
}

/// containerd goes and comes back.
#[test]
fn containers_outlive_containerd() {
    let stage = Stage::new(Version::V2_1);
    let twin = stage.publish_twin("app", &image::every_kind());
    stage.cri_pull(&twin.lazy);
    stage.ctr_pull("default", OURS, &twin.plain);
    for (namespace, image) in [(K8S, &twin.lazy), ("default", &twin.plain)] {
        let running = stage.start(namespace, OURS, image);
        let known = stage.snapshots(namespace, OURS);
        stage.stop_containerd();
        stage.start_containerd();
        assert_eq!(stage.snapshots(namespace, OURS), known);
        let seen = running.sees();
        let new = stage.start(namespace, OURS, image);
        new.sees().assert_equals(&seen);
        new.end();
        running.end();
    }
    stage.cri_remove(&twin.lazy);
    stage.remove_image("default", &twin.plain);
    stage.assert_bare(&[K8S, "default"]);
}
