//! What is below the snapshots of user namespaces, under the ids of each: the lower directories of their overlays.
//!
//! ```text
//! <run>/m/<number>/<n>    the n-th directory below the snapshot of this number, its ids mapped by the kernel
//! ```
//!
//! containerd 2 maps lower directories itself if it finds the ids among the options of a mount. It is not told: it maps the
//! directory that all of them have in common, with every mount in it, and does not take away what it mounted so; 1.7 does
//! not map at all.
//!
//! A mount here is needed until the container's overlay is made, which takes over what it was given. Nobody says when that
//! is, so it is there until its snapshot is removed or committed, or the daemon ends; who asks for the mounts of a snapshot
//! after that gets new ones. Waits for the kernel.

use std::collections::HashMap;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context as _;

use crate::chain::{Labels, SnapshotSlot};
use crate::sys::idmap::{IdMap, IdRange, is_mount_point};
use crate::sys::mount::{Unmount, unmount};

/// The user and group ids of the container's user namespace: `container:host:length`, several with commas.
pub(super) const UID_MAPPING: &str = "containerd.io/snapshot/uidmapping";
pub(super) const GID_MAPPING: &str = "containerd.io/snapshot/gidmapping";

/// The ids of a user namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ids {
    users: Vec<IdRange>,
    groups: Vec<IdRange>,
    /// The user and the group of this machine that are the namespace's root.
    pub(super) root: (u32, u32),
}

/// A label with a value that makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BadLabel {
    pub(super) label: &'static str,
    pub(super) why: &'static str,
}

impl Ids {
    /// What labels ask for, if they do.
    pub(super) fn asked(labels: &Labels) -> Result<Option<Self>, BadLabel> {
        let said = |label| labels.get(label).map(|value| ranges(value).map_err(|why| BadLabel { label, why }));
        let missing = |label| BadLabel { label, why: "it is missing, and the one for the others is there" };
        match (said(UID_MAPPING).transpose()?, said(GID_MAPPING).transpose()?) {
            (None, None) => Ok(None),
            (None, Some(_)) => Err(missing(UID_MAPPING)),
            (Some(_), None) => Err(missing(GID_MAPPING)),
            (Some((users, user)), Some((groups, group))) => Ok(Some(Self { users, groups, root: (user, group) })),
        }
    }
}

/// The ranges of a mapping, and what root becomes.
fn ranges(mapping: &str) -> Result<(Vec<IdRange>, u32), &'static str> {
    const FORM: &str = "it is not written as CONTAINER:HOST:LENGTH, with commas between several";
    let mut ranges = Vec::new();
    for part in mapping.split(',') {
        let numbers: Vec<u32> = part.split(':').map(str::parse).collect::<Result<_, _>>().map_err(|_| FORM)?;
        let [from, to, length] = numbers[..] else { return Err(FORM) };
        if length == 0 || from.checked_add(length).is_none() || to.checked_add(length).is_none() {
            return Err("it maps ids that do not exist");
        }
        ranges.push(IdRange { from, to, length });
    }
    let root = ranges.iter().find(|range| range.from == 0).ok_or("it does not map the container's root")?.to;
    Ok((ranges, root))
}

/// Held over the mounting and the unmounting of one snapshot.
type Place = Arc<Mutex<()>>;

/// See the top of this file.
#[derive(Debug)]
pub(super) struct Mapped {
    directory: PathBuf,
    /// Snapshots that have something here. Never locked over a system call.
    places: Mutex<HashMap<SnapshotSlot, Place>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mapped {
    /// In `directory`. What a process before this one left there is taken away.
    pub(super) fn new(directory: PathBuf) -> Self {
        let mapped = Self { directory, places: Mutex::default() };
        mapped.clear();
        mapped
    }

    /// `lowers` under other ids, in the same order, for the snapshot `slot`. With `is_new`, what is there was another's.
    pub(super) fn show(
        &self,
        slot: SnapshotSlot,
        ids: &Ids,
        lowers: &[PathBuf],
        is_new: bool,
    ) -> anyhow::Result<Vec<PathBuf>> {
        let busy = Arc::clone(lock(&self.places).entry(slot).or_default());
        let _busy = lock(&busy);
        let place = self.place(slot);
        if is_new {
            clear(&place);
        }
        let shown: Vec<PathBuf> = (0..lowers.len()).map(|number| place.join(number.to_string())).collect();
        let made = make(ids, lowers, &shown);
        if made.is_err() {
            clear(&place);
        }
        made.map(|()| shown)
    }

    /// The snapshot needs nothing any more.
    pub(super) fn forget(&self, slot: SnapshotSlot) {
        let Some(busy) = lock(&self.places).remove(&slot) else { return };
        let _busy = lock(&busy);
        clear(&self.place(slot));
    }

    fn place(&self, slot: SnapshotSlot) -> PathBuf {
        self.directory.join(slot.to_string())
    }

    fn clear(&self) {
        for entry in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            clear(&entry.path());
        }
        remove(&self.directory);
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        self.clear();
    }
}

fn make(ids: &Ids, lowers: &[PathBuf], shown: &[PathBuf]) -> anyhow::Result<()> {
    let mut missing = Vec::new();
    for (lower, target) in lowers.iter().zip(shown) {
        if !is_mount_point(target).with_context(|| format!("cannot look at {}", target.display()))? {
            missing.push((lower, target));
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let map = IdMap::new(&ids.users, &ids.groups);
    let map = map.with_context(|| format!("cannot make a user namespace with the ids {ids:?}"))?;
    for (lower, target) in missing {
        let created = DirBuilder::new().recursive(true).mode(0o700).create(target);
        created.with_context(|| format!("cannot create {}", target.display()))?;
        map.mount(lower, target)?;
    }
    Ok(())
}

/// Takes away what is mounted in `place`, and the directories.
fn clear(place: &Path) {
    for entry in fs::read_dir(place).into_iter().flatten().flatten() {
        let path = entry.path();
        while is_mount_point(&path).is_ok_and(|is_mounted| is_mounted) {
            if let Err(error) = unmount(&path, Unmount::Lazy) {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(error, "a directory under other ids stays behind");
                break;
            }
        }
        remove(&path);
    }
    remove(place);
}

fn remove(directory: &Path) {
    match fs::remove_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %directory.display(), %error, "a directory for other ids stays behind");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, chown};

    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn mappings_are_read() {
        for (mapping, expected) in [
            ("0:100000:65536", Some((1, 100_000))),
            ("0:1000:1,1:100000:65535", Some((2, 1000))),
            ("1:100000:65535,0:7:1", Some((2, 7))),
            ("1:100000:65535", None),
            ("0:1000", None),
            ("0:1000:0", None),
            ("0:4294967295:2", None),
            ("0:-1:5", None),
            ("0:1000:1,upperdir=/etc", None),
            ("", None),
        ] {
            let found = ranges(mapping).ok().map(|(ranges, root)| (ranges.len(), root));
            assert_eq!(found, expected, "{mapping:?}");
        }
        let asked = |pairs: &[(&str, &str)]| Ids::asked(&labels(pairs)).map(|ids| ids.map(|ids| ids.root));
        assert_eq!(asked(&[("x", "0:1:1")]), Ok(None));
        assert_eq!(asked(&[(UID_MAPPING, "0:1:1"), (GID_MAPPING, "0:2:1")]), Ok(Some((1, 2))));
        for (label, pairs) in [
            (GID_MAPPING, &[(UID_MAPPING, "0:1:1")][..]),
            (UID_MAPPING, &[(GID_MAPPING, "0:1:1")]),
            (GID_MAPPING, &[(UID_MAPPING, "0:1:1"), (GID_MAPPING, "5:1:1")]),
        ] {
            assert_eq!(asked(pairs).unwrap_err().label, label, "{pairs:?}");
        }
    }

    #[test]
    fn each_snapshot_has_its_own_ids_until_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let lowers = ["a", "b"].map(|name| dir.path().join(name));
        for lower in &lowers {
            fs::create_dir(lower).unwrap();
            fs::write(lower.join("file"), "").unwrap();
            chown(lower.join("file"), Some(3), Some(4)).unwrap();
        }
        let ids = |user: u32| {
            let (user, group) = (format!("0:{user}:10"), format!("0:{}:10", user + 1));
            Ids::asked(&labels(&[(UID_MAPPING, &user), (GID_MAPPING, &group)])).unwrap().unwrap()
        };
        let owner = |shown: &Path| fs::metadata(shown.join("file")).map(|found| (found.uid(), found.gid())).unwrap();
        let run = dir.path().join("m");
        let mapped = Mapped::new(run.clone());
        let (one, two) = (SnapshotSlot(1), SnapshotSlot(2));
        let shown = mapped.show(one, &ids(100), &lowers, true).unwrap();
        assert_eq!(shown, [run.join("1/0"), run.join("1/1")]);
        assert_eq!(shown.iter().map(|shown| owner(shown)).collect::<Vec<_>>(), [(103, 105), (103, 105)]);
        let other = mapped.show(two, &ids(200), &lowers[1..], true).unwrap();
        assert_eq!((owner(&other[0]), owner(&shown[0])), ((203, 205), (103, 105)));
        // Asked again, what is there stays; for a new snapshot of the number it does not.
        mapped.show(one, &ids(300), &lowers, false).unwrap();
        assert_eq!(owner(&shown[0]), (103, 105));
        mapped.show(one, &ids(300), &lowers, true).unwrap();
        assert_eq!(owner(&shown[0]), (303, 305));
        mapped.forget(one);
        mapped.forget(one);
        assert!(!run.join("1").exists() && run.join("2/0/file").exists());
        // A directory that cannot be mapped leaves none of the others.
        let refused = mapped.show(one, &ids(100), &[lowers[0].clone(), "/proc".into()], true);
        assert!(format!("{:#}", refused.unwrap_err()).contains("/proc"));
        assert!(!run.join("1").exists());
        // What a process that was killed left is taken away by the next.
        std::mem::forget(mapped);
        drop(Mapped::new(run.clone()));
        assert!(!run.exists());
        assert_eq!(owner(&lowers[0]), (3, 4));
    }
}
