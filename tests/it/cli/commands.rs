//! The commands that need no mount.

use std::fs;
use std::process::Stdio;

use headstart::model::BlobDigest;
use serde_json::Value;

use super::stage::{Stage, noise, reference, tar, wait_until};

#[test]
fn converting_tells_what_was_published_and_gives_the_same_again() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", b"a")]), tar(&[("b", b"b")])]);
    let first = fs::read_to_string(converted.join("index.json")).unwrap();
    let again = stage.path("again");
    let told = stage.json(&["convert", &reference(&stage.path("source")), &reference(&again), "--jobs", "1"]);
    assert_eq!(fs::read_to_string(again.join("index.json")).unwrap(), first, "the same source gives the same image");
    assert_eq!(told["images"][0]["layers"].as_array().unwrap().len(), 2);
    assert_eq!(told["images"][0]["platform"], "linux/amd64");
    let top: Value = serde_json::from_str(&first).unwrap();
    assert_eq!(top["manifests"][0]["digest"], told["digest"]);

    let words = stage.ok(&["convert", &reference(&stage.path("source")), &reference(&stage.path("third"))]);
    assert!(words.contains(told["digest"].as_str().unwrap()) && words.contains("2 layers"), "{words}");
}

#[test]
fn appending_keeps_the_original_first() {
    let stage = Stage::new();
    let (_, _) = stage.images(&[tar(&[("a", b"a")])]);
    let both = stage.path("both");
    let told = stage.json(&["convert", "--append", &reference(&stage.path("source")), &reference(&both)]);
    let digest: BlobDigest = told["digest"].as_str().unwrap().parse().unwrap();
    let index = fs::read(both.join("blobs/sha256").join(digest.0.hex())).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    let entries = index["manifests"].as_array().unwrap();
    assert_eq!(entries.len(), 2);
    assert_eq!(entries[0]["digest"], told["images"][0]["source"]);
    assert_eq!(entries[1]["digest"], told["images"][0]["manifest"]);
    assert_eq!(entries[1]["platform"]["os.features"][0], "erofs");
    // And who is asked for the first one can serve the second.
    assert_eq!(entries[1]["annotations"]["io.github.headstart-fs.twin-of"], entries[0]["digest"]);
    // Mounting and listing take the lazy one.
    assert_eq!(stage.ok(&["ls", &reference(&both)]), "a\n");
    assert_eq!(stage.json(&["inspect", &reference(&both)])["mountable"], true);
}

#[test]
fn images_are_listed_and_read_without_a_mount() {
    let stage = Stage::new();
    let content = noise(4, 3_000_000);
    let (_, converted) =
        stage.images(&[tar(&[("dir/", b""), ("dir/file", &content), ("dir/other", b"other"), ("gone", b"x")]), {
            let mut upper = tar(&[("dir/other", b"changed")]);
            // The two zero blocks at the end make room for one more entry.
            upper.truncate(upper.len() - 1024);
            upper.extend(tar(&[(".wh.gone", b"")]));
            upper
        }]);
    let image = reference(&converted);
    assert_eq!(stage.ok(&["ls", &image]), "dir\n");
    assert_eq!(stage.ok(&["ls", &image, "/dir/../dir/."]), "file\nother\n");
    let long = stage.ok(&["ls", "-l", &image, "dir/other"]);
    assert_eq!(long, "-rw-r--r--   1     0     0          7 2023-11-14T22:13:20Z dir/other\n");
    let rows = stage.json(&["ls", &image, "dir"]);
    assert_eq!(rows[0]["name"], "file");
    assert_eq!(rows[0]["size"], content.len());
    assert_eq!(rows[0]["mtime"], "2023-11-14T22:13:20.000000005Z");
    assert_eq!(stage.ok(&["cat", &image, "dir/other"]), "changed");
    let output = stage.run(&["cat", &image, "/dir/file"]);
    assert_eq!(output.stdout, content);

    for (arguments, words) in [
        (["ls", &image, "/gone"], "there is no /gone in the image"),
        (["ls", &image, "/dir/file/x"], "/dir/file/x is not a directory"),
        (["cat", &image, "/dir"], "/dir is not a regular file"),
    ] {
        let (code, told) = stage.fails(&arguments);
        assert_eq!(code, 3, "{told}");
        assert!(told.contains(words), "{told}");
    }
    stage.assert_clean();
}

#[test]
fn inspecting_tells_layers_of_both_kinds() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", &noise(5, 2_500_000))]), tar(&[("b", b"b")])]);
    let told = stage.json(&["inspect", &reference(&converted)]);
    assert_eq!(told["mountable"], true);
    let layer = &told["layers"][0];
    assert_eq!(layer["media_type"], "application/vnd.erofs+zstd");
    assert_eq!(layer["verified_by"], "chunk-index");
    assert!(layer["chunks"].as_u64().unwrap() >= 3, "{layer}");
    assert!(layer["bytes"].as_u64().unwrap() > 2_500_000, "{layer}");
    let ratio = layer["ratio"].as_f64().unwrap();
    assert!(ratio > 0.9 && ratio < 1.1, "noise does not shrink: {ratio}");
    assert!(stage.ok(&["inspect", &reference(&converted)]).contains("verified by chunk-index"));

    let told = stage.json(&["inspect", &reference(&stage.path("source"))]);
    assert_eq!(told["mountable"], false);
    assert_eq!(told["layers"][1]["media_type"], "application/vnd.oci.image.layer.v1.tar+gzip");
    assert!(stage.ok(&["inspect", &reference(&stage.path("source"))]).contains("headstart convert"));
}

#[test]
fn checking_finds_every_place_that_is_wrong() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", &noise(6, 5_000_000)), ("b", b"b")])]);
    let image = reference(&converted);
    let told = stage.json(&["check", &image]);
    assert_eq!(told["findings"], serde_json::json!([]));
    assert_eq!(told["layers"], 1);
    assert!(told["inodes"].as_u64().unwrap() >= 3, "{told}");
    assert!(stage.ok(&["check", &image]).starts_with("nothing is wrong"));

    // One byte in the middle of the layer: its digest, one chunk, the diffID.
    let layer = stage.json(&["inspect", &image])["layers"][0]["digest"].as_str().unwrap().to_owned();
    let path = converted.join("blobs/sha256").join(layer.strip_prefix("sha256:").unwrap());
    let mut blob = fs::read(&path).unwrap();
    let middle = blob.len() / 2;
    blob[middle] ^= 1;
    fs::write(&path, &blob).unwrap();
    let output = stage.run(&["--json", "check", &image]);
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    let places: Vec<&str> = told["findings"].as_array().unwrap().iter().map(|f| f["place"].as_str().unwrap()).collect();
    assert_eq!(places.iter().filter(|place| place.starts_with("chunk ")).count(), 1, "{told}");
    assert!(places.contains(&"blob"), "{told}");
    assert!(told["findings"].as_array().unwrap().iter().all(|f| f["layer"] == layer), "{told}");
    stage.assert_clean();
}

#[test]
fn completions_and_manual_pages_are_written() {
    let stage = Stage::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = stage.ok(&["completions", shell]);
        assert!(script.contains("headstart") && script.contains("umount"), "{shell}: {script}");
    }
    let man = stage.path("man");
    stage.ok(&["man", man.to_str().unwrap()]);
    for command in ["convert", "mount", "umount", "inspect", "check", "ls", "cat", "status", "serve"] {
        let page = fs::read_to_string(man.join(format!("headstart-{command}.1"))).unwrap();
        assert!(page.contains(".SH NAME"), "{command}");
    }
    assert!(stage.ok(&["man"]).contains(".SH SUBCOMMANDS"));
}

#[test]
fn output_that_nobody_reads_is_no_failure() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("large", &noise(7, 4 << 20))])]);
    let mut child =
        stage.program().args(["cat", &reference(&converted), "large"]).stdout(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
}

#[test]
fn an_interrupted_conversion_leaves_nothing() {
    let stage = Stage::new();
    let (_, _) = stage.images(&[tar(&[("large", &noise(8, 4 << 20))])]);
    let registry = stage.serve(&stage.path("source"), &["--bandwidth", "100kB"]);
    let dest = stage.path("dest");
    let mut child = stage.program().args(["convert", &registry.image(), &reference(&dest)]).spawn().unwrap();
    wait_until("the download of the layer", || registry.requests().iter().any(|request| request.bytes > 1 << 20));
    let process = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(process, rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let left: Vec<_> = walk(&dest);
    let named = |name: &str| left.iter().any(|path| path.ends_with(name));
    assert!(
        !named("latest") && !left.iter().any(|path| path.contains(".tmp") || path.contains(".headstart-")),
        "{left:?}"
    );
    stage.assert_clean();
}

fn walk(directory: &std::path::Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory) else { return vec![] };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.unwrap().path();
        found.push(path.display().to_string());
        found.extend(walk(&path));
    }
    found
}
