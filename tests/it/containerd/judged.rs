//! Two images that nobody converted, pulled in both ways, and containers of them that are held against containerd's own snapshotter.

use super::container::Container;
use super::image;
use super::stage::{K8S, OURS, Stage};

/// Publishes an image with every kind of file and one of `many` small layers. The first is pulled through the runtime interface,
/// the other through `ctr`: in which namespace which image is.
pub(super) fn pull_both_ways(stage: &Stage, many: usize) -> [(&'static str, String); 2] {
    let every = stage.publish("every", &image::every_kind());
    let many = stage.publish("many", &image::many(many));
    stage.cri_pull(&every);
    stage.ctr_pull("default", OURS, &many);
    [(K8S, every), ("default", many)]
}

/// A container that sees what it would see under overlayfs.
#[track_caller]
pub(super) fn start_judged<'a>(stage: &'a Stage, namespace: &str, image: &str) -> Container<'a> {
    let container = stage.start(namespace, OURS, image);
    let seen = container.sees();
    assert!(seen.count() > 20, "{seen:?}");
    seen.assert_equals(&stage.judge(image));
    container
}
