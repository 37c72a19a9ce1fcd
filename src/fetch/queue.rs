//! What is wanted, what is under way, who waits for it. No I/O, no time: decisions only.
//!
//! A chunk that anybody wants has one entry from the first wish until it has landed or failed, so nothing is fetched
//! twice at the same time. A queued chunk leaves as part of a flight: a run of neighbours that one request brings.

use std::collections::{BTreeSet, HashMap};

use super::Cause;

/// Names a layer within one fetcher.
pub(super) type LayerId = u32;

/// A chunk of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) layer: LayerId,
    pub(super) chunk: u32,
}

/// A run of chunks that one request brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Flight {
    pub(super) id: u64,
    pub(super) layer: LayerId,
    /// First chunk.
    pub(super) first: u32,
    /// One past the last.
    pub(super) end: u32,
    /// The most urgent wish among them.
    pub(super) cause: Cause,
    /// How often the bytes of its chunk were wrong. Only flights of one chunk have an attempt above 0.
    pub(super) attempt: u32,
}

#[derive(Debug)]
struct Entry<W> {
    place: Place,
    cause: Cause,
    attempt: u32,
    waiters: Vec<W>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Queued { seq: u64 },
    Flying { flight: u64 },
}

/// What the queue has to know about chunks to join them.
pub(super) trait Layout {
    /// Where the chunk lies in its blob: start and end.
    fn blob_range(&self, key: Key) -> Option<(u64, u64)>;

    /// How many bytes a chunk may lie behind what its background flight reads now before somebody who waits for it
    /// gets a request of his own.
    fn patience(&self) -> u64;
}

/// How far a background flight is.
#[derive(Debug, Clone, Copy)]
struct Progress {
    layer: LayerId,
    /// The chunk that it reads now.
    now: u32,
    end: u32,
    /// False if it has begun a chunk since somebody looked.
    looked_at: bool,
}

/// See the module's description. `W` is who waits.
#[derive(Debug)]
pub(super) struct Queue<W> {
    entries: HashMap<Key, Entry<W>>,
    order: BTreeSet<(Cause, u64, Key)>,
    /// Flights for what nobody waits for.
    background: HashMap<u64, Progress>,
    next: u64,
}

impl<W> Queue<W> {
    pub(super) fn new() -> Self {
        Self { entries: HashMap::new(), order: BTreeSet::new(), background: HashMap::new(), next: 0 }
    }

    fn tick(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Adds a wish. A chunk that is queued for a lesser cause moves up; one that travels far behind in a background
    /// flight is queued again for whoever waits for it now. True if the chunk was not wanted before.
    pub(super) fn want(&mut self, layout: &impl Layout, key: Key, cause: Cause, waiter: Option<W>) -> bool {
        let seq = self.tick();
        if let Some(entry) = self.entries.get_mut(&key) {
            entry.waiters.extend(waiter);
            if cause >= entry.cause {
                return false;
            }
            match entry.place {
                Place::Queued { seq: old } => {
                    self.order.remove(&(entry.cause, old, key));
                    self.order.insert((cause, seq, key));
                    entry.place = Place::Queued { seq };
                }
                Place::Flying { flight } if cause.is_demand() => {
                    let start = |chunk| layout.blob_range(Key { chunk, ..key }).map(|(start, _)| start);
                    let now = self.background.get(&flight).and_then(|progress| start(progress.now));
                    if now.zip(start(key.chunk)).is_some_and(|(now, then)| then.saturating_sub(now) > layout.patience())
                    {
                        self.order.insert((cause, seq, key));
                        entry.place = Place::Queued { seq };
                    }
                }
                Place::Flying { .. } => {}
            }
            entry.cause = cause;
            return false;
        }
        let place = Place::Queued { seq };
        self.entries.insert(key, Entry { place, cause, attempt: 0, waiters: waiter.into_iter().collect() });
        self.order.insert((cause, seq, key));
        true
    }

    /// True if the chunk is wanted or on its way.
    pub(super) fn knows(&self, key: Key) -> bool {
        self.entries.contains_key(&key)
    }

    /// The cause of the most urgent queued wish.
    pub(super) fn most_urgent(&self) -> Option<Cause> {
        self.order.first().map(|(cause, ..)| *cause)
    }

    /// Takes the most urgent queued chunk and those of its queued neighbours that one request of at most `max_bytes`
    /// brings along. Neighbours before it join only if they are as urgent, since they would delay it; neighbours
    /// behind it join whatever their cause, except that nothing but a fill takes along what only fills want.
    pub(super) fn take_flight(&mut self, layout: &impl Layout, max_bytes: impl Fn(Cause) -> u64) -> Option<Flight> {
        let (cause, _, key) = *self.order.first()?;
        let id = self.tick();
        let attempt = self.entries.get(&key)?.attempt;
        let (mut first, mut end) = (key.chunk, key.chunk.saturating_add(1));
        if attempt == 0
            && let Some((mut start, mut stop)) = layout.blob_range(key)
        {
            let max = max_bytes(cause);
            let joins = |queue: &Self, neighbour: Key, before: bool| {
                queue.entries.get(&neighbour).is_some_and(|entry| {
                    let fits =
                        if before { entry.cause <= cause } else { entry.cause < Cause::Fill || cause == Cause::Fill };
                    fits && entry.attempt == 0 && matches!(entry.place, Place::Queued { .. })
                })
            };
            while let Some(chunk) = first.checked_sub(1) {
                let neighbour = Key { chunk, ..key };
                match layout.blob_range(neighbour) {
                    Some((s, e)) if e == start && stop - s <= max && joins(self, neighbour, true) => start = s,
                    _ => break,
                }
                first = chunk;
            }
            loop {
                let neighbour = Key { chunk: end, ..key };
                match layout.blob_range(neighbour) {
                    Some((s, e)) if s == stop && e - start <= max && joins(self, neighbour, false) => stop = e,
                    _ => break,
                }
                end += 1;
            }
        }
        for chunk in first..end {
            let key = Key { chunk, ..key };
            if let Some(entry) = self.entries.get_mut(&key) {
                if let Place::Queued { seq } = entry.place {
                    self.order.remove(&(entry.cause, seq, key));
                }
                entry.place = Place::Flying { flight: id };
            }
        }
        if !cause.is_demand() {
            self.background.insert(id, Progress { layer: key.layer, now: first, end, looked_at: false });
        }
        Some(Flight { id, layer: key.layer, first, end, cause, attempt })
    }

    /// True if `key` is still to be brought by `flight`.
    pub(super) fn belongs(&self, key: Key, flight: u64) -> bool {
        self.entries.get(&key).is_some_and(|entry| entry.place == Place::Flying { flight })
    }

    /// Takes note that `flight` reads `chunk` now. False if it should not: somebody else brings that chunk.
    pub(super) fn advance(&mut self, flight: &Flight, chunk: u32) -> bool {
        if let Some(progress) = self.background.get_mut(&flight.id) {
            progress.now = chunk;
            progress.looked_at = false;
        }
        self.belongs(Key { layer: flight.layer, chunk }, flight.id)
    }

    /// True if somebody waits for one of the chunks from `next` on that `flight` still brings.
    pub(super) fn is_awaited(&self, flight: &Flight, next: u32) -> bool {
        (next..flight.end).any(|chunk| {
            let entry = self.entries.get(&Key { layer: flight.layer, chunk });
            entry.is_some_and(|entry| entry.place == Place::Flying { flight: flight.id } && entry.cause.is_demand())
        })
    }

    /// Queues again what somebody waits for and what travels in a background flight that has not begun another chunk
    /// since this was called before. True if there was anything.
    pub(super) fn overtake_stalled(&mut self) -> bool {
        let mut stalled = Vec::new();
        for (id, progress) in &mut self.background {
            if std::mem::replace(&mut progress.looked_at, true) {
                stalled.push((*id, *progress));
            }
        }
        let mut any = false;
        for (id, Progress { layer, now, end, .. }) in stalled {
            for chunk in now..end {
                let (seq, key) = (self.tick(), Key { layer, chunk });
                if let Some(entry) = self.entries.get_mut(&key)
                    && entry.place == (Place::Flying { flight: id })
                    && entry.cause.is_demand()
                {
                    entry.place = Place::Queued { seq };
                    self.order.insert((entry.cause, seq, key));
                    any = true;
                }
            }
        }
        any
    }

    /// `flight` ends before it has brought the chunks from `next` on: those that were left to it are queued again.
    pub(super) fn requeue(&mut self, flight: &Flight, next: u32) {
        for chunk in next..flight.end {
            let (seq, key) = (self.tick(), Key { layer: flight.layer, chunk });
            if let Some(entry) = self.entries.get_mut(&key)
                && entry.place == (Place::Flying { flight: flight.id })
            {
                entry.place = Place::Queued { seq };
                self.order.insert((entry.cause, seq, key));
            }
        }
    }

    /// `flight` is over.
    pub(super) fn landed(&mut self, flight: &Flight) {
        self.background.remove(&flight.id);
    }

    /// The chunk is there, or will not come: gives back who waits for it.
    pub(super) fn settle(&mut self, key: Key) -> Vec<W> {
        let Some(entry) = self.entries.remove(&key) else { return Vec::new() };
        if let Place::Queued { seq } = entry.place {
            self.order.remove(&(entry.cause, seq, key));
        }
        entry.waiters
    }

    /// The chunk came with wrong bytes: queues it once more, alone. False if it was wanted that often already, or is
    /// not wanted at all.
    pub(super) fn again(&mut self, key: Key, max_attempts: u32) -> bool {
        let seq = self.tick();
        let Some(entry) = self.entries.get_mut(&key) else { return false };
        if entry.attempt + 1 >= max_attempts {
            return false;
        }
        entry.attempt += 1;
        entry.place = Place::Queued { seq };
        self.order.insert((entry.cause, seq, key));
        true
    }

    /// Everybody who waits.
    pub(super) fn waiters(&self) -> impl Iterator<Item = &W> {
        self.entries.values().flat_map(|entry| &entry.waiters)
    }

    /// How many chunks of `layer` are wanted or on their way.
    pub(super) fn wanted(&self, layer: LayerId) -> usize {
        self.entries.keys().filter(|key| key.layer == layer).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chunks of ten bytes, with a gap before every chunk whose number is a multiple of 100.
    struct Tens;

    impl Layout for Tens {
        fn blob_range(&self, key: Key) -> Option<(u64, u64)> {
            let start = u64::from(key.chunk) * 10 + u64::from(key.chunk / 100) * 5;
            (key.chunk < 1000).then_some((start, start + 10))
        }

        fn patience(&self) -> u64 {
            u64::MAX
        }
    }

    fn key(chunk: u32) -> Key {
        Key { layer: 1, chunk }
    }

    fn take(queue: &mut Queue<u32>, max: u64) -> Option<(u32, u32, Cause)> {
        queue.take_flight(&Tens, |_| max).map(|flight| (flight.first, flight.end, flight.cause))
    }

    #[test]
    fn urgency_comes_before_age_and_age_before_nothing() {
        let mut queue = Queue::<u32>::new();
        for (chunk, cause) in
            [(10, Cause::Fill), (20, Cause::Read), (30, Cause::ReadAhead), (40, Cause::Read), (50, Cause::Metadata)]
        {
            assert!(queue.want(&Tens, key(chunk), cause, None));
        }
        let order: Vec<u32> = std::iter::from_fn(|| take(&mut queue, 10)).map(|(first, ..)| first).collect();
        assert_eq!(order, [20, 40, 50, 30, 10]);
    }

    #[test]
    fn a_wish_moves_a_queued_chunk_up_and_joins_a_flying_one() {
        let mut queue = Queue::new();
        queue.want(&Tens, key(1), Cause::Read, Some(1));
        queue.want(&Tens, key(5), Cause::Fill, Some(2));
        assert!(!queue.want(&Tens, key(5), Cause::Read, Some(3)));
        assert_eq!(take(&mut queue, 10), Some((1, 2, Cause::Read)));
        assert!(!queue.want(&Tens, key(1), Cause::Fill, Some(4)));
        assert_eq!(take(&mut queue, 10), Some((5, 6, Cause::Read)));
        assert_eq!(take(&mut queue, 10), None);
        assert_eq!(queue.settle(key(1)), [1, 4]);
        assert_eq!(queue.settle(key(5)), [2, 3]);
        assert!(queue.settle(key(5)).is_empty());
        assert!(!queue.knows(key(5)));
    }

    #[test]
    fn neighbours_travel_together_up_to_the_limit() {
        let mut queue = Queue::new();
        for chunk in [3, 4, 5, 6, 7, 8, 11] {
            queue.want(&Tens, key(chunk), Cause::Read, Some(chunk));
        }
        assert_eq!(take(&mut queue, 40), Some((3, 7, Cause::Read)));
        assert_eq!(take(&mut queue, 40), Some((7, 9, Cause::Read)));
        assert_eq!(take(&mut queue, 40), Some((11, 12, Cause::Read)));
        queue.want(&Tens, key(99), Cause::Read, None);
        queue.want(&Tens, key(100), Cause::Read, None);
        assert_eq!(take(&mut queue, 1000), Some((99, 100, Cause::Read)), "joined over a gap");
        assert_eq!(take(&mut queue, 1), Some((100, 101, Cause::Read)), "a chunk above the limit never leaves");
    }

    #[test]
    fn the_less_urgent_never_delays_the_more_urgent() {
        let mut queue = Queue::<u32>::new();
        for chunk in 0..3 {
            queue.want(&Tens, key(chunk), Cause::ReadAhead, None);
        }
        queue.want(&Tens, key(3), Cause::Read, None);
        queue.want(&Tens, key(4), Cause::ReadAhead, None);
        queue.want(&Tens, key(5), Cause::Fill, None);
        assert_eq!(take(&mut queue, 1000), Some((3, 5, Cause::Read)));
        assert_eq!(take(&mut queue, 1000), Some((0, 3, Cause::ReadAhead)));
        assert_eq!(take(&mut queue, 1000), Some((5, 6, Cause::Fill)));
    }

    #[test]
    fn as_urgent_ones_before_join() {
        let mut queue = Queue::<u32>::new();
        for chunk in [12, 11, 10] {
            queue.want(&Tens, key(chunk), Cause::Read, None);
        }
        assert_eq!(take(&mut queue, 1000), Some((10, 13, Cause::Read)));
    }

    /// Chunks of 100 KiB.
    struct Large;

    impl Layout for Large {
        fn blob_range(&self, key: Key) -> Option<(u64, u64)> {
            Some((u64::from(key.chunk) * 102_400, u64::from(key.chunk + 1) * 102_400))
        }

        fn patience(&self) -> u64 {
            256 << 10
        }
    }

    #[test]
    fn whoever_waits_does_not_wait_for_a_long_background_flight() {
        let mut queue = Queue::new();
        for chunk in 0..10 {
            queue.want(&Large, key(chunk), Cause::Fill, Some(chunk));
        }
        let long = queue.take_flight(&Large, |_| u64::MAX).unwrap();
        assert_eq!((long.first, long.end), (0, 10));
        assert!(queue.advance(&long, 3));
        assert!(!queue.is_awaited(&long, 3));
        queue.want(&Large, key(5), Cause::Read, Some(50));
        assert!(queue.is_awaited(&long, 3), "a chunk that comes soon is waited for");
        assert_eq!(queue.most_urgent(), None);
        queue.want(&Large, key(7), Cause::Read, Some(70));
        let own = queue.take_flight(&Large, |_| u64::MAX).unwrap();
        assert_eq!((own.first, own.end, own.cause), (7, 8, Cause::Read));
        assert!(queue.advance(&long, 6));
        assert!(!queue.advance(&long, 7), "brings what somebody else brings");
        queue.requeue(&long, 7);
        queue.landed(&long);
        let rest = queue.take_flight(&Large, |_| u64::MAX).unwrap();
        assert_eq!((rest.first, rest.end, rest.cause), (8, 10, Cause::Fill));
        assert_eq!(queue.settle(key(7)), [7, 70]);
    }

    #[test]
    fn whoever_waits_does_not_wait_for_a_flight_that_stalls() {
        let mut queue = Queue::<u32>::new();
        for chunk in 0..10 {
            queue.want(&Large, key(chunk), Cause::Fill, None);
        }
        let stalled = queue.take_flight(&Large, |_| u64::MAX).unwrap();
        assert!(queue.advance(&stalled, 3));
        queue.want(&Large, key(4), Cause::Read, None);
        assert!(!queue.overtake_stalled(), "it has had no time to stall");
        assert!(queue.advance(&stalled, 4));
        assert!(!queue.overtake_stalled(), "it goes on");
        assert!(queue.overtake_stalled());
        let own = queue.take_flight(&Large, |_| u64::MAX).unwrap();
        assert_eq!((own.first, own.end, own.cause), (4, 5, Cause::Read));
        assert!(!queue.overtake_stalled());
        assert!(queue.belongs(key(5), stalled.id) && !queue.belongs(key(4), stalled.id));
    }

    #[test]
    fn whoever_waits_never_takes_chunks_from_another_who_waits() {
        let mut queue = Queue::<u32>::new();
        for chunk in 0..10 {
            queue.want(&Large, key(chunk), Cause::Metadata, None);
        }
        let flight = queue.take_flight(&Large, |_| u64::MAX).unwrap();
        queue.want(&Large, key(9), Cause::Read, None);
        assert!(queue.belongs(key(9), flight.id));
    }

    #[test]
    fn layers_are_not_mixed() {
        let mut queue = Queue::<u32>::new();
        queue.want(&Tens, Key { layer: 1, chunk: 1 }, Cause::Read, None);
        queue.want(&Tens, Key { layer: 2, chunk: 2 }, Cause::Read, None);
        assert_eq!(take(&mut queue, 1000), Some((1, 2, Cause::Read)));
        assert_eq!((queue.wanted(1), queue.wanted(2), queue.wanted(3)), (1, 1, 0));
    }

    #[test]
    fn a_second_attempt_travels_alone_and_is_the_last() {
        let mut queue = Queue::new();
        for chunk in 1..4 {
            queue.want(&Tens, key(chunk), Cause::Read, Some(chunk));
        }
        let flight = queue.take_flight(&Tens, |_| 1000).unwrap();
        assert!(queue.belongs(key(2), flight.id));
        assert!(queue.again(key(2), 2));
        assert!(!queue.belongs(key(2), flight.id));
        queue.want(&Tens, key(4), Cause::Read, None);
        let second = queue.take_flight(&Tens, |_| 1000).unwrap();
        assert_eq!((second.first, second.end, second.attempt), (2, 3, 1));
        assert!(!queue.again(key(2), 2), "a third attempt");
        assert_eq!(queue.settle(key(2)), [2]);
        assert!(!queue.again(key(2), 2), "a chunk nobody wants was queued");
    }
}
