//! Runs everything that the EROFS reader can do on bytes that may be anything: for property tests and fuzzing.
//!
//! A panic, an endless loop or work out of proportion to the bytes is a failure; an error never is.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::erofs::{self, Image, Inode, Nid};
use crate::model::{ByteRange, FileKind, ReadAt, ReadAtError};

/// Bytes that count how many of them were read, and panic when it is too many.
struct Metered<'a> {
    bytes: &'a [u8],
    left: &'a AtomicU64,
}

impl ReadAt for Metered<'_> {
    fn size(&self) -> u64 {
        self.bytes.size()
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
        let cost = buf.len() as u64 + 16;
        let before = self.left.fetch_sub(cost, Ordering::Relaxed);
        assert!(before >= cost, "reading an image of {} bytes takes work out of proportion", self.bytes.len());
        self.bytes.read_exact_at(offset, buf)
    }
}

/// Text that is only counted.
struct Sink(u64);

impl io::Write for Sink {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0 = self.0.checked_sub(buf.len() as u64).expect("a dump of an image is out of proportion");
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs everything on `bytes`; with devices if `devices` is not empty.
///
/// # Panics
/// If the reader does, or if it works out of proportion to the bytes.
pub fn abuse_erofs(bytes: &[u8], devices: &[&[u8]]) {
    abuse_erofs_whole(bytes, devices);
    let size = total(bytes, devices);
    let budget = AtomicU64::new(4 * size + (1 << 20));
    if let Some(image) = open(bytes, devices, &budget) {
        walk(&image, &budget, size);
    }
}

/// Runs only what looks at a whole image: the verifier and the dump.
///
/// # Panics
/// If they do, or if they work out of proportion to the bytes.
pub fn abuse_erofs_whole(bytes: &[u8], devices: &[&[u8]]) {
    let size = total(bytes, devices);
    // Every structure once. An inode of 64 bytes for a directory entry of 13, or a look at 256 bytes for an attribute
    // id of 4, are the worst there is.
    let budget = AtomicU64::new(100 * size + (1 << 20));
    let Some(image) = open(bytes, devices, &budget) else { return };
    let _outcome = erofs::check(&image);
    budget.store(100 * size + (1 << 20), Ordering::Relaxed);
    let _outcome = erofs::dump(&image, &mut Sink(200 * size + (1 << 20)));
}

fn total(bytes: &[u8], devices: &[&[u8]]) -> u64 {
    bytes.len() as u64 + devices.iter().map(|device| device.len() as u64).sum::<u64>()
}

fn open<'a>(bytes: &'a [u8], devices: &[&'a [u8]], left: &'a AtomicU64) -> Option<Image<Metered<'a>>> {
    let primary = Metered { bytes, left };
    if devices.is_empty() {
        return Image::open(primary).ok();
    }
    Image::open_with_devices(primary, devices.iter().map(|bytes| Metered { bytes, left }).collect()).ok()
}

/// A walk as a mount would do it, cut off after some inodes: each operation on its own must be in proportion.
fn walk(image: &Image<Metered<'_>>, budget: &AtomicU64, size: u64) {
    let mut left = vec![image.root()];
    for number in 0..300_u64 {
        let Some(nid) = left.pop() else { break };
        let refill = || budget.store(4 * size + (1 << 17), Ordering::Relaxed);
        refill();
        let Ok(inode) = image.inode(nid) else { continue };
        refill();
        let names: Vec<_> = image.xattrs(&inode).unwrap_or_default().into_iter().map(|xattr| xattr.name).collect();
        for name in names.iter().map(|name| &**name).take(5).chain([&b"user.none"[..], b"trusted.overlay.opaque"]) {
            refill();
            let _outcome = image.xattr(&inode, name);
        }
        refill();
        let _outcome = image.read_link(&inode);
        data(image, &inode, refill);
        if inode.attributes().kind == FileKind::Directory {
            refill();
            let _outcome = image.parent(&inode);
            refill();
            let entries = image.entries(&inode).unwrap_or_default();
            for entry in entries.iter().step_by(entries.len() / 7 + 1) {
                refill();
                let found = image.lookup(&inode, entry.name.as_bytes()).ok().flatten();
                assert_eq!(found.as_ref(), Some(entry), "a name is listed, but not found");
            }
            // Breadth and depth in turn.
            let at = if number % 2 == 0 { left.len() } else { 0 };
            left.splice(at..at, entries.iter().take(100).map(|entry| entry.nid));
        }
        left.push(Nid(nid.0 ^ number));
    }
}

fn data(image: &Image<Metered<'_>>, inode: &Inode, refill: impl Fn()) {
    let size = inode.attributes().size;
    let mut buf = vec![0xa5; 20_000];
    for offset in [0, 1, 4095, size / 2, size.saturating_sub(100), size, u64::MAX] {
        refill();
        if let Ok(len) = image.read(inode, offset, &mut buf) {
            assert!(len as u64 <= size.saturating_sub(offset));
        }
    }
    for start in [0, size / 3] {
        refill();
        let mut next = start;
        for extent in image.extents(inode, ByteRange::new(start, u64::MAX).unwrap_or(ByteRange::to(0))).take(50) {
            let Ok(extent) = extent else { break };
            assert!(extent.file.start() == next && extent.file.end() > next && extent.file.end() <= size);
            next = extent.file.end();
        }
    }
}
