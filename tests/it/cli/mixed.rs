//! Images some layers of which are tars and some EROFS. Needs root, /dev/fuse, EROFS and overlayfs.

use std::fs;
use std::path::Path;

use headstart::tar::decompress::Compression;
use headstart::testkit::layers::{Options, stacks};
use headstart::testkit::layouts::{TestLayer, TestLayout, write_layout};
use headstart::testkit::tree::Listing;
use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};

use super::stage::{Stage, reference};

fn document(layout: &Path, descriptor: &Value) -> Value {
    let hex = descriptor["digest"].as_str().unwrap().trim_start_matches("sha256:");
    serde_json::from_slice(&fs::read(layout.join("blobs/sha256").join(hex)).unwrap()).unwrap()
}

/// The manifest of the only image of a layout.
fn manifest(layout: &Path) -> Value {
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    let top = document(layout, &index["manifests"][0]);
    if top["manifests"].is_array() { document(layout, &top["manifests"][0]) } else { top }
}

/// An image whose layer `n` is that of `images[n % 2]`, at `to`.
fn mix(images: [&Path; 2], to: &Path) {
    let layout = TestLayout::create(to).unwrap();
    let manifests = images.map(manifest);
    let configs = [0, 1].map(|which| document(images[which], &manifests[which]["config"]));
    let (mut layers, mut diff_ids) = (Vec::new(), Vec::new());
    for number in 0..manifests[0]["layers"].as_array().unwrap().len() {
        let which = number % 2;
        let descriptor = manifests[which]["layers"][number].clone();
        let hex = descriptor["digest"].as_str().unwrap().trim_start_matches("sha256:").to_owned();
        layout.blob(&fs::read(images[which].join("blobs/sha256").join(hex)).unwrap()).unwrap();
        layers.push(descriptor);
        diff_ids.push(configs[which]["rootfs"]["diff_ids"][number].clone());
    }
    let mut config = configs[0].clone();
    config["rootfs"]["diff_ids"] = json!(diff_ids);
    let config = layout.document("application/vnd.oci.image.config.v1+json", &config).unwrap();
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers});
    let descriptor = layout.document(media_type, &manifest).unwrap();
    layout.tag("latest", descriptor).unwrap();
}

#[test]
fn images_of_both_kinds_look_as_the_kernel_shows_their_conversion() {
    let stage = Stage::new();
    let mut runner = TestRunner::deterministic();
    let mut mixed = 0;
    for round in 0.. {
        let stack = stacks(Options::default()).new_tree(&mut runner).unwrap().current();
        let tars = stack.tars();
        if tars.len() < 2 {
            continue;
        }
        let path = |name: &str| stage.path(&format!("{name}-{round}"));
        let (source, converted) = (path("source"), path("converted"));
        let form = [Compression::Plain, Compression::Gzip, Compression::Zstd][round % 3];
        let layers: Vec<TestLayer> = tars.iter().map(|tar| TestLayer::of_tar(tar, form)).collect();
        write_layout(&source, &layers).unwrap();
        stage.ok(&["convert", &reference(&source), &reference(&converted)]);
        // The kernel merges the conversion: it is the judge.
        let judge = stage.make(&format!("judge-{round}"));
        stage.ok(&["pull", &reference(&converted)]);
        stage.ok(&["mount", "--driver", "local", &reference(&converted), judge.to_str().unwrap()]);
        assert_eq!(stage.status()[0]["driver"], "local");
        let seen = |at: &Path| Listing::of_directory(at).unwrap().without_directory_sizes();
        for (which, images) in [[&*source, &*converted], [&*converted, &*source]].into_iter().enumerate() {
            let image = path(&format!("mixed-{which}"));
            mix(images, &image);
            for driver in ["fuse", "kernel"] {
                let at = stage.make(&format!("{driver}-{which}-{round}"));
                stage.ok(&["mount", "--driver", driver, &reference(&image), at.to_str().unwrap()]);
                seen(&judge).assert_equals(&seen(&at));
                stage.ok(&["umount", at.to_str().unwrap()]);
            }
        }
        stage.ok(&["umount", judge.to_str().unwrap()]);
        mixed += 1;
        if mixed == 4 {
            break;
        }
    }
    stage.assert_clean();
}

#[test]
fn an_image_of_both_kinds_is_pulled_and_recorded() {
    let stage = Stage::new();
    let tars = [
        super::stage::tar(&[("a", &super::stage::noise(1, 300_000))]),
        super::stage::tar(&[("b", b"b")]),
        super::stage::tar(&[(".wh.b", b""), ("c", b"c")]),
    ];
    let (_, converted) = stage.images(&tars);
    let image = stage.path("mixed");
    mix([&converted, &stage.path("source")], &image);
    let told = stage.json(&["inspect", &reference(&image)]);
    assert_eq!((told["layers"].as_array().unwrap().len(), &told["mountable"]), (3, &false.into()), "{told:#}");
    let pulled = stage.json(&["pull", &reference(&image)]);
    assert_eq!(pulled["layers"].as_array().unwrap().len(), 3);
    let seen = stage.json(&["snapshots"]);
    let all = seen["snapshots"].as_array().unwrap();
    assert!(all.len() == 3 && all.iter().all(|of| of["kind"] == "committed" && of["state"] == "local"), "{seen:#}");
    assert_eq!(stage.json(&["pull", &reference(&image)])["bytes_fetched"], 0);
    let mnt = stage.make("mnt");
    stage.ok(&["mount", &reference(&image), mnt.to_str().unwrap()]);
    let mut names: Vec<_> = fs::read_dir(&mnt).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["a", "c"]);
    stage.ok(&["umount", mnt.to_str().unwrap()]);
    stage.assert_clean();
}
