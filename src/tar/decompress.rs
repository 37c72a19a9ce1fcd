//! Opens a layer blob, whatever its compression, and digests both sides of it while it streams.
//!
//! The compression is told by the first bytes, never by the media type: registries hold layers whose type lies.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read};

use flate2::bufread::MultiGzDecoder;

use crate::model::{Algorithm, BlobDigest, DiffId, Hasher};

/// Largest zstd window that is accepted, as a power of two: 128 MiB, what `zstd` itself takes without being asked.
pub const MAX_WINDOW_LOG: u32 = 27;

/// Buffers on both sides of the decompressor. 128 KiB is zstd's own block size; larger ones measured no faster.
const BUFFER: usize = 128 << 10;

/// How a layer blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    Plain,
    /// One or more gzip members.
    Gzip,
    /// One or more zstd frames.
    Zstd,
}

impl Compression {
    /// What the first four bytes of a blob tell. A zstd stream may begin with a skippable frame.
    pub fn of(start: &[u8]) -> Self {
        match start {
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
            _ => Self::Plain,
        }
    }
}

/// What is known of a blob's own digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlobCheck {
    /// Nothing: it is computed with this algorithm.
    Compute(Algorithm),
    /// Whoever delivers the bytes holds them against this digest, and fails at their end if they are others.
    Done(BlobDigest),
}

/// What a whole blob turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// How it was compressed.
    pub compression: Compression,
    /// Digest of the blob's bytes, computed or as given.
    pub digest: BlobDigest,
    /// Number of the blob's bytes.
    pub size: u64,
    /// Digest of the decompressed bytes.
    pub diff_id: DiffId,
    /// Number of decompressed bytes.
    pub diff_size: u64,
}

/// A blob that does not decompress. Comes as the inner error of an [`io::Error`].
#[derive(Debug, thiserror::Error)]
#[error("cannot decompress the {compression} stream behind byte {offset} of the blob")]
pub struct DecompressError {
    /// What the first bytes promised.
    pub compression: Compression,
    /// How much of the blob had been read.
    pub offset: u64,
    /// What the decompressor or the source says.
    #[source]
    pub source: io::Error,
}

/// Decompressed bytes of a blob. Buffered on the way out, so that small reads are cheap.
#[derive(Debug)]
pub struct Decompressed<R: Read> {
    compression: Compression,
    decoder: Decoder<R>,
    /// None where the blob's own digest is that of the decompressed bytes too.
    hasher: Option<Hasher>,
    size: u64,
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
}

enum Decoder<R: Read> {
    Plain(Box<Input<R>>),
    Gzip(Box<MultiGzDecoder<Input<R>>>),
    Zstd(Box<zstd::stream::read::Decoder<'static, Input<R>>>),
}

/// The blob's bytes as they pass, the first of them read ahead to know the compression.
type Input<R> = BufReader<Hashed<io::Chain<io::Cursor<Vec<u8>>, R>>>;

struct Hashed<R> {
    inner: R,
    identity: Identity,
    size: u64,
}

enum Identity {
    Hashing(Hasher),
    Known(BlobDigest),
}

/// Opens `blob`. Its diffID is computed with `diff_algorithm`.
///
/// # Errors
/// The first bytes cannot be read.
pub fn open<R: Read>(mut blob: R, check: BlobCheck, diff_algorithm: Algorithm) -> io::Result<Decompressed<R>> {
    let mut start = Vec::with_capacity(4);
    blob.by_ref().take(4).read_to_end(&mut start)?;
    let compression = Compression::of(&start);
    let (algorithm, identity) = match check {
        BlobCheck::Compute(algorithm) => (algorithm, Identity::Hashing(Hasher::new(algorithm))),
        BlobCheck::Done(digest) => (digest.0.algorithm(), Identity::Known(digest)),
    };
    let hashed = Hashed { inner: io::Cursor::new(start).chain(blob), identity, size: 0 };
    let input = BufReader::with_capacity(BUFFER, hashed);
    let decoder = match compression {
        Compression::Plain => Decoder::Plain(Box::new(input)),
        Compression::Gzip => Decoder::Gzip(Box::new(MultiGzDecoder::new(input))),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
            decoder.window_log_max(MAX_WINDOW_LOG)?;
            Decoder::Zstd(Box::new(decoder))
        }
    };
    let same = compression == Compression::Plain && algorithm == diff_algorithm;
    Ok(Decompressed {
        compression,
        decoder,
        hasher: (!same).then(|| Hasher::new(diff_algorithm)),
        size: 0,
        buffer: vec![0; BUFFER].into_boxed_slice(),
        start: 0,
        end: 0,
    })
}

impl<R: Read> Decompressed<R> {
    /// How the blob is compressed.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// How many bytes of the blob have been taken in: for progress.
    pub fn blob_offset(&self) -> u64 {
        self.decoder.input().get_ref().size
    }

    /// Reads whatever is left and tells what the whole blob is.
    ///
    /// # Errors
    /// As reading: the rest may be cut or damaged too.
    pub fn finish(mut self) -> io::Result<Summary> {
        loop {
            let len = self.fill_buf()?.len();
            if len == 0 {
                break;
            }
            self.consume(len);
        }
        let Hashed { identity, size, .. } = self.decoder.into_input().into_inner();
        let digest = match identity {
            Identity::Hashing(hasher) => BlobDigest(hasher.finish()),
            Identity::Known(digest) => digest,
        };
        Ok(Summary {
            compression: self.compression,
            digest,
            size,
            diff_id: DiffId(self.hasher.map_or(digest.0, Hasher::finish)),
            diff_size: self.size,
        })
    }

    /// Decompresses into `buf`, which goes into the digest.
    fn decode(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = match &mut self.decoder {
            Decoder::Plain(input) => input.read(buf),
            Decoder::Gzip(decoder) => decoder.read(buf),
            Decoder::Zstd(decoder) => decoder.read(buf),
        }
        .map_err(|source| {
            let (compression, offset) = (self.compression, self.blob_offset());
            if source.kind() == io::ErrorKind::Interrupted || compression == Compression::Plain {
                return source;
            }
            io::Error::new(source.kind(), DecompressError { compression, offset, source })
        })?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(buf.get(..read).unwrap_or_default());
        }
        self.size += read as u64;
        Ok(read)
    }
}

impl<R: Read> BufRead for Decompressed<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.start == self.end {
            let mut buffer = std::mem::take(&mut self.buffer);
            let read = self.decode(&mut buffer);
            self.buffer = buffer;
            (self.start, self.end) = (0, read?);
        }
        Ok(self.buffer.get(self.start..self.end).unwrap_or_default())
    }

    fn consume(&mut self, amount: usize) {
        self.start = (self.start + amount).min(self.end);
    }
}

impl<R: Read> Read for Decompressed<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.start == self.end && buf.len() >= BUFFER {
            return self.decode(buf);
        }
        let mut ready = self.fill_buf()?;
        let read = ready.read(buf)?;
        self.consume(read);
        Ok(read)
    }
}

impl<R: Read> Decoder<R> {
    fn input(&self) -> &Input<R> {
        match self {
            Self::Plain(input) => input,
            Self::Gzip(decoder) => decoder.get_ref(),
            Self::Zstd(decoder) => decoder.get_ref(),
        }
    }

    fn into_input(self) -> Input<R> {
        match self {
            Self::Plain(input) => *input,
            Self::Gzip(decoder) => decoder.into_inner(),
            Self::Zstd(decoder) => decoder.finish(),
        }
    }
}

impl<R: Read> fmt::Debug for Decoder<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Decoder")
    }
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buf)?;
        if let Identity::Hashing(hasher) = &mut self.identity {
            hasher.update(buf.get(..read).unwrap_or_default());
        }
        self.size += read as u64;
        Ok(read)
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Plain => "uncompressed",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::model::Digest;

    /// A source that gives one byte, then three, and so on: no reader may rely on full buffers.
    struct Trickle<'a>(&'a [u8], usize);

    impl Read for Trickle<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.1 = self.1 % 997 + 1;
            let len = self.1.min(buf.len());
            self.0.read(&mut buf[..len])
        }
    }

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(data: &[u8]) -> Vec<u8> {
        zstd::encode_all(data, 1).unwrap()
    }

    fn read(blob: &[u8]) -> io::Result<Summary> {
        open(blob, BlobCheck::Compute(Algorithm::Sha256), Algorithm::Sha256)?.finish()
    }

    fn sha(data: &[u8]) -> Digest {
        Digest::of(Algorithm::Sha256, data)
    }

    #[test]
    fn all_compressions_give_bytes_and_both_digests() {
        let data: Vec<u8> = (0..1_000_000_u32).flat_map(|n| (n / 3).to_le_bytes()).collect();
        let (left, right) = data.split_at(1_234_567);
        let skippable = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
        for (blob, compression) in [
            (data.clone(), Compression::Plain),
            (gzip(&data), Compression::Gzip),
            ([gzip(left), gzip(right)].concat(), Compression::Gzip),
            (zstd(&data), Compression::Zstd),
            ([skippable.clone(), zstd(left), skippable, zstd(right)].concat(), Compression::Zstd),
        ] {
            for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
                for read_first in [0, 512, 300_000, data.len()] {
                    let mut reader = open(Trickle(&blob, 0), BlobCheck::Compute(algorithm), Algorithm::Sha256).unwrap();
                    let mut start = vec![0; read_first];
                    reader.read_exact(&mut start).unwrap();
                    assert_eq!(start, data[..read_first]);
                    let summary = reader.finish().unwrap();
                    assert_eq!(
                        summary,
                        Summary {
                            compression,
                            digest: BlobDigest(Digest::of(algorithm, &blob)),
                            size: blob.len() as u64,
                            diff_id: DiffId(sha(&data)),
                            diff_size: data.len() as u64,
                        }
                    );
                }
            }
        }
    }

    #[test]
    fn a_digest_that_is_known_is_not_computed_again() {
        let data = vec![3; 200_000];
        let known = BlobDigest(Digest::of(Algorithm::Sha256, b"as somebody else says"));
        for (blob, diff_id) in [(data.clone(), known.0), (gzip(&data), sha(&data))] {
            let summary = open(&blob[..], BlobCheck::Done(known), Algorithm::Sha256).unwrap().finish().unwrap();
            assert_eq!((summary.digest, summary.diff_id, summary.size), (known, DiffId(diff_id), blob.len() as u64));
        }
        let summary = open(&data[..], BlobCheck::Done(known), Algorithm::Sha512).unwrap().finish().unwrap();
        assert_eq!(summary.diff_id.0, Digest::of(Algorithm::Sha512, &data));
    }

    #[test]
    fn short_blobs_are_plain() {
        for blob in [&b""[..], b"\x1f", b"\x28\xb5\x2f"] {
            let summary = read(blob).unwrap();
            assert_eq!((summary.compression, summary.diff_id.0), (Compression::Plain, sha(blob)));
        }
    }

    #[test]
    fn cut_damaged_and_padded_streams_are_refused() {
        let data = vec![7; 100_000];
        let whole = [gzip(&data), zstd(&data)];
        for blob in &whole {
            for cut in [5, blob.len() / 2, blob.len() - 1] {
                let error = read(&blob[..cut]).unwrap_err();
                let inner = error.get_ref().unwrap().downcast_ref::<DecompressError>().unwrap();
                assert!(inner.offset <= cut as u64, "{inner}");
            }
            let garbage = [&blob[..], b"garbage"].concat();
            assert!(read(&garbage[..]).is_err());
        }
        let mut damaged = whole[0].clone();
        let at = damaged.len() - 6;
        damaged[at] ^= 1;
        assert!(read(&damaged[..]).is_err(), "a wrong CRC was taken");
    }

    #[test]
    fn a_window_above_the_limit_is_refused() {
        // Frame header alone: magic, no single segment, window descriptor for 2^28, then one raw block.
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, (28 - 10) << 3, 0x09, 0x00, 0x00, b'x'];
        let error = read(&frame[..]).unwrap_err();
        assert!(error.to_string().contains("zstd"), "{error}");
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, (27 - 10) << 3, 0x09, 0x00, 0x00, b'x'];
        assert_eq!(read(&frame[..]).unwrap().diff_size, 1);
    }
}
