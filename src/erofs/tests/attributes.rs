//! Extended attributes.

use super::*;

fn xattr(name: &[u8], value: &[u8]) -> Xattr {
    Xattr { name: name.into(), value: value.into() }
}

/// An image whose inode 80 has this attribute area, and shared attributes from byte 4096 on.
fn with_xattrs(area: &[u8], shared: &[u8]) -> Draft {
    let mut draft = Draft::new(12, 3);
    draft.superblock.xattr_block = 1;
    let mut inode = compact(FILE, DataLayout::FlatPlain, 0, 0);
    inode.xattr_count = xattr_count(area.len());
    draft.compact(80, inode, area);
    draft.put(4096, shared);
    draft
}

#[test]
fn attributes_are_read_from_both_places_under_full_names() {
    let large = vec![9; 3000];
    let first = xattr_entry(6, b"capability", b"cap");
    let second = xattr_entry(4, b"overlay.opaque", b"y");
    let third = xattr_entry(1, b"large", &large);
    let id = |bytes: usize| u32::try_from(bytes / 4).unwrap();
    let area = xattr_area(
        0,
        &[0, id(first.len()), id(first.len() + second.len())],
        &[
            (1, b"b", b"inline"),
            (2, b"", b"acl"),
            (3, b"", b""),
            (5, b"lustre", b"hidden"),
            (0, b"x", b"none"),
            (9, b"y", b""),
        ],
    );
    let draft = with_xattrs(&area, &[first, second, third].concat());
    let image = draft.open();
    let inode = image.inode(nid(80)).unwrap();
    assert!(inode.has_xattrs());
    let expected = [
        xattr(b"security.capability", b"cap"),
        xattr(b"system.posix_acl_access", b"acl"),
        xattr(b"system.posix_acl_default", b""),
        xattr(b"trusted.overlay.opaque", b"y"),
        xattr(b"user.b", b"inline"),
        xattr(b"user.large", &large),
    ];
    assert_eq!(image.xattrs(&inode).unwrap(), expected);
    for Xattr { name, value } in &expected {
        assert_eq!(image.xattr(&inode, name).unwrap().as_ref(), Some(value));
    }
    for absent in [&b"user.c"[..], b"user.", b"lustre.lustre", b"x", b""] {
        assert_eq!(image.xattr(&inode, absent).unwrap(), None, "{absent:?}");
    }
}

#[test]
fn of_two_attributes_with_one_name_the_first_counts() {
    let area = xattr_area(0, &[0], &[(1, b"a", b"inline"), (1, b"a", b"again")]);
    let image = with_xattrs(&area, &xattr_entry(1, b"a", b"shared")).open();
    let inode = image.inode(nid(80)).unwrap();
    assert_eq!(image.xattrs(&inode).unwrap(), [xattr(b"user.a", b"inline")]);
    assert_eq!(image.xattr(&inode, b"user.a").unwrap().as_deref(), Some(&b"inline"[..]));
}

#[test]
fn long_prefixes_complete_names() {
    let prefixes: Vec<u8> = [&b"\x04\0\x04ovl"[..], b"\0\0", b"\x01\0\x01", b"\0"].concat();
    let area = xattr_area(0, &[], &[(0x80, b".x", b"1"), (0x81, b"y", b"2"), (0x82, b"z", b"no such prefix")]);
    let expected = [xattr(b"trusted.ovl.x", b"1"), xattr(b"user.y", b"2")];

    // In the image itself.
    let mut draft = with_xattrs(&area, b"");
    draft.superblock.feature_incompat = incompat::XATTR_PREFIXES;
    draft.superblock.feature_compat |= compat::PLAIN_XATTR_PFX;
    draft.superblock.xattr_prefix_count = 2;
    draft.superblock.xattr_prefix_start = 8192 / 4;
    draft.put(8192, &prefixes);
    let image = draft.open();
    assert_eq!(image.xattrs(&image.inode(nid(80)).unwrap()).unwrap(), expected);

    // In the packed inode.
    let mut packed = with_xattrs(&area, b"");
    packed.superblock.feature_incompat = incompat::XATTR_PREFIXES | incompat::FRAGMENTS;
    packed.superblock.xattr_prefix_count = 2;
    packed.superblock.xattr_prefix_start = 1;
    packed.superblock.packed_nid = 100;
    let data = [&b"skip"[..], &prefixes].concat();
    packed.compact(100, compact(FILE, DataLayout::FlatInline, u32::try_from(data.len()).unwrap(), 0), &data);
    let image = packed.open();
    assert_eq!(image.xattrs(&image.inode(nid(80)).unwrap()).unwrap(), expected);

    // Cut off, empty, too long.
    packed.compact(100, compact(FILE, DataLayout::FlatInline, 13, 0), &data);
    assert_eq!(defect(Image::open(packed.bytes())), Defect::XattrOverrun);
    draft.put(8192, &[0, 0]);
    assert_eq!(defect(Image::open(draft.bytes())), Defect::PrefixLength(0));
    draft.put(8192, &[1, 1]);
    assert_eq!(defect(Image::open(draft.bytes())), Defect::PrefixLength(257));
}

#[test]
fn the_name_filter_is_believed_where_it_is_defined() {
    let bit = xattr_filter_bit(1, b"a");
    let area = xattr_area(1 << bit, &[], &[(1, b"a", b"here")]);
    let mut draft = with_xattrs(&area, b"");
    let find = |draft: &Draft| {
        let image = draft.open();
        let found = image.xattr(&image.inode(nid(80)).unwrap(), b"user.a").unwrap();
        found.is_some()
    };
    assert!(find(&draft));
    draft.superblock.feature_compat |= compat::XATTR_FILTER;
    assert!(!find(&draft));
    draft.superblock.xattr_filter_reserved = 1;
    assert!(find(&draft));
}

#[test]
fn attributes_that_reach_out_are_refused() {
    let all = |area: &[u8], shared: &[u8]| {
        let image = with_xattrs(area, shared).open();
        image.xattrs(&image.inode(nid(80)).unwrap())
    };
    // A header alone is no attribute.
    assert_eq!(all(&xattr_area(0, &[], &[]), b"").unwrap(), []);
    let mut area = xattr_area(0, &[], &[(1, b"ab", b"cd")]);
    area[14] = 3;
    assert_eq!(defect(all(&area, b"")), Defect::XattrOverrun);
    let mut area = xattr_area(0, &[], &[(1, b"ab", b"cd")]);
    area[4] = 3;
    assert_eq!(defect(all(&area, b"")), Defect::XattrOverrun);
    // Shared ones outside of the image, or reaching out of it.
    assert!(matches!(defect(all(&xattr_area(0, &[u32::MAX], &[]), b"")), Defect::OutOfBounds { .. }));
    let mut last = vec![0; 8192 - 4];
    last.extend([200, 1, 255, 255]);
    assert!(matches!(defect(all(&xattr_area(0, &[2047], &[]), &last)), Defect::OutOfBounds { .. }));
    // Names that cannot be.
    let long = [b'n'; 255];
    assert!(matches!(defect(all(&xattr_area(0, &[], &[(1, &long, b"")]), b"")), Defect::XattrName(_)));
    assert!(matches!(defect(all(&xattr_area(0, &[], &[(1, b"a\0b", b"")]), b"")), Defect::XattrName(_)));
    // An area larger than the image.
    let mut draft = Draft::new(12, 2);
    let mut inode = compact(FILE, DataLayout::FlatPlain, 0, 0);
    inode.xattr_count = u16::MAX;
    draft.compact(80, inode, b"");
    let image = draft.open();
    assert!(matches!(defect(image.xattrs(&image.inode(nid(80)).unwrap())), Defect::OutOfBounds { .. }));
}

#[test]
fn every_known_prefix_is_shown_or_hidden_on_purpose() {
    let hidden: Vec<_> =
        XATTR_PREFIXES.iter().filter(|(index, _)| ondisk::visible_xattr_prefix(*index).is_none()).collect();
    assert_eq!(hidden, [&(5, &b"lustre."[..])]);
}
