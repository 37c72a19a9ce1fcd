//! Who keeps the daemon's FUSE connection while there is no daemon: the service manager's store of descriptors
//! (`FileDescriptorStoreMax=` of systemd), or a small process of this program ([`hold`]).
//!
//! A manager that says that it has a store (`FDSTORE`, systemd 254) is believed as long as the service runs or is restarted.
//! When it is stopped the store is emptied; nobody tells a daemon that is asked to end which of both it will be, so one that
//! leaves its mounts starts a holder all the same. Older managers have a store and do not say so, and some are told to have
//! none: then both keep it from the beginning, which does no harm.

mod holder;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::notify::Notify;
use crate::fuse::Kept;
use crate::sys::descriptors::{Inherited, packet_pair, receive, send};

pub use holder::hold;

/// What the descriptors are called in the manager's store.
pub const NAME: &str = "headstart-fs";

/// How long the holder may take to answer a word. It does nothing else, but may have to be started on a machine that is busy.
const ANSWER: Duration = Duration::from_secs(30);

/// How often a holder is started anew if it is killed.
const HOLDERS: u32 = 5;

/// How the connection is kept.
#[derive(Debug, Clone)]
pub struct KeeperOptions {
    /// The run directory.
    pub run: PathBuf,
    /// This program.
    pub program: PathBuf,
    /// How long a holder waits for the next daemon.
    pub patience: Duration,
    /// The service manager, if there is one.
    pub notify: Notify,
    /// The manager has said that it has a store.
    pub has_store: bool,
}

/// Keeps the connection beyond this process.
#[derive(Debug, Clone)]
pub struct Keeper {
    options: KeeperOptions,
    /// The connection to the holder.
    holder: Arc<Mutex<Option<OwnedFd>>>,
}

impl Keeper {
    /// One that keeps nothing yet.
    pub fn new(options: KeeperOptions) -> Self {
        Self { options, holder: Arc::default() }
    }

    fn holder(&self) -> MutexGuard<'_, Option<OwnedFd>> {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was kept for a daemon before this one: the manager's store first, which has passed on `inherited`.
    pub fn found(&self, inherited: Vec<Inherited>) -> Option<Kept> {
        let stored = inherited.into_iter().filter(|inherited| inherited.name == NAME);
        let stored: Vec<OwnedFd> = stored.map(|inherited| inherited.descriptor).collect();
        // Asked in any case: this is how it learns that there is a daemon again.
        let held = match self.take_from_holder() {
            Ok(held) => held,
            Err(error) => {
                tracing::debug!(%error, "no process holds a FUSE connection");
                Vec::new()
            }
        };
        let living = |descriptors| Kept::found(descriptors).ok().filter(Kept::is_connected);
        [stored, held].into_iter().find_map(living)
    }

    fn take_from_holder(&self) -> io::Result<Vec<OwnedFd>> {
        let flags = SocketFlags::CLOEXEC;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(holder::socket(&self.options.run))?)?;
        send(&socket, holder::TAKE, &[])?;
        let held = answer(&socket)?;
        *self.holder() = Some(socket);
        Ok(held)
    }

    /// Has `kept` kept from now on, and nothing else; `anew` if it is not what was found.
    ///
    /// # Errors
    /// Nobody keeps it.
    pub fn keep(&self, kept: &Kept, anew: bool) -> io::Result<()> {
        if anew {
            self.options.notify.say(&format!("FDSTOREREMOVE=1\nFDNAME={NAME}"));
        }
        self.options.notify.store(NAME, &kept.descriptors());
        if self.options.has_store {
            // One that has bridged the time since a daemon before this one was stopped.
            self.dismiss();
            return Ok(());
        }
        let known = {
            let holder = self.holder();
            holder.as_ref().map(|holder| give(holder, kept))
        };
        match known {
            Some(Ok(())) => {}
            _ => *self.holder() = Some(start(&self.options, kept)?),
        }
        let again = kept.descriptors().iter().map(|one| one.try_clone_to_owned()).collect::<io::Result<Vec<_>>>()?;
        let again = Kept::found(again).map_err(io::Error::other)?;
        let keeper = self.clone();
        thread::Builder::new().name("keeper".into()).spawn(move || keeper.watch(&again))?;
        Ok(())
    }

    /// Starts the holder anew when it is killed.
    fn watch(&self, kept: &Kept) {
        for _ in 0..HOLDERS {
            let Some(socket) = self.holder().as_ref().and_then(|holder| holder.try_clone().ok()) else { return };
            // Only that the other side has closed, not what it says.
            let closed = rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(&socket, PollFlags::RDHUP)], None));
            if closed.is_err() || self.holder().is_none() || !kept.is_connected() {
                return;
            }
            match start(&self.options, kept) {
                Ok(holder) => *self.holder() = Some(holder),
                Err(error) => {
                    let error: &dyn std::error::Error = &error;
                    return tracing::error!(error, "nobody keeps the FUSE connection should this process die");
                }
            }
            tracing::warn!("the process that keeps the FUSE connection was gone and is there again");
        }
    }

    /// True if somebody keeps the connection.
    pub fn keeps(&self) -> bool {
        self.options.has_store || self.holder().is_some()
    }

    /// Sees to it that `kept` outlives this process, which is about to end, whatever the manager does.
    ///
    /// # Errors
    /// Nobody but the manager keeps it.
    pub fn leave(&self, kept: &Kept) -> io::Result<()> {
        if self.holder().is_none() {
            let holder = start(&self.options, kept)?;
            *self.holder() = Some(holder);
        }
        Ok(())
    }

    /// Has nothing kept any more.
    pub fn forget(&self) {
        self.options.notify.say(&format!("FDSTOREREMOVE=1\nFDNAME={NAME}"));
        self.dismiss();
    }

    /// Lets the holder end, if there is one.
    fn dismiss(&self) {
        let holder = self.holder().take();
        if let Some(holder) = holder {
            // One that has gone by itself keeps nothing either.
            send(&holder, holder::DROP, &[]).ok();
        }
    }
}

/// The descriptors that come with the holder's answer.
fn answer(holder: &OwnedFd) -> io::Result<Vec<OwnedFd>> {
    let patience = Timespec::try_from(ANSWER).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut waited = [PollFd::new(holder, PollFlags::IN)];
    if rustix::io::retry_on_intr(|| poll(&mut waited, Some(&patience)))? == 0 {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut word = [0; 16];
    let (length, descriptors) = receive(holder, &mut word)?;
    if word.get(..length) == Some(holder::KEPT) {
        return Ok(descriptors);
    }
    Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the process that holds descriptors does not answer"))
}

fn give(holder: &OwnedFd, kept: &Kept) -> io::Result<()> {
    send(holder, holder::KEEP, &kept.descriptors())?;
    answer(holder).map(drop)
}

/// Starts a holder: the connection to it.
fn start(options: &KeeperOptions, kept: &Kept) -> io::Result<OwnedFd> {
    let (ours, theirs) = packet_pair()?;
    let mut child = Command::new(&options.program)
        .arg("hold")
        .arg("--run")
        .arg(&options.run)
        .arg("--patience")
        .arg(options.patience.as_secs().to_string())
        .env_clear()
        .current_dir(Path::new("/"))
        .stdin(theirs)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    give(&ours, kept)?;
    // It lives longer than this process, or is waited for here.
    thread::Builder::new().name("holder-end".into()).spawn(move || child.wait())?;
    Ok(ours)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::fs::PermissionsExt as _;
    use std::time::Instant;

    use super::*;
    use crate::sys::descriptors::{read_record, sealed_record};

    const LONG: Duration = Duration::from_secs(60);

    /// A holder on a thread of this process.
    fn begin(run: &Path, patience: Duration) -> (OwnedFd, thread::JoinHandle<io::Result<()>>) {
        let (ours, theirs) = packet_pair().unwrap();
        let run = run.to_owned();
        (ours, thread::spawn(move || hold(&run, patience, theirs)))
    }

    fn wait(holder: thread::JoinHandle<io::Result<()>>) {
        holder.join().unwrap().unwrap();
    }

    fn connect(run: &Path) -> OwnedFd {
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        rustix::net::connect(&socket, &SocketAddrUnix::new(holder::socket(run)).unwrap()).unwrap();
        socket
    }

    #[test]
    fn a_holder_keeps_what_it_was_given_until_it_is_told_not_to() {
        let run = tempfile::tempdir().unwrap();
        let (daemon, holder) = begin(run.path(), LONG);
        let records = ["one", "two"].map(|name| sealed_record(name, name.as_bytes()).unwrap());
        send(&daemon, holder::KEEP, &[records[0].as_fd(), records[1].as_fd()]).unwrap();
        assert!(answer(&daemon).unwrap().is_empty());
        drop((daemon, records));
        for _ in 0..3 {
            let next = connect(run.path());
            send(&next, holder::TAKE, &[]).unwrap();
            let kept = answer(&next).unwrap();
            let told: Vec<_> = kept.iter().map(|record| read_record(record, 64).unwrap()).collect();
            assert_eq!(told, [b"one", b"two"]);
        }
        let last = connect(run.path());
        send(&last, holder::DROP, &[]).unwrap();
        wait(holder);
        assert!(!holder::socket(run.path()).exists());
        assert!(answer(&last).is_err());
    }

    #[test]
    fn nobody_who_comes_back_is_waited_for_no_longer_than_was_said() {
        let run = tempfile::tempdir().unwrap();
        let patience = Duration::from_millis(200);
        let (daemon, holder) = begin(run.path(), patience);
        let record = sealed_record("one", b"one").unwrap();
        send(&daemon, holder::KEEP, &[record.as_fd()]).unwrap();
        answer(&daemon).unwrap();
        // Somebody else who comes and goes is no daemon.
        drop(connect(run.path()));
        let gone = Instant::now();
        drop(daemon);
        wait(holder);
        assert!(gone.elapsed() >= patience);
    }

    #[test]
    fn one_who_was_replaced_leaves_the_name_to_the_other() {
        let run = tempfile::tempdir().unwrap();
        let (first_daemon, first) = begin(run.path(), LONG);
        send(&first_daemon, holder::TAKE, &[]).unwrap();
        assert!(answer(&first_daemon).unwrap().is_empty());
        let (second_daemon, second) = begin(run.path(), LONG);
        let record = sealed_record("one", b"one").unwrap();
        send(&second_daemon, holder::KEEP, &[record.as_fd()]).unwrap();
        assert!(answer(&second_daemon).unwrap().is_empty());
        send(&first_daemon, holder::DROP, &[]).unwrap();
        wait(first);
        let next = connect(run.path());
        send(&next, holder::TAKE, &[]).unwrap();
        assert_eq!(answer(&next).unwrap().len(), 1);
        send(&next, holder::DROP, &[]).unwrap();
        wait(second);
        assert!(!holder::socket(run.path()).exists());
    }

    #[test]
    fn words_that_are_none_end_the_talk() {
        let run = tempfile::tempdir().unwrap();
        let (daemon, holder) = begin(run.path(), LONG);
        send(&daemon, holder::TAKE, &[]).unwrap();
        assert!(answer(&daemon).unwrap().is_empty());
        let other = connect(run.path());
        send(&other, b"what is this that is so long", &[]).unwrap();
        assert!(answer(&other).is_err());
        let mode = std::fs::metadata(holder::socket(run.path())).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        send(&daemon, holder::DROP, &[]).unwrap();
        wait(holder);
    }
}
