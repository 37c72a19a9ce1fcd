//! What is known of a layer as a whole, and who wants to hear when that changes.
//!
//! Guarantees: whoever watches sees the last change, however late they look; who waits for a layer to become local is
//! called once, at once if it is already. Refuses to know what is then done with a local layer.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

use super::layer::Body;
use super::{FetchError, LayerImage};
use crate::model::DiffId;

/// How long is waited after a local layer could not be kept from eviction: that is a system without descriptors or locks.
const AGAIN: Duration = Duration::from_secs(1);

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

impl Standing {
    /// True if nothing has to be found out, unless something changes.
    pub(super) const fn is_over(&self) -> bool {
        match self {
            Self::Local { .. } | Self::Contradicted(_) | Self::Unverifiable | Self::Failed(_) => true,
            Self::Incomplete | Self::Distrusted(_) => false,
        }
    }
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

    /// True if all of it is here and has been verified. Some of it may go again; see [`LayerImage::local`].
    pub fn is_local(&self) -> bool {
        if let Some(chunked) = self.chunked() {
            self.notice_evictions(chunked);
        }
        matches!(*self.standing.borrow(), Standing::Local { .. })
    }

    /// Where the image is, if all of it is here and has been verified. Whoever asks may let the kernel show it: from now on
    /// all of it stays as long as this layer is open. Waits while some of it is going.
    pub fn local(&self) -> Option<LocalLayer> {
        if !self.is_local() {
            return None;
        }
        let file = match &self.body {
            Body::Chunked(chunked) => {
                let pinned = chunked.pin().unwrap_or_else(|error| {
                    let (blob, error): (_, &dyn std::error::Error) = (self.spec.blob, &error);
                    tracing::warn!(%blob, error, "a complete layer cannot be kept from eviction");
                    false
                });
                if !pinned {
                    chunked.start_over();
                    self.is_still_local(chunked);
                    return None;
                }
                &chunked.file
            }
            Body::Whole(whole) => whole.file()?,
        };
        Some(LocalLayer { diff_id: self.spec.diff_id, image: file.image_path(), size: file.spec().image_size })
    }

    /// Calls `done` when the layer is local, from a thread that may wait; from then on all of it stays, see
    /// [`LayerImage::local`]. It is not called if the layer is dropped before, and does not keep it.
    pub fn when_local(self: &Arc<Self>, done: impl FnOnce(&Arc<Self>, &LocalLayer) + Send + 'static) {
        let (weak, mut standing) = (Arc::downgrade(self), self.standing());
        self.shared.runtime.spawn(async move {
            let mut done = Some(done);
            while done.is_some() {
                if standing.wait_for(|standing| matches!(standing, Standing::Local { .. })).await.is_err() {
                    return;
                }
                let weak = Weak::clone(&weak);
                let called = tokio::task::spawn_blocking(move || {
                    let layer = weak.upgrade();
                    // It may have lost a chunk meanwhile, and then says so.
                    match layer.as_ref().and_then(|layer| Some((layer, layer.local()?))) {
                        Some((layer, local)) => {
                            if let Some(done) = done {
                                done(layer, &local);
                            }
                            None
                        }
                        None => done,
                    }
                });
                done = called.await.unwrap_or_else(|error| {
                    tracing::error!(%error, "what a local layer was waited for has failed");
                    None
                });
                if done.is_some() && matches!(*standing.borrow(), Standing::Local { .. }) {
                    // It could not be kept from eviction: whoever said so has told why.
                    tokio::time::sleep(AGAIN).await;
                }
            }
        });
    }

    /// Calls `done` when all of the layer is here and has been verified, from a thread that may wait. Nothing stays for it:
    /// some of the layer may go again, see [`LayerImage::is_local`]. It is not called if the layer is dropped before, and does
    /// not keep it.
    pub fn when_verified(self: &Arc<Self>, done: impl FnOnce(&Arc<Self>) + Send + 'static) {
        let (weak, mut standing) = (Arc::downgrade(self), self.standing());
        self.shared.runtime.spawn(async move {
            if standing.wait_for(|standing| matches!(standing, Standing::Local { .. })).await.is_err() {
                return;
            }
            let called = tokio::task::spawn_blocking(move || {
                if let Some(layer) = weak.upgrade() {
                    done(&layer);
                }
            });
            if let Err(error) = called.await {
                tracing::error!(%error, "what a verified layer was waited for has failed");
            }
        });
    }

    pub(super) fn stands(&self, standing: Standing) {
        let judged = standing.is_over();
        // Whoever finds it over may make it begin anew: that is to be the last word then.
        if judged {
            self.judged(true);
        }
        self.standing.send_replace(standing);
        if !judged {
            self.judged(false);
        }
    }

    /// It begins anew, if what it stands at is `over`. True if it did.
    pub(super) fn stands_no_more(&self, over: impl FnOnce(&Standing) -> bool) -> bool {
        let begins = self.standing.send_if_modified(|standing| {
            let over = over(standing);
            if over {
                *standing = Standing::Incomplete;
            }
            over
        });
        if begins {
            self.judged(false);
        }
        begins
    }

    fn judged(&self, judged: bool) {
        if let Some(chunked) = self.chunked() {
            chunked.judged.store(judged, Ordering::Release);
        }
    }
}
