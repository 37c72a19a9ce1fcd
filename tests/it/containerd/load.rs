//! Many at once.

use std::thread;

use super::image;
use super::stage::{K8S, OURS, Stage, Version};

#[test]
fn twenty_containers_at_once() {
    let stage = Stage::new(Version::V1_7);
    let twin = stage.publish_twin("app", &image::every_kind());
    stage.cri_pull(&twin.lazy);
    let read = |number: usize| {
        let container = stage.start(K8S, OURS, &twin.lazy);
        // Each begins elsewhere in the same cold files.
        let files = ["/data/big", "/changing/changed", "/bin/busybox"];
        let order: Vec<&str> = files.iter().cycle().skip(number % 3).take(3).copied().collect();
        let sums = container.exec(&format!("sha256sum {} | sort", order.join(" ")));
        container.exec(&format!("echo {number} > /mine; test \"$(cat /mine)\" = {number}"));
        (container, sums)
    };
    let done: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..20).map(|number| scope.spawn(move || read(number))).collect();
        threads.into_iter().map(|thread| thread.join().expect("a container has failed")).collect()
    });
    let sums = &done[0].1;
    assert_eq!(sums.lines().count(), 3, "{sums}");
    assert!(done.iter().all(|(_, other)| other == sums), "{:?}", done.iter().map(|(_, sums)| sums).collect::<Vec<_>>());
    thread::scope(|scope| {
        for (container, _) in done {
            scope.spawn(|| container.end());
        }
    });
    stage.cri_remove(&twin.lazy);
    stage.assert_bare(&[K8S]);
}

#[test]
fn ten_images_at_once() {
    let stage = Stage::new(Version::V2_1);
    // All have their lowest layer in common; half of them are converted.
    let publish = |number: usize| {
        let twin = stage.publish_twin(&format!("app-{number}"), &image::small(number));
        if number.is_multiple_of(2) { twin.lazy } else { twin.plain }
    };
    let images: Vec<String> = (0..10).map(publish).collect();
    thread::scope(|scope| {
        for image in &images {
            scope.spawn(|| stage.cri_pull(image));
        }
    });
    for (number, image) in images.iter().enumerate() {
        let container = stage.start(K8S, OURS, image);
        assert_eq!(container.exec("cat /number"), format!("number {number}"));
        container.end();
        stage.cri_remove(image);
    }
    stage.assert_bare(&[K8S]);
}
