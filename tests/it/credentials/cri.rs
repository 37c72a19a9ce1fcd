//! The image service of CRI between a kubelet and containerd: everything goes through, and logins stay.

use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt as _;
use headstart::grpc::proto::runtime::v1::{
    AuthConfig, ImageSpec, ListImagesRequest, PullImageRequest, PullImageResponse, RemoveImageRequest,
};
use headstart::registry::{CredentialConfig, PulledLogins};

use super::cri_fake::{Answer, Between, framed};
use super::{assert_discreet, client, name};
use crate::registry_real::{Registry, htpasswd, put_tiny};

fn image(reference: &str) -> Option<ImageSpec> {
    Some(ImageSpec { image: reference.to_owned(), ..ImageSpec::default() })
}

fn auth() -> AuthConfig {
    AuthConfig { username: "me".to_owned(), password: "hunter2".to_owned(), ..AuthConfig::default() }
}

fn pull(reference: &str, auth: AuthConfig) -> Bytes {
    framed(&PullImageRequest { image: image(reference), auth: Some(auth), sandbox_config: None })
}

fn answering(body: &Bytes, status: &'static str) -> Answer {
    let body = body.clone();
    Arc::new(move |_| {
        let body = body.clone();
        async move { (body, status) }.boxed()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_goes_through_as_it_came() {
    let directory = tempfile::tempdir().unwrap();
    let logins = Arc::new(PulledLogins::default());
    let answer = framed(&PullImageResponse { image_ref: "sha256:1".to_owned() });
    let mut between = Between::start(directory.path(), &logins, answering(&answer, "0"));
    // containerd is not there yet: that is an answer too, and no reason to end.
    let (headers, _, _) = between.call("ListImages", framed(&ListImagesRequest::default())).await;
    assert_eq!(headers["grpc-status"], "14");
    between.upstream();
    let remove = framed(&RemoveImageRequest { image: image("r.example/a:1") });
    for (method, body) in [
        ("ListImages", framed(&ListImagesRequest::default())),
        ("PullImage", pull("r.example/a:1", auth())),
        ("RemoveImage", remove),
        ("OfTheFuture", Bytes::from_static(b"\0\0\0\0\x04what")),
        // Nothing of it is a message; that is for containerd to say.
        ("PullImage", Bytes::from_static(b"\0\0\0\0\x04\xff\xff\xff\xff")),
        ("PullImage", Bytes::from_static(b"\x01\0\0\0\x04zzzz")),
        ("PullImage", Bytes::new()),
    ] {
        let (headers, got, trailers) = between.call(method, body.clone()).await;
        assert_eq!(got, answer, "{method}");
        assert_eq!((&headers["x-header"], &trailers["grpc-status"]), (&"kept".parse().unwrap(), &"0".parse().unwrap()));
        assert_eq!(trailers["x-trailer-bin"], "AAEC");
        let call = between.calls.lock().unwrap().pop().unwrap();
        assert_eq!((call.path, call.body), (format!("/runtime.v1.ImageService/{method}"), body));
        assert_eq!(call.headers["x-trace"], "kept");
    }
    // containerd is started again.
    between.upstream();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    loop {
        let (headers, got, _) = between.call("ListImages", framed(&ListImagesRequest::default())).await;
        if got == answer {
            break;
        }
        assert_eq!(headers["grpc-status"], "14");
        assert!(std::time::Instant::now() < deadline, "the proxy does not find containerd again");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_pull_is_refused_in_containerds_words_and_its_login_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    let logins = Arc::new(PulledLogins::default());
    let mut between = Between::start(directory.path(), &logins, answering(&Bytes::new(), "5"));
    between.upstream();
    let (_, _, trailers) = between.call("PullImage", pull("r.example/a:1", auth())).await;
    assert_eq!(
        (&trailers["grpc-status"], &trailers["grpc-message"]),
        (&"5".parse().unwrap(), &"as%20scripted".parse().unwrap())
    );
    assert_eq!(format!("{logins:?}"), "PulledLogins { pulls: 0, .. }");
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_are_pulled_with_what_the_kubelet_said() {
    let directory = tempfile::tempdir().unwrap();
    let registry = Registry::start(directory.path(), &htpasswd(directory.path()));
    let host = registry.host();
    put_tiny(&host, directory.path()).await;
    let image_name = name(&host, "app:v1");
    let base64 = "bWU6aHVudGVyMg==".to_owned();
    for (form, auth) in [
        ("user", auth()),
        ("auth", AuthConfig { auth: base64.clone(), ..AuthConfig::default() }),
        ("server", AuthConfig { server_address: format!("http://{host}"), ..auth() }),
    ] {
        let logins = Arc::new(PulledLogins::default());
        let asking = client(CredentialConfig { pulled: Some(Arc::clone(&logins)), ..CredentialConfig::default() });
        let error = asking.manifest(&image_name).await.unwrap_err().to_string();
        assert!(error.contains("none is known for it"), "{error}");
        // What a snapshotter is asked to do while containerd pulls.
        let during = (asking.clone(), image_name.clone());
        let answer: Answer = Arc::new(move |call| {
            let (asking, image_name) = during.clone();
            async move {
                if call.path.ends_with("RemoveImage") {
                    return (Bytes::new(), "0");
                }
                asking.manifest(&image_name).await.expect("the login is known before containerd hears of the pull");
                (framed(&PullImageResponse { image_ref: "sha256:1".to_owned() }), "0")
            }
            .boxed()
        });
        let place = directory.path().join(form);
        std::fs::create_dir(&place).unwrap();
        let mut between = Between::start(&place, &logins, answer);
        between.upstream();
        let (_, _, trailers) = between.call("PullImage", pull(&image_name.to_string(), auth)).await;
        assert_eq!(trailers["grpc-status"], "0", "{form}");
        // And afterwards, by a client that has not learned it before, until the image is removed.
        let later = || client(CredentialConfig { pulled: Some(Arc::clone(&logins)), ..CredentialConfig::default() });
        later().manifest(&image_name).await.unwrap();
        assert_discreet(&format!("{logins:?}"));
        let (_, _, trailers) =
            between.call("RemoveImage", framed(&RemoveImageRequest { image: image("sha256:1") })).await;
        assert_eq!(trailers["grpc-status"], "0");
        assert!(later().manifest(&image_name).await.is_err(), "{form}");
    }
}
