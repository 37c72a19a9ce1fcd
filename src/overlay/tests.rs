//! The merge on layers in memory. What is expected here was seen on the kernel's overlayfs; `tests/it/overlay_judge.rs`
//! keeps comparing.

use std::collections::BTreeMap;
use std::convert::Infallible;

use super::*;
use crate::model::{DeviceNumber, Timestamp};

/// A layer written as lines: `dir/`, `file`, `name -> target` for a hard link, `name !` for a whiteout; each may be
/// followed by ` @attribute=value`.
#[derive(Debug, Default)]
struct Layer {
    files: Vec<File>,
}

#[derive(Debug)]
struct File {
    kind: FileKind,
    size: u64,
    parent: u64,
    children: BTreeMap<Vec<u8>, u64>,
    xattrs: Vec<Xattr>,
}

impl Layer {
    fn new(lines: &[&str]) -> Self {
        let mut layer = Self::default();
        layer.files.push(File {
            kind: FileKind::Directory,
            size: 0,
            parent: 0,
            children: BTreeMap::new(),
            xattrs: Vec::new(),
        });
        for line in lines {
            let mut words = line.split(" @");
            let head = words.next().unwrap();
            let nid = layer.add(head);
            for attribute in words {
                let (name, value) = attribute.split_once('=').unwrap();
                layer.files[nid as usize]
                    .xattrs
                    .push(Xattr { name: name.as_bytes().into(), value: value.as_bytes().into() });
            }
        }
        layer
    }

    fn add(&mut self, head: &str) -> u64 {
        let (path, kind) = match head.strip_suffix('/') {
            Some(path) => (path, FileKind::Directory),
            None => match head.strip_suffix(" !") {
                Some(path) => (path, FileKind::CharDevice),
                None => (head, FileKind::Regular),
            },
        };
        let mut dir = 0;
        let mut parts = path.split('/').peekable();
        while let Some(part) = parts.next() {
            if part.is_empty() {
                return dir;
            }
            let next = self.files.len() as u64;
            let known = self.files[dir as usize].children.get(part.as_bytes()).copied();
            dir = known.unwrap_or_else(|| {
                let kind = if parts.peek().is_some() { FileKind::Directory } else { kind };
                let size = u64::from(kind == FileKind::Regular && !head.contains("empty"));
                self.files.push(File { kind, size, parent: dir, children: BTreeMap::new(), xattrs: Vec::new() });
                self.files[dir as usize].children.insert(part.as_bytes().to_vec(), next);
                next
            });
        }
        dir
    }
}

impl LayerView for Layer {
    type Error = Infallible;

    fn root(&self) -> u64 {
        0
    }

    fn look(&self, nid: u64) -> Result<Look, Infallible> {
        let file = &self.files[nid as usize];
        let subdirs = file.children.values().filter(|c| self.files[**c as usize].kind == FileKind::Directory).count();
        let attributes = Attributes {
            kind: file.kind,
            permissions: 0o644,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            nlink: if file.kind == FileKind::Directory { 2 + subdirs as u32 } else { 1 },
            size: file.size,
            rdev: DeviceNumber::default(),
        };
        Ok(Look { attributes, has_xattrs: !file.xattrs.is_empty() })
    }

    fn lookup(&self, dir: u64, name: &[u8]) -> Result<Option<u64>, Infallible> {
        Ok(self.files[dir as usize].children.get(name).copied())
    }

    fn for_each(&self, dir: u64, each: &mut EachEntry<'_>) -> Result<(), Infallible> {
        for (name, nid) in &self.files[dir as usize].children {
            if each(name, *nid, self.files[*nid as usize].kind).is_break() {
                break;
            }
        }
        Ok(())
    }

    fn parent(&self, dir: u64) -> Result<u64, Infallible> {
        Ok(self.files[dir as usize].parent)
    }

    fn xattr(&self, nid: u64, name: &[u8]) -> Result<Option<Box<[u8]>>, Infallible> {
        Ok(self.files[nid as usize].xattrs.iter().find(|x| *x.name == *name).map(|x| x.value.clone()))
    }

    fn xattrs(&self, nid: u64) -> Result<Vec<Xattr>, Infallible> {
        Ok(self.files[nid as usize].xattrs.clone())
    }
}

/// The merged tree as lines `path layer[+layer…]`, each file looked up by name and through the listing, each merged
/// directory found again from its topmost part.
fn tree(overlay: &Overlay<Layer>) -> Vec<String> {
    fn walk(overlay: &Overlay<Layer>, parts: &[NodeId], path: &str, lines: &mut Vec<String>) {
        let listing = overlay.list(parts).unwrap();
        for index in 0..listing.len() {
            let entry = listing.get(index).unwrap();
            let path = format!("{path}{}", String::from_utf8_lossy(entry.name));
            let listed = overlay.entry(parts, &entry);
            let looked_up = overlay.lookup(parts, entry.name);
            let found = match (listed, looked_up) {
                (Ok(listed), Ok(looked_up)) => {
                    assert_eq!(listed, looked_up, "{path}");
                    let Some(found) = listed else { continue };
                    found
                }
                (Err(listed), Err(looked_up)) => {
                    assert_eq!(listed.to_string(), looked_up.to_string());
                    lines.push(format!("{path} {listed}"));
                    continue;
                }
                (listed, looked_up) => panic!("{path}: {listed:?} but {looked_up:?}"),
            };
            let layers: Vec<String> = found.parts().iter().map(|p| p.layer.to_string()).collect();
            let is_dir = found.attributes.kind == FileKind::Directory;
            lines.push(format!("{path}{} {}", if is_dir { "/" } else { "" }, layers.join("+")));
            if is_dir {
                assert_eq!(overlay.parts(found.node).unwrap(), found.parts(), "{path}");
                if found.is_merged() {
                    assert_eq!(found.attributes.nlink, 1, "{path}");
                }
                walk(overlay, &found.parts(), &format!("{path}/"), lines);
            }
        }
    }
    let mut lines = Vec::new();
    walk(overlay, &overlay.root().unwrap().parts(), "", &mut lines);
    lines
}

fn stack(layers: &[&[&str]]) -> Overlay<Layer> {
    Overlay::new(layers.iter().map(|lines| Layer::new(lines)).collect()).unwrap()
}

/// What is shown, layers from the lowest, lines of the tree.
type Case<'a> = (&'a str, &'a [&'a [&'a str]], &'a [&'a str]);

#[test]
fn layers_merge_as_in_overlayfs() {
    let cases: &[Case<'_>] = &[
        ("one layer", &[&["a/b", "c"]], &["a/ 0", "a/b 0", "c 0"]),
        ("merge", &[&["d/low", "d/both"], &["d/high", "d/both"]], &["d/ 1+0", "d/both 1", "d/high 1", "d/low 0"]),
        ("whiteout of a file", &[&["a", "b"], &["a !"]], &["b 0"]),
        ("whiteout of a directory", &[&["d/x"], &["d !"], &["d/y"]], &["d/ 2", "d/y 2"]),
        ("whiteout of nothing", &[&[], &["d/w !", "d/x"]], &["d/ 1", "d/x 1"]),
        ("whiteout in the lowest layer", &[&["w !", "x"]], &["x 0"]),
        ("file over directory", &[&["d/x"], &["d"]], &["d 1"]),
        ("directory over file", &[&["d"], &["d/x"]], &["d/ 1", "d/x 1"]),
        ("a file ends the merge", &[&["d/low"], &["d"], &["d/high"]], &["d/ 2", "d/high 2"]),
        ("opaque", &[&["d/low"], &["d/mid"], &["d/ @trusted.overlay.opaque=y", "d/high"]], &["d/ 2", "d/high 2"]),
        (
            "opaque in the middle",
            &[&["d/low"], &["d/ @trusted.overlay.opaque=y", "d/mid"], &["d/high"]],
            &["d/ 2+1", "d/high 2", "d/mid 1"],
        ),
        ("only y is opaque", &[&["d/low"], &["d/ @trusted.overlay.opaque=yes"]], &["d/ 1+0", "d/low 0"]),
        ("opaque for users is a plain attribute", &[&["d/a"], &["d/ @user.overlay.opaque=y"]], &["d/ 1+0", "d/a 0"]),
        ("roots always merge", &[&["low"], &["/ @trusted.overlay.opaque=y", "high"]], &["high 1", "low 0"]),
        ("whiteout as an attribute", &[&["empty"], &["empty @trusted.overlay.whiteout=y"]], &[]),
        ("only an empty file is one", &[&["full"], &["full @trusted.overlay.whiteout=y"]], &["full 1"]),
        ("shadowed beneath a merge", &[&["d/e/x"], &["d/e/y"], &["d/e"]], &["d/ 2+1+0", "d/e 2"]),
    ];
    for (what, layers, expected) in cases {
        assert_eq!(tree(&stack(layers)), *expected, "{what}");
    }
}

#[test]
fn redirects_are_followed_as_in_overlayfs() {
    let cases: &[Case<'_>] = &[
        (
            "to a path",
            &[&["a/b/deep"], &["a/ @x=y"], &["new/own", "new/ @trusted.overlay.redirect=/a/b"]],
            &["a/ 1+0", "a/b/ 0", "a/b/deep 0", "new/ 2+0", "new/deep 0", "new/own 2"],
        ),
        (
            "to a name beside it",
            &[&["old/x"], &["new/ @trusted.overlay.redirect=old", "old !"]],
            &["new/ 1+0", "new/x 0"],
        ),
        (
            "from a directory that the layers below do not have",
            &[&["a/x"], &["only/moved/ @trusted.overlay.redirect=/a"]],
            &["a/ 0", "a/x 0", "only/ 1", "only/moved/ 1+0", "only/moved/x 0"],
        ),
        (
            "a path through a whiteout ends",
            &[&["a/b/low"], &["a !"], &["new/ @trusted.overlay.redirect=/a/b"]],
            &["new/ 2"],
        ),
        (
            "a redirect on the way of a redirect",
            &[&["c/b/low"], &["a/ @trusted.overlay.redirect=c", "a/b/mid"], &["n/ @trusted.overlay.redirect=/a/b"]],
            &[
                "a/ 1+0",
                "a/b/ 1+0",
                "a/b/low 0",
                "a/b/mid 1",
                "c/ 0",
                "c/b/ 0",
                "c/b/low 0",
                "n/ 2+1+0",
                "n/low 0",
                "n/mid 1",
            ],
        ),
        ("in the lowest layer it means nothing", &[&["d/ @trusted.overlay.redirect=/a//b"], &[]], &["d/ 0"]),
    ];
    for (what, layers, expected) in cases {
        assert_eq!(tree(&stack(layers)), *expected, "{what}");
    }
}

#[test]
fn what_overlayfs_refuses_is_refused() {
    let overlay = stack(&[
        &["low @trusted.overlay.metacopy=", "x", "d2/"],
        &[
            "d/ @trusted.overlay.redirect=/a//b",
            "e/ @trusted.overlay.redirect=../x",
            "f/ @trusted.overlay.redirect=",
            "g/ @trusted.overlay.redirect=..",
            "h/ @trusted.overlay.redirect=/d2/./x",
            "i/ @trusted.overlay.redirect=/absent/../d2",
        ],
    ]);
    assert_eq!(
        tree(&overlay),
        [
            "d directory 1 of layer 1 has the invalid redirect \"/a//b\"",
            "d2/ 0",
            "e directory 2 of layer 1 has the invalid redirect \"../x\"",
            "f directory 3 of layer 1 has the invalid redirect \"\"",
            "g a redirect leads from directory 0 of layer 0 to \"..\", which is no name to look up",
            "h a redirect leads from directory 3 of layer 0 to \".\", which is no name to look up",
            "i/ 1",
            "low file 1 of layer 0 has trusted.overlay.metacopy: its content lies elsewhere and is not followed",
            "x 0",
        ]
    );
}

#[test]
fn attributes_of_overlayfs_stay_hidden() {
    let overlay = stack(&[&[
        "f @trusted.overlay.origin=1 @trusted.overlay.overlay.opaque=2 @user.overlay.opaque=3 @trusted.other=4",
    ]]);
    let node = overlay.lookup(&overlay.root().unwrap().parts(), b"f").unwrap().unwrap().node;
    let shown: Vec<String> = overlay.xattrs(node).unwrap().iter().map(|x| format!("{x:?}")).collect();
    assert_eq!(shown, ["trusted.overlay.opaque=0x32", "user.overlay.opaque=0x33", "trusted.other=0x34"]);
    for (name, value) in [
        ("trusted.overlay.origin", None),
        ("trusted.overlay.opaque", Some(b"2")),
        ("trusted.overlay.overlay.opaque", None),
        ("user.overlay.opaque", Some(b"3")),
        ("trusted.other", Some(b"4")),
        ("trusted.overlay.", None),
        ("absent", None),
    ] {
        let found = overlay.xattr(node, name.as_bytes()).unwrap();
        assert_eq!(found.as_deref(), value.map(|v| v.as_slice()), "{name}");
    }
    let long = format!("trusted.overlay.{}", "x".repeat(239));
    assert_eq!(overlay.xattr(node, long.as_bytes()).unwrap(), None);
}

#[test]
fn a_directory_in_a_loop_is_detached() {
    let mut layer = Layer::new(&["a/b/"]);
    layer.files[1].parent = 2;
    layer.files[2].children.insert(b"a".to_vec(), 1);
    let overlay = Overlay::new(vec![layer]).unwrap();
    let found = overlay.parts(NodeId { layer: 0, nid: 2 });
    assert!(matches!(found, Err(Error::Detached { layer: 0, nid: 2 })), "{found:?}");
    assert!(matches!(overlay.attributes(NodeId { layer: 1, nid: 0 }), Err(Error::NoLayer(1))));
    assert!(matches!(Overlay::<Layer>::new(Vec::new()), Err(Error::LayerCount(0))));
}
