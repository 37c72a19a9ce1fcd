//! The room as a whole: what the assembler writes is what the readers read, and nothing else is.

use proptest::prelude::*;

use super::*;
use crate::model::{Algorithm, BlobDigest, ByteRange, DiffId, Digest, IndexDigest};

/// An image of chunks with content that compresses a little.
fn image(sizes: &[usize]) -> Vec<Vec<u8>> {
    let mut word = 0x1234_5678_u32;
    let mut next = || {
        word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        word.to_be_bytes()[0] & 0x1f
    };
    sizes.iter().map(|size| (0..*size).map(|_| next()).collect()).collect()
}

fn assemble(chunks: &[Vec<u8>], compression: Compression, sums: Option<Algorithm>) -> (Vec<u8>, BlobSummary) {
    let mut assembler = BlobAssembler::with_checksums(Vec::new(), compression, sums);
    for chunk in chunks {
        match compression {
            Compression::None => assembler.append(chunk, chunk.len() as u64).unwrap(),
            Compression::Zstd => assembler.append(&compress_chunk(3, chunk), chunk.len() as u64).unwrap(),
        }
    }
    assembler.finish().unwrap()
}

fn section(summary: &BlobSummary) -> IndexSection {
    IndexSection {
        family: IndexFamily::ImageSpec,
        framing: if summary.compression == Compression::None { Framing::Bare } else { Framing::Frame },
        compression: summary.compression,
        digest: Some(summary.index_digest),
        data_end: summary.index_range.start(),
    }
}

fn slice(bytes: &[u8], range: ByteRange) -> &[u8] {
    &bytes[usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()]
}

/// Reads every chunk of a blob as a lazy reader does.
fn read_lazily(blob: &[u8], index: &ChunkIndex) -> Result<Vec<u8>, ChunkError> {
    let (mut whole, mut out) = (Vec::new(), Vec::new());
    for chunk in index.iter() {
        decode_chunk(&chunk, index.compression(), slice(blob, chunk.blob), &mut out)?;
        whole.extend_from_slice(&out);
    }
    Ok(whole)
}

fn read_sequentially(blob: &[u8], compression: Compression, piece: usize) -> Result<Vec<u8>, SequentialError> {
    let mut reader = SequentialReader::new(Vec::new(), compression, 1 << 30);
    for piece in blob.chunks(piece) {
        reader.push(piece)?;
    }
    let (image, summary) = reader.finish()?;
    assert_eq!(summary.diff_id, DiffId(Digest::of(Algorithm::Sha256, &image)));
    assert_eq!((summary.image_size, summary.blob_size), (image.len() as u64, blob.len() as u64));
    Ok(image)
}

const KINDS: [(Compression, Option<Algorithm>); 6] = [
    (Compression::None, None),
    (Compression::None, Some(Algorithm::Sha256)),
    (Compression::None, Some(Algorithm::Sha512)),
    (Compression::Zstd, None),
    (Compression::Zstd, Some(Algorithm::Sha256)),
    (Compression::Zstd, Some(Algorithm::Sha512)),
];

#[test]
fn what_is_assembled_is_read_back() {
    for sizes in [&[][..], &[1], &[4096], &[1, 2, 3, 70_000, 5], &[300_000, 300_000]] {
        for (compression, sums) in KINDS {
            let chunks = image(sizes);
            let (blob, summary) = assemble(&chunks, compression, sums);
            assert_eq!(summary.digest, BlobDigest(Digest::of(Algorithm::Sha256, &blob)));
            assert_eq!((summary.size, summary.index_range.end()), (blob.len() as u64, blob.len() as u64));
            let index = section(&summary).read(slice(&blob, summary.index_range)).unwrap();
            assert_eq!((index.len(), index.image_size()), (summary.chunks, summary.image_size));
            assert_eq!(index.has_checksums(), sums.is_some());
            let whole = chunks.concat();
            assert_eq!(read_lazily(&blob, &index).unwrap(), whole);
            let end = if compression == Compression::None { summary.index_range.start() } else { summary.size };
            let sequential = read_sequentially(slice(&blob, ByteRange::to(end)), compression, 777).unwrap();
            assert_eq!(sequential, whole);
        }
    }
}

#[test]
fn ranges_find_the_chunks_that_hold_them() {
    let (blob, summary) = assemble(&image(&[10, 20, 30]), Compression::Zstd, None);
    let index = section(&summary).read(slice(&blob, summary.index_range)).unwrap();
    let cases =
        [(0, 0, 0..0), (0, 1, 0..1), (9, 10, 0..1), (9, 11, 0..2), (10, 30, 1..2), (0, 60, 0..3), (30, 99, 2..3)];
    for (start, end, chunks) in cases {
        assert_eq!(index.chunks_in(ByteRange::new(start, end).unwrap()), chunks, "{start}..{end}");
    }
    assert!(index.chunks_in(ByteRange::new(60, 99).unwrap()).is_empty());
    assert!(index.chunks_in(ByteRange::new(15, 15).unwrap()).is_empty());
    assert_eq!(index.chunk(3), None);
}

#[test]
fn a_detached_index_reads_the_same_chunks() {
    let chunks = image(&[100, 5000]);
    let mut assembler = BlobAssembler::new(Vec::new(), Compression::Zstd);
    for chunk in &chunks {
        assembler.append(&compress_chunk(1, chunk), chunk.len() as u64).unwrap();
    }
    let (blob, detached) = assembler.finish_detached();
    let digest = Some(IndexDigest(Digest::of(Algorithm::Sha256, &detached.payload)));
    let section = IndexSection {
        family: IndexFamily::ImageSpec,
        framing: Framing::Bare,
        compression: Compression::Zstd,
        digest,
        data_end: detached.size,
    };
    let index = section.read(&detached.payload).unwrap();
    assert_eq!(read_lazily(&blob, &index).unwrap(), chunks.concat());
}

#[test]
fn frames_are_the_same_whatever_was_compressed_before() {
    let chunk = &image(&[100_000])[0];
    let first = compress_chunk(3, chunk);
    compress_chunk(9, &image(&[50_000])[0]);
    assert_eq!(compress_chunk(3, chunk), first);
    let elsewhere = std::thread::scope(|scope| scope.spawn(|| compress_chunk(3, chunk)).join().unwrap());
    assert_eq!(elsewhere, first);
}

/// A zstd frame without its size, as a streaming encoder writes it.
fn unsized_frame(image: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
    std::io::Write::write_all(&mut encoder, image).unwrap();
    encoder.finish().unwrap()
}

fn chunk_of(stored: &[u8], image: u64) -> Chunk {
    Chunk { blob: ByteRange::to(stored.len() as u64), image: ByteRange::to(image), checksum: None }
}

#[test]
fn frames_are_held_to_the_length_of_their_chunk() {
    let image = vec![7; 100_000];
    let padding = [0x5f, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 0, 0, 0];
    for frame in [compress_chunk(3, &image), unsized_frame(&image)] {
        let mut out = vec![1, 2, 3];
        decode_chunk(&chunk_of(&frame, 100_000), Compression::Zstd, &frame, &mut out).unwrap();
        assert_eq!(out, image);
        let padded = [&frame[..], &padding].concat();
        decode_chunk(&chunk_of(&padded, 100_000), Compression::Zstd, &padded, &mut out).unwrap();
        assert_eq!(out, image);
        for wrong in [0, 1, 99_999, 100_001, 1 << 40] {
            let error = decode_chunk(&chunk_of(&frame, wrong), Compression::Zstd, &frame, &mut out).unwrap_err();
            assert!(out.is_empty() && out.capacity() < 1 << 20, "{error}");
        }
        let bad = [
            [&frame[..], &frame].concat(),
            [&padding[..], &frame].concat(),
            [&frame[..], b"x"].concat(),
            [&frame[..], &padding, &padding].concat(),
            frame[..frame.len() - 1].to_vec(),
            padding.to_vec(),
            Vec::new(),
        ];
        for stored in bad {
            decode_chunk(&chunk_of(&stored, 100_000), Compression::Zstd, &stored, &mut out).unwrap_err();
        }
    }
}

#[test]
fn a_sequential_read_bounds_what_it_writes_and_knows_the_end() {
    let image = vec![7; 100_000];
    let frame = unsized_frame(&image);
    let padding = [0x5f, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 0, 0, 0];
    let whole = [&padding[..], &frame, &padding, &frame, &padding].concat();
    for piece in [1, 3, 1000, whole.len()] {
        assert_eq!(read_sequentially(&whole, Compression::Zstd, piece).unwrap().len(), 200_000);
    }
    let ends = [0, 11, 11 + frame.len(), 22 + frame.len(), 22 + 2 * frame.len(), whole.len()];
    for cut in 0..whole.len() {
        let result = read_sequentially(&whole[..cut], Compression::Zstd, 10);
        assert_eq!(result.is_ok(), ends.contains(&cut), "cut at {cut}: {result:?}");
    }
    let mut reader = SequentialReader::new(Vec::new(), Compression::Zstd, 150_000);
    assert!(matches!(reader.push(&whole), Err(SequentialError::TooLarge(150_000))));
    assert!(reader.finish().is_err());
    let mut reader = SequentialReader::new(Vec::new(), Compression::Zstd, 1);
    assert!(matches!(reader.push(b"not zstd at all"), Err(SequentialError::Inflate { .. })));
    assert!(reader.finish().is_err());
}

proptest! {
    /// Any single changed byte of a blob is noticed, or harmless: never wrong bytes.
    #[test]
    fn a_changed_byte_never_gives_wrong_bytes(
        sizes in prop::collection::vec(1_usize..600, 0..6),
        kind in prop::sample::select(&KINDS[..]),
        at in any::<prop::sample::Index>(),
        flip in 1_u8..,
    ) {
        let (compression, sums) = kind;
        let chunks = image(&sizes);
        let (mut blob, summary) = assemble(&chunks, compression, sums);
        let at = at.index(blob.len());
        blob[at] ^= flip;
        let in_index = at as u64 >= summary.index_range.start();
        let result = section(&summary).read(slice(&blob, summary.index_range));
        let Ok(index) = result else {
            prop_assert!(in_index);
            return Ok(());
        };
        // The digest covers the payload; a frame may carry any of sixteen magics.
        prop_assert!(!in_index || at as u64 == summary.index_range.start());
        match read_lazily(&blob, &index) {
            Ok(image) if sums.is_some() || in_index => prop_assert_eq!(image, chunks.concat()),
            // Without checksums the lengths at least are right.
            Ok(image) => prop_assert_eq!(image.len() as u64, summary.image_size),
            Err(_) => prop_assert!(!in_index),
        }
    }

    /// An index that nobody promised a digest for, damaged: it is refused, or each chunk fails its checksum or is
    /// right, or the chunk boundaries moved (which only a digest can notice) and lengths still hold.
    #[test]
    fn a_damaged_index_without_digest_stays_in_bounds(
        sizes in prop::collection::vec(1_usize..600, 0..6),
        kind in prop::sample::select(&KINDS[..]),
        at in any::<prop::sample::Index>(),
        flip in 1_u8..,
    ) {
        let (compression, sums) = kind;
        let (blob, summary) = assemble(&image(&sizes), compression, sums);
        let mut bytes = slice(&blob, summary.index_range).to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        let section = IndexSection { digest: None, ..section(&summary) };
        let Ok(index) = section.read(&bytes) else { return Ok(()) };
        let (mut end, mut out) = (0, Vec::new());
        for chunk in index.iter() {
            prop_assert_eq!(chunk.image.start(), end);
            end = chunk.image.end();
            prop_assert!(chunk.blob.end() <= summary.index_range.start());
            let stored = slice(&blob, chunk.blob);
            if decode_chunk(&chunk, index.compression(), stored, &mut out).is_ok() {
                prop_assert_eq!(out.len() as u64, chunk.image.len());
            }
        }
        prop_assert_eq!(end, index.image_size());
    }

    #[test]
    fn no_bytes_make_the_parser_panic(
        mut bytes in prop::collection::vec(any::<u8>(), 0..300),
        family in prop::sample::select(&[IndexFamily::ImageSpec, IndexFamily::Pr12703][..]),
        valid_start in any::<bool>(),
        data_end in any::<u64>(),
    ) {
        if valid_start {
            let start = [0xCD, 0xE4, 0xEC, 0x67, 1];
            let common = start.len().min(bytes.len());
            bytes[..common].copy_from_slice(&start[..common]);
        }
        if let Ok(index) = ChunkIndex::parse(&bytes, family, data_end) {
            prop_assert_eq!(index.iter().count(), index.len() as usize);
        }
    }
}
