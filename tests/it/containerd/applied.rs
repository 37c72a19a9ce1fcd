//! Images that nobody converted, applied by our diff service: each layer is an image of its own in the store.

use std::sync::Mutex;

use super::image;
use super::stage::{K8S, OURS, Stage, Version};
use crate::cli::stage::wait_until;

fn layers_become_images(version: Version) {
    let stage = Stage::applying(version);
    let every = stage.publish("every", &image::every_kind());
    let many = stage.publish("many", &image::many(12));
    stage.cri_pull(&every);
    stage.ctr_pull("default", OURS, &many);
    let anchors = stage.anchors();
    let is_tar = |anchor: &Option<String>| anchor.as_ref().is_some_and(|anchor| anchor.starts_with("tar-"));
    assert!(anchors.len() > 12 && anchors.iter().all(is_tar), "{anchors:?}\n{}", stage.logs());
    for (namespace, image) in [(K8S, &every), ("default", &many)] {
        let container = stage.start(namespace, OURS, image);
        let seen = container.sees();
        assert!(seen.count() > 20, "{seen:?}");
        // The judge's snapshots are not ours: containerd asks the next differ.
        seen.assert_equals(&stage.judge(image));
        container.end();
    }
    // They are there again without containerd bringing anything.
    stage.kill_daemon();
    stage.start_daemon();
    let started = Mutex::new(None);
    // containerd does not ask again at once after a connection that was refused.
    wait_until("a container after the restart", || {
        *started.lock().unwrap() = stage.try_start("default", OURS, &many).ok();
        started.lock().unwrap().is_some()
    });
    let container = started.into_inner().unwrap().expect("it was just started");
    assert!(container.exec("cat /etc/passwd").starts_with("root:"));
    container.end();
}

#[test]
fn containerd_1_7_lets_us_apply_layers() {
    layers_become_images(Version::V1_7);
}

#[test]
fn containerd_2_1_lets_us_apply_layers() {
    layers_become_images(Version::V2_1);
}
