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

/// Whether taking away what `mark` hides may touch directories that the same layer has brought before, in `earlier`.
/// umoci gives only the directory that the mark itself stands in its time back, and not even that of the root.
fn touches(mark: &LayerFile, earlier: &[&LayerFile]) -> bool {
    let hidden = mark.entry.path.components();
    let depth_below = |file: &LayerFile| {
        let path = file.entry.path.components();
        path.starts_with(hidden).then(|| path.len() - hidden.len())
    };
    let is_directory = |file: &LayerFile| matches!(file.entry.kind, EntryKind::Directory | EntryKind::Opaque);
    match mark.entry.kind {
        EntryKind::Whiteout => earlier.iter().any(|file| match depth_below(file) {
            None => false,
            Some(0) => is_directory(file),
            Some(_) => file.entry.kind != EntryKind::Whiteout,
        }),
        EntryKind::Opaque => earlier.iter().any(|file| match depth_below(file) {
            None => false,
            Some(0) => hidden.is_empty(),
            Some(1) => is_directory(file),
            Some(_) => file.entry.kind != EntryKind::Whiteout,
        }),
        _ => false,
    }
}

fn touches_late(stack: &Stack) -> bool {
    let clears_root = |file: &LayerFile| file.entry.kind == EntryKind::Opaque && file.entry.path.is_root();
    stack.layers.iter().any(|layer| {
        let files = layer.in_order();
        (layer.marks == Marks::Last && files.iter().any(|file| clears_root(file)))
            || files.iter().enumerate().any(|(at, mark)| touches(mark, &files[..at]))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn the_model_is_right(stack in stacks(Options::default()).prop_filter(UMOCI_TOUCHES, |stack| !touches_late(stack))) {
        let dir = tempfile::tempdir().unwrap();
        let layout = dir.path().join("layout");
        write_layout(&layout, &TestLayer::of_stack(&stack, &[Compression::Gzip, Compression::Plain])).unwrap();
        let unpacked = unpacked_by_umoci(&layout, &dir.path().join("bundle"));
        let unpacked = unpacked.without_directory_sizes().without_directory_links();
        let difference = stack.expected().difference(&unpacked);
        prop_assert!(difference.is_none(), "{}", difference.unwrap_or_default());
    }
}
