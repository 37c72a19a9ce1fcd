//! Words to the service manager (`sd_notify(3)`).

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};

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
        let Some(address) = &self.0 else { return };
        let sent = UnixDatagram::unbound().and_then(|socket| socket.send_to_addr(words.as_bytes(), address));
        if let Err(error) = sent {
            tracing::warn!(%error, "cannot tell the service manager: {words}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        Notify::new(Some(OsStr::new("/nowhere/at/all"))).unwrap().say("READY=1");
    }
}
