//! System calls that need care, and the only unsafe code.

pub mod fuse;
mod lock;
mod map;
pub mod mount;

pub use lock::{FileLock, LockMode};
pub use map::SharedBytes;
