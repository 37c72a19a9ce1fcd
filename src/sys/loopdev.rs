//! Loop devices: a file as a read-only block device, whose file can be exchanged while the device is mounted.
//!
//! Every device made here is read-only and clears itself when its last user goes, be that a mount or a descriptor. So a
//! process that is killed leaves no device that nothing uses. Calls that make the kernel read the file (all that attach
//! or exchange) block as long as that file does; they belong on a thread that serves nothing. While an exchange waits for
//! reads, to *open* that device waits too, and no signal ends it: who looks for a device opens none that it need not.
//!
//! Source: `include/uapi/linux/loop.h` and `drivers/block/loop.c` of Linux. Refuses to know what the files hold.

#![expect(unsafe_code, reason = "loop devices are driven by ioctls that no library has")]

use std::ffi::c_ulong;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode};
use rustix::io::Errno;

use super::apart::ioctl_apart;

const LOOP_CLR_FD: c_ulong = 0x4C01;
const LOOP_GET_STATUS64: c_ulong = 0x4C05;
const LOOP_CHANGE_FD: c_ulong = 0x4C06;
const LOOP_SET_DIRECT_IO: c_ulong = 0x4C08;
const LOOP_CONFIGURE: c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: c_ulong = 0x4C82;

const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// Major number of loop devices (`Documentation/admin-guide/devices.txt`).
const LOOP_MAJOR: u32 = 7;

/// How often a free number is asked for. Between the answer and its use another process may take it; with a hundred
/// processes at it, one that loses a hundred times in a row has met something else.
const RACES: u32 = 100;

const CONTROL: &str = "/dev/loop-control";

/// Longest label of a device, in bytes: `lo_file_name` has 64 with the final NUL.
pub const LABEL_LIMIT: usize = 63;

/// Why a loop device could not be made or changed.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// The kernel, or the container this runs in, has none.
    #[error(
        "there are no loop devices here ({CONTROL} cannot be opened): load the module `loop` (`modprobe loop`), or \
         pass {CONTROL} into the container"
    )]
    None(#[source] io::Error),
    /// All are taken.
    #[error("no loop device is free: detach some (`losetup -l`), or raise `max_loop` of the module `loop`")]
    Exhausted(#[source] io::Error),
    /// The device has no node and none can be made.
    #[error("loop device {number} has no node {path}, and it cannot be made", path = path.display())]
    NoNode {
        /// Number of the device.
        number: u32,
        /// Where its node should be.
        path: PathBuf,
        /// Why it cannot be made.
        #[source]
        source: io::Error,
    },
    /// The file cannot back a device, or not this one.
    #[error("{path} cannot back loop device {number}: it has {found} bytes, and the device has {wanted}", path = path.display())]
    Size {
        /// Number of the device.
        number: u32,
        /// The file.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// Size of the file behind the device.
        wanted: u64,
    },
    /// After an exchange the device names another file than the one it was given.
    #[error("loop device {number} reads {found} and not {wanted}", found = found.display(), wanted = wanted.display())]
    Elsewhere {
        /// Number of the device.
        number: u32,
        /// What it names.
        found: PathBuf,
        /// What it was given.
        wanted: PathBuf,
    },
    /// A system call failed.
    #[error("cannot {action} loop device {number} ({path})", path = path.display())]
    System {
        /// What was attempted.
        action: &'static str,
        /// Number of the device.
        number: u32,
        /// The file behind it.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A file of this machine's own could not be used.
    #[error("cannot {action} {path}", path = path.display())]
    File {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl LoopInfo {
    const fn new() -> Self {
        Self {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: 0,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// What is known of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoopStatus {
    /// Device number of the file system that holds the file behind it.
    pub device: u64,
    /// Inode number of that file.
    pub inode: u64,
    /// It cannot be written to.
    pub read_only: bool,
    /// It goes when its last user goes.
    pub clears_itself: bool,
    /// It reads past the page cache of the file behind it.
    pub direct_io: bool,
    /// What its maker called it.
    pub label: String,
}

/// A loop device that is in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoopEntry {
    /// Its number.
    pub number: u32,
    /// The file behind it as the kernel names it now: ` (deleted)` is appended to one that has no name any more, and one
    /// in a file system that was unmounted is named from that file system's root.
    pub backing: PathBuf,
}

impl LoopEntry {
    /// What the file behind it is called, whether or not it still is; nothing of where it is.
    pub fn file_name(&self) -> &[u8] {
        let name = self.backing.file_name().unwrap_or_default().as_bytes();
        name.strip_suffix(b" (deleted)").unwrap_or(name)
    }

    /// Whether nothing was being read from it at a moment of the next `patience`. One of which that is not true may be in
    /// the middle of an exchange that waits for these reads, and whoever opens it then waits as well, in a way that no
    /// signal ends.
    pub fn rests_within(&self, patience: Duration) -> bool {
        let under_way = || {
            let told = fs::read_to_string(format!("/sys/block/loop{}/inflight", self.number)).unwrap_or_default();
            told.split_whitespace().any(|count| count != "0")
        };
        let deadline = Instant::now() + patience;
        while under_way() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        true
    }
}

/// A loop device, held open. It goes when the last of this, its mounts and other descriptors goes.
#[derive(Debug)]
pub struct LoopDevice {
    file: File,
    number: u32,
    node: PathBuf,
}

impl LoopDevice {
    /// A new read-only device on the regular file `backing`, open for reading; `path` is its name. `label` is kept by the
    /// kernel; what is longer than [`LABEL_LIMIT`] is cut off.
    ///
    /// # Errors
    /// See [`LoopError`].
    pub fn attach(backing: &File, path: &Path, label: &str) -> Result<Self, LoopError> {
        let control = open_control()?;
        let mut info = LoopInfo::new();
        info.flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR;
        for (to, from) in info.file_name.iter_mut().zip(label.bytes().take(LABEL_LIMIT)) {
            *to = from;
        }
        let fd = u32::try_from(backing.as_raw_fd()).expect("a descriptor is not negative");
        let mut config = LoopConfig { fd, block_size: 0, info, reserved: [0; 8] };
        let mut last = Errno::BUSY;
        for _ in 0..RACES {
            let number = ask(&control, LOOP_CTL_GET_FREE, 0).map_err(|errno| match errno {
                Errno::NOSPC | Errno::NODEV | Errno::NOMEM => LoopError::Exhausted(errno.into()),
                errno => LoopError::None(errno.into()),
            })?;
            let device = match Self::open(number) {
                Ok(device) => device,
                // Somebody removed it again.
                Err(LoopError::File { source, .. }) if is_gone(&source) => continue,
                Err(error) => return Err(error),
            };
            // SAFETY: the kernel reads one `struct loop_config` behind the pointer, which `config` is, and keeps no pointer.
            let done = unsafe { libc::ioctl(device.file.as_raw_fd(), LOOP_CONFIGURE, &raw mut config) };
            if done == 0 {
                return Ok(device);
            }
            last = last_errno();
            if !matches!(last, Errno::BUSY | Errno::NXIO | Errno::INTR) {
                return Err(device.failed("attach", path, last));
            }
        }
        Err(LoopError::Exhausted(last.into()))
    }

    /// The device with this number, whoever made it.
    ///
    /// # Errors
    /// See [`LoopError`].
    pub fn open(number: u32) -> Result<Self, LoopError> {
        let node = PathBuf::from(format!("/dev/loop{number}"));
        make_node(number, &node)?;
        let file =
            File::open(&node).map_err(|source| LoopError::File { action: "open", path: node.clone(), source })?;
        Ok(Self { file, number, node })
    }

    /// Its number.
    pub const fn number(&self) -> u32 {
        self.number
    }

    /// Its node in `/dev`.
    pub fn node(&self) -> &Path {
        &self.node
    }

    /// Exchanges the file behind the device, which may be mounted and in use: what is being read is read to its end from
    /// the old file, what is asked for later comes from the new one. Both must have the same bytes; the kernel checks
    /// that they have the same size, and that the device is read-only. Afterwards the device is looked at: it reads the
    /// new file. If it did so before, it is left alone, and nobody waits.
    ///
    /// # Errors
    /// [`LoopError::Size`] and what the kernel says; the device then reads the old file. [`LoopError::Elsewhere`].
    pub fn change_backing(&self, backing: &File, path: &Path) -> Result<(), LoopError> {
        let metadata = backing.metadata().map_err(|source| LoopError::File {
            action: "look at",
            path: path.to_owned(),
            source,
        })?;
        let reads_it =
            |status: &LoopStatus| (status.inode, rustix_device(status.device)) == (metadata.ino(), metadata.dev());
        if self.status().is_ok_and(|status| reads_it(&status)) {
            return Ok(());
        }
        let wanted = self.size()?;
        if metadata.len() / 512 * 512 != wanted {
            return Err(LoopError::Size { number: self.number, path: path.to_owned(), found: metadata.len(), wanted });
        }
        ioctl_apart(self.file.as_fd(), LOOP_CHANGE_FD, backing.as_fd())
            .map_err(|errno| self.failed("exchange the file behind", path, errno))?;
        if !reads_it(&self.status()?) {
            let found = backing_of(self.number).ok().flatten().unwrap_or_default();
            return Err(LoopError::Elsewhere { number: self.number, found, wanted: path.to_owned() });
        }
        Ok(())
    }

    /// Lets the device read past the page cache of the file behind it, or through it again.
    ///
    /// # Errors
    /// The file system of that file cannot.
    pub fn set_direct_io(&self, on: bool) -> Result<(), LoopError> {
        ask_usize(&self.file, LOOP_SET_DIRECT_IO, i32::from(on)).map(drop).map_err(|errno| {
            let path = backing_of(self.number).ok().flatten().unwrap_or_default();
            self.failed("switch direct I/O of", &path, errno)
        })
    }

    /// What is known of it.
    ///
    /// # Errors
    /// It has no file behind it any more.
    pub fn status(&self) -> Result<LoopStatus, LoopError> {
        let mut info = LoopInfo::new();
        // SAFETY: the kernel writes one `struct loop_info64` behind the pointer, which `info` is; all its values are valid.
        let done = unsafe { libc::ioctl(self.file.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) };
        if done != 0 {
            return Err(self.failed("look at", Path::new(""), last_errno()));
        }
        let label = info.file_name.split(|byte| *byte == 0).next().unwrap_or_default();
        Ok(LoopStatus {
            device: info.device,
            inode: info.inode,
            read_only: info.flags & LO_FLAGS_READ_ONLY != 0,
            clears_itself: info.flags & LO_FLAGS_AUTOCLEAR != 0,
            direct_io: info.flags & LO_FLAGS_DIRECT_IO != 0,
            label: String::from_utf8_lossy(label).into_owned(),
        })
    }

    /// Takes the file away now, or when the last other user is gone. Of no use for devices made here, which do that by
    /// themselves.
    ///
    /// # Errors
    /// It has no file behind it.
    pub fn detach(&self) -> Result<(), LoopError> {
        ask(&self.file, LOOP_CLR_FD, 0).map(drop).map_err(|errno| self.failed("detach", &self.node, errno))
    }

    /// Size in bytes.
    fn size(&self) -> Result<u64, LoopError> {
        let path = PathBuf::from(format!("/sys/block/loop{}/size", self.number));
        let failed = |source| LoopError::File { action: "read", path: path.clone(), source };
        let sectors: u64 = fs::read_to_string(&path)
            .map_err(failed)?
            .trim()
            .parse()
            .map_err(|error| failed(io::Error::new(io::ErrorKind::InvalidData, error)))?;
        Ok(sectors.saturating_mul(512))
    }

    fn failed(&self, action: &'static str, path: &Path, errno: Errno) -> LoopError {
        LoopError::System { action, number: self.number, path: path.to_owned(), source: errno.into() }
    }
}

/// The loop devices that have a file behind them, by number.
///
/// # Errors
/// `/sys` could not be read.
pub fn loop_devices() -> io::Result<Vec<LoopEntry>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block")? {
        let name = entry?.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("loop")).and_then(|number| number.parse().ok());
        if let Some(number) = number
            && let Some(backing) = backing_of(number)?
        {
            found.push(LoopEntry { number, backing });
        }
    }
    found.sort_by_key(|entry| entry.number);
    Ok(found)
}

/// The file behind a device, as the kernel names it; none if it has none.
///
/// # Errors
/// `/sys` could not be read.
pub fn backing_of(number: u32) -> io::Result<Option<PathBuf>> {
    use std::os::unix::ffi::OsStringExt as _;
    match fs::read(format!("/sys/block/loop{number}/loop/backing_file")) {
        Ok(mut name) => {
            if name.last() == Some(&b'\n') {
                name.pop();
            }
            Ok((!name.is_empty()).then(|| std::ffi::OsString::from_vec(name).into()))
        }
        // The directory is there only while a file is.
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOENT | Errno::NXIO | Errno::NODEV))
}

/// Whether loop devices can be asked for at all.
///
/// # Errors
/// [`LoopError::None`].
pub fn check_loop_control() -> Result<(), LoopError> {
    open_control().map(drop)
}

fn open_control() -> Result<File, LoopError> {
    let open = || OpenOptions::new().read(true).write(true).open(CONTROL);
    open()
        .or_else(|error| if is_gone(&error) && load_module("loop") { open() } else { Err(error) })
        .map_err(LoopError::None)
}

/// Loads a kernel module if there is a program to do it; true if that program was content.
fn load_module(name: &str) -> bool {
    let mut modprobe = std::process::Command::new("modprobe");
    modprobe.args(["-q", "--", name]).stdin(std::process::Stdio::null());
    modprobe.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    modprobe.status().is_ok_and(|status| status.success())
}

/// Sees to it that device `number` has a node: containers have a `/dev` of their own, where nobody adds new ones.
fn make_node(number: u32, node: &Path) -> Result<(), LoopError> {
    if fs::metadata(node).is_ok_and(|metadata| metadata.file_type().is_block_device()) {
        return Ok(());
    }
    let device = rustix::fs::makedev(LOOP_MAJOR, number);
    let mode = Mode::RUSR | Mode::WUSR;
    match rustix::fs::mknodat(rustix::fs::CWD, node, FileType::BlockDevice, mode, device) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(LoopError::NoNode { number, path: node.to_owned(), source: errno.into() }),
    }
}

/// `lo_device` is the kernel's `huge_encode_dev`, which is laid out as the C library's is not.
fn rustix_device(kernel: u64) -> u64 {
    let major = u32::try_from((kernel >> 8) & 0xfff).unwrap_or_default();
    let minor = u32::try_from((kernel & 0xff) | ((kernel >> 12) & 0xf_ff00)).unwrap_or_default();
    rustix::fs::makedev(major, minor)
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// An ioctl with a number for an argument, that answers with a number.
fn ask(file: &File, request: c_ulong, argument: c_ulong) -> Result<u32, Errno> {
    // SAFETY: all requests that come here take a plain number and touch no memory of this process.
    let answer = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    u32::try_from(answer).map_err(|_| last_errno())
}

fn ask_usize(file: &File, request: c_ulong, argument: i32) -> Result<u32, Errno> {
    ask(file, request, c_ulong::try_from(argument).map_err(|_| Errno::BADF)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Seek as _, SeekFrom};

    fn file(byte: u8, len: usize) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), vec![byte; len]).unwrap();
        file
    }

    fn first_byte(device: &LoopDevice) -> u8 {
        // Past the page cache of the device.
        let mut reader = File::open(device.node()).unwrap();
        rustix::fs::fadvise(&reader, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let mut byte = [0];
        reader.seek(SeekFrom::Start(0)).unwrap();
        reader.read_exact(&mut byte).unwrap();
        byte[0]
    }

    #[test]
    fn a_device_reads_its_file_and_goes_with_its_owner() {
        let backing = file(7, 8192);
        let device = LoopDevice::attach(backing.as_file(), backing.path(), "headstart:test").unwrap();
        let status = device.status().unwrap();
        assert!(status.read_only && status.clears_itself && !status.direct_io);
        assert_eq!(status.label, "headstart:test");
        assert_eq!(first_byte(&device), 7);
        let entry = LoopEntry { number: device.number(), backing: backing.path().to_owned() };
        assert!(loop_devices().unwrap().contains(&entry));
        drop(device);
        // Another program that looks at devices may still hold it.
        let deadline = Instant::now() + Duration::from_secs(30);
        while loop_devices().unwrap().contains(&entry) {
            assert!(Instant::now() < deadline, "the device stays");
            std::thread::yield_now();
        }
    }

    #[test]
    fn the_file_behind_a_device_is_exchanged() {
        let (old, new) = (file(1, 8192), file(2, 8192));
        let device = LoopDevice::attach(old.as_file(), old.path(), "").unwrap();
        assert_eq!(first_byte(&device), 1);
        device.change_backing(new.as_file(), new.path()).unwrap();
        assert_eq!(first_byte(&device), 2);
        assert_eq!(backing_of(device.number()).unwrap().as_deref(), Some(new.path()));
        // By another name, and through another descriptor.
        let again = File::open(new.path()).unwrap();
        device.change_backing(&again, Path::new("another name")).unwrap();
        assert_eq!(first_byte(&device), 2);
        for len in [4096, 8192 + 512, 0] {
            let other = file(3, len);
            let refused = device.change_backing(other.as_file(), other.path());
            assert!(matches!(refused, Err(LoopError::Size { wanted: 8192, .. })), "{refused:?}");
        }
        assert_eq!(first_byte(&device), 2);
    }

    #[test]
    fn a_device_is_known_without_being_opened() {
        for (backing, name) in [
            ("/var/lib/headstart/blobs/a/image", "image"),
            ("/var/lib/headstart/blobs/a/image (deleted)", "image"),
            ("/layers/sha256:00", "sha256:00"),
            ("/", ""),
        ] {
            let entry = LoopEntry { number: 0, backing: backing.into() };
            assert_eq!(entry.file_name(), name.as_bytes(), "{backing}");
        }
        let backing = file(1, 4096);
        let device = LoopDevice::attach(backing.as_file(), backing.path(), "").unwrap();
        let entry = LoopEntry { number: device.number(), backing: backing.path().to_owned() };
        assert!(entry.rests_within(Duration::from_secs(30)));
    }

    #[test]
    fn a_label_that_is_too_long_is_cut() {
        let backing = file(0, 4096);
        let device = LoopDevice::attach(backing.as_file(), backing.path(), &"x".repeat(100)).unwrap();
        assert_eq!(device.status().unwrap().label, "x".repeat(LABEL_LIMIT));
    }

    #[test]
    fn many_at_once_get_devices_of_their_own() {
        let files: Vec<_> = (0..12).map(|byte| file(byte, 4096)).collect();
        let numbers = std::thread::scope(|scope| {
            let threads: Vec<_> = files
                .iter()
                .zip(0_u8..)
                .map(|(file, byte)| {
                    scope.spawn(move || {
                        let device = LoopDevice::attach(file.as_file(), file.path(), "").unwrap();
                        assert_eq!(first_byte(&device), byte);
                        device
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        let mut distinct: Vec<u32> = numbers.iter().map(LoopDevice::number).collect();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), files.len());
    }

    #[test]
    fn device_numbers_are_translated() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let device = LoopDevice::attach(file.as_file(), file.path(), "").unwrap();
        let status = device.status().unwrap();
        let metadata = file.as_file().metadata().unwrap();
        assert_eq!((rustix_device(status.device), status.inode), (metadata.dev(), metadata.ino()));
    }
}
