//! Extended attributes: records, name prefixes, and the hash of the name filter.

use super::{Fields, Record, XATTR_ENTRY_SIZE, XATTR_HEADER_SIZE};

/// `struct erofs_xattr_ibody_header`. After it: ids of shared attributes (u32 each), then entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XattrHeader {
    /// A set bit says: no name that hashes to it is here. See [`xattr_filter_bit`].
    pub name_filter: u32,
    /// Number of shared attributes.
    pub shared_count: u8,
    /// Zero.
    pub reserved: [u8; 7],
}

impl XattrHeader {
    /// Reads the record.
    pub fn decode(raw: &[u8; XATTR_HEADER_SIZE]) -> Self {
        let mut f = Fields(raw);
        Self { name_filter: f.u32(), shared_count: f.u8(), reserved: f.bytes() }
    }

    /// Writes the record.
    pub fn encode(&self) -> [u8; XATTR_HEADER_SIZE] {
        Record::new().u32(self.name_filter).u8(self.shared_count).put(&self.reserved).done()
    }
}

/// `struct erofs_xattr_entry`. After it: the name without its prefix, the value, padding to 4 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XattrEntry {
    /// Bytes of the name without its prefix.
    pub name_len: u8,
    /// Which prefix: see [`XATTR_PREFIXES`]; with [`XATTR_LONG_PREFIX`] set, a long prefix of the image.
    pub name_index: u8,
    /// Bytes of the value.
    pub value_len: u16,
}

impl XattrEntry {
    /// Reads the record.
    pub fn decode(raw: &[u8; XATTR_ENTRY_SIZE]) -> Self {
        let mut f = Fields(raw);
        Self { name_len: f.u8(), name_index: f.u8(), value_len: f.u16() }
    }

    /// Writes the record.
    pub fn encode(&self) -> [u8; XATTR_ENTRY_SIZE] {
        Record::new().u8(self.name_len).u8(self.name_index).u16(self.value_len).done()
    }

    /// Bytes of entry, name, value and padding.
    pub fn padded_len(&self) -> usize {
        (XATTR_ENTRY_SIZE + usize::from(self.name_len) + usize::from(self.value_len)).next_multiple_of(4)
    }
}

/// Bytes of the attribute area of an inode that says `count`.
pub fn xattr_area_size(count: u16) -> usize {
    match count {
        0 => 0,
        _ => XATTR_HEADER_SIZE + 4 * (usize::from(count) - 1),
    }
}

/// In an attribute entry's `name_index`: the other bits count the long prefixes of the image.
pub const XATTR_LONG_PREFIX: u8 = 0x80;

/// Index and prefix of attribute names. The two ACL prefixes are whole names.
pub const XATTR_PREFIXES: [(u8, &[u8]); 6] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (5, b"lustre."),
    (6, b"security."),
];

/// The prefix that `index` stands for.
pub fn xattr_prefix(index: u8) -> Option<&'static [u8]> {
    XATTR_PREFIXES.iter().find(|(known, _)| *known == index).map(|(_, prefix)| *prefix)
}

/// As [`xattr_prefix`], but none for prefixes whose attributes the kernel does not show (Lustre's).
pub fn visible_xattr_prefix(index: u8) -> Option<&'static [u8]> {
    if index == 5 { None } else { xattr_prefix(index) }
}

/// Cuts a full attribute name into prefix index and rest; none if EROFS has no prefix for it.
pub fn split_xattr_name(name: &[u8]) -> Option<(u8, &[u8])> {
    XATTR_PREFIXES.iter().find_map(|(index, prefix)| {
        let rest = name.strip_prefix(*prefix)?;
        // The ACL names are complete; anything longer is another name, which EROFS cannot hold.
        (matches!(index, 2 | 3) == rest.is_empty()).then_some((*index, rest))
    })
}

/// Which of the 32 bits of a name filter speaks for the attribute `rest` below prefix `index` (after taking a long
/// prefix apart: `index` is its base, `rest` includes its infix).
pub fn xattr_filter_bit(index: u8, rest: &[u8]) -> u32 {
    const SEED: u32 = 0x25BB_E08F;
    xxh32(rest, SEED.wrapping_add(u32::from(index))) & 31
}

/// XXH32 as its specification defines it (`xxHash/doc/xxhash_spec.md`).
fn xxh32(data: &[u8], seed: u32) -> u32 {
    const P1: u32 = 0x9E37_79B1;
    const P2: u32 = 0x85EB_CA77;
    const P3: u32 = 0xC2B2_AE3D;
    const P4: u32 = 0x27D4_EB2F;
    const P5: u32 = 0x1656_67B1;
    let round = |lane: u32, word: u32| lane.wrapping_add(word.wrapping_mul(P2)).rotate_left(13).wrapping_mul(P1);

    let (stripes, rest) = data.as_chunks::<16>();
    let mut hash = if stripes.is_empty() {
        seed.wrapping_add(P5)
    } else {
        let mut lanes = [seed.wrapping_add(P1).wrapping_add(P2), seed.wrapping_add(P2), seed, seed.wrapping_sub(P1)];
        for stripe in stripes {
            for (lane, word) in lanes.iter_mut().zip(stripe.as_chunks::<4>().0) {
                *lane = round(*lane, u32::from_le_bytes(*word));
            }
        }
        let [a, b, c, d] = lanes;
        a.rotate_left(1).wrapping_add(b.rotate_left(7)).wrapping_add(c.rotate_left(12)).wrapping_add(d.rotate_left(18))
    };
    let [a, b, c, d, ..] = (data.len() as u64).to_le_bytes();
    hash = hash.wrapping_add(u32::from_le_bytes([a, b, c, d]));

    let (words, bytes) = rest.as_chunks::<4>();
    for word in words {
        hash = hash.wrapping_add(u32::from_le_bytes(*word).wrapping_mul(P3)).rotate_left(17).wrapping_mul(P4);
    }
    for byte in bytes {
        hash = hash.wrapping_add(u32::from(*byte).wrapping_mul(P5)).rotate_left(11).wrapping_mul(P1);
    }
    hash = (hash ^ (hash >> 15)).wrapping_mul(P2);
    hash = (hash ^ (hash >> 13)).wrapping_mul(P3);
    hash ^ (hash >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xxh32_gives_the_published_values() {
        // Values from the reference implementation's own self test and documentation.
        assert_eq!(xxh32(b"", 0), 0x02CC_5D05);
        assert_eq!(xxh32(b"", 2_654_435_761), 0x36B7_8AE7);
        assert_eq!(xxh32(b"Nobody inspects the spammish repetition", 0), 0xE229_3B2F);
    }

    #[test]
    fn attribute_names_are_cut_at_known_prefixes() {
        for (name, cut) in [
            (&b"user.a"[..], Some((1, &b"a"[..]))),
            (b"system.posix_acl_access", Some((2, b""))),
            (b"system.posix_acl_default", Some((3, b""))),
            (b"system.posix_acl_access2", None),
            (b"trusted.overlay.opaque", Some((4, b"overlay.opaque"))),
            (b"security.capability", Some((6, b"capability"))),
            (b"user.", None),
            (b"strange", None),
        ] {
            assert_eq!(split_xattr_name(name), cut, "{name:?}");
        }
    }
}
