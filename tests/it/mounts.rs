//! What the tests of mounts share: images mounted by the kernel and by this program. Needs root.

use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustix::mount::{MountFlags, UnmountFlags};

use headstart::fuse::{ServeOptions, Server, serve};
use headstart::testkit::lazy::{LazyBytes, LazyLayer};
use headstart::vfs::{Vfs, open_layers};

/// Runs a command that must succeed.
#[track_caller]
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("cannot run {program}: {e}"));
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An image of a directory, made by `mkfs.erofs`.
pub(crate) fn mkfs(source: &Path, options: &[&str]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    let mut arguments = options.to_vec();
    arguments.extend([image.to_str().unwrap(), source.to_str().unwrap()]);
    run("mkfs.erofs", &arguments);
    fs::read(image).unwrap()
}

pub(crate) fn lazy(images: Vec<Vec<u8>>) -> Vec<Arc<LazyBytes>> {
    images.into_iter().map(|image| LazyBytes::new(image, 1 << 16)).collect()
}

pub(crate) fn open(layers: &[Arc<LazyBytes>]) -> Vfs<LazyLayer> {
    let layers: Vec<_> = layers.iter().map(|layer| (LazyLayer(Arc::clone(layer)), Vec::new())).collect();
    Vfs::new(open_layers(&layers).unwrap()).unwrap()
}

pub(crate) fn mount(layers: &[Arc<LazyBytes>], on: &Path) -> Server {
    serve(open(layers), on, &ServeOptions::for_this_user("test")).unwrap()
}

/// Layers mounted by the kernel: EROFS each, overlayfs on top. Goes away with its owner.
pub(crate) struct Kernel {
    dir: tempfile::TempDir,
    mounted: Vec<PathBuf>,
}

impl Kernel {
    /// The lowest layer first. Overlayfs wants two layers at least, so an empty one lies below a single one.
    pub(crate) fn stack(images: &[Vec<u8>]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut kernel = Self { dir, mounted: Vec::new() };
        let mut lowers = Vec::new();
        for (number, image) in images.iter().enumerate() {
            let file = kernel.dir.path().join(format!("{number}.erofs"));
            fs::write(&file, image).unwrap();
            let tree = kernel.make(&number.to_string());
            rustix::mount::mount(&file, &tree, "erofs", MountFlags::RDONLY, None).unwrap();
            lowers.insert(0, tree.display().to_string());
            kernel.mounted.push(tree);
        }
        if lowers.len() == 1 {
            lowers.push(kernel.make("bottom").display().to_string());
        }
        let tree = kernel.make("tree");
        let options = CString::new(format!("lowerdir={}", lowers.join(":"))).unwrap();
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

    /// The layers, each as it is, the lowest first.
    pub(crate) fn layers(&self) -> &[PathBuf] {
        self.mounted.split_last().unwrap().1
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        for path in self.mounted.iter().rev() {
            rustix::mount::unmount(path, UnmountFlags::DETACH).unwrap();
        }
    }
}
