//! A foreign layer tar, converted. What comes out is an image without a fault: the checker finds nothing, chunks and
//! stream agree, every file holds what some entry of the tar held, and the same tar gives the same blob.
//!
//! Input: one byte of choices, the tar.
#![no_main]

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::LazyLock;

use headstart::chunked::{Compression, Framing, IndexFamily, IndexSection, SequentialReader, decode_chunk};
use headstart::convert::layer::{ChunkSizes, ConvertedLayer, LayerOptions, convert_layer};
use headstart::erofs::writer::LayerRole;
use headstart::erofs::{Image, check};
use headstart::model::{Algorithm, DiffId, Digest, EntryKind, FileKind};
use headstart::tar;
use libfuzzer_sys::fuzz_target;

/// Larger files are holes for the most part; their contents are not looked at.
const BYTES: u64 = 1 << 20;

static POOL: LazyLock<rayon::ThreadPool> =
    LazyLock::new(|| rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("one thread can be had"));

fuzz_target!(|input: &[u8]| {
    let Some((choice, tar)) = input.split_first() else { return };
    let Some((blob, layer)) = convert(tar, *choice) else { return };
    let (again, _) = convert(tar, *choice).expect("what could be converted once can be again");
    assert_eq!(blob, again);

    let section = IndexSection {
        family: IndexFamily::ImageSpec,
        framing: Framing::Frame,
        compression: Compression::Zstd,
        digest: Some(layer.summary.index_digest),
        data_end: layer.summary.index_range.start(),
    };
    let index = section.read(&blob[layer.summary.index_range.start() as usize..]).expect("our index is readable");
    let (mut bytes, mut out) = (Vec::new(), Vec::new());
    for chunk in index.iter() {
        let stored = &blob[chunk.blob.start() as usize..chunk.blob.end() as usize];
        decode_chunk(&chunk, Compression::Zstd, stored, &mut out).expect("our chunks are sound");
        bytes.extend_from_slice(&out);
    }
    let (stream, summary) = SequentialReader::new(Vec::new(), Compression::Zstd, u64::MAX).run(&blob[..]).unwrap();
    assert!(stream == bytes);
    assert_eq!((summary.diff_id, DiffId(Digest::of(Algorithm::Sha256, &bytes))), (layer.diff_id, layer.diff_id));

    let image = Image::open(bytes).expect("our image opens");
    let report = check(&image).expect("our image is checked");
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    let statistics = layer.statistics.tree;
    assert_eq!((report.inodes, report.directories), (statistics.inodes, statistics.directories));
    look(&image, &contents(tar));
});

fn convert(tar: &[u8], choice: u8) -> Option<(Vec<u8>, ConvertedLayer)> {
    let role = if choice & 1 == 0 { LayerRole::Bottom } else { LayerRole::Upper };
    let source = DiffId(Digest::of(Algorithm::Sha256, b"fuzz"));
    let mut options = LayerOptions::new(role, source, Path::new("/dev/shm"));
    options.level = 1;
    if choice & 2 == 0 {
        options.chunks = ChunkSizes { metadata: 4096, shared: 4096, large: 8192 };
    }
    convert_layer(tar, &options, &POOL, None, Vec::new()).ok()
}

/// What the regular files of a tar hold.
fn contents(tar: &[u8]) -> BTreeSet<Digest> {
    let mut reader = tar::Reader::new(tar);
    let mut digests = BTreeSet::new();
    while let Some(entry) = reader.next_entry().expect("what was converted can be read") {
        if let EntryKind::Regular { size } = entry.kind
            && size <= BYTES
        {
            let mut bytes = vec![0; size as usize];
            let mut filled = 0;
            while filled < bytes.len() {
                filled += reader.read_body(&mut bytes[filled..]).expect("what was converted can be read");
            }
            digests.insert(Digest::of(Algorithm::Sha256, &bytes));
        }
    }
    digests
}

/// Every small file of the image holds what some entry of the tar held.
fn look(image: &Image<Vec<u8>>, contents: &BTreeSet<Digest>) {
    let (mut queue, mut seen) = (vec![image.root()], BTreeSet::new());
    while let Some(nid) = queue.pop() {
        if !seen.insert(nid) {
            continue;
        }
        let inode = image.inode(nid).expect("our inodes are sound");
        image.xattrs(&inode).expect("our attributes are sound");
        match inode.attributes().kind {
            FileKind::Directory => {
                queue.extend(image.entries(&inode).expect("our directories are sound").iter().map(|entry| entry.nid));
            }
            FileKind::Regular if inode.attributes().size <= BYTES => {
                let mut bytes = vec![1; inode.attributes().size as usize];
                let mut filled = 0;
                while filled < bytes.len() {
                    filled += image.read(&inode, filled as u64, &mut bytes[filled..]).expect("our files are sound");
                }
                assert!(contents.contains(&Digest::of(Algorithm::Sha256, &bytes)), "a file of no entry's content");
            }
            FileKind::Symlink => drop(image.read_link(&inode).expect("our links are sound")),
            _ => {}
        }
    }
}
