//! Records that last, whatever the disk forgets; one who changes them, many who look.

use std::fs;
use std::io;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use redb::{BackendError, StorageBackend};
use tempfile::TempDir;

use super::*;
use crate::chain::{ChainError, Effect, Key, Labels, LayerId, PulledLayer, Usage};
use crate::model::{Algorithm, BlobDigest, DiffId, Digest};
use crate::store::StoreError;

fn key(text: &str) -> Key {
    Key::new(text).unwrap()
}

fn layer(name: &str) -> LayerId {
    let digest = Digest::of(Algorithm::Sha256, name.as_bytes());
    LayerId { diff_id: DiffId(digest), blob: BlobDigest(digest), anchor: "whole".to_owned() }
}

fn prepare(name: &str, parent: &str) -> Command {
    let labels: Labels = [("containerd.io/snapshot.ref".to_owned(), name.to_owned())].into();
    Command::Prepare { key: key(name), parent: Key::optional(parent).unwrap(), labels, layer: None }
}

fn commit(from: &str, name: &str, parent: &str) -> Command {
    let usage = Some(Usage { bytes: 4096, inodes: 2 });
    let parent = Key::optional(parent).unwrap();
    Command::Commit { key: key(from), name: key(name), parent, labels: Labels::new(), usage }
}

/// Something of everything.
fn commands() -> Vec<Command> {
    let pulled = |of: &str, name: &str| PulledLayer { id: layer(of), size: None, name: key(name) };
    vec![
        prepare("default/1/extract 1 sha256:c0", ""),
        prepare("default/2/extract 2 sha256:c1", ""),
        commit("default/1/extract 1 sha256:c0", "c0", ""),
        commit("default/2/extract 2 sha256:c1", "c1", "c0"),
        Command::Pull {
            image: "registry.example/image:tag".to_owned(),
            manifest: BlobDigest(Digest::of(Algorithm::Sha256, b"manifest")),
            layers: vec![pulled("l0", "d0"), pulled("l1", "d1")],
        },
        Command::View { key: key("look"), parent: Some(key("c1")), labels: Labels::new() },
        Command::LayerLocal { layer: layer("l1"), size: 77 },
        Command::Update { key: key("c0"), labels: [("x".to_owned(), "y".repeat(5000))].into(), fields: Vec::new() },
        Command::LayerLocal { layer: layer("l0"), size: 4096 },
        Command::Remove { key: key("look") },
        prepare("container", "d1"),
        Command::Forget { image: "registry.example/image:tag".to_owned() },
        Command::Remove { key: key("c1") },
    ]
}

const NOW: Timestamp = Timestamp { seconds: 1_800_000_000, nanos: 123_456_789 };

fn apply(records: &Records, command: &Command) -> Result<Change, RecordsError> {
    records.apply(command, NOW, |_| Ok(()))
}

fn said(chain: &Chain) -> String {
    format!("{chain:?}")
}

#[test]
fn what_was_commanded_is_there_after_opening_again() {
    let root = TempDir::new().unwrap();
    for command in commands() {
        let records = Records::open(root.path()).unwrap();
        apply(&records, &command).unwrap();
        let (now, written) = (records.read(said), said(&look(root.path()).unwrap()));
        assert_eq!(written, now, "after {command:?}");
        drop(records);
        assert_eq!(Records::open(root.path()).unwrap().read(said), now);
        assert_eq!(said(&look(root.path()).unwrap()), now);
    }
}

#[test]
fn a_root_without_records_has_no_snapshots_and_looking_makes_none() {
    let root = TempDir::new().unwrap();
    assert_eq!(look(root.path()).unwrap().walk().count(), 0);
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
}

#[test]
fn racing_makers_agree_on_one_file() {
    let root = TempDir::new().unwrap();
    let barrier = std::sync::Barrier::new(4);
    let opened = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    barrier.wait();
                    let opened = Records::open(root.path());
                    barrier.wait();
                    opened.map(drop)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(opened.iter().filter(|opened| opened.is_ok()).count(), 1, "{opened:?}");
    assert!(opened.iter().all(|opened| matches!(opened, Ok(()) | Err(RecordsError::InUse { .. }))), "{opened:?}");
    assert_eq!(fs::read_dir(root.path().join("state")).unwrap().count(), 1, "losers of the race left something");
}

#[test]
fn one_changes_and_many_look() {
    let root = TempDir::new().unwrap();
    let records = Records::open(root.path()).unwrap();
    assert!(matches!(Records::open(root.path()), Err(RecordsError::InUse { .. })));
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut count = 0;
                while count < 40 {
                    let seen = look(root.path()).unwrap().walk().count();
                    assert!(seen >= count, "{seen} snapshots after {count}");
                    count = seen;
                }
            });
        }
        for number in 0..40 {
            apply(&records, &prepare(&format!("s{number}"), "")).unwrap();
        }
    });
    assert!(matches!(Records::open(root.path()), Err(RecordsError::InUse { .. })));
}

#[test]
fn commands_of_many_threads_come_one_after_another() {
    let root = TempDir::new().unwrap();
    let records = Records::open(root.path()).unwrap();
    apply(&records, &prepare("active", "")).unwrap();
    let won = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for number in 0..4 {
            let (records, won) = (&records, &won);
            scope.spawn(move || {
                apply(records, &prepare(&format!("own {number}"), "")).unwrap();
                if apply(records, &commit("active", &format!("c{number}"), "")).is_ok() {
                    won.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    assert_eq!(won.into_inner(), 1, "commits of one snapshot");
    assert_eq!(records.read(|chain| chain.walk().count()), 5);
    let slots: std::collections::BTreeSet<_> =
        records.read(|chain| chain.walk().map(|snapshot| snapshot.slot).collect());
    assert_eq!(slots.len(), 5);
}

#[test]
fn what_cannot_be_made_is_not_recorded() {
    let root = TempDir::new().unwrap();
    let records = Records::open(root.path()).unwrap();
    let mut planned = Vec::new();
    let failed = records.apply(&prepare("a", ""), NOW, |change| {
        planned.clone_from(&change.effects);
        Err(RecordsError::Store(StoreError::io("make", "/x", io::Error::from_raw_os_error(libc::ENOSPC))))
    });
    assert!(matches!(failed, Err(RecordsError::Store(StoreError::Full { .. }))));
    assert!(matches!(&planned[..], [Effect::MakeFiles(_)]));
    assert_eq!(records.read(|chain| chain.walk().count()), 0);
    assert!(matches!(apply(&records, &commit("a", "b", "")), Err(RecordsError::Refused(ChainError::NotFound { .. }))));
    apply(&records, &prepare("a", "")).unwrap();
}

fn header(root: &Path, name: &str, value: &[u8]) {
    const HEADER: redb::TableDefinition<'_, &str, &[u8]> = redb::TableDefinition::new("header");
    let database = Database::create(path(root)).unwrap();
    let transaction = database.begin_write().unwrap();
    transaction.open_table(HEADER).unwrap().insert(name, value).unwrap();
    transaction.commit().unwrap();
}

#[test]
fn the_future_is_refused_and_what_is_compatible_is_not() {
    for (name, value, wanted) in [
        ("version", &7_u32.to_le_bytes()[..], Some("version 7")),
        ("incompatible", &6_u64.to_le_bytes(), Some("features 0x6")),
        ("compatible", &6_u64.to_le_bytes(), None),
        ("something new", b"?", None),
    ] {
        let root = TempDir::new().unwrap();
        let records = Records::open(root.path()).unwrap();
        apply(&records, &prepare("a", "")).unwrap();
        let found = records.read(said);
        drop(records);
        header(root.path(), name, value);
        for opened in [Records::open(root.path()).map(drop), look(root.path()).map(drop)] {
            match (opened, wanted) {
                (Ok(()), None) => {}
                (Err(RecordsError::Unsupported { needs, .. }), Some(wanted)) => assert_eq!(needs, wanted),
                (opened, _) => panic!("{name}: {opened:?}"),
            }
        }
        if wanted.is_some() {
            let good = if name == "version" { &1_u32.to_le_bytes()[..] } else { &0_u64.to_le_bytes() };
            header(root.path(), name, good);
        }
        assert_eq!(Records::open(root.path()).unwrap().read(said), found, "{name}");
    }
}

#[test]
fn what_is_not_ours_is_refused() {
    for (name, value, what) in [("magic", &b"OTHER"[..], "magic"), ("version", b"1", "version")] {
        let root = TempDir::new().unwrap();
        drop(Records::open(root.path()).unwrap());
        header(root.path(), name, value);
        let error = Records::open(root.path()).unwrap_err();
        assert!(matches!(&error, RecordsError::Damaged { what: said, .. } if said.contains(what)), "{error:?}");
    }
    const ANY: redb::TableDefinition<'_, u64, u64> = redb::TableDefinition::new("any");
    let root = TempDir::new().unwrap();
    fs::create_dir(root.path().join("state")).unwrap();
    let database = Database::create(path(root.path())).unwrap();
    let transaction = database.begin_write().unwrap();
    drop(transaction.open_table(ANY).unwrap());
    transaction.commit().unwrap();
    drop(database);
    assert!(matches!(Records::open(root.path()), Err(RecordsError::Damaged { .. })));
    for garbage in [&b""[..], b"x", b"headstart store 1\n", &[0; 8192], &[0xff; 70_000]] {
        fs::write(path(root.path()), garbage).unwrap();
        let opened = Records::open(root.path());
        assert!(matches!(opened, Err(RecordsError::Damaged { .. })), "{} bytes: {opened:?}", garbage.len());
    }
}

#[test]
fn records_that_are_no_records_are_damage() {
    const SNAPSHOTS: redb::TableDefinition<'_, &str, &[u8]> = redb::TableDefinition::new("snapshots");
    let root = TempDir::new().unwrap();
    let records = Records::open(root.path()).unwrap();
    for command in commands() {
        apply(&records, &command).unwrap();
    }
    drop(records);
    let spoil = |name: &str, value: Option<&[u8]>| {
        let database = Database::create(path(root.path())).unwrap();
        let transaction = database.begin_write().unwrap();
        let old = {
            let mut table = transaction.open_table(SNAPSHOTS).unwrap();
            let old = table.remove(name).unwrap().map(|old| old.value().to_vec());
            if let Some(value) = value {
                table.insert(name, value).unwrap();
            }
            old
        };
        transaction.commit().unwrap();
        old
    };
    let good = spoil("c0", Some(b"{")).unwrap();
    assert!(matches!(Records::open(root.path()), Err(RecordsError::Damaged { what, .. }) if what.contains("c0")));
    spoil("c0", Some(&good));
    let other = spoil("d0", Some(&good)).unwrap();
    assert!(matches!(Records::open(root.path()), Err(RecordsError::Damaged { what, .. }) if what.contains("another")));
    spoil("d0", None);
    assert!(matches!(Records::open(root.path()), Err(RecordsError::Contradiction { .. })));
    spoil("d0", Some(&other));
    drop(Records::open(root.path()).unwrap());
}

/// What reached a disk.
#[derive(Debug, Clone)]
enum Op {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Sync,
}

impl Op {
    fn apply(&self, file: &mut Vec<u8>) {
        match self {
            Self::Write(offset, data) => {
                let start = usize::try_from(*offset).unwrap();
                let end = start + data.len();
                if file.len() < end {
                    file.resize(end, 0);
                }
                file[start..end].copy_from_slice(data);
            }
            Self::SetLen(len) => file.resize(usize::try_from(*len).unwrap(), 0),
            Self::Sync => {}
        }
    }
}

/// A disk that writes down all that happens to it, and fails from a given moment on.
#[derive(Debug, Default)]
struct Platter {
    file: Vec<u8>,
    ops: Vec<Op>,
    fail_after: Option<usize>,
}

impl Platter {
    fn happen(&mut self, op: Op) -> io::Result<()> {
        if self.fail_after.is_some_and(|after| self.ops.len() >= after) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        op.apply(&mut self.file);
        self.ops.push(op);
        Ok(())
    }
}

#[derive(Debug, Clone, Default)]
struct Disk(Arc<Mutex<Platter>>);

impl Disk {
    fn holding(file: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(Platter { file, ..Platter::default() })))
    }

    /// With a file as it is when it appears under its name.
    fn fresh() -> Self {
        let disk = Self::default();
        tables::prepare(&builder().create_with_backend(disk.clone()).unwrap()).unwrap();
        Self::holding(disk.file())
    }

    fn file(&self) -> Vec<u8> {
        self.0.lock().unwrap().file.clone()
    }

    fn ops(&self) -> usize {
        self.0.lock().unwrap().ops.len()
    }

    fn records(&self) -> Result<Records, RecordsError> {
        let disk = self.clone();
        Records::open_with("/disk".into(), Box::new(move || builder().create_with_backend(disk.clone())))
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().unwrap().file.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let start = usize::try_from(offset).unwrap();
        let platter = self.0.lock().unwrap();
        let found = platter.file.get(start..start + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(found);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.lock().unwrap().happen(Op::SetLen(len))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.lock().unwrap().happen(Op::Sync)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap().happen(Op::Write(offset, data.to_vec()))
    }

    // Nobody else has this disk.
    fn try_lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn try_lock_shared_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }

    fn lock_shared_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }

    fn unlock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<(), BackendError> {
        Ok(())
    }

    fn query_lock_range(&self, _: Bound<u64>, _: Bound<u64>) -> Result<bool, BackendError> {
        Ok(false)
    }
}

/// What a crash leaves of that which was not synced.
#[derive(Debug, Clone, Copy)]
enum Left {
    Nothing,
    Everything,
    /// In order up to one write, of which the first half got through.
    Torn(usize),
    /// Each write by the bits of a number: disks do not keep an order.
    Some(u64),
}

fn after_crash(fresh: &[u8], ops: &[Op], left: Left) -> Vec<u8> {
    let synced = ops.iter().rposition(|op| matches!(op, Op::Sync)).map_or(0, |at| at + 1);
    let (safe, open) = ops.split_at(synced);
    let mut file = fresh.to_vec();
    safe.iter().for_each(|op| op.apply(&mut file));
    for (index, op) in open.iter().enumerate() {
        match (left, op) {
            (Left::Nothing, _) => {}
            (Left::Everything, op) => op.apply(&mut file),
            (Left::Torn(at), op) if index < at => op.apply(&mut file),
            (Left::Torn(at), Op::Write(offset, data)) if index == at => {
                Op::Write(*offset, data[..data.len() / 2].to_vec()).apply(&mut file);
            }
            (Left::Torn(_), _) => {}
            (Left::Some(bits), op) => {
                if bits >> (index % 64) & 1 == 1 {
                    op.apply(&mut file);
                }
            }
        }
    }
    file
}

#[test]
fn a_crash_at_any_moment_loses_nothing_that_was_answered() {
    let disk = Disk::fresh();
    let fresh = disk.file();
    let records = disk.records().unwrap();
    // How much had happened when a command was answered, and what was true then.
    let mut answered = vec![(0, said(&Chain::default()))];
    for command in commands() {
        apply(&records, &command).unwrap();
        answered.push((disk.ops(), records.read(said)));
    }
    drop(records);
    let ops = std::mem::take(&mut disk.0.lock().unwrap().ops);
    let mut crashes = 0;
    for at in 0..=ops.len() {
        let before = &ops[..at];
        let open = before.iter().rev().take_while(|op| !matches!(op, Op::Sync)).count();
        let lottery = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(at as u64 + 1);
        let mut kinds = vec![Left::Nothing, Left::Everything, Left::Some(lottery), Left::Some(!lottery)];
        kinds.extend(open.checked_sub(1).map(Left::Torn));
        let last = answered.iter().rposition(|(ops, _)| *ops <= at).unwrap();
        for left in kinds {
            let records = Disk::holding(after_crash(&fresh, before, left)).records();
            let records = records.unwrap_or_else(|error| panic!("crash at {at} with {left:?}: {error:?}"));
            let found = records.read(said);
            let allowed = &answered[last..answered.len().min(last + 2)];
            assert!(
                allowed.iter().any(|(_, said)| *said == found),
                "crash at {at} of {} with {left:?}: after command {last} there is {found}",
                ops.len()
            );
            // Life goes on.
            apply(&records, &prepare("after the crash", "")).unwrap();
            crashes += 1;
        }
    }
    assert!(crashes > 4 * commands().len(), "{crashes} crashes are too few to mean anything");
}

#[test]
fn a_disk_that_fails_costs_the_command_and_no_more() {
    let empty = Disk::fresh().file();
    for after in 0.. {
        let disk = Disk::holding(empty.clone());
        let records = disk.records().unwrap();
        let begin = disk.ops();
        disk.0.lock().unwrap().fail_after = Some(begin + after);
        let done = apply(&records, &prepare("a", ""));
        if done.is_ok() {
            assert!(after > 1, "the disk was never needed");
            break;
        }
        assert!(matches!(done, Err(RecordsError::Store(StoreError::Full { .. }))), "{done:?}");
        // Still full: still an error, and what was true is.
        assert!(apply(&records, &prepare("b", "")).is_err());
        disk.0.lock().unwrap().fail_after = None;
        apply(&records, &prepare("c", "")).unwrap();
        let found = records.read(said);
        assert!(records.read(|chain| chain.stat("c").is_ok() && chain.stat("b").is_err()));
        drop(records);
        assert_eq!(disk.records().unwrap().read(said), found);
    }
}

#[test]
fn altered_bytes_are_refused_or_mean_nothing() {
    let disk = Disk::fresh();
    let records = disk.records().unwrap();
    for command in commands() {
        apply(&records, &command).unwrap();
    }
    let found = records.read(said);
    drop(records);
    let file = disk.file();
    let written: Vec<usize> = (0..file.len()).filter(|at| file[*at] != 0).collect();
    let (mut refused, mut harmless) = (0, 0);
    for at in written.iter().step_by(written.len() / 150) {
        let mut file = file.clone();
        file[*at] ^= 0x10;
        match Disk::holding(file).records() {
            Ok(records) => {
                assert_eq!(records.read(said), found, "byte {at} was altered");
                harmless += 1;
            }
            Err(RecordsError::Damaged { .. } | RecordsError::Unsupported { .. }) => refused += 1,
            Err(other) => panic!("byte {at}: {other:?}"),
        }
    }
    assert!(refused > 0 && harmless > 0, "{refused} refused, {harmless} harmless");
}
