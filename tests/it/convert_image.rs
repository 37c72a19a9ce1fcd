//! Whole images: what a converted image shows, that nothing but the source decides its digests, and what is left behind
//! when something is wrong. Needs root.

use std::path::Path;
use std::sync::Arc;

use headstart::chunked::SequentialReader;
use headstart::convert::{Converted, ImageError, ImageOptions, Platforms, convert_image};
use headstart::model::FileKind;
use headstart::oci::{ImagePlan, Platform, Prefer, Reference};
use headstart::registry::{Client, ClientConfig};
use headstart::tar::decompress::Compression;
use headstart::testkit::layers::{Options, Stack, plain_tar, stacks};
use headstart::testkit::layouts::{TestLayer, TestLayout, write_layout};
use headstart::testkit::tree::Listing;
use headstart::transport::{ImageSource, Transports};
use proptest::prelude::*;
use tokio::runtime::Runtime;

use super::mounts::Kernel;

const MIXED: [Compression; 3] = [Compression::Gzip, Compression::Plain, Compression::Zstd];

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn reference(text: &str) -> Reference {
    text.parse().unwrap()
}

fn transports(dir: &Path) -> Transports {
    Transports::new(Client::new(ClientConfig::default()), dir.join("spool"))
}

fn source(dir: &Path, from: &str) -> ImageSource {
    runtime().block_on(transports(dir).open(&reference(from))).unwrap()
}

fn convert_with(dir: &Path, from: &str, to: &str, options: &ImageOptions) -> Result<Converted, ImageError> {
    runtime().block_on(async {
        let transports = transports(dir);
        let source = transports.open(&reference(from)).await?;
        let sink = transports.create(&reference(to)).await?;
        convert_image(&source, &sink, options, Arc::new(())).await
    })
}

fn amd64() -> ImageOptions {
    ImageOptions { platforms: Platforms::One(Some(Platform::linux("amd64", None))), ..ImageOptions::default() }
}

/// The EROFS images of the layers of the image at `at`, lowest first, each checked against what is said of it.
pub(crate) fn images_at(dir: &Path, at: &str) -> Vec<Vec<u8>> {
    let source = source(dir, at);
    runtime().block_on(async {
        let image = source.image(Some(&Platform::linux("amd64", None)), Prefer::Erofs).await.unwrap();
        assert!(image.config.has_erofs_feature());
        let plan = ImagePlan::new(&image.manifest, &image.config).unwrap();
        assert_eq!(plan.diff_ids, image.config.diff_ids());
        let mut images = Vec::new();
        for (layer, descriptor) in plan.layers.iter().zip(&image.manifest.layers) {
            assert!(layer.index.is_some() && layer.ignored_index.is_none(), "{descriptor:?}");
            let blob = source.reader(&tokio::runtime::Handle::current(), descriptor).await.unwrap();
            let compression = layer.compression;
            let read = move || SequentialReader::new(Vec::new(), compression, 1 << 30).run(blob);
            let (bytes, summary) = tokio::task::spawn_blocking(read).await.unwrap().unwrap();
            assert_eq!(summary.diff_id, layer.diff_id);
            images.push(bytes);
        }
        images
    })
}

/// The EROFS images of a stack's layers, converted, lowest first.
pub(crate) fn converted(stack: &Stack) -> Vec<Vec<u8>> {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    write_layout(&from, &TestLayer::of_stack(stack, &MIXED)).unwrap();
    let (from, to) = (format!("oci:{}:latest", from.display()), format!("oci:{}:new", to.display()));
    convert_with(dir.path(), &from, &to, &amd64()).unwrap();
    images_at(dir.path(), &to)
}

/// What is compared: all but link counts, and the sizes and links of directories.
pub(crate) fn comparable(listing: Listing) -> Listing {
    let mut listing = listing.without_directory_sizes().without_directory_links();
    for node in listing.nodes.values_mut() {
        if node.attributes.kind != FileKind::Directory {
            node.attributes.nlink = 0;
        }
    }
    listing
}

/// Where the converted image, mounted by the kernel, differs from what the stack should show.
fn difference(dir: &Path, at: &str, stack: &Stack) -> Option<String> {
    let kernel = Kernel::stack(&images_at(dir, at));
    let shown = Listing::of_overlay(kernel.tree()).unwrap();
    comparable(stack.expected()).difference(&comparable(shown))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 300, ..ProptestConfig::default() })]

    #[test]
    fn converted_images_show_what_their_layers_say(stack in stacks(Options::default())) {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        write_layout(&from, &TestLayer::of_stack(&stack, &MIXED)).unwrap();
        let (from, to) = (format!("oci:{}:latest", from.display()), format!("oci:{}:new", to.display()));
        convert_with(dir.path(), &from, &to, &amd64()).unwrap();
        let difference = difference(dir.path(), &to, &stack);
        prop_assert!(difference.is_none(), "{}", difference.unwrap_or_default());
    }
}

/// A layout `from` with one image of four plain layers.
fn plain_layout(dir: &Path) -> (String, String, TestLayout) {
    let big: Vec<u8> = (0..3_000_000_u32).flat_map(|n| (n / 5).to_le_bytes()).collect();
    let tars = [
        plain_tar(&[("etc/passwd", b"root"), ("etc/big", &big)]),
        plain_tar(&[("etc/.wh.passwd", b""), ("bin/sh", b"shell")]),
        plain_tar(&[("bin/sh", b"other shell")]),
        plain_tar(&[("bin/sh", b"other shell")]),
    ];
    let layers: Vec<TestLayer> = tars
        .iter()
        .zip(MIXED.into_iter().cycle())
        .map(|(tar, compression)| TestLayer::of_tar(tar, compression))
        .collect();
    let layout = write_layout(&dir.join("from"), &layers).unwrap();
    let place = |name: &str| format!("oci:{}:latest", dir.join(name).display());
    (place("from"), place("to"), layout)
}

#[test]
fn digests_depend_on_the_source_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to, _) = plain_layout(dir.path());
    let mut tops = Vec::new();
    for (number, jobs) in [1, 2, 7].into_iter().enumerate() {
        let options = ImageOptions { jobs: jobs.try_into().unwrap(), ..amd64() };
        let to = to.replace("/to:", &format!("/to{number}:"));
        tops.push(convert_with(dir.path(), &from, &to, &options).unwrap());
    }
    // Through an archive, and over an image that is there.
    let archive = format!("oci-archive:{}:x", dir.path().join("to.tar").display());
    tops.push(convert_with(dir.path(), &from, &archive, &amd64()).unwrap());
    tops.push(convert_with(dir.path(), &from, &from, &amd64()).unwrap());
    for top in &tops {
        assert_eq!(top, &tops[0]);
    }
    assert_eq!(tops[0].images[0].layers.len(), 4);
    let again = convert_with(dir.path(), &to.replace("/to:", "/to0:"), &to, &amd64()).unwrap();
    assert_eq!(again.top, tops[0].top, "an image that is EROFS stays as it is");
}
