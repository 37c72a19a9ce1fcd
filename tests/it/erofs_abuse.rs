//! The EROFS reader on images that were damaged: it answers with errors, soon.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::LazyLock;

use headstart::testkit::abuse::abuse_erofs;
use headstart::testkit::tree::pattern;
use proptest::prelude::*;

/// Images of a small tree in many layouts, without checksums so that damage reaches beyond the superblock.
static IMAGES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    small_tree(&tree);
    let image = dir.path().join("image");
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/erofs-utils-recent");
    let programs = Command::new(tool).args(["--suite", "forky"]).output().unwrap();
    assert!(programs.status.success(), "{}", String::from_utf8_lossy(&programs.stderr));
    let mkfs = Path::new(String::from_utf8(programs.stdout).unwrap().trim_end()).join("mkfs.erofs");
    let layouts = [
        "",
        "-b512",
        "-Eforce-inode-extended -x1",
        "-Enoinline_data -x10000",
        "-E48bit,force-chunk-indexes --chunksize=4096",
        "-b1024 --chunksize=1024 -Eforce-inode-blockmap",
        "-Edot-omitted --xattr-prefix=user. --xattr-prefix=trusted.over",
        "--xattr-prefix=user.s -Efragments,xattr-name-filter",
    ];
    layouts
        .iter()
        .map(|layout| {
            let output = Command::new(&mkfs)
                .args(["--quiet", "-Enosbcrc"])
                .args(layout.split_whitespace())
                .arg(&image)
                .arg(&tree)
                .output()
                .unwrap();
            assert!(output.status.success(), "{layout}: {}", String::from_utf8_lossy(&output.stderr));
            let bytes = fs::read(&image).unwrap();
            fs::remove_file(&image).unwrap();
            bytes
        })
        .collect()
});

fn small_tree(root: &Path) {
    fs::create_dir(root).unwrap();
    for directory in ["a", "a/b", "a/b/c", "crowd"] {
        fs::create_dir(root.join(directory)).unwrap();
    }
    for number in 0..60 {
        fs::write(root.join(format!("crowd/file-{number}")), pattern(number * 13)).unwrap();
    }
    fs::write(root.join("big"), pattern(20_000)).unwrap();
    fs::write(root.join("a/tail"), pattern(4100)).unwrap();
    fs::hard_link(root.join("a/tail"), root.join("a/b/again")).unwrap();
    std::os::unix::fs::symlink("../../big", root.join("a/b/link")).unwrap();
    for (path, name, value) in [
        ("big", c"user.small", &b"value"[..]),
        ("big", c"trusted.overlay.opaque", b"y"),
        ("a/tail", c"user.small", b"value"),
        ("crowd", c"user.small", b"value"),
        ("crowd", c"security.selinux", b"system_u:object_r:usr_t:s0"),
    ] {
        rustix::fs::lsetxattr(root.join(path), name, value, rustix::fs::XattrFlags::empty()).unwrap();
    }
}

/// One way to damage an image. Places are fractions of its length, so that they fit any image.
#[derive(Debug, Clone)]
enum Damage {
    /// A byte becomes another one.
    Byte(u32, u8),
    /// A bit near the beginning, where the structures are, is turned over.
    EarlyBit(u16, u8),
    /// Four bytes become a number that is likely to hurt.
    Word(u32, u32),
    /// Bytes are copied from one place to another.
    Copy(u32, u32, u16),
    /// The rest is cut off.
    Cut(u32),
}

fn damage() -> impl Strategy<Value = Damage> {
    let nasty = prop_oneof![
        Just(0),
        Just(1),
        Just(u32::MAX),
        Just(u32::MAX - 1),
        Just(0x7fff_ffff),
        Just(0x8000_0000),
        0..200_u32,
        any::<u32>()
    ];
    prop_oneof![
        3 => (any::<u32>(), any::<u8>()).prop_map(|(at, value)| Damage::Byte(at, value)),
        6 => (1024..16_384_u16, 0..8_u8).prop_map(|(at, bit)| Damage::EarlyBit(at, bit)),
        3 => (any::<u32>(), nasty).prop_map(|(at, value)| Damage::Word(at, value)),
        2 => (any::<u32>(), any::<u32>(), 1..600_u16).prop_map(|(from, to, len)| Damage::Copy(from, to, len)),
        1 => any::<u32>().prop_map(Damage::Cut),
    ]
}

/// The place that lies `fraction` of 2^32 into the bytes.
fn place(bytes: &[u8], fraction: u32) -> usize {
    usize::try_from((bytes.len() as u64 * u64::from(fraction)) >> 32).unwrap()
}

impl Damage {
    fn apply(&self, bytes: &mut Vec<u8>) {
        match *self {
            Self::Byte(at, value) => {
                let at = place(bytes, at);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            Self::EarlyBit(at, bit) => {
                if let Some(byte) = bytes.get_mut(usize::from(at)) {
                    *byte ^= 1 << bit;
                }
            }
            Self::Word(at, value) => {
                let at = place(bytes, at) & !3;
                if let Some(word) = bytes.get_mut(at..at + 4) {
                    word.copy_from_slice(&value.to_le_bytes());
                }
            }
            Self::Copy(from, to, len) => {
                let (from, to) = (place(bytes, from), place(bytes, to));
                let len = usize::from(len).min(bytes.len() - from.max(to));
                bytes.copy_within(from..from + len, to);
            }
            Self::Cut(at) => bytes.truncate(place(bytes, at)),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn damaged_images_give_errors_and_nothing_worse(
        which in any::<prop::sample::Index>(),
        damages in prop::collection::vec(damage(), 1..8),
    ) {
        let mut bytes = which.get(&IMAGES).clone();
        for damage in &damages {
            damage.apply(&mut bytes);
        }
        abuse_erofs(&bytes, &[]);
    }
}

#[test]
fn images_that_are_not_damaged_stay_within_the_same_bounds() {
    for image in &*IMAGES {
        abuse_erofs(image, &[]);
    }
}
