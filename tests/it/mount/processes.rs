//! What a mount promises whose server is a process of its own, with a life and a user of its own.

use std::fs;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use headstart::sys::mount::{MountError, Unmount, check_mount_point, unmount};
use headstart::testkit::images::{EntryWithContent, file};
use headstart::testkit::lazy::LazyBytes;
use rustix::io::Errno;

use super::{NOBODY, as_nobody, dir, errno, image, owned};
use crate::mounts::mount;

/// A process that serves a file as a mount.
struct Serving {
    child: Child,
    _dir: tempfile::TempDir,
    _stdout: ChildStdout,
    target: PathBuf,
}

impl Serving {
    /// Starts it, as another user if one is given, and waits until the mount is there.
    fn start(entries: &[EntryWithContent], user: Option<u32>) -> Self {
        let dir = dir();
        let target = dir.path().join("mount");
        fs::create_dir(&target).unwrap();
        fs::write(dir.path().join("image"), image(entries)).unwrap();
        // The user may not be able to reach where this program lies.
        let program = dir.path().join("program");
        fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
        let mut command = match user {
            None => Command::new(&program),
            Some(id) => {
                std::os::unix::fs::chown(&target, Some(id), Some(id)).unwrap();
                let id = id.to_string();
                let mut command = Command::new("setpriv");
                command.args(["--reuid", &id, "--regid", &id, "--clear-groups", "--"]).arg(&program);
                command
            }
        };
        let mut child = command
            .args(["--exact", "mount::processes::serves_for_another_test", "--ignored", "--nocapture"])
            .env("SERVE_IMAGE", dir.path().join("image"))
            .env("SERVE_ON", &target)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        let mut stdout = child.stdout.take().unwrap();
        while !said.contains("ready") {
            let mut byte = [0];
            assert_eq!(stdout.read(&mut byte).unwrap(), 1, "the server ended: {said}");
            said.push(char::from(byte[0]));
        }
        Self { child, _dir: dir, _stdout: stdout, target }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        drop(self.child.kill());
        self.child.wait().unwrap();
        drop(unmount(&self.target, Unmount::Lazy));
    }
}

#[test]
#[ignore = "a server that other tests start as another process"]
fn serves_for_another_test() {
    let image = fs::read(std::env::var_os("SERVE_IMAGE").unwrap()).unwrap();
    let target = PathBuf::from(std::env::var_os("SERVE_ON").unwrap());
    let server = mount(&[LazyBytes::new(image, 1 << 16)], &target);
    println!("ready");
    server.wait();
}

#[test]
fn a_dead_server_is_noticed_and_its_mount_can_be_removed() {
    let mut serving = Serving::start(&[file("a", b"x")], None);
    assert_eq!(fs::read(serving.target.join("a")).unwrap(), b"x");
    serving.child.kill().unwrap();
    serving.child.wait().unwrap();
    assert_eq!(errno(&fs::metadata(serving.target.join("b")).unwrap_err()), Some(Errno::NOTCONN));
    assert!(matches!(check_mount_point(&serving.target), Err(MountError::Stale(_))));
    unmount(&serving.target, Unmount::Strict).unwrap();
    check_mount_point(&serving.target).unwrap();
}

#[test]
fn an_ordinary_user_mounts_for_themselves() {
    // As udev leaves it wherever there is udev.
    fs::set_permissions("/dev/fuse", fs::Permissions::from_mode(0o666)).unwrap();
    let entries = [owned("public", b"p", 0o644, 0), owned("secret", b"s", 0o600, 0), owned("suid", b"", 0o4755, 0)];
    let mut serving = Serving::start(&entries, Some(NOBODY));
    let text = |name: &str| {
        let path = serving.target.join(name);
        String::from_utf8(as_nobody(Path::new("cat"), &[path.to_str().unwrap()]).stdout).unwrap()
    };
    // Whoever could download the image may read all of it.
    assert_eq!((text("public").as_str(), text("secret").as_str()), ("p", "s"));
    let entry = headstart::sys::mount::mounted_on(&serving.target).unwrap().unwrap();
    for option in ["ro", "nosuid", "nodev"] {
        assert!(entry.options.split(',').any(|word| word == option), "{option} in {}", entry.options);
    }
    // Nobody else may, not even root.
    assert_eq!(errno(&fs::read(serving.target.join("public")).unwrap_err()), Some(Errno::ACCESS));
    let removed = as_nobody(Path::new("fusermount3"), &["-u", serving.target.to_str().unwrap()]);
    assert!(removed.status.success());
    assert!(serving.child.wait().unwrap().success(), "the server ends by itself");
}
