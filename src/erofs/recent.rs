//! The parts of images that this thread read last.
//!
//! Inodes, names and attributes are a few bytes each and lie close together; asking the source for each of them costs
//! more than everything that is then done with them. A source never changes the bytes it has once given
//! ([`ReadAt`]), so what was read stays true for as long as its image is open. Bounded: [`SLOTS`] parts of [`PART`]
//! bytes a thread, whatever the number of images.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::model::{ReadAt, ReadAtError};

/// Bytes of a part. Of 2, 4, 8 and 16 KiB all but the first made a walk over 23,669 files read its source fewer than 1,500
/// times instead of 39,054 times; larger ones only copy more.
const PART: usize = 4096;

/// Parts that a thread keeps: 128 KiB. A step of a walk over 10 merged layers touches two in each.
const SLOTS: usize = 32;

/// Numbers the sources of a process, so that no two of them are taken for each other.
static NEXT: AtomicU64 = AtomicU64::new(1);

thread_local! {
    static PARTS: RefCell<Vec<Part>> = const { RefCell::new(Vec::new()) };
}

/// One of the sources that this process has opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SourceId(u64);

struct Part {
    of: Option<(SourceId, u64)>,
    bytes: Box<[u8; PART]>,
    len: usize,
}

impl SourceId {
    pub(super) fn new() -> Self {
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }

    fn slot(self, number: u64) -> usize {
        // Neighbours of one source never collide, and sources start at different slots.
        usize::try_from(number.wrapping_add(self.0.wrapping_mul(7)) % SLOTS as u64).unwrap_or(0)
    }
}

/// Fills `buf` from `offset` of `source`, which has `size` bytes and is known as `id`, by way of the parts that were
/// read last if it is small enough to gain by it.
pub(super) fn read(
    id: SourceId,
    source: &impl ReadAt,
    size: u64,
    offset: u64,
    buf: &mut [u8],
) -> Result<(), ReadAtError> {
    let part = PART as u64;
    let end = offset.saturating_add(buf.len() as u64);
    if buf.is_empty() || buf.len() > PART / 2 || end > size || (end - 1) / part != offset / part {
        return source.read_exact_at(offset, buf);
    }
    let (number, within) = (offset / part, usize::try_from(offset % part).unwrap_or(0));
    let answered = PARTS.with(|parts| {
        // Busy if the source itself reads an image on this thread.
        let mut parts = parts.try_borrow_mut().ok()?;
        if parts.is_empty() {
            parts.resize_with(SLOTS, || Part { of: None, bytes: Box::new([0; PART]), len: 0 });
        }
        let kept = parts.get_mut(id.slot(number))?;
        if kept.of != Some((id, number)) {
            kept.of = None;
            kept.len = usize::try_from((size - number * part).min(part)).unwrap_or(PART);
            // Parts of it may be absent that nobody has asked for.
            source.read_exact_at(number * part, kept.bytes.get_mut(..kept.len)?).ok()?;
            kept.of = Some((id, number));
        }
        buf.copy_from_slice(kept.bytes.get(..kept.len)?.get(within..within + buf.len())?);
        Some(())
    });
    match answered {
        Some(()) => Ok(()),
        None => source.read_exact_at(offset, buf),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::model::ByteRange;

    /// Bytes that count how often they are asked for; some of them are absent.
    struct Counted {
        bytes: Vec<u8>,
        absent: ByteRange,
        asked: AtomicUsize,
    }

    impl Counted {
        fn new(first: u8, len: usize, absent: ByteRange) -> Self {
            Self {
                bytes: (0..len).map(|at| first ^ u8::try_from(at % 251).unwrap()).collect(),
                absent,
                asked: AtomicUsize::new(0),
            }
        }

        fn asked(&self) -> usize {
            self.asked.load(Ordering::Relaxed)
        }
    }

    impl ReadAt for Counted {
        fn size(&self) -> u64 {
            self.bytes.len() as u64
        }

        fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), ReadAtError> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            let range = ByteRange::at(offset, buf.len() as u64).unwrap();
            match self.absent.intersection(range) {
                Some(absent) if !absent.is_empty() => Err(ReadAtError::Absent(range)),
                _ => self.bytes[..].read_exact_at(offset, buf),
            }
        }
    }

    fn take(id: SourceId, source: &Counted, offset: u64, len: usize) -> Option<Vec<u8>> {
        let mut buf = vec![0; len];
        read(id, source, source.size(), offset, &mut buf).ok().map(|()| buf)
    }

    #[test]
    fn neighbours_are_read_once() {
        let (a, b) = (Counted::new(0, 9000, ByteRange::to(0)), Counted::new(0x80, 9000, ByteRange::to(0)));
        let (of_a, of_b) = (SourceId::new(), SourceId::new());
        for _ in 0..2 {
            for (offset, len) in [(0, 64), (64, 32), (4000, 96), (4096, 64), (8990, 10), (3, 2048), (0, 0)] {
                let range = offset..offset + len;
                assert_eq!(take(of_a, &a, offset as u64, len).unwrap(), a.bytes[range.clone()], "{offset} {len}");
                assert_eq!(take(of_b, &b, offset as u64, len).unwrap(), b.bytes[range], "{offset} {len}");
            }
        }
        // Three parts, and twice what is empty.
        assert_eq!((a.asked(), b.asked()), (5, 5));
    }

    #[test]
    fn what_is_large_or_on_a_border_is_read_as_it_is_asked_for() {
        let source = Counted::new(0, 9000, ByteRange::to(0));
        let id = SourceId::new();
        for (offset, len) in [(0, 2049), (4090, 10), (0, 9000), (8999, 1)] {
            assert_eq!(take(id, &source, offset as u64, len).unwrap(), source.bytes[offset..offset + len]);
        }
        assert_eq!(source.asked(), 4);
        assert_eq!((take(id, &source, 8999, 2), take(id, &source, u64::MAX - 1, 1)), (None, None));
    }

    #[test]
    fn nobody_waits_for_neighbours_that_are_absent() {
        let source = Counted::new(0, 9000, ByteRange::new(100, 200).unwrap());
        let id = SourceId::new();
        assert_eq!(take(id, &source, 0, 64).unwrap(), source.bytes[..64]);
        let mut buf = [0; 64];
        let absent = ByteRange::new(128, 192).unwrap();
        assert!(matches!(
            read(id, &source, 9000, 128, &mut buf),
            Err(ReadAtError::Absent(range)) if range == absent
        ));
    }

    #[test]
    fn more_sources_than_there_are_slots() {
        let sources: Vec<(SourceId, Counted)> = (0..u8::try_from(3 * SLOTS).unwrap())
            .map(|first| (SourceId::new(), Counted::new(first, 100, ByteRange::to(0))))
            .collect();
        for _ in 0..3 {
            for (id, source) in &sources {
                assert_eq!(take(*id, source, 10, 20).unwrap(), source.bytes[10..30]);
            }
        }
    }
}
