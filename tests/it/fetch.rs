//! The download path against a source that follows a script.

use std::sync::Arc;
use std::time::Duration;

use headstart::chunked::Compression;
use headstart::fetch::{Cause, FetchConfig, FetchError, Fetcher, LayerImage, LayerState};
use headstart::model::{Algorithm, BlobDigest, ByteRange, DiffId, Digest, ReadAt, ReadAtError};
use headstart::store::Store;
use headstart::testkit::source::{Answer, Ending, Gate, Refusal, Scripted, ScriptedSource, TestLayer};
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// Longest time anything here may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(30);

/// A fetcher over a store and a scripted source.
struct Stage {
    source: Arc<ScriptedSource>,
    fetcher: Fetcher,
    runtime: Runtime,
    _root: TempDir,
}

/// Neither reads ahead nor brings heads along: what is asked for is what a test asks for.
fn plain() -> FetchConfig {
    FetchConfig { read_ahead: 0, head: 0, ..FetchConfig::default() }
}

impl Stage {
    fn new(config: FetchConfig) -> Self {
        let root = TempDir::new().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let store = Arc::new(Store::open(root.path()).unwrap());
        let fetcher = Fetcher::new(store, runtime.handle().clone(), config).unwrap();
        Self { source: ScriptedSource::new(1000), fetcher, runtime, _root: root }
    }

    fn try_open(&self, layer: &TestLayer) -> Result<Arc<LayerImage>, Arc<FetchError>> {
        self.source.add_as(layer.spec.blob, &layer.bytes);
        let source = Arc::new(Scripted(Arc::clone(&self.source)));
        self.runtime.block_on(self.fetcher.open_layer(layer.spec.clone(), source))
    }

    fn open(&self, layer: &TestLayer) -> Arc<LayerImage> {
        self.try_open(layer).unwrap()
    }
}

/// Asks for a range; the answer comes through the channel.
fn ask(
    layer: &Arc<LayerImage>,
    start: u64,
    len: u64,
    cause: Cause,
) -> std::sync::mpsc::Receiver<Result<(), Arc<FetchError>>> {
    let (sender, receiver) = std::sync::mpsc::channel();
    layer.request(ByteRange::at(start, len).unwrap(), cause, move |result| sender.send(result).unwrap());
    receiver
}

/// Reads as a mount does: what is absent is asked for, then everything is tried again.
fn read(layer: &Arc<LayerImage>, start: u64, len: usize) -> Result<Vec<u8>, Arc<FetchError>> {
    let mut buf = vec![0; len];
    loop {
        match layer.read_exact_at(start, &mut buf) {
            Ok(()) => return Ok(buf),
            Err(ReadAtError::Absent(range)) => {
                ask(layer, range.start(), range.len(), Cause::Read).recv_timeout(PATIENCE).expect("an answer")?;
            }
            Err(error) => panic!("{error:?}"),
        }
    }
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(std::time::Instant::now() < deadline, "never: {what}");
        std::thread::yield_now();
    }
}

fn ranges(stage: &Stage) -> Vec<(u64, u64)> {
    stage.source.asked().iter().map(|asked| (asked.range.start(), asked.range.end())).collect()
}

fn blob_range(layer: &TestLayer, first: usize, last: usize) -> (u64, u64) {
    (layer.chunks[first].start(), layer.chunks[last].end())
}

#[test]
fn a_read_fetches_the_chunks_it_needs_and_no_others() {
    for compression in [Compression::Zstd, Compression::None] {
        let stage = Stage::new(plain());
        let layer = TestLayer::new(&[5000, 3000, 7000, 1, 4000], compression);
        let image = stage.open(&layer);
        assert_eq!((image.size(), image.state()), (19_001, LayerState::Lazy));
        stage.source.forget();
        assert_eq!(read(&image, 6000, 3000).unwrap(), layer.image[6000..9000]);
        assert_eq!(ranges(&stage), [blob_range(&layer, 1, 2)]);
        assert_eq!(read(&image, 5000, 10_000).unwrap(), layer.image[5000..15_000]);
        assert_eq!(stage.source.asked().len(), 1, "what is here was fetched again");
        assert_eq!(read(&image, 0, 19_001).unwrap(), layer.image);
        assert_eq!(ranges(&stage)[1..], [blob_range(&layer, 0, 0), blob_range(&layer, 3, 4)]);
        let counters = image.counters();
        assert_eq!((counters.chunks, counters.needed), (5, layer.chunks[4].end()));
        assert_eq!(counters.fetched, layer.bytes.len() as u64);
    }
}

#[test]
fn a_complete_layer_is_verified_and_then_local_for_everybody() {
    for compression in [Compression::Zstd, Compression::None] {
        let stage = Stage::new(plain());
        let layer = TestLayer::new(&[5000, 3000, 7000], compression);
        let image = stage.open(&layer);
        read(&image, 0, 15_000).unwrap();
        until("the layer is local", || image.state() == LayerState::Local);
        drop(image);
        stage.source.script(|asked| panic!("{asked:?} although everything is here"));
        let image = stage.open(&layer);
        assert_eq!(image.state(), LayerState::Local);
        assert_eq!(read(&image, 100, 14_000).unwrap(), layer.image[100..14_100]);
    }
}

#[test]
fn nothing_outside_of_the_image_is_read_or_fetched() {
    let stage = Stage::new(plain());
    let image = stage.open(&TestLayer::new(&[5000], Compression::Zstd));
    stage.source.forget();
    for (start, len) in [(5000, 1), (4999, 2), (u64::MAX, 1), (u64::MAX - 3, 9)] {
        let result = image.read_exact_at(start, &mut vec![0; len]);
        assert!(matches!(result, Err(ReadAtError::OutOfBounds { .. })), "{start}+{len}: {result:?}");
    }
    image.read_exact_at(5000, &mut []).unwrap();
    ask(&image, 5000, 1000, Cause::Read).recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(ranges(&stage), []);
}

#[test]
fn a_layer_without_index_is_read_from_start_to_end() {
    for compression in [Compression::Zstd, Compression::None] {
        let stage = Stage::new(plain());
        let layer = TestLayer::new(&[50_000, 30_000], compression).without_index();
        let image = stage.open(&layer);
        assert_eq!(image.state(), LayerState::Lazy);
        assert_eq!(read(&image, 40_000, 30_000).unwrap(), layer.image[40_000..70_000]);
        assert_eq!(ranges(&stage), [(0, layer.bytes.len() as u64)]);
        assert_eq!(image.state(), LayerState::Local);
        let size = if compression == Compression::None { layer.bytes.len() } else { layer.image.len() };
        assert_eq!(image.size(), size as u64);
        drop(image);
        stage.source.script(|asked| panic!("{asked:?} although everything is here"));
        assert_eq!(read(&stage.open(&layer), 7, 70_000).unwrap(), layer.image[7..70_007]);
    }
}

#[test]
fn a_chunk_with_wrong_bytes_is_fetched_once_more() {
    let stage = Stage::new(plain());
    let layer = TestLayer::new(&[5000, 3000, 7000], Compression::Zstd);
    let image = stage.open(&layer);
    stage.source.forget();
    let bad = layer.chunks[1].start() + 20;
    stage.source.script(move |asked| Answer { corrupt: (asked.attempt == 0).then_some(bad), ..Answer::default() });
    assert_eq!(read(&image, 0, 15_000).unwrap(), layer.image);
    let again: Vec<_> = stage.source.asked().iter().map(|asked| (asked.range, asked.attempt)).collect();
    assert_eq!(again, [(ByteRange::to(layer.chunks[2].end()), 0), (layer.chunks[1], 1)]);
    assert_eq!(image.counters().corrupt, 1);
}

#[test]
fn a_chunk_that_stays_wrong_fails_its_reads_alone_and_is_tried_again_later() {
    let stage = Stage::new(plain());
    let layer = TestLayer::new(&[5000, 3000, 7000], Compression::Zstd);
    let image = stage.open(&layer);
    let bad = layer.chunks[1].start() + 20;
    stage.source.script(move |_| Answer { corrupt: Some(bad), ..Answer::default() });
    let error = read(&image, 0, 15_000).unwrap_err();
    let FetchError::Corrupt { blob, chunk, .. } = &*error else { panic!("{error:?}") };
    assert_eq!((blob, *chunk), (&layer.spec.blob, 1));
    let cause = std::error::Error::source(&*error).unwrap().source().unwrap().to_string();
    assert!(cause.contains("sha256:") && cause.contains("not"), "{cause:?} does not say what was expected and found");
    assert_eq!(read(&image, 0, 5000).unwrap(), layer.image[..5000]);
    assert_eq!(read(&image, 8000, 7000).unwrap(), layer.image[8000..]);
    assert!(matches!(image.read_exact_at(5000, &mut [0]), Err(ReadAtError::Absent(_))));
    stage.source.script(|_| Answer::default());
    assert_eq!(read(&image, 5000, 3000).unwrap(), layer.image[5000..8000]);
    until("the layer is local", || image.state() == LayerState::Local);
}

#[test]
fn frames_are_answered_as_they_arrive() {
    let stage = Stage::new(plain());
    let layer = TestLayer::new(&[5000, 3000, 7000, 2000], Compression::Zstd);
    let image = stage.open(&layer);
    stage.source.forget();
    let gate = Gate::closed();
    let (held, at) = (gate.clone(), layer.chunks[2].start() + 1);
    stage.source.script(move |_| Answer { hold: Some((at, held.clone())), ..Answer::default() });
    let all = ask(&image, 0, 17_000, Cause::Read);
    for (start, len) in [(0, 5000), (5000, 3000)] {
        ask(&image, start, len, Cause::Read).recv_timeout(PATIENCE).unwrap().unwrap();
    }
    let mut start = vec![0; 8000];
    image.read_exact_at(0, &mut start).unwrap();
    assert_eq!(start, layer.image[..8000]);
    let rest = ask(&image, 8000, 1, Cause::Read);
    assert!(all.try_recv().is_err() && rest.try_recv().is_err());
    gate.open();
    all.recv_timeout(PATIENCE).unwrap().unwrap();
    rest.recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(ranges(&stage), [blob_range(&layer, 0, 3)]);
}

#[test]
fn a_connection_that_breaks_is_replaced_where_it_broke() {
    for ending in [Ending::Transient, Ending::Silent] {
        let stage = Stage::new(plain());
        let layer = TestLayer::new(&[5000, 3000, 7000], Compression::Zstd);
        let image = stage.open(&layer);
        stage.source.forget();
        let at = layer.chunks[1].start() + 100;
        let end = move |number| (number < 2).then_some((at, ending));
        stage.source.script(move |asked| Answer { end: end(asked.number), ..Answer::default() });
        assert_eq!(read(&image, 0, 15_000).unwrap(), layer.image);
        let (all, rest) = (blob_range(&layer, 0, 2), blob_range(&layer, 1, 2));
        assert_eq!(ranges(&stage), [all, rest, rest], "{ending:?}");
        assert_eq!((image.counters().retries, image.counters().corrupt), (2, 0));
    }
}

#[test]
fn a_source_that_fails_for_good_fails_its_readers_once() {
    let refused = |refusal| Answer { refuse: Some(refusal), ..Answer::default() };
    let broken = |at, ending| Answer { end: Some((at, ending)), ..Answer::default() };
    let layer = TestLayer::new(&[5000, 3000, 7000], Compression::Zstd);
    let at = layer.chunks[1].start() + 100;
    for (name, answer, requests) in [
        ("refused", refused(Refusal::Final), 1),
        // The source has retried what could be retried.
        ("refused for now", refused(Refusal::Transient), 1),
        ("broken off for good", broken(at, Ending::Final), 1),
        ("broken off again and again", broken(at, Ending::Transient), 1 + 3),
        ("short again and again", broken(at, Ending::Silent), 1 + 3),
    ] {
        let stage = Stage::new(plain());
        let image = stage.open(&layer);
        stage.source.forget();
        stage.source.script(move |_| answer.clone());
        let (one, two) = (ask(&image, 5000, 10, Cause::Read), ask(&image, 6000, 10, Cause::Read));
        let one = one.recv_timeout(PATIENCE).unwrap().unwrap_err();
        let two = two.recv_timeout(PATIENCE).unwrap().unwrap_err();
        assert!(matches!(*one, FetchError::Source { .. } | FetchError::Interrupted { .. }), "{name}: {one:?}");
        assert!(Arc::ptr_eq(&one, &two) || stage.source.asked().len() > requests, "{name}");
        stage.source.script(|_| Answer::default());
        assert_eq!(read(&image, 0, 15_000).unwrap(), layer.image, "{name}");
    }
}

#[test]
fn a_source_that_falls_silent_is_given_up() {
    let short = Duration::from_millis(50);
    let layer = TestLayer::new(&[5000, 3000, 7000], Compression::Zstd);
    let stall = Answer { end: Some((layer.chunks[1].start() + 100, Ending::Stall)), ..Answer::default() };
    let mute = Answer { gate: Some(Gate::closed()), ..Answer::default() };
    for (name, answer) in [("stalls", stall), ("never answers", mute)] {
        let stage = Stage::new(FetchConfig { stall_timeout: short, open_timeout: short, ..plain() });
        let image = stage.open(&layer);
        stage.source.script(move |_| answer.clone());
        let error = read(&image, 5000, 3000).unwrap_err();
        assert!(matches!(*error, FetchError::Interrupted { .. }), "{name}: {error:?}");
    }
}

#[test]
fn a_read_has_a_deadline_whatever_the_source_does() {
    let stage = Stage::new(FetchConfig { deadline: Duration::from_millis(50), ..plain() });
    let layer = TestLayer::new(&[5000], Compression::Zstd);
    let image = stage.open(&layer);
    let gate = Gate::closed();
    let held = gate.clone();
    stage.source.script(move |_| Answer { gate: Some(held.clone()), ..Answer::default() });
    let error = read(&image, 0, 10).unwrap_err();
    assert!(matches!(*error, FetchError::Deadline { .. }), "{error:?}");
    let later = ask(&image, 0, 10, Cause::ReadAhead);
    gate.open();
    later.recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(read(&image, 0, 10).unwrap(), layer.image[..10]);
}

#[test]
fn a_layer_that_is_closed_or_a_runtime_that_ends_fails_who_waits() {
    let layer = TestLayer::new(&[5000; 4], Compression::Zstd);
    let mute = || Answer { gate: Some(Gate::closed()), ..Answer::default() };

    let stage = Stage::new(FetchConfig { connections: 1, ..plain() });
    let image = stage.open(&layer);
    stage.source.script(move |_| mute());
    let flying = ask(&image, 0, 10, Cause::Read);
    until("the first is under way", || !stage.source.asked().is_empty());
    let queued = ask(&image, 15_000, 10, Cause::Read);
    stage.runtime.shutdown_background();
    let error = flying.recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert!(matches!(*error, FetchError::Abandoned { .. }), "{error:?}");
    drop(image);
    let error = queued.recv_timeout(PATIENCE).unwrap().unwrap_err();
    assert!(matches!(*error, FetchError::Abandoned { .. }), "{error:?}");
}

#[test]
fn connections_are_bounded_and_some_are_kept_for_those_who_wait() {
    let stage = Stage::new(FetchConfig { connections: 3, background_connections: 2, ..plain() });
    let layer = TestLayer::new(&[5000; 40], Compression::Zstd);
    let image = stage.open(&layer);
    stage.source.forget();
    let gate = Gate::closed();
    let held = gate.clone();
    stage.source.script(move |_| Answer { gate: Some(held.clone()), ..Answer::default() });
    // No two of them are neighbours.
    let background: Vec<_> = (0..10).map(|i| ask(&image, i * 20_000, 10, Cause::ReadAhead)).collect();
    until("the background has its connections", || stage.source.asked().len() == 2);
    let demand: Vec<_> = (0..5).map(|i| ask(&image, i * 20_000 + 10_000, 10, Cause::Read)).collect();
    until("a read has its connection", || stage.source.asked().len() == 3);
    gate.open();
    for answer in background.into_iter().chain(demand) {
        answer.recv_timeout(PATIENCE).unwrap().unwrap();
    }
    let order: Vec<u64> = stage.source.asked().iter().map(|asked| asked.range.start()).collect();
    let reads: Vec<u64> = (0..5).map(|i| layer.chunks[i * 4 + 2].start()).collect();
    assert_eq!(order[2..7], reads, "the background was served before those who wait");
    assert_eq!(stage.source.most_open(), 3);
    assert_eq!(stage.source.overlaps(), []);
}

#[test]
fn whoever_waits_overtakes_a_long_background_flight() {
    let stage = Stage::new(FetchConfig { range: 64 << 20, ..plain() });
    let layer = TestLayer::new(&[400_000; 8], Compression::None);
    let image = stage.open(&layer);
    stage.source.forget();
    let gate = Gate::closed();
    let held = gate.clone();
    stage.source.script(move |asked| Answer {
        hold: (asked.number == 0).then(|| (450_000, held.clone())),
        ..Answer::default()
    });
    let (sender, filled) = std::sync::mpsc::channel();
    image.fill(move |result| sender.send(result).unwrap());
    until("the first chunk is there", || image.read_exact_at(0, &mut [0; 10]).is_ok());
    assert_eq!(image.state(), LayerState::Filling);
    assert_eq!(read(&image, 2_400_000, 1000).unwrap(), layer.image[2_400_000..2_401_000]);
    assert_eq!(ranges(&stage), [blob_range(&layer, 0, 7), blob_range(&layer, 6, 6)]);
    gate.open();
    filled.recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(read(&image, 0, 3_200_000).unwrap(), layer.image);
    assert_eq!(ranges(&stage)[2..], [blob_range(&layer, 7, 7)], "a chunk came twice, or never");
    assert_eq!(image.counters().chunks, 8);
}

#[test]
fn a_fill_brings_what_is_missing_and_survives_a_bad_chunk() {
    let stage = Stage::new(FetchConfig { range: 100_000, ..plain() });
    let layer = TestLayer::new(&[3000; 400], Compression::Zstd);
    let image = stage.open(&layer);
    read(&image, 30_000, 30_000).unwrap();
    stage.source.forget();
    let bad = layer.chunks[200].start() + 20;
    stage.source.script(move |_| Answer { corrupt: Some(bad), ..Answer::default() });
    let fill = || {
        let (sender, filled) = std::sync::mpsc::channel();
        image.fill(move |result| sender.send(result).unwrap());
        filled.recv_timeout(PATIENCE).unwrap()
    };
    let error = fill().unwrap_err();
    assert!(matches!(*error, FetchError::Corrupt { chunk: 200, .. }), "{error:?}");
    until("the others are there", || image.status().present == 399);
    assert_eq!(image.state(), LayerState::Lazy);
    assert_eq!(stage.source.overlaps(), []);
    stage.source.script(|_| Answer::default());
    fill().unwrap();
    until("the layer is local", || image.state() == LayerState::Local);
    let status = image.status();
    assert_eq!((status.chunks, status.present, status.bytes, status.bytes_present), (400, 400, 1_200_000, 1_200_000));
    assert_eq!(status.contradiction, None);
}

#[test]
fn a_sequential_reader_is_kept_ahead_of() {
    let stage = Stage::new(FetchConfig { read_ahead: 1 << 20, ..plain() });
    let layer = TestLayer::new(&[100_000; 30], Compression::Zstd);
    let image = stage.open(&layer);
    stage.source.forget();
    assert_eq!(read(&image, 0, 50_000).unwrap(), layer.image[..50_000]);
    assert_eq!(ranges(&stage), [blob_range(&layer, 0, 0)], "one read is no stream");
    assert_eq!(read(&image, 100_000, 50_000).unwrap(), layer.image[100_000..150_000]);
    until("the next megabyte is there", || image.read_exact_at(200_000, &mut vec![0; 1 << 20]).is_ok());
    assert!(image.counters().fetched > image.counters().needed);
    let before = stage.source.asked().len();
    assert_eq!(read(&image, 200_000, 1000).unwrap(), layer.image[200_000..201_000]);
    assert_eq!(stage.source.asked().len(), before, "what was read ahead was fetched again");
    assert_eq!(stage.source.overlaps(), []);
}

#[test]
fn the_head_comes_along_with_the_index() {
    let stage = Stage::new(FetchConfig { head: 10_000, ..plain() });
    let layer = TestLayer::new(&[2000, 2000, 3000, 4000, 90_000], Compression::None);
    let image = stage.open(&layer);
    let index = layer.spec.index.unwrap().range;
    let mut asked = ranges(&stage);
    asked.sort_unstable();
    assert_eq!(asked, [(0, 10_000), (index.start(), index.end())]);
    let mut head = vec![0; 7000];
    image.read_exact_at(0, &mut head).unwrap();
    assert_eq!(head, layer.image[..7000]);
    assert!(image.read_exact_at(7000, &mut [0]).is_err(), "half a chunk is no chunk");
    drop(image);
    stage.source.script(|asked| panic!("{asked:?} although index and head are kept"));
    stage.open(&layer).read_exact_at(0, &mut head).unwrap();
}

#[test]
fn a_small_blob_comes_in_one_piece() {
    let stage = Stage::new(FetchConfig { head: 10_000, ..plain() });
    let layer = TestLayer::new(&[2000, 2000, 3000, 4000], Compression::Zstd);
    let image = stage.open(&layer);
    assert_eq!(ranges(&stage), [(0, layer.bytes.len() as u64)]);
    until("the layer is local", || image.state() == LayerState::Local);
}

#[test]
fn a_damaged_head_is_not_kept() {
    let stage = Stage::new(FetchConfig { head: 10_000, ..plain() });
    let layer = TestLayer::new(&[2000, 2000, 3000, 4000, 90_000], Compression::Zstd);
    let bad = layer.chunks[1].start() + 20;
    stage
        .source
        .script(move |asked| Answer { corrupt: (asked.range.start() == 0).then_some(bad), ..Answer::default() });
    let image = stage.open(&layer);
    assert!(image.read_exact_at(0, &mut [0; 2000]).is_ok());
    assert!(matches!(image.read_exact_at(2000, &mut [0]), Err(ReadAtError::Absent(_))));
    assert_eq!(read(&image, 0, 11_000).unwrap(), layer.image[..11_000]);
}

#[test]
fn an_index_with_wrong_bytes_is_fetched_once_more_and_never_used() {
    let layer = TestLayer::new(&[5000, 3000], Compression::Zstd);
    let index = layer.spec.index.unwrap();
    let bad = index.range.start() + 50;
    for (wrong, opens) in [(1, true), (2, false)] {
        let stage = Stage::new(plain());
        stage
            .source
            .script(move |asked| Answer { corrupt: (asked.attempt < wrong).then_some(bad), ..Answer::default() });
        let opened = stage.try_open(&layer);
        assert_eq!(stage.source.asked().iter().map(|asked| asked.attempt).collect::<Vec<_>>(), [0, 1]);
        match opened {
            Ok(image) => assert!(opens && read(&image, 0, 8000).unwrap() == layer.image),
            Err(error) => assert!(!opens && matches!(*error, FetchError::Index { .. }), "{error:?}"),
        }
    }
}

#[test]
fn an_index_may_lie_in_a_blob_of_its_own() {
    for compression in [Compression::Zstd, Compression::None] {
        let stage = Stage::new(plain());
        let (layer, index) = TestLayer::new(&[5000, 3000], compression).with_standalone_index();
        stage.source.add(&index);
        let image = stage.open(&layer);
        assert_eq!(read(&image, 0, 8000).unwrap(), layer.image);
        until("the layer is local", || image.state() == LayerState::Local);
    }
}

#[test]
fn an_index_of_an_unknown_kind_is_ignored() {
    let stage = Stage::new(plain());
    let mut layer = TestLayer::new(&[5000, 3000], Compression::Zstd);
    // Bytes 8 to 12 of the section are the magic, the next is the version.
    let section = layer.spec.index.as_mut().unwrap();
    let place = |offset| usize::try_from(offset).unwrap();
    let (start, end) = (place(section.range.start()), place(section.range.end()));
    layer.bytes[start + 12] = 9;
    let digest = Digest::of(Algorithm::Sha256, &layer.bytes[start + 8..end]);
    section.section.digest = Some(headstart::model::IndexDigest(digest));
    layer.spec.blob = BlobDigest(Digest::of(Algorithm::Sha256, &layer.bytes));
    section.blob = layer.spec.blob;
    let image = stage.open(&layer);
    stage.source.forget();
    assert_eq!(read(&image, 10, 20).unwrap(), layer.image[10..30]);
    assert_eq!(ranges(&stage), [(0, layer.bytes.len() as u64)]);
}

#[test]
fn an_index_of_somebody_else_gives_no_bytes_to_others() {
    let stage = Stage::new(plain());
    let honest = TestLayer::seeded(&[5000, 3000], Compression::None, 1);
    // Bytes and index of its own under the digest of the honest blob.
    let mut forged = TestLayer::seeded(&[5000, 3000], Compression::None, 2);
    forged.spec.blob = honest.spec.blob;
    forged.spec.index.as_mut().unwrap().blob = honest.spec.blob;
    assert_eq!(read(&stage.open(&forged), 0, 8000).unwrap(), forged.image);
    assert_eq!(read(&stage.open(&honest), 0, 8000).unwrap(), honest.image);
}

#[test]
fn a_whole_blob_survives_broken_connections() {
    let stage = Stage::new(plain());
    let layer = TestLayer::new(&[50_000, 30_000], Compression::Zstd).without_index();
    let image = stage.open(&layer);
    stage.source.script(|asked| Answer {
        end: (asked.number < 3).then_some((asked.range.start() + 7001, Ending::Transient)),
        ..Answer::default()
    });
    assert_eq!(read(&image, 0, 80_000).unwrap(), layer.image);
    let starts: Vec<u64> = stage.source.asked().iter().map(|asked| asked.range.start()).collect();
    assert_eq!(starts, [0, 7001, 14_002, 21_003]);
}

#[test]
fn a_whole_blob_with_wrong_bytes_is_fetched_once_more_and_never_served() {
    let layer = TestLayer::new(&[50_000, 30_000], Compression::Zstd).without_index();
    for (wrong, comes) in [(1, true), (2, false)] {
        let stage = Stage::new(plain());
        let image = stage.open(&layer);
        stage
            .source
            .script(move |asked| Answer { corrupt: (asked.attempt < wrong).then_some(30_000), ..Answer::default() });
        let result = read(&image, 0, 80_000);
        assert_eq!(stage.source.asked().len(), 2);
        match result {
            Ok(bytes) => assert!(comes && bytes == layer.image),
            Err(error) => {
                assert!(!comes && matches!(*error, FetchError::BlobDigest { .. }), "{error:?}");
                assert_eq!(image.state(), LayerState::Lazy);
                stage.source.script(|_| Answer::default());
                assert_eq!(read(&image, 0, 80_000).unwrap(), layer.image);
            }
        }
    }
}

#[test]
fn a_whole_layer_that_is_not_what_its_image_says_is_not_served() {
    let stage = Stage::new(plain());
    let right = TestLayer::new(&[50_000], Compression::Zstd).without_index();
    let mut wrong = right.clone();
    wrong.spec.diff_id = DiffId(Digest::of(Algorithm::Sha256, b"something else"));
    let image = stage.open(&wrong);
    let error = read(&image, 0, 10).unwrap_err();
    assert!(matches!(*error, FetchError::DiffId { .. }), "{error:?}");
    assert_eq!(read(&stage.open(&right), 0, 50_000).unwrap(), right.image);
    let error = stage.try_open(&wrong).unwrap_err();
    assert!(matches!(*error, FetchError::DiffId { .. }), "{error:?}");
}

#[test]
fn a_blob_that_is_no_zstd_is_told_apart_from_a_damaged_one() {
    let stage = Stage::new(plain());
    let mut layer = TestLayer::new(&[50_000], Compression::None).without_index();
    layer.spec.compression = Compression::Zstd;
    let error = read(&stage.open(&layer), 0, 10).unwrap_err();
    assert!(matches!(*error, FetchError::Unpack { .. }), "{error:?}");
}

#[test]
fn an_image_that_contradicts_itself_is_served_but_never_local() {
    let stage = Stage::new(plain());
    let mut layer = TestLayer::new(&[5000, 3000], Compression::Zstd);
    let right = layer.spec.diff_id;
    layer.spec.diff_id = DiffId(Digest::of(Algorithm::Sha256, b"something else"));
    let image = stage.open(&layer);
    assert_eq!(read(&image, 0, 8000).unwrap(), layer.image);
    until("its chunks are distrusted", || image.status().present == 0);
    assert_eq!(read(&image, 0, 8000).unwrap(), layer.image);
    until("the contradiction is known", || image.status().contradiction == Some(right));
    assert_eq!(read(&image, 0, 8000).unwrap(), layer.image);
    assert_eq!((image.state(), image.counters().chunks), (LayerState::Lazy, 4));
    // Somebody else's image says the truth about the same blob.
    layer.spec.diff_id = right;
    let honest = stage.open(&layer);
    assert_eq!(read(&honest, 0, 8000).unwrap(), layer.image);
    until("the honest layer is local", || honest.state() == LayerState::Local);
}
