//! Images that nobody converted, applied by our diff service: each layer is an image of its own in the store.

use std::sync::Mutex;

use super::image;
use super::judged::{pull_both_ways, start_judged};
use super::stage::{OURS, Stage, Version};
use crate::cli::stage::wait_until;

fn layers_become_images(version: Version) {
    let stage = Stage::applying(version);
    let pulled = pull_both_ways(&stage, 12);
    let anchors = stage.anchors();
    let is_tar = |anchor: &Option<String>| anchor.as_ref().is_some_and(|anchor| anchor.starts_with("tar-"));
    assert!(anchors.len() > 12 && anchors.iter().all(is_tar), "{anchors:?}\n{}", stage.logs());
    for (namespace, image) in &pulled {
        // The judge's snapshots are not ours: containerd asks the next differ.
        start_judged(&stage, namespace, image).end();
    }
    let [_, (_, many)] = &pulled;
    // They are there again without containerd bringing anything.
    stage.kill_daemon();
    stage.start_daemon();
    let started = Mutex::new(None);
    // containerd does not ask again at once after a connection that was refused.
    wait_until("a container after the restart", || {
        *started.lock().unwrap() = stage.try_start("default", OURS, many).ok();
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

/// The transfer service asks one differ alone: what stands on layers that another one has applied is applied, too.
#[test]
fn layers_on_files_of_before() {
    let mut stage = Stage::new(Version::V2_1);
    let before = stage.publish("before", &image::small(1));
    let after = stage.publish("after", &[image::base(), image::changes(), image::big()]);
    stage.ctr_pull("default", OURS, &before);
    stage.apply_from_now_on();
    stage.ctr_pull("default", OURS, &after);
    let anchors = stage.anchors();
    let images = anchors.iter().flatten().count();
    assert_eq!((anchors.len(), images), (4, 2), "{anchors:?}\n{}", stage.logs());
    start_judged(&stage, "default", &after).end();
}
