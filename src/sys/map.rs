//! Files seen through memory, shared with whoever maps the same file.
//!
//! The mapping is read-only on purpose: a store into a shared mapping of a file on a full copy-on-write disk is answered
//! with SIGBUS, a load from a page that exists never is. Whoever changes the bytes uses `pwrite`, whose failure is an
//! ordinary error; Linux shows the change to every mapping at once, since both are the same page.
//!
//! Refuses to know what the bytes mean.

#![expect(unsafe_code, reason = "memory maps are raw pointers")]

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// The first bytes of a file, read as atomics.
#[derive(Debug)]
pub struct SharedBytes {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping is only ever read, through atomics, and is unmapped when its only owner goes.
unsafe impl Send for SharedBytes {}
// SAFETY: as above; concurrent atomic loads are allowed.
unsafe impl Sync for SharedBytes {}

impl SharedBytes {
    /// Maps the first `len` bytes of `file`. Nobody may shorten the file below `len` afterwards: a load from behind
    /// the end of a file is answered with SIGBUS.
    ///
    /// # Errors
    /// An empty or too short file, or what `mmap` says.
    pub fn map(file: &File, len: usize) -> io::Result<Self> {
        if len == 0 || file.metadata()?.len() < len as u64 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is shorter than what is to be mapped"));
        }
        // SAFETY: a fresh mapping at an address of the kernel's choice aliases nothing.
        let start = unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ, MapFlags::SHARED, file, 0)? };
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(|| io::Error::other("mmap gave a null pointer"))?;
        Ok(Self { start, len })
    }

    /// How many bytes there are.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Never true: nothing is not mapped.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The byte at `index` as it is now. What was written before it, by any process, is visible after the load.
    pub fn load(&self, index: usize) -> Option<u8> {
        if index >= self.len {
            return None;
        }
        // SAFETY: the index lies inside of the mapping, which lives as long as `self`; AtomicU8 has the layout of u8
        // and no alignment, and nobody in this process makes a reference to the same memory that is not atomic.
        let byte = unsafe { &*self.start.as_ptr().add(index).cast::<AtomicU8>() };
        Some(byte.load(Ordering::Acquire))
    }
}

impl Drop for SharedBytes {
    fn drop(&mut self) {
        // SAFETY: the range is the one `mmap` gave, and no reference into it outlives `self`.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of an own mapping cannot fail");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn a_write_through_one_descriptor_shows_in_every_mapping() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(10_000).unwrap();
        let map = SharedBytes::map(file.as_file(), 10_000).unwrap();
        let other = SharedBytes::map(&File::open(file.path()).unwrap(), 10_000).unwrap();
        assert_eq!(map.load(9_999), Some(0));
        file.as_file().write_all_at(&[7], 9_999).unwrap();
        assert_eq!((map.load(9_999), other.load(9_999)), (Some(7), Some(7)));
        assert_eq!(map.load(10_000), None);
    }

    #[test]
    fn a_file_that_is_too_short_is_not_mapped() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10).unwrap();
        assert_eq!(SharedBytes::map(&file, 11).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(SharedBytes::map(&file, 0).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
