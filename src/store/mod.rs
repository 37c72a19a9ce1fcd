//! Blob files, presence bitmaps and what survives a crash.
