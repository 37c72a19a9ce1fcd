//! The only download path.
