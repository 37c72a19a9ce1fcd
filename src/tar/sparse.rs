//! Maps of sparse files: which pieces of a file are stored, in all four spellings.
//!
//! A map that comes out of here is sorted, without overlaps and inside the file.

use super::MAX_SPARSE_RUNS;
use super::error::Problem;
use super::header;

/// The stored pieces of a file: where each lies in the file and how long it is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct SparseMap {
    pieces: Vec<(u64, u64)>,
    stored: u64,
    end: u64,
}

impl SparseMap {
    /// Adds the next piece. Empty ones (GNU tar ends its maps with one) only need to lie in order.
    pub(super) fn push(&mut self, offset: u64, len: u64) -> Result<(), Problem> {
        let end = offset.checked_add(len).ok_or(Problem::BadSparseMap("a piece reaches beyond 64 bits"))?;
        if offset < self.end {
            return Err(Problem::BadSparseMap("its pieces overlap or are out of order"));
        }
        self.end = end;
        if len == 0 {
            return Ok(());
        }
        if self.pieces.len() == MAX_SPARSE_RUNS {
            return Err(Problem::TooManyRuns(MAX_SPARSE_RUNS));
        }
        self.stored += len;
        match self.pieces.last_mut() {
            Some(last) if last.0 + last.1 == offset => last.1 += len,
            _ => self.pieces.push((offset, len)),
        }
        Ok(())
    }

    /// The pieces, if they fit a file of `size` bytes of which `stored` are in the tar.
    pub(super) fn finish(self, size: u64, stored: u64) -> Result<Vec<(u64, u64)>, Problem> {
        if self.end > size {
            return Err(Problem::BadSparseMap("a piece reaches beyond the file's end"));
        }
        if self.stored != stored {
            return Err(Problem::BadSparseMap("its pieces and the stored content differ in length"));
        }
        Ok(self.pieces)
    }

    /// Adds pieces of an old GNU map; a piece whose length field begins with NUL ends it.
    pub(super) fn push_old_gnu(&mut self, pieces: &[u8]) -> Result<(), Problem> {
        for piece in pieces.chunks_exact(header::SPARSE_PIECE) {
            let (offset, len) = piece.split_at(header::SPARSE_PIECE / 2);
            if offset.first() == Some(&0) && len.first() == Some(&0) {
                break;
            }
            self.push(field(offset)?, field(len)?)?;
        }
        Ok(())
    }

    /// Adds the pieces of a PAX 0.1 map, `offset,length,offset,length`.
    pub(super) fn push_list(&mut self, list: &[u8]) -> Result<(), Problem> {
        let mut numbers = list.split(|b| *b == b',');
        while let Some(offset) = numbers.next() {
            let len = numbers.next().ok_or(Problem::BadSparseMap("its list holds half a piece"))?;
            self.push(decimal("GNU.sparse.map", offset)?, decimal("GNU.sparse.map", len)?)?;
        }
        Ok(())
    }
}

fn field(bytes: &[u8]) -> Result<u64, Problem> {
    header::number(bytes)
        .and_then(|value| u64::try_from(value).ok())
        .ok_or_else(|| Problem::not_a_number("sparse", bytes))
}

/// A decimal number of a PAX record.
pub(super) fn decimal(name: &'static str, digits: &[u8]) -> Result<u64, Problem> {
    let all_digits = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
    all_digits
        .then(|| std::str::from_utf8(digits).ok()?.parse().ok())
        .flatten()
        .ok_or_else(|| Problem::not_a_number(name, digits))
}

/// Reads the map of PAX sparse 1.0, which precedes the content as decimal lines: count, then offset and length of each.
#[derive(Debug, Default)]
pub(super) struct Lines {
    map: SparseMap,
    token: Vec<u8>,
    left: Option<u64>,
    offset: Option<u64>,
}

impl Lines {
    /// Takes the next block; true when the map is complete (the rest of that block is padding).
    pub(super) fn take(&mut self, block: &header::Block) -> Result<bool, Problem> {
        for byte in block {
            if *byte != b'\n' {
                // The longest 64-bit number has twenty digits.
                if self.token.len() == 20 {
                    return Err(Problem::BadSparseMap("a line is longer than any number"));
                }
                self.token.push(*byte);
                continue;
            }
            let number = decimal("sparse map", &self.token)?;
            self.token.clear();
            match (self.left, self.offset.take()) {
                (None, _) => self.left = Some(number),
                (Some(_), None) => self.offset = Some(number),
                (Some(left), Some(offset)) => {
                    self.map.push(offset, number)?;
                    self.left = Some(left - 1);
                }
            }
            if self.left == Some(0) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(super) fn finish(self) -> SparseMap {
        self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_sorted_and_inside_the_file() {
        for (list, size, stored, expected) in [
            (&b"0,10,20,5"[..], 100, 15, Ok(vec![(0, 10), (20, 5)])),
            (b"0,10,10,5,100,0", 100, 15, Ok(vec![(0, 15)])),
            (b"100,0", 100, 0, Ok(vec![])),
            (b"0,10,5,5", 100, 15, Err("overlap")),
            (b"20,10,0,5", 100, 15, Err("overlap")),
            (b"90,11", 100, 11, Err("beyond the file's end")),
            (b"90,10", 100, 11, Err("differ in length")),
            (b"90", 100, 0, Err("half a piece")),
            (b"18446744073709551615,2", 100, 0, Err("beyond 64 bits")),
            (b"1,-2", 100, 0, Err("no number")),
            (b"", 100, 0, Err("half a piece")),
        ] {
            let mut map = SparseMap::default();
            let found = map.push_list(list).and_then(|()| map.finish(size, stored));
            match expected {
                Ok(pieces) => assert_eq!(found.unwrap(), pieces),
                Err(why) => {
                    let message = found.unwrap_err().to_string();
                    assert!(message.contains(why), "{message} does not say {why}");
                }
            }
        }
    }

    #[test]
    fn lines_may_be_cut_by_blocks() {
        let mut text = b"30\n".to_vec();
        for piece in 0..30_u64 {
            text.extend(format!("{}\n{}\n", piece * 1_000_000_000, 7).bytes());
        }
        text.resize(text.len().next_multiple_of(512), 0);
        let mut lines = Lines::default();
        let mut blocks = text.chunks_exact(512);
        while !lines.take(blocks.next().unwrap().try_into().unwrap()).unwrap() {}
        assert_eq!(blocks.next(), None);
        let pieces = lines.finish().finish(u64::MAX, 210).unwrap();
        assert_eq!(pieces.len(), 30);
        assert_eq!(pieces[29], (29_000_000_000, 7));
    }
}
