//! The sources of one layer. Mounts that share a layer may name different registries, or the same one with other
//! credentials.
//!
//! The source that worked last is asked first, so that one layer's requests go to one place and its connections stay
//! warm. When it refuses, the others are asked before anybody hears of it: an expired login or a registry that is gone is
//! no reason to fail while another mount's source still has the blob. Bytes are verified wherever they come from, so a
//! source more is a chance more and never a risk.

use std::sync::{Arc, Mutex, PoisonError};

use futures::FutureExt as _;
use futures::future::BoxFuture;

use crate::model::{BlobDigest, BlobSource, ByteRange, ByteStream, SourceError};

/// More sources than this are not kept: a machine that mounts one image from ever new names should not try them all.
const MOST: usize = 4;

/// The sources of one layer, the one to ask first in front.
pub(super) struct Origins {
    sources: Mutex<Vec<Arc<dyn BlobSource>>>,
}

impl Origins {
    pub(super) fn new(first: Arc<dyn BlobSource>) -> Self {
        Self { sources: Mutex::new(vec![first]) }
    }

    /// Adds a source. One of the same origin takes the place of the older one: its credentials are fresher.
    pub(super) fn add(&self, source: Arc<dyn BlobSource>) {
        let origin = source.origin();
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(same) = sources.iter_mut().find(|known| known.origin() == origin) {
            *same = source;
            return;
        }
        if sources.len() >= MOST {
            sources.pop();
        }
        sources.push(source);
    }

    fn list(&self) -> Vec<Arc<dyn BlobSource>> {
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn prefer(&self, worked: &Arc<dyn BlobSource>) {
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = sources.iter().position(|source| Arc::ptr_eq(source, worked)) {
            let source = sources.remove(at);
            sources.insert(0, source);
        }
    }
}

impl BlobSource for Origins {
    fn open(&self, blob: BlobDigest, range: ByteRange, attempt: u32) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
        async move {
            let mut sources = self.list();
            // Wrong bytes came: another source is asked first.
            let turn = usize::try_from(attempt).unwrap_or(0) % sources.len().max(1);
            sources.rotate_left(turn);
            let mut first_error = None;
            for (number, source) in sources.iter().enumerate() {
                match source.open(blob, range, attempt).await {
                    Ok(stream) => {
                        if number > 0 && attempt == 0 {
                            self.prefer(source);
                        }
                        return Ok(stream);
                    }
                    Err(error) => drop(first_error.get_or_insert(error)),
                }
            }
            Err(first_error.expect("a layer has at least one source"))
        }
        .boxed()
    }

    fn origin(&self) -> String {
        self.list().first().map_or_else(String::new, |source| source.origin())
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    struct Named(&'static str, bool);

    impl BlobSource for Named {
        fn open(&self, blob: BlobDigest, range: ByteRange, _: u32) -> BoxFuture<'_, Result<ByteStream, SourceError>> {
            async move {
                if self.1 {
                    return Ok(futures::StreamExt::boxed(futures::stream::empty()));
                }
                let source = Box::new(io::Error::other("refused"));
                Err(SourceError { blob, range, origin: self.0.to_owned(), transient: false, source })
            }
            .boxed()
        }

        fn origin(&self) -> String {
            self.0.to_owned()
        }
    }

    fn open(origins: &Origins) -> Result<(), String> {
        let blob = BlobDigest(crate::model::Digest::of(crate::model::Algorithm::Sha256, b""));
        let opened = origins.open(blob, ByteRange::to(1), 0).now_or_never().expect("these sources answer at once");
        opened.map(drop).map_err(|error| error.origin)
    }

    #[test]
    fn the_source_that_works_is_asked_first_from_then_on() {
        let origins = Origins::new(Arc::new(Named("a", false)));
        assert_eq!(open(&origins), Err("a".to_owned()));
        origins.add(Arc::new(Named("b", false)));
        assert_eq!((open(&origins), origins.origin()), (Err("a".to_owned()), "a".to_owned()));
        origins.add(Arc::new(Named("c", true)));
        assert_eq!((open(&origins), origins.origin()), (Ok(()), "c".to_owned()));
    }

    #[test]
    fn fresh_credentials_replace_old_ones() {
        let origins = Origins::new(Arc::new(Named("a", false)));
        origins.add(Arc::new(Named("a", true)));
        assert_eq!((open(&origins), origins.list().len()), (Ok(()), 1));
        for name in ["b", "c", "d", "e", "f"] {
            origins.add(Arc::new(Named(name, true)));
        }
        assert_eq!((origins.list().len(), origins.origin()), (MOST, "a".to_owned()));
    }
}
