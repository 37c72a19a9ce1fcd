//! What is known of a layer as a whole, and who wants to hear when that changes.
//!
//! Guarantees: whoever watches sees the last change, however late they look; who waits for a layer to become local is
//! called once, at once if it is already. Refuses to know what is then done with a local layer.

use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::SystemTime;

use tokio::sync::watch;

use super::layer::Body;
use super::{FetchError, LayerImage};
use crate::model::DiffId;

/// What is known of a layer as a whole.
#[derive(Debug, Clone)]
pub enum Standing {
    /// Something is missing, or the whole is still being hashed.
    Incomplete,
    /// All of it is here, safe on disk, and has its diffID.
    Local {
        /// When that was found out, maybe by another process.
        since: SystemTime,
    },
    /// All of it was here and hashed to this, which is not its diffID. The local copy was distrusted and forgotten: the
    /// next fill decides.
    Distrusted(DiffId),
    /// All of it is here and hashed to this a second time: the image contradicts itself, the layer never becomes local.
    Contradicted(DiffId),
    /// All of it is here, and what its diffID covers behind the image is not known: the layer never becomes local.
    Unverifiable,
    /// All of it is here, and it could not be verified, or that it was could not be kept. A fill tries again.
    Failed(Arc<FetchError>),
}

/// A layer that has become local.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalLayer {
    /// What all of it hashes to.
    pub diff_id: DiffId,
    /// Its image, complete and safe on disk.
    pub image: PathBuf,
    /// Size of the image in bytes.
    pub size: u64,
}

impl LayerImage {
    /// What is known of the layer as a whole, now and whenever it changes.
    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.standing.subscribe()
    }

    /// Where the image is, if all of it is here and has been verified. It stays there as long as this layer is open.
    pub fn local(&self) -> Option<LocalLayer> {
        let Standing::Local { .. } = *self.standing.borrow() else { return None };
        let file = match &self.body {
            Body::Chunked(chunked) => &chunked.file,
            Body::Whole(whole) => whole.file()?,
        };
        Some(LocalLayer { diff_id: self.spec.diff_id, image: file.image_path(), size: file.spec().image_size })
    }

    /// Calls `done` when the layer is local, from a thread that may wait. It is not called if the layer is dropped
    /// before, and does not keep it.
    pub fn when_local(self: &Arc<Self>, done: impl FnOnce(&Arc<Self>, &LocalLayer) + Send + 'static) {
        let (weak, mut standing) = (Arc::downgrade(self), self.standing());
        self.shared.runtime.spawn(async move {
            if standing.wait_for(|standing| matches!(standing, Standing::Local { .. })).await.is_err() {
                return;
            }
            drop(standing);
            let called = tokio::task::spawn_blocking(move || {
                if let Some(layer) = Weak::upgrade(&weak)
                    && let Some(local) = layer.local()
                {
                    done(&layer, &local);
                }
            });
            if let Err(error) = called.await {
                tracing::error!(%error, "what a local layer was waited for has failed");
            }
        });
    }

    pub(super) fn stands(&self, standing: Standing) {
        self.standing.send_replace(standing);
    }
}
