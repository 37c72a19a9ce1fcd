//! Facts, from where they are. Decides nothing.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::process::Command;

use super::version::ContainerdVersion;

/// Most bytes of a configuration file; real ones have some kilobytes.
const FILE_LIMIT: u64 = 1 << 20;

/// The version of the containerd that is in the search path, or why it cannot be told.
///
/// # Errors
/// What was attempted and why it failed, as a sentence.
pub fn ask_version() -> Result<ContainerdVersion, String> {
    let output = Command::new("containerd").arg("--version").output();
    let output = output.map_err(|error| format!("cannot run `containerd --version`: {error}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    ContainerdVersion::of_output(&said)
        .ok_or_else(|| format!("cannot understand what `containerd --version` says: {:?}", said.trim()))
}

/// The `version` that containerd's main configuration file says; none if there is no such file, or if it cannot be read.
pub fn main_file_version(file: &Path) -> Option<i64> {
    let table: toml::Table = toml::from_str(&read(file).ok()?).ok()?;
    table.get("version")?.as_integer()
}

/// The text of a file, which is not too long.
pub(super) fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = File::open(path)?.take(FILE_LIMIT + 1).read_to_string(&mut text)?;
    match u64::try_from(read).is_ok_and(|read| read <= FILE_LIMIT) {
        true => Ok(text),
        false => Err(io::Error::new(io::ErrorKind::InvalidData, "the file is longer than 1 MiB")),
    }
}
