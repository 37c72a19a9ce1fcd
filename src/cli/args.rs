//! What can be said on the command line. Parsing only: nothing here acts.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::daemon::config::LogLevel;
use crate::drivers::{self, Wanted};
use crate::grpc::ContainerdVersion;
use crate::oci::{Platform, Reference};
use crate::serve::Bandwidth;

/// Lazy container file systems: mount an OCI image before it has arrived.
#[derive(Debug, Parser)]
#[command(name = "headstart", version, max_term_width = 110)]
#[command(
    after_help = "Images are named as skopeo does: docker://HOST/REPO:TAG (or without docker://), oci:DIR[:TAG], \
                        oci-archive:FILE, docker-archive:FILE. Exit codes are described in docs/operations.md."
)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
pub(crate) struct Global {
    /// Where layers, state and logs are kept [default: /var/lib/headstart; of an ordinary user ~/.local/share/headstart]
    #[arg(long, global = true, value_name = "DIR", env = "HEADSTART_ROOT")]
    pub(crate) root: Option<PathBuf>,
    /// Configuration file [default: /etc/headstart/config.toml; of an ordinary user ~/.config/headstart/config.toml]
    #[arg(long, global = true, value_name = "FILE", env = "HEADSTART_CONFIG")]
    pub(crate) config: Option<PathBuf>,
    /// How much is logged
    #[arg(long, global = true, value_enum, value_name = "LEVEL")]
    pub(crate) log_level: Option<Level>,
    /// Print data (and errors) as JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
}

/// The words of `--log-level`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Level {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

impl From<Level> for LogLevel {
    fn from(level: Level) -> Self {
        match level {
            Level::Error => Self::Error,
            Level::Warn => Self::Warn,
            Level::Info => Self::Info,
            Level::Debug => Self::Debug,
            Level::Trace => Self::Trace,
        }
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(name = "containerd-config")]
    ContainerdConfig(ContainerdConfig),
    Convert(Convert),
    Daemon(Daemon),
    Doctor(Doctor),
    Mount(Mount),
    #[command(alias = "unmount")]
    Umount(Umount),
    Pull(Pull),
    Wait(Wait),
    Prune(Prune),
    Forget(Forget),
    Inspect(Inspect),
    Check(Check),
    Ls(Ls),
    Cat(Cat),
    Status(Status),
    Snapshots(Snapshots),
    Cleanup(Cleanup),
    Serve(Serve),
    #[command(hide = true)]
    Hold(Hold),
    Completions(Completions),
    Man(Man),
}

/// Print what containerd's configuration needs so that this is its snapshotter, each line with its reason.
///
/// The root and the socket are those of this configuration. containerd reads its own only when it starts.
#[derive(Debug, Args)]
pub(crate) struct ContainerdConfig {
    /// For this version of containerd, for example 1.7 or 2.1.4 [default: what `containerd --version` says]
    #[arg(long, value_name = "VERSION")]
    pub(crate) version: Option<ContainerdVersion>,
    /// containerd's main configuration file, whose format version is kept
    #[arg(long, value_name = "FILE", default_value = "/etc/containerd/config.toml")]
    pub(crate) file: PathBuf,
    /// Only what may stand in a file that the main one imports: all of it from 2.0 on, not CRI's settings before
    #[arg(long)]
    pub(crate) drop_in: bool,
}

/// Look for what keeps this machine from lazy images: kernel, disk, registries, the daemon, containerd's configuration.
///
/// Changes nothing. Each finding says what to write or to run. Exits with 1 if something must be done.
#[derive(Debug, Args)]
pub(crate) struct Doctor {
    /// containerd's main configuration file
    #[arg(long, value_name = "FILE", default_value = "/etc/containerd/config.toml")]
    pub(crate) containerd_config: PathBuf,
    /// Take containerd for this version instead of asking it
    #[arg(long, value_name = "VERSION")]
    pub(crate) containerd_version: Option<ContainerdVersion>,
    /// Tell only what is not as it should be
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

/// Convert an image into one that can be mounted lazily.
///
/// Reads SOURCE, rebuilds each layer as an EROFS image in chunks, and writes the result to DEST. Both are image references;
/// DEST may be docker:// or oci:. The same source always gives the same result.
#[derive(Debug, Args)]
pub(crate) struct Convert {
    /// The image to read
    pub(crate) source: Reference,
    /// Where the converted image goes
    pub(crate) dest: Reference,
    /// Which image of a multi-platform source [default: this machine's]
    #[arg(long, value_name = "PLATFORM", conflicts_with = "all_platforms")]
    pub(crate) platform: Option<Platform>,
    /// Convert every platform of a multi-platform source
    #[arg(long)]
    pub(crate) all_platforms: bool,
    /// Publish an index with the original manifest first and the converted one second, for runtimes of both kinds
    #[arg(long)]
    pub(crate) append: bool,
    /// Write media types and annotations for this runtime instead of the specification's
    #[arg(long, value_enum, value_name = "FORM")]
    pub(crate) compat: Option<Compat>,
    /// Largest chunk of file data [default: chosen by the converter]
    #[arg(long, value_name = "BYTES", value_parser = size)]
    pub(crate) chunk_size: Option<u64>,
    /// zstd level, 1 to 22 [default: chosen by the converter]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(i32).range(1..=22))]
    pub(crate) level: Option<i32>,
    /// Lay these files out first, in this order: one path a line, what a start reads. They arrive in few requests
    #[arg(long, value_name = "FILE")]
    pub(crate) profile: Option<PathBuf>,
    /// Threads to work with [default: one per processor]
    #[arg(long, short, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) jobs: Option<u16>,
}

/// The words of `--compat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Compat {
    /// containerd 2.3's media types of EROFS layers; the blobs are the same bytes.
    #[value(name = "containerd-2.3")]
    Containerd23,
}

/// Serve mounts until a signal asks for the end; `mount` and the other commands use it while it runs.
///
/// There is one for each root. SIGTERM ends it and its mounts, SIGHUP has it read log level, logins and hosts again. What a
/// killed one had mounted is mounted again by the next.
#[derive(Debug, Args)]
pub(crate) struct Daemon {}

/// Mount an image; its layers are fetched when they are read.
///
/// Returns when the mount is usable. The daemon of this root serves it, or, where none runs, a process of its own, until
/// `headstart umount DIR`.
#[derive(Debug, Args)]
pub(crate) struct Mount {
    /// The image to mount: of one that `headstart convert` (or another EROFS converter) made, layers come when they are
    /// read; of any other, all of it comes first
    pub(crate) image: Reference,
    /// The directory to mount it on
    pub(crate) dir: PathBuf,
    /// How the image is presented
    #[arg(long, value_enum, default_value_t = Driver::Auto)]
    pub(crate) driver: Driver,
    /// Stack a writable layer on top (root only); what is written is kept in DIR/upper
    #[arg(long, value_name = "DIR")]
    pub(crate) upper: Option<PathBuf>,
    /// Bring only what is read; do not complete the image in the background
    #[arg(long)]
    pub(crate) no_fill: bool,
    /// Serve from this process until it is interrupted
    #[arg(long)]
    pub(crate) foreground: bool,
    /// Serve from a process of its own even if the daemon runs
    #[arg(long)]
    pub(crate) no_daemon: bool,
    /// Which image of a multi-platform one [default: this machine's]
    #[arg(long, value_name = "PLATFORM")]
    pub(crate) platform: Option<Platform>,
    /// Set by `mount` for the process it starts: the standard output is the pipe on which readiness is told.
    #[arg(long, hide = true)]
    pub(crate) serving_process: bool,
}

/// The words of `--driver`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Driver {
    /// The best that works: local if all layers are here, else kernel, else fuse
    Auto,
    /// The kernel asks a process for everything: works on every kernel with FUSE, and for ordinary users
    Fuse,
    /// The kernel reads layers that are filled as it reads them, and forgets the process when they are complete (root only)
    Kernel,
    /// The kernel reads complete layers (root only)
    Local,
}

impl From<Driver> for Wanted {
    fn from(driver: Driver) -> Self {
        match driver {
            Driver::Auto => Self::Auto,
            Driver::Fuse => Self::Driver(drivers::Driver::Fuse),
            Driver::Kernel => Self::Driver(drivers::Driver::Kernel),
            Driver::Local => Self::Driver(drivers::Driver::Local),
        }
    }
}

/// Find and remove what killed processes left: mounts, loop devices, records.
///
/// What belongs to a process that lives is not touched. A mount that is in use stays, with all that it needs.
#[derive(Debug, Args)]
pub(crate) struct Cleanup {
    /// Only tell what there is
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Take mounts away even while files in them are open
    #[arg(long)]
    pub(crate) lazy: bool,
}

/// End a mount, also one whose serving process has died.
#[derive(Debug, Args)]
pub(crate) struct Umount {
    /// The directory it is mounted on
    pub(crate) dir: PathBuf,
    /// Take it away even while files are open; it ends when the last one is closed
    #[arg(long, short)]
    pub(crate) lazy: bool,
}

/// Bring all of an image here, without mounting it.
///
/// Returns when every layer is complete, verified and safe on disk; a mount of it then needs no registry.
#[derive(Debug, Args)]
pub(crate) struct Pull {
    /// The image
    pub(crate) image: Reference,
    /// Which image of a multi-platform one [default: this machine's]
    #[arg(long, value_name = "PLATFORM")]
    pub(crate) platform: Option<Platform>,
}

/// Wait until all of a mounted image is here.
#[derive(Debug, Args)]
pub(crate) struct Wait {
    /// The directory it is mounted on
    pub(crate) dir: PathBuf,
    /// Give up after this many seconds
    #[arg(long, value_name = "SECONDS")]
    pub(crate) timeout: Option<u64>,
}

/// Make the cache smaller: remove layers that nobody uses, the least recently used first.
///
/// Without --all as many go as the configured quota and reserve of free space ask for; if those that nobody uses are not
/// enough, the daemon takes parts of layers in use as well, which come again when they are read.
#[derive(Debug, Args)]
pub(crate) struct Prune {
    /// Remove everything that nobody uses
    #[arg(long)]
    pub(crate) all: bool,
    /// Only tell what would go
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Forget a pulled image: its record, and the snapshots that nothing else needs.
///
/// Its layers stay in the cache until room is needed, unless --prune is given.
#[derive(Debug, Args)]
pub(crate) struct Forget {
    /// The image, as it was pulled
    pub(crate) image: Reference,
    /// Remove its layers as well, as far as nobody uses them
    #[arg(long)]
    pub(crate) prune: bool,
}

/// Show an image's layers: kind, chunks, sizes, ratio, and how much of each is here and verified.
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// The image
    pub(crate) image: Reference,
    /// Which image of a multi-platform one [default: this machine's]
    #[arg(long, value_name = "PLATFORM")]
    pub(crate) platform: Option<Platform>,
}

/// Verify an image: every digest, every chunk, every inode. Exits with 1 and the places that are wrong.
#[derive(Debug, Args)]
pub(crate) struct Check {
    /// The image
    pub(crate) image: Reference,
    /// Which image of a multi-platform one [default: this machine's]
    #[arg(long, value_name = "PLATFORM")]
    pub(crate) platform: Option<Platform>,
}

/// List a directory of an image without mounting it.
#[derive(Debug, Args)]
pub(crate) struct Ls {
    /// The image
    pub(crate) image: Reference,
    /// What to list; links inside of the image are followed
    #[arg(default_value = "/")]
    pub(crate) path: PathBuf,
    /// One line per entry with mode, owner, size and time
    #[arg(long, short)]
    pub(crate) long: bool,
    /// Which image of a multi-platform one [default: this machine's]
    #[arg(long, value_name = "PLATFORM")]
    pub(crate) platform: Option<Platform>,
}

/// Write a file of an image to the standard output without mounting it.
#[derive(Debug, Args)]
pub(crate) struct Cat {
    /// The image
    pub(crate) image: Reference,
    /// The file; links inside of the image are followed
    pub(crate) path: PathBuf,
    /// Which image of a multi-platform one [default: this machine's]
    #[arg(long, value_name = "PLATFORM")]
    pub(crate) platform: Option<Platform>,
}

/// Show every mount of this root and how much of each layer is here.
#[derive(Debug, Args)]
pub(crate) struct Status {}

/// Show the snapshots of this root: what is committed, what fills, and what each takes on disk.
#[derive(Debug, Args)]
pub(crate) struct Snapshots {}

/// Serve an image layout as a read-only registry, for experiments and machines without a network.
///
/// Every repository name shows the same layout. With --latency and --bandwidth it behaves like a registry at the far end of
/// one link.
#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// The layout: oci:DIR
    pub(crate) layout: Reference,
    /// Address to listen on; port 0 takes a free one and prints it
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:5000")]
    pub(crate) listen: SocketAddr,
    /// Round-trip time in milliseconds: each request and each new connection waits for it
    #[arg(long, value_name = "MS", default_value = "0", value_parser = milliseconds)]
    pub(crate) latency: Duration,
    /// Capacity shared by all answers, for example 1Gbit or 20MB (per second)
    #[arg(long, value_name = "RATE")]
    pub(crate) bandwidth: Option<Bandwidth>,
    /// Append a line per request to this file: time, peer, method, path, range, status, bytes
    #[arg(long, value_name = "FILE")]
    pub(crate) access_log: Option<PathBuf>,
}

/// Keep the descriptors of a FUSE connection while there is no daemon. The daemon starts this.
#[derive(Debug, Args)]
pub(crate) struct Hold {
    /// The daemon's run directory
    #[arg(long, value_name = "DIR")]
    pub(crate) run: PathBuf,
    /// How long to wait for the next daemon
    #[arg(long, value_name = "SECONDS")]
    pub(crate) patience: u64,
}

/// Print a completion script for a shell.
#[derive(Debug, Args)]
pub(crate) struct Completions {
    /// The shell
    pub(crate) shell: clap_complete::Shell,
}

/// Write the manual pages into a directory.
#[derive(Debug, Args)]
pub(crate) struct Man {
    /// The directory; without one the main page goes to the standard output
    pub(crate) dir: Option<PathBuf>,
}

fn milliseconds(text: &str) -> Result<Duration, String> {
    let number = text.strip_suffix("ms").unwrap_or(text);
    number.parse().map(Duration::from_millis).map_err(|_| "write a whole number of milliseconds, for example 20".into())
}

fn size(text: &str) -> Result<u64, String> {
    crate::daemon::config::parse_size(text).map_err(str::to_owned)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definitions_agree_with_each_other() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn the_commands_of_the_manual_are_understood() {
        for line in [
            "convert docker://a.example/b:c oci:d:e --platform linux/arm64 --append --compat containerd-2.3 \
             --chunk-size 1MiB --level 9 --jobs 2 --profile p",
            "convert oci:a oci:b --all-platforms",
            "mount localhost:5000/a:b /mnt --driver fuse --upper /up --foreground",
            "mount oci:a /mnt --no-daemon",
            "mount oci:a /mnt --driver kernel",
            "cleanup --dry-run --lazy",
            "daemon --config /c --root /r",
            "umount /mnt",
            "unmount --lazy /mnt",
            "mount --no-fill oci:a /mnt",
            "pull oci:a --platform linux/arm64",
            "wait /mnt --timeout 5",
            "prune --all --dry-run --json",
            "forget oci:a --prune",
            "inspect oci-archive:a.tar",
            "--json check docker-archive:a.tar",
            "ls oci:a",
            "ls -l oci:a /etc",
            "cat oci:a /etc/passwd",
            "status --json --root /r --config /c --log-level debug",
            "serve oci:a --listen 127.0.0.1:0 --latency 20 --bandwidth 1Gbit --access-log /l",
            "serve oci:a --latency 20ms",
            "containerd-config",
            "containerd-config --version 2.1.4 --drop-in --file /host/etc/containerd/config.toml",
            "doctor --json",
            "doctor -q --containerd-config /host/etc/containerd/config.toml --containerd-version 1.7",
            "completions zsh",
            "man /m",
        ] {
            let words = std::iter::once("headstart").chain(line.split_whitespace());
            assert!(Arguments::try_parse_from(words.clone()).is_ok(), "{line}: {:?}", Arguments::try_parse_from(words));
        }
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for line in [
            "",
            "fly",
            "convert oci:a",
            "convert oci:a oci:b --platform linux/arm64 --all-platforms",
            "convert oci:a oci:b --level 0",
            "convert oci:a oci:b --level 23",
            "convert oci:a oci:b --jobs 0",
            "convert oci:a oci:b --compat docker",
            "mount ftp://a /mnt",
            "mount oci:a /mnt --driver loop",
            "serve oci:a --listen here",
            "serve oci:a --latency soon",
            "serve oci:a --bandwidth wide",
            "containerd-config --version new",
        ] {
            let words = std::iter::once("headstart").chain(line.split_whitespace());
            assert!(Arguments::try_parse_from(words).is_err(), "{line:?} was taken");
        }
    }
}
