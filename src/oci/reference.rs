//! Where an image is: the names that people know from skopeo, and docker's short names.
//!
//! A [`Reference`] that exists is well formed: host, repository and tag fit the distribution specification's grammar, a
//! path is not empty. Its text form parses back to the same value. What stands behind the name is unknown here.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::model::BlobDigest;

/// The host that docker's short names mean.
pub const DEFAULT_HOST: &str = "docker.io";
/// The tag that a name without tag and digest means.
pub const DEFAULT_TAG: &str = "latest";

/// Longest repository name, host included (distribution specification's reference implementation: 255).
const REPOSITORY_LIMIT: usize = 255;
/// Longest tag (distribution specification: 128).
const TAG_LIMIT: usize = 128;

/// Why a text is no reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an image reference: {reason}")]
pub struct ReferenceError {
    /// The text as given.
    pub text: String,
    /// What is wrong with it.
    pub reason: Reason,
}

/// What is wrong with a reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Reason {
    /// There is nothing.
    #[error("it is empty")]
    Empty,
    /// A transport that skopeo or we do not read.
    #[error("unknown transport {0:?}; known are docker://, oci:, oci-archive: and docker-archive:")]
    Transport(String),
    /// It looks like a path.
    #[error("it looks like a path; an image layout is written oci:DIR, an archive oci-archive:FILE")]
    Path,
    /// `docker:` without the slashes.
    #[error("a registry's image is written docker://HOST/REPOSITORY:TAG")]
    Slashes,
    /// The host part.
    #[error("{0:?} is no host name with an optional port")]
    Host(String),
    /// The repository part.
    #[error(
        "{0:?} is no repository name: lower-case letters, digits and single '.', '_', '__' or '-' between them, parts \
         divided by '/'"
    )]
    Repository(String),
    /// Host and repository together.
    #[error("host and repository are longer than 255 characters")]
    TooLong,
    /// The tag part.
    #[error("{0:?} is no tag: up to 128 letters, digits, '_', '.', '-', not beginning with '.' or '-'")]
    Tag(String),
    /// The digest part.
    #[error("{0}")]
    Digest(crate::model::DigestError),
    /// No directory or file after the transport.
    #[error("no path follows the transport")]
    NoPath,
    /// A number after `@` in a docker archive.
    #[error("{0:?} is no index of an image in the archive")]
    Index(String),
}

/// An image in a registry: host, repository, and a tag or digest or both (the digest then decides).
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageName {
    host: String,
    repository: String,
    tag: Option<String>,
    digest: Option<BlobDigest>,
}

impl ImageName {
    /// A name from its parts.
    ///
    /// # Errors
    /// The part that does not fit the grammar.
    pub fn new(
        host: &str,
        repository: &str,
        tag: Option<&str>,
        digest: Option<BlobDigest>,
    ) -> Result<Self, ReferenceError> {
        let fail = |reason| ReferenceError { text: format!("{host}/{repository}"), reason };
        check_host(host).map_err(fail)?;
        check_repository(host, repository).map_err(fail)?;
        if let Some(tag) = tag {
            check_tag(tag).map_err(fail)?;
        }
        Ok(Self { host: host.to_owned(), repository: repository.to_owned(), tag: tag.map(str::to_owned), digest })
    }

    /// The registry's name, with its port if one is named; `docker.io` for docker's own, which answers elsewhere.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The repository inside the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if one was named.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if one was named.
    pub const fn digest(&self) -> Option<&BlobDigest> {
        self.digest.as_ref()
    }

    /// What a registry is asked for: the digest if there is one, else the tag, else `latest`.
    pub fn selector(&self) -> Selector<'_> {
        match (&self.digest, &self.tag) {
            (Some(digest), _) => Selector::Digest(*digest),
            (None, Some(tag)) => Selector::Tag(tag),
            (None, None) => Selector::Tag(DEFAULT_TAG),
        }
    }

    /// The same repository under another tag.
    ///
    /// # Errors
    /// If `tag` is no tag.
    pub fn with_tag(&self, tag: &str) -> Result<Self, ReferenceError> {
        Self::new(&self.host, &self.repository, Some(tag), None)
    }

    /// The same repository, by digest alone.
    #[must_use]
    pub fn with_digest(&self, digest: BlobDigest) -> Self {
        Self { tag: None, digest: Some(digest), ..self.clone() }
    }
}

/// How a manifest is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selector<'a> {
    /// By a name that may move.
    Tag(&'a str),
    /// By content.
    Digest(BlobDigest),
}

impl fmt::Display for Selector<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for ImageName {
    type Err = ReferenceError;

    /// Reads docker's familiar form: `busybox` is `docker.io/library/busybox`; the first part is a host if it holds a
    /// dot, a colon or a capital, or is `localhost`.
    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        parse_image(text).map_err(|reason| ReferenceError { text: text.to_owned(), reason })
    }
}

fn parse_image(text: &str) -> Result<ImageName, Reason> {
    if text.is_empty() {
        return Err(Reason::Empty);
    }
    if text.starts_with(['/', '.', '~']) {
        return Err(Reason::Path);
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => (rest, Some(digest.parse().map_err(Reason::Digest)?)),
        None => (text, None),
    };
    // The last colon divides a tag off, unless a slash follows it: then it belongs to the host's port.
    let (path, tag) = match rest.rsplit_once(':') {
        Some((path, tag)) if !tag.contains('/') => (path, Some(tag)),
        _ => (rest, None),
    };
    let (host, repository) = match path.split_once('/') {
        Some((first, others))
            if first.contains(['.', ':']) || first == "localhost" || first.contains(|c: char| c.is_uppercase()) =>
        {
            (first, others)
        }
        _ => (DEFAULT_HOST, path),
    };
    let host = if host == "index.docker.io" { DEFAULT_HOST } else { host };
    let repository = if host == DEFAULT_HOST && !repository.contains('/') {
        format!("library/{repository}")
    } else {
        repository.to_owned()
    };
    check_host(host)?;
    check_repository(host, &repository)?;
    if let Some(tag) = tag {
        check_tag(tag)?;
    }
    Ok(ImageName { host: host.to_owned(), repository, tag: tag.map(str::to_owned), digest })
}

fn check_host(host: &str) -> Result<(), Reason> {
    let bad = || Reason::Host(host.to_owned());
    let (name, port) = if let Some(rest) = host.strip_prefix('[') {
        let (address, rest) = rest.split_once(']').ok_or_else(bad)?;
        if address.parse::<std::net::Ipv6Addr>().is_err() {
            return Err(bad());
        }
        match rest.strip_prefix(':') {
            Some(port) => (None, Some(port)),
            None if rest.is_empty() => (None, None),
            None => return Err(bad()),
        }
    } else {
        match host.split_once(':') {
            Some((name, port)) => (Some(name), Some(port)),
            None => (Some(host), None),
        }
    };
    if port.is_some_and(|port| !port.bytes().all(|b| b.is_ascii_digit()) || port.parse::<u16>().is_err()) {
        return Err(bad());
    }
    let label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.is_some_and(|name| !name.split('.').all(label)) { Err(bad()) } else { Ok(()) }
}

fn check_repository(host: &str, repository: &str) -> Result<(), Reason> {
    if host.len() + 1 + repository.len() > REPOSITORY_LIMIT {
        return Err(Reason::TooLong);
    }
    if repository.split('/').all(is_component) { Ok(()) } else { Err(Reason::Repository(repository.to_owned())) }
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(part: &str) -> bool {
    let alphanumeric = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = part.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    alphanumeric(*first)
        && alphanumeric(*last)
        && bytes
            .split(|b| alphanumeric(*b))
            .all(|separator| matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-'))
}

fn check_tag(tag: &str) -> Result<(), Reason> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let mut bytes = tag.bytes();
    let fits = bytes.next().is_some_and(word) && bytes.all(|b| word(b) || matches!(b, b'.' | b'-'));
    if fits && tag.len() <= TAG_LIMIT { Ok(()) } else { Err(Reason::Tag(tag.to_owned())) }
}

/// Which image of a layout or archive is meant.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum LayoutImage {
    /// The only one.
    Only,
    /// The one whose `org.opencontainers.image.ref.name` is this.
    Named(String),
    /// The one with this manifest or index digest.
    Digest(BlobDigest),
}

/// Which image of a docker archive is meant.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ArchiveImage {
    /// The only one.
    Only,
    /// The one with this name among its `RepoTags`.
    Named(ImageName),
    /// The one at this place in `manifest.json`, from 0.
    Index(usize),
}

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Reference {
    /// `docker://HOST/REPOSITORY[:TAG][@DIGEST]`, or the same without `docker://`.
    Registry(ImageName),
    /// `oci:DIR[:TAG]` or `oci:DIR[:TAG]@DIGEST`: an OCI image layout.
    Layout {
        /// The directory.
        path: PathBuf,
        /// Which of its images.
        image: LayoutImage,
    },
    /// `oci-archive:FILE[:TAG]`: a tar of an OCI image layout.
    OciArchive {
        /// The file.
        path: PathBuf,
        /// Which of its images.
        image: LayoutImage,
    },
    /// `docker-archive:FILE[:NAME:TAG]` or `docker-archive:FILE:@INDEX`: what `docker save` writes.
    DockerArchive {
        /// The file.
        path: PathBuf,
        /// Which of its images.
        image: ArchiveImage,
    },
}

impl Reference {
    /// The path, of a reference that names one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Registry(_) => None,
            Self::Layout { path, .. } | Self::OciArchive { path, .. } | Self::DockerArchive { path, .. } => Some(path),
        }
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        parse_reference(text).map_err(|reason| ReferenceError { text: text.to_owned(), reason })
    }
}

fn parse_reference(text: &str) -> Result<Reference, Reason> {
    if let Some(rest) = text.strip_prefix("docker://") {
        return parse_image(rest).map(Reference::Registry);
    }
    if let Some((transport, rest)) = text.split_once("://") {
        return Err(match transport {
            "http" | "https" => Reason::Host(rest.to_owned()),
            _ => Reason::Transport(transport.to_owned()),
        });
    }
    match text.split_once(':') {
        Some(("oci", rest)) => parse_layout(rest).map(|(path, image)| Reference::Layout { path, image }),
        Some(("oci-archive", rest)) => parse_layout(rest).map(|(path, image)| Reference::OciArchive { path, image }),
        Some(("docker-archive", rest)) => parse_docker_archive(rest),
        Some(("docker", rest)) if rest.starts_with('/') => Err(Reason::Slashes),
        // A short name's tag cannot begin with a slash or hold one after it, so these are transports of others.
        Some((transport @ ("dir" | "docker-daemon" | "containers-storage" | "ostree" | "sif" | "tarball"), _)) => {
            Err(Reason::Transport(transport.to_owned()))
        }
        _ => parse_image(text).map(Reference::Registry),
    }
}

fn parse_layout(text: &str) -> Result<(PathBuf, LayoutImage), Reason> {
    let digest = text.rsplit_once('@').and_then(|(rest, digest)| Some((rest, digest.parse().ok()?)));
    let (rest, digest) = match digest {
        Some((rest, digest)) => (rest, Some(digest)),
        None => (text, None),
    };
    let (path, name) = match rest.split_once(':') {
        Some((path, name)) => (path, Some(name)),
        None => (rest, None),
    };
    if path.is_empty() {
        return Err(Reason::NoPath);
    }
    let image = match (digest, name) {
        (Some(digest), _) => LayoutImage::Digest(digest),
        (None, None) => LayoutImage::Only,
        (None, Some(name)) => {
            check_layout_name(name)?;
            LayoutImage::Named(name.to_owned())
        }
    };
    Ok((PathBuf::from(path), image))
}

/// The image specification's grammar of `org.opencontainers.image.ref.name`, read generously: anything visible.
fn check_layout_name(name: &str) -> Result<(), Reason> {
    let fits = !name.is_empty()
        && name.len() <= REPOSITORY_LIMIT + TAG_LIMIT
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:@+/".contains(&b));
    if fits { Ok(()) } else { Err(Reason::Tag(name.to_owned())) }
}

fn parse_docker_archive(text: &str) -> Result<Reference, Reason> {
    let (path, name) = match text.split_once(':') {
        Some((path, name)) => (path, Some(name)),
        None => (text, None),
    };
    if path.is_empty() {
        return Err(Reason::NoPath);
    }
    let image = match name {
        None => ArchiveImage::Only,
        Some(name) => match name.strip_prefix('@') {
            Some(index) => ArchiveImage::Index(index.parse().map_err(|_| Reason::Index(index.to_owned()))?),
            None => ArchiveImage::Named(parse_image(name)?),
        },
    };
    Ok(Reference::DockerArchive { path: PathBuf::from(path), image })
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(name) => write!(f, "docker://{name}"),
            Self::Layout { path, image } => write!(f, "oci:{}{image}", path.display()),
            Self::OciArchive { path, image } => write!(f, "oci-archive:{}{image}", path.display()),
            Self::DockerArchive { path, image } => write!(f, "docker-archive:{}{image}", path.display()),
        }
    }
}

impl fmt::Display for LayoutImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Only => Ok(()),
            Self::Named(name) => write!(f, ":{name}"),
            Self::Digest(digest) => write!(f, "@{digest}"),
        }
    }
}

impl fmt::Display for ArchiveImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Only => Ok(()),
            Self::Named(name) => write!(f, ":{name}"),
            Self::Index(index) => write!(f, ":@{index}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_are_understood_as_docker_does_and_round_trip() {
        let digested = format!("docker://quay.io/a/b:t@{HEX}");
        for (text, host, repository, tag) in [
            ("busybox", "docker.io", "library/busybox", None),
            ("busybox:1.36", "docker.io", "library/busybox", Some("1.36")),
            ("index.docker.io/busybox", "docker.io", "library/busybox", None),
            ("docker.io/me/app:v1", "docker.io", "me/app", Some("v1")),
            ("me/app", "docker.io", "me/app", None),
            ("localhost/app", "localhost", "app", None),
            ("localhost:5000/app:x", "localhost:5000", "app", Some("x")),
            ("127.0.0.1:5000/a/b/c", "127.0.0.1:5000", "a/b/c", None),
            ("[::1]:5000/app:t", "[::1]:5000", "app", Some("t")),
            ("[2001:db8::1]/app", "[2001:db8::1]", "app", None),
            ("docker://registry.example/a__b/c-d---e.f:T_1.-", "registry.example", "a__b/c-d---e.f", Some("T_1.-")),
            ("Registry/app", "Registry", "app", None),
            ("docker:latest", "docker.io", "library/docker", Some("latest")),
            (digested.as_str(), "quay.io", "a/b", Some("t")),
        ] {
            let reference: Reference = text.parse().unwrap();
            let Reference::Registry(name) = &reference else { panic!("{text} became {reference:?}") };
            assert_eq!((name.host(), name.repository(), name.tag()), (host, repository, tag), "{text}");
            assert_eq!(name.digest().is_some(), text.contains('@'), "{text}");
            assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference, "{text}");
        }
    }

    #[test]
    fn paths_and_archives_round_trip() {
        let digest: BlobDigest = HEX.parse().unwrap();
        let layout = |path: &str, image| Reference::Layout { path: path.into(), image };
        let docker = |path: &str, image| Reference::DockerArchive { path: path.into(), image };
        for (text, expected) in [
            ("oci:dir".to_owned(), layout("dir", LayoutImage::Only)),
            ("oci:/a/dir:v1".to_owned(), layout("/a/dir", LayoutImage::Named("v1".to_owned()))),
            (
                "oci:dir:docker.io/library/busybox:latest".to_owned(),
                layout("dir", LayoutImage::Named("docker.io/library/busybox:latest".to_owned())),
            ),
            (format!("oci:dir@{HEX}"), layout("dir", LayoutImage::Digest(digest))),
            (
                "oci-archive:a.tar:x".to_owned(),
                Reference::OciArchive { path: "a.tar".into(), image: LayoutImage::Named("x".to_owned()) },
            ),
            ("docker-archive:a.tar".to_owned(), docker("a.tar", ArchiveImage::Only)),
            ("docker-archive:a.tar:@2".to_owned(), docker("a.tar", ArchiveImage::Index(2))),
            (
                "docker-archive:a.tar:docker.io/library/busybox:1".to_owned(),
                docker("a.tar", ArchiveImage::Named("busybox:1".parse().unwrap())),
            ),
        ] {
            let reference: Reference = text.parse().unwrap();
            assert_eq!(reference, expected, "{text}");
            assert_eq!(reference.to_string(), text);
        }
    }

    #[test]
    fn the_digest_decides_over_the_tag() {
        let name: ImageName = format!("a.b/c:t@{HEX}").parse().unwrap();
        assert_eq!(name.selector().to_string(), HEX);
        assert_eq!("a.b/c:t".parse::<ImageName>().unwrap().selector(), Selector::Tag("t"));
        assert_eq!("a.b/c".parse::<ImageName>().unwrap().selector(), Selector::Tag("latest"));
    }

    #[test]
    fn what_is_no_reference_is_refused_with_the_reason() {
        let long = format!("docker://a.b/{}", "x".repeat(256));
        let tag = format!("a.b/c:{}", "x".repeat(129));
        for (text, reason) in [
            ("", "empty"),
            ("docker://", "empty"),
            ("./dir", "looks like a path"),
            ("/dir", "looks like a path"),
            ("docker:/x/y", "docker://HOST"),
            ("https://quay.io/a/b", "no host name"),
            ("dir:/tmp/x", "unknown transport \"dir\""),
            ("ftp://x/y", "unknown transport \"ftp\""),
            ("oci:", "no path"),
            ("oci::tag", "no path"),
            ("oci:dir:", "no tag"),
            ("oci:dir:a b", "no tag"),
            ("docker-archive:", "no path"),
            ("docker-archive:f:@x", "no index"),
            ("a.b/C", "no repository name"),
            ("a.b/c//d", "no repository name"),
            ("a.b/../d", "no repository name"),
            ("a.b/c_-d", "no repository name"),
            ("a.b/c..d", "no repository name"),
            ("a.b/c:", "no tag"),
            ("a.b/c:-x", "no tag"),
            ("a.b/c@sha256:abc", "hexadecimal digits"),
            ("a.b/c@md5:abc", "only sha256 and sha512"),
            ("a.b:x/c", "no host name"),
            ("a.b:99999/c", "no host name"),
            ("user@a.b/c", "not a digest"),
            ("-a.b/c", "no host name"),
            ("[::1/c", "no host name"),
            (long.as_str(), "longer than 255"),
            (tag.as_str(), "no tag"),
        ] {
            let error = text.parse::<Reference>().expect_err(text).to_string();
            assert!(error.contains(reason), "{text:?} gave {error:?}");
        }
    }
}
