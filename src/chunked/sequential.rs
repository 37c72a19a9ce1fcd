//! Reads a whole blob from start to end, for layers whose index is missing or not understood.
//!
//! Memory stays at one zstd window and two buffers, whatever the blob holds. What comes out is not to be trusted
//! before [`SequentialReader::finish`] has named its digest and the caller has compared it.

use std::io::{self, Read, Write};

use zstd::zstd_safe::{self, DCtx, DParameter, InBuffer, OutBuffer};

use super::{Compression, MAX_WINDOW_LOG};
use crate::model::{Algorithm, DiffId, Hasher};

/// Size of the buffer between decompressor and writer: zstd's own recommendation for its largest block.
const OUT_BUFFER: usize = 128 << 10;

/// Why a blob could not be read to its end.
#[derive(Debug, thiserror::Error)]
pub enum SequentialError {
    /// The blob itself could not be read.
    #[error("cannot read the layer blob at offset {offset}")]
    Read {
        /// Blob offset.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The bytes are not zstd frames, or need more memory than is allowed.
    #[error("cannot inflate the layer blob near offset {offset}: {reason}")]
    Inflate {
        /// Blob offset of the piece that was being inflated.
        offset: u64,
        /// What the decompressor says.
        reason: &'static str,
    },
    /// The blob ends in the middle of a frame.
    #[error("the layer blob ends after {0} bytes, in the middle of a zstd frame")]
    Truncated(u64),
    /// It inflates to more than was allowed.
    #[error("the layer blob inflates to more than {0} bytes")]
    TooLarge(u64),
    /// The image could not be written.
    #[error("cannot write the layer image at offset {offset}")]
    Write {
        /// Image offset.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequentialSummary {
    /// SHA-256 of the image.
    pub diff_id: DiffId,
    /// Size of the image.
    pub image_size: u64,
    /// Size of the blob.
    pub blob_size: u64,
}

/// Takes a blob in pieces of any size and writes the image. Skippable frames, such as the one around an index, are
/// passed over; for a raw blob everything is the image, an index at its end included, as the image specification
/// defines its diffID (section 5.2).
pub struct SequentialReader<W> {
    image: Image<W>,
    inflate: Option<Inflate>,
    blob_size: u64,
}

struct Inflate {
    context: DCtx<'static>,
    buffer: Vec<u8>,
    /// False between frames; true inside of one, and for good after an error.
    inside: bool,
}

/// The image as it grows.
struct Image<W> {
    out: W,
    limit: u64,
    hasher: Hasher,
    size: u64,
}

impl<W: Write> Image<W> {
    fn append(&mut self, bytes: &[u8]) -> Result<(), SequentialError> {
        let offset = self.size;
        let size = offset.checked_add(bytes.len() as u64).filter(|size| *size <= self.limit);
        self.size = size.ok_or(SequentialError::TooLarge(self.limit))?;
        self.hasher.update(bytes);
        self.out.write_all(bytes).map_err(|source| SequentialError::Write { offset, source })
    }
}

impl Inflate {
    fn push<W: Write>(&mut self, stored: &[u8], offset: u64, image: &mut Image<W>) -> Result<(), SequentialError> {
        let mut input = InBuffer::around(stored);
        loop {
            let before = input.pos();
            let mut output = OutBuffer::around(self.buffer.as_mut_slice());
            let hint = self.context.decompress_stream(&mut output, &mut input).map_err(|code| {
                let reason = zstd_safe::get_error_name(code);
                SequentialError::Inflate { offset: offset.saturating_add(before as u64), reason }
            })?;
            let produced = output.pos();
            // A hint of 0 is the end of a frame. A call that moves nothing says nothing: after the end of a frame
            // zstd asks for the header of the next.
            if input.pos() != before || produced > 0 {
                self.inside = hint != 0;
            }
            image.append(self.buffer.get(..produced).unwrap_or_default())?;
            if input.pos() == stored.len() && produced < self.buffer.len() {
                return Ok(());
            }
        }
    }
}

impl<W: Write> SequentialReader<W> {
    /// A reader that writes to `out`, at most `limit` bytes.
    pub fn new(out: W, compression: Compression, limit: u64) -> Self {
        let inflate = match compression {
            Compression::None => None,
            Compression::Zstd => {
                let mut context = DCtx::create();
                context
                    .set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))
                    .expect("the window limit is one that zstd knows");
                Some(Inflate { context, buffer: vec![0; OUT_BUFFER], inside: false })
            }
        };
        let image = Image { out, limit, hasher: Hasher::new(Algorithm::Sha256), size: 0 };
        Self { image, inflate, blob_size: 0 }
    }

    /// Takes in the next bytes of the blob.
    ///
    /// # Errors
    /// See [`SequentialError`]. After one the reader is of no use.
    pub fn push(&mut self, stored: &[u8]) -> Result<(), SequentialError> {
        let offset = self.blob_size;
        self.blob_size = offset.saturating_add(stored.len() as u64);
        match &mut self.inflate {
            None => self.image.append(stored),
            Some(inflate) => inflate.push(stored, offset, &mut self.image).inspect_err(|_| inflate.inside = true),
        }
    }

    /// Size of the image so far.
    pub fn image_size(&self) -> u64 {
        self.image.size
    }

    /// Says that the blob has ended; gives the writer back, not flushed.
    ///
    /// # Errors
    /// [`SequentialError::Truncated`].
    pub fn finish(self) -> Result<(W, SequentialSummary), SequentialError> {
        let Self { image, inflate, blob_size } = self;
        if inflate.is_some_and(|inflate| inflate.inside) {
            return Err(SequentialError::Truncated(blob_size));
        }
        let diff_id = DiffId(image.hasher.finish());
        Ok((image.out, SequentialSummary { diff_id, image_size: image.size, blob_size }))
    }

    /// Reads `blob` to its end: [`Self::push`] and [`Self::finish`] in one.
    ///
    /// # Errors
    /// See [`SequentialError`].
    pub fn run(mut self, mut blob: impl Read) -> Result<(W, SequentialSummary), SequentialError> {
        let mut buffer = vec![0; OUT_BUFFER];
        loop {
            let read = match blob.read(&mut buffer) {
                Ok(0) => return self.finish(),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(SequentialError::Read { offset: self.blob_size, source }),
            };
            self.push(buffer.get(..read).unwrap_or_default())?;
        }
    }
}
