//! Looks at every inode of an image and tells all that is wrong with it.
//!
//! The work and the memory are bounded by the image's size, whatever its bytes say: directories are entered once, and
//! structures that lie over each other are not read over and over. What a file holds is not looked at, only where.

mod report;

use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;

use super::data::ExtentSource;
use super::inode::Data;
use super::ondisk::{self, DEVICE_SLOT_SIZE, SUPER_OFFSET, SUPER_SIZE};
use super::{Defect, Error, Image, Inode, Nid};
use crate::model::{ByteRange, FileKind, Name, ReadAt};

pub use report::{Finding, MAX_FINDINGS, Problem, Report};

/// Longest path that is told in full; of a longer one, its end (Linux `PATH_MAX`).
const MAX_PATH: usize = 4096;

/// Looks at everything in an image.
///
/// # Errors
/// [`Error::Absent`] and [`Error::Io`] only: what is wrong with the image itself is in the report.
pub fn check<R: ReadAt>(image: &Image<R>) -> Result<Report, Error> {
    let mut checker = Checker::new(image);
    checker.superblock();
    checker.walk()?;
    checker.link_counts();
    checker.overlaps();
    checker.chunks()?;
    Ok(checker.report)
}

/// How many more bytes of structures can lie in an image, since no two of them share bytes. Whoever reads structures of
/// many inodes takes them off, and is done at last even if they all lie over each other.
pub(crate) struct Budget(u64);

impl Budget {
    pub(crate) fn of<R: ReadAt>(image: &Image<R>) -> Self {
        Self(image.total_size())
    }

    /// Takes off `amount` bytes that `inode` says it has.
    pub(crate) fn spend(&mut self, inode: &Inode, amount: u64) -> Result<(), Error> {
        self.0 = self.0.checked_sub(amount).ok_or_else(|| inode.corrupt(Defect::Overfull { amount, left: self.0 }))?;
        Ok(())
    }
}

/// A name in the tree, by its parent: paths are only put together for findings, since a deep tree's paths are
/// quadratic in its size.
struct Step {
    parent: Option<usize>,
    name: Box<[u8]>,
}

/// Bytes that someone claims.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    device: u16,
    start: u64,
    end: u64,
    owner: Owner,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Owner {
    Superblock,
    DeviceTable,
    SharedXattr(u32),
    Inode(Nid),
    Data(Nid),
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Superblock => f.write_str("the superblock"),
            Self::DeviceTable => f.write_str("the device table"),
            Self::SharedXattr(id) => write!(f, "shared attribute {id}"),
            Self::Inode(nid) => write!(f, "inode {nid}"),
            Self::Data(nid) => write!(f, "data of inode {nid}"),
        }
    }
}

/// What is remembered of an inode that was met.
struct Met {
    step: usize,
    position: u64,
    names: u64,
    nlink: u32,
    is_directory: bool,
}

struct Checker<'a, R> {
    image: &'a Image<R>,
    report: Report,
    steps: Vec<Step>,
    met: HashMap<Nid, Met>,
    claims: Vec<Claim>,
    shared: HashSet<u32>,
    /// Files whose chunks are looked at in the end, when all other claims are known.
    chunked: Vec<Inode>,
    budget: Budget,
}

impl<'a, R: ReadAt> Checker<'a, R> {
    fn new(image: &'a Image<R>) -> Self {
        Self {
            image,
            report: Report::default(),
            steps: Vec::new(),
            met: HashMap::new(),
            claims: Vec::new(),
            shared: HashSet::new(),
            chunked: Vec::new(),
            budget: Budget::of(image),
        }
    }

    fn found(&mut self, step: Option<usize>, nid: Option<Nid>, offset: u64, problem: Problem) {
        if self.report.findings.len() >= MAX_FINDINGS {
            self.report.more += 1;
            return;
        }
        let path = step.map(|step| self.path(step)).unwrap_or_default();
        self.report.findings.push(Finding { path, nid, offset, problem });
    }

    /// Turns what a reading operation said into a finding, unless the bytes could not be had.
    fn failed(&mut self, step: usize, nid: Nid, error: Error) -> Result<(), Error> {
        let (offset, problem) = match error {
            Error::Corrupt { offset, defect, .. } => (offset, Problem::Defect(defect)),
            Error::Compressed { .. } => (0, Problem::Compressed),
            Error::DeviceMissing { device, .. } => (0, Problem::DeviceMissing(device)),
            other => return Err(other),
        };
        self.found(Some(step), Some(nid), offset, problem);
        Ok(())
    }

    fn path(&self, step: usize) -> String {
        let mut parts: Vec<&[u8]> = Vec::new();
        let mut len = 0;
        let mut next = Some(step);
        while let Some(step) = next.and_then(|index| self.steps.get(index)) {
            if len > MAX_PATH {
                parts.push(b"...");
                break;
            }
            len += step.name.len() + 1;
            parts.push(&step.name);
            next = step.parent;
        }
        parts.reverse();
        match String::from_utf8_lossy(&parts.join(&b'/')) {
            path if path.is_empty() => "/".to_owned(),
            path => path.into_owned(),
        }
    }

    fn claim(&mut self, device: u16, start: u64, len: u64, owner: Owner) {
        if len > 0 {
            self.claims.push(Claim { device, start, end: start.saturating_add(len), owner });
        }
    }

    fn superblock(&mut self) {
        let superblock = self.image.superblock();
        let slots = u64::from(superblock.raw().ext_slots) * ondisk::SUPER_SLOT_SIZE as u64;
        self.claim(0, SUPER_OFFSET, SUPER_SIZE as u64 + slots, Owner::Superblock);
        let devices = self.image.devices().len() as u64;
        let table = u64::from(superblock.raw().device_slot) * DEVICE_SLOT_SIZE as u64;
        self.claim(0, table, devices * DEVICE_SLOT_SIZE as u64, Owner::DeviceTable);
        let expected = superblock.blocks().saturating_mul(superblock.block_size());
        let found = self.image.primary_size();
        if expected > found {
            self.found(None, None, SUPER_OFFSET, Problem::Truncated { expected, found });
        }
    }

    /// Meets every inode that has a name.
    fn walk(&mut self) -> Result<(), Error> {
        let root = self.image.root();
        self.steps.push(Step { parent: None, name: Box::default() });
        let mut left = Vec::new();
        if let Some(inode) = self.meet(0, root)? {
            if inode.attributes.kind == FileKind::Directory {
                left.push((0, inode, root));
            } else {
                self.found(Some(0), Some(root), inode.position, Problem::Root(inode.attributes.kind));
            }
        }
        while let Some((step, directory, parent)) = left.pop() {
            self.directory(step, &directory, parent, &mut left)?;
        }
        self.report.inodes = self.met.len() as u64;
        let counted = self.report.inodes;
        let found = self.image.superblock().inodes();
        // The packed inode has no name, and makers count it or not.
        let unnamed = u64::from(self.image.superblock().packed_inode().is_some());
        if self.report.findings.is_empty() && !(counted..=counted + unnamed).contains(&found) {
            self.found(None, None, SUPER_OFFSET, Problem::InodeCount { found, counted });
        }
        Ok(())
    }

    /// Reads an inode under one of its names, and looks at all but its entries if this is the first one.
    fn meet(&mut self, step: usize, nid: Nid) -> Result<Option<Inode>, Error> {
        let inode = match self.image.inode(nid) {
            Ok(inode) => inode,
            Err(error) => return self.failed(step, nid, error).map(|()| None),
        };
        let attributes = inode.attributes;
        let is_directory = attributes.kind == FileKind::Directory;
        if let Some(met) = self.met.get_mut(&nid) {
            if is_directory {
                let first = met.step;
                let first = self.path(first);
                self.found(Some(step), Some(nid), inode.position, Problem::DirectoryTwice(first));
                return Ok(None);
            }
            met.names += 1;
            return Ok(Some(inode));
        }
        let met = Met { step, position: inode.position, names: 1, nlink: attributes.nlink, is_directory };
        self.met.insert(nid, met);
        self.report.directories += u64::from(is_directory);
        if attributes.kind == FileKind::Regular {
            self.report.content = self.report.content.saturating_add(attributes.size);
        }
        let record = u64::from(inode.record_size) + u64::from(inode.xattr_size);
        self.claim(0, inode.position, record, Owner::Inode(nid));
        for look in [Self::xattrs, Self::target, Self::data] {
            if let Err(error) = look(self, &inode) {
                self.failed(step, nid, error)?;
            }
        }
        Ok(Some(inode))
    }

    fn target(&mut self, inode: &Inode) -> Result<(), Error> {
        if inode.attributes.kind == FileKind::Symlink {
            self.budget.spend(inode, inode.attributes.size)?;
            self.image.read_link(inode)?;
        }
        Ok(())
    }

    /// Where the data of an inode lies. Chunks have to wait until all structures are known.
    fn data(&mut self, inode: &Inode) -> Result<(), Error> {
        if let Data::Chunks(format) = inode.data {
            let (table, len) = self.image.chunk_table(inode, format).ok_or_else(|| inode.corrupt(Defect::Overflow))?;
            let range = ByteRange::at(table, len).map_err(|_| inode.corrupt(Defect::Overflow))?;
            let size = self.image.primary_size();
            if range.end() > size {
                return Err(inode.corrupt(Defect::OutOfBounds { range, size }));
            }
            self.budget.spend(inode, len)?;
            self.claim(0, table, len, Owner::Inode(inode.nid));
            self.chunked.push(*inode);
            return Ok(());
        }
        let is_content = inode.attributes.kind == FileKind::Regular;
        let owner = if is_content { Owner::Data(inode.nid) } else { Owner::Inode(inode.nid) };
        for extent in self.image.extents(inode, ByteRange::to(inode.attributes.size)) {
            let extent = extent?;
            if let ExtentSource::Data { device, offset } = extent.source {
                self.in_bounds(inode, device, offset, extent.file.len())?;
                self.claim(device, offset, extent.file.len(), owner);
            }
        }
        Ok(())
    }

    fn in_bounds(&self, inode: &Inode, device: u16, offset: u64, len: u64) -> Result<(), Error> {
        let range = ByteRange::at(offset, len).map_err(|_| inode.corrupt(Defect::Overflow))?;
        let size = self.image.device_size(device).ok_or(Error::DeviceMissing { nid: inode.nid, device })?;
        if range.end() > size { Err(inode.corrupt(Defect::OutOfBounds { range, size })) } else { Ok(()) }
    }

    fn xattrs(&mut self, inode: &Inode) -> Result<(), Error> {
        self.budget.spend(inode, inode.xattr_size.into())?;
        let Some(area) = self.image.xattr_area(inode)? else { return Ok(()) };
        let ignore = &mut |_: &[u8], _: &[u8]| ControlFlow::Continue(());
        let _more = self.image.visit_inline_xattrs(inode, &area, ignore)?;
        for id in area.shared_ids() {
            // Each only once: many inodes share one.
            if self.shared.insert(id) {
                let range = self.image.visit_shared_xattr(inode, id, ignore)?.1;
                self.budget.spend(inode, range.len())?;
                self.claim(0, range.start(), range.len(), Owner::SharedXattr(id));
            }
        }
        Ok(())
    }

    /// The entries of a directory, and every inode that they lead to.
    fn directory(
        &mut self,
        step: usize,
        directory: &Inode,
        parent: Nid,
        left: &mut Vec<(usize, Inode, Nid)>,
    ) -> Result<(), Error> {
        let nid = directory.nid;
        let blocks = self.image.dir_blocks(directory);
        let blocks =
            match blocks.and_then(|blocks| self.budget.spend(directory, directory.attributes.size).map(|()| blocks)) {
                Ok(blocks) => blocks,
                Err(error) => return self.failed(step, nid, error),
            };
        let mut dots = [directory.omits_dot(), false];
        let mut last: Vec<u8> = Vec::new();
        let mut subdirectories = 0_u64;
        let mut complete = true;
        for number in 0..blocks {
            let block = match self.image.dir_block(directory, number) {
                Ok(block) => block,
                Err(error) => {
                    self.failed(step, nid, error)?;
                    complete = false;
                    continue;
                }
            };
            for entry in block.entries() {
                let entry = match entry {
                    Ok(entry) => entry,
                    Err(error) => {
                        self.failed(step, nid, error)?;
                        complete = false;
                        continue;
                    }
                };
                if entry.name <= &*last {
                    let name = String::from_utf8_lossy(entry.name).into_owned();
                    self.found(Some(step), Some(nid), directory.position, Problem::Defect(Defect::Unsorted(name)));
                }
                entry.name.clone_into(&mut last);
                let target = Nid(entry.dirent.nid);
                if let Some(name) = entry.dot() {
                    let (index, expected) = if name == "." { (0, nid) } else { (1, parent) };
                    if let Some(seen) = dots.get_mut(index) {
                        *seen = true;
                    }
                    if target != expected {
                        let problem = Problem::DotWrong { name, found: target.0, expected: expected.0 };
                        self.found(Some(step), Some(nid), directory.position, problem);
                    }
                    continue;
                }
                let child = self.steps.len();
                self.steps.push(Step { parent: Some(step), name: entry.name.into() });
                if let Err(error) = Name::check(entry.name) {
                    self.found(Some(child), Some(nid), directory.position, Problem::Defect(error.into()));
                }
                let Some(inode) = self.meet(child, target)? else { continue };
                let found = inode.attributes.kind;
                let listed = entry.dirent.file_type;
                if listed != 0 && listed != ondisk::file_type_of(found) {
                    let problem = Problem::FileType { listed, found };
                    self.found(Some(child), Some(target), inode.position, problem);
                }
                if found == FileKind::Directory {
                    subdirectories += 1;
                    left.push((child, inode, nid));
                }
            }
        }
        for (seen, name) in dots.into_iter().zip([".", ".."]) {
            if !seen && complete {
                self.found(Some(step), Some(nid), directory.position, Problem::DotMissing(name));
            }
        }
        if complete && let Some(met) = self.met.get_mut(&nid) {
            met.names = subdirectories + 2;
        }
        Ok(())
    }

    fn link_counts(&mut self) {
        let mut wrong: Vec<_> = self
            .met
            .iter()
            // 1 stands for "not counted" in directories, as everywhere in Linux.
            .filter(|(_, met)| u64::from(met.nlink) != met.names && !(met.is_directory && met.nlink == 1))
            .map(|(nid, met)| (met.step, *nid, met.position, met.nlink, met.names))
            .collect();
        wrong.sort_unstable();
        for (step, nid, position, found, counted) in wrong {
            self.found(Some(step), Some(nid), position, Problem::LinkCount { found, counted });
        }
    }

    /// Two structures, or the data of two files that are not chunk-based, never share bytes.
    fn overlaps(&mut self) {
        self.claims.sort_unstable();
        let claims = std::mem::take(&mut self.claims);
        let mut furthest: Option<Claim> = None;
        for claim in &claims {
            if let Some(before) = furthest
                && before.device == claim.device
                && before.end > claim.start
            {
                self.overlap(*claim, before);
            }
            if furthest.is_none_or(|before| before.device != claim.device || before.end < claim.end) {
                furthest = Some(*claim);
            }
        }
        self.claims = claims;
    }

    fn overlap(&mut self, claim: Claim, other: Claim) {
        let range = ByteRange::new(claim.start.max(other.start), claim.end.min(other.end));
        let range = range.unwrap_or(ByteRange::to(0));
        let (Owner::Inode(nid) | Owner::Data(nid)) = claim.owner else {
            let problem = Problem::Overlap { device: claim.device, range, other: other.owner.to_string() };
            return self.found(None, None, claim.start, problem);
        };
        let (step, position) = self.met.get(&nid).map_or((0, 0), |met| (met.step, met.position));
        let problem = Problem::Overlap { device: claim.device, range, other: other.owner.to_string() };
        self.found(Some(step), Some(nid), position, problem);
    }

    /// Chunks may be shared with other files, but not lie over structures.
    fn chunks(&mut self) -> Result<(), Error> {
        // Sorted by start. Where structures do not overlap, which has been found out by now, also by end.
        let structures: Vec<Claim> =
            self.claims.iter().filter(|claim| !matches!(claim.owner, Owner::Data(_))).copied().collect();
        for inode in std::mem::take(&mut self.chunked) {
            let step = self.met.get(&inode.nid).map_or(0, |met| met.step);
            for extent in self.image.extents(&inode, ByteRange::to(inode.attributes.size)) {
                let checked = extent.and_then(|extent| {
                    let ExtentSource::Data { device, offset } = extent.source else { return Ok(None) };
                    self.in_bounds(&inode, device, offset, extent.file.len())?;
                    let end = offset.saturating_add(extent.file.len());
                    Ok(Some(Claim { device, start: offset, end, owner: Owner::Data(inode.nid) }))
                });
                let claim = match checked {
                    Ok(None) => continue,
                    Ok(Some(claim)) => claim,
                    Err(error) => {
                        self.failed(step, inode.nid, error)?;
                        break;
                    }
                };
                let before = |other: &Claim| (other.device, other.end) <= (claim.device, claim.start);
                if let Some(other) = structures.get(structures.partition_point(before))
                    && other.device == claim.device
                    && other.start < claim.end
                {
                    self.overlap(claim, *other);
                }
            }
        }
        Ok(())
    }
}
