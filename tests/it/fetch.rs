//! The download path against a source that follows a script.

use std::sync::Arc;
use std::time::Duration;

use headstart::chunked::Compression;
use headstart::fetch::{Cause, FetchConfig, FetchError, Fetcher, LayerImage, LayerState};
use headstart::model::{ByteRange, ReadAt, ReadAtError};
use headstart::store::Store;
use headstart::testkit::source::{Answer, Scripted, ScriptedSource, TestLayer};
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
