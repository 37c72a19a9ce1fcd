//! Mounts held against what the kernel shows for the same image, and against what `docs/semantics.md` promises.
//! Needs root, /dev/fuse, and a kernel with EROFS (file-backed mounts) and overlayfs.

use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustix::mount::{MountFlags, UnmountFlags};

use headstart::fuse::{ServeOptions, Server, serve};
use headstart::sys::mount::Unmount;
use headstart::testkit::lazy::{LazyBytes, LazyLayer};
use headstart::testkit::tree::{Listing, build_oddities};
use headstart::vfs::{Vfs, open_layers};

/// Runs a command that must succeed.
#[track_caller]
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("cannot run {program}: {e}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An image of a directory, made by `mkfs.erofs`.
fn mkfs(source: &Path, options: &[&str]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let mut arguments = options.to_vec();
    arguments.extend([image.to_str().unwrap(), source.to_str().unwrap()]);
    run("mkfs.erofs", &arguments);
    fs::read(image).unwrap()
}

fn lazy(images: Vec<Vec<u8>>) -> Vec<Arc<LazyBytes>> {
    images.into_iter().map(|image| LazyBytes::new(image, 1 << 16)).collect()
}

fn open(layers: &[Arc<LazyBytes>]) -> Vfs<LazyLayer> {
    let layers: Vec<_> = layers.iter().map(|layer| (LazyLayer(Arc::clone(layer)), Vec::new())).collect();
    Vfs::new(open_layers(&layers).unwrap()).unwrap()
}

fn mount(layers: &[Arc<LazyBytes>], on: &Path) -> Server {
    serve(open(layers), on, &ServeOptions::for_this_user("test")).unwrap()
}

/// Layers mounted by the kernel: EROFS each, overlayfs on top. Goes away with its owner.
pub(crate) struct Kernel {
    dir: tempfile::TempDir,
    mounted: Vec<PathBuf>,
}

impl Kernel {
    /// The lowest layer first. Overlayfs wants two layers at least, so an empty one lies below.
    pub(crate) fn stack(images: &[Vec<u8>]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut kernel = Self { dir, mounted: Vec::new() };
        let bottom = kernel.dir.path().join("bottom");
        fs::create_dir(&bottom).unwrap();
        let mut lowers = bottom.display().to_string();
        for (number, image) in images.iter().enumerate() {
            let file = kernel.dir.path().join(format!("{number}.erofs"));
            fs::write(&file, image).unwrap();
            let tree = kernel.make(&number.to_string());
            rustix::mount::mount(&file, &tree, "erofs", MountFlags::RDONLY, None).unwrap();
            lowers = format!("{}:{lowers}", tree.display());
            kernel.mounted.push(tree);
        }
        let tree = kernel.make("tree");
        let options = CString::new(format!("lowerdir={lowers}")).unwrap();
        rustix::mount::mount("judge", &tree, "overlay", MountFlags::RDONLY, options.as_c_str()).unwrap();
        kernel.mounted.push(tree);
        kernel
    }

    fn make(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    }

    pub(crate) fn tree(&self) -> &Path {
        self.mounted.last().unwrap()
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        for path in self.mounted.iter().rev() {
            rustix::mount::unmount(path, UnmountFlags::empty()).unwrap();
        }
    }
}

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
        server.unmount(Unmount::Strict).unwrap();
        server.wait();
        assert!(fs::read_dir(target.path()).unwrap().next().is_none(), "the mount is gone");
    }
}
