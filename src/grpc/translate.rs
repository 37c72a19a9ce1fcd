//! Values of the protocol from values of this program, and back.

use super::Mount;
use super::proto::containerd::services::snapshots::v1;
use super::proto::containerd::types;
use crate::chain::{Kind, Labels, Snapshot, Usage};
use crate::model::Timestamp;

pub(super) fn mounts(mounts: Vec<Mount>) -> Vec<types::Mount> {
    let mount = |Mount { kind, source, options }| types::Mount {
        r#type: String::from(kind),
        source,
        // Where it is mounted is the caller's to say.
        target: String::new(),
        options,
    };
    mounts.into_iter().map(mount).collect()
}

pub(super) fn labels(labels: impl IntoIterator<Item = (String, String)>) -> Labels {
    labels.into_iter().collect()
}

const fn kind(kind: Kind) -> v1::Kind {
    match kind {
        Kind::View => v1::Kind::View,
        Kind::Active => v1::Kind::Active,
        Kind::Committed => v1::Kind::Committed,
    }
}

fn timestamp(time: Timestamp) -> prost_types::Timestamp {
    let nanos = i32::try_from(time.nanos).expect("a second has less nanoseconds than an i32 holds");
    prost_types::Timestamp { seconds: time.seconds, nanos }
}

pub(super) fn info(snapshot: Snapshot) -> v1::Info {
    v1::Info {
        name: snapshot.key.into(),
        parent: snapshot.parent.map(String::from).unwrap_or_default(),
        kind: kind(snapshot.kind).into(),
        created_at: Some(timestamp(snapshot.created)),
        updated_at: Some(timestamp(snapshot.updated)),
        labels: snapshot.labels.into_iter().collect(),
    }
}

pub(super) fn usage(usage: Usage) -> v1::UsageResponse {
    let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    v1::UsageResponse { size: number(usage.bytes), inodes: number(usage.inodes) }
}
