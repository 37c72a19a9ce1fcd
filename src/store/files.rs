//! Small files that change as a whole, and the directories around them.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

use tempfile::{NamedTempFile, TempDir};

use super::StoreError;

/// Whether a change waits for the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Durability {
    /// A power cut may undo it, or leave a file that is damaged: for what can be told from damage and made again.
    Relaxed,
    /// It survives a power cut when the call returns.
    Synced,
}

/// Makes `path` and what is missing above it, open to the owner only: images hold other people's set-uid programs.
pub(super) fn make_dirs(path: &Path) -> Result<(), StoreError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(|error| StoreError::io("make directory", path, error))
}

/// A directory below `tmp` that goes with its owner.
pub(super) fn temp_dir(tmp: &Path) -> Result<TempDir, StoreError> {
    tempfile::Builder::new()
        .prefix("")
        .tempdir_in(tmp)
        .map_err(|error| StoreError::io("make a directory in", tmp, error))
}

/// Puts `bytes` in the place of `path`, for others all at once.
pub(super) fn replace(path: &Path, bytes: &[u8], durability: Durability) -> Result<(), StoreError> {
    let failed = |error| StoreError::io("write", path, error);
    let above = path.parent().unwrap_or(Path::new("."));
    let mut file: NamedTempFile = tempfile::Builder::new().prefix(".new-").tempfile_in(above).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    if durability == Durability::Synced {
        file.as_file().sync_all().map_err(failed)?;
    }
    file.persist(path).map_err(|error| failed(error.error))?;
    if durability == Durability::Synced {
        sync_dir(above)?;
    }
    Ok(())
}

/// Makes the names in `dir` last.
pub(super) fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|error| StoreError::io("sync", dir, error))
}

/// Makes the name of `path` last, and those of the directories above it, `levels` in all.
pub(super) fn sync_names(path: &Path, levels: usize) -> Result<(), StoreError> {
    path.ancestors().skip(1).take(levels).try_for_each(sync_dir)
}

/// Makes a file last.
pub(super) fn sync_file(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| StoreError::io("sync", path, error))
}

/// All of `path`, none if it is missing or longer than `limit`.
pub(super) fn read_bounded(path: &Path, limit: u64) -> Result<Option<Vec<u8>>, StoreError> {
    let failed = |error| StoreError::io("read", path, error);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)?;
    Ok((bytes.len() as u64 <= limit).then_some(bytes))
}

/// Makes an empty file.
pub(super) fn touch(path: &Path) -> Result<(), StoreError> {
    fs::write(path, b"").map_err(|error| StoreError::io("make", path, error))
}

/// Moves the finished directory `made` to `place`. False if something is there already, which then stays.
pub(super) fn publish(made: &Path, place: &Path) -> Result<bool, StoreError> {
    let mut tries = 0;
    let renamed = loop {
        if let Some(above) = place.parent() {
            make_dirs(above)?;
        }
        match fs::rename(made, place) {
            // Somebody removed the directory above because it was empty.
            Err(error) if error.kind() == io::ErrorKind::NotFound && tries < 8 => tries += 1,
            renamed => break renamed,
        }
    };
    match renamed {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists) => {
            Ok(false)
        }
        Err(error) => Err(StoreError::io("publish", place, error)),
    }
}
