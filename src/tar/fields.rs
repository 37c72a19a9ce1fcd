//! The fields of an entry that a layer may hold: types, devices, numbers and attributes within Linux's limits.

use super::error::{Problem, shorten};
use super::header::{Dialect, Header};
use super::pax::Pax;
use crate::model::{DeviceNumber, Xattr};

/// The types a layer may hold (OCI image specification, `layer.md`, *File Types*).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Regular,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
}

impl Kind {
    pub(super) fn of(header: Header<'_>, path: &[u8]) -> Result<Self, Problem> {
        Ok(match header.type_flag() {
            // V7 had no type for directories, only the slash.
            0 if path.ends_with(b"/") => Self::Directory,
            0 | b'0' | b'7' => Self::Regular,
            b'S' if header.dialect() == Dialect::Gnu => Self::Regular,
            b'1' => Self::HardLink,
            b'2' => Self::Symlink,
            b'3' => Self::CharDevice,
            b'4' => Self::BlockDevice,
            b'5' => Self::Directory,
            b'6' => Self::Fifo,
            other => return Err(Problem::UnknownType(other)),
        })
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Regular => "regular file",
            Self::HardLink => "hard link",
            Self::Symlink => "symbolic link",
            Self::CharDevice => "character device",
            Self::BlockDevice => "block device",
            Self::Directory => "directory",
            Self::Fifo => "named pipe",
        }
    }
}

pub(super) fn device(header: Header<'_>, pax: &Pax) -> Result<DeviceNumber, Problem> {
    // Linux keeps twelve bits of the major and twenty of the minor number.
    let major = pax.dev_major.map_or_else(|| header.dev_major(), |major| Ok(major.into()))?;
    let minor = pax.dev_minor.map_or_else(|| header.dev_minor(), |minor| Ok(minor.into()))?;
    let narrow = |field, value: i128, max: u32| {
        u32::try_from(value).ok().filter(|value| *value <= max).ok_or(Problem::OutOfRange {
            field,
            value,
            min: 0,
            max: max.into(),
        })
    };
    Ok(DeviceNumber { major: narrow("devmajor", major, 0xfff)?, minor: narrow("devminor", minor, 0xf_ffff)? })
}

pub(super) fn within(field: &'static str, value: i128, min: i64, max: i64) -> Result<i64, Problem> {
    let wrong = Problem::OutOfRange { field, value, min: min.into(), max: max.into() };
    i64::try_from(value).ok().filter(|value| (min..=max).contains(value)).ok_or(wrong)
}

pub(super) fn xattr(name: Vec<u8>, value: Vec<u8>) -> Result<Xattr, Problem> {
    let why = if name.is_empty() {
        Some("its name is empty")
    } else if name.len() > 255 {
        Some("its name is longer than the 255 bytes that Linux allows")
    } else if name.contains(&0) {
        Some("its name holds a NUL byte")
    } else if value.len() > 65_536 {
        Some("its value is longer than the 65,536 bytes that Linux allows")
    } else {
        None
    };
    match why {
        Some(why) => Err(Problem::BadXattr { name: shorten(&name), why }),
        None => Ok(Xattr { name: name.into(), value: value.into() }),
    }
}
