//! `convert` on images that are more than a row of tars: indexes with attestations, layers of other kinds, images that
//! are damaged, conversions that are stopped.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use axum::http::Method;
use headstart::erofs::{ExtentSource, Image};
use headstart::model::{Algorithm, BlobDigest, ByteRange, Digest, EntryKind, RelPath};
use headstart::tar::decompress::Compression;
use headstart::testkit::layouts::{TestLayer, TestLayout, write_layout};
use headstart::testkit::registry::{Fault, FaultyRegistry};
use headstart::testkit::tar::{RawHeader, TarWriter};
use headstart::testkit::tree::Listing;
use serde_json::{Value, json};

use super::stage::{Stage, entry, noise, reference, tar, wait_until};
use crate::convert_image::images_at;
use crate::transport::skopeo;

const NONDISTRIBUTABLE: &str = "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip";

fn blob_path(layout: &Path, digest: &Value) -> PathBuf {
    let digest = digest.as_str().expect("a digest is text");
    layout.join("blobs").join(digest.replace(':', "/"))
}

fn document(layout: &Path, descriptor: &Value) -> Value {
    serde_json::from_slice(&fs::read(blob_path(layout, &descriptor["digest"])).unwrap()).unwrap()
}

/// What the layout's only name stands for.
fn top(layout: &Path) -> Value {
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    assert_eq!(index["manifests"].as_array().unwrap().len(), 1, "{index}");
    index["manifests"][0].clone()
}

/// The manifest that the layout's only name stands for.
fn manifest(layout: &Path) -> Value {
    document(layout, &top(layout))
}

/// The same manifest with something changed. Returns its descriptor.
fn altered(layout: &TestLayout, path: &Path, descriptor: &Value, change: impl FnOnce(&mut Value)) -> Value {
    let mut manifest = document(path, descriptor);
    change(&mut manifest);
    layout.document(descriptor["mediaType"].as_str().unwrap(), &manifest).unwrap()
}

fn strings<'a>(rows: &'a Value, field: &str) -> Vec<&'a str> {
    rows.as_array().unwrap().iter().map(|row| row[field].as_str().unwrap_or_default()).collect()
}

/// Blobs that are not what their names say, and files that have no name to be.
fn half_made(layout: &Path) -> Vec<PathBuf> {
    let Ok(blobs) = fs::read_dir(layout.join("blobs/sha256")) else { return Vec::new() };
    let is_wrong = |path: &PathBuf| {
        let found = Digest::of(Algorithm::Sha256, &fs::read(path).unwrap()).hex();
        path.file_name().unwrap().to_str() != Some(&found)
    };
    blobs.map(|blob| blob.unwrap().path()).filter(is_wrong).collect()
}

/// The tree that a mount of `image` shows.
fn mounted(stage: &Stage, image: &str) -> Listing {
    let mnt = stage.path("mnt");
    fs::create_dir_all(&mnt).unwrap();
    stage.ok(&["mount", image, mnt.to_str().unwrap()]);
    let listing = Listing::of_directory(&mnt).unwrap().without_directory_sizes();
    stage.ok(&["umount", mnt.to_str().unwrap()]);
    listing
}

/// An index of two platforms, with what BuildKit attaches to the first and a signature without any platform.
fn buildkit_index(path: &Path) -> (Value, Value, Value, Value) {
    let layout = TestLayout::create(path).unwrap();
    let layer = |content: &[u8]| TestLayer::of_tar(&tar(&[("etc/", b""), ("etc/arch", content)]), Compression::Gzip);
    let image = |content: &[u8], arch: &str| {
        let mut image = layout.image(&[layer(content)], arch).unwrap();
        image["platform"] = json!({"architecture": arch, "os": "linux"});
        image
    };
    let (amd64, arm64) = (image(b"amd64", "amd64"), image(b"arm64", "arm64"));
    let statement =
        br#"{"_type":"https://in-toto.io/Statement/v0.1","predicateType":"https://slsa.dev/provenance/v0.2"}"#;
    let statement = json!({
        "mediaType": "application/vnd.in-toto+json",
        "digest": layout.blob(statement).unwrap(),
        "size": statement.len(),
        "annotations": {"in-toto.io/predicate-type": "https://slsa.dev/provenance/v0.2"},
    });
    let config = json!({
        "architecture": "unknown", "os": "unknown", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [statement["digest"]]},
    });
    let config = layout.document("application/vnd.oci.image.config.v1+json", &config).unwrap();
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let attestation = json!({"schemaVersion": 2, "mediaType": manifest_type, "config": config, "layers": [statement]});
    let mut attestation = layout.document(manifest_type, &attestation).unwrap();
    attestation["platform"] = json!({"architecture": "unknown", "os": "unknown"});
    attestation["annotations"] = json!({
        "vnd.docker.reference.type": "attestation-manifest",
        "vnd.docker.reference.digest": amd64["digest"],
    });
    let empty = layout.document("application/vnd.oci.empty.v1+json", &json!({})).unwrap();
    let signature = json!({
        "schemaVersion": 2, "mediaType": manifest_type, "artifactType": "application/vnd.example.signature",
        "config": empty, "layers": [empty],
    });
    let signature = layout.document(manifest_type, &signature).unwrap();
    let all = [amd64.clone(), arm64.clone(), attestation.clone(), signature.clone()];
    layout.tag("latest", layout.index(&all).unwrap()).unwrap();
    (amd64, arm64, attestation, signature)
}

#[test]
fn attestations_and_signatures_of_an_index_are_kept_as_they_are() {
    let stage = Stage::new();
    let source = stage.path("source");
    let (amd64, arm64, attestation, signature) = buildkit_index(&source);
    let (plain, both) = (stage.path("plain"), stage.path("both"));
    let told = stage.json(&["convert", "--all-platforms", &reference(&source), &reference(&plain)]);
    assert_eq!(strings(&told["images"], "platform"), ["linux/amd64", "linux/arm64"]);
    let made = [told["images"][0]["manifest"].clone(), told["images"][1]["manifest"].clone()];

    let index = manifest(&plain);
    assert_eq!(index["annotations"]["org.example.index"], "kept");
    let digests: Vec<&Value> = index["manifests"].as_array().unwrap().iter().map(|entry| &entry["digest"]).collect();
    assert_eq!(digests, [&made[0], &made[1], &attestation["digest"], &signature["digest"]]);
    assert_eq!(index["manifests"][1]["platform"]["os.features"], json!(["erofs"]));
    assert_eq!(index["manifests"][2], attestation, "the entry still speaks of the original");
    assert_eq!(index["manifests"][3], signature);

    // With the originals: each before its twin, what is about them behind.
    let told = stage.json(&["convert", "--all-platforms", "--append", &reference(&source), &reference(&both)]);
    let index = manifest(&both);
    let digests: Vec<&Value> = index["manifests"].as_array().unwrap().iter().map(|entry| &entry["digest"]).collect();
    let expected =
        [&amd64["digest"], &made[0], &arm64["digest"], &made[1], &attestation["digest"], &signature["digest"]];
    assert_eq!(digests, expected);
    assert_eq!(told["images"][0]["manifest"], made[0], "what stands beside it changes nothing");
    for layout in [&plain, &both] {
        assert_eq!(half_made(layout), Vec::<PathBuf>::new());
        for kept in [&attestation, &signature] {
            let document = document(layout, kept);
            for named in document["layers"].as_array().unwrap().iter().chain([&document["config"]]) {
                assert!(blob_path(layout, &named["digest"]).exists(), "{named}");
            }
        }
        let read = |platform: &str| stage.ok(&["cat", "--platform", platform, &reference(layout), "/etc/arch"]);
        assert_eq!([read("linux/amd64"), read("linux/arm64")], ["amd64", "arm64"]);
    }

    // An engine takes all of it.
    let copy = stage.path("copy");
    skopeo(&["copy", "-q", "--all", "--preserve-digests", &reference(&both), &reference(&copy)]);
    assert_eq!(top(&copy)["digest"], top(&both)["digest"]);

    // Converting the result again makes nothing new, and no twin of a twin.
    let again = stage.path("again");
    stage.ok(&["convert", "--all-platforms", "--append", &reference(&both), &reference(&again)]);
    assert_eq!(top(&again)["digest"], top(&both)["digest"]);

    // One platform alone is a bare manifest.
    let one = stage.path("one");
    stage.ok(&["convert", "--platform", "linux/arm64", &reference(&source), &reference(&one)]);
    assert_eq!(top(&one)["digest"], made[1]);
    stage.assert_clean();
}

#[test]
fn layers_that_may_not_be_handed_on() {
    let stage = Stage::new();
    let source = stage.path("source");
    let layout = TestLayout::create(&source).unwrap();
    let layers = [tar(&[("base", b"licensed")]), tar(&[("app", b"own")])];
    let layers = layers.map(|tar| TestLayer::of_tar(&tar, Compression::Gzip));
    let image = layout.image(&layers, "amd64").unwrap();
    let image = altered(&layout, &source, &image, |manifest| {
        manifest["layers"][0]["mediaType"] = NONDISTRIBUTABLE.into();
        manifest["layers"][0]["urls"] = json!(["https://vendor.example/base.tar.gz"]);
    });
    let foreign = blob_path(&source, &json!(layout.blob(&layers[0].blob).unwrap()));
    layout.tag("latest", image.clone()).unwrap();

    // Where its bytes are at hand it is converted as any other. The new layer has no address anywhere else.
    let (alone, both) = (stage.path("alone"), stage.path("both"));
    stage.ok(&["convert", &reference(&source), &reference(&alone)]);
    assert_eq!(manifest(&alone)["layers"][0]["urls"], Value::Null);
    assert_eq!(stage.ok(&["ls", &reference(&alone)]), "app\nbase\n");
    // Beside its original, the original's blob is not copied: its address says where it is had.
    stage.ok(&["convert", "--append", &reference(&source), &reference(&both)]);
    let original = document(&both, &manifest(&both)["manifests"][0]);
    assert_eq!(original["layers"][0]["urls"][0], "https://vendor.example/base.tar.gz");
    assert!(!blob_path(&both, &original["layers"][0]["digest"]).exists());
    assert!(blob_path(&both, &original["layers"][1]["digest"]).exists());

    // Where they are not, nothing is published.
    fs::remove_file(foreign).unwrap();
    let none = stage.path("none");
    let (code, told) = stage.fails(&["convert", &reference(&source), &reference(&none)]);
    assert_eq!(code, 3, "{told}");
    assert!(told.contains("cannot fetch layer 0"), "{told}");
    assert!(
        !none.join("index.json").exists() || !fs::read_to_string(none.join("index.json")).unwrap().contains("sha256")
    );
    stage.assert_clean();
}

#[test]
fn an_image_without_layers_becomes_one_with_an_empty_layer() {
    let stage = Stage::new();
    let source = stage.path("source");
    write_layout(&source, &[]).unwrap();
    let converted = stage.path("converted");
    stage.ok(&["convert", &reference(&source), &reference(&converted)]);
    let made = manifest(&converted);
    assert_eq!(made["layers"].as_array().unwrap().len(), 1);
    let config = document(&converted, &made["config"]);
    assert_eq!(config["rootfs"]["diff_ids"].as_array().unwrap().len(), 1);
    assert_eq!(config["history"].as_array().unwrap().len(), 1, "{config}");
    assert_eq!(config["config"]["Cmd"], json!(["/bin/sh"]));
    assert_eq!(stage.ok(&["ls", &reference(&converted)]), "");
    assert_eq!(mounted(&stage, &reference(&converted)).nodes.len(), 1, "the root alone");
    skopeo(&["inspect", &reference(&converted)]);
    stage.assert_clean();
}

/// A layer tar that needs the one below: it takes a file away, links to another and renews a third.
fn upper_tar() -> Vec<u8> {
    let mut tar = TarWriter::new();
    tar.entry(&entry("dir/.wh.gone", EntryKind::Regular { size: 0 }, 0o644), b"");
    let target = RelPath::parse(b"dir/kept").unwrap();
    tar.entry(&entry("linked", EntryKind::HardLink { target }, 0o644), b"");
    tar.entry(&entry("dir/renewed", EntryKind::Regular { size: 3 }, 0o600), b"new");
    tar.finish()
}

#[test]
fn images_of_erofs_and_tar_layers_are_completed() {
    let stage = Stage::new();
    let lower = tar(&[
        ("dir/", b""),
        ("dir/gone", b"x"),
        ("dir/kept", &noise(1, 600_000)),
        ("dir/renewed", b"old"),
        ("top", b"top"),
    ]);
    let tars = [lower, upper_tar(), tar(&[("last", b"last")])];
    let (_, whole) = stage.images(&tars);
    let (expected, made) = (mounted(&stage, &reference(&whole)), manifest(&whole));
    let diff_ids = document(&whole, &made["config"])["rootfs"]["diff_ids"].clone();

    // Every mixture becomes the image that the tars alone become.
    for mixture in 1..7_u8 {
        let from = stage.path(&format!("mixed-{mixture}"));
        let layout = TestLayout::create(&from).unwrap();
        let is_erofs = |layer: usize| mixture & (1 << layer) != 0;
        let layers: Vec<TestLayer> = (0..3)
            .map(|layer| {
                if !is_erofs(layer) {
                    return TestLayer::of_tar(&tars[layer], Compression::Zstd);
                }
                TestLayer {
                    blob: fs::read(blob_path(&whole, &made["layers"][layer]["digest"])).unwrap(),
                    media_type: made["layers"][layer]["mediaType"].as_str().unwrap().to_owned(),
                    diff_id: serde_json::from_value(diff_ids[layer].clone()).unwrap(),
                }
            })
            .collect();
        let image = layout.image(&layers, "amd64").unwrap();
        let image = altered(&layout, &from, &image, |manifest| {
            for layer in (0..3).filter(|layer| is_erofs(*layer)) {
                manifest["layers"][layer]["annotations"] = made["layers"][layer]["annotations"].clone();
            }
        });
        layout.tag("latest", image).unwrap();
        mounted(&stage, &reference(&from)).assert_equals(&expected);
        let to = stage.path(&format!("completed-{mixture}"));
        stage.ok(&["convert", &reference(&from), &reference(&to)]);
        assert_eq!(manifest(&to)["layers"], made["layers"], "mixture {mixture:03b}");
        mounted(&stage, &reference(&to)).assert_equals(&expected);
    }
    stage.assert_clean();
}

#[test]
fn containerds_media_types_are_written_for_the_same_blobs() {
    let stage = Stage::new();
    let tars = [tar(&[("a", &noise(2, 700_000))]), tar(&[("b", b"b")])];
    let (_, usual) = stage.images(&tars);
    let compat = stage.path("compat");
    let source = reference(&stage.path("source"));
    stage.ok(&["convert", "--compat", "containerd-2.3", &source, &reference(&compat)]);
    let (usual_layers, layers) = (manifest(&usual)["layers"].clone(), manifest(&compat)["layers"].clone());
    assert_eq!(strings(&usual_layers, "mediaType"), ["application/vnd.erofs+zstd"; 2]);
    assert_eq!(strings(&layers, "mediaType"), ["application/vnd.erofs.layer.v1+zstd"; 2]);
    assert_eq!(strings(&layers, "digest"), strings(&usual_layers, "digest"), "the bytes are the same");
    assert_eq!(manifest(&compat)["config"]["digest"], manifest(&usual)["config"]["digest"]);
    // Lazy here as well.
    assert_eq!(stage.json(&["inspect", &reference(&compat)])["layers"][0]["verified_by"], "chunk-index");
    mounted(&stage, &reference(&compat)).assert_equals(&mounted(&stage, &reference(&usual)));
    stage.assert_clean();
}

#[test]
fn a_converted_image_that_skopeo_copied_mounts() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("dir/", b""), ("dir/a", &noise(3, 900_000))]), tar(&[("b", b"b")])]);
    let (there, back) = (stage.path("archive.tar"), stage.path("back"));
    let archive = format!("oci-archive:{}:latest", there.display());
    skopeo(&["copy", "-q", "--preserve-digests", &reference(&converted), &archive]);
    skopeo(&["copy", "-q", "--preserve-digests", &archive, &reference(&back)]);
    assert_eq!(top(&back)["digest"], top(&converted)["digest"]);
    assert_eq!(manifest(&back), manifest(&converted));
    stage.ok(&["check", &reference(&back)]);
    let expected = mounted(&stage, &reference(&converted));
    fs::remove_dir_all(stage.root()).unwrap();
    for copy in [reference(&back), archive] {
        mounted(&stage, &copy).assert_equals(&expected);
    }
    stage.assert_clean();
}

/// A layout in which one thing is wrong, and words of the message about it.
fn damaged(stage: &Stage) -> Vec<(PathBuf, &'static str)> {
    let good = TestLayer::of_tar(&tar(&[("good", &noise(4, 200_000))]), Compression::Gzip);
    let whole = tar(&[("a", &noise(5, 300_000))]);
    let layer = TestLayer::of_tar(&whole, Compression::Gzip);
    let with = |name: &str, top: &TestLayer| {
        let path = stage.path(name);
        (write_layout(&path, &[good.clone(), top.clone()]).unwrap(), path)
    };
    let digest = BlobDigest(Digest::of(Algorithm::Sha256, &layer.blob));
    let (bent, bent_at) = with("bent", &layer);
    let mut bytes = layer.blob.clone();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(bent.path(digest), &bytes).unwrap();
    let (cut, cut_at) = with("cut", &layer);
    fs::write(cut.path(digest), &layer.blob[..middle]).unwrap();
    let mut other = layer.clone();
    other.diff_id = good.diff_id;
    let (_, other_at) = with("other", &other);
    let (_, tar_at) = with("tar", &TestLayer::of_tar(&whole[..150_000], Compression::Zstd));
    // An EROFS layer, which is copied and not read.
    let (_, converted) = stage.images(&[tar(&[("lower", b"l")]), tar(&[("kept", &noise(6, 300_000))])]);
    let made = manifest(&converted);
    let kept = blob_path(&converted, &made["layers"][1]["digest"]);
    let mut bytes = fs::read(&kept).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&kept, bytes).unwrap();
    vec![
        (bent_at, "layer 1"),
        (cut_at, "layer 1"),
        (other_at, "unpacks to"),
        (tar_at, "in the middle of"),
        (converted, "sha256:"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_images_leave_nothing_half_made_at_any_destination() {
    let stage = Stage::new();
    let registry = FaultyRegistry::start().await;
    let damaged = tokio::task::block_in_place(|| damaged(&stage));
    for (number, (from, words)) in damaged.iter().enumerate() {
        let layout = stage.path(&format!("to-{number}"));
        let archive = stage.path(&format!("to-{number}.tar"));
        let remote = format!("{}/to-{number}:latest", registry.host());
        let archive_name = format!("oci-archive:{}", archive.display());
        for to in [&reference(&layout), &archive_name, &remote] {
            let (code, told) = tokio::task::block_in_place(|| stage.fails(&["convert", &reference(from), to]));
            assert_eq!(code, 6, "{} to {to}: {told}", from.display());
            assert!(told.contains(words), "{} to {to}: {told}", from.display());
        }
        assert!(
            !layout.join("index.json").exists()
                || !fs::read_to_string(layout.join("index.json")).unwrap().contains("sha256")
        );
        assert_eq!(half_made(&layout), Vec::<PathBuf>::new());
        let beside = fs::read_dir(stage.path(".")).unwrap().map(|entry| entry.unwrap().file_name());
        let left: Vec<_> =
            beside.filter(|name| name.to_string_lossy().starts_with(&format!("to-{number}.tar"))).collect();
        assert!(left.is_empty(), "{left:?}");
        assert!(registry.manifest(&format!("to-{number}"), "latest").is_none());
    }
    assert!(registry.seen_at(&Method::PUT, "/manifests/").is_empty());
    stage.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_is_stopped_leaves_no_tag_and_no_files() {
    let stage = Stage::new();
    let registry = FaultyRegistry::start().await;
    let source = stage.path("source");
    let layers = [tar(&[("a", &noise(7, 400_000))]), tar(&[("b", &noise(8, 400_000))])];
    let layers = layers.map(|tar| TestLayer::of_tar(&tar, Compression::Gzip));
    write_layout(&source, &layers).unwrap();
    let remote = format!("{}/app:latest", registry.host());
    for (signal, code, hangs_at) in [
        (rustix::process::Signal::INT, 130, "/blobs/uploads/"),
        (rustix::process::Signal::TERM, 143, "/blobs/uploads/"),
        (rustix::process::Signal::INT, 130, "/manifests/"),
    ] {
        registry.forget_seen();
        for method in [Method::PUT, Method::PATCH] {
            registry.script(method, hangs_at, Fault::Hang, 1000);
        }
        let mut child = stage
            .program()
            .args(["convert", &reference(&source), &remote])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let ended = tokio::task::block_in_place(|| {
            wait_until("an upload", || {
                let seen = |method| !registry.seen_at(&method, hangs_at).is_empty();
                seen(Method::PUT) || seen(Method::PATCH)
            });
            let pid = rustix::process::Pid::from_child(&child);
            rustix::process::kill_process(pid, signal).unwrap();
            child.wait().unwrap()
        });
        assert_eq!(ended.code(), Some(code), "{hangs_at}");
        assert!(registry.manifest("app", "latest").is_none());
        stage.assert_clean();
        registry.clear_script();
    }
    // What is there already is no hindrance.
    tokio::task::block_in_place(|| stage.ok(&["convert", &reference(&source), &remote]));
    assert!(registry.manifest("app", "latest").is_some());
    assert_eq!(tokio::task::block_in_place(|| stage.ok(&["ls", &remote])), "a\nb\n");
    stage.assert_clean();
}

#[test]
fn what_is_left_out_is_told() {
    let stage = Stage::new();
    let source = stage.path("source");
    let file = |tar: &mut TarWriter, path: &str, records: &[(&str, &str)]| {
        tar.pax(records.iter().map(|(key, value)| (key.as_bytes(), value.as_bytes())));
        tar.raw(&RawHeader::new(b'0', path), b"");
    };
    let named = "user::rw-,user:lisa:r--,group::r--,mask::r--,other::r--";
    let numbered = "user::rw-,user:lisa:r--:7,group::r--,mask::r--,other::r--";
    let (mut lower, mut upper) = (TarWriter::new(), TarWriter::new());
    file(&mut lower, "named", &[("SCHILY.acl.access", named)]);
    file(&mut lower, "named-too", &[("SCHILY.acl.access", named)]);
    file(&mut lower, "numbered", &[("SCHILY.acl.access", numbered)]);
    file(&mut lower, "foreign", &[("SCHILY.xattr.com.apple.quarantine", "q"), ("SCHILY.xattr.user.kept", "k")]);
    file(&mut lower, "redirected", &[("SCHILY.xattr.trusted.overlay.redirect", "/x")]);
    lower.entry(&entry("sub/.wh.nothing", EntryKind::Regular { size: 0 }, 0o644), b"");
    file(&mut lower, ".wh..wh.plnk/1", &[]);
    file(&mut upper, "late", &[("SCHILY.acl.access", named)]);
    upper.entry(&entry(".wh.named-too", EntryKind::Regular { size: 0 }, 0o644), b"");
    let layers = [lower.finish(), upper.finish()].map(|tar| TestLayer::of_tar(&tar, Compression::Gzip));
    let layout = TestLayout::create(&source).unwrap();
    let image = layout.image(&layers, "amd64").unwrap();
    let image = altered(&layout, &source, &image, |manifest| {
        manifest["layers"][1]["mediaType"] = NONDISTRIBUTABLE.into();
        manifest["layers"][1]["urls"] = json!(["https://vendor.example/upper.tar.gz"]);
    });
    layout.tag("latest", image).unwrap();

    let told = stage.json(&["convert", &reference(&source), &reference(&stage.path("json"))]);
    let row = |layer: u64, what: &str, count: u64, first: Option<&str>| json!({"layer": layer, "what": what, "count": count, "first": first});
    let expected = [
        row(0, "named-acls", 2, Some("/named")),
        row(0, "aufs-files", 1, None),
        row(0, "foreign-xattrs", 1, Some("/foreign")),
        row(0, "overlay-xattrs", 1, Some("/redirected")),
        row(0, "bottom-whiteouts", 1, Some("/sub/nothing")),
        row(1, "named-acls", 1, Some("/late")),
        row(1, "addresses", 1, None),
    ];
    assert_eq!(told["images"][0]["left_out"], json!(expected));

    let output = stage.run(&["convert", &reference(&source), &reference(&stage.path("text"))]);
    let words = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<&str> = words.lines().collect();
    assert_eq!(lines.len(), expected.len(), "{words}");
    let first = "note: left out of layer 0: 2 ACLs that name users or groups without their numbers (first at /named)";
    assert_eq!(lines[0], first);
    assert!(lines[5].starts_with("note: left out of layer 1: 1 ACLs") && lines[5].ends_with("(at /late)"), "{words}");

    // What is kept is kept.
    let mnt = stage.make("mnt");
    stage.ok(&["mount", &reference(&stage.path("text")), mnt.to_str().unwrap()]);
    let xattrs = |name: &str| {
        let mut names = vec![0_u8; 4096];
        let len = rustix::fs::llistxattr(mnt.join(name), &mut names).unwrap();
        let names = String::from_utf8(names[..len].to_vec()).unwrap();
        names.split_terminator('\0').map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(xattrs("named"), Vec::<String>::new());
    assert_eq!(xattrs("numbered"), ["system.posix_acl_access"]);
    assert_eq!(xattrs("foreign"), ["user.kept"]);
    assert_eq!(xattrs("redirected"), Vec::<String>::new());
    stage.ok(&["umount", mnt.to_str().unwrap()]);

    // An image with nothing of the kind says nothing.
    write_layout(&stage.path("plain"), &[TestLayer::of_tar(&tar(&[("a", b"a")]), Compression::Gzip)]).unwrap();
    let output = stage.run(&["convert", &reference(&stage.path("plain")), &reference(&stage.path("quiet"))]);
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
    stage.assert_clean();
}

/// The names of an image's files in the order of their data. All of them lie in the root.
fn data_order(image: &[u8]) -> Vec<String> {
    let image = Image::open(image).unwrap();
    let root = image.root_inode().unwrap();
    let mut places = Vec::new();
    for node in Listing::of_image(&image).unwrap().nodes.keys() {
        let name = String::from_utf8(node.clone()).unwrap();
        let Some(found) = image.lookup(&root, name.as_bytes()).unwrap() else { continue };
        let inode = image.inode(found.nid).unwrap();
        for extent in image.extents(&inode, ByteRange::to(inode.attributes().size)) {
            if let ExtentSource::Data { offset, .. } = extent.unwrap().source {
                places.push((offset, name.clone()));
            }
        }
    }
    places.sort();
    let mut names: Vec<String> = places.into_iter().map(|(_, name)| name).collect();
    names.dedup();
    names
}

#[test]
fn the_files_of_a_start_up_profile_come_first() {
    let stage = Stage::new();
    let content: Vec<Vec<u8>> = (0..6).map(|seed| noise(seed, 60_000)).collect();
    let of = |names: &[&'static str]| -> Vec<u8> {
        let files: Vec<(&str, &[u8])> = names.iter().zip(&content).map(|(name, bytes)| (*name, &bytes[..])).collect();
        tar(&files)
    };
    let (_, usual) = stage.images(&[of(&["a", "b", "c", "d"]), of(&["e", "f", "g", "a"])]);
    let profile = stage.path("profile");
    fs::write(&profile, "/g\nd\n\n./b\nabsent\n/g\nno/such/file\nf\r\n").unwrap();
    let profile = profile.to_str().unwrap();
    let (source, lazy) = (reference(&stage.path("source")), stage.path("lazy"));
    let told = stage.json(&["convert", "--profile", profile, &source, &reference(&lazy)]);
    assert_eq!(told["images"][0]["not_laid_out"], json!(["/absent", "/no/such/file"]));
    let orders = |layout: &Path| -> Vec<Vec<String>> {
        images_at(&stage.path("root"), &reference(layout)).iter().map(|image| data_order(image)).collect()
    };
    assert_eq!(orders(&usual), [["a", "b", "c", "d"], ["e", "f", "g", "a"]]);
    assert_eq!(orders(&lazy), [["d", "b", "a", "c"], ["g", "f", "e", "a"]]);
    mounted(&stage, &reference(&lazy)).assert_equals(&mounted(&stage, &reference(&usual)));

    let output = stage.run(&["convert", "--profile", profile, &source, &reference(&stage.path("again"))]);
    let words = String::from_utf8(output.stderr).unwrap();
    let expected = "note: in the profile, but no regular files of the converted layers: /absent, /no/such/file\n";
    assert_eq!(words, expected);
    assert_eq!(top(&stage.path("again"))["digest"], top(&lazy)["digest"], "the same profile gives the same image");

    for (text, code, words) in [(Some("a\n../b\n"), 2, "line 2"), (None, 3, "cannot read")] {
        let path = stage.path("bad-profile");
        match text {
            Some(text) => fs::write(&path, text).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let bad = ["convert", "--profile", path.to_str().unwrap(), &source, &reference(&stage.path("none"))];
        let (found, told) = stage.fails(&bad);
        assert_eq!(found, code, "{told}");
        assert!(told.contains(words) && told.contains("bad-profile"), "{told}");
        assert!(!stage.path("none").exists());
    }
    stage.assert_clean();
}
