//! One lower layer as it can be looked into: an EROFS image, wherever its bytes are, or a directory.

use std::fs::File;
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::mpsc::sync_channel;

use super::readback::BlobImage;
use super::unpacked::Unpacked;
use crate::erofs::{self, Image, Inode, Nid};
use crate::fetch::{Cause, LayerImage};
use crate::model::{ReadAt, ReadAtError, Xattr};
use crate::overlay::{EachEntry, LayerView, Look};
use crate::sys::FileError;
use crate::vfs::Layer;

/// Bytes of an image, wherever they are.
pub(super) enum Bytes {
    Blob(BlobImage),
    File(File),
    Lazy(Arc<LayerImage>),
}

impl ReadAt for Bytes {
    fn size(&self) -> u64 {
        match self {
            Self::Blob(blob) => blob.size(),
            Self::File(file) => file.size(),
            Self::Lazy(layer) => layer.size(),
        }
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
        match self {
            Self::Blob(blob) => blob.read_exact_at(offset, buf),
            Self::File(file) => file.read_exact_at(offset, buf),
            Self::Lazy(layer) => read_lazily(layer, offset, buf),
        }
    }
}

/// Reads bytes that may have to come first, and again if they went before they were read.
fn read_lazily(layer: &Arc<LayerImage>, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
    loop {
        let range = match layer.read_exact_at(offset, buf) {
            Err(ReadAtError::Absent(range)) => range,
            other => return other,
        };
        let (told, tell) = sync_channel(1);
        layer.request(range, Cause::Metadata, move |result| {
            // Whoever waits stays until it is told.
            told.send(result).ok();
        });
        match tell.recv() {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(ReadAtError::Io { range, source: io::Error::other(error) }),
            Err(gone) => return Err(ReadAtError::Io { range, source: io::Error::other(gone) }),
        }
    }
}

/// Why one layer could not be looked into.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ViewError {
    /// An image.
    #[error("cannot read an EROFS image")]
    Image(#[source] erofs::Error),
    /// A directory.
    #[error("cannot read what was unpacked")]
    Files(#[source] FileError),
}

/// One lower layer, in either form.
pub(super) enum View {
    Image(Box<Layer<Bytes>>),
    Files(Unpacked),
}

impl View {
    /// Where a symbolic link leads.
    pub(super) fn read_link(&self, nid: u64) -> Result<Vec<u8>, ViewError> {
        match self {
            Self::Image(layer) => {
                let inode = layer.image().inode(Nid(nid)).map_err(ViewError::Image)?;
                layer.image().read_link(&inode).map(Into::into).map_err(ViewError::Image)
            }
            Self::Files(files) => files.read_link(nid).map_err(ViewError::Files),
        }
    }

    /// The bytes of a regular file.
    pub(super) fn content(&self, nid: u64) -> Result<Box<dyn Read + '_>, ViewError> {
        Ok(match self {
            Self::Image(layer) => {
                let image = layer.image();
                let inode = image.inode(Nid(nid)).map_err(ViewError::Image)?;
                Box::new(Content { image, inode, position: 0 })
            }
            Self::Files(files) => Box::new(files.read(nid).map_err(ViewError::Files)?),
        })
    }
}

impl LayerView for View {
    type Error = ViewError;

    fn root(&self) -> u64 {
        match self {
            Self::Image(layer) => layer.root(),
            Self::Files(files) => files.root(),
        }
    }

    fn look(&self, nid: u64) -> Result<Look, ViewError> {
        match self {
            Self::Image(layer) => layer.look(nid).map_err(ViewError::Image),
            Self::Files(files) => files.look(nid).map_err(ViewError::Files),
        }
    }

    fn lookup(&self, dir: u64, name: &[u8]) -> Result<Option<u64>, ViewError> {
        match self {
            Self::Image(layer) => layer.lookup(dir, name).map_err(ViewError::Image),
            Self::Files(files) => files.lookup(dir, name).map_err(ViewError::Files),
        }
    }

    fn for_each(&self, dir: u64, each: &mut EachEntry<'_>) -> Result<(), ViewError> {
        match self {
            Self::Image(layer) => layer.for_each(dir, each).map_err(ViewError::Image),
            Self::Files(files) => files.for_each(dir, each).map_err(ViewError::Files),
        }
    }

    fn parent(&self, dir: u64) -> Result<u64, ViewError> {
        match self {
            Self::Image(layer) => layer.parent(dir).map_err(ViewError::Image),
            Self::Files(files) => files.parent(dir).map_err(ViewError::Files),
        }
    }

    fn xattr(&self, nid: u64, name: &[u8]) -> Result<Option<Box<[u8]>>, ViewError> {
        match self {
            Self::Image(layer) => layer.xattr(nid, name).map_err(ViewError::Image),
            Self::Files(files) => files.xattr(nid, name).map_err(ViewError::Files),
        }
    }

    fn xattrs(&self, nid: u64) -> Result<Vec<Xattr>, ViewError> {
        match self {
            Self::Image(layer) => layer.xattrs(nid).map_err(ViewError::Image),
            Self::Files(files) => files.xattrs(nid).map_err(ViewError::Files),
        }
    }
}

/// A file's bytes.
struct Content<'a> {
    image: &'a Image<Bytes>,
    inode: Inode,
    position: u64,
}

impl Read for Content<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.image.read(&self.inode, self.position, buf).map_err(io::Error::other)?;
        self.position += read as u64;
        Ok(read)
    }
}
