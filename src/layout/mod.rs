//! Images on the local disk: OCI layouts and archives.
