//! Words to the service manager (`sd_notify(3)`).

use std::ffi::OsStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use crate::sys::descriptors::send;

/// The service manager, if one started this process.
#[derive(Debug, Clone, Default)]
pub struct Notify(Option<SocketAddr>);

impl Notify {
    /// The one behind `socket`, the value of `NOTIFY_SOCKET`: a path, or an abstract name behind an `@`.
    ///
    /// # Errors
    /// It names no socket.
    pub fn new(socket: Option<&OsStr>) -> io::Result<Self> {
        let address = match socket {
            None => None,
            Some(socket) => Some(match socket.as_bytes().split_first() {
                Some((b'@', name)) => SocketAddr::from_abstract_name(name)?,
                _ => SocketAddr::from_pathname(socket)?,
            }),
        };
        Ok(Self(address))
    }

    /// Says `words`, lines of `NAME=VALUE`. That nobody hears it is no error: it is told in the log.
    pub fn say(&self, words: &str) {
        self.say_with(words, &[]);
    }

    /// Has the manager keep `descriptors` under `name` beyond this process. They are not watched: the manager would wake up
    /// for whatever comes through them.
    pub fn store(&self, name: &str, descriptors: &[BorrowedFd<'_>]) {
        self.say_with(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0"), descriptors);
    }

    fn say_with(&self, words: &str, descriptors: &[BorrowedFd<'_>]) {
        let Some(address) = &self.0 else { return };
        let sent = UnixDatagram::unbound().and_then(|socket| {
            socket.connect_addr(address)?;
            send(&socket, words.as_bytes(), descriptors)
        });
        if let Err(error) = sent {
            tracing::warn!(%error, "cannot tell the service manager: {words}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;
    use crate::sys::descriptors::{packet_pair, receive};

    #[test]
    fn words_reach_sockets_of_both_kinds() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("notify");
        let abstract_name = format!("headstart-test-{}", std::process::id());
        let by_path = UnixDatagram::bind(&path).unwrap();
        let by_name = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&abstract_name).unwrap()).unwrap();
        for (socket, name) in [(by_path, path.into_os_string()), (by_name, format!("@{abstract_name}").into())] {
            Notify::new(Some(&name)).unwrap().say("READY=1");
            let mut buffer = [0; 64];
            let length = socket.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], b"READY=1");
        }
        Notify::new(None).unwrap().say("READY=1");
        let (one, other) = packet_pair().unwrap();
        let path = temporary.path().join("store");
        let manager = UnixDatagram::bind(&path).unwrap();
        Notify::new(Some(path.as_os_str())).unwrap().store("name", &[one.as_fd(), other.as_fd()]);
        let mut buffer = [0; 64];
        let (length, descriptors) = receive(&manager, &mut buffer).unwrap();
        assert_eq!((&buffer[..length], descriptors.len()), (&b"FDSTORE=1\nFDNAME=name\nFDPOLL=0"[..], 2));
        Notify::new(Some(OsStr::new("/nowhere/at/all"))).unwrap().say("READY=1");
    }
}
