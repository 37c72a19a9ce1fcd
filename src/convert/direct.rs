//! One layer: a tar streams in, a plain EROFS image streams out, ready to be mounted. Nothing is compressed and nothing is
//! spooled: the blocks of files go to the image as they come, behind its first block, and the metadata behind them.
//!
//! Guarantees and refusals are those of [`super::layer`], with which it shares everything but where blocks go.

use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use super::adopt::LowerLayers;
use super::layer::{LayerError, LayerOptions, TarTree, read_tar};
use super::packer::{BlockStore, EarlyFiles};
use crate::erofs::writer::{
    Area, BLOCK_BITS, BLOCK_SIZE, DataBlock, Extents, FileData, ImageIdentity, LayerRole, Plan, Tree, TreeError,
    TreeStatistics,
};
use crate::model::DiffId;

/// Bytes that are gathered before they are written.
const BUFFER: usize = 1 << 20;

/// Where an image goes.
pub trait ImageOut: Write {
    /// Writes the first block of the image, in whose place zeros were written.
    ///
    /// # Errors
    /// What the disk says.
    fn write_first_block(&mut self, block: &[u8]) -> io::Result<()>;
}

/// Unpacks the plain tar `source`, whose uncompressed bytes are `diff_id`, into `out`.
///
/// # Errors
/// See [`LayerError`]. What `out` then has is of no use.
pub fn unpack_layer(
    source: impl Read,
    role: LayerRole,
    diff_id: DiffId,
    lower: Option<&mut dyn LowerLayers>,
    out: &mut impl ImageOut,
) -> Result<TreeStatistics, LayerError> {
    let (first, statistics) = write(source, role, diff_id, lower, out)?;
    out.write_first_block(&first).map_err(failed)?;
    Ok(statistics)
}

/// Writes everything, with zeros for the first block, which it gives back.
fn write(
    source: impl Read,
    role: LayerRole,
    diff_id: DiffId,
    lower: Option<&mut dyn LowerLayers>,
    out: &mut impl Write,
) -> Result<(Vec<u8>, TreeStatistics), LayerError> {
    // There is no profile, so nothing else of the options counts.
    let options = LayerOptions::new(role, diff_id, Path::new("."));
    let mut blocks = Blocks { out: BufWriter::with_capacity(BUFFER, out), blocks: 0 };
    blocks.write(&[0; 1 << BLOCK_BITS])?;
    let TarTree { tree, .. } = read_tar(source, role, &mut blocks, &mut EarlyFiles::new(&options), lower)?;
    let late = u32::try_from(blocks.blocks).map_err(|_| TreeError::TooLarge)?;
    let plan = Plan::behind(tree, ImageIdentity::of_source(&diff_id.0), late)?;
    let mut split = FirstBlock { first: Vec::new(), out: &mut blocks.out };
    plan.write_behind(&mut split).map_err(failed)?;
    let first = split.first;
    blocks.out.flush().map_err(failed)?;
    Ok((first, plan.statistics().clone()))
}

fn failed(source: io::Error) -> LayerError {
    LayerError::Image { source }
}

/// Takes blocks of files in the order of the tar.
struct Blocks<W: Write> {
    out: BufWriter<W>,
    /// How many there are, the first block of the image not counted.
    blocks: u64,
}

impl<W: Write> Blocks<W> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), LayerError> {
        self.out.write_all(bytes).map_err(failed)
    }
}

impl<W: Write> BlockStore for Blocks<W> {
    fn begin(&mut self, size: u64, tree: &Tree) -> Result<Extents, LayerError> {
        let block = u32::try_from(self.blocks).map_err(|_| TreeError::TooLarge)?;
        Ok(Extents::new(size, DataBlock { area: Area::Late, block }, tree.map_entries()))
    }

    fn put(&mut self, blocks: &[u8]) -> Result<(), LayerError> {
        self.blocks += blocks.len() as u64 / BLOCK_SIZE;
        self.write(blocks)
    }

    fn end(&mut self, extents: Extents) -> Result<FileData, LayerError> {
        let (data, _) = extents.finish(&mut |blocks| self.put(blocks))?;
        Ok(data)
    }
}

/// Keeps the first block and passes on the rest.
struct FirstBlock<'a, W> {
    first: Vec<u8>,
    out: &'a mut W,
}

impl<W: Write> Write for FirstBlock<'_, W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let missing = (1 << BLOCK_BITS) - self.first.len();
        if missing == 0 {
            return self.out.write(bytes);
        }
        let taken = bytes.len().min(missing);
        self.first.extend_from_slice(bytes.get(..taken).unwrap_or_default());
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
