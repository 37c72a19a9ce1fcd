//! What a daemon that ends or is killed leaves to the next one. Needs root, /dev/fuse, loop devices, EROFS and overlayfs.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use headstart::sys::mount::mounted_on;

use crate::cli::stage::{Stage, noise, tar, wait_until};
use crate::daemon::Daemon;

/// Lets daemons of the stage leave what goes on without them, and log what they take up.
fn keep_mounts(stage: &Stage) {
    stage.program();
    let config = stage.path("config.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("log_level = 'info'\n{}", text.replace("keep_mounts = false", "keep_mounts = true")))
        .unwrap();
}

/// What tells a mount from another one in its place.
fn identity(mount_point: &Path) -> (u64, u64) {
    let metadata = fs::metadata(mount_point).unwrap();
    (metadata.dev(), metadata.ino())
}

/// Reads a file past what is cached of it.
fn read(path: &Path) -> Vec<u8> {
    let file = fs::File::open(path).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    fs::read(path).unwrap()
}

#[test]
fn a_local_mount_outlives_its_daemon_and_is_taken_up_by_the_next() {
    let stage = Stage::new();
    keep_mounts(&stage);
    let (large, other) = (noise(21, 3 << 20), noise(22, 1 << 20));
    let (_, converted) = stage.images(&[tar(&[("large", &large)]), tar(&[("other", &other)])]);
    let registry = stage.serve(&converted, &[]);
    let (mnt, written, upper) = (stage.make("mnt"), stage.make("written"), stage.path("upper"));
    let daemon = Daemon::start(&stage);
    stage.ok(&["pull", &registry.image()]);
    stage.ok(&["mount", &registry.image(), mnt.to_str().unwrap()]);
    stage.ok(&["mount", &registry.image(), written.to_str().unwrap(), "--upper", upper.to_str().unwrap()]);
    drop(registry);
    fs::write(written.join("new"), "new").unwrap();
    let held = fs::File::open(mnt.join("large")).unwrap();
    let before = [identity(&mnt), identity(&written)];
    daemon.end();
    assert!(read(&mnt.join("large")) == large, "nobody is needed");
    assert_eq!([identity(&mnt), identity(&written)], before);

    let daemon = Daemon::start(&stage);
    assert_eq!([identity(&mnt), identity(&written)], before, "{}", daemon.log());
    for mount in stage.status() {
        assert_eq!((&mount["state"], &mount["driver"]), (&"serving".into(), &"local".into()), "{}", daemon.log());
    }
    assert!(read(&mnt.join("other")) == other && fs::read(written.join("new")).unwrap() == b"new");
    drop(held);
    // Killed is as good as ended.
    daemon.kill();
    let daemon = Daemon::start(&stage);
    assert_eq!([identity(&mnt), identity(&written)], before, "{}", daemon.log());
    for point in [&mnt, &written] {
        stage.ok(&["umount", point.to_str().unwrap()]);
        assert!(mounted_on(point).unwrap().is_none());
    }
    daemon.end();
    stage.assert_clean();
    assert!(!stage.path("run/l").exists(), "layers stay");
}

#[test]
fn lazy_layers_of_a_killed_daemon_are_read_on_through_the_next() {
    let stage = Stage::new();
    keep_mounts(&stage);
    let (large, other) = (noise(23, 6 << 20), noise(24, 5 << 20));
    let (_, converted) = stage.images(&[tar(&[("large", &large)]), tar(&[("other", &other)])]);
    let registry = stage.serve(&converted, &[]);
    let mnt = stage.make("mnt");
    let daemon = Daemon::start(&stage);
    stage.ok(&["mount", "--driver", "kernel", &registry.image(), mnt.to_str().unwrap()]);
    assert!(read(&mnt.join("other")) == other);
    let before = identity(&mnt);
    daemon.kill();
    let daemon = Daemon::start(&stage);
    let log = daemon.log();
    assert_eq!(identity(&mnt), before, "{log}");
    assert!(
        log.contains("a loop device is taken up") && log.contains("the mount of the daemon before is taken up"),
        "{log}"
    );
    // What nobody had read before the death comes through the new connection, under the old mount.
    assert!(read(&mnt.join("large")) == large && read(&mnt.join("other")) == other);
    stage.ok(&["umount", mnt.to_str().unwrap()]);
    assert!(mounted_on(&mnt).unwrap().is_none());
    daemon.end();
    stage.assert_clean();
    wait_until("the layers go", || !stage.path("run/l").exists());
}
