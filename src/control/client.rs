//! The asking side, in the command line.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::VERSION;
use super::cache::{ForgetAsked, Forgotten, PruneAsked, Pruned, SnapshotsSeen};
use super::fault::Fault;
use super::message::{Done, MountAsked, PullAsked, PullLine, Pulled, UmountAsked, WaitAsked};
use super::status::{Health, HostStatus, MountStatus};

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
    /// It gave no answer, or none in time.
    #[error("the serving process at {socket} gave no answer")]
    NoAnswer {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// It gave an answer that cannot be understood.
    #[error("cannot understand the answer of the serving process at {socket}: it may be of another version")]
    Nonsense {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: Arc<serde_json::Error>,
    },
    /// It ended in the middle of an answer.
    #[error("the serving process at {socket} ended before it was done")]
    Ended {
        /// The socket.
        socket: PathBuf,
    },
    /// It refused, or failed.
    #[error(transparent)]
    Refused(Fault),
}

/// Asks the process behind a socket. Each question is a connection of its own.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// One for the process behind `socket`. Nothing is asked yet.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into() }
    }

    /// That it is there, and what it is.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn health(&self) -> Result<Health, ControlError> {
        self.get("health").await
    }

    /// How everything stands that it serves.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn status(&self) -> Result<HostStatus, ControlError> {
        self.get("status").await
    }

    /// Has an image mounted; as long as it takes.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn mount(&self, asked: &MountAsked) -> Result<MountStatus, ControlError> {
        self.post("mount", asked).await
    }

    /// Has a mount ended.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn umount(&self, asked: &UmountAsked) -> Result<(), ControlError> {
        self.post("umount", asked).await.map(|Done {}| ())
    }

    /// Has all of an image brought; as long as it takes. `progress` is told the bytes that are here and those there will be.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn pull(&self, asked: &PullAsked, mut progress: impl FnMut(u64, u64)) -> Result<Pulled, ControlError> {
        let mut answer = self.send(|client| client.post(address("pull")).json(asked)).await?;
        let nonsense = |source| ControlError::Nonsense { socket: self.socket.clone(), source: Arc::new(source) };
        let mut line = Vec::new();
        while let Some(piece) = answer.chunk().await.map_err(|source| self.no_answer(source))? {
            for byte in piece {
                if byte != b'\n' {
                    line.push(byte);
                    continue;
                }
                match serde_json::from_slice(&line).map_err(nonsense)? {
                    PullLine::Progress { bytes, of } => progress(bytes, of),
                    PullLine::Done(pulled) => return Ok(pulled),
                    PullLine::Failed(fault) => return Err(ControlError::Refused(fault)),
                }
                line.clear();
            }
        }
        Err(ControlError::Ended { socket: self.socket.clone() })
    }

    /// Waits until all of a mount is here; as long as it takes.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn wait(&self, asked: &WaitAsked) -> Result<MountStatus, ControlError> {
        self.post("wait", asked).await
    }

    /// Has room made in the cache; as long as it takes.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn prune(&self, asked: &PruneAsked) -> Result<Pruned, ControlError> {
        self.post("prune", asked).await
    }

    /// Has a pulled image forgotten.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn forget(&self, asked: &ForgetAsked) -> Result<Forgotten, ControlError> {
        self.post("forget", asked).await
    }

    /// Everything that is recorded; as long as it takes to look at the files of each.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub async fn snapshots(&self) -> Result<SnapshotsSeen, ControlError> {
        self.ask(|client| client.get(address("snapshots"))).await
    }

    async fn get<A: DeserializeOwned>(&self, question: &str) -> Result<A, ControlError> {
        // Answered from memory.
        self.ask(|client| client.get(address(question)).timeout(ANSWER_LIMIT)).await
    }

    async fn post<A: DeserializeOwned>(&self, question: &str, asked: &impl Serialize) -> Result<A, ControlError> {
        self.ask(|client| client.post(address(question)).json(asked)).await
    }

    async fn ask<A: DeserializeOwned>(
        &self,
        request: impl FnOnce(&reqwest::Client) -> reqwest::RequestBuilder,
    ) -> Result<A, ControlError> {
        let answer = self.send(request).await?;
        let no_answer = |source| self.no_answer(source);
        let bytes = answer.bytes().await.map_err(no_answer)?;
        serde_json::from_slice(&bytes)
            .map_err(|source| ControlError::Nonsense { socket: self.socket.clone(), source: Arc::new(source) })
    }

    /// Sends a request; a refusal is an error.
    async fn send(
        &self,
        request: impl FnOnce(&reqwest::Client) -> reqwest::RequestBuilder,
    ) -> Result<reqwest::Response, ControlError> {
        let socket = &self.socket;
        let unreachable = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ControlError::Gone { socket: socket.clone() },
            _ => ControlError::Unreachable { socket: socket.clone(), source },
        };
        // Asked first by itself, because the HTTP library does not tell why it could not connect.
        with_short_path(socket, |short| std::os::unix::net::UnixStream::connect(short)).map_err(unreachable)?;
        let directory = open_directory(socket).map_err(unreachable)?;
        let client = reqwest::Client::builder()
            .no_proxy()
            // Nothing here speaks TLS: a machine without authorities can be asked too.
            .tls_certs_only([])
            .unix_socket(short_path(socket, &directory))
            .build()
            .map_err(|source| self.no_answer(source))?;
        let answer = request(&client).send().await.map_err(|source| self.no_answer(source))?;
        if answer.status().is_success() {
            return Ok(answer);
        }
        let bytes = answer.bytes().await.map_err(|source| self.no_answer(source))?;
        Err(match serde_json::from_slice(&bytes) {
            Ok(fault) => ControlError::Refused(fault),
            Err(source) => ControlError::Nonsense { socket: socket.clone(), source: Arc::new(source) },
        })
    }

    fn no_answer(&self, source: reqwest::Error) -> ControlError {
        match source.is_connect() {
            true => ControlError::Gone { socket: self.socket.clone() },
            false => ControlError::NoAnswer { socket: self.socket.clone(), source },
        }
    }
}

fn address(question: &str) -> String {
    format!("http://headstart/v{VERSION}/{question}")
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
    use std::sync::Mutex;

    use futures::future::BoxFuture;
    use futures::stream::BoxStream;

    use super::super::cache::{SeenImage, SeenLayer, SeenSnapshot};
    use super::super::server::{ControlServer, Served};
    use super::super::status::{DaemonStatus, LayerState, LayerStatus, MountRecord, SlowRead};
    use super::*;
    use crate::model::{Algorithm, BlobDigest, DiffId, Digest};

    /// Refuses all but lazy ends, and remembers what it was asked.
    #[derive(Default)]
    struct Process {
        mounts: Mutex<Vec<MountAsked>>,
    }

    fn example() -> MountStatus {
        let digest = Digest::of(Algorithm::Sha256, b"layer");
        MountStatus {
            record: MountRecord {
                image: "oci:here:latest".to_owned(),
                manifest: BlobDigest(digest),
                mount_point: "/mnt".into(),
                driver: "fuse".to_owned(),
                driver_wanted: crate::drivers::Wanted::Auto,
                pid: 7,
                upper: None,
                no_fill: false,
                daemon: None,
            },
            driver_why: None,
            layers: vec![LayerStatus {
                digest: BlobDigest(digest),
                diff_id: Some(DiffId(digest)),
                state: LayerState::Lazy,
                why: Some("nobody read it".to_owned()),
                presented: None,
                chunks: 9,
                present: 1,
                bytes: 1 << 40,
                bytes_present: 4096,
                local_since: Some(5),
                bytes_demanded: 6,
                bytes_prefetched: 7,
                bytes_wasted: 8,
                slowest_reads: vec![SlowRead { offset: 9, bytes: 10, milliseconds: 11 }],
            }],
            bytes_fetched: 100,
            bytes_demanded: 200,
        }
    }

    fn pulled() -> Pulled {
        let manifest = BlobDigest(Digest::of(Algorithm::Sha256, b"layer"));
        Pulled { image: "good".to_owned(), manifest, bytes_fetched: 1, bytes: 2, layers: vec![] }
    }

    fn pruned(dry_run: bool) -> Pruned {
        let image = crate::store::CacheEntry::example();
        let evicted = crate::store::Evicted { images: vec![image], bytes: 5, left: 6 };
        Pruned { dry_run, evicted, chunks: crate::fetch::Room { chunks: 7, bytes: 8 } }
    }

    fn seen() -> SnapshotsSeen {
        let digest = Digest::of(Algorithm::Sha256, b"layer");
        let key = crate::chain::Key::new("sha256:1").unwrap();
        let layer = SeenLayer {
            slot: 1,
            diff_id: DiffId(digest),
            blob: BlobDigest(digest),
            anchor: "whole".to_owned(),
            bytes: Some(2),
            local: None,
        };
        let snapshot = SeenSnapshot {
            key: key.clone(),
            kind: crate::chain::Kind::Active,
            parent: None,
            state: crate::chain::State::Filling,
            bytes: 3,
            inodes: 4,
            created: "then".to_owned(),
            updated: "now".to_owned(),
            labels: [("a".to_owned(), "b".to_owned())].into(),
            slot: 5,
            becomes: Some(key),
            layer: Some(layer),
        };
        let image = SeenImage {
            image: "i".to_owned(),
            manifest: BlobDigest(digest),
            pulled: "then".to_owned(),
            layers: 1,
            committed: 0,
        };
        SnapshotsSeen { snapshots: vec![snapshot], images: vec![image] }
    }

    fn busy() -> Fault {
        Fault { kind: "mount-point".to_owned(), message: "cannot".to_owned(), causes: vec!["busy".to_owned()] }
    }

    impl Served for Process {
        fn health(&self) -> Health {
            Health { version: "1".to_owned(), pid: 7, root: "/r".into(), ready: true }
        }

        fn status(&self) -> HostStatus {
            let daemon = DaemonStatus { health: self.health(), uptime_seconds: 1, resident_bytes: 2, connections: 3 };
            HostStatus { daemon, mounts: vec![example()] }
        }

        fn mount(&self, asked: MountAsked) -> BoxFuture<'static, Result<MountStatus, Fault>> {
            self.mounts.lock().unwrap().push(asked);
            Box::pin(async { Ok(example()) })
        }

        fn umount(&self, asked: UmountAsked) -> BoxFuture<'static, Result<(), Fault>> {
            Box::pin(async move { if asked.lazy { Ok(()) } else { Err(busy()) } })
        }

        fn pull(&self, asked: PullAsked) -> BoxStream<'static, PullLine> {
            let end = match asked.image.as_str() {
                "good" => vec![PullLine::Done(pulled())],
                "bad" => vec![PullLine::Failed(busy())],
                _ => vec![],
            };
            let begin = (1..=3).map(|bytes| PullLine::Progress { bytes, of: 3 });
            Box::pin(futures::stream::iter(begin.chain(end)))
        }

        fn wait(&self, _: WaitAsked) -> BoxFuture<'static, Result<MountStatus, Fault>> {
            Box::pin(async { Ok(example()) })
        }

        fn prune(&self, asked: PruneAsked) -> BoxFuture<'static, Result<Pruned, Fault>> {
            Box::pin(async move { if asked.all { Err(busy()) } else { Ok(pruned(asked.dry_run)) } })
        }

        fn forget(&self, asked: ForgetAsked) -> BoxFuture<'static, Result<Forgotten, Fault>> {
            let snapshots = vec![crate::chain::Key::new("sha256:1").unwrap()];
            let forgotten = Forgotten { image: asked.image, snapshots, evicted: pruned(false).evicted };
            Box::pin(async move { if asked.prune { Ok(forgotten) } else { Err(busy()) } })
        }

        fn snapshots(&self) -> BoxFuture<'static, Result<SnapshotsSeen, Fault>> {
            Box::pin(async { Ok(seen()) })
        }
    }

    /// A process at `socket` while `with` runs.
    async fn serving<F: Future>(socket: &Path, with: impl FnOnce(Arc<Process>) -> F) -> F::Output {
        let process = Arc::new(Process::default());
        let server = ControlServer::bind(socket).unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let served: Arc<dyn Served> = Arc::<Process>::clone(&process);
        let running = tokio::spawn(server.run(served, async {
            stopped.await.ok();
        }));
        let done = with(process).await;
        stop.send(()).unwrap();
        running.await.unwrap().unwrap();
        assert!(!socket.exists());
        done
    }

    fn ready() {
        rustls::crypto::ring::default_provider().install_default().ok();
    }

    #[tokio::test]
    async fn questions_are_answered_at_paths_of_any_length() {
        ready();
        let temporary = tempfile::tempdir().unwrap();
        let deep = temporary.path().join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        for socket in [temporary.path().join("s"), deep.join("socket")] {
            let client = Client::new(&socket);
            assert!(matches!(client.status().await, Err(ControlError::Gone { .. })));
            serving(&socket, async |process| {
                assert_eq!(client.health().await.unwrap(), process.health());
                assert_eq!(client.status().await.unwrap(), process.status());
                let asked = MountAsked {
                    image: "i".to_owned(),
                    mount_point: "/m".into(),
                    platform: None,
                    upper: Some("/u".into()),
                    driver: crate::drivers::Wanted::Auto,
                    no_fill: true,
                };
                assert_eq!(client.mount(&asked).await.unwrap(), example());
                assert_eq!(*process.mounts.lock().unwrap(), [asked]);
                let asked = |lazy| UmountAsked { mount_point: "/m".into(), lazy };
                client.umount(&asked(true)).await.unwrap();
                match client.umount(&asked(false)).await {
                    Err(ControlError::Refused(fault)) => assert_eq!(fault, busy()),
                    other => panic!("{other:?}"),
                }
                assert_eq!(client.wait(&WaitAsked { mount_point: "/m".into() }).await.unwrap(), example());
                let asked = |all| PruneAsked { all, dry_run: true };
                assert_eq!(client.prune(&asked(false)).await.unwrap(), pruned(true));
                assert!(matches!(client.prune(&asked(true)).await, Err(ControlError::Refused(_))));
                let asked = ForgetAsked { image: "i".to_owned(), prune: true };
                let forgotten = client.forget(&asked).await.unwrap();
                assert_eq!((forgotten.image.as_str(), forgotten.snapshots.len()), ("i", 1));
                assert_eq!(forgotten.evicted, pruned(true).evicted);
                assert_eq!(client.snapshots().await.unwrap(), seen());
            })
            .await;
        }
    }

    #[tokio::test]
    async fn a_pull_tells_how_far_it_is_and_how_it_ends() {
        ready();
        let temporary = tempfile::tempdir().unwrap();
        let socket = temporary.path().join("s");
        serving(&socket, async |_| {
            let client = Client::new(&socket);
            let mut told = Vec::new();
            let asked = |image: &str| PullAsked { image: image.to_owned(), platform: None };
            let good = client.pull(&asked("good"), |bytes, of| told.push((bytes, of))).await;
            assert_eq!(good.unwrap(), pulled());
            assert_eq!(told, [(1, 3), (2, 3), (3, 3)]);
            match client.pull(&asked("bad"), |_, _| {}).await {
                Err(ControlError::Refused(fault)) => assert_eq!(fault, busy()),
                other => panic!("{other:?}"),
            }
            assert!(matches!(client.pull(&asked("cut"), |_, _| {}).await, Err(ControlError::Ended { .. })));
        })
        .await;
    }

    #[tokio::test]
    async fn what_is_not_understood_is_refused_with_the_reason() {
        ready();
        let temporary = tempfile::tempdir().unwrap();
        let socket = temporary.path().join("s");
        let large = format!("{{\"mount_point\": \"{}\"}}", "x".repeat(80_000));
        serving(&socket, async |_| {
            let client = Client::new(&socket);
            for (question, body, kind, words) in [
                ("v1/umount", "{\"mount_point\": \"/m\", \"force\": true}", "usage", "unknown field `force`"),
                ("v1/umount", "{}", "usage", "missing field `mount_point`"),
                ("v1/umount", "{", "usage", "cannot understand"),
                ("v1/umount", &large, "usage", "more than 65536 bytes"),
                ("v1/fly", "{}", "usage", "POST /v1/fly: there is no such question"),
                ("v1/status", "{}", "usage", "POST /v1/status: there is no such question"),
                ("v2/umount", "{}", "unsupported", "speaks version 1 of the control protocol, not 2"),
                ("umount", "{}", "usage", "no such question"),
            ] {
                let url = format!("http://headstart/{question}");
                match client.send(|client| client.post(url).body(body.to_owned())).await {
                    Err(ControlError::Refused(fault)) => {
                        assert_eq!(fault.kind, kind, "{question}: {fault:?}");
                        assert!(fault.message.contains(words), "{question}: {fault:?}");
                    }
                    other => panic!("{question}: {other:?}"),
                }
            }
        })
        .await;
    }

    #[test]
    fn states_have_the_names_that_are_promised() {
        let text = serde_json::to_value(example()).unwrap();
        assert_eq!(text["layers"][0]["state"], "lazy");
        assert_eq!(text["mount_point"], "/mnt");
        for (state, name) in
            [(LayerState::Lazy, "lazy"), (LayerState::Filling, "filling"), (LayerState::Local, "local")]
        {
            assert_eq!(serde_json::to_value(state).unwrap(), name);
        }
    }
}
