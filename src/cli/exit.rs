//! Exit codes and hints: the one table of what kinds of failure there are, and which error of which room is which.
//!
//! Every match over this program's own errors is exhaustive, so a new error does not compile before it has a place here.
//! `docs/operations.md` shows the table to operators; a test holds both together.

use std::io;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};

use crate::control::ControlError;
use crate::daemon::config::ConfigError;
use crate::layout::LayoutError;
use crate::oci::{DocumentError, PlanError, PlatformError, ReferenceError};
use crate::registry::{Attempts, HostsError, RegistryError, TryError};
use crate::serve::ServeError;
use crate::store::StoreError;
use crate::tar::TarError;
use crate::transport::TransportError;

/// Kinds of failure, as scripts can tell them apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Problem {
    /// A check found places that are wrong.
    Wrong,
    /// The command line or the configuration makes no sense.
    Usage,
    /// The image, path, file or mount is not there.
    NotFound,
    /// Credentials or permissions are missing or refused.
    Denied,
    /// A registry or a serving process does not answer.
    Unreachable,
    /// Bytes are not what their digest or format promises.
    Corrupt,
    /// It is well formed, but this program or kernel cannot do it.
    Unsupported,
    /// The mount point is missing, in use, or left over from a dead process.
    MountPoint,
    /// The local disk or another local resource failed or is used up.
    Local,
    /// A fault of this program.
    Internal,
}

impl Problem {
    /// All of them, in the order of their codes.
    #[cfg(test)]
    const ALL: [Self; 10] = [
        Self::Wrong,
        Self::Usage,
        Self::NotFound,
        Self::Denied,
        Self::Unreachable,
        Self::Corrupt,
        Self::Unsupported,
        Self::MountPoint,
        Self::Local,
        Self::Internal,
    ];

    /// The exit code. These numbers are a promise to scripts.
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Wrong => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::Denied => 4,
            Self::Unreachable => 5,
            Self::Corrupt => 6,
            Self::Unsupported => 7,
            Self::MountPoint => 8,
            Self::Local => 9,
            Self::Internal => 10,
        }
    }

    /// [`Problem::code`] for the end of `main`.
    pub(crate) fn exit_code(self) -> ExitCode {
        ExitCode::from(self.code())
    }

    /// What can be done, where there is something that helps in most cases.
    pub(crate) const fn hint(self) -> Option<&'static str> {
        match self {
            Self::Wrong => None,
            Self::Usage => Some("see `headstart help` and docs/config.example.toml"),
            Self::NotFound => Some("check the name and the tag; `headstart status` lists mounts"),
            Self::Denied => Some("log in (`docker login HOST` or `skopeo login HOST`), or run as a user who may"),
            Self::Unreachable => Some("check the address and that the registry is running, then try again"),
            Self::Corrupt => {
                Some("`headstart check IMAGE` lists every place that is wrong; convert or push the image again")
            }
            Self::Unsupported => Some("`headstart convert SOURCE DEST` makes an image that can be mounted"),
            Self::MountPoint => {
                Some("name an empty directory; `headstart umount DIR` ends a mount, also one whose process has died")
            }
            Self::Local => Some("make room on the disk of --root, or choose another root"),
            Self::Internal => {
                Some("this is a fault of headstart; please report it with the output of --log-level debug")
            }
        }
    }

    /// Which kind `error` is: what the first error in its chain that is known says.
    pub(crate) fn of(error: &anyhow::Error) -> Self {
        error.chain().find_map(known).unwrap_or(Self::Internal)
    }
}

/// A failure whose kind a command knows itself.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Told {
    pub(crate) problem: Problem,
    pub(crate) message: String,
}

/// The kind of one error of a chain, if it decides; else its causes do.
fn known(error: &(dyn std::error::Error + 'static)) -> Option<Problem> {
    macro_rules! first_of {
        ($($kind:ty => $judge:expr),+ $(,)?) => {
            $(if let Some(error) = error.downcast_ref::<$kind>() { return $judge(error); })+
        };
    }
    first_of! {
        Told => |told: &Told| Some(told.problem),
        ConfigError => of_config,
        ReferenceError => |_: &ReferenceError| Some(Problem::Usage),
        PlatformError => |_: &PlatformError| Some(Problem::Usage),
        DocumentError => of_document,
        PlanError => |_: &PlanError| Some(Problem::Unsupported),
        RegistryError => of_registry,
        TryError => |error: &TryError| Some(of_try(error)),
        HostsError => of_hosts,
        TransportError => of_transport,
        LayoutError => of_layout,
        StoreError => of_store,
        TarError => of_tar,
        ServeError => of_serve,
        ControlError => of_control,
        io::Error => |error: &io::Error| Some(of_io(error)),
    }
    None
}

fn of_config(error: &ConfigError) -> Option<Problem> {
    match error {
        ConfigError::Read { .. } => None,
        ConfigError::Parse { .. } | ConfigError::UnknownKey { .. } | ConfigError::Value { .. } => Some(Problem::Usage),
    }
}

fn of_document(error: &DocumentError) -> Option<Problem> {
    Some(match error {
        DocumentError::TooLarge { .. } | DocumentError::Schema1 | DocumentError::NoImage(_) => Problem::Unsupported,
        DocumentError::MediaType(_) | DocumentError::SchemaVersion(_) => Problem::Unsupported,
        DocumentError::Size { .. }
        | DocumentError::Digest { .. }
        | DocumentError::Json { .. }
        | DocumentError::Contradiction { .. }
        | DocumentError::Ambiguous
        | DocumentError::LayerCount { .. } => Problem::Corrupt,
    })
}

fn of_registry(error: &RegistryError) -> Option<Problem> {
    match error {
        RegistryError::Failed { attempts, .. } => Some(of_attempts(attempts)),
        RegistryError::NotFound { .. } => Some(Problem::NotFound),
        RegistryError::NoServer { .. } => Some(Problem::Usage),
        RegistryError::Hosts(error) => of_hosts(error),
        RegistryError::Document(error) => of_document(error),
    }
}

/// The last server is the registry itself; what it said counts before what its mirrors said.
fn of_attempts(attempts: &Attempts) -> Problem {
    attempts.iter().last().map_or(Problem::Unreachable, |attempt| of_try(&attempt.error))
}

fn of_try(error: &TryError) -> Problem {
    match error {
        TryError::Connect(_)
        | TryError::Tls(_)
        | TryError::Broken(_)
        | TryError::Timeout { .. }
        | TryError::Cut { .. }
        | TryError::Trickle { .. }
        | TryError::Redirect(_)
        | TryError::Header(_)
        | TryError::Range { .. } => Problem::Unreachable,
        TryError::Status { status: 401 | 403, .. } | TryError::Denied(_) | TryError::Credentials(_) => Problem::Denied,
        TryError::Status { status: 404 | 410, .. } => Problem::NotFound,
        TryError::Status { .. } => Problem::Unreachable,
        TryError::Token { source, .. } => of_try(source),
        TryError::TooLarge(_) | TryError::Document(_) | TryError::Json { .. } => Problem::Corrupt,
        TryError::Setup(error) => of_hosts(error).unwrap_or(Problem::Local),
        TryError::File(error) => of_io(error),
    }
}

fn of_hosts(error: &HostsError) -> Option<Problem> {
    match error {
        HostsError::Read { .. } => None,
        HostsError::Parse { .. } | HostsError::Value { .. } | HostsError::Certificate { .. } => Some(Problem::Usage),
    }
}

fn of_transport(error: &TransportError) -> Option<Problem> {
    match error {
        TransportError::Registry(error) => of_registry(error),
        TransportError::Layout(error) => of_layout(error),
        TransportError::Document { source, .. } => of_document(source),
        // The cause of a stream's end stands behind it in the chain.
        TransportError::Source(_) => None,
        TransportError::NoPlatform { .. } => Some(Problem::NotFound),
        TransportError::TooManyIndexes { .. } => Some(Problem::Unsupported),
        TransportError::Unwritable { .. } => Some(Problem::Usage),
        TransportError::Damaged { .. } => Some(Problem::Corrupt),
        TransportError::Spool { source, .. } => Some(of_io(source)),
    }
}

fn of_layout(error: &LayoutError) -> Option<Problem> {
    match error {
        LayoutError::Io { source, .. } => Some(of_io(source)),
        LayoutError::NoLayout { .. } | LayoutError::Ambiguous { .. } => Some(Problem::Usage),
        LayoutError::Archive { .. } | LayoutError::Size { .. } => Some(Problem::Corrupt),
        LayoutError::Document { source, .. } => of_document(source),
        LayoutError::NoImage { .. } | LayoutError::NoBlob { .. } => Some(Problem::NotFound),
    }
}

fn of_store(error: &StoreError) -> Option<Problem> {
    match error {
        StoreError::Io { .. } => None,
        StoreError::Full { .. } | StoreError::DamagedInUse { .. } => Some(Problem::Local),
        StoreError::Unsupported { .. } => Some(Problem::Unsupported),
        StoreError::OutOfBounds { .. } => Some(Problem::Internal),
    }
}

fn of_tar(error: &TarError) -> Option<Problem> {
    use crate::tar::Problem as Tar;
    match &error.problem {
        Tar::Io(_) => None,
        Tar::OutOfRange { .. }
        | Tar::RecordsTooLong { .. }
        | Tar::TooLong { .. }
        | Tar::UnknownType(_)
        | Tar::TooManyRuns(_)
        | Tar::SparseVersion { .. } => Some(Problem::Unsupported),
        Tar::Cut(_)
        | Tar::Checksum { .. }
        | Tar::NotANumber { .. }
        | Tar::BadRecord(_)
        | Tar::BadPath(_)
        | Tar::Climbs
        | Tar::BadTarget { .. }
        | Tar::TargetClimbs(_)
        | Tar::Nul(_)
        | Tar::NoTarget
        | Tar::RootIsNoDirectory(_)
        | Tar::ReservedName
        | Tar::BadXattr { .. }
        | Tar::BadAcl(_)
        | Tar::BadSparseMap(_)
        | Tar::LoneZeroBlock => Some(Problem::Corrupt),
    }
}

fn of_serve(error: &ServeError) -> Option<Problem> {
    match error {
        ServeError::NotALayout { source, .. } => Some(match of_io(source) {
            Problem::Local => Problem::Corrupt,
            other => other,
        }),
        ServeError::Listen { .. } => Some(Problem::Usage),
        ServeError::AccessLog { .. } | ServeError::Serve { .. } => None,
    }
}

fn of_control(error: &ControlError) -> Option<Problem> {
    match error {
        ControlError::Gone { .. } | ControlError::NoAnswer { .. } => Some(Problem::Unreachable),
        ControlError::Unreachable { .. } => None,
    }
}

/// The kernel's errors. Their list is the library's and may grow, so the rest is the machine's fault.
fn of_io(error: &io::Error) -> Problem {
    use io::ErrorKind as Kind;
    match error.kind() {
        Kind::NotFound => Problem::NotFound,
        Kind::PermissionDenied => Problem::Denied,
        Kind::ConnectionRefused | Kind::ConnectionReset | Kind::TimedOut | Kind::HostUnreachable => {
            Problem::Unreachable
        }
        Kind::InvalidData | Kind::UnexpectedEof => Problem::Corrupt,
        Kind::Unsupported => Problem::Unsupported,
        _ => Problem::Local,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn codes_are_a_row_without_gaps() {
        let codes: Vec<u8> = Problem::ALL.map(Problem::code).to_vec();
        assert_eq!(codes, (1..=10).collect::<Vec<u8>>());
    }

    #[test]
    fn the_manual_shows_the_table() {
        let manual = include_str!("../../docs/operations.md");
        for problem in Problem::ALL {
            let name = serde_json::to_value(problem).unwrap();
            let row = format!("| {} | `{}` |", problem.code(), name.as_str().unwrap());
            assert!(manual.contains(&row), "docs/operations.md has no row {row}");
        }
    }

    #[test]
    fn errors_of_every_room_have_their_code() {
        let digest = crate::model::BlobDigest(crate::model::Digest::of(crate::model::Algorithm::Sha256, b"x"));
        let io = |kind| io::Error::new(kind, "why");
        let failed = |error: TryError| {
            anyhow::Error::new(TryError::Token {
                realm: crate::registry::SafeUrl::from(&url::Url::parse("http://x/").unwrap()),
                source: Box::new(error),
            })
        };
        let status = |status| TryError::Status { status, message: String::new(), retry_after: None };
        let full = StoreError::Full { attempted: "write", path: "/x".into(), source: io(io::ErrorKind::StorageFull) };
        let source = crate::model::SourceError {
            blob: digest,
            range: crate::model::ByteRange::to(1),
            origin: "x".to_owned(),
            transient: true,
            source: Box::new(status(503)),
        };
        for (error, expected) in [
            (anyhow::Error::new("".parse::<crate::oci::Reference>().unwrap_err()), Problem::Usage),
            (anyhow::Error::new("a/b/c/d/e".parse::<crate::oci::Platform>().unwrap_err()), Problem::Usage),
            (
                anyhow::Error::new(ConfigError::UnknownKey { path: "c".into(), key: "k".into(), nearest: None }),
                Problem::Usage,
            ),
            (
                anyhow::Error::new(ConfigError::Read { path: "c".into(), source: io(io::ErrorKind::NotFound) }),
                Problem::NotFound,
            ),
            (anyhow::Error::new(DocumentError::Schema1), Problem::Unsupported),
            (anyhow::Error::new(DocumentError::Ambiguous), Problem::Corrupt),
            (failed(status(401)), Problem::Denied),
            (failed(status(404)), Problem::NotFound),
            (failed(status(500)), Problem::Unreachable),
            (failed(TryError::Document(Arc::new(DocumentError::Ambiguous))), Problem::Corrupt),
            (anyhow::Error::new(source), Problem::Unreachable),
            (anyhow::Error::new(full), Problem::Local),
            (anyhow::Error::new(ControlError::Gone { socket: "/s".into() }), Problem::Unreachable),
            (anyhow::Error::new(io(io::ErrorKind::PermissionDenied)).context("outer"), Problem::Denied),
            (anyhow::anyhow!("nothing is known of this"), Problem::Internal),
            (
                anyhow::Error::new(Told { problem: Problem::MountPoint, message: "m".into() }).context("o"),
                Problem::MountPoint,
            ),
        ] {
            assert_eq!(Problem::of(&error), expected, "{error:#}");
        }
    }
}
