//! An image service that takes and gives bytes, and writes them down.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use headstart::grpc::{CriProxy, connect};
use headstart::registry::PulledLogins;
use http_body_util::{BodyExt as _, Full};
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::NamedService;
use tonic::transport::{Channel, Server};
use tower::ServiceExt as _;

/// What came to the fake.
#[derive(Debug, Clone)]
pub(crate) struct Call {
    pub(crate) path: String,
    pub(crate) body: Bytes,
    pub(crate) headers: http::HeaderMap,
}

/// What the fake does with a call: bytes of a body, and a status.
pub(crate) type Answer = Arc<dyn Fn(Call) -> BoxFuture<'static, (Bytes, &'static str)> + Send + Sync>;

#[derive(Clone)]
struct Fake {
    calls: Arc<Mutex<Vec<Call>>>,
    answer: Answer,
}

impl NamedService for Fake {
    const NAME: &'static str = "runtime.v1.ImageService";
}

impl Service<http::Request<Body>> for Fake {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let fake = self.clone();
        async move {
            let (parts, body) = request.into_parts();
            let body = body.collect().await.expect("the proxy sends whole bodies").to_bytes();
            let call = Call { path: parts.uri.path().to_owned(), body, headers: parts.headers };
            fake.calls.lock().unwrap().push(call.clone());
            let (body, status) = (fake.answer)(call).await;
            let mut trailers = http::HeaderMap::new();
            trailers.insert("grpc-status", status.parse().unwrap());
            trailers.insert("grpc-message", "as%20scripted".parse().unwrap());
            trailers.insert("x-trailer-bin", "AAEC".parse().unwrap());
            let body = Body::new(Full::new(body).with_trailers(async move { Some(Ok(trailers)) }));
            let answer =
                http::Response::builder().header("content-type", "application/grpc").header("x-header", "kept");
            Ok(answer.body(body).unwrap())
        }
        .boxed()
    }
}

/// A proxy between a client and a fake containerd.
pub(crate) struct Between {
    pub(crate) channel: Channel,
    pub(crate) calls: Arc<Mutex<Vec<Call>>>,
    upstream_socket: PathBuf,
    answer: Answer,
    upstream: Option<oneshot::Sender<()>>,
    _proxy: oneshot::Sender<()>,
}

impl Between {
    pub(crate) fn start(directory: &Path, logins: &Arc<PulledLogins>, answer: Answer) -> Self {
        let (upstream_socket, socket) = (directory.join("containerd.sock"), directory.join("cri.sock"));
        let proxy = CriProxy::new(connect(&upstream_socket), Arc::clone(logins));
        let listener = UnixListener::bind(&socket).unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        tokio::spawn(async move { proxy.serve(listener, stopped.map(drop)).await.unwrap() });
        let channel = connect(&socket);
        let calls = Arc::default();
        Self { channel, calls, upstream_socket, answer, upstream: None, _proxy: stop }
    }

    /// Brings containerd up, anew if it was there.
    pub(crate) fn upstream(&mut self) {
        self.upstream = None;
        std::fs::remove_file(&self.upstream_socket).ok();
        let listener = UnixListener::bind(&self.upstream_socket).unwrap();
        let fake = Fake { calls: Arc::clone(&self.calls), answer: Arc::clone(&self.answer) };
        let (stop, stopped) = oneshot::channel::<()>();
        // It ends as containerd does: what is under way is answered, then connections are closed.
        let server = Server::builder()
            .add_service(fake)
            .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stopped.map(drop));
        tokio::spawn(async move { server.await.unwrap() });
        self.upstream = Some(stop);
    }

    /// One call with these bytes: the answer's headers, body and trailers.
    pub(crate) async fn call(&self, method: &str, body: Bytes) -> (http::HeaderMap, Bytes, http::HeaderMap) {
        let request = http::Request::post(format!("http://localhost/runtime.v1.ImageService/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .header("x-trace", "kept")
            .body(Body::new(Full::new(body)))
            .unwrap();
        let answer = self.channel.clone().oneshot(request).await.unwrap();
        let (parts, body) = answer.into_parts();
        let body = body.collect().await.unwrap();
        let trailers = body.trailers().cloned().unwrap_or_default();
        (parts.headers, body.to_bytes(), trailers)
    }
}

/// A message as it travels, followed by a field that nobody knows.
pub(crate) fn framed(message: &impl prost::Message) -> Bytes {
    let mut bytes = message.encode_to_vec();
    // Field 4000, a string.
    bytes.extend([0x82, 0xfa, 0x01, 0x03, b'n', b'e', b'w']);
    let mut frame = vec![0];
    frame.extend(u32::try_from(bytes.len()).unwrap().to_be_bytes());
    frame.extend(bytes);
    frame.into()
}
