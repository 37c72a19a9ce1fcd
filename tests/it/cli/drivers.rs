//! Drivers as a user meets them: what is chosen and why, the hand-over, what a killed process leaves and how it is removed.

use std::fs::{self, File};
use std::path::Path;

use headstart::sys::loopdev::loop_devices;
use headstart::sys::mount::mount_table;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::mounts::has_ended;
use super::stage::{Stage, noise, reference, tar, wait_until};

fn kill(stage: &Stage) {
    let pid = stage.status()[0]["pid"].as_i64().expect("a mount has a process");
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    wait_until("the death of the serving process", || has_ended(pid));
    assert_eq!(stage.status()[0]["state"], "dead");
}

/// Types of file systems mounted below `path`, in order, and how many loop devices have their files there.
fn mounted(path: &Path) -> (Vec<String>, usize) {
    let table = mount_table().unwrap().into_iter().filter(|entry| entry.mount_point.starts_with(path));
    let mut kinds: Vec<String> = table.map(|entry| entry.kind).collect();
    kinds.sort();
    (kinds, loop_devices().unwrap().iter().filter(|device| device.backing.starts_with(path)).count())
}

fn driver(stage: &Stage) -> (String, String) {
    let status = &stage.status()[0];
    let text = |field: &str| status[field].as_str().unwrap_or_default().to_owned();
    (text("driver"), text("driver_why"))
}

fn words(list: &Value) -> Vec<String> {
    list.as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_lazy_mount_becomes_a_local_one_and_outlives_its_process() {
    let stage = Stage::with_fills();
    let (large, other) = (noise(1, 6 << 20), noise(2, 3 << 20));
    let (_, converted) = stage.images(&[tar(&[("large", &large)]), tar(&[("other", &other)])]);
    let (one, two) = (stage.make("one"), stage.make("two"));
    let registry = stage.serve(&converted, &["--latency", "20"]);
    stage.ok(&["mount", "--driver", "kernel", &registry.image(), one.to_str().unwrap()]);
    assert!(fs::read(one.join("other")).unwrap() == other);
    stage.ok(&["wait", one.to_str().unwrap()]);
    wait_until("the hand-over", || driver(&stage).0 == "local");
    assert_eq!(driver(&stage).1, "all layers were handed over to the kernel");
    for layer in stage.status()[0]["layers"].as_array().unwrap() {
        assert!(layer["presented"].as_str().unwrap().starts_with("the kernel reads the local file"), "{layer}");
    }
    wait_until("the end of the FUSE connection", || !mounted(&stage.root()).0.contains(&"fuse.headstart".to_owned()));
    assert_eq!(mounted(&stage.root()).0, ["erofs", "erofs"]);

    // Now all of it is here, the kernel needs nobody from the start.
    stage.ok(&["mount", &registry.image(), two.to_str().unwrap()]);
    let status = stage.status();
    assert_eq!((&status[1]["driver"], &status[1]["driver_why"]), (&"local".into(), &"all layers are local".into()));
    stage.ok(&["umount", two.to_str().unwrap()]);

    kill(&stage);
    for (name, content) in [("large", &large), ("other", &other)] {
        let file = File::open(one.join(name)).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        assert!(fs::read(one.join(name)).unwrap() == *content);
    }
    stage.ok(&["umount", one.to_str().unwrap()]);
    stage.assert_clean();
}

#[test]
fn a_driver_that_cannot_be_had_is_replaced_with_the_reason() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", &noise(3, 1 << 20))])]);
    let (image, mnt) = (reference(&converted), stage.make("mnt"));
    let point = mnt.to_str().unwrap();
    for (wanted, expected, why) in [
        ("fuse", "fuse", "asked for"),
        ("local", "kernel", "no driver local: 1 of 1 layers are not local"),
        ("kernel", "kernel", "asked for"),
        ("auto", "kernel", "1 of 1 layers are not local"),
    ] {
        stage.ok(&["mount", "--driver", wanted, &image, point]);
        assert_eq!(driver(&stage), (expected.to_owned(), why.to_owned()), "{wanted}");
        assert_eq!(stage.status()[0]["driver_wanted"], wanted);
        assert!(stage.ok(&["status"]).contains(why));
        stage.ok(&["umount", point]);
        stage.assert_clean();
    }
    stage.ok(&["pull", &image]);
    stage.ok(&["mount", &image, point]);
    assert_eq!(driver(&stage), ("local".to_owned(), "all layers are local".to_owned()));
    assert!(fs::read(mnt.join("a")).unwrap() == noise(3, 1 << 20));
    stage.ok(&["umount", point]);
    stage.assert_clean();
}

#[test]
fn what_a_killed_process_left_is_found_and_removed() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", &noise(4, 2 << 20))]), tar(&[("b", b"b")])]);
    let image = reference(&converted);
    assert_eq!(stage.ok(&["cleanup"]).trim(), "nothing was left behind");
    let (kernel, fuse, alive) = (stage.make("kernel"), stage.make("fuse"), stage.make("alive"));
    stage.ok(&["mount", "--driver", "kernel", &image, kernel.to_str().unwrap()]);
    kill(&stage);
    let before = mounted(stage.root().parent().unwrap());
    assert_eq!(before.0, ["erofs", "erofs", "fuse.headstart", "overlay"]);
    stage.ok(&["mount", "--driver", "kernel", &image, alive.to_str().unwrap()]);
    let living = mounted(stage.root().parent().unwrap());

    let told = stage.json(&["cleanup", "--dry-run"]);
    let listed = words(&told["removed"]);
    let order: Vec<&str> = listed.iter().map(|what| what.split(' ').next().unwrap()).collect();
    // Both layers are small enough to be complete when they are mounted, or they have loop devices.
    let devices = order.iter().filter(|word| **word == "loop").count();
    let mut expected = vec!["overlay", "layer", "layer"];
    expected.extend(vec!["loop"; devices]);
    expected.extend(["FUSE", "run", "record"]);
    assert_eq!(order, expected, "{listed:?}");
    assert_eq!(mounted(stage.root().parent().unwrap()), living, "nothing was touched");

    let done = stage.json(&["cleanup"]);
    assert_eq!(words(&done["removed"]), listed);
    assert_eq!(fs::read(alive.join("b")).unwrap(), b"b");
    assert_eq!(stage.status().len(), 1);
    assert_eq!(stage.ok(&["cleanup"]).trim(), "nothing was left behind");
    stage.ok(&["umount", alive.to_str().unwrap()]);

    stage.ok(&["mount", "--driver", "fuse", &image, fuse.to_str().unwrap()]);
    kill(&stage);
    assert!(stage.ok(&["cleanup"]).contains(fuse.to_str().unwrap()));
    stage.assert_clean();
}

#[test]
fn a_left_mount_that_is_in_use_stays_until_it_is_taken_away_lazily() {
    let stage = Stage::with_fills();
    let (_, converted) = stage.images(&[tar(&[("a", b"content")])]);
    let (image, mnt) = (reference(&converted), stage.make("mnt"));
    stage.ok(&["pull", &image]);
    stage.ok(&["mount", &image, mnt.to_str().unwrap()]);
    kill(&stage);
    let held = File::open(mnt.join("a")).unwrap();
    let (code, words) = stage.fails(&["cleanup"]);
    assert!(code == 8 && words.contains("in use"), "{code} {words}");
    assert_eq!(fs::read(mnt.join("a")).unwrap(), b"content");
    assert_eq!(stage.status().len(), 1);
    stage.ok(&["cleanup", "--lazy"]);
    assert!(stage.status().is_empty());
    drop(held);
    stage.assert_clean();
}

#[test]
fn a_mount_that_is_taken_away_lazily_is_read_to_the_end() {
    let stage = Stage::new();
    let content = noise(5, 4 << 20);
    let (_, converted) = stage.images(&[tar(&[("a", &content)])]);
    let mnt = stage.make("mnt");
    let mut child = stage
        .program()
        .args(["mount", "--driver", "kernel", "--foreground", &reference(&converted)])
        .arg(&mnt)
        .spawn()
        .unwrap();
    wait_until("the mount", || mnt.join("a").exists());
    let mut held = File::open(mnt.join("a")).unwrap();
    stage.ok(&["umount", "--lazy", mnt.to_str().unwrap()]);
    let mut bytes = Vec::new();
    std::io::Read::read_to_end(&mut held, &mut bytes).unwrap();
    assert!(bytes == content);
    drop(held);
    assert!(child.wait().unwrap().success());
    stage.assert_clean();
}
