//! Layers brought to local in the background, by the room `unpack`.

use std::sync::mpsc::channel;
use std::time::Duration;

use headstart::chunked::Compression;
use headstart::fetch::{FetchConfig, LayerState, Standing};
use headstart::model::{Algorithm, DiffId, Digest};
use headstart::testkit::source::{Answer, Refusal, Scripted, ScriptedSource, TestLayer};
use headstart::unpack::{Fill, FillOptions, Persistence, Phase, UnpackError};

use super::*;

const AT_ONCE: FillOptions = FillOptions { start_delay: Duration::ZERO, persistence: Persistence::Once };

fn fill(stage: &Stage, layers: &[Arc<LayerImage>]) -> Result<(), UnpackError> {
    let fill = Fill::start(stage.runtime.handle(), layers, AT_ONCE);
    let finished = async { tokio::time::timeout(PATIENCE, fill.finished()).await.expect("a fill ends") };
    stage.runtime.block_on(finished)
}

/// A layer whose chunks are many and of different sizes.
fn sizes(seed: usize) -> Vec<usize> {
    (0..200).map(|i| 1 + (i * 7919 + seed * 31) % 9000).collect()
}

#[test]
fn all_layers_become_local_and_those_who_wait_are_told_once() {
    // Nothing is held for its turn to be hashed, some is, everything is.
    for hold in [0, 20_000, 16 << 20] {
        let stage = Stage::new(FetchConfig { hold, range: 20_000, ..plain() });
        let tests: Vec<TestLayer> = (0..4).map(|seed| TestLayer::new(&sizes(seed), Compression::Zstd)).collect();
        let layers: Vec<_> = tests.iter().map(|test| stage.open(test)).collect();
        let (sender, told) = channel();
        for layer in &layers {
            let sender = sender.clone();
            layer.when_local(move |_, local| sender.send(local.clone()).unwrap());
        }
        drop(sender);
        fill(&stage, &layers).unwrap();
        let told: Vec<_> = told.iter().collect();
        assert_eq!(told.len(), layers.len());
        for (layer, test) in layers.iter().zip(&tests) {
            let local = layer.local().expect("the layer is local");
            assert!(told.contains(&local));
            assert_eq!(local.diff_id, test.spec.diff_id);
            assert!(std::fs::read(&local.image).unwrap() == test.image);
            assert_eq!(layer.state(), LayerState::Local);
            let (sender, at_once) = channel();
            layer.when_local(move |_, local| sender.send(local.clone()).unwrap());
            assert_eq!(at_once.recv_timeout(PATIENCE).unwrap(), local);
        }
        // Nothing is left to do, and nothing is done.
        let asked = stage.source.asked().len();
        fill(&stage, &layers).unwrap();
        assert_eq!(stage.source.asked().len(), asked);
    }
}

#[test]
fn what_a_process_before_has_fetched_is_hashed_as_well() {
    let root = TempDir::new().unwrap();
    let test = TestLayer::new(&sizes(1), Compression::Zstd);
    {
        let stage = Stage::below(root.path(), plain());
        let layer = stage.open(&test);
        for at in [0, 50_000, 100_000, 300_000] {
            read(&layer, at, 20_000).unwrap();
        }
    }
    let stage = Stage::below(root.path(), plain());
    let layer = stage.open(&test);
    assert_eq!(layer.state(), LayerState::Lazy);
    fill(&stage, &[Arc::clone(&layer)]).unwrap();
    assert!(std::fs::read(layer.local().unwrap().image).unwrap() == test.image);
    drop((layer, stage));
    let stage = Stage::below(root.path(), plain());
    assert_eq!(stage.open(&test).state(), LayerState::Local);
    assert!(stage.source.asked().is_empty(), "a local layer needs no source");
}

#[test]
fn an_image_that_contradicts_itself_never_becomes_local() {
    let stage = Stage::new(plain());
    let mut test = TestLayer::new(&sizes(2), Compression::Zstd);
    test.spec.diff_id = DiffId(Digest::of(Algorithm::Sha256, b"something else"));
    let layer = stage.open(&test);
    let error = fill(&stage, &[Arc::clone(&layer)]).unwrap_err();
    assert!(matches!(error, UnpackError::Contradiction { expected, .. } if expected == test.spec.diff_id), "{error:?}");
    assert!(matches!(*layer.standing().borrow(), Standing::Contradicted(_)));
    assert_eq!((layer.local(), layer.state()), (None, LayerState::Lazy));
    assert_eq!(layer.counters().chunks, 400, "the copy was distrusted once");
    assert_eq!(read(&layer, 0, 100).unwrap(), test.image[..100], "its chunks are what the index says");
}

#[test]
fn a_layer_is_opened_once_and_any_source_of_it_will_do() {
    let stage = Stage::new(plain());
    let test = TestLayer::new(&sizes(3), Compression::Zstd);
    let layer = stage.open(&test);
    stage.source.script(|_| Answer { refuse: Some(Refusal::Final), ..Answer::default() });
    assert!(matches!(fill(&stage, &[Arc::clone(&layer)]), Err(UnpackError::Fetch { .. })));
    let other = Arc::new(Named(ScriptedSource::new(1000)));
    other.0.add_as(test.spec.blob, &test.bytes);
    let again = stage.runtime.block_on(stage.fetcher.open_layer(test.spec.clone(), other)).unwrap();
    assert!(Arc::ptr_eq(&layer, &again));
    fill(&stage, &[layer]).unwrap();
}

/// A source with another name than all others.
struct Named(Arc<ScriptedSource>);

impl headstart::model::BlobSource for Named {
    fn open(
        &self,
        blob: headstart::model::BlobDigest,
        range: ByteRange,
        attempt: u32,
    ) -> futures::future::BoxFuture<'_, Result<headstart::model::ByteStream, headstart::model::SourceError>> {
        let source = Scripted(Arc::clone(&self.0));
        Box::pin(async move { source.open(blob, range, attempt).await })
    }

    fn origin(&self) -> String {
        "another".to_owned()
    }
}

#[test]
fn a_persistent_fill_tries_again() {
    let stage = Stage::new(plain());
    let test = TestLayer::new(&[1000; 20], Compression::Zstd);
    let layer = stage.open(&test);
    stage.source.script(|_| Answer { refuse: Some(Refusal::Final), ..Answer::default() });
    let options = FillOptions { persistence: Persistence::Forever, ..AT_ONCE };
    let fill = Fill::start(stage.runtime.handle(), &[Arc::clone(&layer)], options);
    until("it pauses", || matches!(fill.phases()[..], [Phase::Pausing(UnpackError::Fetch { .. })]));
    stage.source.script(|_| Answer::default());
    stage.runtime.block_on(async { tokio::time::timeout(PATIENCE, fill.finished()).await.unwrap() }).unwrap();
    assert!(layer.local().is_some());
}

#[test]
fn a_fill_waits_for_its_start_and_ends_when_it_is_dropped() {
    let stage = Stage::new(plain());
    let test = TestLayer::new(&[1000; 20], Compression::Zstd);
    let layer = stage.open(&test);
    let before = stage.source.asked().len();
    let options = FillOptions { start_delay: Duration::from_secs(3600), ..AT_ONCE };
    let fill = Fill::start(stage.runtime.handle(), &[Arc::clone(&layer)], options);
    assert!(matches!(fill.phases()[..], [Phase::Waiting]));
    assert_eq!(stage.source.asked().len(), before);
    // Readers who want more than a fifth end the wait.
    read(&layer, 0, 5000).unwrap();
    stage.runtime.block_on(async { tokio::time::timeout(PATIENCE, fill.finished()).await.unwrap() }).unwrap();
    let other = stage.open(&TestLayer::new(&[1000; 21], Compression::Zstd));
    drop(Fill::start(stage.runtime.handle(), &[Arc::clone(&other)], options));
    assert_eq!(other.state(), LayerState::Lazy);
}
