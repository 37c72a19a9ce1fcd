//! Which blocks of a file are stored and which are holes, decided while its bytes stream past.
//!
//! A run of zero blocks becomes a hole if it is at least [`MIN_HOLE`] long or is the whole file. Files with a hole are
//! chunk-based: their chunk size (not to be confused with the chunks of a blob) grows with the file so that the map
//! beside the inode stays small; a hole shrinks to whole chunks, what is left over of it is stored.

use super::{Area, BLOCK_BITS, BLOCK_SIZE, DataBlock};

/// Shorter runs of zeros are stored. Compressed they cost nearly nothing, while each hole makes its whole file
/// chunk-based, which costs 4 bytes of metadata and a look-up for each chunk on each read.
const MIN_HOLE: u64 = 16 << 10;

/// A file's map may have as many entries before its chunks grow beyond one block: 16 KiB of metadata.
const SOFT_MAP_ENTRIES: u64 = 4096;
/// Chunks do not grow beyond this (log2) for [`SOFT_MAP_ENTRIES`]: holes finer than 256 KiB matter even in huge files …
const SOFT_CHUNK_BITS: u8 = 18;
/// … until the map has this many entries: 256 KiB of metadata, for files above 16 GiB.
const HARD_MAP_ENTRIES: u64 = 65_536;
/// Once the maps of a layer hold [`MAP_BUDGET`] entries, those of further files stay below this many.
const POOR_MAP_ENTRIES: u64 = 256;
/// Entries in all maps of a layer (64 MiB) before they must be small. A tar of nothing but sparse headers would
/// otherwise turn each KiB into 256 KiB.
const MAP_BUDGET: u64 = 16 << 20;
/// Largest chunk the format can say (log2), 8 TiB.
const MAX_CHUNK_BITS: u8 = BLOCK_BITS + 31;

/// Where a file's bytes lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FileData {
    /// In one row of blocks from here on; the place means nothing for an empty file.
    Blocks(DataBlock),
    /// Partly nowhere.
    Mapped(ChunkMap),
}

impl FileData {
    /// The data of a file without bytes.
    pub const EMPTY: Self = Self::Blocks(DataBlock { area: Area::Late, block: 0 });
}

/// A file with holes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkMap {
    /// log2 of the chunk size in bytes.
    pub(super) chunk_bits: u8,
    /// Number of chunks.
    pub(super) chunks: u64,
    /// Which of them are stored, in order.
    pub(super) runs: Box<[Run]>,
}

/// Stored chunks that follow each other in file and image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    /// First chunk.
    pub(super) first: u64,
    /// How many.
    pub(super) count: u64,
    /// Where the first one lies.
    pub(super) start: DataBlock,
}

impl ChunkMap {
    /// The first block of each chunk, none for holes.
    pub(super) fn blocks(&self) -> impl Iterator<Item = Option<DataBlock>> + '_ {
        let blocks_of_chunk = 1_u64 << (self.chunk_bits - BLOCK_BITS);
        let mut runs = self.runs.iter().copied().peekable();
        (0..self.chunks).map(move |chunk| {
            while runs.next_if(|run| run.first + run.count <= chunk).is_some() {}
            let run = runs.peek().filter(|run| run.first <= chunk)?;
            let block = u64::from(run.start.block) + (chunk - run.first) * blocks_of_chunk;
            Some(DataBlock { area: run.start.area, block: u32::try_from(block).expect("stored blocks were counted") })
        })
    }

    /// Bytes in stored chunks; the file's last one counts in full.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.runs.iter().map(|run| run.count << self.chunk_bits).sum()
    }

    /// Number of chunks, each four bytes beside the inode.
    pub(super) fn entries(&self) -> u64 {
        self.chunks
    }
}

/// Takes the bytes of one file in order, with what is known to be a hole said as such, and hands the blocks that must
/// be stored to a sink, whole blocks and in order.
#[derive(Debug)]
pub struct Extents {
    size: u64,
    start: DataBlock,
    chunk_bits: u8,
    /// Bytes taken.
    taken: u64,
    /// The block that is being filled.
    partial: Vec<u8>,
    /// Blocks before this one are settled.
    settled: u64,
    /// Zero blocks after `settled`, neither stored nor left out yet.
    zeros: u64,
    /// Blocks handed to the sink.
    stored: u64,
    runs: Vec<Run>,
}

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

impl Extents {
    /// A file of `size` bytes whose stored blocks follow each other from `start` on. `map_entries` is what
    /// [`Tree::map_entries`](super::Tree::map_entries) says.
    pub fn new(size: u64, start: DataBlock, map_entries: u64) -> Self {
        let chunk_bits = chunk_bits(size, map_entries);
        let partial = Vec::new();
        Self { size, start, chunk_bits, taken: 0, partial, settled: 0, zeros: 0, stored: 0, runs: Vec::new() }
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// Those of `sink`.
    ///
    /// # Panics
    /// If the file gets more bytes than it has.
    pub fn push<E>(&mut self, mut data: &[u8], sink: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        self.take(data.len() as u64);
        if !self.partial.is_empty() {
            let missing = block_len() - self.partial.len();
            let (head, rest) = data.split_at(missing.min(data.len()));
            self.partial.extend_from_slice(head);
            data = rest;
            if self.partial.len() < block_len() {
                return Ok(());
            }
            let block = std::mem::take(&mut self.partial);
            self.blocks(&block, sink)?;
            self.partial = block;
            self.partial.clear();
        }
        let whole = data.len() - data.len() % block_len();
        self.blocks(&data[..whole], sink)?;
        self.partial.extend_from_slice(&data[whole..]);
        Ok(())
    }

    /// Takes `len` zero bytes.
    ///
    /// # Errors
    /// Those of `sink`.
    ///
    /// # Panics
    /// If the file gets more bytes than it has.
    pub fn hole<E>(&mut self, len: u64, sink: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let mut left = len;
        if !self.partial.is_empty() {
            let missing = (BLOCK_SIZE - self.partial.len() as u64).min(left);
            self.push(zeros(missing), sink)?;
            left -= missing;
        }
        let whole = left - left % BLOCK_SIZE;
        self.take(whole);
        self.zeros += whole / BLOCK_SIZE;
        self.push(zeros(left - whole), sink)
    }

    /// Ends the file and tells where its bytes lie and how many blocks were stored.
    ///
    /// # Errors
    /// Those of `sink`.
    ///
    /// # Panics
    /// If the file got fewer bytes than it has.
    pub fn finish<E>(mut self, sink: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(FileData, u64), E> {
        assert_eq!(self.taken, self.size, "a file gets exactly its bytes");
        if !self.partial.is_empty() {
            let mut block = std::mem::take(&mut self.partial);
            block.resize(block_len(), 0);
            self.blocks(&block, sink)?;
        }
        if self.zeros > 0 {
            self.settle(true, sink)?;
        }
        let blocks = self.size.div_ceil(BLOCK_SIZE);
        debug_assert_eq!(self.settled, blocks, "every block is settled");
        if self.stored == blocks {
            return Ok((FileData::Blocks(self.start), blocks));
        }
        let stored = self.stored;
        Ok((FileData::Mapped(self.map()), stored))
    }

    fn take(&mut self, len: u64) {
        self.taken =
            self.taken.checked_add(len).filter(|taken| *taken <= self.size).expect("no more than the file has");
    }

    /// Takes whole blocks.
    fn blocks<E>(&mut self, data: &[u8], sink: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let mut row = 0;
        for at in (0..data.len()).step_by(block_len()) {
            if is_zero(&data[at..at + block_len()]) {
                self.store(&data[row..at], sink)?;
                self.zeros += 1;
                row = at + block_len();
            } else if self.zeros > 0 {
                self.settle(false, sink)?;
            }
        }
        self.store(&data[row..], sink)
    }

    /// Stores whole blocks at `settled`.
    fn store<E>(&mut self, data: &[u8], sink: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        if data.is_empty() {
            return Ok(());
        }
        sink(data)?;
        let count = data.len() as u64 / BLOCK_SIZE;
        self.settled += count;
        self.stored += count;
        Ok(())
    }

    /// Decides about the zero blocks that were seen: a hole, or stored. `end`: nothing follows them.
    fn settle<E>(&mut self, end: bool, sink: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let blocks_of_chunk = 1_u64 << (self.chunk_bits - BLOCK_BITS);
        let zeros = std::mem::take(&mut self.zeros);
        let behind = self.settled + zeros;
        let first = self.settled.div_ceil(blocks_of_chunk);
        let last = if end { behind.div_ceil(blocks_of_chunk) } else { behind / blocks_of_chunk };
        let hole = (last.saturating_sub(first)) << self.chunk_bits;
        let whole_file = end && zeros == behind;
        if hole < MIN_HOLE && !whole_file {
            return self.store_zeros(zeros, sink);
        }
        self.store_zeros(first * blocks_of_chunk - self.settled, sink)?;
        self.close_run(first);
        self.settled = (last * blocks_of_chunk).min(behind);
        self.store_zeros(behind - self.settled, sink)
    }

    fn store_zeros<E>(&mut self, blocks: u64, sink: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let mut left = blocks * BLOCK_SIZE;
        while left > 0 {
            let part = left.min(ZEROS.len() as u64);
            self.store(zeros(part), sink)?;
            left -= part;
        }
        Ok(())
    }

    /// Notes the chunks from the last hole up to `end` as stored.
    fn close_run(&mut self, end: u64) {
        let blocks_of_chunk = 1_u64 << (self.chunk_bits - BLOCK_BITS);
        // What was stored before the current run is a whole number of chunks: only the file's last one may be cut.
        let before: u64 = self.runs.iter().map(|run| run.count).sum::<u64>();
        let count = self.stored.div_ceil(blocks_of_chunk) - before;
        if count > 0 {
            let block = u64::from(self.start.block) + before * blocks_of_chunk;
            let block = u32::try_from(block).expect("the owner of the area counts its blocks with 32 bits");
            self.runs.push(Run { first: end - count, count, start: DataBlock { block, ..self.start } });
        }
    }

    /// The finished map, with chunks as large as its runs allow.
    fn map(mut self) -> ChunkMap {
        let blocks = self.size.div_ceil(BLOCK_SIZE);
        let mut chunk_bits = self.chunk_bits;
        let mut chunks = blocks.div_ceil(1 << (chunk_bits - BLOCK_BITS));
        self.close_run(chunks);
        while chunk_bits < MAX_CHUNK_BITS
            && chunks > 1
            && self.runs.iter().all(|run| {
                let end = run.first + run.count;
                run.first.is_multiple_of(2) && (end.is_multiple_of(2) || end == chunks)
            })
        {
            chunk_bits += 1;
            chunks = chunks.div_ceil(2);
            for run in &mut self.runs {
                run.first /= 2;
                run.count = run.count.div_ceil(2);
            }
        }
        ChunkMap { chunk_bits, chunks, runs: self.runs.into() }
    }
}

/// How many entries the map of the next file may have, if those before have `used`.
pub(super) fn map_entries(used: u64) -> u64 {
    if used > MAP_BUDGET { POOR_MAP_ENTRIES } else { HARD_MAP_ENTRIES }
}

/// log2 of the chunk size for a file of `size` bytes, should it have holes.
fn chunk_bits(size: u64, map_entries: u64) -> u8 {
    let blocks = size.div_ceil(BLOCK_SIZE);
    let bits = |entries: u64| log2_ceil(blocks.div_ceil(entries)).saturating_add(BLOCK_BITS);
    bits(SOFT_MAP_ENTRIES).min(SOFT_CHUNK_BITS).max(bits(map_entries)).min(MAX_CHUNK_BITS)
}

fn log2_ceil(n: u64) -> u8 {
    u8::try_from(n.max(1).next_power_of_two().trailing_zeros()).expect("64 bits have at most 63 zeros below the top")
}

const fn block_len() -> usize {
    1 << BLOCK_BITS
}

/// At most [`ZEROS`]`.len()` zero bytes.
fn zeros(len: u64) -> &'static [u8] {
    &ZEROS[..usize::try_from(len).expect("no more zeros are asked for than there are")]
}

fn is_zero(block: &[u8]) -> bool {
    // Most blocks differ from zero in their first bytes.
    let (head, rest) = block.split_at(16);
    head == &ZEROS[..16] && rest == &ZEROS[..rest.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    const B: usize = 4096;

    /// Pieces of a file: bytes or holes.
    enum Piece {
        Data(Vec<u8>),
        Hole(u64),
    }

    fn store(size: u64, pieces: &[Piece]) -> (FileData, Vec<u8>) {
        let mut extents = Extents::new(size, DataBlock { area: Area::Late, block: 10 }, HARD_MAP_ENTRIES);
        let mut stored = Vec::new();
        let mut sink = |data: &[u8]| -> Result<(), std::convert::Infallible> {
            assert!(data.len().is_multiple_of(B));
            stored.extend_from_slice(data);
            Ok(())
        };
        for piece in pieces {
            match piece {
                Piece::Data(data) => extents.push(data, &mut sink).unwrap(),
                Piece::Hole(len) => extents.hole(*len, &mut sink).unwrap(),
            }
        }
        let (data, blocks) = extents.finish(&mut sink).unwrap();
        assert_eq!(blocks, (stored.len() / B) as u64);
        (data, stored)
    }

    /// The file's content as the map says it.
    fn read_back(size: u64, data: &FileData, stored: &[u8]) -> Vec<u8> {
        let mut content = Vec::new();
        match data {
            FileData::Blocks(start) => {
                assert!(size == 0 || start.block == 10);
                content.extend_from_slice(stored);
            }
            FileData::Mapped(map) => {
                for block in map.blocks() {
                    let len = (1_usize << map.chunk_bits)
                        .min((usize::try_from(size).unwrap() - content.len()).next_multiple_of(B));
                    match block {
                        None => content.resize(content.len() + len, 0),
                        Some(block) => {
                            let at = (block.block as usize - 10) * B;
                            content.extend_from_slice(&stored[at..at + len]);
                        }
                    }
                }
            }
        }
        assert!(content.len() as u64 >= size);
        assert!(content[usize::try_from(size).unwrap()..].iter().all(|b| *b == 0));
        content.truncate(usize::try_from(size).unwrap());
        content
    }

    fn content_of(pieces: &[Piece]) -> Vec<u8> {
        let mut content = Vec::new();
        for piece in pieces {
            match piece {
                Piece::Data(data) => content.extend_from_slice(data),
                Piece::Hole(len) => content.resize(content.len() + usize::try_from(*len).unwrap(), 0),
            }
        }
        content
    }

    #[test]
    fn files_without_holes_are_stored_in_one_row() {
        for size in [0, 1, B - 1, B, B + 1, 10 * B + 7] {
            let (data, stored) = store(size as u64, &[Piece::Data(vec![1; size])]);
            assert_eq!(data, FileData::Blocks(DataBlock { area: Area::Late, block: 10 }));
            assert_eq!(stored.len(), size.next_multiple_of(B));
        }
        // Too short for a hole.
        let size = 12 * B as u64;
        let pieces = [Piece::Data(vec![1; B]), Piece::Hole(3 * B as u64), Piece::Data(vec![1; 8 * B])];
        assert!(matches!(store(size, &pieces).0, FileData::Blocks(_)));
    }

    #[test]
    fn zeros_and_holes_are_left_out() {
        let size = 100 * B as u64;
        for zeros in [Piece::Data(vec![0; 90 * B]), Piece::Hole(90 * B as u64)] {
            let (data, stored) = store(size, &[Piece::Data(vec![1; 5 * B]), zeros, Piece::Data(vec![2; 5 * B])]);
            assert_eq!(stored.len(), 10 * B);
            let FileData::Mapped(map) = data else { panic!("no hole found") };
            assert_eq!((map.chunk_bits, map.chunks, map.runs.len()), (12, 100, 2));
        }
    }

    #[test]
    fn a_file_of_zeros_needs_one_chunk_and_no_block() {
        for size in [1, B as u64, 100 * B as u64, 1 << 40] {
            let (data, stored) = store(size, &[Piece::Hole(size)]);
            assert!(stored.is_empty());
            let FileData::Mapped(map) = data else { panic!("no hole found") };
            assert_eq!((map.chunks, map.runs.len()), (1, 0));
        }
    }

    #[test]
    fn maps_stay_small() {
        for (size, bits) in [
            (0, 12),
            (16 << 20, 12),
            ((16 << 20) + 1, 13),
            (1 << 30, 18),
            (16 << 30, 18),
            (20 << 30, 19),
            (1 << 40, 24),
            (u64::MAX, 43),
        ] {
            assert_eq!(chunk_bits(size, HARD_MAP_ENTRIES), bits, "{size}");
        }
        assert_eq!(chunk_bits(16 << 20, POOR_MAP_ENTRIES), 16);
    }

    proptest::proptest! {
        #![proptest_config(proptest::prelude::ProptestConfig { cases: 100, ..Default::default() })]
        #[test]
        fn what_is_mapped_is_what_was_pushed(pieces in proptest::collection::vec((0..3_u8, 0..60_000_u64), 0..12), tail in 0..9000_u64) {
            let mut pieces: Vec<Piece> = pieces.into_iter().map(|(kind, len)| match kind {
                0 => Piece::Data(vec![7; usize::try_from(len).unwrap()]),
                1 => Piece::Data(vec![0; usize::try_from(len).unwrap()]),
                _ => Piece::Hole(len),
            }).collect();
            pieces.push(Piece::Data(vec![1; usize::try_from(tail).unwrap()]));
            let content = content_of(&pieces);
            let size = content.len() as u64;
            let (data, stored) = store(size, &pieces);
            proptest::prop_assert!(read_back(size, &data, &stored) == content);
        }

        #[test]
        fn large_chunks_hold_what_was_pushed(lens in proptest::collection::vec((proptest::bool::ANY, 1..100_u64), 1..8), map_entries in 1..20_u64) {
            let pieces: Vec<Piece> = lens.iter().map(|(data, blocks)| {
                if *data { Piece::Data(vec![3; usize::try_from(*blocks).unwrap() * B]) } else { Piece::Hole(*blocks * BLOCK_SIZE) }
            }).collect();
            let content = content_of(&pieces);
            let size = content.len() as u64;
            let mut extents = Extents::new(size, DataBlock { area: Area::Late, block: 10 }, map_entries);
            let mut stored = Vec::new();
            let mut sink = |data: &[u8]| -> Result<(), std::convert::Infallible> { stored.extend_from_slice(data); Ok(()) };
            for piece in &pieces {
                match piece {
                    Piece::Data(data) => extents.push(data, &mut sink).unwrap(),
                    Piece::Hole(len) => extents.hole(*len, &mut sink).unwrap(),
                }
            }
            let (data, _) = extents.finish(&mut sink).unwrap();
            if let FileData::Mapped(map) = &data {
                proptest::prop_assert!(map.chunks <= map_entries);
            }
            proptest::prop_assert!(read_back(size, &data, &stored) == content);
        }
    }
}
