//! The download path against a source that follows a script.

mod evictions;
mod fills;
mod hardship;
mod layers;
mod reads;
mod streams;

use std::path::Path;
use std::sync::Arc;

use headstart::fetch::{Cause, FetchConfig, FetchError, Fetcher, LayerImage};
use headstart::model::{ByteRange, ReadAt, ReadAtError};
use headstart::store::Store;
use headstart::testkit::source::{Scripted, ScriptedSource, TestLayer};
use headstart::testkit::waiting::{PATIENCE, wait_until as until};
use tempfile::TempDir;
use tokio::runtime::Runtime;

/// A fetcher over a store and a scripted source.
struct Stage {
    source: Arc<ScriptedSource>,
    fetcher: Fetcher,
    runtime: Runtime,
    _root: Option<TempDir>,
}

/// Neither reads ahead nor brings heads along: what is asked for is what a test asks for.
fn plain() -> FetchConfig {
    FetchConfig { read_ahead: 0, head: 0, ..FetchConfig::default() }
}

impl Stage {
    fn new(config: FetchConfig) -> Self {
        Self::at(TempDir::new().unwrap(), config)
    }

    /// A stage whose store is below a directory that is there already.
    fn at(root: TempDir, config: FetchConfig) -> Self {
        let stage = Self::below(root.path(), config);
        Self { _root: Some(root), ..stage }
    }

    /// A stage whose store is below a directory that somebody else removes.
    fn below(root: &Path, config: FetchConfig) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let store = Arc::new(Store::open(root).unwrap());
        let fetcher = Fetcher::new(store, runtime.handle().clone(), config).unwrap();
        Self { source: ScriptedSource::new(1000), fetcher, runtime, _root: None }
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

fn ranges(stage: &Stage) -> Vec<(u64, u64)> {
    stage.source.asked().iter().map(|asked| (asked.range.start(), asked.range.end())).collect()
}

fn blob_range(layer: &TestLayer, first: usize, last: usize) -> (u64, u64) {
    (layer.chunks[first].start(), layer.chunks[last].end())
}
