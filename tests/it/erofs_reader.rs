//! The EROFS reader against images made by `mkfs.erofs`, with the kernel as judge. Needs root.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use headstart::erofs::Image;
use headstart::testkit::tree::{Listing, build_oddities};

/// Runs a program that must succeed.
#[track_caller]
fn run(program: &mut Command) {
    let output = program.output().unwrap_or_else(|error| panic!("cannot start {program:?}: {error}"));
    let said = [output.stdout, output.stderr].concat();
    let last = said.rsplit(|byte| *byte == b'\r').next().unwrap_or_default();
    assert!(output.status.success(), "{program:?} failed: {}", String::from_utf8_lossy(last));
}

/// A mounted file system that goes away with its owner.
struct Mounted(PathBuf);

impl Mounted {
    #[track_caller]
    fn erofs(image: &Path, at: &Path, options: &str) -> Self {
        std::fs::create_dir_all(at).unwrap();
        run(Command::new("mount").args(["-t", "erofs", "-o", options]).arg(image).arg(at));
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        run(Command::new("umount").arg(&self.0));
    }
}

/// The kernel's view of `image` and the reader's must be the same.
#[track_caller]
fn same_as_kernel(image: &Path, options: &str) {
    let mount = Mounted::erofs(image, &image.with_extension("mnt"), options);
    let judge = Listing::of_directory(&mount.0).unwrap();
    drop(mount);
    let reader = Image::open(File::open(image).unwrap()).unwrap();
    Listing::of_image(&reader).unwrap().assert_equals(&judge);
}

#[test]
fn images_of_mkfs_read_as_the_kernel_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir(&tree).unwrap();
    build_oddities(&tree).unwrap();
    // This version forgets the end of names of full length.
    std::fs::remove_file(tree.join("names").join("n".repeat(255))).unwrap();
    for (number, options) in [
        &[][..],
        &["-Eforce-inode-extended"],
        &["-Enoinline_data"],
        &["-x-1"],
        &["-x1"],
        &["-x10000"],
        &["--chunksize=4096"],
        &["--chunksize=65536", "-Eforce-chunk-indexes"],
        &["-T1000", "--all-root", "-Eforce-inode-compact"],
    ]
    .iter()
    .enumerate()
    {
        let image = dir.path().join(format!("{number}.erofs"));
        run(Command::new("mkfs.erofs").args(*options).arg(&image).arg(&tree));
        println!("{options:?}");
        same_as_kernel(&image, "ro");
    }
}
