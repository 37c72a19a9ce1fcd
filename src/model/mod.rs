//! Pure words that every other room speaks: digests, names, attributes, ranges, layer entries, and the two ports
//! through which bytes arrive ([`ReadAt`] for what is local, [`BlobSource`] for what is not).
//!
//! Nothing here does I/O and nothing here knows a format.

mod attr;
mod digest;
mod entry;
mod name;
mod ports;
mod range;
mod tally;

pub use attr::{Attributes, DeviceNumber, FileKind, Timestamp, Xattr};
pub use digest::{Algorithm, BlobDigest, ChainId, ChunkDigest, DiffId, Digest, DigestError, Hasher, IndexDigest};
pub use entry::{EntryKind, LayerEntry, Metadata};
pub use name::{Name, NameError, RelPath};
pub use ports::{BlobSource, ByteStream, ReadAt, ReadAtError, SourceError};
pub use range::{ByteRange, RangeError};
pub use tally::Tally;
