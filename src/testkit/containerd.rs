//! What this program asks of containerd, answered as it is told: the version and the content service on a Unix socket.
//!
//! It is stricter than the real one: content is only seen in its namespace, and a filter that it does not know is an
//! error.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::stream::{self, BoxStream};
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use crate::grpc::proto::containerd::services::content::v1::content_server::{Content, ContentServer};
use crate::grpc::proto::containerd::services::content::v1::{
    AbortRequest, DeleteContentRequest, Info, InfoRequest, InfoResponse, ListContentRequest, ListContentResponse,
    ListStatusesRequest, ListStatusesResponse, ReadContentRequest, ReadContentResponse, StatusRequest, StatusResponse,
    UpdateRequest, UpdateResponse, WriteContentRequest, WriteContentResponse,
};
use crate::grpc::proto::containerd::services::version::v1::VersionResponse;
use crate::grpc::proto::containerd::services::version::v1::version_server::{Version, VersionServer};
use crate::model::{Algorithm, BlobDigest, Digest};
use crate::oci::{Document, media};

/// Bytes in one message of a read: small, so that answers come in pieces.
const PIECE: usize = 1000;

/// Namespace and digest.
type Name = (String, String);

/// A blob, and what is noted about it.
type Noted = (Vec<u8>, HashMap<String, String>);

#[derive(Default)]
struct State {
    version: String,
    hangs: bool,
    asked: Vec<String>,
    content: BTreeMap<Name, Noted>,
}

#[derive(Clone, Default)]
struct Services(Arc<Mutex<State>>);

/// A containerd. It stops when it is dropped; the socket stays.
pub struct FakeContainerd {
    socket: PathBuf,
    services: Services,
    /// Dropped, it ends the server and its connections.
    _until: oneshot::Sender<()>,
}

impl FakeContainerd {
    /// Starts one that calls itself `version`. A socket that is there is replaced.
    ///
    /// # Panics
    /// If it cannot listen there.
    pub fn start(socket: &Path, version: &str) -> Self {
        // What an earlier one left.
        std::fs::remove_file(socket).ok();
        let listener = UnixListener::bind(socket).expect("the directory of the test takes a socket");
        let services = Services::default();
        services.state().version = version.to_owned();
        let (until, end) = oneshot::channel();
        let serving = Server::builder()
            .add_service(VersionServer::new(services.clone()))
            .add_service(ContentServer::new(services.clone()))
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), async { drop(end.await) });
        tokio::spawn(async move { drop(serving.await) });
        Self { socket: socket.to_owned(), services, _until: until }
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What it calls itself from now on.
    pub fn set_version(&self, version: &str) {
        version.clone_into(&mut self.services.state().version);
    }

    /// Whether it answers nothing from now on.
    pub fn set_hangs(&self, hangs: bool) {
        self.services.state().hangs = hangs;
    }

    /// What it was asked so far.
    pub fn asked(&self) -> Vec<String> {
        self.services.state().asked.clone()
    }

    /// Gives it a document that it got from a repository, as its own pull notes it. `host` is without a port.
    pub fn put(&self, namespace: &str, bytes: &[u8], (host, repository): (&str, &str)) -> BlobDigest {
        let digest = BlobDigest(Digest::of(Algorithm::Sha256, bytes));
        let mut labels = HashMap::from([(format!("containerd.io/distribution.source.{host}"), repository.to_owned())]);
        if let Ok(Document::Index(index)) = Document::parse(bytes, None) {
            let manifests = index.manifests.iter().filter(|entry| media::is_manifest(&entry.media_type));
            let named = manifests
                .enumerate()
                .map(|(number, entry)| (format!("containerd.io/gc.ref.content.m.{number}"), entry.digest.to_string()));
            labels.extend(named);
        }
        let key = (namespace.to_owned(), digest.to_string());
        self.services.state().content.insert(key, (bytes.to_vec(), labels));
        digest
    }
}

impl Services {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a question; does not return while it hangs.
    async fn asked(&self, what: String) {
        let hangs = {
            let mut state = self.state();
            state.asked.push(what);
            state.hangs
        };
        if hangs {
            std::future::pending::<()>().await;
        }
    }
}

fn namespace<T>(request: &Request<T>) -> Result<String, Box<Status>> {
    let named = request.metadata().get("containerd-namespace").and_then(|value| value.to_str().ok());
    named.map(str::to_owned).ok_or_else(|| Box::new(Status::failed_precondition("namespace is required")))
}

/// True if one of `filters` fits; each must be an equality of a label.
fn fits(labels: &HashMap<String, String>, filters: &[String]) -> Result<bool, Box<Status>> {
    for filter in filters {
        let parts = filter.strip_prefix("labels.\"").and_then(|rest| rest.split_once("\"=="));
        let Some((name, value)) = parts else {
            return Err(Box::new(Status::invalid_argument(format!("filter {filter:?}"))));
        };
        if labels.get(name).is_some_and(|found| found == value) {
            return Ok(true);
        }
    }
    Ok(filters.is_empty())
}

#[tonic::async_trait]
impl Version for Services {
    async fn version(&self, _: Request<()>) -> Result<Response<VersionResponse>, Status> {
        self.asked("version".to_owned()).await;
        Ok(Response::new(VersionResponse { version: self.state().version.clone(), revision: String::new() }))
    }
}

#[tonic::async_trait]
impl Content for Services {
    type ListStream = BoxStream<'static, Result<ListContentResponse, Status>>;
    type ReadStream = BoxStream<'static, Result<ReadContentResponse, Status>>;
    type WriteStream = BoxStream<'static, Result<WriteContentResponse, Status>>;

    async fn info(&self, request: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        let key = (namespace(&request).map_err(|status| *status)?, request.into_inner().digest);
        self.asked(format!("info {}", key.1)).await;
        let state = self.state();
        let (bytes, labels) = state.content.get(&key).ok_or_else(|| Status::not_found(key.1.clone()))?;
        let size = i64::try_from(bytes.len()).unwrap_or(i64::MAX);
        let info = Info { digest: key.1, size, labels: labels.clone(), ..Info::default() };
        Ok(Response::new(InfoResponse { info: Some(info) }))
    }

    async fn list(&self, request: Request<ListContentRequest>) -> Result<Response<Self::ListStream>, Status> {
        let (namespace, filters) = (namespace(&request).map_err(|status| *status)?, request.into_inner().filters);
        self.asked("list".to_owned()).await;
        let mut info = Vec::new();
        for ((of, digest), (_, labels)) in &self.state().content {
            if *of == namespace && fits(labels, &filters).map_err(|status| *status)? {
                info.push(Info { digest: digest.clone(), labels: labels.clone(), ..Info::default() });
            }
        }
        Ok(Response::new(Box::pin(stream::iter([Ok(ListContentResponse { info })]))))
    }

    async fn read(&self, request: Request<ReadContentRequest>) -> Result<Response<Self::ReadStream>, Status> {
        let key = (namespace(&request).map_err(|status| *status)?, request.into_inner().digest);
        self.asked(format!("read {}", key.1)).await;
        let state = self.state();
        let (bytes, _) = state.content.get(&key).ok_or_else(|| Status::not_found(key.1.clone()))?;
        let piece = |data: &[u8]| Ok(ReadContentResponse { offset: 0, data: data.to_vec() });
        let pieces: Vec<_> = bytes.chunks(PIECE).map(piece).collect();
        Ok(Response::new(Box::pin(stream::iter(pieces))))
    }

    async fn update(&self, _: Request<UpdateRequest>) -> Result<Response<UpdateResponse>, Status> {
        Err(Status::unimplemented("update"))
    }

    async fn delete(&self, _: Request<DeleteContentRequest>) -> Result<Response<()>, Status> {
        Err(Status::unimplemented("delete"))
    }

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Err(Status::unimplemented("status"))
    }

    async fn list_statuses(&self, _: Request<ListStatusesRequest>) -> Result<Response<ListStatusesResponse>, Status> {
        Err(Status::unimplemented("list_statuses"))
    }

    async fn write(&self, _: Request<Streaming<WriteContentRequest>>) -> Result<Response<Self::WriteStream>, Status> {
        Err(Status::unimplemented("write"))
    }

    async fn abort(&self, _: Request<AbortRequest>) -> Result<Response<()>, Status> {
        Err(Status::unimplemented("abort"))
    }
}
