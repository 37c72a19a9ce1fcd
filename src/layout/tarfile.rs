//! A tar file as a table of contents: where each member's bytes lie, so that they are read in place.
//!
//! Nothing is unpacked, so paths can do no harm; those that climb are refused all the same, because no tool that writes
//! images makes them. Members, names and links are bounded. Knows nothing of layers: their content is `tar`'s affair.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::blob::BlobAt;
use super::error::LayoutError;
use crate::model::ByteRange;

const BLOCK: u64 = 512;
/// Most members: an image archive has three a layer and some; a store of a whole distribution some ten thousand.
const MEMBER_LIMIT: usize = 200_000;
/// Longest name or link target (Linux `PATH_MAX`).
const NAME_LIMIT: u64 = 4096;
/// Largest PAX record block: names, times and ids take some hundred bytes.
const PAX_LIMIT: u64 = 64 << 10;
/// Links in a row that are followed: `docker save` made one.
const LINK_LIMIT: usize = 8;

/// Where a member's content is.
#[derive(Debug, Clone)]
enum Member {
    /// In the archive.
    File(ByteRange),
    /// At another member, by its normalised path.
    Link(String),
}

/// The contents of a tar file.
#[derive(Debug)]
pub(super) struct TarFile {
    path: PathBuf,
    file: Arc<File>,
    members: HashMap<String, Member>,
}

/// What the headers before a member say about it.
#[derive(Default)]
struct Pending {
    name: Option<String>,
    link: Option<String>,
    size: Option<u64>,
}

impl TarFile {
    /// Reads the headers of the whole archive. `control` are paths that must not occur twice: which of two would count
    /// depends on the reader.
    pub(super) fn open(path: &Path, control: &[&str]) -> Result<Self, LayoutError> {
        let mut file = super::blob::open_regular(path).map_err(LayoutError::io("open the archive", path))?;
        let size = file.metadata().map_err(LayoutError::io("look at", path))?.len();
        let members = Index { path, size, control, members: HashMap::new() }.read(&mut file)?;
        Ok(Self { path: path.to_owned(), file: Arc::new(file), members })
    }

    /// Where the content of `name` is, links followed.
    pub(super) fn find(&self, name: &str) -> Result<Option<BlobAt>, LayoutError> {
        let Some(mut name) = normalise(name) else { return Ok(None) };
        for _ in 0..LINK_LIMIT {
            match self.members.get(&name) {
                None => return Ok(None),
                Some(Member::File(range)) => {
                    return Ok(Some(BlobAt::File { file: Arc::clone(&self.file), range: *range }));
                }
                Some(Member::Link(target)) => name.clone_from(target),
            }
        }
        let reason = format!("more than {LINK_LIMIT} links in a row end at {name:?}");
        Err(LayoutError::Archive { path: self.path.clone(), reason })
    }
}

struct Index<'a> {
    path: &'a Path,
    size: u64,
    control: &'a [&'a str],
    members: HashMap<String, Member>,
}

impl Index<'_> {
    fn bad(&self, reason: impl Into<String>) -> LayoutError {
        LayoutError::Archive { path: self.path.to_owned(), reason: reason.into() }
    }

    fn read(mut self, file: &mut File) -> Result<HashMap<String, Member>, LayoutError> {
        let mut at = 0_u64;
        let mut pending = Pending::default();
        let mut count = 0_usize;
        loop {
            let mut header = [0_u8; 512];
            if at == self.size && count > 0 {
                // Some writers leave out the two blocks of zeros.
                return Ok(self.members);
            }
            file.read_exact_at(&mut header, at).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => self.bad(format!("it ends inside the header at byte {at}")),
                _ => LayoutError::io("read", self.path)(error),
            })?;
            if header.iter().all(|byte| *byte == 0) {
                return Ok(self.members);
            }
            self.check_magic(&header, at)?;
            let own_size = number(&header[124..136]).ok_or_else(|| self.bad(format!("bad size at byte {at}")))?;
            let kind = header[156];
            // A PAX size is about the next ordinary member, not about the headers between.
            let is_header = matches!(kind, b'x' | b'g' | b'L' | b'K');
            let size = if is_header { own_size } else { pending.size.unwrap_or(own_size) };
            let body = at + BLOCK;
            let range = ByteRange::at(body, size).map_err(|_| self.bad(format!("bad size at byte {at}")))?;
            if range.end() > self.size {
                return Err(self.bad(format!("the member at byte {at} of {size} bytes is cut")));
            }
            match kind {
                b'L' => pending.name = Some(self.text(file, range)?),
                b'K' => pending.link = Some(self.text(file, range)?),
                b'x' => self.pax(file, range, &mut pending)?,
                b'g' => {}
                _ => {
                    let taken = std::mem::take(&mut pending);
                    let name = taken.name.unwrap_or_else(|| header_name(&header));
                    let link = taken.link.unwrap_or_else(|| text_of(&header[157..257]));
                    self.member(kind, &name, &link, range)?;
                }
            }
            count += 1;
            if count > MEMBER_LIMIT {
                return Err(self.bad(format!("it has more than {MEMBER_LIMIT} members")));
            }
            // Directories and links have no body, whatever their size says.
            let length = if matches!(kind, b'1' | b'2' | b'5') { 0 } else { size };
            at = body + length.div_ceil(BLOCK) * BLOCK;
        }
    }

    fn check_magic(&self, header: &[u8; 512], at: u64) -> Result<(), LayoutError> {
        let sum: u64 =
            header.iter().enumerate().map(|(i, b)| u64::from(if (148..156).contains(&i) { b' ' } else { *b })).sum();
        if number(&header[148..156]) == Some(sum) {
            return Ok(());
        }
        let compressed = match header {
            [0x1f, 0x8b, ..] => Some("gzip"),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some("zstd"),
            [0xfd, b'7', b'z', b'X', b'Z', ..] => Some("xz"),
            [b'B', b'Z', b'h', ..] => Some("bzip2"),
            _ => None,
        };
        Err(match compressed.filter(|_| at == 0) {
            Some(how) => self.bad(format!("it is compressed with {how}; decompress it first")),
            None if at == 0 => self.bad("it is no tar"),
            None => self.bad(format!("the header at byte {at} has a wrong checksum")),
        })
    }

    fn text(&self, file: &mut File, range: ByteRange) -> Result<String, LayoutError> {
        // One more for the NUL at its end.
        if range.len() > NAME_LIMIT + 1 {
            return Err(self.bad(format!("a name of {} bytes is too long", range.len())));
        }
        Ok(text_of(&self.bytes(file, range)?))
    }

    fn bytes(&self, file: &mut File, range: ByteRange) -> Result<Vec<u8>, LayoutError> {
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(range.start())).map_err(LayoutError::io("read", self.path))?;
        file.take(range.len()).read_to_end(&mut bytes).map_err(LayoutError::io("read", self.path))?;
        Ok(bytes)
    }

    /// `LENGTH KEY=VALUE\n` (POSIX pax, *pax Extended Header*).
    fn pax(&self, file: &mut File, range: ByteRange, pending: &mut Pending) -> Result<(), LayoutError> {
        if range.len() > PAX_LIMIT {
            return Err(self.bad(format!("a PAX header of {} bytes is too long", range.len())));
        }
        let bytes = self.bytes(file, range)?;
        let mut rest = bytes.as_slice();
        let bad = || self.bad("a PAX header is malformed");
        while !rest.is_empty() {
            let blank = rest.iter().position(|b| *b == b' ').ok_or_else(bad)?;
            let length = std::str::from_utf8(&rest[..blank]).ok().and_then(|n| n.parse::<usize>().ok());
            let length = length.filter(|length| *length > blank + 1 && *length <= rest.len()).ok_or_else(bad)?;
            let (record, after) = rest.split_at(length);
            rest = after;
            let record = record[blank + 1..].strip_suffix(b"\n").ok_or_else(bad)?;
            let equals = record.iter().position(|b| *b == b'=').ok_or_else(bad)?;
            let value = String::from_utf8_lossy(&record[equals + 1..]).into_owned();
            match &record[..equals] {
                b"path" => pending.name = Some(value),
                b"linkpath" => pending.link = Some(value),
                b"size" => pending.size = Some(value.parse().map_err(|_| bad())?),
                key if key.starts_with(b"GNU.sparse.") => return Err(self.bad("a member is sparse")),
                _ => {}
            }
        }
        Ok(())
    }

    fn member(&mut self, kind: u8, name: &str, link: &str, range: ByteRange) -> Result<(), LayoutError> {
        if name.len() as u64 > NAME_LIMIT || link.len() as u64 > NAME_LIMIT {
            return Err(self.bad("a name is too long"));
        }
        let climbs = |name: &str| self.bad(format!("the path {name:?} leads out of it"));
        let normal = normalise(name).ok_or_else(|| climbs(name))?;
        let member = match kind {
            b'0' | 0 | b'7' => Member::File(range),
            b'1' => Member::Link(normalise(link).ok_or_else(|| climbs(link))?),
            // Relative to the directory the link is in.
            b'2' => {
                let directory = normal.rsplit_once('/').map_or("", |(directory, _)| directory);
                let target = if link.starts_with('/') { link.to_owned() } else { format!("{directory}/{link}") };
                Member::Link(normalise(&target).ok_or_else(|| climbs(link))?)
            }
            b'S' => return Err(self.bad(format!("the member {name:?} is sparse"))),
            // Directories, devices and what else there may be hold no blob.
            _ => return Ok(()),
        };
        if self.members.contains_key(&normal) && self.control.contains(&normal.as_str()) {
            return Err(self.bad(format!("{normal:?} stands in it twice")));
        }
        self.members.insert(normal, member);
        Ok(())
    }
}

/// A path without `.`, empty parts and inner `..`; none if it climbs out.
fn normalise(path: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

fn text_of(field: &[u8]) -> String {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

fn header_name(header: &[u8; 512]) -> String {
    let name = text_of(&header[..100]);
    // GNU uses the prefix field for other things.
    if &header[257..263] == b"ustar\0" && header[345] != 0 {
        return format!("{}/{name}", text_of(&header[345..500]));
    }
    name
}

/// Octal digits, or base 256 if the top bit is set.
fn number(field: &[u8]) -> Option<u64> {
    let (first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        if *first != 0x80 {
            return None;
        }
        return rest.iter().try_fold(0_u64, |value, byte| Some(value.checked_mul(256)? + u64::from(*byte)));
    }
    let text = std::str::from_utf8(field).ok()?.trim_matches(['\0', ' ']);
    if text.is_empty() { Some(0) } else { u64::from_str_radix(text, 8).ok() }
}

/// The header of a regular file, and how many zeros follow its content.
pub(super) fn header(name: &str, size: u64) -> Option<([u8; 512], usize)> {
    let mut header = [0_u8; 512];
    header.get_mut(..100)?.get_mut(..name.len())?.copy_from_slice(name.as_bytes());
    header[100..108].copy_from_slice(b"0000644\0");
    header[108..116].copy_from_slice(b"0000000\0");
    header[116..124].copy_from_slice(b"0000000\0");
    if size < 1 << 33 {
        header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    } else {
        header[124] = 0x80;
        header[128..136].copy_from_slice(&size.to_be_bytes());
    }
    header[136..148].copy_from_slice(b"00000000000\0");
    header[156] = b'0';
    header[257..265].copy_from_slice(b"ustar\x0000");
    header[148..156].fill(b' ');
    let sum: u64 = header.iter().map(|b| u64::from(*b)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let padding = usize::try_from(size.next_multiple_of(BLOCK) - size).ok()?;
    Some((header, padding))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn member(name: &str, kind: u8, link: &str, content: &[u8]) -> Vec<u8> {
        let (mut header, padding) = header(name, content.len() as u64).unwrap();
        header[156] = kind;
        header[157..157 + link.len()].copy_from_slice(link.as_bytes());
        fix_sum(&mut header);
        [&header[..], content, &vec![0; padding]].concat()
    }

    fn fix_sum(header: &mut [u8; 512]) {
        header[148..156].fill(b' ');
        let sum: u64 = header.iter().map(|b| u64::from(*b)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }

    fn open(members: &[Vec<u8>]) -> Result<TarFile, LayoutError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&members.concat()).unwrap();
        TarFile::open(file.path(), &["index.json"])
    }

    fn content(archive: &TarFile, name: &str) -> Option<Vec<u8>> {
        archive.find(name).unwrap().map(|found| found.read_all(1 << 20).unwrap())
    }

    #[test]
    fn members_are_found_where_they_lie() {
        let long = format!("a/{}", "n".repeat(150));
        let record = format!("path={}/x\n", "p".repeat(120));
        let record = format!("{} {record}", record.len() + 4);
        let archive = open(&[
            member("./oci-layout", b'0', "", b"one"),
            member("dir/", b'5', "", b""),
            member("x", b'L', "", format!("{long}\0").as_bytes()),
            member("short", b'0', "", b"two"),
            member("pax", b'x', "", record.as_bytes()),
            member("short", 0, "", b"three"),
            member("dir/link", b'2', "../oci-layout", b""),
            member("dir/hard", b'1', "./oci-layout", b""),
            vec![0; 1024],
        ])
        .unwrap();
        for (name, expected) in [
            ("oci-layout", Some("one")),
            ("/./oci-layout", Some("one")),
            (long.as_str(), Some("two")),
            (&format!("{}/x", "p".repeat(120)), Some("three")),
            ("dir/link", Some("one")),
            ("dir/hard", Some("one")),
            ("dir", None),
            ("missing", None),
            ("../oci-layout", None),
        ] {
            assert_eq!(content(&archive, name).as_deref(), expected.map(str::as_bytes), "{name}");
        }
    }

    #[test]
    fn broken_and_hostile_archives_are_refused() {
        let mut big = member("blob", b'0', "", b"");
        big[124..136].copy_from_slice(&[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        let mut big: [u8; 512] = big.try_into().unwrap();
        fix_sum(&mut big);
        let mut flipped = member("a", b'0', "", b"");
        flipped[3] ^= 1;
        let gz = [&[0x1f, 0x8b][..], &[0; 600]].concat();
        for (members, message) in [
            (vec![vec![]], "ends inside the header at byte 0"),
            (vec![vec![b'x'; 2000]], "it is no tar"),
            (vec![gz], "compressed with gzip"),
            (vec![member("a", b'0', "", b"abc")[..513].to_vec()], "is cut"),
            (vec![big.to_vec()], "bad size"),
            (vec![member("a", b'0', "", b""), flipped], "wrong checksum"),
            (vec![member("../a", b'0', "", b"")], "leads out of it"),
            (vec![member("a/l", b'2', "../../etc/passwd", b"")], "leads out of it"),
            (vec![member("index.json", b'0', "", b"1"), member("./index.json", b'0', "", b"2")], "stands in it twice"),
            (vec![member("a", b'S', "", b"")], "is sparse"),
            (vec![member("a", b'L', "", &[b'x'; 5000])], "too long"),
            (vec![member("a", b'x', "", b"99 path=x\n")], "malformed"),
            (vec![member("a", b'x', "", b"11 size=-1\n")], "malformed"),
        ] {
            let error = open(&members).expect_err(message).to_string();
            assert!(error.contains(message), "{error} instead of {message}");
        }
        let circle = open(&[member("a", b'2', "b", b""), member("b", b'2', "a", b""), vec![0; 1024]]).unwrap();
        assert!(circle.find("a").unwrap_err().to_string().contains("links in a row"));
    }

    #[test]
    fn large_sizes_survive_the_header() {
        for size in [0, 1, (1 << 33) - 1, 1 << 33, 1 << 40] {
            let (header, padding) = header("x", size).unwrap();
            assert_eq!(number(&header[124..136]), Some(size));
            assert_eq!((size + padding as u64) % BLOCK, 0);
        }
    }
}
