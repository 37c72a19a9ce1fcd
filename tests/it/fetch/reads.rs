//! Reads: what they fetch, in which order, and what becomes of them when the source fails.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use headstart::chunked::Compression;
use headstart::fetch::{Cause, FetchConfig, FetchError, LayerState};
use headstart::model::{ByteRange, ReadAt, ReadAtError};
use headstart::testkit::source::{Answer, Ending, Gate, Refusal, TestLayer};

use super::{PATIENCE, Stage, ask, blob_range, plain, ranges, read, until};

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
        // Two requests at the same time.
        let rest: BTreeSet<_> = ranges(&stage).split_off(1).into_iter().collect();
        assert_eq!(rest, BTreeSet::from([blob_range(&layer, 0, 0), blob_range(&layer, 3, 4)]));
        let counters = image.counters();
        assert_eq!((counters.chunks, counters.needed), (5, layer.chunks[4].end()));
        assert_eq!(counters.fetched, layer.bytes.len() as u64);
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
    let reads: BTreeSet<u64> = (0..5).map(|i| layer.chunks[i * 4 + 2].start()).collect();
    // Those whose turn has come ask in any order: the other two connections may be faster than the last read's.
    let first: BTreeSet<u64> = order[2..9].iter().copied().collect();
    assert!(first.is_superset(&reads), "the background was served before those who wait: {order:?}");
    assert_eq!(stage.source.most_open(), 3);
    assert_eq!(stage.source.overlaps(), []);
}

#[test]
fn whoever_waits_overtakes_a_long_background_flight() {
    let stage = Stage::new(FetchConfig { range: 64 << 20, ..plain() });
    let layer = TestLayer::new(&[400_000; 9], Compression::None);
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
    assert_eq!(read(&image, 2_800_000, 1000).unwrap(), layer.image[2_800_000..2_801_000]);
    assert_eq!(ranges(&stage), [blob_range(&layer, 0, 8), blob_range(&layer, 7, 7)]);
    gate.open();
    filled.recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(read(&image, 0, 3_600_000).unwrap(), layer.image);
    assert_eq!(ranges(&stage)[2..], [blob_range(&layer, 8, 8)], "a chunk came twice, or never");
    assert_eq!(image.counters().chunks, 9);
}

#[test]
fn whoever_waits_does_not_wait_for_a_background_flight_that_stalls() {
    let stage = Stage::new(plain());
    let layer = TestLayer::new(&[5000; 8], Compression::None);
    let image = stage.open(&layer);
    stage.source.forget();
    stage
        .source
        .script(move |asked| Answer { end: (asked.number == 0).then_some((7000, Ending::Stall)), ..Answer::default() });
    let ahead = ask(&image, 0, 40_000, Cause::ReadAhead);
    until("the first chunk is there", || image.read_exact_at(0, &mut [0; 10]).is_ok());
    assert_eq!(read(&image, 6000, 10_000).unwrap(), layer.image[6000..16_000]);
    assert_eq!(ranges(&stage), [blob_range(&layer, 0, 7), blob_range(&layer, 1, 3)]);
    assert!(ahead.try_recv().is_err());
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
    // The bad chunk alone is asked for again, maybe while the rest of its range still arrives.
    let again = blob_range(&layer, 200, 200);
    let twice: Vec<_> = stage
        .source
        .overlaps()
        .into_iter()
        .filter(|(_, later)| (later.range.start(), later.range.end()) != again)
        .collect();
    assert_eq!(twice, []);
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
