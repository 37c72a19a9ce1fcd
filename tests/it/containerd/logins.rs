//! What kubelets pull with, by way of our proxy of the image service: layers of a registry that wants a password are lazy with
//! nothing but that.

use super::image;
use super::lazy::{assert_lazy, bytes_of};
use super::stage::{K8S, OURS, PASSWORD, Setup, Stage, Version};

fn a_pull_secret_is_enough(version: Version) {
    let settings = "[fill]\nenabled = false\n[credentials]\ncri_proxy = true\n";
    let stage = Stage::build(version, &Setup { settings, password: true, ..Setup::default() });
    let twin = stage.publish_twin("secret", &image::every_kind());
    stage.forget_the_password();
    let published = stage.fetched().len();
    let ([user, password], proxy) = (PASSWORD, stage.cri_proxy());
    for refused in [proxy.pull(&twin.lazy), proxy.pull_with(&twin.lazy, user, "wrong"), stage.cri().pull(&twin.lazy)] {
        assert!(refused.is_err(), "the registry wants no password");
    }
    proxy.pull_with(&twin.lazy, user, password).unwrap_or_else(|error| panic!("{error}\n{}", stage.logs()));
    let container = stage.start(K8S, OURS, &twin.lazy);
    assert_eq!(container.exec("cat /opaque/new"), "of the second layer");
    let started = bytes_of(&stage.fetched().split_off(published), &twin);
    assert!(started > 0 && started < image::BIG as u64 / 2, "{started} bytes were fetched for a start");
    // Long after the pull, what has not been read yet still needs the password.
    let sum = container.exec("sha256sum /data/big");
    let fetched = stage.fetched().split_off(published);
    assert!(bytes_of(&fetched, &twin) > image::BIG as u64, "{fetched:?}");
    let lazily: Vec<_> = fetched.into_iter().filter(|read| read.status != 401).collect();
    assert_lazy(&lazily, &twin);
    container.end();
    // An ordinary image is containerd's to fetch, with the same password.
    proxy.pull_with(&twin.plain, user, password).unwrap_or_else(|error| panic!("{error}\n{}", stage.logs()));
    let container = stage.start(K8S, OURS, &twin.plain);
    assert_eq!(container.exec("sha256sum /data/big"), sum);
    container.end();
    let logs = stage.whole_logs();
    assert!(logs.len() > 1000 && !logs.contains(password), "the password is in a log");
    for image in [&twin.lazy, &twin.plain] {
        proxy.remove_image(image).unwrap_or_else(|error| panic!("{error}\n{}", stage.logs()));
    }
    stage.assert_bare(&[K8S]);
}

#[test]
fn pull_secrets_are_enough_for_containerd_1_7() {
    a_pull_secret_is_enough(Version::V1_7);
}

#[test]
fn pull_secrets_are_enough_for_containerd_2_1() {
    a_pull_secret_is_enough(Version::V2_1);
}
