//! containerd's conformance cases for snapshots and their records, its table of rebases, and what is our own: images
//! that fill, and garbage.

use super::*;
use crate::model::{Algorithm, BlobDigest, DiffId, Digest, Timestamp};

pub(super) fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

pub(super) const fn at(seconds: i64) -> Timestamp {
    Timestamp { seconds, nanos: 0 }
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn prepare(name: &str, parent: &str) -> Command {
    Command::Prepare { key: key(name), parent: Key::optional(parent).unwrap(), labels: Labels::new(), layer: None }
}

fn view(name: &str, parent: &str) -> Command {
    Command::View { key: key(name), parent: Key::optional(parent).unwrap(), labels: Labels::new() }
}

fn commit(from: &str, name: &str, parent: &str) -> Command {
    Command::Commit {
        key: key(from),
        name: key(name),
        parent: Key::optional(parent).unwrap(),
        labels: Labels::new(),
        usage: Some(Usage::default()),
    }
}

fn remove(name: &str) -> Command {
    Command::Remove { key: key(name) }
}

pub(super) fn layer(name: &str) -> LayerId {
    let digest = Digest::of(Algorithm::Sha256, name.as_bytes());
    LayerId { diff_id: DiffId(digest), blob: BlobDigest(digest), anchor: "whole".to_owned() }
}

pub(super) fn manifest() -> BlobDigest {
    BlobDigest(Digest::of(Algorithm::Sha256, b"manifest"))
}

fn pull(image: &str, layers: &[(&str, &str)]) -> Command {
    let layers = layers.iter().map(|(of, name)| PulledLayer { id: layer(of), size: None, name: key(name) });
    Command::Pull { image: image.to_owned(), manifest: manifest(), layers: layers.collect() }
}

/// What a snapshot is called while it fills.
pub(super) fn fill(of: &str, becomes: &str) -> String {
    fill::fill_key(&layer(of), &key(becomes)).unwrap().to_string()
}

fn local(name: &str) -> Command {
    Command::LayerLocal { layer: layer(name), size: 4096 }
}

/// What an error is to whoever asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    NotFound,
    Exists,
    Precondition,
    Argument,
}
use Class::{Argument, Exists, NotFound, Precondition};

pub(super) const fn class(error: &ChainError) -> Class {
    match error {
        ChainError::NotFound { .. } => NotFound,
        ChainError::AlreadyExists { .. } => Exists,
        ChainError::FailedPrecondition { .. } => Precondition,
        ChainError::InvalidArgument(_) => Argument,
    }
}

/// Applies everything; nothing may be refused.
fn apply(chain: &mut Chain, commands: &[Command]) -> Vec<Change> {
    let mut changes = Vec::new();
    for command in commands {
        changes.push(chain.apply(command, at(7)).unwrap_or_else(|error| panic!("{command:?}: {error}")));
    }
    changes
}

/// The seven snapshots that containerd's record tests begin with.
fn base() -> Chain {
    let mut chain = Chain::default();
    apply(
        &mut chain,
        &[
            prepare("tmp-1", ""),
            commit("tmp-1", "committed-1", ""),
            prepare("tmp-2", "committed-1"),
            commit("tmp-2", "committed-2", ""),
            prepare("active-1", ""),
            prepare("active-2", "committed-1"),
            prepare("active-3", "committed-2"),
            view("view-1", ""),
            view("view-2", "committed-2"),
        ],
    );
    chain
}

fn said(chain: &Chain) -> Vec<(&str, Kind, &str)> {
    let parent = |of: &Snapshot| of.parent.as_ref().map(Key::to_string).unwrap_or_default();
    let all = chain.walk().map(|snapshot| (snapshot.key.as_str(), snapshot.kind, parent(snapshot)));
    all.map(|(name, kind, parent)| (name, kind, &*parent.leak())).collect()
}

#[test]
fn stat_and_walk_say_what_was_done() {
    let all = [
        ("active-1", Kind::Active, ""),
        ("active-2", Kind::Active, "committed-1"),
        ("active-3", Kind::Active, "committed-2"),
        ("committed-1", Kind::Committed, ""),
        ("committed-2", Kind::Committed, "committed-1"),
        ("view-1", Kind::View, ""),
        ("view-2", Kind::View, "committed-2"),
    ];
    let chain = base();
    assert_eq!(said(&chain), all);
    for (name, kind, _) in all {
        let found = chain.stat(name).unwrap();
        assert_eq!((found.key.as_str(), found.kind, found.created, found.updated), (name, kind, at(7), at(7)));
    }
    assert_eq!(chain.stat("tmp-1").map_err(|error| class(&error)), Err(NotFound));
}

#[test]
fn refusals_come_in_containerds_order() {
    let cases: &[(Command, Class)] = &[
        (prepare("new", "does-not-exist"), NotFound),
        // The parent is looked at first.
        (prepare("active-1", "does-not-exist"), NotFound),
        (prepare("active-1", "active-2"), Argument),
        (prepare("new", "active-1"), Argument),
        (view("new", "active-1"), Argument),
        (view("new", "view-1"), Argument),
        (prepare("active-1", ""), Exists),
        (prepare("committed-1", ""), Exists),
        (prepare("view-1", "committed-1"), Exists),
        (view("view-1", ""), Exists),
        (view("active-1", "committed-2"), Exists),
        (commit("active-1", "committed-1", ""), Exists),
        (commit("active-1", "active-2", ""), Exists),
        (commit("active-1", "active-1", ""), Exists),
        // The name is looked at before the key.
        (commit("does-not-exist", "committed-1", ""), Exists),
        (commit("does-not-exist", "new", ""), NotFound),
        (commit("committed-1", "new", ""), Precondition),
        (commit("view-1", "new", ""), Precondition),
        (commit("view-1", "new", "does-not-exist"), Precondition),
        (commit("active-2", "new", "committed-2"), Argument),
        (commit("active-2", "new", "does-not-exist"), Argument),
        (commit("active-1", "new", "does-not-exist"), NotFound),
        (commit("active-1", "new", "active-2"), Precondition),
        (commit("active-1", "new", "view-2"), Precondition),
        // Nothing can stand on itself.
        (commit("active-1", "new", "new"), NotFound),
        (commit("active-1", "new", "active-1"), Precondition),
        (remove("does-not-exist"), NotFound),
        (remove("committed-1"), Precondition),
        (remove("committed-2"), Precondition),
    ];
    for (command, wanted) in cases {
        let mut chain = base();
        let error = chain.apply(command, at(9)).expect_err(&format!("{command:?} was not refused"));
        assert_eq!(class(&error), *wanted, "{command:?}: {error}");
        assert_eq!(said(&chain), said(&base()), "{command:?} changed something all the same");
    }
}

#[test]
fn a_rebase_gives_the_parent_and_takes_none_away() {
    // Prepared on, committed on, stands on.
    let cases = [
        ("", "", Ok("")),
        ("", "committed-1", Ok("committed-1")),
        ("", "committed-2", Ok("committed-2")),
        ("committed-1", "committed-1", Ok("committed-1")),
        ("committed-1", "", Ok("committed-1")),
        ("committed-1", "committed-2", Err(Argument)),
        ("committed-1", "nonexistent", Err(Argument)),
        ("committed-2", "committed-1", Err(Argument)),
        ("", "nonexistent", Err(NotFound)),
        ("", "active-1", Err(Precondition)),
        ("", "view-1", Err(Precondition)),
        ("", "rebase", Err(Precondition)),
    ];
    for (before, after, wanted) in cases {
        let mut chain = base();
        apply(&mut chain, &[prepare("rebase", before)]);
        let slot = chain.stat("rebase").unwrap().slot;
        let done = chain.apply(&commit("rebase", "rebased", after), at(9));
        let parent = match (done, wanted) {
            (Ok(_), Ok(parent)) => parent,
            (Err(error), Err(wanted)) if class(&error) == wanted => {
                assert_eq!(chain.stat("rebase").unwrap().kind, Kind::Active);
                assert!(chain.stat("rebased").is_err());
                continue;
            }
            (done, wanted) => panic!("{before:?} on {after:?}: {done:?}, not {wanted:?}"),
        };
        apply(&mut chain, &[view("look", "rebased")]);
        let stack: Vec<SnapshotSlot> = chain.stack("look").unwrap().iter().map(|of| of.slot).collect();
        assert_eq!(stack[1], slot, "the number changed");
        if parent.is_empty() {
            assert_eq!(stack.len(), 2);
        } else {
            assert_eq!(stack[2], chain.stat(parent).unwrap().slot);
            assert_eq!(chain.apply(&remove(parent), at(9)).map_err(|error| class(&error)), Err(Precondition));
        }
        assert_eq!(chain.apply(&remove("rebased"), at(9)).map_err(|error| class(&error)), Err(Precondition));
    }
}

#[test]
fn parallel_layers_are_put_into_order_by_their_commits() {
    let mut chain = Chain::default();
    let names: Vec<String> = (0..5).map(|n| format!("sha256:c{n}")).collect();
    let keys: Vec<String> = (0..5).map(|n| format!("default/{n}/extract-12 sha256:c{n}")).collect();
    for key in &keys {
        apply(&mut chain, &[prepare(key, "")]);
    }
    // Out of order: the parent is not there.
    let early = chain.apply(&commit(&keys[1], &names[1], &names[0]), at(9));
    assert_eq!(early.map_err(|error| class(&error)), Err(NotFound));
    for n in 0..5 {
        apply(&mut chain, &[commit(&keys[n], &names[n], if n == 0 { "" } else { &names[n - 1] })]);
    }
    apply(&mut chain, &[prepare("k8s.io/9/container", &names[4])]);
    let stack: Vec<&str> = chain.stack("k8s.io/9/container").unwrap().iter().map(|of| of.key.as_str()).collect();
    assert_eq!(stack, ["k8s.io/9/container", "sha256:c4", "sha256:c3", "sha256:c2", "sha256:c1", "sha256:c0"]);
}

#[test]
fn stacks_go_down_to_the_bottom_and_only_what_can_be_mounted_has_one() {
    let chain = base();
    for (name, parents) in [
        ("active-1", &[][..]),
        ("active-2", &["committed-1"]),
        ("active-3", &["committed-2", "committed-1"]),
        ("view-1", &[]),
        ("view-2", &["committed-2", "committed-1"]),
    ] {
        let stack: Vec<&str> = chain.stack(name).unwrap().iter().map(|of| of.key.as_str()).collect();
        assert_eq!(stack, [&[name], parents].concat());
    }
    assert_eq!(chain.stack("committed-1").map_err(|error| class(&error)).unwrap_err(), Precondition);
    assert_eq!(chain.stack("does-not-exist").map_err(|error| class(&error)).unwrap_err(), NotFound);
}

#[test]
fn numbers_stay_and_are_not_shared() {
    let mut chain = base();
    let mut slots: Vec<SnapshotSlot> = chain.walk().map(|snapshot| snapshot.slot).collect();
    slots.sort_unstable();
    slots.dedup();
    assert_eq!(slots.len(), 7);
    let slot = chain.stat("active-1").unwrap().slot;
    apply(&mut chain, &[commit("active-1", "committed-3", "committed-2")]);
    assert_eq!(chain.stat("committed-3").unwrap().slot, slot);
    apply(&mut chain, &[remove("committed-3"), prepare("next", "")]);
    assert!(chain.stat("next").unwrap().slot > slot, "a number was given again at once");
}

#[test]
fn keys_can_be_used_again_and_a_layer_can_stand_in_for_a_removed_one() {
    let mut chain = Chain::default();
    apply(
        &mut chain,
        &[
            prepare("committed-a", ""),
            commit("committed-a", "committed-1", ""),
            prepare("reuse-1", "committed-1"),
            remove("reuse-1"),
            view("reuse-1", "committed-1"),
            remove("reuse-1"),
            prepare("reuse-1", ""),
            remove("committed-1"),
            commit("reuse-1", "committed-1", ""),
        ],
    );
    assert_eq!(said(&chain), [("committed-1", Kind::Committed, "")]);
}

#[test]
fn what_stands_in_the_middle_stays_until_nothing_stands_on_it() {
    let mut chain = Chain::default();
    apply(&mut chain, &[prepare("b", ""), commit("b", "base", ""), prepare("i", "base"), commit("i", "inter", "")]);
    apply(&mut chain, &[prepare("top", "inter")]);
    for name in ["inter", "base"] {
        let error = chain.apply(&remove(name), at(9)).unwrap_err();
        assert_eq!(class(&error), Precondition);
        assert!(error.to_string().starts_with("cannot remove"), "{error}");
    }
    apply(&mut chain, &[remove("top"), remove("inter"), remove("base")]);
    assert_eq!(chain.walk().count(), 0);
}

#[test]
fn directories_are_made_and_dropped_with_their_snapshot() {
    let mut chain = Chain::default();
    let changes =
        apply(&mut chain, &[prepare("a", ""), commit("a", "c", ""), view("v", "c"), remove("v"), remove("c")]);
    let effects: Vec<&[Effect]> = changes.iter().map(|change| change.effects.as_slice()).collect();
    let (first, second) = (SnapshotSlot(1), SnapshotSlot(2));
    assert_eq!(
        effects,
        [
            &[Effect::MakeFiles(first)][..],
            &[Effect::Committed(key("c"))],
            &[Effect::MakeFiles(second)],
            &[Effect::DropFiles(second)],
            &[Effect::DropFiles(first)],
        ]
    );
}

#[test]
fn updates_change_labels_alone() {
    for name in ["committed-1", "committed-2", "active-1", "active-2", "view-1", "view-2"] {
        let mut chain = base();
        let before = chain.stat(name).unwrap().clone();
        let update = |chain: &mut Chain, new: &[(&str, &str)], fields: &[&str]| {
            let fields = fields.iter().map(|field| (*field).to_owned()).collect();
            chain.apply(&Command::Update { key: key(name), labels: labels(new), fields }, at(11)).map(drop)
        };
        type Pairs<'a> = &'a [(&'a str, &'a str)];
        let cases: [(Pairs<'_>, &[&str], Pairs<'_>); 6] = [
            (&[("l1", "v1"), ("l2", "v2"), ("l3", "v3")], &[], &[("l1", "v1"), ("l2", "v2"), ("l3", "v3")]),
            (&[("l1", "updated"), ("l4", "v4")], &["labels.l1", "labels.l2"], &[("l1", "updated"), ("l3", "v3")]),
            (&[("l4", "v4")], &["labels"], &[("l4", "v4")]),
            (
                &[("containerd.io/gc.root", "x")],
                &["labels.containerd.io/gc.root"],
                &[("l4", "v4"), ("containerd.io/gc.root", "x")],
            ),
            (&[("empty", ""), ("l5", "v5")], &[], &[("l5", "v5")]),
            (&[], &[], &[]),
        ];
        for (new, fields, wanted) in cases {
            update(&mut chain, new, fields).unwrap();
            let after = chain.stat(name).unwrap();
            assert_eq!(after.labels, labels(wanted), "{name} after {new:?} of {fields:?}");
            assert_eq!(
                (after.kind, &after.parent, after.created, after.updated, after.slot),
                (before.kind, &before.parent, at(7), at(11), before.slot)
            );
        }
        for field in ["parent", "kind", "name", "created", "label.x", "labels2", ""] {
            let refused = update(&mut chain, &[("x", "y")], &["labels", field]);
            assert_eq!(refused.map_err(|error| class(&error)), Err(Argument), "{field}");
            assert_eq!(chain.stat(name).unwrap().labels, Labels::new(), "half an update was kept");
        }
    }
    let missing = Command::Update { key: key("nobody"), labels: Labels::new(), fields: Vec::new() };
    assert_eq!(base().apply(&missing, at(9)).map_err(|error| class(&error)), Err(NotFound));
}

#[test]
fn a_commit_replaces_labels_and_begins_a_new_time() {
    let mut chain = Chain::default();
    let prepared =
        Command::Prepare { key: key("a"), parent: None, labels: labels(&[("x", "1"), ("y", "")]), layer: None };
    chain.apply(&prepared, at(1)).unwrap();
    assert_eq!(chain.stat("a").unwrap().labels, labels(&[("x", "1")]));
    let usage = Usage { bytes: 12, inodes: 3 };
    let committed = Command::Commit {
        key: key("a"),
        name: key("c"),
        parent: None,
        labels: labels(&[("z", "2")]),
        usage: Some(usage),
    };
    chain.apply(&committed, at(2)).unwrap();
    let found = chain.stat("c").unwrap();
    assert_eq!((&found.labels, found.created, found.updated), (&labels(&[("z", "2")]), at(2), at(2)));
    assert_eq!(found.usage, Some(usage));
}

#[test]
fn what_is_committed_is_measured_later() {
    let usage = Usage { bytes: 12, inodes: 3 };
    let measured = |name: &str| Command::Measured { key: key(name), usage };
    let mut chain = Chain::default();
    let prepare = Command::Prepare { key: key("a"), parent: None, labels: Labels::new(), layer: None };
    chain.apply(&prepare, at(1)).unwrap();
    assert_eq!(chain.apply(&measured("a"), at(2)).map_err(|error| class(&error)), Err(Precondition));
    assert_eq!(chain.apply(&measured("b"), at(2)).map_err(|error| class(&error)), Err(NotFound));
    let commit = Command::Commit { key: key("a"), name: key("b"), parent: None, labels: Labels::new(), usage: None };
    chain.apply(&commit, at(2)).unwrap();
    assert_eq!(chain.stat("b").unwrap().usage, None);
    chain.apply(&measured("b"), at(3)).unwrap();
    let found = chain.stat("b").unwrap();
    assert_eq!((found.usage, found.updated), (Some(usage), at(2)));
}

#[test]
fn what_is_too_large_is_refused() {
    assert_eq!(Key::new("").map_err(|error| class(&error)), Err(Argument));
    assert_eq!(Key::new(&"k".repeat(MAX_KEY)).map(|key| key.as_str().len()), Ok(MAX_KEY));
    assert_eq!(Key::new(&"k".repeat(MAX_KEY + 1)).map_err(|error| class(&error)), Err(Argument));
    assert_eq!(Key::optional("").unwrap(), None);
    let large = labels(&[("x", &"v".repeat(MAX_LABELS))]);
    let mut chain = base();
    for command in [
        Command::Prepare { key: key("new"), parent: None, labels: large.clone(), layer: None },
        Command::View { key: key("new"), parent: None, labels: large.clone() },
        Command::Commit {
            key: key("active-1"),
            name: key("new"),
            parent: None,
            labels: large.clone(),
            usage: Some(Usage::default()),
        },
        Command::Update { key: key("active-1"), labels: large, fields: Vec::new() },
    ] {
        assert_eq!(chain.apply(&command, at(9)).map_err(|error| class(&error)), Err(Argument));
    }
    assert_eq!(said(&chain), said(&base()));
}

#[test]
fn lists_are_containerds_walks() {
    let mut chain = Chain::default();
    let root = ("containerd.io/gc.root", "check-walk");
    let with = |name: &str, parent: &str, kind: Kind, label: &str| {
        let labels = labels(&[root, ("l", label)]);
        let (key, parent) = (key(name), Key::optional(parent).unwrap());
        match kind {
            Kind::View => Command::View { key, parent, labels },
            _ => Command::Prepare { key, parent, labels, layer: None },
        }
    };
    let commit = |from: &str, name: &str, label: &str| Command::Commit {
        key: key(from),
        name: key(name),
        parent: None,
        labels: labels(&[root, ("l", label)]),
        usage: Some(Usage::default()),
    };
    apply(
        &mut chain,
        &[
            with("a-np", "", Kind::Active, ""),
            with("p-tmp", "", Kind::Active, ""),
            commit("p-tmp", "p", ""),
            with("a", "p", Kind::Active, ""),
            with("v", "p", Kind::View, ""),
            with("p-wl-tmp", "", Kind::Active, ""),
            commit("p-wl-tmp", "p-wl", "1"),
            with("a-wl", "p-wl", Kind::Active, "2"),
            with("v-wl", "p-wl", Kind::View, "3"),
            with("a-np-wl", "", Kind::Active, "2"),
        ],
    );
    let marked = "labels.\"containerd.io/gc.root\"==check-walk";
    let cases: [(&[&str], &[&str]); 10] = [
        (&[marked], &["a", "a-np", "a-np-wl", "a-wl", "p", "p-wl", "v", "v-wl"]),
        (&[&format!("kind==active,{marked}")], &["a", "a-np", "a-np-wl", "a-wl"]),
        (&[&format!("kind==view,{marked}")], &["v", "v-wl"]),
        (&[&format!("kind==committed,{marked}")], &["p", "p-wl"]),
        (&["name==p", "name==a-np-wl"], &["a-np-wl", "p"]),
        (&["name==a-wl,labels.l"], &["a-wl"]),
        (&["parent==p"], &["a", "v"]),
        (&[&format!("parent!=\"\",{marked}")], &["a", "a-wl", "v", "v-wl"]),
        (&["labels.l"], &["a-np-wl", "a-wl", "p-wl", "v-wl"]),
        (&["labels.l==2"], &["a-np-wl", "a-wl"]),
    ];
    for (filters, wanted) in cases {
        let parsed = Filters::parse(filters).unwrap();
        let found: Vec<&str> = chain.list(&parsed).map(|snapshot| snapshot.key.as_str()).collect();
        assert_eq!(found, wanted, "{filters:?}");
    }
}

#[test]
fn layers_are_committed_in_order_whatever_order_they_become_local_in() {
    let layers = [("l0", "c0"), ("l1", "c1"), ("l2", "c2")];
    for (order, wanted) in [
        (["l0", "l1", "l2"], [&["c0"][..], &["c1"], &["c2"]]),
        (["l2", "l1", "l0"], [&[], &[], &["c0", "c1", "c2"]]),
        (["l1", "l0", "l2"], [&[], &["c0", "c1"], &["c2"]]),
        (["l0", "l2", "l1"], [&["c0"], &[], &["c1", "c2"]]),
    ] {
        let mut chain = Chain::default();
        apply(&mut chain, &[pull("image", &layers)]);
        for (name, kind, parent) in said(&chain) {
            assert_eq!((kind, parent), (Kind::Active, ""), "{name} while it fills");
        }
        let slots: Vec<LayerSlot> = chain.image("image").unwrap().layers.iter().map(|of| of.layer).collect();
        for (layer, wanted) in order.iter().zip(wanted) {
            let change = chain.apply(&local(layer), at(9)).unwrap();
            let committed: Vec<&str> = change.committed().map(Key::as_str).collect();
            assert_eq!(committed, wanted, "{layer} of {order:?}");
        }
        assert_eq!(
            said(&chain),
            [("c0", Kind::Committed, ""), ("c1", Kind::Committed, "c0"), ("c2", Kind::Committed, "c1")]
        );
        for (name, slot) in ["c0", "c1", "c2"].iter().zip(slots) {
            assert_eq!(chain.stat(name).unwrap().content, Content::Layer(slot));
        }
        assert!(chain.apply(&local("l1"), at(10)).unwrap().writes.is_empty(), "the second time is news");
    }
}

#[test]
fn images_share_what_they_have_in_common() {
    let mut chain = Chain::default();
    apply(&mut chain, &[pull("one", &[("l0", "c0"), ("l1", "c1")]), pull("two", &[("l0", "c0"), ("l2", "c2")])]);
    assert_eq!(chain.walk().count(), 3);
    assert_eq!(chain.layers().count(), 3);
    let again = apply(&mut chain, &[local("l0"), local("l2"), pull("two", &[("l0", "c0"), ("l2", "c2")])]);
    assert_eq!(again[2].effects, []);
    // All of it is local already: committed at once.
    let change = &apply(&mut chain, &[pull("three", &[("l2", "d0"), ("l0", "d1")])])[0];
    assert_eq!(change.committed().map(Key::as_str).collect::<Vec<_>>(), ["d0", "d1"]);
    assert_eq!(
        said(&chain),
        [
            (fill("l1", "c1").as_str(), Kind::Active, ""),
            ("c0", Kind::Committed, ""),
            ("c2", Kind::Committed, "c0"),
            ("d0", Kind::Committed, ""),
            ("d1", Kind::Committed, "d0"),
        ]
    );
}

#[test]
fn two_blobs_of_one_name_fill_beside_each_other_and_the_first_wins() {
    let mut chain = Chain::default();
    apply(&mut chain, &[pull("tar", &[("slow", "c0")]), pull("erofs", &[("fast", "c0"), ("top", "c1")])]);
    assert_eq!(chain.walk().count(), 3);
    apply(&mut chain, &[local("top")]);
    let change = &apply(&mut chain, &[local("fast")])[0];
    assert_eq!(change.committed().map(Key::as_str).collect::<Vec<_>>(), ["c0", "c1"]);
    assert_eq!(said(&chain), [("c0", Kind::Committed, ""), ("c1", Kind::Committed, "c0")]);
    // The image still names the layer that lost.
    assert_eq!(chain.layers().count(), 3);
    let released = &apply(&mut chain, &[Command::Forget { image: "tar".to_owned() }])[0];
    assert!(matches!(&released.effects[..], [Effect::ReleaseLayer(lost)] if lost.id == layer("slow")));
}

#[test]
fn files_become_a_layer_once_and_never_behind_a_commit() {
    let become_layer = |name: &str, of: &str| Command::Become { key: key(name), layer: layer(of), size: Some(4096) };
    let mut chain = Chain::default();
    apply(&mut chain, &[prepare("a", "")]);
    let slot = chain.stat("a").unwrap().slot;
    let change = &apply(&mut chain, &[become_layer("a", "l0")])[0];
    assert_eq!(change.effects, [Effect::DropFiles(slot)]);
    assert_eq!(apply(&mut chain, &[become_layer("a", "l0")])[0], Change::default());
    // Another layer in its place: the one before is nobody's.
    let change = &apply(&mut chain, &[become_layer("a", "l1")])[0];
    assert!(matches!(&change.effects[..], [Effect::ReleaseLayer(gone)] if gone.id == layer("l0")), "{change:?}");
    apply(&mut chain, &[commit("a", "c", "")]);
    assert_eq!(chain.stat("c").unwrap().content, Content::Layer(chain.layers().next().unwrap().slot));
    apply(&mut chain, &[view("v", "c")]);
    for (name, expected) in [("c", Precondition), ("v", Precondition), ("nobody", NotFound)] {
        let refused = chain.apply(&become_layer(name, "l2"), at(9)).unwrap_err();
        assert_eq!(class(&refused), expected, "{name}");
    }
}

#[test]
fn pulls_that_contradict_what_is_there_are_refused() {
    let mut chain = base();
    apply(&mut chain, &[pull("image", &[("l0", "c0"), ("l1", "c1")]), local("l0")]);
    let before = chain.clone();
    let sized = Command::Pull {
        image: "x".to_owned(),
        manifest: manifest(),
        layers: vec![PulledLayer { id: layer("l0"), size: Some(1), name: key("c9") }],
    };
    for (command, wanted) in [
        (pull("x", &[("l0", "active-1")]), Precondition),
        (pull("x", &[("l0", "view-1")]), Precondition),
        (pull("x", &[("l9", "c9"), ("l0", "c0")]), Precondition),
        (pull("x", &[("l9", "c9"), ("l1", "c1")]), Precondition),
        (pull("x", &[("l1", "c1")]), Precondition),
        (pull("x", &[("l0", "c0"), ("l0", "c0")]), Argument),
        (sized, Argument),
        (commit(&fill("l1", "c1"), "new", ""), Precondition),
        (Command::Forget { image: "x".to_owned() }, NotFound),
        (local("l9"), NotFound),
        (Command::LayerLost { layer: layer("l9") }, NotFound),
        (remove("c0"), Precondition),
        (remove(&fill("l1", "c1")), Precondition),
    ] {
        let error = chain.apply(&command, at(9)).expect_err(&format!("{command:?} was not refused"));
        assert_eq!(class(&error), wanted, "{command:?}: {error}");
    }
    assert_eq!(said(&chain), said(&before));
}

#[test]
fn clients_and_images_use_each_others_snapshots() {
    let mut chain = Chain::default();
    // A client's snapshot is what an image needs; a client stands on an image's.
    apply(&mut chain, &[prepare("k", ""), commit("k", "c0", ""), pull("image", &[("l0", "c0"), ("l1", "c1")])]);
    assert_eq!(chain.walk().filter(|snapshot| snapshot.filling.is_some()).count(), 1);
    apply(&mut chain, &[local("l1"), prepare("container", "c1"), Command::Forget { image: "image".to_owned() }]);
    assert_eq!(chain.garbage(&BTreeSet::new()), Garbage::default());
    apply(&mut chain, &[remove("container")]);
    assert_eq!(chain.garbage(&BTreeSet::new()).snapshots, [key("c1")]);
    assert_eq!(chain.garbage(&[key("c1")].into()), Garbage::default());
    apply(&mut chain, &[remove("c1"), remove("c0")]);
    assert_eq!((chain.walk().count(), chain.layers().count()), (0, 0));
}

#[test]
fn garbage_is_what_no_image_names_and_goes_from_the_top() {
    let mut chain = Chain::default();
    let layers = [("l0", "c2"), ("l1", "c1"), ("l2", "c0"), ("l3", "b"), ("l4", "a")];
    apply(&mut chain, &[pull("one", &layers), pull("two", &layers[..2]), local("l0"), local("l1"), local("l2")]);
    assert_eq!(chain.garbage(&BTreeSet::new()), Garbage::default());
    // Of the old image only what fills and what the new one does not name.
    apply(&mut chain, &[pull("one", &layers[..1])]);
    let plan = chain.garbage(&BTreeSet::new());
    assert_eq!(plan.snapshots, [key(&fill("l4", "a")), key(&fill("l3", "b")), key("c0")]);
    for key in plan.snapshots {
        apply(&mut chain, &[Command::Remove { key }]);
    }
    assert_eq!(said(&chain), [("c1", Kind::Committed, "c2"), ("c2", Kind::Committed, "")]);
    apply(&mut chain, &[Command::Forget { image: "two".to_owned() }, Command::Forget { image: "one".to_owned() }]);
    let plan = chain.garbage(&BTreeSet::new());
    assert_eq!(plan.snapshots, [key("c1"), key("c2")]);
}

#[test]
fn a_lost_layer_unmakes_no_commit() {
    let mut chain = Chain::default();
    apply(&mut chain, &[pull("image", &[("l0", "c0"), ("l1", "c1")]), local("l0")]);
    apply(&mut chain, &[Command::LayerLost { layer: layer("l0") }, local("l1")]);
    assert_eq!(said(&chain), [("c0", Kind::Committed, ""), ("c1", Kind::Committed, "c0")]);
    assert_eq!(chain.layers().map(|layer| layer.local.is_some()).collect::<Vec<_>>(), [false, true]);
}

#[test]
fn records_that_contradict_each_other_are_damage() {
    let mut chain = base();
    apply(&mut chain, &[pull("image", &[("l0", "c0"), ("l1", "c1")]), local("l0")]);
    type Spoil = fn(&mut Vec<Snapshot>, &mut Vec<Layer>, &mut Vec<Image>);
    let cases: [(&str, Spoil); 9] = [
        ("missing parent", |snapshots, _, _| snapshots.retain(|of| of.key.as_str() != "committed-1")),
        ("active parent", |snapshots, _, _| {
            snapshots.iter_mut().for_each(|of| {
                if of.key.as_str() == "committed-1" {
                    of.kind = Kind::Active;
                }
            });
        }),
        ("circle", |snapshots, _, _| {
            let of = snapshots.iter_mut().find(|of| of.key.as_str() == "committed-1").unwrap();
            of.parent = Some(key("committed-2"));
        }),
        ("two of one number", |snapshots, _, _| snapshots[0].slot = snapshots[1].slot),
        ("missing layer", |_, layers, _| layers.truncate(1)),
        ("two of one layer", |_, layers, _| layers[0].id = layers[1].id.clone()),
        ("two layers of one number", |_, layers, _| layers[0].slot = layers[1].slot),
        ("image without snapshot", |snapshots, _, _| snapshots.retain(|of| of.filling.is_none())),
        ("filling and committed", |snapshots, _, _| {
            snapshots.iter_mut().for_each(|of| {
                if of.filling.is_some() {
                    of.kind = Kind::Committed;
                }
            });
        }),
    ];
    let parts = || {
        let (snapshots, layers): (Vec<_>, Vec<_>) =
            (chain.walk().cloned().collect(), chain.layers().cloned().collect());
        (snapshots, layers, chain.images().cloned().collect::<Vec<_>>())
    };
    let (snapshots, layers, images) = parts();
    Chain::restore(snapshots, layers, images, chain.cursors()).unwrap();
    for (name, spoil) in cases {
        let (mut snapshots, mut layers, mut images) = parts();
        spoil(&mut snapshots, &mut layers, &mut images);
        assert!(Chain::restore(snapshots, layers, images, chain.cursors()).is_err(), "{name} was taken");
    }
}
