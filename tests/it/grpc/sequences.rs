//! What containerd's versions ask for, in their order: one layer after the other, all at once, layers that are served and
//! need not come, garbage collection; and what may happen in between.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use headstart::chain::LayerSlot;
use headstart::grpc::proto::containerd::services::snapshots::v1::{Info, Kind, PrepareSnapshotRequest};
use headstart::grpc::proto::containerd::types::Mount;
use headstart::model::{Algorithm, BlobDigest, ChainId, DiffId, Digest, IndexDigest};
use headstart::oci::labels::SNAPSHOT_REF;
use headstart::snapshots::LayerSpec;
use headstart::store::Anchor;
use headstart::testkit::waiting::wait_until;
use tonic::Code;

use super::{PATIENCE, ROOT_LABEL, Stage, assert_code};

/// The key under which a layer is extracted.
fn extract(number: usize, chain: &str) -> String {
    format!("default/{number}/extract-4711-aBc_ {chain}")
}

fn written(mounts: &[Mount]) -> String {
    let [Mount { r#type: kind, source, options, .. }] = mounts else { panic!("{mounts:?}") };
    format!("{kind} {source} {}", options.join(" "))
}

fn option<'a>(mounts: &'a [Mount], name: &str) -> &'a Path {
    let value = mounts[0].options.iter().find_map(|option| option.strip_prefix(name)?.strip_prefix('='));
    Path::new(value.unwrap_or_else(|| panic!("no {name} in {mounts:?}")))
}

/// What a mount that can only be read is, as containerd 2.4 looks at it.
fn is_staged(mounts: &[Mount]) -> bool {
    let Some(Mount { r#type: kind, options, .. }) = mounts.last() else { return false };
    let has = |wanted: &str| options.iter().any(|option| option == wanted);
    match kind.rsplit('/').next().unwrap() {
        "erofs" => true,
        "overlay" => has("ro") || !options.iter().any(|option| option.starts_with("upperdir=")),
        _ => has("ro"),
    }
}

/// The question that follows the answer that a layer is there, and the answer's one fitting snapshot.
fn served_under(stage: &Stage, chain: &str, parent: &str) -> Vec<Info> {
    let filter = format!("labels.\"containerd.io/snapshot.ref\"=={chain},parent==\"{parent}\"");
    let found = stage.list(&[&filter]).unwrap();
    for info in &found {
        assert_eq!((info.kind(), info.parent.as_str()), (Kind::Committed, parent), "{info:?}");
        assert_eq!(info.labels.get(SNAPSHOT_REF).map(String::as_str), Some(chain));
        assert_eq!(stage.stat(&info.name).unwrap(), *info);
    }
    found
}

#[test]
fn layers_one_after_the_other() {
    let stage = Stage::new();
    let mut parent = String::new();
    for number in 0..3 {
        let (chain, name) = (format!("sha256:c{number}"), format!("default/{}/sha256:c{number}", 10 + number));
        let key = extract(number, &chain);
        let label = [(SNAPSHOT_REF, chain.as_str()), ROOT_LABEL];
        let mounts = stage.prepare_with(&key, &parent, &label).unwrap();
        assert!(!is_staged(&mounts), "{mounts:?}");
        let upper = option(&mounts, "upperdir").to_owned();
        match number {
            // It is written into, never mounted: what it deletes is turned into marks.
            0 => assert_eq!(written(&mounts), format!("overlay overlay upperdir={}", upper.display())),
            _ => assert_eq!(mounts[0].options.last().unwrap().matches("/upper").count(), number),
        }
        assert_eq!(stage.mounts(&key).unwrap(), mounts);
        fs::write(upper.join(format!("file-{number}")), b"x").unwrap();
        stage.commit_with(&name, &key, "", &label).unwrap();
        let info = stage.stat(&name).unwrap();
        assert_eq!((info.parent.as_str(), info.name.as_str()), (parent.as_str(), name.as_str()));
        assert_eq!(served_under(&stage, &chain, &parent).len(), 1);
        parent = name;
    }
    let container = "default/20/a container: with/slashes";
    let seen = stage.mount(&stage.prepare_with(container, &parent, &[]).unwrap());
    let mut names: Vec<_> = fs::read_dir(&seen.0).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["file-0", "file-1", "file-2"]);
}

/// Whoever loses field 5 of a commit fails here.
#[test]
fn layers_all_at_once() {
    let stage = Stage::new();
    let chain = |number: usize| format!("sha256:c{number}");
    let labels = |number: usize| [(SNAPSHOT_REF.to_owned(), chain(number))];
    // One goroutine walks through the layers, others apply them.
    for number in 0..3 {
        let labels = labels(number);
        let label = labels.each_ref().map(|(name, value)| (name.as_str(), value.as_str()));
        let mounts = stage.prepare_with(&extract(number, &chain(number)), "", &label).unwrap();
        let upper = option(&mounts, "upperdir");
        assert_eq!(written(&mounts), format!("overlay overlay upperdir={}", upper.display()), "no whiteouts in a bind");
        fs::write(upper.join("changed"), format!("by {number}")).unwrap();
        fs::write(upper.join(format!("own-{number}")), b"x").unwrap();
        if number == 2 {
            let device = rustix::fs::makedev(0, 0);
            let kind = rustix::fs::FileType::CharacterDevice;
            rustix::fs::mknodat(rustix::fs::CWD, upper.join("own-0"), kind, rustix::fs::Mode::empty(), device).unwrap();
        }
    }
    let name = |number: usize| format!("default/{}/{}", 10 + number, chain(number));
    // Not before its parent is there.
    assert_code(stage.commit_with(&name(1), &extract(1, &chain(1)), &name(0), &[]), Code::NotFound);
    for number in 0..3 {
        let labels = labels(number);
        let label = labels.each_ref().map(|(name, value)| (name.as_str(), value.as_str()));
        let parent = if number == 0 { String::new() } else { name(number - 1) };
        stage.commit_with(&name(number), &extract(number, &chain(number)), &parent, &label).unwrap();
        let info = stage.stat(&name(number)).unwrap();
        assert_eq!(info.parent, parent, "a commit lost the parent of a layer");
    }
    let seen = stage.mount(&stage.prepare("default/30/run", &name(2)));
    assert_eq!(fs::read_to_string(seen.0.join("changed")).unwrap(), "by 2");
    let exists = |file: &str| seen.0.join(file).exists();
    assert_eq!((exists("own-0"), exists("own-1"), exists("own-2")), (false, true, true), "a whiteout is lost");
    // A parent cannot be exchanged.
    stage.prepare("default/31/x", &name(0));
    assert_code(stage.commit_with("default/32/y", "default/31/x", &name(1), &[]), Code::InvalidArgument);
    stage.commit_with("default/32/y", "default/31/x", &name(0), &[]).unwrap();
    assert_eq!(stage.stat("default/32/y").unwrap().parent, name(0));
}

#[test]
fn served_layers_are_there_already() {
    let stage = Stage::new();
    let mut parent = String::new();
    for (number, namespace) in [(0, "one"), (1, "one"), (0, "two"), (1, "two")] {
        if number == 0 {
            parent = String::new();
        }
        let chain = format!("sha256:c{number}");
        if namespace == "one" {
            stage.offer(&chain, number);
        }
        let label = [(SNAPSHOT_REF, chain.as_str()), ("containerd.io/snapshot/cri.image-ref", "a.b/c:t"), ROOT_LABEL];
        let key = format!("{namespace}/{number}/extract-1 {chain}");
        assert_code(stage.prepare_with(&key, &parent, &label), Code::AlreadyExists);
        // The one that was prepared for it is gone, and both namespaces have the same one.
        assert_code(stage.stat(&key), Code::NotFound);
        let found = served_under(&stage, &chain, &parent);
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!(found[0].name, chain);
        assert_eq!(found[0].labels.get(ROOT_LABEL.0).map(String::as_str), Some(ROOT_LABEL.1));
        parent = chain;
    }
    assert_eq!(stage.held(), [LayerSlot(1), LayerSlot(2)]);
    let mounts = stage.prepare_with("one/9/container", "sha256:c1", &[]).unwrap();
    let l = stage.path("l");
    assert_eq!(option(&mounts, "lowerdir"), Path::new(&format!("{0}/2:{0}/1", l.display())));
    // Views of one layer are bound, of two are stacked.
    let one = stage.view_with("one/10/view", "sha256:c0", &[]).unwrap();
    assert_eq!(written(&one), format!("bind {}/1 ro rbind", l.display()));
    let two = stage.view_with("one/11/view", "sha256:c1", &[]).unwrap();
    assert_eq!(written(&two), format!("overlay overlay xino=on lowerdir={0}/2:{0}/1", l.display()));
    let blobs = || fs::read_dir(stage.path("root/blobs/sha256")).unwrap().count();
    assert_eq!(blobs(), 2);
    for key in ["one/9/container", "one/10/view", "one/11/view"] {
        stage.remove(key).unwrap();
    }
    stage.cleanup().unwrap();
    // Who has it open keeps the first.
    stage.world.served.lock().unwrap().remove("sha256:c1");
    stage.remove("sha256:c1").unwrap();
    wait_until("a removed layer is not shown any more", || stage.held() == [LayerSlot(1)]);
    wait_until("what was fetched of it is deleted", || blobs() == 1);
    stage.remove("sha256:c0").unwrap();
    wait_until("removed layers are not shown any more", || stage.held().is_empty());
    assert_eq!(blobs(), 1, "an open layer was deleted");
    stage.world.served.lock().unwrap().clear();
    stage.cleanup().unwrap();
    wait_until("what was fetched is deleted", || blobs() == 0);
}

#[test]
fn served_layers_are_staged_where_their_parents_are_not_known() {
    let stage = Stage::with(true);
    let chain = |number: u64| format!("sha256:c{number}");
    for number in 0..3 {
        stage.offer(&chain(number), number);
        let chain = chain(number);
        let label = [(SNAPSHOT_REF, chain.as_str())];
        let key = format!("default/{number}/extract-1 {chain}");
        let answer = stage.prepare_with(&key, "", &label);
        if number == 0 {
            assert_code(answer, Code::AlreadyExists);
            assert_eq!(served_under(&stage, &chain, "").len(), 1);
            continue;
        }
        let mounts = answer.unwrap();
        assert!(is_staged(&mounts), "{mounts:?}");
        assert_eq!(stage.stat(&key).unwrap().kind(), Kind::Active);
    }
    // One is given up.
    stage.remove("default/2/extract-1 sha256:c2").unwrap();
    wait_until("a layer that was given up is not shown any more", || stage.held() == [LayerSlot(1), LayerSlot(2)]);
    stage.commit_with("default/11/sha256:c1", "default/1/extract-1 sha256:c1", "sha256:c0", &[]).unwrap();
    let info = stage.stat("default/11/sha256:c1").unwrap();
    assert_eq!((info.kind(), info.parent.as_str()), (Kind::Committed, "sha256:c0"));
    // What this program noted is not lost with the labels that containerd replaces.
    assert_eq!(info.labels.get("headstart.test").map(String::as_str), Some("sha256:c1"));
    let mounts = stage.prepare_with("default/20/container", "default/11/sha256:c1", &[]).unwrap();
    assert_eq!(option(&mounts, "lowerdir"), Path::new(&format!("{0}/2:{0}/1", stage.path("l").display())));
}

/// containerd passes on the labels that it knows, and replaces all with them if it is not told which.
#[test]
fn what_this_program_notes_is_nobody_elses_to_change() {
    const NOTED: &str = "headstart.test";
    let stage = Stage::new();
    stage.offer("sha256:c0", 0);
    let label = [(SNAPSHOT_REF, "sha256:c0"), (NOTED, "forged"), ("headstart.other", "forged")];
    assert_code(stage.prepare_with("default/1/x", "", &label), Code::AlreadyExists);
    let container = stage.prepare_with("default/2/container", "sha256:c0", &[(NOTED, "forged")]).unwrap();
    assert_eq!(stage.stat("default/2/container").unwrap().labels, super::owned(&[]));
    for fields in [&[][..], &["labels"], &["labels.x", "labels.headstart.test", "labels.headstart.other"]] {
        let known =
            super::owned(&[(SNAPSHOT_REF, "sha256:c0"), ("x", "y"), (NOTED, "forged"), ("headstart.other", "z")]);
        let info = Info { name: "sha256:c0".to_owned(), labels: known, ..Info::default() };
        let updated = stage.update(info, fields).unwrap();
        let expected = super::owned(&[(SNAPSHOT_REF, "sha256:c0"), ("x", "y"), (NOTED, "sha256:c0")]);
        assert_eq!(updated.labels, expected, "{fields:?}");
    }
    // So the layer is there again after a restart.
    stage.stop();
    wait_until("the dead one's layers are gone", || stage.held().is_empty());
    stage.start();
    assert_eq!(stage.held(), [LayerSlot(1)]);
    assert_eq!(stage.mounts("default/2/container").unwrap(), container);
}

#[test]
fn what_cannot_be_served_is_brought_by_containerd() {
    let stage = Stage::new();
    stage.offer("sha256:c0", 0);
    stage.offer("sha256:c1", 1);
    // In parallel mode an older containerd would lose the parent.
    let mounts = stage.prepare_with("a", "", &[(SNAPSHOT_REF, "sha256:c1")]).unwrap();
    assert!(!is_staged(&mounts) && written(&mounts).starts_with("overlay overlay upperdir="), "{mounts:?}");
    // The kernel does not want to.
    *stage.world.broken.lock().unwrap() = true;
    let mounts = stage.prepare_with("b", "", &[(SNAPSHOT_REF, "sha256:c0")]).unwrap();
    assert!(!is_staged(&mounts), "{mounts:?}");
    *stage.world.broken.lock().unwrap() = false;
    // The registry does not answer.
    *stage.world.silent.lock().unwrap() = true;
    let begin = Instant::now();
    stage.prepare_with("c", "", &[(SNAPSHOT_REF, "sha256:c0")]).unwrap();
    assert!(begin.elapsed() < PATIENCE / 2, "a preparation waits for a registry");
    // Containers are not asked about at all.
    let offers = stage.world.offers.load(Ordering::Relaxed);
    stage.prepare_with("d", "", &[("containerd.io/snapshot/cri.image-ref", "a.b/c")]).unwrap();
    assert_eq!(stage.world.offers.load(Ordering::Relaxed), offers);
    assert_eq!((stage.held(), stage.names(&[])), (vec![], ["a", "b", "c", "d"].map(String::from).to_vec()));
    // Keys are refused as they are for other snapshots.
    assert_code(stage.prepare_with("a", "", &[(SNAPSHOT_REF, "sha256:c9")]), Code::AlreadyExists);
    assert_code(stage.prepare_with("", "", &[(SNAPSHOT_REF, "sha256:c9")]), Code::InvalidArgument);
    assert_code(stage.prepare_with("e", "nobody", &[(SNAPSHOT_REF, "sha256:c9")]), Code::NotFound);
}

#[test]
fn everything_is_back_after_a_death() {
    let stage = Stage::new();
    for number in 0..2 {
        let chain = format!("sha256:c{number}");
        stage.offer(&chain, number);
        let parent = if number == 0 { "" } else { "sha256:c0" };
        let key = format!("default/{number}/extract-1 {chain}");
        assert_code(stage.prepare_with(&key, parent, &[(SNAPSHOT_REF, &chain)]), Code::AlreadyExists);
    }
    let container = stage.prepare_with("default/5/container", "sha256:c1", &[]).unwrap();
    let ordinary = stage.prepare("default/6/build", "");
    let known = stage.list(&[]).unwrap();
    stage.stop();
    wait_until("the dead one's layers are gone", || stage.held().is_empty());
    stage.start();
    assert_eq!(stage.held(), [LayerSlot(1), LayerSlot(2)], "layers are shown before the first question");
    assert_eq!(stage.list(&[]).unwrap(), known);
    assert_eq!(stage.mounts("default/5/container").unwrap(), container);
    assert_eq!(stage.mounts("default/6/build").unwrap(), ordinary);
    let offers = stage.world.offers.load(Ordering::Relaxed);
    assert_code(stage.prepare_with("two/1/x", "", &[(SNAPSHOT_REF, "sha256:c0")]), Code::AlreadyExists);
    assert_eq!(stage.world.offers.load(Ordering::Relaxed), offers + 1);
    assert_code(stage.mounts("sha256:c1"), Code::FailedPrecondition);

    // What cannot be shown now is tried again when it is needed, and fails alone.
    stage.stop();
    wait_until("the dead one's layers are gone", || stage.held().is_empty());
    *stage.world.broken.lock().unwrap() = true;
    stage.start();
    assert_code(stage.mounts("default/5/container"), Code::Unavailable);
    assert_code(stage.prepare_with("default/7/new", "sha256:c1", &[]), Code::Unavailable);
    assert_code(stage.stat("default/7/new"), Code::NotFound);
    assert_eq!(stage.mounts("default/6/build").unwrap(), ordinary);
    *stage.world.broken.lock().unwrap() = false;
    assert_eq!(stage.mounts("default/5/container").unwrap(), container);
    stage.prepare_with("default/7/new", "sha256:c1", &[]).unwrap();
}

#[test]
fn garbage_goes_children_first() {
    let stage = Stage::new();
    for (name, parent) in [("c0", ""), ("c1", "c0"), ("c2", "c1")] {
        let mounts = stage.prepare("key", parent);
        if parent.is_empty() {
            fs::write(Path::new(&mounts[0].source).join("file"), vec![1; 100_000]).unwrap();
        }
        stage.commit(name, "key");
    }
    stage.prepare("running", "c1");
    let snapshots = stage.snapshots();
    // As containerd does: everything is listed, what it does not know goes, children before parents.
    let mut left = stage.list(&[]).unwrap();
    assert_eq!(left.len(), 4);
    left.retain(|info| info.name != "running");
    while let Some(leaf) = left.iter().position(|info| !left.iter().any(|other| other.parent == info.name)) {
        let info = left.remove(leaf);
        let is_needed = info.name != "c2";
        match stage.remove(&info.name) {
            Ok(()) => assert!(!is_needed, "{} was removed under a container", info.name),
            // Any other refusal would end the collection.
            Err(status) => assert!(is_needed && status.code() == Code::FailedPrecondition, "{status:?}"),
        }
    }
    stage.cleanup().unwrap();
    assert_eq!(stage.names(&[]), ["c0", "c1", "running"]);
    for name in ["running", "c1", "c0"] {
        stage.remove(name).unwrap();
    }
    snapshots.cleaned();
    let bytes = |directory: &str| fs::read_dir(stage.path("root").join(directory)).unwrap().count();
    assert_eq!((bytes("snapshots"), bytes("trash")), (0, 0));
}

/// What this program pulled by itself is not containerd's, until containerd asks for it.
#[test]
fn images_of_this_programs_own_are_left_alone() {
    let stage = Stage::new();
    let diff_id = stage.offer("sha256:c0", 0);
    let (below, image) = stage.world.served.lock().unwrap()["sha256:c0"].clone();
    let spec = LayerSpec { diff_id, blob: *image.blob(), anchor: image.anchor(), size: image.image_size() };
    let name = ChainId::of_stack(&[diff_id])[0].to_string();
    stage.world.served.lock().unwrap().insert(name.clone(), (below, image));
    let digest = Digest::of(Algorithm::Sha256, b"manifest");
    let snapshots = stage.snapshots();
    snapshots.pull("ours", BlobDigest(digest), &[spec]).unwrap();
    assert_eq!(stage.names(&[]), [""; 0], "containerd would remove it");
    snapshots.layer_local(&spec.id(), 4196).unwrap();
    assert_eq!(stage.names(&[]), [""; 0], "containerd would remove it");
    // containerd pulls the same image.
    let label = [(SNAPSHOT_REF, name.as_str()), ROOT_LABEL];
    assert_code(stage.prepare_with("default/1/x", "", &label), Code::AlreadyExists);
    assert_eq!(served_under(&stage, &name, "").len(), 1);
    // It removes it: the image of ours keeps it, containerd does not see it any more.
    stage.remove(&name).unwrap();
    assert_eq!(stage.names(&[]), [""; 0]);
    assert!(snapshots.stat(&name).is_ok());
}

#[test]
fn usage_is_honest_and_is_measured_once() {
    let stage = Stage::new();
    let mounts = stage.prepare("a", "");
    fs::write(Path::new(&mounts[0].source).join("file"), vec![1; 100_000]).unwrap();
    let active = stage.usage("a").unwrap();
    assert!(active.inodes == 2 && (100_000..500_000).contains(&active.size), "{active:?}");
    stage.commit("c", "a");
    assert_eq!(stage.usage("c").unwrap(), active);
    let snapshots = stage.snapshots();
    wait_until("what was committed is measured", || snapshots.stat("c").unwrap().usage.is_some());
    assert_eq!(stage.usage("c").unwrap(), active);
    assert_code(stage.usage("nobody"), Code::NotFound);
    // Of a layer: what of it is here.
    stage.offer("sha256:c0", 0);
    assert_code(stage.prepare_with("l", "", &[(SNAPSHOT_REF, "sha256:c0")]), Code::AlreadyExists);
    let layer = stage.usage("sha256:c0").unwrap();
    assert!(layer.size < 100_000, "{layer:?}");
}

const UID: &str = "containerd.io/snapshot/uidmapping";
const GID: &str = "containerd.io/snapshot/gidmapping";

fn owner(path: &Path) -> (u32, u32) {
    let found = fs::metadata(path).unwrap();
    (found.uid(), found.gid())
}

#[test]
fn containers_of_a_user_namespace() {
    let stage = Stage::new();
    let mounts = stage.prepare("default/1/x", "");
    fs::write(Path::new(&mounts[0].source).join("file"), "of the image").unwrap();
    std::os::unix::fs::chown(Path::new(&mounts[0].source).join("file"), Some(5), Some(6)).unwrap();
    stage.commit("default/2/image", "default/1/x");
    let mapping = [(UID, "0:100000:65536"), (GID, "0:200000:65536")];
    // This snapshotter is declared to map: containerd leaves the files as they are.
    let key = "default/3/mapped";
    let mounts = stage.prepare_with(key, "default/2/image", &mapping).unwrap();
    assert!(!mounts[0].options.iter().any(|option| option.contains("idmap=")), "mapped twice: {mounts:?}");
    assert_eq!(owner(option(&mounts, "upperdir")), (100_000, 200_000));
    let lower = option(&mounts, "lowerdir").to_owned();
    assert_eq!((owner(&lower), owner(&lower.join("file"))), ((100_000, 200_000), (100_005, 200_006)));
    assert_eq!(stage.mounts(key).unwrap(), mounts);
    // They are made again for whoever asks after a restart, and go with the snapshot.
    stage.stop();
    assert!(!lower.exists());
    stage.start();
    assert_eq!(stage.mounts(key).unwrap(), mounts);
    assert_eq!(owner(&lower.join("file")), (100_005, 200_006));
    stage.remove(key).unwrap();
    assert!(!lower.exists());
    // Nothing below: nothing to map, and its directory is root's.
    let mounts = stage.prepare_with("default/3/empty", "", &mapping).unwrap();
    assert_eq!(written(&mounts), format!("bind {} rw rbind", mounts[0].source));
    assert_eq!(owner(Path::new(&mounts[0].source)), (100_000, 200_000));
    // What an image says of the layers that it is made of is not followed.
    let hostile = [(SNAPSHOT_REF, "sha256:none"), (UID, "0:100000:65536"), (GID, "nonsense")];
    let mounts = stage.prepare_with("default/3/extract", "default/2/image", &hostile).unwrap();
    assert_eq!(owner(option(&mounts, "upperdir")), (0, 0));
    assert_eq!(owner(&option(&mounts, "lowerdir").join("file")), (5, 6));
}

#[test]
fn files_that_containerd_gave_to_a_user_namespace_stay_as_they_are() {
    let stage = Stage::new();
    stage.prepare("default/1/x", "");
    stage.commit("default/2/image", "default/1/x");
    let mapping = [(UID, "0:100000:65536"), (GID, "0:200000:65536")];
    // This snapshotter is not declared to map: containerd changes the files itself, in a snapshot of its own.
    let mounts = stage.prepare_with("default/4/sha256:id-remap", "default/2/image", &[]).unwrap();
    std::os::unix::fs::chown(option(&mounts, "upperdir"), Some(100_000), Some(200_000)).unwrap();
    stage.commit_with("default/5/sha256:id", "default/4/sha256:id-remap", "", &[]).unwrap();
    let mounts = stage.prepare_with("default/6/container", "default/5/sha256:id", &mapping).unwrap();
    assert_eq!(owner(option(&mounts, "upperdir")), (100_000, 200_000));
    let lowers = option(&mounts, "lowerdir").to_str().unwrap().split(':').map(Path::new);
    assert_eq!(lowers.map(owner).collect::<Vec<_>>(), [(100_000, 200_000), (0, 0)], "{mounts:?}");
    // Who has the root below has it above, mapped or not.
    let mounts = stage.prepare_with("default/7/plain", "default/5/sha256:id", &[]).unwrap();
    assert_eq!(owner(option(&mounts, "upperdir")), (100_000, 200_000));
}

#[test]
fn mappings_that_make_no_sense_are_refused() {
    let stage = Stage::new();
    stage.prepare("default/1/x", "");
    stage.commit("default/2/image", "default/1/x");
    for wrong in ["0:100000", "5:100000:10", "0:100000:65536,upperdir=/etc", "0:4294967295:9"] {
        let refused = stage.prepare_with("default/8/x", "default/2/image", &[(UID, wrong), (GID, "0:1:1")]);
        assert_code(refused, Code::InvalidArgument);
        assert_code(stage.stat("default/8/x"), Code::NotFound);
        // A view is mounted, too.
        let refused = stage.view_with("default/8/x", "default/2/image", &[(UID, wrong)]);
        assert_code(refused, Code::InvalidArgument);
        assert_code(stage.stat("default/8/x"), Code::NotFound);
        // The author of an image is nobody to say who owns what.
        let key = format!("default/9/extract {wrong}");
        let mounts = stage.prepare_with(&key, "default/2/image", &[(SNAPSHOT_REF, "sha256:c9"), (UID, wrong)]).unwrap();
        assert!(!mounts[0].options.iter().any(|option| option.starts_with("uidmap")), "{mounts:?}");
        assert_eq!(owner(option(&mounts, "upperdir")), (0, 0));
    }
    assert_code(stage.prepare_with("default/8/x", "default/2/image", &[(UID, "0:1:1")]), Code::InvalidArgument);
    // It is well said, and the kernel does not do it: an id cannot become two.
    let twice = [(UID, "0:1:10,5:100:10"), (GID, "0:1:1")];
    assert_code(stage.prepare_with("default/8/x", "default/2/image", &twice), Code::FailedPrecondition);
    assert_code(stage.stat("default/8/x"), Code::NotFound);
    assert_eq!(fs::read_dir(stage.path("m")).into_iter().flatten().count(), 0);
}

#[test]
fn long_lists_come_in_pieces_and_calls_are_counted() {
    let stage = Stage::new();
    let padding = "v".repeat(4000);
    for number in 0..250 {
        stage.prepare_with(&format!("key {number:03}"), "", &[("padding", &padding)]).unwrap();
    }
    let names = stage.names(&[]);
    assert_eq!(names, (0..250).map(|number| format!("key {number:03}")).collect::<Vec<_>>());
    assert_code(stage.mounts("nobody"), Code::NotFound);
    let calls = std::sync::Arc::clone(&stage.server.lock().unwrap().as_ref().unwrap().calls);
    let tallies: std::collections::BTreeMap<_, _> = calls.tallies().collect();
    let count = |name: &str| (tallies[name].within.last().copied().unwrap(), tallies[name].failed);
    assert_eq!((count("prepare"), count("list"), count("mounts"), count("view")), ((250, 0), (1, 0), (1, 1), (0, 0)));
}

/// A caller that goes away leaves a whole change or none.
#[test]
fn a_call_that_nobody_waits_for_is_finished() {
    let stage = Stage::new();
    stage.offer("sha256:c0", 0);
    let labels = super::owned(&[(SNAPSHOT_REF, "sha256:c0")]);
    let request =
        PrepareSnapshotRequest { snapshotter: String::new(), key: "a".to_owned(), parent: String::new(), labels };
    let mut patience = Duration::from_micros(100);
    wait_until("the layer is served", || {
        let (mut client, request) = (stage.client.clone(), request.clone());
        stage.runtime.block_on(async {
            tokio::time::timeout(patience, client.prepare(request)).await.ok();
        });
        patience += Duration::from_micros(100);
        stage.stat("sha256:c0").is_ok()
    });
    wait_until("nothing is left of those that were too late", || stage.names(&[]) == ["sha256:c0"]);
}

#[test]
fn hostile_words_are_words() {
    let stage = Stage::new();
    for key in ["../../etc", "/etc/passwd", "a\0b", "a\nb", "ä ö", &"k".repeat(32_768)] {
        stage.prepare(key, "");
        assert_eq!(stage.stat(key).unwrap().name, key);
        stage.remove(key).unwrap();
    }
    assert_code(stage.prepare_with(&"k".repeat(32_769), "", &[]), Code::InvalidArgument);
    assert_code(stage.prepare_with("", "", &[]), Code::InvalidArgument);
    let large = "v".repeat(300 << 10);
    assert_code(stage.prepare_with("k", "", &[("x", &large)]), Code::InvalidArgument);
    assert_eq!(stage.names(&[]), [""; 0]);
    let inside: Vec<_> = fs::read_dir(stage.path("root/snapshots")).unwrap().collect();
    assert!(inside.is_empty(), "{inside:?}");
}

/// Layers of pulls that nobody told containerd about have digests that are made here.
#[test]
fn a_layer_of_another_blob_is_another_layer() {
    let stage = Stage::new();
    let digest = |of: &str| Digest::of(Algorithm::Sha256, of.as_bytes());
    let spec = |blob: &str| LayerSpec {
        diff_id: DiffId(digest("the same")),
        blob: BlobDigest(digest(blob)),
        anchor: Anchor::ImageSpec(IndexDigest(digest(blob))),
        size: None,
    };
    let snapshots = stage.snapshots();
    for (key, blob) in [("a", "one"), ("b", "other")] {
        snapshots.prepare_layer(key, "", headstart::chain::Labels::new(), &spec(blob)).unwrap();
    }
    assert_eq!(snapshots.layers().len(), 2);
    // Neither is shown by anybody: containers that would stand on them fail, and nothing else does.
    assert_code(stage.mounts("a"), Code::Unavailable);
}
