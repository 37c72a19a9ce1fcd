//! One tar layer to one chunked blob: what is in it, that its index tells the truth, that bytes depend on nothing but
//! the tar, and that memory does not grow with the layer. Needs root.

use std::collections::BTreeMap;
use std::io::{self, Read, Write as _};
use std::path::Path;
use std::process::Command;

use headstart::chunked::{ChunkIndex, Compression, Framing, IndexFamily, IndexSection, SequentialReader, decode_chunk};
use headstart::convert::layer::{
    ChunkSizes, ConvertedLayer, LayerError, LayerOptions, LowerDirectory, LowerError, LowerFile, LowerLayers,
    convert_layer,
};
use headstart::erofs::Image;
use headstart::erofs::writer::LayerRole;
use headstart::model::{Algorithm, BlobDigest, DiffId, Digest, EntryKind, LayerEntry, Metadata, Name, RelPath};
use headstart::testkit::images::{
    EntryWithContent, directory, file, hard_link, listing_of, opaque, path, symlink, whiteout,
};
use headstart::testkit::layers::{layer_tars, plain_tar};
use headstart::testkit::tar::{RawHeader, TarWriter};
use headstart::testkit::tree::{Listing, pattern};
use proptest::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::erofs_writer::{checkers, kernel_listing, run};

fn pool(threads: usize) -> ThreadPool {
    ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

fn options(role: LayerRole) -> LayerOptions {
    LayerOptions::new(role, DiffId(Digest::of(Algorithm::Sha256, b"source")), &std::env::temp_dir())
}

fn tar_of(entries: &[EntryWithContent]) -> Vec<u8> {
    let mut tar = TarWriter::new();
    for (entry, content) in entries {
        tar.entry(entry, content);
    }
    tar.finish()
}

fn convert(tar: &[u8], options: &LayerOptions) -> (Vec<u8>, ConvertedLayer) {
    convert_layer(tar, options, &pool(2), None, Vec::new()).unwrap()
}

/// The image in a blob, read in both ways, with everything that the summary says checked.
#[track_caller]
fn image_in(blob: &[u8], layer: &ConvertedLayer) -> Vec<u8> {
    let summary = &layer.summary;
    assert_eq!(summary.size, blob.len() as u64);
    assert_eq!(summary.digest, BlobDigest(Digest::of(Algorithm::Sha256, blob)));
    let sequential = SequentialReader::new(Vec::new(), Compression::Zstd, 1 << 30);
    let (image, told) = sequential.run(blob).unwrap();
    assert_eq!(told.diff_id, layer.diff_id);
    assert_eq!(layer.diff_id, DiffId(Digest::of(Algorithm::Sha256, &image)));
    assert_eq!(summary.image_size, image.len() as u64);

    let index = index_of(blob, layer);
    assert_eq!(index.len(), summary.chunks);
    let mut chunk_bytes = Vec::new();
    for chunk in index.iter() {
        let stored = &blob[usize::try_from(chunk.blob.start()).unwrap()..usize::try_from(chunk.blob.end()).unwrap()];
        decode_chunk(&chunk, Compression::Zstd, stored, &mut chunk_bytes).unwrap();
        let place = usize::try_from(chunk.image.start()).unwrap()..usize::try_from(chunk.image.end()).unwrap();
        assert!(chunk_bytes == image[place], "chunk {:?} holds other bytes than the stream", chunk.image);
    }
    image
}

fn index_of(blob: &[u8], layer: &ConvertedLayer) -> ChunkIndex {
    let range = layer.summary.index_range;
    let section = IndexSection {
        family: IndexFamily::ImageSpec,
        framing: Framing::Frame,
        compression: Compression::Zstd,
        digest: Some(layer.summary.index_digest),
        data_end: range.start(),
    };
    section.read(&blob[usize::try_from(range.start()).unwrap()..]).unwrap()
}

/// A layer with something of everything.
fn oddities() -> Vec<EntryWithContent> {
    let mut sparse = pattern(70_000);
    sparse.resize(900_000, 0);
    let mut entries = vec![
        directory(""),
        directory("etc"),
        file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n"),
        file("etc/empty", b""),
        symlink("bin", "usr/bin"),
        file("usr/lib/large.so", &pattern(5_000_000)),
        file("usr/lib/medium.so", &pattern(700_000)),
        hard_link("usr/lib/also.so", "usr/lib/large.so"),
        file("var/sparse", &sparse),
        file("var/zeros", &vec![0; 500_000]),
        whiteout("gone"),
        opaque("replaced"),
    ];
    entries.extend((0..600).map(|i| file(&format!("usr/share/doc/{i:04}"), &pattern(i * 7))));
    entries
}

#[test]
fn a_layer_becomes_what_its_entries_say() {
    let entries = oddities();
    let dir = tempfile::tempdir().unwrap();
    for role in [LayerRole::Bottom, LayerRole::Upper] {
        let (blob, layer) = convert(&tar_of(&entries), &options(role));
        let image = image_in(&blob, &layer);
        let expected = listing_of(role, &entries).unwrap().without_directory_sizes();
        let seen = Listing::of_image(&Image::open(image.as_slice()).unwrap()).unwrap();
        seen.clone().without_directory_sizes().assert_equals(&expected);

        let path = dir.path().join(format!("{role:?}.erofs"));
        std::fs::write(&path, &image).unwrap();
        kernel_listing(&path).assert_equals(&seen);
        for checker in checkers() {
            run(Command::new(checker).arg("--extract").arg(&path));
        }

        let s = layer.statistics;
        let upper = u64::from(role == LayerRole::Upper);
        let directories = ["", "etc", "usr", "usr/lib", "usr/share", "usr/share/doc", "var", "replaced"].len() as u64;
        assert_eq!((s.tree.files, s.tree.directories, s.tree.symlinks), (606, directories, 1));
        assert_eq!((s.tree.hard_links, s.tree.whiteouts, s.tree.opaque_directories), (1, upper, upper));
        assert_eq!(s.tree.dropped.bottom_whiteouts.count, 2 * (1 - upper));
        let content: u64 = entries.iter().map(|(_, content)| content.len() as u64).sum();
        assert_eq!(s.tree.bytes, content);
        assert!(s.tree.hole_bytes > 1_200_000, "{s:?}");
        assert_eq!(s.metadata_bytes + s.data_bytes, image.len() as u64);
        assert_eq!(s.metadata_chunks + s.data_chunks, layer.summary.chunks);
        assert_eq!(s.tar_bytes, tar_of(&entries).len() as u64);
    }
}

#[test]
fn metadata_and_files_have_chunks_of_their_own() {
    let entries = oddities();
    let mut options = options(LayerRole::Bottom);
    options.chunks = ChunkSizes { metadata: 16 << 10, shared: 64 << 10, large: 256 << 10 };
    let (blob, layer) = convert(&tar_of(&entries), &options);
    let image = image_in(&blob, &layer);
    let chunks: Vec<_> = index_of(&blob, &layer).iter().map(|chunk| chunk.image).collect();
    let metadata = layer.statistics.metadata_bytes;
    assert!(metadata > 32 << 10);
    let starts: BTreeMap<u64, u64> = chunks.iter().map(|chunk| (chunk.start(), chunk.len())).collect();
    assert!(starts.contains_key(&metadata), "data begins with a chunk of its own");
    assert!(starts.range(..metadata).all(|(_, len)| *len <= 16 << 10));
    assert!(starts.range(metadata..).all(|(_, len)| *len <= 256 << 10));

    // Whatever fits into a chunk beside others is in one chunk.
    let image = Image::open(image.as_slice()).unwrap();
    let doc = ["usr", "share", "doc"].iter().fold(image.root_inode().unwrap(), |directory, name| {
        image.inode(image.lookup(&directory, name.as_bytes()).unwrap().unwrap().nid).unwrap()
    });
    let mut shared = 0;
    for entry in image.entries(&doc).unwrap() {
        let inode = image.inode(entry.nid).unwrap();
        let whole = headstart::model::ByteRange::to(inode.attributes().size);
        for extent in image.extents(&inode, whole) {
            let headstart::erofs::ExtentSource::Data { offset, .. } = extent.unwrap().source else { continue };
            let holders = chunks.iter().filter(|chunk| chunk.start() < offset + whole.len() && offset < chunk.end());
            assert_eq!(holders.count(), 1, "{:?} is cut", entry.name);
            shared += 1;
        }
    }
    assert!(shared > 590);
}

#[test]
fn bytes_depend_on_nothing_but_the_tar_and_the_options() {
    let tar = tar_of(&oddities());
    let (blob, layer) = convert(&tar, &options(LayerRole::Bottom));
    for threads in [1, 5] {
        let (again, _) =
            convert_layer(&tar[..], &options(LayerRole::Bottom), &pool(threads), None, Vec::new()).unwrap();
        assert!(again == blob, "{threads} threads give other bytes");
    }
    // On a thread of the pool itself, and from a reader that gives few bytes at a time.
    struct Dribble<'a>(&'a [u8]);
    impl Read for Dribble<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let len = buf.len().min(777);
            self.0.read(&mut buf[..len])
        }
    }
    let one = pool(1);
    let options_again = options(LayerRole::Bottom);
    let (again, _) = one.install(|| convert_layer(Dribble(&tar), &options_again, &one, None, Vec::new())).unwrap();
    assert!(again == blob);

    // Another source, another identity.
    let other =
        LayerOptions::new(LayerRole::Bottom, DiffId(Digest::of(Algorithm::Sha256, b"other")), &std::env::temp_dir());
    assert_ne!(convert(&tar, &other).1.diff_id, layer.diff_id);
    assert_eq!(layer.diff_id.to_string(), "sha256:79811ec718b0ff0a7a8d5ce16529fdb7876d524defcd95393536c3e216ec12f7");
}

#[test]
fn files_of_the_start_up_profile_come_first_in_its_order() {
    let mut sparse = pattern(20_000);
    sparse.resize(2_000_000, 0);
    sparse.extend(pattern(10_000));
    let names = ["a", "b", "c", "d", "e"];
    let mut entries: Vec<_> =
        names.iter().map(|name| file(name, &pattern(50_000 + usize::from(name.as_bytes()[0])))).collect();
    entries.insert(2, file("sparse", &sparse));
    entries.push(file("empty", b""));
    entries.push(hard_link("also d", "d"));
    let mut options = options(LayerRole::Bottom);
    options.early = ["d", "missing", "sparse", "empty", "b", "d"].map(path).into();
    let tar = tar_of(&entries);
    let (blob, layer) = convert(&tar, &options);
    let image = image_in(&blob, &layer);
    let image = Image::open(image.as_slice()).unwrap();
    let expected = listing_of(LayerRole::Bottom, &entries).unwrap().without_directory_sizes();
    Listing::of_image(&image).unwrap().without_directory_sizes().assert_equals(&expected);

    let root = image.root_inode().unwrap();
    let mut places = Vec::new();
    for name in ["a", "b", "c", "d", "e", "sparse"] {
        let inode = image.inode(image.lookup(&root, name.as_bytes()).unwrap().unwrap().nid).unwrap();
        for extent in image.extents(&inode, headstart::model::ByteRange::to(inode.attributes().size)) {
            if let headstart::erofs::ExtentSource::Data { offset, .. } = extent.unwrap().source {
                places.push((offset, name));
            }
        }
    }
    places.sort_unstable();
    let mut order: Vec<&str> = places.iter().map(|(_, name)| *name).collect();
    order.dedup();
    assert_eq!(order, ["d", "sparse", "b", "a", "c", "e"]);
    assert_eq!(places[0].0, layer.statistics.metadata_bytes);
    let boundary = places.iter().find(|(_, name)| *name == "a").unwrap().0;
    assert!(
        index_of(&blob, &layer).iter().any(|chunk| chunk.image.start() == boundary),
        "a chunk holds early and late files"
    );
}

/// A tar that is made while it is read.
struct Generated<F> {
    part: F,
    number: u64,
    bytes: Vec<u8>,
    at: usize,
}

impl<F: FnMut(u64) -> Option<Vec<u8>>> Read for Generated<F> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.at == self.bytes.len() {
            let Some(bytes) = (self.part)(self.number) else { return Ok(0) };
            (self.bytes, self.at, self.number) = (bytes, 0, self.number + 1);
        }
        let len = buf.len().min(self.bytes.len() - self.at);
        buf[..len].copy_from_slice(&self.bytes[self.at..self.at + len]);
        self.at += len;
        Ok(len)
    }
}

fn generated(part: impl FnMut(u64) -> Option<Vec<u8>>) -> impl Read {
    Generated { part, number: 0, bytes: Vec::new(), at: 0 }
}

/// Runs the calling test again in a process of its own, which converts `source`, and gives the most memory that
/// process had, in MiB. None in that process.
#[track_caller]
fn peak_memory(test: &str, source: impl Read, check: impl FnOnce(ConvertedLayer)) -> Option<u64> {
    const CHILD: &str = "HEADSTART_TEST_MEMORY";
    const SAYS: &str = "peak memory in KiB: ";
    if std::env::var_os(CHILD).is_some() {
        let (_, layer) = convert_layer(source, &options(LayerRole::Bottom), &pool(2), None, io::sink()).unwrap();
        check(layer);
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        let said = format!("\n{SAYS}{}\n", peak.trim().trim_end_matches(" kB"));
        io::stdout().write_all(said.as_bytes()).unwrap();
        return None;
    }
    let said = run(Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("convert_layer::{test}"), "--nocapture"])
        .env(CHILD, "1"));
    let peak: u64 = said.lines().find_map(|line| line.strip_prefix(SAYS)).unwrap().parse().unwrap();
    Some(peak >> 10)
}

#[test]
fn half_a_million_files_stay_below_300_mib() {
    const FILES: u64 = 500_000;
    // Long names and as many of them, in few directories and in one large one.
    let source = generated(|number| {
        let name = match number {
            FILES.. => return (number == FILES).then(|| vec![0; 1024]),
            0..300_000 => {
                format!("usr/share/some-package/{:03}/{:04}/file-with-a-name-{number}", number % 97, number % 1999)
            }
            _ => format!("var/cache/one-large-directory/entry-{number:030}"),
        };
        let mut header = RawHeader::new(b'0', name);
        header.size = 4;
        header.mtime = i128::from(number % 1000);
        let mut tar = TarWriter::new();
        Some(tar.raw(&header, &number.to_le_bytes()[..4]).unfinished())
    });
    let peak = peak_memory("half_a_million_files_stay_below_300_mib", source, |layer| {
        assert_eq!(layer.statistics.tree.files, FILES);
    });
    if let Some(peak) = peak {
        println!("{peak} MiB");
        assert!(peak < 300, "{peak} MiB");
    }
}

#[test]
fn a_huge_file_costs_no_memory() {
    // Beyond what 32 bits count. What is in it is easy to compress, or this would take minutes.
    const MIB: u64 = 4200;
    let mut mib = vec![0x55; 1 << 20];
    let source = generated(move |number| match number {
        0 => {
            let mut header = RawHeader::new(b'0', "huge");
            header.size = i128::from(MIB << 20);
            Some(header.block().to_vec())
        }
        1..=MIB => {
            mib[..8].copy_from_slice(&number.to_le_bytes());
            Some(mib.clone())
        }
        _ => (number == MIB + 1).then(|| vec![0; 1024]),
    });
    let peak = peak_memory("a_huge_file_costs_no_memory", source, |layer| {
        assert_eq!(layer.statistics.tree.bytes, MIB << 20);
        assert_eq!(layer.statistics.data_bytes, MIB << 20);
    });
    if let Some(peak) = peak {
        println!("{peak} MiB");
        assert!(peak < 100, "{peak} MiB");
    }
}

/// Lower layers that hold what a map says.
struct Lower {
    files: BTreeMap<RelPath, EntryWithContent>,
    directories: BTreeMap<RelPath, Metadata>,
}

impl LowerLayers for Lower {
    fn file(&mut self, path: &RelPath) -> Result<Option<LowerFile<'_>>, LowerError> {
        if path.to_bytes() == b"broken" {
            return Err("this one is broken".into());
        }
        Ok(self.files.get(path).map(|(entry, content)| {
            let entry: LayerEntry = entry.clone();
            LowerFile { entry, names: vec![path.clone()], content: Box::new(&content[..]) }
        }))
    }

    fn directory(&mut self, path: &RelPath) -> Result<LowerDirectory, LowerError> {
        let found = self.directories.get(path).cloned();
        Ok(found.map_or(LowerDirectory::Nothing, LowerDirectory::Directory))
    }

    fn names_in_root(&mut self) -> Result<Vec<Name>, LowerError> {
        Ok(Vec::new())
    }
}

#[test]
fn links_into_lower_layers_bring_their_files() {
    let below = [file("usr/bin/tool", &pattern(300_000)), symlink("usr/bin/link", "tool")];
    let mut implied = directory("usr").0.metadata;
    implied.permissions = 0o711;
    implied.uid = 9;
    let mut lower = Lower {
        files: below.iter().map(|below| (below.0.path.clone(), below.clone())).collect(),
        directories: [(path("usr"), implied.clone())].into(),
    };
    let links = [
        hard_link("usr/bin/a", "usr/bin/tool"),
        hard_link("usr/bin/b", "usr/bin/a"),
        hard_link("c", "usr/bin/tool"),
        hard_link("d", "usr/bin/link"),
        file("later", b"1"),
    ];
    let tar = tar_of(&links);
    let upper = options(LayerRole::Upper);
    let two = pool(2);
    let error = convert_layer(&tar[..], &upper, &two, None, Vec::new()).map(drop).unwrap_err();
    let LayerError::NeedsLower(needed) = &error else { panic!("{error}") };
    assert_eq!(
        needed.iter().map(|link| link.target.to_string()).collect::<Vec<_>>(),
        ["/usr/bin/tool", "/usr/bin/link"]
    );

    let (blob, layer) = convert_layer(&tar[..], &upper, &two, Some(&mut lower), Vec::new()).unwrap();
    let image = image_in(&blob, &layer);
    let seen = Listing::of_image(&Image::open(image.as_slice()).unwrap()).unwrap();
    // The same as if the files had come first, under the names they have below.
    let [tool, link] = below;
    let mut same = vec![tool, link];
    same.extend(links.iter().filter(|link| matches!(link.0.kind, EntryKind::HardLink { .. })).cloned());
    same.extend([file("later", b"1"), directory("usr")]);
    same.last_mut().unwrap().0.metadata = implied;
    let expected = listing_of(LayerRole::Upper, &same).unwrap();
    seen.without_directory_sizes().assert_equals(&expected.without_directory_sizes());

    for (target, message) in [("missing", "hard link /a names /missing"), ("broken", "cannot take /broken")] {
        let tar = tar_of(&[hard_link("a", target)]);
        let error = convert_layer(&tar[..], &upper, &two, Some(&mut lower), Vec::new()).map(drop).unwrap_err();
        let said = format!("{:#}", anyhow::Error::from(error));
        assert!(said.contains(message), "{said}");
    }
}

#[test]
fn a_tar_cut_anywhere_is_an_error() {
    let tar = tar_of(&[file("a", &pattern(3000)), file("b", &pattern(100_000))]);
    let whole = options(LayerRole::Bottom);
    for cut in [10, 512, 700, 4000, 60_000, 100_000] {
        let result = convert_layer(&tar[..cut], &whole, &pool(1), None, Vec::new()).map(drop);
        // Between two entries a tar may end.
        if cut != 512 + 3072 {
            assert!(matches!(result, Err(LayerError::Tar(_))), "cut at {cut}: {result:?}");
        }
    }
    let nowhere = LayerOptions { spool: Path::new("/nonexistent").into(), ..whole };
    let error = convert_layer(&tar[..], &nowhere, &pool(1), None, Vec::new()).map(drop).unwrap_err();
    assert!(error.to_string().contains("temporary file in /nonexistent"), "{error}");
}

#[test]
fn a_sink_that_is_full_is_an_error() {
    struct Full(usize);
    impl io::Write for Full {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 = self.0.checked_sub(bytes.len()).ok_or(io::ErrorKind::StorageFull)?;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let tar = tar_of(&oddities());
    for room in [0, 10_000, 200_000] {
        let error =
            convert_layer(&tar[..], &options(LayerRole::Bottom), &pool(2), None, Full(room)).map(drop).unwrap_err();
        assert!(matches!(&error, LayerError::Write(_)), "{error}");
    }
}

#[test]
fn what_follows_the_end_of_a_tar_is_left_to_the_caller() {
    let mut tar = plain_tar(&[("a", b"1")]);
    let end = tar.len();
    tar.extend_from_slice(&[1; 100]);
    let (_, layer) = convert(&tar, &options(LayerRole::Bottom));
    assert_eq!(layer.statistics.tar_bytes, end as u64);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]
    #[test]
    fn any_layer_converts_and_reads_back((layer, tar) in layer_tars()) {
        let mut options = options(LayerRole::Upper);
        options.chunks = ChunkSizes { metadata: 4096, shared: 8192, large: 16_384 };
        let mut any = AnyLower;
        let (blob, converted) = convert_layer(&tar[..], &options, &pool(2), Some(&mut any), Vec::new()).unwrap();
        let image = image_in(&blob, &converted);
        let entries: Vec<EntryWithContent> = layer.files.iter().map(|file| {
            (file.entry.clone(), file.pieces.iter().flat_map(|piece| piece.bytes()).collect())
        }).collect();
        let links_are_inside = entries.iter().all(|(entry, _)| !matches!(entry.kind, EntryKind::HardLink { .. }));
        let seen = Listing::of_image(&Image::open(image.as_slice()).unwrap()).unwrap();
        if links_are_inside && let Some(expected) = listing_of(LayerRole::Upper, &entries) {
            let difference = seen.without_directory_sizes().difference(&expected.without_directory_sizes());
            prop_assert!(difference.is_none(), "{}", difference.unwrap_or_default());
        }
    }
}

/// Lower layers that have a file wherever one is looked for.
struct AnyLower;

impl LowerLayers for AnyLower {
    fn file(&mut self, _: &RelPath) -> Result<Option<LowerFile<'_>>, LowerError> {
        let (entry, _) = file("x", b"from below");
        Ok(Some(LowerFile { entry, names: Vec::new(), content: Box::new(&b"from below"[..]) }))
    }

    fn directory(&mut self, _: &RelPath) -> Result<LowerDirectory, LowerError> {
        Ok(LowerDirectory::Nothing)
    }

    fn names_in_root(&mut self) -> Result<Vec<Name>, LowerError> {
        Ok(Vec::new())
    }
}
