//! What `stat` tells, in the protocol's words.

use std::time::{Duration, SystemTime};

use fuser::{FileAttr, FileType, INodeNo};

use crate::model::{FileKind, Timestamp};
use crate::vfs::Stat;

/// How long the kernel may believe an answer: 136 years. Nothing in an image ever changes. (The kernel adds this to a
/// clock in signed 64 bits, so it must not be the largest number there is.)
pub(super) const FOREVER: Duration = Duration::from_secs(1 << 32);

/// The attributes of a file. EROFS has one time; it stands for all of them, as in the kernel.
pub(super) fn attr(stat: &Stat) -> FileAttr {
    let attributes = &stat.attributes;
    let time = time(attributes.mtime);
    FileAttr {
        ino: INodeNo(stat.ino),
        size: attributes.size,
        blocks: stat.blocks,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind: file_type(attributes.kind),
        perm: attributes.permissions & 0o7777,
        nlink: attributes.nlink,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: attributes.rdev.encode(),
        blksize: stat.block_size,
        flags: 0,
    }
}

/// The attributes of a name whose file cannot be told, or of no file at all (`ino` 0).
pub(super) const fn unknown(ino: u64, kind: FileKind) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino),
        size: 0,
        blocks: 0,
        atime: SystemTime::UNIX_EPOCH,
        mtime: SystemTime::UNIX_EPOCH,
        ctime: SystemTime::UNIX_EPOCH,
        crtime: SystemTime::UNIX_EPOCH,
        kind: file_type(kind),
        perm: 0,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

pub(super) const fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
    }
}

/// Every time of 64-bit seconds fits on Linux; were one not to, 1970 stands for it.
fn time(time: Timestamp) -> SystemTime {
    let seconds = Duration::from_secs(time.seconds.unsigned_abs());
    let base = if time.seconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(seconds)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(seconds)
    };
    base.and_then(|base| base.checked_add(Duration::from_nanos(time.nanos.into()))).unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_before_1970_keep_their_nanoseconds() {
        for (seconds, nanos) in [(0, 0), (1, 999_999_999), (-1, 1), (-1, 0), (i64::MIN, 5), (i64::MAX, 999_999_999)] {
            let converted = time(Timestamp { seconds, nanos });
            let back = match converted.duration_since(SystemTime::UNIX_EPOCH) {
                Ok(after) => i128::try_from(after.as_nanos()).unwrap(),
                Err(before) => -i128::try_from(before.duration().as_nanos()).unwrap(),
            };
            assert_eq!(back, i128::from(seconds) * 1_000_000_000 + i128::from(nanos), "{seconds}.{nanos}");
        }
    }
}
