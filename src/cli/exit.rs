//! Exit codes and hints: the one table of what kinds of failure there are, and which error of which room is which.
//!
//! Every match over this program's own errors is exhaustive, so a new error does not compile before it has a place here.
//! `docs/operations.md` shows the table to operators; a test holds both together.

mod kinds;

use std::process::ExitCode;

use serde::{Deserialize, Serialize};
use tokio::signal::unix::SignalKind;

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

    /// Its name, as JSON and the control socket have it.
    pub(crate) fn name(self) -> String {
        match serde_json::to_value(self) {
            Ok(serde_json::Value::String(name)) => name,
            _ => String::new(),
        }
    }

    /// The one with this name.
    pub(crate) fn named(name: &str) -> Option<Self> {
        serde_json::from_value(name.into()).ok()
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
                Some("fetch, build or convert the image again; `headstart check IMAGE` lists what is wrong with it")
            }
            Self::Unsupported => {
                Some("an image that was never converted is made mountable by `headstart convert SOURCE DEST`")
            }
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
        error.chain().find_map(kinds::known).unwrap_or(Self::Internal)
    }
}

/// The exit code of a command that a signal ended, as shells give it.
pub(crate) fn interrupted(signal: SignalKind) -> ExitCode {
    ExitCode::from(u8::try_from(signal.as_raw_value()).map_or(255, |signal| signal.saturating_add(128)))
}

/// A failure whose kind a command knows itself.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Told {
    pub(crate) problem: Problem,
    pub(crate) message: String,
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;

    use super::*;
    use crate::control::ControlError;
    use crate::daemon::config::ConfigError;
    use crate::oci::DocumentError;
    use crate::registry::TryError;
    use crate::store::StoreError;

    #[test]
    fn codes_are_a_row_without_gaps() {
        let codes: Vec<u8> = Problem::ALL.map(Problem::code).to_vec();
        assert_eq!(codes, (1..=10).collect::<Vec<u8>>());
    }

    #[test]
    fn signals_have_the_shells_codes() {
        assert_eq!(interrupted(SignalKind::interrupt()), ExitCode::from(130));
        assert_eq!(interrupted(SignalKind::terminate()), ExitCode::from(143));
    }

    #[test]
    fn the_manual_shows_the_table() {
        let manual = include_str!("../../docs/operations.md");
        for problem in Problem::ALL {
            assert_eq!(Problem::named(&problem.name()), Some(problem));
            let row = format!("| {} | `{}` |", problem.code(), problem.name());
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
