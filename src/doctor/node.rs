//! What is to be done about everything but containerd: kernel, places, registries, the daemon. Rules over facts.

use std::path::{Path, PathBuf};

use super::finding::{Finding, Remedy};
use crate::drivers::{Capabilities, Capability};

/// What the kernel can.
#[derive(Debug, Clone)]
pub(super) struct KernelFacts {
    pub(super) release: String,
    pub(super) fuse: Capability,
    pub(super) capabilities: Capabilities,
    /// Whether the file behind a loop device can be exchanged.
    pub(super) exchange: Capability,
    /// Whether the kernel was built with FUSE passthrough; none if it does not tell.
    pub(super) passthrough: Option<bool>,
}

/// A directory of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PlaceFacts {
    pub(super) path: PathBuf,
    /// Owner and mode, if it exists; or why it cannot be looked at.
    pub(super) found: Result<Option<(u32, u32)>, String>,
    /// What kind of file system it is on, or will be.
    pub(super) file_system: String,
    /// Options of that mount.
    pub(super) options: String,
}

/// How full the disk of the root is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DiskFacts {
    pub(super) size: u64,
    pub(super) free: u64,
    pub(super) reserve: u64,
    pub(super) quota: Option<u64>,
}

/// A socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// Somebody answers.
    Ready,
    /// Somebody answers, and is not ready.
    NotReady,
    /// Nobody does, for this reason.
    Silent(String),
}

/// The daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DaemonFacts {
    /// The process that has the root, if there is one.
    pub(super) pid: Option<u32>,
    pub(super) control: Answer,
    /// The socket of the snapshotter, if there is to be one and a daemon, and whether it answers.
    pub(super) snapshotter: Option<(PathBuf, Answer)>,
    /// There is no daemon, and somebody keeps the connection of the one before for the next.
    pub(super) kept: bool,
    /// What killed processes left, in words.
    pub(super) leftovers: Vec<String>,
}

/// Docker's file of logins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LoginFacts {
    pub(super) path: PathBuf,
    /// Mode, whether logins stand in it, and helpers that are named and not in the search path; none if there is no file.
    pub(super) found: Result<Option<(u32, bool, Vec<String>)>, String>,
}

/// Everything.
#[derive(Debug, Clone)]
pub(super) struct NodeFacts {
    pub(super) is_root: bool,
    pub(super) uid: u32,
    pub(super) kernel: KernelFacts,
    pub(super) places: Vec<PlaceFacts>,
    pub(super) disk: Result<DiskFacts, String>,
    pub(super) daemon: DaemonFacts,
    pub(super) login: LoginFacts,
    /// Files of hosts that cannot be used, and why.
    pub(super) hosts: Vec<(PathBuf, String)>,
}

/// What to do.
pub(super) fn examine(facts: &NodeFacts) -> Vec<Finding> {
    let mut findings = kernel(&facts.kernel, facts.is_root);
    for place in &facts.places {
        findings.push(self::place(place, facts.uid));
    }
    findings.extend(disk(&facts.disk));
    findings.extend(daemon(&facts.daemon, facts.is_root));
    findings.extend(login(&facts.login));
    findings.extend(hosts(&facts.hosts));
    findings
}

fn kernel(facts: &KernelFacts, is_root: bool) -> Vec<Finding> {
    let Capabilities { root: _, erofs, file_backed, loop_devices, overlay } = &facts.capabilities;
    let mut findings = Vec::new();
    let module = |name: &str| Remedy::run(format!("modprobe {name}"));
    findings.push(match facts.fuse.reason() {
        None => Finding::good("kernel.fuse", format!("Linux {} serves FUSE", facts.release)),
        Some(why) => Finding::must("kernel.fuse", format!("nothing can be mounted lazily: {why}")).with(module("fuse")),
    });
    if !is_root {
        let what =
            "only root has the drivers `kernel` and `local`, and can be asked about them: others mount through FUSE";
        findings.push(Finding::note("kernel.drivers", what));
        return findings;
    }
    findings.push(match erofs.reason() {
        None => Finding::good("kernel.erofs", "the kernel reads EROFS"),
        Some(why) => {
            let what = format!("what is local is read through FUSE, not by the kernel: {why}");
            Finding::should("kernel.erofs", what).with(module("erofs"))
        }
    });
    findings.push(match overlay.reason() {
        None => Finding::good("kernel.overlay", "the kernel stacks layers"),
        Some(why) => Finding::must("kernel.overlay", format!("containers have no writable file system: {why}"))
            .with(module("overlay")),
    });
    findings.push(match (loop_devices.reason(), facts.exchange.reason()) {
        (None, None) => {
            Finding::good("kernel.loop", "loop devices work, and the file behind one can be exchanged (LOOP_CHANGE_FD)")
        }
        (Some(why), _) => {
            let what = format!("lazy layers are shown through FUSE until they are local: {why}");
            Finding::should("kernel.loop", what).with(module("loop"))
        }
        (None, Some(why)) => {
            Finding::should("kernel.loop", format!("layers that become local are not handed over to the kernel: {why}"))
        }
    });
    findings.push(match (file_backed.reason(), loop_devices.reason()) {
        (None, _) => Finding::good("kernel.erofs-files", "the kernel mounts EROFS images that are regular files"),
        (Some(_), None) => Finding::note(
            "kernel.erofs-files",
            "EROFS images that are regular files need loop devices before Linux 6.12",
        ),
        (Some(why), Some(_)) => {
            Finding::should("kernel.erofs-files", format!("local layers are read through FUSE: {why}"))
        }
    });
    let what = match facts.passthrough {
        Some(true) => "the kernel was built with FUSE passthrough (not used yet)",
        Some(false) => "the kernel was built without FUSE passthrough (not used yet)",
        None => "the kernel does not tell whether it was built with FUSE passthrough (not used yet)",
    };
    findings.push(Finding::note("kernel.fuse-passthrough", what));
    findings
}

/// File systems that cannot hold the directories which overlayfs writes to (`Documentation/filesystems/overlayfs.rst`, "Upper
/// and lower": extended attributes `trusted.` and file types in listings are needed).
const NO_UPPER: &[&str] = &["overlay", "nfs", "nfs4", "cifs", "vfat", "msdos", "exfat", "9p", "squashfs", "iso9660"];

fn place(facts: &PlaceFacts, uid: u32) -> Finding {
    const CHECK: &str = "place";
    let PlaceFacts { path, found, file_system, options } = facts;
    let shown = path.display();
    let has = |wanted: &str| options.split(',').any(|option| option == wanted);
    match found {
        Err(why) => Finding::must(CHECK, format!("cannot look at {shown}: {why}")),
        _ if NO_UPPER.contains(&file_system.as_str()) => {
            let what = format!("{shown} is on {file_system}, on which overlayfs cannot write: choose another root");
            Finding::must(CHECK, what)
        }
        _ if has("ro") => Finding::must(CHECK, format!("{shown} is on a file system that is mounted read-only")),
        Ok(None) => Finding::good(CHECK, format!("{shown} is made when it is needed, on {file_system}")),
        Ok(Some((owner, _))) if *owner != uid => {
            let what = format!("{shown} belongs to user {owner}: whoever that is can change what containers read");
            Finding::must(CHECK, what).with(Remedy::run(format!("chown {uid} {}", quoted(path))))
        }
        Ok(Some((_, mode))) if mode & 0o022 != 0 => {
            let what = format!("others may write into {shown} (mode {mode:04o})");
            Finding::must(CHECK, what).with(Remedy::run(format!("chmod go-w {}", quoted(path))))
        }
        Ok(Some(_)) => Finding::good(CHECK, format!("{shown} is there, on {file_system}")),
    }
}

fn disk(facts: &Result<DiskFacts, String>) -> Vec<Finding> {
    const CHECK: &str = "disk";
    let DiskFacts { size, free, reserve, quota } = match facts {
        Ok(facts) => *facts,
        Err(why) => return vec![Finding::must(CHECK, format!("cannot ask how full the disk is: {why}"))],
    };
    let shown = |bytes: u64| indicatif::HumanBytes(bytes).to_string();
    let mut findings = Vec::new();
    if free < reserve {
        let what = format!(
            "{} are free, less than the reserve of {}: nothing is filled any more",
            shown(free),
            shown(reserve)
        );
        findings.push(Finding::must(CHECK, what).with(Remedy::run("headstart prune")));
    } else if free - reserve < size / 50 {
        let what = format!("{} are free of {}, {} of them in reserve", shown(free), shown(size), shown(reserve));
        findings.push(Finding::should(CHECK, what).with(Remedy::run("headstart prune --all")));
    } else {
        findings.push(Finding::good(CHECK, format!("{} are free of {}", shown(free), shown(size))));
    }
    if let Some(quota) = quota.filter(|quota| *quota > size) {
        let what =
            format!("store.quota is {}, more than the disk has: only the reserve limits the cache", shown(quota));
        findings.push(Finding::note(CHECK, what));
    }
    findings
}

fn daemon(facts: &DaemonFacts, is_root: bool) -> Vec<Finding> {
    const CHECK: &str = "daemon";
    let mut findings = Vec::new();
    let start = || Remedy::run("systemctl enable --now headstart.service");
    let look = || Remedy::run("journalctl -u headstart.service");
    match (facts.pid, &facts.control) {
        (None, _) if facts.kept => {
            let what = "no daemon runs, and readers of what the one before has left wait for the next";
            findings.push(Finding::must(CHECK, what).with(start()));
        }
        (None, _) if is_root => {
            let what = "no daemon runs: containerd finds no snapshotter, and `mount` serves each mount by itself";
            findings.push(Finding::should(CHECK, what).with(start()));
        }
        (None, _) => findings.push(Finding::note(CHECK, "no daemon runs: `mount` serves each mount by itself")),
        (Some(pid), Answer::Ready) => findings.push(Finding::good(CHECK, format!("the daemon runs (process {pid})"))),
        (Some(pid), Answer::NotReady) => {
            let what = format!("the daemon (process {pid}) begins or ends at this moment");
            findings.push(Finding::should(CHECK, what));
        }
        (Some(pid), Answer::Silent(why)) => {
            let what = format!("the daemon (process {pid}) does not answer: {why}");
            findings.push(Finding::must(CHECK, what).with(look()));
        }
    }
    if let Some((socket, answer)) = &facts.snapshotter {
        let socket = socket.display();
        findings.push(match answer {
            Answer::Ready => Finding::good("daemon.socket", format!("{socket} answers")),
            Answer::NotReady => Finding::should("daemon.socket", format!("{socket} is not ready")),
            Answer::Silent(why) => {
                let what = format!("containerd gets no answer at {socket}: {why}");
                Finding::must("daemon.socket", what).with(look())
            }
        });
    }
    // What is kept is the next daemon's.
    if !facts.leftovers.is_empty() && !facts.kept {
        let what = format!("killed processes left {} behind", facts.leftovers.join(", "));
        findings.push(Finding::should("leftovers", what).with(Remedy::run("headstart cleanup")));
    }
    findings
}

fn login(facts: &LoginFacts) -> Vec<Finding> {
    const CHECK: &str = "registry.logins";
    let path = facts.path.display();
    let (mode, logins, helpers) = match &facts.found {
        Err(why) => return vec![Finding::must(CHECK, format!("no login is known: cannot use {path}: {why}"))],
        Ok(None) => return vec![Finding::note(CHECK, format!("there is no {path}: nobody is logged in"))],
        Ok(Some(found)) => found,
    };
    let mut findings = Vec::new();
    if *logins && mode & 0o077 != 0 {
        let what = format!("others may read the passwords in {path} (mode {mode:04o})");
        findings.push(Finding::must(CHECK, what).with(Remedy::run(format!("chmod 600 {}", quoted(&facts.path)))));
    }
    for helper in helpers {
        findings.push(Finding::must(
            CHECK,
            format!("{path} names the credential helper {helper}, which is not in the search path"),
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::good(CHECK, format!("{path} can be used")));
    }
    findings
}

fn hosts(faults: &[(PathBuf, String)]) -> Vec<Finding> {
    const CHECK: &str = "registry.hosts";
    if faults.is_empty() {
        return vec![Finding::good(CHECK, "all hosts.toml can be used")];
    }
    faults.iter().map(|(path, why)| Finding::must(CHECK, format!("{}: {why}", path.display()))).collect()
}

/// A path as a shell takes it.
fn quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
    if text.chars().all(plain) { text.into_owned() } else { format!("'{}'", text.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests;
