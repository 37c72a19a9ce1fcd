//! An image read without being mounted: paths resolved, directories listed, files read, bytes fetched as they are needed.
//!
//! Guarantees: links are followed inside of the image and cannot leave it; a chain of links ends. Waits for bytes; never for
//! threads that serve.

use std::io::Write;
use std::ops::ControlFlow;
use std::sync::mpsc;

use crate::model::{FileKind, Name};
use crate::vfs::{Bring as _, Error, Item, ItemKind, Purpose, ROOT_INO, Stat, Vfs};

use super::image::Lazy;

/// How many links one path may go through, as in the kernel (`MAXSYMLINKS`).
const MAX_LINKS: usize = 40;
/// Most bytes read at once.
const READ: usize = 1 << 20;

/// Why a path of an image could not be read.
#[derive(Debug, thiserror::Error)]
pub enum BrowseError {
    /// There is no such file.
    #[error("there is no {0} in the image")]
    Missing(String),
    /// A part of the path is no directory.
    #[error("{0} is not a directory")]
    NotADirectory(String),
    /// It has no bytes to show.
    #[error("{0} is not a regular file")]
    NotAFile(String),
    /// Links that lead to each other.
    #[error("{0} goes through too many symbolic links")]
    TooManyLinks(String),
    /// Bytes did not come.
    #[error("cannot fetch what {path} needs")]
    Bring {
        /// The path.
        path: String,
        /// Why.
        #[source]
        source: crate::vfs::BringError,
    },
    /// The image cannot be read.
    #[error("cannot read {path}")]
    Image {
        /// The path.
        path: String,
        /// Why.
        #[source]
        source: Error,
    },
    /// Whoever takes the bytes does not.
    #[error("cannot write the content of {path}")]
    Write {
        /// The path.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// A file system being read.
#[derive(Debug)]
pub struct Browser {
    file_system: Vfs<Lazy>,
}

impl Browser {
    /// Reads `file_system`.
    pub const fn new(file_system: Vfs<Lazy>) -> Self {
        Self { file_system }
    }

    /// Does `attempt` until no bytes are missing, bringing those that are.
    fn with_bytes<T>(&self, path: &[u8], attempt: impl Fn(&Vfs<Lazy>) -> Result<T, Error>) -> Result<T, BrowseError> {
        let image = |source| BrowseError::Image { path: shown(path), source };
        loop {
            let (layer, device, range) = match attempt(&self.file_system) {
                Err(Error::Absent { layer, device, range }) => (layer, device, range),
                other => return other.map_err(image),
            };
            let Some(bytes) = self.file_system.source(layer, device) else {
                return Err(image(Error::Absent { layer, device, range }));
            };
            let (answer, answered) = mpsc::sync_channel(1);
            // Nobody but this function listens, and it does.
            bytes.bring(range, Purpose::Read, Box::new(move |result| drop(answer.send(result))));
            match answered.recv() {
                Ok(Ok(())) => {}
                Ok(Err(source)) => return Err(BrowseError::Bring { path: shown(path), source }),
                Err(mpsc::RecvError) => return Err(image(Error::Absent { layer, device, range })),
            }
        }
    }

    /// What `path` stands for; links on the way are followed, one at its end too if `follow`.
    ///
    /// # Errors
    /// See [`BrowseError`].
    pub fn find(&self, path: &[u8], follow: bool) -> Result<Stat, BrowseError> {
        let mut links = 0;
        // What is still to be walked, the next part last.
        let mut rest: Vec<Vec<u8>> = parts_of(path);
        // The way from the root to here.
        let mut way = vec![self.with_bytes(path, |fs| fs.stat(ROOT_INO))?];
        while let Some(part) = rest.pop() {
            let Some(here) = way.last().copied() else { break };
            if here.attributes.kind != FileKind::Directory {
                return Err(BrowseError::NotADirectory(shown(path)));
            }
            if part == b".." {
                if way.len() > 1 {
                    way.pop();
                }
                continue;
            }
            if Name::check(&part).is_err() {
                return Err(BrowseError::Missing(shown(path)));
            }
            let found = self.with_bytes(path, |fs| fs.lookup(here.ino, &part))?;
            let found = found.ok_or_else(|| BrowseError::Missing(shown(path)))?;
            if found.attributes.kind == FileKind::Symlink && (follow || !rest.is_empty()) {
                links += 1;
                if links > MAX_LINKS {
                    return Err(BrowseError::TooManyLinks(shown(path)));
                }
                let target = self.with_bytes(path, |fs| fs.read_link(found.ino))?;
                if target.starts_with(b"/") {
                    way.truncate(1);
                }
                rest.extend(parts_of(&target));
                continue;
            }
            way.push(found);
        }
        way.last().copied().ok_or_else(|| BrowseError::Missing(shown(path)))
    }

    /// The entries of the directory `path` in the order of their names, without `.` and `..`; of another file, itself.
    ///
    /// # Errors
    /// See [`BrowseError`].
    pub fn list(&self, path: &[u8]) -> Result<Vec<Listed>, BrowseError> {
        let stat = self.find(path, true)?;
        if stat.attributes.kind != FileKind::Directory {
            return Ok(vec![self.listed(path, path.to_vec(), self.find(path, false)?)?]);
        }
        let mut entries: Vec<(Vec<u8>, Stat)> = Vec::new();
        let mut offset = 0;
        loop {
            let (more, next) = self.with_bytes(path, |fs| {
                let (mut found, mut next) = (Vec::new(), offset);
                let mut failed = None;
                fs.read_dir(stat.ino, offset, &mut |item: Item<'_>| {
                    match item.kind {
                        ItemKind::Dot { .. } => {}
                        ItemKind::File(stat) => found.push((item.name.to_vec(), stat)),
                        ItemKind::Broken { error, .. } => {
                            failed = Some(error);
                            return ControlFlow::Break(());
                        }
                    }
                    next = item.next_offset;
                    ControlFlow::Continue(())
                })?;
                match failed {
                    Some(error) if found.is_empty() => Err(error),
                    _ => Ok((found, next)),
                }
            })?;
            if next == offset {
                break;
            }
            entries.extend(more);
            offset = next;
        }
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        entries.into_iter().map(|(name, stat)| self.listed(path, name, stat)).collect()
    }

    fn listed(&self, path: &[u8], name: Vec<u8>, stat: Stat) -> Result<Listed, BrowseError> {
        let target = match stat.attributes.kind {
            FileKind::Symlink => Some(self.with_bytes(path, |fs| fs.read_link(stat.ino))?.into_vec()),
            _ => None,
        };
        Ok(Listed { name, stat, target })
    }

    /// Writes the content of the file `path` to `out`.
    ///
    /// # Errors
    /// See [`BrowseError`].
    pub fn cat(&self, path: &[u8], out: &mut dyn Write) -> Result<(), BrowseError> {
        let stat = self.find(path, true)?;
        if stat.attributes.kind != FileKind::Regular {
            return Err(BrowseError::NotAFile(shown(path)));
        }
        let mut offset = 0;
        loop {
            let piece = self.with_bytes(path, |fs| {
                let mut buffer = vec![0; READ];
                let length = fs.read(stat.ino, offset, &mut buffer)?;
                buffer.truncate(length);
                Ok(buffer)
            })?;
            if piece.is_empty() {
                return Ok(());
            }
            offset += piece.len() as u64;
            out.write_all(&piece).map_err(|source| BrowseError::Write { path: shown(path), source })?;
        }
    }
}

/// One file as a listing shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its name; the whole path, if the listing was asked for something that is no directory.
    pub name: Vec<u8>,
    /// What it is.
    pub stat: Stat,
    /// Where it leads, if it is a link.
    pub target: Option<Vec<u8>>,
}

/// The parts of a path that lead somewhere, the first one last.
fn parts_of(path: &[u8]) -> Vec<Vec<u8>> {
    path.split(|byte| *byte == b'/')
        .rev()
        .filter(|part| !part.is_empty() && *part != b".")
        .map(<[u8]>::to_vec)
        .collect()
}

fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}
