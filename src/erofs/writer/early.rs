//! The order of the early area. Files get there in the order of the tar, but are laid out in the order of the start-up
//! profile, which is known to be complete only at the end.

/// Where the rows of blocks of the early area went.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EarlyLayout {
    /// First block of a row as it was told to the tree, and where it is; sorted.
    moves: Vec<(u32, u32)>,
    blocks: u32,
}

impl EarlyLayout {
    /// A layout in which rows of blocks follow each other in the order of `rows`, each given as its first block as the
    /// tree knows it and its length. Each block of the early area must be in one of them. None if they are too many.
    pub fn of_rows(rows: impl IntoIterator<Item = (u32, u32)>) -> Option<Self> {
        let mut layout = Self::default();
        for (first, len) in rows {
            layout.moves.push((first, layout.blocks));
            layout.blocks = layout.blocks.checked_add(len)?;
        }
        layout.moves.sort_unstable();
        Some(layout)
    }

    /// How many blocks there are.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Where `block` went.
    pub(super) fn place(&self, block: u32) -> u32 {
        let row = self.moves.partition_point(|(first, _)| *first <= block);
        match self.moves[..row].last() {
            Some((first, now)) => now + (block - first),
            None => block,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_change_places() {
        let layout = EarlyLayout::of_rows([(7, 3), (0, 2), (2, 5)]).unwrap();
        let places: Vec<u32> = (0..10).map(|block| layout.place(block)).collect();
        assert_eq!(places, [3, 4, 5, 6, 7, 8, 9, 0, 1, 2]);
        assert_eq!(layout.blocks(), 10);
        assert_eq!(EarlyLayout::of_rows([(0, u32::MAX), (1, 1)]), None);
    }
}
