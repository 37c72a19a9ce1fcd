//! A tar writer for tests: ordinary entries in PAX form, and single headers with any field bent out of shape.
//!
//! Writes what it is told to, correct or not; it is not for making archives that anybody keeps.

use crate::model::{EntryKind, LayerEntry, RelPath, Timestamp};

/// Size of headers and the unit that contents are padded to.
pub const BLOCK: usize = 512;

/// Which magic a header carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Magic {
    /// None.
    V7,
    /// `ustar\0` `00`
    Ustar,
    /// `ustar  \0`
    Gnu,
}

/// The fields of one header, written as octal where they fit and in base 256 where not.
#[derive(Debug, Clone)]
pub struct RawHeader {
    /// At most 100 bytes are kept.
    pub path: Vec<u8>,
    /// At most 100 bytes are kept.
    pub link: Vec<u8>,
    /// At most 155 bytes are kept.
    pub prefix: Vec<u8>,
    /// Permissions.
    pub mode: i128,
    /// Owner.
    pub uid: i128,
    /// Group.
    pub gid: i128,
    /// Bytes that follow.
    pub size: i128,
    /// Whole seconds.
    pub mtime: i128,
    /// Type.
    pub type_flag: u8,
    /// Dialect.
    pub magic: Magic,
    /// Device numbers; spaces if absent.
    pub device: Option<(u32, u32)>,
    /// Bytes to lay over the finished header before its checksum is computed.
    pub patches: Vec<(usize, Vec<u8>)>,
}

impl RawHeader {
    /// A header with plain values.
    pub fn new(type_flag: u8, path: impl AsRef<[u8]>) -> Self {
        Self {
            path: path.as_ref().to_vec(),
            link: Vec::new(),
            prefix: Vec::new(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: 0,
            type_flag,
            magic: Magic::Ustar,
            device: None,
            patches: Vec::new(),
        }
    }

    /// The block, with its checksum.
    pub fn block(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        put(&mut block, 0, &self.path, 100);
        put(&mut block, 100, &number(self.mode, 8), 8);
        put(&mut block, 108, &number(self.uid, 8), 8);
        put(&mut block, 116, &number(self.gid, 8), 8);
        put(&mut block, 124, &number(self.size, 12), 12);
        put(&mut block, 136, &number(self.mtime, 12), 12);
        put(&mut block, 148, b"        ", 8);
        put(&mut block, 156, &[self.type_flag], 1);
        put(&mut block, 157, &self.link, 100);
        match self.magic {
            Magic::V7 => {}
            Magic::Ustar => put(&mut block, 257, b"ustar\x0000", 8),
            Magic::Gnu => put(&mut block, 257, b"ustar  \0", 8),
        }
        if let Some((major, minor)) = self.device {
            put(&mut block, 329, &number(major.into(), 8), 8);
            put(&mut block, 337, &number(minor.into(), 8), 8);
        }
        put(&mut block, 345, &self.prefix, 155);
        for (at, bytes) in &self.patches {
            put(&mut block, *at, bytes, BLOCK);
        }
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        put(&mut block, 148, format!("{sum:06o}\0 ").as_bytes(), 8);
        block
    }
}

fn put(block: &mut [u8; BLOCK], at: usize, bytes: &[u8], most: usize) {
    let len = bytes.len().min(most).min(BLOCK - at);
    block[at..at + len].copy_from_slice(&bytes[..len]);
}

/// A number field: octal with a NUL where it fits, else base 256.
pub fn number(value: i128, width: usize) -> Vec<u8> {
    let octal = format!("{value:0digits$o}", digits = width - 1);
    if value >= 0 && octal.len() < width {
        return [octal.as_bytes(), b"\0"].concat();
    }
    let mut bytes = value.to_be_bytes()[16 - width..].to_vec();
    bytes[0] = if value < 0 { 0xff } else { 0x80 };
    bytes
}

/// One PAX record.
pub fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let mut len = body + body.to_string().len();
    len = body + len.to_string().len();
    [format!("{len} ").as_bytes(), key, b"=", value, b"\n"].concat()
}

/// An archive in the making.
#[derive(Debug, Clone, Default)]
pub struct TarWriter {
    bytes: Vec<u8>,
    dotted: bool,
}

impl TarWriter {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// How long it is so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// True if nothing has been written.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Writes paths of further entries with `./` in front.
    pub fn dotted(&mut self) -> &mut Self {
        self.dotted = true;
        self
    }

    /// Any bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// A header as it is, then `body` with its padding. The header's size is not touched.
    pub fn raw(&mut self, header: &RawHeader, body: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(&header.block());
        self.body(body)
    }

    /// A header whose size becomes that of `body`.
    pub fn sized(&mut self, header: &RawHeader, body: &[u8]) -> &mut Self {
        let size = body.len() as i128;
        self.raw(&RawHeader { size, ..header.clone() }, body)
    }

    /// An extended header.
    pub fn pax<'a>(&mut self, records: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> &mut Self {
        let records: Vec<u8> = records.into_iter().flat_map(|(key, value)| pax_record(key, value)).collect();
        self.sized(&RawHeader::new(b'x', "PaxHeaders/x"), &records)
    }

    /// An entry as a PAX writer would put it: an extended header only for what the plain one cannot say.
    pub fn entry(&mut self, entry: &LayerEntry, content: &[u8]) -> &mut Self {
        self.entry_with_pieces(entry, &[(0, content)])
    }

    /// An entry whose content is given as pieces in order; anything but one piece from 0 to the end is written as a
    /// PAX 1.0 sparse file.
    pub fn entry_with_pieces(&mut self, entry: &LayerEntry, pieces: &[(u64, &[u8])]) -> &mut Self {
        let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        let mut say = |key: &str, value: Vec<u8>| records.push((key.as_bytes().to_vec(), value));
        let mut path = on_tape(entry);
        if self.dotted && path != b"." {
            path.splice(..0, *b"./");
        }
        let mut body: Vec<u8> = Vec::new();
        let mut header = RawHeader::new(flag(&entry.kind), b"");
        match &entry.kind {
            EntryKind::Regular { size } => {
                let is_whole =
                    matches!(pieces, [] | [(0, _)] if pieces.iter().map(|p| p.1.len() as u64).sum::<u64>() == *size);
                if !is_whole {
                    say("GNU.sparse.major", b"1".to_vec());
                    say("GNU.sparse.minor", b"0".to_vec());
                    say("GNU.sparse.name", path.clone());
                    say("GNU.sparse.realsize", size.to_string().into_bytes());
                    path = b"GNUSparseFile.0/sparse".to_vec();
                    body = format!("{}\n", pieces.len()).into_bytes();
                    for (offset, data) in pieces {
                        body.extend(format!("{offset}\n{}\n", data.len()).bytes());
                    }
                    body.resize(body.len().next_multiple_of(BLOCK), 0);
                }
                body.extend(pieces.iter().flat_map(|(_, data)| data.iter().copied()));
            }
            EntryKind::Symlink { target } => header.link = target.to_vec(),
            EntryKind::HardLink { target } => header.link = target.to_bytes(),
            EntryKind::CharDevice(device) | EntryKind::BlockDevice(device) => {
                header.device = Some((device.major, device.minor));
            }
            EntryKind::Directory => path.push(b'/'),
            EntryKind::Fifo | EntryKind::Whiteout | EntryKind::Opaque => {}
        }
        if path.len() > 100 {
            say("path", path.clone());
        }
        if header.link.len() > 100 {
            say("linkpath", header.link.clone());
        }
        let metadata = &entry.metadata;
        header.mode = metadata.permissions.into();
        (header.uid, header.gid) = (metadata.uid.into(), metadata.gid.into());
        for (key, id) in [("uid", &mut header.uid), ("gid", &mut header.gid)] {
            if *id >= 1 << 21 {
                say(key, id.to_string().into_bytes());
                *id = 0;
            }
        }
        let Timestamp { seconds, nanos } = metadata.mtime;
        if nanos != 0 || !(0..1 << 33).contains(&seconds) {
            say("mtime", decimal_time(metadata.mtime).into_bytes());
        } else {
            header.mtime = seconds.into();
        }
        for xattr in &metadata.xattrs {
            say(&format!("SCHILY.xattr.{}", String::from_utf8_lossy(&xattr.name)), xattr.value.to_vec());
        }
        if !records.is_empty() {
            self.pax(records.iter().map(|(key, value)| (&key[..], &value[..])));
        }
        header.path = path;
        self.sized(&header, &body)
    }

    /// The archive with its end: two blocks of zeros.
    pub fn finish(&self) -> Vec<u8> {
        [&self.bytes[..], &[0; 2 * BLOCK]].concat()
    }

    /// The archive without an end.
    pub fn unfinished(&self) -> Vec<u8> {
        self.bytes.clone()
    }

    fn body(&mut self, body: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(body);
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK), 0);
        self
    }
}

/// A time as PAX writes it.
pub fn decimal_time(time: Timestamp) -> String {
    let total = i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos);
    let sign = if total < 0 { "-" } else { "" };
    let (whole, fraction) = (total.unsigned_abs() / 1_000_000_000, total.unsigned_abs() % 1_000_000_000);
    if fraction == 0 { format!("{sign}{whole}") } else { format!("{sign}{whole}.{fraction:09}") }
}

/// The path an entry has in a tar: marks get their names back.
fn on_tape(entry: &LayerEntry) -> Vec<u8> {
    let in_directory = |directory: &RelPath, name: &[u8]| {
        let above = directory.to_bytes();
        if above.is_empty() { name.to_vec() } else { [&above[..], b"/", name].concat() }
    };
    match (&entry.kind, entry.path.parent().zip(entry.path.file_name())) {
        (EntryKind::Whiteout, Some((parent, name))) => in_directory(&parent, &[b".wh.", name.as_bytes()].concat()),
        (EntryKind::Opaque, _) => in_directory(&entry.path, b".wh..wh..opq"),
        (_, None) => b".".to_vec(),
        _ => entry.path.to_bytes(),
    }
}

fn flag(kind: &EntryKind) -> u8 {
    match kind {
        EntryKind::Regular { .. } | EntryKind::Whiteout | EntryKind::Opaque => b'0',
        EntryKind::HardLink { .. } => b'1',
        EntryKind::Symlink { .. } => b'2',
        EntryKind::CharDevice(_) => b'3',
        EntryKind::BlockDevice(_) => b'4',
        EntryKind::Directory => b'5',
        EntryKind::Fifo => b'6',
    }
}
