//! Containers in user namespaces: their root is somebody else here, and they see the files of their image as everybody does.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use tonic::Status;

use super::container::Container;
use super::image;
use super::lazy::{assert_lazy, bytes_of};
use super::stage::{JUDGE, K8S, OURS, Setup, Stage, Version};
use crate::cli::stage::wait_until;

/// The users and groups of a namespace: enough of them for those of the image.
const MAPPED: [&str; 4] = ["--uidmap", "0:100000:100000", "--gidmap", "0:200000:100000"];
/// What becomes of root.
const ROOT: (u32, u32) = (100_000, 200_000);

/// All that does not depend on whether a hard link was copied: the kernel's copies have one name each.
const LIST: &str = r#"
cd /; for place in bin changing data etc/passwd kinds opaque; do
  find $place -exec stat -c '%n %F %a %u %g %t %T' {} +
  find $place -type f -exec sha256sum {} +
done | sort"#;

fn owner(path: &Path) -> (u32, u32) {
    let found = fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    (found.uid(), found.gid())
}

/// `labels`: containerd tells the snapshotter of the namespace, by labels, and does not see to the files at once.
fn start<'a>(stage: &'a Stage, namespace: &str, image: &str, labels: bool) -> Container<'a> {
    let options = [&MAPPED[..], if labels { &["--remap-labels"][..] } else { &[] }].concat();
    stage.try_start_with(namespace, OURS, image, &options).unwrap_or_else(|error| panic!("{error}\n{}", stage.logs()))
}

/// A container is root inside and somebody else outside, sees what everybody sees, and what it writes is its own.
fn is_root_inside_alone(stage: &Stage, container: &Container<'_>, listed: &str) {
    assert_eq!(
        container.exec("cat /proc/self/uid_map").split_whitespace().collect::<Vec<_>>(),
        ["0", "100000", "100000"]
    );
    for (mine, theirs) in container.exec(LIST).lines().zip(listed.lines()) {
        assert_eq!(mine, theirs);
    }
    assert_eq!(container.exec(LIST).lines().count(), listed.lines().count());
    let rootfs = container.rootfs();
    let somebody = (ROOT.0 + 1000, ROOT.1 + 70_000);
    for (name, expected) in [("", ROOT), ("bin/busybox", ROOT), ("kinds/set-uid", somebody)] {
        assert_eq!(owner(&rootfs.join(name)), expected, "{name:?}");
    }
    container.exec("echo mine > /opaque/mine; mkdir /opaque/of; echo more >> /changing/changed; rm /etc/passwd");
    assert_eq!(container.exec("stat -c '%u %g' /opaque/mine /changing/changed; cat /opaque/mine"), "0 0\n0 0\nmine\n");
    let uppers = fs::read_dir(stage.path("root/snapshots")).unwrap().map(|entry| entry.unwrap().path().join("upper"));
    let upper = uppers.into_iter().find(|upper| upper.join("opaque/mine").exists()).expect("it is written somewhere");
    for name in ["", "opaque/mine", "opaque/of", "changing/changed"] {
        assert_eq!(owner(&upper.join(name)), ROOT, "{name:?}");
    }
}

/// The same files in an image that has no converted form.
fn publish_ordinary(stage: &Stage) -> String {
    let layers = image::every_kind().into_iter().chain(image::small(1).pop());
    stage.publish("ordinary", &layers.collect::<Vec<_>>())
}

/// What containers without a user namespace see.
fn listed(stage: &Stage, image: &str) -> String {
    stage.ctr_pull("judge", JUDGE, image);
    let container = stage.start("judge", JUDGE, image);
    let listed = container.exec(LIST);
    container.end();
    assert!(listed.lines().count() > 30, "{listed}");
    listed
}

/// Mounts of ours under other ids.
fn mapped(stage: &Stage) -> usize {
    let places = fs::read_dir(stage.path("run/m")).into_iter().flatten();
    places.map(|place| fs::read_dir(place.unwrap().path()).unwrap().count()).sum()
}

/// Layers that are served, and layers that containerd applied, mapped by the kernel.
fn is_mapped_by_the_kernel(stage: &Stage) {
    let (twin, ordinary) = (stage.publish_twin("app", &image::every_kind()), publish_ordinary(stage));
    let listed = listed(stage, &twin.plain);
    let published = stage.fetched().len();
    stage.cri_pull(&twin.lazy);
    let lazy = start(stage, K8S, &twin.lazy, true);
    lazy.exec("cat /opaque/new");
    let fetched = stage.fetched().split_off(published);
    assert_lazy(&fetched, &twin);
    assert!(bytes_of(&fetched, &twin) < image::BIG as u64 / 2, "changing owners has read it all: {fetched:?}");
    assert_eq!(mapped(stage), 4);
    is_root_inside_alone(stage, &lazy, &listed);
    stage.ctr_pull("default", OURS, &ordinary);
    let plain = start(stage, "default", &ordinary, true);
    assert_eq!(mapped(stage), 4 + 5);
    is_root_inside_alone(stage, &plain, &listed);
    // Whoever is not in the namespace has the files as they are, from the same layers.
    let other = stage.start(K8S, OURS, &twin.lazy);
    assert_eq!(other.exec(LIST), listed);
    assert_eq!(owner(&other.rootfs().join("bin/busybox")), (0, 0));
    for container in [lazy, plain, other] {
        container.end();
    }
    stage.cri_remove(&twin.lazy);
    stage.remove_image("default", &ordinary);
    stage.assert_bare(&[K8S, "default"]);
    assert_eq!(mapped(stage), 0);
}

fn declared(version: Version, settings: &str) -> Stage {
    Stage::build(version, &Setup { settings, maps_ids: true, ..Setup::default() })
}

const KERNEL: &str = "driver = \"kernel\"\n[fill]\nenabled = false\n";

#[test]
fn the_kernel_maps_ids_for_containerd_1_7() {
    is_mapped_by_the_kernel(&declared(Version::V1_7, KERNEL));
}

#[test]
fn the_kernel_maps_ids_for_containerd_2_1() {
    is_mapped_by_the_kernel(&declared(Version::V2_1, KERNEL));
}

/// Our daemon goes and comes back, and layers become local under the container.
#[test]
fn mapped_containers_outlive_our_daemon() {
    let stage = declared(Version::V2_1, "driver = \"kernel\"\n[fill]\nstart_delay = '1s'\n");
    let twin = stage.publish_twin("app", &image::every_kind());
    let listed = listed(&stage, &twin.plain);
    stage.cri_pull(&twin.lazy);
    let before = start(&stage, K8S, &twin.lazy, true);
    before.exec("cat /opaque/new");
    stage.kill_daemon();
    stage.start_daemon();
    wait_until("the layers to be local", || {
        let layers = stage.layers();
        layers.len() == 4 && layers.iter().all(|layer| layer["state"] == "local")
    });
    is_root_inside_alone(&stage, &before, &listed);
    wait_until("containerd to call again", || {
        stage.ctr(&["-n", K8S, "snapshot", "--snapshotter", OURS, "list"]).is_ok()
    });
    let after = start(&stage, K8S, &twin.lazy, true);
    is_root_inside_alone(&stage, &after, &listed);
    before.end();
    after.end();
    stage.cri_remove(&twin.lazy);
    stage.assert_bare(&[K8S]);
}

/// Layers that the kernel cannot map are refused in words, and run otherwise.
#[test]
fn layers_shown_through_fuse_are_not_mapped() {
    let stage = declared(Version::V2_1, "driver = \"fuse\"\n[fill]\nenabled = false\n");
    let twin = stage.publish_twin("app", &image::every_kind());
    stage.cri_pull(&twin.lazy);
    let options = [&MAPPED[..], &["--remap-labels"]].concat();
    let Err(refused) = stage.try_start_with(K8S, OURS, &twin.lazy, &options) else { panic!("FUSE maps no ids") };
    assert!(refused.contains("take `remap-ids` out of the capabilities"), "{refused}\n{}", stage.logs());
    assert_eq!(mapped(&stage), 0);
    // containerd is asked to change the owners, whatever is declared.
    let listed = listed(&stage, &twin.plain);
    let changed = start(&stage, K8S, &twin.lazy, false);
    is_root_inside_alone(&stage, &changed, &listed);
    changed.end();
    stage.cri_remove(&twin.lazy);
    stage.assert_bare(&[K8S]);
}

/// containerd changes the owners itself: told by labels, and at once.
fn containerd_changes_the_owners(version: Version) {
    let stage = Stage::new(version);
    let (twin, ordinary) = (stage.publish_twin("app", &image::every_kind()), publish_ordinary(&stage));
    let mut listed = listed(&stage, &twin.plain);
    if version == Version::V1_7 {
        // It does not set again what changing an owner clears.
        listed = listed.replace("kinds/set-uid regular file 6755", "kinds/set-uid regular file 755");
    }
    stage.cri_pull(&twin.lazy);
    stage.ctr_pull("default", OURS, &ordinary);
    for (namespace, image, labels) in [(K8S, &twin.lazy, true), ("default", &ordinary, false)] {
        let container = start(&stage, namespace, image, labels);
        assert_eq!(mapped(&stage), 0, "mapped twice");
        is_root_inside_alone(&stage, &container, &listed);
        // From here on it is there for everybody of the namespace.
        let second = start(&stage, namespace, image, labels);
        is_root_inside_alone(&stage, &second, &listed);
        container.end();
        second.end();
    }
    stage.cri_remove(&twin.lazy);
    stage.remove_image("default", &ordinary);
    stage.assert_bare(&[K8S, "default"]);
}

#[test]
fn containerd_1_7_changes_the_owners() {
    containerd_changes_the_owners(Version::V1_7);
}

#[test]
fn containerd_2_1_changes_the_owners() {
    containerd_changes_the_owners(Version::V2_1);
}

#[track_caller]
fn done<T>(stage: &Stage, answer: Result<T, Status>) -> T {
    answer.unwrap_or_else(|error| panic!("{error}\n{}", stage.logs()))
}

/// As kubelet asks for it: `hostUsers: false`.
#[test]
fn pods_have_users_of_their_own() {
    // The runtime interface of 2.x wants a runc that is newer than Debian's.
    let stage = declared(Version::V1_7, KERNEL);
    stage.publish("pause", &[image::pause()]);
    let twin = stage.publish_twin("app", &image::every_kind());
    let (cri, published) = (stage.cri(), stage.fetched().len());
    stage.cri_pull(&twin.lazy);
    let name = format!("headstart-it-users-{}", std::process::id());
    let pod = done(&stage, cri.run_pod_as(&name, ROOT.0, ROOT.1));
    let container = done(&stage, cri.run_container(&pod, &twin.lazy, &["sleep", "100000"]));
    let script =
        "cat /proc/self/uid_map; stat -c '%u %g' /bin/busybox; echo mine > /opaque/mine; stat -c %u /opaque/mine";
    let said = done(&stage, cri.exec(&container, &["sh", "-c", script]));
    assert_eq!(said.split_whitespace().collect::<Vec<_>>(), ["0", "100000", "65536", "0", "0", "0"]);
    let uppers = fs::read_dir(stage.path("root/snapshots")).unwrap().map(|entry| entry.unwrap().path());
    let written = uppers.map(|place| place.join("upper/opaque/mine")).find(|file| file.exists());
    assert_eq!(owner(&written.expect("it is written somewhere")), ROOT);
    let fetched: Vec<_> = stage.fetched().split_off(published);
    assert_lazy(&fetched, &twin);
    done(&stage, cri.remove_pod(&pod));
    done(&stage, cri.remove_image(&twin.lazy));
    wait_until("the end of mounts under other ids", || mapped(&stage) == 0);
}
