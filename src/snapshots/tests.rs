//! Snapshots with their directories and layers: what containerd's suite asks of a snapshotter, images that fill, and
//! what a start repairs.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use tempfile::TempDir;

use super::*;
use crate::chain::{ChainError, Layer};
use crate::model::{Algorithm, Digest, IndexDigest};
use crate::store::{BlobFile, BlobSpec, Verdict};

const CHUNK: u64 = 5000;

fn open(root: &Path) -> (Snapshots, Recovery) {
    let store = Arc::new(Store::open(root).unwrap());
    // The disk of whoever runs this may have much to write.
    Snapshots::open(store, SnapshotsConfig { sync: false }).unwrap()
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn keys(snapshots: &[Key]) -> Vec<&str> {
    snapshots.iter().map(Key::as_str).collect()
}

fn digest(of: &str) -> Digest {
    Digest::of(Algorithm::Sha256, of.as_bytes())
}

/// A layer of two chunks.
fn layer(name: &str) -> LayerSpec {
    LayerSpec {
        diff_id: DiffId(digest(name)),
        blob: BlobDigest(digest(&format!("blob of {name}"))),
        anchor: Anchor::ImageSpec(IndexDigest(digest(&format!("index of {name}")))),
        size: Some(2 * CHUNK),
    }
}

fn image_of(store: &Store, layer: &LayerSpec) -> Arc<BlobFile> {
    let spec = BlobSpec { blob: layer.blob, anchor: layer.anchor, image_size: 2 * CHUNK, chunks: 2 };
    store.blob(&spec, b"index").unwrap()
}

fn bring(store: &Store, layer: &LayerSpec) {
    let file = image_of(store, layer);
    for chunk in 0..2 {
        file.write_chunk(chunk, u64::from(chunk) * CHUNK, &[7; 5000]).unwrap();
    }
    file.set_verdict(Verdict::Verified(layer.diff_id)).unwrap();
}

fn chain_ids(layers: &[LayerSpec]) -> Vec<String> {
    let diff_ids: Vec<DiffId> = layers.iter().map(|layer| layer.diff_id).collect();
    ChainId::of_stack(&diff_ids).iter().map(ToString::to_string).collect()
}

/// Names of what lies in a directory of the root.
fn listed(root: &Path, directory: &str) -> Vec<String> {
    let entries = fs::read_dir(root.join(directory)).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

const MANIFEST: &str = "manifest";

#[test]
fn files_stay_where_they_are_from_prepare_to_removal() {
    let root = TempDir::new().unwrap();
    let (snapshots, recovery) = open(root.path());
    assert_eq!(recovery, Recovery::default());
    let key = "k8s.io/1/extract-1 sha256:../..";
    let stack = snapshots.prepare(key, "", labels(&[("a", "b")])).unwrap();
    let own = stack.own.clone().unwrap();
    assert_eq!((stack.lowers.as_slice(), stack.snapshot.kind), (&[][..], Kind::Active));
    assert_eq!(fs::metadata(&own.upper).unwrap().permissions().mode() & 0o7777, 0o755);
    assert_eq!(fs::metadata(&own.work).unwrap().dev(), fs::metadata(&own.upper).unwrap().dev());
    fs::write(own.upper.join("file"), b"content").unwrap();
    assert_eq!(snapshots.stack(key).unwrap(), stack);
    snapshots.commit("c0", key, "", labels(&[("c", "d")])).unwrap();
    assert_eq!(snapshots.stat("c0").unwrap().labels, labels(&[("c", "d")]));
    assert!(matches!(snapshots.stack("c0").unwrap_err().refusal(), Some(ChainError::FailedPrecondition { .. })));

    let next = snapshots.prepare("next", "c0", Labels::new()).unwrap();
    assert_eq!(next.lowers, [Lower::Files(own.upper.clone())]);
    assert_ne!(next.own.as_ref().unwrap().upper, own.upper);
    let look = snapshots.view("look", "c0", Labels::new()).unwrap();
    assert_eq!((look.own, look.lowers), (None, vec![Lower::Files(own.upper.clone())]));
    let nothing = snapshots.view("nothing", "", Labels::new()).unwrap();
    assert!(nothing.own.unwrap().upper.is_dir());
    assert_eq!(fs::read(own.upper.join("file")).unwrap(), b"content");

    for key in ["next", "look", "nothing", "c0"] {
        snapshots.remove(key).unwrap();
        assert!(snapshots.stat(key).is_err());
    }
    assert_eq!(listed(root.path(), "snapshots"), [""; 0]);
    snapshots.cleaned();
    assert_eq!(listed(root.path(), "trash"), [""; 0]);
}

#[test]
fn what_is_refused_leaves_no_directory() {
    let root = TempDir::new().unwrap();
    let (snapshots, _) = open(root.path());
    snapshots.prepare("a", "", Labels::new()).unwrap();
    assert!(snapshots.prepare("a", "", Labels::new()).unwrap_err().is_refusal());
    assert!(snapshots.prepare("b", "a", Labels::new()).unwrap_err().is_refusal());
    assert!(snapshots.view("b", "nobody", Labels::new()).unwrap_err().is_refusal());
    assert!(snapshots.prepare("", "", Labels::new()).unwrap_err().is_refusal());
    assert!(snapshots.commit("c", "nobody", "", Labels::new()).unwrap_err().is_refusal());
    assert!(snapshots.remove("nobody").unwrap_err().is_refusal());
    assert!(snapshots.list(&["name="]).unwrap_err().is_refusal());
    assert_eq!(listed(root.path(), "snapshots").len(), 1);
}

#[test]
fn usage_counts_blocks_and_no_parents() {
    let root = TempDir::new().unwrap();
    let (snapshots, _) = open(root.path());
    let upper = snapshots.prepare("a", "", Labels::new()).unwrap().own.unwrap().upper;
    let empty = snapshots.usage("a").unwrap();
    assert_eq!(empty.inodes, 1);
    fs::create_dir(upper.join("dir")).unwrap();
    fs::write(upper.join("dir/file"), vec![1; 100_000]).unwrap();
    fs::hard_link(upper.join("dir/file"), upper.join("link")).unwrap();
    // A hole takes nothing.
    fs::File::create(upper.join("hole")).unwrap().set_len(1 << 30).unwrap();
    std::os::unix::fs::symlink("/", upper.join("everything")).unwrap();
    let full = snapshots.usage("a").unwrap();
    assert_eq!(full.inodes, 5, "root, dir, file, hole, link");
    assert!((100_000..1_000_000).contains(&(full.bytes - empty.bytes)), "{full:?}");
    snapshots.commit("c", "a", "", Labels::new()).unwrap();
    assert_eq!(snapshots.stat("c").unwrap().usage, None);
    assert_eq!(snapshots.measure("c").unwrap(), full);
    assert_eq!(snapshots.stat("c").unwrap().usage, Some(full));
    // It is not looked at again.
    fs::write(upper.join("later"), vec![1; 100_000]).unwrap();
    assert_eq!(snapshots.usage("c").unwrap(), full);
    assert!(snapshots.measure("nobody").unwrap_err().is_refusal());
    snapshots.prepare("b", "c", Labels::new()).unwrap();
    assert_eq!(snapshots.usage("b").unwrap().inodes, 1);
    assert!(snapshots.usage("nobody").unwrap_err().is_refusal());
}

#[test]
fn usage_of_a_layer_is_what_of_it_is_here() {
    let root = TempDir::new().unwrap();
    let (snapshots, _) = open(root.path());
    let spec = layer("l0");
    let stack = snapshots.prepare_layer("k", "", Labels::new(), &spec).unwrap();
    let [Lower::Layer(Layer { id, size, .. })] = &stack.lowers[..] else { panic!("{stack:?}") };
    assert_eq!((id, size, &stack.own), (&spec.id(), &spec.size, &None));
    assert_eq!(snapshots.usage("k").unwrap(), Usage::default());
    let file = image_of(&snapshots.store, &spec);
    let none = snapshots.usage("k").unwrap();
    file.write_chunk(1, CHUNK, &[1; 5000]).unwrap();
    file.sync().unwrap();
    let some = snapshots.usage("k").unwrap();
    assert!(none.inodes == 1 && some.bytes > none.bytes && some.bytes < 3 * CHUNK, "{none:?} {some:?}");
    snapshots.commit("c", "k", "", Labels::new()).unwrap();
    bring(&snapshots.store, &spec);
    assert!(snapshots.usage("c").unwrap().bytes >= 2 * CHUNK, "the usage of a layer was frozen by its commit");
    assert_eq!(listed(root.path(), "snapshots"), [""; 0]);
}

#[test]
fn a_pulled_image_is_committed_in_order_as_its_layers_become_local() {
    let root = TempDir::new().unwrap();
    let (snapshots, _) = open(root.path());
    let layers = [layer("l0"), layer("l1"), LayerSpec { size: None, ..layer("l2") }];
    let names = chain_ids(&layers);
    // One of them is here already.
    bring(&snapshots.store, &layers[1]);
    let recorded = snapshots.pull("image", BlobDigest(digest(MANIFEST)), &layers).unwrap();
    assert_eq!((recorded.image.layers.len(), keys(&recorded.committed)), (3, vec![]));
    assert_eq!(
        snapshots.waiting().iter().map(|layer| layer.id.diff_id).collect::<Vec<_>>(),
        [layers[0].diff_id, layers[2].diff_id]
    );
    assert_eq!(snapshots.list(&["kind==active,parent==\"\""]).unwrap().len(), 3);
    assert_eq!(keys(&snapshots.layer_local(&layers[2].id(), 2 * CHUNK).unwrap()), [""; 0]);
    assert_eq!(keys(&snapshots.layer_local(&layers[0].id(), 2 * CHUNK).unwrap()), names);
    assert_eq!(snapshots.layer_local(&layers[0].id(), 2 * CHUNK).unwrap(), []);
    assert_eq!(snapshots.layer_local(&layer("unknown").id(), 1).unwrap(), []);
    let container = snapshots.prepare("container", &names[2], Labels::new()).unwrap();
    let lowers: Vec<DiffId> = container
        .lowers
        .iter()
        .map(|lower| match lower {
            Lower::Layer(layer) => layer.id.diff_id,
            Lower::Files(path) => panic!("{}", path.display()),
        })
        .collect();
    assert_eq!(lowers, [layers[2].diff_id, layers[1].diff_id, layers[0].diff_id]);
    // Again is as good as once, and keeps the numbers.
    assert_eq!(snapshots.pull("image", BlobDigest(digest(MANIFEST)), &layers).unwrap().image.slot, recorded.image.slot);
    snapshots.forget("image").unwrap();
    assert_eq!(snapshots.collect(&BTreeSet::new()).unwrap(), []);
    snapshots.remove("container").unwrap();
    let mut gone = names.clone();
    gone.reverse();
    assert_eq!(keys(&snapshots.collect(&BTreeSet::new()).unwrap()), gone);
    assert_eq!((snapshots.layers(), snapshots.images()), (vec![], vec![]));
}

#[test]
fn a_start_finds_what_happened_while_nobody_listened() {
    let root = TempDir::new().unwrap();
    let (snapshots, _) = open(root.path());
    let layers = [layer("l0"), layer("l1")];
    let names = chain_ids(&layers);
    snapshots.pull("image", BlobDigest(digest(MANIFEST)), &layers).unwrap();
    let lost = snapshots.prepare("lost", "", Labels::new()).unwrap();
    snapshots.prepare("kept", "", Labels::new()).unwrap();
    let all = snapshots.all();
    bring(&snapshots.store, &layers[0]);
    bring(&snapshots.store, &layers[1]);
    drop(snapshots);
    fs::remove_dir_all(lost.own.unwrap().upper.parent().unwrap()).unwrap();
    fs::create_dir_all(root.path().join("snapshots/4711/upper/deep")).unwrap();
    fs::write(root.path().join("snapshots/4711/upper/deep/file"), b"of nobody").unwrap();
    fs::create_dir(root.path().join("snapshots/lost+found")).unwrap();
    fs::create_dir_all(root.path().join("trash/x/gone")).unwrap();

    let (snapshots, recovery) = open(root.path());
    assert_eq!(recovery.removed, [crate::chain::SnapshotSlot(4711)]);
    assert_eq!(keys(&recovery.missing), ["lost"]);
    assert_eq!(recovery.strange, [root.path().join("snapshots/lost+found")]);
    assert_eq!(keys(&recovery.committed), names);
    assert_eq!(recovery.lost, []);
    assert_eq!(all.walk().count(), snapshots.all().walk().count());
    snapshots.cleaned();
    assert_eq!(listed(root.path(), "trash"), [""; 0]);
    assert_eq!(listed(root.path(), "snapshots").len(), 2);
    // Its files are lost, but it can be removed.
    snapshots.remove("lost").unwrap();
    drop(snapshots);

    let image = image_path(root.path(), &layers[0]);
    fs::remove_dir_all(image.parent().unwrap()).unwrap();
    let (snapshots, recovery) = open(root.path());
    assert_eq!(recovery.lost, [layers[0].diff_id]);
    assert_eq!(snapshots.stat(&names[1]).unwrap().kind, Kind::Committed);
}

fn image_path(root: &Path, layer: &LayerSpec) -> PathBuf {
    store::image_path(root, &layer.blob, &layer.anchor.to_string()).unwrap()
}

#[test]
fn what_a_crash_left_in_the_place_of_a_new_snapshot_is_no_part_of_it() {
    let root = TempDir::new().unwrap();
    let (snapshots, _) = open(root.path());
    let slot = snapshots.prepare("first", "", Labels::new()).unwrap().snapshot.slot.0;
    fs::create_dir_all(root.path().join(format!("snapshots/{}/upper", slot + 1))).unwrap();
    fs::write(root.path().join(format!("snapshots/{}/upper/secret", slot + 1)), b"of another").unwrap();
    let stack = snapshots.prepare("second", "", Labels::new()).unwrap();
    assert_eq!(stack.snapshot.slot.0, slot + 1);
    assert_eq!(fs::read_dir(stack.own.unwrap().upper).unwrap().count(), 0);
}

#[test]
fn a_directory_that_cannot_be_made_leaves_no_snapshot() {
    let root = TempDir::new().unwrap();
    let (snapshots, _) = open(root.path());
    fs::remove_dir(root.path().join("snapshots")).unwrap();
    assert!(matches!(snapshots.prepare("a", "", Labels::new()), Err(SnapshotsError::Store(_))));
    assert!(snapshots.stat("a").is_err());
    fs::create_dir(root.path().join("snapshots")).unwrap();
    snapshots.prepare("a", "", Labels::new()).unwrap();
}

#[test]
fn files_that_become_a_layer_are_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (snapshots, _) = open(dir.path());
    let upper = snapshots.prepare("a", "", Labels::new()).unwrap().own.unwrap().upper;
    fs::write(upper.join("file"), b"x").unwrap();
    assert_eq!(snapshots.owner_of(&upper).map(|of| of.key.as_str().to_owned()).as_deref(), Some("a"));
    let strange = ["/", "/etc", "upper", "../upper"].map(Path::new).map(Path::to_owned);
    let near = [upper.join(".."), upper.join("x"), upper.parent().unwrap().join("./upper/."), upper.join("../upper")];
    for path in strange.iter().chain(&near) {
        assert_eq!(snapshots.owner_of(path), None, "{}", path.display());
    }
    let layer = layer("x");
    let became = snapshots.become_layer("a", &layer).unwrap();
    assert!(matches!(became.content, Content::Layer(_)));
    assert!(!upper.exists());
    let stack = snapshots.stack("a").unwrap();
    assert!(stack.own.is_none());
    assert!(matches!(&stack.lowers[..], [Lower::Layer(found)] if found.id == layer.id()));
    // Whose directory it was is still known: whoever asks twice is told the same.
    assert!(snapshots.owner_of(&upper).is_some());
}

#[test]
fn committed_files_are_on_disk() {
    let root = TempDir::new().unwrap();
    let store = Arc::new(Store::open(root.path()).unwrap());
    let (snapshots, _) = Snapshots::open(store, SnapshotsConfig::default()).unwrap();
    let upper = snapshots.prepare("a", "", Labels::new()).unwrap().own.unwrap().upper;
    fs::write(upper.join("file"), b"x").unwrap();
    snapshots.commit("c", "a", "", Labels::new()).unwrap();
    assert_eq!(snapshots.measure("c").unwrap().inodes, 2);
}
