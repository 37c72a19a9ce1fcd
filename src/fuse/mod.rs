//! The kernel's FUSE protocol, translated.
