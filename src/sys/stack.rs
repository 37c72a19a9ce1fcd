//! What the kernel driver mounts: EROFS images, overlays of many lower directories, and the watch over the mount table.
//!
//! Overlays are made with the mount interface that takes one lower directory at a time (Linux 6.8), whose number and
//! names no page limits; older kernels get one option string. A mount appears at its target finished or not at all.
//!
//! Mounting reads the image: see [`super::loopdev`] about threads. Refuses to know where images come from.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags};

use super::mount::MountError;

/// Longest string that `fsconfig` takes, without its NUL (`fs/fsopen.c`).
const STRING_LIMIT: usize = 255;

/// Longest option string of `mount(2)`: a page with the final NUL.
const OPTIONS_LIMIT: usize = 4095;

/// Mounts the EROFS image `source`, a block device or (Linux 6.12) a regular file, on `target`, read-only.
///
/// # Errors
/// See [`MountError`].
pub fn mount_erofs(source: &Path, target: &Path) -> Result<(), MountError> {
    // Not the newer interface: a file's path may be longer than the strings that it takes.
    rustix::mount::mount(source, target, "erofs", MountFlags::RDONLY, None)
        .map_err(|errno| MountError::system("mount the EROFS image", source, errno))
}

/// Whether the kernel can mount the EROFS image `source`, without mounting it anywhere. A file system that is a module
/// is loaded by that.
///
/// # Errors
/// See [`MountError`].
pub fn try_erofs(source: &Path) -> Result<(), MountError> {
    let failed = |errno: Errno| MountError::system("open as an EROFS image", source, errno);
    let context = rustix::mount::fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed)?;
    rustix::mount::fsconfig_set_string(context.as_fd(), "source", source).map_err(failed)?;
    rustix::mount::fsconfig_set_flag(context.as_fd(), "ro").map_err(failed)?;
    rustix::mount::fsconfig_create(context.as_fd()).map_err(failed)
}

/// Whether the kernel knows the type `name` of file systems. One that is a module is loaded by that.
///
/// # Errors
/// [`Errno::NODEV`] if it does not.
pub fn has_file_system(name: &str) -> io::Result<()> {
    match rustix::mount::fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC) {
        Ok(_) => Ok(()),
        // Before Linux 5.2 there was only the list, and no way to load.
        Err(Errno::NOSYS) => {
            let list = fs::read_to_string("/proc/filesystems")?;
            let known = list.lines().filter_map(|line| line.split_whitespace().last()).any(|known| known == name);
            if known { Ok(()) } else { Err(Errno::NODEV.into()) }
        }
        Err(errno) => Err(errno.into()),
    }
}

/// A stack of directories to mount.
#[derive(Debug, Clone, Copy)]
pub struct OverlayMount<'a> {
    /// What the mount table shows as the source.
    pub source: &'a str,
    /// The lower directories, the topmost first: two at least if there is no upper one.
    pub lowers: &'a [PathBuf],
    /// The directory that takes what is written, and overlayfs's own on the same file system. Read-only without.
    pub upper: Option<(&'a Path, &'a Path)>,
}

/// Mounts an overlay on `target`. Redirects of directories are followed, as the merge of this program follows them, and all
/// files have one device (overlayfs's `xino`): else `du -x`, `tar --one-file-system` and the like pass over what lies in
/// layers, and a file has another inode number once it is written to.
///
/// # Errors
/// See [`MountError`]; nothing is mounted then.
pub fn mount_overlay(overlay: &OverlayMount<'_>, target: &Path) -> Result<(), MountError> {
    match mount_stepwise(overlay, target) {
        // What an old kernel says to `lowerdir+`, and one that does not have the interface.
        Err((errno @ (Errno::INVAL | Errno::NOSYS), said)) => match mount_at_once(overlay, target) {
            Ok(()) => Ok(()),
            Err(Errno::INVAL | Errno::TOOBIG) => Err(overlay_failed(target, errno, &said)),
            Err(errno) => Err(overlay_failed(target, errno, "")),
        },
        Err((errno, said)) => Err(overlay_failed(target, errno, &said)),
        Ok(()) => Ok(()),
    }
}

fn overlay_failed(target: &Path, errno: Errno, said: &str) -> MountError {
    let errno = io::Error::from(errno);
    let source = if said.is_empty() { errno } else { io::Error::new(errno.kind(), format!("{said} ({errno})")) };
    MountError::system("mount an overlay on", target, source)
}

/// With the error comes what the kernel had to say about it.
fn mount_stepwise(overlay: &OverlayMount<'_>, target: &Path) -> Result<(), (Errno, String)> {
    let plain = |errno| (errno, String::new());
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(plain)?;
    configure(&context, overlay).map_err(|errno| (errno, messages(&context)))?;
    let attributes = if overlay.upper.is_some() { MountAttrFlags::empty() } else { MountAttrFlags::MOUNT_ATTR_RDONLY };
    let tree = rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(plain)?;
    attach(&tree, target).map_err(plain)
}

fn configure(context: &OwnedFd, overlay: &OverlayMount<'_>) -> rustix::io::Result<()> {
    let context = context.as_fd();
    rustix::mount::fsconfig_set_string(context, "source", overlay.source)?;
    // Held until the kernel has resolved the names.
    let mut held = Vec::new();
    for lower in overlay.lowers {
        rustix::mount::fsconfig_set_string(context, "lowerdir+", name_of(lower, STRING_LIMIT, &mut held)?)?;
    }
    match overlay.upper {
        Some((upper, work)) => {
            rustix::mount::fsconfig_set_string(context, "upperdir", name_of(upper, STRING_LIMIT, &mut held)?)?;
            rustix::mount::fsconfig_set_string(context, "workdir", name_of(work, STRING_LIMIT, &mut held)?)?;
        }
        None => rustix::mount::fsconfig_set_flag(context, "ro")?,
    }
    rustix::mount::fsconfig_set_string(context, "redirect_dir", "follow")?;
    rustix::mount::fsconfig_set_string(context, "xino", "on")?;
    rustix::mount::fsconfig_create(context)
}

fn mount_at_once(overlay: &OverlayMount<'_>, target: &Path) -> rustix::io::Result<()> {
    // What of the page each directory may use.
    let share = OPTIONS_LIMIT.saturating_sub(100) / (overlay.lowers.len() + 2);
    let mut held = Vec::new();
    let mut options = b"redirect_dir=follow,xino=on,lowerdir=".to_vec();
    for (number, lower) in overlay.lowers.iter().enumerate() {
        if number > 0 {
            options.push(b':');
        }
        options.extend_from_slice(name_of(lower, share.saturating_sub(1), &mut held)?.as_os_str().as_bytes());
    }
    if let Some((upper, work)) = overlay.upper {
        for (option, path) in [(",upperdir=", upper), (",workdir=", work)] {
            options.extend_from_slice(option.as_bytes());
            options.extend_from_slice(name_of(path, share, &mut held)?.as_os_str().as_bytes());
        }
    }
    if options.len() > OPTIONS_LIMIT {
        return Err(Errno::TOOBIG);
    }
    let options = CString::new(options).map_err(|_| Errno::INVAL)?;
    let flags = if overlay.upper.is_some() { MountFlags::empty() } else { MountFlags::RDONLY };
    rustix::mount::mount(overlay.source, target, "overlay", flags, options.as_c_str())
}

/// A name of `path` that is short and has no character with a meaning in option strings: through a descriptor, which is
/// put into `held`, if it has to be.
fn name_of(path: &Path, limit: usize, held: &mut Vec<OwnedFd>) -> rustix::io::Result<PathBuf> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.len() <= limit && !bytes.iter().any(|byte| matches!(byte, b'\\' | b',' | b':')) {
        return Ok(path.to_owned());
    }
    let opened = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let name = format!("/proc/self/fd/{}", opened.as_raw_fd());
    held.push(opened);
    Ok(name.into())
}

/// What the kernel wrote down while a mount was prepared, as one sentence.
fn messages(context: &OwnedFd) -> String {
    let mut said: Vec<String> = Vec::new();
    let mut line = [0_u8; 1024];
    // One message each time; without one it fails.
    while let Ok(len @ 1..) = rustix::io::read(context, &mut line) {
        let text = String::from_utf8_lossy(line.get(..len).unwrap_or_default());
        // `e ` for an error, `w ` and `i ` for the rest.
        said.push(text.get(2..).unwrap_or_default().trim().to_owned());
        if said.len() >= 16 {
            break;
        }
    }
    said.join("; ")
}

/// Mounts on `target` what is not mounted yet.
pub(super) fn attach(tree: &OwnedFd, target: &Path) -> rustix::io::Result<()> {
    rustix::mount::move_mount(tree.as_fd(), c"", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// Shows what `from` shows on `target` as well.
///
/// # Errors
/// See [`MountError`].
pub fn mount_bind(from: &Path, target: &Path) -> Result<(), MountError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    rustix::mount::open_tree(CWD, from, flags)
        .and_then(|tree| attach(&tree, target))
        .map_err(|errno| MountError::system("bind to", target, errno))
}

/// Tells when the mount table of this process's namespace changes.
#[derive(Debug)]
pub struct MountWatch(File);

impl MountWatch {
    /// Changes from now on are told.
    ///
    /// # Errors
    /// `/proc` could not be read.
    pub fn start() -> io::Result<Self> {
        // The kernel tells a descriptor of what has changed since it was opened or last told.
        File::open("/proc/self/mountinfo").map(Self)
    }

    /// Waits for a change, at most for `patience`; false if there was none.
    ///
    /// # Errors
    /// The kernel cannot wait.
    pub fn wait(&self, patience: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut handles = [PollFd::new(&self.0, PollFlags::PRI)];
            match poll(&mut handles, Some(&timeout)) {
                Ok(0) => return Ok(false),
                Ok(_) => return Ok(true),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::mount::{Unmount, mounted_on, unmount};
    use super::*;

    fn directories(below: &Path, names: &[&str]) -> Vec<PathBuf> {
        names
            .iter()
            .map(|name| {
                let path = below.join(name);
                fs::create_dir_all(&path).unwrap();
                fs::write(path.join("from"), name.as_bytes()).unwrap();
                path
            })
            .collect()
    }

    #[test]
    fn overlays_take_many_directories_of_any_name() {
        let dir = tempfile::tempdir().unwrap();
        let long = format!("{0}/{0}", "l".repeat(200));
        let names: Vec<String> = (0..120).map(|n| format!("plain{n}")).collect();
        let mut all = vec![long.as_str(), "a,b:c\\d", "w x"];
        all.extend(names.iter().map(String::as_str));
        let lowers = directories(dir.path(), &all);
        let is_plain = |path: &PathBuf| name_of(path, STRING_LIMIT, &mut Vec::new()).unwrap() == *path;
        assert_eq!(lowers[..4].iter().map(is_plain).collect::<Vec<_>>(), [false, false, true, true]);
        let target = dir.path().join("target");
        fs::create_dir(&target).unwrap();
        for (number, lower) in lowers.iter().enumerate() {
            fs::write(lower.join(format!("only{number}")), "").unwrap();
        }
        let overlay = OverlayMount { source: "headstart:test", lowers: &lowers, upper: None };
        for mount in [
            (|overlay, target| mount_stepwise(overlay, target).unwrap()) as fn(&OverlayMount<'_>, &Path),
            |overlay, target| mount_at_once(overlay, target).unwrap(),
        ] {
            mount(&overlay, &target);
            assert_eq!(fs::read_to_string(target.join("from")).unwrap(), long);
            assert!((0..lowers.len()).all(|number| target.join(format!("only{number}")).exists()));
            assert_eq!(mounted_on(&target).unwrap().unwrap().source, "headstart:test");
            assert_eq!(fs::write(target.join("new"), "").unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
            unmount(&target, Unmount::Strict).unwrap();
        }
    }

    #[test]
    fn an_overlay_with_an_upper_directory_is_written_to() {
        let dir = tempfile::tempdir().unwrap();
        let lowers = directories(dir.path(), &["low"]);
        let upper = directories(dir.path(), &["up,per", "wo:rk", "target"]);
        fs::remove_file(upper[1].join("from")).unwrap();
        let overlay = OverlayMount { source: "headstart", lowers: &lowers, upper: Some((&upper[0], &upper[1])) };
        mount_overlay(&overlay, &upper[2]).unwrap();
        fs::write(upper[2].join("new"), "x").unwrap();
        unmount(&upper[2], Unmount::Strict).unwrap();
        assert_eq!(fs::read(upper[0].join("new")).unwrap(), b"x");
    }

    #[test]
    fn what_the_kernel_says_is_kept() {
        let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        rustix::mount::fsconfig_set_flag(context.as_fd(), "nonsense").unwrap_err();
        assert!(messages(&context).contains("nonsense"));
        let dir = tempfile::tempdir().unwrap();
        let lowers = directories(dir.path(), &["low"]);
        let overlay = OverlayMount { source: "headstart", lowers: &[dir.path().join("gone")], upper: None };
        let refused = mount_overlay(&overlay, &lowers[0]);
        assert!(matches!(refused, Err(MountError::System { .. })), "{refused:?}");
        assert!(mounted_on(&lowers[0]).unwrap().is_none());
    }

    #[test]
    fn file_systems_that_there_are_not_are_told() {
        has_file_system("overlay").unwrap();
        let error = has_file_system("no-such-type").unwrap_err();
        assert_eq!(Errno::from_io_error(&error), Some(Errno::NODEV));
    }

    #[test]
    fn changes_of_the_mount_table_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        directories(dir.path(), &["from", "to"]);
        let watch = MountWatch::start().unwrap();
        mount_bind(&from, &to).unwrap();
        assert!(watch.wait(Duration::from_secs(30)).unwrap());
        assert_eq!(fs::read_to_string(to.join("from")).unwrap(), "from");
        unmount(&to, Unmount::Strict).unwrap();
        assert!(watch.wait(Duration::from_secs(30)).unwrap());
    }
}
