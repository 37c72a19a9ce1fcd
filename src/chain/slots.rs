//! Small numbers that are given once and again only after a long time.
//!
//! The kernel may know an inode by its number for a while after the snapshot it belonged to is gone. So a number that
//! became free is not the next one to be given: the search goes on from the number given last, round and round.

/// The largest number of a snapshot or an image. Inode numbers hold a slot in 4, 8, 16 or 24 bits, and those of layers
/// below 64 GiB stay below 2^53 with 16; a host has some thousand snapshots.
pub const MAX_SNAPSHOT_SLOT: u32 = (1 << 16) - 1;

/// The largest number of a layer.
pub const MAX_LAYER_SLOT: u32 = (1 << 16) - 1;

/// The first number above `cursor` that is free, from 1 again after `max`. Zero is never given.
pub(super) fn next_free(cursor: u32, max: u32, is_free: impl Fn(u32) -> bool) -> Option<u32> {
    let cursor = cursor.min(max);
    (cursor + 1..=max).chain(1..=cursor).find(|slot| is_free(*slot))
}

#[cfg(test)]
mod tests {
    use super::next_free;

    #[test]
    fn numbers_go_round() {
        for (cursor, taken, next) in [
            (0, &[][..], Some(1)),
            (1, &[1], Some(2)),
            (1, &[1, 2, 3], Some(4)),
            (4, &[4], Some(1)),
            (4, &[1, 4], Some(2)),
            (9, &[4], Some(1)),
            (2, &[1, 3, 4], Some(2)),
            (2, &[1, 2, 3, 4], None),
        ] {
            assert_eq!(next_free(cursor, 4, |slot| !taken.contains(&slot)), next, "after {cursor} with {taken:?}");
        }
    }
}
