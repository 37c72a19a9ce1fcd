use super::super::finding::Severity;
use super::*;

fn healthy() -> NodeFacts {
    let present = || Capability::PRESENT;
    let place = |path: &str| PlaceFacts {
        path: path.into(),
        found: Ok(Some((0, 0o700))),
        file_system: "ext4".into(),
        options: "rw,relatime".into(),
    };
    NodeFacts {
        is_root: true,
        uid: 0,
        kernel: KernelFacts {
            release: "6.12.1".into(),
            fuse: present(),
            capabilities: Capabilities {
                root: present(),
                erofs: present(),
                file_backed: present(),
                loop_devices: present(),
                overlay: present(),
            },
            exchange: present(),
            passthrough: Some(true),
        },
        places: vec![place("/var/lib/headstart"), place("/run/headstart")],
        disk: Ok(DiskFacts { size: 100 << 30, free: 50 << 30, reserve: 1 << 30, quota: None }),
        daemon: DaemonFacts {
            pid: Some(1),
            control: Answer::Ready,
            snapshotter: Some(("/run/headstart/headstart.sock".into(), Answer::Ready)),
            kept: false,
            leftovers: Vec::new(),
        },
        login: LoginFacts { path: "/root/.docker/config.json".into(), found: Ok(Some((0o600, true, Vec::new()))) },
        hosts: Vec::new(),
    }
}

fn complaints(facts: &NodeFacts) -> Vec<String> {
    let complaints = examine(facts).into_iter().filter(|finding| finding.severity >= Severity::Should);
    complaints.map(|finding| format!("{:?} {}", finding.severity, finding.check)).collect()
}

#[test]
fn a_healthy_machine_has_nothing_to_do() {
    assert_eq!(complaints(&healthy()), Vec::<String>::new());
    assert!(examine(&healthy()).iter().all(|finding| finding.remedy.is_none()));
}

#[test]
fn each_fault_has_its_finding() {
    let missing = || Capability::missing("why");
    let silent = || Answer::Silent("why".into());
    type Break = Box<dyn Fn(&mut NodeFacts)>;
    let table: Vec<(Break, &[&str])> = vec![
        (Box::new(move |f| f.kernel.fuse = missing()), &["Must kernel.fuse"]),
        (Box::new(move |f| f.kernel.capabilities.erofs = missing()), &["Should kernel.erofs"]),
        (Box::new(move |f| f.kernel.capabilities.overlay = missing()), &["Must kernel.overlay"]),
        (Box::new(move |f| f.kernel.capabilities.file_backed = missing()), &[]),
        (
            Box::new(move |f| {
                f.kernel.capabilities.file_backed = missing();
                f.kernel.capabilities.loop_devices = missing();
            }),
            &["Should kernel.loop", "Should kernel.erofs-files"],
        ),
        (Box::new(move |f| f.kernel.exchange = missing()), &["Should kernel.loop"]),
        (Box::new(|f| f.kernel.passthrough = None), &[]),
        (
            Box::new(move |f| {
                f.is_root = false;
                f.kernel.capabilities = Capabilities::unknown();
            }),
            &[],
        ),
        (Box::new(|f| f.places[0].found = Err("why".into())), &["Must place"]),
        (Box::new(|f| f.places[0].found = Ok(None)), &[]),
        (Box::new(|f| f.places[0].found = Ok(Some((1000, 0o700)))), &["Must place"]),
        (Box::new(|f| f.places[1].found = Ok(Some((0, 0o770)))), &["Must place"]),
        (Box::new(|f| f.places[1].found = Ok(Some((0, 0o755)))), &[]),
        (Box::new(|f| f.places[0].file_system = "overlay".into()), &["Must place"]),
        (Box::new(|f| f.places[0].options = "nosuid,ro".into()), &["Must place"]),
        (Box::new(|f| f.disk = Err("why".into())), &["Must disk"]),
        (Box::new(|f| f.disk.as_mut().unwrap().free = 1 << 20), &["Must disk"]),
        (Box::new(|f| f.disk.as_mut().unwrap().free = 2 << 30), &["Should disk"]),
        (Box::new(|f| f.disk.as_mut().unwrap().quota = Some(1 << 50)), &[]),
        (Box::new(|f| f.daemon.pid = None), &["Should daemon"]),
        (Box::new(move |f| f.daemon.control = silent()), &["Must daemon"]),
        (Box::new(|f| f.daemon.control = Answer::NotReady), &["Should daemon"]),
        (Box::new(move |f| f.daemon.snapshotter = Some(("/s".into(), silent()))), &["Must daemon.socket"]),
        (Box::new(|f| f.daemon.leftovers = vec!["loop device 1 (x)".into()]), &["Should leftovers"]),
        (
            Box::new(|f| {
                (f.daemon.pid, f.daemon.kept) = (None, true);
                f.daemon.leftovers = vec!["loop device 1 (x)".into()];
            }),
            &["Must daemon"],
        ),
        (Box::new(|f| f.login.found = Ok(None)), &[]),
        (Box::new(|f| f.login.found = Err("why".into())), &["Must registry.logins"]),
        (Box::new(|f| f.login.found = Ok(Some((0o644, true, Vec::new())))), &["Must registry.logins"]),
        (Box::new(|f| f.login.found = Ok(Some((0o644, false, Vec::new())))), &[]),
        (
            Box::new(|f| f.login.found = Ok(Some((0o600, false, vec!["docker-credential-x".into()])))),
            &["Must registry.logins"],
        ),
        (Box::new(|f| f.hosts = vec![("/c/h/hosts.toml".into(), "why".into())]), &["Must registry.hosts"]),
    ];
    for (at, (break_it, expected)) in table.into_iter().enumerate() {
        let mut facts = healthy();
        break_it(&mut facts);
        assert_eq!(complaints(&facts), expected, "fault {at}");
    }
}

#[test]
fn commands_can_be_pasted() {
    assert_eq!(quoted(Path::new("/var/lib/headstart")), "/var/lib/headstart");
    assert_eq!(quoted(Path::new("/a b/it's")), r"'/a b/it'\''s'");
}
