//! Keeps the cache within its quota and the disk above its reserve.

use std::sync::Weak;
use std::time::{Duration, Instant};

use super::Host;

/// How often the size of the cache is looked at, which takes a look at each of its directories. Sooner if much has come
/// since: this part of the quota, and not less than this many bytes.
const LOOK_AT_CACHE: Duration = Duration::from_secs(60);
const MUCH_OF_QUOTA: u64 = 16;
const MUCH: u64 = 64 << 20;

/// How often it is looked whether much has come.
const LOOK_AT_WRITTEN: Duration = Duration::from_secs(1);

/// Does so as long as the host is there.
pub(super) async fn keep_in_bounds(host: Weak<Host>) {
    loop {
        let Some(looking) = host.upgrade() else { return };
        let goal = looking.settings.cache_goal();
        let written = looking.house.store.bytes_written();
        let evicting = tokio::task::spawn_blocking(move || {
            if let Err(error) = looking.house.prune(&goal, false) {
                let error: &dyn std::error::Error = &error;
                tracing::warn!(error, "the cache is not kept within its bounds");
            }
        });
        evicting.await.ok();
        let (begin, much) = (Instant::now(), (goal.quota.unwrap_or(u64::MAX) / MUCH_OF_QUOTA).max(MUCH));
        while begin.elapsed() < LOOK_AT_CACHE {
            tokio::time::sleep(LOOK_AT_WRITTEN).await;
            let Some(host) = host.upgrade() else { return };
            if host.house.store.bytes_written().saturating_sub(written) >= much {
                break;
            }
        }
    }
}
