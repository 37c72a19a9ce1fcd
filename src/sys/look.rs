//! What the system tells of a file that is there, in the words in which layers describe files.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;

use rustix::io::Errno;

use super::FileError;
use crate::model::{Attributes, DeviceNumber, FileKind, Timestamp, Xattr};

/// Longest list of names, and longest value, that the kernel gives (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
const XATTR_MAX: usize = 1 << 16;

/// A file of this machine, whatever its name: its device and its inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId {
    /// The device.
    pub device: u64,
    /// The inode.
    pub inode: u64,
}

/// What kind of file it is.
pub fn kind_of(file_type: fs::FileType) -> FileKind {
    match () {
        () if file_type.is_dir() => FileKind::Directory,
        () if file_type.is_symlink() => FileKind::Symlink,
        () if file_type.is_char_device() => FileKind::CharDevice,
        () if file_type.is_block_device() => FileKind::BlockDevice,
        () if file_type.is_fifo() => FileKind::Fifo,
        () if file_type.is_socket() => FileKind::Socket,
        () => FileKind::Regular,
    }
}

/// What `lstat` tells, and which file it is.
///
/// # Errors
/// The kernel's.
pub fn attributes(path: &Path) -> Result<(Attributes, FileId), FileError> {
    let metadata = fs::symlink_metadata(path).map_err(FileError::of("look at", path))?;
    let strange = || FileError::of("look at", path)(io::ErrorKind::InvalidData.into());
    let mode = u16::try_from(metadata.mode()).map_err(|_| strange())?;
    let rdev = metadata.rdev();
    let attributes = Attributes {
        kind: FileKind::from_mode(mode).ok_or_else(strange)?,
        permissions: mode & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: Timestamp {
            seconds: metadata.mtime(),
            nanos: u32::try_from(metadata.mtime_nsec()).map_err(|_| strange())?,
        },
        nlink: u32::try_from(metadata.nlink()).map_err(|_| strange())?,
        size: metadata.size(),
        rdev: DeviceNumber { major: rustix::fs::major(rdev), minor: rustix::fs::minor(rdev) },
    };
    Ok((attributes, FileId { device: metadata.dev(), inode: metadata.ino() }))
}

/// All extended attributes as this process may see them, sorted; of a symbolic link its own.
///
/// # Errors
/// The kernel's.
pub fn xattrs(path: &Path) -> Result<Vec<Xattr>, FileError> {
    let failed = |error: Errno| FileError::of("read the extended attributes of", path)(error.into());
    let mut names = vec![0_u8; XATTR_MAX];
    let len = match rustix::fs::llistxattr(path, &mut names) {
        Ok(len) => len,
        Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    names.truncate(len);
    let mut xattrs = Vec::new();
    let mut value = if names.is_empty() { Vec::new() } else { vec![0_u8; XATTR_MAX] };
    for name in names.split_inclusive(|byte| *byte == 0) {
        let name = CStr::from_bytes_with_nul(name).map_err(|_| failed(Errno::INVAL))?;
        let len = match rustix::fs::lgetxattr(path, name, &mut value) {
            Ok(len) => len,
            // It was taken away meanwhile.
            Err(Errno::NODATA) => continue,
            Err(error) => return Err(failed(error)),
        };
        xattrs.push(Xattr { name: name.to_bytes().into(), value: value.get(..len).unwrap_or_default().into() });
    }
    xattrs.sort();
    Ok(xattrs)
}
