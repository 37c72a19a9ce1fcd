//! The layers below one that is being converted, merged: for hard links that name their files, and for directories
//! that a layer needs but does not describe.
//!
//! Asking waits until the lower layers are converted. They never wait for an upper one, so somebody always moves.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Read};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::watch;

use super::adopt::{LowerDirectory, LowerError, LowerFile, LowerLayers};
use super::readback::{BlobError, BlobImage};
use super::unpacked::Unpacked;
use super::view::{Bytes, View, ViewError};
use crate::chunked::{BlobSummary, SequentialError, SequentialReader};
use crate::erofs::Image;
use crate::fetch::LayerImage;
use crate::model::{Attributes, EntryKind, FileKind, LayerEntry, Metadata, Name, NameError, RelPath};
use crate::oci::{Descriptor, LayerKind};
use crate::overlay::{self, Found, LayerView as _, NodeId, Overlay};
use crate::store::Pin;
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
pub(crate) enum Below {
    /// Converted: its blob is in this file.
    Converted {
        /// The blob.
        file: Arc<File>,
        /// Where what is in it.
        summary: BlobSummary,
    },
    /// It is a plain image in this file.
    Local {
        /// The image.
        image: Arc<File>,
        /// Keeps all of it there, if some of it could be evicted.
        #[expect(dead_code, reason = "it is held, not looked at")]
        pin: Option<Arc<Pin>>,
    },
    /// It is an image whose bytes come when they are read.
    Lazy {
        /// The layer.
        layer: Arc<LayerImage>,
    },
    /// Its files are in this directory, as overlayfs takes them.
    Unpacked {
        /// Nobody writes there any more.
        directory: Arc<Path>,
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
    #[error("layer {0} below it failed")]
    Failed(usize),
    #[error(transparent)]
    Blob(#[from] BlobError),
    #[error("cannot look into layer {layer}")]
    View { layer: usize, source: ViewError },
    #[error("cannot fetch layer {layer}, which is EROFS already")]
    Fetch { layer: usize, source: TransportError },
    #[error("cannot unpack layer {layer}, which is EROFS already")]
    Unpack { layer: usize, source: SequentialError },
    #[error("cannot keep layer {layer} in a temporary file")]
    Spool { layer: usize, source: io::Error },
    #[error("cannot merge the layers below")]
    Merge(#[from] overlay::Error<ViewError>),
    #[error("more than {MAX_FOLLOWED} symbolic links, or {MAX_STEPS} parts, on the way")]
    Loop,
    #[error("an impossible name is on the way")]
    Name(#[source] NameError),
    #[error("it is a directory, and directories cannot have hard links")]
    Directory,
    #[error("it has the type of a socket, which a layer cannot hold")]
    Socket,
}

/// A lower layer as it becomes known.
#[derive(Debug, Clone)]
pub(crate) struct LayerBelow {
    /// When it is finished.
    pub(crate) image: watch::Receiver<Option<Below>>,
    /// Earlier: when its tar has been read.
    pub(crate) root: watch::Receiver<Option<Root>>,
}

/// The root of the merged tree up to a layer. Nearly every layer asks for it, since few tars have an entry for it;
/// that is why it does not wait for the layers below to be finished.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Root {
    /// It looks so.
    Is(Metadata),
    /// Only the image tells.
    InImage,
    /// The layer is not part of the stack.
    Aside,
}

/// The layers below.
pub(crate) struct Lower {
    runtime: Handle,
    /// Where layers that are [`Below::Kept`] come from.
    source: Option<ImageSource>,
    layers: Vec<LayerBelow>,
    /// None inside if there are no layers below.
    merged: Option<Option<Overlay<View>>>,
    asked: Asked,
    /// Where to tell what the root of this layer looks like.
    root: watch::Sender<Option<Root>>,
}

/// What a layer asked of those below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asked {
    /// For directories only: each with the answer.
    Directories(Vec<(RelPath, LowerDirectory)>),
    /// For more than that.
    More,
}

/// Which symbolic links are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Follow {
    Nothing,
    Parents,
    All,
}

/// What a path leads to, and the same path without symbolic links.
struct Way {
    found: Found,
    path: RelPath,
}

impl Lower {
    /// `layers` are all that stand below in the manifest, the lowest first; `root` is told what this layer's root
    /// looks like.
    pub(crate) fn new(
        runtime: Handle,
        source: Option<ImageSource>,
        layers: Vec<LayerBelow>,
        root: watch::Sender<Option<Root>>,
    ) -> Self {
        Self { runtime, source, layers, merged: None, asked: Asked::Directories(Vec::new()), root }
    }

    /// What was asked.
    pub(super) fn into_asked(self) -> Asked {
        self.asked
    }

    /// True if these layers answer the same as others did. Not being able to answer is another answer.
    pub(super) fn would_answer(&mut self, asked: &Asked) -> bool {
        match asked {
            Asked::More => false,
            Asked::Directories(asked) => {
                asked.iter().all(|(path, answer)| self.directory_at(path).is_ok_and(|found| found == *answer))
            }
        }
    }

    /// The merged layers; none if there are none.
    fn merged(&mut self) -> Result<Option<&Overlay<View>>, BelowError> {
        if self.merged.is_none() {
            self.merged = Some(self.open()?);
        }
        Ok(self.merged.as_ref().and_then(Option::as_ref))
    }

    fn open(&mut self) -> Result<Option<Overlay<View>>, BelowError> {
        let mut views = Vec::new();
        for layer in 0..self.layers.len() {
            let Some(receiver) = self.layers.get_mut(layer).map(|layer| &mut layer.image) else { break };
            let below = wait(&self.runtime, receiver).ok_or(BelowError::Failed(layer))?;
            let bytes = match below {
                Below::Converted { file, summary } => Bytes::Blob(BlobImage::open(file, &summary)?),
                // Its pin is where it came from, for as long as this is.
                Below::Local { image, .. } => {
                    Bytes::File(image.try_clone().map_err(|source| BelowError::Spool { layer, source })?)
                }
                Below::Lazy { layer } => Bytes::Lazy(layer),
                Below::Kept { descriptor } => Bytes::File(self.inflate(layer, &descriptor)?),
                Below::Unpacked { directory } => {
                    let files = Unpacked::open(&directory).map_err(ViewError::Files);
                    views.push(View::Files(files.map_err(|source| BelowError::View { layer, source })?));
                    continue;
                }
                Below::Aside => continue,
            };
            let image = Image::open(bytes).map_err(ViewError::Image);
            let image = image.map_err(|source| BelowError::View { layer, source })?;
            views.push(View::Image(Box::new(Layer::new(image))));
        }
        Ok(if views.is_empty() { None } else { Some(Overlay::new(views)?) })
    }

    /// The image of a layer that was EROFS before, in a temporary file.
    fn inflate(&self, layer: usize, descriptor: &Descriptor) -> Result<File, BelowError> {
        let spooled = |source| BelowError::Spool { layer, source };
        let (LayerKind::Erofs(compression), Some(source)) = (LayerKind::of(&descriptor.media_type), &self.source)
        else {
            return Err(BelowError::Failed(layer));
        };
        let blob = self
            .runtime
            .block_on(source.reader(&self.runtime, descriptor))
            .map_err(|source| BelowError::Fetch { layer, source })?;
        let out = BufWriter::new(tempfile::tempfile().map_err(spooled)?);
        let reader: SequentialReader<BufWriter<File>> = SequentialReader::new(out, compression, MAX_IMAGE);
        let (out, _) = reader.run(blob).map_err(|source| BelowError::Unpack { layer, source })?;
        out.into_inner().map_err(|error| spooled(error.into_error()))
    }

    /// What the merged root looks like, without waiting for images where that can be.
    fn root(&mut self) -> Result<Option<Metadata>, BelowError> {
        for (layer, below) in self.layers.iter_mut().enumerate().rev() {
            match wait(&self.runtime, &mut below.root).ok_or(BelowError::Failed(layer))? {
                Root::Is(metadata) => return Ok(Some(metadata)),
                Root::Aside => {}
                Root::InImage => {
                    let Some(merged) = self.merged()? else { return Ok(None) };
                    return metadata(merged, &merged.root()?).map(Some);
                }
            }
        }
        Ok(None)
    }

    fn file_at(&mut self, path: &RelPath) -> Result<Option<LowerFile<'_>>, BelowError> {
        let Some(merged) = self.merged()? else { return Ok(None) };
        let Some(Way { found, path }) = find(merged, path, Follow::Parents)? else { return Ok(None) };
        let Attributes { size, rdev, nlink, .. } = found.attributes;
        let kind = match found.attributes.kind {
            FileKind::Regular => EntryKind::Regular { size },
            FileKind::Symlink => EntryKind::Symlink { target: read_link(merged, found.node)?.into() },
            FileKind::CharDevice => EntryKind::CharDevice(rdev),
            FileKind::BlockDevice => EntryKind::BlockDevice(rdev),
            FileKind::Fifo => EntryKind::Fifo,
            FileKind::Directory => return Err(BelowError::Directory),
            FileKind::Socket => return Err(BelowError::Socket),
        };
        let metadata = metadata(merged, &found)?;
        let names = if nlink > 1 { names_of(merged, found.node)? } else { vec![path.clone()] };
        let content: Box<dyn Read + '_> = match kind {
            EntryKind::Regular { .. } => {
                let view = merged.layer(found.node.layer)?;
                view.content(found.node.nid).map_err(|source| in_layer(found.node, source))?
            }
            _ => Box::new(io::empty()),
        };
        Ok(Some(LowerFile { entry: LayerEntry { path, kind, metadata }, names, content }))
    }

    fn root_names(&mut self) -> Result<Vec<Name>, BelowError> {
        let Some(merged) = self.merged()? else { return Ok(Vec::new()) };
        let listing = merged.list(&merged.root()?.parts())?;
        let names = (0..listing.len()).filter_map(|number| listing.get(number)).map(|entry| Name::new(entry.name));
        names.collect::<Result<_, _>>().map_err(BelowError::Name)
    }

    fn directory_at(&mut self, path: &RelPath) -> Result<LowerDirectory, BelowError> {
        if path.is_root() {
            return Ok(self.root()?.map_or(LowerDirectory::Nothing, LowerDirectory::Directory));
        }
        let Some(merged) = self.merged()? else { return Ok(LowerDirectory::Nothing) };
        let Some(Way { found, .. }) = find(merged, path, Follow::Nothing)? else { return Ok(LowerDirectory::Nothing) };
        match found.attributes.kind {
            FileKind::Directory => metadata(merged, &found).map(LowerDirectory::Directory),
            FileKind::Symlink => Ok(match find(merged, path, Follow::All) {
                Ok(Some(Way { found, path })) if found.attributes.kind == FileKind::Directory => {
                    LowerDirectory::LinkTo(path)
                }
                // A link that leads nowhere is replaced by the directory.
                Ok(_) | Err(BelowError::Loop | BelowError::Name(_)) => LowerDirectory::Nothing,
                Err(error) => return Err(error),
            }),
            _ => Ok(LowerDirectory::Nothing),
        }
    }
}

impl LowerLayers for Lower {
    fn file(&mut self, path: &RelPath) -> Result<Option<LowerFile<'_>>, LowerError> {
        self.asked = Asked::More;
        Ok(self.file_at(path)?)
    }

    fn directory(&mut self, path: &RelPath) -> Result<LowerDirectory, LowerError> {
        let found = self.directory_at(path)?;
        if let Asked::Directories(asked) = &mut self.asked {
            asked.push((path.clone(), found.clone()));
        }
        Ok(found)
    }

    fn names_in_root(&mut self) -> Result<Vec<Name>, LowerError> {
        self.asked = Asked::More;
        Ok(self.root_names()?)
    }

    fn root_is(&mut self, root: &Metadata) {
        self.root.send_replace(Some(Root::Is(root.clone())));
    }
}

/// Waits for a value; none if it will never come.
fn wait<T: Clone>(runtime: &Handle, receiver: &mut watch::Receiver<Option<T>>) -> Option<T> {
    runtime.block_on(receiver.wait_for(Option::is_some)).ok()?.clone()
}

/// What `path` leads to.
fn find(merged: &Overlay<View>, path: &RelPath, follow: Follow) -> Result<Option<Way>, BelowError> {
    let mut way = vec![(merged.root()?, RelPath::root())];
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
                if way.len() > 1 {
                    way.pop();
                }
                continue;
            }
            Step::Root => {
                way.truncate(1);
                continue;
            }
        };
        let Some((here, path)) = way.last() else { return Ok(None) };
        let Some(found) = merged.lookup(&here.parts(), name.as_bytes())? else { return Ok(None) };
        let is_last = left.is_empty();
        let follows = follow == Follow::All || (follow == Follow::Parents && !is_last);
        match found.attributes.kind {
            FileKind::Directory => {
                let path = path.join(name);
                way.push((found, path));
            }
            FileKind::Symlink if follows => {
                followed += 1;
                if followed > MAX_FOLLOWED {
                    return Err(BelowError::Loop);
                }
                follow_link(&read_link(merged, found.node)?, &mut left)?;
            }
            _ if is_last => return Ok(Some(Way { found, path: path.join(name) })),
            _ => return Ok(None),
        }
    }
    Ok(way.pop().map(|(found, path)| Way { found, path }))
}

/// All names under which a file with several shows in the merged tree. Hard links lie in one layer, so that one is
/// walked; seldom, and never without a file to bring.
fn names_of(merged: &Overlay<View>, node: NodeId) -> Result<Vec<RelPath>, BelowError> {
    let view = merged.layer(node.layer)?;
    let mut names = Vec::new();
    let mut seen = HashSet::new();
    let mut left = vec![(view.root(), RelPath::root())];
    while let Some((dir, path)) = left.pop() {
        // A directory that an image made by others names twice.
        if !seen.insert(dir) {
            continue;
        }
        let mut entries = Vec::new();
        let listed = view.for_each(dir, &mut |name, nid, kind| {
            if nid == node.nid || kind == FileKind::Directory {
                entries.push((Name::new(name), nid));
            }
            ControlFlow::Continue(())
        });
        listed.map_err(|source| in_layer(node, source))?;
        for (name, nid) in entries {
            let path = path.join(name.map_err(BelowError::Name)?);
            if nid == node.nid {
                let shown = find(merged, &path, Follow::Nothing)?;
                names.extend(shown.filter(|way| way.found.node == node).map(|way| way.path));
            } else {
                left.push((nid, path));
            }
        }
    }
    names.sort();
    Ok(names)
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

fn in_layer(node: NodeId, source: ViewError) -> BelowError {
    BelowError::View { layer: usize::from(node.layer), source }
}

fn read_link(merged: &Overlay<View>, node: NodeId) -> Result<Vec<u8>, BelowError> {
    merged.layer(node.layer)?.read_link(node.nid).map_err(|source| in_layer(node, source))
}

fn metadata(merged: &Overlay<View>, found: &Found) -> Result<Metadata, BelowError> {
    let Attributes { permissions, uid, gid, mtime, .. } = found.attributes;
    let mut xattrs = merged.xattrs(found.node)?;
    xattrs.sort();
    Ok(Metadata { permissions, uid, gid, mtime, xattrs })
}
