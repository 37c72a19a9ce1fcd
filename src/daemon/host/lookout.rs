//! Notices that something is not mounted any more, whoever took it away.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::watch;

use crate::sys::mount::{MountEntry, mount_table};
use crate::sys::stack::MountWatch;

/// How long a watch without anybody who wants it may live on.
const PATIENCE: Duration = Duration::from_secs(10);

/// True if what is watched is not in the table.
type IsOver = Box<dyn Fn(&[MountEntry]) -> bool + Send>;

/// A thread that reads the mount table each time it has changed.
#[derive(Clone, Default)]
pub(super) struct Watch(Arc<Mutex<Watched>>);

#[derive(Default)]
struct Watched {
    running: bool,
    mounts: Vec<(IsOver, watch::Sender<bool>)>,
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

fn lock(watched: &Mutex<Watched>) -> MutexGuard<'_, Watched> {
    watched.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watch {
    /// Asks everybody again now, though nothing may have changed in the mount table.
    pub(super) fn ask(&self) {
        look(&self.0);
    }

    /// Says true as soon as `is_over`, which is asked with each new mount table. What is mounted already is not missed.
    ///
    /// # Errors
    /// A thread that cannot be started.
    pub(super) fn until(
        &self,
        is_over: impl Fn(&[MountEntry]) -> bool + Send + 'static,
    ) -> anyhow::Result<watch::Receiver<bool>> {
        let (say, over) = watch::channel(false);
        let mut watched = lock(&self.0);
        if !watched.running {
            let mounts = MountWatch::start().context("cannot watch the mount table")?;
            let weak = Arc::downgrade(&self.0);
            let run = move || run(&mounts, &weak);
            thread::Builder::new().name("mount-watch".into()).spawn(run).context("cannot start a thread")?;
            watched.running = true;
        }
        watched.mounts.push((Box::new(is_over), say));
        drop(watched);
        // It may have gone before anybody watched.
        look(&self.0);
        Ok(over)
    }
}

fn run(mounts: &MountWatch, watched: &Weak<Mutex<Watched>>) {
    loop {
        let changed = mounts.wait(PATIENCE);
        let Some(watched) = watched.upgrade() else { return };
        match changed {
            Ok(true) => look(&watched),
            Ok(false) => {}
            Err(error) => {
                tracing::error!(%error, "nobody notices any more when mounts are taken away by others");
                lock(&watched).running = false;
                return;
            }
        }
    }
}

fn look(watched: &Mutex<Watched>) {
    // Locked before the table is read: nobody is asked with a table that is older than what they watch.
    let mut watched = lock(watched);
    let table = match mount_table() {
        Ok(table) => table,
        Err(error) => return tracing::warn!(%error, "cannot read the mount table"),
    };
    watched.mounts.retain(|(is_over, say)| {
        let over = is_over(&table);
        if over {
            say.send_replace(true);
        }
        !over && !say.is_closed()
    });
}
