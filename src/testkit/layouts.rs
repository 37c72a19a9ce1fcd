//! OCI layouts on disk, made of given layers, for tests.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde_json::{Value, json};

use super::layers::{Stack, compress};
use crate::model::{Algorithm, BlobDigest, DiffId, Digest};
use crate::tar::decompress::Compression;

/// A layer blob and what its descriptor says.
#[derive(Debug, Clone)]
pub struct TestLayer {
    /// The bytes.
    pub blob: Vec<u8>,
    /// The media type.
    pub media_type: String,
    /// What the config says of it.
    pub diff_id: DiffId,
}

impl TestLayer {
    /// A tar layer.
    pub fn of_tar(tar: &[u8], compression: Compression) -> Self {
        let suffix = match compression {
            Compression::Plain => "",
            Compression::Gzip => "+gzip",
            Compression::Zstd => "+zstd",
        };
        Self {
            blob: compress(tar, compression),
            media_type: format!("application/vnd.oci.image.layer.v1.tar{suffix}"),
            diff_id: DiffId(Digest::of(Algorithm::Sha256, tar)),
        }
    }

    /// The layers of a stack, compressed in these ways in turn.
    pub fn of_stack(stack: &Stack, compressions: &[Compression]) -> Vec<Self> {
        stack.tars().iter().zip(compressions.iter().cycle()).map(|(tar, c)| Self::of_tar(tar, *c)).collect()
    }
}

/// A directory that is an OCI layout.
#[derive(Debug)]
pub struct TestLayout {
    root: PathBuf,
}

impl TestLayout {
    /// An empty layout in `root`, which is made.
    ///
    /// # Errors
    /// The directory cannot be written.
    pub fn create(root: &Path) -> anyhow::Result<Self> {
        fs::create_dir_all(root.join("blobs/sha256")).with_context(|| format!("cannot create {}", root.display()))?;
        fs::write(root.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let layout = Self { root: root.to_owned() };
        layout.write_index(&[])?;
        Ok(layout)
    }

    /// Stores bytes.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn blob(&self, bytes: &[u8]) -> anyhow::Result<BlobDigest> {
        let digest = BlobDigest(Digest::of(Algorithm::Sha256, bytes));
        fs::write(self.path(digest), bytes).context("cannot write a blob")?;
        Ok(digest)
    }

    /// Where a blob lies.
    pub fn path(&self, digest: BlobDigest) -> PathBuf {
        self.root.join("blobs").join(digest.0.algorithm().name()).join(digest.0.hex())
    }

    /// Stores a JSON document. Returns its descriptor.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn document(&self, media_type: &str, document: &Value) -> anyhow::Result<Value> {
        let bytes = serde_json::to_vec(document)?;
        let digest = self.blob(&bytes)?;
        Ok(json!({"mediaType": media_type, "digest": digest, "size": bytes.len()}))
    }

    /// Stores an image for `architecture`. Returns the descriptor of its manifest.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn image(&self, layers: &[TestLayer], architecture: &str) -> anyhow::Result<Value> {
        let diff_ids: Vec<DiffId> = layers.iter().map(|layer| layer.diff_id).collect();
        let history: Vec<Value> = layers
            .iter()
            .enumerate()
            .flat_map(|(number, _)| {
                let step = |kind: &str| format!("{kind} of layer {number}");
                [json!({"created_by": step("content")}), json!({"created_by": step("setting"), "empty_layer": true})]
            })
            .collect();
        let config = json!({
            "created": "2026-01-02T03:04:05Z",
            "architecture": architecture,
            "os": "linux",
            "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"], "Labels": {"unknown.to.us": "kept"}},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": history,
            "x-unknown": {"kept": true},
        });
        let config = self.document("application/vnd.oci.image.config.v1+json", &config)?;
        let mut described = Vec::new();
        for (number, layer) in layers.iter().enumerate() {
            let digest = self.blob(&layer.blob)?;
            described.push(json!({
                "mediaType": layer.media_type,
                "digest": digest,
                "size": layer.blob.len(),
                "annotations": {"org.example.layer": number.to_string()},
            }));
        }
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": described,
            "annotations": {"org.example.image": "kept"},
        });
        self.document("application/vnd.oci.image.manifest.v1+json", &manifest)
    }

    /// Stores an index of images. Returns its descriptor.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn index(&self, manifests: &[Value]) -> anyhow::Result<Value> {
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": manifests,
            "annotations": {"org.example.index": "kept"},
        });
        self.document("application/vnd.oci.image.index.v1+json", &index)
    }

    /// Makes `descriptor` known under `tag`, besides those that are.
    ///
    /// # Errors
    /// The index cannot be read or written.
    pub fn tag(&self, tag: &str, mut descriptor: Value) -> anyhow::Result<()> {
        let index: Value = serde_json::from_slice(&fs::read(self.root.join("index.json"))?)?;
        let mut manifests = index["manifests"].as_array().context("the index has no manifests")?.clone();
        descriptor["annotations"]["org.opencontainers.image.ref.name"] = tag.into();
        manifests.push(descriptor);
        self.write_index(&manifests)
    }

    fn write_index(&self, manifests: &[Value]) -> anyhow::Result<()> {
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": manifests,
        });
        fs::write(self.root.join("index.json"), serde_json::to_vec(&index)?).context("cannot write index.json")
    }
}

/// A layout with one image of the given layers under the tag `latest`.
///
/// # Errors
/// It cannot be written.
pub fn write_layout(root: &Path, layers: &[TestLayer]) -> anyhow::Result<TestLayout> {
    let layout = TestLayout::create(root)?;
    let image = layout.image(layers, "amd64")?;
    layout.tag("latest", image)?;
    Ok(layout)
}
