//! Space given back to the file system from the middle of a file.

use std::fs::File;
use std::io;

use rustix::fs::{FallocateFlags, fallocate};

/// Makes `len` bytes of `file` from `offset` on a hole: they read as zeros and take no space. The file keeps its length.
///
/// # Errors
/// What `fallocate(2)` says; [`io::ErrorKind::Unsupported`] if the file system has no such thing.
pub fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::io::retry_on_intr(|| fallocate(file, how, offset, len))?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt as _, MetadataExt as _};

    use super::*;

    #[test]
    fn a_hole_takes_no_space_and_touches_nothing_else() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 64 << 10], 0).unwrap();
        file.sync_all().unwrap();
        let before = file.metadata().unwrap();
        punch_hole(&file, 16 << 10, 32 << 10).unwrap();
        let after = file.metadata().unwrap();
        assert_eq!((after.len(), before.blocks() - after.blocks()), (64 << 10, 64));
        let mut bytes = vec![1; 64 << 10];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let expected = |at: usize| if (16 << 10..48 << 10).contains(&at) { 0 } else { 7 };
        assert!(bytes.iter().enumerate().all(|(at, byte)| *byte == expected(at)));
    }
}
