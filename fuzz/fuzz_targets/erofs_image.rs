//! A foreign EROFS image, walked as a mount does. Nothing may panic, hang or take memory beyond what is there; the
//! answers agree with each other; and an image whose bytes arrive one block at a time gives the same ones. The verifier
//! and the dump do no more work than the image's size allows.
//!
//! Input: one byte of choices, two bytes that say at which block of 512 bytes a second device begins, the image.
#![no_main]

use std::collections::{BTreeSet, VecDeque};
use std::fmt::Write as _;
use std::sync::Mutex;

use headstart::erofs::{Error, ExtentSource, Image, Nid};
use headstart::model::{ByteRange, FileKind, ReadAt, ReadAtError};
use headstart::testkit::abuse::abuse_erofs_whole;
use libfuzzer_sys::fuzz_target;

/// Inodes that a walk looks at.
const INODES: usize = 64;
/// Bytes of a file that a walk reads.
const BYTES: u64 = 256 << 10;
/// Block in which absent bytes arrive.
const BLOCK: u64 = 512;

fuzz_target!(|input: &[u8]| {
    let Some(([choice, low, high], image)) = input.split_first_chunk::<3>() else { return };
    let mut image = image.to_vec();
    // Without this bit no change would get past the superblock's checksum.
    if choice & 1 == 0
        && let Some(compatible) = image.get_mut(1024 + 8)
    {
        *compatible &= !1;
    }
    let split = usize::from(u16::from_le_bytes([*low, *high])) * 512;
    let device = image.split_off(if choice & 2 == 0 { image.len() } else { split.min(image.len()) });
    let devices: &[&[u8]] = if choice & 2 == 0 { &[] } else { &[&device] };
    abuse_erofs_whole(&image, devices);
    let devices = if choice & 2 == 0 { vec![] } else { vec![device.clone()] };
    let eager = open(image.clone(), devices).map(|image| walk(&image));
    let devices = if choice & 2 == 0 { vec![] } else { vec![Arriving::new(device)] };
    let arriving = Arriving::new(image);
    let lazy = retry(|| open(&arriving, devices.iter().collect())).map(|image| walk(&image));
    assert_eq!(eager.ok(), lazy.ok());
});

fn open<R: ReadAt>(image: R, devices: Vec<R>) -> Result<Image<R>, Error> {
    if devices.is_empty() { Image::open(image) } else { Image::open_with_devices(image, devices) }
}

/// Bytes of which each block is absent the first time it is asked for.
struct Arriving {
    bytes: Vec<u8>,
    present: Mutex<BTreeSet<u64>>,
}

impl Arriving {
    fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, present: Mutex::default() }
    }
}

impl ReadAt for Arriving {
    fn size(&self) -> u64 {
        self.bytes.size()
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
        self.bytes.read_exact_at(offset, buf)?;
        let mut present = self.present.lock().unwrap();
        for block in offset / BLOCK..(offset + buf.len() as u64).div_ceil(BLOCK) {
            if present.insert(block) {
                buf.fill(0xAA);
                return Err(ReadAtError::Absent(ByteRange::at(block * BLOCK, BLOCK).unwrap()));
            }
        }
        Ok(())
    }
}

/// Runs an operation until nothing is absent. Each round brings a block, so it ends.
fn retry<T>(mut operation: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
    loop {
        match operation() {
            Err(Error::Absent { .. }) => {}
            other => return other,
        }
    }
}

/// Everything a mount asks, as text.
fn walk<R: ReadAt>(image: &Image<R>) -> String {
    let mut text = format!("{:?} {:?}\n", image.superblock(), image.devices());
    let mut queue: VecDeque<Nid> = [image.root()].into();
    let mut seen = BTreeSet::new();
    while let Some(nid) = queue.pop_front() {
        if seen.len() == INODES || !seen.insert(nid) {
            continue;
        }
        let inode = match retry(|| image.inode(nid)) {
            Ok(inode) => inode,
            Err(error) => {
                writeln!(text, "{nid:?} {error}").unwrap();
                continue;
            }
        };
        writeln!(text, "{nid:?} {:?}", inode.attributes()).unwrap();
        match retry(|| image.xattrs(&inode)) {
            Err(error) => writeln!(text, "xattrs {error}").unwrap(),
            Ok(xattrs) => {
                assert!(xattrs.is_empty() || inode.has_xattrs());
                for xattr in &xattrs {
                    // The name filter of an image may hide an attribute from searches, never change it.
                    if let Ok(Some(value)) = retry(|| image.xattr(&inode, &xattr.name)) {
                        assert_eq!(value, xattr.value);
                    }
                }
                writeln!(text, "{xattrs:?}").unwrap();
            }
        }
        match inode.attributes().kind {
            FileKind::Directory => match retry(|| image.entries(&inode)) {
                Err(error) => writeln!(text, "entries {error}").unwrap(),
                Ok(entries) => {
                    for entry in &entries {
                        let found = retry(|| image.lookup(&inode, entry.name.as_bytes()));
                        assert_eq!(found.unwrap().as_ref(), Some(entry));
                        queue.push_back(entry.nid);
                    }
                    writeln!(text, "{entries:?}").unwrap();
                }
            },
            FileKind::Symlink => writeln!(text, "{:?}", retry(|| image.read_link(&inode)).ok()).unwrap(),
            FileKind::Regular => file(image, &inode, &mut text),
            _ => {}
        }
    }
    text
}

/// The extents of a file tile it, and its bytes are what they point at.
fn file<R: ReadAt>(image: &Image<R>, inode: &headstart::erofs::Inode, text: &mut String) {
    let size = inode.attributes().size.min(BYTES);
    let extents = retry(|| image.extents(inode, ByteRange::to(size)).collect::<Result<Vec<_>, _>>());
    let mut bytes = vec![1; usize::try_from(size).unwrap()];
    let mut read = 0;
    let whole = loop {
        match retry(|| image.read(inode, read as u64, &mut bytes[read..])) {
            Ok(0) => break Ok(()),
            Ok(more) => read += more,
            Err(error) => break Err(error),
        }
    };
    writeln!(text, "{extents:?} {read} {whole:?}").unwrap();
    let (Ok(extents), Ok(())) = (extents, whole) else { return };
    assert_eq!(read as u64, size);
    let mut end = 0;
    for extent in extents {
        assert_eq!(extent.file.start(), end);
        assert!(!extent.file.is_empty());
        end = extent.file.end();
        let part = &bytes[extent.file.start() as usize..end as usize];
        match extent.source {
            ExtentSource::Hole => assert!(part.iter().all(|byte| *byte == 0)),
            ExtentSource::Data { device, offset } => {
                let mut there = vec![0; part.len()];
                image.source(device).unwrap().read_exact_at(offset, &mut there).unwrap();
                assert_eq!(part, there);
            }
        }
    }
    assert_eq!(end, size);
}
