//! What a path means in a layer: a file, a removal, an opaque mark, or nothing; and where links lead.

use super::MAX_PATH;
use super::error::{Problem, shorten};
use crate::model::{Name, RelPath};

/// What a path means in a layer.
pub(super) enum Place {
    File(RelPath),
    Whiteout(RelPath),
    Opaque(RelPath),
    Aufs,
}

pub(super) fn place(path: &[u8]) -> Result<Place, Problem> {
    const MARK: &[u8] = b".wh.";
    const AUFS: &[u8] = b".wh..wh.";
    const OPAQUE: &[u8] = b".wh..wh..opq";
    let parts = parts(path, "path", || Problem::Climbs)?;
    let below = |parts: &[&[u8]]| RelPath::parse(&parts.join(&b'/')).map_err(Problem::BadPath);
    let Some((last, above)) = parts.split_last() else { return Ok(Place::File(RelPath::root())) };
    if above.iter().any(|part| part.starts_with(AUFS)) {
        return Ok(Place::Aufs);
    }
    if above.iter().any(|part| part.starts_with(MARK)) {
        return Err(Problem::ReservedName);
    }
    if *last == OPAQUE {
        below(above).map(Place::Opaque)
    } else if last.starts_with(AUFS) {
        Ok(Place::Aufs)
    } else if let Some(removed) = last.strip_prefix(MARK) {
        // The mark may be longer than a name: only what it removes has to be one.
        if matches!(removed, b"" | b"." | b"..") {
            return Err(Problem::ReservedName);
        }
        let removed = Name::new(removed).map_err(Problem::BadPath)?;
        Ok(Place::Whiteout(below(above)?.join(removed)))
    } else {
        below(&parts).map(Place::File)
    }
}

/// The parts of a path with `..` resolved by text alone, as engines do, unless it leaves the layer.
fn parts<'a>(bytes: &'a [u8], what: &'static str, climbs: impl FnOnce() -> Problem) -> Result<Vec<&'a [u8]>, Problem> {
    if bytes.len() > MAX_PATH {
        return Err(Problem::TooLong { what, len: bytes.len(), limit: MAX_PATH });
    }
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in bytes.split(|b| *b == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                if parts.pop().is_none() {
                    return Err(climbs());
                }
            }
            _ => parts.push(part),
        }
    }
    Ok(parts)
}

pub(super) fn symlink_target(link: &[u8]) -> Result<Box<[u8]>, Problem> {
    if link.is_empty() {
        Err(Problem::NoTarget)
    } else if link.len() > MAX_PATH {
        Err(Problem::TooLong { what: "link target", len: link.len(), limit: MAX_PATH })
    } else if link.contains(&0) {
        Err(Problem::Nul("link target"))
    } else {
        Ok(link.into())
    }
}

pub(super) fn hard_link_target(link: &[u8]) -> Result<RelPath, Problem> {
    let parts = parts(link, "link target", || Problem::TargetClimbs(shorten(link)))?;
    RelPath::parse(&parts.join(&b'/')).map_err(|source| Problem::BadTarget { target: shorten(link), source })
}
