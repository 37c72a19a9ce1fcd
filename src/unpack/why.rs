//! Why a layer is in the mode it is in, in words for a person.

use std::error::Error;

use super::Phase;
use crate::fetch::{LayerState, LayerStatus, Standing};

/// Why a layer is as it is. `phase` is that of its fill, if there is one.
pub fn why(layer: &LayerStatus, phase: Option<&Phase>) -> String {
    match &layer.standing {
        Standing::Local { .. } if layer.is_tar => return "eager: tar layer".to_owned(),
        Standing::Local { .. } => return "all of it is here and verified".to_owned(),
        Standing::Contradicted(found) => {
            return format!("lazy: the image contradicts itself, its chunks make diffID {found}");
        }
        Standing::Unverifiable => return "lazy: its diffID covers bytes that are not known".to_owned(),
        Standing::Distrusted(found) if layer.state == LayerState::Lazy => {
            return format!("lazy: the local copy had diffID {found} and was discarded");
        }
        Standing::Failed(error) => return format!("lazy: {}", chain(&**error)),
        Standing::Incomplete | Standing::Distrusted(_) => {}
    }
    if layer.chunks == 0 && layer.bytes_present == 0 && phase.is_none() {
        return "eager: no chunk index in the layer, it comes as a whole with the first read".to_owned();
    }
    let form = if layer.chunks == 0 { "eager: no chunk index in the layer, " } else { "" };
    match phase {
        _ if layer.state == LayerState::Filling => {
            let (here, all) = (mebibytes(layer.bytes_present), mebibytes(layer.bytes));
            if layer.chunks > 0 && layer.present == layer.chunks {
                "filling: all of it is here and is being verified".to_owned()
            } else {
                format!("{form}filling: {here} of {all} MiB")
            }
        }
        None => "lazy: it is not filled".to_owned(),
        Some(Phase::Waiting) => format!("{form}lazy: the fill begins soon"),
        Some(Phase::Filling | Phase::Local) => "filling: all of it is here and is being verified".to_owned(),
        Some(Phase::Pausing(error)) => format!("{form}lazy: {}; it will be tried again", chain(error)),
        Some(Phase::Failed(error)) => format!("{form}lazy: {}", chain(error)),
    }
}

const fn mebibytes(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::fetch::Counters;
    use crate::model::{Algorithm, BlobDigest, DiffId, Digest};
    use crate::unpack::UnpackError;

    #[test]
    fn each_mode_has_its_reason() {
        let digest = Digest::of(Algorithm::Sha256, b"");
        let blob = BlobDigest(digest);
        let lazy = LayerStatus {
            blob,
            diff_id: DiffId(digest),
            is_tar: false,
            state: LayerState::Lazy,
            standing: Standing::Incomplete,
            chunks: 10,
            present: 2,
            bytes: 80 << 20,
            bytes_present: (12 << 20) - 5,
            contradiction: None,
            prefetched: 0,
            wasted: 0,
            slowest: Vec::new(),
            counters: Counters::default(),
        };
        let filling = LayerStatus { state: LayerState::Filling, ..lazy.clone() };
        let whole = LayerStatus { chunks: 0, present: 0, bytes_present: 0, ..lazy.clone() };
        let local = Standing::Local { since: SystemTime::UNIX_EPOCH };
        let full = UnpackError::Full { blob };
        for (status, phase, expected) in [
            (&lazy, None, "lazy: it is not filled"),
            (&lazy, Some(Phase::Waiting), "lazy: the fill begins soon"),
            (&filling, Some(Phase::Filling), "filling: 12 of 80 MiB"),
            (&LayerStatus { present: 10, ..filling.clone() }, Some(Phase::Filling), "is being verified"),
            (&lazy, Some(Phase::Pausing(full.clone())), "the disk is full; it will be tried again"),
            (&lazy, Some(Phase::Failed(full)), "the disk is full"),
            (&whole, None, "eager: no chunk index in the layer, it comes as a whole"),
            (
                &LayerStatus { state: LayerState::Filling, ..whole.clone() },
                Some(Phase::Filling),
                "eager: no chunk index in the layer, filling: 0 of 80 MiB",
            ),
            (&LayerStatus { standing: local.clone(), is_tar: true, ..lazy.clone() }, None, "eager: tar layer"),
            (&LayerStatus { standing: local, ..lazy.clone() }, None, "all of it is here and verified"),
            (
                &LayerStatus { standing: Standing::Contradicted(DiffId(digest)), ..lazy.clone() },
                Some(Phase::Filling),
                "lazy: the image contradicts itself",
            ),
        ] {
            let why = why(status, phase.as_ref());
            assert!(why.contains(expected), "{why:?} does not say {expected:?}");
        }
    }
}
