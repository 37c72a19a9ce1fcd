//! The image service of CRI, passed on to containerd: to see what a kubelet pulls with.
//!
//! Every call goes through as it came, bytes, headers and trailers, and so does every answer: fields and methods that this
//! program has never heard of included. Of a `PullImage` a copy is read, and its login remembered from before containerd
//! hears of it (the layers are asked for during the call) until the pull fails or the image is removed; see [`PulledLogins`].
//!
//! Only the image service is here. A kubelet asks the runtime service of containerd itself, and this one when it is told
//! `--image-service-endpoint`.
//!
//! Guarantees: nothing of a login is logged. Refuses to know who may connect: that is the socket's.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use http_body_util::{BodyExt as _, Full, Limited};
use prost::Message;
use tokio::net::UnixListener;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;
use tonic::transport::{Channel, Server};
use tower::ServiceExt as _;

use super::ServeError;
use super::proto::runtime::v1::{PullImageRequest, PullImageResponse, RemoveImageRequest};
use super::server::accepted;
use super::status;
use crate::registry::{PullLogin, PulledLogins, Secret};

/// Largest message that is taken apart: what kubelet and containerd bound theirs to.
const MESSAGE_LIMIT: usize = 16 << 20;

/// The image service of whoever is behind a channel.
#[derive(Clone)]
pub struct CriProxy {
    upstream: Channel,
    logins: Arc<PulledLogins>,
}

impl std::fmt::Debug for CriProxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CriProxy").field("logins", &self.logins).finish_non_exhaustive()
    }
}

impl NamedService for CriProxy {
    const NAME: &'static str = "runtime.v1.ImageService";
}

impl Service<http::Request<Body>> for CriProxy {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let proxy = self.clone();
        async move {
            let answer = match request.uri().path().rsplit('/').next() {
                Some("PullImage") => proxy.pull(request).await,
                Some("RemoveImage") => proxy.remove(request).await,
                _ => proxy.pass(request).await,
            };
            Ok(answer.unwrap_or_else(|status| status.into_http()))
        }
        .boxed()
    }
}

impl CriProxy {
    /// Passes on to `upstream`, and tells `logins` what is pulled with what.
    pub const fn new(upstream: Channel, logins: Arc<PulledLogins>) -> Self {
        Self { upstream, logins }
    }

    /// Serves on `listener` until `stop` is done.
    ///
    /// # Errors
    /// The socket failed for good.
    pub async fn serve(self, listener: UnixListener, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
        let serving = Server::builder().add_service(self).serve_with_incoming_shutdown(accepted(listener), stop);
        serving.await.map_err(ServeError::Ended)
    }

    async fn pass(self, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        let answer = self.upstream.oneshot(request).await;
        answer.map_err(|error| status::unreachable("containerd's image service", &error))
    }

    async fn pull(self, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        let (request, copy) = whole_request(request).await?;
        let asked: Option<PullImageRequest> = message(&copy);
        let login = asked.and_then(|asked| Some((asked.image?.image, asked.auth?)));
        let pulling = login.and_then(|(image, auth)| {
            let login = PullLogin {
                username: auth.username,
                password: Secret::new(auth.password),
                auth: Secret::new(auth.auth),
                server_address: auth.server_address,
                identity_token: Secret::new(auth.identity_token),
                registry_token: Secret::new(auth.registry_token),
            };
            self.logins.pulling(&image, &login)
        });
        let answer = self.pass(request).await?;
        let Some(pulling) = pulling else { return Ok(answer) };
        let (answer, copy, succeeded) = whole_answer(answer).await?;
        if let Some(PullImageResponse { image_ref }) = message(&copy).filter(|_| succeeded) {
            pulling.done(&image_ref);
        }
        Ok(answer)
    }

    async fn remove(self, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        let (request, copy) = whole_request(request).await?;
        let asked: Option<RemoveImageRequest> = message(&copy);
        let logins = Arc::clone(&self.logins);
        let (answer, _, succeeded) = whole_answer(self.pass(request).await?).await?;
        if let Some(image) = asked.and_then(|asked| asked.image).filter(|_| succeeded) {
            logins.forget(&image.image);
        }
        Ok(answer)
    }
}

/// The request, and all bytes of its body.
async fn whole_request(request: http::Request<Body>) -> Result<(http::Request<Body>, Bytes), Status> {
    let (parts, body) = request.into_parts();
    let (body, copy, _) = whole(body).await?;
    Ok((http::Request::from_parts(parts, body), copy))
}

/// The answer, all bytes of its body, and whether it tells of success.
async fn whole_answer(answer: http::Response<Body>) -> Result<(http::Response<Body>, Bytes, bool), Status> {
    let (parts, body) = answer.into_parts();
    let (body, copy, trailers) = whole(body).await?;
    let status = trailers.as_ref().and_then(|trailers| trailers.get("grpc-status"));
    let succeeded = status.or_else(|| parts.headers.get("grpc-status")).is_some_and(|status| status == "0");
    Ok((http::Response::from_parts(parts, body), copy, succeeded))
}

/// A body as it was, its bytes, and its trailers.
async fn whole(body: Body) -> Result<(Body, Bytes, Option<http::HeaderMap>), Status> {
    let collected = Limited::new(body, MESSAGE_LIMIT).collect().await;
    let collected = collected.map_err(|error| status::cut(error.as_ref()))?;
    let trailers = collected.trailers().cloned();
    let bytes = collected.to_bytes();
    let kept = trailers.clone();
    let body = Full::new(bytes.clone()).with_trailers(async move { kept.map(Ok) });
    Ok((Body::new(body), bytes, trailers))
}

/// The one message of a body: a byte that tells whether it is compressed, four of its length, and itself. None if it is no
/// such thing, which is the upstream's to refuse.
fn message<M: Message + Default>(body: &[u8]) -> Option<M> {
    let (head, rest) = body.split_at_checked(5)?;
    let (compressed, length) = head.split_first()?;
    let length = u32::from_be_bytes(length.try_into().ok()?);
    let length = usize::try_from(length).ok()?;
    if *compressed != 0 {
        tracing::debug!("a compressed message is passed on unread");
        return None;
    }
    M::decode(rest.get(..length)?).ok()
}
