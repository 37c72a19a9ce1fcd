//! Facts, from where they are. Decides nothing.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use tokio::runtime::Handle;

use super::advice::NAME;
use super::config::NodeConfig;
use super::containerd::{ContainerdFacts, Ours};
use super::node::{Answer, DaemonFacts, DiskFacts, KernelFacts, LoginFacts, NodeFacts, PlaceFacts};
use crate::control;
use crate::control::Client;
use crate::daemon::config::{Config, RegistryConfig};
use crate::daemon::host::left_behind;
use crate::daemon::left::is_kept;
use crate::daemon::mounts::Mounts;
use crate::daemon::place;
use crate::drivers::{Capabilities, Capability, Driver, Wanted};
use crate::grpc::{Containerd, ContainerdVersion, snapshotter_answers};
use crate::oci::Platform;
use crate::registry::faulty_hosts;
use crate::sys::idmap::try_mapped_overlay;
use crate::sys::loopdev::LoopDevice;
use crate::sys::mount::mount_table;
use crate::sys::stack::has_file_system;

/// Most bytes of a configuration file; real ones have some kilobytes.
const FILE_LIMIT: u64 = 1 << 20;

/// Where `headstart doctor` looks.
#[derive(Debug, Clone)]
pub struct Whereabouts {
    /// containerd's main configuration file.
    pub containerd_config: PathBuf,
    /// containerd's version, if it is not to be asked.
    pub containerd_version: Option<ContainerdVersion>,
    /// Where containerd answers.
    pub containerd_socket: PathBuf,
    /// Where our snapshotter answers, if it is to.
    pub snapshotter: Option<PathBuf>,
    /// Our own configuration file.
    pub config: PathBuf,
}

/// The version of the containerd that answers at `socket`, or else of the one in the search path.
///
/// # Errors
/// What was attempted and why it failed, as a sentence. None if there is no containerd.
pub fn ask_version(socket: &Path, runtime: &Handle) -> Option<Result<ContainerdVersion, String>> {
    if socket.exists()
        && let Ok(version) = runtime.block_on(async { Containerd::at(socket).version().await })
    {
        return Some(Ok(version));
    }
    match Command::new("containerd").arg("--version").output() {
        Err(error) if error.kind() == io::ErrorKind::NotFound && !socket.exists() => None,
        Err(error) => Some(Err(format!("cannot run `containerd --version`: {error}"))),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout);
            let wrong = || format!("cannot understand what `containerd --version` says: {:?}", said.trim());
            Some(ContainerdVersion::of_output(&said).ok_or_else(wrong))
        }
    }
}

/// The `version` that containerd's main configuration file says; none if there is no such file, or if it cannot be read.
pub fn main_file_version(file: &Path) -> Option<i64> {
    let table: toml::Table = toml::from_str(&read(file).ok()?).ok()?;
    table.get("version")?.as_integer()
}

/// The text of a file, which is not too long.
pub(super) fn read(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = File::open(path)?.take(FILE_LIMIT + 1).read_to_string(&mut text)?;
    match u64::try_from(read).is_ok_and(|read| read <= FILE_LIMIT) {
        true => Ok(text),
        false => Err(io::Error::new(io::ErrorKind::InvalidData, "the file is longer than 1 MiB")),
    }
}

pub(super) fn containerd(whereabouts: &Whereabouts, runtime: &Handle) -> ContainerdFacts {
    let main = &whereabouts.containerd_config;
    let config = NodeConfig::load(main);
    let version = match whereabouts.containerd_version {
        Some(version) => Some(Ok(version)),
        None => ask_version(&whereabouts.containerd_socket, runtime),
    };
    let read: BTreeSet<&Path> =
        config.iter().flat_map(|config| &config.files).map(|file| file.path.as_path()).collect();
    let beside = main.parent().map(|directory| directory.join("conf.d")).into_iter();
    let files = beside.flat_map(|directory| fs::read_dir(directory).into_iter().flatten().flatten());
    let speaks_of_us = |path: &PathBuf| {
        let text = self::read(path).unwrap_or_default();
        path.extension().is_some_and(|extension| extension == "toml") && text.contains(&format!("proxy_plugins.{NAME}"))
    };
    let idle = files.map(|entry| entry.path()).filter(|path| !read.contains(path.as_path()) && speaks_of_us(path));
    ContainerdFacts { version, main: main.clone(), idle: idle.collect(), config: config.clone() }
}

pub(super) fn ours(config: &Config, whereabouts: &Whereabouts) -> Ours {
    Ours {
        // One that is switched off would answer there.
        socket: config.containerd.socket.clone(),
        root: config.root.clone(),
        architecture: Platform::host().architecture,
        maps_ids: maps_ids(config),
        certs_d: config.registry.certs_d.clone(),
        file: whereabouts.config.clone(),
    }
}

/// Whether layers of this configuration can be shown under the ids of user namespaces on this machine.
pub fn maps_ids(config: &Config) -> bool {
    let places = [config.root.clone(), std::env::temp_dir()];
    let Some(scratch) = places.iter().find(|place| place.is_dir()) else { return false };
    config.containerd.driver != Wanted::Driver(Driver::Fuse) && try_mapped_overlay(scratch).is_ok()
}

pub(super) fn node(config: &Config, whereabouts: &Whereabouts, runtime: &Handle) -> NodeFacts {
    let table = mount_table().unwrap_or_default();
    NodeFacts {
        is_root: rustix::process::geteuid().is_root(),
        uid: rustix::process::geteuid().as_raw(),
        kernel: kernel(&config.root),
        places: [&config.root, &config.run].map(|path| place_of(path, &table)).to_vec(),
        disk: disk(config),
        daemon: daemon(config, whereabouts, runtime),
        login: login(&config.registry),
        hosts: faulty_hosts(&config.registry.certs_d),
    }
}

fn kernel(root: &Path) -> KernelFacts {
    let missing = |error: io::Error| Capability::missing(error.to_string());
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
    let fuse = has_file_system("fuse").and_then(|()| File::options().read(true).write(true).open("/dev/fuse"));
    let fuse = match fuse {
        Ok(_) => Capability::PRESENT,
        Err(error) => Capability::missing(format!("cannot open /dev/fuse: {error}")),
    };
    // Probing writes a small image, which the kernel may take from one file system and not from another: where layers are, or
    // else where the system keeps what nobody needs for long.
    let (capabilities, exchange) = match tempfile::tempdir_in(root).or_else(|_| tempfile::tempdir()) {
        Ok(scratch) => {
            let capabilities = Capabilities::probe(scratch.path());
            let exchange = match capabilities.loop_devices.reason() {
                None => exchange(scratch.path()),
                Some(why) => Capability::missing(why),
            };
            (capabilities, exchange)
        }
        Err(error) => (Capabilities::unknown(), missing(error)),
    };
    KernelFacts { passthrough: passthrough(&release), release, fuse, capabilities, exchange }
}

/// Tries to exchange the file behind a loop device.
fn exchange(scratch: &Path) -> Capability {
    let file = |name: &str| -> io::Result<(File, PathBuf)> {
        let path = scratch.join(name);
        fs::write(&path, [0; 4096])?;
        Ok((File::open(&path)?, path))
    };
    let (one, other) = match file("one").and_then(|one| Ok((one, file("other")?))) {
        Ok(files) => files,
        Err(error) => return Capability::missing(error.to_string()),
    };
    let tried = LoopDevice::attach(&one.0, &one.1, "headstart doctor")
        .and_then(|device| device.change_backing(&other.0, &other.1).map(|()| drop(device)));
    tried.map_or_else(|error| Capability::missing(format!("{:#}", anyhow::Error::new(error))), |()| Capability::PRESENT)
}

/// What the kernel's own configuration says, where it can be read.
fn passthrough(release: &str) -> Option<bool> {
    let text = fs::read_to_string(format!("/boot/config-{release}")).ok().or_else(|| {
        let mut text = String::new();
        let packed = File::open("/proc/config.gz").ok()?;
        flate2::read::GzDecoder::new(packed).take(FILE_LIMIT).read_to_string(&mut text).ok()?;
        Some(text)
    })?;
    Some(text.lines().any(|line| line == "CONFIG_FUSE_PASSTHROUGH=y"))
}

fn place_of(path: &Path, table: &[crate::sys::mount::MountEntry]) -> PlaceFacts {
    let found = match fs::metadata(path) {
        Ok(metadata) => Ok(Some((metadata.uid(), metadata.mode() & 0o7777))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.to_string()),
    };
    // The nearest one that exists, as the kernel names it.
    let existing = path.ancestors().find_map(|above| above.canonicalize().ok()).unwrap_or_else(|| PathBuf::from("/"));
    let below = table.iter().filter(|entry| existing.starts_with(&entry.mount_point));
    // Of mounts on one directory the last one shows.
    let mount = below.max_by_key(|entry| entry.mount_point.components().count());
    PlaceFacts {
        path: path.to_owned(),
        found,
        file_system: mount.map(|entry| entry.kind.clone()).unwrap_or_default(),
        options: mount.map(|entry| entry.options.clone()).unwrap_or_default(),
    }
}

fn disk(config: &Config) -> Result<DiskFacts, String> {
    let existing = config.root.ancestors().find(|above| above.exists()).unwrap_or(Path::new("/"));
    let figures = rustix::fs::statvfs(existing).map_err(|errno| errno.to_string())?;
    Ok(DiskFacts {
        size: figures.f_blocks.saturating_mul(figures.f_frsize),
        free: figures.f_bavail.saturating_mul(figures.f_frsize),
        reserve: config.reserve,
        quota: config.quota,
    })
}

fn daemon(config: &Config, whereabouts: &Whereabouts, runtime: &Handle) -> DaemonFacts {
    let holder = place::find(&config.root).ok().flatten();
    let silent = || Answer::Silent("nobody was asked".to_owned());
    let control =
        holder.as_ref().map_or_else(silent, |holder| match runtime.block_on(Client::new(&holder.socket).health()) {
            Ok(control::Health { ready: true, .. }) => Answer::Ready,
            Ok(_) => Answer::NotReady,
            Err(error) => Answer::Silent(format!("{:#}", anyhow::Error::new(error))),
        });
    let snapshotter = whereabouts.snapshotter.clone().filter(|_| holder.is_some()).map(|socket| {
        let answer = match runtime.block_on(snapshotter_answers(&socket)) {
            Ok(()) => Answer::Ready,
            Err(why) => Answer::Silent(why),
        };
        (socket, answer)
    });
    DaemonFacts {
        kept: holder.is_none() && is_kept(&config.run),
        pid: holder.map(|holder| holder.pid),
        control,
        snapshotter,
        leftovers: leftovers(&config.root, &config.run),
    }
}

fn leftovers(root: &Path, run: &Path) -> Vec<String> {
    let left = left_behind(root, run).unwrap_or_default().into_iter().flat_map(|(_, left)| left);
    let mut words: Vec<String> = left.map(|left| left.to_string()).collect();
    let dead = Mounts::look(root).unwrap_or_default().into_iter().filter(|entry| !entry.alive);
    words.extend(dead.map(|entry| format!("the mount on {}", entry.record.mount_point.display())));
    words
}

fn login(registry: &RegistryConfig) -> LoginFacts {
    let path = registry.docker_config.clone();
    let found = match (read(&path), fs::metadata(&path)) {
        (Err(error), _) | (_, Err(error)) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        (Err(error), _) | (_, Err(error)) => Err(error.to_string()),
        (Ok(text), Ok(metadata)) => match serde_json::from_str::<serde_json::Value>(&text) {
            // The parser's words could quote a password.
            Err(error) => Err(format!("line {} is no JSON", error.line())),
            Ok(said) => {
                let table = |key: &str| said.get(key).and_then(serde_json::Value::as_object);
                let is_login = |entry: &serde_json::Value| entry.as_object().is_some_and(|entry| !entry.is_empty());
                let logins = table("auths").is_some_and(|auths| auths.values().any(is_login));
                let named = table("credHelpers").into_iter().flat_map(|helpers| helpers.values());
                let named: BTreeSet<&str> = named
                    .chain(said.get("credsStore"))
                    .filter_map(serde_json::Value::as_str)
                    .filter(|n| !n.is_empty())
                    .collect();
                let programs = named.into_iter().map(|name| format!("docker-credential-{name}"));
                Ok(Some((metadata.mode() & 0o7777, logins, programs.filter(|program| !is_program(program)).collect())))
            }
        },
    };
    LoginFacts { path, found }
}

/// Whether the search path has a program of this name.
fn is_program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(name).is_file())
}
