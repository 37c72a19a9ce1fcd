//! Writing images to an OCI layout or a tar of one.
//!
//! A blob appears under its name only when it is whole; the index is replaced as one, under a lock that other processes
//! respect; an archive appears only when it is finished. What was begun and not finished leaves nothing behind.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Seek as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use tempfile::NamedTempFile;

use super::blob::open_regular;
use super::error::LayoutError;
use super::read::{REF_NAME, blob_path, parse_index};
use super::tarfile::header;
use crate::model::{Algorithm, BlobDigest};
use crate::oci::{DOCUMENT_LIMIT, Descriptor, Index};

const MARKER: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
/// Permissions of what is written: an image layout is for everybody who may enter its directory.
const MODE: u32 = 0o644;

/// A layout or archive being written.
#[derive(Debug)]
pub struct LayoutWriter {
    path: PathBuf,
    /// Under which name the image is listed.
    tag: Option<String>,
    target: Target,
    /// True if the layout was not there before.
    made: bool,
}

#[derive(Debug)]
enum Target {
    Directory,
    Archive(Box<Mutex<Option<ArchiveWriter>>>),
}

/// An archive in the making. Its lock is held while a member is written: members follow each other in the file.
#[derive(Debug)]
struct ArchiveWriter {
    file: NamedTempFile,
    blobs: HashSet<BlobDigest>,
    index: Index,
}

impl LayoutWriter {
    /// Writes to the layout in the directory `path`, which is made if it is missing.
    ///
    /// # Errors
    /// The directory holds something else, or cannot be written.
    pub fn directory(path: &Path, tag: Option<&str>) -> Result<Self, LayoutError> {
        std::fs::create_dir_all(path).map_err(LayoutError::io("make", path))?;
        // Another process may be making the same layout: whoever holds the lock finds all of it or nothing.
        let lock = lock_directory(path)?;
        let marker = path.join("oci-layout");
        let made = !marker.exists();
        if made {
            let mut entries = std::fs::read_dir(path).map_err(LayoutError::io("open the layout", path))?;
            if entries.next().is_some() {
                let reason = "it is not empty and has no file oci-layout".to_owned();
                return Err(LayoutError::NoLayout { path: path.to_owned(), reason });
            }
            replace(path, &marker, MARKER)?;
        }
        drop(lock);
        let blobs = path.join("blobs").join(Algorithm::Sha256.name());
        std::fs::create_dir_all(&blobs).map_err(LayoutError::io("make", blobs))?;
        Ok(Self { path: path.to_owned(), tag: tag.map(str::to_owned), target: Target::Directory, made })
    }

    /// Writes a tarred layout to the file `path`, which [`finish`](Self::finish) replaces.
    ///
    /// # Errors
    /// The file's directory cannot be written.
    pub fn archive(path: &Path, tag: Option<&str>) -> Result<Self, LayoutError> {
        let file = temporary(directory_of(path))?;
        let writer = ArchiveWriter { file, blobs: HashSet::new(), index: Index::new(Vec::new()) };
        let target = Target::Archive(Box::new(Mutex::new(Some(writer))));
        Ok(Self { path: path.to_owned(), tag: tag.map(str::to_owned), target, made: false })
    }

    /// The directory or file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// An empty file that [`put_blob`](Self::put_blob) can take over without copying. It vanishes with its owner.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn spool(&self) -> Result<NamedTempFile, LayoutError> {
        match self.target {
            Target::Directory => temporary(&self.path),
            Target::Archive(_) => temporary(directory_of(&self.path)),
        }
    }

    /// True if the blob is already there in this size.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn has_blob(&self, blob: &BlobDigest, size: u64) -> Result<bool, LayoutError> {
        match &self.target {
            Target::Directory => {
                let path = self.path.join(blob_path(blob));
                match std::fs::metadata(&path) {
                    Ok(metadata) => Ok(metadata.is_file() && metadata.len() == size),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
                    Err(error) => Err(LayoutError::io("look at", path)(error)),
                }
            }
            Target::Archive(writer) => Ok(lock(writer).as_ref().is_some_and(|writer| writer.blobs.contains(blob))),
        }
    }

    /// Takes over a spooled file as `blob`; whoever wrote it computed the digest.
    ///
    /// # Errors
    /// The file has another size, or cannot be moved.
    pub fn put_blob(&self, mut spooled: NamedTempFile, blob: &BlobDigest, size: u64) -> Result<(), LayoutError> {
        let path = spooled.path().to_owned();
        let found = spooled.as_file().metadata().map_err(LayoutError::io("look at", &path))?.len();
        if found != size {
            return Err(LayoutError::Size { path, blob: *blob, expected: size, found });
        }
        match &self.target {
            Target::Directory => {
                let target = self.path.join(blob_path(blob));
                if let Some(directory) = target.parent() {
                    std::fs::create_dir_all(directory).map_err(LayoutError::io("make", directory))?;
                }
                persist(spooled, &target)
            }
            Target::Archive(writer) => {
                let file = spooled.as_file_mut();
                file.rewind().map_err(LayoutError::io("read", &path))?;
                self.append(writer, blob, size, &mut *file)
            }
        }
    }

    /// Writes a small blob.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn put_bytes(&self, blob: &BlobDigest, bytes: &[u8]) -> Result<(), LayoutError> {
        if self.has_blob(blob, bytes.len() as u64)? {
            return Ok(());
        }
        match &self.target {
            Target::Directory => {
                let target = self.path.join(blob_path(blob));
                let directory = directory_of(&target);
                std::fs::create_dir_all(directory).map_err(LayoutError::io("make", directory))?;
                replace(directory, &target, bytes)
            }
            Target::Archive(writer) => self.append(writer, blob, bytes.len() as u64, &mut &*bytes),
        }
    }

    /// Lists a manifest or index, whose bytes were put as a blob, as the image of this writer's name.
    ///
    /// # Errors
    /// The index cannot be read or written.
    pub fn list(&self, top: &Descriptor) -> Result<(), LayoutError> {
        let mut entry = top.clone();
        entry.annotations.remove(REF_NAME);
        if let Some(tag) = &self.tag {
            entry.annotations.insert(REF_NAME.to_owned(), tag.clone());
        }
        match &self.target {
            Target::Archive(writer) => {
                let mut writer = lock(writer);
                let writer = writer.as_mut().ok_or_else(|| self.finished())?;
                enlist(&mut writer.index, entry);
                Ok(())
            }
            Target::Directory => {
                let path = self.path.join("index.json");
                let marker = self.path.join("oci-layout");
                // Other processes may list their images at the same time.
                let directory = lock_directory(&self.path)?;
                if !marker.exists() {
                    replace(&self.path, &marker, MARKER)?;
                }
                let mut index = read_index(&path)?;
                enlist(&mut index, entry);
                replace(&self.path, &path, &index.to_json())?;
                directory.sync_all().map_err(LayoutError::io("sync", &self.path))
            }
        }
    }

    /// Makes everything visible. A directory already is; an archive appears now.
    ///
    /// # Errors
    /// The archive cannot be written to its place.
    pub fn finish(&self) -> Result<(), LayoutError> {
        let Target::Archive(writer) = &self.target else { return Ok(()) };
        let Some(mut writer) = lock(writer).take() else { return Ok(()) };
        let index = writer.index.to_json();
        for (name, bytes) in [("index.json", index.as_slice()), ("oci-layout", MARKER)] {
            self.write_member(&mut writer.file, name, bytes.len() as u64, &mut &*bytes)?;
        }
        let end = writer.file.write_all(&[0; 1024]);
        end.map_err(LayoutError::io("write", &self.path))?;
        persist(writer.file, &self.path)
    }

    fn finished(&self) -> LayoutError {
        LayoutError::Archive { path: self.path.clone(), reason: "it is already finished".to_owned() }
    }

    fn append(
        &self,
        writer: &Mutex<Option<ArchiveWriter>>,
        blob: &BlobDigest,
        size: u64,
        content: &mut dyn io::Read,
    ) -> Result<(), LayoutError> {
        let mut writer = lock(writer);
        let writer = writer.as_mut().ok_or_else(|| self.finished())?;
        if writer.blobs.contains(blob) {
            return Ok(());
        }
        self.write_member(&mut writer.file, &blob_path(blob), size, content)?;
        writer.blobs.insert(*blob);
        Ok(())
    }

    fn write_member(
        &self,
        file: &mut NamedTempFile,
        name: &str,
        size: u64,
        content: &mut dyn io::Read,
    ) -> Result<(), LayoutError> {
        let long = || LayoutError::Archive { path: self.path.clone(), reason: format!("{name} is too long a name") };
        let (header, padding) = header(name, size).ok_or_else(long)?;
        let file = file.as_file_mut();
        let written = file.write_all(&header).and_then(|()| io::copy(content, file)).and_then(|copied| {
            if copied != size {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the content is shorter than announced"));
            }
            file.write_all(&[0; 512][..padding])
        });
        written.map_err(LayoutError::io("write", &self.path))
    }
}

impl Drop for LayoutWriter {
    /// Takes away a layout that was made for an image that never came. Blobs that arrived stay: they are whole, and the
    /// next try finds them.
    fn drop(&mut self) {
        if !self.made || self.path.join("index.json").exists() {
            return;
        }
        let Ok(_lock) = lock_directory(&self.path) else { return };
        let blobs = self.path.join("blobs");
        let empty =
            std::fs::remove_dir(blobs.join(Algorithm::Sha256.name())).and_then(|()| std::fs::remove_dir(&blobs));
        if empty.is_ok() && !self.path.join("index.json").exists() {
            drop(std::fs::remove_file(self.path.join("oci-layout")));
            drop(std::fs::remove_dir(&self.path));
        }
    }
}

/// The directory, locked against other writers until it is closed.
fn lock_directory(path: &Path) -> Result<File, LayoutError> {
    let directory = File::open(path).map_err(LayoutError::io("open", path))?;
    rustix::fs::flock(&directory, rustix::fs::FlockOperation::LockExclusive)
        .map_err(|errno| LayoutError::io("lock", path)(errno.into()))?;
    Ok(directory)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Puts the entry into the index in the place of what it replaces: the image of the same name, or the same unnamed one.
fn enlist(index: &mut Index, entry: Descriptor) {
    let name = entry.annotations.get(REF_NAME);
    index.manifests.retain(|old| match (name, old.annotations.get(REF_NAME)) {
        (Some(new), Some(old)) => new != old,
        (None, None) => old.digest != entry.digest,
        _ => true,
    });
    index.manifests.push(entry);
}

fn read_index(path: &Path) -> Result<Index, LayoutError> {
    let file = match open_regular(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Index::new(Vec::new())),
        Err(error) => return Err(LayoutError::io("open", path)(error)),
    };
    let size = file.metadata().map_err(LayoutError::io("look at", path))?.len();
    let too_large = || LayoutError::io("read", path)(io::ErrorKind::FileTooLarge.into());
    let length = usize::try_from(size.min(DOCUMENT_LIMIT + 1)).map_err(|_| too_large())?;
    if size > DOCUMENT_LIMIT {
        return Err(too_large());
    }
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, 0).map_err(LayoutError::io("read", path))?;
    parse_index(&bytes).map_err(|source| {
        let document = "index.json".to_owned();
        LayoutError::Document { path: directory_of(path).to_owned(), document, source }
    })
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn temporary(directory: &Path) -> Result<NamedTempFile, LayoutError> {
    tempfile::Builder::new()
        .prefix(".headstart-")
        .tempfile_in(directory)
        .map_err(LayoutError::io("make a temporary file in", directory))
}

/// Writes a whole file beside its place and moves it there.
fn replace(directory: &Path, path: &Path, bytes: &[u8]) -> Result<(), LayoutError> {
    let mut file = temporary(directory)?;
    file.write_all(bytes).map_err(LayoutError::io("write", path))?;
    persist(file, path)
}

/// Syncs a temporary file and moves it to its place.
fn persist(file: NamedTempFile, path: &Path) -> Result<(), LayoutError> {
    use std::os::unix::fs::PermissionsExt as _;
    let write = || LayoutError::io("write", path);
    file.as_file().set_permissions(std::fs::Permissions::from_mode(MODE)).map_err(write())?;
    file.as_file().sync_data().map_err(write())?;
    file.persist(path).map_err(|error| write()(error.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::LayoutReader;
    use crate::oci::{LayoutImage, media};

    #[test]
    fn writers_of_one_layout_lose_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("layout");
        let top = |tag: &str| Descriptor::of(media::OCI_MANIFEST, tag.as_bytes());
        let tags: Vec<String> = (0..16).map(|tag| format!("t{tag}")).collect();
        std::thread::scope(|scope| {
            for tag in &tags {
                scope.spawn(|| {
                    let writer = LayoutWriter::directory(&path, Some(tag)).unwrap();
                    writer.put_bytes(&top(tag).digest, tag.as_bytes()).unwrap();
                    writer.list(&top(tag)).unwrap();
                });
            }
        });
        for tag in &tags {
            let reader = LayoutReader::directory(&path, &LayoutImage::Named(tag.clone())).unwrap();
            assert_eq!(reader.top().digest, top(tag).digest);
        }
    }

    #[test]
    fn an_unfinished_archive_leaves_what_was_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image.tar");
        std::fs::write(&path, "old").unwrap();
        let writer = LayoutWriter::archive(&path, None).unwrap();
        writer.put_bytes(&Descriptor::of("", b"x").digest, b"x").unwrap();
        drop(writer);
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_layout_for_an_image_that_never_came_goes_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("layout");
        drop(LayoutWriter::directory(&path, None).unwrap());
        assert!(!path.exists());
        let writer = LayoutWriter::directory(&path, None).unwrap();
        writer.put_bytes(&Descriptor::of("", b"x").digest, b"x").unwrap();
        drop(writer);
        let again = LayoutWriter::directory(&path, None).unwrap();
        assert!(again.has_blob(&Descriptor::of("", b"x").digest, 1).unwrap());
    }

    #[test]
    fn a_blob_of_another_size_is_not_taken() {
        let directory = tempfile::tempdir().unwrap();
        let writer = LayoutWriter::directory(directory.path(), None).unwrap();
        let blob = Descriptor::of("", b"abc").digest;
        let mut spooled = writer.spool().unwrap();
        spooled.write_all(b"ab").unwrap();
        assert!(matches!(writer.put_blob(spooled, &blob, 3), Err(LayoutError::Size { expected: 3, found: 2, .. })));
        assert!(!writer.has_blob(&blob, 3).unwrap());
    }
}
