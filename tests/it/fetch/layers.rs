//! Layers as a whole: their indexes, their heads, those that come from start to end, and what is verified when all is here.

use headstart::chunked::Compression;
use headstart::fetch::{FetchConfig, FetchError, LayerState};
use headstart::model::{Algorithm, BlobDigest, DiffId, Digest, IndexDigest, ReadAt, ReadAtError};
use headstart::testkit::source::{Answer, Ending, TestLayer};

use super::{Stage, plain, ranges, read, until};

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
    section.section.digest = Some(IndexDigest(digest));
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
    drop(image);
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
    until("its chunks are distrusted and fetched once more", || {
        assert_eq!(read(&image, 0, 8000).unwrap(), layer.image);
        image.counters().chunks == 4
    });
    until("the contradiction is known", || image.status().contradiction == Some(right));
    assert_eq!(read(&image, 0, 8000).unwrap(), layer.image);
    assert_eq!((image.state(), image.counters().chunks), (LayerState::Lazy, 4));
    // Somebody else's image says the truth about the same blob.
    layer.spec.diff_id = right;
    let honest = stage.open(&layer);
    assert_eq!(read(&honest, 0, 8000).unwrap(), layer.image);
    until("the honest layer is local", || honest.state() == LayerState::Local);
}
