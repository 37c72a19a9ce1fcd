//! Mounts held against what the kernel shows for the same image, and against what `docs/semantics.md` promises.
//! Needs root, /dev/fuse, and a kernel with EROFS (file-backed mounts) and overlayfs.

use std::fs;

use headstart::sys::mount::Unmount;
use headstart::testkit::layers::{Options, stacks};
use headstart::testkit::tree::{Listing, build_oddities};
use proptest::prelude::*;

use crate::convert_image::converted;
use crate::mounts::{Kernel, lazy, mkfs, mount};

/// The root is merged with the empty layer in the kernel, and with nothing in ours.
fn without_root_links(mut listing: Listing) -> Listing {
    listing.nodes.get_mut(&b""[..]).unwrap().attributes.nlink = 0;
    listing
}

#[test]
fn a_mount_shows_what_the_kernel_shows() {
    let source = tempfile::tempdir().unwrap();
    build_oddities(source.path()).unwrap();
    // This mkfs.erofs (1.5) forgets the end of names of full length.
    fs::remove_file(source.path().join("names").join("n".repeat(255))).unwrap();
    for options in [&[][..], &["--chunksize=4096"], &["-x-1", "-Enoinline_data"]] {
        let image = mkfs(source.path(), options);
        let kernel = Kernel::stack(std::slice::from_ref(&image));
        let target = tempfile::tempdir().unwrap();
        let server = mount(&lazy(vec![image]), target.path());
        let shown = Listing::of_overlay(target.path()).unwrap();
        let judged = Listing::of_overlay(kernel.tree()).unwrap();
        without_root_links(judged).assert_equals(&without_root_links(shown));
        server.unmount(Unmount::Lazy).unwrap();
        server.wait();
        assert!(fs::read_dir(target.path()).unwrap().next().is_none(), "the mount is gone");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 300, ..ProptestConfig::default() })]

    #[test]
    fn converted_stacks_look_as_in_the_kernel(stack in stacks(Options { bare: true, ..Options::default() })) {
        let images = converted(&stack);
        let kernel = Kernel::stack(&images);
        let target = tempfile::tempdir().unwrap();
        let server = mount(&lazy(images), target.path());
        let shown = Listing::of_overlay(target.path()).unwrap();
        let judged = Listing::of_overlay(kernel.tree()).unwrap();
        server.unmount(Unmount::Lazy).unwrap();
        server.wait();
        // A single layer is merged with an empty one in the kernel, and with nothing in ours.
        prop_assert_eq!(without_root_links(judged).difference(&without_root_links(shown)), None);
    }
}
