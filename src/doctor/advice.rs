//! What to write into containerd's configuration, by containerd's version.
//!
//! Each line has its reason beside it. What is advised here is what [`super::containerd`] finds nothing wrong with; a test
//! holds both together for every version.

use std::fmt::Write as _;
use std::path::Path;

use super::config::DIFF_SERVICE;
use crate::grpc::ContainerdVersion;

/// What the snapshotter is called in containerd's configuration.
pub const NAME: &str = "headstart";

/// What our differ is called there: an entry of `proxy_plugins` has one type.
pub(super) const DIFFER: &str = "headstart-diff";

/// containerd's own differ.
pub(super) const WALKING: &str = "walking";
/// The capability of layers that are unpacked at once.
pub(super) const REBASE: &str = "rebase";
/// The capability of mapping the ids of files.
pub(super) const REMAP_IDS: &str = "remap-ids";

/// How many layers of an image containerd 2.4 unpacks at once. Its default is 1; more only makes sense with `rebase`.
const UNPACKS: u32 = 4;

/// For whom the lines are.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a> {
    /// Which containerd.
    pub version: ContainerdVersion,
    /// The `version` that containerd's main configuration file says, if there is one: files that it imports have to say the
    /// same.
    pub file_version: Option<i64>,
    /// Where our snapshotter listens.
    pub socket: &'a Path,
    /// Where our layers are kept.
    pub root: &'a Path,
    /// This machine's processor, as Go calls it.
    pub architecture: &'a str,
    /// Whether layers can be shown under the ids of user namespaces here.
    pub maps_ids: bool,
}

impl Reader<'_> {
    /// What the proxy plugin declares, and why.
    pub(super) fn capabilities(&self) -> Vec<(&'static str, &'static str)> {
        let rebase = "Layers of one image may be unpacked at once. Not before 2.4: 2.2 and 2.3 then keep only the top layer of a lazy image.";
        let remap = "The kernel maps owners for user namespaces; else containerd copies the whole image for each. Not with the driver `fuse`.";
        let rebase = self.version.stages().then_some((REBASE, rebase));
        let remap = (self.version.has_exports() && self.maps_ids).then_some((REMAP_IDS, remap));
        rebase.into_iter().chain(remap).collect()
    }
}

/// A line that declares `capabilities`.
pub(super) fn declared<'a>(capabilities: impl IntoIterator<Item = &'a str>) -> String {
    let quoted: Vec<String> = capabilities.into_iter().map(|name| format!("\"{name}\"")).collect();
    format!("capabilities = [{}]", quoted.join(", "))
}

/// What may stand in a file that the main one imports: before 2.0 such a file would take the place of all of CRI's settings.
pub fn drop_in(reader: &Reader<'_>) -> String {
    match reader.version.merges_plugins() {
        true => file(reader),
        false => {
            let differ = if reader.version.has_exports() { differ_plugin(reader) } else { String::new() };
            format!("version = {}\n\n{}{differ}", file_version(reader), proxy_plugin(reader))
        }
    }
}

/// The whole file.
pub fn file(reader: &Reader<'_>) -> String {
    let Reader { version, .. } = *reader;
    let mut text = format!("# containerd {}.{} with Headstart as its snapshotter.\n", version.major, version.minor);
    if version.merges_plugins() {
        text.push_str(
            "# It may stand in a file of its own, if the `imports` of /etc/containerd/config.toml name it; there, `version` has to\n\
             # be that of the importing file: with another one containerd 2.0 to 2.2 forget settings, and 2.3 does not start.\n",
        );
    } else {
        text.push_str(
            "# A file that containerd 1.x imports replaces whole plugins: [proxy_plugins] may stand in a file of its own, but the lines\n\
             # of the CRI plugin belong into the file that has its other settings, which is /etc/containerd/config.toml in most cases.\n",
        );
    }
    text.push_str("# containerd reads all of this when it starts.\n");
    writeln!(text, "version = {}\n", file_version(reader)).expect("writing to a string never fails");
    text.push_str(&proxy_plugin(reader));
    if version.has_exports() {
        text.push('\n');
        text.push_str(&differ(reader));
    }
    if version.has_images_plugin() {
        text.push('\n');
        text.push_str(&unpack_config(reader, DIFFER));
    }
    text.push('\n');
    text.push_str(&images(reader));
    text
}

/// The `version` that a file for this reader says.
pub(super) fn file_version(reader: &Reader<'_>) -> i64 {
    match reader.file_version {
        Some(said) if reader.version.merges_plugins() && (2..=4).contains(&said) => said,
        _ if reader.version.merges_plugins() => 3,
        _ => 2,
    }
}

/// The entry of `proxy_plugins`.
pub(super) fn proxy_plugin(reader: &Reader<'_>) -> String {
    let Reader { version, .. } = *reader;
    let mut text = String::new();
    let mut line = |line: &str| {
        text.push_str(line);
        text.push('\n');
    };
    line(
        "# Where containerd finds the snapshotter. The socket has to be there before somebody pulls or runs: start Headstart first.",
    );
    line(&format!("[proxy_plugins.{NAME}]"));
    line("  type = \"snapshot\"");
    line(&format!("  address = {}", quoted(reader.socket)));
    let capabilities = reader.capabilities();
    for (_, why) in &capabilities {
        line(&format!("  # {why}"));
    }
    if !capabilities.is_empty() {
        line(&format!("  {}", declared(capabilities.into_iter().map(|(name, _)| name))));
    }
    if version.has_exports() {
        line(&format!("  [proxy_plugins.{NAME}.exports]"));
        line("    # CRI measures here how much of the disk images take.");
        line(&format!("    root = {}", quoted(reader.root)));
    }
    if version.has_annotations_export() {
        line("    # Labels that say which image a layer belongs to: without them no layer is lazy.");
        line("    enable_remote_snapshot_annotations = \"true\"");
    }
    text
}

/// The differ, and who asks it.
pub(super) fn differ(reader: &Reader<'_>) -> String {
    differ_plugin(reader) + &diff_service()
}

/// The differ's entry of `proxy_plugins`.
fn differ_plugin(reader: &Reader<'_>) -> String {
    let address = quoted(reader.socket);
    format!(
        "# Layers that containerd downloads become EROFS images as well, all of an image at once. Without it containerd applies them, and\n\
         # the differ is \"{WALKING}\" everywhere: that is for kernels without EROFS.\n\
         [proxy_plugins.{DIFFER}]\n  type = \"diff\"\n  address = {address}\n"
    )
}

/// Who is asked to apply a layer by clients and by CRI without the transfer service.
pub(super) fn diff_service() -> String {
    format!(
        "# Who is asked in turn, by all but the transfer service. Layers of other snapshotters are left to containerd.\n\
         [plugins.\"{DIFF_SERVICE}\"]\n  default = [\"{DIFFER}\", \"{WALKING}\"]\n"
    )
}

/// What the transfer service has to know (containerd 2), if `differ` is to apply layers for this snapshotter: it asks no other
/// one.
pub(super) fn unpack_config(reader: &Reader<'_>, differ: &str) -> String {
    const PLUGIN: &str = "plugins.'io.containerd.transfer.v1.local'";
    let Reader { version, architecture, .. } = *reader;
    let mut text = String::new();
    let mut line = |line: &str| {
        text.push_str(line);
        text.push('\n');
    };
    line("# What unpacks for whom. Without an entry for the snapshotter, pulls fail: \"no unpack platforms defined\".");
    line(&format!("[{PLUGIN}]"));
    if version.stages() {
        line("  # So many layers of an image at once; the default is 1.");
        line(&format!("  max_concurrent_unpacks = {UNPACKS}"));
    }
    let mut entry = |why: Option<&str>, platform: &str, snapshotter: &str, differ: &str| {
        if let Some(why) = why {
            line(&format!("  # {why}"));
        }
        line(&format!("  [[{PLUGIN}.unpack_config]]"));
        line(&format!("    platform = \"{platform}\""));
        line(&format!("    snapshotter = \"{snapshotter}\""));
        line(&format!("    differ = \"{differ}\""));
    };
    if version.knows_erofs_layers() {
        let why = "Images that have nothing but EROFS layers; before 2.3 such layers were none.";
        entry(Some(why), &format!("linux(+erofs)/{architecture}"), NAME, differ);
    }
    let plain = format!("linux/{architecture}");
    entry(None, &plain, NAME, differ);
    entry(Some("A list replaces the default, which is this:"), &plain, "overlayfs", WALKING);
    text
}

/// What CRI has to know.
pub(super) fn images(reader: &Reader<'_>) -> String {
    let Reader { version, .. } = *reader;
    let plugin = images_plugin(version);
    let mut text = format!(
        "# All images and containers of Kubernetes. Leave it out if only `ctr` and other clients shall use Headstart.\n[{plugin}]\n  \
         snapshotter = \"{NAME}\"\n"
    );
    if version.has_annotations_export() {
        text.push_str(
            "  # Not `disable_snapshot_annotations = false`: that was the switch before 2.1, and now has CRI pull without the transfer\n  \
             # service. The export above is the switch.\n",
        );
    } else {
        text.push_str(
            "  # Labels that say which image a layer belongs to: without them no layer is lazy.\n  \
             disable_snapshot_annotations = false\n",
        );
    }
    text
}

/// The table in which CRI's snapshotter is said.
pub(super) fn images_plugin(version: ContainerdVersion) -> &'static str {
    match version.has_images_plugin() {
        true => "plugins.'io.containerd.cri.v1.images'",
        false => "plugins.\"io.containerd.grpc.v1.cri\".containerd",
    }
}

/// A path as TOML has it.
pub(super) fn quoted(path: &Path) -> String {
    toml::Value::String(path.to_string_lossy().into_owned()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn advised(version: &str, file_version: Option<i64>) -> toml::Table {
        let reader = Reader {
            version: version.parse().unwrap(),
            file_version,
            socket: Path::new("/run/head\"start/headstart.sock"),
            root: Path::new("/var/lib/headstart"),
            architecture: "amd64",
            maps_ids: file_version.is_none(),
        };
        toml::from_str(&file(&reader)).unwrap()
    }

    fn text(value: Option<&toml::Value>) -> Option<&str> {
        value.and_then(toml::Value::as_str)
    }

    #[test]
    fn each_version_gets_what_it_understands() {
        for (version, exports, annotations, rebase, platforms) in [
            ("1.6.20", false, false, false, &[][..]),
            ("1.7.24", true, false, false, &[]),
            ("2.0.0", true, false, false, &["linux/amd64", "linux/amd64"]),
            ("2.1.9", true, true, false, &["linux/amd64", "linux/amd64"]),
            ("2.2.7", true, true, false, &["linux/amd64", "linux/amd64"]),
            ("2.3.4", true, true, false, &["linux(+erofs)/amd64", "linux/amd64", "linux/amd64"]),
            ("2.4.0", true, true, true, &["linux(+erofs)/amd64", "linux/amd64", "linux/amd64"]),
        ] {
            let table = advised(version, None);
            let proxy = &table["proxy_plugins"][NAME];
            assert_eq!(text(proxy.get("address")), Some("/run/head\"start/headstart.sock"), "{version}");
            assert_eq!(text(proxy.get("type")), Some("snapshot"), "{version}");
            let capabilities = |table: &toml::Table| -> Vec<String> {
                let all = table["proxy_plugins"][NAME].get("capabilities").and_then(toml::Value::as_array).cloned();
                all.unwrap_or_default().iter().map(|one| one.as_str().unwrap().to_owned()).collect()
            };
            let declared = |on: &[(bool, &str)]| -> Vec<String> {
                on.iter().filter(|(on, _)| *on).map(|(_, name)| (*name).to_owned()).collect()
            };
            assert_eq!(capabilities(&table), declared(&[(rebase, REBASE), (exports, REMAP_IDS)]), "{version}");
            assert_eq!(capabilities(&advised(version, Some(3))), declared(&[(rebase, REBASE)]), "{version}");
            let exported = proxy.get("exports");
            assert_eq!(text(exported.and_then(|e| e.get("root"))).is_some(), exports, "{version}");
            let switch = text(exported.and_then(|e| e.get("enable_remote_snapshot_annotations")));
            assert_eq!(switch, annotations.then_some("true"), "{version}");
            let plugins = &table["plugins"];
            let differ = table["proxy_plugins"].get(DIFFER);
            assert_eq!(text(differ.and_then(|differ| differ.get("type"))), exports.then_some("diff"), "{version}");
            let asked = plugins.get(DIFF_SERVICE).map(|service| service["default"].as_array().unwrap().len());
            assert_eq!(asked, exports.then_some(2), "{version}");
            let cri = match version.starts_with('1') {
                true => &plugins["io.containerd.grpc.v1.cri"]["containerd"],
                false => &plugins["io.containerd.cri.v1.images"],
            };
            assert_eq!(text(cri.get("snapshotter")), Some(NAME), "{version}");
            let switch = cri.get("disable_snapshot_annotations").and_then(toml::Value::as_bool);
            assert_eq!(switch, (!annotations).then_some(false), "{version}");
            let entries = plugins.get("io.containerd.transfer.v1.local").map(|transfer| {
                assert_eq!(transfer.get("max_concurrent_unpacks").is_some(), rebase, "{version}");
                let entries = transfer["unpack_config"].as_array().unwrap();
                for entry in entries {
                    let expected = if text(entry.get("snapshotter")) == Some(NAME) { DIFFER } else { WALKING };
                    assert_eq!(text(entry.get("differ")), Some(expected), "{version}");
                }
                entries.iter().map(|entry| entry["platform"].as_str().unwrap()).collect::<Vec<_>>()
            });
            assert_eq!(entries.unwrap_or_default(), platforms, "{version}");
        }
    }

    #[test]
    fn what_is_imported_replaces_nothing_else() {
        for (version, all) in [("1.6.20", false), ("1.7.24", false), ("2.0.0", true), ("2.4.0", true)] {
            let reader = Reader {
                version: version.parse().unwrap(),
                file_version: None,
                socket: Path::new("/s"),
                root: Path::new("/r"),
                architecture: "arm64",
                maps_ids: true,
            };
            let table: toml::Table = toml::from_str(&drop_in(&reader)).unwrap();
            assert_eq!(table.contains_key("plugins"), all, "{version}");
            assert!(table["proxy_plugins"].get(NAME).is_some(), "{version}");
            assert_eq!(table["proxy_plugins"].get(DIFFER).is_some(), version != "1.6.20", "{version}");
        }
    }

    #[test]
    fn a_file_says_the_version_of_the_one_that_imports_it() {
        for (version, said, expected) in [
            ("1.6", None, 2),
            ("1.7", Some(1), 2),
            ("1.7", Some(2), 2),
            ("2.0", None, 3),
            ("2.1", Some(2), 2),
            ("2.1", Some(3), 3),
            ("2.3", Some(4), 4),
            ("2.3", Some(1), 3),
            ("2.3", Some(-7), 3),
        ] {
            let table = advised(version, said);
            assert_eq!(table["version"].as_integer(), Some(expected), "{version}, {said:?}");
        }
    }
}
