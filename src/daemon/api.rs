//! A host as the control socket sees it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use tokio::sync::mpsc;

use super::host::{Host, MountRequest, Mounted};
use super::ledger::{self, prune_goal};
use super::pull;
use super::pulls::{Pulls, UnderWay};
use crate::control::{
    DaemonStatus, Fault, ForgetAsked, Forgotten, Health, HostStatus, MountAsked, MountStatus, PruneAsked, Pruned,
    PullAsked, PullLine, Served, SnapshotsSeen, UmountAsked, WaitAsked,
};
use crate::fetch::Counters;
use crate::observe::HOST_METRICS_LEN;
use crate::sys::mount::{self, Unmount};

/// Tells which kind of failure an error is: a table of the floor above.
pub type Judge = fn(&anyhow::Error) -> Fault;

/// How often a mount that somebody waits for is looked at.
const GLANCE: Duration = Duration::from_millis(50);

/// So many lines of a pull wait for whoever reads them.
const LINES: usize = 4;

/// A host as the control socket sees it.
#[derive(Debug)]
pub struct Api {
    host: Arc<Host>,
    judge: Judge,
    ready: AtomicBool,
    ends: Arc<AtomicBool>,
}

impl Api {
    /// What can be asked of `host`.
    pub fn new(host: Arc<Host>, judge: Judge) -> Self {
        Self { host, judge, ready: AtomicBool::new(true), ends: Arc::default() }
    }

    /// Says whether the host has everything that it should have.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Relaxed);
    }

    /// Says that the host is about to end: from now on it leaves those who asked, and not they it.
    pub fn ends(&self) {
        self.ends.store(true, Ordering::Relaxed);
        self.set_ready(false);
    }

    /// What fetching has cost.
    pub(super) fn counters(&self) -> Counters {
        self.host.counters()
    }

    /// The numbers of `HOST_METRICS`, in that order.
    pub(super) fn gauges(&self) -> [u64; HOST_METRICS_LEN] {
        let mounts = u64::try_from(self.host.mounts().len()).unwrap_or(u64::MAX);
        [mounts, self.host.uptime().as_secs(), resident_bytes(), u64::from(self.health().ready)]
    }

    /// Does `work` and puts what goes wrong into words.
    fn answer<T: Send + 'static>(
        &self,
        work: impl Future<Output = anyhow::Result<T>> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, Fault>> {
        let judge = self.judge;
        Box::pin(async move { work.await.map_err(|error| judge(&error)) })
    }
}

/// Does work that waits for the kernel where it may.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> anyhow::Result<T> + Send + 'static) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work).await.context("the thread that works for a request broke down")?
}

impl Served for Api {
    fn health(&self) -> Health {
        Health {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            root: self.host.house().store.root().to_owned(),
            ready: self.ready.load(Ordering::Relaxed),
        }
    }

    fn status(&self) -> HostStatus {
        let mut mounts: Vec<MountStatus> = self.host.mounts().iter().map(|mounted| mounted.status()).collect();
        mounts.sort_by(|a, b| a.record.mount_point.cmp(&b.record.mount_point));
        let daemon = DaemonStatus {
            health: self.health(),
            uptime_seconds: self.host.uptime().as_secs(),
            resident_bytes: resident_bytes(),
            connections: self.host.connections(),
        };
        HostStatus { daemon, mounts }
    }

    fn mount(&self, asked: MountAsked) -> BoxFuture<'static, Result<MountStatus, Fault>> {
        let host = Arc::clone(&self.host);
        self.answer(async move {
            let MountAsked { image, mount_point, platform, upper, driver, no_fill } = asked;
            let (image, platform) = (image.parse()?, platform.map(|platform| platform.parse()).transpose()?);
            let (claiming, upper) = (Arc::clone(&host), upper.as_deref().map(std::path::absolute).transpose()?);
            let (claim, mount_point, upper) = blocking(move || {
                let mount_point: PathBuf = mount::check_mount_point(&mount_point)?;
                Ok((claiming.claim(&mount_point, upper.as_deref())?, mount_point, upper))
            })
            .await?;
            let mounted =
                host.mount(claim, MountRequest { image, platform, mount_point, upper, driver, fill: !no_fill }).await?;
            told(mounted).await
        })
    }

    fn umount(&self, asked: UmountAsked) -> BoxFuture<'static, Result<(), Fault>> {
        let host = Arc::clone(&self.host);
        self.answer(blocking(move || {
            let how = if asked.lazy { Unmount::Lazy } else { Unmount::Strict };
            host.unmount(&asked.mount_point, how)
        }))
    }

    fn pull(&self, asked: PullAsked) -> BoxStream<'static, PullLine> {
        let (lines, read) = mpsc::channel(LINES);
        let (host, judge, telling) = (Arc::clone(&self.host), self.judge, lines.clone());
        let (pulls, written, ends) = (host.pulls(), asked.clone(), Arc::clone(&self.ends));
        let bringing = async move {
            let (image, platform) = (asked.image.parse()?, asked.platform.map(|word| word.parse()).transpose()?);
            // Who does not read fast enough misses some of these.
            let tell = move |bytes, of| telling.try_send(PullLine::Progress { bytes, of }).unwrap_or_default();
            pull::bring(host.house(), &image, platform.as_ref(), tell).await
        };
        tokio::spawn(async move {
            let under_way = write_down(pulls, written).await;
            let end = tokio::select! {
                pulled = bringing => Some(match pulled {
                    Ok(pulled) => PullLine::Done(pulled),
                    Err(error) => PullLine::Failed(judge(&error)),
                }),
                // Who asked has gone.
                () = lines.closed() => None,
            };
            if let Some(under_way) = under_way.filter(|_| end.is_some() || !ends.load(Ordering::Relaxed)) {
                under_way.over();
            }
            if let Some(end) = end {
                lines.send(end).await.ok();
            }
        });
        Box::pin(futures::stream::unfold(read, async |mut read| read.recv().await.map(|line| (line, read))))
    }

    fn wait(&self, asked: WaitAsked) -> BoxFuture<'static, Result<MountStatus, Fault>> {
        let host = Arc::clone(&self.host);
        self.answer(async move {
            loop {
                let mounted = host.find(&asked.mount_point)?;
                if mounted.is_local() {
                    return told(mounted).await;
                }
                if let Some(never) = mounted.hopeless() {
                    return Err(never.into());
                }
                tokio::time::sleep(GLANCE).await;
            }
        })
    }

    fn prune(&self, asked: PruneAsked) -> BoxFuture<'static, Result<Pruned, Fault>> {
        let host = Arc::clone(&self.host);
        self.answer(blocking(move || Ok(host.house().prune(&prune_goal(host.settings(), asked.all), asked.dry_run)?)))
    }

    fn forget(&self, asked: ForgetAsked) -> BoxFuture<'static, Result<Forgotten, Fault>> {
        let host = Arc::clone(&self.host);
        self.answer(blocking(move || Ok(host.house().forget(&asked.image, asked.prune)?)))
    }

    fn snapshots(&self) -> BoxFuture<'static, Result<SnapshotsSeen, Fault>> {
        let host = Arc::clone(&self.host);
        self.answer(blocking(move || Ok(ledger::seen(host.house().store.root(), &host.house().recorded()?))))
    }
}

/// Writes down that a pull begins, for the next daemon should this one not come to its end.
async fn write_down(pulls: Option<Pulls>, asked: PullAsked) -> Option<UnderWay> {
    let pulls = pulls?;
    match blocking(move || Ok(pulls.begin(&asked)?)).await {
        Ok(under_way) => Some(under_way),
        Err(error) => {
            let error: &dyn std::error::Error = error.as_ref();
            tracing::warn!(error, "a pull is not gone on with should this process end");
            None
        }
    }
}

async fn told(mounted: Arc<Mounted>) -> anyhow::Result<MountStatus> {
    blocking(move || Ok(mounted.status())).await
}

/// Memory that this process occupies; 0 if the kernel does not tell.
fn resident_bytes() -> u64 {
    // `VmRSS` of `Documentation/filesystems/proc.rst`, table 1-2, in kB.
    let text = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let words = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes: u64 = words.and_then(|words| words.split_whitespace().next()?.parse().ok()).unwrap_or(0);
    kibibytes.saturating_mul(1024)
}
