//! Writes the seed corpus of every fuzz target: `fuzz-seeds DIR` makes `DIR/<target>/seed-*`.
//!
//! Small valid inputs of every kind, so that the fuzzer begins behind the magics and lengths. Needs root (devices,
//! `trusted` attributes), mkfs.erofs and tar.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};
use headstart::chunked::{BlobAssembler, Compression, compress_chunk};
use headstart::model::{Algorithm, DiffId, Digest};
use headstart::oci::{
    Descriptor, EROFS_LAYER_ZSTD, Form, Index, Manifest, index_descriptor, layer_descriptor, layer_role, media,
};
use headstart::tar::decompress::Compression as TarCompression;
use headstart::testkit::layers::{compress, plain_tar};
use headstart::testkit::layouts::{TestLayer, write_layout};

fn main() -> anyhow::Result<()> {
    let corpus: PathBuf = std::env::args_os().nth(1).context("usage: fuzz-seeds DIR")?.into();
    let work = tempfile::tempdir().context("cannot make a directory to work in")?;
    let tree = work.path().join("tree");
    build_tree(&tree)?;
    for (target, seeds) in [
        ("chunk_index", chunk_index()),
        ("manifest", manifest()),
        ("erofs_image", erofs_images(work.path(), &tree)?),
        ("tar", tars(work.path(), &tree)?),
        ("layer", tars(work.path(), &tree)?),
        ("archive", archives(work.path())?),
        ("hosts", hosts()),
    ] {
        let directory = corpus.join(target);
        fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        for (number, seed) in seeds.iter().enumerate() {
            let path = directory.join(format!("seed-{number:02}"));
            fs::write(&path, seed).with_context(|| format!("cannot write {}", path.display()))?;
        }
    }
    Ok(())
}

/// The corpus format of `chunk_index`: choices, where the index begins, the blob.
fn chunk_index() -> Vec<Vec<u8>> {
    let chunks: [&[u8]; 4] = [b"headstart", &[0; 5000], b"a container should start before its image", &[7; 20]];
    let mut seeds = Vec::new();
    for compression in [Compression::Zstd, Compression::None] {
        for sums in [None, Some(Algorithm::Sha256), Some(Algorithm::Sha512)] {
            for count in [0, 1, chunks.len()] {
                let assembler = || {
                    let mut assembler = BlobAssembler::with_checksums(Vec::new(), compression, sums);
                    for chunk in &chunks[..count] {
                        let stored =
                            if compression == Compression::None { chunk.to_vec() } else { compress_chunk(3, chunk) };
                        assembler.append(&stored, chunk.len() as u64).expect("a vector takes everything");
                    }
                    assembler
                };
                let (blob, summary) = assembler().finish().expect("a vector takes everything");
                let choice = if compression == Compression::None { 2 | 4 } else { 0 };
                seeds.push(chunk_seed(choice, summary.index_range.start(), &blob));
                let (mut blob, detached) = assembler().finish_detached();
                let start = blob.len() as u64;
                blob.extend_from_slice(&detached.payload);
                seeds.push(chunk_seed(choice | 4, start, &blob));
            }
        }
    }
    // The older draft: 24 bytes of header, one size for all chunks.
    let frames = [compress_chunk(3, &[1; 64]), compress_chunk(3, b"the rest")];
    let mut payload = vec![0xCD, 0xE4, 0xEC, 0x67, 1, 0, 0, 0];
    payload.extend_from_slice(&72_u64.to_le_bytes());
    payload.extend_from_slice(&64_u32.to_le_bytes());
    payload.extend_from_slice(&[1, 32, 0, 0]);
    let mut blob = Vec::new();
    for frame in &frames {
        payload.extend_from_slice(&(blob.len() as u64).to_le_bytes());
        payload.extend_from_slice(Digest::of(Algorithm::Sha256, frame).as_bytes());
        blob.extend_from_slice(frame);
    }
    let start = blob.len() as u64;
    blob.extend_from_slice(&[0x5E, 0x2A, 0x4D, 0x18]);
    blob.extend_from_slice(&u32::try_from(payload.len()).expect("a small payload").to_le_bytes());
    blob.extend_from_slice(&payload);
    seeds.push(chunk_seed(1, start, &blob));
    seeds
}

fn chunk_seed(choice: u8, start: u64, blob: &[u8]) -> Vec<u8> {
    let start = u16::try_from(start).expect("seeds are small");
    [&[choice][..], &start.to_le_bytes(), blob].concat()
}

/// The corpus format of `manifest`: document, config, name.
fn manifest() -> Vec<Vec<u8>> {
    let mut assembler = BlobAssembler::new(Vec::new(), Compression::Zstd);
    assembler.append(&compress_chunk(3, b"content"), 7).expect("a vector takes everything");
    let (_, summary) = assembler.finish().expect("a vector takes everything");
    let diff_id = DiffId(Digest::of(Algorithm::Sha256, b"content"));
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","os.features":["erofs"],"rootfs":{{"type":"layers","diff_ids":["{diff_id}","{diff_id}","{diff_id}","{diff_id}"]}}}}"#
    );
    let layer = |position, form| layer_descriptor(form, &summary, diff_id, layer_role(position, 2));
    let with = |media_type: &str, annotations: &[(&str, &str)]| {
        let mut descriptor = Descriptor::new(media_type, summary.digest, summary.size);
        descriptor.annotations = annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        descriptor
    };
    let digest = summary.digest.to_string();
    let stacks = [
        vec![layer(0, Form::ImageSpec), layer(1, Form::ImageSpec)],
        vec![layer(0, Form::Containerd23)],
        vec![with(EROFS_LAYER_ZSTD, &[]), index_descriptor(b"index", summary.digest), layer(1, Form::ImageSpec)],
        vec![
            with("application/octet-stream", &[("org.erofs.role", "device")]),
            with("application/vnd.erofs", &[("org.erofs.role", "overlay-data")]),
            with(
                "application/vnd.erofs+zstd",
                &[
                    ("org.erofs.dmverity.hash_offset", "8192"),
                    ("org.erofs.dmverity.root_digest", &digest),
                    ("org.erofs.dmverity.block_size", "512"),
                ],
            ),
        ],
        vec![with(
            "application/vnd.erofs.layer.v1+zstd",
            &[
                ("dev.containerd.erofs.zstd.chunk_table_offset", "10"),
                ("dev.containerd.erofs.zstd.chunk_digest", &digest),
            ],
        )],
        vec![with(media::OCI_LAYER_GZIP, &[]), with(media::DOCKER_LAYER_GZIP, &[])],
    ];
    let names = [
        "docker://registry.example:5000/a/b:tag@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "oci:dir/of/layout:latest",
        "docker-archive:file.tar:name:tag",
        "linux(+erofs)/arm64/v8",
        "windows(10.0.17763)/amd64",
        "debian",
    ];
    let mut seeds = Vec::new();
    for (layers, name) in stacks.into_iter().zip(names) {
        let manifest = Manifest::new(Descriptor::of(media::OCI_CONFIG, config.as_bytes()), layers);
        seeds.push([manifest.to_json().as_slice(), b"\0", config.as_bytes(), b"\0", name.as_bytes()].concat());
    }
    let index = br#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":2,"platform":{"architecture":"amd64","os":"linux","os.features":["erofs"]}}]}"#;
    seeds.push([&index[..], b"\0\0", names[0].as_bytes()].concat());
    seeds.push([Index::new(Vec::new()).to_json().as_slice(), b"\0{}\0", names[1].as_bytes()].concat());
    seeds
}

/// A few files of every kind, in few bytes.
fn build_tree(root: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(root.join("directory/below"))?;
    for (name, len) in [("empty", 0), ("tail", 100), ("block", 4096), ("more", 5000), ("directory/.wh.gone", 0)] {
        fs::write(root.join(name), vec![b'x'; len])?;
    }
    let mut sparse = fs::File::create(root.join("sparse"))?;
    sparse.write_all(b"start")?;
    sparse.set_len(40_000)?;
    for number in 0..60 {
        fs::write(root.join(format!("directory/file-with-a-long-name-{number:03}")), b"")?;
    }
    symlink("tail", root.join("link"))?;
    symlink("l".repeat(200), root.join("long-link"))?;
    // mkfs.erofs 1.5 fails on names of full length.
    fs::write(root.join("n".repeat(200)), b"long name")?;
    fs::hard_link(root.join("tail"), root.join("directory/again"))?;
    fs::set_permissions(root.join("tail"), fs::Permissions::from_mode(0o4751))?;
    let null = rustix::fs::makedev(1, 3);
    let kind = rustix::fs::FileType::CharacterDevice;
    rustix::fs::mknodat(rustix::fs::CWD, root.join("null"), kind, rustix::fs::Mode::from(0o666), null)?;
    for (name, key) in [("tail", c"user.small"), ("block", c"user.small"), ("directory", c"trusted.overlay.opaque")] {
        rustix::fs::setxattr(root.join(name), key, b"y", rustix::fs::XattrFlags::empty())?;
    }
    Ok(())
}

fn run(program: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("cannot run {program}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {arguments:?} failed: {errors}");
    Ok(())
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary directories have plain names")
}

/// The corpus format of `erofs_image`: choices, where a second device begins, the image.
fn erofs_images(work: &Path, tree: &Path) -> anyhow::Result<Vec<Vec<u8>>> {
    let image = work.join("image");
    let mut seeds = Vec::new();
    for options in [
        &["-T0"][..],
        &["-T0", "-Eforce-inode-compact"],
        &["-Eforce-inode-extended", "-x1"],
        &["-Enoinline_data", "-x-1"],
        &["-T0", "-Eforce-chunk-indexes", "--chunksize=4096"],
        &["--chunksize=4096", "-Eforce-inode-blockmap"],
    ] {
        run("mkfs.erofs", &[options, &["--quiet", text(&image), text(tree)]].concat())?;
        let bytes = fs::read(&image)?;
        fs::remove_file(&image)?;
        seeds.push([&[0; 3][..], &bytes].concat());
    }
    let device = work.join("device");
    let blobs = format!("--blobdev={}", text(&device));
    run("mkfs.erofs", &["-T0", "--chunksize=4096", &blobs, "--quiet", text(&image), text(tree)])?;
    let bytes = fs::read(&image)?;
    let [low, high] = u16::try_from(bytes.len() / 512).context("the image of a seed is too large")?.to_le_bytes();
    seeds.push([&[2, low, high][..], &bytes, &fs::read(&device)?].concat());
    Ok(seeds)
}

/// The corpus format of `tar` and `layer`: choices, the tar.
fn tars(work: &Path, tree: &Path) -> anyhow::Result<Vec<Vec<u8>>> {
    let file = work.join("tar");
    let mut seeds = Vec::new();
    for options in [
        &["--format=gnu", "--sparse"][..],
        &["--format=oldgnu", "--sparse"],
        &["--format=pax", "--sparse", "--sparse-version=0.0"],
        &["--format=pax", "--sparse", "--sparse-version=0.1"],
        &["--format=pax", "--sparse", "--sparse-version=1.0", "--xattrs", "--xattrs-include=*", "--acls"],
        &["--format=ustar", "--exclude=long-link", "--exclude=nnnn*"],
        &["--format=v7", "--exclude=long-link", "--exclude=nnnn*", "--exclude=null"],
    ] {
        run(
            "tar",
            &[options, &["--exclude=file-with*", "--blocking-factor=1", "-C", text(tree), "-cf", text(&file), "."]]
                .concat(),
        )?;
        seeds.push([&[0][..], &fs::read(&file)?].concat());
    }
    Ok(seeds)
}

/// The corpus format of `archive`: a tarred layout, or what `docker save` writes in its old and its new form.
fn archives(work: &Path) -> anyhow::Result<Vec<Vec<u8>>> {
    let layer = plain_tar(&[("file", b"content")]);
    let layout = work.join("layout");
    write_layout(&layout, &[TestLayer::of_tar(&layer, TarCompression::Gzip)])?;
    let saved = work.join("saved");
    fs::create_dir_all(saved.join("0123"))?;
    let diff_id = Digest::of(Algorithm::Sha256, &layer);
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["{diff_id}","{diff_id}","{diff_id}"]}}}}"#
    );
    let listing =
        r#"[{"Config":"0123.json","RepoTags":["a/b:latest"],"Layers":["0123/layer.tar","0123/again.tar","layer.gz"]}]"#;
    fs::write(saved.join("manifest.json"), listing)?;
    fs::write(saved.join("0123.json"), config)?;
    fs::write(saved.join("0123/layer.tar"), &layer)?;
    fs::write(saved.join("layer.gz"), compress(&layer, TarCompression::Gzip))?;
    symlink("layer.tar", saved.join("0123/again.tar"))?;
    let file = work.join("archive");
    let mut seeds = Vec::new();
    for (tree, formats) in [(&layout, &["gnu", "pax"][..]), (&saved, &["gnu", "pax", "ustar"])] {
        for format in formats {
            let format = format!("--format={format}");
            run("tar", &[&format, "--blocking-factor=1", "-C", text(tree), "-cf", text(&file), "."])?;
            seeds.push(fs::read(&file)?);
        }
    }
    Ok(seeds)
}

/// The corpus format of `hosts`: which registry, the text.
fn hosts() -> Vec<Vec<u8>> {
    [
        "",
        "server = 'https://upstream.example:8443/prefix'\ncapabilities = ['pull', 'resolve', 'push']\n",
        "ca = ['a.pem', '/b.pem']\nclient = [['c.cert', 'c.key'], ['d.pem', '']]\nskip_verify = true\n[header]\nx = ['1']\n",
        "[host.'https://mirror.example']\n  capabilities = ['pull']\n  override_path = true\n  client = 'e.pem'\n\
         [host.'https://mirror.example'.header]\n  x-one = '1'\n[host.'http://other.example/v2']\n",
    ]
    .iter()
    .enumerate()
    .map(|(number, text)| [&[u8::try_from(number).expect("seeds are few")][..], text.as_bytes()].concat())
    .collect()
}
