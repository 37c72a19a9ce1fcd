//! What `headstart doctor` makes of this machine.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use serde_json::Value;

use super::stage::Stage;

/// The exit code, and the findings that ask for something.
fn complaints(stage: &Stage) -> (Option<i32>, Vec<Value>) {
    // No containerd: what it is told stands in tests of its own.
    let output = stage.run(&["--json", "doctor", "--quiet", "--containerd-config", "/no/such/file"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = report["findings"].as_array().unwrap().clone();
    let must = findings.iter().filter(|finding| finding["severity"] == "must").count();
    assert_eq!(report["must"], must);
    (output.status.code(), findings)
}

fn checks(findings: &[Value], severity: &str) -> Vec<String> {
    let found = findings.iter().filter(|finding| finding["severity"] == severity);
    found.map(|finding| finding["check"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn doctor_finds_what_is_wrong_and_tells_what_to_do() {
    let stage = Stage::new();
    // The program makes its root.
    stage.ok(&["status"]);
    fs::create_dir_all(stage.root()).unwrap();
    let (_, healthy) = complaints(&stage);
    let ours = |findings: &[Value]| -> Vec<String> {
        let about_us = |check: &String| check == "place" || check.starts_with("registry.");
        checks(findings, "must").into_iter().filter(about_us).collect()
    };
    assert_eq!(ours(&healthy), Vec::<String>::new());
    assert_eq!(checks(&healthy, "should").iter().filter(|check| *check == "daemon").count(), 1, "{healthy:?}");

    let login = stage.path("docker-config.json");
    fs::write(&login, r#"{"auths": {"r.example": {"auth": "dTpw"}}, "credsStore": "of-nobody"}"#).unwrap();
    fs::set_permissions(&login, Permissions::from_mode(0o644)).unwrap();
    fs::set_permissions(stage.root(), Permissions::from_mode(0o777)).unwrap();
    let hosts = stage.path("certs.d/r.example");
    fs::create_dir_all(&hosts).unwrap();
    fs::write(hosts.join("hosts.toml"), "server = \n").unwrap();
    let (code, broken) = complaints(&stage);
    assert_eq!(code, Some(1));
    assert_eq!(ours(&broken), ["place", "registry.logins", "registry.logins", "registry.hosts"]);
    let run = |check: &str| {
        let finding = broken.iter().find(|finding| finding["check"] == check).unwrap();
        finding["remedy"]["run"]["command"].as_str().unwrap().to_owned()
    };
    assert_eq!(run("place"), format!("chmod go-w {}", stage.root().display()));
    assert_eq!(run("registry.logins"), format!("chmod 600 {}", login.display()));

    let output = stage.run(&["doctor"]);
    let told = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(told.contains("MUST    place"), "{told}");
    assert!(told.contains(&format!("          run:\n            chmod go-w {}", stage.root().display())), "{told}");

    // A file longer than any real one is an error, not what its beginning says.
    fs::write(hosts.join("hosts.toml"), "#".repeat((1 << 20) + 1)).unwrap();
    let (_, long) = complaints(&stage);
    let finding = long.iter().find(|finding| finding["check"] == "registry.hosts").unwrap();
    assert!(finding["what"].as_str().unwrap().ends_with("the file is longer than 1 MiB"), "{finding}");
    assert!(Path::new(finding["what"].as_str().unwrap().split(": ").next().unwrap()).ends_with("r.example/hosts.toml"));
}
