//! Blobs from start to end, as tar layers come.

use std::io::{self, Read as _};
use std::time::Duration;

use headstart::chunked::Compression;
use headstart::fetch::{BlobStream, FetchConfig};
use headstart::model::{Algorithm, BlobDigest, Digest};
use headstart::testkit::source::{Answer, Ending, Gate, Refusal, TestLayer};

use super::*;

const SIZE: usize = 3 << 20;

fn bytes(seed: u8) -> Vec<u8> {
    (0..SIZE).map(|at| (at / 7).to_le_bytes()[0] ^ (at >> 9).to_le_bytes()[0] ^ seed).collect()
}

/// The blob as it is asked for.
fn open(stage: &Stage, blob: &[u8], attempt: u32) -> BlobStream {
    let digest = stage.source.add(blob);
    stage.fetcher.stream(digest, blob.len() as u64, Arc::new(Scripted(Arc::clone(&stage.source))), attempt)
}

fn read_all(mut stream: BlobStream) -> io::Result<Vec<u8>> {
    let mut read = Vec::new();
    stream.read_to_end(&mut read).map(|_| read)
}

fn reason(error: &io::Error) -> &FetchError {
    error.get_ref().and_then(|error| error.downcast_ref()).expect("the reason is told")
}

#[test]
fn a_broken_connection_is_replaced_where_it_broke() {
    let stage = Stage::new(plain());
    let blob = bytes(1);
    let (first, second) = (1_000_001_u64, 2_500_000_u64);
    stage.source.script(move |asked| {
        let end = match asked.range.start() {
            0 => Some((first, Ending::Transient)),
            start if start == first => Some((second, Ending::Silent)),
            _ => None,
        };
        Answer { end, ..Answer::default() }
    });
    assert!(read_all(open(&stage, &blob, 0)).unwrap() == blob);
    let asked = ranges(&stage);
    let end = blob.len() as u64;
    // What was in a piece that broke off comes again.
    assert_eq!(asked.len(), 3, "{asked:?}");
    assert!(asked.iter().all(|range| range.1 == end), "{asked:?}");
    assert!(asked[1].0 <= first && asked[1].0 > first - 2000 && asked[2].0 <= second, "{asked:?}");
}

#[test]
fn what_does_not_come_or_is_wrong_is_told() {
    let stage = Stage::new(plain());
    let blob = bytes(2);
    stage.source.script(|_| Answer { corrupt: Some(77), ..Answer::default() });
    let error = read_all(open(&stage, &blob, 0)).unwrap_err();
    assert!(matches!(reason(&error), FetchError::BlobDigest { .. }), "{error:?}");
    stage.source.script(|_| Answer { refuse: Some(Refusal::Final), ..Answer::default() });
    let error = read_all(open(&stage, &blob, 0)).unwrap_err();
    assert!(matches!(reason(&error), FetchError::WholeSource { .. }), "{error:?}");
    stage.source.script(|_| Answer { end: Some((5000, Ending::Silent)), ..Answer::default() });
    let before = stage.source.asked().len();
    let error = read_all(open(&stage, &blob, 3)).unwrap_err();
    assert!(matches!(reason(&error), FetchError::Interrupted { .. }), "{error:?}");
    let asked = stage.source.asked().split_off(before);
    assert!(asked.len() == 4 && asked.iter().all(|asked| asked.attempt == 3), "{asked:?}");

    // Who goes down in between has not found wrong bytes.
    let gate = Gate::closed();
    let hold = gate.clone();
    stage.source.script(move |_| Answer { hold: Some((100_000, hold.clone())), ..Answer::default() });
    let mut stream = open(&stage, &blob, 0);
    stream.read_exact(&mut [0; 1000]).unwrap();
    let Stage { runtime, fetcher, .. } = stage;
    runtime.shutdown_background();
    let error = read_all(stream).unwrap_err();
    assert!(matches!(reason(&error), FetchError::Abandoned { .. }), "{error:?}");
    drop((fetcher, gate));
}

#[test]
fn streams_leave_connections_to_those_who_wait_and_to_fills() {
    // Of five connections three are for the background, and two of them for streams.
    let stage = Stage::new(FetchConfig { connections: 5, background_connections: 3, ..plain() });
    let layer = TestLayer::new(&[5000; 20], Compression::Zstd);
    let image = stage.open(&layer);
    let gate = Gate::closed();
    let blobs: Vec<Vec<u8>> = (10..14).map(bytes).collect();
    let digests: Vec<BlobDigest> = blobs.iter().map(|blob| BlobDigest(Digest::of(Algorithm::Sha256, blob))).collect();
    let (held, hold) = (digests.clone(), gate.clone());
    stage.source.script(move |asked| Answer {
        hold: held.contains(&asked.blob).then(|| (10_000, hold.clone())),
        ..Answer::default()
    });
    let streams: Vec<BlobStream> = blobs.iter().map(|blob| open(&stage, blob, 0)).collect();
    let under_way = || stage.source.asked().iter().filter(|asked| digests.contains(&asked.blob)).count();
    until("two streams are under way", || under_way() == 2);
    assert_eq!(read(&image, 0, 5000).unwrap(), layer.image[..5000]);
    let (sender, filled) = std::sync::mpsc::channel();
    image.fill(move |result| sender.send(result).unwrap());
    filled.recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(under_way(), 2);
    gate.open();
    let readers: Vec<_> = streams.into_iter().map(|stream| std::thread::spawn(move || read_all(stream))).collect();
    for (reader, blob) in readers.into_iter().zip(blobs) {
        assert!(reader.join().unwrap().unwrap() == blob);
    }
    assert!(stage.source.most_open() <= 5);
}

#[test]
fn who_rests_gives_his_connection_to_others() {
    // One connection for streams: who reads the second waits for nobody who reads the first.
    let stage = Stage::new(FetchConfig { connections: 2, background_connections: 1, ..plain() });
    let (one, two) = (bytes(20), bytes(21));
    let mut first = open(&stage, &one, 0);
    let mut start = vec![0; 1000];
    first.read_exact(&mut start).unwrap();
    assert!(read_all(open(&stage, &two, 0)).unwrap() == two);
    let rest = read_all(first).unwrap();
    assert!([start, rest].concat() == one);
    let asked = ranges(&stage);
    assert!(asked.len() >= 3 && asked[0].0 == 0 && asked.iter().filter(|range| range.0 == 0).count() == 2, "{asked:?}");
}

#[test]
fn streams_keep_to_the_bandwidth_of_fills() {
    let stage = Stage::new(FetchConfig { fill_bandwidth: Some(2 << 20), ..plain() });
    let blob = bytes(30);
    let begin = std::time::Instant::now();
    assert!(read_all(open(&stage, &blob, 0)).unwrap() == blob);
    // Three MiB at two a second, and what may pass at once.
    assert!(begin.elapsed() >= Duration::from_millis(1_400), "{:?}", begin.elapsed());
}

#[test]
fn who_reads_a_layer_that_is_being_filled_does_not_wait_for_the_bandwidth_of_fills() {
    let stage = Stage::new(FetchConfig { fill_bandwidth: Some(1000), ..plain() });
    let mut layer = TestLayer::new(&[50_000; 10], Compression::Zstd);
    layer.spec.index = None;
    let image = stage.open(&layer);
    image.fill(|_| ());
    until("the fill is under way", || !stage.source.asked().is_empty());
    // All of it at the fill's pace would take four minutes.
    assert_eq!(read(&image, 0, layer.image.len()).unwrap(), layer.image);
    assert_eq!(stage.source.asked().len(), 1);
}
