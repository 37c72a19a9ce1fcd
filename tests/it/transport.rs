//! Images read and written through every transport, with skopeo as the judge of what lies on disk and in registries.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use axum::http::Method;
use bytes::Bytes;
use headstart::layout::LayoutError;
use headstart::model::{Algorithm, BlobDigest, DiffId, Digest};
use headstart::oci::{Config, Descriptor, Index, Manifest, Platform, PlatformRecord, Prefer, Reference, media};
use headstart::registry::{Client, ClientConfig, Patience, Pushed, Upload};
use headstart::testkit::registry::{Fault, FaultyRegistry};
use headstart::transport::{ImageSink, ImageSource, ResolvedImage, TransportError, Transports};

fn transports(spool: &Path) -> Transports {
    transports_with(spool, Upload::Auto)
}

fn transports_with(spool: &Path, upload: Upload) -> Transports {
    let patience = Patience {
        response: Duration::from_secs(5),
        rounds: 3,
        backoff: Duration::from_millis(1),
        backoff_limit: Duration::from_millis(4),
        ..Patience::default()
    };
    Transports::new(Client::new(ClientConfig { patience, upload, ..ClientConfig::default() }), spool.to_owned())
}

fn reference(text: &str) -> Reference {
    text.parse().unwrap()
}

/// Runs skopeo; its standard output.
pub(crate) fn skopeo(arguments: &[&str]) -> String {
    let output = Command::new("skopeo").arg("--insecure-policy").args(arguments).output().unwrap();
    assert!(output.status.success(), "skopeo {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A tar with one file.
fn tar(name: &str, content: &[u8]) -> Vec<u8> {
    let mut header = [0_u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    header[124..136].copy_from_slice(format!("{:011o}\0", content.len()).as_bytes());
    header[136..148].copy_from_slice(b"00000000000\0");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|b| u32::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut tar = header.to_vec();
    tar.extend(content);
    tar.resize(tar.len().next_multiple_of(512) + 1024, 0);
    tar
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn sha256(bytes: &[u8]) -> Digest {
    Digest::of(Algorithm::Sha256, bytes)
}

/// A two-layer image.
pub(crate) struct Tiny {
    pub(crate) layers: Vec<Vec<u8>>,
    pub(crate) config: Vec<u8>,
    pub(crate) manifest: Manifest,
}

pub(crate) fn tiny(architecture: &str, content: &[u8]) -> Tiny {
    let tars = [tar("etc/one", b"one"), tar("two", content)];
    let layers: Vec<Vec<u8>> = tars.iter().map(|tar| gzip(tar)).collect();
    let config = serde_json::json!({
        "os": "linux", "architecture": architecture, "config": {"Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": tars.iter().map(|tar| sha256(tar).to_string()).collect::<Vec<_>>()},
        "history": [{"created_by": "one"}, {"created_by": "two"}],
    });
    let config = config.to_string().into_bytes();
    let descriptors = layers.iter().map(|layer| Descriptor::of(media::OCI_LAYER_GZIP, layer)).collect();
    let manifest = Manifest::new(Descriptor::of(media::OCI_CONFIG, &config), descriptors);
    Tiny { layers, config, manifest }
}

impl Tiny {
    async fn write(&self, sink: &ImageSink) -> Descriptor {
        for (layer, descriptor) in self.layers.iter().zip(&self.manifest.layers) {
            let mut spooled = sink.spool().unwrap();
            spooled.write_all(layer).unwrap();
            sink.put_blob(spooled, &descriptor.digest, descriptor.size).await.unwrap();
            assert!(sink.has_blob(&descriptor.digest, descriptor.size).await.unwrap());
        }
        sink.put_bytes(&self.manifest.config.digest, self.config.clone().into()).await.unwrap();
        Descriptor::of(media::OCI_MANIFEST, &self.manifest.to_json())
    }

    /// Writes the image alone.
    pub(crate) async fn write_all(&self, sink: &ImageSink) -> Descriptor {
        let top = self.write(sink).await;
        sink.finish(&top, &self.manifest.to_json().into()).await.unwrap();
        top
    }
}

async fn image(source: &ImageSource) -> ResolvedImage {
    source.image(None, Prefer::Ordinary).await.unwrap()
}

/// A layer's bytes through the blocking reader, decompressed.
async fn layer(source: &ImageSource, descriptor: &Descriptor) -> Vec<u8> {
    let mut reader = source.reader(&tokio::runtime::Handle::current(), descriptor).await.unwrap();
    let gzipped = descriptor.media_type == media::OCI_LAYER_GZIP || descriptor.media_type == media::DOCKER_LAYER_GZIP;
    tokio::task::spawn_blocking(move || {
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        if !gzipped {
            return bytes;
        }
        let mut plain = Vec::new();
        flate2::read::GzDecoder::new(bytes.as_slice()).read_to_end(&mut plain).unwrap();
        plain
    })
    .await
    .unwrap()
}

/// The image at `text` is `tiny`, layer by layer.
pub(crate) async fn assert_holds(transports: &Transports, text: &str, tiny: &Tiny) -> ResolvedImage {
    let source = transports.open(&reference(text)).await.unwrap();
    let image = image(&source).await;
    let config = Config::parse(tiny.config.clone()).unwrap();
    assert_eq!(image.config.diff_ids(), config.diff_ids(), "{text}");
    for (descriptor, diff_id) in image.manifest.layers.iter().zip(config.diff_ids()) {
        assert_eq!(DiffId(sha256(&layer(&source, descriptor).await)), *diff_id, "{text}: {descriptor:?}");
    }
    image
}

#[tokio::test(flavor = "multi_thread")]
async fn layouts_and_archives_are_what_skopeo_writes_and_reads() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).display().to_string();
    let transports = transports(directory.path());
    let tiny = tiny(&Platform::host().architecture, b"two");

    let ours = [format!("oci:{}:v1", at("layout")), format!("oci-archive:{}:v1", at("ours.tar"))];
    for text in &ours {
        let sink = transports.create(&reference(text)).await.unwrap();
        let top = tiny.write_all(&sink).await;
        let raw = skopeo(&["inspect", "--raw", text]);
        assert_eq!(raw.as_bytes(), tiny.manifest.to_json(), "{text}");
        assert_eq!(assert_holds(&transports, text, &tiny).await.top, {
            let annotations = [("org.opencontainers.image.ref.name".to_owned(), "v1".to_owned())].into();
            Descriptor { annotations, ..top }
        });
    }
    // Every form that skopeo makes of them is read back.
    for from in &ours {
        for (to, name) in [("oci", "dir"), ("oci-archive", "a.tar"), ("docker-archive", "d.tar")] {
            let to = format!("{to}:{}:docker.io/library/x:y", at(name));
            skopeo(&["copy", "-q", from, &to]);
            assert_holds(&transports, &to, &tiny).await;
            assert_holds(&transports, to.strip_suffix(":docker.io/library/x:y").unwrap(), &tiny).await;
            if Path::new(&at(name)).is_dir() {
                std::fs::remove_dir_all(at(name)).unwrap();
            } else {
                std::fs::remove_file(at(name)).unwrap();
            }
        }
    }
    let left: Vec<String> = std::fs::read_dir(directory.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(".headstart"))
        .collect();
    assert!(left.is_empty(), "temporary files were left behind: {left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_of_a_layout_are_replaced_and_told_apart() {
    let directory = tempfile::tempdir().unwrap();
    let transports = transports(directory.path());
    let path = directory.path().join("layout").display().to_string();
    let architecture = Platform::host().architecture;
    let (one, two) = (tiny(&architecture, b"one"), tiny(&architecture, b"two"));
    for (tag, tiny) in [("a", &one), ("b", &two), ("a", &two), ("b", &one)] {
        let sink = transports.create(&reference(&format!("oci:{path}:{tag}"))).await.unwrap();
        tiny.write_all(&sink).await;
    }
    assert_holds(&transports, &format!("oci:{path}:a"), &two).await;
    assert_holds(&transports, &format!("oci:{path}:b"), &one).await;
    let digest = sha256(&one.manifest.to_json());
    assert_holds(&transports, &format!("oci:{path}@{digest}"), &one).await;
    let open = |text: String| {
        let transports = transports.clone();
        async move { transports.open(&reference(&text)).await.unwrap_err().to_string() }
    };
    assert_eq!(open(format!("oci:{path}")).await, format!("{path} holds several images that fit; name one of: a, b"));
    assert_eq!(open(format!("oci:{path}:c")).await, format!("there is no image c in {path}; it holds: a, b"));
}

#[tokio::test]
async fn what_is_no_image_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let transports = transports(directory.path());
    let write = |name: &str, bytes: &[u8]| {
        let path = directory.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
    };
    write("other/file", b"x");
    write("bare/oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    write("future/oci-layout", br#"{"imageLayoutVersion":"2.0.0"}"#);
    write("broken/oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    write("broken/index.json", br#"{"schemaVersion":2,"manifests":7}"#);
    write("empty/oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    write("empty/index.json", br#"{"schemaVersion":2,"manifests":[]}"#);
    write("text", b"x");
    write("docker.tar", &tar("manifest.json", b"[]"));
    write("listed.tar", &tar("manifest.json", br#"[{"Config":"c.json","Layers":null}]"#));
    for (text, message) in [
        ("oci:missing", "cannot open the layout"),
        ("oci:other", "it has no file oci-layout"),
        ("oci:bare", "it has no file index.json"),
        ("oci:future", "its version is \"2.0.0\""),
        ("oci:broken", "cannot use index.json of"),
        ("oci:empty", "its index names no image"),
        ("oci-archive:missing", "cannot open the archive"),
        ("oci-archive:text", "is no usable archive"),
        ("oci-archive:other", "cannot open the archive"),
        ("oci-archive:docker.tar", "it has no file oci-layout"),
        ("docker-archive:docker.tar", "its manifest.json is empty"),
        ("docker-archive:listed.tar", "the config \"c.json\" is missing"),
    ] {
        let (transport, name) = text.split_once(':').unwrap();
        let text = format!("{transport}:{}", directory.path().join(name).display());
        let error = transports.open(&reference(&text)).await.expect_err(&text).to_string();
        assert!(error.contains(message), "{text} gave {error}");
    }
    for (text, message) in [
        (format!("oci:{}", directory.path().join("other").display()), "is not empty and has no file oci-layout"),
        (format!("docker-archive:{}", directory.path().join("x").display()), "docker archives are only read"),
        (format!("a.example/b@{}", sha256(b"")), "name a tag"),
    ] {
        let error = transports.create(&reference(&text)).await.expect_err(&text).to_string();
        assert!(error.contains(message), "{text} gave {error}");
    }
    assert!(!directory.path().join("x").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_blobs_are_found_by_whoever_reads_them_whole() {
    let directory = tempfile::tempdir().unwrap();
    let transports = transports(directory.path());
    let text = format!("oci:{}:v1", directory.path().join("layout").display());
    let tiny = tiny(&Platform::host().architecture, b"two");
    tiny.write_all(&transports.create(&reference(&text)).await.unwrap()).await;
    let path = |digest: &BlobDigest| directory.path().join("layout/blobs/sha256").join(digest.0.hex());
    let damage = |digest: &BlobDigest| {
        let mut bytes = std::fs::read(path(digest)).unwrap();
        bytes[10] ^= 1;
        std::fs::write(path(digest), bytes).unwrap();
    };
    let first = &tiny.manifest.layers[0];
    damage(&first.digest);
    let source = transports.open(&reference(&text)).await.unwrap();
    let mut reader = source.reader(&tokio::runtime::Handle::current(), first).await.unwrap();
    let error = tokio::task::spawn_blocking(move || reader.read_to_end(&mut Vec::new()).unwrap_err()).await.unwrap();
    assert!(error.to_string().contains("is damaged: its"), "{error}");
    // A copy does not take it over either.
    let copy = format!("oci:{}:v1", directory.path().join("copy").display());
    let sink = transports.create(&reference(&copy)).await.unwrap();
    assert!(matches!(sink.copy_blob(&source, first).await, Err(TransportError::Damaged { .. })));
    assert!(!sink.has_blob(&first.digest, first.size).await.unwrap());
    assert_eq!(sink.copy_blob(&source, &tiny.manifest.layers[1]).await.unwrap(), Pushed::Uploaded);
    assert_eq!(sink.copy_blob(&source, &tiny.manifest.layers[1]).await.unwrap(), Pushed::Present);

    damage(&tiny.manifest.config.digest);
    let error = source.image(None, Prefer::Ordinary).await.unwrap_err();
    assert!(matches!(error, TransportError::Layout(LayoutError::Document { .. })), "{error}");
    std::fs::remove_file(path(&tiny.manifest.config.digest)).unwrap();
    let error = source.image(None, Prefer::Ordinary).await.unwrap_err();
    assert!(matches!(error, TransportError::Layout(LayoutError::NoBlob { .. })), "{error}");
}

fn entry(tiny: &Tiny, platform: &str) -> Descriptor {
    let mut entry = Descriptor::of(media::OCI_MANIFEST, &tiny.manifest.to_json());
    entry.platform = Some(PlatformRecord::from(&platform.parse::<Platform>().unwrap()));
    entry
}

#[tokio::test(flavor = "multi_thread")]
async fn the_image_for_a_platform_is_found_in_nested_indexes() {
    let directory = tempfile::tempdir().unwrap();
    let transports = transports(directory.path());
    let text = format!("oci:{}:v1", directory.path().join("layout").display());
    let sink = transports.create(&reference(&text)).await.unwrap();
    let (arm, amd, twin) = (tiny("arm64", b"arm"), tiny("amd64", b"amd"), tiny("amd64", b"twin"));
    for tiny in [&arm, &amd, &twin] {
        let top = tiny.write(&sink).await;
        sink.put_manifest(&top, &tiny.manifest.to_json().into()).await.unwrap();
    }
    let inner = Index::new(vec![entry(&amd, "linux/amd64"), entry(&twin, "linux(+erofs)/amd64")]).to_json();
    let inner_descriptor = Descriptor::of(media::OCI_INDEX, &inner);
    sink.put_manifest(&inner_descriptor, &inner.into()).await.unwrap();
    let outer = Index::new(vec![entry(&arm, "linux/arm64"), inner_descriptor]).to_json();
    let top = Descriptor::of(media::OCI_INDEX, &outer);
    sink.finish(&top, &outer.into()).await.unwrap();

    let source = transports.open(&reference(&text)).await.unwrap();
    let find = |platform: &str, prefer| {
        let (source, platform) = (source.clone(), platform.parse::<Platform>().unwrap());
        async move { source.image(Some(&platform), prefer).await }
    };
    for (platform, prefer, expected) in [
        ("linux/arm64", Prefer::Erofs, &arm),
        ("linux/amd64", Prefer::Ordinary, &amd),
        ("linux/amd64", Prefer::Erofs, &twin),
        ("linux(+erofs)/amd64", Prefer::Ordinary, &twin),
    ] {
        assert_eq!(find(platform, prefer).await.unwrap().manifest, expected.manifest, "{platform} {prefer:?}");
    }
    let error = find("linux/s390x", Prefer::Ordinary).await.unwrap_err().to_string();
    assert!(
        error.ends_with("no image for linux/s390x; it has: linux/arm64, linux/amd64, linux(+erofs)/amd64"),
        "{error}"
    );
    assert_eq!(source.images().await.unwrap().len(), 3);
    // What an index names can be opened by its digest alone.
    let by_digest = format!("oci:{}@{}", directory.path().join("layout").display(), entry(&twin, "linux/amd64").digest);
    let source = transports.open(&reference(&by_digest)).await.unwrap();
    assert_eq!(image(&source).await.manifest, twin.manifest);
}

#[tokio::test]
async fn a_single_image_for_another_platform_is_taken_only_unasked() {
    let registry = FaultyRegistry::start().await;
    let other = if Platform::host().architecture == "s390x" { "arm64" } else { "s390x" };
    let tiny = tiny(other, b"x");
    registry.put_blob(tiny.config.clone());
    registry.put_manifest("app", "v1", media::OCI_MANIFEST, tiny.manifest.to_json());
    let spool = tempfile::tempdir().unwrap();
    let source = transports(spool.path()).open(&reference(&format!("{}/app:v1", registry.host()))).await.unwrap();
    assert_eq!(image(&source).await.platform().architecture, other);
    // A tag, its manifest and its config cost two requests.
    assert_eq!(registry.seen().len(), 2);
    let error = source.image(Some(&Platform::host()), Prefer::Ordinary).await.unwrap_err();
    assert!(matches!(error, TransportError::NoPlatform { .. }), "{error}");
}

#[tokio::test]
async fn indexes_without_end_and_manifests_of_other_things_are_refused() {
    let registry = FaultyRegistry::start().await;
    let spool = tempfile::tempdir().unwrap();
    let transports = transports(spool.path());
    let mut below = registry.put_manifest("app", "deep", media::OCI_INDEX, Index::new(Vec::new()).to_json());
    for _ in 0..20 {
        let size = registry.manifest("app", &below.to_string()).unwrap().len() as u64;
        let index = Index::new(vec![Descriptor::new(media::OCI_INDEX, below, size)]);
        below = registry.put_manifest("app", "deep", media::OCI_INDEX, index.to_json());
    }
    let source = transports.open(&reference(&format!("{}/app:deep", registry.host()))).await.unwrap();
    let error = source.image(None, Prefer::Ordinary).await.unwrap_err();
    assert!(matches!(error, TransportError::TooManyIndexes { limit: 16, .. }), "{error}");

    let chart = Manifest::new(Descriptor::of("application/vnd.cncf.helm.config.v1+json", b"{}"), Vec::new());
    registry.put_manifest("app", "chart", media::OCI_MANIFEST, chart.to_json());
    registry.put_manifest("app", "old", media::DOCKER_SCHEMA1_SIGNED, br#"{"schemaVersion":1,"fsLayers":[]}"#.to_vec());
    for (tag, message) in [("chart", "it describes no container image"), ("old", "schema1")] {
        let source = transports.open(&reference(&format!("{}/app:{tag}", registry.host()))).await.unwrap();
        let error = source.image(None, Prefer::Ordinary).await.unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains(message), "{error}: {cause}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pushes_survive_what_registries_do() {
    let directory = tempfile::tempdir().unwrap();
    let tiny = tiny(&Platform::host().architecture, &vec![7; 300_000]);
    let big = Bytes::from((0..200_000_u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>());
    let digest = BlobDigest(sha256(&big));
    for (name, upload, faults) in [
        ("plain", Upload::Monolithic, vec![]),
        ("pieces", Upload::Chunked(100_000), vec![]),
        ("one byte more", Upload::Chunked(799_999), vec![]),
        ("too large", Upload::Auto, vec![(Method::PUT, Fault::Status(413, vec![]), 1)]),
        ("busy", Upload::Auto, vec![(Method::POST, Fault::Status(503, vec![]), 1)]),
        ("broken off", Upload::Monolithic, vec![(Method::PUT, Fault::DropUpload(1000), 1)]),
        ("a piece broken off", Upload::Chunked(100_000), vec![(Method::PATCH, Fault::DropUpload(1000), 2)]),
        ("a piece refused", Upload::Chunked(100_000), vec![(Method::PATCH, Fault::Status(500, vec![]), 2)]),
    ] {
        let registry = FaultyRegistry::start().await;
        for (method, fault, times) in faults {
            registry.script(method, "/blobs/uploads/", fault, times);
        }
        let transports = transports_with(directory.path(), upload);
        let text = format!("{}/app:v1", registry.host());
        let sink = transports.create(&reference(&text)).await.unwrap();
        let mut spooled = sink.spool().unwrap();
        spooled.write_all(&big).unwrap();
        sink.put_blob(spooled, &digest, big.len() as u64).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(registry.blob(&digest).as_ref(), Some(&big), "{name}");
        tiny.write_all(&sink).await;
        assert_holds(&transports, &text, &tiny).await;
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "spooled files were left behind");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_that_fails_says_why_and_cancels() {
    let directory = tempfile::tempdir().unwrap();
    let registry = FaultyRegistry::start().await;
    let transports = transports(directory.path());
    let sink = transports.create(&reference(&format!("{}/app:v1", registry.host()))).await.unwrap();
    let mut spooled = sink.spool().unwrap();
    spooled.write_all(b"not what it says").unwrap();
    let digest = BlobDigest(sha256(b"other"));
    let error = sink.put_blob(spooled, &digest, 16).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("the server answered 400: DIGEST_INVALID: digest invalid"), "{text}");
    assert!(!text.contains("secret-state") && !error.is_transient());
    assert_eq!(registry.seen_at(&Method::DELETE, "/blobs/uploads/").len(), 1);
    // A file that is shorter than it was said to be.
    let mut spooled = sink.spool().unwrap();
    spooled.write_all(b"short").unwrap();
    let error = sink.put_blob(spooled, &digest, 300_000).await.unwrap_err();
    assert!(error.to_string().contains("cannot read the file that is sent"), "{error}");
    // A registry that stores something else under the tag.
    let wrong = Fault::With("docker-content-digest".parse().unwrap(), sha256(b"x").to_string());
    registry.script(Method::PUT, "/manifests/", wrong, 1);
    let tiny = tiny("amd64", b"x");
    let top = Descriptor::of(media::OCI_MANIFEST, &tiny.manifest.to_json());
    let error = sink.finish(&top, &tiny.manifest.to_json().into()).await.unwrap_err();
    assert!(error.to_string().contains("header Docker-Content-Digest"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn blobs_are_mounted_inside_a_registry_and_copied_between_them() {
    let directory = tempfile::tempdir().unwrap();
    let transports = transports(directory.path());
    let (one, two) = (FaultyRegistry::start().await, FaultyRegistry::start().await);
    let tiny = tiny(&Platform::host().architecture, b"x");
    let text = format!("{}/app:v1", one.host());
    tiny.write_all(&transports.create(&reference(&text)).await.unwrap()).await;
    let source = transports.open(&reference(&text)).await.unwrap();
    let layer = &tiny.manifest.layers[0];
    for (to, expected) in [(&one, Pushed::Present), (&two, Pushed::Uploaded)] {
        let sink = transports.create(&reference(&format!("{}/copy:v1", to.host()))).await.unwrap();
        let done = sink.copy_blob(&source, layer).await.unwrap();
        // The first registry keeps one store for all repositories, so the blob is found without a mount.
        assert!(done == expected || done == Pushed::Mounted, "{done:?}");
        assert!(sink.has_blob(&layer.digest, layer.size).await.unwrap());
    }
    assert_eq!(two.blob(&layer.digest).unwrap(), tiny.layers[0]);
}
