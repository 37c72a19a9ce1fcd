//! Mounts that show the files of others under other user and group ids (Linux 5.12, as lower directories of overlayfs 5.19).
//!
//! The kernel takes the ids from a user namespace, and makes one only together with a process. Here that is a copy of this
//! process that does nothing and is ended as soon as the ids are written down; the namespace stays with its descriptor.
//!
//! Source: `mount_setattr(2)`, `user_namespaces(7)`. Making the copy needs the capabilities SYS_ADMIN, SETUID, SETGID and, to
//! map root, SETFCAP. Refuses to know whose ids they are.

#![expect(
    unsafe_code,
    reason = "no library makes a process that is in a user namespace alone, or maps the ids of a mount"
)]

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr;

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use super::mount::{MountError, Unmount, unmount};
use super::stack::{OverlayMount, attach, mount_overlay};

const MOUNT_ATTR_RDONLY: u64 = 1;
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// `struct mount_attr` (`include/uapi/linux/mount.h`), as it has been from the start.
#[repr(C)]
struct Attributes {
    set: u64,
    clear: u64,
    propagation: u64,
    namespace: u64,
}

/// Ids that follow each other, and what each becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// The first one, as files have it.
    pub from: u32,
    /// What that one becomes.
    pub to: u32,
    /// How many there are.
    pub length: u32,
}

/// Which ids become which. What is not named becomes nobody.
#[derive(Debug)]
pub struct IdMap(OwnedFd);

impl IdMap {
    /// The kernel takes 340 ranges each, of which no two overlap.
    ///
    /// # Errors
    /// The kernel makes no such namespace.
    pub fn new(users: &[IdRange], groups: &[IdRange]) -> io::Result<Self> {
        let idle = Idle::start()?;
        fs::write(idle.file("uid_map"), lines(users))?;
        fs::write(idle.file("gid_map"), lines(groups))?;
        Ok(Self(File::open(idle.file("ns/user"))?.into()))
    }

    /// Shows the directory `from` on `target` under these ids, read-only. Mounts inside of it are not shown.
    ///
    /// # Errors
    /// See [`MountError`]; a file system whose ids cannot be mapped is `EINVAL`.
    pub fn mount(&self, from: &Path, target: &Path) -> Result<(), MountError> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = rustix::mount::open_tree(CWD, from, flags)
            .map_err(|errno| MountError::system("open for other ids", from, errno))?;
        self.apply_to(&tree).map_err(|error| MountError::system("map the ids of", from, error))?;
        attach(&tree, target).map_err(|errno| MountError::system("mount with other ids on", target, errno))
    }

    fn apply_to(&self, tree: &OwnedFd) -> io::Result<()> {
        let namespace = u64::try_from(self.0.as_raw_fd()).expect("an open descriptor has a number from 0 on");
        let attributes = Attributes { set: MOUNT_ATTR_RDONLY | MOUNT_ATTR_IDMAP, clear: 0, propagation: 0, namespace };
        // SAFETY: the kernel reads one empty string and one `struct mount_attr` of the size that it is told, which both live
        // until it returns, and keeps no pointer.
        let done = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                tree.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH,
                &raw const attributes,
                size_of::<Attributes>(),
            )
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Each range in a line, as `/proc` takes them.
fn lines(ranges: &[IdRange]) -> String {
    let mut text = String::new();
    for IdRange { from, to, length } in ranges {
        writeln!(text, "{from} {to} {length}").expect("writing to a string never fails");
    }
    text
}

/// A process in a user namespace of its own that does nothing. Dropping it ends it.
struct Idle(Pid);

impl Idle {
    fn start() -> io::Result<Self> {
        // With this process's table of descriptors: a copy would keep files open, and mounts busy, that are closed here meanwhile.
        let flags = libc::CLONE_NEWUSER | libc::CLONE_FILES | libc::SIGCHLD;
        // Not `clone3`, which a service manager that restricts namespaces takes away.
        // SAFETY: without a stack and without CLONE_VM this is a fork: the copy has memory of its own and goes on below, where it
        // makes system calls that touch no memory, takes no lock and never returns. So it does not matter what other threads
        // were doing at this moment. The arguments are in this order on every processor but s390.
        let answer = unsafe { libc::syscall(libc::SYS_clone, flags, 0_usize, 0_usize, 0_usize, 0_usize) };
        match answer {
            0 => do_nothing(),
            _ => {
                let pid = i32::try_from(answer).ok().and_then(Pid::from_raw);
                pid.filter(|_| answer > 0).map(Self).ok_or_else(io::Error::last_os_error)
            }
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        format!("/proc/{}/{name}", self.0.as_raw_nonzero()).into()
    }
}

/// What the copy does.
fn do_nothing() -> ! {
    // SAFETY: it ends with whoever made it, should that be killed; a plain number is all that the kernel takes.
    unsafe { libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0_usize, 0_usize, 0_usize) };
    loop {
        // SAFETY: no descriptors to wait for, no time, no signals: the kernel reads and writes nothing.
        unsafe {
            libc::syscall(libc::SYS_ppoll, ptr::null::<u8>(), 0_usize, ptr::null::<u8>(), ptr::null::<u8>(), 0_usize);
        }
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        // Nobody else waits for it, so the number is still its own.
        if let Err(error) = kill_process(self.0, Signal::KILL) {
            tracing::warn!(pid = self.0.as_raw_nonzero(), %error, "a process that holds a user namespace is not ended");
            return;
        }
        while matches!(waitpid(Some(self.0), WaitOptions::empty()), Err(Errno::INTR)) {}
    }
}

/// True if something is mounted on exactly `path`. Asks no server of what may be mounted there.
///
/// # Errors
/// What the kernel says, but for that there is no `path`.
pub fn is_mount_point(path: &Path) -> io::Result<bool> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    match rustix::fs::statx(CWD, path, flags, StatxFlags::empty()) {
        Ok(found) => Ok(found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether this process can stack directories under other ids. `scratch` is where it may try.
///
/// # Errors
/// See [`MountError`].
pub fn try_mapped_overlay(scratch: &Path) -> Result<(), MountError> {
    let place = tempfile::tempdir_in(scratch).map_err(|error| MountError::system("try in", scratch, error))?;
    let make = |name: &str| {
        let path = place.path().join(name);
        fs::create_dir(&path).map_err(|error| MountError::system("create", &path, error)).map(|()| path)
    };
    let (lower, other, mapped, target) = (make("lower")?, make("other")?, make("mapped")?, make("target")?);
    let ranges = [IdRange { from: 0, to: 1, length: 1 }];
    let map = IdMap::new(&ranges, &ranges)
        .map_err(|error| MountError::system("make a user namespace to try in", scratch, error))?;
    map.mount(&lower, &mapped)?;
    let overlay = OverlayMount { source: "headstart", lowers: &[mapped.clone(), other], upper: None };
    let tried = mount_overlay(&overlay, &target).and_then(|()| unmount(&target, Unmount::Lazy));
    let cleared = unmount(&mapped, Unmount::Lazy);
    tried.and(cleared)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, chown};

    use super::*;

    fn owner(path: &Path) -> (u32, u32) {
        let found = fs::metadata(path).unwrap();
        (found.uid(), found.gid())
    }

    #[test]
    fn files_are_shown_under_other_ids() {
        let dir = tempfile::tempdir().unwrap();
        let [from, target] = ["from", "target"].map(|name| dir.path().join(name));
        fs::create_dir(&from).unwrap();
        fs::create_dir(&target).unwrap();
        for (name, user, group) in [("root", 0, 0), ("mapped", 5, 7), ("edge", 99, 999), ("beyond", 100, 1000)] {
            fs::write(from.join(name), name).unwrap();
            chown(from.join(name), Some(user), Some(group)).unwrap();
        }
        let users = [IdRange { from: 0, to: 70_000, length: 1 }, IdRange { from: 1, to: 100_001, length: 99 }];
        let groups = [IdRange { from: 0, to: 200_000, length: 1000 }];
        assert!(!is_mount_point(&target).unwrap());
        IdMap::new(&users, &groups).unwrap().mount(&from, &target).unwrap();
        assert!(is_mount_point(&target).unwrap());
        let nobody = 65534;
        for (name, user, group) in [
            ("root", 70_000, 200_000),
            ("mapped", 100_005, 200_007),
            ("edge", 100_099, 200_999),
            ("beyond", nobody, nobody),
        ] {
            assert_eq!(owner(&target.join(name)), (user, group), "{name}");
            assert_eq!(fs::read_to_string(target.join(name)).unwrap(), name);
        }
        assert_eq!(fs::write(target.join("root"), "").unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
        assert_eq!(owner(&from.join("mapped")), (5, 7));
        unmount(&target, Unmount::Strict).unwrap();
        assert!(!is_mount_point(&dir.path().join("gone")).unwrap());
    }

    #[test]
    fn many_threads_make_namespaces_at_once() {
        let ranges = [IdRange { from: 0, to: 100_000, length: 10 }];
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..10 {
                        IdMap::new(&ranges, &ranges).unwrap();
                    }
                });
            }
        });
    }

    #[test]
    fn what_the_kernel_does_not_take_is_refused() {
        let twice = [IdRange { from: 0, to: 10, length: 10 }, IdRange { from: 5, to: 100, length: 10 }];
        let fine = [IdRange { from: 0, to: 10, length: 1 }];
        assert_eq!(IdMap::new(&twice, &fine).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        // What has no owners that could be others.
        let dir = tempfile::tempdir().unwrap();
        let refused = IdMap::new(&fine, &fine).unwrap().mount(Path::new("/proc"), dir.path());
        assert!(matches!(refused, Err(MountError::System { action: "map the ids of", .. })), "{refused:?}");
        assert!(!is_mount_point(dir.path()).unwrap());
    }

    #[test]
    fn this_machine_can_stack_under_other_ids() {
        let dir = tempfile::tempdir().unwrap();
        try_mapped_overlay(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
