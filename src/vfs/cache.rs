//! What a file system remembers between requests, within bounds that do not depend on the image.

use std::num::NonZeroUsize;
use std::sync::Arc;

use lru::LruCache;

use crate::overlay::{Listing, NodeId};

/// How many merged directories' parts are remembered. Debian-based images of ten layers have 300 to 900 merged
/// directories; 4,096 take about 1 MiB with ten parts each.
const PARTS: NonZeroUsize = NonZeroUsize::new(4096).expect("4096 is not 0");

/// Bytes of merged listings that are remembered. A directory is listed by several requests in a row, and a walk needs
/// those of one path from the root; the largest merged directory of a Debian image (`/usr/share/doc` with 1,000 names)
/// takes 40 KiB.
const LISTING_BYTES: usize = 4 << 20;

/// All caches of a file system.
#[derive(Debug)]
pub(super) struct Caches {
    /// The parts of merged directories, by their topmost one.
    pub(super) parts: LruCache<NodeId, Arc<[NodeId]>>,
    listings: LruCache<NodeId, Arc<Listing>>,
    listing_bytes: usize,
}

impl Default for Caches {
    fn default() -> Self {
        Self { parts: LruCache::new(PARTS), listings: LruCache::unbounded(), listing_bytes: 0 }
    }
}

impl Caches {
    /// The listing of the merged directory whose topmost part is `top`.
    pub(super) fn listing(&mut self, top: NodeId) -> Option<Arc<Listing>> {
        self.listings.get(&top).map(Arc::clone)
    }

    /// Remembers a listing and forgets those not used for longest. The last one stays whatever its size, because the
    /// next request will be about its second part.
    pub(super) fn keep_listing(&mut self, top: NodeId, listing: Arc<Listing>) {
        self.listing_bytes += listing.footprint();
        if let Some(old) = self.listings.put(top, listing) {
            self.listing_bytes -= old.footprint();
        }
        while self.listing_bytes > LISTING_BYTES && self.listings.len() > 1 {
            let Some((_, old)) = self.listings.pop_lru() else { break };
            self.listing_bytes -= old.footprint();
        }
    }
}
