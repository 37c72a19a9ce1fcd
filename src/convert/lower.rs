//! The layers below one that is being converted, merged: for hard links that name their files, and for directories
//! that a layer needs but does not describe.
//!
//! Asking waits until the lower layers are converted. They never wait for an upper one, so somebody always moves.

use std::fs::File;
use std::io::{self, BufWriter, Read};
use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::watch;

use super::layer::{LowerError, LowerFile, LowerLayers};
use super::readback::{BlobError, BlobImage};
use crate::chunked::{BlobSummary, SequentialError, SequentialReader};
use crate::erofs::{self, Image, Inode, Nid};
use crate::model::{
    Attributes, EntryKind, FileKind, LayerEntry, Metadata, Name, NameError, ReadAt, ReadAtError, RelPath,
};
use crate::oci::{Descriptor, LayerKind};
use crate::overlay::{self, Found, NodeId, Overlay};
use crate::transport::{ImageSource, TransportError};
use crate::vfs::Layer;

/// Symbolic links that are followed on one path, as Linux does.
const MAX_FOLLOWED: usize = 40;
/// Parts of a path, symbolic links resolved, that are walked.
const MAX_STEPS: usize = 4096;
/// Largest image of a layer that was EROFS before and has to be inflated to be looked into.
const MAX_IMAGE: u64 = 1 << 44;

/// A finished lower layer, as far as it can be looked into.
#[derive(Debug, Clone)]
pub(super) enum Below {
    /// Converted: its blob is in this file.
    Converted {
        /// The blob.
        file: Arc<File>,
        /// Where what is in it.
        summary: BlobSummary,
    },
    /// It was EROFS before and lies with the source.
    Kept {
        /// Its blob.
        descriptor: Descriptor,
    },
    /// A device or index: no layer of the stack.
    Aside,
}

/// Why a lower layer cannot be looked into.
#[derive(Debug, thiserror::Error)]
enum BelowError {
    #[error("the conversion of layer {0} below it failed")]
    Failed(usize),
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error("cannot read the EROFS image of layer {layer}")]
    Image { layer: usize, source: erofs::Error },
    #[error("cannot fetch layer {layer}, which is EROFS already")]
    Fetch { layer: usize, source: TransportError },
    #[error("cannot unpack layer {layer}, which is EROFS already")]
    Unpack { layer: usize, source: SequentialError },
    #[error("cannot keep layer {layer} in a temporary file")]
    Spool { layer: usize, source: io::Error },
    #[error("cannot merge the layers below")]
    Merge(#[from] overlay::Error<erofs::Error>),
    #[error("more than {MAX_FOLLOWED} symbolic links, or {MAX_STEPS} parts, on the way")]
    Loop,
    #[error("a symbolic link on the way leads through an impossible name")]
    Name(#[source] NameError),
    #[error("it is a directory, and directories cannot have hard links")]
    Directory,
    #[error("it has the type of a socket, which a layer cannot hold")]
    Socket,
}

/// Bytes of an image, wherever they are.
enum Bytes {
    Blob(BlobImage),
    File(File),
}

impl ReadAt for Bytes {
    fn size(&self) -> u64 {
        match self {
            Self::Blob(blob) => blob.size(),
            Self::File(file) => file.size(),
        }
    }

    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
        match self {
            Self::Blob(blob) => blob.read_exact_at(offset, buf),
            Self::File(file) => file.read_exact_at(offset, buf),
        }
    }
}

type View = Layer<Bytes>;

/// The layers below.
pub(super) struct Lower {
    runtime: Handle,
    source: ImageSource,
    layers: Vec<watch::Receiver<Option<Below>>>,
    merged: Option<Overlay<View>>,
    asked: Asked,
}

/// What a layer asked of those below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asked {
    /// For directories only: each with the answer.
    Directories(Vec<(RelPath, Option<Metadata>)>),
    /// For contents too.
    Files,
}

impl Lower {
    /// `layers` are all that stand below in the manifest, the lowest first.
    pub(super) fn new(runtime: Handle, source: ImageSource, layers: Vec<watch::Receiver<Option<Below>>>) -> Self {
        Self { runtime, source, layers, merged: None, asked: Asked::Directories(Vec::new()) }
    }

    /// What was asked.
    pub(super) fn into_asked(self) -> Asked {
        self.asked
    }

    /// True if these layers answer the same as others did. Not being able to answer is another answer.
    pub(super) fn would_answer(&mut self, asked: &Asked) -> bool {
        match asked {
            Asked::Files => false,
            Asked::Directories(asked) => {
                asked.iter().all(|(path, answer)| self.directory_at(path).is_ok_and(|found| found == *answer))
            }
        }
    }

    fn merged(&mut self) -> Result<&Overlay<View>, BelowError> {
        if self.merged.is_none() {
            self.merged = Some(self.open()?);
        }
        Ok(self.merged.as_ref().expect("it was just opened"))
    }

    fn open(&mut self) -> Result<Overlay<View>, BelowError> {
        let mut views = Vec::new();
        for layer in 0..self.layers.len() {
            let Some(receiver) = self.layers.get_mut(layer) else { break };
            let below = self
                .runtime
                .block_on(receiver.wait_for(Option::is_some))
                .map_err(|_| BelowError::Failed(layer))?
                .clone();
            let bytes = match below {
                Some(Below::Converted { file, summary }) => Bytes::Blob(BlobImage::open(file, &summary)?),
                Some(Below::Kept { descriptor }) => Bytes::File(self.inflate(layer, &descriptor)?),
                Some(Below::Aside) | None => continue,
            };
            let image = Image::open(bytes).map_err(|source| BelowError::Image { layer, source })?;
            views.push(Layer::new(image));
        }
        Ok(Overlay::new(views)?)
    }

    /// The image of a layer that was EROFS before, in a temporary file.
    fn inflate(&self, layer: usize, descriptor: &Descriptor) -> Result<File, BelowError> {
        let spooled = |source| BelowError::Spool { layer, source };
        let LayerKind::Erofs(compression) = LayerKind::of(&descriptor.media_type) else {
            return Err(BelowError::Failed(layer));
        };
        let blob = self
            .runtime
            .block_on(self.source.reader(&self.runtime, descriptor))
            .map_err(|source| BelowError::Fetch { layer, source })?;
        let out = BufWriter::new(tempfile::tempfile().map_err(spooled)?);
        let reader: SequentialReader<BufWriter<File>> = SequentialReader::new(out, compression, MAX_IMAGE);
        let (out, _) = reader.run(blob).map_err(|source| BelowError::Unpack { layer, source })?;
        out.into_inner().map_err(|error| spooled(error.into_error()))
    }

    /// What `path` names, symbolic links followed but for the last part if `follow`.
    fn find(&mut self, path: &RelPath, follow: bool) -> Result<Option<Found>, BelowError> {
        if self.layers.is_empty() {
            return Ok(None);
        }
        let merged = self.merged()?;
        let mut stack = vec![merged.root()?];
        let mut left: Vec<Step> = path.components().iter().rev().cloned().map(Step::Into).collect();
        let (mut followed, mut steps) = (0, 0);
        while let Some(step) = left.pop() {
            steps += 1;
            if steps > MAX_STEPS {
                return Err(BelowError::Loop);
            }
            let name = match step {
                Step::Into(name) => name,
                Step::Up => {
                    if stack.len() > 1 {
                        stack.pop();
                    }
                    continue;
                }
                Step::Root => {
                    stack.truncate(1);
                    continue;
                }
            };
            let Some(here) = stack.last() else { return Ok(None) };
            let Some(found) = merged.lookup(&here.parts(), name.as_bytes())? else { return Ok(None) };
            match found.attributes.kind {
                FileKind::Directory => stack.push(found),
                _ if left.is_empty() => return Ok(Some(found)),
                FileKind::Symlink if follow => {
                    followed += 1;
                    if followed > MAX_FOLLOWED {
                        return Err(BelowError::Loop);
                    }
                    let (image, inode) = open_inode(merged, found.node)?;
                    let target = image.read_link(&inode).map_err(|source| in_layer(found.node, source))?;
                    follow_link(&target, &mut left)?;
                }
                _ => return Ok(None),
            }
        }
        Ok(stack.pop())
    }

    fn file_at(&mut self, path: &RelPath) -> Result<Option<LowerFile<'_>>, BelowError> {
        let Some(found) = self.find(path, true)? else { return Ok(None) };
        let merged = self.merged()?;
        let (image, inode) = open_inode(merged, found.node)?;
        let Attributes { size, rdev, .. } = found.attributes;
        let kind = match found.attributes.kind {
            FileKind::Regular => EntryKind::Regular { size },
            FileKind::Symlink => {
                EntryKind::Symlink { target: image.read_link(&inode).map_err(|source| in_layer(found.node, source))? }
            }
            FileKind::CharDevice => EntryKind::CharDevice(rdev),
            FileKind::BlockDevice => EntryKind::BlockDevice(rdev),
            FileKind::Fifo => EntryKind::Fifo,
            FileKind::Directory => return Err(BelowError::Directory),
            FileKind::Socket => return Err(BelowError::Socket),
        };
        let metadata = metadata(merged, &found)?;
        let entry = LayerEntry { path: path.clone(), kind, metadata };
        Ok(Some(LowerFile { entry, content: Box::new(Content { image, inode, position: 0 }) }))
    }

    fn directory_at(&mut self, path: &RelPath) -> Result<Option<Metadata>, BelowError> {
        let Some(found) = self.find(path, false)? else { return Ok(None) };
        if found.attributes.kind != FileKind::Directory {
            return Ok(None);
        }
        metadata(self.merged()?, &found).map(Some)
    }
}

impl LowerLayers for Lower {
    fn file(&mut self, path: &RelPath) -> Result<Option<LowerFile<'_>>, LowerError> {
        self.asked = Asked::Files;
        Ok(self.file_at(path)?)
    }

    fn directory(&mut self, path: &RelPath) -> Result<Option<Metadata>, LowerError> {
        let found = self.directory_at(path)?;
        if let Asked::Directories(asked) = &mut self.asked {
            asked.push((path.clone(), found.clone()));
        }
        Ok(found)
    }
}

/// A part of a path on the way.
enum Step {
    Into(Name),
    Up,
    Root,
}

/// Puts the parts of a link's target before what is left of the path.
fn follow_link(target: &[u8], left: &mut Vec<Step>) -> Result<(), BelowError> {
    for part in target.split(|byte| *byte == b'/').rev() {
        match part {
            b"" | b"." => {}
            b".." => left.push(Step::Up),
            name => left.push(Step::Into(Name::new(name).map_err(BelowError::Name)?)),
        }
    }
    if target.starts_with(b"/") {
        left.push(Step::Root);
    }
    Ok(())
}

fn in_layer(node: NodeId, source: erofs::Error) -> BelowError {
    BelowError::Image { layer: usize::from(node.layer), source }
}

fn open_inode(merged: &Overlay<View>, node: NodeId) -> Result<(&Image<Bytes>, Inode), BelowError> {
    let image = merged.layer(node.layer)?.image();
    let inode = image.inode(Nid(node.nid)).map_err(|source| in_layer(node, source))?;
    Ok((image, inode))
}

fn metadata(merged: &Overlay<View>, found: &Found) -> Result<Metadata, BelowError> {
    let Attributes { permissions, uid, gid, mtime, .. } = found.attributes;
    let mut xattrs = merged.xattrs(found.node)?;
    xattrs.sort();
    Ok(Metadata { permissions, uid, gid, mtime, xattrs })
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
