//! Why the store cannot do what it was asked.

use std::io;
use std::path::{Path, PathBuf};

/// Why the store cannot do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No space, no inode or no quota is left.
    #[error("cannot {attempted} {}: the disk is full", path.display())]
    Full {
        /// What was attempted.
        attempted: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file operation failed.
    #[error("cannot {attempted} {}", path.display())]
    Io {
        /// What was attempted.
        attempted: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A newer program wrote this, in a form that cannot be understood safely.
    #[error("cannot use {}: it needs {needs}, which this version does not know", path.display())]
    Unsupported {
        /// Which file.
        path: PathBuf,
        /// Which version or feature.
        needs: String,
    },
    /// Something is damaged and another process still uses it.
    #[error("cannot rebuild {}: it is damaged, and another process uses it", path.display())]
    DamagedInUse {
        /// Which directory.
        path: PathBuf,
    },
    /// Bytes outside of the layer image.
    #[error("bytes {offset}+{len} lie outside of the {size} bytes of {}", path.display())]
    OutOfBounds {
        /// Which image.
        path: PathBuf,
        /// First byte.
        offset: u64,
        /// How many.
        len: u64,
        /// Size of the image.
        size: u64,
    },
}

impl StoreError {
    /// Wraps what the system said; a full disk is told apart here and nowhere else.
    pub fn io(attempted: &'static str, path: impl AsRef<Path>, source: io::Error) -> Self {
        let path = path.as_ref().to_owned();
        if is_full(&source) { Self::Full { attempted, path, source } } else { Self::Io { attempted, path, source } }
    }

    /// True if only space is missing.
    pub const fn is_full(&self) -> bool {
        matches!(self, Self::Full { .. })
    }
}

/// True for the errors that mean that no space is left: of the disk, of a quota, or below a process's file size limit.
fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lack_of_space_is_told_apart() {
        for (raw, full) in [
            (libc::ENOSPC, true),
            (libc::EDQUOT, true),
            (libc::EFBIG, true),
            (libc::EIO, false),
            (libc::EROFS, false),
            (libc::EACCES, false),
        ] {
            let error = StoreError::io("write", "/x", io::Error::from_raw_os_error(raw));
            assert_eq!(error.is_full(), full, "{error:?}");
        }
    }
}
