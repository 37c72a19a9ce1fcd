//! PAX extended headers: `length key=value` records and what the keys mean.
//!
//! Text is taken as bytes whatever `hdrcharset` says: Linux names are bytes, and engines do the same.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};

use super::error::{Problem, shorten};
use super::sparse::{SparseMap, decimal};
use crate::model::Timestamp;

/// What the records before an entry say about it. What is absent is said by the header itself.
#[derive(Debug, Default)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link_path: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<i128>,
    pub(super) gid: Option<i128>,
    pub(super) mtime: Option<Timestamp>,
    pub(super) dev_major: Option<u64>,
    pub(super) dev_minor: Option<u64>,
    pub(super) acl_access: Option<Vec<u8>>,
    pub(super) acl_default: Option<Vec<u8>>,
    /// Full attribute names; those given raw win over those given in base64.
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) sparse: Sparse,
}

/// The `GNU.sparse` records.
#[derive(Debug, Default)]
pub(super) struct Sparse {
    pub(super) major: Option<Vec<u8>>,
    pub(super) minor: Option<Vec<u8>>,
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_size: Option<u64>,
    /// From versions 0.0 and 0.1.
    pub(super) map: Option<SparseMap>,
    /// The offset of version 0.0 that waits for its length.
    offset: Option<u64>,
}

impl Pax {
    /// Reads all records of one extended header.
    pub(super) fn parse(records: &[u8]) -> Result<Self, Problem> {
        let mut pax = Self::default();
        let mut encoded: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
        let mut rest = records;
        while !rest.is_empty() {
            let at = records.len() - rest.len();
            let (key, value, after) = record(rest).ok_or(Problem::BadRecord(at))?;
            rest = after;
            if let Some(name) = key.strip_prefix(b"LIBARCHIVE.xattr.") {
                if !value.is_empty() {
                    encoded.insert(percent_decode(name), base64(name, value)?);
                }
            } else {
                pax.take(key, value)?;
            }
        }
        for (name, value) in encoded {
            pax.xattrs.entry(name).or_insert(value);
        }
        Ok(pax)
    }

    /// One record. An empty value says: as the header has it.
    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), Problem> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.insert(gnu_decode(name), value.to_vec());
            return Ok(());
        }
        let text = || (!value.is_empty()).then(|| value.to_vec());
        let number = |name| if value.is_empty() { Ok(None) } else { decimal(name, value).map(Some) };
        match key {
            b"path" => self.path = text(),
            b"linkpath" => self.link_path = text(),
            b"size" => self.size = number("size")?,
            b"uid" => self.uid = signed("uid", value)?,
            b"gid" => self.gid = signed("gid", value)?,
            b"mtime" => self.mtime = if value.is_empty() { None } else { Some(timestamp(value)?) },
            b"SCHILY.devmajor" => self.dev_major = number("SCHILY.devmajor")?,
            b"SCHILY.devminor" => self.dev_minor = number("SCHILY.devminor")?,
            b"SCHILY.acl.access" => self.acl_access = text(),
            b"SCHILY.acl.default" => self.acl_default = text(),
            b"GNU.sparse.major" => self.sparse.major = text(),
            b"GNU.sparse.minor" => self.sparse.minor = text(),
            b"GNU.sparse.name" => self.sparse.name = text(),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.real_size = number("GNU.sparse.size")?,
            b"GNU.sparse.map" if !value.is_empty() => {
                self.sparse.map.insert(SparseMap::default()).push_list(value)?;
            }
            b"GNU.sparse.offset" => {
                let waiting = self.sparse.offset.replace(decimal("GNU.sparse.offset", value)?);
                if waiting.is_some() {
                    return Err(Problem::BadSparseMap("an offset has no length"));
                }
            }
            b"GNU.sparse.numbytes" => {
                let offset = self.sparse.offset.take().ok_or(Problem::BadSparseMap("a length has no offset"))?;
                let len = decimal("GNU.sparse.numbytes", value)?;
                self.sparse.map.get_or_insert_default().push(offset, len)?;
            }
            // Version 0.0 of a file that is all hole has no pieces.
            b"GNU.sparse.numblocks" => {
                self.sparse.map.get_or_insert_default();
            }
            _ => {}
        }
        Ok(())
    }
}

/// Key, value and what follows the first record.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(20).position(|b| *b == b' ')?;
    let len = usize::try_from(decimal("record", bytes.get(..space)?).ok()?).ok()?;
    let (record, rest) = bytes.split_at_checked(len)?;
    let (line_feed, record) = record.get(space + 1..)?.split_last()?;
    let equals = record.iter().position(|b| *b == b'=')?;
    let (key, value) = (record.get(..equals)?, record.get(equals + 1..)?);
    (*line_feed == b'\n' && !key.is_empty()).then_some((key, value, rest))
}

/// Ids may be negative in the format, though never on Linux: the reader refuses them with the entry's name.
fn signed(name: &'static str, value: &[u8]) -> Result<Option<i128>, Problem> {
    let (negative, digits) = match value.split_first() {
        None => return Ok(None),
        Some((b'-', digits)) => (true, digits),
        Some(_) => (false, value),
    };
    let magnitude = i128::from(decimal(name, digits)?);
    Ok(Some(if negative { -magnitude } else { magnitude }))
}

/// Decimal seconds with an optional sign and fraction. Digits beyond nanoseconds are cut off.
fn timestamp(value: &[u8]) -> Result<Timestamp, Problem> {
    let bad = || Problem::not_a_number("mtime", value);
    let (negative, unsigned) = match value.split_first() {
        Some((b'-', unsigned)) => (true, unsigned),
        _ => (false, value),
    };
    let mut parts = unsigned.splitn(2, |b| *b == b'.');
    let whole = decimal("mtime", parts.next().unwrap_or_default())?;
    let mut nanos = 0_u32;
    if let Some(fraction) = parts.next() {
        if !fraction.iter().all(u8::is_ascii_digit) {
            return Err(bad());
        }
        for place in 0..9 {
            nanos = nanos * 10 + fraction.get(place).map_or(0, |digit| u32::from(digit - b'0'));
        }
    }
    let whole = i64::try_from(whole).map_err(|_| bad())?;
    Ok(match (negative, nanos) {
        (false, _) => Timestamp { seconds: whole, nanos },
        (true, 0) => Timestamp { seconds: -whole, nanos: 0 },
        (true, _) => Timestamp { seconds: -whole - 1, nanos: 1_000_000_000 - nanos },
    })
}

/// GNU tar writes `%` and `=` of an attribute's name as `%25` and `%3D`, and nothing else so.
fn gnu_decode(name: &[u8]) -> Vec<u8> {
    decode(name, |high, low| matches!((high, low), (b'2', b'5') | (b'3', b'D')))
}

/// libarchive writes any unusual byte of a name as `%XX`.
fn percent_decode(name: &[u8]) -> Vec<u8> {
    decode(name, |_, _| true)
}

fn decode(name: &[u8], wanted: impl Fn(u8, u8) -> bool) -> Vec<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut decoded = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        if let (b'%', [high, low, after @ ..]) = (byte, after)
            && wanted(*high, *low)
            && let (Some(high), Some(low)) = (digit(*high), digit(*low))
        {
            decoded.push(high * 16 + low);
            rest = after;
        } else {
            decoded.push(*byte);
        }
    }
    decoded
}

/// libarchive writes base64 without padding.
fn base64(name: &[u8], value: &[u8]) -> Result<Vec<u8>, Problem> {
    const LENIENT: GeneralPurposeConfig =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    GeneralPurpose::new(&base64::alphabet::STANDARD, LENIENT)
        .decode(value)
        .map_err(|_| Problem::BadXattr { name: shorten(name), why: "its value is not base64" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pax(records: &[(&str, &str)]) -> Result<Pax, Problem> {
        let mut bytes = Vec::new();
        for (key, value) in records {
            let body = key.len() + value.len() + 3;
            let mut len = body + body.to_string().len();
            len = body + len.to_string().len();
            bytes.extend(format!("{len} {key}={value}\n").bytes());
        }
        Pax::parse(&bytes)
    }

    #[test]
    fn times_have_signs_and_fractions() {
        for (text, seconds, nanos) in [
            ("0", 0, 0),
            ("1700000000.123456789", 1_700_000_000, 123_456_789),
            ("1700000000.1", 1_700_000_000, 100_000_000),
            ("1.9999999999", 1, 999_999_999),
            ("5.", 5, 0),
            ("-1", -1, 0),
            ("-1.5", -2, 500_000_000),
            ("-0.25", -1, 750_000_000),
            ("-0.0000000001", 0, 0),
            ("9223372036854775807", i64::MAX, 0),
        ] {
            assert_eq!(pax(&[("mtime", text)]).unwrap().mtime, Some(Timestamp { seconds, nanos }), "{text}");
        }
        for text in ["-", "1e3", "1.x", ".5", "+1", "9223372036854775808", "0x10", " 1"] {
            assert!(pax(&[("mtime", text)]).is_err(), "{text} was taken");
        }
        assert_eq!(pax(&[("mtime", "")]).unwrap().mtime, None);
    }

    #[test]
    fn later_records_win_and_empty_ones_take_back() {
        let found = pax(&[("path", "a"), ("path", "b"), ("size", "7"), ("size", ""), ("uid", "-3")]).unwrap();
        assert_eq!(found.path.as_deref(), Some(&b"b"[..]));
        assert_eq!(found.size, None);
        assert_eq!(found.uid, Some(-3));
    }

    #[test]
    fn attributes_come_raw_or_in_base64() {
        let found = pax(&[
            ("LIBARCHIVE.xattr.user.both", "bG9zZXI"),
            ("SCHILY.xattr.user.both", "winner\0\n="),
            ("LIBARCHIVE.xattr.user.a%20b", "AAE="),
            ("LIBARCHIVE.xattr.user.nopad", "AAE"),
            ("SCHILY.xattr.user.100%25%3D%41", ""),
        ])
        .unwrap();
        let found: Vec<(&[u8], &[u8])> = found.xattrs.iter().map(|(n, v)| (&n[..], &v[..])).collect();
        assert_eq!(
            found,
            [
                (&b"user.100%=%41"[..], &b""[..]),
                (b"user.a b", b"\0\x01"),
                (b"user.both", b"winner\0\n="),
                (b"user.nopad", b"\0\x01"),
            ]
        );
        assert!(matches!(pax(&[("LIBARCHIVE.xattr.user.x", "!!")]), Err(Problem::BadXattr { .. })));
    }

    #[test]
    fn malformed_records_are_named_by_their_place() {
        for (bytes, at) in [
            (&b"12 path=abc"[..], 0),
            (b"12 path=abcd", 0),
            (b"11 path=abc", 0),
            (b"path=abc\n", 0),
            (b"6 abc\n", 0),
            (b"6 =ab\n", 0),
            (b"0 path=abc\n", 0),
            (b"2 path=abc\n", 0),
            (b"99999999999999999999 path=abc\n", 0),
            (b"12 path=abc\n\0\0\0", 12),
            (b"12 path=abc\n13 path=abc\n", 12),
        ] {
            match Pax::parse(bytes) {
                Err(Problem::BadRecord(found)) => assert_eq!(found, at, "{}", bytes.escape_ascii()),
                other => panic!("{} gave {other:?}", bytes.escape_ascii()),
            }
        }
        assert_eq!(Pax::parse(b"12 path=abc\n").unwrap().path.as_deref(), Some(&b"abc"[..]));
    }

    #[test]
    fn old_sparse_records_pair_up() {
        let found = pax(&[
            ("GNU.sparse.size", "100"),
            ("GNU.sparse.numblocks", "2"),
            ("GNU.sparse.offset", "10"),
            ("GNU.sparse.numbytes", "5"),
            ("GNU.sparse.offset", "50"),
            ("GNU.sparse.numbytes", "1"),
        ])
        .unwrap();
        assert_eq!(found.sparse.map.unwrap().finish(100, 6).unwrap(), [(10, 5), (50, 1)]);
        assert!(pax(&[("GNU.sparse.numbytes", "5")]).is_err());
        assert!(pax(&[("GNU.sparse.offset", "5"), ("GNU.sparse.offset", "5")]).is_err());
    }
}
