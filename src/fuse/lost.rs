//! What becomes of requests that a dead process had read, on kernels that do not send them again (before Linux 6.9).
//!
//! Whoever made them waits, and cannot be killed. What they were nobody knows, but the kernel numbers its requests one
//! after the other, and whoever hears EINTR asks again. So every number from the one before the first that this process
//! was asked is answered like that, as far back as somebody may wait.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use super::adapter::Connection;
use super::errno::Failure;
use crate::sys::fuse::refuse;
use crate::vfs::FileSystem;

/// How many numbers are tried. Nobody waits longer than the patience of a connection, a minute or two; at 30,000 requests a
/// second that is as many. Trying one takes less than a microsecond.
const TRIES: usize = 4 << 20;

/// Refuses what was asked before this process served, from a thread of its own.
pub(super) fn refuse_lost<F: FileSystem>(
    device: OwnedFd,
    connection: Arc<Connection<F>>,
    mount_point: PathBuf,
) -> io::Result<()> {
    let work = move || {
        // A request that no kernel answers by itself; that it fails would be no reason to stop.
        let asked = rustix::fs::statfs(&mount_point);
        let Some(first) = connection.first.get().copied() else {
            return tracing::warn!(?asked, "what a dead process was asked stays unanswered: nothing else was asked");
        };
        let errno = Failure::Lost.errno().code();
        let mut refused = 0_u64;
        // Requests have even numbers (`FUSE_REQ_ID_STEP`).
        for number in (2..first & !1).rev().filter(|number| number % 2 == 0).take(TRIES) {
            match refuse(&device, number, errno) {
                Ok(known) => refused += u64::from(known),
                Err(error) => return tracing::warn!(%error, refused, "what a dead process was asked stays unanswered"),
            }
        }
        tracing::info!(refused, "requests that a dead process had read were refused: they will be made again");
    };
    thread::Builder::new().name("fuse-lost".into()).spawn(work)?;
    Ok(())
}
