//! Where containerd plays: one version of it with a root, a state and a socket of its own, a registry, our daemon, and
//! containers that are always taken away. Processes end by their identifiers, mounts by their paths.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, Mutex};

use base64::Engine as _;
use headstart::sys::mount::{Unmount, mount_table, unmount};
use headstart::tar::decompress::Compression;
use headstart::testkit::layouts::{TestLayer, write_layout};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::container::{Container, Seen};
use super::cri::Cri;
use crate::cli::stage::{Stage as Program, reference, wait_until};
use crate::registry_real::{Process, Registry, htpasswd};
use crate::transport::skopeo;

/// The name of our snapshotter in every configuration.
pub(super) const OURS: &str = "headstart";
/// The name of our differ in every configuration that has it.
const OUR_DIFFER: &str = "headstart-diff";
/// containerd's own, which shows how a tree has to look.
pub(super) const JUDGE: &str = "overlayfs";
/// Where the judge's images and containers are, in a namespace of their own.
const JUDGES_NAMESPACE: &str = "judge";
/// Where the runtime interface keeps everything.
pub(super) const K8S: &str = "k8s.io";

/// Longest time that `ctr` may take, in seconds.
const CTR_SECONDS: &str = "180";

/// Where `tools/containerd-versions` put them.
static VERSIONS: LazyLock<PathBuf> = LazyLock::new(|| {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/containerd-versions");
    let output = Command::new(&tool).output().unwrap();
    assert!(output.status.success(), "{tool:?} failed: {}", String::from_utf8_lossy(&output.stderr));
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
});

/// One of the three that are tested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    V1_6,
    V1_7,
    V2_1,
}

impl Version {
    pub(super) fn programs(self) -> PathBuf {
        let (suite, version) = match self {
            Self::V1_6 => ("bookworm", "1.6."),
            Self::V1_7 => ("trixie", "1.7."),
            Self::V2_1 => ("forky", "2."),
        };
        let directory = VERSIONS.join(suite);
        let found = fs::read_to_string(directory.join("version")).unwrap();
        assert!(found.starts_with(version), "{suite} has containerd {found}");
        directory.join("bin")
    }
}

/// What is not as in most tests.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setup<'a> {
    /// What stands below `[containerd]` in our configuration.
    pub(super) settings: &'a str,
    /// Who applies the layers of our snapshots.
    pub(super) differ: &'static str,
    /// Our snapshotter is declared to map ids.
    pub(super) maps_ids: bool,
    /// The registry wants [`PASSWORD`], see [`Stage::forget_the_password`].
    pub(super) password: bool,
}

impl Default for Setup<'_> {
    fn default() -> Self {
        Self { settings: "[fill]\nenabled = false\n", differ: "walking", maps_ids: false, password: false }
    }
}

/// The user and the password of [`Setup::password`].
pub(super) const PASSWORD: [&str; 2] = ["me", "hunter2"];

/// A network of pods that has an address and nothing else, as CNI wants to be told of it.
const NETWORK: &str = r#"#!/bin/sh
version=$(sed -n 's/.*"cniVersion": *"\([^"]*\)".*/\1/p')
case $CNI_COMMAND in
VERSION) echo '{"cniVersion": "1.0.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0"]}' ;;
ADD) echo "{\"cniVersion\": \"$version\", \"interfaces\": [{\"name\": \"$CNI_IFNAME\", \"sandbox\": \"$CNI_NETNS\"}],
  \"ips\": [{\"version\": \"4\", \"interface\": 0, \"address\": \"127.0.0.9/8\"}]}" ;;
esac
"#;

/// Who fetched how much of what, as the registry saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fetched {
    /// `/v2/NAME/blobs/DIGEST` or `/v2/NAME/manifests/TAG`.
    pub(super) path: String,
    pub(super) status: u16,
    pub(super) bytes: u64,
    pub(super) by_containerd: bool,
}

/// An image and the index of it and its converted form.
#[derive(Debug)]
pub(super) struct Twin {
    pub(super) plain: String,
    pub(super) lazy: String,
    /// Digests of the gzip layers.
    pub(super) layers: Vec<String>,
    /// Digests of the converted layers.
    pub(super) converted: Vec<String>,
}

/// A `hosts.toml` as containerd reads it: it wants a table of hosts.
fn hosts_of(host: &str) -> String {
    format!("server = \"http://{host}\"\n[host.\"http://{host}\"]\ncapabilities = [\"pull\", \"resolve\"]\n")
}

/// See the top of this file.
pub(super) struct Stage {
    version: Version,
    // In this order they end if a test fails: containers are ended first, by hand.
    containerd: Mutex<Option<Process>>,
    daemon: Mutex<Option<Process>>,
    registry: Registry,
    program: Program,
    /// Who applies the layers of our snapshots.
    differ: &'static str,
    /// Our snapshotter is declared to map ids.
    maps_ids: bool,
}

impl Stage {
    /// Everything runs: containerd with our snapshotter, our daemon and the registry.
    pub(super) fn new(version: Version) -> Self {
        Self::build(version, &Setup::default())
    }

    /// The same with our diff service.
    pub(super) fn applying(version: Version) -> Self {
        Self::build(version, &Setup { differ: OUR_DIFFER, ..Setup::default() })
    }

    /// From now on our diff service is asked, as after a change of containerd's configuration.
    pub(super) fn apply_from_now_on(&mut self) {
        self.stop_containerd();
        self.differ = OUR_DIFFER;
        fs::write(self.path("containerd.toml"), self.configuration()).unwrap();
        self.start_containerd();
    }

    /// The same as `setup` says.
    pub(super) fn build(version: Version, setup: &Setup<'_>) -> Self {
        let Setup { settings, differ, maps_ids, password } = *setup;
        let program = Program::new();
        let place = program.make("registry");
        // containerd would keep the roots of user namespaces out.
        program.make("c");
        let registry = Registry::start(&place, &if password { htpasswd(&place) } else { String::new() });
        let at = |name: &str| program.path(name);
        let text = format!(
            "run = {:?}\n[registry]\ncerts_d = [{:?}]\ndocker_config = {:?}\n[containerd]\naddress = {:?}\n{settings}",
            at("run"),
            at("certs.d"),
            at("docker-config.json"),
            at("c/sock")
        );
        fs::write(at("config.toml"), text).unwrap();
        let hosts = at("certs.d").join(registry.host());
        fs::create_dir_all(&hosts).unwrap();
        fs::write(hosts.join("hosts.toml"), hosts_of(&registry.host())).unwrap();
        if password {
            let login = base64::engine::general_purpose::STANDARD.encode(PASSWORD.join(":"));
            let text = format!("{{\"auths\": {{\"{}\": {{\"auth\": \"{login}\"}}}}}}", registry.host());
            fs::write(at("docker-config.json"), text).unwrap();
        }
        let (containerd, daemon) = (Mutex::default(), Mutex::default());
        let stage = Self { version, containerd, daemon, registry, program, differ, maps_ids };
        if maps_ids {
            stage.write_network();
        }
        fs::write(stage.path("containerd.toml"), stage.configuration()).unwrap();
        stage.start_daemon();
        stage.start_containerd();
        stage
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.program.path(name)
    }

    /// Nobody on this machine knows the registry's password from now on.
    pub(super) fn forget_the_password(&self) {
        fs::remove_file(self.path("docker-config.json")).unwrap();
    }

    fn write_network(&self) {
        let place = self.path("c/cni");
        fs::create_dir_all(&place).unwrap();
        let network = r#"{"cniVersion": "0.4.0", "name": "tests", "plugins": [{"type": "nothing"}]}"#;
        fs::write(place.join("10-tests.conflist"), network).unwrap();
        for name in ["nothing", "loopback"] {
            fs::write(place.join(name), NETWORK).unwrap();
            fs::set_permissions(place.join(name), fs::Permissions::from_mode(0o755)).unwrap();
        }
    }

    /// What `docs` tell an operator to write, for a machine without a network of containers and without privileges over
    /// resources.
    fn configuration(&self) -> String {
        let at = |name: &str| format!("{:?}", self.path(name));
        let (root, state, socket, ttrpc) = (at("c/root"), at("c/state"), at("c/sock"), at("c/ttrpc"));
        let (ours, certs, opt, cni) = (at("run/headstart.sock"), at("certs.d"), at("c/opt"), at("c/cni"));
        let sandbox = self.image("pause");
        let common = format!(
            "root = {root}\nstate = {state}\n\
             disabled_plugins = [\"io.containerd.nri.v1.nri\", \"io.containerd.snapshotter.v1.devmapper\"]\n\
             [grpc]\naddress = {socket}\n[ttrpc]\naddress = {ttrpc}\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = {opt}\n\
             [proxy_plugins.{OURS}]\ntype = \"snapshot\"\naddress = {ours}\n"
        );
        let common = match (self.maps_ids, self.version) {
            // 1.6 does not know the key.
            (true, Version::V1_7 | Version::V2_1) => format!("{common}capabilities = [\"remap-ids\"]\n"),
            _ => common,
        };
        let differ = self.differ;
        let common = match differ {
            // `ctr` of 1.7 and the runtime interface ask one differ after the other.
            OUR_DIFFER => format!(
                "{common}[proxy_plugins.{OUR_DIFFER}]\ntype = \"diff\"\naddress = {ours}\n\
                 [plugins.\"io.containerd.service.v1.diff-service\"]\ndefault = [\"{OUR_DIFFER}\", \"walking\"]\n"
            ),
            _ => common,
        };
        match self.version {
            Version::V1_6 | Version::V1_7 => format!(
                "version = 2\n{common}\
                 [plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"{sandbox}\"\nrestrict_oom_score_adj = true\n\
                 [plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"{OURS}\"\n\
                 disable_snapshot_annotations = false\n\
                 [plugins.\"io.containerd.grpc.v1.cri\".cni]\nbin_dir = {cni}\nconf_dir = {cni}\n\
                 [plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = {certs}\n"
            ),
            Version::V2_1 => {
                let root = at("root");
                format!(
                    "version = 3\n{common}\
                     [proxy_plugins.{OURS}.exports]\nroot = {root}\nenable_remote_snapshot_annotations = \"true\"\n\
                     [plugins.'io.containerd.transfer.v1.local']\nconfig_path = {certs}\n\
                     [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = \"linux/amd64\"\n\
                     snapshotter = \"{OURS}\"\ndiffer = \"{differ}\"\n\
                     [[plugins.'io.containerd.transfer.v1.local'.unpack_config]]\nplatform = \"linux/amd64\"\n\
                     snapshotter = \"{JUDGE}\"\ndiffer = \"walking\"\n\
                     [plugins.'io.containerd.cri.v1.images']\nsnapshotter = \"{OURS}\"\n\
                     [plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = \"{sandbox}\"\n\
                     [plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = {certs}\n\
                     [plugins.'io.containerd.cri.v1.runtime']\nrestrict_oom_score_adj = true\n\
                     [plugins.'io.containerd.cri.v1.runtime'.cni]\nbin_dirs = [{cni}]\nconf_dir = {cni}\n"
                )
            }
        }
    }

    // --- processes ---------------------------------------------------------------------------------------------------------

    pub(super) fn start_containerd(&self) {
        let programs = self.version.programs();
        let mut path = programs.clone().into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap());
        let mut command = Command::new(programs.join("containerd"));
        command.env("PATH", path).arg("--config").arg(self.path("containerd.toml"));
        command.arg("--root").arg(self.path("c/root")).arg("--state").arg(self.path("c/state"));
        command.arg("--address").arg(self.path("c/sock"));
        let containerd = Process::start(&mut command, &self.new_log("containerd"));
        *self.containerd.lock().unwrap() = Some(containerd);
        wait_until("containerd's answer", || self.ctr(&["version"]).is_ok());
        // Plugins may still start while the first calls are answered.
        wait_until("the runtime interface", || Cri::of(&self.path("c/sock")).is_ready());
    }

    /// Ends containerd as its service manager would; containers go on.
    pub(super) fn stop_containerd(&self) {
        self.containerd.lock().unwrap().take().expect("containerd runs").end(Signal::TERM);
    }

    pub(super) fn start_daemon(&self) {
        let mut command = self.program.program();
        let daemon = Process::start(command.arg("daemon"), &self.new_log("daemon"));
        let process = daemon.id();
        *self.daemon.lock().unwrap() = Some(daemon);
        wait_until("our daemon", || {
            let status: Value =
                serde_json::from_slice(&self.program.run(&["--json", "status"]).stdout).unwrap_or_default();
            status["daemon"]["ready"] == true && status["daemon"]["pid"] == process
        });
    }

    /// Ends our daemon as its service manager would.
    pub(super) fn stop_daemon(&self) {
        self.daemon.lock().unwrap().take().expect("our daemon runs").end(Signal::TERM);
    }

    /// Ends our daemon as a lack of memory would.
    pub(super) fn kill_daemon(&self) {
        self.daemon.lock().unwrap().take().expect("our daemon runs").end(Signal::KILL);
    }

    /// A directory for each container that has not been deleted: its namespace, in that its name.
    fn bundles(&self) -> Vec<PathBuf> {
        let below = |path: &Path| -> Vec<PathBuf> {
            fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
        };
        let namespaces = below(&self.path("c/state/io.containerd.runtime.v2.task"));
        namespaces.iter().flat_map(|namespace| below(namespace)).collect()
    }

    fn new_log(&self, name: &str) -> PathBuf {
        let mut paths = (0..).map(|number| self.path(&format!("{name}-{number}.log")));
        paths.find(|path| !path.exists()).expect("there are more numbers than logs")
    }

    /// The last lines of what `name` (`daemon`, `containerd`) said since it was started.
    pub(super) fn log(&self, name: &str) -> String {
        let paths = (0..).map(|number| self.path(&format!("{name}-{number}.log"))).take_while(|path| path.exists());
        let text = paths.last().map(|path| fs::read_to_string(path).unwrap()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    /// All that our daemons and containerd have ever said.
    pub(super) fn whole_logs(&self) -> String {
        let paths = |name: &'static str| (0..).map(move |number| self.path(&format!("{name}-{number}.log")));
        let of = |name| paths(name).map_while(|path| fs::read_to_string(path).ok()).collect::<String>();
        of("daemon") + &of("containerd")
    }

    pub(super) fn logs(&self) -> String {
        format!("our daemon said:\n{}\ncontainerd said:\n{}", self.log("daemon"), self.log("containerd"))
    }
    // --- containerd's clients -----------------------------------------------------------------------------------------------

    /// What `ctr` prints, or what it says if it fails.
    pub(super) fn ctr(&self, arguments: &[&str]) -> Result<String, String> {
        let mut command = Command::new("timeout");
        command.args(["--signal=KILL", CTR_SECONDS]).arg(self.version.programs().join("ctr"));
        command.arg("--address").arg(self.path("c/sock")).args(arguments);
        let output = command.output().expect("timeout is there");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        Err(format!("{arguments:?} ended with {}: {}{text}", output.status, String::from_utf8_lossy(&output.stderr)))
    }

    /// The same for a call that must succeed.
    #[track_caller]
    pub(super) fn ok(&self, arguments: &[&str]) -> String {
        self.ctr(arguments).unwrap_or_else(|error| panic!("{error}\n{}", self.logs()))
    }

    pub(super) fn cri(&self) -> Cri {
        Cri::of(&self.path("c/sock"))
    }

    /// The same with images by way of our proxy.
    pub(super) fn cri_proxy(&self) -> Cri {
        Cri::of(&self.path("run/cri.sock"))
    }

    /// Pulls through the runtime interface: into [`K8S`], with our snapshotter.
    #[track_caller]
    pub(super) fn cri_pull(&self, image: &str) {
        self.cri().pull(image).unwrap_or_else(|error| panic!("cannot pull {image}: {error}\n{}", self.logs()));
    }

    /// Pulls through `ctr`.
    #[track_caller]
    pub(super) fn ctr_pull(&self, namespace: &str, snapshotter: &str, image: &str) {
        self.ok(&["-n", namespace, "image", "pull", "--plain-http", "--snapshotter", snapshotter, image]);
    }

    /// Removes an image that was pulled through the runtime interface, with all of its names.
    #[track_caller]
    pub(super) fn cri_remove(&self, image: &str) {
        self.cri()
            .remove_image(image)
            .unwrap_or_else(|error| panic!("cannot remove {image}: {error}\n{}", self.logs()));
    }

    /// Removes an image and waits for the collection of what nobody needs.
    #[track_caller]
    pub(super) fn remove_image(&self, namespace: &str, image: &str) {
        self.ok(&["-n", namespace, "image", "rm", "--sync", image]);
    }

    /// The snapshots that containerd knows in a namespace: name, parent and kind.
    #[track_caller]
    pub(super) fn snapshots(&self, namespace: &str, snapshotter: &str) -> Vec<[String; 3]> {
        let text = self.ok(&["-n", namespace, "snapshots", "--snapshotter", snapshotter, "ls"]);
        let record = |line: &str| {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                [name, parent, kind] => [name, parent, kind].map(str::to_owned),
                [name, kind] => [name, "", kind].map(str::to_owned),
                _ => panic!("{line:?} is no snapshot"),
            }
        };
        text.lines().skip(1).map(record).collect()
    }

    /// For each committed snapshot of ours, what its layer was verified against; nothing for files.
    pub(super) fn anchors(&self) -> Vec<Option<String>> {
        let known: Value = serde_json::from_str(&self.program.ok(&["--json", "snapshots"])).unwrap();
        let snapshots = known["snapshots"].as_array().expect("it is a list").iter();
        let committed = snapshots.filter(|snapshot| snapshot["kind"] == "committed");
        committed.map(|snapshot| snapshot["layer"]["anchor"].as_str().map(str::to_owned)).collect()
    }

    /// What is known of the snapshots of ours that are layers.
    pub(super) fn layers(&self) -> Vec<Value> {
        let known: Value = serde_json::from_str(&self.program.ok(&["--json", "snapshots"])).unwrap();
        let snapshots = known["snapshots"].as_array().expect("it is a list");
        snapshots.iter().filter(|snapshot| snapshot["layer"].is_object()).cloned().collect()
    }

    /// Fails unless everything is gone that images and containers left, once all of them are removed.
    #[track_caller]
    pub(super) fn assert_bare(&self, namespaces: &[&str]) {
        for namespace in namespaces {
            wait_until("the collection of snapshots", || self.snapshots(namespace, OURS).is_empty());
        }
        let layers = self.path("run/l");
        wait_until("the end of mounts and snapshots", || {
            let known: Value = serde_json::from_str(&self.program.ok(&["--json", "snapshots"])).unwrap();
            let mounted = mount_table().unwrap().iter().any(|entry| entry.mount_point.starts_with(&layers));
            known["snapshots"].as_array().is_some_and(Vec::is_empty) && !mounted
        });
    }

    // --- images and containers ----------------------------------------------------------------------------------------------

    /// The reference of an image in the registry.
    pub(super) fn image(&self, name: &str) -> String {
        format!("{}/{name}:1", self.registry.host())
    }

    /// Pushes an image of gzip layers.
    pub(super) fn publish(&self, name: &str, tars: &[Vec<u8>]) -> String {
        let layers: Vec<TestLayer> = tars.iter().map(|tar| TestLayer::of_tar(tar, Compression::Gzip)).collect();
        let layout = self.path(&format!("layout-{name}"));
        write_layout(&layout, &layers).unwrap();
        let image = self.image(name);
        let to = format!("docker://{image}");
        self.skopeo(&["copy", "-q", "--dest-tls-verify=false", &reference(&layout), &to]);
        image
    }

    /// With the password that whoever publishes has.
    fn skopeo(&self, arguments: &[&str]) -> String {
        let logins = self.path("docker-config.json").display().to_string();
        let (command, rest) = arguments.split_first().expect("there is a command");
        match Path::new(&logins).exists() {
            true => skopeo(&[&[*command, "--authfile", &logins][..], rest].concat()),
            false => skopeo(arguments),
        }
    }

    /// Pushes an image of gzip layers, and an index of it and of its converted form under the tag `twin`. Returns both
    /// references.
    pub(super) fn publish_twin(&self, name: &str, tars: &[Vec<u8>]) -> Twin {
        let plain = self.publish(name, tars);
        let lazy = format!("{}/{name}:twin", self.registry.host());
        self.program.ok(&["convert", "--append", &format!("docker://{plain}"), &format!("docker://{lazy}")]);
        let raw = |image: &str| -> Value {
            let text = self.skopeo(&["inspect", "--tls-verify=false", "--raw", &format!("docker://{image}")]);
            serde_json::from_str(&text).unwrap()
        };
        let digests = |manifest: &Value| -> Vec<String> {
            let layers = manifest["layers"].as_array().expect("a manifest has layers");
            layers.iter().map(|layer| layer["digest"].as_str().expect("a layer has a digest").to_owned()).collect()
        };
        let manifests = raw(&lazy)["manifests"].as_array().expect("it is an index").clone();
        let converted = manifests[1]["digest"].as_str().expect("the second one is the converted one");
        let converted = raw(&format!("{}/{name}@{converted}", self.registry.host()));
        Twin { layers: digests(&raw(&plain)), converted: digests(&converted), plain, lazy }
    }

    /// A container that runs `sleep`.
    #[track_caller]
    pub(super) fn start(&self, namespace: &str, snapshotter: &str, image: &str) -> Container<'_> {
        self.try_start(namespace, snapshotter, image).unwrap_or_else(|error| panic!("{error}\n{}", self.logs()))
    }

    pub(super) fn try_start(&self, namespace: &str, snapshotter: &str, image: &str) -> Result<Container<'_>, String> {
        self.try_start_with(namespace, snapshotter, image, &["--net-host"])
    }

    /// The same with other options of `ctr run`.
    pub(super) fn try_start_with(
        &self,
        namespace: &str,
        snapshotter: &str,
        image: &str,
        options: &[&str],
    ) -> Result<Container<'_>, String> {
        // The runtime's own state and the control groups are everybody's.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("headstart-it-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let out = self.path(&format!("out-{id}"));
        fs::create_dir(&out).unwrap();
        // Whoever is root in the container.
        fs::set_permissions(&out, fs::Permissions::from_mode(0o777)).unwrap();
        // The runtime mounts an empty file system on /run: nothing of the image changes.
        let mount = format!("type=bind,src={},dst=/run/out,options=rbind:rw", out.display());
        let run = ["-n", namespace, "run", "--detach", "--snapshotter", snapshotter, "--mount", &mount];
        self.ctr(&[&run[..], options, &[image, &id, "sleep", "100000"]].concat())?;
        Ok(Container { stage: self, namespace: namespace.to_owned(), id })
    }

    /// What a container of `image` sees under containerd's own snapshotter, after a pull by way of `ctr`. Whoever counts what
    /// was fetched counts before.
    #[track_caller]
    pub(super) fn judge(&self, image: &str) -> Seen {
        self.ctr_pull(JUDGES_NAMESPACE, JUDGE, image);
        let container = self.start(JUDGES_NAMESPACE, JUDGE, image);
        let seen = container.sees();
        container.end();
        self.remove_image(JUDGES_NAMESPACE, image);
        seen
    }

    // --- the registry's log ---------------------------------------------------------------------------------------------------

    /// What was fetched so far. Waits until the log tells of everything that was answered before.
    pub(super) fn fetched(&self) -> Vec<Fetched> {
        static MARK: AtomicU32 = AtomicU32::new(0);
        let mark = format!("/v2/mark/manifests/m{}", MARK.fetch_add(1, Ordering::Relaxed));
        let mut stream = TcpStream::connect(self.registry.host()).unwrap();
        write!(stream, "GET {mark} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        stream.read_to_end(&mut Vec::new()).unwrap();
        let line = format!("\"GET {mark} ");
        wait_until("a line of the log", || self.registry.log().contains(&line));
        let fetched = |line: &str| {
            let (_, rest) = line.split_once("\"GET ")?;
            let (path, rest) = rest.split_once(" HTTP/1.1\" ")?;
            let mut words = rest.split(' ');
            let (status, bytes) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
            let by_containerd = rest.contains("\"containerd/");
            Some(Fetched { path: path.to_owned(), status, bytes, by_containerd })
        };
        self.registry.log().lines().filter_map(fetched).collect()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // A test that failed leaves containers behind; their shims and processes are children of nobody here.
        let socket = self.path("c/sock").into_os_string().into_encoded_bytes();
        let shims: Vec<i32> = processes().into_iter().filter(|&id| is_shim_of(id, &socket)).collect();
        let inside: Vec<i32> = processes().into_iter().filter(|&id| shims.contains(&parent_of(id))).collect();
        for id in inside.into_iter().chain(shims) {
            // It may have ended meanwhile.
            Pid::from_raw(id).map(|id| kill_process(id, Signal::KILL).ok());
        }
        drop(self.containerd.lock().unwrap().take());
        for bundle in self.bundles() {
            let names: Vec<_> = bundle.iter().rev().take(2).collect();
            let [id, namespace] = names[..] else { continue };
            let state = Path::new("/run/containerd/runc").join(namespace);
            Command::new("runc").arg("--root").arg(state).args(["delete", "--force"]).arg(id).output().ok();
        }
        let place = self.path("c");
        for entry in mount_table().unwrap_or_default().iter().rev() {
            if entry.mount_point.starts_with(&place) {
                unmount(&entry.mount_point, Unmount::Lazy).ok();
            }
        }
        drop(self.daemon.lock().unwrap().take());
    }
}

fn processes() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

fn is_shim_of(process: i32, socket: &[u8]) -> bool {
    let words = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
    let mut words = words.split(|&byte| byte == 0);
    words.next().is_some_and(|program| program.ends_with(b"containerd-shim-runc-v2"))
        && words.any(|word| word == socket)
}

/// 0 if it is gone.
fn parent_of(process: i32) -> i32 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    line.and_then(|id| id.trim().parse().ok()).unwrap_or(0)
}
