//! `headstart ls` and `headstart cat`: files of an image that is not mounted.

use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::process::ExitCode;

use serde::Serialize;

use super::Context;
use crate::cli::args;
use crate::cli::output;
use crate::daemon::browse::{Browser, Listed};
use crate::daemon::image::{House, absolute};
use crate::model::{Attributes, FileKind, Timestamp};
use crate::oci::{Platform, Reference};

fn browser(
    context: &Context,
    runtime: &tokio::runtime::Handle,
    image: &Reference,
    platform: Option<&Platform>,
) -> anyhow::Result<Browser> {
    let house = House::open(&context.config, runtime.clone())?;
    let file_system = runtime.block_on(async {
        let documents = house.documents(&absolute(image)?, platform).await?;
        house.open_image(documents).await?.file_system().await
    })?;
    Ok(Browser::new(file_system))
}

pub(crate) fn ls(context: &Context, arguments: &args::Ls) -> anyhow::Result<ExitCode> {
    let runtime = context.runtime()?;
    let browser = browser(context, runtime.handle(), &arguments.image, arguments.platform.as_ref())?;
    let entries = browser.list(arguments.path.as_os_str().as_bytes())?;
    if context.json {
        output::json(&entries.iter().map(Row::from).collect::<Vec<_>>())?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = Vec::new();
    for entry in &entries {
        if arguments.long {
            text.extend_from_slice(details(&entry.stat.attributes).as_bytes());
            text.push(b' ');
        }
        text.extend_from_slice(&entry.name);
        if let Some(target) = entry.target.as_ref().filter(|_| arguments.long) {
            text.extend_from_slice(b" -> ");
            text.extend_from_slice(target);
        }
        text.push(b'\n');
    }
    let mut out = io::stdout().lock();
    out.write_all(&text)?;
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn cat(context: &Context, arguments: &args::Cat) -> anyhow::Result<ExitCode> {
    let runtime = context.runtime()?;
    let browser = browser(context, runtime.handle(), &arguments.image, arguments.platform.as_ref())?;
    let mut out = io::stdout().lock();
    browser.cat(arguments.path.as_os_str().as_bytes(), &mut out)?;
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}

/// One entry as JSON.
#[derive(Debug, Serialize)]
struct Row {
    name: String,
    /// The name's bytes in hexadecimal, if they are no UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    name_bytes: Option<String>,
    kind: &'static str,
    mode: String,
    uid: u32,
    gid: u32,
    nlink: u32,
    size: u64,
    mtime: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    target: Option<String>,
}

impl From<&Listed> for Row {
    fn from(entry: &Listed) -> Self {
        let Attributes { kind, permissions, uid, gid, mtime, nlink, size, .. } = entry.stat.attributes;
        let lossy = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            name: lossy(&entry.name),
            name_bytes: std::str::from_utf8(&entry.name).is_err().then(|| hex::encode(&entry.name)),
            kind: kind_name(kind),
            mode: format!("{permissions:04o}"),
            uid,
            gid,
            nlink,
            size,
            mtime: time(mtime, true),
            target: entry.target.as_deref().map(lossy),
        }
    }
}

const fn kind_name(kind: FileKind) -> &'static str {
    match kind {
        FileKind::Regular => "file",
        FileKind::Directory => "directory",
        FileKind::Symlink => "symlink",
        FileKind::CharDevice => "character device",
        FileKind::BlockDevice => "block device",
        FileKind::Fifo => "fifo",
        FileKind::Socket => "socket",
    }
}

/// Mode, links, owner, size and time, as `ls -ln` shows them.
fn details(attributes: &Attributes) -> String {
    let Attributes { kind, permissions, uid, gid, mtime, nlink, size, rdev } = *attributes;
    let size = match kind {
        FileKind::CharDevice | FileKind::BlockDevice => format!("{}, {}", rdev.major, rdev.minor),
        _ => size.to_string(),
    };
    format!("{} {nlink:>3} {uid:>5} {gid:>5} {size:>10} {}", mode(kind, permissions), time(mtime, false))
}

fn mode(kind: FileKind, permissions: u16) -> String {
    let mut text = String::from(match kind {
        FileKind::Regular => '-',
        FileKind::Directory => 'd',
        FileKind::Symlink => 'l',
        FileKind::CharDevice => 'c',
        FileKind::BlockDevice => 'b',
        FileKind::Fifo => 'p',
        FileKind::Socket => 's',
    });
    // Owner, group, others: the shift of their bits, and the bit and letters that stand in the place of `x`.
    for (shift, special, set, letters) in [(6, 0o4000, "s", "S"), (3, 0o2000, "s", "S"), (0, 0o1000, "t", "T")] {
        let bits = permissions >> shift;
        text.push(if bits & 4 == 0 { '-' } else { 'r' });
        text.push(if bits & 2 == 0 { '-' } else { 'w' });
        text.push_str(match (bits & 1 != 0, permissions & special != 0) {
            (true, true) => set,
            (false, true) => letters,
            (true, false) => "x",
            (false, false) => "-",
        });
    }
    text
}

/// A time in UTC as ISO 8601 writes it, with nanoseconds on demand.
fn time(time: Timestamp, nanoseconds: bool) -> String {
    const DAY: i64 = 86_400;
    let (days, second) = (time.seconds.div_euclid(DAY), time.seconds.rem_euclid(DAY));
    let (year, month, day) = date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let fraction = if nanoseconds { format!(".{:09}", time.nanos) } else { String::new() };
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}{fraction}Z")
}

/// The date that lies `days` after 1970-01-01, by counting in eras of 400 years from the first of March of year 0.
fn date(days: i64) -> (i64, i64, i64) {
    let days = i128::from(days) + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i128::from(month <= 2);
    let narrow = |value: i128| i64::try_from(value).unwrap_or(i64::MAX);
    (narrow(year), narrow(month), narrow(day))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_in_utc() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (-1, "1969-12-31T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
            (-62_135_596_800, "0001-01-01T00:00:00Z"),
        ] {
            assert_eq!(time(Timestamp { seconds, nanos: 0 }, false), text);
        }
        assert_eq!(time(Timestamp { seconds: 1, nanos: 20 }, true), "1970-01-01T00:00:01.000000020Z");
        time(Timestamp { seconds: i64::MIN, nanos: 0 }, false);
        time(Timestamp { seconds: i64::MAX, nanos: 0 }, false);
    }

    #[test]
    fn modes_are_told_as_ls_does() {
        for (kind, permissions, text) in [
            (FileKind::Regular, 0o644, "-rw-r--r--"),
            (FileKind::Directory, 0o1777, "drwxrwxrwt"),
            (FileKind::Regular, 0o4755, "-rwsr-xr-x"),
            (FileKind::Regular, 0o6644, "-rwSr-Sr--"),
            (FileKind::Directory, 0o1666, "drw-rw-rwT"),
            (FileKind::CharDevice, 0o000, "c---------"),
        ] {
            assert_eq!(mode(kind, permissions), text);
        }
    }
}
