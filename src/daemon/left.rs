//! What a daemon that is gone has left: asked of the kernel alone, and without waiting for the next one.

use std::path::Path;
use std::time::Duration;

use super::mounts::Entry;
use super::place;
use crate::drivers::Driver;
use crate::sys::fuse::is_over;
use crate::sys::mount::{is_ours, mounted_on};

/// How long to wait for somebody to answer on a connection: one that is over says so at once.
const PATIENCE: Duration = Duration::from_millis(500);

/// How a mount stands whose process is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// The connection is kept: whoever reads what is not here waits for the next daemon.
    Kept,
    /// The kernel reads it from local files and needs nobody.
    Alone,
    /// Nobody answers any more.
    Dead,
}

/// True if no daemon has the run directory `run`, and the FUSE connection of the one before is kept for the next.
pub fn is_kept(run: &Path) -> bool {
    let connection = place::file_system(run);
    is_ours(&connection).is_ok_and(|ours| ours) && !is_over(&connection, PATIENCE)
}

impl Left {
    /// How the mount of `entry` stands, whose daemon is gone; `kept` tells of a run directory whether its connection is kept.
    pub fn of(entry: &Entry, mut kept: impl FnMut(&Path) -> bool) -> Self {
        let record = &entry.record;
        let Some(run) = record.daemon.as_ref().and_then(|socket| socket.parent()) else { return Self::Dead };
        if !mounted_on(&record.mount_point).is_ok_and(|mounted| mounted.is_some()) {
            return Self::Dead;
        }
        match record.driver == Driver::Local.to_string() {
            true => Self::Alone,
            false if kept(run) => Self::Kept,
            false => Self::Dead,
        }
    }
}
