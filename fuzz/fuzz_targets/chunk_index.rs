//! A blob and its index, both foreign. Whatever the index says, its chunks tile the image and stay inside of the blob;
//! whatever a chunk inflates to has the length that the index says, and is what a read from start to end gives.
//!
//! Input: one byte of choices, two bytes that say where the index begins, the blob.
#![no_main]

use headstart::chunked::{
    BlobAssembler, Chunk, Compression, Framing, IndexFamily, IndexSection, MAX_CHUNK_SIZE, SequentialError,
    SequentialReader, compress_chunk, decode_chunk,
};
use headstart::model::ByteRange;
use libfuzzer_sys::fuzz_target;

/// The largest chunk that is inflated here: enough for every path, and quick.
const INFLATE: u64 = 1 << 20;

fuzz_target!(|input: &[u8]| {
    let Some(([choice, low, high], blob)) = input.split_first_chunk::<3>() else { return };
    let start = usize::from(u16::from_le_bytes([*low, *high])) % (blob.len() + 1);
    let family = if choice & 1 == 0 { IndexFamily::ImageSpec } else { IndexFamily::Pr12703 };
    let compression = if choice & 2 == 0 { Compression::Zstd } else { Compression::None };
    let framing = if choice & 4 == 0 { Framing::Frame } else { Framing::Bare };
    drop(sequential(blob, compression));
    let section = IndexSection { family, framing, compression, digest: None, data_end: start as u64 };
    let Ok(index) = section.read(&blob[start..]) else { return };

    let (mut image_end, mut blob_end) = (0, None);
    let mut out = Vec::new();
    let mut image = Some(Vec::new());
    for (number, chunk) in index.iter().enumerate() {
        assert_eq!(chunk.image.start(), image_end);
        assert_eq!(chunk.blob.start(), blob_end.unwrap_or(chunk.blob.start()));
        assert!(!chunk.image.is_empty() && !chunk.blob.is_empty() && chunk.image.len() <= MAX_CHUNK_SIZE);
        (image_end, blob_end) = (chunk.image.end(), Some(chunk.blob.end()));
        let number = u32::try_from(number).unwrap();
        assert_eq!(index.chunk(number), Some(chunk));
        assert_eq!(index.chunks_in(chunk.image), number..number + 1);
        let stored = &blob[chunk.blob.start() as usize..chunk.blob.end() as usize];
        let decoded = chunk.image.len() <= INFLATE && decode_chunk(&chunk, compression, stored, &mut out).is_ok();
        match &mut image {
            Some(image) if decoded => {
                assert_eq!(out.len() as u64, chunk.image.len());
                image.extend_from_slice(&out);
            }
            image => *image = None,
        }
    }
    assert_eq!(image_end, index.image_size());
    assert!(blob_end.is_none_or(|end| end == start as u64));
    assert_eq!(index.chunks_in(ByteRange::to(u64::MAX)), 0..index.len());
    assert_eq!(index.chunk(index.len()), None);
    // Bytes before the first chunk belong to no chunk; a read from start to end meets them all the same.
    let begins = index.chunk(0).map_or(start as u64, |chunk| chunk.blob.start());
    if let Some(image) = image.filter(|_| begins == 0) {
        match sequential(&blob[..start], compression) {
            Ok(sequential) => assert_eq!(sequential, image),
            // Inflating one chunk needs no window, inflating a stream does, and windows are limited.
            Err(SequentialError::Inflate { reason, .. }) if reason.contains("memory") => {}
            Err(error) => panic!("chunks that inflate one by one do so in a row, but {error}"),
        }
        let range = |chunk: Chunk| chunk.image.start() as usize..chunk.image.end() as usize;
        rewrite(&index.iter().map(|chunk| &image[range(chunk)]).collect::<Vec<_>>());
    }
});

fn sequential(blob: &[u8], compression: Compression) -> Result<Vec<u8>, SequentialError> {
    let (image, summary) = SequentialReader::new(Vec::new(), compression, 4 * INFLATE).run(blob)?;
    assert_eq!(summary.image_size, image.len() as u64);
    Ok(image)
}

/// What we write of the same chunks is read as the same chunks.
fn rewrite(chunks: &[&[u8]]) {
    let mut assembler = BlobAssembler::new(Vec::new(), Compression::Zstd);
    for chunk in chunks {
        assembler.append(&compress_chunk(1, chunk), chunk.len() as u64).unwrap();
    }
    let (blob, summary) = assembler.finish().unwrap();
    let section = IndexSection {
        family: IndexFamily::ImageSpec,
        framing: Framing::Frame,
        compression: Compression::Zstd,
        digest: Some(summary.index_digest),
        data_end: summary.index_range.start(),
    };
    let index = section.read(&blob[summary.index_range.start() as usize..]).unwrap();
    assert_eq!(index.len() as usize, chunks.len());
}
