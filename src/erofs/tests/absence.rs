//! Bytes that are not here yet.

use super::*;

/// Bytes of which blocks are missing until they were asked for.
struct Lazy {
    bytes: Vec<u8>,
    present: Mutex<Vec<bool>>,
}

impl Lazy {
    const BLOCK: usize = 512;

    fn new(bytes: Vec<u8>) -> Self {
        let blocks = bytes.len().div_ceil(Self::BLOCK);
        Self { bytes, present: Mutex::new(vec![false; blocks]) }
    }

    fn fetch(&self, range: ByteRange) {
        let blocks = usize::try_from(range.start()).unwrap() / Self::BLOCK
            ..usize::try_from(range.end()).unwrap().div_ceil(Self::BLOCK);
        self.present.lock().unwrap()[blocks].fill(true);
    }
}

impl ReadAt for Lazy {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
        self.bytes.read_exact_at(offset, buf)?;
        let start = usize::try_from(offset).unwrap();
        let blocks = start / Self::BLOCK..(start + buf.len()).div_ceil(Self::BLOCK);
        match blocks.clone().find(|block| !self.present.lock().unwrap()[*block]) {
            None => Ok(()),
            Some(block) => {
                let first = (block * Self::BLOCK) as u64;
                Err(ReadAtError::Absent(ByteRange::new(first, (first + 512).min(self.size())).unwrap()))
            }
        }
    }
}

/// Runs an operation until nothing is missing. It must never need the same bytes twice.
#[track_caller]
fn persist<T>(source: &Lazy, operation: impl Fn() -> Result<T, Error>) -> T {
    loop {
        match operation() {
            Ok(value) => return value,
            Err(Error::Absent { device: 0, range }) => {
                let block = usize::try_from(range.start()).unwrap() / Lazy::BLOCK;
                assert!(!source.present.lock().unwrap()[block], "{range} was fetched before");
                source.fetch(range);
            }
            Err(other) => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_is_absent_is_named_and_the_operation_run_again() {
    let mut draft = big_directory(9, 0, 40, 15);
    draft.superblock.xattr_block = 5;
    draft.put(5 * 512, &xattr_entry(1, b"shared", &[5; 1500]));
    let mut inode = compact(FileKind::Symlink, DataLayout::FlatInline, 300, 0);
    let area = xattr_area(0, &[0], &[(1, b"inline", &[6; 100])]);
    inode.xattr_count = xattr_count(area.len());
    // Begins in one block and ends in the next one.
    let at = (8192 + 41 * 512) / 32 + 12;
    draft.compact(at, inode, &[area, vec![b't'; 300]].concat());
    let whole = draft.open();
    let link = whole.inode(nid(at)).unwrap();

    let lazy = Lazy::new(draft.bytes());
    let image = persist(&lazy, || Image::open(&lazy));
    let root = persist(&lazy, || image.root_inode());
    let found = persist(&lazy, || image.lookup(&root, b"name-000333")).unwrap();
    assert_eq!(found.name.as_bytes(), b"name-000333");
    let fetched = lazy.present.lock().unwrap().iter().filter(|present| **present).count();
    assert!(fetched <= 12, "a search by halves fetched {fetched} blocks");
    assert_eq!(persist(&lazy, || image.entries(&root)), whole.entries(&whole.root_inode().unwrap()).unwrap());
    assert_eq!(persist(&lazy, || image.inode(nid(at))), link);
    assert_eq!(persist(&lazy, || image.xattrs(&link)), whole.xattrs(&link).unwrap());
    assert_eq!(&*persist(&lazy, || image.read_link(&link)), [b't'; 300]);
}
