//! What is taken on disk: allocated blocks, counted without reading a file.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::files;
use crate::chain::{Layer, Snapshot, Usage};
use crate::store;

/// The unit of `st_blocks`, whatever the block size of a file system (stat(2)).
const BLOCK: u64 = 512;

/// What a snapshot takes, without its parents: allocated blocks of its files, or of the image of its layer as far as it
/// is here. `layer` is the one that holds its files, if one does.
pub fn usage_of(root: &Path, snapshot: &Snapshot, layer: Option<&Layer>) -> Usage {
    match (layer, snapshot.usage) {
        (Some(layer), _) => of_layer(root, layer),
        (None, Some(measured)) => measured,
        (None, None) => of_directory(&files::own(root, snapshot.slot).upper),
    }
}

/// Everything below and including `directory` on the same file system; a file with several names counts once. What
/// vanishes meanwhile counts as nothing.
fn of_directory(directory: &Path) -> Usage {
    let mut usage = Usage::default();
    let Ok(top) = fs::symlink_metadata(directory) else { return usage };
    let device = top.dev();
    add(&mut usage, &top);
    let mut linked = BTreeSet::new();
    let mut open: Vec<PathBuf> = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.dev() != device
                || (metadata.nlink() > 1 && !metadata.is_dir() && !linked.insert(metadata.ino()))
            {
                continue;
            }
            add(&mut usage, &metadata);
            if metadata.is_dir() {
                open.push(entry.path());
            }
        }
    }
    usage
}

/// What of a layer's image is here.
pub(super) fn of_layer(root: &Path, layer: &Layer) -> Usage {
    let mut usage = Usage::default();
    let image = store::image_path(root, &layer.id.blob, &layer.id.anchor);
    if let Some(metadata) = image.and_then(|image| fs::symlink_metadata(image).ok()) {
        add(&mut usage, &metadata);
    }
    usage
}

fn add(usage: &mut Usage, metadata: &fs::Metadata) {
    usage.bytes += metadata.blocks() * BLOCK;
    usage.inodes += 1;
}
