//! The reference model of generated layer stacks against a container engine's unpacker.

use std::path::Path;
use std::process::Command;

use headstart::tar::decompress::Compression;
use headstart::testkit::layers::{Options, stacks};
use headstart::testkit::layouts::{TestLayer, write_layout};
use headstart::testkit::tree::Listing;
use proptest::prelude::*;

/// The tree that umoci makes of the image `layout:latest`.
pub(crate) fn unpacked_by_umoci(layout: &Path, into: &Path) -> Listing {
    let image = format!("{}:latest", layout.display());
    let output = Command::new("umoci").args(["unpack", "--image", &image]).arg(into).output().expect("umoci runs");
    assert!(output.status.success(), "umoci: {}", String::from_utf8_lossy(&output.stderr));
    Listing::of_directory(&into.join("rootfs")).expect("an unpacked image is readable")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_model_is_right(stack in stacks(Options::default())) {
        let dir = tempfile::tempdir().unwrap();
        let layout = dir.path().join("layout");
        write_layout(&layout, &TestLayer::of_stack(&stack, &[Compression::Gzip, Compression::Plain])).unwrap();
        let unpacked = unpacked_by_umoci(&layout, &dir.path().join("bundle"));
        let unpacked = unpacked.without_directory_sizes().without_directory_links();
        let difference = stack.expected().difference(&unpacked);
        prop_assert!(difference.is_none(), "{}", difference.unwrap_or_default());
    }
}
