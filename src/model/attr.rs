//! What a file is, besides its bytes.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The type of a file, with the values Linux puts into `st_mode` and `d_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FileKind {
    /// Regular file.
    Regular,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
    /// Unix socket.
    Socket,
}

impl FileKind {
    /// The `S_IFMT` bits.
    pub const fn mode_bits(self) -> u16 {
        match self {
            Self::Fifo => 0o010_000,
            Self::CharDevice => 0o020_000,
            Self::Directory => 0o040_000,
            Self::BlockDevice => 0o060_000,
            Self::Regular => 0o100_000,
            Self::Symlink => 0o120_000,
            Self::Socket => 0o140_000,
        }
    }

    /// The kind that the `S_IFMT` bits of `mode` name, if any does.
    pub const fn from_mode(mode: u16) -> Option<Self> {
        Some(match mode & 0o170_000 {
            0o010_000 => Self::Fifo,
            0o020_000 => Self::CharDevice,
            0o040_000 => Self::Directory,
            0o060_000 => Self::BlockDevice,
            0o100_000 => Self::Regular,
            0o120_000 => Self::Symlink,
            0o140_000 => Self::Socket,
            _ => return None,
        })
    }
}

/// A point in time: seconds since 1970 (negative before) and nanoseconds after that second, below 1,000,000,000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Timestamp {
    /// Seconds since the epoch.
    pub seconds: i64,
    /// Nanoseconds to add.
    pub nanos: u32,
}

impl fmt::Display for Timestamp {
    /// As RFC 3339 has it, in UTC, to the second.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const DAY: i64 = 86_400;
        let (days, second) = (self.seconds.div_euclid(DAY), self.seconds.rem_euclid(DAY));
        // Years are counted from March, so that leap days come last; 400 of them have 146,097 days.
        let since = i128::from(days) + 719_468;
        let (era, day) = (since.div_euclid(146_097), since.rem_euclid(146_097));
        let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
        let of_year = day - (365 * year + year / 4 - year / 100);
        let month = (5 * of_year + 2) / 153;
        let day = of_year - (153 * month + 2) / 5 + 1;
        let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
        let year = year + era * 400 + next;
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
}

/// A device number. Linux holds 12 bits of major and 20 of minor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct DeviceNumber {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl DeviceNumber {
    /// Linux's 32-bit encoding `new_encode_dev`, as EROFS and FUSE store it.
    pub const fn encode(self) -> u32 {
        (self.minor & 0xff) | ((self.major & 0xfff) << 8) | ((self.minor & 0xf_ff00) << 12)
    }

    /// The inverse of [`encode`](Self::encode).
    pub const fn decode(raw: u32) -> Self {
        Self { major: (raw >> 8) & 0xfff, minor: (raw & 0xff) | ((raw >> 12) & 0xf_ff00) }
    }

    /// True if the kernel's encoding keeps both numbers.
    pub const fn is_representable(self) -> bool {
        self.major < 1 << 12 && self.minor < 1 << 20
    }
}

/// What `stat` tells of a file, without its inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Type.
    pub kind: FileKind,
    /// The twelve permission bits, set-uid, set-gid and sticky included.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last modification.
    pub mtime: Timestamp,
    /// Number of hard links (for a directory: 2 + sub-directories).
    pub nlink: u32,
    /// Bytes: content of a regular file, target of a symlink; file-system specific for a directory.
    pub size: u64,
    /// Which device, for device files; zero else.
    pub rdev: DeviceNumber,
}

impl Attributes {
    /// Type and permission bits together: `st_mode`.
    pub const fn mode(&self) -> u16 {
        self.kind.mode_bits() | (self.permissions & 0o7777)
    }

    /// True for overlayfs's mark of a removed file: a character device 0/0.
    pub fn is_whiteout(&self) -> bool {
        self.kind == FileKind::CharDevice && self.rdev == DeviceNumber::default()
    }
}

/// An extended attribute under its full name, `security.capability` for example.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Xattr {
    /// Full name with its namespace prefix, 1 to 255 bytes, no NUL.
    pub name: Box<[u8]>,
    /// Value, at most 65,536 bytes (Linux `XATTR_SIZE_MAX`).
    pub value: Box<[u8]>,
}

impl fmt::Debug for Xattr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=0x{}", String::from_utf8_lossy(&self.name), hex::encode(&self.value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive_their_encoding() {
        for (major, minor, raw) in [(0, 0, 0), (1, 3, 0x103), (8, 17, 0x811), (4095, 1_048_575, u32::MAX)] {
            let device = DeviceNumber { major, minor };
            assert_eq!(device.encode(), raw, "{device:?}");
            assert_eq!(DeviceNumber::decode(raw), device);
        }
    }

    #[test]
    fn times_are_told_in_utc() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (-1, "1969-12-31T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (-62_135_596_800, "0001-01-01T00:00:00Z"),
            (i64::MAX, "292277026596-12-04T15:30:07Z"),
        ] {
            assert_eq!(Timestamp { seconds, nanos: 0 }.to_string(), text);
        }
        assert!(Timestamp { seconds: i64::MIN, nanos: 0 }.to_string().starts_with("-292277022657-01-27T"));
    }

    #[test]
    fn kinds_survive_the_mode() {
        use FileKind::{BlockDevice, CharDevice, Directory, Fifo, Regular, Socket, Symlink};
        for kind in [Regular, Directory, Symlink, CharDevice, BlockDevice, Fifo, Socket] {
            assert_eq!(FileKind::from_mode(kind.mode_bits() | 0o7777), Some(kind));
        }
        assert_eq!(FileKind::from_mode(0o777), None);
        assert_eq!(FileKind::from_mode(0o170_000), None);
    }
}
