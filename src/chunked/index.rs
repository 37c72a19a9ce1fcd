//! Reads chunk indexes. Every rule of the format is checked once, in [`ChunkIndex::parse`]; afterwards each chunk is a
//! non-empty range of the image and of the blob, in order and without gaps in the image.
//!
//! The entries stay in memory as they came, so an index costs what its payload costs.

use std::ops::Range;

use super::fault::{CorruptIndex, IndexError, UnreadableIndex};
use super::{
    Compression, INDEX_MAGIC, INDEX_MAGIC_REVERSED, IndexFamily, MAX_CHUNK_SIZE, MAX_CHUNKS, MAX_INDEX_SIZE,
    MAX_STORED_CHUNK_SIZE, Mismatch, SKIPPABLE_HEADER, SKIPPABLE_MAGIC,
};
use crate::model::{Algorithm, ByteRange, ChunkDigest, Digest, IndexDigest};

/// What surrounds an index payload at its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Framing {
    /// Nothing: the section is the payload (raw blobs, standalone indexes).
    Bare,
    /// One skippable frame that fills the section exactly.
    Frame,
}

/// How to read the bytes at an index's place: everything that a manifest says about them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexSection {
    /// Which form.
    pub family: IndexFamily,
    /// What surrounds the payload.
    pub framing: Framing,
    /// What the layer's media type says about its chunks.
    pub compression: Compression,
    /// The payload's promised digest, if any.
    pub digest: Option<IndexDigest>,
    /// Blob offset where the chunks end.
    pub data_end: u64,
}

impl IndexSection {
    /// Unwraps, verifies and parses the bytes found at the index's place.
    ///
    /// # Errors
    /// See [`IndexError`].
    pub fn read(&self, section: &[u8]) -> Result<ChunkIndex, IndexError> {
        let payload = self.payload(section)?;
        if payload.len() as u64 > MAX_INDEX_SIZE {
            return Err(UnreadableIndex::TooLarge(payload.len() as u64).into());
        }
        if let Some(expected) = self.digest {
            let found = IndexDigest(Digest::of(expected.0.algorithm(), payload));
            if found != expected {
                return Err(CorruptIndex::DigestMismatch(Box::new(Mismatch { expected, found })).into());
            }
        }
        let index = ChunkIndex::parse(payload, self.family, self.data_end)?;
        if index.compression != self.compression {
            let (expected, found) = (self.compression, index.compression);
            return Err(CorruptIndex::CompressionMismatch { expected, found }.into());
        }
        Ok(index)
    }

    /// The payload inside of the bytes found at the index's place, not verified.
    ///
    /// # Errors
    /// [`CorruptIndex::NoFrame`] and [`CorruptIndex::FrameLength`].
    pub fn payload<'a>(&self, section: &'a [u8]) -> Result<&'a [u8], IndexError> {
        if self.framing == Framing::Bare {
            return Ok(section);
        }
        let (header, rest) = section.split_first_chunk::<SKIPPABLE_HEADER>().ok_or(CorruptIndex::NoFrame)?;
        let [a, b, c, d, e, f, g, h] = *header;
        if !is_skippable_magic(u32::from_le_bytes([a, b, c, d])) {
            return Err(CorruptIndex::NoFrame.into());
        }
        let frame = u64::from(u32::from_le_bytes([e, f, g, h]));
        let wrong = CorruptIndex::FrameLength { frame, section: rest.len() as u64 };
        let payload = usize::try_from(frame).ok().and_then(|len| rest.get(..len)).ok_or_else(|| wrong.clone())?;
        if payload.len() == rest.len() { Ok(payload) } else { Err(wrong.into()) }
    }
}

/// True for the sixteen magics of skippable frames.
pub(super) const fn is_skippable_magic(magic: u32) -> bool {
    magic & !0xF == SKIPPABLE_MAGIC
}

/// One chunk: where it is stored, what it covers, what its stored bytes hash to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// Its stored bytes in the blob.
    pub blob: ByteRange,
    /// The bytes of the layer image it holds.
    pub image: ByteRange,
    /// Checksum of the stored bytes, if the index has checksums.
    pub checksum: Option<ChunkDigest>,
}

/// A chunk index that keeps every rule of its format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkIndex {
    compression: Compression,
    hash: Option<Algorithm>,
    image_size: u64,
    data_end: u64,
    len: u32,
    /// Image size of every chunk but the last, where the entries do not say.
    fixed_size: Option<u64>,
    /// The entries as stored, `stride` bytes each.
    entries: Box<[u8]>,
    stride: usize,
}

/// What a header says, with everything checked that can be checked without the entries.
struct Header {
    compression: Compression,
    hash: Option<Algorithm>,
    image_size: u64,
    len: u64,
    fixed_size: Option<u64>,
    size: usize,
}

/// Reads little-endian fields from the front.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (field, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*field)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }
}

impl Header {
    /// Length of the image specification's header.
    const IMAGE_SPEC: usize = 32;
    /// Length of the older draft's header.
    const PR_12703: usize = 24;

    fn read(payload: &[u8], family: IndexFamily) -> Result<Self, IndexError> {
        let short = || CorruptIndex::NoHeader(payload.len() as u64);
        let mut fields = Fields(payload);
        match fields.take::<4>().ok_or_else(short)? {
            INDEX_MAGIC => {}
            INDEX_MAGIC_REVERSED if family == IndexFamily::Pr12703 => {
                return Err(UnreadableIndex::AbandonedDraft.into());
            }
            other => return Err(CorruptIndex::BadMagic(other).into()),
        }
        match family {
            IndexFamily::ImageSpec => Self::image_spec(fields, short),
            IndexFamily::Pr12703 => Self::pr_12703(fields, short),
        }
    }

    /// What is not known is reported before what is broken: a later revision may give reserved bytes a meaning, but
    /// only behind a version or flag that this one does not know.
    fn image_spec(mut fields: Fields<'_>, short: impl Fn() -> CorruptIndex) -> Result<Self, IndexError> {
        let version = fields.byte().ok_or_else(&short)?;
        let compression = fields.byte().ok_or_else(&short)?;
        let flags = u16::from_le_bytes(fields.take().ok_or_else(&short)?);
        let image_size = u64::from_le_bytes(fields.take().ok_or_else(&short)?);
        let len = u32::from_le_bytes(fields.take().ok_or_else(&short)?);
        let hash_family = fields.byte().ok_or_else(&short)?;
        let hash_size = fields.byte().ok_or_else(&short)?;
        let reserved: [u8; 10] = fields.take().ok_or_else(&short)?;
        if version != 1 {
            return Err(UnreadableIndex::Version(version.into()).into());
        }
        if flags != 0 {
            return Err(UnreadableIndex::Flags(flags).into());
        }
        let compression = match compression {
            0 => Compression::None,
            1 => Compression::Zstd,
            other => return Err(UnreadableIndex::Compression(other).into()),
        };
        let hash = match (hash_family, hash_size) {
            (0, 0) => None,
            (1, 32) => Some(Algorithm::Sha256),
            (1, 64) => Some(Algorithm::Sha512),
            (family @ (0 | 1), size) => return Err(CorruptIndex::HashSize { family, size }.into()),
            (family, _) => return Err(UnreadableIndex::HashFamily(family).into()),
        };
        if reserved != [0; 10] {
            return Err(CorruptIndex::Reserved.into());
        }
        Ok(Self { compression, hash, image_size, len: len.into(), fixed_size: None, size: Self::IMAGE_SPEC })
    }

    fn pr_12703(mut fields: Fields<'_>, short: impl Fn() -> CorruptIndex) -> Result<Self, IndexError> {
        let version = u32::from_le_bytes(fields.take().ok_or_else(&short)?);
        let image_size = u64::from_le_bytes(fields.take().ok_or_else(&short)?);
        let chunk_size = u64::from(u32::from_le_bytes(fields.take().ok_or_else(&short)?));
        let hash_family = fields.byte().ok_or_else(&short)?;
        let hash_size = fields.byte().ok_or_else(&short)?;
        let reserved: [u8; 2] = fields.take().ok_or_else(&short)?;
        if version != 1 {
            return Err(UnreadableIndex::Version(version).into());
        }
        let hash = match (hash_family, hash_size) {
            (0, 0) => None,
            (1, 32) => Some(Algorithm::Sha256),
            (family @ (0 | 1), size) => return Err(CorruptIndex::HashSize { family, size }.into()),
            (family, _) => return Err(UnreadableIndex::HashFamily(family).into()),
        };
        if reserved != [0; 2] {
            return Err(CorruptIndex::Reserved.into());
        }
        if chunk_size == 0 {
            return Err(CorruptIndex::ZeroChunkSize.into());
        }
        let len = image_size.div_ceil(chunk_size);
        let (compression, fixed_size) = (Compression::Zstd, Some(chunk_size));
        Ok(Self { compression, hash, image_size, len, fixed_size, size: Self::PR_12703 })
    }
}

impl ChunkIndex {
    /// Parses an index payload (header and entries, no frame around it). `data_end` is the blob offset where the
    /// chunks' bytes end: where an embedded index section begins, or the blob's size.
    ///
    /// # Errors
    /// See [`IndexError`].
    pub fn parse(payload: &[u8], family: IndexFamily, data_end: u64) -> Result<Self, IndexError> {
        let header = Header::read(payload, family)?;
        let offsets = if header.fixed_size.is_some() { 8 } else { 16 };
        let stride = offsets + header.hash.map_or(0, Algorithm::size);
        let entries = payload.get(header.size..).unwrap_or_default();
        let expected = header.len.checked_mul(stride as u64).and_then(|bytes| bytes.checked_add(header.size as u64));
        if expected != Some(payload.len() as u64) {
            let (expected, found) = (expected.unwrap_or(u64::MAX), payload.len() as u64);
            return Err(CorruptIndex::Length { expected, found }.into());
        }
        let len = match u32::try_from(header.len) {
            Ok(len) if len <= MAX_CHUNKS => len,
            _ => return Err(UnreadableIndex::TooManyChunks(header.len).into()),
        };
        if (len == 0) != (header.image_size == 0) {
            return Err(CorruptIndex::EmptyMismatch { chunks: len, image_size: header.image_size }.into());
        }
        let index = Self {
            compression: header.compression,
            hash: header.hash,
            image_size: header.image_size,
            data_end,
            len,
            fixed_size: header.fixed_size,
            entries: entries.into(),
            stride,
        };
        index.check()?;
        Ok(index)
    }

    /// Order and size of every chunk. Faults of the format go before limits, so that a damaged index is never taken
    /// for one that is merely large.
    fn check(&self) -> Result<(), IndexError> {
        let mut limit = None;
        if self.len > 0 && self.image_start(0) != 0 {
            return Err(CorruptIndex::FirstChunk(self.image_start(0)).into());
        }
        for chunk in 0..self.len {
            let (start, end) = (self.image_start(chunk), self.image_start(chunk + 1));
            if start >= end {
                return Err(CorruptIndex::ImageOrder { chunk, start, end }.into());
            }
            let size = end - start;
            if size > MAX_CHUNK_SIZE {
                limit.get_or_insert(UnreadableIndex::ChunkSize { chunk, size });
            }
            let (start, end) = (self.blob_start(chunk), self.blob_start(chunk + 1));
            if start >= end {
                return Err(CorruptIndex::BlobOrder { chunk, start, end }.into());
            }
            let size = end - start;
            if size > MAX_STORED_CHUNK_SIZE {
                limit.get_or_insert(UnreadableIndex::StoredChunkSize { chunk, size });
            }
            let (blob, image) = (start, self.image_start(chunk));
            if self.compression == Compression::None && blob != image {
                return Err(CorruptIndex::RawOffset { chunk, blob, image }.into());
            }
        }
        if self.compression == Compression::None && self.image_size != self.data_end {
            return Err(CorruptIndex::RawSize { image_size: self.image_size, data_end: self.data_end }.into());
        }
        limit.map_or(Ok(()), |limit| Err(limit.into()))
    }

    /// How the chunks are stored.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// Size of the layer image in bytes.
    pub fn image_size(&self) -> u64 {
        self.image_size
    }

    /// Blob offset where the chunks' bytes end.
    pub fn data_end(&self) -> u64 {
        self.data_end
    }

    /// How many chunks there are.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// True if the image has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// True if each chunk has a checksum, so that it can be trusted alone.
    pub fn has_checksums(&self) -> bool {
        self.hash.is_some()
    }

    /// Chunk number `i`, counted from 0.
    pub fn chunk(&self, i: u32) -> Option<Chunk> {
        if i >= self.len {
            return None;
        }
        let range = |start, end| ByteRange::new(start, end).ok();
        let checksum = match self.hash {
            None => None,
            Some(algorithm) => {
                let entry = self.entry(i)?;
                let digest = Digest::from_bytes(entry.get(entry.len().checked_sub(algorithm.size())?..)?).ok()?;
                Some(ChunkDigest(digest))
            }
        };
        Some(Chunk {
            blob: range(self.blob_start(i), self.blob_start(i + 1))?,
            image: range(self.image_start(i), self.image_start(i + 1))?,
            checksum,
        })
    }

    /// All chunks in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Chunk> + '_ {
        // Not `0..len` of `u32`: exact size needs a range that fits `usize`.
        (0..self.len as usize).map(|i| {
            let chunk = u32::try_from(i).ok().and_then(|i| self.chunk(i));
            chunk.expect("every chunk below the length was checked when the index was parsed")
        })
    }

    /// The numbers of the chunks that hold bytes of `image`; none beyond the image's end.
    pub fn chunks_in(&self, image: ByteRange) -> Range<u32> {
        if image.is_empty() {
            return 0..0;
        }
        let first = self.count(|i| self.image_start(i + 1) <= image.start());
        let end = self.count(|i| self.image_start(i) < image.end());
        first.min(end)..end
    }

    /// How many chunks from the first on satisfy `below`, which holds up to some chunk and not after it.
    fn count(&self, below: impl Fn(u32) -> bool) -> u32 {
        let (mut low, mut high) = (0, self.len);
        while low < high {
            let middle = low + (high - low) / 2;
            if below(middle) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }

    fn entry(&self, i: u32) -> Option<&[u8]> {
        let start = usize::try_from(i).ok()?.checked_mul(self.stride)?;
        self.entries.get(start..start.checked_add(self.stride)?)
    }

    /// Field number `field` of entry `i`; the length of the payload was checked, so it is there.
    fn offset(&self, i: u32, field: usize) -> u64 {
        let field = self.entry(i).and_then(|entry| entry.get(field * 8..)).and_then(|rest| rest.first_chunk());
        u64::from_le_bytes(*field.expect("the payload holds exactly as many entries as the index has chunks"))
    }

    /// Where chunk `i` begins in the image; the image's end for the number after the last.
    fn image_start(&self, i: u32) -> u64 {
        if i >= self.len {
            return self.image_size;
        }
        match self.fixed_size {
            // `len` is the rounded-up quotient of the image size by the chunk size, so this cannot overflow.
            Some(size) => u64::from(i) * size,
            None => self.offset(i, 1),
        }
    }

    /// Where chunk `i` begins in the blob; the chunks' end for the number after the last.
    fn blob_start(&self, i: u32) -> u64 {
        if i >= self.len { self.data_end } else { self.offset(i, 0) }
    }
}
