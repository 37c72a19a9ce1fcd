//! A read-only OCI distribution endpoint over an image layout.
