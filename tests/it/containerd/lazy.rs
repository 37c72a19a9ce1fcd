//! Converted images, published beside their originals: containerd downloads no layer of them, in any version, and containers see
//! the same tree.

use super::image;
use super::stage::{Fetched, K8S, OURS, Stage, Twin, Version};

/// Nobody fetched a layer of the original, nobody a whole layer of the twin, and containerd none at all.
#[track_caller]
pub(super) fn assert_lazy(fetched: &[Fetched], twin: &Twin) {
    let names = |digests: &[String], read: &Fetched| digests.iter().any(|digest| read.path.ends_with(digest.as_str()));
    for read in fetched {
        assert!(!names(&twin.layers, read), "a layer of the original was fetched: {read:?}");
        if names(&twin.converted, read) {
            assert!(!read.by_containerd, "containerd fetched a converted layer: {read:?}");
            assert_eq!(read.status, 206, "not a range: {read:?}");
        }
    }
}

/// What was fetched of converted layers.
pub(super) fn bytes_of(fetched: &[Fetched], twin: &Twin) -> u64 {
    let reads = fetched.iter().filter(|read| twin.converted.iter().any(|digest| read.path.ends_with(digest.as_str())));
    reads.map(|read| read.bytes).sum()
}

/// Pulled by `pull`, run in `namespace`, and seen as under overlayfs.
fn is_lazy_and_right(stage: &Stage, namespace: &str, name: &str, pull: impl Fn(&str)) {
    let twin = stage.publish_twin(name, &image::every_kind());
    let published = stage.fetched().len();
    pull(&twin.lazy);
    let container = stage.start(namespace, OURS, &twin.lazy);
    assert_eq!(container.exec("cat /opaque/new"), "of the second layer");
    let fetched = stage.fetched().split_off(published);
    assert_lazy(&fetched, &twin);
    let bytes = bytes_of(&fetched, &twin);
    // The second image of a stage has the same layers, and what was fetched of them stays.
    assert!(bytes > 0 || name == "other", "nothing came from the registry: {fetched:?}");
    assert!(bytes < image::BIG as u64 / 2, "{bytes} bytes were fetched for a start: {fetched:?}");

    let seen = container.sees();
    assert_lazy(&stage.fetched().split_off(published), &twin);
    seen.assert_equals(&stage.judge(&twin.plain));
    container.exec("echo changed > /changing/changed; test \"$(cat /changing/changed)\" = changed");
    container.end();
    if namespace == K8S { stage.cri_remove(&twin.lazy) } else { stage.remove_image(namespace, &twin.lazy) }
}

fn through_the_runtime_interface(version: Version) {
    let stage = Stage::new(version);
    is_lazy_and_right(&stage, K8S, "lazy", |image| stage.cri_pull(image));
}

#[test]
fn twins_are_lazy_on_containerd_1_6() {
    through_the_runtime_interface(Version::V1_6);
}

#[test]
fn twins_are_lazy_on_containerd_1_7() {
    through_the_runtime_interface(Version::V1_7);
}

#[test]
fn twins_are_lazy_on_containerd_2_1() {
    let stage = Stage::new(Version::V2_1);
    is_lazy_and_right(&stage, K8S, "lazy", |image| stage.cri_pull(image));
    is_lazy_and_right(&stage, "default", "other", |image| stage.ctr_pull("default", OURS, image));
    stage.assert_bare(&[K8S, "default"]);
}

/// As kubelet does it: a pod, a container in it, a command in that.
#[test]
fn pods_run_from_twins() {
    let stage = Stage::new(Version::V1_7);
    stage.publish("pause", &[image::pause()]);
    let twin = stage.publish_twin("app", &image::every_kind());
    let cri = stage.cri();
    let published = stage.fetched().len();
    stage.cri_pull(&twin.lazy);
    let name = format!("headstart-it-{}", std::process::id());
    let pod = cri.run_pod(&name).unwrap_or_else(|error| panic!("{error}\n{}", stage.logs()));
    let container = cri.run_container(&pod, &twin.lazy, &["sleep", "100000"]).unwrap();
    assert_eq!(cri.exec(&container, &["cat", "/opaque/new"]).unwrap(), "of the second layer");
    assert_lazy(&stage.fetched().split_off(published), &twin);
    cri.remove_pod(&pod).unwrap();
    cri.remove_image(&twin.lazy).unwrap();
}
