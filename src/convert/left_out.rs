//! What of a layer is not in the converted one, so that whoever converts can be told.
//!
//! Nothing here is an accident: each kind has its rule in the room that leaves it out, and none of it would show in a
//! container that an engine unpacked.

use std::fmt;

use crate::erofs::writer;
use crate::model::{RelPath, Tally};
use crate::tar;

/// A kind of thing that is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum What {
    /// ACLs that name users or groups without their numbers, which a layer alone does not tell.
    NamedAcls,
    /// AUFS's own files.
    AufsFiles,
    /// Extended attributes of other systems.
    ForeignXattrs,
    /// Extended attributes that would make overlayfs fetch or redirect files.
    OverlayXattrs,
    /// Whiteouts and opaque marks of the lowest layer, which have nothing to hide.
    BottomWhiteouts,
    /// Addresses of the old blob outside of the registry.
    Addresses,
}

impl What {
    /// All kinds, in the order in which they are told.
    pub const ALL: [Self; 6] = [
        Self::NamedAcls,
        Self::AufsFiles,
        Self::ForeignXattrs,
        Self::OverlayXattrs,
        Self::BottomWhiteouts,
        Self::Addresses,
    ];

    /// Its name, for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NamedAcls => "named-acls",
            Self::AufsFiles => "aufs-files",
            Self::ForeignXattrs => "foreign-xattrs",
            Self::OverlayXattrs => "overlay-xattrs",
            Self::BottomWhiteouts => "bottom-whiteouts",
            Self::Addresses => "addresses",
        }
    }

    /// What it is, for people.
    const fn words(self) -> &'static str {
        match self {
            Self::NamedAcls => "ACLs that name users or groups without their numbers",
            Self::AufsFiles => "files of AUFS's own",
            Self::ForeignXattrs => "extended attributes that Linux does not show",
            Self::OverlayXattrs => "extended attributes that only overlayfs may set",
            Self::BottomWhiteouts => "whiteouts in the lowest layer, with nothing below to hide",
            Self::Addresses => "addresses that lead to the original blob",
        }
    }
}

/// Something that was left out of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// What.
    pub what: What,
    /// How often.
    pub count: u64,
    /// The first file concerned, where that is known.
    pub first: Option<RelPath>,
}

impl LeftOut {
    /// What the tar reader and the tree of a layer have left out.
    pub(super) fn of_layer(tar: &tar::Dropped, tree: &writer::Dropped) -> Vec<Self> {
        let told = |what, Tally { count, first }: &Tally| Self { what, count: *count, first: first.clone() };
        let all = [
            told(What::NamedAcls, &tar.unresolved_acls),
            Self { what: What::AufsFiles, count: tar.aufs_entries, first: None },
            told(What::ForeignXattrs, &tree.foreign_xattrs),
            told(What::OverlayXattrs, &tree.overlay_xattrs),
            told(What::BottomWhiteouts, &tree.bottom_whiteouts),
        ];
        all.into_iter().filter(|left_out| left_out.count > 0).collect()
    }
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.count, self.what.words())?;
        match &self.first {
            Some(first) if self.count > 1 => write!(f, " (first at {first})"),
            Some(only) => write!(f, " (at {only})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn what_did_not_happen_is_not_told() {
        let mut tar = tar::Dropped::default();
        let mut tree = writer::Dropped::default();
        assert_eq!(LeftOut::of_layer(&tar, &tree), []);
        tar.unresolved_acls.add(&RelPath::parse(b"etc/a").unwrap());
        tree.foreign_xattrs.add(&RelPath::parse(b"b").unwrap());
        tree.foreign_xattrs.add(&RelPath::parse(b"c").unwrap());
        let told: Vec<String> = LeftOut::of_layer(&tar, &tree).iter().map(LeftOut::to_string).collect();
        let expected = [
            "1 ACLs that name users or groups without their numbers (at /etc/a)",
            "2 extended attributes that Linux does not show (first at /b)",
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn every_kind_has_its_own_name() {
        let names: HashSet<&str> = What::ALL.map(What::name).into();
        assert_eq!(names.len(), What::ALL.len());
        let manual = include_str!("../../docs/conversion.md");
        for name in names {
            assert!(manual.contains(&format!("| `{name}` |")), "docs/conversion.md does not speak of {name}");
        }
    }
}
