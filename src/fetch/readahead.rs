//! Guesses what will be read: what lies ahead of readers that move forward, and what lies around reads that missed. Pure:
//! chunk numbers in, chunk numbers out.

use std::ops::Range;

use super::Cause;

/// Readers that are told apart within one layer. A dozen containers rarely stream a layer at once; one more costs the
/// oldest its window, which it earns again within two chunks.
const STREAMS: usize = 8;

/// The first window, in bytes of the image. Two chunks in order may be chance: one more chunk of the usual size is what
/// a wrong guess costs.
const FIRST_WINDOW: u64 = 1 << 20;

/// The largest window of a reader of metadata. Metadata ends somewhere, and a window that reaches over its end brings file
/// data nobody asked for: half a megabyte holds four chunks of metadata as our writer cuts it, and reaches one chunk of
/// data too far at most.
const METADATA_WINDOW: u64 = 512 << 10;

/// How a reader came to chunks it had not been at before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// They were here already. Goes on with what was begun, but begins nothing: metadata of a layer is looked at all over
    /// without anybody going anywhere.
    Hit,
    /// They had to be fetched, for this.
    Miss(Cause),
}

/// Stored bytes that each miss of a layer adds to what is fetched around the next one.
///
/// Found by replaying the misses of `python3 -c 'import numpy'` and of listings over a link of 1 Gbit/s and 22 ms: 96
/// misses of 2.6 s without any guess, 68 of 2.0 s with reading ahead alone, 41 of 1.3 s with this, for 32 MB instead of
/// 27. At 100 Mbit/s 2.6 s instead of 3.2. Steps of 128 KiB gain nothing, 32 KiB and smaller limits lose what they save.
const AROUND_STEP: u64 = 64 << 10;

/// The most that is fetched around a miss.
const AROUND_LIMIT: u64 = 512 << 10;

/// How many chunks on either side of a miss are looked at for some that are missing.
const AROUND_REACH: u32 = 32;

/// What to fetch around reads that missed. A layer that is hardly used is left alone; the more often one is missed, the
/// more of it will be needed, and near to what was needed before: files of one package lie together.
#[derive(Debug, Default)]
pub(super) struct Around {
    misses: u64,
}

impl Around {
    /// A read has missed `chunks`, of a layer of `all`. Calls `want` with chunks nearby, nearest first; it gives the
    /// stored bytes that each will cost, 0 if it is here or on its way.
    pub(super) fn missed(&mut self, chunks: Range<u32>, all: u32, mut want: impl FnMut(u32) -> u64) {
        let mut left = self.misses.saturating_mul(AROUND_STEP).min(AROUND_LIMIT);
        self.misses += 1;
        for distance in 0..AROUND_REACH {
            let behind = chunks.end.checked_add(distance).filter(|chunk| *chunk < all);
            let before = chunks.start.checked_sub(distance + 1);
            for chunk in [behind, before].into_iter().flatten() {
                if left == 0 {
                    return;
                }
                left = left.saturating_sub(want(chunk));
            }
        }
    }
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct ReadAhead {
    max_window: u64,
    streams: Vec<Stream>,
    clock: u64,
}

#[derive(Debug, Clone, Copy)]
struct Stream {
    /// The chunk that comes next if the reader goes on.
    next: u32,
    /// One past the last chunk that was asked for ahead.
    ahead: u32,
    window: u64,
    max_window: u64,
    used: u64,
}

impl ReadAhead {
    pub(super) fn new(max_window: u64) -> Self {
        Self { max_window, streams: Vec::new(), clock: 0 }
    }

    /// A reader has reached chunks of a layer of `chunks` for the first time, in one read. Gives those that are worth
    /// fetching now.
    pub(super) fn reached(
        &mut self,
        read: Range<u32>,
        reach: Reach,
        chunks: u32,
        size_of: impl Fn(u32) -> u64,
    ) -> Option<Range<u32>> {
        if self.max_window == 0 {
            return None;
        }
        self.clock += 1;
        let (clock, after) = (self.clock, read.end);
        let goes_on = |stream: &&mut Stream| (stream.next..=stream.ahead.max(stream.next)).contains(&read.start);
        let Some(stream) = self.streams.iter_mut().find(goes_on) else {
            let max_window = match reach {
                Reach::Hit => return None,
                Reach::Miss(Cause::Metadata) => self.max_window.min(METADATA_WINDOW),
                Reach::Miss(_) => self.max_window,
            };
            let fresh = Stream { next: after, ahead: after, window: 0, max_window, used: clock };
            if self.streams.len() < STREAMS {
                self.streams.push(fresh);
            } else if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.used) {
                *oldest = fresh;
            }
            return None;
        };
        stream.used = clock;
        stream.next = after;
        stream.ahead = stream.ahead.max(after);
        let left: u64 = (after..stream.ahead).map(&size_of).sum();
        if left * 2 > stream.window {
            return None;
        }
        stream.window = (stream.window * 2).clamp(FIRST_WINDOW.min(stream.max_window), stream.max_window);
        let from = stream.ahead;
        let mut bytes = left;
        while stream.ahead < chunks && (bytes < stream.window) {
            bytes += size_of(stream.ahead);
            stream.ahead += 1;
        }
        (from < stream.ahead).then_some(from..stream.ahead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const READ: Reach = Reach::Miss(Cause::Read);

    fn reach(ahead: &mut ReadAhead, chunk: u32) -> Option<Range<u32>> {
        ahead.reached(chunk..chunk + 1, READ, 1000, |_| MIB)
    }

    #[test]
    fn a_reader_that_moves_forward_is_kept_ahead_of_in_growing_steps() {
        let mut ahead = ReadAhead::new(8 * MIB);
        let mut fetched = Vec::new();
        for chunk in 10..40 {
            if let Some(range) = reach(&mut ahead, chunk) {
                assert_eq!(range.start, fetched.last().map_or(12, |last: &Range<u32>| last.end), "a gap or an overlap");
                assert!(range.start > chunk);
                assert!(range.end <= chunk + 1 + 8, "{range:?} is more than the window ahead of {chunk}");
                fetched.push(range);
            }
        }
        assert_eq!(fetched[..3], [12..13, 13..15, 15..18]);
        assert!(fetched.last().unwrap().end >= 44);
    }

    #[test]
    fn readers_that_jump_are_left_alone() {
        let mut ahead = ReadAhead::new(8 * MIB);
        for chunk in [5, 300, 7, 100, 50, 9, 800, 20, 400, 3, 600, 41] {
            assert_eq!(reach(&mut ahead, chunk), None, "chunk {chunk}");
        }
    }

    #[test]
    fn several_readers_are_told_apart() {
        let mut ahead = ReadAhead::new(8 * MIB);
        for step in 0..3 {
            for reader in 0..8 {
                let range = reach(&mut ahead, reader * 100 + step);
                assert_eq!(range.is_some(), step > 0, "reader {reader} at step {step}");
            }
        }
    }

    #[test]
    fn one_large_read_is_no_stream_but_two_are() {
        let mut ahead = ReadAhead::new(8 * MIB);
        assert_eq!(ahead.reached(10..30, READ, 1000, |_| MIB / 64), None);
        assert_eq!(ahead.reached(30..34, READ, 1000, |_| MIB / 64), Some(34..98));
    }

    #[test]
    fn what_is_here_begins_nothing_but_is_gone_on_with() {
        let mut ahead = ReadAhead::new(8 * MIB);
        for chunk in 0..20 {
            assert_eq!(ahead.reached(chunk..chunk + 1, Reach::Hit, 1000, |_| MIB), None);
        }
        assert_eq!(reach(&mut ahead, 20), None);
        assert_eq!(ahead.reached(21..22, Reach::Hit, 1000, |_| MIB), Some(22..23));
    }

    #[test]
    fn readers_of_metadata_are_kept_little_ahead_of() {
        let mut ahead = ReadAhead::new(8 * MIB);
        let mut last = 0;
        for chunk in 10..40 {
            if let Some(range) = ahead.reached(chunk..chunk + 1, Reach::Miss(Cause::Metadata), 1000, |_| MIB / 8) {
                last = range.end;
                assert!(last <= chunk + 1 + 4, "{range:?} is too far ahead of {chunk}");
            }
        }
        assert!(last > 40);
    }

    #[test]
    fn the_end_is_the_end() {
        let mut ahead = ReadAhead::new(8 * MIB);
        assert_eq!(ahead.reached(7..8, READ, 10, |_| MIB / 4), None);
        assert_eq!(ahead.reached(8..9, READ, 10, |_| MIB / 4), Some(9..10));
        assert_eq!(ahead.reached(9..10, READ, 10, |_| MIB / 4), None);
    }

    #[test]
    fn the_more_misses_the_more_is_fetched_around_them() {
        let mut around = Around::default();
        let mut missed = |chunks: Range<u32>, all| {
            let mut wanted = Vec::new();
            around.missed(chunks, all, |chunk| {
                wanted.push(chunk);
                // Every fifth chunk is here.
                if chunk.is_multiple_of(5) { 0 } else { 100 << 10 }
            });
            wanted
        };
        assert!(missed(50..51, 100).is_empty());
        assert_eq!(missed(50..51, 100), [51]);
        assert_eq!(missed(50..52, 100), [52, 49]);
        assert_eq!(missed(54..55, 100), [55, 53, 56]);
        assert_eq!(missed(0..1, 3), [1, 2]);
        for _ in 0..20 {
            missed(0..100, 100);
        }
        assert_eq!(missed(50..51, 100), [51, 49, 52, 48, 53, 47]);
    }

    #[test]
    fn it_can_be_switched_off() {
        let mut ahead = ReadAhead::new(0);
        assert!((0..20).all(|chunk| reach(&mut ahead, chunk).is_none()));
    }
}
