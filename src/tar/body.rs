//! The content of one entry: which stretches of the file are in the tar, and which are holes.

use super::header::BLOCK;

/// A stretch of a file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Run {
    /// So many zeros that are not in the tar.
    Hole(u64),
    /// So many bytes that `Reader::read_body` hands out next.
    Data(u64),
}

/// The content of the current entry.
#[derive(Debug, Default)]
pub(super) struct Body {
    /// Bytes of the file, holes included.
    size: u64,
    /// How many of them have been handed out.
    position: u64,
    /// The stored piece at or after `position`.
    piece: (u64, u64),
    /// The pieces after that.
    pieces: std::vec::IntoIter<(u64, u64)>,
    /// Bytes of content in the tar that have not been read.
    pub(super) stored: u64,
    /// Bytes after the content up to the next block.
    pub(super) padding: u64,
}

impl Body {
    pub(super) fn plain(size: u64) -> Self {
        Self { size, piece: (0, size), stored: size, ..Self::padding_of(size) }
    }

    pub(super) fn padding_of(stored: u64) -> Self {
        Self { padding: stored.next_multiple_of(BLOCK as u64) - stored, ..Self::default() }
    }

    pub(super) fn sparse(size: u64, stored: u64, pieces: Vec<(u64, u64)>) -> Self {
        let mut pieces = pieces.into_iter();
        let piece = pieces.next().unwrap_or((size, 0));
        Self { size, piece, pieces, stored, ..Self::padding_of(stored) }
    }

    /// Leaves nothing to hand out; what is in the tar is passed over.
    pub(super) fn hide(&mut self) {
        self.size = 0;
    }

    pub(super) fn run(&self) -> Option<Run> {
        let (start, len) = self.piece;
        if self.position >= self.size {
            None
        } else if self.position < start {
            Some(Run::Hole(start - self.position))
        } else {
            Some(Run::Data(start + len - self.position))
        }
    }

    /// Moves on by `len` bytes of the current run.
    pub(super) fn hand_out(&mut self, len: u64) {
        self.position += len;
        if self.position == self.piece.0 + self.piece.1 {
            self.piece = self.pieces.next().unwrap_or((self.size, 0));
        }
    }
}
