//! The diff service: layers that containerd has downloaded are applied by this program to snapshots of its own.
//!
//! containerd asks one differ after the other while the answer is that it is not implemented: so are mounts of other
//! snapshotters, media types that are no plain tars, and the making of diffs.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tonic::transport::Channel;
use tonic::{Request, Response, Status, async_trait};

use super::proto::containerd::services::content::v1::ReadContentRequest;
use super::proto::containerd::services::content::v1::content_client::ContentClient;
use super::proto::containerd::services::diff::v1::diff_server::Diff;
use super::proto::containerd::services::diff::v1::{ApplyRequest, ApplyResponse, DiffRequest, DiffResponse};
use super::proto::containerd::types;
use super::{Calls, status};
use crate::model::{BlobDigest, DiffId};
use crate::oci::media;
use crate::snapshots::SnapshotsError;
use crate::unpack::UnpackError;

/// The header in which containerd's clients name their namespace.
const NAMESPACE: &str = "containerd-namespace";

/// Pieces of a blob on their way from containerd; it sends 1 MiB at a time.
const PIECES: usize = 4;

/// How long a piece may take: containerd reads it from its disk.
const PATIENCE: Duration = Duration::from_secs(60);

/// A layer that is to be applied.
#[derive(Debug, Clone)]
pub struct Order {
    /// What the blob is.
    pub media_type: String,
    /// Which blob.
    pub blob: BlobDigest,
    /// Its size.
    pub size: u64,
    /// The mounts that it is to be applied to.
    pub mounts: Vec<Given>,
    /// The namespace of whoever asks, if he says so.
    pub namespace: Option<String>,
}

/// A mount as somebody names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// The kind of file system, or `bind`.
    pub kind: String,
    /// What is mounted.
    pub source: String,
    /// Options, as in a line of fstab.
    pub options: Vec<String>,
}

/// What a layer turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uncompressed {
    /// Its diffID.
    pub diff_id: DiffId,
    /// Bytes of the tar, if they were counted.
    pub size: Option<u64>,
}

/// Applies layers.
#[async_trait]
pub trait Differ: Send + Sync + 'static {
    /// Applies a layer. Dropped, it ends soon and leaves the snapshot as it was.
    async fn apply(&self, order: Order) -> Result<Uncompressed, DifferError>;
}

/// Why a layer is not applied.
#[derive(Debug, thiserror::Error)]
pub enum DifferError {
    /// Somebody else may do it.
    #[error("not for this differ: {0}")]
    NotOurs(String),
    /// The records refuse it.
    #[error(transparent)]
    Snapshots(#[from] SnapshotsError),
    /// The layer cannot be applied.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
    /// What is below, or what came of it, cannot be shown.
    #[error("cannot show layers")]
    Layers(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The call could not be finished.
    #[error("the thread that applies the layer broke down")]
    Broken,
}

pub(super) struct DiffService {
    differ: Arc<dyn Differ>,
    calls: Arc<Calls>,
}

impl DiffService {
    pub(super) const fn new(differ: Arc<dyn Differ>, calls: Arc<Calls>) -> Self {
        Self { differ, calls }
    }
}

#[async_trait]
impl Diff for DiffService {
    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<ApplyResponse>, Status> {
        let namespace = request.metadata().get(NAMESPACE).and_then(|value| value.to_str().ok()).map(str::to_owned);
        // Payloads are for processors, which media types that are processed ask for; the runtime interface always sends some.
        let ApplyRequest { diff, mounts, payloads: _, sync_fs: _ } = request.into_inner();
        let began = std::time::Instant::now();
        let applied = match order(diff, mounts, namespace) {
            Ok(order) => self.differ.apply(order).await,
            Err(error) => Err(error),
        };
        self.calls.count("apply", began.elapsed(), applied.is_err());
        let Uncompressed { diff_id, size } = applied.map_err(|error| status::of_differ(&error))?;
        tracing::debug!(%diff_id, milliseconds = began.elapsed().as_millis(), "applied");
        let applied = types::Descriptor {
            media_type: media::OCI_LAYER_TAR.to_owned(),
            digest: diff_id.to_string(),
            size: size.and_then(|size| i64::try_from(size).ok()).unwrap_or_default(),
            ..types::Descriptor::default()
        };
        Ok(Response::new(ApplyResponse { applied: Some(applied) }))
    }

    async fn diff(&self, _: Request<DiffRequest>) -> Result<Response<DiffResponse>, Status> {
        Err(status::of_differ(&DifferError::NotOurs("it makes no diffs".to_owned())))
    }
}

fn order(
    diff: Option<types::Descriptor>,
    mounts: Vec<types::Mount>,
    namespace: Option<String>,
) -> Result<Order, DifferError> {
    let not_ours = |why: &str| DifferError::NotOurs(why.to_owned());
    let diff = diff.ok_or_else(|| not_ours("no layer is named"))?;
    let blob = diff.digest.parse().map_err(|_| not_ours("the layer has no digest"))?;
    let size = u64::try_from(diff.size).map_err(|_| not_ours("the layer has no size"))?;
    let given = |mount: types::Mount| Given { kind: mount.r#type, source: mount.source, options: mount.options };
    let mounts = mounts.into_iter().map(given).collect();
    Ok(Order { media_type: diff.media_type, blob, size, mounts, namespace })
}

/// The bytes of `blob` from containerd's content store, piece by piece; the last thing that comes is an error if they do
/// not come whole. Has to be called inside of a tokio runtime.
pub fn read_content(
    containerd: Channel,
    namespace: &str,
    blob: BlobDigest,
    size: u64,
) -> mpsc::Receiver<Result<bytes::Bytes, String>> {
    let (pieces, received) = mpsc::channel(PIECES);
    let mut request = Request::new(ReadContentRequest { digest: blob.to_string(), offset: 0, size: 0 });
    if let Ok(namespace) = namespace.parse() {
        request.metadata_mut().insert(NAMESPACE, namespace);
    }
    tokio::spawn(async move {
        let reading = async {
            let mut client = ContentClient::new(containerd);
            let mut stream = in_time(client.read(request)).await?.into_inner();
            let mut read = 0_u64;
            while let Some(piece) = in_time(stream.message()).await? {
                read = read.saturating_add(piece.data.len() as u64);
                if pieces.send(Ok(piece.data.into())).await.is_err() {
                    // Nobody wants more.
                    return Ok(size);
                }
            }
            Ok::<u64, Status>(read)
        };
        let failed = match reading.await {
            Ok(read) if read == size => return,
            Ok(read) => format!("containerd gave {read} of {size} bytes"),
            Err(error) => format!("containerd does not give the blob: {}", status::words(&error)),
        };
        // Whoever has gone does not want to know.
        pieces.send(Err(failed)).await.ok();
    });
    received
}

async fn in_time<T>(asking: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    tokio::time::timeout(PATIENCE, asking).await.unwrap_or_else(|_| Err(status::silent(PATIENCE)))
}
