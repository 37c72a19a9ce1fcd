//! Room made, images forgotten, with and without a daemon. Needs root, /dev/fuse and overlayfs.

use std::fs::{self, File};

use rustix::fs::{Advice, fadvise};
use serde_json::Value;

use super::stage::{Stage, noise, reference, tar, wait_until};
use crate::daemon::Daemon;

/// Adds a line to the store's settings.
fn with_store(stage: &Stage, line: &str) {
    stage.ok(&["status"]);
    let path = stage.path("config.toml");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(path, format!("{text}[store]\n{line}\n")).unwrap();
}

fn count(of: &Value) -> usize {
    of.as_array().unwrap().len()
}

#[test]
fn what_is_recorded_goes_last_and_tars_stay_until_everything_goes() {
    for served in [false, true] {
        let stage = Stage::new();
        with_store(&stage, "quota = '1B'");
        let shared = tar(&[("shared", &noise(1, 400_000))]);
        let image = |name: &str, number| {
            let tars = [shared.clone(), tar(&[("own", &noise(number, 300_000))])];
            stage.images_at(&format!("source-{name}"), name, &tars).1
        };
        let (one, two) = (reference(&image("one", 2)), reference(&image("two", 3)));
        let ordinary = reference(&stage.path("source-one"));
        let daemon = served.then(|| Daemon::start(&stage));
        for image in [&one, &two, &ordinary] {
            // A daemon may look at its cache at any moment: what is in use stays, and what has gone comes again.
            stage.ok(&["pull", image]);
        }
        let seen = stage.json(&["snapshots"]);
        assert_eq!((count(&seen["images"]), count(&seen["snapshots"])), (3, 5), "{seen:#}");

        let (code, words) = stage.fails(&["forget", &reference(&stage.path("never"))]);
        assert!(code == 3, "{code} {words}");
        let forgotten = stage.json(&["forget", "--prune", &two]);
        assert_eq!((count(&forgotten["snapshots"]), &forgotten["image"]), (1, &Value::from(two.as_str())));
        assert!(count(&forgotten["images"]) <= 1, "the shared layer is needed: {forgotten}");
        let seen = stage.json(&["snapshots"]);
        assert_eq!((count(&seen["images"]), count(&seen["snapshots"])), (2, 4), "{seen:#}");

        let tars = |pruned: &Value| {
            let all = pruned["images"].as_array().unwrap();
            all.iter().filter(|image| image["anchor"].as_str().unwrap().starts_with("tar-")).count()
        };
        // A daemon lets go of what it has just written when that is synced.
        wait_until("all but tars goes", || {
            stage.ok(&["prune"]);
            let left = stage.json(&["prune", "--all", "--dry-run"]);
            assert_eq!(tars(&left), 2, "tars are unpacked with effort: {left:#}");
            count(&left["images"]) == 2 && left["left"] == 0
        });
        stage.ok(&["forget", &ordinary]);
        let pruned = stage.json(&["prune"]);
        assert!(tars(&pruned) == 2 && pruned["left"] == 0, "{pruned:#}");
        let seen = stage.json(&["snapshots"]);
        let states: Vec<&Value> = seen["snapshots"].as_array().unwrap().iter().map(|of| &of["state"]).collect();
        assert_eq!(states, ["lazy", "lazy"], "the other image is still named: {seen:#}");
        if let Some(daemon) = daemon {
            daemon.end();
        }
        stage.assert_clean();
    }
}

#[test]
fn a_mounted_image_larger_than_the_quota_is_read_through_a_small_cache() {
    let stage = Stage::new();
    with_store(&stage, "quota = '2MiB'");
    let files: Vec<Vec<u8>> = (0..8).map(|number| noise(number, 1 << 20)).collect();
    let names: Vec<String> = (0..8).map(|number| format!("file-{number}")).collect();
    let entries: Vec<(&str, &[u8])> = names.iter().map(String::as_str).zip(files.iter().map(Vec::as_slice)).collect();
    let (_, converted) = stage.images(&[tar(&entries)]);
    let daemon = Daemon::start(&stage);
    let mnt = stage.make("mnt");
    stage.ok(&["mount", "--driver", "fuse", &reference(&converted), mnt.to_str().unwrap()]);
    let read = || {
        for (name, content) in names.iter().zip(&files) {
            let path = mnt.join(name);
            // From the daemon, not from what the kernel remembers.
            fadvise(File::open(&path).unwrap(), 0, None, Advice::DontNeed).unwrap();
            assert!(fs::read(path).unwrap() == *content, "{name}");
        }
    };
    read();
    let layer = || stage.status()[0]["layers"][0].clone();
    wait_until("chunks that nobody has read for a second go", || {
        let pruned = stage.json(&["prune"]);
        assert_eq!(count(&pruned["images"]), 0, "it is mounted");
        // The daemon may have made room before it was asked to.
        layer()["bytes_present"].as_u64().unwrap() <= 4 << 20
    });
    let fetched = || stage.status()[0]["bytes_fetched"].as_u64().unwrap();
    let before = fetched();
    read();
    assert!(fetched() > before, "what has gone is fetched again");
    stage.ok(&["umount", mnt.to_str().unwrap()]);
    daemon.end();
    stage.assert_clean();
}
