//! The stream of entries.
//!
//! One pass, forward only. What is kept at any time: one header, the records of one entry, the map of one sparse file;
//! each has a limit in `mod.rs`. Content goes straight from the source into the caller's buffer.

use std::io::Read;

use super::MAX_RECORDS;
use super::acl::{self, Acl};
use super::body::{Body, Run};
use super::error::{Part, Problem, TarError, shorten};
use super::fields::{Kind, device, within, xattr};
use super::header::{self, BLOCK, Block, Header};
use super::pax::Pax;
use super::place::{Place, hard_link_target, place, symlink_target};
use super::source::Source;
use super::sparse::{Lines, SparseMap};
use crate::model::{EntryKind, LayerEntry, Metadata, RelPath, Tally, Timestamp};

/// What was left out because the layer alone does not tell what it means.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dropped {
    /// ACLs that name users or groups without their numbers. The engines that unpack layers read no text ACLs.
    pub unresolved_acls: Tally,
    /// Entries below AUFS's own names (`.wh..wh.` and anything but `opq`).
    pub aufs_entries: u64,
}

/// Reads a layer tar entry by entry.
///
/// After [`next_entry`](Self::next_entry) gave a regular file, its content may be read with
/// [`read_body`](Self::read_body) and [`next_run`](Self::next_run) in any mixture; what is left unread is passed over.
/// After an error the reader gives no more entries.
#[derive(Debug)]
pub struct Reader<R> {
    source: Source<R>,
    body: Body,
    /// Read while looking ahead, not yet taken: always at the place of a header.
    ahead: Option<Box<Block>>,
    /// An `x` record came before some entry: hard links may have contents (POSIX 2001).
    is_pax: bool,
    dropped: Dropped,
    done: bool,
}

/// What the headers before an entry said about it.
#[derive(Debug, Default)]
struct Extended {
    pax: Option<Pax>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<R: Read> Reader<R> {
    /// Reads from the start of a tar, which must not be compressed. Headers are read one by one: give a buffered source.
    pub fn new(source: R) -> Self {
        Self {
            source: Source { inner: source, offset: 0 },
            body: Body::default(),
            ahead: None,
            is_pax: false,
            dropped: Dropped::default(),
            done: false,
        }
    }

    /// The next entry, none after the last.
    ///
    /// The tar ends with two blocks of zeros, after which anything may follow, or with the source itself between two
    /// entries (engines allow it; a cut there shows in the layer's digest alone). Not seen by the caller: global
    /// headers, whose values engines ignore; extended headers and long names, which become part of their entry; AUFS's
    /// own files.
    ///
    /// # Errors
    /// [`TarError`] with the offset of the header it concerns.
    pub fn next_entry(&mut self) -> Result<Option<LayerEntry>, TarError> {
        if self.done {
            return Ok(None);
        }
        let entry = self.advance();
        self.done = !matches!(entry, Ok(Some(_)));
        entry
    }

    /// Fills `buf` from the content of the current regular file, holes as zeros. Returns 0 at its end (or for an empty
    /// `buf`); may return less than there is room for.
    ///
    /// # Errors
    /// The source fails or ends.
    pub fn read_body(&mut self, buf: &mut [u8]) -> Result<usize, TarError> {
        let (run, is_data) = match self.body.run() {
            None => return Ok(0),
            Some(Run::Hole(len)) => (len, false),
            Some(Run::Data(len)) => (len, true),
        };
        let len = usize::try_from(run).map_or(buf.len(), |run| run.min(buf.len()));
        let buf = buf.get_mut(..len).unwrap_or_default();
        if !is_data {
            buf.fill(0);
            self.body.hand_out(buf.len() as u64);
            return Ok(buf.len());
        }
        let read = self.source.read(buf).map_err(|error| self.source.error(error))?;
        if read == 0 && !buf.is_empty() {
            return Err(self.source.error(Problem::Cut(Part::Content)));
        }
        self.body.hand_out(read as u64);
        self.body.stored -= read as u64;
        Ok(read)
    }

    /// What comes next in the content of the current regular file, none at its end. A hole is passed over by asking;
    /// data stays where it is until it has been read with [`read_body`](Self::read_body).
    pub fn next_run(&mut self) -> Option<Run> {
        let run = self.body.run();
        if let Some(Run::Hole(len)) = run {
            self.body.hand_out(len);
        }
        run
    }

    /// How many bytes of the tar have been read.
    pub fn offset(&self) -> u64 {
        self.source.offset
    }

    /// What has been left out so far.
    pub fn dropped(&self) -> &Dropped {
        &self.dropped
    }

    /// Gives back the source, which stands wherever reading stopped.
    pub fn into_inner(self) -> R {
        self.source.inner
    }

    fn advance(&mut self) -> Result<Option<LayerEntry>, TarError> {
        let mut extended = Extended::default();
        let mut extended_at = None;
        loop {
            self.skip_body()?;
            let Some((offset, block)) = self.next_block()? else {
                return match extended_at {
                    None => Ok(None),
                    Some(_) => Err(self.source.error(Problem::Cut(Part::Entry))),
                };
            };
            let at = |path: Option<String>| move |problem| TarError { offset, path, problem };
            let header = Header::check(&block).map_err(at(None))?;
            let is_extension = match header.type_flag() {
                b'x' => {
                    let records = self.records(header, offset)?;
                    extended.pax = Some(Pax::parse(&records).map_err(at(None))?);
                    self.is_pax = true;
                    true
                }
                b'g' => {
                    let records = self.records(header, offset)?;
                    Pax::parse(&records).map_err(at(None))?;
                    continue;
                }
                b'L' => {
                    let name = self.records(header, offset)?;
                    extended.long_name = Some(header::text(&name).to_vec());
                    true
                }
                b'K' => {
                    let name = self.records(header, offset)?;
                    extended.long_link = Some(header::text(&name).to_vec());
                    true
                }
                _ => false,
            };
            if is_extension {
                extended_at.get_or_insert(offset);
                continue;
            }
            let found = std::mem::take(&mut extended);
            extended_at = None;
            let path = path_bytes(header, &found);
            let entry = self.entry(header, found, &path).map_err(|error| match error {
                Stop::Problem(problem) => at(Some(shorten(&path)))(problem),
                Stop::Located(error) => TarError { path: Some(shorten(&path)), ..error },
            })?;
            if let Some(entry) = entry {
                return Ok(Some(entry));
            }
        }
    }

    /// The next header block that is not the end, with its offset.
    fn next_block(&mut self) -> Result<Option<(u64, Box<Block>)>, TarError> {
        let mut zeros = false;
        loop {
            let block = match self.ahead.take() {
                Some(block) => block,
                None => match self.source.block(Part::Header)? {
                    Some(block) => block,
                    None => return Ok(None),
                },
            };
            let offset = self.source.offset - BLOCK as u64;
            match (block.iter().all(|byte| *byte == 0), zeros) {
                (true, true) => return Ok(None),
                (true, false) => zeros = true,
                (false, true) => return Err(TarError { offset, path: None, problem: Problem::LoneZeroBlock }),
                (false, false) => return Ok(Some((offset, block))),
            }
        }
    }

    /// The content of an extended header or long name.
    fn records(&mut self, header: Header<'_>, offset: u64) -> Result<Vec<u8>, TarError> {
        let at = |problem| TarError { offset, path: None, problem };
        let size = header.size().and_then(|size| within("size", size, 0, i64::MAX)).map_err(at)?;
        let size = size.unsigned_abs();
        if size > MAX_RECORDS {
            return Err(at(Problem::RecordsTooLong { size, limit: MAX_RECORDS }));
        }
        let mut records = Vec::new();
        self.source.read_to(size, &mut records, Part::Extension)?;
        self.body = Body::padding_of(size);
        Ok(records)
    }

    /// One entry from its header and what was said before it; none if it is to be passed over.
    fn entry(&mut self, header: Header<'_>, extended: Extended, path: &[u8]) -> Result<Option<LayerEntry>, Stop> {
        let kind = Kind::of(header, path)?;
        let mut pax = extended.pax.unwrap_or_default();
        let header_size = within("size", header.size()?, 0, i64::MAX)?.unsigned_abs();
        let stored = pax.size.unwrap_or(header_size);
        within("size", i128::from(stored), 0, i64::MAX)?;

        let place = place(path)?;
        // The content must be passed over even where the entry means nothing.
        self.body = match kind {
            Kind::Regular => Body::plain(stored),
            Kind::HardLink if stored > 0 => self.link_content(stored)?,
            _ => Body::default(),
        };
        let content = if kind == Kind::Regular { self.sparse_content(header, &mut pax, stored)? } else { 0 };
        if !matches!(place, Place::File(_)) {
            self.body.hide();
        }

        let path = match place {
            Place::Aufs => {
                self.dropped.aufs_entries += 1;
                return Ok(None);
            }
            Place::Opaque(path) => {
                return Ok(Some(LayerEntry { path, kind: EntryKind::Opaque, metadata: Metadata::default() }));
            }
            Place::Whiteout(path) => {
                return Ok(Some(LayerEntry { path, kind: EntryKind::Whiteout, metadata: Metadata::default() }));
            }
            Place::File(path) => path,
        };
        if path.is_root() && kind != Kind::Directory {
            return Err(Problem::RootIsNoDirectory(kind.name()).into());
        }
        let link = extended.long_link.or(pax.link_path.take());
        let link = link.as_deref().unwrap_or_else(|| header.link_name());
        let kind = match kind {
            Kind::Directory => EntryKind::Directory,
            Kind::Regular => EntryKind::Regular { size: content },
            Kind::Symlink => EntryKind::Symlink { target: symlink_target(link)? },
            Kind::HardLink => EntryKind::HardLink { target: hard_link_target(link)? },
            Kind::CharDevice => EntryKind::CharDevice(device(header, &pax)?),
            Kind::BlockDevice => EntryKind::BlockDevice(device(header, &pax)?),
            Kind::Fifo => EntryKind::Fifo,
        };
        let metadata = match kind {
            EntryKind::HardLink { .. } => Metadata::default(),
            // Linux shows no other permissions of a symbolic link, whatever the tar says.
            EntryKind::Symlink { .. } => Metadata { permissions: 0o777, ..self.metadata(header, pax, &path)? },
            _ => self.metadata(header, pax, &path)?,
        };
        Ok(Some(LayerEntry { path, kind, metadata }))
    }

    /// Sets the body up for a sparse file, if it is one. Returns the file's size.
    fn sparse_content(&mut self, header: Header<'_>, pax: &mut Pax, stored: u64) -> Result<u64, Stop> {
        if header.type_flag() == b'S' {
            let size = within("realsize", header.real_size()?, 0, i64::MAX)?.unsigned_abs();
            let (pieces, mut more) = header.sparse_pieces();
            let mut map = SparseMap::default();
            map.push_old_gnu(pieces)?;
            while more {
                let block = self.source.block(Part::SparseMap)?.ok_or_else(|| self.cut(Part::SparseMap))?;
                let (pieces, another) = header::sparse_extension(&block);
                map.push_old_gnu(pieces)?;
                more = another;
            }
            self.body = Body::sparse(size, stored, map.finish(size, stored)?);
            return Ok(size);
        }
        let sparse = &mut pax.sparse;
        let version = (sparse.major.as_deref(), sparse.minor.as_deref());
        let (map, stored) = match version {
            (None, None) if sparse.map.is_none() => return Ok(stored),
            (None, None) | (Some(b"0"), Some(b"0" | b"1")) => (sparse.map.take().unwrap_or_default(), stored),
            (Some(b"1"), Some(b"0")) => {
                let mut lines = Lines::default();
                let mut left = stored;
                loop {
                    left = left
                        .checked_sub(BLOCK as u64)
                        .ok_or(Problem::BadSparseMap("the stored content ends before the map does"))?;
                    let block = self.source.block(Part::SparseMap)?.ok_or_else(|| self.cut(Part::SparseMap))?;
                    if lines.take(&block)? {
                        break (lines.finish(), left);
                    }
                }
            }
            (major, minor) => {
                let text = |field: Option<&[u8]>| field.map_or_else(|| "?".to_owned(), shorten);
                return Err(Problem::SparseVersion { major: text(major), minor: text(minor) }.into());
            }
        };
        let size = sparse.real_size.ok_or(Problem::BadSparseMap("the file's size is missing"))?;
        within("GNU.sparse.size", i128::from(size), 0, i64::MAX)?;
        self.body = Body::sparse(size, stored, map.finish(size, stored)?);
        Ok(size)
    }

    /// What to pass over after a hard link with a size. POSIX 1988 writers give a size without content, POSIX 2001 (PAX)
    /// writers may give both, and only the next block tells: content does not look like a header.
    fn link_content(&mut self, stored: u64) -> Result<Body, TarError> {
        if !self.is_pax {
            return Ok(Body::default());
        }
        let Some(block) = self.source.block(Part::Content)? else { return Ok(Body::default()) };
        if Header::check(&block).is_ok() || block.iter().all(|byte| *byte == 0) {
            self.ahead = Some(block);
            return Ok(Body::default());
        }
        let mut whole = Body::padding_of(stored);
        match stored.checked_sub(BLOCK as u64) {
            Some(rest) => whole.stored = rest,
            None => return Ok(Body::default()),
        }
        Ok(whole)
    }

    fn metadata(&mut self, header: Header<'_>, mut pax: Pax, path: &RelPath) -> Result<Metadata, Stop> {
        let mode = header.mode()?;
        let id = |field, pax: Option<i128>, header: Result<i128, Problem>| {
            // The greatest number is `-1` to chown(2): no owner at all.
            let id = within(field, pax.map_or(header, Ok)?, 0, i64::from(u32::MAX - 1))?;
            u32::try_from(id).map_err(|_| Problem::OutOfRange { field, value: id.into(), min: 0, max: u32::MAX.into() })
        };
        let uid = id("uid", pax.uid, header.uid())?;
        let gid = id("gid", pax.gid, header.gid())?;
        let mtime = match pax.mtime {
            Some(mtime) => mtime,
            None => Timestamp { seconds: within("mtime", header.mtime()?, i64::MIN, i64::MAX)?, nanos: 0 },
        };
        for (name, text, default) in [
            (&b"system.posix_acl_access"[..], pax.acl_access.take(), false),
            (b"system.posix_acl_default", pax.acl_default.take(), true),
        ] {
            let Some(text) = text else { continue };
            match acl::parse(&text, default)? {
                Acl::Binary(value) => {
                    pax.xattrs.entry(name.to_vec()).or_insert(value);
                }
                Acl::Trivial => {}
                Acl::Unresolved => {
                    self.dropped.unresolved_acls.add(path);
                }
            }
        }
        let xattrs = pax.xattrs.into_iter().map(|(name, value)| xattr(name, value)).collect::<Result<_, _>>()?;
        let permissions = u16::try_from(mode & 0o7777).unwrap_or_default();
        Ok(Metadata { permissions, uid, gid, mtime, xattrs })
    }

    /// Passes over what is left of the current entry.
    fn skip_body(&mut self) -> Result<(), TarError> {
        let body = std::mem::take(&mut self.body);
        self.source.skip(body.stored, Part::Content)?;
        // The padding of the very last entry may be missing.
        self.source.skip_what_is_there(body.padding)
    }

    fn cut(&self, part: Part) -> TarError {
        self.source.error(Problem::Cut(part))
    }
}

/// Why an entry could not be read: with or without its place known already.
enum Stop {
    Problem(Problem),
    Located(TarError),
}

impl From<Problem> for Stop {
    fn from(problem: Problem) -> Self {
        Self::Problem(problem)
    }
}

impl From<TarError> for Stop {
    fn from(error: TarError) -> Self {
        Self::Located(error)
    }
}

/// The path as written, from wherever it is written.
fn path_bytes(header: Header<'_>, extended: &Extended) -> Vec<u8> {
    let pax = extended.pax.as_ref();
    pax.and_then(|pax| pax.sparse.name.clone())
        .or_else(|| extended.long_name.clone())
        .or_else(|| pax.and_then(|pax| pax.path.clone()))
        .unwrap_or_else(|| header.path())
}
