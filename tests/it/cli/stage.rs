//! What the tests of the program share: a root of its own, images, registries, mounts that are always taken away.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use headstart::model::{EntryKind, LayerEntry, Metadata, RelPath, Timestamp};
use headstart::sys::loopdev::loop_devices;
use headstart::sys::mount::{Unmount, mount_table, unmount};
use headstart::tar::decompress::Compression;
use headstart::testkit::layouts::{TestLayer, TestLayout, write_layout};
use headstart::testkit::tar::TarWriter;
pub(crate) use headstart::testkit::waiting::wait_until;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// A directory with a root in it. Everything that is mounted below goes with it.
pub(crate) struct Stage {
    dir: TempDir,
    /// Whether mounts are filled in the background.
    fills: bool,
}

impl Stage {
    pub(crate) fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("headstart-cli").tempdir().unwrap();
        // Other users have to get in for their tests.
        fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        Self { dir, fills: false }
    }

    /// The same with mounts that are filled in the background, after a moment.
    pub(super) fn with_fills() -> Self {
        let mut stage = Self::new();
        stage.fills = true;
        stage
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A new directory.
    pub(crate) fn make(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir(&path).unwrap();
        path
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.path("root")
    }

    /// The program with this stage's root and nobody's settings.
    pub(crate) fn program(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_headstart"));
        self.settle(&mut command);
        command
    }

    /// Keeps settings of the machine away from `command`.
    pub(crate) fn settle(&self, command: &mut Command) {
        let config = self.path("config.toml");
        if !config.exists() {
            let certs = self.path("certs.d");
            let login = self.path("docker-config.json");
            let run = self.path("run");
            let text = format!(
                "run = {run:?}\n[registry]\ncerts_d = [{certs:?}]\ndocker_config = {login:?}\nrounds = 2\n[fill]\n\
                 enabled = {}\n[daemon]\nkeep_mounts = false\n",
                self.fills
            );
            fs::write(&config, text).unwrap();
        }
        for name in [
            "HEADSTART_ROOT",
            "HEADSTART_CONFIG",
            "DOCKER_CONFIG",
            "XDG_DATA_HOME",
            "XDG_CONFIG_HOME",
            "NOTIFY_SOCKET",
            "FDSTORE",
        ] {
            command.env_remove(name);
        }
        command.env("HOME", self.dir.path()).env("NO_PROXY", "*");
        command.arg("--root").arg(self.root()).arg("--config").arg(config);
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.program().args(arguments).output().expect("the program starts")
    }

    /// What a command prints that must succeed.
    #[track_caller]
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments:?} failed with {}: {stderr}", output.status);
        String::from_utf8(output.stdout).expect("the program prints text")
    }

    /// What a command prints as JSON that must succeed.
    #[track_caller]
    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(arguments);
        serde_json::from_str(&self.ok(&all)).expect("the program prints JSON")
    }

    /// The exit code and the words of a command that must fail.
    #[track_caller]
    pub(crate) fn fails(&self, arguments: &[&str]) -> (i32, String) {
        let output = self.run(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let code = output.status.code().unwrap_or_else(|| panic!("{arguments:?} was killed: {stderr}"));
        assert_ne!(code, 0, "{arguments:?} succeeded");
        (code, stderr)
    }

    /// A layout of tar layers, and the same converted. Both are tagged `latest`.
    pub(crate) fn images(&self, tars: &[Vec<u8>]) -> (TestLayout, PathBuf) {
        self.images_at("source", "converted", tars)
    }

    /// The same with names for both directories.
    pub(crate) fn images_at(&self, source: &str, converted: &str, tars: &[Vec<u8>]) -> (TestLayout, PathBuf) {
        let layers: Vec<TestLayer> = tars.iter().map(|tar| TestLayer::of_tar(tar, Compression::Gzip)).collect();
        let layout = write_layout(&self.path(source), &layers).unwrap();
        let (from, to) = (reference(&self.path(source)), reference(&self.path(converted)));
        self.ok(&["convert", &from, &to]);
        (layout, self.path(converted))
    }

    /// Serves a layout until the answer is dropped.
    pub(crate) fn serve(&self, layout: &Path, options: &[&str]) -> Registry {
        let log = self.path(&format!("access-{}.log", fs::read_dir(self.dir.path()).unwrap().count()));
        let mut child = self
            .program()
            .args(["serve", &format!("oci:{}", layout.display()), "--listen", "127.0.0.1:0", "--access-log"])
            .arg(&log)
            .args(options)
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("it was asked for")).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("http://").expect("the address is told").to_owned();
        Registry { child, address, log }
    }

    /// Takes one record of `status --json`.
    #[track_caller]
    pub(crate) fn status(&self) -> Vec<Value> {
        self.json(&["status"])["mounts"].as_array().expect("mounts are a list").clone()
    }

    /// Nothing of this stage is mounted, no state is left, and nothing lies in the making.
    #[track_caller]
    pub(crate) fn assert_clean(&self) {
        // What the kernel presented goes when its last reader goes, and a daemon that lives does not wait for that.
        let run = self.root().join("run");
        let is_below = |path: &Path| path.starts_with(self.dir.path());
        wait_until("the end of kernel mounts", || {
            let mounted = mount_table().unwrap().iter().any(|entry| entry.mount_point.starts_with(&run));
            let devices = loop_devices().unwrap().iter().any(|device| is_below(&device.backing));
            let left = fs::read_dir(&run).map_or(0, Iterator::count);
            !mounted && !devices && left == 0
        });
        let table = mount_table().unwrap();
        let left: Vec<_> = table.iter().filter(|entry| entry.mount_point.starts_with(self.dir.path())).collect();
        assert!(left.is_empty(), "still mounted: {left:?}");
        for name in ["mounts", "tmp"] {
            let Ok(entries) = fs::read_dir(self.root().join(name)) else { continue };
            let left: Vec<PathBuf> =
                entries.map(|e| e.unwrap().path()).filter(|path| path.extension().is_none_or(|e| e != "log")).collect();
            assert!(left.is_empty(), "left behind: {left:?}");
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let Ok(table) = mount_table() else { return };
        for entry in table.iter().rev().filter(|entry| entry.mount_point.starts_with(self.dir.path())) {
            unmount(&entry.mount_point, Unmount::Lazy).ok();
        }
    }
}

/// `oci:DIR:latest`.
pub(crate) fn reference(layout: &Path) -> String {
    format!("oci:{}:latest", layout.display())
}

/// A running `headstart serve`.
pub(crate) struct Registry {
    child: Child,
    pub(crate) address: String,
    log: PathBuf,
}

/// One line of its access log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) range: String,
    pub(crate) status: u16,
    pub(crate) bytes: u64,
}

impl Registry {
    pub(crate) fn image(&self) -> String {
        format!("{}/some/image:latest", self.address)
    }

    /// Answers nobody until [`Registry::go_on`].
    pub(crate) fn pause(&self) {
        kill_process(Pid::from_child(&self.child), Signal::STOP).unwrap();
    }

    pub(crate) fn go_on(&self) {
        kill_process(Pid::from_child(&self.child), Signal::CONT).unwrap();
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let request = |line: &str| {
            let words: Vec<&str> = line.split(' ').skip(2).collect();
            let [method, path, range, status, bytes] = words[..] else { panic!("{line:?} is no line of the log") };
            Request {
                method: method.to_owned(),
                path: path.to_owned(),
                range: range.to_owned(),
                status: status.parse().unwrap(),
                bytes: bytes.parse().unwrap(),
            }
        };
        text.lines().map(request).collect()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// Bytes that no compressor makes smaller.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

pub(crate) fn entry(path: &str, kind: EntryKind, permissions: u16) -> LayerEntry {
    let metadata = Metadata {
        permissions,
        uid: 0,
        gid: 0,
        mtime: Timestamp { seconds: 1_700_000_000, nanos: 5 },
        xattrs: Vec::new(),
    };
    LayerEntry { path: RelPath::parse(path.as_bytes()).unwrap(), kind, metadata }
}

/// A tar of directories (a path that ends in a slash) and files.
pub(crate) fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = TarWriter::new();
    for (path, content) in files {
        match path.strip_suffix('/') {
            Some(path) => tar.entry(&entry(path, EntryKind::Directory, 0o755), b""),
            None => {
                let kind = EntryKind::Regular { size: content.len() as u64 };
                tar.entry(&entry(path, kind, 0o644), content)
            }
        };
    }
    tar.finish()
}
