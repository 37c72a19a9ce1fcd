//! Layer blobs as chunks: chunk index and zstd frames. Bytes in, values out.
