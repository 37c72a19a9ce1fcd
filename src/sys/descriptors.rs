//! Descriptors that go from process to process: sent over Unix sockets, inherited from a service manager, put in the place
//! of another one; and small records in memory that go with them.
//!
//! Guarantees: every descriptor that comes in is closed when a program is executed. Refuses to know what they are.

#![expect(unsafe_code, reason = "a descriptor that was inherited or is replaced has no owner that Rust knows of")]

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write as _};
use std::mem::{ManuallyDrop, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::{DupFlags, Errno, FdFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};

/// So many go with one message.
pub const MAX_DESCRIPTORS: usize = 16;

/// The first descriptor that a service manager passes on (`sd_listen_fds(3)`).
const FIRST_INHERITED: i32 = 3;

/// Sends `bytes` as one message, and `descriptors` with it (at most [`MAX_DESCRIPTORS`]).
///
/// # Errors
/// What `sendmsg` says; a message that is sent in part has failed.
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut messages = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !messages.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors for one message"));
    }
    // Whoever has closed the other end is no reason to be killed.
    let sent = rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(&socket, &[IoSlice::new(bytes)], &mut messages, SendFlags::NOSIGNAL)
    })?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives one message into `buffer`: how long it is, 0 if the other side has closed, and the descriptors that came with it.
///
/// # Errors
/// What `recvmsg` says.
pub fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    loop {
        let mut messages = RecvAncillaryBuffer::new(&mut space);
        let buffers = &mut [IoSliceMut::new(buffer)];
        match rustix::net::recvmsg(&socket, buffers, &mut messages, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(message) => {
                let rights = messages.drain().filter_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                    _ => None,
                });
                return Ok((message.bytes, rights.flatten().collect()));
            }
        }
    }
}

/// Two ends of a connection that keeps messages apart.
///
/// # Errors
/// What `socketpair` says.
pub fn packet_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = SocketFlags::CLOEXEC;
    Ok(rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

/// The user at the other end of a Unix socket, as it was when the connection was made.
///
/// # Errors
/// What `getsockopt` says.
pub fn peer_user(socket: impl AsFd) -> io::Result<u32> {
    Ok(rustix::net::sockopt::socket_peercred(socket)?.uid.as_raw())
}

/// Lets the descriptor `target` be one of what `source` is. Whoever uses `target` uses that from now on.
///
/// # Errors
/// What `dup3` says; nothing has changed then.
pub fn replace(target: BorrowedFd<'_>, source: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: `target` is borrowed for this call, so it is open and nobody closes it meanwhile; this second owner is never
    // dropped, and `dup3` leaves the number open with the first.
    let mut target = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(target.as_raw_fd()) });
    Ok(rustix::io::dup3(source, &mut target, DupFlags::CLOEXEC)?)
}

/// A file in memory that nobody can change any more.
///
/// # Errors
/// What the system says.
pub fn sealed_record(name: &str, bytes: &[u8]) -> io::Result<OwnedFd> {
    let record = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut file = File::from(record);
    file.write_all(bytes)?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&file, seals)?;
    Ok(file.into())
}

/// Reads a record from its beginning, wherever others have read.
///
/// # Errors
/// What the system says, or that it is longer than `limit`.
pub fn read_record(record: impl AsFd, limit: usize) -> io::Result<Vec<u8>> {
    let file = File::from(record.as_fd().try_clone_to_owned()?);
    let length = usize::try_from(file.metadata()?.len()).ok().filter(|length| *length <= limit);
    let length = length.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the record is too long"))?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// A descriptor from a service manager.
#[derive(Debug)]
pub struct Inherited {
    /// What the unit or this program called it.
    pub name: String,
    /// It.
    pub descriptor: OwnedFd,
}

/// What the service manager says that it has passed on: the values of `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Announced {
    /// The process that it is for.
    pub pid: Option<String>,
    /// How many.
    pub count: Option<String>,
    /// Their names, with colons between them.
    pub names: Option<String>,
}

/// The descriptors that the service manager has passed to this process. Only the first call gets them; what was announced
/// to another process (a parent of this one) is nobody's here.
pub fn inherited(announced: &Announced) -> Vec<Inherited> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let number = |text: &Option<String>| text.as_ref().and_then(|text| text.parse::<u32>().ok());
    let count = number(&announced.count).filter(|_| number(&announced.pid) == Some(std::process::id()));
    let Some(count) = count.and_then(|count| i32::try_from(count).ok()) else { return Vec::new() };
    if TAKEN.swap(true, Ordering::AcqRel) {
        return Vec::new();
    }
    let names = announced.names.as_deref().unwrap_or_default();
    let mut names = names.split(':').map(str::to_owned);
    let mut found = Vec::new();
    for number in FIRST_INHERITED..FIRST_INHERITED.saturating_add(count) {
        let name = names.next().unwrap_or_else(|| "unknown".to_owned());
        // SAFETY: the number is only asked about for this call; that it is not open is an answer.
        let open = rustix::io::fcntl_setfd(unsafe { BorrowedFd::borrow_raw(number) }, FdFlags::CLOEXEC);
        if open.is_err() {
            break;
        }
        // SAFETY: it is open, the manager opened it for this process, and since this is done once nobody else owns it.
        let descriptor = unsafe { OwnedFd::from_raw_fd(number) };
        found.push(Inherited { name, descriptor });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_go_through_a_socket_with_their_message() {
        let (one, other) = packet_pair().unwrap();
        let record = sealed_record("test", b"content").unwrap();
        send(&one, b"hello", &[record.as_fd(), one.as_fd()]).unwrap();
        send(&one, b"bye", &[]).unwrap();
        drop(record);
        let mut buffer = [0; 64];
        let (length, descriptors) = receive(&other, &mut buffer).unwrap();
        assert_eq!((&buffer[..length], descriptors.len()), (&b"hello"[..], 2));
        assert_eq!(read_record(&descriptors[0], 64).unwrap(), b"content");
        assert!(read_record(&descriptors[0], 6).is_err());
        assert!(rustix::io::fcntl_getfd(&descriptors[1]).unwrap().contains(FdFlags::CLOEXEC));
        let (length, none) = receive(&other, &mut buffer).unwrap();
        assert_eq!((&buffer[..length], none.len()), (&b"bye"[..], 0));
        assert_eq!(peer_user(&other).unwrap(), rustix::process::getuid().as_raw());
        drop((one, descriptors));
        assert_eq!(receive(&other, &mut buffer).unwrap().0, 0);
        let many = vec![other.as_fd(); MAX_DESCRIPTORS + 1];
        assert!(send(&other, b"x", &many).is_err());
    }

    #[test]
    fn a_record_is_not_changed_any_more() {
        let record = sealed_record("test", b"content").unwrap();
        let file = File::from(record.try_clone().unwrap());
        assert!(file.write_at(b"x", 0).is_err() && file.set_len(0).is_err());
        assert_eq!(read_record(&record, 64).unwrap(), b"content");
    }

    #[test]
    fn a_replaced_descriptor_is_the_other() {
        let (one, other) = packet_pair().unwrap();
        let target = sealed_record("first", b"first").unwrap();
        let number = target.as_raw_fd();
        replace(target.as_fd(), sealed_record("second", b"second").unwrap().as_fd()).unwrap();
        assert_eq!(target.as_raw_fd(), number);
        assert_eq!(read_record(&target, 64).unwrap(), b"second");
        replace(target.as_fd(), one.as_fd()).unwrap();
        drop(one);
        send(&target, b"x", &[]).unwrap();
        assert_eq!(receive(&other, &mut [0; 4]).unwrap().0, 1);
    }

    #[test]
    fn what_was_announced_to_others_is_left_alone() {
        let text = |number: u32| Some(number.to_string());
        for announced in [
            Announced::default(),
            Announced { pid: text(1), count: text(2), names: None },
            Announced { pid: None, count: text(2), names: None },
            Announced { pid: text(std::process::id()), count: Some("many".into()), names: None },
        ] {
            assert!(inherited(&announced).is_empty(), "{announced:?}");
        }
    }
}
