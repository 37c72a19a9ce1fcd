//! Reads chunk indexes. Every rule of the format is checked once, in [`ChunkIndex::parse`]; afterwards each chunk is a
//! non-empty range of the image and of the blob, in order and without gaps in the image.
//!
//! The entries stay in memory as they came, so an index costs what its payload costs.

use std::ops::Range;

use super::{
    Compression, INDEX_MAGIC, INDEX_MAGIC_REVERSED, IndexFamily, MAX_CHUNK_SIZE, MAX_CHUNKS, MAX_INDEX_SIZE,
    MAX_STORED_CHUNK_SIZE, Mismatch, SKIPPABLE_HEADER, SKIPPABLE_MAGIC,
};
use crate::model::{Algorithm, ByteRange, ChunkDigest, Digest, IndexDigest};

/// Why an index gives no chunks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// The index breaks a rule of its format: the layer is damaged and must not be used.
    #[error("the chunk index is corrupt")]
    Corrupt(#[source] CorruptIndex),
    /// The index is of a kind this program does not know, or beyond its limits: the layer is read without it, from
    /// start to end.
    #[error("the chunk index is not usable, the layer has to be read from start to end")]
    Unreadable(#[source] UnreadableIndex),
}

impl From<CorruptIndex> for IndexError {
    fn from(fault: CorruptIndex) -> Self {
        Self::Corrupt(fault)
    }
}

impl From<UnreadableIndex> for IndexError {
    fn from(fault: UnreadableIndex) -> Self {
        Self::Unreadable(fault)
    }
}

/// A rule of the format that an index breaks.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CorruptIndex {
    /// The bytes are not those the manifest promises.
    #[error("its digest is {}, {} was promised", .0.found, .0.expected)]
    DigestMismatch(Box<Mismatch<IndexDigest>>),
    /// There is no skippable frame where the index should be.
    #[error("no zstd skippable frame at its place")]
    NoFrame,
    /// The skippable frame is longer or shorter than the place for it.
    #[error("its skippable frame holds {frame} bytes where there are {section}")]
    FrameLength {
        /// What the frame header says.
        frame: u64,
        /// What is there.
        section: u64,
    },
    /// Not even a header.
    #[error("{0} bytes are too few for a header")]
    NoHeader(u64),
    /// Other bytes where the magic should be.
    #[error("it begins with {0:02x?}, which is not its magic")]
    BadMagic([u8; 4]),
    /// The payload's length is not header plus entries.
    #[error("{found} bytes long, header and entries need {expected}")]
    Length {
        /// What header and entries need; `u64::MAX` if that is beyond 64 bits.
        expected: u64,
        /// What is there.
        found: u64,
    },
    /// A reserved byte is in use.
    #[error("a reserved byte of its header is not zero")]
    Reserved,
    /// The checksum length does not belong to the hash family.
    #[error("checksums of {size} bytes do not belong to hash family {family}")]
    HashSize {
        /// `HashAlgo`.
        family: u8,
        /// `HashSize`.
        size: u8,
    },
    /// The header's compression is not the media type's.
    #[error("it says {found:?} for a layer whose media type says {expected:?}")]
    CompressionMismatch {
        /// What the media type says.
        expected: Compression,
        /// What the header says.
        found: Compression,
    },
    /// Chunks of no bytes.
    #[error("its chunk size is zero")]
    ZeroChunkSize,
    /// Chunks and image size contradict each other: one is zero, the other is not.
    #[error("{chunks} chunks for an image of {image_size} bytes")]
    EmptyMismatch {
        /// How many chunks.
        chunks: u32,
        /// Image size.
        image_size: u64,
    },
    /// The image does not begin in the first chunk.
    #[error("its first chunk begins at image offset {0}")]
    FirstChunk(u64),
    /// Image offsets do not increase strictly, or the last reaches the image size.
    #[error("chunk {chunk} covers no range of the image: {start} to {end}")]
    ImageOrder {
        /// Which chunk.
        chunk: u32,
        /// Its image offset.
        start: u64,
        /// Where the next begins, or the image ends.
        end: u64,
    },
    /// Blob offsets do not increase strictly, or the last reaches the end of the chunks.
    #[error("chunk {chunk} covers no range of the blob: {start} to {end}")]
    BlobOrder {
        /// Which chunk.
        chunk: u32,
        /// Its blob offset.
        start: u64,
        /// Where the next begins, or the chunks end.
        end: u64,
    },
    /// A raw blob is its image, so both offsets of a chunk are the same.
    #[error("raw chunk {chunk} is stored at {blob} but begins the image at {image}")]
    RawOffset {
        /// Which chunk.
        chunk: u32,
        /// Its blob offset.
        blob: u64,
        /// Its image offset.
        image: u64,
    },
    /// A raw blob is its image, so both end at the same place.
    #[error("a raw image of {image_size} bytes in {data_end} bytes of blob")]
    RawSize {
        /// Image size.
        image_size: u64,
        /// Blob offset where the chunks end.
        data_end: u64,
    },
}

/// What about an index this program does not understand or not accept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UnreadableIndex {
    /// A later or unknown version.
    #[error("its version is {0}, only 1 is known")]
    Version(u32),
    /// An unknown compression.
    #[error("compression type {0} is not known")]
    Compression(u8),
    /// Unknown flags.
    #[error("flags {0:#06x} are not known")]
    Flags(u16),
    /// An unknown hash family.
    #[error("hash family {0} is not known")]
    HashFamily(u8),
    /// The byte-swapped magic of an abandoned draft.
    #[error("it is in the form of containerd pull request 12764, which is not read")]
    AbandonedDraft,
    /// More bytes than [`MAX_INDEX_SIZE`].
    #[error("{0} bytes are more than the limit of {MAX_INDEX_SIZE}")]
    TooLarge(u64),
    /// More chunks than [`MAX_CHUNKS`].
    #[error("{0} chunks are more than the limit of {MAX_CHUNKS}")]
    TooManyChunks(u64),
    /// A chunk that inflates to more than [`MAX_CHUNK_SIZE`].
    #[error("chunk {chunk} has {size} bytes, more than the limit of {MAX_CHUNK_SIZE}")]
    ChunkSize {
        /// Which chunk.
        chunk: u32,
        /// How many bytes of image.
        size: u64,
    },
    /// A chunk that takes more than [`MAX_STORED_CHUNK_SIZE`].
    #[error("chunk {chunk} is stored in {size} bytes, more than the limit of {MAX_STORED_CHUNK_SIZE}")]
    StoredChunkSize {
        /// Which chunk.
        chunk: u32,
        /// How many bytes of blob.
        size: u64,
    },
}

/// What surrounds an index payload at its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Framing {
    /// Nothing: the section is the payload (raw blobs, standalone indexes).
    Bare,
    /// One skippable frame that fills the section exactly.
    Frame,
    /// A skippable frame at the section's start; what follows it is none of the index's business.
    FrameAndMore,
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
        if self.framing == Framing::Frame && payload.len() != rest.len() {
            return Err(wrong.into());
        }
        Ok(payload)
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
