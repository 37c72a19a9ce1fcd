//! Why the kernel does not present a stack.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::chain::LayerId;
use crate::model::DiffId;
use crate::sys::loopdev::LoopError;
use crate::sys::mount::MountError;

/// Why the kernel does not present a stack, or does not take another file.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// The kernel is still at it: most likely it reads a lazy file whose bytes do not come. When it is done, what it made
    /// is taken away.
    #[error("the kernel did not {attempted} within {seconds} s", seconds = .patience.as_secs_f32())]
    Slow {
        /// What was attempted.
        attempted: String,
        /// How long it was waited for.
        patience: Duration,
    },
    /// No loop device for the layer, or none that takes the file.
    #[error("cannot attach layer {diff_id} to a loop device")]
    Loop {
        /// The layer.
        diff_id: DiffId,
        /// Why.
        #[source]
        source: LoopError,
    },
    /// The kernel does not mount the layer.
    #[error("the kernel refuses the EROFS image of layer {diff_id}")]
    Refused {
        /// The layer.
        diff_id: DiffId,
        /// Why.
        #[source]
        source: MountError,
    },
    /// The kernel does not stack the layers.
    #[error("cannot stack the layers")]
    Stack(#[source] MountError),
    /// There is nothing to stack.
    #[error("there are no layers to stack")]
    Empty,
    /// A file that is said to hold the layer has another size.
    #[error("{path} is not layer {diff_id}: it has {found} bytes and not {wanted}", path = path.display())]
    Size {
        /// The layer.
        diff_id: DiffId,
        /// The file.
        path: PathBuf,
        /// Its size.
        found: u64,
        /// The layer's size.
        wanted: u64,
    },
    /// A block device would cut the end off.
    #[error("layer {diff_id} cannot be a block device: its {size} bytes are no multiple of 512")]
    Uneven {
        /// The layer.
        diff_id: DiffId,
        /// The layer's size.
        size: u64,
    },
    /// Neither a file nor a directory was given.
    #[error("there is no file that holds layer {0}")]
    NoFile(DiffId),
    /// Nobody holds the layer of this number.
    #[error("layer number {0} is not mounted")]
    NotMounted(u32),
    /// The number is that of another layer.
    #[error("cannot give number {number} to layer {id}: layer {taken_by} has it")]
    Taken {
        /// The number.
        number: u32,
        /// Who wanted it.
        id: Box<LayerId>,
        /// Who has it.
        taken_by: Box<LayerId>,
    },
    /// Another owner lives.
    #[error("{0} belongs to a process that lives")]
    Owned(PathBuf),
    /// The system refused.
    #[error("cannot {action} {path}", path = path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl DriverError {
    pub(super) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}

/// An error and its causes in one line: what `status` shows as the reason of something.
pub(super) fn in_one_line(error: &(dyn std::error::Error + 'static)) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line
}
