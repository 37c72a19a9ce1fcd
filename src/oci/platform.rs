//! For which machine an image is, and which entry of an index fits a request.
//!
//! Text form as containerd reads and writes it: `linux`, `linux/arm64`, `linux/arm/v7`, `linux(+erofs)/amd64`,
//! `windows(10.0.17763)/amd64`. Names are normalised (`x86_64` is `amd64`, `arm64/v8` is `arm64`).

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Descriptor;

/// The `os.features` word of an image whose layers are EROFS (EROFS image layer specification, *Platform*).
pub const EROFS_FEATURE: &str = "erofs";

/// A platform, normalised.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Platform {
    /// Operating system, as `GOOS` names it.
    pub os: String,
    /// Processor, as `GOARCH` names it.
    pub architecture: String,
    /// Processor variant, if it is not the common one.
    pub variant: Option<String>,
    /// Version of the operating system; only Windows images have it.
    pub os_version: Option<String>,
    /// Features the operating system must offer (an image) or offers (a request).
    pub os_features: BTreeSet<String>,
}

/// Why a text is no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a platform: {reason}; a platform is written os/architecture[/variant], for example linux/arm64"
)]
pub struct PlatformError {
    text: String,
    reason: &'static str,
}

/// Which of two otherwise equal entries of an index is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prefer {
    /// The one with ordinary layers, for example as the source of a conversion; an EROFS one if it is all there is.
    Ordinary,
    /// The one with EROFS layers, for example to mount it; an ordinary one if it is all there is.
    Erofs,
}

impl Platform {
    /// A Linux platform.
    pub fn linux(architecture: &str, variant: Option<&str>) -> Self {
        Self::normalised("linux", architecture, variant)
    }

    /// The platform this program runs on.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            // Rust's names where they differ from Go's. Variants of 32-bit ARM: Rust's `arm` targets run on v6 at least.
            "x86" => "386",
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            "powerpc64" => "ppc64",
            "loongarch64" => "loong64",
            other => other,
        };
        Self::normalised(std::env::consts::OS, architecture, None)
    }

    fn normalised(os: &str, architecture: &str, variant: Option<&str>) -> Self {
        let os = match os.to_ascii_lowercase().as_str() {
            "macos" => "darwin".to_owned(),
            other => other.to_owned(),
        };
        let architecture = architecture.to_ascii_lowercase();
        let variant = variant.unwrap_or_default().to_ascii_lowercase();
        let (architecture, variant) = match (architecture.as_str(), variant.as_str()) {
            ("i386" | "x86", _) => ("386", ""),
            ("x86_64" | "x86-64" | "amd64", "v1") => ("amd64", ""),
            ("x86_64" | "x86-64", variant) => ("amd64", variant),
            ("aarch64" | "arm64", "8" | "v8") => ("arm64", ""),
            ("aarch64", variant) => ("arm64", variant),
            ("armhf", _) | ("arm", "" | "7") => ("arm", "v7"),
            ("armel", _) | ("arm", "6") => ("arm", "v6"),
            ("arm", "5") => ("arm", "v5"),
            ("arm", "8") => ("arm", "v8"),
            (architecture, variant) => (architecture, variant),
        };
        Self {
            os,
            architecture: architecture.to_owned(),
            variant: (!variant.is_empty()).then(|| variant.to_owned()),
            os_version: None,
            os_features: BTreeSet::new(),
        }
    }

    /// Variants that run on this platform, best first; `None` is the architecture's common variant.
    fn runnable_variants(&self) -> Vec<Option<String>> {
        let numbered = |highest: u32, lowest: u32| {
            (lowest..=highest).rev().map(|n| Some(format!("v{n}"))).collect::<Vec<Option<String>>>()
        };
        let level = self.variant.as_deref().and_then(|v| v.strip_prefix('v')?.parse::<u32>().ok());
        match (self.architecture.as_str(), level) {
            ("arm", Some(level @ 5..=8)) => numbered(level, 5),
            ("amd64", Some(level @ 2..=4)) => numbered(level, 2).into_iter().chain([None]).collect(),
            ("arm64", Some(level @ 9)) => numbered(level, 9).into_iter().chain([None]).collect(),
            _ => vec![self.variant.clone()],
        }
    }

    /// How well an image for `image` fits this request: `None` does not run, lower is better.
    ///
    /// A variant that is older but runs fits worse. An image that needs a feature does not fit a request without it,
    /// but for `erofs`, which this program always offers and which `prefer` decides about.
    pub fn fits(&self, image: &Self, prefer: Prefer) -> Option<u32> {
        if self.os != image.os || self.architecture != image.architecture {
            return None;
        }
        if self.os_version.is_some() && image.os_version.is_some() && self.os_version != image.os_version {
            return None;
        }
        if image.os_features.iter().any(|feature| feature != EROFS_FEATURE && !self.os_features.contains(feature)) {
            return None;
        }
        let rank = self.runnable_variants().iter().position(|variant| *variant == image.variant)?;
        let wants_erofs = prefer == Prefer::Erofs || self.os_features.contains(EROFS_FEATURE);
        let other_kind = u32::from(wants_erofs != image.os_features.contains(EROFS_FEATURE));
        u32::try_from(rank).ok()?.checked_mul(2)?.checked_add(other_kind)
    }
}

/// The entry of an index that fits `request` best, the first of equals. An entry without platform fits when it is the
/// only one.
///
/// Image specification, `image-index.md`: *"If multiple manifests match a client or runtime's requirements, the first
/// matching entry SHOULD be used."*
pub fn select<'a>(entries: &'a [Descriptor], request: &Platform, prefer: Prefer) -> Option<&'a Descriptor> {
    let best = entries
        .iter()
        .filter_map(|entry| Some((request.fits(&entry.platform.as_ref()?.into(), prefer)?, entry)))
        .min_by_key(|(rank, _)| *rank)
        .map(|(_, entry)| entry);
    match (best, entries) {
        (None, [only]) if only.platform.is_none() => Some(only),
        (best, _) => best,
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let fail = |reason| PlatformError { text: text.to_owned(), reason };
        let word = |word: &str| {
            !word.is_empty() && word.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        };
        let mut parts = text.split('/');
        let os = parts.next().unwrap_or_default();
        let (architecture, variant) = (parts.next(), parts.next());
        if parts.next().is_some() {
            return Err(fail("it has more than three parts"));
        }
        let (os, options) = match os.split_once('(') {
            Some((os, options)) => {
                (os, options.strip_suffix(')').ok_or_else(|| fail("a parenthesis is not closed after the system"))?)
            }
            None => (os, ""),
        };
        if !word(os) || architecture.is_some_and(|a| !word(a)) || variant.is_some_and(|v| !word(v)) {
            return Err(fail("a part is empty or holds characters that no name has"));
        }
        let mut options = options.split('+');
        let os_version = options.next().filter(|version| !version.is_empty());
        let os_features: BTreeSet<String> = options.map(str::to_owned).collect();
        if os_version.is_some_and(|v| !word(v)) || os_features.iter().any(|feature| !word(feature)) {
            return Err(fail("the parenthesis after the system holds neither a version nor +features"));
        }
        let mut platform = match architecture {
            Some(architecture) => Self::normalised(os, architecture, variant),
            // One word is a system for the host's processor, or a processor.
            None if matches!(os, "linux" | "windows" | "darwin" | "freebsd") => {
                Self { os: os.to_owned(), ..Self::host() }
            }
            None => Self::normalised(&Self::host().os, os, None),
        };
        platform.os_version = os_version.map(str::to_owned);
        platform.os_features = os_features;
        Ok(platform)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.os)?;
        if self.os_version.is_some() || !self.os_features.is_empty() {
            write!(f, "({}", self.os_version.as_deref().unwrap_or_default())?;
            for feature in &self.os_features {
                write!(f, "+{feature}")?;
            }
            f.write_str(")")?;
        }
        write!(f, "/{}", self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

/// A platform as it stands in a descriptor or config: not normalised, so that it is written back as it was read.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PlatformRecord {
    /// Processor.
    pub architecture: String,
    /// Operating system.
    pub os: String,
    /// Version of the operating system.
    #[serde(rename = "os.version", default, skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
    /// Features the operating system must offer.
    #[serde(rename = "os.features", default, skip_serializing_if = "Option::is_none")]
    pub os_features: Option<Vec<String>>,
    /// Processor variant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl From<&PlatformRecord> for Platform {
    fn from(record: &PlatformRecord) -> Self {
        Self {
            os_version: record.os_version.clone().filter(|version| !version.is_empty()),
            os_features: record.os_features.iter().flatten().cloned().collect(),
            ..Self::normalised(&record.os, &record.architecture, record.variant.as_deref())
        }
    }
}

impl From<&Platform> for PlatformRecord {
    fn from(platform: &Platform) -> Self {
        Self {
            architecture: platform.architecture.clone(),
            os: platform.os.clone(),
            os_version: platform.os_version.clone(),
            os_features: (!platform.os_features.is_empty()).then(|| platform.os_features.iter().cloned().collect()),
            variant: platform.variant.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Algorithm, BlobDigest, Digest};

    #[test]
    fn texts_are_normalised_and_round_trip() {
        for (text, expected) in [
            ("linux/amd64", "linux/amd64"),
            ("linux/x86_64", "linux/amd64"),
            ("Linux/AArch64", "linux/arm64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/arm/6", "linux/arm/v6"),
            ("linux/armel", "linux/arm/v6"),
            ("linux/amd64/v1", "linux/amd64"),
            ("linux/amd64/v3", "linux/amd64/v3"),
            ("linux(+erofs)/amd64", "linux(+erofs)/amd64"),
            ("windows(10.0.17763+win32k)/amd64", "windows(10.0.17763+win32k)/amd64"),
            ("macos/arm64", "darwin/arm64"),
            ("linux/i386", "linux/386"),
        ] {
            let platform: Platform = text.parse().unwrap();
            assert_eq!(platform.to_string(), expected, "{text}");
            assert_eq!(platform.to_string().parse::<Platform>().unwrap(), platform);
        }
        assert_eq!("linux".parse::<Platform>().unwrap().architecture, Platform::host().architecture);
        assert_eq!("arm64".parse::<Platform>().unwrap().to_string(), "linux/arm64");
    }

    #[test]
    fn texts_that_are_no_platform_are_refused() {
        for text in ["", "/", "linux/", "linux/a/b/c", "linux(/amd64", "linux(+)/amd64", "li nux/amd64", "linux/amd64/"]
        {
            assert!(text.parse::<Platform>().is_err(), "{text:?} was taken for a platform");
        }
    }

    fn index(platforms: &[&str]) -> Vec<Descriptor> {
        platforms
            .iter()
            .map(|text| {
                let digest = BlobDigest(Digest::of(Algorithm::Sha256, text.as_bytes()));
                let mut entry = Descriptor::new(super::super::media::OCI_MANIFEST, digest, 1);
                entry.platform = (!text.is_empty()).then(|| PlatformRecord::from(&text.parse::<Platform>().unwrap()));
                entry
            })
            .collect()
    }

    #[test]
    fn the_best_entry_of_an_index_is_taken() {
        use Prefer::{Erofs, Ordinary};
        let dual: &[&str] = &["linux/amd64", "linux(+erofs)/amd64", "linux/arm64", "unknown/unknown"];
        let arms: &[&str] = &["linux/arm/v5", "linux/arm/v6", "linux/arm/v8", "linux/amd64", "linux/amd64/v2"];
        for (entries, request, prefer, expected) in [
            (dual, "linux/amd64", Ordinary, Some(0)),
            (dual, "linux/amd64", Erofs, Some(1)),
            (dual, "linux(+erofs)/amd64", Ordinary, Some(1)),
            (dual, "linux/arm64", Erofs, Some(2)),
            (dual, "linux/s390x", Erofs, None),
            (&["linux(+erofs)/amd64"], "linux/amd64", Ordinary, Some(0)),
            (arms, "linux/arm/v7", Ordinary, Some(1)),
            (arms, "linux/arm/v8", Ordinary, Some(2)),
            (arms, "linux/amd64", Ordinary, Some(3)),
            (arms, "linux/amd64/v3", Ordinary, Some(4)),
            (&["linux/amd64", "linux/amd64"], "linux/amd64", Ordinary, Some(0)),
            (&["windows(10.0.1+win32k)/amd64"], "windows/amd64", Ordinary, None),
            (&["windows(10.0.1+win32k)/amd64"], "windows(10.0.1+win32k)/amd64", Ordinary, Some(0)),
            (&["windows(10.0.1)/amd64"], "windows(10.0.2)/amd64", Ordinary, None),
            (&[""], "linux/amd64", Ordinary, Some(0)),
            (&["", ""], "linux/amd64", Ordinary, None),
            (&[], "linux/amd64", Ordinary, None),
        ] {
            let entries = index(entries);
            let found = select(&entries, &request.parse().unwrap(), prefer);
            let place = found.map(|found| entries.iter().position(|entry| std::ptr::eq(entry, found)).unwrap());
            assert_eq!(place, expected, "{request} {prefer:?} in {entries:?}");
        }
    }
}
