//! Single chunks: stored bytes to image bytes and back.
//!
//! Each thread keeps its zstd contexts, so that a chunk costs no set-up. The checksum is looked at before a single
//! stored byte reaches the decompressor.

use std::cell::RefCell;

use zstd::zstd_safe::{self, CCtx, DCtx};

use super::index::is_skippable_magic;
use super::{Chunk, Compression, MAX_CHUNK_SIZE, Mismatch, SKIPPABLE_HEADER};
use crate::model::{ByteRange, ChunkDigest, Digest};

/// Why stored bytes are not the chunk they are said to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the chunk with image bytes {image}, stored in blob bytes {blob}, is damaged")]
pub struct ChunkError {
    /// Where it should be stored.
    pub blob: ByteRange,
    /// What it should cover.
    pub image: ByteRange,
    /// What is wrong.
    #[source]
    pub fault: ChunkFault,
}

/// What is wrong with a chunk.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChunkFault {
    /// The bytes at hand are more or fewer than the index says.
    #[error("{0} stored bytes were given")]
    StoredLength(u64),
    /// The checksum is another.
    #[error("its stored bytes have the checksum {}, not {}", .0.found, .0.expected)]
    Checksum(Box<Mismatch<ChunkDigest>>),
    /// The chunk is larger than a chunk may be.
    #[error("its image bytes are more than the limit of {MAX_CHUNK_SIZE}")]
    TooLarge,
    /// A raw chunk is as long as what it covers.
    #[error("raw bytes of another length than the image bytes")]
    RawLength,
    /// It does not begin with a zstd frame.
    #[error("no complete zstd frame at its start")]
    NoFrame,
    /// Something follows the frame that is not one skippable frame.
    #[error("{0} bytes after its zstd frame")]
    TrailingBytes(u64),
    /// The frame inflates to more or fewer bytes than the chunk covers.
    #[error("its zstd frame inflates to another length")]
    ImageLength,
    /// The decompressor refused it.
    #[error("its zstd frame cannot be inflated: {0}")]
    Inflate(&'static str),
}

thread_local! {
    static INFLATE: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
    static DEFLATE: RefCell<CCtx<'static>> = RefCell::new(CCtx::create());
}

/// Turns the stored bytes of `chunk` into its image bytes, which replace what `out` held. Checks the checksum first,
/// then inflates exactly one frame to exactly the chunk's length. One skippable frame may follow the zstd frame: a
/// writer may put padding between the last chunk and the index. On an error `out` is empty.
///
/// # Errors
/// See [`ChunkFault`].
pub fn decode_chunk(
    chunk: &Chunk,
    compression: Compression,
    stored: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), ChunkError> {
    out.clear();
    decode(chunk, compression, stored, out).map_err(|fault| {
        out.clear();
        ChunkError { blob: chunk.blob, image: chunk.image, fault }
    })
}

fn decode(chunk: &Chunk, compression: Compression, stored: &[u8], out: &mut Vec<u8>) -> Result<(), ChunkFault> {
    if stored.len() as u64 != chunk.blob.len() {
        return Err(ChunkFault::StoredLength(stored.len() as u64));
    }
    if let Some(expected) = chunk.checksum {
        let found = ChunkDigest(Digest::of(expected.0.algorithm(), stored));
        if found != expected {
            return Err(ChunkFault::Checksum(Box::new(Mismatch { expected, found })));
        }
    }
    if chunk.image.len() > MAX_CHUNK_SIZE {
        return Err(ChunkFault::TooLarge);
    }
    let size = usize::try_from(chunk.image.len()).map_err(|_| ChunkFault::TooLarge)?;
    match compression {
        Compression::None if stored.len() != size => Err(ChunkFault::RawLength),
        Compression::None => {
            out.extend_from_slice(stored);
            Ok(())
        }
        Compression::Zstd => inflate(only_frame(stored)?, size, out),
    }
}

/// The zstd frame that `stored` consists of, without a skippable frame behind it.
fn only_frame(stored: &[u8]) -> Result<&[u8], ChunkFault> {
    if stored.get(..4) != Some(&zstd_safe::MAGICNUMBER.to_le_bytes()) {
        return Err(ChunkFault::NoFrame);
    }
    let size = zstd_safe::find_frame_compressed_size(stored).map_err(|_| ChunkFault::NoFrame)?;
    let (frame, rest) = stored.split_at_checked(size).ok_or(ChunkFault::NoFrame)?;
    if rest.is_empty() || is_one_skippable_frame(rest) {
        Ok(frame)
    } else {
        Err(ChunkFault::TrailingBytes(rest.len() as u64))
    }
}

fn is_one_skippable_frame(bytes: &[u8]) -> bool {
    let Some(([a, b, c, d, e, f, g, h], payload)) = bytes.split_first_chunk::<SKIPPABLE_HEADER>() else {
        return false;
    };
    is_skippable_magic(u32::from_le_bytes([*a, *b, *c, *d]))
        && u64::from(u32::from_le_bytes([*e, *f, *g, *h])) == payload.len() as u64
}

fn inflate(frame: &[u8], size: usize, out: &mut Vec<u8>) -> Result<(), ChunkFault> {
    match zstd_safe::get_frame_content_size(frame).map_err(|_| ChunkFault::NoFrame)? {
        // The decompressor holds a frame to the size it states, so it may see all of the vector's capacity.
        Some(stated) if stated == size as u64 => out.reserve_exact(size),
        Some(_) => return Err(ChunkFault::ImageLength),
        // A frame that states no size sees a buffer of the chunk's length and not a byte more.
        None => out.resize(size, 0),
    }
    let inflated = INFLATE.with_borrow_mut(|context| {
        if out.len() == size { context.decompress(out.as_mut_slice(), frame) } else { context.decompress(out, frame) }
    });
    match inflated {
        Ok(length) if length == size => Ok(()),
        Ok(_) => Err(ChunkFault::ImageLength),
        Err(code) => Err(ChunkFault::Inflate(zstd_safe::get_error_name(code))),
    }
}

/// Compresses `image` to one zstd frame that states its size. The same bytes and level give the same frame.
pub fn compress_chunk(level: i32, image: &[u8]) -> Vec<u8> {
    let mut stored = Vec::new();
    compress_chunk_into(level, image, &mut stored);
    stored.shrink_to_fit();
    stored
}

/// Like [`compress_chunk`], into a buffer that can be used again. What it held is replaced.
pub fn compress_chunk_into(level: i32, image: &[u8], stored: &mut Vec<u8>) {
    stored.clear();
    stored.reserve_exact(zstd_safe::compress_bound(image.len()));
    let result = DEFLATE.with_borrow_mut(|context| context.compress(stored, image, level));
    if let Err(code) = result {
        unreachable!("a buffer of the bound holds any frame, but zstd says {}", zstd_safe::get_error_name(code));
    }
}
