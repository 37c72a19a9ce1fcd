//! Holds the room against the vectors of `docs/format.md`.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::model::{Algorithm, ByteRange, ChunkDigest, DiffId, Digest, IndexDigest};

const PAGE: &str = include_str!("../../docs/format.md");

/// One block of the page.
struct Vector {
    name: String,
    fields: BTreeMap<String, Vec<String>>,
}

impl Vector {
    fn all() -> Vec<Self> {
        let (mut vectors, mut name, mut lines) = (Vec::new(), "", PAGE.lines());
        while let Some(line) = lines.next() {
            if let Some(title) = line.strip_prefix("#### ") {
                name = title;
            } else if line == "```vector" {
                vectors.push(Self::parse(name, lines.by_ref().take_while(|line| *line != "```")));
            }
        }
        vectors
    }

    fn parse<'a>(name: &str, lines: impl Iterator<Item = &'a str>) -> Self {
        let mut fields: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut last = "";
        for line in lines {
            if let Some(more) = line.strip_prefix("    ") {
                fields.get_mut(last).unwrap().last_mut().unwrap().push_str(more);
            } else {
                let (key, value) = line.split_once(" =").unwrap_or_else(|| panic!("{name}: {line}"));
                fields.entry(key.to_owned()).or_default().push(value.trim().to_owned());
                last = key;
            }
        }
        Self { name: name.to_owned(), fields }
    }

    fn find(&self, key: &str) -> Option<&str> {
        self.fields.get(key).map(|values| values[0].as_str())
    }

    fn get(&self, key: &str) -> &str {
        self.find(key).unwrap_or_else(|| panic!("vector {} has no {key}", self.name))
    }

    fn number(&self, key: &str) -> u64 {
        self.get(key).parse().unwrap()
    }

    fn bytes(&self, key: &str) -> Option<Vec<u8>> {
        self.find(key).map(|text| hex::decode(text).unwrap())
    }

    fn compression(&self) -> Compression {
        match self.get("compression") {
            "none" => Compression::None,
            "zstd" => Compression::Zstd,
            other => panic!("{other}"),
        }
    }

    fn family(&self) -> IndexFamily {
        match self.get("family") {
            "image-spec" => IndexFamily::ImageSpec,
            "pr-12703" => IndexFamily::Pr12703,
            other => panic!("{other}"),
        }
    }

    fn check(&self) {
        match self.get("verdict") {
            "chunks" => self.check_chunks(),
            "sequential" => {
                let (image, diff_id) = self.sequential();
                assert_eq!(image.len() as u64, self.number("image-size"));
                assert_eq!(diff_id.to_string(), self.get("diff-id"));
            }
            "corrupt" | "unreadable" => self.check_bad_index(),
            "damaged" => self.check_damaged(),
            other => panic!("{other}"),
        }
    }

    fn sequential(&self) -> (Vec<u8>, DiffId) {
        let blob = self.bytes("blob").unwrap();
        let reader = SequentialReader::new(Vec::new(), self.compression(), 1 << 20);
        let (image, summary) = reader.run(blob.as_slice()).unwrap();
        (image, summary.diff_id)
    }

    fn check_chunks(&self) {
        let blob = self.bytes("blob").unwrap();
        let (bytes, framing, data_end) = match self.bytes("index-blob") {
            Some(bytes) => (bytes, Framing::Bare, blob.len() as u64),
            None => {
                let at = range(self.get("index"));
                let framing = if self.compression() == Compression::None { Framing::Bare } else { Framing::Frame };
                (cut(&blob, at).to_vec(), framing, at.start())
            }
        };
        let digest: IndexDigest = self.get("index-digest").parse().unwrap();
        let (family, compression) = (self.family(), self.compression());
        let section = IndexSection { family, framing, compression, digest: Some(digest), data_end };
        let index = section.read(&bytes).unwrap();
        let chunks: Vec<String> = index.iter().map(|chunk| line(chunk.blob) + " " + &line(chunk.image)).collect();
        assert_eq!(chunks, *self.fields.get("chunk").unwrap_or(&Vec::new()));
        let (mut image, mut out) = (Vec::new(), Vec::new());
        for chunk in index.iter() {
            decode_chunk(&chunk, compression, cut(&blob, chunk.blob), &mut out).unwrap();
            image.extend_from_slice(&out);
        }
        assert_eq!(image.len() as u64, self.number("image-size"));
        let (whole, diff_id) = self.sequential();
        assert_eq!(diff_id.to_string(), self.get("diff-id"));
        assert!(whole.starts_with(&image));
        assert_eq!(whole.len(), if compression == Compression::None { blob.len() } else { image.len() });

        let other = match compression {
            Compression::None => Compression::Zstd,
            Compression::Zstd => Compression::None,
        };
        let error = IndexSection { compression: other, ..section }.read(&bytes).unwrap_err();
        assert!(matches!(error, IndexError::Corrupt(CorruptIndex::CompressionMismatch { .. })));
        let digest = Some(IndexDigest(Digest::of(Algorithm::Sha256, b"another")));
        let error = IndexSection { digest, ..section }.read(&bytes).unwrap_err();
        assert!(matches!(error, IndexError::Corrupt(CorruptIndex::DigestMismatch(_))));

        if family == IndexFamily::ImageSpec && !matches!(self.name.as_str(), "zstd-frame-5f" | "zstd-padding") {
            self.check_written(&blob, &index, &bytes);
        }
    }

    /// The assembler, given the same chunks, writes the same bytes.
    fn check_written(&self, blob: &[u8], index: &ChunkIndex, index_bytes: &[u8]) {
        let sums = match index.chunk(0) {
            None => Some(Algorithm::Sha256),
            Some(chunk) => chunk.checksum.map(|sum| sum.0.algorithm()),
        };
        let mut assembler = BlobAssembler::with_checksums(Vec::new(), self.compression(), sums);
        for chunk in index.iter() {
            assembler.append(cut(blob, chunk.blob), chunk.image.len()).unwrap();
        }
        if self.find("index-blob").is_some() {
            let (written, detached) = assembler.finish_detached();
            assert_eq!((written.as_slice(), detached.payload.as_slice()), (blob, index_bytes));
        } else {
            let (written, summary) = assembler.finish().unwrap();
            assert_eq!(hex::encode(&written), hex::encode(blob));
            assert_eq!(line(summary.index_range), self.get("index"));
            assert_eq!(summary.index_digest.to_string(), self.get("index-digest"));
        }
    }

    fn check_bad_index(&self) {
        let (bytes, framing) = match self.bytes("section") {
            Some(bytes) => (bytes, Framing::Frame),
            None => (self.bytes("payload").unwrap(), Framing::Bare),
        };
        let (family, data_end) = (self.family(), self.number("data-end"));
        let section = IndexSection { family, framing, compression: Compression::Zstd, digest: None, data_end };
        let error = section.read(&bytes).unwrap_err();
        let verdict = match error {
            IndexError::Corrupt(_) => "corrupt",
            IndexError::Unreadable(_) => "unreadable",
        };
        let because = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!((verdict, because.as_str()), (self.get("verdict"), self.get("because")));
    }

    fn check_damaged(&self) {
        let stored = self.bytes("stored").unwrap();
        let chunk = Chunk {
            blob: ByteRange::to(stored.len() as u64),
            image: ByteRange::to(self.number("image-size")),
            checksum: self.find("checksum").map(|text| text.parse::<ChunkDigest>().unwrap()),
        };
        let error = decode_chunk(&chunk, self.compression(), &stored, &mut Vec::new()).unwrap_err();
        assert_eq!(error.fault.to_string(), self.get("because"));
    }
}

fn range(text: &str) -> ByteRange {
    let (start, end) = text.split_once(':').unwrap();
    ByteRange::new(start.parse().unwrap(), end.parse().unwrap()).unwrap()
}

fn line(range: ByteRange) -> String {
    format!("{}:{}", range.start(), range.end())
}

fn cut(bytes: &[u8], range: ByteRange) -> &[u8] {
    &bytes[usize::try_from(range.start()).unwrap()..usize::try_from(range.end()).unwrap()]
}

#[test]
fn every_vector_of_the_page_holds() {
    let vectors = Vector::all();
    let names: BTreeSet<&str> = vectors.iter().map(|vector| vector.name.as_str()).collect();
    assert_eq!(names.len(), vectors.len(), "two vectors have one name");
    assert_eq!(vectors.len(), PAGE.matches("\nverdict = ").count());
    for verdict in ["chunks", "sequential", "corrupt", "unreadable", "damaged"] {
        assert!(vectors.iter().any(|vector| vector.get("verdict") == verdict), "no vector is {verdict}");
    }
    for vector in &vectors {
        println!("vector {}", vector.name);
        vector.check();
    }
}
