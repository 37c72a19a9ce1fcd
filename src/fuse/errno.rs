//! What a program is told when something fails: the only place that knows errno.

use fuser::Errno;

use crate::erofs;
use crate::overlay;
use crate::vfs;

/// Why a request was not answered with what it asked for.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The file system says no.
    #[error(transparent)]
    Vfs(#[from] vfs::Error),
    /// Bytes could not be brought.
    #[error("cannot fetch bytes {range} of layer {layer}")]
    Bring {
        /// Index of the layer, 0 is the lowest.
        layer: u16,
        /// Which bytes.
        range: crate::model::ByteRange,
        /// Why not.
        #[source]
        source: vfs::BringError,
    },
    /// Bytes were not brought in time.
    #[error("bytes {range} of layer {layer} did not arrive within {seconds} s")]
    Deadline {
        /// Index of the layer.
        layer: u16,
        /// Which bytes.
        range: crate::model::ByteRange,
        /// How long was waited.
        seconds: u64,
    },
    /// Whoever was to bring bytes forgot about it.
    #[error("nobody answered for bytes {range} of layer {layer}")]
    Forgotten {
        /// Index of the layer.
        layer: u16,
        /// Which bytes.
        range: crate::model::ByteRange,
    },
    /// The server ends.
    #[error("the mount is being taken down before bytes {range} of layer {layer} arrived")]
    Closed {
        /// Index of the layer.
        layer: u16,
        /// Which bytes.
        range: crate::model::ByteRange,
    },
    /// Whoever asked was killed.
    #[error("whoever waited for bytes {range} of layer {layer} was killed")]
    Abandoned {
        /// Index of the layer.
        layer: u16,
        /// Which bytes.
        range: crate::model::ByteRange,
    },
    /// It was asked of a process that is gone, and nobody knows what it was.
    #[error("the process that was asked is gone")]
    Lost,
    /// Bytes were brought again and again and are still absent.
    #[error("bytes {range} of layer {layer} are absent however often they are fetched")]
    StillAbsent {
        /// Index of the layer.
        layer: u16,
        /// Which bytes.
        range: crate::model::ByteRange,
    },
    /// There is no such name, and there may be one later.
    #[error("there is no such name")]
    NoName,
    /// There is no such extended attribute.
    #[error("there is no such extended attribute")]
    NoAttribute,
    /// The answer does not fit the program's buffer.
    #[error("the buffer is too small")]
    BufferTooSmall,
    /// No data or hole behind the offset.
    #[error("there is no data or hole behind the offset")]
    NothingBehind,
    /// The request makes no sense.
    #[error("the request makes no sense")]
    Invalid,
    /// Everything here is read-only.
    #[error("the file system is read-only")]
    ReadOnly,
    /// The kernel shall not ask again, because the answer is always the same.
    #[error("not needed")]
    NotNeeded,
}

impl Failure {
    /// The errno that says it. What only an operator can understand is an I/O error to a program.
    pub fn errno(&self) -> Errno {
        match self {
            Self::Vfs(error) => of_vfs(error),
            Self::Bring { .. }
            | Self::Deadline { .. }
            | Self::Closed { .. }
            | Self::Forgotten { .. }
            | Self::StillAbsent { .. } => Errno::EIO,
            // Whoever hears this of a call that no signal interrupted asks again, as of one that a signal did.
            Self::Abandoned { .. } | Self::Lost => Errno::EINTR,
            Self::NoName => Errno::ENOENT,
            Self::NoAttribute => Errno::ENODATA,
            Self::BufferTooSmall => Errno::ERANGE,
            Self::NothingBehind => Errno::ENXIO,
            Self::Invalid => Errno::EINVAL,
            Self::ReadOnly => Errno::EROFS,
            Self::NotNeeded => Errno::ENOSYS,
        }
    }

    /// The index of the layer that it is about, if it is about one.
    pub(super) const fn layer(&self) -> Option<u16> {
        match self {
            Self::Bring { layer, .. }
            | Self::Deadline { layer, .. }
            | Self::Forgotten { layer, .. }
            | Self::Closed { layer, .. }
            | Self::Abandoned { layer, .. }
            | Self::StillAbsent { layer, .. }
            | Self::Vfs(vfs::Error::Absent { layer, .. } | vfs::Error::Layer { layer, .. }) => Some(*layer),
            _ => None,
        }
    }

    /// True if an operator wants to know: something is broken that should not be.
    pub fn is_fault(&self) -> bool {
        self.errno() == Errno::EIO
    }
}

fn of_vfs(error: &vfs::Error) -> Errno {
    match error {
        vfs::Error::Absent { .. }
        | vfs::Error::Image { .. }
        | vfs::Error::LayerCount(_)
        | vfs::Error::NumberTooLarge { .. } => Errno::EIO,
        vfs::Error::Layer { layer: _, source } => of_erofs(source),
        vfs::Error::Refused(refused) => of_overlay(refused),
        vfs::Error::NoSuchInode(_) => Errno::ESTALE,
        vfs::Error::IsADirectory(_) => Errno::EISDIR,
        vfs::Error::NotADirectory(_) => Errno::ENOTDIR,
        vfs::Error::NotRegular(_) | vfs::Error::NotALink(_) => Errno::EINVAL,
    }
}

fn of_overlay(error: &overlay::Error<erofs::Error>) -> Errno {
    match error {
        overlay::Error::Layer { layer: _, source } => of_erofs(source),
        // As overlayfs answers: see `Documentation/filesystems/overlayfs.rst`, "Metadata only copy up".
        overlay::Error::Metacopy { .. } => Errno::EPERM,
        overlay::Error::Redirect { .. } => Errno::EINVAL,
        // What the kernel says to whoever looks such a name up in a directory of a layer (`lookup_one_len`).
        overlay::Error::Dots { .. } => Errno::EACCES,
        overlay::Error::Detached { .. } | overlay::Error::NoLayer(_) => Errno::ESTALE,
        overlay::Error::TooLarge { .. } | overlay::Error::LayerCount(_) => Errno::EIO,
    }
}

fn of_erofs(error: &erofs::Error) -> Errno {
    match error {
        erofs::Error::WrongKind { wanted: "directory", .. } => Errno::ENOTDIR,
        erofs::Error::WrongKind { .. } => Errno::EINVAL,
        erofs::Error::Compressed { .. } | erofs::Error::Features { .. } => Errno::EOPNOTSUPP,
        erofs::Error::Absent { .. }
        | erofs::Error::Io { .. }
        | erofs::Error::TooShort { .. }
        | erofs::Error::NotErofs { .. }
        | erofs::Error::DeviceCount { .. }
        | erofs::Error::DeviceMissing { .. }
        | erofs::Error::Corrupt { .. } => Errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::erofs::{Defect, Nid, Place};
    use crate::model::{ByteRange, FileKind};

    #[test]
    fn every_failure_has_its_errno() {
        let range = ByteRange::to(1);
        let of_erofs = |source| Failure::Vfs(vfs::Error::Layer { layer: 0, source });
        let of_overlay = |error| Failure::Vfs(vfs::Error::Refused(Box::new(error)));
        let wrong = |wanted| erofs::Error::WrongKind { nid: Nid(1), wanted, found: FileKind::Fifo };
        let gone: vfs::BringError = std::sync::Arc::new(std::io::Error::other("gone"));
        let diff_id = crate::model::DiffId(crate::model::Digest::of(crate::model::Algorithm::Sha256, b""));
        let out_of_bounds = crate::model::ReadAtError::OutOfBounds { range, size: 0 };
        let table = [
            (Failure::Vfs(vfs::Error::Absent { layer: 0, device: 0, range }), Errno::EIO),
            (Failure::Vfs(vfs::Error::LayerCount(0)), Errno::EIO),
            (Failure::Vfs(vfs::Error::NumberTooLarge { layer: 0, nid: 1 }), Errno::EIO),
            (Failure::Vfs(vfs::Error::NoSuchInode(0)), Errno::ESTALE),
            (Failure::Vfs(vfs::Error::IsADirectory(1)), Errno::EISDIR),
            (Failure::Vfs(vfs::Error::NotRegular(1)), Errno::EINVAL),
            (Failure::Vfs(vfs::Error::NotALink(1)), Errno::EINVAL),
            (Failure::Vfs(vfs::Error::NotADirectory(1)), Errno::ENOTDIR),
            (Failure::Vfs(vfs::Error::Image { diff_id, source: out_of_bounds }), Errno::EIO),
            (of_erofs(wrong("directory")), Errno::ENOTDIR),
            (of_erofs(wrong("symbolic link")), Errno::EINVAL),
            (of_erofs(erofs::Error::Compressed { nid: Nid(1) }), Errno::EOPNOTSUPP),
            (of_erofs(erofs::Error::TooShort { size: 1 }), Errno::EIO),
            (
                of_erofs(erofs::Error::Corrupt { place: Place::Inode(Nid(1)), offset: 0, defect: Defect::Overflow }),
                Errno::EIO,
            ),
            (of_overlay(overlay::Error::Metacopy { layer: 0, nid: 1 }), Errno::EPERM),
            (of_overlay(overlay::Error::Redirect { layer: 0, nid: 1, redirect: "/".into() }), Errno::EINVAL),
            (of_overlay(overlay::Error::Dots { layer: 0, nid: 1, redirect: "..".into() }), Errno::EACCES),
            (of_overlay(overlay::Error::Detached { layer: 0, nid: 1 }), Errno::ESTALE),
            (of_overlay(overlay::Error::TooLarge { layer: 0, nid: 1, limit: 1 }), Errno::EIO),
            (of_overlay(overlay::Error::Layer { layer: 0, source: wrong("directory") }), Errno::ENOTDIR),
            (Failure::Bring { layer: 0, range, source: gone }, Errno::EIO),
            (Failure::Deadline { layer: 0, range, seconds: 1 }, Errno::EIO),
            (Failure::Forgotten { layer: 0, range }, Errno::EIO),
            (Failure::Closed { layer: 0, range }, Errno::EIO),
            (Failure::Abandoned { layer: 0, range }, Errno::EINTR),
            (Failure::Lost, Errno::EINTR),
            (Failure::StillAbsent { layer: 0, range }, Errno::EIO),
            (Failure::NoName, Errno::ENOENT),
            (Failure::NoAttribute, Errno::ENODATA),
            (Failure::BufferTooSmall, Errno::ERANGE),
            (Failure::NothingBehind, Errno::ENXIO),
            (Failure::Invalid, Errno::EINVAL),
            (Failure::ReadOnly, Errno::EROFS),
            (Failure::NotNeeded, Errno::ENOSYS),
        ];
        for (failure, errno) in table {
            assert_eq!(failure.errno(), errno, "{failure}");
        }
    }
}
