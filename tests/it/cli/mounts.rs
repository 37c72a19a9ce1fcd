//! `mount`, `umount` and `status`: the life of a serving process, and what it fetches.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use headstart::sys::mount::{Unmount, mounted_on, unmount};
use headstart::testkit::layers::{Options, stacks};
use headstart::testkit::tree::Listing;
use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::TestRunner;

use super::stage::{Stage, noise, reference, tar, wait_until};
use crate::layers::unpacked_by_umoci;

/// The serving process of the only mount.
fn pid(stage: &Stage) -> rustix::process::Pid {
    let pid = stage.status()[0]["pid"].as_i64().expect("a mount has a process");
    rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
}

/// True if it is gone, or waits for nothing but a parent to ask how it ended.
pub(super) fn has_ended(process: rustix::process::Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('Z'))
}

#[test]
fn an_image_is_converted_served_and_mounted_as_umoci_unpacks_it() {
    let stage = Stage::new();
    let mut runner = TestRunner::deterministic();
    let stack = stacks(Options::default()).new_tree(&mut runner).unwrap().current();
    let (_, converted) = stage.images(&stack.tars());
    let unpacked = unpacked_by_umoci(&stage.path("source"), &stage.path("bundle"));
    let registry = stage.serve(&converted, &["--latency", "1"]);
    let mnt = stage.make("mnt");
    stage.ok(&["mount", &registry.image(), mnt.to_str().unwrap()]);
    let mounted = Listing::of_directory(&mnt).unwrap();
    let plain = |listing: Listing| listing.without_directory_sizes().without_directory_links();
    plain(mounted).assert_equals(&plain(unpacked));
    stage.ok(&["umount", mnt.to_str().unwrap()]);
    stage.assert_clean();
}

#[test]
fn a_mount_fetches_ranges_and_no_more_than_is_read() {
    let stage = Stage::new();
    let large = noise(1, 24 << 20);
    let (_, converted) = stage.images(&[tar(&[("a/", b""), ("a/large", &large), ("a/small", b"little")])]);
    let registry = stage.serve(&converted, &[]);
    let mnt = stage.make("mnt");
    stage.ok(&["mount", "--driver", "fuse", &registry.image(), mnt.to_str().unwrap()]);
    assert_eq!(fs::read(mnt.join("a/small")).unwrap(), b"little");
    assert_eq!(fs::metadata(mnt.join("a/large")).unwrap().len(), large.len() as u64);

    let requests = registry.requests();
    let of_layer: Vec<_> = requests.iter().filter(|r| r.path.contains("/blobs/") && r.bytes > 2000).collect();
    assert!(!of_layer.is_empty(), "{requests:?}");
    for request in &of_layer {
        assert_eq!((request.status, request.range.as_str() == "-"), (206, false), "{request:?}");
    }
    let fetched: u64 = requests.iter().map(|r| r.bytes).sum();
    assert!(fetched < 4 << 20, "{fetched} bytes for a name and six bytes: {requests:?}");

    let status = stage.status();
    let told = status[0]["bytes_fetched"].as_u64().unwrap();
    assert!(told > 0 && told <= fetched, "{told} of {fetched}");
    stage.ok(&["umount", mnt.to_str().unwrap()]);
}

#[test]
fn status_tells_every_mount_with_the_promised_fields() {
    let stage = Stage::new();
    assert!(stage.status().is_empty());
    let content = noise(2, 3 << 20);
    let (_, converted) = stage.images(&[tar(&[("a", &content)]), tar(&[("b", b"b")])]);
    let image = reference(&converted);
    let (one, two) = (stage.make("one"), stage.make("two"));
    for mnt in [&one, &two] {
        stage.ok(&["mount", "--driver", "fuse", &image, mnt.to_str().unwrap()]);
    }
    assert_eq!(fs::read(one.join("a")).unwrap(), content);
    let status = stage.status();
    let points: Vec<_> = status.iter().map(|mount| mount["mount_point"].as_str().unwrap()).collect();
    assert_eq!(points, [one.to_str().unwrap(), two.to_str().unwrap()]);
    let first = &status[0];
    assert_eq!(first["image"], image);
    assert_eq!((&first["driver"], &first["driver_why"]), (&"fuse".into(), &"asked for".into()));
    assert_eq!(first["state"], "serving");
    assert!(first["bytes_fetched"].as_u64().unwrap() > 3 << 20, "{first}");
    assert!(first["bytes_demanded"].as_u64().unwrap() > 3 << 20, "{first}");
    let layers = first["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 2);
    for layer in layers {
        let number = |field: &str| layer[field].as_u64().unwrap_or_else(|| panic!("no number {field} in {layer}"));
        assert!(layer["digest"].as_str().unwrap().starts_with("sha256:"));
        assert!(layer["diff_id"].as_str().unwrap().starts_with("sha256:"));
        assert!(number("present") <= number("chunks") && number("chunks") > 0, "{layer}");
        assert!(number("bytes_present") <= number("bytes"), "{layer}");
    }
    // All of the large layer was read, so it is complete and, as soon as it was hashed, local.
    wait_until("the verification of a complete layer", || stage.status()[0]["layers"][0]["state"] == "local");
    assert_eq!(stage.status()[0]["layers"][0]["present"], stage.status()[0]["layers"][0]["chunks"]);

    let text = stage.ok(&["status"]);
    assert!(text.contains(one.to_str().unwrap()) && text.contains("local"), "{text}");
    for mnt in [&one, &two] {
        stage.ok(&["umount", mnt.to_str().unwrap()]);
    }
    assert_eq!(stage.ok(&["status"]).trim(), "nothing is mounted");
    stage.assert_clean();
}

#[test]
fn an_image_that_was_seen_opens_without_its_registry() {
    let stage = Stage::new();
    let unread = noise(3, 4 << 20);
    let (_, converted) = stage.images(&[tar(&[("read", b"known"), ("unread", &unread)])]);
    let registry = stage.serve(&converted, &[]);
    let (image, mnt) = (registry.image(), stage.make("mnt"));
    stage.ok(&["mount", &image, mnt.to_str().unwrap()]);
    assert_eq!(fs::read(mnt.join("read")).unwrap(), b"known");
    let manifest = stage.status()[0]["manifest"].as_str().unwrap().to_owned();
    stage.ok(&["umount", mnt.to_str().unwrap()]);

    // By tag, one question is enough while the registry answers.
    let before = registry.requests().len();
    stage.ok(&["mount", &image, mnt.to_str().unwrap()]);
    assert_eq!(fs::read(mnt.join("read")).unwrap(), b"known");
    stage.ok(&["umount", mnt.to_str().unwrap()]);
    let asked = registry.requests();
    assert_eq!(asked.len(), before + 1, "{:?}", &asked[before..]);
    let address = registry.address.clone();
    drop(registry);

    stage.ok(&["mount", &image, mnt.to_str().unwrap()]);
    assert_eq!(fs::read(mnt.join("read")).unwrap(), b"known");
    assert!(fs::read(mnt.join("unread")).is_err(), "bytes that were never fetched came from nowhere");
    assert_eq!(fs::read(mnt.join("read")).unwrap(), b"known", "one failed read harms no other");
    let log = fs::read_to_string(stage.status()[0]["log"].as_str().unwrap()).unwrap();
    assert!(log.contains("the registry does not answer: the image is taken as it was last seen"), "{log}");
    stage.ok(&["umount", mnt.to_str().unwrap()]);

    // By digest nobody has to be asked at all.
    stage.ok(&["mount", &format!("{address}/some/image@{manifest}"), mnt.to_str().unwrap()]);
    assert_eq!(fs::read(mnt.join("read")).unwrap(), b"known");
    let log = fs::read_to_string(stage.status()[0]["log"].as_str().unwrap()).unwrap();
    assert!(!log.contains("does not answer"), "{log}");
    stage.ok(&["umount", mnt.to_str().unwrap()]);
    stage.assert_clean();
}

#[test]
fn a_writable_layer_keeps_what_is_written() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("kept", b"kept"), ("removed", b"x"), ("changed", b"before")])]);
    let (image, mnt, upper) = (reference(&converted), stage.make("mnt"), stage.path("upper"));
    let mount = || stage.ok(&["mount", &image, mnt.to_str().unwrap(), "--upper", upper.to_str().unwrap()]);
    mount();
    fs::write(mnt.join("new"), b"new").unwrap();
    fs::write(mnt.join("changed"), b"after").unwrap();
    fs::remove_file(mnt.join("removed")).unwrap();
    assert_eq!(stage.status()[0]["upper"], upper.to_str().unwrap());
    stage.ok(&["umount", mnt.to_str().unwrap()]);
    assert!(fs::read_dir(&mnt).unwrap().next().is_none());
    stage.assert_clean();

    mount();
    let read = |name: &str| fs::read_to_string(mnt.join(name)).ok();
    assert_eq!(read("new").as_deref(), Some("new"));
    assert_eq!(read("changed").as_deref(), Some("after"));
    assert_eq!(read("kept").as_deref(), Some("kept"));
    assert_eq!(read("removed"), None);
    // Whoever takes the overlay away ends the whole.
    let process = pid(&stage);
    unmount(&mnt, Unmount::Strict).unwrap();
    wait_until("the end of the serving process", || has_ended(process));
    stage.assert_clean();
}

#[test]
fn a_mount_ends_when_it_is_unmounted_by_hand_or_its_process_is_asked_to() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", b"a")])]);
    let (image, mnt) = (reference(&converted), stage.make("mnt"));
    for by_signal in [false, true] {
        stage.ok(&["mount", &image, mnt.to_str().unwrap()]);
        let process = pid(&stage);
        if by_signal {
            rustix::process::kill_process(process, rustix::process::Signal::TERM).unwrap();
        } else {
            unmount(&mnt, Unmount::Strict).unwrap();
        }
        wait_until("the end of the serving process", || has_ended(process));
        assert!(stage.status().is_empty());
        stage.assert_clean();
    }
}

#[test]
fn a_mount_in_use_stays_until_it_is_taken_away_lazily() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", b"content")])]);
    let (image, mnt) = (reference(&converted), stage.make("mnt"));
    stage.ok(&["mount", &image, mnt.to_str().unwrap()]);
    let process = pid(&stage);
    let open = fs::File::open(mnt.join("a")).unwrap();
    let (code, words) = stage.fails(&["umount", mnt.to_str().unwrap()]);
    assert_eq!(code, 8, "{words}");
    assert!(words.contains("files in it are in use"), "{words}");
    stage.ok(&["umount", "--lazy", mnt.to_str().unwrap()]);
    assert!(mounted_on(&mnt).unwrap().is_none());
    assert_eq!(std::io::read_to_string(&open).unwrap(), "content", "an open file stays readable");
    drop(open);
    wait_until("the end of the serving process", || has_ended(process));
    stage.assert_clean();
}

#[test]
fn what_a_dead_process_left_is_told_and_taken_away() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", b"content")])]);
    let (image, mnt) = (reference(&converted), stage.make("mnt"));
    let point = mnt.to_str().unwrap();
    stage.ok(&["mount", "--driver", "fuse", &image, point]);
    let process = pid(&stage);
    rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
    wait_until("the death of the serving process", || has_ended(process));
    assert_eq!(stage.status()[0]["state"], "dead");
    assert!(fs::read_dir(&mnt).is_err(), "the mount is stale");

    let (code, words) = stage.fails(&["mount", &image, point]);
    assert_eq!(code, 8, "{words}");
    assert!(words.contains("stale") && words.contains("headstart umount"), "{words}");
    assert!(stage.ok(&["status"]).contains("is gone"));
    stage.ok(&["umount", point]);
    assert!(stage.status().is_empty());
    stage.assert_clean();
    stage.ok(&["mount", &image, point]);
    assert_eq!(fs::read(mnt.join("a")).unwrap(), b"content");
    stage.ok(&["umount", point]);
}

#[test]
fn a_process_that_hangs_holds_no_mount() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", b"content")])]);
    let (image, mnt) = (reference(&converted), stage.make("mnt"));
    stage.ok(&["mount", "--driver", "fuse", &image, mnt.to_str().unwrap()]);
    let process = pid(&stage);
    rustix::process::kill_process(process, rustix::process::Signal::STOP).unwrap();
    let status = stage.status();
    assert_eq!((status.len(), &status[0]["state"]), (1, &"silent".into()), "{status:?}");
    stage.ok(&["umount", mnt.to_str().unwrap()]);
    assert!(mounted_on(&mnt).unwrap().is_none());
    rustix::process::kill_process(process, rustix::process::Signal::CONT).unwrap();
    wait_until("the end of the serving process", || has_ended(process));
    stage.assert_clean();
}

#[test]
fn one_process_serves_in_the_foreground_until_it_is_interrupted() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", b"content")])]);
    let mnt = stage.make("mnt");
    let mut child = stage
        .program()
        .args(["mount", &reference(&converted), mnt.to_str().unwrap(), "--foreground"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_until("the mount", || mnt.join("a").exists());
    wait_until("the record of the mount", || !stage.status().is_empty());
    assert_eq!(stage.status()[0]["pid"], child.id());
    let process = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(process, rustix::process::Signal::INT).unwrap();
    assert!(child.wait().unwrap().success());
    stage.assert_clean();
}

/// An ordinary user mounts through fusermount3, sees the files and can take the mount away.
#[test]
fn an_ordinary_user_mounts_too() {
    const NOBODY: u32 = 65_534;
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", b"content")])]);
    // The program may lie where others cannot get at it.
    let program = stage.path("headstart");
    fs::copy(env!("CARGO_BIN_EXE_headstart"), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let home = stage.make("home");
    std::os::unix::fs::chown(&home, Some(NOBODY), Some(NOBODY)).unwrap();
    let run = |arguments: &[&str]| {
        let output = Command::new(&program)
            .env_clear()
            .env("HOME", &home)
            .env("PATH", "/usr/bin:/bin")
            .args(arguments)
            .uid(NOBODY)
            .gid(NOBODY)
            .output()
            .unwrap();
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned(), words)
    };
    let mnt = home.join("mnt");
    fs::create_dir(&mnt).unwrap();
    std::os::unix::fs::chown(&mnt, Some(NOBODY), Some(NOBODY)).unwrap();
    let image = reference(&converted);
    let (code, _, words) = run(&["mount", &image, mnt.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{words}");
    let read = Command::new("cat").arg(mnt.join("a")).uid(NOBODY).gid(NOBODY).output().unwrap();
    assert_eq!(read.stdout, b"content");
    let (_, status, _) = run(&["status"]);
    assert!(status.contains(mnt.to_str().unwrap()), "{status}");
    let (code, _, words) = run(&["mount", &image, mnt.to_str().unwrap(), "--upper", "/tmp/upper"]);
    assert_eq!(code, Some(4), "{words}");
    let (code, _, words) = run(&["umount", mnt.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{words}");
    assert!(mounted_on(&mnt).unwrap().is_none());
    assert!(home.join(".local/share/headstart/blobs").is_dir(), "a user's root is at home");
}
