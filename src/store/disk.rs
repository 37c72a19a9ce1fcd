//! The one file whose bytes matter: the image. A seam, so that a test can lose what was never synced.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::sys::punch_hole;

/// A file that can be read, written and made to last.
pub(super) trait Disk: Send + Sync + std::fmt::Debug {
    /// Reads all of `buf` from `offset`.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `data` at `offset`.
    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()>;
    /// Returns when everything written before, by anybody, survives a power cut.
    fn sync_data(&self) -> io::Result<()>;
    /// Gives back the space of `len` bytes from `offset` on. They read as zeros, now or after a power cut.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
}

impl Disk for File {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buf, offset)
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(self, data, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        Self::sync_data(self)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        punch_hole(self, offset, len)
    }
}
