//! Bytes with their place: every error of reading says where in the tar it happened.

use std::io::{self, Read};

use super::error::{Part, Problem, TarError};
use super::header::{BLOCK, Block};

/// Bytes with their place.
#[derive(Debug)]
pub(super) struct Source<R> {
    pub(super) inner: R,
    /// Bytes read so far.
    pub(super) offset: u64,
}

impl<R: Read> Source<R> {
    pub(super) fn error(&self, problem: impl Into<Problem>) -> TarError {
        TarError { offset: self.offset, path: None, problem: problem.into() }
    }

    pub(super) fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.inner.read(buf) {
                Ok(read) => {
                    self.offset += read as u64;
                    return Ok(read);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Fills `buf` as far as there are bytes.
    pub(super) fn fill(&mut self, buf: &mut [u8]) -> Result<usize, TarError> {
        let mut filled = 0;
        while let Some(rest) = buf.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.read(rest).map_err(|error| self.error(error))? {
                0 => break,
                read => filled += read,
            }
        }
        Ok(filled)
    }

    /// The next block, none at the end of the source.
    pub(super) fn block(&mut self, part: Part) -> Result<Option<Box<Block>>, TarError> {
        let mut block = Box::new([0; BLOCK]);
        match self.fill(&mut block[..])? {
            0 => Ok(None),
            BLOCK => Ok(Some(block)),
            _ => Err(self.error(Problem::Cut(part))),
        }
    }

    /// Appends `len` bytes to `into`, which grows only with bytes that are there.
    pub(super) fn read_to(&mut self, len: u64, into: &mut Vec<u8>, part: Part) -> Result<(), TarError> {
        let mut left = len;
        let mut buf = [0; 4096];
        while left > 0 {
            let room = usize::try_from(left).map_or(buf.len(), |left| left.min(buf.len()));
            let read = self.fill(buf.get_mut(..room).unwrap_or_default())?;
            if read < room {
                return Err(self.error(Problem::Cut(part)));
            }
            into.extend_from_slice(buf.get(..read).unwrap_or_default());
            left -= read as u64;
        }
        Ok(())
    }

    pub(super) fn skip(&mut self, len: u64, part: Part) -> Result<(), TarError> {
        let before = self.offset;
        self.skip_what_is_there(len)?;
        if self.offset - before < len { Err(self.error(Problem::Cut(part))) } else { Ok(()) }
    }

    pub(super) fn skip_what_is_there(&mut self, len: u64) -> Result<(), TarError> {
        let mut left = len;
        let mut buf = [0; 16 << 10];
        while left > 0 {
            let room = usize::try_from(left).map_or(buf.len(), |left| left.min(buf.len()));
            match self.fill(buf.get_mut(..room).unwrap_or_default())? {
                0 => break,
                read => left -= read as u64,
            }
        }
        Ok(())
    }
}

impl From<io::Error> for Problem {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}
