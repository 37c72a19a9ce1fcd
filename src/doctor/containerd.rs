//! What is to be changed in containerd's configuration: the rules, over files that were read.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::advice::{self, DIFFER, NAME, Reader, WALKING};
use super::config::{CRI, DIFF_SERVICE, IMAGES, NodeConfig, TRANSFER, said_in};
use super::finding::{Finding, Remedy};
use crate::grpc::ContainerdVersion;

/// What is known of containerd.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct ContainerdFacts {
    /// Its version, or why it is not known.
    pub(super) version: Option<Result<ContainerdVersion, String>>,
    /// Its main configuration file.
    pub(super) main: PathBuf,
    /// What that and its imports say; none if there is no such file.
    pub(super) config: Option<NodeConfig>,
    /// Files beside it that speak of us and that nothing imports.
    pub(super) idle: Vec<PathBuf>,
}

/// What of this program matters to containerd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ours {
    pub(super) socket: PathBuf,
    pub(super) root: PathBuf,
    pub(super) architecture: String,
    /// Whether layers can be shown under the ids of user namespaces here.
    pub(super) maps_ids: bool,
    pub(super) certs_d: Vec<PathBuf>,
    /// Our own configuration file.
    pub(super) file: PathBuf,
}

/// What to do about containerd.
pub(super) fn examine(facts: &ContainerdFacts, ours: &Ours) -> Vec<Finding> {
    let version = match &facts.version {
        None if facts.config.is_none() => {
            return vec![Finding::note(
                "containerd.version",
                "there is no containerd here; `headstart mount` needs none",
            )];
        }
        None => {
            let what = "containerd does not run and is not in the search path: its configuration is not examined";
            return vec![Finding::should("containerd.version", what)];
        }
        Some(Err(why)) => {
            let what = format!("containerd's configuration is not examined: {why}");
            let remedy = Remedy::run("headstart doctor --containerd-version VERSION");
            return vec![Finding::should("containerd.version", what).with(remedy)];
        }
        Some(Ok(version)) if *version < ContainerdVersion::OLDEST => {
            let what = format!("containerd {version} is older than {}", ContainerdVersion::OLDEST);
            return vec![Finding::must("containerd.version", what)];
        }
        Some(Ok(version)) => *version,
    };
    let main_version = facts.config.as_ref().and_then(|config| config.files.first()?.version());
    let reader = Reader {
        version,
        file_version: main_version,
        socket: &ours.socket,
        root: &ours.root,
        architecture: &ours.architecture,
        maps_ids: ours.maps_ids,
    };
    let mut findings = vec![Finding::good("containerd.version", format!("containerd is {version}"))];
    let Some(config) = &facts.config else {
        let what = "containerd has no configuration file, and does not know of this snapshotter";
        let remedy = Remedy::write(&facts.main, advice::file(&reader));
        findings.push(Finding::must("containerd.config", what).with(remedy));
        return findings;
    };
    let checked = Checked { config, reader, ours, main: &facts.main };
    for fault in &config.faults {
        let what = format!("containerd cannot read {}: {}", fault.path.display(), fault.why);
        findings.push(Finding::must("containerd.config", what));
    }
    for path in &facts.idle {
        let what = format!("nothing imports {}", path.display());
        let lines = format!("imports = [{}]", advice::quoted(path));
        findings.push(Finding::should("containerd.config", what).with(Remedy::write(&facts.main, lines)));
    }
    findings.extend(checked.file_versions());
    findings.extend(checked.proxy());
    findings.extend(checked.differ());
    let cri = checked.cri();
    findings.extend(cri);
    findings.extend(checked.unpack());
    findings.extend(checked.hosts());
    findings
}

/// True if an entry of `proxy_plugins` declares a capability.
fn declares(entry: &Table, capability: &str) -> bool {
    let all = entry.get("capabilities").and_then(Value::as_array);
    all.is_some_and(|all| all.iter().any(|one| one.as_str() == Some(capability)))
}

struct Checked<'a> {
    config: &'a NodeConfig,
    reader: Reader<'a>,
    ours: &'a Ours,
    main: &'a Path,
}

impl Checked<'_> {
    fn version(&self) -> ContainerdVersion {
        self.reader.version
    }

    /// Files of different formats, which some versions mix up.
    fn file_versions(&self) -> Option<Finding> {
        const CHECK: &str = "containerd.format";
        let version = self.version();
        let first = self.config.files.first()?;
        let main = first.version().unwrap_or(1);
        if main < 2 && version.merges_plugins() {
            let what =
                format!("{} has the first format, which containerd {version} does not know", first.path.display());
            return Some(Finding::must(CHECK, what).with(Remedy::run("containerd config migrate")));
        }
        let other = self.config.files.iter().find(|file| file.version().is_some_and(|other| other > main))?;
        let what = format!(
            "{} says version = {} and is imported by {}, which says {main}",
            other.path.display(),
            other.version().unwrap_or(1),
            first.path.display()
        );
        let remedy = Remedy::write(&other.path, format!("version = {main}"));
        let finding = match (version.major, version.minor) {
            // 2.0 to 2.2 take the last version for all: settings of the older format are forgotten. 2.3 does not start.
            (2, 0..=3) => Finding::must(CHECK, what),
            _ => Finding::should(CHECK, what),
        };
        Some(finding.with(remedy))
    }

    /// The entry of `proxy_plugins`.
    fn proxy(&self) -> Vec<Finding> {
        const CHECK: &str = "containerd.proxy";
        let address = self.ours.socket.to_string_lossy();
        let advised = || advice::proxy_plugin(&self.reader);
        let Some((path, entry)) = self.config.proxy(NAME) else {
            let is_ours = |entry: &Table| {
                text(entry.get("address")) == Some(&*address) && text(entry.get("type")) != Some("diff")
            };
            let other = self.config.proxies().find(|(_, _, entry)| is_ours(entry));
            return vec![match other {
                Some((path, name, _)) => Finding::note(
                    CHECK,
                    format!("{} calls this snapshotter {name:?}; the rest is not examined", path.display()),
                ),
                None => Finding::must(CHECK, "containerd does not know of this snapshotter")
                    .with(Remedy::write(self.main, advised())),
            }];
        };
        let mut findings = Vec::new();
        match text(entry.get("type")) {
            Some("snapshot") => {}
            other => {
                let what = format!(
                    "proxy_plugins.{NAME} is of type {other:?}: containerd does not start, or finds no snapshotter"
                );
                findings.push(Finding::must(CHECK, what).with(Remedy::write(path, advised())));
            }
        }
        match text(entry.get("address")) {
            Some(said) if said == address => {}
            said => {
                let what = format!(
                    "containerd looks for this snapshotter at {:?}, it listens at {address}",
                    said.unwrap_or_default()
                );
                let lines = format!("[proxy_plugins.{NAME}]\n  address = {}", advice::quoted(&self.ours.socket));
                findings.push(Finding::must(CHECK, what).with(Remedy::write(path, lines)));
            }
        }
        findings.extend(self.rebase(path, entry));
        if self.version().has_exports() {
            findings.extend(self.exports(path, entry));
        }
        if findings.is_empty() {
            findings.push(Finding::good(CHECK, format!("{} tells containerd of this snapshotter", path.display())));
        }
        findings.extend(self.remap_ids(path, entry));
        findings
    }

    fn rebase(&self, path: &Path, entry: &Table) -> Option<Finding> {
        const CHECK: &str = "containerd.rebase";
        let version = self.version();
        match (declares(entry, advice::REBASE), version.knows_rebase(), version.stages()) {
            (true, true, false) => {
                let what = format!(
                    "with `rebase`, containerd {version} keeps only the top layer of a lazy image (its issue 13264)"
                );
                Some(Finding::must(CHECK, what).with(self.capabilities(path)))
            }
            (true, false, _) => {
                let what = format!(
                    "`rebase` means nothing to containerd {version}, and breaks lazy images after an upgrade to 2.2 or 2.3"
                );
                Some(Finding::should(CHECK, what).with(self.capabilities(path)))
            }
            (false, _, true) => {
                let what = "without `rebase` layers of an image are unpacked one after the other";
                Some(Finding::should(CHECK, what).with(self.capabilities(path)))
            }
            _ => None,
        }
    }

    /// Who changes the owners of files for user namespaces.
    fn remap_ids(&self, path: &Path, entry: &Table) -> Option<Finding> {
        const CHECK: &str = "containerd.remap-ids";
        let can = self.ours.maps_ids && self.version().has_exports();
        match (declares(entry, advice::REMAP_IDS), can) {
            (true, false) => {
                let what = "containers in user namespaces do not start: layers cannot be shown under other ids here (Linux before \
                            5.19, or the driver `fuse`), which `remap-ids` promises";
                Some(Finding::should(CHECK, what).with(self.capabilities(path)))
            }
            (false, true) => {
                let what = "without `remap-ids` containerd reads and copies a whole image for each user namespace";
                Some(Finding::note(CHECK, what).with(self.capabilities(path)))
            }
            _ => None,
        }
    }

    /// The capabilities as they should be.
    fn capabilities(&self, path: &Path) -> Remedy {
        let wanted = self.reader.capabilities().into_iter().map(|(name, _)| name);
        Remedy::write(path, format!("[proxy_plugins.{NAME}]\n  {}", advice::declared(wanted)))
    }

    fn exports(&self, path: &Path, entry: &Table) -> Vec<Finding> {
        let mut findings = Vec::new();
        let export = |key: &str| text(said_in(entry, &["exports", key])).map(str::to_owned);
        let write = |line: String| Remedy::write(path, format!("[proxy_plugins.{NAME}.exports]\n  {line}"));
        let root = self.ours.root.to_string_lossy();
        if export("root").as_deref() != Some(&*root) {
            let what = match export("root") {
                Some(other) => format!("CRI measures the disk usage of images in {other}, they are in {root}"),
                None => "CRI does not know where to measure the disk usage of images".to_owned(),
            };
            let line = format!("root = {}", advice::quoted(&self.ours.root));
            findings.push(Finding::should("containerd.exports", what).with(write(line)));
        }
        if self.version().has_annotations_export()
            && export("enable_remote_snapshot_annotations").as_deref() != Some("true")
        {
            let what = "the transfer service does not tell which image a layer belongs to: nothing is lazy";
            let line = "enable_remote_snapshot_annotations = \"true\"".to_owned();
            findings.push(Finding::must("containerd.annotations", what).with(write(line)));
        }
        findings
    }

    /// Entries of type `diff`: the file, the name and what is said.
    fn differs(&self) -> impl Iterator<Item = (&Path, &str, &Table)> {
        self.config.proxies().filter(|(_, _, entry)| text(entry.get("type")) == Some("diff"))
    }

    /// What our differ is called, if containerd knows it.
    fn our_differ(&self) -> Option<&str> {
        let address = self.ours.socket.to_string_lossy();
        let ours = self.differs().find(|(_, _, entry)| text(entry.get("address")) == Some(&*address));
        ours.map(|(_, name, _)| name)
    }

    /// Who applies the layers that containerd downloads.
    fn differ(&self) -> Vec<Finding> {
        const CHECK: &str = "containerd.differ";
        if !self.version().has_exports() {
            // 1.6 knows no differs outside of it, and does not survive one.
            let told = self.differs().map(|(path, name, _)| {
                let version = self.version();
                let what =
                    format!("containerd {version} panics at its start over proxy_plugins.{name}, of type \"diff\"");
                Finding::must(CHECK, what).with(Remedy::remove(path, format!("[proxy_plugins.{name}]")))
            });
            return told.collect();
        }
        let address = self.ours.socket.to_string_lossy();
        let elsewhere =
            |(_, name, entry): &(&Path, &str, &Table)| *name == DIFFER && text(entry.get("address")) != Some(&*address);
        if let Some((path, ..)) = self.differs().find(elsewhere) {
            let what = format!("containerd looks for the differ {DIFFER:?} elsewhere than at {address}");
            let lines = format!("[proxy_plugins.{DIFFER}]\n  address = {}", advice::quoted(&self.ours.socket));
            return vec![Finding::must(CHECK, what).with(Remedy::write(path, lines))];
        }
        let Some(ours) = self.our_differ() else {
            let what = "containerd applies layers that it downloads itself, one after the other, as files";
            return vec![Finding::note(CHECK, what).with(Remedy::write(self.main, advice::differ(&self.reader)))];
        };
        let service = self.config.plugin(DIFF_SERVICE, self.version());
        let asked = service.get("default").and_then(Value::as_array);
        if asked.is_some_and(|asked| asked.iter().any(|name| name.as_str() == Some(ours))) {
            return vec![Finding::good(CHECK, "containerd has this program apply the layers that it downloads")];
        }
        let path = self.config.place_of(DIFF_SERVICE).unwrap_or(self.main);
        let whom = if self.version().has_images_plugin() { "only the transfer service asks" } else { "nobody asks" };
        let what = format!("{whom} proxy_plugins.{ours} to apply a layer");
        vec![Finding::note(CHECK, what).with(Remedy::write(path, advice::diff_service()))]
    }

    /// What CRI unpacks with, and what it tells the snapshotter.
    fn cri(&self) -> Vec<Finding> {
        let version = self.version();
        let is_off = |name: &&str| *name == CRI || *name == "cri" || *name == IMAGES;
        if self.config.list("disabled_plugins").iter().any(is_off) {
            return vec![Finding::note(
                "containerd.snapshotter",
                "CRI is switched off: Kubernetes does not use this containerd",
            )];
        }
        let (id, settings) = match version.has_images_plugin() {
            true => (IMAGES, self.config.plugin(IMAGES, version)),
            false => {
                let cri = self.config.plugin(CRI, version);
                (CRI, cri.get("containerd").and_then(Value::as_table).cloned().unwrap_or_default())
            }
        };
        let path = self.config.place_of(id).unwrap_or(self.main);
        let table = advice::images_plugin(version);
        let write = |line: &str| Remedy::write(path, format!("[{table}]\n  {line}"));
        let mut findings = Vec::new();
        let said = text(settings.get("snapshotter")).unwrap_or("overlayfs");
        let ours = said == NAME;
        if ours {
            findings.push(Finding::good(
                "containerd.snapshotter",
                "CRI uses this snapshotter for all images and containers",
            ));
        } else {
            let old = self.config.plugin(CRI, version);
            let misplaced =
                version.has_images_plugin() && text(said_in(&old, &["containerd", "snapshotter"])) == Some(NAME);
            let what = match misplaced {
                true => format!(
                    "CRI uses {said}: containerd {version} does not take the snapshotter from [plugins.\"{CRI}\".containerd]"
                ),
                false => format!("CRI uses {said}: what Kubernetes runs is not lazy"),
            };
            let finding = if misplaced { Finding::must } else { Finding::should };
            let remedy = Remedy::write(path, advice::images(&self.reader));
            findings.push(finding("containerd.snapshotter", what).with(remedy));
        }
        findings.extend(self.annotations(&settings, ours, &write));
        findings
    }

    fn annotations(&self, settings: &Table, ours: bool, write: &dyn Fn(&str) -> Remedy) -> Option<Finding> {
        const CHECK: &str = "containerd.annotations";
        let switched_on = settings.get("disable_snapshot_annotations").and_then(Value::as_bool) == Some(false);
        let line = "disable_snapshot_annotations = false";
        if !self.version().has_annotations_export() {
            let what = "CRI does not tell which image a layer belongs to: nothing is lazy";
            return (ours && !switched_on).then(|| Finding::must(CHECK, what).with(write(line)));
        }
        let why = pulls_locally(settings)?;
        match (ours, switched_on) {
            (true, false) => {
                let what = format!(
                    "CRI pulls without the transfer service because of {why}, and does not tell which image a layer belongs to"
                );
                Some(Finding::must(CHECK, what).with(write(line)))
            }
            (true, true) => {
                let what = format!(
                    "CRI pulls without the transfer service because of {why}: layers are unpacked one after the other"
                );
                Some(Finding::should(CHECK, what))
            }
            (false, _) => None,
        }
    }

    /// What the transfer service unpacks with.
    fn unpack(&self) -> Option<Finding> {
        const CHECK: &str = "containerd.unpack";
        let version = self.version();
        if !version.has_images_plugin() {
            return None;
        }
        let transfer = self.config.plugin(TRANSFER, version);
        let entries = transfer.get("unpack_config").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let plain = format!("linux/{}", self.ours.architecture);
        let erofs = format!("linux(+erofs)/{}", self.ours.architecture);
        let ours =
            entries.iter().filter_map(Value::as_table).filter(|entry| text(entry.get("snapshotter")) == Some(NAME));
        let platforms: Vec<&str> = ours.clone().filter_map(|entry| text(entry.get("platform"))).collect();
        let path = self.config.place_of(TRANSFER).unwrap_or(self.main);
        let differ = self.our_differ();
        // One that is not there would keep the whole transfer service from starting.
        let remedy = || Remedy::write(path, advice::unpack_config(&self.reader, differ.unwrap_or(WALKING)));
        let is_missing = |entry: &Table| {
            text(entry.get("differ")) == Some(DIFFER) && self.differs().all(|(_, name, _)| name != DIFFER)
        };
        if ours.clone().any(is_missing) {
            let what =
                format!("the transfer service does not start: its differ {DIFFER:?} is not among the proxy_plugins");
            let remedy = Remedy::write(self.main, advice::differ(&self.reader));
            return Some(Finding::must(CHECK, what).with(remedy));
        }
        if platforms.is_empty() {
            let what = "the transfer service has no unpack_config for this snapshotter: pulls fail with \"no unpack platforms defined\"";
            return Some(Finding::must(CHECK, what).with(remedy()));
        }
        if !platforms.iter().any(|platform| *platform == plain || *platform == erofs) {
            let what = format!("no unpack_config for this snapshotter fits this machine, which is {plain}");
            return Some(Finding::must(CHECK, what).with(remedy()));
        }
        if version.knows_erofs_layers() && !platforms.contains(&&*erofs) {
            let what =
                format!("no unpack_config for this snapshotter takes images with nothing but EROFS layers ({erofs})");
            return Some(Finding::should(CHECK, what).with(remedy()));
        }
        if let Some(differ) =
            differ.filter(|differ| ours.clone().any(|entry| text(entry.get("differ")) != Some(*differ)))
        {
            let what = format!("the transfer service does not ask proxy_plugins.{differ} to apply layers");
            return Some(Finding::note(CHECK, what).with(remedy()));
        }
        Some(Finding::good(CHECK, "the transfer service unpacks for this snapshotter"))
    }

    /// Whether both read the same `hosts.toml`.
    fn hosts(&self) -> Vec<Finding> {
        const CHECK: &str = "containerd.hosts";
        let version = self.version();
        let registry =
            |table: &Table| said_in(table, &["registry"]).and_then(Value::as_table).cloned().unwrap_or_default();
        let mut settings = registry(&self.config.plugin(CRI, version));
        if version.has_images_plugin() {
            settings.extend(registry(&self.config.plugin(IMAGES, version)));
        }
        let mut findings = Vec::new();
        let said = text(settings.get("config_path")).unwrap_or_default();
        let unread: Vec<&str> = said
            .split(':')
            .filter(|path| !path.is_empty() && !self.ours.certs_d.iter().any(|ours| ours == Path::new(path)))
            .collect();
        if !unread.is_empty() {
            let all = said.split(':').filter(|path| !path.is_empty()).map(|path| advice::quoted(Path::new(path)));
            let lines = format!("[registry]\ncerts_d = [{}]", all.collect::<Vec<_>>().join(", "));
            let what = format!(
                "containerd reads the hosts of registries from {}, this program does not",
                unread.join(" and ")
            );
            findings.push(Finding::should(CHECK, what).with(Remedy::write(&self.ours.file, lines)));
        }
        let old: Vec<&str> = ["mirrors", "configs", "auths"]
            .into_iter()
            .filter(|key| settings.get(*key).and_then(Value::as_table).is_some_and(|table| !table.is_empty()))
            .collect();
        if !old.is_empty() {
            let what = format!(
                "containerd has registry.{} in its own configuration, which this program does not read: write hosts.toml files for both",
                old.join(" and registry.")
            );
            findings.push(Finding::should(CHECK, what));
        }
        findings
    }
}

/// The setting because of which CRI of containerd 2.1 and later does not ask the transfer service
/// (`CheckLocalImagePullConfigs` in its source).
fn pulls_locally(images: &Table) -> Option<&'static str> {
    let truth = |key: &str| images.get(key).and_then(Value::as_bool);
    let table =
        |key: &str| said_in(images, &["registry", key]).and_then(Value::as_table).is_some_and(|t| !t.is_empty());
    let downloads = images.get("max_concurrent_downloads").and_then(Value::as_integer);
    let reasons = [
        ("use_local_image_pull", truth("use_local_image_pull") == Some(true)),
        ("disable_snapshot_annotations = false", truth("disable_snapshot_annotations") == Some(false)),
        ("discard_unpacked_layers", truth("discard_unpacked_layers") == Some(true)),
        ("registry.mirrors", table("mirrors")),
        ("registry.configs", table("configs")),
        ("registry.auths", table("auths")),
        ("max_concurrent_downloads", downloads.is_some_and(|downloads| downloads != 3)),
        ("image_pull_with_sync_fs", truth("image_pull_with_sync_fs") == Some(true)),
    ];
    reasons.into_iter().find_map(|(reason, holds)| holds.then_some(reason))
}

fn text(value: Option<&Value>) -> Option<&str> {
    value.and_then(Value::as_str)
}

#[cfg(test)]
mod tests;
