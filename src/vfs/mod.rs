//! Inodes, lookups, directories and reads of a merged snapshot.
