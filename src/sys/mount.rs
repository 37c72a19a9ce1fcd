//! Mounts: what is mounted where, mounting a FUSE connection or an overlay, taking it away again.
//!
//! Every failure says which path it is about and what can be done. Nothing here touches a file inside of a mount, so a
//! dead server cannot make these calls hang; the table comes from `/proc/self/mountinfo`.

use std::ffi::{CString, OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{FsPickFlags, MountFlags, UnmountFlags};

/// Why a mount could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// There is no such directory.
    #[error("mount point {path} does not exist: create the directory first", path = .0.display())]
    Missing(PathBuf),
    /// It is something else.
    #[error("mount point {path} is not a directory", path = .0.display())]
    NotADirectory(PathBuf),
    /// What is mounted there has lost its server.
    #[error(
        "mount point {path} holds the stale mount of a process that is gone: remove it with `umount -l {path}` \
         (or `fusermount3 -u -z {path}`)",
        path = .0.display()
    )]
    Stale(PathBuf),
    /// Something is mounted there.
    #[error("mount point {path} is busy: {source_name} ({kind}) is mounted there", path = path.display())]
    Busy {
        /// The mount point.
        path: PathBuf,
        /// Type of the file system.
        kind: String,
        /// What is mounted.
        source_name: String,
    },
    /// Nothing is mounted there.
    #[error("nothing is mounted on {path}", path = .0.display())]
    NotMounted(PathBuf),
    /// Files below the mount point are open.
    #[error("cannot unmount {path}: files in it are in use", path = .0.display())]
    InUse(PathBuf),
    /// The kernel has no FUSE.
    #[error(
        "this kernel has no /dev/fuse: load the module `fuse` (`modprobe fuse`), or pass the device into the container"
    )]
    NoFuse(#[source] io::Error),
    /// An ordinary user needs the helper.
    #[error("cannot run fusermount3, which mounts for ordinary users: install the package `fuse3`, or run as root")]
    NoHelper(#[source] io::Error),
    /// The helper refused.
    #[error("fusermount3 did not mount {path}: {message}", path = path.display())]
    Helper {
        /// The mount point.
        path: PathBuf,
        /// What it said.
        message: String,
    },
    /// A system call failed.
    #[error("cannot {action} {path}", path = path.display())]
    System {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl MountError {
    pub(super) fn system(action: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        Self::System { action, path: path.to_owned(), source: source.into() }
    }
}

/// One line of the mount table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// `st_dev` of what is mounted, major part.
    pub major: u32,
    /// `st_dev` of what is mounted, minor part.
    pub minor: u32,
    /// Where.
    pub mount_point: PathBuf,
    /// Options of this mount: `ro`, `nosuid`, …
    pub options: String,
    /// Type of the file system, `fuse.headstart` for example.
    pub kind: String,
    /// What is mounted, as it was named.
    pub source: OsString,
}

/// The mounts this process sees, in the order they were made.
///
/// # Errors
/// `/proc` could not be read.
pub fn mount_table() -> io::Result<Vec<MountEntry>> {
    Ok(parse_table(&fs::read("/proc/self/mountinfo")?))
}

/// The topmost mount on exactly `path` (absolute, without links, as the kernel knows it), if there is one.
///
/// # Errors
/// `/proc` could not be read.
pub fn mounted_on(path: &Path) -> io::Result<Option<MountEntry>> {
    Ok(mount_table()?.into_iter().rev().find(|entry| entry.mount_point == path))
}

/// What the mount table shows as the source of mounts of this program, if not a word that begins with this and a colon.
pub const NAME: &str = "headstart";

/// True if the topmost mount on exactly `path` was made by this program, living or dead.
///
/// # Errors
/// `/proc` could not be read.
pub fn is_ours(path: &Path) -> Result<bool, MountError> {
    let top = mounted_on(path).map_err(|error| MountError::system("read mounts for", path, error))?;
    let by_name = |source: &OsStr| source == NAME || source.as_bytes().starts_with(b"headstart:");
    Ok(top.is_some_and(|found| found.kind == super::fuse::MOUNT_KIND || by_name(&found.source)))
}

/// Reads `/proc/self/mountinfo` (`Documentation/filesystems/proc.rst`, section 3.5). Lines of another form are left out.
fn parse_table(table: &[u8]) -> Vec<MountEntry> {
    table.split(|byte| *byte == b'\n').filter_map(parse_line).collect()
}

fn parse_line(line: &[u8]) -> Option<MountEntry> {
    let mut words = line.split(|byte| *byte == b' ');
    let device = std::str::from_utf8(words.nth(2)?).ok()?;
    let (major, minor) = device.split_once(':')?;
    let mount_point = unescape(words.nth(1)?);
    let options = String::from_utf8_lossy(words.next()?).into_owned();
    let mut rest = words.skip_while(|word| *word != b"-").skip(1);
    Some(MountEntry {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        mount_point: PathBuf::from(mount_point),
        options,
        kind: String::from_utf8_lossy(rest.next()?).into_owned(),
        source: unescape(rest.next()?),
    })
}

/// Blank, tab, newline and backslash stand there as three octal digits.
fn unescape(word: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let [first, tail @ ..] = rest {
        let code = match (first, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        plain.push(code.unwrap_or(*first));
        rest = tail.get(if code.is_some() { 3.. } else { 0.. }).unwrap_or_default();
    }
    OsString::from_vec(plain)
}

/// Checks that something can be mounted on `path` and gives its absolute name without links.
///
/// # Errors
/// [`MountError::Missing`], [`MountError::NotADirectory`], [`MountError::Stale`], [`MountError::Busy`].
pub fn check_mount_point(path: &Path) -> Result<PathBuf, MountError> {
    let refuse = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => MountError::Missing(path.to_owned()),
        io::ErrorKind::NotADirectory => MountError::NotADirectory(path.to_owned()),
        _ if Errno::from_io_error(&source) == Some(Errno::NOTCONN) => MountError::Stale(path.to_owned()),
        _ => MountError::system("look at mount point", path, source),
    };
    let place = path.canonicalize().map_err(refuse)?;
    if let Some(entry) = mounted_on(&place).map_err(|e| MountError::system("read mounts for", path, e))?
        && place != Path::new("/")
    {
        // What is cached of a dead FUSE mount still answers `stat`; `statfs` always asks the server.
        if rustix::fs::statfs(&place).err() == Some(Errno::NOTCONN) {
            return Err(MountError::Stale(place));
        }
        let source_name = entry.source.to_string_lossy().into_owned();
        return Err(MountError::Busy { path: place, kind: entry.kind, source_name });
    }
    if !fs::metadata(&place).map_err(refuse)?.is_dir() {
        return Err(MountError::NotADirectory(place));
    }
    Ok(place)
}

/// Lets the kernel drop what it remembers of the file system on `path` and nobody uses: asking it to change nothing does
/// that (`reconfigure_super` shrinks the cache of names first).
///
/// # Errors
/// See [`MountError`].
pub fn drop_unused(path: &Path) -> Result<(), MountError> {
    let failed = |errno| MountError::system("drop what is remembered of", path, errno);
    let context = rustix::mount::fspick(CWD, path, FsPickFlags::FSPICK_CLOEXEC).map_err(failed)?;
    rustix::mount::fsconfig_reconfigure(context.as_fd()).map_err(failed)
}

/// How [`unmount`] treats files that are in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unmount {
    /// Fails with [`MountError::InUse`].
    Strict,
    /// The mount disappears now, and ends when the last file is closed.
    Lazy,
}

/// Removes the topmost mount on `path`. An ordinary user's FUSE mount is removed through `fusermount3`.
///
/// # Errors
/// See [`MountError`].
pub fn unmount(path: &Path, how: Unmount) -> Result<(), MountError> {
    let flags = UnmountFlags::NOFOLLOW
        | match how {
            Unmount::Strict => UnmountFlags::empty(),
            Unmount::Lazy => UnmountFlags::DETACH,
        };
    match rustix::mount::unmount(path, flags) {
        Ok(()) => Ok(()),
        Err(Errno::PERM) => super::fuse::unmount_through_helper(path, how),
        Err(Errno::BUSY) => Err(MountError::InUse(path.to_owned())),
        Err(Errno::INVAL) => Err(MountError::NotMounted(path.to_owned())),
        Err(Errno::NOENT) => Err(MountError::Missing(path.to_owned())),
        Err(errno) => Err(MountError::system("unmount", path, errno)),
    }
}

/// The directories of a writable layer that is kept in `dir`: what is written goes to `dir/upper`, `dir/work` is
/// overlayfs's own. Both are made if they are missing.
///
/// # Errors
/// See [`MountError`].
pub fn writable_layer(dir: &Path) -> Result<(PathBuf, PathBuf), MountError> {
    let dir = match dir.canonicalize() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => fs::create_dir(dir).and_then(|()| dir.canonicalize()),
        other => other,
    }
    .map_err(|error| MountError::system("prepare upper directory", dir, error))?;
    let make = |name| {
        let path = dir.join(name);
        match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                Err(MountError::system("create", &path, error))
            }
            _ => Ok(path),
        }
    };
    Ok((make("upper")?, make("work")?))
}

/// Stacks a writable overlayfs on `lower` and mounts it on `target` (root only): see [`writable_layer`] about `dir`, which
/// stays when the mount is gone, so that the next one shows the same changes.
///
/// The overlay holds what is mounted on `lower` by itself: `lower` may be unmounted while the overlay is in use, and
/// what was mounted there ends with the overlay. The mount table shows `source`.
///
/// # Errors
/// See [`MountError`].
pub fn mount_writable(source: &str, lower: &Path, dir: &Path, target: &Path) -> Result<(), MountError> {
    let (upper, work) = writable_layer(dir)?;
    let mut options = b"lowerdir=".to_vec();
    options.extend(escape_option(lower.as_os_str()));
    for (option, path) in [(",upperdir=", upper), (",workdir=", work)] {
        options.extend_from_slice(option.as_bytes());
        options.extend(escape_option(path.as_os_str()));
    }
    let options = CString::new(options)
        .map_err(|error| MountError::system("mount overlay with upper directory", dir, io::Error::from(error)))?;
    rustix::mount::mount(source, target, "overlay", MountFlags::empty(), options.as_c_str())
        .map_err(|errno| MountError::system("mount a writable overlay on", target, errno))
}

/// A path inside of overlayfs's option string: `\`, `,` and `:` have a meaning there.
fn escape_option(path: &OsStr) -> Vec<u8> {
    let mut escaped = Vec::with_capacity(path.len());
    for byte in path.as_bytes() {
        if matches!(byte, b'\\' | b',' | b':') {
            escaped.push(b'\\');
        }
        escaped.push(*byte);
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_table_is_read() {
        let table = b"22 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/root rw\n\
            131 22 0:48 / /mnt/a\\040b\\134c rw,nosuid - fuse.headstart headstart rw,user_id=0\n\
            broken line\n";
        let entries = parse_table(table);
        assert_eq!(entries.len(), 2);
        assert_eq!(
            entries[1],
            MountEntry {
                major: 0,
                minor: 48,
                mount_point: PathBuf::from("/mnt/a b\\c"),
                options: "rw,nosuid".into(),
                kind: "fuse.headstart".into(),
                source: "headstart".into(),
            }
        );
        assert_eq!((entries[0].kind.as_str(), entries[0].major), ("ext4", 254));
    }

    #[test]
    fn the_root_is_a_mount() {
        assert!(mounted_on(Path::new("/")).unwrap().is_some());
        assert!(mounted_on(Path::new("/no/such/mount")).unwrap().is_none());
    }

    #[test]
    fn paths_are_escaped_for_overlayfs() {
        assert_eq!(escape_option(OsStr::new("/a,b:c\\d")), b"/a\\,b\\:c\\\\d");
    }

    #[test]
    fn a_mount_point_must_be_a_free_directory() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(check_mount_point(&dir.path().join("gone")), Err(MountError::Missing(_))));
        assert!(matches!(check_mount_point(&file), Err(MountError::NotADirectory(_))));
        assert!(matches!(check_mount_point(Path::new("/proc")), Err(MountError::Busy { .. })));
        assert_eq!(check_mount_point(dir.path()).unwrap(), dir.path().canonicalize().unwrap());
        assert!(matches!(unmount(dir.path(), Unmount::Strict), Err(MountError::NotMounted(_))));
    }
}
