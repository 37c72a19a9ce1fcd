//! Chunks that go to make room, under readers and fills.

use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use headstart::chunked::Compression;
use headstart::fetch::{FetchConfig, LayerState, Standing};
use headstart::store::image_path;
use headstart::sys::{FileLock, LockMode};
use headstart::testkit::source::{Answer, Gate, TestLayer};
use headstart::unpack::{Fill, FillOptions, Persistence, UnpackError};

use super::*;

const CHUNK: usize = 8192;

fn layer(seed: u8) -> TestLayer {
    TestLayer::new(&vec![CHUNK; 20 + usize::from(seed)], Compression::Zstd)
}

fn fill(stage: &Stage, layer: &Arc<LayerImage>) -> Result<(), UnpackError> {
    let options = FillOptions { start_delay: Duration::ZERO, persistence: Persistence::Once };
    let fill = Fill::start(stage.runtime.handle(), &[Arc::clone(layer)], options);
    stage.runtime.block_on(async { tokio::time::timeout(PATIENCE, fill.finished()).await.expect("a fill ends") })
}

/// The chunks that can be read without asking for them. `image` is that of another process: whoever reads uses.
fn there(image: &Arc<LayerImage>) -> Vec<usize> {
    let chunks = image.size().div_ceil(CHUNK as u64);
    let has = |chunk: &u64| image.read_exact_at(chunk * CHUNK as u64, &mut [0; CHUNK]).is_ok();
    (0..chunks).filter(has).map(|chunk| usize::try_from(chunk).unwrap()).collect()
}

#[test]
fn what_nobody_read_goes_first_and_then_what_was_read_longest_ago() {
    let root = TempDir::new().unwrap();
    let (stage, other) = (Stage::below(root.path(), plain()), Stage::below(root.path(), plain()));
    let (one, two) = (layer(0), layer(1));
    let (a, b) = (stage.open(&one), stage.open(&two));
    let (of_a, of_b) = (other.open(&one), other.open(&two));
    fill(&stage, &a).unwrap();
    let at = |chunk: usize| (chunk * CHUNK) as u64;
    for chunk in [3, 5, 7] {
        read(&a, at(chunk), 10).unwrap();
    }
    read(&b, at(2), 10).unwrap();
    // Seventeen chunks were never read.
    let would = stage.fetcher.make_room(4 * CHUNK as u64, true).unwrap();
    assert_eq!((would.chunks, would.bytes), (4, 4 * CHUNK as u64));
    assert_eq!(a.status().present, 20, "a dry run takes nothing");
    let room = stage.fetcher.make_room(4 * CHUNK as u64, false).unwrap();
    assert_eq!((room, a.counters().evicted), (would, 4));
    assert_eq!(there(&of_a), [[3].as_slice(), &(5..20).collect::<Vec<_>>()].concat());
    // As much as there is: what was read of late stays.
    stage.fetcher.make_room(u64::MAX, false).unwrap();
    assert_eq!((there(&of_a), there(&of_b)), (vec![3, 5, 7], vec![2]));
    // The next time only what was read since.
    until("what was not read again goes", || {
        read(&a, at(5), 10).unwrap();
        stage.fetcher.make_room(u64::MAX, false).unwrap();
        (there(&of_a), there(&of_b)) == (vec![5], vec![])
    });
    assert_eq!(read(&a, 0, one.image.len()).unwrap(), one.image);
    assert_eq!(read(&b, 0, two.image.len()).unwrap(), two.image);
}

#[test]
fn a_layer_that_lost_a_chunk_is_not_local_until_it_is_back() {
    let root = TempDir::new().unwrap();
    let test = layer(0);
    // The second process knows the layer as well, and loses nothing by itself.
    let (stage, other) = (Stage::below(root.path(), plain()), Stage::below(root.path(), plain()));
    let (here, theirs) = (stage.open(&test), other.open(&test));
    fill(&stage, &here).unwrap();
    fill(&other, &theirs).unwrap();
    assert!(here.is_local() && theirs.is_local());
    assert_eq!(stage.fetcher.make_room(1, false).unwrap().chunks, 1);
    assert_eq!((here.state(), theirs.state()), (LayerState::Lazy, LayerState::Lazy));
    assert!(matches!(*here.standing().borrow(), Standing::Incomplete));
    assert_eq!((here.local(), theirs.local()), (None, None), "nobody is told where a hole is");
    // By reads alone.
    assert_eq!(read(&theirs, 0, test.image.len()).unwrap(), test.image);
    until("the layer is local again", || theirs.is_local());
    read(&here, 0, 10).unwrap();
    until("others notice", || here.is_local());
    // Who was told where it is may give it to the kernel.
    let local = theirs.local().expect("all of it is there");
    assert_eq!(stage.fetcher.make_room(u64::MAX, false).unwrap().chunks, 0);
    assert_eq!(std::fs::read(local.image).unwrap(), test.image);
    drop((theirs, other));
    assert!(stage.fetcher.make_room(u64::MAX, false).unwrap().chunks > 0);
}

/// Waits until whoever watches the layer hears that it is local; nobody asks for anything meanwhile.
fn becomes_local(stage: &Stage, image: &Arc<LayerImage>) {
    let mut standing = image.standing();
    let local = standing.wait_for(|standing| matches!(standing, Standing::Local { .. }));
    let told = stage.runtime.block_on(async { tokio::time::timeout(PATIENCE, local).await.map(|told| told.is_ok()) });
    assert_eq!(told, Ok(true));
}

#[test]
fn a_layer_that_another_process_completes_is_local_here_as_well() {
    let root = TempDir::new().unwrap();
    let test = layer(0);
    let (stage, other) = (Stage::below(root.path(), plain()), Stage::below(root.path(), plain()));
    let (here, theirs) = (stage.open(&test), other.open(&test));
    read(&here, 0, 10).unwrap();
    assert_eq!(read(&theirs, 0, test.image.len()).unwrap(), test.image);
    becomes_local(&stage, &here);
    // And what they evict is missed.
    let mut standing = here.standing();
    until("what was read goes", || other.fetcher.make_room(1, false).unwrap().chunks > 0);
    let lost = standing.wait_for(|standing| matches!(standing, Standing::Incomplete));
    stage.runtime.block_on(async { tokio::time::timeout(PATIENCE, lost).await.unwrap().unwrap() });
}

#[test]
fn a_chunk_that_came_while_its_place_was_evicted_is_kept_in_the_end() {
    let root = TempDir::new().unwrap();
    let test = layer(0);
    let stage = Stage::below(root.path(), plain());
    let image = stage.open(&test);
    let place = image_path(root.path(), image.blob(), &image.anchor().to_string()).unwrap();
    let place = place.parent().unwrap();
    // Another process evicts chunk 7.
    let guard = FileLock::acquire(&place.join("guard"), LockMode::Exclusive).unwrap();
    let live = std::fs::OpenOptions::new().write(true).open(place.join("live")).unwrap();
    live.write_all_at(&[2], 64 + 8 + 7).unwrap();
    assert_eq!(read(&image, 0, test.image.len()).unwrap(), test.image);
    assert_eq!(image.status().present, 19);
    // It is done, and its lock is given back.
    live.write_all_at(&[0], 64 + 8 + 7).unwrap();
    drop(guard);
    becomes_local(&stage, &image);
    assert_eq!(std::fs::read(image.local().unwrap().image).unwrap(), test.image);
}

#[test]
fn metadata_stays() {
    // What looked at metadata has asked for chunk 4; chunks 0 and 1 lie in the head.
    let test = layer(0);
    let head = test.chunks[1].end();
    let root = TempDir::new().unwrap();
    let (stage, other) =
        (Stage::below(root.path(), FetchConfig { head, ..plain() }), Stage::below(root.path(), plain()));
    let image = stage.open(&test);
    let observed = other.open(&test);
    ask(&image, 4 * CHUNK as u64, 1, Cause::Metadata).recv_timeout(PATIENCE).unwrap().unwrap();
    fill(&stage, &image).unwrap();
    until("all but metadata goes", || {
        stage.fetcher.make_room(u64::MAX, false).unwrap();
        there(&observed) == [0, 1, 4]
    });
}

#[test]
fn a_fill_whose_chunks_go_gives_up() {
    let stage = Stage::new(FetchConfig { range: 1000, background_connections: 1, ..plain() });
    let test = layer(200);
    let gate = Gate::closed();
    let held = test.chunks[100].start();
    let (image, hold) = (stage.open(&test), gate.clone());
    stage.source.script(move |_| Answer { hold: Some((held, hold.clone())), ..Answer::default() });
    let options = FillOptions { start_delay: Duration::ZERO, persistence: Persistence::Forever };
    let fill = Fill::start(stage.runtime.handle(), &[Arc::clone(&image)], options);
    until("half of it is there", || image.status().present >= 50);
    assert!(stage.fetcher.make_room(CHUNK as u64, false).unwrap().chunks > 0);
    gate.open();
    let finished = async { tokio::time::timeout(PATIENCE, fill.finished()).await.expect("a fill ends") };
    let error = stage.runtime.block_on(finished).unwrap_err();
    assert!(
        matches!(&error, UnpackError::Fetch { source, .. } if matches!(**source, FetchError::NoRoom { .. })),
        "{error:?}"
    );
    assert_eq!(read(&image, 0, test.image.len()).unwrap(), test.image);
}

#[test]
fn readers_and_fills_and_evictions_together_show_the_right_bytes() {
    let root = TempDir::new().unwrap();
    let test = layer(40);
    let stages: Vec<Stage> = (0..2).map(|_| Stage::below(root.path(), plain())).collect();
    let images: Vec<_> = stages.iter().map(|stage| stage.open(&test)).collect();
    let (over, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
    let evicted = std::thread::scope(|scope| {
        for number in 0..4 {
            let (image, test, over, reads) = (&images[number % 2], &test, &over, &reads);
            scope.spawn(move || {
                let mut at = number * 1000;
                while !over.load(Ordering::Relaxed) {
                    at = (at * 31 + 4099) % (test.image.len() - 20_000);
                    let len = 1 + at % 20_000;
                    assert!(read(image, at as u64, len).unwrap() == test.image[at..at + len], "{len} bytes at {at}");
                    reads.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let (mut evicted, fills) = (0, Arc::new(AtomicUsize::new(0)));
        until("enough has gone and come", || {
            // Those that find no room end, others begin.
            if fills.load(Ordering::Relaxed) == 0 {
                let under_way = Arc::clone(&fills);
                under_way.store(1, Ordering::Relaxed);
                images[0].fill(move |_| under_way.store(0, Ordering::Relaxed));
            }
            evicted += stages[0].fetcher.make_room(10 * CHUNK as u64, false).unwrap().chunks;
            evicted > 50 && reads.load(Ordering::Relaxed) > 1000
        });
        over.store(true, Ordering::Relaxed);
        evicted
    });
    assert_eq!(images[0].counters().evicted, evicted);
    for image in &images {
        assert_eq!(read(image, 0, test.image.len()).unwrap(), test.image);
    }
    // Whoever landed the last chunk.
    for (stage, image) in stages.iter().zip(&images) {
        becomes_local(stage, image);
    }
}
