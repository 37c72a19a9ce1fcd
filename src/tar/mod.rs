//! Layer tars as a stream of entries: bytes in, [`LayerEntry`](crate::model::LayerEntry)s and contents out.
//!
//! Reads V7, ustar, PAX, GNU and old GNU archives in one pass, with memory that does not grow with the archive. Knows the
//! names that mark removals in a layer (`.wh.name`, `.wh..wh..opq`); knows nothing of what lies in other layers.
//! [`decompress`] opens a layer blob of any of the three compressions and computes its digests on the way.
//!
//! Where archivers differ, the answer is that of the container engines that unpack these layers: a converted image must
//! hold what its original shows when it runs. `docs/tar.md` lists the choices.

mod acl;
mod body;
pub mod decompress;
mod error;
mod fields;
mod header;
mod pax;
mod place;
mod reader;
mod source;
mod sparse;

pub use body::Run;
pub use error::{Part, Problem, TarError};
pub use reader::{Dropped, Reader};

/// Most bytes of one extended header or long name. The writers and readers of the container engines (Go's `archive/tar`)
/// stop at the same size, so no layer that they can unpack is refused.
pub const MAX_RECORDS: u64 = 1 << 20;

/// Most pieces of one sparse file: 32 MiB of map. Reaches a 16 GiB file that alternates between 4 KiB of data and 4 KiB
/// of hole from end to end.
pub const MAX_SPARSE_RUNS: usize = 1 << 21;

/// Longest path or link target: Linux's `PATH_MAX` without its NUL, more than any engine can unpack.
pub const MAX_PATH: usize = 4095;
