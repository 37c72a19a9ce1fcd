//! `headstart daemon` from end to end: a real process on a root and a run directory of its own. Needs root, /dev/fuse and
//! overlayfs.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use headstart::sys::mount::{Unmount, mounted_on, unmount};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::cli::stage::{Stage, noise, reference, tar, wait_until};

/// A daemon that is killed when its owner is done with it.
pub(crate) struct Daemon<'a> {
    stage: &'a Stage,
    child: Child,
    log: std::path::PathBuf,
}

impl<'a> Daemon<'a> {
    /// One that is ready.
    pub(crate) fn start(stage: &'a Stage) -> Self {
        Self::start_with(stage, |_| {})
    }

    pub(crate) fn start_with(stage: &'a Stage, prepare: impl FnOnce(&mut Command)) -> Self {
        let log = (0..).map(|number| stage.path(&format!("daemon-{number}.log"))).find(|log| !log.exists()).unwrap();
        let mut command = stage.program();
        command.arg("daemon").stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&log).unwrap());
        prepare(&mut command);
        let child = command.spawn().unwrap();
        let daemon = Self { stage, child, log };
        wait_until("the daemon", || daemon.status()["ready"] == true);
        assert_eq!(daemon.status()["pid"], daemon.child.id());
        daemon
    }

    /// What `status` tells of it; null if it is not there.
    fn status(&self) -> Value {
        let output = self.stage.run(&["--json", "status"]);
        let text = String::from_utf8_lossy(&output.stdout);
        serde_json::from_str::<Value>(&text).map_or(Value::Null, |status| status["daemon"].clone())
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Asks for the end and waits for it.
    #[track_caller]
    pub(crate) fn end(mut self) -> String {
        self.signal(Signal::TERM);
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{status}: {}", self.log());
        self.log()
    }

    pub(crate) fn kill(mut self) {
        self.signal(Signal::KILL);
        self.child.wait().unwrap();
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Says something over the control socket as it is written here, and gives the status line's code and the answer.
fn say(socket: &Path, method: &str, path: &str, body: &str) -> (u16, Value) {
    let mut stream = UnixStream::connect(socket).unwrap();
    let head =
        format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).unwrap();
    // A body that is too large is not read to its end.
    stream.write_all(body.as_bytes()).ok();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok();
    let code = answer.split(' ').nth(1).unwrap_or_else(|| panic!("no answer: {answer:?}")).parse().unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    (code, serde_json::from_str(body).unwrap_or(Value::Null))
}

#[test]
fn images_are_mounted_read_and_ended_through_the_daemon() {
    let stage = Stage::new();
    let large = noise(1, 3 << 20);
    let (_, one) = stage.images_at("a", "ca", &[tar(&[("one", &large)]), tar(&[("shared", b"x")])]);
    let (_, two) = stage.images_at("b", "cb", &[tar(&[("two", b"2")])]);
    let (first, second) = (stage.serve(&one, &[]), stage.serve(&two, &[]));
    let (a, b) = (stage.make("mnt-a"), stage.make("mnt-b"));
    let (point_a, point_b) = (a.to_str().unwrap(), b.to_str().unwrap());
    let daemon = Daemon::start(&stage);
    let said = stage.run(&["mount", &first.image(), point_a]);
    let words = String::from_utf8(said.stderr).unwrap();
    assert!(said.status.success(), "{words}");
    assert_eq!(words.trim(), format!("headstart: mounted by the daemon (process {})", daemon.child.id()));
    stage.ok(&["mount", &second.image(), point_b]);
    assert_eq!(fs::read(a.join("one")).unwrap(), large);
    assert_eq!(fs::read(b.join("two")).unwrap(), b"2");

    let status = stage.status();
    let points: Vec<_> = status.iter().map(|mount| mount["mount_point"].as_str().unwrap()).collect();
    assert_eq!(points, [point_a, point_b]);
    for mount in &status {
        assert_eq!(mount["state"], "serving");
        assert_eq!(mount["pid"], daemon.child.id());
        assert_eq!(mount["daemon"], stage.path("run/control.sock").to_str().unwrap());
        assert_eq!(mount["log"], Value::Null);
    }
    assert!(status[0]["bytes_fetched"].as_u64().unwrap() > 3 << 20, "{status:?}");
    let told = daemon.status();
    assert_eq!(told["root"], stage.root().to_str().unwrap());
    assert_eq!(told["version"], env!("CARGO_PKG_VERSION"));
    assert!(told["resident_bytes"].as_u64().unwrap() > 1 << 20, "{told}");
    let text = stage.ok(&["status"]);
    assert!(text.contains(&format!("(process {})", daemon.child.id())) && text.contains("served by daemon"), "{text}");

    // A mount point has one mount, and a place in use stays.
    let (code, words) = stage.fails(&["mount", &second.image(), point_a]);
    assert_eq!(code, 8, "{words}");
    let open = File::open(b.join("two")).unwrap();
    let (code, words) = stage.fails(&["umount", point_b]);
    assert_eq!(code, 8, "{words}");
    assert!(words.contains("files in it are in use"), "{words}");
    drop(open);
    stage.ok(&["umount", point_b]);
    assert!(mounted_on(&b).unwrap().is_none());
    assert_eq!(stage.status().len(), 1);
    // By hand is as good.
    unmount(&a, Unmount::Strict).unwrap();
    wait_until("the end of the other mount", || stage.status().is_empty());
    stage.ok(&["mount", &first.image(), point_a]);
    assert_eq!(fs::read(a.join("one")).unwrap(), large);
    let log = daemon.end();
    assert!(log.contains("unmounted"), "{log}");
    stage.assert_clean();
    assert!(!stage.path("run/control.sock").exists());
}

#[test]
fn failures_have_the_same_codes_with_and_without_the_daemon() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", b"a")])]);
    let registry = stage.serve(&converted, &[]);
    let mnt = stage.make("mnt");
    let point = mnt.to_str().unwrap();
    let missing = format!("{}/some/image:missing", registry.address);
    let nowhere = reference(&stage.path("nowhere"));
    let cases: [(&[&str], i32); 4] = [
        (&["mount", &missing, point], 3),
        (&["mount", &nowhere, point], 3),
        (&["mount", &missing, "/no/such/place"], 8),
        (&["umount", point], 3),
    ];
    let without: Vec<_> = cases.iter().map(|(words, _)| stage.fails(words)).collect();
    let daemon = Daemon::start(&stage);
    for ((words, code), without) in cases.iter().zip(without) {
        let with = stage.fails(words);
        assert_eq!(with.0, *code, "{words:?}: {}", with.1);
        assert_eq!(with, without);
    }
    daemon.end();
    stage.assert_clean();
}

#[test]
fn mounts_of_a_killed_daemon_are_told_and_brought_back_by_the_next() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", b"content")])]);
    let registry = stage.serve(&converted, &[]);
    let (plain, written, upper) = (stage.make("plain"), stage.make("written"), stage.path("upper"));
    let daemon = Daemon::start(&stage);
    stage.ok(&["mount", &registry.image(), plain.to_str().unwrap()]);
    stage.ok(&["mount", &registry.image(), written.to_str().unwrap(), "--upper", upper.to_str().unwrap()]);
    assert_eq!(fs::read(plain.join("a")).unwrap(), b"content");
    fs::write(written.join("new"), b"new").unwrap();
    daemon.kill();
    let status = stage.status();
    assert_eq!(status.len(), 2);
    for mount in &status {
        // Somebody keeps the connection, or the kernel needs none.
        assert!(["kept", "alone"].contains(&mount["state"].as_str().unwrap()), "{mount}");
    }
    let before = registry.requests().len();

    let daemon = Daemon::start(&stage);
    for mount in stage.status() {
        assert_eq!(mount["state"], "serving", "{mount}: {}", daemon.log());
        assert_eq!(mount["pid"], daemon.child.id());
    }
    assert_eq!(fs::read(plain.join("a")).unwrap(), b"content");
    assert_eq!(fs::read(written.join("a")).unwrap(), b"content");
    assert_eq!(fs::read(written.join("new")).unwrap(), b"new");
    assert_eq!(registry.requests().len(), before, "the registry was asked: {:?}", &registry.requests()[before..]);
    daemon.kill();

    // Without a daemon what is left can be taken away.
    stage.ok(&["umount", plain.to_str().unwrap()]);
    stage.ok(&["umount", written.to_str().unwrap()]);
    assert!(stage.status().is_empty());
    // The socket and the connection of the dead one are in nobody's way.
    assert!(stage.path("run/control.sock").exists() && mounted_on(&stage.path("run/fs")).unwrap().is_some());
    Daemon::start(&stage).end();
    stage.assert_clean();
}

#[test]
fn a_restarted_daemon_gives_the_same_inode_numbers() {
    let stage = Stage::new();
    let layers = [tar(&[("a", b"lower"), ("d/", b""), ("d/b", b"b")]), tar(&[("d/", b""), ("d/c", b"c")])];
    let (_, converted) = stage.images(&layers);
    let (image, one, two) = (reference(&converted), stage.make("one"), stage.make("two"));
    let recorded = || {
        let told = stage.json(&["snapshots"])["images"].clone();
        told.as_array().unwrap().iter().map(|image| image["image"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let daemon = Daemon::start(&stage);
    // What was there before takes numbers with it.
    stage.ok(&["mount", "--driver", "fuse", &image, one.to_str().unwrap()]);
    stage.ok(&["mount", "--driver", "fuse", &image, two.to_str().unwrap()]);
    assert_eq!(recorded(), [one.to_str().unwrap(), two.to_str().unwrap()]);
    stage.ok(&["umount", one.to_str().unwrap()]);
    wait_until("the mount is forgotten", || recorded() == [two.to_str().unwrap()]);
    let numbers = || ["", "a", "d", "d/b", "d/c"].map(|path| fs::metadata(two.join(path)).unwrap().ino());
    let before = numbers();
    daemon.kill();
    let daemon = Daemon::start(&stage);
    assert_eq!(numbers(), before);
    assert_eq!(recorded(), [two.to_str().unwrap()]);
    daemon.end();
    assert_eq!(recorded(), Vec::<String>::new());
    stage.assert_clean();
}

#[test]
fn what_cannot_be_brought_back_stays_told() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", b"content")])]);
    let (mnt, other) = (stage.make("mnt"), stage.make("other"));
    let daemon = Daemon::start(&stage);
    stage.ok(&["mount", &reference(&converted), mnt.to_str().unwrap()]);
    daemon.kill();
    fs::rename(&converted, stage.path("elsewhere")).unwrap();
    let daemon = Daemon::start(&stage);
    let log = daemon.log();
    assert!(log.contains("cannot be brought back"), "{log}");
    let status = stage.status();
    assert_eq!((status.len(), status[0]["state"].as_str()), (1, Some("dead")), "{status:?}");
    stage.ok(&["umount", mnt.to_str().unwrap()]);
    // The daemon is none the worse for it.
    stage.ok(&["mount", &reference(&stage.path("elsewhere")), other.to_str().unwrap()]);
    assert_eq!(fs::read(other.join("a")).unwrap(), b"content");
    daemon.end();
    stage.assert_clean();
}

/// How a daemon ends that must not start.
fn refused(root: Option<&Path>, config: &Path) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_headstart"));
    if let Some(root) = root {
        command.arg("--root").arg(root);
    }
    let output = command.arg("--config").arg(config).arg("daemon").output().unwrap();
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn a_root_and_a_run_directory_have_one_daemon() {
    let stage = Stage::new();
    let daemon = Daemon::start(&stage);
    let words = format!("process {} is", daemon.child.id());
    for root in [stage.root(), stage.path("other-root")] {
        let (code, said) = refused(Some(&root), &stage.path("config.toml"));
        // Not the code after which a service manager gives up: the other one may end.
        assert!(code == Some(9) && said.contains(&words), "{code:?}: {said}");
    }
    daemon.end();
    Daemon::start(&stage).end();
}

#[test]
fn settings_that_make_no_sense_keep_the_daemon_from_starting() {
    let stage = Stage::new();
    for (text, words) in [
        ("[daemon]\nmetrics_lisen = ''\n", "did you mean \"daemon.metrics_listen\"?"),
        ("[daemon]\nmetrics_listen = 'everywhere'\n", "daemon.metrics_listen must be ADDRESS:PORT"),
        ("[daemon]\nstop_timeout = 5\n", "cannot understand the configuration"),
        ("run = 'here'\n", "run must be an absolute path"),
    ] {
        let config = stage.path("wrong.toml");
        fs::write(&config, text).unwrap();
        let (code, said) = refused(None, &config);
        assert!(code == Some(2) && said.contains(words), "{code:?}: {said}");
    }
}

#[test]
fn the_socket_refuses_what_it_does_not_understand_and_whom_it_does_not_know() {
    const NOBODY: u32 = 65_534;
    let stage = Stage::new();
    let daemon = Daemon::start(&stage);
    let socket = stage.path("run/control.sock");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&socket), mode(&stage.path("run"))), (0o600, 0o700));
    let large = format!("{{\"mount_point\": \"{}\"}}", "x".repeat(100_000));
    for (method, path, body, code, kind) in [
        ("GET", "/v1/health", "", 200, None),
        ("POST", "/v1/umount", "{\"mount_point\": \"/nowhere\"}", 422, Some("not-found")),
        ("POST", "/v1/umount", "{\"mount_point\": \"/nowhere\", \"now\": 1}", 400, Some("usage")),
        ("POST", "/v1/mount", "{\"image\": \"ftp://x\", \"mount_point\": \"/nowhere\"}", 422, Some("usage")),
        ("POST", "/v1/mount", "[", 400, Some("usage")),
        ("POST", "/v1/umount", &large, 413, Some("usage")),
        ("GET", "/v7/status", "", 404, Some("unsupported")),
        ("GET", "/v1/secrets", "", 404, Some("usage")),
        ("DELETE", "/v1/status", "", 404, Some("usage")),
    ] {
        let (found, answer) = say(&socket, method, path, body);
        assert_eq!(found, code, "{method} {path}: {answer}");
        assert_eq!(answer["kind"].as_str(), kind, "{method} {path}: {answer}");
    }
    // A mode that somebody has changed lets nobody in.
    for (path, mode) in [("run", 0o755), ("run/control.sock", 0o666), ("root/daemon.lock", 0o666)] {
        fs::set_permissions(stage.path(path), fs::Permissions::from_mode(mode)).unwrap();
    }
    let program = stage.path("headstart");
    fs::copy(env!("CARGO_BIN_EXE_headstart"), &program).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = Command::new(&program);
    stage.settle(&mut command);
    let output = command.args(["pull", "oci:/no/such/place:latest"]).uid(NOBODY).gid(NOBODY).output().unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(5), "{words}");
    let log = daemon.end();
    assert!(log.contains("another user asked"), "{log}");
}

#[test]
fn many_mounts_at_once() {
    const MOUNTS: usize = 20;
    let stage = Stage::new();
    let content = noise(7, 1 << 20);
    let (_, converted) = stage.images(&[tar(&[("a", &content)]), tar(&[("b", b"b")])]);
    let registry = stage.serve(&converted, &["--latency", "2"]);
    let daemon = Daemon::start(&stage);
    let points: Vec<_> = (0..MOUNTS).map(|number| stage.make(&format!("mnt-{number}"))).collect();
    std::thread::scope(|scope| {
        for point in &points {
            scope.spawn(|| {
                stage.ok(&["mount", &registry.image(), point.to_str().unwrap()]);
                assert_eq!(fs::read(point.join("a")).unwrap(), content);
            });
        }
    });
    assert_eq!(stage.status().len(), MOUNTS);
    std::thread::scope(|scope| {
        for point in points.iter().take(MOUNTS / 2) {
            scope.spawn(|| stage.ok(&["umount", point.to_str().unwrap()]));
        }
    });
    assert_eq!(stage.status().len(), MOUNTS - MOUNTS / 2);
    for point in points.iter().skip(MOUNTS / 2) {
        assert_eq!(fs::read(point.join("b")).unwrap(), b"b");
    }
    daemon.end();
    stage.assert_clean();
}

#[test]
fn an_end_takes_mounts_in_use_away_and_serves_what_is_open() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", b"content")])]);
    let mnt = stage.make("mnt");
    let mut daemon = Daemon::start(&stage);
    stage.ok(&["mount", &reference(&converted), mnt.to_str().unwrap()]);
    let open = File::open(mnt.join("a")).unwrap();
    daemon.signal(Signal::TERM);
    wait_until("the end of the mount", || mounted_on(&mnt).unwrap().is_none());
    assert_eq!(std::io::read_to_string(&open).unwrap(), "content");
    drop(open);
    assert!(daemon.child.wait().unwrap().success());
    let log = daemon.log();
    assert!(log.contains("is in use: it is taken away"), "{log}");
    stage.assert_clean();
}

#[test]
fn the_service_manager_hears_of_the_beginning_and_the_end() {
    let stage = Stage::new();
    let path = stage.path("notify.sock");
    let socket = UnixDatagram::bind(&path).unwrap();
    socket.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
    // What is given to it to keep is told in between (see `takeover`).
    let hear = || {
        loop {
            let mut buffer = [0; 256];
            let length = socket.recv(&mut buffer).unwrap();
            let message = String::from_utf8_lossy(&buffer[..length]).into_owned();
            if !message.starts_with("FDSTORE") {
                break message;
            }
        }
    };
    let daemon = Daemon::start_with(&stage, |command| {
        command.env("NOTIFY_SOCKET", &path);
    });
    assert_eq!(hear(), "READY=1");
    daemon.end();
    assert_eq!(hear(), "STOPPING=1");
}

#[test]
fn a_hang_up_has_the_settings_read_again() {
    let stage = Stage::new();
    let daemon = Daemon::start(&stage);
    let config = stage.path("config.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("log_level = 'debug'\n{text}[fetch]\nconnections = 3\n")).unwrap();
    daemon.signal(Signal::HUP);
    wait_until("a word about it", || daemon.log().contains("are read again"));
    let log = daemon.log();
    assert!(log.contains("when the daemon is started again") && log.contains("\"fetch\""), "{log}");
    fs::write(&config, "nonsense = 1\n").unwrap();
    daemon.signal(Signal::HUP);
    wait_until("a word about it", || daemon.log().contains("the old one stays"));
    fs::write(&config, text).unwrap();
    daemon.end();
}

#[test]
fn machines_can_watch_the_daemon() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", b"content")])]);
    let mnt = stage.make("mnt");
    // Nobody else gets the number in between, unless the machine hands out all others first.
    let address = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    stage.ok(&["status"]);
    let config = stage.path("config.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("{text}metrics_listen = '{address}'\n")).unwrap();
    let daemon = Daemon::start(&stage);
    stage.ok(&["mount", &reference(&converted), mnt.to_str().unwrap()]);
    assert_eq!(fs::read(mnt.join("a")).unwrap(), b"content");
    let get = |path: &str| {
        let mut stream = std::net::TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    assert!(get("/healthz").starts_with("HTTP/1.1 200"));
    assert!(get("/readyz").starts_with("HTTP/1.1 200"));
    let metrics = get("/metrics");
    assert!(metrics.contains("\nheadstart_mounts 1\n"), "{metrics}");
    let fetched = |metrics: &str| -> u64 {
        let line = metrics.lines().find_map(|line| line.strip_prefix("headstart_fetched_bytes_total "));
        line.unwrap_or_else(|| panic!("{metrics}")).parse().unwrap()
    };
    let before = fetched(&metrics);
    assert!(before > 0, "{metrics}");
    stage.ok(&["umount", mnt.to_str().unwrap()]);
    wait_until("the end of the mount", || get("/metrics").contains("\nheadstart_mounts 0\n"));
    assert!(fetched(&get("/metrics")) >= before, "a counter went back");
    daemon.end();
}

#[test]
fn a_mount_can_have_a_process_of_its_own_beside_the_daemon() {
    let stage = Stage::new();
    let (_, converted) = stage.images(&[tar(&[("a", b"content")])]);
    let mnt = stage.make("mnt");
    let daemon = Daemon::start(&stage);
    stage.ok(&["mount", "--no-daemon", &reference(&converted), mnt.to_str().unwrap()]);
    let status = stage.status();
    assert_ne!(status[0]["pid"], daemon.child.id());
    assert_eq!(status[0]["daemon"], Value::Null);
    daemon.end();
    assert_eq!(fs::read(mnt.join("a")).unwrap(), b"content");
    stage.ok(&["umount", mnt.to_str().unwrap()]);
    stage.assert_clean();
}

#[test]
fn mounts_share_a_connection_and_the_files_of_their_layers() {
    use std::os::unix::fs::MetadataExt as _;

    let stage = Stage::new();
    let shared = tar(&[("shared", b"in both")]);
    let (_, one) = stage.images_at("a", "ca", &[shared.clone(), tar(&[("one", b"1")])]);
    let (_, two) = stage.images_at("b", "cb", &[shared, tar(&[("two", b"2")])]);
    let (a, b) = (stage.make("mnt-a"), stage.make("mnt-b"));
    let daemon = Daemon::start(&stage);
    assert_eq!(daemon.status()["connections"], 1);
    stage.ok(&["mount", "--driver", "fuse", &reference(&one), a.to_str().unwrap()]);
    stage.ok(&["mount", "--driver", "fuse", &reference(&two), b.to_str().unwrap()]);
    assert_eq!(daemon.status()["connections"], 1, "{:?}", stage.status());
    let same = |path: &Path| {
        let metadata = fs::metadata(path.join("shared")).unwrap();
        (metadata.dev(), metadata.ino())
    };
    assert_eq!(same(&a), same(&b));
    assert_eq!(fs::read(a.join("one")).unwrap(), b"1");
    assert_eq!(fs::read(b.join("two")).unwrap(), b"2");

    // What was taken away in use leaves room at once, and stays readable.
    let open = File::open(a.join("one")).unwrap();
    stage.ok(&["umount", "--lazy", a.to_str().unwrap()]);
    stage.ok(&["mount", "--driver", "fuse", &reference(&two), a.to_str().unwrap()]);
    assert_eq!(std::io::read_to_string(&open).unwrap(), "1");
    drop(open);
    assert_eq!(fs::read(a.join("two")).unwrap(), b"2");
    daemon.end();
    stage.assert_clean();
    assert!(!stage.path("run/fs").exists());
}

#[test]
fn pulls_through_the_daemon_tell_how_they_end() {
    let stage = Stage::new();
    let content = noise(11, 5 << 20);
    let (_, converted) = stage.images(&[tar(&[("a", &content)]), tar(&[("b", b"b")])]);
    let registry = stage.serve(&converted, &[]);
    let daemon = Daemon::start(&stage);
    let output = stage.run(&["--json", "pull", &registry.image()]);
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && words.contains("pulled by the daemon"), "{words}");
    let pulled: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(pulled["layers"].as_array().unwrap().len(), 2);
    assert!(pulled["bytes_fetched"].as_u64().unwrap() > 5 << 20, "{pulled}");
    let (code, words) = stage.fails(&["pull", &format!("{}/some/image:missing", registry.address)]);
    assert_eq!(code, 3, "{words}");
    let image = registry.image();
    drop(registry);
    let mnt = stage.make("mnt");
    stage.ok(&["mount", &image, mnt.to_str().unwrap()]);
    assert!(fs::read(mnt.join("a")).unwrap() == content);
    stage.ok(&["wait", mnt.to_str().unwrap()]);
    daemon.end();
    stage.assert_clean();
}

#[test]
fn ordinary_images_are_mounted_through_the_daemon() {
    let stage = Stage::new();
    stage.images(&[tar(&[("a", b"lower"), ("b", b"below")]), tar(&[("a", b"upper")])]);
    let mnt = stage.make("mnt");
    let daemon = Daemon::start(&stage);
    stage.ok(&["mount", &reference(&stage.path("source")), mnt.to_str().unwrap()]);
    assert_eq!(daemon.status()["connections"], 1);
    assert_eq!(fs::read(mnt.join("a")).unwrap(), b"upper");
    assert_eq!(fs::read(mnt.join("b")).unwrap(), b"below");
    daemon.end();
    stage.assert_clean();
}

#[test]
fn a_layer_that_claims_to_be_another_is_not_shown_in_its_place() {
    let stage = Stage::new();
    let content = noise(3, 200_000);
    let (_, one) = stage.images(&[tar(&[("a", &content)])]);
    // The same image in other pieces: the same diffID and another blob.
    let (source, two) = (reference(&stage.path("source")), stage.path("pieces"));
    stage.ok(&["convert", &source, &reference(&two), "--chunk-size", "65536"]);
    let (a, b) = (stage.make("mnt-a"), stage.make("mnt-b"));
    let daemon = Daemon::start(&stage);
    stage.ok(&["mount", "--driver", "fuse", &reference(&one), a.to_str().unwrap()]);
    stage.ok(&["mount", "--driver", "fuse", &reference(&two), b.to_str().unwrap()]);
    let status = stage.status();
    let layer = |number: usize, field: &str| status[number]["layers"][0][field].clone();
    assert_eq!(layer(0, "diff_id"), layer(1, "diff_id"));
    assert_ne!(layer(0, "digest"), layer(1, "digest"));
    assert_eq!(daemon.status()["connections"], 1);
    for mnt in [&a, &b] {
        assert!(fs::read(mnt.join("a")).unwrap() == content);
    }
    // Nothing of one is taken for the other: they are two files to the kernel.
    let ino = |mnt: &Path| fs::metadata(mnt.join("a")).unwrap().ino();
    assert_ne!(ino(&a), ino(&b));
    daemon.end();
    stage.assert_clean();
}

/// As `headstart.socket` does: the socket is there before the daemon, and stays when it goes.
#[test]
fn a_socket_of_the_service_manager_is_served() {
    let stage = Stage::new();
    let path = stage.path("handed.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let plain = stage.program();
    let mut command = Command::new("sh");
    // The number of the process is known when it is the process.
    command
        .args(["-c", "exec 3<&0 0</dev/null; LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=snapshots exec \"$0\" \"$@\""]);
    command.arg(plain.get_program()).args(plain.get_args()).arg("daemon");
    for (name, value) in plain.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    let log = stage.path("daemon-handed.log");
    command.stdin(Stdio::from(std::os::fd::OwnedFd::from(listener.try_clone().unwrap())));
    let child = command.stdout(Stdio::null()).stderr(File::create(&log).unwrap()).spawn().unwrap();
    let daemon = Daemon { stage: &stage, child, log };
    wait_until("the daemon", || daemon.status()["ready"] == true);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(headstart::grpc::snapshotter_answers(&path)).unwrap();
    assert!(!stage.path("run/headstart.sock").exists(), "a second socket was opened");
    daemon.end();
    assert!(path.exists());
    drop(listener);
}
