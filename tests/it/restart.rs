//! What a daemon that ends or is killed leaves to the next one. Needs root, /dev/fuse, loop devices, EROFS and overlayfs.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Child, Stdio};

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

/// A pull through the daemon that waits for a registry which does not answer.
fn begin_pull(stage: &Stage, image: &str) -> Child {
    let mut command = stage.program();
    let client = command.args(["pull", image]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_until("the pull begins", || pulls_under_way(stage) == 1);
    client
}

fn pulls_under_way(stage: &Stage) -> usize {
    fs::read_dir(stage.root().join("pulls")).map_or(0, Iterator::count)
}

#[test]
fn a_pull_that_its_daemon_did_not_end_goes_on_with_the_next() {
    let stage = Stage::new();
    for (number, is_killed) in [(25, true), (26, false)] {
        let name = number.to_string();
        let layers = [tar(&[("large", &noise(number, 3 << 20))]), tar(&[("other", &noise(number + 10, 1 << 20))])];
        let (_, converted) = stage.images_at(&format!("source-{name}"), &name, &layers);
        let registry = stage.serve(&converted, &[]);
        let daemon = Daemon::start(&stage);
        registry.pause();
        let mut client = begin_pull(&stage, &registry.image());
        if is_killed {
            daemon.kill();
        } else {
            daemon.end();
        }
        assert!(!client.wait().unwrap().success());
        assert_eq!(pulls_under_way(&stage), 1);
        registry.go_on();
        let daemon = Daemon::start(&stage);
        wait_until("the image is here", || pulls_under_way(&stage) == 0);
        let seen = stage.json(&["snapshots"]);
        let images = seen["images"].as_array().unwrap();
        let image =
            images.iter().find(|image| image["image"].as_str().is_some_and(|name| name.ends_with(&registry.image())));
        let image = image.unwrap_or_else(|| panic!("{seen}: {}", daemon.log()));
        assert_eq!((&image["layers"], &image["committed"]), (&2.into(), &2.into()), "{}", daemon.log());
        daemon.end();
    }
    stage.assert_clean();
}

#[test]
fn a_pull_that_nobody_wants_any_more_is_over() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("large", &noise(27, 1 << 20))])]);
    let registry = stage.serve(&converted, &[]);
    let daemon = Daemon::start(&stage);
    registry.pause();
    let mut client = begin_pull(&stage, &registry.image());
    client.kill().unwrap();
    client.wait().unwrap();
    wait_until("the pull is over", || pulls_under_way(&stage) == 0);
    registry.go_on();
    // One that fails is over as well.
    stage.fails(&["pull", &format!("oci:{}:latest", stage.path("nowhere").display())]);
    assert_eq!(pulls_under_way(&stage), 0);
    daemon.end();
    stage.assert_clean();
}
