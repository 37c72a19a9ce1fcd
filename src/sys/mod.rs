//! System calls that need care, and the only unsafe code.

mod lock;
mod map;

pub use lock::{FileLock, LockMode};
pub use map::SharedBytes;
