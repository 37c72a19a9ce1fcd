//! Names and paths of files, as bytes. A [`Name`] that exists is safe to join to a directory.

use std::borrow::Borrow;
use std::fmt;

/// Why bytes are no file name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// No bytes at all.
    #[error("a file name is empty")]
    Empty,
    /// `.` or `..`.
    #[error("{0:?} cannot be a file name")]
    Dots(String),
    /// More than 255 bytes.
    #[error("a file name of {0} bytes is longer than the 255 that Linux allows")]
    TooLong(usize),
    /// A `/` or a NUL inside.
    #[error("file name {0:?} contains a slash or a NUL byte")]
    Separator(String),
    /// A path has a `..` in it.
    #[error("path {0:?} climbs with '..'")]
    Climbs(String),
}

/// One component of a path: 1 to 255 bytes, neither `.` nor `..`, without `/` and NUL. Any other bytes are legal.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name(Box<[u8]>);

impl Name {
    /// Longest name in bytes (Linux `NAME_MAX`).
    pub const MAX_LEN: usize = 255;

    /// Checks `bytes` without keeping them.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn check(bytes: &[u8]) -> Result<(), NameError> {
        match bytes {
            [] => Err(NameError::Empty),
            b"." | b".." => Err(NameError::Dots(lossy(bytes))),
            _ if bytes.len() > Self::MAX_LEN => Err(NameError::TooLong(bytes.len())),
            _ if bytes.iter().any(|b| matches!(b, b'/' | 0)) => Err(NameError::Separator(lossy(bytes))),
            _ => Ok(()),
        }
    }

    /// A checked name.
    ///
    /// # Errors
    /// As [`Name::check`].
    pub fn new(bytes: impl Into<Box<[u8]>>) -> Result<Self, NameError> {
        let bytes = bytes.into();
        Self::check(&bytes)?;
        Ok(Self(bytes))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl Borrow<[u8]> for Name {
    fn borrow(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", lossy(&self.0))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&lossy(&self.0))
    }
}

/// A path below a root: zero or more [`Name`]s. The empty path is the root itself. It can only go down.
#[derive(Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelPath(Vec<Name>);

impl RelPath {
    /// The root.
    pub fn root() -> Self {
        Self::default()
    }

    /// Reads a path as tar and people write it: leading `/` and `./`, empty and `.` components are dropped.
    ///
    /// # Errors
    /// [`NameError::Climbs`] for any `..` component (even one that would stay inside), else what [`Name::new`] says.
    pub fn parse(path: &[u8]) -> Result<Self, NameError> {
        let mut names = Vec::new();
        for part in path.split(|b| *b == b'/') {
            match part {
                b"" | b"." => {}
                b".." => return Err(NameError::Climbs(lossy(path))),
                _ => names.push(Name::new(part)?),
            }
        }
        Ok(Self(names))
    }

    /// The components, outermost first.
    pub fn components(&self) -> &[Name] {
        &self.0
    }

    /// True for the root.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The last component, none for the root.
    pub fn file_name(&self) -> Option<&Name> {
        self.0.last()
    }

    /// The path of the directory that holds this one, none for the root.
    pub fn parent(&self) -> Option<Self> {
        let (_, above) = self.0.split_last()?;
        Some(Self(above.to_vec()))
    }

    /// This path with one more component.
    #[must_use]
    pub fn join(&self, name: Name) -> Self {
        let mut names = self.0.clone();
        names.push(name);
        Self(names)
    }

    /// The bytes with `/` between components, without a leading one. Empty for the root.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.iter().map(Name::as_bytes).collect::<Vec<_>>().join(&b'/')
    }
}

impl fmt::Debug for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", format!("{self}"))
    }
}

impl fmt::Display for RelPath {
    /// Absolute, as a person inside the container sees it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}", lossy(&self.to_bytes()))
    }
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cut_into_safe_names() {
        for (path, shown) in [
            (&b""[..], "/"),
            (b"/", "/"),
            (b"./", "/"),
            (b"./a//b/./c/", "/a/b/c"),
            (b"/etc/passwd", "/etc/passwd"),
            (b"...", "/..."),
            (b"a b\n", "/a b\n"),
        ] {
            assert_eq!(RelPath::parse(path).unwrap().to_string(), shown);
        }
    }

    #[test]
    fn paths_that_climb_or_hold_impossible_names_are_refused() {
        for path in [&b".."[..], b"a/..", b"../a", b"a/../b", b"a\0b", &[b'x'; 256]] {
            assert!(RelPath::parse(path).is_err(), "{path:?} was taken");
        }
        assert!(RelPath::parse(&[b'x'; 255]).is_ok());
    }
}
