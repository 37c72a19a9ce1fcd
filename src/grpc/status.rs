//! What a failure is called: one table from errors to status codes.
//!
//! containerd acts on the codes: a removal that is refused otherwise than by `FailedPrecondition` ends its round of garbage
//! collection; `AlreadyExists` of a preparation means that the layer is there; `Unavailable` may be tried again.

use std::time::Duration;

use tonic::{Code, Status};

use super::{DifferError, SnapshotterError};
use crate::chain::{ChainError, Unmet};
use crate::snapshots::SnapshotsError;
use crate::store::StoreError;
use crate::store::records::RecordsError;
use crate::unpack::UnpackError;

impl From<SnapshotterError> for Status {
    fn from(error: SnapshotterError) -> Self {
        Self::new(code(&error), words(&error))
    }
}

/// What is asked for is there already, under `name`.
pub(super) fn there(name: &str) -> Status {
    Status::already_exists(format!("snapshot {name:?} is there already"))
}

/// Whoever a call is passed on to is not there.
pub(super) fn unreachable(whom: &str, error: &(dyn std::error::Error + 'static)) -> Status {
    Status::unavailable(format!("cannot reach {whom}: {}", words(error)))
}

/// A message that did not come whole, or is larger than any.
pub(super) fn cut(error: &(dyn std::error::Error + 'static)) -> Status {
    Status::aborted(format!("the message did not come whole: {}", words(error)))
}

/// Somebody who was asked does not answer.
pub(super) fn silent(patience: Duration) -> Status {
    Status::deadline_exceeded(format!("no answer within {patience:?}"))
}

/// True if somebody who was asked does not have it.
pub(super) fn is_not_found(status: &Status) -> bool {
    status.code() == Code::NotFound
}

/// A layer that was not applied. Only for `Unimplemented` another differ is asked.
pub(super) fn of_differ(error: &DifferError) -> Status {
    let code = match error {
        DifferError::NotOurs(_) => Code::Unimplemented,
        DifferError::Snapshots(error) => of_snapshots(error),
        DifferError::Unpack(error) => of_unpack(error),
        DifferError::Layers(_) => Code::Unavailable,
        DifferError::Broken => Code::Internal,
    };
    if !matches!(code, Code::Unimplemented | Code::Cancelled) {
        let error: &dyn std::error::Error = error;
        tracing::error!(error, "a layer is not applied");
    }
    Status::new(code, words(error))
}

fn of_unpack(error: &UnpackError) -> Code {
    match error {
        UnpackError::Fetch { .. } | UnpackError::Read { .. } => Code::Unavailable,
        UnpackError::Tar { .. }
        | UnpackError::DiffId { .. }
        | UnpackError::Misplaced { .. }
        | UnpackError::Contradiction { .. }
        | UnpackError::Unverifiable { .. } => Code::FailedPrecondition,
        UnpackError::Store { source, .. } => of_store(source),
        UnpackError::Full { .. } => Code::ResourceExhausted,
        UnpackError::Abandoned { .. } => Code::Cancelled,
    }
}

pub(super) fn code(error: &SnapshotterError) -> Code {
    match error {
        SnapshotterError::Snapshots(error) => of_snapshots(error),
        SnapshotterError::Layers { .. } => Code::Unavailable,
        SnapshotterError::Unmapped { .. } => Code::FailedPrecondition,
        SnapshotterError::Label { .. } => Code::InvalidArgument,
        SnapshotterError::Broken => Code::Internal,
    }
}

fn of_snapshots(error: &SnapshotsError) -> Code {
    match error {
        SnapshotsError::Records(error) => of_records(error),
        SnapshotsError::Store(error) => of_store(error),
    }
}

fn of_records(error: &RecordsError) -> Code {
    match error {
        RecordsError::Refused(error) => of_chain(error),
        RecordsError::InUse { .. } => Code::Unavailable,
        RecordsError::Damaged { .. } | RecordsError::Contradiction { .. } => Code::DataLoss,
        RecordsError::Unclean { .. } | RecordsError::Unsupported { .. } | RecordsError::Database { .. } => {
            Code::Internal
        }
        RecordsError::Store(error) => of_store(error),
    }
}

const fn of_store(error: &StoreError) -> Code {
    match error {
        StoreError::Full { .. } => Code::ResourceExhausted,
        StoreError::DamagedInUse { .. } => Code::DataLoss,
        StoreError::Io { .. } | StoreError::Unsupported { .. } | StoreError::OutOfBounds { .. } => Code::Internal,
    }
}

const fn of_chain(error: &ChainError) -> Code {
    match error {
        ChainError::NotFound { .. } => Code::NotFound,
        ChainError::AlreadyExists { .. } => Code::AlreadyExists,
        ChainError::FailedPrecondition { unmet: Unmet::NoSlot, .. } => Code::ResourceExhausted,
        ChainError::FailedPrecondition { .. } => Code::FailedPrecondition,
        ChainError::InvalidArgument(_) => Code::InvalidArgument,
    }
}

/// The error and its causes, in one line.
pub(super) fn words(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        let words = source.to_string();
        // A transparent error says what its source says.
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        cause = source.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::chain::{Invalid, Kind, Subject};

    #[test]
    fn every_failure_has_its_code() {
        let name = || "k".to_owned();
        let refused = |error: ChainError| SnapshotterError::from(SnapshotsError::from(error));
        let unmet = |unmet| refused(ChainError::FailedPrecondition { attempted: "remove", name: name(), unmet });
        let records = |error| SnapshotterError::from(SnapshotsError::Records(error));
        let disk = |raw| StoreError::io("write", "/x", io::Error::from_raw_os_error(raw));
        for (error, expected) in [
            (refused(ChainError::NotFound { subject: Subject::Snapshot, name: name() }), Code::NotFound),
            (refused(ChainError::NotFound { subject: Subject::Parent, name: name() }), Code::NotFound),
            (refused(ChainError::AlreadyExists { name: name() }), Code::AlreadyExists),
            (unmet(Unmet::HasChild { child: name() }), Code::FailedPrecondition),
            (unmet(Unmet::Held { image: name() }), Code::FailedPrecondition),
            (unmet(Unmet::Kind(Kind::View)), Code::FailedPrecondition),
            (unmet(Unmet::NoSlot), Code::ResourceExhausted),
            (refused(Invalid::EmptyKey.into()), Code::InvalidArgument),
            (records(RecordsError::InUse { path: "/x".into() }), Code::Unavailable),
            (records(RecordsError::Damaged { path: "/x".into(), what: name() }), Code::DataLoss),
            (records(RecordsError::Store(disk(libc::ENOSPC))), Code::ResourceExhausted),
            (SnapshotsError::Store(disk(libc::ENOSPC)).into(), Code::ResourceExhausted),
            (SnapshotsError::Store(disk(libc::EIO)).into(), Code::Internal),
            (SnapshotterError::Layers { key: name(), source: "x".into() }, Code::Unavailable),
            (SnapshotterError::Unmapped { key: name(), source: "x".into() }, Code::FailedPrecondition),
            (SnapshotterError::Label { key: name(), label: "l", why: "x" }, Code::InvalidArgument),
            (SnapshotterError::Broken, Code::Internal),
        ] {
            assert_eq!(code(&error), expected, "{error:?}");
        }
    }

    #[test]
    fn causes_are_told_once() {
        let full = StoreError::io("write", "/x", io::Error::from_raw_os_error(libc::ENOSPC));
        let error = SnapshotterError::from(SnapshotsError::Records(RecordsError::Store(full)));
        let status = Status::from(error);
        assert_eq!(
            status.message(),
            "cannot write /x: the disk is full: No space left on device (os error 28)",
            "{status:?}"
        );
    }
}
