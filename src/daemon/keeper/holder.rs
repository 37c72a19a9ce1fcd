//! The process that keeps descriptors while there is no daemon (`headstart hold`), and its words.
//!
//! It does nothing else: it waits, and hands over what it was given to whoever of its own user
//! asks. It ends when it is told to, when the connection that it keeps is over, and when nobody has come back in time for
//! what a dead daemon left: then the last descriptor goes, and with it the connection, so that those who wait for an answer
//! get an error at last.
//!
//! Words are messages of a `SOCK_SEQPACKET` socket. The one who said `keep` or `take` last is the daemon, as long as its
//! connection lives.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::sys::descriptors::{peer_user, receive, send};
use crate::sys::fuse::is_connected;

/// Keep what comes with this instead of what there was. Answer: `KEPT`.
pub(super) const KEEP: &[u8] = b"keep";
/// Hand over what is kept. Answer: `KEPT` with it, or without anything.
pub(super) const TAKE: &[u8] = b"take";
/// Keep nothing any more. Answer: none, it is gone.
pub(super) const DROP: &[u8] = b"drop";
pub(super) const KEPT: &[u8] = b"kept";

/// Longest word.
const WORD: usize = 16;

/// How often a connection that nobody unmounts by name is looked at: its last user may just close a file. Nothing wakes a
/// process for that without waking it for every request, too.
const GLANCE: Duration = Duration::from_secs(30);

/// So many may ask at once.
const CLIENTS: usize = 8;

/// Where it listens.
pub(super) fn socket(run: &Path) -> PathBuf {
    run.join("hold.sock")
}

struct Holder {
    listener: OwnedFd,
    clients: Vec<Client>,
    kept: Vec<OwnedFd>,
    /// When nobody will come back any more.
    deadline: Option<Instant>,
    patience: Duration,
}

struct Client {
    socket: OwnedFd,
    is_daemon: bool,
}

/// Keeps what is given over `first` and over the socket in `run`. Comes back when there is nothing to keep any more.
///
/// # Errors
/// The system refuses.
pub fn hold(run: &Path, patience: Duration, first: OwnedFd) -> io::Result<()> {
    let path = socket(run);
    let listener = listen(&path)?;
    let bound = identity(&path)?;
    let mounts = fs::File::open("/proc/self/mountinfo")?;
    let clients = vec![Client { socket: first, is_daemon: false }];
    let mut holder = Holder { listener, clients, kept: Vec::new(), deadline: None, patience };
    while holder.goes_on() {
        holder.wait(mounts.as_fd())?;
    }
    // First the name, so that nobody comes who is not answered; unless another one has it by now, who was started because this
    // one did not answer in time.
    if identity(&path).is_ok_and(|there| there == bound) {
        fs::remove_file(&path)?;
    }
    Ok(())
}

/// Which file a name leads to.
fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn listen(path: &Path) -> io::Result<OwnedFd> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::bind(&listener, &SocketAddrUnix::new(path)?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    rustix::net::listen(&listener, 4)?;
    Ok(listener)
}

impl Holder {
    fn goes_on(&self) -> bool {
        let somebody = !self.clients.is_empty() || self.deadline.is_some_and(|deadline| Instant::now() < deadline);
        somebody && self.kept.iter().all(is_connected)
    }

    fn wait(&mut self, mounts: BorrowedFd<'_>) -> io::Result<()> {
        let left = self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let pause = left.map_or(GLANCE, |left| left.min(GLANCE));
        let pause = Timespec::try_from(pause).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // `PRI` of the mount table: it has changed.
        let mut descriptors = vec![PollFd::from_borrowed_fd(mounts, PollFlags::PRI)];
        descriptors.push(PollFd::new(&self.listener, PollFlags::IN));
        descriptors.extend(self.clients.iter().map(|client| PollFd::new(&client.socket, PollFlags::IN)));
        rustix::io::retry_on_intr(|| poll(&mut descriptors, Some(&pause)))?;
        let asked: Vec<bool> = descriptors.iter().skip(1).map(|descriptor| !descriptor.revents().is_empty()).collect();
        let (comes, asked) = asked.split_first().map_or((false, &[][..]), |(comes, asked)| (*comes, asked));
        // From the last on, so that one who goes changes no other's place.
        for index in (0..asked.len()).rev() {
            if asked.get(index) == Some(&true) && !self.answer(index) {
                let client = self.clients.remove(index);
                if client.is_daemon {
                    self.deadline = Some(Instant::now() + self.patience);
                }
            }
        }
        if comes {
            self.welcome();
        }
        Ok(())
    }

    fn welcome(&mut self) {
        // One that has gone again is nobody's trouble.
        let Ok(socket) = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC) else { return };
        let ours = rustix::process::geteuid().as_raw();
        if self.clients.len() < CLIENTS && peer_user(&socket).is_ok_and(|user| user == ours || user == 0) {
            self.clients.push(Client { socket, is_daemon: false });
        }
    }

    /// Answers one word; false if that was the last.
    fn answer(&mut self, index: usize) -> bool {
        let Some(client) = self.clients.get(index) else { return false };
        let mut word = [0; WORD];
        let Ok((length, descriptors)) = receive(&client.socket, &mut word) else { return false };
        match word.get(..length) {
            Some(KEEP) => {
                self.kept = descriptors;
                let told = send(&client.socket, KEPT, &[]).is_ok();
                self.is_daemon(index);
                told
            }
            Some(TAKE) => {
                let kept: Vec<BorrowedFd<'_>> = self.kept.iter().map(|descriptor| descriptor.as_fd()).collect();
                let told = send(&client.socket, KEPT, &kept).is_ok();
                self.is_daemon(index);
                told
            }
            Some(DROP) => {
                self.kept.clear();
                self.clients.clear();
                self.deadline = None;
                true
            }
            _ => false,
        }
    }

    fn is_daemon(&mut self, index: usize) {
        for (number, client) in self.clients.iter_mut().enumerate() {
            client.is_daemon = number == index;
        }
        self.deadline = None;
    }
}
