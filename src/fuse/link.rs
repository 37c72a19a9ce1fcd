//! A connection apart from who serves it: the device that its requests come through, and what was agreed on when it began.
//!
//! The kernel introduces itself once in the life of a connection. So whoever is to take it over from a process that died
//! needs the device and what was said then; both are descriptors ([`Kept`]), so that one keeper can keep them together.
//!
//! The record is a sealed file in memory, little endian: magic, version, flags that must be understood (none yet), device
//! number of the mount (major, minor), lengths of request and answer, then both as they were.

use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::FileType;
use rustix::net::Shutdown;

use super::adapter::Adapter;
use super::{ServeError, ServeOptions};
use crate::sys::descriptors::{packet_pair, read_record, receive, replace, sealed_record, send};
use crate::sys::fuse::{FuseMountOptions, first_request, is_connected, mount_fuse};
use crate::sys::mount::{MountError, Unmount, check_mount_point, mounted_on, unmount};
use crate::vfs::FileSystem;

const MAGIC: &[u8; 8] = b"HSFUSE\r\n";
/// Another one also if files get other inode numbers: what the kernel remembers goes by those.
const VERSION: u32 = 1;
/// Magic, version, flags, device number, two lengths.
const HEAD: usize = 32;
/// Longest record that is read. What is said today has some hundred bytes.
const RECORD_LIMIT: usize = 64 << 10;

/// What the kernel calls the first request and its length at least (`FUSE_INIT`, `struct fuse_in_header` and two numbers).
const FUSE_INIT: u32 = 26;
const SHORTEST_REQUEST: usize = 48;
/// The protocol that this program speaks.
const MAJOR: u32 = 7;

/// Why a connection cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Something else was kept.
    #[error("cannot take a FUSE connection over: what was kept are not its device and the record of its beginning")]
    Incomplete,
    /// The record cannot be used.
    #[error("cannot take a FUSE connection over: the record of its beginning {0}")]
    Record(&'static str),
    /// The record cannot be read.
    #[error("cannot read the record of a FUSE connection's beginning")]
    Unreadable(#[source] io::Error),
    /// There is no connection any more.
    #[error("cannot take a FUSE connection over: it has ended")]
    Over,
    /// It is another one.
    #[error("cannot take a FUSE connection over: it is not the one on {}", .0.display())]
    Elsewhere(PathBuf),
}

/// What outlives a process that serves, if somebody keeps it.
#[derive(Debug)]
pub struct Kept {
    device: OwnedFd,
    record: OwnedFd,
}

impl Kept {
    /// What is to be kept, in any order.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.device.as_fd(), self.record.as_fd()]
    }

    /// True as long as there is a connection.
    pub fn is_connected(&self) -> bool {
        is_connected(&self.device)
    }

    /// What was kept, in any order. Of several devices one that has a connection.
    ///
    /// # Errors
    /// [`LinkError::Incomplete`].
    pub fn found(descriptors: Vec<OwnedFd>) -> Result<Self, LinkError> {
        let (mut device, mut record): (Option<OwnedFd>, _) = (None, None);
        for descriptor in descriptors {
            let kind = rustix::fs::fstat(&descriptor).map(|stat| FileType::from_raw_mode(stat.st_mode));
            match kind {
                Ok(FileType::CharacterDevice) if device.as_ref().is_none_or(|known| !is_connected(known)) => {
                    device = Some(descriptor);
                }
                Ok(FileType::RegularFile) => record = Some(descriptor),
                _ => {}
            }
        }
        Ok(Self { device: device.ok_or(LinkError::Incomplete)?, record: record.ok_or(LinkError::Incomplete)? })
    }
}

/// A connection that nobody serves yet, or not any more.
pub struct Link {
    device: OwnedFd,
    mount_point: PathBuf,
    /// The kernel's first request.
    request: Box<[u8]>,
    /// What it was answered, and the record of that; none if it was not.
    before: Option<Before>,
    /// Device number of the mount.
    number: (u32, u32),
    /// The kernel can send again what was not answered.
    pub(super) can_resend: bool,
}

/// What is known of the process that served a connection before.
struct Before {
    answer: Box<[u8]>,
    /// Handed on as it is: a keeper that has this very file need not keep another one.
    record: OwnedFd,
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { mount_point, number, .. } = self;
        f.debug_struct("Link").field("mount_point", mount_point).field("number", number).finish_non_exhaustive()
    }
}

/// Takes a mount away that nobody will serve.
struct Unserved<'a>(&'a Path);

impl Drop for Unserved<'_> {
    fn drop(&mut self) {
        if let Err(error) = unmount(self.0, Unmount::Lazy) {
            let error: &dyn std::error::Error = &error;
            tracing::warn!(error, "the mount stays behind");
        }
    }
}

impl Link {
    /// Mounts a new connection on the directory `mount_point`. Whoever looks into it waits until it is served.
    ///
    /// # Errors
    /// See [`ServeError`]; nothing is mounted then.
    pub fn mount(mount_point: &Path, options: &ServeOptions) -> Result<Self, ServeError> {
        let mount_point = check_mount_point(mount_point)?;
        let device = mount_fuse(
            &mount_point,
            &FuseMountOptions {
                source: options.source.clone(),
                allow_other: options.allow_other,
                default_permissions: options.default_permissions,
            },
        )?;
        let unserved = Unserved(&mount_point);
        let failed = |source| ServeError::Session { mount_point: mount_point.clone(), source };
        let request = first_request(&device).map_err(failed)?;
        let entry = mounted_on(&mount_point).map_err(failed)?;
        let entry = entry.ok_or_else(|| MountError::NotMounted(mount_point.clone()))?;
        let number = (entry.major, entry.minor);
        std::mem::forget(unserved);
        Ok(Self { device, mount_point, request, before: None, number, can_resend: true })
    }

    /// The connection on `mount_point` that was served by a process which is gone.
    ///
    /// # Errors
    /// See [`LinkError`].
    pub fn take_up(kept: Kept, mount_point: &Path) -> Result<Self, LinkError> {
        let Kept { device, record } = kept;
        let bytes = read_record(&record, RECORD_LIMIT).map_err(LinkError::Unreadable)?;
        let Record { number, request, answer } = Record::parse(&bytes)?;
        if !is_connected(&device) {
            return Err(LinkError::Over);
        }
        let elsewhere = || LinkError::Elsewhere(mount_point.to_owned());
        // What is on the run directory's way is not looked into: there may be nobody who answers.
        let (parent, name) = mount_point.parent().zip(mount_point.file_name()).ok_or_else(elsewhere)?;
        let mount_point = parent.canonicalize().map_err(|_| elsewhere())?.join(name);
        let entry = mounted_on(&mount_point).map_err(LinkError::Unreadable)?;
        if entry.is_none_or(|entry| (entry.major, entry.minor) != number) {
            return Err(elsewhere());
        }
        let (request, before) = (request.into(), Some(Before { answer: answer.into(), record }));
        Ok(Self { device, mount_point, request, before, number, can_resend: true })
    }

    /// Where it is mounted, absolute and without links.
    pub fn mount_point(&self) -> &Path {
        &self.mount_point
    }

    /// Device number of the mount.
    pub const fn number(&self) -> (u32, u32) {
        self.number
    }

    /// True if a process served it before, so that the kernel knows what that one told it.
    pub const fn was_served(&self) -> bool {
        self.before.is_some()
    }

    /// The same as on a kernel that does not send again what was not answered (before Linux 6.9).
    #[must_use]
    pub fn without_resend(self) -> Self {
        Self { can_resend: false, ..self }
    }

    /// Introduces `adapter` and the kernel to each other: a session that may run, and what is to be kept of it.
    ///
    /// The library that answers requests wants to be introduced by the kernel itself, in this process. So it is spoken to
    /// by this end of a socket, with the kernel's words, and gets the device when it has answered.
    pub(super) fn introduce<F: FileSystem>(
        &self,
        adapter: Adapter<F>,
        config: fuser::Config,
    ) -> io::Result<(fuser::Session<Adapter<F>>, Kept)> {
        let (ours, theirs) = packet_pair()?;
        send(&ours, &self.request, &[])?;
        // Should it want to hear more it hears that this is the end.
        rustix::net::shutdown(&ours, Shutdown::Write)?;
        // The kernel checks who may use the mount; a second check here would only repeat it.
        let session = fuser::Session::from_fd(adapter, theirs, fuser::SessionACL::All, config)?;
        let mut answer = vec![0; RECORD_LIMIT];
        let (length, _) = receive(&ours, &mut answer)?;
        answer.truncate(length);
        let record = match &self.before {
            None => {
                rustix::io::write(&self.device, &answer)?;
                let record = Record { number: self.number, request: &self.request, answer: &answer };
                sealed_record("headstart-fuse", &record.write())?
            }
            Some(before) => {
                if *before.answer != *answer {
                    tracing::info!("the kernel keeps to what it agreed on with the program before this one");
                }
                before.record.try_clone()?
            }
        };
        replace(session.as_fd(), self.device.as_fd())?;
        Ok((session, Kept { device: self.device.try_clone()?, record }))
    }

    pub(super) fn into_device(self) -> OwnedFd {
        self.device
    }
}

/// What is written down of a connection's beginning.
#[derive(Debug, PartialEq, Eq)]
struct Record<'a> {
    number: (u32, u32),
    request: &'a [u8],
    answer: &'a [u8],
}

impl<'a> Record<'a> {
    fn write(&self) -> Vec<u8> {
        let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a message of the protocol's beginning is short");
        let mut record = MAGIC.to_vec();
        for number in
            [VERSION, 0, self.number.0, self.number.1, length(self.request), length(self.answer)].map(u32::to_le_bytes)
        {
            record.extend(number);
        }
        record.extend([self.request, self.answer].concat());
        record
    }

    fn parse(bytes: &'a [u8]) -> Result<Self, LinkError> {
        let wrong = LinkError::Record;
        let (head, rest) = bytes.split_at_checked(HEAD).ok_or(wrong("is too short"))?;
        let (magic, numbers) = head.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(wrong("is something else"));
        }
        let number = |index: usize| {
            let bytes = numbers.get(index * 4..index * 4 + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u32::from_le_bytes)
        };
        if number(0) != VERSION || number(1) != 0 {
            return Err(wrong("is of a newer version"));
        }
        let length = |index| usize::try_from(number(index)).unwrap_or(usize::MAX);
        let (request, answer) = rest.split_at_checked(length(4)).ok_or(wrong("is too short"))?;
        if answer.len() != length(5) {
            return Err(wrong("has the wrong length"));
        }
        let word = |at: usize| request.get(at..at + 4).and_then(|word| word.try_into().ok()).map(u32::from_ne_bytes);
        if request.len() < SHORTEST_REQUEST || word(4) != Some(FUSE_INIT) {
            return Err(wrong("does not begin with the kernel's first request"));
        }
        if word(40) != Some(MAJOR) {
            return Err(wrong("is about another protocol"));
        }
        Ok(Self { number: (number(2), number(3)), request, answer })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Vec<u8> {
        let mut request = vec![0; 104];
        request[4..8].copy_from_slice(&FUSE_INIT.to_ne_bytes());
        request[40..44].copy_from_slice(&MAJOR.to_ne_bytes());
        request
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let request = request();
        let record = Record { number: (0, 48), request: &request, answer: b"answer" };
        let written = record.write();
        assert_eq!(Record::parse(&written).unwrap(), record);
    }

    #[test]
    fn other_records_are_refused() {
        let request = request();
        let good = Record { number: (0, 48), request: &request, answer: b"answer" }.write();
        let with = |at: usize, byte: u8| {
            let mut changed = good.clone();
            changed[at] = byte;
            changed
        };
        for (bytes, why) in [
            (Vec::new(), "is too short"),
            (good[..HEAD].to_vec(), "is too short"),
            (with(0, b'X'), "is something else"),
            (with(8, 2), "is of a newer version"),
            (with(12, 1), "is of a newer version"),
            (with(27, 255), "is too short"),
            (good[..good.len() - 1].to_vec(), "has the wrong length"),
            ([&good[..], b"x"].concat(), "has the wrong length"),
            (with(HEAD + 4, 1), "does not begin with the kernel's first request"),
            (with(HEAD + 40, 8), "is about another protocol"),
        ] {
            match Record::parse(&bytes) {
                Err(LinkError::Record(found)) => assert_eq!(found, why),
                other => panic!("{why}: {other:?}"),
            }
        }
        for length in 0..good.len() {
            assert!(Record::parse(&good[..length]).is_err(), "{length}");
        }
    }

    #[test]
    fn both_descriptors_are_needed() {
        let record = || sealed_record("test", &Record { number: (0, 1), request: &request(), answer: b"" }.write());
        let device = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        assert!(matches!(Kept::found(vec![]), Err(LinkError::Incomplete)));
        assert!(matches!(Kept::found(vec![record().unwrap()]), Err(LinkError::Incomplete)));
        assert!(matches!(Kept::found(vec![device()]), Err(LinkError::Incomplete)));
        for both in [vec![record().unwrap(), device()], vec![device(), record().unwrap()]] {
            let kept = Kept::found(both).unwrap();
            let place = tempfile::tempdir().unwrap();
            // Nothing is mounted there, and the device is none of FUSE.
            let refused = Link::take_up(kept, place.path()).unwrap_err();
            assert!(matches!(refused, LinkError::Elsewhere(_) | LinkError::Over), "{refused}");
        }
    }
}
