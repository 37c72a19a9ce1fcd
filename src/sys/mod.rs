//! System calls that need care, and the only unsafe code.

mod apart;
pub mod descriptors;
mod file_error;
pub mod fuse;
mod hole;
pub mod idmap;
mod lock;
pub mod look;
pub mod loopdev;
mod map;
pub mod mount;
mod process;
pub mod stack;

pub use file_error::FileError;
pub use hole::punch_hole;
pub use lock::{FileLock, LockMode};
pub use map::SharedBytes;
pub use process::is_dying;
