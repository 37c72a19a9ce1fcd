//! What a mount promises (`docs/semantics.md`), one test a promise. Needs root, /dev/fuse, fusermount3 and setpriv.

mod processes;

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mount::MountFlags;

use headstart::erofs::writer::LayerRole;
use headstart::fuse::{ServeError, ServeOptions, Server, serve};
use headstart::model::{DeviceNumber, EntryKind};
use headstart::sys::mount::{MountError, Unmount, check_mount_point, mount_writable, unmount};
use headstart::testkit::images::{
    EntryWithContent, directory, entry, file, hard_link, image_of, opaque, symlink, whiteout, xattr,
};
use headstart::testkit::lazy::{LazyBytes, Reaction};
use headstart::testkit::tree::pattern;
use headstart::testkit::waiting::{PATIENCE, wait_until as eventually};
use headstart::vfs::Purpose;

use crate::mounts::{Kernel, mount, open, run};

const BLOCK: u64 = 4096;

/// The user of the tests that are not about root.
const NOBODY: u32 = 65_534;

fn image(entries: &[EntryWithContent]) -> Vec<u8> {
    image_of(LayerRole::Upper, entries).unwrap()
}

/// A layer whose bytes come a block at a time.
fn lazy(entries: &[EntryWithContent]) -> Arc<LazyBytes> {
    LazyBytes::new(image(entries), BLOCK)
}

fn local(entries: &[EntryWithContent]) -> Arc<LazyBytes> {
    LazyBytes::local(image(entries))
}

fn dir() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    // Other users look at mounts in it.
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

/// A file with a mode and an owner.
fn owned(at: &str, content: &[u8], permissions: u16, owner: u32) -> EntryWithContent {
    let mut made = file(at, content);
    made.0.metadata.permissions = permissions;
    (made.0.metadata.uid, made.0.metadata.gid) = (owner, owner);
    made
}

/// Runs a program as somebody without rights.
fn as_nobody(program: &Path, arguments: &[&str]) -> std::process::Output {
    let id = NOBODY.to_string();
    Command::new("setpriv")
        .args(["--reuid", &id, "--regid", &id, "--clear-groups", "--"])
        .arg(program)
        .args(arguments)
        .output()
        .unwrap()
}

fn errno(error: &io::Error) -> Option<Errno> {
    Errno::from_io_error(error)
}

#[test]
fn listing_never_waits_behind_downloads() {
    let mut entries: Vec<EntryWithContent> = (0..20_000).map(|n| file(&format!("crowd/{n}"), b"")).collect();
    let content = pattern(200_000);
    // More readers than any number of threads that could be meant to serve them.
    let names: Vec<String> = (0..40).map(|n| format!("slow/{n}")).collect();
    entries.extend(names.iter().map(|name| file(name, &content)));
    let layer = lazy(&entries);
    let target = dir();
    let server = mount(std::slice::from_ref(&layer), target.path());
    layer.script(|_, purpose| if purpose == Purpose::Read { Reaction::Hold } else { Reaction::Soon });
    let readers: Vec<_> = names
        .iter()
        .map(|name| {
            let path = target.path().join(name);
            thread::spawn(move || fs::read(path).unwrap())
        })
        .collect();
    layer.wait_for_held(names.len());
    eventually("all readers wait", || server.waiting() >= names.len());
    let listed = fs::read_dir(target.path().join("crowd")).unwrap().map(|entry| entry.unwrap().metadata().unwrap());
    assert_eq!(listed.count(), 20_000);
    assert!(readers.iter().all(|reader| !reader.is_finished()));
    layer.script(|_, _| Reaction::Soon);
    layer.release();
    for reader in readers {
        assert!(reader.join().unwrap() == content);
    }
    eventually("nothing waits any more", || server.waiting() == 0);
}

#[test]
fn a_failed_fetch_is_an_error_for_that_file_alone_and_is_tried_again() {
    let layer = lazy(&[file("bad", &pattern(10_000)), file("good", &pattern(10_000))]);
    let target = dir();
    let _server = mount(std::slice::from_ref(&layer), target.path());
    let bad = target.path().join("bad");
    for reaction in [Reaction::Fail, Reaction::Forget, Reaction::Lie] {
        layer.script(move |_, purpose| if purpose == Purpose::Read { reaction } else { Reaction::Soon });
        assert_eq!(errno(&fs::read(&bad).unwrap_err()), Some(Errno::IO), "{reaction:?}");
        assert_eq!(fs::metadata(&bad).unwrap().len(), 10_000);
    }
    layer.script(|_, _| Reaction::Now);
    assert_eq!(fs::read(target.path().join("good")).unwrap(), pattern(10_000));
    assert_eq!(fs::read(&bad).unwrap(), pattern(10_000));
}

#[test]
fn a_wait_has_an_end() {
    let layer = lazy(&[file("late", &pattern(10_000))]);
    let target = dir();
    let mut options = ServeOptions::for_this_user("test");
    options.patience = Duration::from_millis(50);
    let server = serve(open(std::slice::from_ref(&layer)), target.path(), &options).unwrap();
    layer.script(|_, purpose| if purpose == Purpose::Read { Reaction::Hold } else { Reaction::Soon });
    let start = Instant::now();
    assert_eq!(errno(&fs::read(target.path().join("late")).unwrap_err()), Some(Errno::IO));
    assert!(start.elapsed() >= Duration::from_millis(50));
    assert_eq!(server.waiting(), 0);
    // What comes too late comes for the next reader.
    layer.script(|_, _| Reaction::Soon);
    layer.release();
    assert_eq!(fs::read(target.path().join("late")).unwrap(), pattern(10_000));
}

#[test]
fn a_bug_is_an_error_of_one_request() {
    let layer = lazy(&[file("bug", &pattern(10_000)), file("fine", &pattern(10_000))]);
    let target = dir();
    let _server = mount(std::slice::from_ref(&layer), target.path());
    layer.script(
        |_, purpose| if purpose == Purpose::Read { panic!("a bug of the test's making") } else { Reaction::Now },
    );
    for _ in 0..20 {
        assert_eq!(errno(&fs::read(target.path().join("bug")).unwrap_err()), Some(Errno::IO));
    }
    layer.script(|_, _| Reaction::Now);
    assert_eq!(fs::read(target.path().join("fine")).unwrap(), pattern(10_000));
}

#[test]
fn whoever_waits_can_be_killed() {
    // A directory of many blocks, which nothing has read before.
    let mut entries: Vec<_> = (0..1000).map(|n| file(&format!("dir/{n:060}"), b"")).collect();
    entries.extend([file("late", &pattern(3_000_000)), file("dir/late", b"x")]);
    let layer = lazy(&entries);
    let target = dir();
    let mut options = ServeOptions::for_this_user("test");
    options.patience = Duration::from_secs(3600);
    let server = serve(open(std::slice::from_ref(&layer)), target.path(), &options).unwrap();
    layer.script(|_, purpose| if purpose == Purpose::Read { Reaction::Hold } else { Reaction::Soon });
    let killed = |program: &str, path: PathBuf, held: usize| {
        let mut child = Command::new(program).arg(path).stdout(Stdio::null()).spawn().unwrap();
        layer.wait_for_held(held);
        child.kill().unwrap();
        assert!(!child.wait().unwrap().success());
    };
    killed("cat", target.path().join("late"), 1);
    layer.forget();
    layer.script(|_, _| Reaction::Hold);
    killed("stat", target.path().join("dir/late"), 2);
    layer.script(|_, _| Reaction::Now);
    layer.release();
    eventually("nothing waits any more", || server.waiting() == 0);
    assert_eq!(fs::read(target.path().join("late")).unwrap(), pattern(3_000_000));
    assert_eq!(fs::read(target.path().join("dir/late")).unwrap(), b"x");
}

#[test]
fn nothing_can_be_written() {
    let layer = local(&[file("file", b"x"), directory("dir")]);
    let target = dir();
    let _server = mount(&[layer], target.path());
    let at = |name: &str| target.path().join(name);
    let attempts: Vec<(&str, io::Result<()>)> = vec![
        ("open", OpenOptions::new().write(true).open(at("file")).map(drop)),
        ("truncate", OpenOptions::new().write(true).truncate(true).open(at("file")).map(drop)),
        ("create", File::create(at("new")).map(drop)),
        ("unlink", fs::remove_file(at("file"))),
        ("rmdir", fs::remove_dir(at("dir"))),
        ("mkdir", fs::create_dir(at("new"))),
        ("rename", fs::rename(at("file"), at("new"))),
        ("link", fs::hard_link(at("file"), at("new"))),
        ("symlink", std::os::unix::fs::symlink("a", at("new"))),
        ("chmod", fs::set_permissions(at("file"), fs::Permissions::from_mode(0o600))),
        ("chown", std::os::unix::fs::chown(at("file"), Some(1), None)),
        (
            "setxattr",
            rustix::fs::setxattr(at("file"), "user.a", b"1", rustix::fs::XattrFlags::empty()).map_err(Into::into),
        ),
    ];
    for (what, result) in attempts {
        assert_eq!(result.map_err(|e| errno(&e)), Err(Some(Errno::ROFS)), "{what}");
    }
    // Nor if somebody makes the mount itself writable.
    rustix::mount::mount_remount(target.path(), MountFlags::empty(), "").unwrap();
    assert_eq!(File::create(at("new")).map(drop).map_err(|e| errno(&e)), Err(Some(Errno::ROFS)));
    assert_eq!(fs::remove_file(at("file")).map_err(|e| errno(&e)), Err(Some(Errno::ROFS)));
}

#[test]
fn inode_numbers_tell_files_apart_and_never_change() {
    let lower = local(&[file("d/a", b"1"), hard_link("d/b", "d/a"), file("d/c", b"2"), directory("d/e")]);
    let upper = local(&[file("d/c", b"3"), file("d/x", b"4"), hard_link("y", "d/x")]);
    let target = dir();
    let look = || {
        let server = mount(&[Arc::clone(&lower), Arc::clone(&upper)], target.path());
        let mut seen = BTreeMap::new();
        for name in ["", "d", "d/a", "d/b", "d/c", "d/e", "d/x", "y"] {
            let path = target.path().join(name);
            let metadata = fs::metadata(&path).unwrap();
            assert_eq!(metadata.dev(), fs::metadata(target.path()).unwrap().dev());
            seen.insert(name, (metadata.ino(), metadata.nlink()));
        }
        for entry in fs::read_dir(target.path().join("d")).unwrap() {
            let entry = entry.unwrap();
            use std::os::unix::fs::DirEntryExt as _;
            assert_eq!(entry.ino(), entry.metadata().unwrap().ino());
        }
        server.unmount(Unmount::Lazy).unwrap();
        server.wait();
        seen
    };
    let seen = look();
    assert_eq!(seen, look());
    assert_eq!(seen["d/a"], seen["d/b"]);
    assert_eq!(seen["d/x"], seen["y"]);
    assert_eq!(seen["d/a"].1, 2);
    // Merged directories say 1, others count.
    assert_eq!((seen[""].1, seen["d"].1, seen["d/e"].1), (1, 1, 2));
    let mut numbers: Vec<u64> = seen.values().map(|(ino, _)| *ino).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!(numbers.len(), 6);
}

#[test]
fn the_kernel_asks_once() {
    let layer = local(&[file("a/b/c", &pattern(100_000)), symlink("link", "a/b/c"), directory("empty")]);
    let target = dir();
    let server = mount(&[layer], target.path());
    let walk = || {
        let walked = Command::new("find").arg(target.path()).arg("-ls").output().unwrap();
        assert!(walked.status.success());
        assert_eq!(fs::read(target.path().join("link")).unwrap().len(), 100_000);
        assert!(!target.path().join("missing").exists());
        assert!(!target.path().join("a/missing").exists());
    };
    walk();
    let before = server.requests();
    walk();
    assert_eq!(server.requests(), before, "everything is remembered");
}

#[test]
fn images_without_attributes_are_not_asked_for_any() {
    // The mark of an opaque directory is an attribute, but not one that shows.
    let layer = local(&[file("a", b""), file("b", b""), directory("c"), opaque("c")]);
    let target = dir();
    let server = mount(&[local(&[file("c/hidden", b"")]), layer], target.path());
    assert!(!target.path().join("c/hidden").exists());
    let ask = |name: &str| {
        let path = target.path().join(name);
        fs::metadata(&path).unwrap();
        let mut room = [0; 100];
        (
            rustix::fs::getxattr(&path, "trusted.overlay.opaque", &mut room[..]),
            rustix::fs::listxattr(&path, &mut room[..]),
        )
    };
    assert_eq!(ask("a"), (Err(Errno::NOTSUP), Err(Errno::NOTSUP)));
    for name in ["b", "c"] {
        fs::metadata(target.path().join(name)).unwrap();
    }
    let before = server.requests();
    assert_eq!(ask("b"), (Err(Errno::NOTSUP), Err(Errno::NOTSUP)));
    assert_eq!(ask("c"), (Err(Errno::NOTSUP), Err(Errno::NOTSUP)));
    assert_eq!(server.requests(), before);
}

#[test]
fn extended_attributes_are_shown_as_the_kernel_shows_them() {
    let mut made = file("f", b"x");
    made.0.metadata.xattrs = vec![
        xattr("security.capability", b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        xattr("trusted.secret", b"s"),
        xattr("user.empty", b""),
        xattr("user.long", &[7; 3000]),
    ];
    let layer = local(&[made]);
    let target = dir();
    let _server = mount(&[layer], target.path());
    let path = target.path().join("f");
    let mut room = vec![0; 4096];
    let len = rustix::fs::listxattr(&path, &mut room[..]).unwrap();
    assert_eq!(&room[..len], b"security.capability\0trusted.secret\0user.empty\0user.long\0");
    assert_eq!(rustix::fs::listxattr_query(&path).unwrap(), len);
    assert_eq!(rustix::fs::getxattr_query(&path, "user.long"), Ok(3000));
    assert_eq!(rustix::fs::listxattr(&path, &mut [0_u8; 10][..]), Err(Errno::RANGE));
    assert_eq!(rustix::fs::getxattr(&path, "user.long", &mut room[..]), Ok(3000));
    assert_eq!(rustix::fs::getxattr(&path, "user.long", &mut [0_u8; 10][..]), Err(Errno::RANGE));
    assert_eq!(rustix::fs::getxattr(&path, "user.empty", &mut room[..]), Ok(0));
    assert_eq!(rustix::fs::getxattr(&path, "user.none", &mut room[..]), Err(Errno::NODATA));
    // What only the superuser may see is kept from others.
    let listed = as_nobody(Path::new("getfattr"), &["-m", "-", "--absolute-names", path.to_str().unwrap()]);
    let listed = String::from_utf8(listed.stdout).unwrap();
    assert!(listed.contains("user.long") && !listed.contains("trusted.secret"), "{listed}");
}

#[test]
fn holes_are_found_where_the_kernel_finds_them() {
    let mut content = vec![0; 20 * 4096 + 100];
    for block in [2, 3, 7, 19] {
        content[block * 4096..][..4096].copy_from_slice(&pattern(4096));
    }
    let entries =
        [file("sparse", &content), file("empty", b""), file("full", &pattern(5000)), file("zeros", &[0; 9000])];
    let image = image(&entries);
    let kernel = Kernel::stack(std::slice::from_ref(&image));
    let target = dir();
    let _server = mount(&[LazyBytes::local(image)], target.path());
    for name in ["sparse", "empty", "full", "zeros"] {
        let open = |root: &Path| rustix::fs::open(root.join(name), OFlags::RDONLY, Mode::empty()).unwrap();
        let (ours, theirs) = (open(target.path()), open(kernel.tree()));
        for offset in (0..=21 * 4096).step_by(1024) {
            for seek in [SeekFrom::Data, SeekFrom::Hole] {
                assert_eq!(
                    rustix::fs::seek(&ours, seek(offset)),
                    rustix::fs::seek(&theirs, seek(offset)),
                    "{name} {:?}",
                    seek(offset)
                );
            }
        }
    }
}

#[test]
fn programs_run_with_the_rights_their_files_give() {
    let id = fs::read("/usr/bin/id").unwrap();
    let mut null = entry("null", EntryKind::CharDevice(DeviceNumber { major: 1, minor: 3 }));
    null.0.metadata.permissions = 0o666;
    let layer = lazy(&[owned("bin/id", &id, 0o755, 0), owned("bin/suid", &id, 0o4755, 0), null]);
    let target = dir();
    let _server = mount(&[layer], target.path());
    let effective = |program: &str| {
        let output = as_nobody(&target.path().join(program), &["-u"]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(effective("bin/id"), "65534\n");
    assert_eq!(effective("bin/suid"), "0\n");
    fs::write(target.path().join("null"), "into the void").unwrap();
}

#[test]
fn the_kernel_checks_permissions_and_acls() {
    // user::rw- user:65534:r-- group::--- mask::r-- other::--- and user::rw- user:65534:--- group::r-- mask::r-- other::r--
    let acl = |named: u16, other: u16| {
        let mut value = 2_u32.to_le_bytes().to_vec();
        for (tag, permissions, id) in [
            (0x01_u16, 6, u32::MAX),
            (0x02, named, NOBODY),
            (0x04, other, u32::MAX),
            (0x10, 4, u32::MAX),
            (0x20, other, u32::MAX),
        ] {
            value.extend(tag.to_le_bytes());
            value.extend(permissions.to_le_bytes());
            value.extend(id.to_le_bytes());
        }
        value
    };
    let with_acl = |name: &str, mode, value: &[u8]| {
        let mut made = owned(name, b"x", mode, 0);
        made.0.metadata.xattrs = vec![xattr("system.posix_acl_access", value)];
        made
    };
    let layer = local(&[
        owned("public", b"x", 0o644, 0),
        owned("secret", b"x", 0o600, 0),
        owned("own", b"x", 0o400, NOBODY),
        with_acl("allowed", 0o640, &acl(4, 0)),
        with_acl("denied", 0o644, &acl(0, 4)),
    ]);
    let target = dir();
    let _server = mount(&[layer], target.path());
    for (name, readable) in [("public", true), ("secret", false), ("own", true), ("allowed", true), ("denied", false)] {
        let path = target.path().join(name);
        let output = as_nobody(Path::new("cat"), &[path.to_str().unwrap()]);
        assert_eq!(output.status.success(), readable, "{name}: {}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(fs::read(&path).unwrap(), b"x", "{name} as root");
    }
}

#[test]
fn a_file_system_tells_its_size() {
    let layers = [local(&[file("a", &pattern(100_000))]), local(&[file("b", &pattern(5000))])];
    let bytes: u64 = layers.iter().map(|layer| headstart::model::ReadAt::size(&**layer)).sum();
    let target = dir();
    let _server = mount(&layers, target.path());
    let told = rustix::fs::statvfs(target.path()).unwrap();
    assert_eq!(told.f_frsize * told.f_blocks, bytes);
    assert_eq!((told.f_bfree, told.f_ffree, told.f_namemax), (0, 0, 255));
    assert_eq!(told.f_files, 4, "two roots and two files");
    let metadata = fs::metadata(target.path().join("b")).unwrap();
    assert_eq!((metadata.size(), metadata.blocks(), metadata.blksize()), (5000, 16, 4096));
}

#[test]
fn offsets_of_a_listing_stay_valid() {
    let names: Vec<String> = (0..3000).map(|n| format!("{n:05}")).collect();
    let lower: Vec<_> = names.iter().map(|name| file(&format!("merged/{name}"), b"")).collect();
    let mut upper: Vec<_> = names.iter().step_by(3).map(|name| whiteout(&format!("merged/{name}"))).collect();
    upper.extend(names.iter().map(|name| file(&format!("single/{name}"), b"")));
    let target = dir();
    let _server = mount(&[local(&lower), local(&upper)], target.path());
    for (directory, count) in [("merged", 2000), ("single", 3000)] {
        let handle = File::open(target.path().join(directory)).unwrap();
        let mut listed = Vec::new();
        let mut entries = rustix::fs::Dir::read_from(&handle).unwrap();
        while let Some(entry) = entries.read() {
            let entry = entry.unwrap();
            listed.push((entry.file_name().to_owned(), entry.offset()));
        }
        assert_eq!(listed.len(), count + 2, "{directory} and the dots");
        // Another handle goes on from any offset with exactly what followed it.
        for at in [0, 1, 2, 700, count - 1] {
            let handle = File::open(target.path().join(directory)).unwrap();
            let mut entries = rustix::fs::Dir::new(handle).unwrap();
            entries.seek(listed[at].1).unwrap();
            let rest: Vec<CString> =
                std::iter::from_fn(|| entries.read()).map(|entry| entry.unwrap().file_name().to_owned()).collect();
            let expected: Vec<CString> = listed[at + 1..].iter().map(|(name, _)| name.clone()).collect();
            assert_eq!(rest, expected, "{directory} from {at}");
        }
    }
}

#[test]
fn unmounting_from_outside_ends_the_session() {
    let layer = local(&[file("a", b"x")]);
    let target = dir();
    let server = mount(std::slice::from_ref(&layer), target.path());
    run("umount", &[target.path().to_str().unwrap()]);
    assert!(server.wait_for(PATIENCE));
    server.unmount(Unmount::Strict).unwrap();
    // A file that is open keeps a mount, and survives a lazy unmount.
    let server = mount(std::slice::from_ref(&layer), target.path());
    let open = File::open(target.path().join("a")).unwrap();
    assert!(matches!(server.unmount(Unmount::Strict), Err(MountError::InUse(_))));
    server.unmount(Unmount::Lazy).unwrap();
    assert!(!target.path().join("a").exists());
    assert!(!server.is_over());
    let mut byte = [0];
    open.read_exact_at(&mut byte, 0).unwrap();
    assert_eq!(byte, *b"x");
    drop(open);
    assert!(server.wait_for(PATIENCE));
}

/// A reader on its way, and what it will have read.
type Waiting = thread::JoinHandle<Result<Vec<u8>, Option<Errno>>>;

/// A mount, and somebody who reads a file of it whose bytes do not come.
fn somebody_waits() -> (Server, Arc<LazyBytes>, tempfile::TempDir, Waiting) {
    let layer = lazy(&[file("never", &pattern(10_000))]);
    let target = dir();
    let server = mount(std::slice::from_ref(&layer), target.path());
    layer.script(|_, purpose| if purpose == Purpose::Read { Reaction::Hold } else { Reaction::Soon });
    let path = target.path().join("never");
    let reader = thread::spawn(move || fs::read(path).map_err(|e| errno(&e)));
    layer.wait_for_held(1);
    (server, layer, target, reader)
}

#[test]
fn a_server_that_ends_lets_nobody_wait() {
    let (server, _layer, _target, reader) = somebody_waits();
    drop(server);
    assert_eq!(reader.join().unwrap(), Err(Some(Errno::IO)));
}

#[test]
fn unmounting_answers_those_who_wait() {
    let (server, layer, _target, reader) = somebody_waits();
    server.unmount(Unmount::Lazy).unwrap();
    assert!(!reader.is_finished());
    layer.script(|_, _| Reaction::Now);
    layer.release();
    assert_eq!(reader.join().unwrap(), Ok(pattern(10_000)));
    assert!(server.wait_for(PATIENCE));
}

#[test]
fn bad_mount_points_are_refused() {
    let vfs = || open(&[local(&[file("a", b"")])]);
    let target = dir();
    let options = ServeOptions::for_this_user("test");
    let plain = target.path().join("file");
    fs::write(&plain, "").unwrap();
    let refused = |path: &Path| serve(vfs(), path, &options).map(drop).unwrap_err();
    assert!(matches!(refused(&target.path().join("gone")), ServeError::Mount(MountError::Missing(_))));
    assert!(matches!(refused(&plain), ServeError::Mount(MountError::NotADirectory(_))));
    let place = target.path().join("dir");
    fs::create_dir(&place).unwrap();
    let server = serve(vfs(), &place, &options).unwrap();
    match refused(&place) {
        ServeError::Mount(MountError::Busy { kind, source_name, .. }) => {
            assert_eq!((kind.as_str(), source_name.as_str()), ("fuse.headstart", "test"));
        }
        other => panic!("{other}"),
    }
    drop(server);
    assert_eq!(check_mount_point(&place).unwrap(), place.canonicalize().unwrap());
}

#[test]
fn a_writable_overlay_keeps_what_is_written() {
    let layer = lazy(&[file("etc/hosts", b"lower"), file("etc/gone", b"x"), file("bin/tool", &pattern(300_000))]);
    let stage = dir();
    let (lower, merged, upper) = (stage.path().join("lower"), stage.path().join("mnt"), stage.path().join("up,per:1"));
    fs::create_dir(&lower).unwrap();
    fs::create_dir(&merged).unwrap();
    for round in 0..2 {
        let server = mount(std::slice::from_ref(&layer), &lower);
        mount_writable("headstart", server.mount_point(), &upper, &merged).unwrap();
        if round == 0 {
            fs::write(merged.join("etc/hosts"), "upper").unwrap();
            fs::remove_file(merged.join("etc/gone")).unwrap();
            fs::rename(merged.join("bin/tool"), merged.join("bin/moved")).unwrap();
            fs::create_dir(merged.join("new")).unwrap();
        }
        assert_eq!(fs::read(merged.join("etc/hosts")).unwrap(), b"upper");
        assert!(!merged.join("etc/gone").exists());
        assert_eq!(fs::read(merged.join("bin/moved")).unwrap(), pattern(300_000));
        assert!(merged.join("new").is_dir());
        assert_eq!(fs::read(lower.join("etc/hosts")).unwrap(), b"lower");
        // The overlay holds the lower mount by itself, whose name may go; both end together.
        server.unmount(Unmount::Lazy).unwrap();
        assert!(!server.is_over());
        assert_eq!(fs::read(merged.join("bin/moved")).unwrap().len(), 300_000);
        unmount(&merged, Unmount::Lazy).unwrap();
        assert!(server.wait_for(PATIENCE));
    }
}

#[test]
fn many_readers_at_once_get_the_right_bytes() {
    let names: Vec<(String, usize)> = (0..24).map(|n| (format!("d/{n}"), 1000 + n * 4567)).collect();
    let entries: Vec<_> = names.iter().map(|(name, len)| file(name, &pattern(*len))).collect();
    let layer = lazy(&entries);
    let target = dir();
    let _server = mount(std::slice::from_ref(&layer), target.path());
    let (send, results) = mpsc::channel();
    for thread in 0..8 {
        let (send, names, root) = (send.clone(), names.clone(), target.path().to_owned());
        thread::spawn(move || {
            for (name, len) in names.iter().skip(thread * 3).chain(&names) {
                send.send(fs::read(root.join(name)).unwrap() == pattern(*len)).unwrap();
            }
        });
    }
    drop(send);
    assert!(results.iter().all(|right| right));
}
