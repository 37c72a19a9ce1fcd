//! The mounts that containerd is told to make: a decision from the state of a snapshot, without any doing.
//!
//! | snapshot | mounts |
//! |---|---|
//! | active, nothing below | bind of its directory, writable |
//! | the same, to extract a layer into | overlay with the single option `upperdir` |
//! | active, on others | overlay with upper, work and lower directories |
//! | active, its files are a layer | bind of the layer, read-only |
//! | view of nothing, or of one | bind, read-only |
//! | view of several | overlay of lower directories |
//!
//! The second row is for containerd 2.2 and newer, which prepare all layers of an image at once and without parent. Into a
//! bind mount they would be applied without turning whiteouts into overlayfs's, and what a layer deletes would come back. An
//! overlay of only an upper directory is never mounted: every version's differ writes into the directory that it names, and
//! turns whiteouts.
//!
//! Lower directories of a snapshot of a user namespace have its ids already (see [`super::mapped`]): no mount has an option
//! about ids. Types of mounts that only newer versions know (templates, `format/…`) are not used.

use std::path::{Path, PathBuf};

use crate::chain::{Kind, Labels};
use crate::grpc::Mount;
use crate::oci::labels::SNAPSHOT_REF;
use crate::snapshots::{Lower, Stack};

/// What the kernel of this machine wants besides.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Kernel {
    /// overlayfs knows an index of its upper directories, and refuses one that was used with other lowers before, unless it
    /// is switched off.
    pub(super) index: bool,
    /// overlayfs is to show one device, although each layer is a file system of its own.
    pub(super) xino: bool,
}

impl Kernel {
    /// As this machine's kernel is, with one device for all files if `xino` is true.
    pub(super) fn of_this_machine(xino: bool) -> Self {
        Self { index: Path::new("/sys/module/overlay/parameters/index").exists(), xino }
    }
}

/// True if a layer is to be extracted into the snapshot.
pub(super) fn is_extraction(labels: &Labels) -> bool {
    labels.contains_key(SNAPSHOT_REF)
}

/// The mounts of a snapshot on `lowers`, the nearest first.
pub(super) fn mounts(stack: &Stack, lowers: &[PathBuf], kernel: Kernel) -> Vec<Mount> {
    let snapshot = &stack.snapshot;
    let mut options = Vec::new();
    // Where all is on one file system there is but one device, and the kernel complains of the option.
    let xino = || {
        (kernel.xino && stack.lowers.iter().any(|lower| matches!(lower, Lower::Layer(_)))).then(|| "xino=on".to_owned())
    };
    let mount = match (&stack.own, lowers) {
        (Some(own), []) if snapshot.kind == Kind::Active && is_extraction(&snapshot.labels) => {
            options.push(format!("upperdir={}", own.upper.display()));
            overlay(options)
        }
        (Some(own), []) => bind(&own.upper, snapshot.kind == Kind::View),
        (Some(own), lowers) => {
            options.extend(kernel.index.then(|| "index=off".to_owned()));
            options.extend(xino());
            options.push(format!("workdir={}", own.work.display()));
            options.push(format!("upperdir={}", own.upper.display()));
            options.push(lowerdir(lowers));
            overlay(options)
        }
        // overlayfs takes no single directory, and a layer is shown as it is.
        (None, [only]) => bind(only, true),
        (None, lowers) if snapshot.kind == Kind::View => {
            options.extend(xino());
            options.push(lowerdir(lowers));
            overlay(options)
        }
        // What is below a layer that is served is not asked for: nobody mounts it before it is committed.
        (None, lowers) => bind(lowers.first().map_or(Path::new("/"), PathBuf::as_path), true),
    };
    vec![mount]
}

fn bind(source: &Path, read_only: bool) -> Mount {
    let options = [if read_only { "ro" } else { "rw" }, "rbind"].map(str::to_owned).into();
    Mount { kind: "bind", source: source.display().to_string(), options }
}

fn overlay(options: Vec<String>) -> Mount {
    Mount { kind: "overlay", source: "overlay".to_owned(), options }
}

fn lowerdir(lowers: &[PathBuf]) -> String {
    let lowers: Vec<String> = lowers.iter().map(|lower| lower.display().to_string()).collect();
    format!("lowerdir={}", lowers.join(":"))
}

/// Bytes that the options of a mount may take with some to spare: one page with its end (mount(2)).
const OPTIONS: usize = 4096 - 256;

/// True if the options would be too long for a page with these lower directories.
pub(super) fn are_long(own: usize, lowers: &[PathBuf]) -> bool {
    own + lowers.iter().map(|lower| lower.as_os_str().len() + 1).sum::<usize>() > OPTIONS
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::{Content, Key, Layer, LayerId, LayerSlot, Owner, Snapshot, SnapshotSlot};
    use crate::model::{Algorithm, BlobDigest, DiffId, Digest, Timestamp};
    use crate::snapshots::Own;

    fn stack(kind: Kind, content: Content, labels: &[(&str, &str)], own: bool, lowers: usize) -> Stack {
        let digest = Digest::of(Algorithm::Sha256, b"x");
        let time = Timestamp { seconds: 1, nanos: 0 };
        let id = LayerId { diff_id: DiffId(digest), blob: BlobDigest(digest), anchor: "a".to_owned() };
        let layer = Layer { slot: LayerSlot(7), id, size: None, local: None };
        Stack {
            snapshot: Snapshot {
                key: Key::new("k").unwrap(),
                slot: SnapshotSlot(3),
                kind,
                parent: None,
                labels: labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
                created: time,
                updated: time,
                content,
                owner: Owner::Client,
                usage: None,
                filling: None,
            },
            own: own.then(|| Own { upper: "/r/3/upper".into(), work: "/r/3/work".into() }),
            lowers: vec![Lower::Layer(layer); lowers],
        }
    }

    fn written(mounts: &[Mount]) -> String {
        let [Mount { kind, source, options }] = mounts else { panic!("{mounts:?}") };
        format!("{kind} {source} {}", options.join(" "))
    }

    #[test]
    fn every_snapshot_has_its_mounts() {
        let layer = Content::Layer(LayerSlot(7));
        let reference = (SNAPSHOT_REF, "sha256:x");
        for (stack, expected) in [
            (stack(Kind::Active, Content::Files, &[], true, 0), "bind /r/3/upper rw rbind"),
            (stack(Kind::Active, Content::Files, &[reference], true, 0), "overlay overlay upperdir=/r/3/upper"),
            (
                stack(Kind::Active, Content::Files, &[reference], true, 2),
                "overlay overlay index=off xino=on workdir=/r/3/work upperdir=/r/3/upper lowerdir=/l/0:/l/1",
            ),
            (
                stack(Kind::Active, Content::Files, &[], true, 1),
                "overlay overlay index=off xino=on workdir=/r/3/work upperdir=/r/3/upper lowerdir=/l/0",
            ),
            (stack(Kind::Active, layer, &[reference], false, 1), "bind /l/0 ro rbind"),
            (stack(Kind::Active, layer, &[reference], false, 2), "bind /l/0 ro rbind"),
            (stack(Kind::View, Content::Files, &[], true, 0), "bind /r/3/upper ro rbind"),
            (stack(Kind::View, Content::Files, &[], false, 1), "bind /l/0 ro rbind"),
            (stack(Kind::View, Content::Files, &[], false, 3), "overlay overlay xino=on lowerdir=/l/0:/l/1:/l/2"),
        ] {
            let lowers: Vec<PathBuf> = (0..stack.lowers.len()).map(|number| format!("/l/{number}").into()).collect();
            let mounts = mounts(&stack, &lowers, Kernel { index: true, xino: true });
            assert_eq!(written(&mounts), expected, "{:?} {:?}", stack.snapshot.kind, stack.snapshot.content);
        }
        let plain = mounts(&stack(Kind::Active, Content::Files, &[], true, 1), &["/l".into()], Kernel::default());
        assert_eq!(written(&plain), "overlay overlay workdir=/r/3/work upperdir=/r/3/upper lowerdir=/l");
    }

    #[test]
    fn long_options_are_noticed() {
        let lower = PathBuf::from("/var/lib/headstart/snapshots/123/upper");
        assert!(!are_long(100, &vec![lower.clone(); 90]));
        assert!(are_long(100, &vec![lower; 128]));
        assert!(!are_long(100, &vec![PathBuf::from("/run/headstart/f/123"); 128]));
    }
}
