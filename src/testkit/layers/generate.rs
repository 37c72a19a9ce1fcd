//! Draws stacks. Raw operations are drawn first, blind; then each is bent to what can stand at its place. So a stack
//! shrinks by leaving operations out.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use super::merged::Merged;
use super::{Layer, LayerFile, Marks, Piece, Stack, Tar};
use crate::model::{DeviceNumber, EntryKind, LayerEntry, Metadata, Name, RelPath, Timestamp, Xattr};

/// What to draw.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// At most so many layers.
    pub layers: usize,
    /// At most so many operations in each.
    pub operations: usize,
    /// Draw what engines differ about too: parents without entry that are new, empty attributes.
    pub bare: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { layers: 4, operations: 14, bare: false }
    }
}

#[derive(Debug, Clone, Copy)]
enum Shape {
    File,
    Directory,
    Symlink,
    HardLink,
    CharDevice,
    BlockDevice,
    Fifo,
    Whiteout,
    Opaque,
    /// A directory with many entries.
    Crowd,
}

#[derive(Debug, Clone)]
struct RawMetadata {
    permissions: u16,
    uid: u32,
    gid: u32,
    mtime: Timestamp,
    user: Option<u8>,
    trusted: bool,
    capability: bool,
    access_acl: bool,
    default_acl: bool,
}

#[derive(Debug, Clone)]
struct Operation {
    shape: Shape,
    place: Vec<usize>,
    pick: Index,
    /// Removals and links take an existing path instead of `place`.
    existing: bool,
    explicit_parents: bool,
    metadata: RawMetadata,
    pieces: Vec<Piece>,
    crowd: u16,
}

/// Names that collide, one of the greatest length, and three that are unusual bytes.
fn names() -> [Vec<u8>; 7] {
    [
        b"a".to_vec(),
        b"b".to_vec(),
        b"c".to_vec(),
        vec![b'n'; Name::MAX_LEN],
        b"...".to_vec(),
        vec![0xc3, 0xa9, 0xff],
        b" \n\\".to_vec(),
    ]
}

fn metadata() -> impl Strategy<Value = RawMetadata> {
    let permissions = prop_oneof![
        4 => select(vec![0o644_u16, 0o755, 0o600, 0o777]),
        1 => 0..=0o7777_u16,
    ];
    let id = prop_oneof![
        6 => select(vec![0_u32, 1000, 65_534]),
        1 => select(vec![65_535, 65_536, 2_097_151, 2_097_152, u32::MAX - 1]),
    ];
    let mtime = (
        prop_oneof![
            4 => 0..2_000_000_000_i64,
            1 => select(vec![-1, -2_000_000_000, 0, i64::from(i32::MAX) + 1, i64::from(u32::MAX) + 1, 8_589_934_592]),
        ],
        prop_oneof![2 => Just(0), 1 => 1..1_000_000_000_u32],
    );
    let rare = || prop::bool::weighted(0.08);
    (permissions, id.clone(), id, mtime, (option::weighted(0.15, any::<u8>()), rare(), rare(), rare(), rare()))
        .prop_map(|(permissions, uid, gid, (seconds, nanos), (user, trusted, capability, access_acl, default_acl))| {
            RawMetadata {
                permissions,
                uid,
                gid,
                mtime: Timestamp { seconds, nanos },
                user,
                trusted,
                capability,
                access_acl,
                default_acl,
            }
        })
}

fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    let len = prop_oneof![
        3 => select(vec![0_u32, 1, 100, 511, 512, 513, 4095, 4096, 4097, 8192]),
        1 => 1..70_000_u32,
        1 => select(vec![16_384, 65_536, 262_144, 300_000]),
    ];
    let piece = (0..6_u8, any::<u8>(), len).prop_map(|(kind, seed, len)| match kind {
        0 => Piece::Hole(len),
        1 => Piece::Zeros(len),
        _ => Piece::Data { seed, len },
    });
    prop_oneof![1 => Just(Vec::new()), 4 => vec(piece.clone(), 1..=1), 2 => vec(piece, 2..6)]
}

fn operation() -> impl Strategy<Value = Operation> {
    let shape = prop_oneof![
        8 => Just(Shape::File),
        5 => Just(Shape::Directory),
        2 => Just(Shape::Symlink),
        4 => Just(Shape::HardLink),
        1 => Just(Shape::CharDevice),
        1 => Just(Shape::BlockDevice),
        1 => Just(Shape::Fifo),
        4 => Just(Shape::Whiteout),
        2 => Just(Shape::Opaque),
        1 => Just(Shape::Crowd),
    ];
    let name = prop_oneof![8 => 0..3_usize, 1 => 3..7_usize];
    let flags = (prop::bool::weighted(0.8), any::<bool>());
    (shape, vec(name, 1..4), any::<Index>(), flags, metadata(), pieces(), 1..400_u16).prop_map(
        |(shape, place, pick, (existing, explicit_parents), metadata, pieces, crowd)| Operation {
            shape,
            place,
            pick,
            existing,
            explicit_parents,
            metadata,
            pieces,
            crowd,
        },
    )
}

/// Stacks of one to `options.layers` layers.
pub fn stacks(options: Options) -> impl Strategy<Value = Stack> {
    let marks = select(vec![Marks::Among, Marks::First, Marks::Last]);
    let layer = (vec(operation(), 0..=options.operations), any::<bool>(), marks);
    vec(layer, 1..=options.layers).prop_map(move |layers| build(&layers, options))
}

/// Single layers as tars, for tests of readers alone.
pub fn layer_tars() -> impl Strategy<Value = (Layer, Tar)> {
    stacks(Options { layers: 1, operations: 30, bare: true }).prop_map(|mut stack| {
        let layer = stack.layers.swap_remove(0);
        let tar = Tar(layer.tar());
        (layer, tar)
    })
}

fn build(layers: &[(Vec<Operation>, bool, Marks)], options: Options) -> Stack {
    let mut merged = Merged::new();
    let mut built = Vec::new();
    for (number, (operations, dotted, marks)) in layers.iter().enumerate() {
        let mut layer = Building {
            number,
            options,
            below: merged.clone(),
            merged: &mut merged,
            files: Vec::new(),
            in_order: false,
        };
        // The root has an entry in most images; without one, its metadata is for everybody to invent.
        if number == 0 {
            let root = operations.first().map_or_else(Metadata::default, |first| first.metadata.directory());
            layer.push(RelPath::root(), EntryKind::Directory, root, Vec::new());
        }
        for operation in operations {
            layer.take(operation);
        }
        // Some entries mean another thing, or nothing, if removals are moved across them.
        let marks = if layer.in_order { Marks::Among } else { *marks };
        built.push(Layer { files: layer.files, dotted: *dotted, marks });
    }
    Stack { layers: built, merged }
}

struct Building<'a> {
    number: usize,
    options: Options,
    merged: &'a mut Merged,
    /// As the lower layers left it.
    below: Merged,
    files: Vec<LayerFile>,
    in_order: bool,
}

impl Building<'_> {
    fn push(&mut self, path: RelPath, kind: EntryKind, metadata: Metadata, pieces: Vec<Piece>) {
        let bytes = path.to_bytes();
        let stays = kind == EntryKind::Directory && self.merged.is_directory(&bytes);
        self.in_order |= match kind {
            EntryKind::Whiteout | EntryKind::Opaque => {
                // What it lies in, or is, was made by this layer.
                path.parent().is_some_and(|parent| !self.below.is_directory(&parent.to_bytes()))
                    || (kind == EntryKind::Opaque && !self.below.is_directory(&bytes))
            }
            _ => !stays && self.merged.is_touched(&bytes, self.number),
        };
        let mut metadata = metadata;
        if !self.options.bare {
            metadata.xattrs.retain(|xattr| !xattr.value.is_empty());
        }
        let file = LayerFile { entry: LayerEntry { path, kind, metadata }, pieces };
        self.merged.apply(self.number, &file);
        self.files.push(file);
    }

    fn take(&mut self, operation: &Operation) {
        let names = names();
        let path = operation.place.iter().fold(RelPath::root(), |path, name| {
            path.join(Name::new(&names[*name][..]).expect("the alphabet has only names"))
        });
        let metadata = &operation.metadata;
        let device = DeviceNumber { major: u32::from(metadata.permissions) % 4096, minor: metadata.uid % 0xf_ffff + 1 };
        match operation.shape {
            Shape::Whiteout => return self.remove(operation, path),
            Shape::Opaque => return self.make_opaque(operation, path),
            Shape::HardLink => return self.link(operation, path),
            _ => {}
        }
        self.parents(&path, operation);
        let size = operation.pieces.iter().map(|piece| piece.len()).sum();
        match operation.shape {
            Shape::File => {
                self.push(path, EntryKind::Regular { size }, metadata.file(), operation.pieces.clone());
            }
            Shape::Directory => self.push(path, EntryKind::Directory, metadata.directory(), Vec::new()),
            Shape::Symlink => {
                let long = usize::from(metadata.user == Some(0)) * 4000;
                let target = [&b"../a/./"[..], &vec![b't'; long], &path.to_bytes()].concat();
                let target = target[..target.len().min(4095)].into();
                let metadata = Metadata { permissions: 0o777, ..metadata.special() };
                self.push(path, EntryKind::Symlink { target }, metadata, Vec::new());
            }
            Shape::CharDevice => self.push(path, EntryKind::CharDevice(device), metadata.special(), Vec::new()),
            Shape::BlockDevice => self.push(path, EntryKind::BlockDevice(device), metadata.special(), Vec::new()),
            Shape::Fifo => self.push(path, EntryKind::Fifo, metadata.special(), Vec::new()),
            Shape::Crowd => {
                self.push(path.clone(), EntryKind::Directory, metadata.directory(), Vec::new());
                for number in 0..operation.crowd {
                    let name = format!("crowd-{:x<width$}{number}", "", width = usize::from(number % 90));
                    let path = path.join(Name::new(name.into_bytes()).expect("it is short"));
                    let target = Box::from(&b"x"[..]);
                    let mut metadata = metadata.special();
                    let kind = match number % 3 {
                        0 => EntryKind::Symlink { target },
                        _ => EntryKind::Regular { size: 0 },
                    };
                    if number % 3 == 0 {
                        metadata.permissions = 0o777;
                    }
                    self.push(path, kind, metadata, Vec::new());
                }
            }
            Shape::Whiteout | Shape::Opaque | Shape::HardLink => {}
        }
    }

    /// Makes sure that everything above `path` is a directory, with entries where need be.
    fn parents(&mut self, path: &RelPath, operation: &Operation) {
        let mut above = Vec::new();
        let mut next = path.parent();
        while let Some(path) = next {
            next = path.parent();
            above.push(path);
        }
        for directory in above.into_iter().rev() {
            let bytes = directory.to_bytes();
            let exists = self.merged.exists(&bytes);
            let is_directory = self.merged.is_directory(&bytes);
            if (exists && !is_directory) || (!exists && (operation.explicit_parents || !self.options.bare)) {
                self.push(directory, EntryKind::Directory, operation.metadata.directory(), Vec::new());
            }
        }
    }

    /// Paths that this layer has not touched, so that removing them means the same to everybody.
    fn untouched(&self, wanted: impl Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
        let fits = |path: &&Vec<u8>| !path.is_empty() && !self.merged.is_touched(path, self.number) && wanted(path);
        self.merged.paths().filter(fits).cloned().collect()
    }

    fn remove(&mut self, operation: &Operation, path: RelPath) {
        let found = self.untouched(|_| true);
        let path = match found.get(operation.pick.index(found.len().max(1))) {
            Some(found) if operation.existing => RelPath::parse(found).expect("it was a path before"),
            // A whiteout of nothing: only where there really is nothing, and no file in the way.
            _ => path,
        };
        let bytes = path.to_bytes();
        let parent_is_directory = path.parent().is_some_and(|parent| self.merged.is_directory(&parent.to_bytes()));
        if !self.merged.is_touched(&bytes, self.number) && parent_is_directory {
            self.push(path, EntryKind::Whiteout, Metadata::default(), Vec::new());
        }
    }

    fn make_opaque(&mut self, operation: &Operation, path: RelPath) {
        // Now and then the root, which is untouched only if nothing came before.
        if operation.crowd.is_multiple_of(2) && self.files.is_empty() && self.number > 0 {
            return self.push(RelPath::root(), EntryKind::Opaque, Metadata::default(), Vec::new());
        }
        let found = self.untouched(|path| self.merged.is_directory(path));
        let path = match found.get(operation.pick.index(found.len().max(1))) {
            Some(found) if operation.existing => RelPath::parse(found).expect("it was a path before"),
            _ => path,
        };
        if self.merged.is_touched(&path.to_bytes(), self.number) {
            return;
        }
        self.parents(&path, operation);
        self.push(path.clone(), EntryKind::Directory, operation.metadata.directory(), Vec::new());
        self.push(path, EntryKind::Opaque, Metadata::default(), Vec::new());
    }

    fn link(&mut self, operation: &Operation, path: RelPath) {
        self.parents(&path, operation);
        let bytes = path.to_bytes();
        let is_above = |other: &[u8]| other == bytes || other.starts_with(&[&bytes[..], b"/"].concat());
        let targets: Vec<Vec<u8>> = self
            .merged
            .paths()
            .filter(|target| !self.merged.is_directory(target) && !is_above(target))
            .cloned()
            .collect();
        let Some(target) = targets.get(operation.pick.index(targets.len().max(1))) else { return };
        self.in_order |= !self.merged.is_touched(target, self.number);
        let target = RelPath::parse(target).expect("it was a path before");
        self.push(path, EntryKind::HardLink { target }, Metadata::default(), Vec::new());
    }
}

impl RawMetadata {
    /// What anything may have: no attributes of users, no ACLs.
    fn special(&self) -> Metadata {
        let Self { permissions, uid, gid, mtime, .. } = *self;
        let xattrs = if self.trusted { vec![xattr(b"trusted.t", b"\0\x01")] } else { Vec::new() };
        Metadata { permissions, uid, gid, mtime, xattrs }
    }

    fn file(&self) -> Metadata {
        let mut metadata = self.special();
        if self.capability {
            // cap_net_raw+ep in revision 2 of struct vfs_cap_data.
            let value = [&[1, 0, 0, 2, 0, 0x20][..], &[0; 14]].concat();
            metadata.xattrs.push(xattr(b"security.capability", &value));
        }
        self.shared(&mut metadata);
        metadata
    }

    fn directory(&self) -> Metadata {
        let mut metadata = self.special();
        if self.default_acl {
            metadata.xattrs.push(xattr(b"system.posix_acl_default", &acl(0o750, 70_000)));
        }
        self.shared(&mut metadata);
        metadata
    }

    fn shared(&self, metadata: &mut Metadata) {
        if let Some(user) = self.user {
            metadata.xattrs.push(xattr(b"user.u", &[user]));
            if user < 40 {
                metadata.xattrs.push(xattr(b"user.long", &vec![user; 2000]));
                metadata.xattrs.push(xattr(b"user.empty", b""));
            }
        }
        if self.access_acl {
            // Says the same as the permissions, as the kernel would make it.
            metadata.xattrs.push(xattr(b"system.posix_acl_access", &acl(metadata.permissions, 12)));
        }
        metadata.xattrs.sort();
    }
}

fn xattr(name: &[u8], value: &[u8]) -> Xattr {
    Xattr { name: name.into(), value: value.into() }
}

/// The bytes of an ACL with one named user, whose mask and other entries are those of `permissions`.
fn acl(permissions: u16, user: u32) -> Vec<u8> {
    let (owner, mask, other) = (permissions >> 6 & 7, permissions >> 3 & 7, permissions & 7);
    let entries =
        [(1_u16, owner, u32::MAX), (2, 5, user), (4, 4, u32::MAX), (0x10, mask, u32::MAX), (0x20, other, u32::MAX)];
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, bits, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(bits.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}
