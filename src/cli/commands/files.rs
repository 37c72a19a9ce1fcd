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
        text.extend_from_slice(&output::name(&entry.name));
        if let Some(target) = entry.target.as_ref().filter(|_| arguments.long) {
            text.extend_from_slice(b" -> ");
            text.extend_from_slice(&output::name(target));
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
            mtime: precise(mtime),
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
    format!("{} {nlink:>3} {uid:>5} {gid:>5} {size:>10} {mtime}", mode(kind, permissions))
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

/// A time with its nanoseconds.
fn precise(time: Timestamp) -> String {
    let second = time.to_string();
    format!("{}.{:09}Z", second.trim_end_matches('Z'), time.nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_to_the_nanosecond() {
        assert_eq!(precise(Timestamp { seconds: 1, nanos: 20 }), "1970-01-01T00:00:01.000000020Z");
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
