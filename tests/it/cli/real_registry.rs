//! The program against Debian's docker-registry: converted from it and to it, mounted from it, with its own access log as
//! witness of what was fetched; behind nginx's TLS and a password; and what it says when it cannot be had.

use std::fs;
use std::path::Path;

use base64::Engine as _;
use headstart::model::BlobDigest;
use headstart::tar::decompress::Compression;
use headstart::testkit::layers::{Options, stacks};
use headstart::testkit::layouts::{TestLayer, write_layout};
use headstart::testkit::tree::Listing;
use proptest::strategy::{Strategy as _, ValueTree as _};
use proptest::test_runner::TestRunner;
use serde_json::Value;

use super::bad_input::assert_told;
use super::stage::{Stage, noise, reference, tar, wait_until};
use crate::layers::unpacked_by_umoci;
use crate::registry_real::{Registry, certificates, htpasswd, nginx};
use crate::transport::skopeo;

/// A line of the registry's access log that tells of a read.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Read {
    path: String,
    status: u16,
    bytes: u64,
}

/// The reads that a log in the combined format tells of.
fn reads(log: &str) -> Vec<Read> {
    let read = |line: &str| {
        let (_, rest) = line.split_once("\"GET /v2/")?;
        let (path, rest) = rest.split_once(" HTTP/1.1\" ")?;
        let mut words = rest.split(' ');
        let (status, bytes) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(Read { path: path.to_owned(), status, bytes })
    };
    log.lines().filter_map(read).collect()
}

/// The log as soon as it tells of `path`, which was asked for after everything that matters.
fn log_with(registry: &Registry, path: &str) -> String {
    wait_until(&format!("{path} in the log"), || registry.log().contains(path));
    registry.log()
}

fn plain(listing: Listing) -> Listing {
    listing.without_directory_sizes().without_directory_links()
}

#[test]
fn a_registry_sees_ranges_and_no_whole_layer_when_an_image_is_mounted() {
    let stage = Stage::new();
    let registry = Registry::start(&stage.make("registry"), "");
    let stack = stacks(Options::default()).new_tree(&mut TestRunner::deterministic()).unwrap().current();
    let mut tars = stack.tars();
    tars.push(tar(&[("large-1", &noise(1, 6 << 20)), ("small", b"little"), ("large-2", &noise(2, 6 << 20))]));
    let layers: Vec<TestLayer> = tars.iter().map(|tar| TestLayer::of_tar(tar, Compression::Gzip)).collect();
    write_layout(&stage.path("source"), &layers).unwrap();
    let unpacked = unpacked_by_umoci(&stage.path("source"), &stage.path("bundle"));
    let (from, to) =
        (format!("docker://{}/team/app:1", registry.host()), format!("docker://{}/team/lazy:1", registry.host()));
    skopeo(&["copy", "-q", "--dest-tls-verify=false", &reference(&stage.path("source")), &from]);

    let told = stage.json(&["convert", &from, &to]);
    let digest = skopeo(&["inspect", "--tls-verify=false", "--format", "{{.Digest}}", &to]);
    assert_eq!(told["digest"], digest.trim());
    let inspected = stage.json(&["inspect", &to]);
    let sizes: Vec<(BlobDigest, u64)> = inspected["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| (layer["digest"].as_str().unwrap().parse().unwrap(), layer["bytes_stored"].as_u64().unwrap()))
        .collect();
    assert_eq!(sizes.len(), tars.len());
    assert!(sizes.iter().any(|(_, size)| *size > 8 << 20), "{sizes:?}");

    // Nothing of the conversion is in the way of what the mount asks.
    fs::remove_dir_all(stage.root()).unwrap();
    let before = reads(&log_with(&registry, "/v2/team/lazy/manifests/1")).len();
    let mnt = stage.make("mnt");
    let mnt_text = mnt.to_str().unwrap();
    stage.ok(&["mount", &to, mnt_text]);
    assert_eq!(fs::read(mnt.join("small")).unwrap(), b"little");
    assert_eq!(fs::metadata(mnt.join("large-2")).unwrap().len(), 6 << 20);
    let (code, _) = stage.fails(&["inspect", &format!("{}/team/lazy:first-mark", registry.host())]);
    assert_eq!(code, 3);
    let asked = reads(&log_with(&registry, "/v2/team/lazy/manifests/first-mark")).split_off(before);
    let fetched: u64 = asked.iter().filter(|read| read.path.contains("/blobs/")).map(|read| read.bytes).sum();
    assert!(fetched < 4 << 20, "{fetched} bytes for six: {asked:?}");

    // All of it, still in ranges.
    plain(Listing::of_directory(&mnt).unwrap()).assert_equals(&plain(unpacked));
    stage.ok(&["umount", mnt_text]);
    let (code, _) = stage.fails(&["inspect", &format!("{}/team/lazy:second-mark", registry.host())]);
    assert_eq!(code, 3);
    let asked = reads(&log_with(&registry, "/v2/team/lazy/manifests/second-mark")).split_off(before);
    let mut ranges = 0;
    for (layer, size) in &sizes {
        for read in asked.iter().filter(|read| read.path.ends_with(&layer.to_string())) {
            ranges += 1;
            assert_eq!(read.status, 206, "{read:?}");
            // Whatever is larger than the piece that opens a layer never comes at once.
            assert!(*size < 1 << 20 || read.bytes < *size / 2, "a layer of {size} bytes at once: {read:?}");
        }
    }
    assert!(ranges > sizes.len(), "{asked:?}");
    stage.assert_clean();
}

/// Makes the program know the authority of `host` and a login there.
fn trust(stage: &Stage, host: &str, login: &str) {
    let place = stage.path("certs.d").join(host);
    fs::create_dir_all(&place).unwrap();
    let at = |name: &str| stage.path("registry").join(name).display().to_string();
    let (ca, pem, key) = (at("ca.pem"), at("client.pem"), at("client.key"));
    let text = format!("server = 'https://{host}'\nca = '{ca}'\nclient = [['{pem}', '{key}']]\n");
    fs::write(place.join("hosts.toml"), text).unwrap();
    let auth = base64::engine::general_purpose::STANDARD.encode(login);
    let text = format!("{{\"auths\": {{\"{host}\": {{\"auth\": \"{auth}\"}}}}}}");
    fs::write(stage.path("docker-config.json"), text).unwrap();
}

/// What each command says of `image` when it cannot be had: one error, this exit code, these words, no secret.
#[track_caller]
fn refused(stage: &Stage, image: &str, code: i32, words: &[&str]) {
    let (dest, mnt) = (reference(&stage.path("dest")), stage.path("mnt"));
    let mnt = mnt.to_str().unwrap();
    for command in [&["convert", image, &dest][..], &["mount", image, mnt], &["inspect", image], &["ls", image]] {
        let (found, told) = stage.fails(command);
        assert_eq!(found, code, "{command:?}: {told}");
        assert_told(&told, words);
        assert_told(&told, &["hint: "]);
        assert!(!told.contains("hunter2"), "a secret was told: {told}");
        let mut json = vec!["--json"];
        json.extend(command);
        let (_, told) = stage.fails(&json);
        let told: Value = serde_json::from_str(&told).unwrap_or_else(|_| panic!("no single line of JSON: {told}"));
        assert_eq!(told["error"]["exit_code"], code, "{told}");
    }
    let index = fs::read_to_string(stage.path("dest").join("index.json")).unwrap_or_default();
    assert!(!index.contains("sha256:"), "something was published: {index}");
    stage.assert_clean();
}

fn logs_of(root: &Path) -> String {
    let entries = fs::read_dir(root.join("mounts")).into_iter().flatten().map(|entry| entry.unwrap().path());
    let logs = entries.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
    logs.map(|path| fs::read_to_string(path).unwrap()).collect()
}

#[test]
fn a_password_and_an_own_authority_from_conversion_to_mount() {
    let stage = Stage::new();
    let directory = stage.make("registry");
    certificates(&directory);
    let registry = Registry::start(&directory, &htpasswd(&directory));
    let (front, port) = nginx(&directory, &registry.host());
    let host = format!("127.0.0.1:{port}");
    trust(&stage, &host, "me:hunter2");
    let layers = [tar(&[("dir/", b""), ("dir/a", &noise(3, 2 << 20))]), tar(&[("b", b"behind a password")])];
    let layers = layers.map(|tar| TestLayer::of_tar(&tar, Compression::Gzip));
    write_layout(&stage.path("source"), &layers).unwrap();
    let unpacked = unpacked_by_umoci(&stage.path("source"), &stage.path("bundle"));
    let (from, to) = (format!("docker://{}/app:1", registry.host()), format!("docker://{host}/lazy:1"));
    let source = reference(&stage.path("source"));
    skopeo(&["copy", "-q", "--dest-tls-verify=false", "--dest-creds", "me:hunter2", &source, &from]);

    stage.ok(&["convert", &format!("docker://{host}/app:1"), &to]);
    let mnt = stage.make("mnt");
    stage.ok(&["mount", &to, mnt.to_str().unwrap()]);
    plain(Listing::of_directory(&mnt).unwrap()).assert_equals(&plain(unpacked));
    let logs = logs_of(&stage.root());
    assert!(!logs.contains("hunter2"), "{logs}");
    stage.ok(&["umount", mnt.to_str().unwrap()]);
    let access = fs::read_to_string(directory.join("nginx.access")).unwrap();
    assert!(access.contains("PUT /v2/lazy/manifests/1") && access.contains("\" 206 "), "{access}");

    // What was seen once would be mounted without asking again.
    fs::remove_dir_all(stage.root()).unwrap();
    refused(&stage, &format!("docker://{host}/lazy:absent"), 3, &["lazy:absent", "there is no such image"]);
    refused(&stage, &format!("docker://{host}/nowhere:1"), 3, &["nowhere:1", "there is no such image"]);
    trust(&stage, &host, "me:not-hunter2");
    refused(&stage, &to, 4, &[&host, "access was denied"]);
    let (code, told) = stage.fails(&["convert", &source, &format!("docker://{host}/other:1")]);
    assert_eq!(code, 4, "{told}");
    assert_told(&told, &["does not accept the user name and password"]);
    fs::remove_file(stage.path("docker-config.json")).unwrap();
    refused(&stage, &to, 4, &[&host, "none is known"]);
    trust(&stage, &host, "me:hunter2");
    fs::remove_dir_all(stage.path("certs.d").join(&host)).unwrap();
    fs::create_dir_all(stage.path("certs.d").join(&host)).unwrap();
    fs::write(stage.path("certs.d").join(&host).join("hosts.toml"), format!("server = 'https://{host}'")).unwrap();
    let (code, told) = stage.fails(&["inspect", &to]);
    assert!(told.contains("TLS"), "{code}: {told}");
    trust(&stage, &host, "me:hunter2");
    drop(registry);
    refused(&stage, &to, 5, &[&host, "502"]);
    drop(front);
    refused(&stage, &to, 5, &[&host, "cannot connect"]);
    let (code, told) = stage.fails(&["convert", &source, &to]);
    assert_eq!(code, 5, "{told}");
    assert_told(&told, &["cannot connect", "hint: check the address"]);
    stage.assert_clean();
}
