//! The ten calls of `containerd.services.snapshots.v1.Snapshots`.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Instant;

use futures::Stream;
use prost::Message as _;
use tonic::{Code, Request, Response, Status, async_trait};

use super::proto::containerd::services::snapshots::v1::snapshots_server::Snapshots;
use super::proto::containerd::services::snapshots::v1::{
    CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, ListSnapshotsResponse, MountsRequest,
    MountsResponse, PrepareSnapshotRequest, PrepareSnapshotResponse, RemoveSnapshotRequest, StatSnapshotRequest,
    StatSnapshotResponse, UpdateSnapshotRequest, UpdateSnapshotResponse, UsageRequest, UsageResponse,
    ViewSnapshotRequest, ViewSnapshotResponse,
};
use super::{Calls, Prepared, Snapshotter, SnapshotterError, status, translate};

/// Most snapshots in one message of a list, as containerd's own service sends them.
const LIST_SNAPSHOTS: usize = 100;

/// Most bytes of one: clients take 4 MiB and more. A snapshot with the largest key, parent and labels has less.
const LIST_BYTES: usize = 1 << 20;

pub(super) struct Service {
    snapshotter: Arc<dyn Snapshotter>,
    calls: Arc<Calls>,
}

impl Service {
    pub(super) const fn new(snapshotter: Arc<dyn Snapshotter>, calls: Arc<Calls>) -> Self {
        Self { snapshotter, calls }
    }

    /// Does the work of a call to its end, even if the caller goes away: half a change would be worse than one that
    /// nobody waits for. `key` is for the log.
    async fn call<T, F>(
        &self,
        name: &'static str,
        key: &str,
        work: impl FnOnce(Arc<dyn Snapshotter>) -> F,
    ) -> Result<T, Status>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, SnapshotterError>> + Send + 'static,
    {
        let began = Instant::now();
        let calls = Arc::clone(&self.calls);
        let work = work(Arc::clone(&self.snapshotter));
        let key = key.to_owned();
        let working = tokio::spawn(async move {
            // A call that breaks down is caught here, so that it is counted.
            let done = tokio::spawn(work).await.unwrap_or(Err(SnapshotterError::Broken));
            let took = began.elapsed();
            calls.count(name, took, done.is_err());
            match &done {
                Ok(_) => tracing::debug!(call = name, microseconds = took.as_micros(), key, "answered"),
                Err(error) => log_failure(name, &key, error),
            }
            done
        });
        match working.await {
            Ok(done) => done.map_err(Status::from),
            Err(_) => Err(SnapshotterError::Broken.into()),
        }
    }
}

/// What a client may ask for and not get is its own to tell; the rest is ours.
fn log_failure(call: &'static str, key: &str, error: &SnapshotterError) {
    let words = status::words(error);
    match status::code(error) {
        // It is the operator who can do something about it.
        Code::FailedPrecondition if matches!(error, SnapshotterError::Unmapped { .. }) => {
            tracing::error!(call, key, "failed: {words}");
        }
        Code::NotFound | Code::AlreadyExists | Code::FailedPrecondition | Code::InvalidArgument => {
            tracing::debug!(call, key, "refused: {words}");
        }
        _ => tracing::error!(call, key, "failed: {words}"),
    }
}

#[async_trait]
impl Snapshots for Service {
    async fn prepare(
        &self,
        request: Request<PrepareSnapshotRequest>,
    ) -> Result<Response<PrepareSnapshotResponse>, Status> {
        let PrepareSnapshotRequest { snapshotter: _, key, parent, labels } = request.into_inner();
        let labels = translate::labels(labels);
        let log = key.clone();
        match self.call("prepare", &log, |to| async move { to.prepare(key, parent, labels).await }).await? {
            Prepared::Mounts(mounts) => {
                Ok(Response::new(PrepareSnapshotResponse { mounts: translate::mounts(mounts) }))
            }
            Prepared::There(name) => Err(status::there(&name)),
        }
    }

    async fn view(&self, request: Request<ViewSnapshotRequest>) -> Result<Response<ViewSnapshotResponse>, Status> {
        let ViewSnapshotRequest { snapshotter: _, key, parent, labels } = request.into_inner();
        let labels = translate::labels(labels);
        let log = key.clone();
        let mounts = self.call("view", &log, |to| async move { to.view(key, parent, labels).await }).await?;
        Ok(Response::new(ViewSnapshotResponse { mounts: translate::mounts(mounts) }))
    }

    async fn mounts(&self, request: Request<MountsRequest>) -> Result<Response<MountsResponse>, Status> {
        let MountsRequest { snapshotter: _, key } = request.into_inner();
        let log = key.clone();
        let mounts = self.call("mounts", &log, |to| async move { to.mounts(key).await }).await?;
        Ok(Response::new(MountsResponse { mounts: translate::mounts(mounts) }))
    }

    async fn commit(&self, request: Request<CommitSnapshotRequest>) -> Result<Response<()>, Status> {
        let CommitSnapshotRequest { snapshotter: _, name, key, labels, parent } = request.into_inner();
        let labels = translate::labels(labels);
        let log = key.clone();
        self.call("commit", &log, |to| async move { to.commit(name, key, parent, labels).await }).await?;
        Ok(Response::new(()))
    }

    async fn remove(&self, request: Request<RemoveSnapshotRequest>) -> Result<Response<()>, Status> {
        let RemoveSnapshotRequest { snapshotter: _, key } = request.into_inner();
        let log = key.clone();
        self.call("remove", &log, |to| async move { to.remove(key).await }).await?;
        Ok(Response::new(()))
    }

    async fn stat(&self, request: Request<StatSnapshotRequest>) -> Result<Response<StatSnapshotResponse>, Status> {
        let StatSnapshotRequest { snapshotter: _, key } = request.into_inner();
        let log = key.clone();
        let snapshot = self.call("stat", &log, |to| async move { to.stat(key).await }).await?;
        Ok(Response::new(StatSnapshotResponse { info: Some(translate::info(snapshot)) }))
    }

    async fn update(
        &self,
        request: Request<UpdateSnapshotRequest>,
    ) -> Result<Response<UpdateSnapshotResponse>, Status> {
        let UpdateSnapshotRequest { snapshotter: _, info, update_mask } = request.into_inner();
        let Info { name, labels, .. } = info.unwrap_or_default();
        let fields = update_mask.map(|mask| mask.paths).unwrap_or_default();
        let labels = translate::labels(labels);
        let log = name.clone();
        let snapshot = self.call("update", &log, |to| async move { to.update(name, labels, fields).await }).await?;
        Ok(Response::new(UpdateSnapshotResponse { info: Some(translate::info(snapshot)) }))
    }

    type ListStream = Pin<Box<dyn Stream<Item = Result<ListSnapshotsResponse, Status>> + Send>>;

    async fn list(&self, request: Request<ListSnapshotsRequest>) -> Result<Response<Self::ListStream>, Status> {
        let ListSnapshotsRequest { snapshotter: _, filters } = request.into_inner();
        let found = self.call("list", "", |to| async move { to.list(filters).await }).await?;
        let messages = Messages { infos: found.into_iter().map(translate::info), over: None };
        Ok(Response::new(Box::pin(futures::stream::iter(messages.map(Ok)))))
    }

    async fn usage(&self, request: Request<UsageRequest>) -> Result<Response<UsageResponse>, Status> {
        let UsageRequest { snapshotter: _, key } = request.into_inner();
        let log = key.clone();
        let usage = self.call("usage", &log, |to| async move { to.usage(key).await }).await?;
        Ok(Response::new(translate::usage(usage)))
    }

    async fn cleanup(&self, request: Request<CleanupRequest>) -> Result<Response<()>, Status> {
        let CleanupRequest { snapshotter: _ } = request.into_inner();
        self.call("cleanup", "", |to| async move { to.cleanup().await }).await?;
        Ok(Response::new(()))
    }
}

/// Messages of a list, none too large.
struct Messages<I> {
    infos: I,
    /// What did not fit into the message before.
    over: Option<Info>,
}

impl<I: Iterator<Item = Info>> Iterator for Messages<I> {
    type Item = ListSnapshotsResponse;

    fn next(&mut self) -> Option<ListSnapshotsResponse> {
        let first = self.over.take().or_else(|| self.infos.next())?;
        let mut bytes = first.encoded_len();
        let mut info = vec![first];
        while info.len() < LIST_SNAPSHOTS {
            let Some(next) = self.infos.next() else { break };
            bytes += next.encoded_len();
            if bytes > LIST_BYTES {
                self.over = Some(next);
                break;
            }
            info.push(next);
        }
        Some(ListSnapshotsResponse { info })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_cut_into_messages() {
        let info = |number: usize, padding: usize| Info {
            name: format!("{number}"),
            parent: "p".repeat(padding),
            ..Info::default()
        };
        for (sizes, messages) in [
            (vec![], vec![]),
            (vec![0; 100], vec![100]),
            (vec![0; 250], vec![100, 100, 50]),
            (vec![400_000; 5], vec![2, 2, 1]),
            // One alone is larger than any may be: it is sent all the same.
            (vec![2 << 20, 0, 0], vec![1, 2]),
            (vec![0, 2 << 20, 0], vec![1, 1, 1]),
        ] {
            let infos: Vec<Info> = sizes.iter().enumerate().map(|(number, padding)| info(number, *padding)).collect();
            let cut: Vec<ListSnapshotsResponse> = Messages { infos: infos.clone().into_iter(), over: None }.collect();
            assert_eq!(cut.iter().map(|message| message.info.len()).collect::<Vec<_>>(), messages);
            assert_eq!(cut.into_iter().flat_map(|message| message.info).collect::<Vec<_>>(), infos);
        }
    }
}
