//! One descriptor after the other: what its media type, its annotations and its place say.

use std::str::FromStr;

use super::{Composer, IgnoredIndex, ImagePlan, IndexLocation, LayerFault, LayerPlan, StackedLayer, Verity, is_tar};
use crate::chunked::{Compression, Framing, IndexFamily, IndexSection, MAX_INDEX_SIZE};
use crate::model::{Algorithm, BlobDigest, ByteRange, DiffId, IndexDigest};
use crate::oci::Descriptor;
use crate::oci::erofs::{
    CHUNK_INDEX, INDEX_DIGEST, INDEX_MEDIA_TYPE, INDEX_RANGE, INDEX_TARGET, LayerKind, PR_TABLE_DIGEST,
    PR_TABLE_OFFSET, PR_VERITY, ROLE, Role, TarCompression, UNCOMPRESSED_DIGEST, VERITY_BLOCK_SIZE, VERITY_HASH_OFFSET,
    VERITY_ROOT_DIGEST,
};

/// One descriptor in its place.
pub(super) struct LayerReader<'a> {
    pub(super) position: usize,
    pub(super) descriptor: &'a Descriptor,
    pub(super) previous: Option<&'a Descriptor>,
    pub(super) count: usize,
    pub(super) diff_ids: &'a [DiffId],
    /// Tars are layers like others.
    pub(super) tars: bool,
}

impl LayerReader<'_> {
    pub(super) fn read(&self, plan: &mut ImagePlan, composer: &mut Composer) -> Result<(), LayerFault> {
        if self.tars && is_tar(self.descriptor) {
            return self.read_tar(plan, composer);
        }
        let role: Option<Role> = self.parsed(ROLE)?;
        let media_type = &self.descriptor.media_type;
        let last = self.position + 1 == self.count;
        let compression = match (LayerKind::of(media_type), role) {
            (LayerKind::ChunkIndex, None) => return self.read_index(plan, last),
            (LayerKind::ChunkIndex, Some(_)) => return Err(LayerFault::Order("a chunk index has no role")),
            (LayerKind::Erofs(compression), _) => compression,
            (LayerKind::Tar(TarCompression::None), Some(Role::Device)) => Compression::None,
            (LayerKind::Tar(TarCompression::Zstd), Some(Role::Device)) => Compression::Zstd,
            (LayerKind::Tar(TarCompression::Gzip), Some(Role::Device)) => {
                return Err(LayerFault::DeviceEncoding(media_type.clone()));
            }
            (LayerKind::Unknown, Some(Role::Device)) => match media_type.rsplit_once('+') {
                None => Compression::None,
                Some((_, "zstd")) => Compression::Zstd,
                Some(_) => return Err(LayerFault::DeviceEncoding(media_type.clone())),
            },
            (LayerKind::Tar(_), _) => return Err(LayerFault::Tar(media_type.clone())),
            (LayerKind::Unknown, _) => return Err(LayerFault::MediaType(media_type.clone())),
        };
        if last && matches!(role, Some(Role::Device | Role::OverlayData)) {
            return Err(LayerFault::Order(
                "the last layer must be one that can be mounted, not a device or data layer",
            ));
        }
        let diff_id = self.diff_id(compression)?;
        let (index, ignored_index) = match self.embedded_index(compression)? {
            None => (None, None),
            Some(Ok(index)) => (Some(index), None),
            Some(Err(ignored)) => (None, Some(ignored)),
        };
        let layer = plan.layers.len();
        plan.diff_ids.push(diff_id);
        plan.layers.push(LayerPlan {
            position: self.position,
            blob: self.descriptor.digest,
            blob_size: self.descriptor.size,
            media_type: media_type.clone(),
            is_tar: false,
            compression,
            diff_id,
            role,
            index,
            ignored_index,
            verity: self.verity()?,
        });
        if role == Some(Role::Device) {
            composer.devices.push(layer);
            return Ok(());
        }
        let devices = std::mem::take(&mut composer.devices);
        if role == Some(Role::OverlayData) {
            composer.data.push(StackedLayer { layer, devices, data: Vec::new() });
        } else {
            plan.stack.push(StackedLayer { layer, devices, data: std::mem::take(&mut composer.data) });
        }
        Ok(())
    }

    /// A tar: all that is said of it is in the config.
    fn read_tar(&self, plan: &mut ImagePlan, composer: &Composer) -> Result<(), LayerFault> {
        if !composer.devices.is_empty() || !composer.data.is_empty() {
            return Err(LayerFault::Order("a tar layer cannot use the device or data layers before it"));
        }
        let diff_id = self.configured_diff_id()?;
        plan.diff_ids.push(diff_id);
        plan.stack.push(StackedLayer { layer: plan.layers.len(), devices: Vec::new(), data: Vec::new() });
        plan.layers.push(LayerPlan {
            position: self.position,
            blob: self.descriptor.digest,
            blob_size: self.descriptor.size,
            media_type: self.descriptor.media_type.clone(),
            is_tar: true,
            compression: Compression::None,
            diff_id,
            role: None,
            index: None,
            ignored_index: None,
            verity: None,
        });
        Ok(())
    }

    fn configured_diff_id(&self) -> Result<DiffId, LayerFault> {
        let configured = self.diff_ids.get(self.position).filter(|_| self.diff_ids.len() == self.count);
        configured.copied().ok_or(LayerFault::NoDiffId { diff_ids: self.diff_ids.len(), layers: self.count })
    }

    fn annotation(&self, key: &str) -> Option<&str> {
        self.descriptor.annotations.get(key).map(String::as_str)
    }

    fn wrong(&self, key: &'static str, reason: impl Into<String>) -> LayerFault {
        let value = self.annotation(key).unwrap_or_default().to_owned();
        LayerFault::Annotation { key, value, reason: reason.into() }
    }

    fn parsed<T: FromStr<Err: ToString>>(&self, key: &'static str) -> Result<Option<T>, LayerFault> {
        let parse = |text: &str| text.parse().map_err(|error: T::Err| self.wrong(key, error.to_string()));
        self.annotation(key).map(parse).transpose()
    }

    /// A number in the specification's grammar: digits and nothing else.
    fn number(&self, key: &'static str) -> Result<Option<u64>, LayerFault> {
        let parse = |text| decimal(text).ok_or_else(|| self.wrong(key, "not a number of 64 bits"));
        self.annotation(key).map(parse).transpose()
    }

    fn diff_id(&self, compression: Compression) -> Result<DiffId, LayerFault> {
        let annotated: Option<DiffId> = self.parsed(UNCOMPRESSED_DIGEST)?;
        let stored = self.descriptor.digest.0;
        let diff_id = if compression == Compression::None && stored.algorithm() == Algorithm::Sha256 {
            if annotated.is_some_and(|annotated| annotated.0 != stored) {
                return Err(self.wrong(UNCOMPRESSED_DIGEST, "a raw layer's is its blob's digest"));
            }
            DiffId(stored)
        } else if let Some(annotated) = annotated {
            annotated
        } else {
            self.configured_diff_id()?
        };
        if diff_id.0.algorithm() == Algorithm::Sha256 { Ok(diff_id) } else { Err(LayerFault::DiffIdAlgorithm(diff_id)) }
    }

    fn embedded_index(
        &self,
        compression: Compression,
    ) -> Result<Option<Result<IndexLocation, IgnoredIndex>>, LayerFault> {
        if self.annotation(INDEX_RANGE).is_some() {
            return self.embedded_spec_index(compression).map(Some);
        }
        if compression == Compression::None {
            return Ok(None);
        }
        if self.annotation(PR_VERITY).is_some() {
            return Err(LayerFault::DraftVerity);
        }
        let Some(start) = self.number(PR_TABLE_OFFSET)? else { return Ok(None) };
        let digest: Option<IndexDigest> = self.parsed(PR_TABLE_DIGEST)?;
        let range = self.index_range(PR_TABLE_OFFSET, start, self.descriptor.size, 8 + 24)?;
        let section = IndexSection {
            family: IndexFamily::Pr12703,
            framing: Framing::Frame,
            compression,
            digest: Some(digest.ok_or(LayerFault::Missing(PR_TABLE_DIGEST))?),
            data_end: start,
        };
        Ok(Some(located(self.descriptor.digest, range, section)))
    }

    fn embedded_spec_index(&self, compression: Compression) -> Result<Result<IndexLocation, IgnoredIndex>, LayerFault> {
        let text = self.annotation(INDEX_RANGE).unwrap_or_default();
        let (start, end) = match text.split_once(':') {
            None => (decimal(text), Some(self.descriptor.size)),
            Some((start, end)) => (decimal(start), decimal(end)),
        };
        let (start, end) =
            start.zip(end).ok_or_else(|| self.wrong(INDEX_RANGE, "not START or START:END in decimal"))?;
        let (framing, shortest) = match compression {
            Compression::None => (Framing::Bare, 32),
            Compression::Zstd => (Framing::Frame, 8 + 32),
        };
        let range = self.index_range(INDEX_RANGE, start, end, shortest)?;
        let digest = self.parsed(INDEX_DIGEST)?;
        if self.annotation(INDEX_MEDIA_TYPE).is_some_and(|media_type| media_type != CHUNK_INDEX) {
            return Ok(Err(IgnoredIndex::MediaType));
        }
        if digest.is_none() {
            return Ok(Err(IgnoredIndex::NoDigest));
        }
        let section = IndexSection { family: IndexFamily::ImageSpec, framing, compression, digest, data_end: start };
        Ok(located(self.descriptor.digest, range, section))
    }

    fn index_range(&self, key: &'static str, start: u64, end: u64, shortest: u64) -> Result<ByteRange, LayerFault> {
        if end > self.descriptor.size {
            return Err(self.wrong(key, format!("the blob has only {} bytes", self.descriptor.size)));
        }
        ByteRange::new(start, end)
            .ok()
            .filter(|range| range.len() >= shortest)
            .ok_or_else(|| self.wrong(key, format!("there is no room for an index between {start} and {end}")))
    }

    /// A standalone index: it belongs to the layer before it (section 3.4.3).
    fn read_index(&self, plan: &mut ImagePlan, last: bool) -> Result<(), LayerFault> {
        let Some(previous) = self.previous else {
            return Err(LayerFault::Order("a chunk index cannot be the first layer"));
        };
        if last {
            return Err(LayerFault::Order("a chunk index cannot be the last layer"));
        }
        if LayerKind::of(&previous.media_type) == LayerKind::ChunkIndex {
            return Err(LayerFault::Order("a chunk index cannot follow another one"));
        }
        if let Some(target) = self.parsed::<BlobDigest>(INDEX_TARGET)?
            && target != previous.digest
        {
            return Err(self.wrong(INDEX_TARGET, format!("the layer before it is {}", previous.digest)));
        }
        let digest = self.parsed(INDEX_DIGEST)?.unwrap_or(IndexDigest(self.descriptor.digest.0));
        let diff_id = self.diff_id(Compression::None)?;
        plan.diff_ids.push(diff_id);
        let layer = plan.layers.last_mut().ok_or(LayerFault::Order("a chunk index cannot be the first layer"))?;
        if layer.is_tar {
            return Err(LayerFault::Order("a chunk index cannot follow a tar layer"));
        }
        if layer.index.is_none() {
            let section = IndexSection {
                family: IndexFamily::ImageSpec,
                framing: Framing::Bare,
                compression: layer.compression,
                digest: Some(digest),
                data_end: layer.blob_size,
            };
            match located(self.descriptor.digest, ByteRange::to(self.descriptor.size), section) {
                Ok(index) => (layer.index, layer.ignored_index) = (Some(index), None),
                Err(ignored) => layer.ignored_index = Some(ignored),
            }
        }
        Ok(())
    }

    fn verity(&self) -> Result<Option<Verity>, LayerFault> {
        let (Some(hash_offset), Some(root_digest)) =
            (self.number(VERITY_HASH_OFFSET)?, self.parsed(VERITY_ROOT_DIGEST)?)
        else {
            return Ok(None);
        };
        let block_size = self.number(VERITY_BLOCK_SIZE)?.unwrap_or(4096);
        // The kernel's dm-verity takes powers of two from 512 bytes up to a page, which has at most 64 KiB.
        let block_size = u32::try_from(block_size)
            .ok()
            .filter(|size| size.is_power_of_two() && (512..=65536).contains(size))
            .ok_or_else(|| self.wrong(VERITY_BLOCK_SIZE, "not a power of two from 512 to 65536"))?;
        if !hash_offset.is_multiple_of(block_size.into()) {
            return Err(self.wrong(VERITY_HASH_OFFSET, format!("not a multiple of the block size {block_size}")));
        }
        Ok(Some(Verity { hash_offset, root_digest, block_size }))
    }
}

fn located(blob: BlobDigest, range: ByteRange, section: IndexSection) -> Result<IndexLocation, IgnoredIndex> {
    if range.len() > MAX_INDEX_SIZE {
        return Err(IgnoredIndex::TooLarge);
    }
    Ok(IndexLocation { blob, range, section })
}

fn decimal(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}
