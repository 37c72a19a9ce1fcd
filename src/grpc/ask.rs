//! A short question to a service of this machine: do you answer.
//!
//! It waits a bounded time, and what comes back in place of an answer is a sentence.

use std::path::Path;
use std::time::Duration;

use tonic::{Code, Status};

use super::client::connect;
use super::proto::containerd::services::snapshots::v1::StatSnapshotRequest;
use super::proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use super::status::words;

/// How long somebody may take for an answer that needs no work.
const PATIENCE: Duration = Duration::from_secs(3);

/// Whether a snapshots service answers at `socket`: it is asked for a snapshot that cannot exist.
///
/// # Errors
/// Why there is no answer.
pub async fn snapshotter_answers(socket: &Path) -> Result<(), String> {
    let mut client = SnapshotsClient::new(connect(socket));
    let asked = client.stat(StatSnapshotRequest { snapshotter: String::new(), key: String::new() });
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(status)) if matches!(status.code(), Code::NotFound | Code::InvalidArgument) => Ok(()),
        Ok(Err(status)) => Err(why(&status)),
        Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
    }
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
        drop(UnixListener::bind(&socket).unwrap());
        let refused = snapshotter_answers(&socket).await.unwrap_err();
        assert!(refused.contains("refused"), "{refused}");
    }
}
