//! What `containerd-config` prints and `doctor` says, judged by what containerd makes of the files (`containerd config dump`).

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;
use toml::Table;

use super::stage::Version;
use crate::cli::stage::Stage;

const ALL: [Version; 3] = [Version::V1_6, Version::V1_7, Version::V2_1];

/// What containerd reads in `main` and its imports.
fn understood(version: Version, main: &Path) -> Table {
    let output = Command::new(version.programs().join("containerd"))
        .arg("--config")
        .arg(main)
        .args(["config", "dump"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{version:?}: {}", String::from_utf8_lossy(&output.stderr));
    toml::from_str(&String::from_utf8(output.stdout).unwrap()).unwrap()
}

fn at<'a>(table: &'a Table, path: &[&str]) -> Option<&'a toml::Value> {
    let (last, above) = path.split_last().unwrap();
    above.iter().try_fold(table, |table, key| table.get(*key)?.as_table())?.get(*last)
}

fn text<'a>(table: &'a Table, path: &[&str]) -> Option<&'a str> {
    at(table, path).and_then(toml::Value::as_str)
}

/// Where CRI's snapshotter and its image of sandboxes are said.
fn cri(version: Version) -> (&'static [&'static str], &'static [&'static str]) {
    match version {
        Version::V1_6 | Version::V1_7 => (
            &["plugins", "io.containerd.grpc.v1.cri", "containerd", "snapshotter"],
            &["plugins", "io.containerd.grpc.v1.cri", "sandbox_image"],
        ),
        Version::V2_1 => (
            &["plugins", "io.containerd.cri.v1.images", "snapshotter"],
            &["plugins", "io.containerd.cri.v1.images", "pinned_images", "sandbox"],
        ),
    }
}

fn named(version: Version) -> &'static str {
    match version {
        Version::V1_6 => "1.6",
        Version::V1_7 => "1.7",
        Version::V2_1 => "2.1",
    }
}

/// What doctor has against a configuration, whatever it thinks of this machine.
fn complaints(stage: &Stage, version: Version, main: &Path) -> Vec<String> {
    let asked =
        ["--json", "doctor", "--containerd-version", named(version), "--containerd-config", main.to_str().unwrap()];
    let output = stage.run(&asked);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = report["findings"].as_array().unwrap().iter();
    let bad = findings.filter(|finding| {
        let check = finding["check"].as_str().unwrap();
        check.starts_with("containerd.") && matches!(finding["severity"].as_str(), Some("must" | "should"))
    });
    bad.map(|finding| format!("{} {}", finding["severity"].as_str().unwrap(), finding["check"].as_str().unwrap()))
        .collect()
}

#[test]
fn containerd_understands_what_is_printed() {
    let stage = Stage::new();
    for version in ALL {
        let main = stage.path("main.toml");
        fs::write(&main, stage.ok(&["containerd-config", "--version", named(version)])).unwrap();
        let table = understood(version, &main);
        let socket = stage.path("run/headstart.sock");
        assert_eq!(text(&table, &["proxy_plugins", "headstart", "address"]), socket.to_str(), "{version:?}");
        assert_eq!(text(&table, &["proxy_plugins", "headstart", "type"]), Some("snapshot"), "{version:?}");
        assert_eq!(text(&table, cri(version).0), Some("headstart"), "{version:?}");
        let exported = |key: &str| text(&table, &["proxy_plugins", "headstart", "exports", key]);
        // 1.6 would not start with a differ.
        let differ = text(&table, &["proxy_plugins", "headstart-diff", "type"]);
        assert_eq!(differ, (version != Version::V1_6).then_some("diff"), "{version:?}");
        if differ.is_some() {
            let asked = at(&table, &["plugins", "io.containerd.service.v1.diff-service", "default"]).unwrap();
            assert_eq!(asked[0].as_str(), Some("headstart-diff"), "{version:?}");
        }
        match version {
            Version::V1_6 => {}
            Version::V1_7 => assert_eq!(exported("root"), stage.root().to_str()),
            Version::V2_1 => {
                assert_eq!(exported("root"), stage.root().to_str());
                assert_eq!(exported("enable_remote_snapshot_annotations"), Some("true"));
                let entries = at(&table, &["plugins", "io.containerd.transfer.v1.local", "unpack_config"]).unwrap();
                let ours = |entry: &toml::Value| {
                    entry["snapshotter"].as_str() == Some("headstart")
                        && entry["differ"].as_str() == Some("headstart-diff")
                };
                assert!(entries.as_array().unwrap().iter().any(ours), "{entries}");
            }
        }
        assert_eq!(complaints(&stage, version, &main), Vec::<String>::new(), "{version:?}");
    }
}

#[test]
fn a_file_that_is_imported_leaves_the_rest_alone() {
    let stage = Stage::new();
    let (main, drop_in) = (stage.path("main.toml"), stage.path("drop-in.toml"));
    for version in ALL {
        let (snapshotter, sandbox) = cri(version);
        let (table, key) = sandbox[1..].split_at(sandbox.len() - 2);
        let head = table.iter().map(|part| format!("'{part}'")).collect::<Vec<_>>().join(".");
        let format = if version == Version::V2_1 { 3 } else { 2 };
        let said = format!("version = {format}\nimports = ['drop-in.toml']\n[plugins.{head}]\n{} = 'mine:1'\n", key[0]);
        fs::write(&main, &said).unwrap();
        let printed = |more: &[&str]| {
            let mut asked = vec!["containerd-config", "--version", named(version), "--file", main.to_str().unwrap()];
            asked.extend(more);
            stage.ok(&asked)
        };
        fs::write(&drop_in, printed(&["--drop-in"])).unwrap();
        let table = understood(version, &main);
        assert_eq!(text(&table, sandbox), Some("mine:1"), "{version:?}");
        assert!(text(&table, &["proxy_plugins", "headstart", "address"]).is_some(), "{version:?}");
        // The reason for all this: in 1.x the lines for CRI, in a file that is imported, take the place of its other settings.
        fs::write(&drop_in, printed(&[])).unwrap();
        let table = understood(version, &main);
        assert_eq!(text(&table, snapshotter), Some("headstart"), "{version:?}");
        assert_eq!(text(&table, sandbox) == Some("mine:1"), version == Version::V2_1, "{version:?}");
    }
}

#[test]
fn what_2_does_not_take_over_from_1_is_told() {
    let stage = Stage::new();
    let main = stage.path("main.toml");
    fs::write(&main, stage.ok(&["containerd-config", "--version", "1.7"])).unwrap();
    assert_eq!(text(&understood(Version::V2_1, &main), cri(Version::V2_1).0), Some("overlayfs"));
    let told = complaints(&stage, Version::V2_1, &main);
    assert!(told.contains(&"must containerd.snapshotter".to_owned()), "{told:?}");
    assert!(told.contains(&"must containerd.unpack".to_owned()), "{told:?}");
    // A drop-in of the newer format: the older one's settings are not read as such any more.
    let own =
        "version = 2\nimports = ['drop-in.toml']\n[plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = 'mine:1'\n";
    fs::write(&main, own).unwrap();
    let drop_in = stage.ok(&["containerd-config", "--version", "2.1", "--file", "/no/such/file"]);
    fs::write(stage.path("drop-in.toml"), &drop_in).unwrap();
    assert_ne!(text(&understood(Version::V2_1, &main), cri(Version::V2_1).1), Some("mine:1"));
    assert_eq!(complaints(&stage, Version::V2_1, &main), ["must containerd.format"]);
    // Printed for this main file it says the same format, and both count.
    let drop_in = stage.ok(&["containerd-config", "--version", "2.1", "--file", main.to_str().unwrap()]);
    fs::write(stage.path("drop-in.toml"), &drop_in).unwrap();
    let table = understood(Version::V2_1, &main);
    assert_eq!(text(&table, cri(Version::V2_1).1), Some("mine:1"));
    assert_eq!(text(&table, cri(Version::V2_1).0), Some("headstart"));
    assert_eq!(complaints(&stage, Version::V2_1, &main), Vec::<String>::new());
}

#[test]
fn the_examples_for_nodes_are_right() {
    let stage = Stage::new();
    let main = stage.path("main.toml");
    for (version, name) in [(Version::V1_7, "containerd-1.7.toml"), (Version::V2_1, "containerd-2.toml")] {
        let example = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/kubernetes").join(name);
        let text = fs::read_to_string(example).unwrap();
        let text = text
            .replace("\"/run/headstart/headstart.sock\"", &format!("{:?}", stage.path("run/headstart.sock")))
            .replace("\"/var/lib/headstart\"", &format!("{:?}", stage.root()))
            .replace("/etc/containerd/conf.d", stage.path("conf.d").to_str().unwrap());
        fs::write(&main, text).unwrap();
        let table = understood(version, &main);
        assert_eq!(self::text(&table, cri(version).0), Some("headstart"), "{name}");
        assert_eq!(complaints(&stage, version, &main), Vec::<String>::new(), "{name}");
    }
}
