//! POSIX ACLs: from the text that archivers write to the bytes of the `system.posix_acl_*` attributes.
//!
//! Text: entries `tag:qualifier:permissions[:id]` between commas or line feeds, `#` begins a comment. The layer alone
//! cannot tell which number belongs to a user's name, so a name without a number is an answer of its own.

use super::error::{Problem, shorten};

/// Entries of `struct posix_acl_xattr_header` and `posix_acl_xattr_entry` (`include/uapi/linux/posix_acl_xattr.h`).
const VERSION: u32 = 2;
const NO_ID: u32 = u32::MAX;
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// What a text ACL comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Acl {
    /// The attribute's bytes.
    Binary(Vec<u8>),
    /// An access ACL that says no more than the permission bits, or no entry at all: the kernel keeps no attribute.
    Trivial,
    /// It names a user or group without its number.
    Unresolved,
}

/// Reads a text ACL, `default` for the one that a directory's new files inherit.
pub(super) fn parse(text: &[u8], default: bool) -> Result<Acl, Problem> {
    let bad = || Problem::BadAcl(shorten(text));
    let mut entries: Vec<(u16, u32, u16)> = Vec::new();
    for line in text.split(|b| matches!(b, b'\n' | b',')) {
        let line = line.split(|b| *b == b'#').next().unwrap_or_default().trim_ascii();
        if line.is_empty() {
            continue;
        }
        let mut fields = line.split(|b| *b == b':').map(<[u8]>::trim_ascii);
        let (tag, mut qualifier) = (fields.next().unwrap_or_default(), fields.next().ok_or_else(bad)?);
        let mut bits = fields.next();
        // Solaris and old star leave the empty qualifier of `mask` and `other` away.
        if bits.is_none() {
            (qualifier, bits) = (b"", Some(qualifier));
        }
        let bits = permissions(bits.unwrap_or_default()).ok_or_else(bad)?;
        let id = if qualifier.is_empty() {
            NO_ID
        } else {
            let written = fields.next().filter(|id| !id.is_empty()).unwrap_or(qualifier);
            match number(written) {
                Some(id) => id,
                None if qualifier == b"root" => 0,
                None => return Ok(Acl::Unresolved),
            }
        };
        let tag = match (tag, id == NO_ID) {
            (b"user" | b"u", true) => USER_OBJ,
            (b"user" | b"u", false) => USER,
            (b"group" | b"g", true) => GROUP_OBJ,
            (b"group" | b"g", false) => GROUP,
            (b"mask" | b"m", true) => MASK,
            (b"other" | b"o", true) => OTHER,
            _ => return Err(bad()),
        };
        entries.push((tag, id, bits));
    }
    entries.sort_unstable();
    if entries.windows(2).any(|pair| matches!(pair, [a, b] if (a.0, a.1) == (b.0, b.1))) {
        return Err(bad());
    }
    let has = |tag| entries.iter().any(|entry| entry.0 == tag);
    if entries.is_empty() {
        return Ok(Acl::Trivial);
    }
    let named = has(USER) || has(GROUP);
    if !has(USER_OBJ) || !has(GROUP_OBJ) || !has(OTHER) || (named && !has(MASK)) {
        return Err(bad());
    }
    if !default && !named && !has(MASK) {
        return Ok(Acl::Trivial);
    }
    let mut bytes = VERSION.to_le_bytes().to_vec();
    for (tag, id, bits) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(bits.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    Ok(Acl::Binary(bytes))
}

fn number(digits: &[u8]) -> Option<u32> {
    let id: u32 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    (digits.iter().all(u8::is_ascii_digit) && id != NO_ID).then_some(id)
}

fn permissions(text: &[u8]) -> Option<u16> {
    text.iter().try_fold(0, |bits, letter| {
        Some(
            bits | match letter {
                b'r' => 4,
                b'w' => 2,
                b'x' => 1,
                b'-' => 0,
                _ => return None,
            },
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(tag: u16, bits: u16, id: u32) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &bits.to_le_bytes(), &id.to_le_bytes()].concat()
    }

    #[test]
    fn texts_of_gnu_star_and_bsd_come_to_the_same_bytes() {
        let expected = [
            2_u32.to_le_bytes().to_vec(),
            entry(USER_OBJ, 7, NO_ID),
            entry(USER, 4, 0),
            entry(USER, 5, 502),
            entry(GROUP_OBJ, 5, NO_ID),
            entry(GROUP, 6, 9),
            entry(MASK, 7, NO_ID),
            entry(OTHER, 4, NO_ID),
        ]
        .concat();
        for text in [
            "user::rwx\nuser:502:r-x\nuser:root:r--\ngroup::r-x\ngroup:9:rw-\nmask::rwx\nother::r--\n",
            "user::rwx,user:lisa:r-x:502,user:root:r--:0,group::r-x,group:toolies:rw-:9,mask::rwx,other::r--",
            "u::rwx, u:502:rx, u:0:r, g::r-x #effective:r-x, g:9:rw, m:rwx, o:r",
        ] {
            assert_eq!(parse(text.as_bytes(), false).unwrap(), Acl::Binary(expected.clone()), "{text}");
        }
    }

    #[test]
    fn acls_that_add_nothing_or_cannot_be_resolved_are_told_apart() {
        for (text, acl) in [
            ("user::rw-,group::r--,other::r--", Acl::Trivial),
            ("", Acl::Trivial),
            ("user::rw-,user:lisa:r--,group::r--,mask::r--,other::r--", Acl::Unresolved),
        ] {
            assert_eq!(parse(text.as_bytes(), false).unwrap(), acl, "{text}");
        }
        let minimal = parse(b"user::rw-,group::r--,other::r--", true).unwrap();
        assert!(matches!(minimal, Acl::Binary(bytes) if bytes.len() == 4 + 3 * 8), "a default ACL needs no names");
    }

    #[test]
    fn malformed_acls_are_refused() {
        for text in [
            "user",
            "user::rw-",
            "user::rq-,group::r--,other::r--",
            "user::rw-,user:7:r--,group::r--,other::r--",
            "friend::rw-,group::r--,other::r--",
            "user::rw-,group::r--,other:7:r--",
            "user::rw-,user::r--,group::r--,other::r--",
        ] {
            assert!(matches!(parse(text.as_bytes(), false), Err(Problem::BadAcl(_))), "{text} was taken");
        }
    }
}
