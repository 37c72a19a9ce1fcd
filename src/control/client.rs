//! The asking side, in the command line.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::status::{MountStatus, Unmount, Unmounted};

/// A serving process answers from memory, so a silence this long means that it hangs.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Longest path that fits into a socket address (`sun_path` in `unix(7)`: 108 with the final NUL).
const SOCKET_PATH_LIMIT: usize = 107;

/// Why a serving process gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens: the process is gone, or was never there.
    #[error("cannot ask the serving process at {socket}: nobody listens there")]
    Gone {
        /// The socket.
        socket: PathBuf,
    },
    /// The socket cannot be used.
    #[error("cannot ask the serving process at {socket}")]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It gave no answer that can be understood, or none in time.
    #[error("the serving process at {socket} gave no answer")]
    NoAnswer {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
}

/// How the mount behind `socket` stands.
///
/// # Errors
/// See [`ControlError`].
pub async fn status(socket: &Path) -> Result<MountStatus, ControlError> {
    ask(socket, |client| client.get("http://mount/status")).await
}

/// Asks the process behind `socket` to end its mount.
///
/// # Errors
/// See [`ControlError`].
pub async fn unmount(socket: &Path, how: Unmount) -> Result<Unmounted, ControlError> {
    ask(socket, |client| client.post("http://mount/unmount").json(&how)).await
}

async fn ask<T: serde::de::DeserializeOwned>(
    socket: &Path,
    request: impl FnOnce(&reqwest::Client) -> reqwest::RequestBuilder,
) -> Result<T, ControlError> {
    let unreachable = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ControlError::Gone { socket: socket.to_owned() },
        _ => ControlError::Unreachable { socket: socket.to_owned(), source },
    };
    // Asked first by itself, because the HTTP library does not tell why it could not connect.
    with_short_path(socket, |short| std::os::unix::net::UnixStream::connect(short)).map_err(unreachable)?;
    let directory = open_directory(socket).map_err(unreachable)?;
    let no_answer = |source: reqwest::Error| match source.is_connect() {
        true => ControlError::Gone { socket: socket.to_owned() },
        false => ControlError::NoAnswer { socket: socket.to_owned(), source },
    };
    let client = reqwest::Client::builder()
        .no_proxy()
        .timeout(ANSWER_LIMIT)
        .unix_socket(short_path(socket, &directory))
        .build()
        .map_err(no_answer)?;
    let answer = request(&client).send().await.and_then(reqwest::Response::error_for_status).map_err(no_answer)?;
    answer.json().await.map_err(no_answer)
}

fn open_directory(socket: &Path) -> io::Result<File> {
    File::open(socket.parent().unwrap_or(Path::new("/")))
}

/// A name of `socket` that fits into an address: through the descriptor of its directory, if it is too long.
fn short_path(socket: &Path, directory: &File) -> PathBuf {
    match socket.file_name() {
        Some(name) if socket.as_os_str().len() > SOCKET_PATH_LIMIT => {
            Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name)
        }
        _ => socket.to_owned(),
    }
}

/// Does `with` with a name of `socket` that fits into an address.
pub(super) fn with_short_path<T>(socket: &Path, with: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let directory = open_directory(socket)?;
    with(&short_path(socket, &directory))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::super::server::{ControlServer, Served};
    use super::super::status::{LayerState, LayerStatus};
    use super::*;
    use crate::model::{Algorithm, BlobDigest, DiffId, Digest};

    struct Mount {
        lazy: AtomicBool,
    }

    fn example() -> MountStatus {
        let digest = Digest::of(Algorithm::Sha256, b"layer");
        MountStatus {
            image: "oci:here:latest".to_owned(),
            manifest: BlobDigest(digest),
            mount_point: "/mnt".into(),
            driver: "fuse".to_owned(),
            pid: 7,
            upper: None,
            layers: vec![LayerStatus {
                digest: BlobDigest(digest),
                diff_id: Some(DiffId(digest)),
                state: LayerState::Lazy,
                chunks: 9,
                present: 1,
                bytes: 1 << 40,
                bytes_present: 4096,
            }],
            bytes_fetched: 100,
            bytes_demanded: 200,
        }
    }

    impl Served for Mount {
        fn status(&self) -> MountStatus {
            example()
        }

        fn unmount(&self, how: Unmount) -> Unmounted {
            self.lazy.store(how.lazy, Ordering::SeqCst);
            if how.lazy { Unmounted::Done } else { Unmounted::Busy }
        }
    }

    #[tokio::test]
    async fn questions_are_answered_at_paths_of_any_length() {
        rustls::crypto::ring::default_provider().install_default().ok();
        let temporary = tempfile::tempdir().unwrap();
        let deep = temporary.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        for socket in [temporary.path().join("s"), deep.join("socket")] {
            assert!(matches!(status(&socket).await, Err(ControlError::Gone { .. })));
            let served = Arc::new(Mount { lazy: AtomicBool::new(false) });
            let server = ControlServer::bind(&socket).unwrap();
            let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
            let as_served: Arc<dyn Served> = Arc::<Mount>::clone(&served);
            let running = tokio::spawn(server.run(as_served, async {
                stopped.await.ok();
            }));
            assert_eq!(status(&socket).await.unwrap(), example());
            assert_eq!(unmount(&socket, Unmount { lazy: false }).await.unwrap(), Unmounted::Busy);
            assert_eq!(unmount(&socket, Unmount { lazy: true }).await.unwrap(), Unmounted::Done);
            assert!(served.lazy.load(Ordering::SeqCst));
            stop.send(()).unwrap();
            running.await.unwrap().unwrap();
            assert!(!socket.exists());
        }
    }

    #[test]
    fn states_have_the_names_that_are_promised() {
        let text = serde_json::to_value(example()).unwrap();
        assert_eq!(text["layers"][0]["state"], "lazy");
        for (state, name) in
            [(LayerState::Lazy, "lazy"), (LayerState::Filling, "filling"), (LayerState::Local, "local")]
        {
            assert_eq!(serde_json::to_value(state).unwrap(), name);
        }
    }
}
