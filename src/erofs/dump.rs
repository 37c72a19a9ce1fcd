//! An image as text: its superblock, then every file with its attributes and extents. For golden tests, and for
//! people who compare images. The form is stable within a version of this program and promises nothing else.

use std::collections::HashSet;
use std::io::{self, Write};

use super::check::Budget;
use super::inode::Data;
use super::ondisk::{self, compat, incompat};
use super::{DataLayout, Error, ExtentSource, Image, Inode, Nid};
use crate::model::{ByteRange, DeviceNumber, FileKind, ReadAt};

/// Directories whose path is longer are not entered: a chain of directories would make a text of quadratic size.
const MAX_PATH: usize = 4096;

/// Why an image could not be dumped.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The image could not be read.
    #[error(transparent)]
    Image(#[from] Error),
    /// The text could not be written.
    #[error("cannot write the dump")]
    Write(#[from] io::Error),
}

/// Writes an image as text. Files come in the order of their paths, directories before what is in them. What has
/// several names is told at the first one; a directory is entered once.
///
/// # Errors
/// The first thing that is wrong ends the dump: see [`check`](super::check()) for all of them.
pub fn dump<R: ReadAt>(image: &Image<R>, out: &mut dyn Write) -> Result<(), DumpError> {
    superblock(image, out)?;
    let mut told: HashSet<Nid> = HashSet::new();
    let mut budget = Budget::of(image);
    let mut left = vec![(Vec::new(), image.root())];
    while let Some((path, nid)) = left.pop() {
        write!(out, "{} nid={nid}", shown(if path.is_empty() { b"/" } else { &path }))?;
        if !told.insert(nid) {
            writeln!(out, " as before")?;
            continue;
        }
        let inode = image.inode(nid)?;
        budget.spend(&inode, inode.xattr_size.into())?;
        if let Data::Chunks(format) = inode.data {
            budget.spend(&inode, image.chunk_table(&inode, format).map_or(u64::MAX, |(_, len)| len))?;
        }
        file(image, &inode, out)?;
        if inode.attributes().kind == FileKind::Directory && path.len() < MAX_PATH {
            budget.spend(&inode, inode.attributes().size)?;
            let children = image.entries(&inode)?;
            let children = children.iter().rev();
            left.extend(children.map(|child| ([&path, &b"/"[..], child.name.as_bytes()].concat(), child.nid)));
        }
    }
    Ok(())
}

fn superblock<R: ReadAt>(image: &Image<R>, out: &mut dyn Write) -> io::Result<()> {
    let superblock = image.superblock();
    let raw = superblock.raw();
    writeln!(out, "block-size {}", superblock.block_size())?;
    writeln!(out, "directory-block-size {}", superblock.dir_block_size())?;
    writeln!(out, "blocks {}", superblock.blocks())?;
    writeln!(out, "inodes {}", superblock.inodes())?;
    writeln!(out, "root {}", superblock.root())?;
    writeln!(out, "epoch {}.{:09}", raw.epoch.cast_signed(), raw.fixed_nsec)?;
    writeln!(out, "build-time {}", raw.build_time)?;
    writeln!(out, "metadata-block {}", raw.meta_block)?;
    writeln!(out, "xattr-block {}", raw.xattr_block)?;
    writeln!(out, "uuid {}", hex::encode(raw.uuid))?;
    writeln!(out, "name {}", shown(superblock.volume_name()))?;
    writeln!(out, "compatible {}", ondisk::feature_names(raw.feature_compat, &compat::NAMES))?;
    writeln!(out, "incompatible {}", ondisk::feature_names(raw.feature_incompat, &incompat::NAMES))?;
    for (device, number) in image.devices().iter().zip(1..) {
        writeln!(
            out,
            "device {number} blocks={} flat={} tag={}",
            device.blocks,
            device.flat_start,
            shown(&device.tag)
        )?;
    }
    for (prefix, number) in image.prefixes.iter().zip(0..) {
        writeln!(out, "xattr-prefix {number} base={} infix={}", prefix.base, shown(&prefix.infix))?;
    }
    Ok(())
}

/// The rest of the file's line, and its lines of attributes and extents.
fn file<R: ReadAt>(image: &Image<R>, inode: &Inode, out: &mut dyn Write) -> Result<(), DumpError> {
    let attributes = inode.attributes();
    let record = if inode.is_extended() { "extended" } else { "compact" };
    let layout = match inode.data_layout() {
        DataLayout::FlatPlain => "plain",
        DataLayout::FlatInline => "inline",
        DataLayout::ChunkBased => "chunks",
        DataLayout::CompressedFull | DataLayout::CompressedCompact => "compressed",
    };
    write!(
        out,
        " at={:#x} {record} {layout} {:06o} {}:{} {}.{:09} links={} size={}",
        inode.position(),
        attributes.mode(),
        attributes.uid,
        attributes.gid,
        attributes.mtime.seconds,
        attributes.mtime.nanos,
        attributes.nlink,
        attributes.size
    )?;
    if attributes.rdev != DeviceNumber::default() {
        write!(out, " rdev={}:{}", attributes.rdev.major, attributes.rdev.minor)?;
    }
    if attributes.kind == FileKind::Symlink {
        write!(out, " -> {}", shown(&image.read_link(inode)?))?;
    }
    writeln!(out)?;
    for xattr in image.xattrs(inode)? {
        writeln!(out, "  {} = {}", shown(&xattr.name), shown(&xattr.value))?;
    }
    for extent in image.extents(inode, ByteRange::to(attributes.size)) {
        let extent = extent?;
        match extent.source {
            ExtentSource::Hole => writeln!(out, "  {} hole", extent.file)?,
            ExtentSource::Data { device, offset } => writeln!(out, "  {} at {device}:{offset:#x}", extent.file)?,
        }
    }
    Ok(())
}

/// Bytes as ASCII, the rest escaped: no byte can forge another line.
fn shown(bytes: &[u8]) -> String {
    bytes.escape_ascii().to_string()
}
