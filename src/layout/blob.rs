//! Bytes of a blob that lie somewhere in a file, or in memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;

use crate::model::ByteRange;

/// Bytes read at a time: large enough that a thread switch costs nothing beside it, small enough to be many in flight.
const PIECE: u64 = 256 << 10;

/// Where the bytes of a blob are.
#[derive(Debug, Clone)]
pub(super) enum BlobAt {
    /// In this range of a file.
    File { file: Arc<File>, range: ByteRange },
    /// Here.
    Memory(Bytes),
}

impl BlobAt {
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::File { range, .. } => range.len(),
            Self::Memory(bytes) => bytes.len() as u64,
        }
    }

    /// Everything, if it is at most `limit` bytes.
    pub(super) fn read_all(&self, limit: u64) -> io::Result<Vec<u8>> {
        if self.size() > limit {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {limit} bytes")));
        }
        self.read(ByteRange::to(self.size())).map(Vec::from)
    }

    /// The bytes `wanted` of the blob, which lie inside it.
    fn read(&self, wanted: ByteRange) -> io::Result<Bytes> {
        let outside = || io::Error::new(io::ErrorKind::UnexpectedEof, "the range lies outside of the blob");
        if wanted.end() > self.size() {
            return Err(outside());
        }
        let (start, length) = (wanted.start(), usize::try_from(wanted.len()).map_err(|_| outside())?);
        match self {
            Self::Memory(bytes) => {
                let start = usize::try_from(start).map_err(|_| outside())?;
                Ok(bytes.slice(start..start + length))
            }
            Self::File { file, range } => {
                let mut buffer = vec![0; length];
                file.read_exact_at(&mut buffer, range.start() + start)?;
                Ok(buffer.into())
            }
        }
    }

    /// Calls `take` with everything, piece by piece.
    pub(super) fn for_each(&self, mut take: impl FnMut(&[u8])) -> io::Result<()> {
        let mut at = 0;
        while at < self.size() {
            let end = (at + PIECE).min(self.size());
            take(&self.read(ByteRange::new(at, end).map_err(io::Error::other)?)?);
            at = end;
        }
        Ok(())
    }

    /// The bytes `wanted`, read on a thread for blocking work.
    pub(super) fn stream(self, wanted: ByteRange) -> BoxStream<'static, io::Result<Bytes>> {
        futures::stream::unfold(Some((self, wanted)), |state| async {
            let (blob, left) = state?;
            if left.is_empty() {
                return None;
            }
            let end = left.start().saturating_add(PIECE).min(left.end());
            let piece = ByteRange::new(left.start(), end).and_then(|now| Ok((now, ByteRange::new(end, left.end())?)));
            let Ok((now, later)) = piece else { return None };
            let read = tokio::task::spawn_blocking(move || (blob.read(now), blob)).await;
            match read {
                Ok((Ok(piece), blob)) => Some((Ok(piece), Some((blob, later)))),
                Ok((Err(error), _)) => Some((Err(error), None)),
                Err(broken) => Some((Err(io::Error::other(broken)), None)),
            }
        })
        .boxed()
    }
}

/// Opens a regular file for reading; anything else (a pipe would wait for a writer) is refused.
pub(super) fn open_regular(path: &Path) -> io::Result<File> {
    let nonblocking = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
    let file = File::options().read(true).custom_flags(nonblocking).open(path)?;
    if file.metadata()?.is_file() {
        Ok(file)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"))
    }
}
