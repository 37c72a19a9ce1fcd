//! What a directory holds.
//!
//! A listing is made in one pass over the parts and holds candidates: it does not open the files. Whether a candidate
//! is a whiteout, and what lies below a directory, is decided by [`Overlay::entry`] when the entry is shown, where its
//! attributes are needed anyway.

use std::ops::ControlFlow;

use crate::model::FileKind;

use super::{Error, Found, LayerView, NodeId, Overlay};

/// Most bytes of names that can be merged: 4 GiB is what the offsets hold, a sixteenth of it is about ten million
/// entries and no directory of an image.
const MAX_NAMES: u32 = 256 << 20;

/// One name of a directory and the topmost file under it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The name.
    pub name: &'a [u8],
    /// The topmost file of that name.
    pub node: NodeId,
    /// Its type, as the directory says it.
    pub kind: FileKind,
    /// True if several layers have the name.
    pub shared: bool,
}

#[derive(Debug, Clone, Copy)]
struct Record {
    nid: u64,
    start: u32,
    len: u16,
    layer: u16,
    kind: FileKind,
    shared: bool,
}

/// The candidates of a merged directory, sorted by name, each name once. Compact: one block for the names, 24 bytes an
/// entry.
#[derive(Debug, Default)]
pub struct Listing {
    names: Box<[u8]>,
    records: Box<[Record]>,
}

impl Listing {
    /// How many candidates.
    pub const fn len(&self) -> usize {
        self.records.len()
    }

    /// True if there is none.
    pub const fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Candidate `index` in the order of names.
    pub fn get(&self, index: usize) -> Option<Entry<'_>> {
        let record = self.records.get(index)?;
        let start = record.start as usize;
        Some(Entry {
            name: self.names.get(start..start + usize::from(record.len))?,
            node: NodeId { layer: record.layer, nid: record.nid },
            kind: record.kind,
            shared: record.shared,
        })
    }

    /// Bytes of memory it takes.
    pub const fn footprint(&self) -> usize {
        size_of::<Self>() + self.names.len() + self.records.len() * size_of::<Record>()
    }
}

impl<V: LayerView> Overlay<V> {
    /// What the directory with these parts (topmost first) holds, before whiteouts are told from files.
    ///
    /// # Errors
    /// A layer could not be read, or [`Error::TooLarge`].
    pub fn list(&self, parts: &[NodeId]) -> Result<Listing, Error<V::Error>> {
        let mut names: Vec<u8> = Vec::new();
        let mut records: Vec<Record> = Vec::new();
        for part in parts {
            let mut fits = true;
            self.ask(part.layer, |view| {
                view.for_each(part.nid, &mut |name, nid, kind| {
                    let start = u32::try_from(names.len()).ok().filter(|start| *start <= MAX_NAMES);
                    let (Some(start), Ok(len)) = (start, u16::try_from(name.len())) else {
                        fits = false;
                        return ControlFlow::Break(());
                    };
                    names.extend_from_slice(name);
                    records.push(Record { nid, start, len, layer: part.layer, kind, shared: false });
                    ControlFlow::Continue(())
                })
            })?;
            if !fits {
                return Err(Error::TooLarge { layer: part.layer, nid: part.nid, limit: MAX_NAMES });
            }
        }
        let name = |record: &Record| {
            let start = record.start as usize;
            names.get(start..start + usize::from(record.len)).unwrap_or_default()
        };
        // Stable: of equal names the topmost stays first. Layers are sorted already, so this merges their runs.
        records.sort_by(|a, b| name(a).cmp(name(b)));
        let mut kept: Vec<Record> = Vec::with_capacity(records.len());
        let mut compact: Vec<u8> = Vec::with_capacity(names.len());
        for record in records {
            let bytes = name(&record);
            if let Some(last) = kept.last_mut() {
                let start = last.start as usize;
                if compact.get(start..start + usize::from(last.len)) == Some(bytes) {
                    last.shared |= last.layer != record.layer;
                    continue;
                }
            }
            let Ok(start) = u32::try_from(compact.len()) else { break };
            compact.extend_from_slice(bytes);
            kept.push(Record { start, ..record });
        }
        Ok(Listing { names: compact.into(), records: kept.into() })
    }

    /// What candidate `entry` of the directory with these parts really is; none for a whiteout.
    ///
    /// # Errors
    /// A layer could not be read, or the file is one that overlayfs refuses, too.
    pub fn entry(&self, parts: &[NodeId], entry: &Entry<'_>) -> Result<Option<Found>, Error<V::Error>> {
        let look = self.look(entry.node)?;
        let alone = Found { node: entry.node, attributes: look.attributes, below: Vec::new() };
        match look.attributes.kind {
            FileKind::Directory if entry.shared => self.lookup(parts, entry.name),
            FileKind::Directory => {
                if entry.node.layer > 0 && self.marks(entry.node, &look)?.redirect.is_some() {
                    return self.lookup(parts, entry.name);
                }
                Ok(Some(alone))
            }
            _ if self.is_whiteout(entry.node, &look)? => Ok(None),
            _ if self.is_marked(entry.node, &look, b"metacopy")? => {
                Err(Error::Metacopy { layer: entry.node.layer, nid: entry.node.nid })
            }
            _ => Ok(Some(alone)),
        }
    }
}
