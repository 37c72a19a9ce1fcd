//! The reader against images made by hand: every layout, and everything that bytes can lie about.

use std::sync::Mutex;

use super::draft::{Draft, compact, dir_block, extended, nid, xattr_area, xattr_count, xattr_entry};
use super::ondisk::{
    ChunkFormat, DataLayout, DeviceSlot, InodeFormat, RawSuperblock, XATTR_PREFIXES, compat, incompat, xattr_filter_bit,
};
use super::*;
use crate::model::{Attributes, ByteRange, DeviceNumber, FileKind, NameError, ReadAt, ReadAtError, Timestamp, Xattr};

mod absence;
mod attributes;
mod check;
mod data;
mod directories;
mod inodes;

const DIR: FileKind = FileKind::Directory;
const FILE: FileKind = FileKind::Regular;

/// The defect that an error tells of.
#[track_caller]
fn defect<T: std::fmt::Debug>(result: Result<T, Error>) -> Defect {
    match result {
        Err(Error::Corrupt { defect, .. }) => defect,
        other => panic!("{other:?} instead of a corruption"),
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| u8::try_from(i * 7 % 251).unwrap()).collect()
}

#[track_caller]
fn content(image: &Image<Vec<u8>>, number: u64) -> Vec<u8> {
    let inode = image.inode(nid(number)).unwrap();
    let mut buf = vec![0xee; usize::try_from(inode.attributes().size).unwrap() + 10];
    let len = image.read(&inode, 0, &mut buf).unwrap();
    buf.truncate(len);
    buf
}

/// A directory of `blocks` blocks, `per_block` names each, in an image of that block size.
fn big_directory(bits: u8, dir_bits: u8, blocks: usize, per_block: usize) -> Draft {
    let dir_block_size = 1_usize << (bits + dir_bits);
    let base = (1_usize << bits).max(8192);
    let first = base >> bits;
    let mut draft = Draft::new(bits, u32::try_from(first + (blocks << dir_bits)).unwrap());
    draft.superblock.dir_block_bits = dir_bits;
    let mut size = 0;
    for block in 0..blocks {
        let names: Vec<_> = (0..per_block).map(|i| format!("name-{:06}", block * per_block + i)).collect();
        let mut entries: Vec<_> = names.iter().map(|name| (name.as_bytes(), 1000, 1)).collect();
        if block == 0 {
            // The dots stand where their bytes sort.
            entries[0] = (b"!first", 1001, 1);
            entries.splice(1..1, [(&b"."[..], 64, 2), (b"..", 64, 2)]);
        }
        let bytes = dir_block(&entries);
        assert!(bytes.len() <= dir_block_size);
        draft.put(base + block * dir_block_size, &bytes);
        size = block * dir_block_size + bytes.len();
    }
    let inode = compact(DIR, DataLayout::FlatPlain, u32::try_from(size).unwrap(), u32::try_from(first).unwrap());
    draft.compact(64, inode, b"");
    draft
}
