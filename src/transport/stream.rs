//! A blob as `Read`: fetched ahead by a task, hashed by the thread that reads.

use std::io::{self, Read};

use bytes::{Buf as _, Bytes};
use futures::StreamExt as _;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::TransportError;
use crate::model::{BlobDigest, ByteStream, Hasher, SourceError};
use crate::oci::Descriptor;

/// Pieces fetched ahead of the reader: with the pieces of an HTTP body at most some megabytes, enough for a link to stay
/// busy while a chunk is compressed.
const AHEAD: usize = 32;

/// A whole blob. Reading blocks the thread; never read it on the reactor.
#[derive(Debug)]
pub struct BlobReader {
    pieces: mpsc::Receiver<Result<Bytes, SourceError>>,
    piece: Bytes,
    hasher: Option<Hasher>,
    expected: BlobDigest,
    size: u64,
    read: u64,
    origin: String,
}

impl BlobReader {
    pub(super) fn new(runtime: &Handle, mut stream: ByteStream, descriptor: &Descriptor, origin: String) -> Self {
        let (sender, pieces) = mpsc::channel(AHEAD);
        runtime.spawn(async move {
            while let Some(piece) = stream.next().await {
                let last = piece.is_err();
                if sender.send(piece).await.is_err() || last {
                    return;
                }
            }
        });
        let hasher = Some(Hasher::new(descriptor.digest.0.algorithm()));
        let (expected, size) = (descriptor.digest, descriptor.size);
        Self { pieces, piece: Bytes::new(), hasher, expected, size, read: 0, origin }
    }

    /// How many bytes were read so far.
    pub fn position(&self) -> u64 {
        self.read
    }

    /// Reads what is left, so that the whole blob is checked whatever part of it was of use.
    ///
    /// # Errors
    /// As reading.
    pub fn finish(mut self) -> io::Result<()> {
        io::copy(&mut self, &mut io::sink()).map(drop)
    }

    /// The end: are the bytes what they should be?
    fn verify(&mut self) -> io::Result<()> {
        let Some(hasher) = self.hasher.take() else { return Ok(()) };
        let found = BlobDigest(hasher.finish());
        if found == self.expected && self.read == self.size {
            return Ok(());
        }
        let (expected, size) = (self.expected, self.read);
        let damaged = TransportError::Damaged { expected, origin: self.origin.clone(), size, found };
        Err(io::Error::new(io::ErrorKind::InvalidData, damaged))
    }
}

impl Read for BlobReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        while self.piece.is_empty() {
            match self.pieces.blocking_recv() {
                Some(Ok(piece)) => {
                    if let Some(hasher) = &mut self.hasher {
                        hasher.update(&piece);
                    }
                    self.read += piece.len() as u64;
                    self.piece = piece;
                }
                Some(Err(error)) => return Err(io::Error::other(error)),
                None => return self.verify().map(|()| 0),
            }
        }
        let count = buffer.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}
