//! Many readers, bad luck, full disks, several processes and processes that are killed.

use std::collections::HashSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use headstart::chunked::Compression;
use headstart::fetch::{Cause, FetchConfig, FetchError, LayerState};
use headstart::model::ReadAt;
use headstart::store::StoreError;
use headstart::testkit::source::{Answer, Ending, TestLayer};
use proptest::prelude::*;
use tempfile::TempDir;

use super::{PATIENCE, Stage, ask, plain, read, until};

#[test]
fn many_readers_fetch_every_chunk_once() {
    let config = FetchConfig { connections: 5, background_connections: 3, range: 30_000, memory: 20_000, ..plain() };
    let stage = Stage::new(config);
    let sizes: Vec<usize> = (0..300).map(|i| 500 + i * 7 % 4000).collect();
    let layer = TestLayer::new(&sizes, Compression::Zstd);
    let image = stage.open(&layer);
    stage.source.forget();
    std::thread::scope(|scope| {
        for reader in 0..8_usize {
            let (image, layer) = (&image, &layer);
            scope.spawn(move || {
                let mut at = reader * 7919;
                for _ in 0..200 {
                    at = (at * 31 + 12_345) % (layer.image.len() - 6000);
                    let len = 1 + at % 6000;
                    assert_eq!(read(image, at as u64, len).unwrap(), layer.image[at..at + len]);
                }
            });
        }
        let image = &image;
        scope.spawn(move || {
            let (sender, filled) = std::sync::mpsc::channel();
            image.fill(move |result| sender.send(result).unwrap());
            filled.recv_timeout(PATIENCE).unwrap().unwrap();
        });
    });
    until("the layer is local", || image.state() == LayerState::Local);
    let counters = image.counters();
    assert_eq!((counters.chunks, counters.corrupt, counters.retries), (300, 0, 0));
    assert_eq!(stage.source.overlaps(), []);
    assert!(stage.source.most_open() <= 5);
}

/// What may befall the request with a given number.
#[derive(Debug, Clone, Copy)]
enum Luck {
    Good,
    /// Breaks off after this many bytes.
    Breaks(u64, Ending),
    /// A bit of this byte of the answer is wrong, if it is the first attempt.
    Wrong(u64),
    Surplus(usize),
}

fn luck() -> impl Strategy<Value = Luck> {
    prop_oneof![
        4 => Just(Luck::Good),
        1 => (0_u64..9000).prop_map(|after| Luck::Breaks(after, Ending::Transient)),
        1 => (0_u64..9000).prop_map(|after| Luck::Breaks(after, Ending::Silent)),
        1 => (0_u64..9000).prop_map(Luck::Wrong),
        1 => (1_usize..5000).prop_map(Luck::Surplus),
    ]
}

#[derive(Debug, Clone, Copy)]
enum Wish {
    Read(usize, usize),
    Ahead(usize, usize),
    Fill,
    Reopen,
}

fn wish(len: usize) -> impl Strategy<Value = Wish> {
    let range = (0..len, 0..9000_usize).prop_map(move |(at, want)| (at, want.min(len - at)));
    prop_oneof![
        8 => range.clone().prop_map(|(at, len)| Wish::Read(at, len)),
        2 => range.prop_map(|(at, len)| Wish::Ahead(at, len)),
        1 => Just(Wish::Fill),
        1 => Just(Wish::Reopen),
    ]
}

fn scenario() -> impl Strategy<Value = (Vec<usize>, Compression, Vec<Luck>, Vec<Wish>, FetchConfig)> {
    let sizes = prop::collection::vec(prop_oneof![1..100_usize, 1000..8000_usize], 1..30);
    let compression = prop_oneof![Just(Compression::None), Just(Compression::Zstd)];
    let config = (1..5_usize, 1..4_usize, 1_u32..40_000, 1_u64..60_000, 0_u64..40_000, 0_u64..8000).prop_map(
        |(connections, background_connections, memory, range, read_ahead, head)| FetchConfig {
            connections,
            background_connections,
            memory,
            range,
            read_ahead,
            head,
            ..FetchConfig::default()
        },
    );
    (sizes, compression, prop::collection::vec(luck(), 0..12), config).prop_flat_map(
        |(sizes, compression, luck, config)| {
            let len = sizes.iter().sum();
            let wishes = prop::collection::vec(wish(len), 1..25);
            (Just(sizes), Just(compression), Just(luck), wishes, Just(config))
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn reads_are_right_whatever_the_order_the_budget_and_the_luck(
        (sizes, compression, luck, wishes, config) in scenario(),
    ) {
        let stage = Stage::new(config);
        let layer = TestLayer::new(&sizes, compression);
        let mut image = stage.open(&layer);
        stage.source.forget();
        stage.source.script(move |asked| {
            let mut answer = Answer::default();
            let at = asked.range.start();
            match luck.get(asked.number).copied().unwrap_or(Luck::Good) {
                Luck::Good => {}
                Luck::Breaks(after, ending) => answer.end = Some((at + after, ending)),
                Luck::Wrong(after) => answer.corrupt = (asked.attempt == 0).then_some(at + after),
                Luck::Surplus(surplus) => answer.surplus = surplus,
            }
            answer
        });
        // More bad luck in a row than is borne is an error, and the next read tries again.
        let patient = |image: &_, at: usize, len: usize| loop {
            match read(image, at as u64, len) {
                Ok(bytes) => break bytes,
                Err(error) => assert!(
                    matches!(*error, FetchError::Source { .. } | FetchError::Interrupted { .. } | FetchError::Corrupt { .. }),
                    "{error:?}"
                ),
            }
        };
        let mut background = Vec::new();
        for wish in wishes {
            match wish {
                Wish::Read(at, len) => prop_assert!(patient(&image, at, len) == layer.image[at..at + len]),
                Wish::Ahead(at, len) => background.push(ask(&image, at as u64, len as u64, Cause::ReadAhead)),
                Wish::Fill => {
                    let (sender, filled) = std::sync::mpsc::channel();
                    // Nobody may be there any more to hear it.
                    image.fill(move |result| drop(sender.send(result)));
                    background.push(filled);
                }
                Wish::Reopen => {
                    drop(image);
                    image = stage.open(&layer);
                }
            }
        }
        prop_assert!(patient(&image, 0, layer.image.len()) == layer.image);
        for answer in background {
            prop_assert!(answer.recv_timeout(PATIENCE).is_ok(), "somebody was never answered");
        }
        until("the layer is local", || image.state() == LayerState::Local);
        prop_assert!(stage.source.most_open() <= 2 * config.connections);
    }
}

/// A small file system in memory that goes away with its owner.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new(bytes: usize) -> Self {
        let at = TempDir::new().unwrap();
        Self::with(&format!("size={bytes}"), at)
    }

    fn with(options: &str, at: TempDir) -> Self {
        let options = std::ffi::CString::new(format!("{options},mode=700")).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", at.path(), "tmpfs", flags, options.as_c_str()).unwrap();
        Self(at)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        rustix::mount::unmount(self.0.path(), rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_full_disk_fails_no_read() {
    let disk = SmallDisk::new(1 << 20);
    let layer = TestLayer::new(&[100_000; 30], Compression::Zstd);
    let config = FetchConfig { spare: 350_000, ..plain() };
    let stage = Stage::at(TempDir::new_in(disk.0.path()).unwrap(), config);
    let image = stage.open(&layer);
    for round in 0..2 {
        for at in (0..2_900_000).step_by(70_001) {
            assert_eq!(read(&image, at as u64, 100_000).unwrap(), layer.image[at..at + 100_000], "round {round}");
        }
    }
    let (counters, status) = (image.counters(), image.status());
    assert!(counters.disk_full > 20, "{counters:?}: the disk was never full");
    assert!(status.present >= 5 && status.present < 11, "{status:?}");
    assert_eq!(image.state(), LayerState::Lazy);

    // With room again, everything is kept.
    rustix::mount::mount_remount(disk.0.path(), rustix::mount::MountFlags::empty(), c"size=8388608").unwrap();
    let (sender, filled) = std::sync::mpsc::channel();
    image.fill(move |result| sender.send(result).unwrap());
    filled.recv_timeout(PATIENCE).unwrap().unwrap();
    until("the layer is local", || image.state() == LayerState::Local);
    drop((image, stage));
}

#[test]
fn a_full_disk_is_named_when_nothing_can_be_done() {
    let disk = SmallDisk::new(1 << 20);
    let stage = Stage::at(TempDir::new_in(disk.0.path()).unwrap(), plain());
    let layer = TestLayer::new(&[1_500_000], Compression::Zstd).without_index();
    let error = read(&stage.open(&layer), 0, 10).unwrap_err();
    assert!(matches!(&*error, FetchError::Store { source: StoreError::Full { .. }, .. }), "{error:?}");
    let left: Vec<PathBuf> = walk(&disk.0.path().join("."));
    assert!(!left.iter().any(|path| path.ends_with("image")), "left behind: {left:?}");
    drop(stage);
}

/// A cache that has filled its disk is what has to be made smaller.
#[test]
fn a_full_disk_is_no_reason_to_keep_what_fills_it() {
    let disk = SmallDisk::with("size=8M,nr_inodes=200", TempDir::new().unwrap());
    let root = disk.0.path().join("root");
    let layer = TestLayer::new(&[1_500_000], Compression::Zstd);
    let stage = Stage::below(&root, plain());
    assert_eq!(read(&stage.open(&layer), 0, 10).unwrap(), layer.image[..10]);
    drop(stage);
    let mut ballast = 0;
    while std::fs::write(disk.0.path().join(format!("ballast-{ballast}")), "").is_ok() {
        ballast += 1;
    }
    std::fs::create_dir(root.join("tmp/x")).unwrap_err();
    let store = headstart::store::Store::open(&root).unwrap();
    let goal = headstart::store::CacheGoal { all: true, ..Default::default() };
    let evicted = store.evict(&goal, &Default::default(), false).unwrap();
    assert_eq!(evicted.images.len(), 1);
    let mut left = walk(&root.join("blobs"));
    left.retain(|path| path.is_file());
    assert_eq!(left, Vec::<PathBuf>::new());
    assert_eq!(store.cache().unwrap(), []);
    // And the layer comes again.
    let stage = Stage::below(&root, plain());
    assert_eq!(read(&stage.open(&layer), 0, 10).unwrap(), layer.image[..10]);
    drop(stage);
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(walk(&path));
        }
        found.push(path);
    }
    found
}

const SHARED_CHUNKS: usize = 40;
const SHARED_CHUNK: usize = 3000;

fn shared_layer() -> TestLayer {
    TestLayer::new(&[SHARED_CHUNK; SHARED_CHUNKS], Compression::Zstd)
}

/// What a process of the tests below does: obeys lines of `first` and `last` chunk, reads them, checks them, and tells
/// how many chunks it has fetched in all.
#[test]
#[ignore = "runs as a process of its own, started by the tests below"]
fn a_reading_process() {
    let root = PathBuf::from(std::env::var_os("HEADSTART_TEST_ROOT").expect("started by another test"));
    let layer = shared_layer();
    let stage = Stage::below(&root, plain());
    let image = stage.open(&layer);
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let (first, last) = line.split_once(' ').unwrap();
        let (start, end) =
            (SHARED_CHUNK * first.parse::<usize>().unwrap(), SHARED_CHUNK * last.parse::<usize>().unwrap());
        assert!(read(&image, start as u64, end - start).unwrap() == layer.image[start..end]);
        println!("\nfetched {}", image.counters().chunks);
    }
}

struct ReadingProcess {
    child: Child,
    answers: BufReader<std::process::ChildStdout>,
}

impl ReadingProcess {
    fn start(root: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "fetch::hardship::a_reading_process"])
            .env("HEADSTART_TEST_ROOT", root)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        Self { child, answers }
    }

    /// Makes it read chunks; gives how many it has fetched since it was started.
    fn read(&mut self, first: usize, last: usize) -> usize {
        writeln!(self.child.stdin.as_ref().unwrap(), "{first} {last}").unwrap();
        loop {
            let mut line = String::new();
            assert!(self.answers.read_line(&mut line).unwrap() > 0, "the reading process has ended");
            if let Some(count) = line.strip_prefix("fetched ") {
                return count.trim().parse().unwrap();
            }
        }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn end(mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().unwrap().success());
    }
}

#[test]
fn processes_share_what_they_fetch_while_they_fetch_it() {
    let root = TempDir::new().unwrap();
    let (mut one, mut two) = (ReadingProcess::start(root.path()), ReadingProcess::start(root.path()));
    assert_eq!(one.read(0, 20), 20);
    assert_eq!(two.read(0, 30), 10);
    assert_eq!(one.read(15, 40), 30);
    assert_eq!(two.read(0, 40), 10);
    one.end();
    two.end();
}

#[test]
fn what_a_killed_process_fetched_is_not_fetched_again() {
    let root = TempDir::new().unwrap();
    let mut one = ReadingProcess::start(root.path());
    assert_eq!(one.read(0, 25), 25);
    one.kill();
    let mut two = ReadingProcess::start(root.path());
    assert_eq!(two.read(0, 40), 15);
    two.end();
}

#[test]
fn processes_that_start_at_once_agree() {
    let root = TempDir::new().unwrap();
    let mut all: Vec<_> = (0..4).map(|_| ReadingProcess::start(root.path())).collect();
    let fetched = Mutex::new(HashSet::new());
    std::thread::scope(|scope| {
        for process in &mut all {
            scope.spawn(|| fetched.lock().unwrap().insert(process.read(0, SHARED_CHUNKS)));
        }
    });
    let mut late = ReadingProcess::start(root.path());
    assert_eq!(late.read(0, SHARED_CHUNKS), 0, "{fetched:?}");
    all.push(late);
    all.into_iter().for_each(ReadingProcess::end);
}

#[test]
fn a_budget_smaller_than_a_chunk_still_lets_it_pass() {
    let stage = Stage::new(FetchConfig { memory: 1000, ..plain() });
    let layer = TestLayer::new(&[300_000, 200_000, 100_000], Compression::None);
    let image = stage.open(&layer);
    assert_eq!(read(&image, 0, 600_000).unwrap(), layer.image);
    image.read_exact_at(0, &mut [0; 10]).unwrap();
}
