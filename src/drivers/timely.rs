//! Calls that may wait for the kernel for ever, with an end to the waiting.
//!
//! A thread that the kernel holds cannot be taken back; it can only be left. What it makes in the end is dropped on that
//! thread, and everything made here is a guard that unmounts or detaches when it is dropped.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use super::error::DriverError;

/// Something that runs on a thread of its own.
pub(super) struct Started<T> {
    attempted: String,
    result: mpsc::Receiver<Result<T, DriverError>>,
}

/// Runs `call`, which attempts to `attempted`, on a thread of its own.
pub(super) fn start<T: Send + 'static>(
    attempted: String,
    call: impl FnOnce() -> Result<T, DriverError> + Send + 'static,
) -> Result<Started<T>, DriverError> {
    let (sender, result) = mpsc::sync_channel(1);
    thread::Builder::new()
        .name("driver".into())
        .spawn(move || {
            // If nobody waits any more, the value comes back and is dropped here.
            drop(sender.send(call()));
        })
        .map_err(DriverError::io("start a thread for", "mounting".as_ref()))?;
    Ok(Started { attempted, result })
}

impl<T> Started<T> {
    /// Its result, waited for until `deadline`; `patience` is what the error tells.
    pub(super) fn wait_until(self, deadline: Instant, patience: Duration) -> Result<T, DriverError> {
        let left = deadline.saturating_duration_since(Instant::now());
        match self.result.recv_timeout(left) {
            Ok(result) => result,
            // A thread that ends without a word has panicked.
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                Err(DriverError::Slow { attempted: self.attempted, patience })
            }
        }
    }
}

/// Runs `call` on a thread of its own and waits for its result, at most for `patience`.
pub(super) fn within<T: Send + 'static>(
    patience: Duration,
    attempted: String,
    call: impl FnOnce() -> Result<T, DriverError> + Send + 'static,
) -> Result<T, DriverError> {
    let deadline = Instant::now() + patience;
    start(attempted, call)?.wait_until(deadline, patience)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_too_late_is_dropped() {
        struct Guard(mpsc::Sender<()>);
        impl Drop for Guard {
            fn drop(&mut self) {
                self.0.send(()).ok();
            }
        }
        let (dropped, is_dropped) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        let late = within(Duration::from_millis(10), "wait".to_owned(), move || {
            released.recv().ok();
            Ok(Guard(dropped))
        });
        assert!(matches!(late.map(drop), Err(DriverError::Slow { attempted, .. }) if attempted == "wait"));
        assert!(is_dropped.try_recv().is_err());
        release.send(()).unwrap();
        is_dropped.recv_timeout(Duration::from_secs(30)).unwrap();
    }

    #[test]
    fn what_comes_in_time_is_given() {
        assert_eq!(within(Duration::from_secs(30), String::new(), || Ok(7)).unwrap(), 7);
    }
}
