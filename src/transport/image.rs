//! From a reference to one image for one platform: indexes walked, manifest and config read and held against each other.

use bytes::Bytes;

use super::TransportError;
use super::source::ImageSource;
use crate::oci::{Config, Descriptor, Document, DocumentError, Index, Manifest, Platform, Prefer, media, select};

/// Most indexes that are read for one reference, however they are nested. Real images have one, or one inside another.
const INDEX_LIMIT: usize = 16;

/// What a reference stands for.
struct Entries {
    top: Descriptor,
    index: Option<Index>,
    manifests: Vec<Descriptor>,
    /// The bytes of the only manifest, where the reference stands for one.
    single: Option<Bytes>,
}

/// One image for one platform.
#[derive(Debug, Clone)]
pub struct ResolvedImage {
    /// What the reference stands for: the index, or the manifest itself.
    pub top: Descriptor,
    /// The index, if the reference stands for one.
    pub index: Option<Index>,
    /// The manifest's descriptor, with the platform that an index gives it.
    pub descriptor: Descriptor,
    /// The manifest.
    pub manifest: Manifest,
    /// The manifest's bytes.
    pub manifest_bytes: Bytes,
    /// The config, with one diffID a layer.
    pub config: Config,
}

impl ResolvedImage {
    /// The platform: as the index says, else as the config does.
    pub fn platform(&self) -> Platform {
        self.descriptor.platform.as_ref().map_or_else(|| self.config.platform(), Platform::from)
    }
}

impl ImageSource {
    /// The image for `platform`. Without one the host's is taken, and a reference that stands for a single image gives
    /// that, whatever it is for. `prefer` decides between an ordinary image and its EROFS twin.
    ///
    /// # Errors
    /// Documents cannot be had or are unusable, or nothing fits.
    pub async fn image(&self, platform: Option<&Platform>, prefer: Prefer) -> Result<ResolvedImage, TransportError> {
        let entries = self.entries().await?;
        let wanted = platform.cloned().unwrap_or_else(Platform::host);
        let no_platform = |known: String| TransportError::NoPlatform {
            reference: Box::new(self.reference().clone()),
            wanted: wanted.to_string(),
            known,
        };
        let chosen = match &entries.index {
            None => entries.manifests.first(),
            Some(_) => select(&entries.manifests, &wanted, prefer),
        };
        let chosen = chosen.ok_or_else(|| no_platform(known(&entries.manifests)))?.clone();
        let image = self.load(&entries, chosen).await?;
        // What a single image is for stands in its config.
        if platform.is_some() && image.index.is_none() && wanted.fits(&image.platform(), prefer).is_none() {
            return Err(no_platform(image.platform().to_string()));
        }
        Ok(image)
    }

    /// All images of the reference in the order of its index, without what is no image (attestations, signatures).
    ///
    /// # Errors
    /// As [`image`](Self::image).
    pub async fn images(&self) -> Result<Vec<ResolvedImage>, TransportError> {
        let entries = self.entries().await?;
        let mut images = Vec::new();
        let at_top = entries.index.iter().flat_map(|index| &index.manifests).map(|entry| entry.digest);
        let at_top: std::collections::HashSet<_> = at_top.collect();
        // What stands in the reference's own index is known to whoever asks, and copied; of what stands deeper only images are.
        let leave_out = |entry: &Descriptor| {
            if !at_top.contains(&entry.digest) {
                tracing::warn!(manifest = %entry.digest, "what is no image and stands in an index inside of the index is left out");
            }
        };
        for entry in &entries.manifests {
            let is_unknown = entry.platform.as_ref().is_some_and(|platform| platform.os == "unknown");
            if is_unknown {
                leave_out(entry);
                continue;
            }
            match self.load(&entries, entry.clone()).await {
                Ok(image) => images.push(image),
                // A signature need not say that it is no image.
                Err(TransportError::Document { source: DocumentError::NoImage(_), .. })
                    if entry.platform.is_none() && entries.single.is_none() =>
                {
                    leave_out(entry);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(images)
    }

    /// The manifests behind the reference, indexes inside indexes opened in their place.
    async fn entries(&self) -> Result<Entries, TransportError> {
        let (mut top, mut top_bytes) = self.fetch_top().await?;
        let (mut manifests, mut index, mut single) = (Vec::new(), None, None);
        let mut opened = 0;
        let mut waiting = vec![top.clone()];
        while let Some(next) = waiting.pop() {
            // A registry may name any type for a tag; below it only indexes are opened.
            let is_top = opened == 0;
            if !is_top && !media::is_index(&next.media_type) {
                if media::is_manifest(&next.media_type) {
                    manifests.push(next);
                }
                continue;
            }
            opened += 1;
            if opened > INDEX_LIMIT {
                let reference = Box::new(self.reference().clone());
                return Err(TransportError::TooManyIndexes { reference, limit: INDEX_LIMIT });
            }
            let bytes = match top_bytes.take() {
                Some(bytes) => bytes,
                None => self.document(&next).await?,
            };
            match self.parse(&bytes, &next)? {
                Document::Index(found) => {
                    waiting.extend(found.manifests.iter().rev().cloned());
                    if is_top {
                        top.media_type.clone_from(&found.media_type);
                        index = Some(found);
                    }
                }
                Document::Manifest(manifest) => {
                    if is_top {
                        top.media_type.clone_from(&manifest.media_type);
                        single = Some(bytes);
                    }
                    manifests.push(Descriptor { media_type: manifest.media_type, ..next });
                }
            }
        }
        Ok(Entries { top, index, manifests, single })
    }

    async fn load(&self, entries: &Entries, descriptor: Descriptor) -> Result<ResolvedImage, TransportError> {
        let unusable = |document: &Descriptor, source: DocumentError| TransportError::Document {
            reference: Box::new(self.reference().clone()),
            document: document.digest,
            source,
        };
        let manifest_bytes = match &entries.single {
            Some(bytes) => bytes.clone(),
            None => self.document(&descriptor).await?,
        };
        let manifest = match self.parse(&manifest_bytes, &descriptor)? {
            Document::Manifest(manifest) => manifest,
            Document::Index(index) => {
                return Err(unusable(&descriptor, DocumentError::MediaType(index.media_type)));
            }
        };
        if !media::is_config(&manifest.config.media_type) {
            return Err(unusable(&descriptor, DocumentError::NoImage(manifest.config.media_type)));
        }
        let bytes = self.document(&manifest.config).await?;
        let config = Config::parse_verified(bytes.into(), &manifest.config)
            .and_then(|config| config.check_layers(&manifest).map(|()| config))
            .map_err(|source| unusable(&manifest.config, source))?;
        let (top, index) = (entries.top.clone(), entries.index.clone());
        Ok(ResolvedImage { top, index, descriptor, manifest, manifest_bytes, config })
    }
}

/// The platforms of an index, for messages.
fn known(entries: &[Descriptor]) -> String {
    let name = |entry: &Descriptor| {
        entry.platform.as_ref().map_or_else(|| "unnamed".to_owned(), |platform| Platform::from(platform).to_string())
    };
    let mut known: Vec<String> = entries.iter().map(name).take(40).collect();
    known.dedup();
    if known.is_empty() { "no image at all".to_owned() } else { known.join(", ") }
}
