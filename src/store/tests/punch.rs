//! Chunks that go under their readers and writers.

use std::os::unix::fs::MetadataExt as _;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use super::*;
use crate::model::ByteRange;
use crate::sys::loopdev::LoopDevice;

fn victims(chunks: impl IntoIterator<Item = u32>) -> Vec<(u32, ByteRange)> {
    let bytes = |chunk: u32| ByteRange::at(u64::from(chunk) * CHUNK as u64, CHUNK as u64).unwrap();
    chunks.into_iter().map(|chunk| (chunk, bytes(chunk))).collect()
}

pub(super) fn punch(file: &BlobFile, chunks: impl IntoIterator<Item = u32>) -> Option<Punched> {
    file.punch(&victims(chunks)).unwrap()
}

fn blocks(file: &BlobFile) -> u64 {
    fs::metadata(file.image_path()).unwrap().blocks()
}

#[test]
fn what_is_punched_is_gone_and_comes_back() {
    let root = TempDir::new().unwrap();
    let store = store_at(&root, 1);
    let file = store.blob(&spec(), b"index").unwrap();
    (0..CHUNKS).for_each(|chunk| write(&file, chunk));
    file.sync().unwrap();
    let (before, evictions) = (blocks(&file), file.evictions());
    // 5000 to 15,000 and 40,000 to the end at 45,000: whole blocks from 8192 to 12,288, and 40,960 to 45,056.
    let punched = punch(&file, [8, 2, 1, 2]).unwrap();
    assert_eq!(punched, Punched { chunks: 3, bytes: 2 * 4096 });
    assert_eq!(before - blocks(&file), 16);
    assert_present(&file, &[0, 3, 4, 5, 6, 7]);
    assert_eq!(file.evictions(), evictions + 1);
    let mut buf = vec![0; 2 * CHUNK];
    assert!(!file.read_present(0..2, 0, &mut buf).unwrap());
    assert!(file.read_present(3..5, 3 * CHUNK as u64, &mut buf).unwrap());
    assert_eq!(buf, [content(3), content(4)].concat());
    assert_eq!(punch(&file, [1, 2]), Some(Punched::default()), "what is gone does not go");
    write(&file, 1);
    assert_present(&file, &[0, 1, 3, 4, 5, 6, 7]);
    drop((file, store));
    assert_present(&store_at(&root, 2).blob(&spec(), b"index").unwrap(), &[0, 1, 3, 4, 5, 6, 7]);
}

#[test]
fn what_lost_a_chunk_is_verified_no_more() {
    let root = TempDir::new().unwrap();
    let store = store_at(&root, 1);
    let file = store.blob(&spec(), b"index").unwrap();
    let found = DiffId(digest(b"image"));
    (0..CHUNKS).for_each(|chunk| write(&file, chunk));
    assert!(file.set_verdict(Verdict::Verified(found)).unwrap());
    let noted = || noted_verdict(root.path(), &spec().blob, &spec().anchor.to_string());
    assert_eq!(noted(), Some(Verdict::Verified(found)));
    punch(&file, [4]).unwrap();
    assert_eq!((file.verdict(), noted()), (Verdict::Unverified, Some(Verdict::Unverified)));
    assert!(!file.set_verdict(Verdict::Verified(found)).unwrap(), "it is not all there");
    assert_eq!(noted(), Some(Verdict::Unverified));
    write(&file, 4);
    assert!(file.set_verdict(Verdict::Verified(found)).unwrap());
    // What is known of an image that is not what it should be does not go with a chunk.
    file.set_verdict(Verdict::Contradicted(found)).unwrap();
    punch(&file, [4]).unwrap();
    assert_eq!((file.verdict(), noted()), (Verdict::Contradicted(found), Some(Verdict::Contradicted(found))));
}

#[test]
fn nothing_goes_of_what_somebody_needs_as_a_whole() {
    let root = TempDir::new().unwrap();
    let (store, other) = (store_at(&root, 1), store_at(&root, 1));
    let (file, theirs) = (store.blob(&spec(), b"index").unwrap(), other.blob(&spec(), b"index").unwrap());
    assert!(file.pin().unwrap().is_none(), "it is not whole");
    (0..CHUNKS).for_each(|chunk| write(&file, chunk));
    file.set_verdict(Verdict::Verified(DiffId(digest(b"image")))).unwrap();
    let pin = theirs.pin().unwrap().expect("it is whole");
    assert_eq!(punch(&file, [4]), None);
    drop(pin);
    let path = file.image_path();
    let device = LoopDevice::attach(&fs::File::open(&path).unwrap(), &path, "test").unwrap();
    assert_eq!(punch(&file, [4]), None, "the kernel shows it");
    device.detach().unwrap();
    drop(device);
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    while punch(&file, [4]).is_none() {
        assert!(std::time::Instant::now() < deadline, "the device never goes");
    }
    assert!(theirs.pin().unwrap().is_none());
}

/// Does something before the first hole is punched.
struct Before<F>(fs::File, Mutex<Option<F>>);

impl<F> std::fmt::Debug for Before<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Before")
    }
}

impl<F: FnOnce() + Send> Disk for Before<F> {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        Disk::read_exact_at(&self.0, buf, offset)
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        Disk::write_all_at(&self.0, data, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        Disk::sync_data(&self.0)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        if let Some(first) = self.1.lock().unwrap().take() {
            first();
        }
        Disk::punch(&self.0, offset, len)
    }
}

/// The image on another disk, which is made of the real one.
fn open_on<D: Disk + 'static>(store: &Store, disk: impl FnOnce(fs::File) -> D) -> Arc<BlobFile> {
    let place = store.place(&spec().blob, spec().anchor);
    let image = fs::OpenOptions::new().read(true).write(true).open(place.join("image")).unwrap();
    let opened = BlobFile::open(&place, &spec().blob, spec().anchor, store.boot, &store.syncer).unwrap();
    let blob::Opened::There(file) = opened else { panic!("the image is there") };
    Arc::new(file.with_disk(Box::new(disk(image))))
}

/// The image on a real disk, on which `before` happens before the first hole.
fn open_with(store: &Store, before: impl FnOnce() + Send + 'static) -> Arc<BlobFile> {
    open_on(store, |image| Before(image, Mutex::new(Some(before))))
}

fn copy(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).unwrap() {
        let (from, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if from.is_dir() {
            fs::create_dir(&to).unwrap();
            copy(&from, &to);
        } else {
            fs::copy(&from, &to).unwrap();
        }
    }
}

#[test]
fn who_dies_before_the_first_hole_leaves_nothing_that_claims_what_may_be_a_hole() {
    // The process is killed, or the power is cut; the images have lost the chunks' bytes and have not.
    for (boot, punched) in [(1, false), (1, true), (2, false), (2, true)] {
        let (root, left) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let store = store_at(&root, 1);
        let file = store.blob(&spec(), b"index").unwrap();
        (0..CHUNKS).for_each(|chunk| write(&file, chunk));
        file.set_verdict(Verdict::Verified(DiffId(digest(b"image")))).unwrap();
        drop(file);
        let (at, to) = (root.path().to_owned(), left.path().to_owned());
        let file = open_with(&store, move || copy(&at, &to));
        let gone = [3, 4, 5];
        punch(&file, gone).unwrap();
        if punched {
            let image = store_at(&left, boot).place(&spec().blob, spec().anchor).join("image");
            let image = fs::OpenOptions::new().write(true).open(image).unwrap();
            crate::sys::punch_hole(&image, 3 * CHUNK as u64, 3 * CHUNK as u64).unwrap();
        }
        let store = store_at(&left, boot);
        let file = store.blob(&spec(), b"index").unwrap();
        assert_present(&file, &[0, 1, 2, 6, 7, 8]);
        assert_eq!(file.verdict(), Verdict::Unverified);
        for chunk in gone {
            assert!(file.write_chunk(chunk, u64::from(chunk) * CHUNK as u64, &content(chunk)).unwrap());
        }
        file.sync().unwrap();
        drop((file, store));
        let file = store_at(&left, 3).blob(&spec(), b"index").unwrap();
        assert_present(&file, &(0..CHUNKS).collect::<Vec<_>>());
    }
}

#[test]
fn what_is_going_is_neither_read_nor_written() {
    let root = TempDir::new().unwrap();
    let (store, other) = (store_at(&root, 1), store_at(&root, 1));
    let theirs = other.blob(&spec(), b"index").unwrap();
    (0..CHUNKS).for_each(|chunk| write(&theirs, chunk));
    let looked = Arc::new(AtomicBool::new(false));
    let (reader, told) = (Arc::clone(&theirs), Arc::clone(&looked));
    let file = open_with(&store, move || {
        assert!(!reader.is_present(2));
        assert!(!reader.read_present(2..3, 2 * CHUNK as u64, &mut [0; CHUNK]).unwrap());
        assert!(!reader.write_chunk(2, 2 * CHUNK as u64, &content(2)).unwrap());
        assert!(reader.write_chunk(1, CHUNK as u64, &content(1)).unwrap());
        told.store(true, Ordering::Relaxed);
    });
    punch(&file, [2, 3]).unwrap();
    assert!(looked.load(Ordering::Relaxed));
    write(&theirs, 2);
    assert_present(&file, &[0, 1, 2, 4, 5, 6, 7, 8]);
}

#[test]
fn what_a_dead_process_left_as_going_is_written_under_those_who_have_it_open() {
    let root = TempDir::new().unwrap();
    let store = store_at(&root, 1);
    let file = store.blob(&spec(), b"index").unwrap();
    (0..CHUNKS).for_each(|chunk| write(&file, chunk));
    let place = store.place(&spec().blob, spec().anchor);
    let live = fs::OpenOptions::new().write(true).open(place.join("live")).unwrap();
    for chunk in [2, 3] {
        live.write_all_at(&[bits::GOING], bits::live_offset(chunk) as u64).unwrap();
    }
    // As long as he lives he holds the guard.
    let alive = FileLock::acquire(&place.join("guard"), LockMode::Exclusive).unwrap();
    assert!(!file.write_chunk(2, 2 * CHUNK as u64, &content(2)).unwrap());
    drop(alive);
    write(&file, 2);
    assert_present(&file, &[0, 1, 2, 4, 5, 6, 7, 8]);
    write(&file, 3);
    assert_present(&file, &(0..CHUNKS).collect::<Vec<_>>());
}

#[test]
fn a_disk_without_holes_loses_marks_and_nothing_else() {
    #[derive(Debug)]
    struct NoHoles(fs::File);
    impl Disk for NoHoles {
        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            Disk::read_exact_at(&self.0, buf, offset)
        }
        fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
            Disk::write_all_at(&self.0, data, offset)
        }
        fn sync_data(&self) -> io::Result<()> {
            Disk::sync_data(&self.0)
        }
        fn punch(&self, _: u64, _: u64) -> io::Result<()> {
            Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
        }
    }
    let root = TempDir::new().unwrap();
    let store = store_at(&root, 1);
    drop(store.blob(&spec(), b"index").unwrap());
    let file = open_on(&store, NoHoles);
    (0..CHUNKS).for_each(|chunk| write(&file, chunk));
    assert!(matches!(file.punch(&victims([1, 2])), Err(StoreError::Io { .. })));
    assert_present(&file, &[0, 3, 4, 5, 6, 7, 8]);
    write(&file, 1);
    assert_present(&file, &[0, 1, 3, 4, 5, 6, 7, 8]);
}

#[test]
fn readers_never_see_a_hole() {
    const PUNCHES: u32 = 300;
    let root = TempDir::new().unwrap();
    // Two processes, as far as locks and marks are concerned.
    let stores = [store_at(&root, 1), store_at(&root, 1)];
    let files: Vec<_> = stores.iter().map(|store| store.blob(&spec(), b"index").unwrap()).collect();
    let (left, read, brought) = (AtomicU32::new(PUNCHES), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for number in 0..4 {
            let (file, left, read, brought) = (&files[number % 2], &left, &read, &brought);
            scope.spawn(move || {
                let mut at = number as u64 * 7;
                let mut buf = vec![0; 2 * CHUNK];
                while left.load(Ordering::Relaxed) > 0 {
                    at = (at * 31 + 17) % (u64::from(CHUNKS - 1) * CHUNK as u64);
                    let len = 1 + usize::try_from(at).unwrap() % CHUNK;
                    let first = u32::try_from(at / CHUNK as u64).unwrap();
                    let last = u32::try_from((at + len as u64 - 1) / CHUNK as u64).unwrap();
                    if file.read_present(first..last + 1, at, &mut buf[..len]).unwrap() {
                        let within = usize::try_from(at % CHUNK as u64).unwrap();
                        let expected = [content(first), content(first + 1)].concat();
                        assert!(buf[..len] == expected[within..within + len], "other bytes at {at}");
                        read.fetch_add(1, Ordering::Relaxed);
                        continue;
                    }
                    for chunk in (first..=last).filter(|chunk| !file.is_present(*chunk)) {
                        file.write_chunk(chunk, u64::from(chunk) * CHUNK as u64, &content(chunk)).unwrap();
                        brought.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        let (files, left) = (&files, &left);
        scope.spawn(move || {
            for number in (0..PUNCHES).rev() {
                let (first, file) = (number * 5 % CHUNKS, &files[usize::from(number % 2 == 0)]);
                // None: they write all the time, which is as good.
                punch(file, (first..CHUNKS).take(4));
                left.store(number, Ordering::Relaxed);
            }
        });
    });
    let (read, brought) = (read.into_inner(), brought.into_inner());
    assert!(read > 100 && brought > 10, "{read} reads, {brought} chunks brought: nothing was tried");
    for file in &files {
        assert_present(file, &present(file));
        file.sync().unwrap();
    }
}
