//! Feature bits and their names.

/// Compatible features: whoever does not know one may read on.
pub mod compat {
    /// The superblock's checksum is set.
    pub const SB_CHKSUM: u32 = 0x01;
    /// Inodes hold modification times (older images held change times).
    pub const MTIME: u32 = 0x02;
    /// Attribute headers hold a name filter.
    pub const XATTR_FILTER: u32 = 0x04;
    /// Shared attributes lie in the metabox.
    pub const SHARED_EA_IN_METABOX: u32 = 0x08;
    /// Long attribute prefixes lie in the image itself, in no inode.
    pub const PLAIN_XATTR_PFX: u32 = 0x10;
    /// Some attributes name content for page cache sharing.
    pub const ISHARE_XATTRS: u32 = 0x20;

    /// Bit and name of each.
    pub const NAMES: [(u32, &str); 6] = [
        (SB_CHKSUM, "sb_chksum"),
        (MTIME, "mtime"),
        (XATTR_FILTER, "xattr_filter"),
        (SHARED_EA_IN_METABOX, "shared_ea_in_metabox"),
        (PLAIN_XATTR_PFX, "plain_xattr_pfx"),
        (ISHARE_XATTRS, "ishare_xattrs"),
    ];
}

/// Incompatible features: whoever does not know one must not read.
pub mod incompat {
    /// LZ4 data is padded at its beginning. Written by `mkfs.erofs` even where nothing is compressed.
    pub const LZ4_0PADDING: u32 = 0x001;
    /// Compression parameters follow the superblock; the same bit allows big clusters.
    pub const COMPR_CFGS: u32 = 0x002;
    /// Some files are chunk-based.
    pub const CHUNKED_FILE: u32 = 0x004;
    /// There is a device table; the same bit means a second compression algorithm.
    pub const DEVICE_TABLE: u32 = 0x008;
    /// Compressed tails lie beside inodes.
    pub const ZTAILPACKING: u32 = 0x010;
    /// Parts of files lie in the packed inode; the same bit means deduplicated compressed data.
    pub const FRAGMENTS: u32 = 0x020;
    /// There are long attribute name prefixes.
    pub const XATTR_PREFIXES: u32 = 0x040;
    /// Block addresses may have 48 bits.
    pub const BITS_48: u32 = 0x080;
    /// Metadata is compressed.
    pub const METABOX: u32 = 0x100;

    /// Bit and name of each.
    pub const NAMES: [(u32, &str); 9] = [
        (LZ4_0PADDING, "lz4_0padding"),
        (COMPR_CFGS, "compr_cfgs/big_pcluster"),
        (CHUNKED_FILE, "chunked_file"),
        (DEVICE_TABLE, "device_table/compr_head2"),
        (ZTAILPACKING, "ztailpacking"),
        (FRAGMENTS, "fragments/dedupe"),
        (XATTR_PREFIXES, "xattr_prefixes"),
        (BITS_48, "48bit"),
        (METABOX, "metabox"),
    ];
}

/// The names of the set bits of `bits`, unknown ones as hexadecimal, joined with commas.
pub fn feature_names(bits: u32, table: &[(u32, &str)]) -> String {
    let named = table.iter().filter(|(bit, _)| bits & bit != 0).map(|(_, name)| (*name).to_owned());
    let unknown = (0..32)
        .map(|shift| 1_u32 << shift)
        .filter(|bit| bits & bit != 0 && table.iter().all(|(known, _)| known != bit))
        .map(|bit| format!("{bit:#x}"));
    named.chain(unknown).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_named() {
        assert_eq!(feature_names(incompat::METABOX | 0x8000, &incompat::NAMES), "metabox, 0x8000");
        assert_eq!(feature_names(0, &compat::NAMES), "");
    }
}
