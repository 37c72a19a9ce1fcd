//! A judge: everything that can be seen of a tree of files, in a form that can be compared.
//!
//! A [`Listing`] is made from a mounted directory, as a program sees it, or from an EROFS image, as the reader sees
//! it. Two listings are equal if no program could tell the trees apart by names, types, modes, owners, modification
//! times, device numbers, link groups, extended attributes and contents. Inode numbers themselves, block counts and
//! the other times are not compared.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};

use crate::erofs::{Image, Inode, Nid};
use crate::model::{Algorithm, Attributes, DeviceNumber, Digest, FileKind, Hasher, Name, ReadAt, Timestamp, Xattr};
use crate::sys::look::{self, FileId};

/// How much is read at once.
const READ_SIZE: usize = 1 << 20;

/// What can be seen of one file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What `stat` tells.
    pub attributes: Attributes,
    /// The type that the directory told; none if it told none.
    pub listed_as: Option<FileKind>,
    /// The first path, in byte order, of the same file; the file's own path if it is the first.
    pub same_file_as: Vec<u8>,
    /// Sorted by name.
    pub xattrs: Vec<Xattr>,
    /// What reading gives.
    pub content: Content,
}

/// What reading a file gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Nothing can be read: directories, devices, pipes, sockets.
    None,
    /// The target of a symbolic link.
    Target(Vec<u8>),
    /// A regular file's bytes: how many, and their SHA-256.
    Bytes(u64, Digest),
    /// Nothing, not even `stat`: this errno.
    Refused(i32),
}

/// A tree: path without leading slash -> file. The root's path is empty.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Listing {
    /// The files.
    pub nodes: BTreeMap<Vec<u8>, Node>,
}

impl Listing {
    /// Walks a directory without following symbolic links. Fails if anything in it cannot be read, or if a directory
    /// names something twice.
    ///
    /// # Errors
    /// With the path that could not be read.
    pub fn of_directory(root: &Path) -> anyhow::Result<Self> {
        Self::walk(root, false)
    }

    /// Walks a directory that may hold what cannot be used: a name that is listed but does not exist is left out (so
    /// overlayfs shows the whiteouts of unmerged directories), any other name that `stat` refuses is
    /// [`Content::Refused`].
    ///
    /// # Errors
    /// With the path that could not be read.
    pub fn of_overlay(root: &Path) -> anyhow::Result<Self> {
        Self::walk(root, true)
    }

    fn walk(root: &Path, refusals: bool) -> anyhow::Result<Self> {
        let mut listing = Self::default();
        let mut files: BTreeMap<Vec<u8>, FileId> = BTreeMap::new();
        let mut left: Vec<(Vec<u8>, Option<FileKind>)> = vec![(Vec::new(), Some(FileKind::Directory))];
        while let Some((path, listed_as)) = left.pop() {
            let full = if path.is_empty() {
                root.to_owned()
            } else {
                root.join(Path::new(std::ffi::OsStr::from_bytes(&path)))
            };
            let (attributes, identity) = match look::attributes(&full) {
                Err(error) if refusals => {
                    let errno = error.source.raw_os_error();
                    let errno = errno.with_context(|| format!("cannot stat {}", full.display()))?;
                    if errno != libc::ENOENT {
                        listing.nodes.insert(path.clone(), Node::refused(path, listed_as, errno));
                    }
                    continue;
                }
                other => other?,
            };
            let xattrs = look::xattrs(&full)?;
            let content =
                content_of(&full, attributes.kind).with_context(|| format!("cannot read {}", full.display()))?;
            if attributes.kind == FileKind::Directory {
                for entry in fs::read_dir(&full).with_context(|| format!("cannot list {}", full.display()))? {
                    let entry = entry.with_context(|| format!("cannot list {}", full.display()))?;
                    let kind = Some(look::kind_of(entry.file_type()?));
                    left.push((join(&path, &entry.file_name().into_vec()), kind));
                }
            }
            files.insert(path.clone(), identity);
            let node = Node { attributes, listed_as, same_file_as: path.clone(), xattrs, content };
            ensure!(
                listing.nodes.insert(path.clone(), node).is_none(),
                "{} is listed twice",
                String::from_utf8_lossy(&path)
            );
        }
        listing.group(&files);
        Ok(listing)
    }

    /// Walks an EROFS image with the reader. Every name is also looked up, and must be found as it was listed.
    ///
    /// # Errors
    /// With the path that could not be read.
    pub fn of_image<R: ReadAt>(image: &Image<R>) -> anyhow::Result<Self> {
        let mut listing = Self::default();
        let mut files: BTreeMap<Vec<u8>, Nid> = BTreeMap::new();
        let mut left = vec![(Vec::new(), image.root(), Some(FileKind::Directory))];
        while let Some((path, nid, listed_as)) = left.pop() {
            let shown = || format!("cannot read /{} of the image", String::from_utf8_lossy(&path));
            let inode = image.inode(nid).with_context(shown)?;
            let xattrs = image.xattrs(&inode).with_context(shown)?;
            for xattr in &xattrs {
                let value = image.xattr(&inode, &xattr.name).with_context(shown)?;
                ensure!(value.as_ref() == Some(&xattr.value), "{xattr:?} is listed, but a search finds {value:?}");
            }
            let content = match inode.attributes().kind {
                FileKind::Regular => image_bytes(image, &inode).with_context(shown)?,
                FileKind::Symlink => Content::Target(image.read_link(&inode).with_context(shown)?.into_vec()),
                _ => Content::None,
            };
            if inode.attributes().kind == FileKind::Directory {
                for entry in image.entries(&inode).with_context(shown)? {
                    let found = image.lookup(&inode, entry.name.as_bytes()).with_context(shown)?;
                    ensure!(found.as_ref() == Some(&entry), "{entry:?} is listed, but a search finds {found:?}");
                    if entry.kind == Some(FileKind::Directory) {
                        let parent =
                            image.inode(entry.nid).and_then(|child| image.parent(&child)).with_context(shown)?;
                        ensure!(parent == nid, "{entry:?} says that it lies in {parent}, not in {nid}");
                    }
                    left.push((join(&path, entry.name.as_bytes()), entry.nid, entry.kind));
                }
            }
            files.insert(path.clone(), nid);
            let attributes = *inode.attributes();
            listing.nodes.insert(path.clone(), Node { attributes, listed_as, same_file_as: path, xattrs, content });
        }
        listing.group(&files);
        Ok(listing)
    }

    /// Forgets the sizes of directories, which every file system counts in its own way.
    #[must_use]
    pub fn without_directory_sizes(mut self) -> Self {
        self.directories().for_each(|node| node.attributes.size = 0);
        self
    }

    /// Forgets the link counts of directories: overlayfs says 1 for merged ones.
    #[must_use]
    pub fn without_directory_links(mut self) -> Self {
        self.directories().for_each(|node| node.attributes.nlink = 0);
        self
    }

    /// Forgets the attributes whose name begins with `prefix`.
    #[must_use]
    pub fn without_xattrs(mut self, prefix: &[u8]) -> Self {
        self.nodes.values_mut().for_each(|node| node.xattrs.retain(|xattr| !xattr.name.starts_with(prefix)));
        self
    }

    fn directories(&mut self) -> impl Iterator<Item = &mut Node> {
        self.nodes.values_mut().filter(|node| node.attributes.kind == FileKind::Directory)
    }

    /// Where this tree and `other` differ, at most twenty places; none if they are equal.
    pub fn difference(&self, other: &Self) -> Option<String> {
        let paths: std::collections::BTreeSet<_> = self.nodes.keys().chain(other.nodes.keys()).collect();
        let mut text = String::new();
        let mut places = 0_usize;
        for path in paths {
            let (mine, theirs) = (self.nodes.get(path), other.nodes.get(path));
            if mine == theirs {
                continue;
            }
            places += 1;
            if places > 20 {
                continue;
            }
            let show = |node: Option<&Node>| node.map_or_else(|| "nothing".to_owned(), Node::line);
            let _ = writeln!(
                text,
                "/{}\n    left:  {}\n    right: {}",
                String::from_utf8_lossy(path),
                show(mine),
                show(theirs)
            );
        }
        (places > 0).then(|| format!("{places} files differ:\n{text}"))
    }

    /// Panics with the differences if there are any.
    ///
    /// # Panics
    /// If the trees differ.
    #[track_caller]
    pub fn assert_equals(&self, other: &Self) {
        if let Some(difference) = self.difference(other) {
            panic!("the trees are not equal; {difference}");
        }
    }

    /// Sets `same_file_as` from identities.
    fn group<I: Ord + Copy>(&mut self, identities: &BTreeMap<Vec<u8>, I>) {
        let mut first: BTreeMap<I, &Vec<u8>> = BTreeMap::new();
        for (path, node) in &mut self.nodes {
            let Some((path, identity)) = identities.get_key_value(path) else { continue };
            node.same_file_as = (*first.entry(*identity).or_insert(path)).clone();
        }
    }
}

impl Node {
    fn refused(path: Vec<u8>, listed_as: Option<FileKind>, errno: i32) -> Self {
        Self {
            attributes: Attributes {
                kind: listed_as.unwrap_or(FileKind::Regular),
                permissions: 0,
                uid: 0,
                gid: 0,
                mtime: Timestamp::default(),
                nlink: 0,
                size: 0,
                rdev: DeviceNumber::default(),
            },
            listed_as,
            same_file_as: path,
            xattrs: Vec::new(),
            content: Content::Refused(errno),
        }
    }

    /// The file in one line of text.
    pub fn line(&self) -> String {
        let Attributes { kind, uid, gid, mtime, nlink, size, rdev, .. } = self.attributes;
        let mut line = format!(
            "{kind:?} {:04o} {uid}:{gid} {}.{:09} links={nlink} size={size}",
            self.attributes.permissions, mtime.seconds, mtime.nanos
        );
        if rdev != DeviceNumber::default() {
            let _ = write!(line, " rdev={}:{}", rdev.major, rdev.minor);
        }
        match &self.content {
            Content::None => {}
            Content::Target(target) => {
                let _ = write!(line, " -> {:?}", String::from_utf8_lossy(target));
            }
            Content::Bytes(len, digest) => {
                let _ = write!(line, " {len} bytes {digest}");
            }
            Content::Refused(errno) => {
                let _ = write!(line, " errno {errno}");
            }
        }
        let _ = write!(line, " same as {:?}", String::from_utf8_lossy(&self.same_file_as));
        if self.listed_as != Some(kind) {
            let _ = write!(line, " listed as {:?}", self.listed_as);
        }
        for xattr in &self.xattrs {
            let _ = write!(line, " {xattr:?}");
        }
        line
    }
}

fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_owned() } else { [directory, b"/", name].concat() }
}

fn content_of(path: &Path, kind: FileKind) -> anyhow::Result<Content> {
    Ok(match kind {
        FileKind::Regular => {
            let mut file = File::open(path)?;
            let mut hasher = Hasher::new(Algorithm::Sha256);
            let mut buf = vec![0; READ_SIZE];
            let mut total = 0;
            loop {
                let len = file.read(&mut buf)?;
                if len == 0 {
                    break Content::Bytes(total, hasher.finish());
                }
                hasher.update(&buf[..len]);
                total += len as u64;
            }
        }
        FileKind::Symlink => Content::Target(fs::read_link(path)?.into_os_string().into_vec()),
        _ => Content::None,
    })
}

fn image_bytes<R: ReadAt>(image: &Image<R>, inode: &Inode) -> anyhow::Result<Content> {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    let mut buf = vec![0; READ_SIZE];
    let mut total = 0;
    loop {
        let len = image.read(inode, total, &mut buf)?;
        if len == 0 {
            break;
        }
        hasher.update(&buf[..len]);
        total += len as u64;
    }
    if total != inode.attributes().size {
        bail!("{total} bytes of {} were read", inode.attributes().size);
    }
    Ok(Content::Bytes(total, hasher.finish()))
}

/// Builds a tree full of oddities below `root`, which must be an empty directory on a file system with extended
/// attributes; needs root for devices, owners and attributes of the `trusted` and `security` namespaces.
///
/// # Errors
/// What could not be made.
pub fn build_oddities(root: &Path) -> anyhow::Result<()> {
    let path = |name: &str| root.join(name);
    let write = |name: &str, bytes: &[u8]| fs::write(path(name), bytes).with_context(|| format!("cannot write {name}"));
    for (name, len) in [
        ("empty", 0_usize),
        ("one", 1),
        ("tail", 100),
        ("block-minus", 4095),
        ("block", 4096),
        ("block-plus", 4097),
        ("many", 5 * 4096 + 17),
        ("big", 3 * (1 << 20) + 5),
    ] {
        write(name, &pattern(len))?;
    }
    // A sparse file: zeros, one block of data, zeros.
    let sparse = File::create(path("sparse"))?;
    sparse.set_len(1 << 20)?;
    std::os::unix::fs::FileExt::write_all_at(&sparse, &pattern(4096), 5 * 4096)?;
    let zeros = File::create(path("zeros"))?;
    zeros.set_len(300_000)?;

    // Names: bytes that are no UTF-8, of full length, and such that sort before and around the dots.
    fs::create_dir(path("names"))?;
    let long = "n".repeat(Name::MAX_LEN);
    for name in
        [&b"!before-dot"[..], b"-dash", b"...", b"..a", b".hidden", b"\xff\xfe", b"a b\nc", b"\x01", long.as_bytes()]
    {
        fs::write(path("names").join(std::ffi::OsStr::from_bytes(name)), name)?;
    }

    fs::create_dir(path("crowd"))?;
    for number in 0..1000 {
        fs::write(path(&format!("crowd/file-{number:05}-{}", "x".repeat(number % 60))), number.to_string())?;
    }
    fs::create_dir(path("hollow"))?;
    let mut deep = PathBuf::from(root);
    for level in 0..40 {
        deep.push(format!("level{level}"));
        fs::create_dir(&deep)?;
    }
    fs::write(deep.join("bottom"), b"bottom")?;

    // Links.
    fs::hard_link(path("tail"), path("tail-again"))?;
    fs::hard_link(path("tail"), path("names/tail-elsewhere"))?;
    std::os::unix::fs::symlink("tail", path("link"))?;
    std::os::unix::fs::symlink("/no/where/at all", path("dangling"))?;
    std::os::unix::fs::symlink("y".repeat(4000), path("long-link"))?;
    fs::hard_link(path("link"), path("link-again"))?;

    // Special files.
    for (name, kind, major, minor) in [
        ("null", rustix::fs::FileType::CharacterDevice, 1, 3),
        ("whiteout", rustix::fs::FileType::CharacterDevice, 0, 0),
        ("disk", rustix::fs::FileType::BlockDevice, 8, 17),
        ("wide", rustix::fs::FileType::CharacterDevice, 4000, 1_000_000),
        ("pipe", rustix::fs::FileType::Fifo, 0, 0),
        ("socket", rustix::fs::FileType::Socket, 0, 0),
    ] {
        let device = rustix::fs::makedev(major, minor);
        rustix::fs::mknodat(rustix::fs::CWD, path(name), kind, rustix::fs::Mode::from(0o640), device)
            .with_context(|| format!("cannot make {name}"))?;
    }

    // Modes and owners.
    for (name, mode, uid, gid) in [
        ("one", 0o4755, 0, 0),
        ("tail", 0o2711, 1000, 1000),
        ("block", 0o000, 65_535, 65_534),
        ("many", 0o1777, 70_000, 4_000_000_000),
        ("hollow", 0o1777, 3, 4),
        ("crowd", 0o2750, 0, 70_000),
    ] {
        std::os::unix::fs::chown(path(name), Some(uid), Some(gid))?;
        fs::set_permissions(path(name), std::os::unix::fs::PermissionsExt::from_mode(mode))?;
    }
    std::os::unix::fs::lchown(path("link"), Some(1234), Some(5678))?;

    // Attributes: small, empty, large, many equal ones (shared), on a directory, a link and a device.
    let set = |name: &str, key: &str, value: &[u8]| {
        let key = CString::new(key)?;
        rustix::fs::lsetxattr(path(name), &*key, value, rustix::fs::XattrFlags::empty())
            .with_context(|| format!("cannot set {key:?} on {name}"))
    };
    set("tail", "user.small", b"value")?;
    set("tail", "user.empty", b"")?;
    set("tail", "security.capability", &CAPABILITY)?;
    set("tail", "trusted.overlay.metacopy", b"")?;
    set("big", "user.large", &pattern(3000))?;
    set("big", "user.common", b"the same everywhere, and long enough that sharing it saves space")?;
    set("hollow", "trusted.overlay.opaque", b"y")?;
    set("hollow", "user.common", b"the same everywhere, and long enough that sharing it saves space")?;
    set("link", "trusted.on-a-link", b"1")?;
    set("null", "security.selinux", b"system_u:object_r:null_device_t:s0")?;
    set("empty", &format!("user.{}", "k".repeat(250)), b"name of full length")?;
    for number in 0..40 {
        let name = format!("crowd/file-{number:05}-{}", "x".repeat(number));
        set(&name, "user.common", b"the same everywhere, and long enough that sharing it saves space")?;
        set(&name, "security.selinux", b"system_u:object_r:usr_t:s0")?;
        set(&name, "user.number", number.to_string().as_bytes())?;
    }
    set("one", "system.posix_acl_access", &ACL)?;
    set("hollow", "system.posix_acl_default", &ACL)?;

    // Times: before 1970, with nanoseconds, beyond 32 bits.
    for (name, seconds, nanos) in [
        ("one", -86_400_i64, 999_999_999_i64),
        ("empty", 0, 0),
        ("tail", 1_700_000_000, 123_456_789),
        ("big", 5_000_000_000, 1),
        ("link", 1_000_000_000, 5),
        ("null", 981_173_106, 7),
        ("crowd", 1_234_567_890, 987_654_321),
        ("hollow", 1, 2),
    ] {
        let time = rustix::fs::Timespec { tv_sec: seconds, tv_nsec: nanos };
        let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(rustix::fs::CWD, path(name), &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

/// Bytes that repeat nowhere near a block's size.
pub fn pattern(len: usize) -> Vec<u8> {
    (0_u64..).flat_map(|word| word.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()).take(len).collect()
}

/// `cap_net_raw=ep` in the form of revision 2.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// `user::rwx,user:1000:r-x,group::r-x,mask::r-x,other::r-x` in the form the kernel takes.
const ACL: [u8; 44] = [
    2, 0, 0, 0, //
    1, 0, 7, 0, 255, 255, 255, 255, //
    2, 0, 5, 0, 0xe8, 3, 0, 0, //
    4, 0, 5, 0, 255, 255, 255, 255, //
    16, 0, 5, 0, 255, 255, 255, 255, //
    32, 0, 5, 0, 255, 255, 255, 255,
];
