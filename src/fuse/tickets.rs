//! Answers that wait for bytes.
//!
//! A request that meets absent bytes leaves its reply in a ticket and gives its thread back. The ticket is redeemed
//! once: by whoever brought the bytes, by its deadline, by the death of the program that asked, or by the loss of the one
//! who should have brought them.
//!
//! A killed program that waits for an answer is not gone before it has one, and the kernel's word that it was killed
//! (`FUSE_INTERRUPT`) does not get through to this program. So whoever waits for long is looked at now and then.
//!
//! Lock order: the table of deadlines, then a ticket's state; the ticket's action runs with neither held.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crate::sys::is_dying;
use crate::vfs::BringError;

/// Why a ticket is redeemed.
#[derive(Debug)]
pub(super) enum Verdict {
    /// The bytes are there.
    Arrived,
    /// They will not come.
    Failed(BringError),
    /// Whoever was asked for them dropped the question.
    Forgotten,
    /// Its time is over.
    Expired,
    /// Whoever asked was killed.
    Abandoned,
    /// Nobody will wait any more.
    Closed,
}

/// What is done when a ticket is redeemed.
pub(super) type Action = Box<dyn FnOnce(Verdict) + Send>;

enum State {
    /// The bytes are being asked for; nothing waits yet.
    Asking,
    /// The answer came before anything waited.
    Early(Verdict),
    /// An action waits.
    Waiting(Action),
    /// Redeemed.
    Over,
}

/// One wait for one range of bytes.
pub(super) struct Ticket(Mutex<State>);

/// The other end of a ticket: redeems it, also when it is dropped.
pub(super) struct Redeemer(Arc<Ticket>);

impl Ticket {
    pub(super) fn new() -> (Arc<Self>, Redeemer) {
        let ticket = Arc::new(Self(Mutex::new(State::Asking)));
        (Arc::clone(&ticket), Redeemer(ticket))
    }

    /// Lets the action that `make` makes of `parcel` wait, unless the verdict is there already: then it is given back
    /// together with the parcel.
    pub(super) fn park<T>(&self, parcel: T, make: impl FnOnce(T) -> Action) -> Option<(Verdict, T)> {
        let mut state = self.state();
        match mem::replace(&mut *state, State::Over) {
            State::Early(verdict) => Some((verdict, parcel)),
            _ => {
                *state = State::Waiting(make(parcel));
                None
            }
        }
    }

    fn redeem(&self, verdict: Verdict) {
        let action = {
            let mut state = self.state();
            match mem::replace(&mut *state, State::Over) {
                State::Waiting(action) => action,
                State::Asking => {
                    *state = State::Early(verdict);
                    return;
                }
                // Only the first verdict counts.
                State::Early(first) => {
                    *state = State::Early(first);
                    return;
                }
                State::Over => return,
            }
        };
        action(verdict);
    }

    /// No code runs while the lock is held that could panic half-way.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Redeemer {
    pub(super) fn redeem(self, result: Result<(), BringError>) {
        self.0.redeem(match result {
            Ok(()) => Verdict::Arrived,
            Err(error) => Verdict::Failed(error),
        });
    }
}

impl Drop for Redeemer {
    fn drop(&mut self) {
        // After `redeem` the ticket is over and this says nothing.
        self.0.redeem(Verdict::Forgotten);
    }
}

/// Watches over the deadlines of tickets, from one thread that sleeps until the next one.
pub(super) struct Deadlines(Arc<Shared>);

/// How often those who wait are looked at, and how long they wait before they are looked at for the first time: what a
/// person who presses Ctrl-C does not mind.
const LOOK: Duration = Duration::from_millis(500);

struct Shared {
    table: Mutex<Table>,
    changed: Condvar,
    /// True for the thread of a program that was killed.
    is_dying: fn(u32) -> bool,
}

struct Waiting {
    ticket: Weak<Ticket>,
    /// The thread of the program that waits, 0 if that is not known.
    caller: u32,
    since: Instant,
}

#[derive(Default)]
struct Table {
    /// When, and which of those at the same moment.
    waiting: BTreeMap<(Instant, u64), Waiting>,
    next: u64,
    closed: bool,
    over: bool,
}

impl Deadlines {
    pub(super) fn start() -> std::io::Result<Self> {
        Self::start_with(is_dying)
    }

    fn start_with(is_dying: fn(u32) -> bool) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { table: Mutex::default(), changed: Condvar::new(), is_dying });
        let watched = Arc::clone(&shared);
        thread::Builder::new().name("fuse-deadlines".into()).spawn(move || watched.watch())?;
        Ok(Self(shared))
    }

    /// Redeems `ticket` with [`Verdict::Expired`] at `deadline`, or with [`Verdict::Abandoned`] soon after thread `caller`
    /// was killed, if nobody did before. Drop the guard when it is redeemed.
    pub(super) fn watch(&self, ticket: &Arc<Ticket>, caller: u32, deadline: Instant) -> Watch {
        let mut table = self.0.table();
        if table.closed {
            drop(table);
            ticket.redeem(Verdict::Closed);
            table = self.0.table();
        }
        table.next += 1;
        let key = (deadline, table.next);
        let is_first = table.waiting.first_key_value().is_none_or(|(first, _)| key < *first);
        table.waiting.insert(key, Waiting { ticket: Arc::downgrade(ticket), caller, since: Instant::now() });
        drop(table);
        if is_first {
            self.0.changed.notify_one();
        }
        Watch { shared: Arc::clone(&self.0), key }
    }

    /// Redeems every ticket that waits, and from now on every new one at once.
    pub(super) fn close(&self) {
        let waiting = {
            let mut table = self.0.table();
            table.closed = true;
            mem::take(&mut table.waiting)
        };
        for ticket in waiting.into_values().filter_map(|waiting| waiting.ticket.upgrade()) {
            ticket.redeem(Verdict::Closed);
        }
    }

    /// How many tickets wait.
    pub(super) fn waiting(&self) -> usize {
        self.0.table().waiting.len()
    }
}

impl Drop for Deadlines {
    fn drop(&mut self) {
        self.0.table().over = true;
        self.0.changed.notify_one();
    }
}

/// A ticket under watch.
pub(super) struct Watch {
    shared: Arc<Shared>,
    key: (Instant, u64),
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _gone = self.shared.table().waiting.remove(&self.key);
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn watch(&self) {
        let mut table = self.table();
        let mut look = Instant::now() + LOOK;
        while !table.over {
            let now = Instant::now();
            let Some(key) = table.waiting.first_key_value().map(|(key, _)| *key) else {
                table = self.changed.wait(table).unwrap_or_else(PoisonError::into_inner);
                look = Instant::now() + LOOK;
                continue;
            };
            let mut redeemed = Vec::new();
            if key.0 <= now {
                redeemed.extend(table.waiting.remove(&key).map(|waiting| (waiting.ticket, Verdict::Expired)));
            } else if look <= now {
                look = now + LOOK;
                let callers = table.long_waiting(now);
                drop(table);
                let dying: BTreeSet<u32> = callers.into_iter().filter(|caller| (self.is_dying)(*caller)).collect();
                table = self.table();
                redeemed = table.take_callers(&dying).map(|ticket| (ticket, Verdict::Abandoned)).collect();
            } else {
                let until = key.0.min(look) - now;
                (table, _) = self.changed.wait_timeout(table, until).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            drop(table);
            for (ticket, verdict) in redeemed {
                if let Some(ticket) = ticket.upgrade() {
                    ticket.redeem(verdict);
                }
            }
            table = self.table();
        }
    }
}

impl Table {
    /// Who waits for long.
    fn long_waiting(&self, now: Instant) -> BTreeSet<u32> {
        let long = self.waiting.values().filter(|waiting| waiting.caller != 0 && waiting.since + LOOK <= now);
        long.map(|waiting| waiting.caller).collect()
    }

    /// The tickets of these callers, which are not watched any more.
    fn take_callers(&mut self, callers: &BTreeSet<u32>) -> impl Iterator<Item = Weak<Ticket>> {
        let taken = self.waiting.extract_if(.., |_, waiting| callers.contains(&waiting.caller));
        taken.map(|(_, waiting)| waiting.ticket)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn parked() -> (Arc<Ticket>, Redeemer, mpsc::Receiver<Verdict>) {
        let (ticket, redeemer) = Ticket::new();
        let (sender, receiver) = mpsc::channel();
        assert!(ticket.park(sender, |sender| Box::new(move |verdict| sender.send(verdict).unwrap())).is_none());
        (ticket, redeemer, receiver)
    }

    #[test]
    fn a_ticket_is_redeemed_once() {
        let (ticket, redeemer, verdicts) = parked();
        redeemer.redeem(Ok(()));
        ticket.redeem(Verdict::Expired);
        assert!(matches!(verdicts.recv(), Ok(Verdict::Arrived)));
        assert!(verdicts.recv().is_err(), "the action is gone after it ran");
    }

    #[test]
    fn a_dropped_redeemer_is_a_verdict() {
        let (_ticket, redeemer, verdicts) = parked();
        drop(redeemer);
        assert!(matches!(verdicts.recv(), Ok(Verdict::Forgotten)));
    }

    #[test]
    fn an_early_answer_is_given_back() {
        let (ticket, redeemer) = Ticket::new();
        redeemer.redeem(Err(Arc::new(std::io::Error::other("no"))));
        let parked = ticket.park("parcel", |_| panic!("it must be given back"));
        assert!(matches!(parked, Some((Verdict::Failed(_), "parcel"))));
    }

    #[test]
    fn deadlines_are_kept_in_their_order() {
        let deadlines = Deadlines::start().unwrap();
        let (sender, verdicts) = mpsc::channel();
        let now = Instant::now();
        let mut watches = Vec::new();
        for (name, millis) in [("late", 60), ("soon", 20), ("never", 3_600_000)] {
            let (ticket, redeemer) = Ticket::new();
            let sender = sender.clone();
            let parked = ticket.park(sender, |sender| Box::new(move |verdict| sender.send((name, verdict)).unwrap()));
            assert!(parked.is_none());
            watches.push((deadlines.watch(&ticket, 0, now + Duration::from_millis(millis)), ticket, redeemer));
        }
        assert_eq!(deadlines.waiting(), 3);
        assert!(matches!(verdicts.recv(), Ok(("soon", Verdict::Expired))));
        assert!(matches!(verdicts.recv(), Ok(("late", Verdict::Expired))));
        assert!(now.elapsed() >= Duration::from_millis(60));
        assert_eq!(deadlines.waiting(), 1);
        deadlines.close();
        assert_eq!(deadlines.waiting(), 0);
        assert!(matches!(verdicts.recv(), Ok(("never", Verdict::Closed))));
        let (ticket, _redeemer) = Ticket::new();
        let _watch = deadlines.watch(&ticket, 0, now + Duration::from_secs(3600));
        assert!(matches!(ticket.park((), |()| panic!("it is over already")), Some((Verdict::Closed, ()))));
    }

    #[test]
    fn the_dead_do_not_wait() {
        const DEAD: u32 = 7;
        let deadlines = Deadlines::start_with(|caller| caller == DEAD).unwrap();
        let (sender, verdicts) = mpsc::channel();
        let far = Instant::now() + Duration::from_secs(3600);
        let mut watches = Vec::new();
        for caller in [DEAD, 8, 0, DEAD] {
            let (ticket, redeemer) = Ticket::new();
            let sender = sender.clone();
            let parked = ticket.park(sender, |sender| Box::new(move |verdict| sender.send((caller, verdict)).unwrap()));
            assert!(parked.is_none());
            watches.push((deadlines.watch(&ticket, caller, far), ticket, redeemer));
        }
        for _ in 0..2 {
            assert!(matches!(verdicts.recv(), Ok((DEAD, Verdict::Abandoned))));
        }
        assert_eq!(deadlines.waiting(), 2);
    }
}
