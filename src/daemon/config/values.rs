//! How times and sizes are written.

use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _};

/// A time as it is written: a number and `ms`, `s`, `m` or `h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span(pub(super) Duration);

impl FromStr for Span {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "a time is written as a number and ms, s, m or h, for example \"30s\"";
        let split = text.find(|c: char| !c.is_ascii_digit()).ok_or(FORM)?;
        let (number, unit) = text.split_at(split);
        let number: u64 = number.parse().map_err(|_| FORM)?;
        let factor = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(FORM),
        };
        number.checked_mul(factor).map(|millis| Self(Duration::from_millis(millis))).ok_or(FORM)
    }
}

/// A number of bytes as it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size(pub(super) u64);

impl FromStr for Size {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_size(text).map(Self)
    }
}

/// Bytes written as a number with or without `kB`, `MB`, `GB`, `KiB`, `MiB`, `GiB`.
///
/// # Errors
/// How it has to be written.
pub fn parse_size(text: &str) -> Result<u64, &'static str> {
    const FORM: &str =
        "a size is written as a number with or without kB, MB, GB, KiB, MiB or GiB, for example \"16MiB\"";
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let number: u64 = number.parse().map_err(|_| FORM)?;
    let factor: u64 = match unit {
        "" | "B" => 1,
        "kB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err(FORM),
    };
    number.checked_mul(factor).ok_or(FORM)
}

macro_rules! deserialize_from_text {
    ($name:ident) => {
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
            }
        }
    };
}
deserialize_from_text!(Span);
deserialize_from_text!(Size);
