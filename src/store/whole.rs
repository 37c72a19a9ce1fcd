//! Images that come from start to end, for layers that cannot be read in pieces.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::StoreError;
use super::bits::Bits;
use super::blob;
use super::files::{self, Durability};
use super::meta::{Anchor, BlobSpec, Meta, Verdict};
use crate::model::{BlobDigest, DiffId};
use crate::sys::{FileLock, LockMode};

/// Runs of zeros are left out in steps of this: the block size of nearly every file system.
const BLOCK: usize = 4096;

/// An image in the making. Nobody sees it before [`Store::keep_whole`](super::Store::keep_whole); dropped before, it leaves nothing.
#[derive(Debug)]
pub struct WholeWriter {
    made: TempDir,
    place: PathBuf,
    blob: BlobDigest,
    anchor: Anchor,
    image: File,
    size: u64,
    _used: FileLock,
}

impl WholeWriter {
    pub(super) fn begin(tmp: &Path, place: PathBuf, blob: BlobDigest, anchor: Anchor) -> Result<Self, StoreError> {
        let made = files::temp_dir(tmp)?;
        let lock = made.path().join(blob::LOCK);
        files::touch(&lock)?;
        files::touch(&made.path().join(blob::GUARD))?;
        let used = FileLock::acquire(&lock, LockMode::Shared).map_err(|error| StoreError::io("lock", &lock, error))?;
        let path = made.path().join(blob::IMAGE);
        let image = File::create_new(&path).map_err(|error| StoreError::io("make", &path, error))?;
        Ok(Self { made, place, blob, anchor, image, size: 0, _used: used })
    }

    /// Puts `block` over the first bytes, which were written before.
    ///
    /// # Errors
    /// What the disk says.
    pub fn write_first(&self, block: &[u8]) -> io::Result<()> {
        self.image.write_all_at(block, 0)
    }

    /// Makes the image, which is complete, has been verified and is `diff_id`, last. `tar` is what it was made from.
    /// Waits for the disk.
    pub(super) fn finish(&self, diff_id: DiffId, tar: Option<DiffId>) -> Result<(), StoreError> {
        let dir = self.made.path();
        self.image
            .set_len(self.size)
            .and_then(|()| self.image.sync_all())
            .map_err(|error| StoreError::io("sync", dir.join(blob::IMAGE), error))?;
        let spec = BlobSpec { blob: self.blob, anchor: self.anchor, image_size: self.size, chunks: 1 };
        let meta = Meta::new(&spec, Verdict::Verified(diff_id)).of_tar(tar).to_bytes();
        files::replace(&dir.join(blob::INDEX), b"", Durability::Synced)?;
        files::replace(&dir.join(blob::PRESENT), &Bits::all(1).to_present(), Durability::Synced)?;
        files::replace(&dir.join(blob::META), &meta, Durability::Synced)
    }

    /// Shows it to everybody. False if there is something at its place.
    pub(super) fn publish(&self) -> Result<bool, StoreError> {
        files::publish(self.made.path(), &self.place)
    }

    pub(super) const fn size(&self) -> u64 {
        self.size
    }

    pub(super) const fn blob(&self) -> &BlobDigest {
        &self.blob
    }

    pub(super) const fn anchor(&self) -> Anchor {
        self.anchor
    }

    pub(super) fn place(&self) -> &Path {
        &self.place
    }
}

impl Write for WholeWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut rest = data;
        while !rest.is_empty() {
            let to_boundary = BLOCK - usize::try_from(self.size % BLOCK as u64).unwrap_or(0);
            let (block, behind) = rest.split_at(to_boundary.min(rest.len()));
            if block.iter().any(|byte| *byte != 0) {
                // Everything up to the next block of zeros in one call.
                let zeros = behind.chunks_exact(BLOCK).position(|block| block.iter().all(|byte| *byte == 0));
                let run = zeros.map_or(rest.len(), |blocks| block.len() + blocks * BLOCK);
                let (run, after) = rest.split_at(run);
                self.image.write_all_at(run, self.size)?;
                self.size += run.len() as u64;
                rest = after;
            } else {
                self.size += block.len() as u64;
                rest = behind;
            }
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
