//! What a layer takes over from those below it when all of its tar has been read.
//!
//! Three things cannot be understood from a tar alone: hard links to files of lower layers, directories that have no
//! entry of their own, and paths that lead through symbolic links of lower layers. Engines unpack into the tree that
//! the lower layers made, so they need not ask; here the few questions there are go through [`LowerLayers`].

use std::io::Read;

use super::layer::LayerError;
use super::packer::BlockStore;
use crate::erofs::writer::{FileData, ImpliedDirectory, LayerRole, Tree, TreeError, UnresolvedLink};
use crate::model::{EntryKind, LayerEntry, Metadata, Name, RelPath};

/// Directories of a layer that may lie behind symbolic links of lower layers. Real ones have a handful (`/lib`, `/bin`,
/// `/var/run`); each costs a walk through the layer's tree.
const MAX_MOVED: usize = 256;

/// Why a lower layer did not deliver: whoever implements [`LowerLayers`] knows.
pub type LowerError = Box<dyn std::error::Error + Send + Sync>;

/// The layers below, merged, for a layer that cannot stand alone.
pub trait LowerLayers {
    /// The file at `path` (never a directory) with its content, for hard links of this layer that name it; none if
    /// there is no such file. Symbolic links on the way are followed.
    ///
    /// # Errors
    /// It cannot be read.
    fn file(&mut self, path: &RelPath) -> Result<Option<LowerFile<'_>>, LowerError>;

    /// What is at `path`, where this layer needs a directory that it has no entry for. No symbolic links are followed
    /// on the way.
    ///
    /// # Errors
    /// It cannot be read.
    fn directory(&mut self, path: &RelPath) -> Result<LowerDirectory, LowerError>;

    /// All names in the root directory.
    ///
    /// # Errors
    /// They cannot be read.
    fn names_in_root(&mut self) -> Result<Vec<Name>, LowerError>;

    /// Takes what this layer's root looks like, which is what the root of the layers up to this one looks like, as
    /// soon as it is known.
    fn root_is(&mut self, _root: &Metadata) {}
}

/// What lower layers have where a directory is needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LowerDirectory {
    /// A directory that looks so.
    Directory(Metadata),
    /// A symbolic link that leads to this directory, which is no link itself and behind none.
    LinkTo(RelPath),
    /// Neither.
    Nothing,
}

/// A file of a lower layer.
pub struct LowerFile<'a> {
    /// Its kind and metadata; the path means nothing.
    pub entry: LayerEntry,
    /// Where it shows in the merged lower layers, without symbolic links on the way: all of its names.
    pub names: Vec<RelPath>,
    /// Of a regular file: exactly its bytes.
    pub content: Box<dyn Read + 'a>,
}

/// Asks the lower layers what the tree needs of them.
pub(super) fn settle(
    tree: &mut Tree,
    store: &mut impl BlockStore,
    mut lower: Option<&mut dyn LowerLayers>,
    buffer: &mut [u8],
) -> Result<(), LayerError> {
    if let Some(lower) = lower.as_deref_mut().filter(|_| tree.is_root_opaque()) {
        let failed = |source| LayerError::Lower { path: RelPath::root(), source };
        tree.hide_in_root(&lower.names_in_root().map_err(failed)?)?;
    }
    tree.drop_pointless_directories();
    if let Some(lower) = lower.as_deref_mut() {
        // The names of what is brought may need directories, so those come second.
        bring_links(tree, store, lower, buffer)?;
        if tree.role() == LayerRole::Upper {
            adopt_directories(tree, lower)?;
        }
        lower.root_is(&tree.root_metadata());
    }
    let missing = tree.unresolved_links()?;
    match (missing.first().cloned(), lower) {
        (None, _) => Ok(()),
        (Some(_), None) => Err(LayerError::NeedsLower(missing)),
        (Some(UnresolvedLink { path, target }), Some(_)) => Err(TreeError::DanglingLink { path, target }.into()),
    }
}

/// Directories without entry look like those below, or lie where symbolic links below lead.
fn adopt_directories(tree: &mut Tree, lower: &mut dyn LowerLayers) -> Result<(), LayerError> {
    let mut moved = 0;
    loop {
        let moved_before = moved;
        let mut gone: Option<RelPath> = None;
        for ImpliedDirectory { path, only_removals } in tree.implied_directories() {
            // Outermost first, so what lies in a directory that is gone follows it.
            if gone.as_ref().is_some_and(|gone| path.components().starts_with(gone.components())) {
                continue;
            }
            let found = lower.directory(&path).map_err(|source| LayerError::Lower { path: path.clone(), source })?;
            match found {
                LowerDirectory::Directory(metadata) => tree.set_implied_directory(&path, &metadata)?,
                LowerDirectory::LinkTo(to) => {
                    moved += 1;
                    if moved > MAX_MOVED {
                        return Err(LayerError::TooManyLinks(MAX_MOVED));
                    }
                    tree.move_implied_directory(&path, &to)?;
                    gone = Some(path);
                }
                LowerDirectory::Nothing if only_removals => {
                    tree.drop_implied_directory(&path);
                    gone = Some(path);
                }
                LowerDirectory::Nothing => {}
            }
        }
        if moved == moved_before {
            return Ok(());
        }
    }
}

/// Files of lower layers that hard links name are copied into this one.
fn bring_links(
    tree: &mut Tree,
    store: &mut impl BlockStore,
    lower: &mut dyn LowerLayers,
    buffer: &mut [u8],
) -> Result<(), LayerError> {
    for UnresolvedLink { target, .. } in tree.pending_links() {
        let failed = |source: LowerError| LayerError::Lower { path: target.clone(), source };
        let Some(LowerFile { entry, names, mut content }) = lower.file(&target).map_err(failed)? else { continue };
        let is_here = names.first().is_some_and(|name| tree.has_brought(name));
        let data = match entry.kind {
            EntryKind::Regular { size } if !is_here => {
                let mut extents = store.begin(size, tree)?;
                let mut left = size;
                while left > 0 {
                    let len = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
                    content.read_exact(&mut buffer[..len]).map_err(|error| failed(error.into()))?;
                    extents.push(&buffer[..len], &mut |blocks| store.put(blocks))?;
                    left -= len as u64;
                }
                store.end(extents)?
            }
            _ => FileData::EMPTY,
        };
        tree.bring(&target, &entry, &data, &names)?;
    }
    Ok(())
}
