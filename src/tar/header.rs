//! The 512-byte header block: where its fields lie and how its numbers are written.
//!
//! Pure reading: nothing here judges whether a value makes sense.

use super::error::Problem;

/// Size of headers and the unit that contents are padded to.
pub(super) const BLOCK: usize = 512;

/// One block.
pub(super) type Block = [u8; BLOCK];

/// Which descendant of V7 wrote a header; decides where extra fields lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    V7,
    Ustar,
    Star,
    Gnu,
}

/// A header block with a good checksum.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header<'a>(&'a Block);

/// Pieces of an old GNU sparse map: offset and length, twelve bytes each.
pub(super) const SPARSE_PIECE: usize = 24;

impl<'a> Header<'a> {
    /// Takes a block whose checksum fits. Old writers summed signed bytes, so both sums count.
    pub(super) fn check(block: &'a Block) -> Result<Self, Problem> {
        let stored = octal(&block[148..156]).and_then(|sum| i64::try_from(sum).ok());
        let (unsigned, signed) = sums(block);
        match stored {
            Some(stored) if stored == unsigned || stored == signed => Ok(Self(block)),
            Some(stored) => Err(Problem::Checksum { stored: stored.unsigned_abs(), computed: unsigned.unsigned_abs() }),
            None => Err(Problem::not_a_number("checksum", &block[148..156])),
        }
    }

    pub(super) fn dialect(self) -> Dialect {
        match (&self.0[257..263], &self.0[263..265], &self.0[508..512]) {
            (b"ustar\0", _, b"tar\0") => Dialect::Star,
            (b"ustar\0", _, _) => Dialect::Ustar,
            (b"ustar ", b" \0", _) => Dialect::Gnu,
            _ => Dialect::V7,
        }
    }

    pub(super) fn type_flag(self) -> u8 {
        self.0[156]
    }

    /// Path with the prefix where the dialect has one.
    pub(super) fn path(self) -> Vec<u8> {
        let name = text(&self.0[0..100]);
        let prefix = match self.dialect() {
            Dialect::Ustar => text(&self.0[345..500]),
            Dialect::Star => text(&self.0[345..476]),
            Dialect::Gnu if self.has_misplaced_prefix() => text(&self.0[345..500]),
            Dialect::Gnu | Dialect::V7 => b"",
        };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    /// Layers written before Go 1.8 may hold a ustar prefix under GNU's magic; GNU has two time stamps there. A text
    /// that is no number can only be the prefix.
    fn has_misplaced_prefix(self) -> bool {
        let times = [&self.0[345..357], &self.0[357..369]];
        self.type_flag() != b'S'
            && times.iter().any(|time| time[0] != 0 && number(time).is_none())
            && text(&self.0[345..500]).is_ascii()
    }

    pub(super) fn link_name(self) -> &'a [u8] {
        text(&self.0[157..257])
    }

    pub(super) fn mode(self) -> Result<i128, Problem> {
        self.number("mode", 100, 8)
    }

    pub(super) fn uid(self) -> Result<i128, Problem> {
        self.number("uid", 108, 8)
    }

    pub(super) fn gid(self) -> Result<i128, Problem> {
        self.number("gid", 116, 8)
    }

    pub(super) fn size(self) -> Result<i128, Problem> {
        self.number("size", 124, 12)
    }

    pub(super) fn mtime(self) -> Result<i128, Problem> {
        self.number("mtime", 136, 12)
    }

    /// Zero where V7 has no such field.
    pub(super) fn dev_major(self) -> Result<i128, Problem> {
        if self.dialect() == Dialect::V7 { Ok(0) } else { self.number("devmajor", 329, 8) }
    }

    /// Zero where V7 has no such field.
    pub(super) fn dev_minor(self) -> Result<i128, Problem> {
        if self.dialect() == Dialect::V7 { Ok(0) } else { self.number("devminor", 337, 8) }
    }

    /// Of an old GNU sparse file: its size with holes.
    pub(super) fn real_size(self) -> Result<i128, Problem> {
        self.number("realsize", 483, 12)
    }

    /// Of an old GNU sparse file: the first four pieces, and whether blocks with more of them follow.
    pub(super) fn sparse_pieces(self) -> (&'a [u8], bool) {
        (&self.0[386..482], self.0[482] != 0)
    }

    fn number(self, field: &'static str, at: usize, len: usize) -> Result<i128, Problem> {
        let bytes = self.0.get(at..at + len).unwrap_or_default();
        number(bytes).ok_or_else(|| Problem::not_a_number(field, bytes))
    }
}

/// The pieces in a block that continues an old GNU sparse map, and whether another such block follows.
pub(super) fn sparse_extension(block: &Block) -> (&[u8], bool) {
    (&block[..21 * SPARSE_PIECE], block[504] != 0)
}

/// The sums of a header's bytes with its checksum field taken as spaces: unsigned, then signed.
pub(super) fn sums(block: &Block) -> (i64, i64) {
    let mut sums = (0, 0);
    for (at, byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&at) { b' ' } else { *byte };
        sums.0 += i64::from(byte);
        sums.1 += i64::from(byte.cast_signed());
    }
    sums
}

/// Bytes up to the first NUL.
pub(super) fn text(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

/// A number: base-256 if the first bit is set (GNU, two's complement), else octal. Fields are at most twelve bytes.
pub(super) fn number(field: &[u8]) -> Option<i128> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 == 0 {
        return octal(field);
    }
    if field.len() > 12 {
        return None;
    }
    // The bit after the marker is the sign.
    let start = if first & 0x40 == 0 { i128::from(first & 0x3f) } else { i128::from(first & 0x3f) - 0x40 };
    Some(rest.iter().fold(start, |value, byte| (value << 8) | i128::from(*byte)))
}

/// Octal digits between spaces and NULs; nothing but those is zero.
fn octal(field: &[u8]) -> Option<i128> {
    let digits = field.trim_ascii_start();
    let start = digits.iter().position(|b| *b != 0).unwrap_or(digits.len());
    let digits = &digits[start..];
    let end = digits.iter().position(|b| matches!(b, b' ' | 0)).unwrap_or(digits.len());
    let (digits, rest) = digits.split_at(end);
    if digits.len() > 32 || rest.iter().any(|b| !matches!(b, b' ' | 0)) {
        return None;
    }
    digits.iter().try_fold(0_i128, |value, digit| match digit {
        b'0'..=b'7' => Some(value * 8 + i128::from(digit - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_in_many_spellings() {
        for (field, value) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"644\0\0\0\0\0", Some(0o644)),
            (b"77777777777 ", Some(0o77_777_777_777)),
            (b"777777777777", Some(0o777_777_777_777)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"\x000644\0", Some(0o644)),
            (b"64 4\0\0\0\0", None),
            (b"0000648\0", None),
            (b"-000644\0", None),
            (b"\x80\0\0\0\0\0\x01\x00", Some(256)),
            (b"\x80\0\0\0\xff\xff\xff\xff", Some(0xffff_ffff)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xf6", Some(-10)),
            (b"\x81\0\0\0\0\0\0\0\0\0\0\0", Some(1 << 88)),
            (b"", None),
        ] {
            assert_eq!(number(field), value, "{:?}", field.escape_ascii().to_string());
        }
    }

    #[test]
    fn a_header_is_known_by_either_checksum() {
        let mut block = [0; BLOCK];
        block[..4].copy_from_slice("né\0".as_bytes().get(..4).unwrap());
        let (unsigned, signed) = sums(&block);
        assert_ne!(unsigned, signed);
        for sum in [unsigned, signed] {
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            assert!(Header::check(&block).is_ok());
        }
        block[148..156].copy_from_slice(b"000001\0 ");
        assert!(matches!(Header::check(&block), Err(Problem::Checksum { stored: 1, .. })));
        block[148..156].copy_from_slice(b"elephant");
        assert!(matches!(Header::check(&block), Err(Problem::NotANumber { field: "checksum", .. })));
    }
}
