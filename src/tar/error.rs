//! What can be wrong with a tar, and where.

use std::fmt;
use std::io;

use crate::model::NameError;

/// A tar that cannot be read, with the place where reading stopped.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {}: {problem}", Place { offset: *offset, path: path.as_deref() })]
pub struct TarError {
    /// Byte of the decompressed tar where the header (or, for a cut tar, the end) lies.
    pub offset: u64,
    /// The entry's path as far as it was known, shortened if it is very long.
    pub path: Option<String>,
    /// What is wrong.
    #[source]
    pub problem: Problem,
}

struct Place<'a> {
    offset: u64,
    path: Option<&'a str>,
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path {
            Some(path) => write!(f, "tar entry {path:?} at byte {}", self.offset),
            None => write!(f, "the tar at byte {}", self.offset),
        }
    }
}

/// A part of a tar that can be cut short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// A 512-byte header.
    Header,
    /// Records or a long name that precede an entry.
    Extension,
    /// The map of a sparse file.
    SparseMap,
    /// A file's content.
    Content,
    /// An extended header was read, but not the entry it speaks of.
    Entry,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "a header",
            Self::Extension => "an extended header",
            Self::SparseMap => "the map of a sparse file",
            Self::Content => "a file's content",
            Self::Entry => "an entry: its extended header is the last thing there is",
        })
    }
}

/// What is wrong with a tar.
#[derive(Debug, thiserror::Error)]
pub enum Problem {
    /// The bytes themselves did not come.
    #[error("the next bytes did not come")]
    Io(#[source] io::Error),
    /// The tar stops too early.
    #[error("it ends there, in the middle of {0}")]
    Cut(Part),
    /// A header whose checksum does not fit: damage, or no tar at all.
    #[error("the header's checksum is {stored} but its bytes sum to {computed}: the tar is damaged or not a tar")]
    Checksum {
        /// As written in the header.
        stored: u64,
        /// Sum of its bytes as unsigned numbers.
        computed: u64,
    },
    /// A field that should hold a number.
    #[error("its field {field} holds {found:?}, which is no number")]
    NotANumber {
        /// The field's or record's name.
        field: &'static str,
        /// What it holds, shortened.
        found: String,
    },
    /// A number that Linux cannot hold.
    #[error("its {field} is {value}, outside of what can be kept ({min} to {max})")]
    OutOfRange {
        /// The field's or record's name.
        field: &'static str,
        /// The number.
        value: i128,
        /// Least that is possible.
        min: i128,
        /// Most that is possible.
        max: i128,
    },
    /// A PAX record that is not `length key=value` and a line feed.
    #[error("its extended header holds a malformed record at byte {0} of the header's content")]
    BadRecord(usize),
    /// More than [`MAX_RECORDS`](super::MAX_RECORDS) in one extended header.
    #[error("its extended header has {size} bytes, more than the {limit} that are read")]
    RecordsTooLong {
        /// Bytes of the extended header.
        size: u64,
        /// The limit.
        limit: u64,
    },
    /// A name that no file can have.
    #[error("its path is impossible")]
    BadPath(#[source] NameError),
    /// A path with `..` that leaves the layer.
    #[error("its path climbs out of the layer with '..'")]
    Climbs,
    /// A path of a hard link's target that no file can have.
    #[error("the target {target:?} of its hard link is impossible")]
    BadTarget {
        /// The target as given, shortened.
        target: String,
        /// Why.
        #[source]
        source: NameError,
    },
    /// A hard link whose target has a `..` that leaves the layer.
    #[error("the target {0:?} of its hard link climbs out of the layer with '..'")]
    TargetClimbs(String),
    /// A path or target above [`MAX_PATH`](super::MAX_PATH).
    #[error("its {what} has {len} bytes, more than the {limit} that Linux allows")]
    TooLong {
        /// `path` or `link target`.
        what: &'static str,
        /// Bytes it has.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// A NUL where none can be.
    #[error("its {0} holds a NUL byte")]
    Nul(&'static str),
    /// A symbolic link to nothing.
    #[error("it is a symbolic link without a target")]
    NoTarget,
    /// The layer's root given as something else than a directory.
    #[error("it makes the layer's root a {0}, which only a directory can be")]
    RootIsNoDirectory(&'static str),
    /// `.wh.` where only the last part of a path can be a mark, or a mark that names nothing.
    #[error("its name is reserved: a part that begins with '.wh.' marks a removal and can hold nothing")]
    ReservedName,
    /// A type that the OCI image specification does not list.
    #[error("its type {} is none that an image layer can hold", .0.escape_ascii())]
    UnknownType(u8),
    /// An extended attribute no file can have.
    #[error("its extended attribute {name:?} is impossible: {why}")]
    BadXattr {
        /// Name, shortened.
        name: String,
        /// Why not.
        why: &'static str,
    },
    /// A text ACL that is none.
    #[error("its ACL {0:?} is malformed")]
    BadAcl(String),
    /// A sparse map that contradicts itself or the file.
    #[error("its sparse map is wrong: {0}")]
    BadSparseMap(&'static str),
    /// More than [`MAX_SPARSE_RUNS`](super::MAX_SPARSE_RUNS).
    #[error("its sparse map has more than {0} pieces")]
    TooManyRuns(usize),
    /// A version of PAX sparse files that is not known.
    #[error("it is a sparse file of the unknown version {major}.{minor}")]
    SparseVersion {
        /// `GNU.sparse.major`.
        major: String,
        /// `GNU.sparse.minor`.
        minor: String,
    },
    /// One block of zeros and then more entries.
    #[error("a single block of zeros stands before it; the end of a tar has two")]
    LoneZeroBlock,
}

impl Problem {
    pub(super) fn not_a_number(field: &'static str, found: &[u8]) -> Self {
        Self::NotANumber { field, found: shorten(found) }
    }
}

/// Bytes of a tar as text fit for a message.
pub(super) fn shorten(bytes: &[u8]) -> String {
    const MOST: usize = 200;
    match bytes.get(..MOST) {
        Some(start) => format!("{}…", String::from_utf8_lossy(start)),
        None => String::from_utf8_lossy(bytes).into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_say_where_and_why() {
        let error = TarError { offset: 1024, path: Some("a/b".to_owned()), problem: Problem::UnknownType(b'V') };
        assert_eq!(
            error.to_string(),
            "cannot read tar entry \"a/b\" at byte 1024: its type V is none that an image layer can hold"
        );
        let error = TarError { offset: 7, path: None, problem: Problem::Cut(Part::Header) };
        assert_eq!(error.to_string(), "cannot read the tar at byte 7: it ends there, in the middle of a header");
    }
}
