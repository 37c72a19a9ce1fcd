//! Marks that never lie, whoever dies when; damage that is absence; several owners of one root.

mod punch;

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write as _};
use std::sync::Mutex;

use proptest::prelude::*;
use tempfile::TempDir;

use super::disk::Disk;
use super::*;
use crate::model::{Algorithm, DiffId, IndexDigest};

const CHUNK: usize = 5000;
const CHUNKS: u32 = 9;

fn digest(of: &[u8]) -> Digest {
    Digest::of(Algorithm::Sha256, of)
}

fn spec() -> BlobSpec {
    BlobSpec {
        blob: BlobDigest(digest(b"blob")),
        anchor: Anchor::ImageSpec(IndexDigest(digest(b"index"))),
        image_size: u64::from(CHUNKS) * CHUNK as u64,
        chunks: CHUNKS,
    }
}

/// Never syncs by itself, is at boot `boot`.
fn store_at(root: &TempDir, boot: u8) -> Store {
    let sync_interval = Duration::from_secs(3600);
    Store::open_with(
        root.path(),
        StoreConfig {
            sync_interval,
            sync_bytes: u64::MAX,
            boot: Some(BootId::invented(boot)),
            ..StoreConfig::default()
        },
    )
    .unwrap()
}

fn content(chunk: u32) -> Vec<u8> {
    (1..=251).map(|i: u8| i.wrapping_mul(7) ^ chunk.to_le_bytes()[0]).cycle().take(CHUNK).collect()
}

fn write(file: &Arc<BlobFile>, chunk: u32) {
    file.write_chunk(chunk, u64::from(chunk) * CHUNK as u64, &content(chunk)).unwrap();
}

fn present(file: &BlobFile) -> Vec<u32> {
    (0..CHUNKS).filter(|chunk| file.is_present(*chunk)).collect()
}

fn assert_present(file: &BlobFile, chunks: &[u32]) {
    assert_eq!(present(file), chunks);
    for chunk in chunks {
        let mut buf = vec![0; CHUNK];
        file.read_exact_at(u64::from(*chunk) * CHUNK as u64, &mut buf).unwrap();
        assert!(buf == content(*chunk), "chunk {chunk} reads other bytes");
    }
}

/// Ends a store as SIGKILL does: nothing is flushed, no destructor runs, the kernel gives the locks back. (Leaked here;
/// nobody waits for these locks.)
fn kill(store: Store, file: Arc<BlobFile>) {
    std::mem::forget((store, file));
}

#[test]
fn a_killed_process_loses_nothing() {
    let root = TempDir::new().unwrap();
    let store = store_at(&root, 1);
    let file = store.blob(&spec(), b"index").unwrap();
    write(&file, 2);
    write(&file, 8);
    kill(store, file);
    let store = store_at(&root, 1);
    assert_present(&store.blob(&spec(), b"index").unwrap(), &[2, 8]);
}

#[test]
fn what_a_killed_process_left_unsynced_is_synced_by_the_next() {
    let root = TempDir::new().unwrap();
    let store = store_at(&root, 1);
    let file = store.blob(&spec(), b"index").unwrap();
    write(&file, 4);
    kill(store, file);
    let store = store_at(&root, 1);
    drop(store.existing(&spec().blob, spec().anchor).unwrap());
    drop(store);
    assert_present(&store_at(&root, 2).blob(&spec(), b"index").unwrap(), &[4]);
}

#[test]
fn another_boot_sees_what_was_synced() {
    let root = TempDir::new().unwrap();
    let store = store_at(&root, 1);
    let file = store.blob(&spec(), b"index").unwrap();
    write(&file, 0);
    write(&file, 3);
    file.sync().unwrap();
    write(&file, 5);
    kill(store, file);
    let store = store_at(&root, 2);
    let file = store.blob(&spec(), b"index").unwrap();
    assert_present(&file, &[0, 3]);
    drop((file, store));
    assert_present(&store_at(&root, 1).blob(&spec(), b"index").unwrap(), &[0, 3]);
}

#[test]
fn closing_makes_everything_last() {
    let root = TempDir::new().unwrap();
    let store = store_at(&root, 1);
    let file = store.blob(&spec(), b"index").unwrap();
    write(&file, 7);
    drop(file);
    drop(store);
    assert_present(&store_at(&root, 2).blob(&spec(), b"index").unwrap(), &[7]);

    let store = store_at(&root, 2);
    let file = store.blob(&spec(), b"index").unwrap();
    write(&file, 1);
    drop(store);
    drop(file);
    assert_present(&store_at(&root, 3).blob(&spec(), b"index").unwrap(), &[1, 7]);
}

#[test]
fn many_bytes_are_synced_before_their_time() {
    let root = TempDir::new().unwrap();
    let config = StoreConfig {
        sync_interval: Duration::from_secs(3600),
        sync_bytes: 2 * CHUNK as u64,
        boot: Some(BootId::invented(1)),
        ..StoreConfig::default()
    };
    let store = Store::open_with(root.path(), config).unwrap();
    let file = store.blob(&spec(), b"index").unwrap();
    write(&file, 0);
    assert!(file.has_unsynced_marks().unwrap());
    write(&file, 1);
    let deadline = std::time::Instant::now() + Duration::from_secs(20);
    while file.has_unsynced_marks().unwrap() {
        assert!(std::time::Instant::now() < deadline, "nobody synced");
        std::thread::yield_now();
    }
}

#[test]
fn two_stores_of_one_root_see_each_others_chunks_at_once() {
    let root = TempDir::new().unwrap();
    let (one, two) = (store_at(&root, 1), store_at(&root, 1));
    let (a, b) = (one.blob(&spec(), b"index").unwrap(), two.blob(&spec(), b"index").unwrap());
    write(&a, 1);
    assert_present(&b, &[1]);
    write(&b, 6);
    assert_present(&a, &[1, 6]);
    a.sync().unwrap();
    a.forget_all().unwrap();
    assert_present(&b, &[]);
}

#[test]
fn racing_creators_agree_on_one_image() {
    let root = TempDir::new().unwrap();
    let barrier = std::sync::Barrier::new(8);
    std::thread::scope(|scope| {
        for chunk in 0..8 {
            let (root, barrier) = (&root, &barrier);
            scope.spawn(move || {
                let store = store_at(root, 1);
                barrier.wait();
                let file = store.blob(&spec(), b"index").unwrap();
                write(&file, chunk);
                barrier.wait();
                assert_present(&file, &[0, 1, 2, 3, 4, 5, 6, 7]);
            });
        }
    });
    assert_eq!(fs::read_dir(root.path().join("tmp")).unwrap().count(), 0, "losers of the race left something");
}

#[test]
fn damage_counts_as_absence() {
    type Damage = fn(&Path);
    let cases: [(&str, Damage, &[u32]); 11] = [
        ("present cut", |dir| fs::write(dir.join("present"), b"HSPRESNT").unwrap(), &[]),
        ("present flipped", |dir| flip(&dir.join("present"), 64), &[]),
        ("present gone", |dir| fs::remove_file(dir.join("present")).unwrap(), &[]),
        ("live cut", |dir| fs::write(dir.join("live"), b"HS").unwrap(), &[2, 5]),
        ("live flipped", |dir| flip(&dir.join("live"), 33), &[2, 5]),
        ("meta empty", |dir| fs::write(dir.join("meta.json"), b"").unwrap(), &[]),
        ("meta of another", |dir| flip(&dir.join("meta.json"), 80), &[]),
        ("meta gone", |dir| fs::remove_file(dir.join("meta.json")).unwrap(), &[]),
        (
            "image cut",
            |dir| fs::OpenOptions::new().write(true).open(dir.join("image")).unwrap().set_len(9).unwrap(),
            &[],
        ),
        ("image gone", |dir| fs::remove_file(dir.join("image")).unwrap(), &[]),
        ("lock gone", |dir| fs::remove_file(dir.join("lock")).unwrap(), &[]),
    ];
    for (name, damage, left) in cases {
        let root = TempDir::new().unwrap();
        let store = store_at(&root, 1);
        let file = store.blob(&spec(), b"index").unwrap();
        write(&file, 2);
        write(&file, 5);
        drop(file);
        drop(store);
        let store = store_at(&root, 2);
        damage(&store.place(&spec().blob, spec().anchor));
        let file = store.blob(&spec(), b"index").unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(present(&file), left, "{name}");
        write(&file, 8);
        assert_present(&file, &[left, &[8]].concat());
    }
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn the_future_is_refused() {
    let cases: [(&str, &str, &[u8], usize); 3] =
        [("present", "version 7", &[7], 8), ("present", "features 0x1", &[1], 12), ("live", "features 0x1", &[1], 12)];
    for (name, needs, bytes, at) in cases {
        let root = TempDir::new().unwrap();
        let store = store_at(&root, 1);
        let file = store.blob(&spec(), b"index").unwrap();
        write(&file, 2);
        file.sync().unwrap();
        let path = store.place(&spec().blob, spec().anchor).join(name);
        drop(file);
        if name == "present" {
            fs::remove_file(path.with_file_name("live")).unwrap();
        }
        let mut content = fs::read(&path).unwrap();
        content[at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(&path, content).unwrap();
        assert!(
            matches!(store.blob(&spec(), b"index"), Err(StoreError::Unsupported { needs: said, .. }) if said == needs),
            "{name} with {needs} was used"
        );
    }
    let root = TempDir::new().unwrap();
    fs::write(root.path().join("format"), "headstart store 2\n").unwrap();
    assert!(matches!(Store::open(root.path()), Err(StoreError::Unsupported { .. })));
}

#[test]
fn what_is_damaged_and_in_use_is_left_alone() {
    let root = TempDir::new().unwrap();
    let (one, two) = (store_at(&root, 1), store_at(&root, 1));
    let file = one.blob(&spec(), b"index").unwrap();
    write(&file, 3);
    fs::write(one.place(&spec().blob, spec().anchor).join("meta.json"), b"").unwrap();
    assert!(matches!(two.blob(&spec(), b"index"), Err(StoreError::DamagedInUse { .. })));
    assert_present(&file, &[3]);
}

#[test]
fn images_of_other_anchors_share_nothing() {
    let root = TempDir::new().unwrap();
    let store = store_at(&root, 1);
    let file = store.blob(&spec(), b"index").unwrap();
    write(&file, 3);
    let other = BlobSpec { anchor: Anchor::ImageSpec(IndexDigest(digest(b"another"))), ..spec() };
    assert_present(&store.blob(&other, b"another").unwrap(), &[]);
    let other = BlobSpec { anchor: Anchor::Pr12703(IndexDigest(digest(b"index"))), ..spec() };
    assert_present(&store.blob(&other, b"index").unwrap(), &[]);
    assert!(store.existing(&spec().blob, Anchor::Whole).unwrap().is_none());
}

#[test]
fn the_index_is_kept_and_distrusted() {
    let root = TempDir::new().unwrap();
    let store = store_at(&root, 1);
    assert_eq!(store.index(&spec().blob, spec().anchor).unwrap(), None);
    drop(store.blob(&spec(), b"index").unwrap());
    assert_eq!(store.index(&spec().blob, spec().anchor).unwrap().as_deref(), Some(&b"index"[..]));
    flip(&store.place(&spec().blob, spec().anchor).join("index"), 0);
    assert_eq!(store.index(&spec().blob, spec().anchor).unwrap(), None);
    drop(store.blob(&spec(), b"index").unwrap());
    assert_eq!(store.index(&spec().blob, spec().anchor).unwrap().as_deref(), Some(&b"index"[..]));
}

#[test]
fn verdicts_last_as_long_as_their_reason() {
    let root = TempDir::new().unwrap();
    let found = DiffId(digest(b"image"));
    let store = store_at(&root, 1);
    let file = store.blob(&spec(), b"index").unwrap();
    (0..CHUNKS).for_each(|chunk| write(&file, chunk));
    assert_eq!(file.verdict(), Verdict::Unverified);
    file.set_verdict(Verdict::Verified(found)).unwrap();
    kill(store, file);
    let store = store_at(&root, 2);
    let file = store.blob(&spec(), b"index").unwrap();
    assert_eq!((file.verdict(), file.is_complete()), (Verdict::Verified(found), true));

    file.set_verdict(Verdict::Quarantined(found)).unwrap();
    assert_present(&file, &[]);
    drop(file);
    let file = store.blob(&spec(), b"index").unwrap();
    assert_eq!(file.verdict(), Verdict::Quarantined(found));
    (0..CHUNKS).for_each(|chunk| write(&file, chunk));
    file.set_verdict(Verdict::Verified(found)).unwrap();
    let marks = file.dir().join("present");
    drop(file);
    drop(store);
    fs::remove_file(marks).unwrap();
    assert_eq!(store_at(&root, 3).blob(&spec(), b"index").unwrap().verdict(), Verdict::Unverified);
}

#[test]
fn nothing_outside_of_the_image_is_read_or_written() {
    let root = TempDir::new().unwrap();
    let store = store_at(&root, 1);
    let file = store.blob(&spec(), b"index").unwrap();
    let size = spec().image_size;
    for (offset, len) in [(size, 1), (size - 1, 2), (u64::MAX, 1), (u64::MAX - 1, 4)] {
        assert!(matches!(file.read_exact_at(offset, &mut vec![0; len]), Err(StoreError::OutOfBounds { .. })));
        assert!(matches!(file.write_chunk(0, offset, &vec![0; len]), Err(StoreError::OutOfBounds { .. })));
    }
    assert!(matches!(file.write_chunk(CHUNKS, 0, b"x"), Err(StoreError::OutOfBounds { .. })));
    assert!(!file.is_present(CHUNKS) && !file.is_present(u32::MAX));
    assert_present(&file, &[]);
    file.read_exact_at(size, &mut []).unwrap();
}

#[test]
fn an_image_without_chunks_is_complete() {
    let root = TempDir::new().unwrap();
    let store = store_at(&root, 1);
    let empty = BlobSpec { image_size: 0, chunks: 0, ..spec() };
    let file = store.blob(&empty, b"index").unwrap();
    assert!(file.is_complete());
    file.sync().unwrap();
}

#[test]
fn a_whole_image_appears_at_once_and_keeps_its_holes() {
    let root = TempDir::new().unwrap();
    let store = store_at(&root, 1);
    let blob = spec().blob;
    let mut image = vec![0_u8; 3 << 20];
    image[..100].fill(1);
    image[(1 << 20) + 5..(1 << 20) + 5000].fill(2);
    let size = image.len() - 77;
    image.truncate(size);
    let mut writer = store.write_whole(&blob).unwrap();
    for piece in image.chunks(70_001) {
        writer.write_all(piece).unwrap();
    }
    assert!(store.existing(&blob, Anchor::Whole).unwrap().is_none());
    let found = DiffId(digest(&image));
    let file = store.keep_whole(&writer, found).unwrap();
    assert_eq!(
        (file.spec().image_size, file.verdict(), file.is_complete()),
        (size as u64, Verdict::Verified(found), true)
    );
    let mut buf = vec![9; size];
    file.read_exact_at(0, &mut buf).unwrap();
    assert!(buf == image);
    let blocks = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(file.dir().join("image")).unwrap());
    assert!(blocks * 512 < 100_000, "{blocks} blocks for two small runs of data");

    drop(store.write_whole(&blob).unwrap());
    let mut second = store.write_whole(&blob).unwrap();
    second.write_all(b"the same blob again").unwrap();
    assert_eq!(store.keep_whole(&second, found).unwrap().spec().image_size, size as u64);
    drop((writer, second));
    assert_eq!(fs::read_dir(root.path().join("tmp")).unwrap().count(), 0);
}

#[test]
fn a_whole_image_whose_marks_are_damaged_is_replaced() {
    let root = TempDir::new().unwrap();
    let blob = spec().blob;
    let write = |store: &Store, bytes: &[u8]| {
        let mut writer = store.write_whole(&blob).unwrap();
        writer.write_all(bytes).unwrap();
        store.keep_whole(&writer, DiffId(digest(bytes))).unwrap()
    };
    let store = store_at(&root, 1);
    drop(write(&store, b"first"));
    flip(&store.place(&blob, Anchor::Whole).join("present"), 64);
    drop(store);
    let store = store_at(&root, 2);
    assert_eq!(store.existing(&blob, Anchor::Whole).unwrap().unwrap().verdict(), Verdict::Unverified);
    let file = write(&store, b"second");
    let mut buf = [0; 6];
    file.read_exact_at(0, &mut buf).unwrap();
    assert_eq!((&buf, file.verdict()), (b"second", Verdict::Verified(DiffId(digest(b"second")))));
}

#[test]
fn documents_are_kept_by_what_they_are() {
    let root = TempDir::new().unwrap();
    let store = store_at(&root, 1);
    let manifest = BlobDigest(digest(b"{}"));
    assert_eq!(store.document(&manifest).unwrap(), None);
    assert!(!store.keep_document(&manifest, b"[]").unwrap(), "another document was kept under this digest");
    assert!(store.keep_document(&manifest, b"{}").unwrap());
    assert_eq!(store.document(&manifest).unwrap().as_deref(), Some(&b"{}"[..]));
    flip(&root.path().join("documents/sha256").join(manifest.0.hex()), 0);
    assert_eq!(store.document(&manifest).unwrap(), None);

    let name = "registry.example/some/image:tag";
    assert_eq!(store.reference(name).unwrap(), None);
    store.keep_reference(name, &manifest).unwrap();
    assert_eq!(store.reference(name).unwrap().unwrap().manifest, manifest);
    assert_eq!(store.reference("registry.example/some/image").unwrap(), None);
}

#[test]
fn what_dead_processes_left_is_removed_and_what_living_ones_make_is_not() {
    let root = TempDir::new().unwrap();
    let store = store_at(&root, 1);
    let writer = store.write_whole(&spec().blob).unwrap();
    let tmp = root.path().join("tmp");
    for name in ["dead", "dead and locked once", "young"] {
        fs::create_dir(tmp.join(name)).unwrap();
        fs::write(tmp.join(name).join("image"), b"half").unwrap();
    }
    fs::write(tmp.join("dead and locked once/lock"), b"").unwrap();
    let long_ago = SystemTime::now() - 2 * LEFT_OVER_AGE;
    for entry in fs::read_dir(&tmp).unwrap() {
        let path = entry.unwrap().path();
        if !path.ends_with("young") {
            fs::File::open(&path).unwrap().set_modified(long_ago).unwrap();
        }
    }
    drop(store_at(&root, 1));
    let left: Vec<PathBuf> = fs::read_dir(&tmp).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
    assert!(left.contains(&tmp.join("young")));
    store.keep_whole(&writer, DiffId(digest(b""))).unwrap();
}

/// Bytes by offset.
type Writes = BTreeMap<u64, Vec<u8>>;

/// A disk whose page cache and platter are two things.
#[derive(Debug, Default)]
struct Forgetful {
    cached: Mutex<Writes>,
    lasting: Mutex<Writes>,
    fail_sync: std::sync::atomic::AtomicBool,
}

impl Disk for Arc<Forgetful> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (cached, lasting) = (self.cached.lock().unwrap(), self.lasting.lock().unwrap());
        match cached.get(&offset).or_else(|| lasting.get(&offset)) {
            Some(data) => buf.copy_from_slice(data),
            None => buf.fill(0),
        }
        Ok(())
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.cached.lock().unwrap().insert(offset, data.to_vec());
        Ok(())
    }

    /// Lasts at once, as it may on a disk.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        for writes in [&self.cached, &self.lasting] {
            for (start, data) in &mut *writes.lock().unwrap() {
                for (at, byte) in (*start..).zip(data) {
                    if (offset..offset + len).contains(&at) {
                        *byte = 0;
                    }
                }
            }
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        if self.fail_sync.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let cached = std::mem::take(&mut *self.cached.lock().unwrap());
        self.lasting.lock().unwrap().extend(cached);
        Ok(())
    }
}

fn open_on(store: &Store, disk: &Arc<Forgetful>) -> Arc<BlobFile> {
    drop(store.blob(&spec(), b"index").unwrap());
    let place = store.place(&spec().blob, spec().anchor);
    let blob::Opened::There(file) =
        BlobFile::open(&place, &spec().blob, spec().anchor, store.boot, &store.syncer).unwrap()
    else {
        panic!("the image is there");
    };
    Arc::new(file.with_disk(Box::new(Arc::clone(disk))))
}

#[derive(Debug, Clone)]
enum Step {
    Write(u32),
    Sync,
    FailedSync,
    Forget,
    Punch(Vec<u32>),
    Kill,
    PowerCut,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..CHUNKS).prop_map(Step::Write),
        2 => Just(Step::Sync),
        1 => Just(Step::FailedSync),
        1 => Just(Step::Forget),
        2 => prop::collection::vec(0..CHUNKS, 1..6).prop_map(Step::Punch),
        1 => Just(Step::Kill),
        1 => Just(Step::PowerCut),
    ];
    prop::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn records_of_any_bytes_are_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..200), chunks in 0..500_u32) {
        drop(bits::Bits::from_present(&bytes, chunks));
        drop(bits::check_live(&bytes, bytes.len() as u64, chunks, BootId::invented(1)));
        drop(meta::Meta::parse(Path::new("meta.json"), &bytes));
    }

    #[test]
    fn a_mark_never_lies_whatever_happens(steps in steps()) {
        let root = TempDir::new().unwrap();
        let disk = Arc::new(Forgetful::default());
        let mut boot = 1;
        let mut store = store_at(&root, boot);
        let mut file = open_on(&store, &disk);
        // The model: chunks that are there, and of them those that are safe.
        let (mut there, mut safe) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
        for step in steps {
            match step {
                Step::Write(chunk) => {
                    write(&file, chunk);
                    there.insert(chunk);
                }
                Step::Sync => {
                    file.sync().unwrap();
                    safe.clone_from(&there);
                }
                Step::FailedSync => {
                    disk.fail_sync.store(true, std::sync::atomic::Ordering::Relaxed);
                    let failed = file.sync().is_err();
                    disk.fail_sync.store(false, std::sync::atomic::Ordering::Relaxed);
                    prop_assert_eq!(failed, there != safe);
                    there.clone_from(&safe);
                }
                Step::Forget => {
                    file.forget_all().unwrap();
                    there.clear();
                    safe.clear();
                }
                Step::Punch(chunks) => {
                    let going: std::collections::BTreeSet<u32> = chunks.iter().copied().collect();
                    let gone = punch::punch(&file, chunks).unwrap();
                    prop_assert_eq!(gone.chunks as usize, going.intersection(&there).count());
                    there.retain(|chunk| !going.contains(chunk));
                    safe.retain(|chunk| !going.contains(chunk));
                }
                Step::Kill | Step::PowerCut => {
                    if matches!(step, Step::PowerCut) {
                        disk.cached.lock().unwrap().clear();
                        boot += 1;
                        there.clone_from(&safe);
                    }
                    kill(store, file);
                    store = store_at(&root, boot);
                    file = open_on(&store, &disk);
                }
            }
            let expected: Vec<u32> = there.iter().copied().collect();
            assert_present(&file, &expected);
        }
        // Not through the real disk below.
        file.sync().unwrap();
    }
}

/// An image of its own, with some chunks.
fn other(number: u8) -> BlobSpec {
    BlobSpec { blob: BlobDigest(digest(&[number])), ..spec() }
}

#[test]
fn what_nobody_uses_goes_and_what_somebody_uses_stays() {
    let root = TempDir::new().unwrap();
    let store = store_at(&root, 1);
    let files: Vec<_> = (0..4).map(|number| store.blob(&other(number), b"index").unwrap()).collect();
    let blobs = |evicted: &Evicted| evicted.images.iter().map(|image| image.blob.clone()).collect::<Vec<_>>();
    let name = |number: u8| other(number).blob.to_string();
    let all = CacheGoal { all: true, ..CacheGoal::default() };
    assert_eq!(store.cache().unwrap().iter().filter(|entry| entry.in_use).count(), 4);
    assert_eq!(store.evict(&all, &Recorded::default(), false).unwrap().images, []);

    // The kernel shows the third one.
    let path = files[2].image_path();
    let backing = fs::File::open(&path).unwrap();
    let device = crate::sys::loopdev::LoopDevice::attach(&backing, &path, "test").unwrap();
    let mut files = files.into_iter();
    let first = files.next().unwrap();
    drop(files);
    let would = store.evict(&all, &Recorded::default(), true).unwrap();
    assert_eq!(would.images.len(), 2);
    assert_eq!(store.cache().unwrap().len(), 4, "a dry run removes nothing");
    let evicted = store.evict(&all, &Recorded::default(), false).unwrap();
    assert_eq!(blobs(&evicted), blobs(&would));
    assert!(evicted.bytes > 0 && evicted.left > 0);
    assert!(first.image_path().exists());
    assert!(path.exists());
    device.detach().unwrap();
    drop((device, first));
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while store.evict(&all, &Recorded::default(), false).unwrap().left > 0 {
        assert!(std::time::Instant::now() < deadline, "the device never goes");
    }
    assert_eq!(store.cache().unwrap(), []);
    assert_eq!(fs::read_dir(root.path().join("blobs/sha256")).unwrap().count(), 0);

    // Used in this order: 6, 5, 7.
    for number in [5, 6, 7, 5, 7] {
        drop(store.blob(&other(number), b"index").unwrap());
    }
    let bytes = store.cache().unwrap()[0].bytes;
    let quota = CacheGoal { quota: Some(bytes * 2), ..CacheGoal::default() };
    assert_eq!(blobs(&store.evict(&quota, &Recorded::default(), false).unwrap()), [name(6)]);
    let quota = CacheGoal { quota: Some(bytes), ..CacheGoal::default() };
    assert_eq!(blobs(&store.evict(&quota, &Recorded::default(), false).unwrap()), [name(5)]);
    let reserve = CacheGoal { reserve: u64::MAX, ..CacheGoal::default() };
    assert_eq!(blobs(&store.evict(&reserve, &Recorded::default(), false).unwrap()), [name(7)]);
}

#[test]
fn left_overs_of_the_dead_go_soon_and_those_of_the_living_stay() {
    let root = TempDir::new().unwrap();
    let store = store_at(&root, 1);
    let blob = BlobDigest(digest(b"whole"));
    let living = store.write_whole(&blob).unwrap();
    let in_tmp =
        || fs::read_dir(root.path().join("tmp")).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>();
    let [alive] = &in_tmp()[..] else { panic!("one thing is in the making") };
    let dead = root.path().join("tmp/dead");
    fs::create_dir(&dead).unwrap();
    files::touch(&dead.join(blob::LOCK)).unwrap();
    let ago = |seconds| SystemTime::now() - Duration::from_secs(seconds);
    let age = |path: &Path, seconds| fs::File::open(path).unwrap().set_modified(ago(seconds)).unwrap();
    age(alive, 7200);
    drop(store_at(&root, 1));
    assert_eq!(in_tmp().len(), 2, "it may just be about to take its lock");
    age(&dead, 61);
    drop(store_at(&root, 1));
    assert_eq!(in_tmp(), std::slice::from_ref(alive));
    drop(living);
}
