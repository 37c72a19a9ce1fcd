use super::super::config::ConfigFile;
use super::super::finding::Severity;
use super::*;

const VERSIONS: [&str; 7] = ["1.6.20", "1.7.24", "2.0.0", "2.1.9", "2.2.7", "2.3.4", "2.4.0"];

fn ours() -> Ours {
    Ours {
        socket: "/run/headstart/headstart.sock".into(),
        root: "/var/lib/headstart".into(),
        architecture: "amd64".into(),
        maps_ids: true,
        certs_d: vec!["/etc/containerd/certs.d".into()],
        file: "/etc/headstart/config.toml".into(),
    }
}

fn config(files: &[(&str, &str)]) -> NodeConfig {
    let read = |(path, text): &(&str, &str)| ConfigFile { path: (*path).into(), table: toml::from_str(text).unwrap() };
    NodeConfig { files: files.iter().map(read).collect(), faults: Vec::new() }
}

fn facts(version: &str, files: &[(&str, &str)]) -> ContainerdFacts {
    ContainerdFacts {
        version: Some(Ok(version.parse().unwrap())),
        main: "/etc/containerd/config.toml".into(),
        config: Some(config(files)),
        idle: Vec::new(),
    }
}

fn advised(version: &str) -> String {
    let ours = ours();
    advice::file(&Reader {
        version: version.parse().unwrap(),
        file_version: None,
        socket: &ours.socket,
        root: &ours.root,
        architecture: &ours.architecture,
        maps_ids: ours.maps_ids,
    })
}

/// What is not as it should be, in words for comparisons.
fn complaints(facts: &ContainerdFacts) -> Vec<String> {
    let findings = examine(facts, &ours());
    let complaints = findings.into_iter().filter(|finding| finding.severity >= Severity::Should);
    complaints.map(|finding| format!("{:?} {}", finding.severity, finding.check)).collect()
}

#[test]
fn what_is_advised_is_right() {
    for version in VERSIONS {
        let text = advised(version);
        let facts = facts(version, &[("/etc/containerd/config.toml", &text)]);
        assert_eq!(complaints(&facts), Vec::<String>::new(), "{version}");
        let checks: Vec<_> = examine(&facts, &ours()).iter().map(|finding| finding.check).collect();
        assert!(checks.contains(&"containerd.proxy") && checks.contains(&"containerd.snapshotter"), "{checks:?}");
    }
}

#[test]
fn what_follows_the_remedies_is_right() {
    for version in VERSIONS {
        let main = "/etc/containerd/config.toml";
        let format = if version.starts_with('1') { 2 } else { 3 };
        let empty = format!("version = {format}\n");
        let mut text = empty.clone();
        for finding in examine(&facts(version, &[(main, &empty)]), &ours()) {
            if let Some(Remedy::Write { file, lines }) = finding.remedy {
                assert_eq!(file, Path::new(main), "{version}");
                text.push_str(&lines);
                text.push('\n');
            }
        }
        assert_eq!(complaints(&facts(version, &[(main, &text)])), Vec::<String>::new(), "{version}\n{text}");
    }
}

#[test]
fn each_mistake_has_its_finding() {
    let proxy = |version: &str, wrong: &str, right: &str| {
        let text = advised(version);
        assert!(text.contains(wrong), "{wrong} is not advised for {version}");
        text.replace(wrong, right)
    };
    let address = "address = \"/run/headstart/headstart.sock\"";
    let table = [
        (
            "1.7.24",
            proxy("1.7.24", address, "address = '/run/other.sock'"),
            vec!["Must containerd.proxy", "Must containerd.differ"],
        ),
        ("1.7.24", proxy("1.7.24", "type = \"snapshot\"", "type = 'snapshotter'"), vec!["Must containerd.proxy"]),
        ("1.7.24", proxy("1.7.24", "root = \"/var/lib/headstart\"", ""), vec!["Should containerd.exports"]),
        ("1.7.24", proxy("1.7.24", "/var/lib/headstart", "/var/lib/other"), vec!["Should containerd.exports"]),
        (
            "1.7.24",
            proxy("1.7.24", "disable_snapshot_annotations = false", "disable_snapshot_annotations = true"),
            vec!["Must containerd.annotations"],
        ),
        (
            "1.7.24",
            proxy("1.7.24", "snapshotter = \"headstart\"", "snapshotter = 'overlayfs'"),
            vec!["Should containerd.snapshotter"],
        ),
        (
            "1.6.20",
            proxy("1.6.20", "version = 2", "version = 2\n[proxy_plugins.d]\ntype = 'diff'"),
            vec!["Must containerd.differ"],
        ),
        ("1.7.24", proxy("1.7.24", "version = 2", "version = 2\n[proxy_plugins.d]\ntype = 'diff'"), vec![]),
        (
            "2.1.9",
            proxy("2.1.9", "enable_remote_snapshot_annotations = \"true\"", ""),
            vec!["Must containerd.annotations"],
        ),
        (
            "2.1.9",
            proxy("2.1.9", "  snapshotter = \"headstart\"\n    differ", "  snapshotter = 'x'\n    differ"),
            vec!["Must containerd.unpack"],
        ),
        ("2.1.9", proxy("2.1.9", "linux/amd64", "linux/arm64"), vec!["Must containerd.unpack"]),
        // Whoever leaves the differ out leaves it out everywhere, or the transfer service does not start.
        (
            "2.1.9",
            proxy("2.1.9", "[proxy_plugins.headstart-diff]", "[proxy_plugins.other]"),
            vec!["Must containerd.unpack"],
        ),
        ("2.1.9", proxy("2.1.9", "headstart-diff", "other"), vec![]),
        ("1.7.24", proxy("1.7.24", "default = [\"headstart-diff\", \"walking\"]", ""), vec![]),
        ("2.3.4", proxy("2.3.4", "linux(+erofs)/amd64", "linux/arm64"), vec!["Should containerd.unpack"]),
        ("2.1.9", proxy("2.1.9", "\"remap-ids\"", "'rebase', 'remap-ids'"), vec!["Should containerd.rebase"]),
        ("2.2.7", proxy("2.2.7", "\"remap-ids\"", "'remap-ids', 'rebase'"), vec!["Must containerd.rebase"]),
        ("2.3.4", proxy("2.3.4", "\"remap-ids\"", "'rebase'"), vec!["Must containerd.rebase"]),
        ("2.4.0", proxy("2.4.0", "capabilities = [\"rebase\", \"remap-ids\"]", ""), vec!["Should containerd.rebase"]),
        // The old switch: CRI pulls locally then, and tells what it should.
        (
            "2.1.9",
            proxy(
                "2.1.9",
                "  snapshotter = \"headstart\"\n  #",
                "  snapshotter = 'headstart'\n  disable_snapshot_annotations = false\n  #",
            ),
            vec!["Should containerd.annotations"],
        ),
        (
            "2.1.9",
            proxy(
                "2.1.9",
                "  snapshotter = \"headstart\"\n  #",
                "  snapshotter = 'headstart'\n  max_concurrent_downloads = 5\n  #",
            ),
            vec!["Must containerd.annotations"],
        ),
        (
            "2.1.9",
            proxy("2.1.9", "version = 3", "version = 3\ndisabled_plugins = ['io.containerd.grpc.v1.cri']"),
            vec![],
        ),
        ("2.1.9", proxy("2.1.9", "version = 3", ""), vec!["Must containerd.format"]),
        ("1.7.24", proxy("1.7.24", "[proxy_plugins.headstart", "[proxy_plugins.other"), vec![]),
        ("1.7.24", "version = 2\n".to_owned(), vec!["Must containerd.proxy", "Should containerd.snapshotter"]),
        (
            "2.1.9",
            advised("2.1.9")
                + "\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/etc/containerd/certs.d:/srv/certs'\n",
            vec!["Should containerd.hosts"],
        ),
        (
            "1.7.24",
            advised("1.7.24")
                + "\n[plugins.'io.containerd.grpc.v1.cri'.registry.mirrors.'docker.io']\nendpoint = ['https://m']\n",
            vec!["Should containerd.hosts"],
        ),
    ];
    for (version, text, expected) in table {
        let found = complaints(&facts(version, &[("/etc/containerd/config.toml", &text)]));
        assert_eq!(found, expected, "containerd {version}:\n{text}");
    }
}

#[test]
fn settings_of_1_are_not_taken_over_by_2() {
    let old = "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd]\nsnapshotter = 'headstart'\n\
               disable_snapshot_annotations = false\n[proxy_plugins.headstart]\ntype = 'snapshot'\naddress = '/run/headstart/headstart.sock'\n\
               exports = { root = '/var/lib/headstart', enable_remote_snapshot_annotations = 'true' }\n";
    assert_eq!(complaints(&facts("1.7.24", &[("/c", old)])), Vec::<String>::new());
    let findings = examine(&facts("2.1.9", &[("/c", old)]), &ours());
    let finding = findings.iter().find(|finding| finding.check == "containerd.snapshotter").unwrap();
    assert_eq!(finding.severity, Severity::Must);
    let Some(Remedy::Write { file, lines }) = &finding.remedy else { panic!("{finding:?}") };
    assert_eq!(file, Path::new("/c"));
    assert!(lines.contains("[plugins.'io.containerd.cri.v1.images']\n  snapshotter = \"headstart\"\n"), "{lines}");
}

#[test]
fn imports_count_as_they_do_for_each_version() {
    let (proxy, rest): (String, String) =
        advised("1.7.24").split_once("# All images").map(|(a, b)| (a.into(), b.into())).unwrap();
    // What is imported replaces CRI's other settings in 1.x; the proxy entry alone does no harm.
    let files = [("/main", format!("version = 2\n#{rest}")), ("/drop", proxy)];
    let files: Vec<(&str, &str)> = files.iter().map(|(path, text)| (*path, text.as_str())).collect();
    assert_eq!(complaints(&facts("1.7.24", &files)), Vec::<String>::new());
    // A drop-in of a newer format.
    let newer = advised("2.1.9");
    let files = [("/main", "version = 2\n"), ("/drop", newer.as_str())];
    assert_eq!(complaints(&facts("2.1.9", &files)), ["Must containerd.format"]);
    assert_eq!(
        complaints(&facts("2.4.0", &files)),
        ["Should containerd.format", "Should containerd.rebase", "Should containerd.unpack"]
    );
}

#[test]
fn without_version_or_file_there_is_a_word_about_it() {
    let none = ContainerdFacts { main: "/m".into(), ..ContainerdFacts::default() };
    assert_eq!(complaints(&none), Vec::<String>::new());
    assert_eq!(examine(&none, &ours()).len(), 1);
    let unknown = ContainerdFacts { version: Some(Err("why".into())), ..none.clone() };
    assert_eq!(complaints(&unknown), ["Should containerd.version"]);
    let ancient = ContainerdFacts { version: Some(Ok(ContainerdVersion::new(1, 5))), ..none.clone() };
    assert_eq!(complaints(&ancient), ["Must containerd.version"]);
    let unconfigured = ContainerdFacts { version: Some(Ok(ContainerdVersion::new(1, 7))), ..none };
    assert_eq!(complaints(&unconfigured), ["Must containerd.config"]);
    let findings = examine(&unconfigured, &ours());
    let Some(Remedy::Write { lines, .. }) = &findings[1].remedy else { panic!("{findings:?}") };
    assert_eq!(*lines, advised("1.7.24"));
    let mut broken = facts("1.7.24", &[("/c", &advised("1.7.24"))]);
    broken
        .config
        .as_mut()
        .unwrap()
        .faults
        .push(super::super::config::Fault { path: "/f".into(), why: "line 1".into() });
    broken.idle.push("/etc/containerd/conf.d/headstart.toml".into());
    assert_eq!(complaints(&broken), ["Must containerd.config", "Should containerd.config"]);
}

/// What is said of who applies layers, and of who asks.
#[test]
fn who_applies_layers_is_told() {
    let said = |version: &str, text: &str| -> Vec<(Severity, &'static str, bool)> {
        let findings = examine(&facts(version, &[("/etc/containerd/config.toml", text)]), &ours());
        let about = |finding: &Finding| matches!(finding.check, "containerd.differ" | "containerd.unpack");
        let told = |finding: Finding| (finding.severity, finding.check, finding.remedy.is_some());
        findings.into_iter().filter(about).map(told).collect()
    };
    let (good, note) = (Severity::Good, Severity::Note);
    let without = |version: &str| advised(version).replace("type = \"diff\"", "type = 'content'");
    for (version, text, expected) in [
        ("1.6.20", advised("1.6.20"), vec![]),
        ("1.7.24", advised("1.7.24"), vec![(good, "containerd.differ", false)]),
        ("1.7.24", without("1.7.24"), vec![(note, "containerd.differ", true)]),
        (
            "1.7.24",
            advised("1.7.24").replace("default = [\"headstart-diff\", ", "default = ["),
            vec![(note, "containerd.differ", true)],
        ),
        ("2.1.9", advised("2.1.9"), vec![(good, "containerd.differ", false), (good, "containerd.unpack", false)]),
        (
            "2.1.9",
            advised("2.1.9").replace("differ = \"headstart-diff\"", "differ = 'walking'"),
            vec![(good, "containerd.differ", false), (note, "containerd.unpack", true)],
        ),
        (
            "2.1.9",
            without("2.1.9").replace("differ = \"headstart-diff\"", "differ = 'walking'"),
            vec![(note, "containerd.differ", true), (good, "containerd.unpack", false)],
        ),
    ] {
        assert_eq!(said(version, &text), expected, "{version}\n{text}");
    }
}

#[test]
fn who_changes_owners_is_told() {
    for (version, maps_ids, declared, expected) in [
        ("2.1.9", true, "", Some(Severity::Note)),
        ("2.1.9", true, "capabilities = ['remap-ids']", None),
        ("2.1.9", false, "", None),
        ("2.1.9", false, "capabilities = ['remap-ids']", Some(Severity::Should)),
        ("1.7.24", true, "", Some(Severity::Note)),
        ("1.6.20", true, "", None),
    ] {
        let file = format!("[proxy_plugins.headstart]\n{declared}\ntype = 'snapshot'");
        let facts = facts(version, &[("/etc/containerd/config.toml", &file)]);
        let ours = Ours { maps_ids, ..ours() };
        let findings = examine(&facts, &ours);
        let found = findings.iter().find(|finding| finding.check == "containerd.remap-ids");
        assert_eq!(found.map(|finding| finding.severity), expected, "{version} {maps_ids} {declared}");
    }
}
