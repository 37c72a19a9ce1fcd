//! FUSE connections: a mount and the descriptor that its requests come through.
//!
//! Root mounts directly, with the options a container's root file system needs; anybody else goes through the set-uid
//! helper `fusermount3`, which forces `nosuid` and `nodev`. Both kinds are read-only and show as type `fuse.headstart`.

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io::{self, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::mount::MountFlags;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};

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
    let device = receive_descriptor(&ours);
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

/// The descriptor that the other side sends, none if it closes without one.
fn receive_descriptor(socket: &UnixStream) -> io::Result<Option<OwnedFd>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    loop {
        let mut messages = RecvAncillaryBuffer::new(&mut space);
        let buffers = &mut [IoSliceMut::new(&mut byte)];
        match rustix::net::recvmsg(socket, buffers, &mut messages, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(_) => {
                return Ok(messages.drain().find_map(|message| match message {
                    RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
                    _ => None,
                }));
            }
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
