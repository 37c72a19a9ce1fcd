//! containerd's configuration as containerd puts it together from files.
//!
//! Files are read in containerd's order: the main one, then what each imports, breadth first, each once. How they become
//! one depends on the version (measured with 1.6.20, 1.7.24 and 2.1.9, and read in the source of 2.0 to 2.3): an entry of
//! `proxy_plugins` replaces one of the same name; a plugin's table does so in 1.x and is merged key by key in 2.x.

use std::collections::{BTreeSet, VecDeque};
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use toml::{Table, Value};

use super::gather::read;
use crate::grpc::ContainerdVersion;

/// Most files that are read: imports may name a directory that is not meant for them.
const FILES: usize = 256;

/// The id of CRI's plugin in 1.x.
pub(super) const CRI: &str = "io.containerd.grpc.v1.cri";
/// The id of CRI's image plugin in 2.x.
pub(super) const IMAGES: &str = "io.containerd.cri.v1.images";
/// The id of the service that asks differs.
pub(super) const DIFF_SERVICE: &str = "io.containerd.service.v1.diff-service";
/// The id of the transfer service's plugin.
pub(super) const TRANSFER: &str = "io.containerd.transfer.v1.local";

/// One file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ConfigFile {
    pub(super) path: PathBuf,
    pub(super) table: Table,
}

impl ConfigFile {
    /// The version of its format; none if it does not say one, which means the first.
    pub(super) fn version(&self) -> Option<i64> {
        self.table.get("version")?.as_integer()
    }
}

/// A file that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) path: PathBuf,
    pub(super) why: String,
}

/// All files, in the order in which they count.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct NodeConfig {
    pub(super) files: Vec<ConfigFile>,
    pub(super) faults: Vec<Fault>,
}

impl NodeConfig {
    /// Reads `main` and what it imports; none if there is no such file.
    pub(super) fn load(main: &Path) -> Option<Self> {
        let mut config = Self::default();
        let mut pending = VecDeque::from([main.to_owned()]);
        let mut seen = BTreeSet::new();
        while let Some(path) = pending.pop_front() {
            if seen.len() >= FILES || !seen.insert(path.clone()) {
                continue;
            }
            let text = match read(&path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && path == main => return None,
                Err(error) => {
                    config.faults.push(Fault { path, why: error.to_string() });
                    continue;
                }
                Ok(text) => text,
            };
            match toml::from_str::<Table>(&text) {
                Ok(table) => {
                    let imports = table.get("imports").and_then(Value::as_array).into_iter().flatten();
                    pending.extend(imports.filter_map(Value::as_str).flat_map(|import| imported(&path, import)));
                    config.files.push(ConfigFile { path, table });
                }
                Err(error) => config.faults.push(Fault { path, why: in_words(&error, &text) }),
            }
        }
        Some(config)
    }

    /// The entry of `proxy_plugins` that counts for `name`, and the file that says it.
    pub(super) fn proxy(&self, name: &str) -> Option<(&Path, &Table)> {
        self.proxies().find(|(_, found, _)| *found == name).map(|(path, _, entry)| (path, entry))
    }

    /// All entries of `proxy_plugins` that count.
    pub(super) fn proxies(&self) -> impl Iterator<Item = (&Path, &str, &Table)> {
        let said = |file: &ConfigFile, name: &str| said_in(&file.table, &["proxy_plugins", name]).is_some();
        let entries = self.files.iter().enumerate().flat_map(|(at, file)| {
            let table = said_in(&file.table, &["proxy_plugins"]).and_then(Value::as_table);
            table.into_iter().flatten().map(move |(name, entry)| (at, name.as_str(), entry))
        });
        entries.filter_map(move |(at, name, entry)| {
            let replaced = self.files.iter().skip(at + 1).any(|later| said(later, name));
            let entry = entry.as_table().filter(|_| !replaced)?;
            Some((self.files.get(at)?.path.as_path(), name, entry))
        })
    }

    /// What all files together say of the plugin `id`.
    pub(super) fn plugin(&self, id: &str, version: ContainerdVersion) -> Table {
        let mut merged = Table::new();
        for file in &self.files {
            let named = said_in(&file.table, &["plugins", id]);
            // The first format calls it by its last part.
            let short = || id.rsplit('.').next().and_then(|short| said_in(&file.table, &["plugins", short]));
            let old = file.version().unwrap_or(1) < 2;
            let Some(table) = named.or_else(|| if old { short() } else { None }).and_then(Value::as_table) else {
                continue;
            };
            if version.merges_plugins() {
                merge(&mut merged, table);
            } else {
                merged = table.clone();
            }
        }
        merged
    }

    /// The last file that says something of the plugin `id`, which is where to write more; else the main one.
    pub(super) fn place_of(&self, id: &str) -> Option<&Path> {
        let said = self.files.iter().rev().find(|file| said_in(&file.table, &["plugins", id]).is_some());
        said.or(self.files.first()).map(|file| file.path.as_path())
    }

    /// The values of a list at the top of all files.
    pub(super) fn list(&self, key: &str) -> Vec<&str> {
        let lists = self.files.iter().filter_map(|file| file.table.get(key)?.as_array());
        lists.flatten().filter_map(Value::as_str).collect()
    }
}

/// What stands at `path` of tables in tables.
pub(super) fn said_in<'a>(table: &'a Table, path: &[&str]) -> Option<&'a Value> {
    let (last, above) = path.split_last()?;
    let inside = above.iter().try_fold(table, |table, key| table.get(*key)?.as_table())?;
    inside.get(*last)
}

/// As containerd 2 does it: tables grow, everything else is replaced, lists too, also by what is empty.
fn merge(into: &mut Table, from: &Table) {
    for (key, value) in from {
        match (into.get_mut(key), value) {
            (Some(Value::Table(below)), Value::Table(value)) => merge(below, value),
            (_, value) => {
                into.insert(key.clone(), value.clone());
            }
        }
    }
}

/// The files that `import`, said in `parent`, means.
fn imported(parent: &Path, import: &str) -> Vec<PathBuf> {
    let path = cleaned(&parent.parent().unwrap_or(Path::new("/")).join(import));
    if !import.contains('*') {
        return vec![path];
    }
    let mut found = vec![PathBuf::new()];
    for component in path.components() {
        let name = component.as_os_str().to_string_lossy();
        let is_pattern = matches!(component, Component::Normal(_)) && name.contains(['*', '?']);
        found = found
            .into_iter()
            .flat_map(|above| match is_pattern {
                true => {
                    children(&above).into_iter().filter(|child| fits(&name, child)).map(|c| above.join(c)).collect()
                }
                false => vec![above.join(component)],
            })
            .take(FILES)
            .collect();
    }
    found.retain(|path| path.is_file());
    found
}

/// Without `.` and `..`, by the words alone, as Go's `filepath.Clean` has it.
fn cleaned(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir => drop(clean.pop()),
            component => clean.push(component),
        }
    }
    clean
}

fn children(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    let mut names: Vec<String> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// Whether `name` fits a pattern of `*` and `?`.
fn fits(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    // `reached[i]`: the first `i` letters of the name fit the pattern so far.
    let mut reached = vec![false; name.len() + 1];
    reached[0] = true;
    for letter in pattern {
        let mut next = vec![false; name.len() + 1];
        match letter {
            '*' => {
                let first = reached.iter().position(|fits| *fits).unwrap_or(next.len());
                next.iter_mut().skip(first).for_each(|fits| *fits = true);
            }
            letter => {
                for (at, found) in name.iter().enumerate() {
                    let here = reached.get(at).copied().unwrap_or(false);
                    if let Some(after) = next.get_mut(at + 1) {
                        *after = here && (letter == '?' || letter == *found);
                    }
                }
            }
        }
        reached = next;
    }
    reached.last().copied().unwrap_or(false)
}

fn in_words(error: &toml::de::Error, text: &str) -> String {
    let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
    format!("line {}: {}", before.matches('\n').count() + 1, error.message())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(files: &[(&str, &str)]) -> NodeConfig {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        NodeConfig::load(&directory.path().join("config.toml")).unwrap()
    }

    fn old() -> ContainerdVersion {
        ContainerdVersion::new(1, 7)
    }

    fn new() -> ContainerdVersion {
        ContainerdVersion::new(2, 1)
    }

    #[test]
    fn imports_are_followed_once_and_in_order() {
        let config = load(&[
            ("config.toml", "version = 2\nimports = ['conf.d/*.toml', 'gone.toml', 'more.toml']\n"),
            ("conf.d/b.toml", "imports = ['../config.toml']\n"),
            ("conf.d/a.toml", ""),
            ("conf.d/c.txt", "= no TOML"),
            ("more.toml", "version = 2\nx = ="),
        ]);
        let names: Vec<_> = config.files.iter().map(|file| file.path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["config.toml", "a.toml", "b.toml"]);
        assert_eq!(config.files[0].version(), Some(2));
        let faults: Vec<_> = config.faults.iter().map(|fault| fault.path.file_name().unwrap().to_owned()).collect();
        assert_eq!(faults, ["gone.toml", "more.toml"]);
        assert!(config.faults[1].why.starts_with("line 2: "), "{}", config.faults[1].why);
        assert_eq!(NodeConfig::load(Path::new("/no/such/config.toml")), None);
    }

    #[test]
    fn plugins_are_replaced_in_1_and_merged_in_2() {
        let config = load(&[
            (
                "config.toml",
                "version = 2\nimports = ['d.toml']\n[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = 'x'\nlist = ['a']\n\
                 [plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = 'overlayfs'\n[proxy_plugins.a]\naddress = '1'\n",
            ),
            (
                "d.toml",
                "[plugins.'io.containerd.grpc.v1.cri']\nlist = ['b', 'a']\n\
                 [plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = 'headstart'\n[proxy_plugins.a]\ntype = 't'\n[proxy_plugins.b]\n",
            ),
        ]);
        let snapshotter =
            |table: &Table| said_in(table, &["containerd", "snapshotter"]).unwrap().as_str().unwrap().to_owned();
        let replaced = config.plugin(CRI, old());
        assert_eq!(snapshotter(&replaced), "headstart");
        assert!(!replaced.contains_key("sandbox_image"));
        let merged = config.plugin(CRI, new());
        assert_eq!(snapshotter(&merged), "headstart");
        assert_eq!(merged["sandbox_image"].as_str(), Some("x"));
        assert_eq!(merged["list"], Value::from(vec!["b", "a"]));
        let (path, entry) = config.proxy("a").unwrap();
        assert!(path.ends_with("d.toml"));
        assert!(!entry.contains_key("address") && entry.contains_key("type"));
        let names: Vec<_> = config.proxies().map(|(_, name, _)| name).collect();
        assert_eq!(names, ["a", "b"]);
        assert!(config.place_of(CRI).unwrap().ends_with("d.toml"));
        assert!(config.place_of(IMAGES).unwrap().ends_with("config.toml"));
    }

    #[test]
    fn the_first_format_has_short_names() {
        let config =
            load(&[("config.toml", "disabled_plugins = ['cri']\n[plugins.cri.containerd]\nsnapshotter = 'a'\n")]);
        assert_eq!(said_in(&config.plugin(CRI, old()), &["containerd", "snapshotter"]).unwrap().as_str(), Some("a"));
        assert_eq!(config.list("disabled_plugins"), ["cri"]);
    }

    #[test]
    fn patterns_fit_as_in_a_shell() {
        for (pattern, name, expected) in [
            ("*.toml", "a.toml", true),
            ("*.toml", ".toml", true),
            ("*.toml", "a.tom", false),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("?", "", false),
            ("?", "x", true),
            ("**", "", true),
            ("", "", true),
            ("", "x", false),
        ] {
            assert_eq!(fits(pattern, name), expected, "{pattern} {name}");
        }
    }
}
