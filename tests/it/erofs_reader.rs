//! The EROFS reader against images made by several releases of `mkfs.erofs`, with the kernel as judge. Needs root.

use std::ffi::CString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use headstart::erofs::{self, Image};
use headstart::model::ReadAt;
use headstart::testkit::tree::{Listing, build_oddities};

/// Runs a program that must succeed; what it says on standard output, without the last line's end.
#[track_caller]
fn run(program: &mut Command) -> String {
    let output = program.output().unwrap_or_else(|error| panic!("cannot start {program:?}: {error}"));
    let said = [&*output.stdout, &*output.stderr].concat();
    let last = said.rsplit(|byte| *byte == b'\r').next().unwrap_or_default();
    assert!(output.status.success(), "{program:?} failed: {}", String::from_utf8_lossy(last));
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

/// A mounted file system that goes away with its owner.
struct Mounted(PathBuf);

impl Mounted {
    /// Mounts a file without a loop device; `mount(8)` would take one, and then devices could not be files.
    #[track_caller]
    fn erofs(image: &Path, devices: &[&Path]) -> Self {
        let at = image.with_extension("mnt");
        fs::create_dir_all(&at).unwrap();
        let options = devices.iter().map(|device| format!("device={}", device.display())).collect::<Vec<_>>().join(",");
        let options = CString::new(options).unwrap();
        rustix::mount::mount(image, &at, "erofs", rustix::mount::MountFlags::RDONLY, options.as_c_str())
            .unwrap_or_else(|error| panic!("cannot mount {} with {options:?}: {error}", image.display()));
        Self(at)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

/// `mkfs.erofs` of some release.
enum Release {
    /// The one that is installed.
    System,
    /// Another Debian release's.
    Debian(&'static str),
}

impl Release {
    fn mkfs(&self) -> Command {
        match self {
            Self::System => Command::new("mkfs.erofs"),
            Self::Debian(suite) => {
                let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/erofs-utils-recent");
                let programs = run(Command::new(tool).args(["--suite", suite]));
                Command::new(Path::new(&programs).join("mkfs.erofs"))
            }
        }
    }
}

/// An empty directory and a tree full of oddities beside it.
fn oddities() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).unwrap();
    build_oddities(&tree).unwrap();
    (dir, tree)
}

#[track_caller]
fn read(image: &Path) -> Listing {
    let image = Image::open(File::open(image).unwrap()).unwrap();
    nothing_wrong(&image);
    Listing::of_image(&image).unwrap()
}

/// The verifier finds nothing, and the dump tells every file.
#[track_caller]
fn nothing_wrong<R: ReadAt>(image: &Image<R>) {
    let report = erofs::check(image).unwrap();
    assert!(report.findings.is_empty(), "{}", report.findings.iter().map(|f| format!("{f}\n")).collect::<String>());
    let mut dump = Vec::new();
    erofs::dump(image, &mut dump).unwrap();
    let told = String::from_utf8(dump).unwrap().lines().filter(|line| line.contains(" at=0x")).count();
    assert_eq!(told as u64, report.inodes);
}

/// The kernel's view of an image.
#[track_caller]
fn judge(image: &Path, devices: &[&Path]) -> Listing {
    let mount = Mounted::erofs(image, devices);
    Listing::of_directory(&mount.0).unwrap()
}

/// Makes an image of `tree` with each of `options` and holds the reader against the kernel.
#[track_caller]
fn same_as_kernel(release: &Release, dir: &Path, tree: &Path, options: &[&str]) {
    for (number, options) in options.iter().enumerate() {
        let image = dir.join(format!("{number}.erofs"));
        run(release.mkfs().arg("--quiet").args(options.split_whitespace()).arg(&image).arg(tree));
        if let Some(difference) = read(&image).difference(&judge(&image, &[])) {
            panic!("image made with {options:?}: {difference}");
        }
        fs::remove_file(image).unwrap();
    }
}

#[test]
fn images_of_release_1_5_read_as_the_kernel_reads_them() {
    let (dir, tree) = oddities();
    // This release forgets the end of names of full length.
    fs::remove_file(tree.join("names").join("n".repeat(255))).unwrap();
    let options = [
        "",
        "-Eforce-inode-extended",
        "-Eforce-inode-compact -T1000 --all-root",
        "-Enoinline_data",
        "-x-1",
        "-x1",
        "-x10000",
        "--chunksize=4096",
        "--chunksize=65536 -Eforce-chunk-indexes",
        "--chunksize=4096 -Eforce-inode-blockmap",
        "--ignore-mtime",
    ];
    same_as_kernel(&Release::System, dir.path(), &tree, &options);
}

/// What 1.8 and 1.9 both know.
const SINCE_1_8: [&str; 20] = [
    "",
    "-b512",
    "-b1024",
    "-b2048",
    "-b512 --chunksize=1024",
    "-b1024 -Enoinline_data",
    "-Eforce-inode-extended",
    "-Eforce-inode-compact --all-root -T1000",
    "-Enoinline_data",
    "-Enosbcrc",
    "-x-1",
    "-x1",
    "-x10000",
    "-Exattr-name-filter",
    "--xattr-prefix=user.comm --xattr-prefix=trusted.overlay. --xattr-prefix=security.selinux",
    "--xattr-prefix=user. -Exattr-name-filter -Eforce-inode-extended",
    "--chunksize=4096",
    "--chunksize=65536 -Eforce-chunk-indexes",
    "--chunksize=8192 -b512 -Eforce-inode-blockmap",
    "--hard-dereference -T7",
];

#[test]
fn images_of_release_1_8_read_as_the_kernel_reads_them() {
    let (dir, tree) = oddities();
    same_as_kernel(&Release::Debian("trixie"), dir.path(), &tree, &SINCE_1_8);
}

#[test]
fn images_of_release_1_9_read_as_the_kernel_reads_them() {
    let (dir, tree) = oddities();
    let forky = Release::Debian("forky");
    same_as_kernel(&forky, dir.path(), &tree, &SINCE_1_8);
    let since = [
        "-E48bit",
        "-E48bit,force-inode-compact --all-root",
        "-E48bit,force-inode-extended",
        "-E48bit,noinline_data",
        "-E48bit --chunksize=4096",
        "-E48bit,force-chunk-indexes --chunksize=4096",
        "-Edot-omitted",
        "-Edot-omitted -b512",
        "--mkfs-time -T123456789",
        "--MZ",
        "--MZ=i",
        "--dsunit=16",
        "--xattr-prefix=user. --xattr-prefix=trusted. -Eplain-xattr-prefixes",
        "--xattr-prefix=user.com -Efragments",
        "--xattr-inode-digest=trusted.overlay.verity",
        "--root-xattr-isize=1000",
    ];
    same_as_kernel(&forky, dir.path(), &tree, &since);
}

#[test]
fn images_of_tars_read_as_the_kernel_reads_them() {
    let (dir, tree) = oddities();
    let tar = dir.path().join("tree.tar");
    // A whiteout and an opaque mark as layers have them.
    fs::write(tree.join("crowd/.wh.gone"), b"").unwrap();
    fs::write(tree.join("names/.wh..wh..opq"), b"").unwrap();
    let sockets_are_no_tar_entries = tree.join("socket");
    fs::remove_file(sockets_are_no_tar_entries).unwrap();
    run(Command::new("tar")
        .args(["--format=posix", "--xattrs", "--xattrs-include=*", "--numeric-owner", "-cf"])
        .arg(&tar)
        .arg("-C")
        .arg(&tree)
        .arg("."));
    for suite in ["trixie", "forky"] {
        let release = Release::Debian(suite);
        same_as_kernel(
            &release,
            dir.path(),
            &tar,
            &["--tar=f --aufs", "--tar=f", "--tar=f --aufs -b512 -Enoinline_data"],
        );
        // The index alone: the data stay in the tar, which is the image's only device.
        let index = dir.path().join("index.erofs");
        run(release.mkfs().args(["--quiet", "--tar=i", "--aufs"]).arg(&index).arg(&tar));
        let both = judge(&index, &[&tar]);
        let image = Image::open_with_devices(File::open(&index).unwrap(), vec![File::open(&tar).unwrap()]).unwrap();
        nothing_wrong(&image);
        Listing::of_image(&image).unwrap().assert_equals(&both);
    }
}

#[test]
fn data_on_other_devices_is_found_there_or_in_the_flat_image() {
    let (dir, tree) = oddities();
    let other = dir.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("more"), vec![42; 100_000]).unwrap();
    let forky = Release::Debian("forky");
    let at = |name: &str| dir.path().join(name);

    // One blob device.
    run(forky
        .mkfs()
        .args(["--quiet", "--chunksize=4096"])
        .arg(format!("--blobdev={}", at("blob").display()))
        .arg(at("one"))
        .arg(&tree));
    let expected = judge(&at("one"), &[&at("blob")]);
    let open = |name: &str| File::open(at(name)).unwrap();
    let image = Image::open_with_devices(open("one"), vec![open("blob")]).unwrap();
    assert_eq!(image.devices().len(), 1);
    nothing_wrong(&image);
    Listing::of_image(&image).unwrap().assert_equals(&expected);

    // Two images merged: the metadata refers to both as devices.
    run(forky.mkfs().args(["--quiet", "-Enoinline_data"]).arg(at("lower")).arg(&tree));
    run(forky.mkfs().args(["--quiet", "-Enoinline_data"]).arg(at("upper")).arg(&other));
    run(forky.mkfs().args(["--quiet"]).arg(at("merged")).arg(at("upper")).arg(at("lower")));
    let expected = judge(&at("merged"), &[&at("upper"), &at("lower")]);
    let image = Image::open_with_devices(open("merged"), vec![open("upper"), open("lower")]).unwrap();
    assert_eq!(image.devices().len(), 2);
    nothing_wrong(&image);
    Listing::of_image(&image).unwrap().assert_equals(&expected);
    assert!(expected.nodes.contains_key(&b"more"[..]) && expected.nodes.contains_key(&b"big"[..]));

    // The flat form: one file after the other, each at the place that the table says.
    let mut flat = fs::read(at("merged")).unwrap();
    for (device, name) in image.devices().iter().zip(["upper", "lower"]) {
        flat.resize(usize::try_from(device.flat_start * image.superblock().block_size()).unwrap(), 0);
        flat.extend(fs::read(at(name)).unwrap());
    }
    fs::write(at("flat"), &flat).unwrap();
    judge(&at("flat"), &[]).assert_equals(&expected);
    read(&at("flat")).assert_equals(&expected);

    // Without the devices, metadata can be read, and what is missing is named.
    let alone = Image::open(open("merged")).unwrap();
    let root = alone.root_inode().unwrap();
    let more = alone.inode(alone.lookup(&root, b"more").unwrap().unwrap().nid).unwrap();
    let error = alone.read(&more, 0, &mut [0; 10]).unwrap_err();
    assert!(matches!(error, erofs::Error::DeviceMissing { device: 1, .. }), "{error}");
    let error = Image::open_with_devices(open("merged"), vec![open("upper")]).unwrap_err();
    assert!(matches!(error, erofs::Error::DeviceCount { expected: 2, given: 1 }), "{error}");
}

#[test]
fn compression_is_refused_by_name() {
    let (dir, tree) = oddities();
    let image = dir.path().join("image");
    for (release, options, names) in [
        (Release::System, "-zlz4", "lz4_0padding (compression inside of the image)"),
        (
            Release::Debian("trixie"),
            "-zlzma",
            "lz4_0padding, compr_cfgs/big_pcluster (compression inside of the image)",
        ),
        (
            Release::Debian("forky"),
            "-zlz4hc -Efragments,ztailpacking",
            "lz4_0padding, ztailpacking, fragments/dedupe (compression inside of the image)",
        ),
        (Release::Debian("forky"), "-m4096 -zlz4", "lz4_0padding, metabox (compression inside of the image)"),
    ] {
        run(release.mkfs().arg("--quiet").args(options.split_whitespace()).arg(&image).arg(tree.join("crowd")));
        let error = Image::open(File::open(&image).unwrap()).unwrap_err();
        assert!(matches!(error, erofs::Error::Features { .. }), "{error}");
        assert_eq!(error.to_string(), format!("the EROFS image needs features that are not supported: {names}"));
        fs::remove_file(&image).unwrap();
    }
}
