//! What users and registries get wrong: each gives one clear error with its exit code, and leaves nothing half-made.

use std::fs;
use std::net::TcpListener;

use headstart::tar::decompress::Compression;
use headstart::testkit::layouts::{TestLayer, write_layout};
use headstart::testkit::registry::{Door, FaultyRegistry};

use super::stage::{Stage, noise, reference, tar};

/// The words of a failure: what was attempted, why, and what to do, each once.
#[track_caller]
pub(super) fn assert_told(words: &str, expected: &[&str]) {
    for part in expected {
        assert!(words.contains(part), "{part:?} is missing in {words:?}");
    }
    assert_eq!(words.matches("headstart: ").count(), 1, "{words:?}");
    assert!(!words.contains("panicked"), "{words:?}");
}

#[test]
fn images_that_cannot_be_had() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", b"a")])]);
    let registry = stage.serve(&converted, &[]);
    // Nobody listens on a port that was free a moment ago.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let mnt = stage.make("mnt");
    let mnt = mnt.to_str().unwrap();
    let tag = format!("{}/some/image:absent", registry.address);
    let digest = format!("{}/some/image@sha256:{}", registry.address, "0".repeat(64));
    let down = format!("{closed}/some/image:latest");
    let no_layout = format!("oci:{}", stage.path("nowhere").display());
    let no_tag = format!("oci:{}:absent", converted.display());
    let no_archive = format!("oci-archive:{}", stage.path("nowhere.tar").display());
    for (image, code, words) in [
        (tag.as_str(), 3, &["absent", "there is no such image"][..]),
        (&digest, 3, &["0000", "there is no such image"]),
        (&down, 5, &["cannot connect", "hint: check the address"]),
        (&no_layout, 3, &["nowhere"]),
        (&no_tag, 3, &["there is no image absent", "latest"]),
        (&no_archive, 3, &["nowhere.tar"]),
        ("ftp://example/x", 2, &["unknown transport"]),
        ("UPPER", 2, &["no repository name"]),
        ("./path", 2, &["looks like a path"]),
    ] {
        let (found, told) = stage.fails(&["mount", image, mnt]);
        assert_eq!(found, code, "{image}: {told}");
        if code != 2 {
            assert_told(&told, words);
        }
        for part in words {
            assert!(told.contains(part), "{part:?} is missing in {told:?}");
        }
        let (found, told) = stage.fails(&["convert", image, &reference(&stage.path("dest"))]);
        assert_eq!(found, code, "{image}: {told}");
        assert!(!stage.path("dest").join("index.json").exists() || index_is_empty(&stage), "{image}");
    }
    stage.assert_clean();
}

fn index_is_empty(stage: &Stage) -> bool {
    fs::read_to_string(stage.path("dest").join("index.json")).unwrap().contains("\"manifests\":[]")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password() {
    let stage = Stage::new();
    let registry = FaultyRegistry::start().await;
    registry.set_door(Door::Basic { user: "user".into(), password: "right".into() });
    // user:wrong
    let login = format!("{{\"auths\":{{\"{}\":{{\"auth\":\"dXNlcjp3cm9uZw==\"}}}}}}", registry.host());
    fs::write(stage.path("docker-config.json"), login).unwrap();
    let image = format!("{}/some/image:latest", registry.host());
    let (code, told) = tokio::task::block_in_place(|| stage.fails(&["inspect", &image]));
    assert_eq!(code, 4, "{told}");
    assert_told(&told, &["access was denied", "docker login"]);
    assert!(!told.contains("wrong") && !told.contains("dXNlcjp3cm9uZw"), "a secret was told: {told}");
}

#[test]
fn mount_points_that_cannot_be_used() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", b"a")])]);
    let image = reference(&converted);
    let missing = stage.path("missing");
    let file = stage.path("file");
    fs::write(&file, b"").unwrap();
    let busy = stage.make("busy");
    stage.ok(&["mount", &image, busy.to_str().unwrap()]);
    for (dir, words) in [(&missing, "does not exist"), (&file, "is not a directory"), (&busy, "is busy")] {
        let (code, told) = stage.fails(&["mount", &image, dir.to_str().unwrap()]);
        assert_eq!(code, 8, "{told}");
        assert_told(&told, &[words, dir.to_str().unwrap(), "hint: "]);
    }
    assert_eq!(stage.status().len(), 1);
    stage.ok(&["umount", busy.to_str().unwrap()]);
    let (code, told) = stage.fails(&["umount", busy.to_str().unwrap()]);
    assert_eq!(code, 3, "{told}");
    assert_told(&told, &["no mount of headstart"]);
    stage.assert_clean();
}

#[test]
fn images_that_are_not_what_they_should_be() {
    let stage = Stage::new();
    let (source, converted) = stage.images(&[tar(&[("a", &noise(1, 300_000))])]);
    let mnt = stage.make("mnt");
    let mnt = mnt.to_str().unwrap();

    // An image of tar layers: it is mounted, but nothing of it can be looked at before all of it is here.
    let (code, told) = stage.fails(&["ls", &reference(&stage.path("source"))]);
    assert_eq!(code, 7, "{told}");
    assert_told(&told, &["headstart convert"]);

    // A tar that is cut, with and without its compression being whole.
    let whole = tar(&[("a", &noise(2, 100_000))]);
    let cut = stage.path("cut");
    write_layout(&cut, &[TestLayer::of_tar(&whole[..50_000], Compression::Gzip)]).unwrap();
    let mut half = TestLayer::of_tar(&whole, Compression::Gzip);
    half.blob.truncate(50_000);
    let half_at = stage.path("half");
    write_layout(&half_at, &[half]).unwrap();
    // A layer whose tar is not the one of the config.
    let mut other = TestLayer::of_tar(&whole, Compression::Gzip);
    other.diff_id = TestLayer::of_tar(b"", Compression::Plain).diff_id;
    let other_at = stage.path("other");
    write_layout(&other_at, &[other]).unwrap();
    // A blob whose bytes differ from its digest.
    let blobs = fs::read_dir(stage.path("source/blobs/sha256")).unwrap().map(|entry| entry.unwrap().path());
    let layer = blobs.max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap();
    let bent = stage.path("bent");
    copy_tree(&stage.path("source"), &bent);
    let bent_layer = bent.join("blobs/sha256").join(layer.file_name().unwrap());
    let mut bytes = fs::read(&bent_layer).unwrap();
    let last = bytes.len() - 5;
    bytes[last] ^= 0xff;
    fs::write(&bent_layer, bytes).unwrap();
    drop(source);

    for (layout, words) in [
        (&cut, &["it ends there, in the middle of"][..]),
        (&half_at, &["cannot"]),
        (&other_at, &["unpacks to", "damaged"]),
        (&bent, &["cannot"]),
    ] {
        let dest = stage.path("dest");
        let (code, told) = stage.fails(&["convert", &reference(layout), &reference(&dest)]);
        assert_eq!(code, 6, "{}: {told}", layout.display());
        assert_told(&told, words);
        assert_told(&told, &["hint: "]);
        assert!(!dest.join("index.json").exists() || index_is_empty(&stage), "a broken image was published");
    }

    // A chunk that is damaged at its source: that file fails, others do not, and it is tried again.
    let layer = stage.json(&["inspect", &reference(&converted)])["layers"][0]["digest"].as_str().unwrap().to_owned();
    let blob = converted.join("blobs/sha256").join(layer.strip_prefix("sha256:").unwrap());
    let right = fs::read(&blob).unwrap();
    let mut wrong = right.clone();
    let middle = wrong.len() / 2;
    wrong[middle] ^= 1;
    fs::write(&blob, &wrong).unwrap();
    fs::remove_dir_all(stage.root()).unwrap();
    stage.ok(&["mount", &reference(&converted), mnt]);
    let file = std::path::Path::new(mnt).join("a");
    let error = fs::read(&file).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert_eq!(fs::read_dir(mnt).unwrap().count(), 1, "names still work");
    let log = fs::read_to_string(stage.status()[0]["log"].as_str().unwrap()).unwrap();
    assert!(log.contains("checksum") || log.contains("corrupt"), "{log}");
    fs::write(&blob, &right).unwrap();
    assert_eq!(fs::read(&file).unwrap(), noise(1, 300_000), "the next read tries again");
    stage.ok(&["umount", mnt]);
    stage.assert_clean();
}

#[test]
fn settings_that_make_no_sense() {
    let stage = Stage::new();
    let config = stage.path("bad.toml");
    fs::write(&config, "[fetch]\nmemroy = '1MiB'\n").unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_headstart"))
        .args(["--config", config.to_str().unwrap(), "status"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert_told(&String::from_utf8_lossy(&output.stderr), &["fetch.memroy", "did you mean \"fetch.memory\"?"]);
    let (code, told) = stage.fails(&["mount"]);
    assert_eq!(code, 2, "{told}");
    let (code, told) = stage.fails(&["--json", "inspect", &format!("oci:{}", stage.path("none").display())]);
    let told: serde_json::Value = serde_json::from_str(&told).expect("one line of JSON");
    assert_eq!((told["error"]["exit_code"].as_i64(), code), (Some(3), 3), "{told}");
}

fn copy_tree(from: &std::path::Path, to: &std::path::Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}
