//! Directories: blocks of sorted names, searched by halves.

use std::cmp::Ordering;

use super::ondisk::{self, DIRENT_SIZE, Dirent, NID_METABOX_BIT};
use super::{Defect, Error, Image, Inode, Nid};
use crate::model::{FileKind, Name, ReadAt};

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name; never `.` or `..`.
    pub name: Name,
    /// The file.
    pub nid: Nid,
    /// The file's type as the directory tells it; the inode has the last word. None if the directory does not say.
    pub kind: Option<FileKind>,
}

/// The names of one directory block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirPage {
    /// In the order of the image, which is that of their bytes. May be empty.
    pub entries: Vec<DirEntry>,
    /// Where to read on; none after the last page.
    pub next: Option<u64>,
}

/// One block of a directory. Entries are judged one by one: a search by halves looks at few of them.
pub(crate) struct DirBlock {
    directory: Inode,
    number: u64,
    bytes: Vec<u8>,
    /// Number of entries, at least 1. The table of them lies inside of the block, and something follows it.
    count: usize,
}

/// An entry as it stands in a block, `.` and `..` included, with a name that may be impossible.
pub(crate) struct RawEntry<'a> {
    pub(crate) name: &'a [u8],
    pub(crate) dirent: Dirent,
}

impl RawEntry<'_> {
    /// Which of the two dot entries this is.
    pub(crate) fn dot(&self) -> Option<&'static str> {
        match self.name {
            b"." => Some("."),
            b".." => Some(".."),
            _ => None,
        }
    }
}

impl DirBlock {
    fn parse(directory: &Inode, number: u64, bytes: Vec<u8>) -> Result<Self, Error> {
        let table = bytes.first_chunk().map_or(0, |first| usize::from(Dirent::decode(first).name_offset));
        let block = Self { directory: *directory, number, count: table / DIRENT_SIZE, bytes };
        if table == 0 || table % DIRENT_SIZE != 0 || table >= block.bytes.len() {
            return Err(block.wrong());
        }
        Ok(block)
    }

    fn wrong(&self) -> Error {
        self.directory.corrupt(Defect::NameOffsets { block: self.number })
    }

    fn dirent(&self, index: usize) -> Option<Dirent> {
        self.bytes.get(index.checked_mul(DIRENT_SIZE)?..)?.first_chunk().map(Dirent::decode)
    }

    /// Entry `index` of `0..count`. Its name is not empty, and lies behind the table.
    fn get(&self, index: usize) -> Result<RawEntry<'_>, Error> {
        let dirent = self.dirent(index).ok_or_else(|| self.wrong())?;
        let start = usize::from(dirent.name_offset);
        let name = if index + 1 < self.count {
            let end = self.dirent(index + 1).map(|next| usize::from(next.name_offset));
            end.and_then(|end| self.bytes.get(start..end))
        } else {
            self.bytes.get(start..).and_then(|rest| rest.split(|byte| *byte == 0).next())
        };
        match name {
            Some(name) if !name.is_empty() && start >= self.count * DIRENT_SIZE => Ok(RawEntry { name, dirent }),
            _ => Err(self.wrong()),
        }
    }

    pub(crate) fn entries(&self) -> impl Iterator<Item = Result<RawEntry<'_>, Error>> {
        (0..self.count).map(|index| self.get(index))
    }

    /// Searches by halves.
    fn find(&self, name: &[u8]) -> Result<Option<RawEntry<'_>>, Error> {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            let entry = self.get(middle)?;
            match entry.name.cmp(name) {
                Ordering::Equal => return Ok(Some(entry)),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }
}

impl Inode {
    pub(crate) fn expect_directory(&self) -> Result<(), Error> {
        match self.attributes.kind {
            FileKind::Directory => Ok(()),
            found => Err(Error::WrongKind { nid: self.nid, wanted: "directory", found }),
        }
    }

    fn entry(&self, raw: &RawEntry<'_>) -> Result<DirEntry, Error> {
        let name = Name::new(raw.name).map_err(|error| self.corrupt(error))?;
        if raw.dirent.nid & NID_METABOX_BIT != 0 {
            return Err(self.corrupt(Defect::MetaboxNid(raw.dirent.nid)));
        }
        Ok(DirEntry { name, nid: Nid(raw.dirent.nid), kind: ondisk::kind_of_file_type(raw.dirent.file_type) })
    }
}

impl<R: ReadAt> Image<R> {
    /// Finds a name in a directory. `.` and `..` are no names.
    ///
    /// # Errors
    /// [`Error::WrongKind`] if it is no directory; else see [`Error`].
    pub fn lookup(&self, directory: &Inode, name: &[u8]) -> Result<Option<DirEntry>, Error> {
        if Name::check(name).is_err() {
            directory.expect_directory()?;
            return Ok(None);
        }
        self.search(directory, name, |raw| directory.entry(raw))?.transpose()
    }

    /// Finds an entry by halves, `.` and `..` included, and takes from it what `take` does.
    fn search<T>(&self, directory: &Inode, name: &[u8], take: impl Fn(&RawEntry<'_>) -> T) -> Result<Option<T>, Error> {
        let (mut low, mut high) = (0, self.dir_blocks(directory)?);
        while low < high {
            let middle = low + (high - low) / 2;
            let block = self.dir_block(directory, middle)?;
            if name < block.get(0)?.name {
                high = middle;
            } else if name > block.get(block.count - 1)?.name {
                low = middle + 1;
            } else {
                return Ok(block.find(name)?.map(|entry| take(&entry)));
            }
        }
        Ok(None)
    }

    /// The directory that holds a directory: its `..`. The root's is the root.
    ///
    /// # Errors
    /// [`Error::WrongKind`] if it is no directory; [`Error::Corrupt`] if it has no `..`; else see [`Error`].
    pub fn parent(&self, directory: &Inode) -> Result<Nid, Error> {
        let nid = self.search(directory, b"..", |raw| raw.dirent.nid)?;
        match nid.ok_or_else(|| directory.corrupt(Defect::NoParent))? {
            nid if nid & NID_METABOX_BIT != 0 => Err(directory.corrupt(Defect::MetaboxNid(nid))),
            nid => Ok(Nid(nid)),
        }
    }

    /// One page of a directory's names: `from` is 0 or what [`DirPage::next`] said.
    ///
    /// # Errors
    /// [`Error::WrongKind`] if it is no directory; [`Error::Corrupt`] if a name is impossible or not sorted; else see
    /// [`Error`].
    pub fn read_dir(&self, directory: &Inode, from: u64) -> Result<DirPage, Error> {
        let blocks = self.dir_blocks(directory)?;
        if from >= blocks {
            return Ok(DirPage { entries: Vec::new(), next: None });
        }
        let mut entries = Vec::new();
        self.collect(directory, from, &mut Vec::new(), &mut entries)?;
        Ok(DirPage { entries, next: (from + 1 < blocks).then_some(from + 1) })
    }

    /// All names of a directory, sorted, none twice.
    ///
    /// # Errors
    /// As [`Image::read_dir`].
    pub fn entries(&self, directory: &Inode) -> Result<Vec<DirEntry>, Error> {
        let (mut last, mut entries) = (Vec::new(), Vec::new());
        for number in 0..self.dir_blocks(directory)? {
            // Order across blocks also bounds the whole: a directory whose blocks are the same bytes again and again
            // ends here.
            self.collect(directory, number, &mut last, &mut entries)?;
        }
        Ok(entries)
    }

    /// Adds the entries of one block to `entries`. Every name, the dots included, must be greater than `last`, which
    /// becomes the last one of the block.
    fn collect(
        &self,
        directory: &Inode,
        number: u64,
        last: &mut Vec<u8>,
        entries: &mut Vec<DirEntry>,
    ) -> Result<(), Error> {
        let block = self.dir_block(directory, number)?;
        entries.reserve(block.count);
        let mut before = &**last;
        for raw in block.entries() {
            let raw = raw?;
            if raw.name <= before {
                return Err(unsorted(directory, raw.name));
            }
            before = raw.name;
            if raw.dot().is_none() {
                entries.push(directory.entry(&raw)?);
            }
        }
        *last = before.to_owned();
        Ok(())
    }

    /// How many blocks a directory has.
    pub(crate) fn dir_blocks(&self, directory: &Inode) -> Result<u64, Error> {
        directory.expect_directory()?;
        let size = directory.attributes.size;
        if size > self.total_size() {
            return Err(directory.corrupt(Defect::DirectorySize { size }));
        }
        Ok(size.div_ceil(self.superblock().dir_block_size()))
    }

    /// Block `number` of a directory.
    pub(crate) fn dir_block(&self, directory: &Inode, number: u64) -> Result<DirBlock, Error> {
        let block_size = self.superblock().dir_block_size();
        let start = number.checked_mul(block_size).ok_or_else(|| directory.corrupt(Defect::Overflow))?;
        let len = directory.attributes.size.saturating_sub(start).min(block_size);
        let mut bytes = vec![0; usize::try_from(len).expect("a directory block has 64 KiB at most")];
        self.read(directory, start, &mut bytes)?;
        DirBlock::parse(directory, number, bytes)
    }
}

fn unsorted(directory: &Inode, name: &[u8]) -> Error {
    directory.corrupt(Defect::Unsorted(String::from_utf8_lossy(name).into_owned()))
}
