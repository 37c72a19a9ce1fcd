//! FUSE connections: a mount and the descriptor that its requests come through.
//!
//! Root mounts directly, with the options a container's root file system needs; anybody else goes through the set-uid
//! helper `fusermount3`, which forces `nosuid` and `nodev`. Both kinds are read-only and show as type `fuse.headstart`.

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::mount::MountFlags;

use super::descriptors::receive;
use super::mount::{MountError, Unmount, mounted_on};

/// The type under which mounts show in the mount table.
pub const MOUNT_KIND: &str = "fuse.headstart";

/// How a connection is mounted.
#[derive(Debug, Clone)]
pub struct FuseMountOptions {
    /// What the mount table shows as the source: the image's name.
    pub source: String,
    /// Other users may use the mount. An ordinary user needs `user_allow_other` in `/etc/fuse.conf` for it.
    pub allow_other: bool,
    /// The kernel checks owners and modes. Without it everybody who may use the mount may read everything.
    pub default_permissions: bool,
}

/// Mounts a new connection on `mount_point` (checked by [`check_mount_point`](super::mount::check_mount_point)) and
/// gives its descriptor. Set-uid programs and devices work if root mounts.
///
/// # Errors
/// See [`MountError`].
pub fn mount_fuse(mount_point: &Path, options: &FuseMountOptions) -> Result<OwnedFd, MountError> {
    if rustix::process::geteuid().is_root() {
        match mount_directly(mount_point, options) {
            // A container's root may lack the capability and still have the helper.
            Err(MountError::System { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {}
            other => return other,
        }
    }
    mount_through_helper(mount_point, options)
}

fn mount_directly(mount_point: &Path, options: &FuseMountOptions) -> Result<OwnedFd, MountError> {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").map_err(|error| {
        if error.kind() == io::ErrorKind::PermissionDenied {
            MountError::system("open", Path::new("/dev/fuse"), error)
        } else {
            MountError::NoFuse(error)
        }
    })?;
    let mut data = format!(
        "fd={},rootmode=40000,user_id={},group_id={}",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw()
    );
    if options.allow_other {
        data.push_str(",allow_other");
    }
    if options.default_permissions {
        data.push_str(",default_permissions");
    }
    let data = CString::new(data).expect("the options hold no NUL");
    rustix::mount::mount(options.source.as_str(), mount_point, MOUNT_KIND, MountFlags::RDONLY, data.as_c_str())
        .map_err(|errno| MountError::system("mount FUSE on", mount_point, errno))?;
    Ok(device.into())
}

fn mount_through_helper(mount_point: &Path, options: &FuseMountOptions) -> Result<OwnedFd, MountError> {
    let failed = |error: io::Error| MountError::system("talk to fusermount3 about", mount_point, error);
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    // In the helper's option string a comma separates and a backslash protects.
    let source = options.source.replace('\\', "\\\\").replace(',', "\\,");
    let mut words = format!("ro,fsname={source},subtype=headstart");
    if options.allow_other {
        words.push_str(",allow_other");
    }
    if options.default_permissions {
        words.push_str(",default_permissions");
    }
    // The helper sends the descriptor through the socket that this variable names: here its standard input.
    let mut child = Command::new("fusermount3")
        .env("_FUSE_COMMFD", "0")
        .args(["-o", &words, "--"])
        .arg(mount_point)
        .stdin(OwnedFd::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(MountError::NoHelper)?;
    // The other side closes without a descriptor if it failed.
    let device = receive(&ours, &mut [0]).map(|(_, descriptors)| descriptors.into_iter().next());
    let mut message = String::new();
    if let Some(mut stderr) = child.stderr.take() {
        // Unreadable complaints leave the message empty; the exit status still counts.
        drop(stderr.read_to_string(&mut message));
    }
    let status = child.wait().map_err(failed)?;
    match device {
        Ok(Some(device)) if status.success() => Ok(device),
        Err(error) if status.success() => Err(failed(error)),
        _ => {
            let message = message.trim().trim_start_matches("fusermount3: ").to_owned();
            Err(MountError::Helper { path: mount_point.to_owned(), message })
        }
    }
}

/// Removes a user's mount through the helper.
pub(super) fn unmount_through_helper(mount_point: &Path, how: Unmount) -> Result<(), MountError> {
    let mut command = Command::new("fusermount3");
    command.arg("-u");
    if how == Unmount::Lazy {
        command.arg("-z");
    }
    let output = command.arg("--").arg(mount_point).stdin(Stdio::null()).output().map_err(MountError::NoHelper)?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    let message = message.trim().trim_start_matches("fusermount3: ");
    if message.contains("Device or resource busy") {
        return Err(MountError::InUse(mount_point.to_owned()));
    }
    if message.contains("not found in /etc/mtab") || message.contains("Invalid argument") {
        return Err(MountError::NotMounted(mount_point.to_owned()));
    }
    Err(MountError::Helper { path: mount_point.to_owned(), message: message.to_owned() })
}

/// Sets how far the kernel reads ahead on the mount at `mount_point`, in KiB (root only). FUSE mounts start with the
/// kernel's default of 128.
///
/// # Errors
/// There is no such mount, or the setting could not be written.
pub fn set_read_ahead(mount_point: &Path, kibibytes: u32) -> io::Result<()> {
    let entry = mounted_on(mount_point)?.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
    let setting = format!("/sys/class/bdi/{}:{}/read_ahead_kb", entry.major, entry.minor);
    fs::write(setting, kibibytes.to_string())
}

/// Room for the kernel's first request. It wants more than the request has (`FUSE_MIN_READ_BUFFER`).
const FIRST_REQUEST: usize = 8192;

/// Reads the first request of a connection that nobody has served yet, as it is. Waits for it.
///
/// # Errors
/// What the kernel says: `ENODEV` if it was unmounted meanwhile.
pub fn first_request(device: impl AsFd) -> io::Result<Box<[u8]>> {
    let mut buffer = vec![0; FIRST_REQUEST];
    let length = rustix::io::retry_on_intr(|| rustix::io::read(&device, &mut *buffer))?;
    buffer.truncate(length);
    Ok(buffer.into())
}

/// `struct fuse_out_header`: length, error or kind of message, number of the request.
fn header(error: i32, unique: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&16_u32.to_ne_bytes());
    header[4..8].copy_from_slice(&error.to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    header
}

/// Asks the kernel to send every request again that was read and not answered. True if it does: it can since Linux 6.9
/// (`FUSE_NOTIFY_RESEND`).
///
/// # Errors
/// What the kernel says, but for that it does not know this.
pub fn resend(device: impl AsFd) -> io::Result<bool> {
    const FUSE_NOTIFY_RESEND: i32 = 7;
    match rustix::io::write(device, &header(FUSE_NOTIFY_RESEND, 0)) {
        Ok(_) => Ok(true),
        Err(Errno::INVAL) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Answers request `unique` with `errno`. False if nobody waits for an answer to it.
///
/// # Errors
/// What the kernel says else.
pub fn refuse(device: impl AsFd, unique: u64, errno: i32) -> io::Result<bool> {
    match rustix::io::write(device, &header(-errno, unique)) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// True if the connection that is mounted on `path` is over: nobody serves it, and nobody keeps it for a server to come. It is
/// asked what only a server can answer, on a thread of its own, since one that is kept answers when there is a server again; who
/// has not answered within `patience` is taken for that.
pub fn is_over(path: &Path, patience: Duration) -> bool {
    let (tell, told) = sync_channel(1);
    let asked = path.to_owned();
    let asking = thread::Builder::new().name("ask-fuse".to_owned()).spawn(move || {
        // Who does not want to know any more has gone.
        tell.send(rustix::fs::statfs(&asked).is_ok()).ok();
    });
    match asking.map(|_| told.recv_timeout(patience)) {
        Ok(Ok(answered)) => !answered,
        Ok(Err(RecvTimeoutError::Timeout)) => false,
        Ok(Err(RecvTimeoutError::Disconnected)) | Err(_) => true,
    }
}

/// True as long as there is a connection behind `device`: it is mounted or in use, and nobody aborted it.
pub fn is_connected(device: impl AsFd) -> bool {
    let mut descriptors = [PollFd::new(&device, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let asked = rustix::io::retry_on_intr(|| poll(&mut descriptors, Some(&now)));
    let over = PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL;
    asked.is_ok() && !descriptors.iter().any(|descriptor| descriptor.revents().intersects(over))
}
