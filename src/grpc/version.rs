//! containerd's version, and what changed with which that matters here.

use std::fmt;
use std::str::FromStr;

/// A version of containerd. What stands behind the numbers (`-beta.0`, `~ds1`) does not count: what a release brings is
/// in its previews.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContainerdVersion {
    /// The first number.
    pub major: u32,
    /// The second.
    pub minor: u32,
    /// The third; 0 if it was not said.
    pub patch: u32,
}

/// A text that names no version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a version of containerd: write it as 1.7 or 2.1.4")]
pub struct VersionError(String);

impl ContainerdVersion {
    /// The oldest one that is known to work.
    pub const OLDEST: Self = Self::new(1, 6);

    /// The first release of a series.
    pub const fn new(major: u32, minor: u32) -> Self {
        Self { major, minor, patch: 0 }
    }

    fn since(self, major: u32, minor: u32) -> bool {
        (self.major, self.minor) >= (major, minor)
    }

    /// Whether an entry of `proxy_plugins` has `exports` and `capabilities`, and may be of type `diff`.
    pub fn has_exports(self) -> bool {
        self.since(1, 7)
    }

    /// Whether files that are imported are merged into plugins key by key; before, they replace whole plugins.
    pub fn merges_plugins(self) -> bool {
        self.since(2, 0)
    }

    /// Whether images are settings of a plugin of their own (`io.containerd.cri.v1.images`), and `ctr image pull` asks the
    /// transfer service.
    pub fn has_images_plugin(self) -> bool {
        self.since(2, 0)
    }

    /// Whether the transfer service tells a snapshotter which image a layer belongs to, if an export says so.
    pub fn has_annotations_export(self) -> bool {
        self.since(2, 1)
    }

    /// Whether the capability `rebase` has an effect.
    pub fn knows_rebase(self) -> bool {
        self.since(2, 2)
    }

    /// Whether layers of type `application/vnd.erofs.layer.v1` are layers.
    pub fn knows_erofs_layers(self) -> bool {
        self.since(2, 3)
    }

    /// Whether a layer that is prepared out of order can be left to the snapshotter. Without that, `rebase` and lazy layers
    /// together make images of which only the top layer is left (containerd's issue 13264).
    pub fn stages(self) -> bool {
        self.since(2, 4)
    }

    /// The version of `containerd --version`'s output: the last word that looks like one, without what a distribution
    /// appends.
    pub fn of_output(output: &str) -> Option<Self> {
        // `containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3`, `... containerd/v2 v2.1.4 75cb2b7`.
        output.lines().next()?.split_whitespace().skip(2).find_map(|word| word.parse().ok())
    }
}

impl FromStr for ContainerdVersion {
    type Err = VersionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || VersionError(text.to_owned());
        let numbers = text.strip_prefix('v').unwrap_or(text);
        // What is built from a tree with changes that nobody has committed says so.
        let numbers = numbers.strip_suffix(".m").unwrap_or(numbers);
        let end = numbers.find(|c: char| c != '.' && !c.is_ascii_digit()).unwrap_or(numbers.len());
        let (numbers, rest) = numbers.split_at(end);
        if !rest.is_empty() && !rest.starts_with(['-', '+', '~']) {
            return Err(wrong());
        }
        let mut parts = numbers.split('.').map(|part| part.parse::<u32>().map_err(|_| wrong()));
        let (major, minor) = (parts.next().ok_or_else(wrong)??, parts.next().ok_or_else(wrong)??);
        let patch = parts.next().unwrap_or(Ok(0))?;
        if parts.next().is_some() {
            return Err(wrong());
        }
        Ok(Self { major, minor, patch })
    }
}

impl fmt::Display for ContainerdVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_they_are_written() {
        for (text, expected) in [
            ("1.6", Some((1, 6, 0))),
            ("1.7.24", Some((1, 7, 24))),
            ("v2.1.4", Some((2, 1, 4))),
            ("2.4.0-beta.0", Some((2, 4, 0))),
            ("1.6.20~ds1-1+deb12u3", Some((1, 6, 20))),
            ("2.1.9+unknown", Some((2, 1, 9))),
            ("v2.1.9.m", Some((2, 1, 9))),
            ("v2.4.0-beta.0-12-g301026e58.m", Some((2, 4, 0))),
            ("v2.10.0", Some((2, 10, 0))),
            ("", None),
            ("2", None),
            ("2.", None),
            ("two.one", None),
            (".1", None),
            ("-1.2", None),
            ("+1.7", None),
            ("1.2.3.4", None),
            ("1.7x", None),
            ("99999999999.1", None),
        ] {
            let expected = expected.map(|(major, minor, patch)| ContainerdVersion { major, minor, patch });
            assert_eq!(text.parse::<ContainerdVersion>().ok(), expected, "{text:?}");
        }
    }

    #[test]
    fn the_program_tells_its_version_among_other_things() {
        for (output, expected) in [
            ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3\n", Some("1.6.20")),
            ("containerd github.com/containerd/containerd/v2 2.1.9+unknown \n", Some("2.1.9")),
            (
                "containerd github.com/containerd/containerd/v2 v2.1.4 75cb2b7193e4e490e9fbdc236c0e811ccaba3376\n",
                Some("2.1.4"),
            ),
            ("containerd containerd.io 1.7.27 05044ec0a9a75232cad458027ca83437aae3f4da\n", Some("1.7.27")),
            ("containerd\n", None),
            ("", None),
        ] {
            let found = ContainerdVersion::of_output(output).map(|version| version.to_string());
            assert_eq!(found.as_deref(), expected, "{output:?}");
        }
    }

    #[test]
    fn what_came_with_which_version() {
        type Has = fn(ContainerdVersion) -> bool;
        let table: [(Has, &str); 7] = [
            (ContainerdVersion::has_exports, "1.7"),
            (ContainerdVersion::merges_plugins, "2.0"),
            (ContainerdVersion::has_images_plugin, "2.0"),
            (ContainerdVersion::has_annotations_export, "2.1"),
            (ContainerdVersion::knows_rebase, "2.2"),
            (ContainerdVersion::knows_erofs_layers, "2.3"),
            (ContainerdVersion::stages, "2.4"),
        ];
        for (has, since) in table {
            let since: ContainerdVersion = since.parse().unwrap();
            for version in ["1.6.38", "1.7.0", "2.0.7", "2.1.9", "2.2.7", "2.3.4", "2.4.0-beta.0", "3.0"] {
                let version: ContainerdVersion = version.parse().unwrap();
                assert_eq!(has(version), version >= since, "{version} and {since}");
            }
        }
    }
}
