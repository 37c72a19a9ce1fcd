//! Short questions to services of this machine: who are you, and do you answer.
//!
//! Each waits a bounded time, and what comes back in place of an answer is a sentence.

use std::path::Path;
use std::time::Duration;

use tonic::{Code, Status};

use super::client::connect;
use super::proto::containerd::services::snapshots::v1::StatSnapshotRequest;
use super::proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use super::proto::containerd::services::version::v1::version_client::VersionClient;
use super::status::words;

/// How long somebody may take for an answer that needs no work.
const PATIENCE: Duration = Duration::from_secs(3);

/// The version that the containerd behind `socket` says it has.
///
/// # Errors
/// Why there is no answer.
pub async fn containerd_version(socket: &Path) -> Result<String, String> {
    let mut client = VersionClient::new(connect(socket));
    let asked = client.version(());
    let answered = tokio::time::timeout(PATIENCE, asked).await.map_err(|_| too_late())?;
    answered.map(|answer| answer.into_inner().version).map_err(|status| why(&status))
}

/// Whether a snapshots service answers at `socket`: it is asked for a snapshot that cannot exist.
///
/// # Errors
/// Why there is no answer.
pub async fn snapshotter_answers(socket: &Path) -> Result<(), String> {
    let mut client = SnapshotsClient::new(connect(socket));
    let asked = client.stat(StatSnapshotRequest { snapshotter: String::new(), key: String::new() });
    let answered = tokio::time::timeout(PATIENCE, asked).await.map_err(|_| too_late())?;
    match answered {
        Ok(_) => Ok(()),
        Err(status) if matches!(status.code(), Code::NotFound | Code::InvalidArgument) => Ok(()),
        Err(status) => Err(why(&status)),
    }
}

fn too_late() -> String {
    format!("no answer within {} s", PATIENCE.as_secs())
}

fn why(status: &Status) -> String {
    match std::error::Error::source(status) {
        Some(cause) => format!("{}: {}", status.message(), words(cause)),
        None => status.message().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[tokio::test]
    async fn who_does_not_answer_is_told_with_the_reason() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("s");
        let missing = snapshotter_answers(&socket).await.unwrap_err();
        assert!(missing.contains("No such file"), "{missing}");
        assert!(containerd_version(&socket).await.is_err());
        drop(UnixListener::bind(&socket).unwrap());
        let refused = snapshotter_answers(&socket).await.unwrap_err();
        assert!(refused.contains("refused"), "{refused}");
    }
}
