//! `pull`, `wait` and what mounts bring in the background.

use std::fs;
use std::time::Duration;

use headstart::tar::decompress::Compression;
use headstart::testkit::layers::{Options, stacks};
use headstart::testkit::layouts::{TestLayer, write_layout};
use headstart::testkit::tree::Listing;
use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::TestRunner;

use super::stage::{Stage, noise, reference, tar, wait_until};

#[test]
fn a_pulled_image_needs_no_registry() {
    let stage = Stage::new();
    let (one, two) = (noise(1, 5 << 20), noise(2, 3 << 20));
    let (_, converted) = stage.images(&[tar(&[("a", &one)]), tar(&[("b", &two)])]);
    let registry = stage.serve(&converted, &[]);
    let image = registry.image();
    let pulled = stage.json(&["pull", &image]);
    let of_blobs = |r: &&super::stage::Request| r.path.contains("/blobs/") && r.method == "GET";
    let fetched: u64 = registry.requests().iter().filter(of_blobs).map(|r| r.bytes).sum();
    let told = pulled["bytes_fetched"].as_u64().unwrap();
    assert!(told > 8 << 20 && told <= fetched, "{told} of {fetched}");
    assert_eq!(pulled["layers"].as_array().unwrap().len(), 2);
    // Again: the tag is looked up, nothing is fetched.
    let before = registry.requests().iter().filter(of_blobs).count();
    let again = stage.json(&["pull", &image]);
    assert_eq!(again["bytes_fetched"], 0);
    assert_eq!(registry.requests().iter().filter(of_blobs).count(), before);
    drop(registry);

    let mnt = stage.make("mnt");
    stage.ok(&["mount", &image, mnt.to_str().unwrap()]);
    stage.ok(&["wait", mnt.to_str().unwrap()]);
    assert!(fs::read(mnt.join("a")).unwrap() == one && fs::read(mnt.join("b")).unwrap() == two);
    for layer in stage.status()[0]["layers"].as_array().unwrap() {
        assert_eq!((&layer["state"], &layer["why"]), (&"local".into(), &"all of it is here and verified".into()));
    }
    stage.ok(&["umount", mnt.to_str().unwrap()]);
    stage.assert_clean();
}

#[test]
fn what_cannot_be_pulled_says_why() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", b"a")])]);
    let registry = stage.serve(&converted, &[]);
    let image = registry.image();
    assert_eq!(stage.fails(&["pull", &format!("oci:{}:no", converted.display())]).0, 3);
    // A blob with another byte at its end, where its index is.
    let manifest = stage.json(&["inspect", &image]);
    let digest = manifest["layers"][0]["digest"].as_str().unwrap().trim_start_matches("sha256:").to_owned();
    let blob = converted.join("blobs/sha256").join(digest);
    let mut bytes = fs::read(&blob).unwrap();
    let middle = bytes.len() / 3;
    bytes[middle] ^= 1;
    fs::write(&blob, bytes).unwrap();
    let other = Stage::new();
    let (code, words) = other.fails(&["pull", &format!("oci:{}:latest", converted.display())]);
    assert_eq!(code, 6, "{words}");
    other.assert_clean();
}

#[test]
fn a_mount_becomes_local_unless_it_is_told_not_to() {
    let stage = Stage::with_fills();
    let large = noise(3, 12 << 20);
    let (_, converted) = stage.images(&[tar(&[("large", &large)]), tar(&[("small", b"small")])]);
    let registry = stage.serve(&converted, &[]);
    let (lazy, filled) = (stage.make("lazy"), stage.make("filled"));
    stage.ok(&["mount", "--no-fill", &registry.image(), lazy.to_str().unwrap()]);
    let before = registry.requests().len();
    let (code, words) = stage.fails(&["wait", lazy.to_str().unwrap()]);
    assert!(code == 7 && words.contains("without a fill"), "{code} {words}");
    let mounts = stage.status();
    assert_eq!(mounts[0]["layers"][0]["why"], "lazy: it is not filled");
    assert_eq!(registry.requests().len(), before, "nobody has read anything");
    stage.ok(&["umount", lazy.to_str().unwrap()]);

    stage.ok(&["mount", &registry.image(), filled.to_str().unwrap()]);
    stage.ok(&["wait", filled.to_str().unwrap(), "--timeout", "60"]);
    let status = &stage.status()[0];
    assert!(status["layers"].as_array().unwrap().iter().all(|layer| layer["state"] == "local"), "{status}");
    drop(registry);
    assert!(fs::read(filled.join("large")).unwrap() == large);
    stage.ok(&["umount", filled.to_str().unwrap()]);
    stage.assert_clean();
}

#[test]
fn waiting_has_an_end() {
    let stage = Stage::with_fills();
    let large = noise(4, 12 << 20);
    let (_, converted) = stage.images(&[tar(&[("large", &large)])]);
    let registry = stage.serve(&converted, &["--bandwidth", "1Mbit"]);
    let mnt = stage.make("mnt");
    stage.ok(&["mount", &registry.image(), mnt.to_str().unwrap()]);
    let (code, words) = stage.fails(&["wait", mnt.to_str().unwrap(), "--timeout", "1"]);
    assert!(code == 5 && words.contains("not local yet"), "{code} {words}");
    wait_until("the start of the fill", || stage.status()[0]["layers"][0]["state"] == "filling");
    let why = stage.status()[0]["layers"][0]["why"].as_str().unwrap().to_owned();
    assert!(why.starts_with("filling: ") && why.ends_with(" MiB"), "{why}");
    stage.ok(&["umount", mnt.to_str().unwrap()]);
    assert_eq!(stage.fails(&["wait", mnt.to_str().unwrap()]).0, 3);
    stage.assert_clean();
}

#[test]
fn an_ordinary_image_looks_as_its_conversion_does() {
    let stage = Stage::new();
    let mut runner = TestRunner::deterministic();
    for round in 0..8 {
        let stack = stacks(Options::default()).new_tree(&mut runner).unwrap().current();
        let tars = stack.tars();
        let (source, converted) = (stage.path(&format!("source-{round}")), stage.path(&format!("converted-{round}")));
        let form = [Compression::Plain, Compression::Gzip, Compression::Zstd][round % 3];
        let layers: Vec<TestLayer> = tars.iter().map(|tar| TestLayer::of_tar(tar, form)).collect();
        write_layout(&source, &layers).unwrap();
        stage.ok(&["convert", &reference(&source), &reference(&converted)]);
        let (plain, lazy) = (stage.make(&format!("plain-{round}")), stage.make(&format!("lazy-{round}")));
        stage.ok(&["mount", &reference(&source), plain.to_str().unwrap()]);
        stage.ok(&["mount", &reference(&converted), lazy.to_str().unwrap()]);
        let seen = |at| Listing::of_directory(at).unwrap().without_directory_sizes();
        seen(&plain).assert_equals(&seen(&lazy));
        for at in [&plain, &lazy] {
            stage.ok(&["umount", at.to_str().unwrap()]);
        }
    }
    stage.assert_clean();
}

#[test]
fn tar_layers_are_unpacked_once() {
    let stage = Stage::new();
    let (large, small) = (noise(5, 6 << 20), noise(6, 100_000));
    stage.images(&[tar(&[("large", &large)]), tar(&[("d/", b""), ("d/small", &small)]), tar(&[("d/.wh.small", b"")])]);
    let registry = stage.serve(&stage.path("source"), &[]);
    let pulled = stage.json(&["pull", &registry.image()]);
    assert!(pulled["bytes_fetched"].as_u64().unwrap() > 6 << 20, "{pulled}");
    assert_eq!(stage.json(&["pull", &registry.image()])["bytes_fetched"], 0);
    let blobs = || registry.requests().iter().filter(|r| r.path.contains("/blobs/") && r.bytes > 20_000).count();
    assert_eq!(blobs(), 2);
    let mnt = stage.make("mnt");
    stage.ok(&["mount", &registry.image(), mnt.to_str().unwrap()]);
    stage.ok(&["wait", "--timeout", "60", mnt.to_str().unwrap()]);
    assert!(fs::read(mnt.join("large")).unwrap() == large);
    assert_eq!(fs::read_dir(mnt.join("d")).unwrap().count(), 0, "what the last layer removes is gone");
    let status = &stage.status()[0];
    for layer in status["layers"].as_array().unwrap() {
        assert_eq!((&layer["state"], &layer["why"]), (&"local".into(), &"eager: tar layer".into()), "{status}");
    }
    assert_eq!(blobs(), 2);
    stage.ok(&["umount", mnt.to_str().unwrap()]);
    stage.assert_clean();
}

#[test]
fn a_tar_that_is_not_what_its_image_says_is_not_kept() {
    let stage = Stage::new();
    stage.images(&[tar(&[("a", &noise(7, 3 << 20))])]);
    let source = stage.path("source");
    let manifest = stage.json(&["inspect", &reference(&source)]);
    let digest = manifest["layers"][0]["digest"].as_str().unwrap().trim_start_matches("sha256:").to_owned();
    let blob = source.join("blobs/sha256").join(digest);
    let whole = fs::read(&blob).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for bytes in [&flipped[..], &whole[..whole.len() / 2]] {
        fs::write(&blob, bytes).unwrap();
        let (code, words) = stage.fails(&["pull", &reference(&source)]);
        assert!([5, 6].contains(&code), "{code} {words}");
        stage.assert_clean();
        assert!(!stage.root().join("blobs/sha256").exists());
    }
    fs::write(&blob, &whole).unwrap();
    stage.ok(&["pull", &reference(&source)]);
}

#[test]
fn what_is_pruned_comes_again() {
    let stage = Stage::new();
    let content = noise(8, 3 << 20);
    let (_, converted) = stage.images(&[tar(&[("a", &content)])]);
    let image = reference(&converted);
    stage.ok(&["pull", &image]);
    let mnt = stage.make("mnt");
    stage.ok(&["mount", &image, mnt.to_str().unwrap()]);
    assert_eq!(stage.json(&["prune", "--all"])["images"].as_array().unwrap().len(), 0, "it is mounted");
    assert!(fs::read(mnt.join("a")).unwrap() == content);
    stage.ok(&["umount", mnt.to_str().unwrap()]);
    assert!(stage.ok(&["prune"]).starts_with("0 layers removed"), "there is no quota");
    let would = stage.json(&["prune", "--all", "--dry-run"]);
    let pruned = stage.json(&["prune", "--all"]);
    assert_eq!(
        (&would["images"], &would["dry_run"], &pruned["dry_run"]),
        (&pruned["images"], &true.into(), &false.into())
    );
    assert!(pruned["bytes"].as_u64().unwrap() > 3 << 20 && pruned["left"] == 0, "{pruned}");
    assert!(stage.json(&["pull", &image])["bytes_fetched"].as_u64().unwrap() > 3 << 20);
    stage.assert_clean();
}

/// How often a pull is killed: the 200 with `HEADSTART_KILLS=200`.
const KILLS: u32 = 24;

#[test]
fn a_pull_that_is_killed_is_continued() {
    let kills = std::env::var("HEADSTART_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(KILLS);
    let stage = Stage::new();
    let (one, two) = (noise(9, 6 << 20), noise(10, 2 << 20));
    let (_, converted) = stage.images(&[tar(&[("a", &one)]), tar(&[("b", &two)])]);
    let (lazy, plain) = (stage.serve(&converted, &["--bandwidth", "60MB"]), stage.serve(&stage.path("source"), &[]));
    // How long a pull takes tells where its points are.
    let begin = std::time::Instant::now();
    stage.ok(&["pull", &lazy.image()]);
    let whole = begin.elapsed();
    stage.ok(&["prune", "--all"]);
    let mut verified: Vec<std::path::PathBuf> = Vec::new();
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    for kill in 0..kills {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let image = if kill % 3 == 2 { plain.image() } else { lazy.image() };
        let mut pull = stage.program().args(["pull", &image]).stdout(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(whole.mul_f64(f64::from(u32::try_from(seed >> 40).unwrap()) / f64::from(1 << 24)));
        pull.kill().unwrap();
        pull.wait().unwrap();
        // What was local once stays local, and is what it should be.
        let now = verified_images(&stage.root());
        assert!(verified.iter().all(|image| now.contains(image)), "{verified:?} became {now:?}");
        verified = now;
        if kill % 8 == 7 {
            let mnt = stage.make(&format!("mnt-{kill}"));
            for image in [lazy.image(), plain.image()] {
                stage.ok(&["mount", &image, mnt.to_str().unwrap()]);
                assert!(fs::read(mnt.join("b")).unwrap() == two && fs::read(mnt.join("a")).unwrap() == one);
                stage.ok(&["umount", mnt.to_str().unwrap()]);
            }
            stage.ok(&["prune", "--all"]);
            verified.clear();
        }
    }
    for image in [lazy.image(), plain.image()] {
        stage.ok(&["pull", &image]);
    }
    // An hour later nothing is left of the dead.
    for entry in fs::read_dir(stage.root().join("tmp")).unwrap() {
        let old = std::time::SystemTime::now() - Duration::from_secs(7200);
        fs::File::open(entry.unwrap().path()).unwrap().set_modified(old).unwrap();
    }
    stage.ok(&["prune"]);
    stage.assert_clean();
}

/// The images whose record says that all of them was verified.
fn verified_images(root: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    let Ok(blobs) = fs::read_dir(root.join("blobs/sha256")) else { return found };
    for image in blobs.flat_map(|blob| fs::read_dir(blob.unwrap().path()).unwrap()) {
        let image = image.unwrap().path();
        if fs::read_to_string(image.join("meta.json")).unwrap().contains("\"verified\"") {
            found.push(image);
        }
    }
    found
}
