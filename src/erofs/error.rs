//! Why an image could not be read, with the place where it is wrong.

use std::fmt;

use super::Nid;
use crate::model::{ByteRange, FileKind, NameError, ReadAtError};

/// What is wrong with an image's bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Defect {
    /// A pointer leads out of the image.
    #[error("it refers to bytes {range} of {size} bytes")]
    OutOfBounds {
        /// Where it points.
        range: ByteRange,
        /// How much there is.
        size: u64,
    },
    /// An address does not fit 64 bits.
    #[error("an address or size does not fit 64 bits")]
    Overflow,
    /// The superblock's checksum does not match.
    #[error("the superblock's checksum is {found:#010x}, but its bytes give {computed:#010x}")]
    Checksum {
        /// What the superblock says.
        found: u32,
        /// What its bytes say.
        computed: u32,
    },
    /// A block size that cannot be.
    #[error("a block size of 2^{0} bytes is outside of 512 B to 64 KiB")]
    BlockSize(u32),
    /// A long attribute prefix of impossible length.
    #[error("a long attribute name prefix has {0} bytes")]
    PrefixLength(u16),
    /// Format bits that mean nothing.
    #[error("the inode's format has undefined bits {0:#x}")]
    InodeFormat(u16),
    /// A mode whose type is none.
    #[error("mode {0:#o} has no file type")]
    Mode(u16),
    /// Structures that cannot lie beside each other in the image.
    #[error("{amount} bytes do not fit beside what was read before: {left} bytes of the image are left for it")]
    Overfull {
        /// How many bytes a structure claims.
        amount: u64,
        /// How many nobody has claimed.
        left: u64,
    },
    /// Nanoseconds of a second or more.
    #[error("a time has {0} nanoseconds")]
    Nanoseconds(u32),
    /// More bytes than a file can have.
    #[error("a size of {0} bytes is impossible")]
    Size(u64),
    /// The inline tail does not fit the inode's block.
    #[error("the data beside the inode crosses a block boundary")]
    InlineCrossesBlock,
    /// Chunk format bits that mean nothing.
    #[error("the chunk format has undefined bits {0:#x}")]
    ChunkFormat(u16),
    /// A chunk names a device that the image has not.
    #[error("a chunk lies on device {device}, but the image has {devices}")]
    NoSuchDevice {
        /// Which, from 1.
        device: u16,
        /// How many there are.
        devices: u16,
    },
    /// A directory larger than the image.
    #[error("a directory of {size} bytes is larger than the image")]
    DirectorySize {
        /// What the inode says.
        size: u64,
    },
    /// Name offsets in a directory block that do not ascend inside of it.
    #[error("the name offsets of directory block {block} are wrong")]
    NameOffsets {
        /// Which block, from 0.
        block: u64,
    },
    /// A name that cannot be.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A directory without `..`.
    #[error("the directory does not name the one that holds it")]
    NoParent,
    /// Names that do not ascend.
    #[error("name {0:?} is not sorted")]
    Unsorted(String),
    /// A nid in the metabox of an image that has none.
    #[error("nid {0:#x} refers to a metabox that the image has not")]
    MetaboxNid(u64),
    /// A symlink too long or empty.
    #[error("a symbolic link of {0} bytes is impossible")]
    SymlinkSize(u64),
    /// A NUL in a symlink's target.
    #[error("the symbolic link's target holds a NUL byte")]
    SymlinkNul,
    /// Attributes that reach out of their area.
    #[error("the extended attributes reach out of their area")]
    XattrOverrun,
    /// An attribute name that cannot be.
    #[error("extended attribute name {0:?} is impossible")]
    XattrName(String),
}

/// Where a defect lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the superblock or a table it points to.
    Superblock,
    /// In an inode or what it points to.
    Inode(Nid),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Superblock => f.write_str("the superblock"),
            Self::Inode(nid) => write!(f, "inode {nid}"),
        }
    }
}

/// Why a reading operation failed. Every operation may be run again as a whole.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Bytes must be fetched first; then the operation works as if they had always been there.
    #[error("bytes {range} of device {device} are not local yet")]
    Absent {
        /// 0 for the image itself, else a device counted from 1.
        device: u16,
        /// Which bytes are missing at least.
        range: ByteRange,
    },
    /// The local copy could not be read.
    #[error("cannot read device {device} of the image at {place}")]
    Io {
        /// 0 for the image itself, else a device counted from 1.
        device: u16,
        /// What was being read.
        place: Place,
        /// Why.
        #[source]
        source: ReadAtError,
    },
    /// There is no EROFS superblock.
    #[error("not an EROFS image: its superblock's magic is {found:#010x} instead of 0xe0f5e1e2")]
    NotErofs {
        /// What lies where the magic should.
        found: u32,
    },
    /// Too short for a superblock.
    #[error("not an EROFS image: {size} bytes are too few")]
    TooShort {
        /// How many there are.
        size: u64,
    },
    /// The image needs features that this program does not have.
    #[error("the EROFS image needs features that are not supported: {names}")]
    Features {
        /// Their names, unknown ones in hexadecimal.
        names: String,
    },
    /// A file is compressed inside of the image.
    #[error("inode {nid} is compressed inside of the EROFS image, which is not supported")]
    Compressed {
        /// Which.
        nid: Nid,
    },
    /// The image was opened with another number of devices than it has.
    #[error("the EROFS image has {expected} extra devices, but {given} were given")]
    DeviceCount {
        /// How many it has.
        expected: u16,
        /// How many were given.
        given: usize,
    },
    /// Data lies on a device that was not given.
    #[error("inode {nid} has data on device {device}, which was not given")]
    DeviceMissing {
        /// Whose data.
        nid: Nid,
        /// Which device, from 1.
        device: u16,
    },
    /// The operation does not fit the file's type.
    #[error("inode {nid} is no {wanted}")]
    WrongKind {
        /// Which.
        nid: Nid,
        /// `directory` or `symbolic link`.
        wanted: &'static str,
        /// What it is.
        found: FileKind,
    },
    /// The image contradicts the format.
    #[error("the EROFS image is damaged in {place} (byte {offset})")]
    Corrupt {
        /// In which structure.
        place: Place,
        /// Where in the image, in bytes.
        offset: u64,
        /// What.
        #[source]
        defect: Defect,
    },
}

impl Error {
    pub(crate) fn corrupt(place: Place, offset: u64, defect: impl Into<Defect>) -> Self {
        Self::Corrupt { place, offset, defect: defect.into() }
    }

    /// What a failed read means: absence stays absence, bounds make a defect of whoever pointed there.
    pub(crate) fn of_read(source: ReadAtError, device: u16, place: Place, offset: u64) -> Self {
        match source {
            ReadAtError::Absent(range) => Self::Absent { device, range },
            ReadAtError::OutOfBounds { range, size } => {
                Self::corrupt(place, offset, Defect::OutOfBounds { range, size })
            }
            ReadAtError::Io { .. } => Self::Io { device, place, source },
        }
    }
}
