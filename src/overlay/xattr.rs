//! How overlayfs names extended attributes: which it keeps to itself and how others pass through it.
//!
//! Overlayfs of the default kind owns `trusted.overlay.*`. An image that needs such an attribute to be seen (an image
//! that holds layers itself) stores it with one more `overlay.` inside. `user.overlay.*` belongs to overlayfs only
//! under the option `userxattr`, which is not used here.

use std::borrow::Cow;

use crate::model::{FileKind, Xattr};

use super::{Error, LayerView, Look, NodeId, Overlay};

const OWN: &[u8] = b"trusted.overlay.";
const ESCAPE: &[u8] = b"overlay.";
/// Longest name of an attribute (Linux `XATTR_NAME_MAX`).
const NAME_MAX: usize = 255;

/// The name under which a stored attribute is shown, none if it is not.
pub(super) fn shown(stored: &[u8]) -> Option<Cow<'_, [u8]>> {
    match stored.strip_prefix(OWN) {
        None => Some(Cow::Borrowed(stored)),
        Some(rest) => match rest.strip_prefix(ESCAPE) {
            Some(name) if !name.is_empty() => Some(Cow::Owned([OWN, name].concat())),
            _ => None,
        },
    }
}

/// The name under which an attribute shown as `shown` is stored, none if no such name can exist.
pub(super) fn stored(shown: &[u8]) -> Option<Cow<'_, [u8]>> {
    match shown.strip_prefix(OWN) {
        None => Some(Cow::Borrowed(shown)),
        Some(name) if !name.is_empty() && shown.len() + ESCAPE.len() <= NAME_MAX => {
            Some(Cow::Owned([OWN, ESCAPE, name].concat()))
        }
        Some(_) => None,
    }
}

/// What overlayfs reads from a directory's own attributes.
#[derive(Debug, Default)]
pub(super) struct Marks {
    /// Nothing below shows.
    pub(super) opaque: bool,
    /// The value of `trusted.overlay.redirect`.
    pub(super) redirect: Option<Box<[u8]>>,
}

impl<V: LayerView> Overlay<V> {
    /// The marks of a directory.
    pub(super) fn marks(&self, dir: NodeId, look: &Look) -> Result<Marks, Error<V::Error>> {
        if !look.has_xattrs {
            return Ok(Marks::default());
        }
        let mut marks = Marks::default();
        for Xattr { name, value } in self.ask(dir.layer, |view| view.xattrs(dir.nid))? {
            match name.strip_prefix(OWN) {
                Some(b"opaque") => marks.opaque = *value == *b"y",
                Some(b"redirect") => marks.redirect = Some(value),
                _ => {}
            }
        }
        Ok(marks)
    }

    /// True if a file is a regular one with the attribute `trusted.overlay.<name>`.
    pub(super) fn is_marked(&self, node: NodeId, look: &Look, name: &[u8]) -> Result<bool, Error<V::Error>> {
        if look.attributes.kind != FileKind::Regular || !look.has_xattrs {
            return Ok(false);
        }
        Ok(self.ask(node.layer, |view| view.xattr(node.nid, &[OWN, name].concat()))?.is_some())
    }
}
