//! The configuration of an image: the few members that this program understands, and all others kept when it is edited.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::descriptor::{Descriptor, DocumentError, null_is_empty, to_json};
use super::manifest::Manifest;
use super::media;
use super::platform::{EROFS_FEATURE, Platform, PlatformRecord};
use crate::model::DiffId;

/// The configuration of an image: what was read, and the few members that this program understands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    bytes: Vec<u8>,
    platform: PlatformRecord,
    diff_ids: Vec<DiffId>,
    created: Option<String>,
}

/// Old images lack the architecture, which a descriptor's platform must have.
#[derive(Deserialize)]
struct ConfigProbe {
    #[serde(default, deserialize_with = "null_is_empty")]
    architecture: String,
    #[serde(default, deserialize_with = "null_is_empty")]
    os: String,
    #[serde(rename = "os.version", default)]
    os_version: Option<String>,
    #[serde(rename = "os.features", default)]
    os_features: Option<Vec<String>>,
    #[serde(default)]
    variant: Option<String>,
    created: Option<String>,
    /// The EROFS image layer format specification lets it be absent (section 5.2).
    #[serde(default, deserialize_with = "null_is_empty")]
    rootfs: RootFs,
}

#[derive(Default, Deserialize)]
struct RootFs {
    #[serde(default, deserialize_with = "null_is_empty")]
    diff_ids: Vec<DiffId>,
}

impl Config {
    /// Checks `bytes` against their descriptor, then reads them.
    ///
    /// # Errors
    /// See [`DocumentError`].
    pub fn parse_verified(bytes: Vec<u8>, descriptor: &Descriptor) -> Result<Self, DocumentError> {
        if !media::is_config(&descriptor.media_type) {
            return Err(DocumentError::NoImage(descriptor.media_type.clone()));
        }
        descriptor.verify(&bytes)?;
        Self::parse(bytes)
    }

    /// Reads a config.
    ///
    /// # Errors
    /// See [`DocumentError`].
    pub fn parse(bytes: Vec<u8>) -> Result<Self, DocumentError> {
        let probe: ConfigProbe = serde_json::from_slice(&bytes)
            .map_err(|source| DocumentError::Json { what: "an image configuration", source })?;
        let platform = PlatformRecord {
            architecture: probe.architecture,
            // Docker's oldest images leave it out and are for Linux.
            os: if probe.os.is_empty() { "linux".to_owned() } else { probe.os },
            os_version: probe.os_version,
            os_features: probe.os_features,
            variant: probe.variant,
        };
        Ok(Self { bytes, platform, diff_ids: probe.rootfs.diff_ids, created: probe.created })
    }

    /// The bytes as read.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The platform, as written.
    pub const fn platform_record(&self) -> &PlatformRecord {
        &self.platform
    }

    /// The platform, normalised.
    pub fn platform(&self) -> Platform {
        Platform::from(&self.platform)
    }

    /// The diffIDs, lowest layer first.
    pub fn diff_ids(&self) -> &[DiffId] {
        &self.diff_ids
    }

    /// When the image was made, as written.
    pub fn created(&self) -> Option<&str> {
        self.created.as_deref()
    }

    /// True if the config says that the layers are EROFS.
    pub fn has_erofs_feature(&self) -> bool {
        self.platform.os_features.iter().flatten().any(|feature| feature == EROFS_FEATURE)
    }

    /// One diffID for each layer of `manifest`?
    ///
    /// # Errors
    /// [`DocumentError::LayerCount`].
    pub fn check_layers(&self, manifest: &Manifest) -> Result<(), DocumentError> {
        if self.diff_ids.len() != manifest.layers.len() {
            return Err(DocumentError::LayerCount { diff_ids: self.diff_ids.len(), layers: manifest.layers.len() });
        }
        Ok(())
    }

    /// The config with other layers: `rootfs.diff_ids` replaced and `erofs` added to or taken from `os.features`.
    /// Everything else is kept; members are written in the order of their names.
    ///
    /// # Errors
    /// The bytes are no JSON object, which a config that was parsed always is.
    pub fn with_layers(&self, diff_ids: &[DiffId], erofs: bool) -> Result<Self, DocumentError> {
        let mut members: BTreeMap<String, Value> = serde_json::from_slice(&self.bytes)
            .map_err(|source| DocumentError::Json { what: "an image configuration", source })?;
        let ids: Vec<Value> = diff_ids.iter().map(|id| Value::String(id.to_string())).collect();
        members.insert("rootfs".to_owned(), serde_json::json!({ "type": "layers", "diff_ids": ids }));
        let mut features: Vec<String> = self.platform.os_features.clone().unwrap_or_default();
        features.retain(|feature| feature != EROFS_FEATURE);
        if erofs {
            features.push(EROFS_FEATURE.to_owned());
        }
        if features.is_empty() {
            members.remove("os.features");
        } else {
            members.insert("os.features".to_owned(), features.into());
        }
        if members.get("os").is_none_or(|os| os.as_str().is_none_or(str::is_empty)) {
            members.insert("os".to_owned(), self.platform.os.clone().into());
        }
        Self::parse(to_json(&members))
    }

    /// True if `other` says the same about everything but the layers and whether they are EROFS: one may be the
    /// conversion of the other.
    pub fn corresponds(&self, other: &Self) -> bool {
        let image = |config: &Self| {
            let mut members: BTreeMap<String, Value> = serde_json::from_slice(&config.bytes).ok()?;
            members.remove("rootfs");
            members.remove("os.features");
            // Written by a conversion where it was left out.
            members.remove("os");
            let features = config.platform.os_features.iter().flatten().filter(|feature| *feature != EROFS_FEATURE);
            Some((members, config.platform.os.clone(), features.cloned().collect::<Vec<_>>()))
        };
        image(self).is_some_and(|this| image(other) == Some(this)) && self.diff_ids.len() == other.diff_ids.len()
    }

    /// The descriptor of this config.
    pub fn descriptor(&self) -> Descriptor {
        Descriptor::of(media::OCI_CONFIG, &self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Digest;

    const HEX: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn an_edited_config_keeps_what_it_does_not_know() {
        let text = format!(
            r#"{{"os":"linux","architecture":"amd64","docker_version":"20","created":"2024-01-01T00:00:00Z",
            "config":{{"Cmd":["sh"],"Healthcheck":{{}}}},"rootfs":{{"type":"layers","diff_ids":["{HEX}"]}},"history":null}}"#
        );
        let config = Config::parse(text.into_bytes()).unwrap();
        assert_eq!(config.diff_ids().len(), 1);
        let layer = DiffId(Digest::of(crate::model::Algorithm::Sha256, b"x"));
        let edited = config.with_layers(&[layer, layer], true).unwrap();
        assert_eq!(edited.diff_ids(), [layer, layer]);
        assert!(edited.has_erofs_feature());
        assert_eq!(edited.platform().to_string(), "linux(+erofs)/amd64");
        let value: Value = serde_json::from_slice(edited.as_bytes()).unwrap();
        assert_eq!(value["docker_version"], "20");
        assert_eq!(value["config"]["Cmd"][0], "sh");
        assert!(!edited.with_layers(&[layer], false).unwrap().has_erofs_feature());
        assert_eq!(config.with_layers(&[layer, layer], true).unwrap().as_bytes(), edited.as_bytes());
    }

    #[test]
    fn a_conversion_corresponds_to_its_original_and_to_nothing_else() {
        let text = |command: &str, os: &str| {
            format!(
                r#"{{{os}"architecture":"amd64","config":{{"Cmd":["{command}"]}},
                "rootfs":{{"type":"layers","diff_ids":["{HEX}"]}},"history":[{{"created_by":"x"}}]}}"#
            )
        };
        let parse = |text: String| Config::parse(text.into_bytes()).unwrap();
        let layer = DiffId(Digest::of(crate::model::Algorithm::Sha256, b"x"));
        for os in ["", r#""os":"linux","#, r#""os":"linux","os.features":["other"],"#] {
            let original = parse(text("sh", os));
            let twin = original.with_layers(&[layer], true).unwrap();
            assert!(original.corresponds(&twin) && twin.corresponds(&original), "{os}");
            assert!(
                !original.corresponds(&twin.with_layers(&[layer, layer], true).unwrap()),
                "another number of layers"
            );
            assert!(!parse(text("rm", os)).corresponds(&twin), "another command");
        }
        assert!(!parse(text("sh", r#""os":"linux","#)).corresponds(&parse(text("sh", r#""os":"windows","#))));
    }

    #[test]
    fn a_config_without_a_diff_id_for_each_layer_is_refused() {
        let config = Config::parse(br#"{"rootfs":{"diff_ids":null}}"#.to_vec()).unwrap();
        assert_eq!(config.platform_record().os, "linux");
        let layer = Descriptor::of(media::OCI_LAYER_GZIP, b"layer");
        let manifest = Manifest::new(config.descriptor(), vec![layer]);
        let error = config.check_layers(&manifest).unwrap_err().to_string();
        assert_eq!(error, "the config has 0 diffIDs for the 1 layers of the manifest");
        let attestation = Descriptor::of("application/vnd.in-toto+json", b"{}");
        assert!(matches!(Config::parse_verified(b"{}".to_vec(), &attestation), Err(DocumentError::NoImage(_))));
    }
}
