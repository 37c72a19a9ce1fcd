//! Plans as tables: descriptors in, layers or the fault's words out.

use super::*;
use crate::chunked::{Framing, IndexFamily, MAX_INDEX_SIZE};
use crate::model::Algorithm;
use crate::oci::erofs::{
    CHUNK_INDEX, CONTAINERD_LAYER_ZSTD, EROFS_LAYER, EROFS_LAYER_ZSTD, Form, INDEX_DIGEST, INDEX_MEDIA_TYPE,
    INDEX_RANGE, INDEX_TARGET, PR_TABLE_DIGEST, PR_TABLE_OFFSET, PR_VERITY, VERITY_BLOCK_SIZE, VERITY_HASH_OFFSET,
    VERITY_ROOT_DIGEST, index_descriptor, layer_descriptor, layer_role,
};
use crate::oci::media;
use crate::{chunked::BlobAssembler, chunked::compress_chunk};

fn sha(text: &str) -> Digest {
    Digest::of(Algorithm::Sha256, text.as_bytes())
}

/// A layer of 10,000 bytes whose digest is that of its name.
fn layer(name: &str, media_type: &str, annotations: &[(&str, &str)]) -> Descriptor {
    let mut descriptor = Descriptor::new(media_type, BlobDigest(sha(name)), 10_000);
    descriptor.annotations = annotations.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    descriptor
}

fn diff_ids(count: usize) -> Vec<DiffId> {
    (0..count).map(|i| DiffId(sha(&format!("diff {i}")))).collect()
}

fn plan(layers: &[Descriptor]) -> Result<ImagePlan, String> {
    ImagePlan::of_layers(layers, &diff_ids(layers.len())).map_err(|error| match error {
        PlanError::Layer { position, fault, .. } => format!("{position}: {fault}"),
        other => other.to_string(),
    })
}

#[test]
fn what_is_written_is_read_back() {
    for (form, compression) in [
        (Form::ImageSpec, Compression::Zstd),
        (Form::Containerd23, Compression::Zstd),
        (Form::ImageSpec, Compression::None),
    ] {
        let mut assembler = BlobAssembler::new(Vec::new(), compression);
        for chunk in [&b"first"[..], b"second"] {
            let stored = if compression == Compression::None { chunk.to_vec() } else { compress_chunk(3, chunk) };
            assembler.append(&stored, chunk.len() as u64).unwrap();
        }
        let (blob, summary) = assembler.finish().unwrap();
        let diff_id = match compression {
            Compression::None => DiffId(summary.digest.0),
            Compression::Zstd => DiffId(sha("firstsecond")),
        };
        let layers: Vec<Descriptor> =
            (0..2).map(|position| layer_descriptor(form, &summary, diff_id, layer_role(position, 2))).collect();
        let plan = ImagePlan::of_layers(&layers, &[]).unwrap();
        assert_eq!(plan.diff_ids, [diff_id, diff_id]);
        let layer = &plan.layers[1];
        assert_eq!((layer.blob, layer.blob_size, layer.diff_id), (summary.digest, summary.size, diff_id));
        assert_eq!((layer.role, layer.compression), (Some(Role::OverlayLower), compression));
        let location = layer.index.unwrap();
        assert_eq!((location.blob, location.range), (summary.digest, summary.index_range));
        let (start, end) = (location.range.start(), location.range.end());
        let index =
            location.section.read(&blob[usize::try_from(start).unwrap()..usize::try_from(end).unwrap()]).unwrap();
        assert_eq!((index.len(), index.image_size()), (2, 11));
    }
    assert_eq!(layer_role(0, 1), None);
}

#[test]
fn a_standalone_index_belongs_to_the_layer_before_it() {
    let mut assembler = BlobAssembler::new(Vec::new(), Compression::Zstd);
    assembler.append(&compress_chunk(3, b"content"), 7).unwrap();
    let (blob, detached) = assembler.finish_detached();
    let erofs = Descriptor::new(EROFS_LAYER_ZSTD, BlobDigest(Digest::of(Algorithm::Sha256, &blob)), detached.size);
    let index = index_descriptor(&detached.payload, erofs.digest);
    let top = layer("top", EROFS_LAYER_ZSTD, &[]);
    let plan = plan(&[erofs.clone(), index.clone(), top]).unwrap();
    assert_eq!(plan.layers.len(), 2);
    assert_eq!(plan.layers[1].position, 2);
    assert_eq!(plan.diff_ids, [diff_ids(1)[0], DiffId(index.digest.0), diff_ids(3)[2]]);
    let location = plan.layers[0].index.unwrap();
    assert_eq!((location.blob, location.range), (index.digest, ByteRange::to(index.size)));
    assert_eq!(location.section.read(&detached.payload).unwrap().image_size(), 7);
    assert_eq!(plan.stack.iter().map(|stacked| stacked.layer).collect::<Vec<_>>(), [0, 1]);
}

#[test]
fn devices_and_data_go_to_the_layer_that_follows() {
    let device = [(ROLE, "device")];
    let data = [(ROLE, "overlay-data")];
    let lower = [(ROLE, "overlay-lower")];
    let plan = plan(&[
        layer("a", "application/octet-stream", &device),
        layer("b", "application/vnd.example+zstd", &device),
        layer("c", CHUNK_INDEX, &[]),
        layer("d", EROFS_LAYER_ZSTD, &lower),
        layer("e", media::OCI_LAYER_ZSTD, &device),
        layer("f", EROFS_LAYER, &data),
        layer("g", EROFS_LAYER, &data),
        layer("h", EROFS_LAYER, &device),
        layer("i", EROFS_LAYER_ZSTD, &[]),
    ])
    .unwrap();
    let stacked =
        |layer, devices: &[usize], data: Vec<StackedLayer>| StackedLayer { layer, devices: devices.to_vec(), data };
    let data = vec![stacked(4, &[3], vec![]), stacked(5, &[], vec![])];
    assert_eq!(plan.stack, [stacked(2, &[0, 1], vec![]), stacked(7, &[6], data)]);
    assert_eq!(plan.layers[0].compression, Compression::None);
    assert_eq!(plan.layers[1].compression, Compression::Zstd);
    assert!(plan.layers[1].index.is_some());
}

#[test]
fn indexes_are_planned_or_passed_over() {
    let digest = sha("index").to_string();
    let sha512 = Digest::of(Algorithm::Sha512, b"index").to_string();
    let range = "9000:10000";
    type Want = Result<(IndexFamily, u64, u64), Option<IgnoredIndex>>;
    let cases: [(&[(&str, &str)], Want); 9] = [
        (&[], Err(None)),
        (&[(INDEX_RANGE, range), (INDEX_DIGEST, &digest)], Ok((IndexFamily::ImageSpec, 9000, 10_000))),
        (&[(INDEX_RANGE, range), (INDEX_DIGEST, &sha512)], Ok((IndexFamily::ImageSpec, 9000, 10_000))),
        (&[(INDEX_RANGE, "9000"), (INDEX_DIGEST, &digest)], Ok((IndexFamily::ImageSpec, 9000, 10_000))),
        (&[(INDEX_RANGE, "9000:9040"), (INDEX_DIGEST, &digest)], Ok((IndexFamily::ImageSpec, 9000, 9040))),
        (&[(INDEX_RANGE, range)], Err(Some(IgnoredIndex::NoDigest))),
        (
            &[
                (INDEX_RANGE, range),
                (INDEX_DIGEST, &digest),
                (INDEX_MEDIA_TYPE, "application/vnd.erofs.chunk-index.v2"),
            ],
            Err(Some(IgnoredIndex::MediaType)),
        ),
        (&[(PR_TABLE_OFFSET, "9000"), (PR_TABLE_DIGEST, &digest)], Ok((IndexFamily::Pr12703, 9000, 10_000))),
        (
            &[(PR_TABLE_OFFSET, "5"), (INDEX_RANGE, range), (INDEX_DIGEST, &digest)],
            Ok((IndexFamily::ImageSpec, 9000, 10_000)),
        ),
    ];
    for (annotations, want) in cases {
        let plan = plan(&[layer("a", CONTAINERD_LAYER_ZSTD, annotations)]).unwrap();
        let found = match (plan.layers[0].index, plan.layers[0].ignored_index) {
            (Some(index), None) => {
                assert_eq!(index.section.data_end, index.range.start());
                assert_eq!(index.section.framing, Framing::Frame);
                Ok((index.section.family, index.range.start(), index.range.end()))
            }
            (None, ignored) => Err(ignored),
            both => panic!("{both:?}"),
        };
        assert_eq!(found, want, "{annotations:?}");
    }
    let mut large = layer("a", EROFS_LAYER_ZSTD, &[(INDEX_RANGE, "0"), (INDEX_DIGEST, &digest)]);
    large.size = MAX_INDEX_SIZE + 1;
    assert_eq!(plan(&[large]).unwrap().layers[0].ignored_index, Some(IgnoredIndex::TooLarge));
}

#[test]
fn annotations_outside_of_their_grammar_are_refused() {
    let digest = sha("index").to_string();
    let bad: [(&str, &str, &str); 26] = [
        (INDEX_RANGE, "", "not START"),
        (INDEX_RANGE, "x", "not START"),
        (INDEX_RANGE, "9000:", "not START"),
        (INDEX_RANGE, ":10000", "not START"),
        (INDEX_RANGE, "9000:9990:9999", "not START"),
        (INDEX_RANGE, "+9000:10000", "not START"),
        (INDEX_RANGE, " 9000", "not START"),
        (INDEX_RANGE, "0x10", "not START"),
        (INDEX_RANGE, "9000-10000", "not START"),
        (INDEX_RANGE, "18446744073709551616", "not START"),
        (INDEX_RANGE, "9000:10001", "only 10000 bytes"),
        (INDEX_RANGE, "9000:8999", "no room"),
        (INDEX_RANGE, "9000:9039", "no room"),
        (INDEX_RANGE, "9961", "no room"),
        (INDEX_RANGE, "10000", "no room"),
        (INDEX_RANGE, "18446744073709551615", "no room"),
        (PR_TABLE_OFFSET, "9999", "no room"),
        (PR_TABLE_OFFSET, "-1", "not a number"),
        (INDEX_DIGEST, "sha256:abc", "sha256"),
        (INDEX_DIGEST, "md5:d41d8cd98f00b204e9800998ecf8427e", "only sha256"),
        (UNCOMPRESSED_DIGEST, "nonsense", "not a digest"),
        (ROLE, "lower", "known roles"),
        (VERITY_HASH_OFFSET, "4097", "not a multiple"),
        (VERITY_BLOCK_SIZE, "1000", "power of two"),
        (VERITY_BLOCK_SIZE, "4294971392", "power of two"),
        (VERITY_ROOT_DIGEST, "0123", "not a digest"),
    ];
    for (key, value, words) in bad {
        let mut annotations = vec![
            (INDEX_RANGE, "9000:10000"),
            (INDEX_DIGEST, &digest),
            (VERITY_HASH_OFFSET, "8192"),
            (VERITY_ROOT_DIGEST, &digest),
        ];
        if key == PR_TABLE_OFFSET {
            annotations = vec![(PR_TABLE_DIGEST, &digest)];
        }
        annotations.retain(|(other, _)| *other != key);
        annotations.push((key, value));
        let error = plan(&[layer("a", EROFS_LAYER_ZSTD, &annotations)]).unwrap_err();
        assert!(error.contains(words) && error.contains(key), "{key} = {value}: {error}");
    }
}

#[test]
fn images_that_break_the_order_are_refused() {
    let erofs = || layer("erofs", EROFS_LAYER_ZSTD, &[]);
    let role = |name, media_type, role| layer(name, media_type, &[(ROLE, role)]);
    let other = sha("another").to_string();
    let sha512 = Digest::of(Algorithm::Sha512, b"index").to_string();
    let cases = [
        (vec![], "no layers"),
        (vec![erofs(); MAX_LAYERS + 1], "501 layers"),
        (vec![layer("a", media::OCI_LAYER_GZIP, &[]), layer("b", media::DOCKER_LAYER_GZIP, &[])], "convert it first"),
        (vec![layer("a", media::OCI_LAYER_GZIP, &[]), erofs()], "0: it is a tar archive"),
        (
            vec![erofs(), layer("a", media::OCI_LAYER_TAR, &[(ROLE, "overlay-lower")]), erofs()],
            "1: it is a tar archive",
        ),
        (vec![layer("a", "application/vnd.erofs+gzip", &[])], "0: its media type"),
        (vec![layer("a", "application/vnd.erofs.chunk-index.v2", &[]), erofs()], "0: its media type"),
        (vec![role("a", "application/octet-stream", "overlay-data"), erofs()], "0: its media type"),
        (vec![role("a", media::OCI_LAYER_GZIP, "device"), erofs()], "0: a device of media type"),
        (vec![role("a", "application/x+lz4", "device"), erofs()], "0: a device of media type"),
        (vec![layer("a", CHUNK_INDEX, &[]), erofs()], "cannot be the first layer"),
        (vec![erofs(), layer("a", CHUNK_INDEX, &[])], "1: a chunk index cannot be the last layer"),
        (vec![erofs(), layer("a", CHUNK_INDEX, &[]), layer("b", CHUNK_INDEX, &[]), erofs()], "cannot follow"),
        (vec![erofs(), role("a", CHUNK_INDEX, "device"), erofs()], "a chunk index has no role"),
        (
            vec![erofs(), layer("a", CHUNK_INDEX, &[(INDEX_TARGET, &other)]), erofs()],
            "1: its annotation org.erofs.chunk-index.target",
        ),
        (vec![erofs(), role("a", EROFS_LAYER, "device")], "1: the last layer must be one that can be mounted"),
        (vec![role("a", EROFS_LAYER, "overlay-data")], "0: the last layer must be one that can be mounted"),
        (vec![layer("a", EROFS_LAYER, &[(UNCOMPRESSED_DIGEST, &other)])], "a raw layer's is its blob's digest"),
        (vec![layer("a", EROFS_LAYER_ZSTD, &[(UNCOMPRESSED_DIGEST, &sha512)])], "not a SHA-256 digest"),
        (vec![layer("a", EROFS_LAYER_ZSTD, &[(PR_VERITY, &other)])], "pull request 12703"),
        (vec![layer("a", EROFS_LAYER_ZSTD, &[(PR_TABLE_OFFSET, "1")])], "chunk_digest is missing"),
    ];
    for (layers, words) in cases {
        let error = plan(&layers).unwrap_err();
        assert!(error.contains(words), "{words}: {error}");
    }
}

#[test]
fn diff_ids_come_from_the_annotation_then_the_blob_then_the_config() {
    let annotated = sha("annotated").to_string();
    let layers = [
        layer("a", EROFS_LAYER_ZSTD, &[(UNCOMPRESSED_DIGEST, &annotated)]),
        layer("b", EROFS_LAYER, &[]),
        layer("c", EROFS_LAYER_ZSTD, &[]),
    ];
    let want = [DiffId(sha("annotated")), DiffId(sha("b")), diff_ids(3)[2]];
    assert_eq!(plan(&layers).unwrap().diff_ids, want);
    assert_eq!(ImagePlan::of_layers(&layers[..2], &[]).unwrap().diff_ids, want[..2]);
    let error = ImagePlan::of_layers(&layers, &diff_ids(2)).unwrap_err();
    assert!(format!("{error:?}").contains("NoDiffId { diff_ids: 2, layers: 3 }"), "{error:?}");
}

#[test]
fn tars_and_images_stand_in_one_stack() {
    let tar = |name| layer(name, media::OCI_LAYER_GZIP, &[]);
    let erofs = |name| layer(name, EROFS_LAYER, &[]);
    let plan = |layers: &[Descriptor], count| {
        ImagePlan::read(layers, &diff_ids(count), true).map_err(|error| match error {
            PlanError::Layer { position, fault, .. } => format!("{position}: {fault}"),
            other => other.to_string(),
        })
    };
    let mixed = plan(&[tar("a"), erofs("b"), tar("c")], 3).unwrap();
    assert_eq!(mixed.layers.iter().map(|layer| layer.is_tar).collect::<Vec<_>>(), [true, false, true]);
    assert_eq!(mixed.stack.iter().map(|stacked| stacked.layer).collect::<Vec<_>>(), [0, 1, 2]);
    // A raw image is what its blob is; a tar what the config says.
    assert_eq!(mixed.diff_ids, [diff_ids(1)[0], DiffId(sha("b")), diff_ids(3)[2]]);
    assert_eq!(plan(&[tar("a"), tar("b")], 2).unwrap().stack.len(), 2);
    for (layers, count, words) in [
        (vec![tar("a"), erofs("b")], 1, "diffID is not known"),
        (vec![tar("a"), layer("i", CHUNK_INDEX, &[]), erofs("b")], 3, "cannot follow a tar"),
        (vec![layer("d", EROFS_LAYER, &[(ROLE, "device")]), tar("a")], 2, "cannot use the device"),
        (vec![], 0, "no layers"),
    ] {
        let words_of = plan(&layers, count).unwrap_err();
        assert!(words_of.contains(words), "{words_of:?} does not say {words:?}");
    }
}
