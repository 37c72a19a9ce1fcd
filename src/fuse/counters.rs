//! How often the kernel has asked for what.

use std::sync::atomic::{AtomicU64, Ordering};

/// Requests so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// What a name stands for.
    pub lookups: u64,
    /// What `stat` tells.
    pub attributes: u64,
    /// Bytes of files.
    pub reads: u64,
    /// Listings of directories.
    pub listings: u64,
    /// Targets of symbolic links.
    pub links: u64,
    /// Extended attributes.
    pub xattrs: u64,
    /// Data and holes.
    pub seeks: u64,
    /// The size of a file system, which no kernel remembers.
    pub totals: u64,
}

impl Counters {
    /// All of them about files: all but [`Self::totals`].
    pub const fn about_files(&self) -> u64 {
        let Self { lookups, attributes, reads, listings, links, xattrs, seeks, totals: _ } = *self;
        lookups + attributes + reads + listings + links + xattrs + seeks
    }
}

/// What is counted together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Lookup,
    GetAttr,
    Read,
    ReadDir,
    ReadLink,
    Xattr,
    Seek,
    Totals,
}

/// The counters of a connection.
#[derive(Debug, Default)]
pub(super) struct Counting([AtomicU64; 8]);

impl Counting {
    const fn of(&self, kind: Kind) -> &AtomicU64 {
        let [lookups, attributes, reads, listings, links, xattrs, seeks, totals] = &self.0;
        match kind {
            Kind::Lookup => lookups,
            Kind::GetAttr => attributes,
            Kind::Read => reads,
            Kind::ReadDir => listings,
            Kind::ReadLink => links,
            Kind::Xattr => xattrs,
            Kind::Seek => seeks,
            Kind::Totals => totals,
        }
    }

    pub(super) fn count(&self, kind: Kind) {
        self.of(kind).fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn snapshot(&self) -> Counters {
        let value = |kind| self.of(kind).load(Ordering::Relaxed);
        Counters {
            lookups: value(Kind::Lookup),
            attributes: value(Kind::GetAttr),
            reads: value(Kind::Read),
            listings: value(Kind::ReadDir),
            links: value(Kind::ReadLink),
            xattrs: value(Kind::Xattr),
            seeks: value(Kind::Seek),
            totals: value(Kind::Totals),
        }
    }
}
