//! Stacks of layers full of oddities, what they must look like when merged, and their tars.
//!
//! [`stacks`] draws them: a tiny alphabet of names, so that layers collide in every way, with all types of files, hard
//! links into lower layers, whiteouts, opaque directories, strange modes, owners and times, attributes, holes and
//! crowded directories. Every stack can be unpacked by a container engine, so that an engine can be the judge; what
//! engines differ about is drawn only on request ([`Options::bare`]).
//!
//! [`Stack::expected`] is a reference model of its own: it applies the entries to one tree in the order of the OCI image
//! specification (`layer.md`, *Applying Changesets*) and knows nothing of EROFS or overlayfs.

mod generate;
mod merged;

use std::io::Write as _;

use flate2::write::GzEncoder;

pub use generate::{Options, layer_tars, stacks};

use super::tar::{RawHeader, TarWriter};
use super::tree::Listing;
use crate::model::{EntryKind, LayerEntry};
use crate::tar::decompress::Compression;

/// A stretch of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Piece {
    /// Bytes that do not compress to nothing, a function of `seed`.
    Data {
        /// Which bytes.
        seed: u8,
        /// How many.
        len: u32,
    },
    /// Zeros that are stored.
    Zeros(u32),
    /// Zeros that are not.
    Hole(u32),
}

impl Piece {
    /// How long it is.
    pub fn len(self) -> u64 {
        match self {
            Self::Data { len, .. } | Self::Zeros(len) | Self::Hole(len) => len.into(),
        }
    }

    /// True if it has no bytes.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Its bytes.
    pub fn bytes(self) -> Vec<u8> {
        match self {
            Self::Data { seed, len } => (0..len)
                .map(|at| {
                    let mixed =
                        (at / 3).wrapping_mul(0x9e37_79b1).wrapping_add(u32::from(seed).wrapping_mul(0x85eb_ca6b));
                    // Never zero, so that no block of it is taken for a hole.
                    mixed.to_be_bytes()[0] | 1
                })
                .collect(),
            Self::Zeros(len) | Self::Hole(len) => vec![0; usize::try_from(len).unwrap_or_default()],
        }
    }
}

/// An entry and, for a regular file, its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerFile {
    /// The entry.
    pub entry: LayerEntry,
    /// The content; its lengths add up to the entry's size.
    pub pieces: Vec<Piece>,
}

/// Where a layer's removals stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Marks {
    /// Where they were drawn.
    Among,
    /// Before everything else.
    First,
    /// After everything else.
    Last,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// The entries in their order.
    pub files: Vec<LayerFile>,
    /// Paths are written with `./`.
    pub dotted: bool,
    /// The order in the tar.
    pub marks: Marks,
}

impl Layer {
    /// The entries in the order in which they stand in the tar.
    pub fn in_order(&self) -> Vec<&LayerFile> {
        let is_mark = |file: &&LayerFile| matches!(file.entry.kind, EntryKind::Whiteout | EntryKind::Opaque);
        let marks = self.files.iter().filter(is_mark);
        let others = self.files.iter().filter(|file| !is_mark(file));
        match self.marks {
            Marks::Among => self.files.iter().collect(),
            Marks::First => marks.chain(others).collect(),
            Marks::Last => others.chain(marks).collect(),
        }
    }

    /// The layer as a tar.
    pub fn tar(&self) -> Vec<u8> {
        let mut tar = TarWriter::new();
        if self.dotted {
            tar.dotted();
        }
        for file in self.in_order() {
            let mut stored: Vec<(u64, Vec<u8>)> = Vec::new();
            let mut at = 0;
            for piece in &file.pieces {
                if !matches!(piece, Piece::Hole(_)) {
                    match stored.last_mut() {
                        Some((start, bytes)) if *start + bytes.len() as u64 == at => bytes.extend(piece.bytes()),
                        _ => stored.push((at, piece.bytes())),
                    }
                }
                at += piece.len();
            }
            let pieces: Vec<(u64, &[u8])> = stored.iter().map(|(at, bytes)| (*at, &bytes[..])).collect();
            tar.entry_with_pieces(&file.entry, &pieces);
        }
        tar.finish()
    }
}

/// Layers, lowest first.
#[derive(Clone, PartialEq, Eq)]
pub struct Stack {
    /// The layers.
    pub layers: Vec<Layer>,
    merged: merged::Merged,
}

impl std::fmt::Debug for Stack {
    /// One line for each entry: what a failing test shows.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (number, layer) in self.layers.iter().enumerate() {
            writeln!(f, "layer {number} (dotted: {}, marks: {:?})", layer.dotted, layer.marks)?;
            for LayerFile { entry, pieces } in &layer.files {
                let LayerEntry { path, kind, metadata: m } = entry;
                write!(f, "  {path} {kind:?} {:04o} {}:{} ", m.permissions, m.uid, m.gid)?;
                writeln!(f, "{}.{:09} {:?} {pieces:?}", m.mtime.seconds, m.mtime.nanos, m.xattrs)?;
            }
        }
        Ok(())
    }
}

impl Stack {
    /// The tars, lowest first.
    pub fn tars(&self) -> Vec<Vec<u8>> {
        self.layers.iter().map(Layer::tar).collect()
    }

    /// What the merged tree must look like. Directories have size 0 and link count 0: every file system has its own.
    pub fn expected(&self) -> Listing {
        self.merged.listing()
    }
}

/// A tar whose bytes nobody wants to see when a test fails.
#[derive(Clone)]
pub struct Tar(pub Vec<u8>);

impl std::fmt::Debug for Tar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a tar of {} bytes", self.0.len())
    }
}

impl std::ops::Deref for Tar {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.0
    }
}

impl std::ops::DerefMut for Tar {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.0
    }
}

/// `tar` as a layer blob.
///
/// # Panics
/// Never: it writes to memory.
pub fn compress(tar: &[u8], compression: Compression) -> Vec<u8> {
    match compression {
        Compression::Plain => tar.to_vec(),
        Compression::Gzip => {
            let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(tar).expect("memory takes all");
            encoder.finish().expect("memory takes all")
        }
        Compression::Zstd => zstd::encode_all(tar, 1).expect("memory takes all"),
    }
}

/// A tar of regular files with the given paths and contents, for tests that need nothing odd.
pub fn plain_tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = TarWriter::new();
    for (path, content) in files {
        tar.sized(&RawHeader::new(b'0', path), content);
    }
    tar.finish()
}
