//! The reference model of generated layer stacks against a container engine's unpacker.

use std::path::Path;
use std::process::Command;

use headstart::model::EntryKind;
use headstart::tar::decompress::Compression;
use headstart::testkit::layers::{LayerFile, Marks, Options, Stack, stacks};
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

/// Taking a file away, umoci gives its directory the time of day, also where the layer has just set its time.
const UMOCI_TOUCHES: &str = "umoci touches directories that a late mark empties";

fn clears_root_late(stack: &Stack) -> bool {
    let clears = |file: &LayerFile| file.entry.kind == EntryKind::Opaque && file.entry.path.is_root();
    stack.layers.iter().any(|layer| layer.marks == Marks::Last && layer.files.iter().any(clears))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_model_is_right(stack in stacks(Options::default()).prop_filter(UMOCI_TOUCHES, |stack| !clears_root_late(stack))) {
        let dir = tempfile::tempdir().unwrap();
        let layout = dir.path().join("layout");
        write_layout(&layout, &TestLayer::of_stack(&stack, &[Compression::Gzip, Compression::Plain])).unwrap();
        let unpacked = unpacked_by_umoci(&layout, &dir.path().join("bundle"));
        let unpacked = unpacked.without_directory_sizes().without_directory_links();
        let difference = stack.expected().difference(&unpacked);
        prop_assert!(difference.is_none(), "{}", difference.unwrap_or_default());
    }
}
