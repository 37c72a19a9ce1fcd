//! Extended attributes of a tree, in their on-disk form: each distinct attribute once, each distinct set of them once.

use super::error::TreeError;
use super::intern::Interner;
use super::{OPAQUE_NAME, OPAQUE_VALUE};
use crate::erofs::ondisk::{XATTR_HEADER_SIZE, XattrEntry, split_xattr_name, xattr_filter_bit};
use crate::model::{RelPath, Xattr};

/// The most bytes of attributes an inode may have: what its 16-bit count can say.
/// An opaque mark may be added when all entries are there: its room is kept.
const MAX_AREA: usize = XATTR_HEADER_SIZE + 4 * (u16::MAX as usize - 1) - 64;

/// A set of attributes; [`XattrSet::EMPTY`] is the one without any.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct XattrSet(u32);

impl XattrSet {
    /// No attributes.
    pub(super) const EMPTY: Self = Self(0);
}

/// All attributes and sets of a tree.
#[derive(Debug)]
pub(super) struct XattrPool {
    /// Entries as they stand in the image: header, rest of the name, value, padding.
    entries: Interner,
    /// Numbers of entries, four bytes each, in the order of the names.
    sets: Interner,
}

impl XattrPool {
    pub(super) fn new() -> Self {
        let mut sets = Interner::default();
        assert_eq!(sets.intern(b""), Some(XattrSet::EMPTY.0), "the first set is the empty one");
        Self { entries: Interner::default(), sets }
    }

    /// The set of `xattrs`, which belong to `path`. Names that EROFS has no prefix for must have been dropped.
    pub(super) fn set_of(&mut self, path: &RelPath, xattrs: &[&Xattr]) -> Result<XattrSet, TreeError> {
        if xattrs.is_empty() {
            return Ok(XattrSet::EMPTY);
        }
        let mut set = Vec::with_capacity(xattrs.len() * 4);
        let mut area = XATTR_HEADER_SIZE;
        for xattr in xattrs {
            let entry = encode(path, xattr)?;
            area += entry.len();
            set.extend_from_slice(&self.entries.intern(&entry).ok_or(TreeError::TooLarge)?.to_le_bytes());
        }
        if area > MAX_AREA {
            return Err(TreeError::XattrsTooLarge { path: path.clone(), size: area, limit: MAX_AREA });
        }
        Ok(XattrSet(self.sets.intern(&set).ok_or(TreeError::TooLarge)?))
    }

    /// The set with the attributes of both.
    pub(super) fn union(&mut self, a: XattrSet, b: XattrSet) -> Result<XattrSet, TreeError> {
        let mut both: Vec<u32> = self.entries_of(a).chain(self.entries_of(b)).collect();
        both.sort_unstable();
        both.dedup();
        let both: Vec<u8> = both.into_iter().flat_map(u32::to_le_bytes).collect();
        Ok(XattrSet(self.sets.intern(&both).ok_or(TreeError::TooLarge)?))
    }

    /// The number of an attribute, if any inode has had it.
    pub(super) fn find(&self, name: &[u8], value: &[u8]) -> Option<u32> {
        let xattr = Xattr { name: name.into(), value: value.into() };
        self.entries.find(&encode(&RelPath::root(), &xattr).ok()?)
    }

    /// True if some inode may show an attribute: overlayfs keeps opaque marks to itself.
    pub(super) fn shows_any(&self) -> bool {
        let marks = usize::from(self.find(OPAQUE_NAME, OPAQUE_VALUE).is_some());
        self.len() > marks
    }

    /// Numbers of the entries of `set`.
    pub(super) fn entries_of(&self, set: XattrSet) -> impl Iterator<Item = u32> + '_ {
        self.sets.get(set.0).as_chunks::<4>().0.iter().map(|raw| u32::from_le_bytes(*raw))
    }

    /// An entry as it stands in the image.
    pub(super) fn entry(&self, id: u32) -> &[u8] {
        self.entries.get(id)
    }

    /// How many entries there are.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// The name filter over the entries of `set`: a set bit says that no name that hashes to it is there.
    pub(super) fn filter(&self, set: XattrSet) -> u32 {
        let present = self.entries_of(set).fold(0, |present, id| {
            let entry = self.entry(id);
            let header = entry.first_chunk().expect("an entry begins with its header");
            let header = XattrEntry::decode(header);
            let rest = &entry[header.encode().len()..][..usize::from(header.name_len)];
            present | 1 << xattr_filter_bit(header.name_index, rest)
        });
        !present
    }
}

fn encode(path: &RelPath, xattr: &Xattr) -> Result<Vec<u8>, TreeError> {
    let refused = |reason| TreeError::Xattr { path: path.clone(), name: lossy(&xattr.name), reason };
    let (name_index, rest) = split_xattr_name(&xattr.name).ok_or_else(|| refused("EROFS has no prefix for it"))?;
    let name_len = u8::try_from(rest.len()).map_err(|_| refused("its name is longer than 255 bytes"))?;
    let value_len =
        u16::try_from(xattr.value.len()).map_err(|_| refused("its value is longer than the 65,535 bytes of EROFS"))?;
    let header = XattrEntry { name_len, name_index, value_len };
    let mut entry = Vec::with_capacity(header.padded_len());
    entry.extend_from_slice(&header.encode());
    entry.extend_from_slice(rest);
    entry.extend_from_slice(&xattr.value);
    entry.resize(header.padded_len(), 0);
    Ok(entry)
}

fn lossy(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}
