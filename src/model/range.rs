//! Half-open byte ranges with checked arithmetic.

use std::fmt;

/// Why two numbers are no range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// The end lies before the start.
    #[error("byte range {start}..{end} ends before it starts")]
    Backwards {
        /// First byte.
        start: u64,
        /// One past the last.
        end: u64,
    },
    /// Start plus length exceeds 64 bits.
    #[error("{len} bytes from {start} reach beyond 64 bits")]
    Overflow {
        /// First byte.
        start: u64,
        /// How many.
        len: u64,
    },
}

/// Bytes from `start` up to, not including, `end`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ByteRange {
    start: u64,
    end: u64,
}

impl ByteRange {
    /// The range `start..end`.
    ///
    /// # Errors
    /// [`RangeError::Backwards`].
    pub const fn new(start: u64, end: u64) -> Result<Self, RangeError> {
        if end < start { Err(RangeError::Backwards { start, end }) } else { Ok(Self { start, end }) }
    }

    /// `len` bytes from `start`.
    ///
    /// # Errors
    /// [`RangeError::Overflow`].
    pub const fn at(start: u64, len: u64) -> Result<Self, RangeError> {
        match start.checked_add(len) {
            Some(end) => Ok(Self { start, end }),
            None => Err(RangeError::Overflow { start, len }),
        }
    }

    /// The range `0..len`.
    pub const fn to(len: u64) -> Self {
        Self { start: 0, end: len }
    }

    /// First byte.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// One past the last byte.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// Number of bytes.
    pub const fn len(self) -> u64 {
        self.end - self.start
    }

    /// True if it holds no byte.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// True if every byte of `other` is in this range.
    pub const fn contains(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// The bytes both ranges hold, none if they hold none in common.
    pub fn intersection(self, other: Self) -> Option<Self> {
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        (start < end).then_some(Self { start, end })
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_checked() {
        assert_eq!(ByteRange::new(5, 4), Err(RangeError::Backwards { start: 5, end: 4 }));
        assert_eq!(ByteRange::at(u64::MAX, 1), Err(RangeError::Overflow { start: u64::MAX, len: 1 }));
        assert_eq!(ByteRange::at(3, 4).unwrap(), ByteRange::new(3, 7).unwrap());
    }

    #[test]
    fn intersections_hold_common_bytes_only() {
        let range = |start, end| ByteRange::new(start, end).unwrap();
        assert_eq!(range(0, 5).intersection(range(3, 9)), Some(range(3, 5)));
        assert_eq!(range(0, 5).intersection(range(5, 9)), None);
        assert!(range(0, 5).contains(range(1, 5)));
        assert!(!range(0, 5).contains(range(1, 6)));
    }
}
