//! The fill of one image: a task for each of its layers.

use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::UnpackError;
use crate::fetch::{FetchError, LayerImage, Standing};

/// Readers who have needed more of an image than one part of this many will need all of it, or nearly: there is no use in
/// waiting any longer. A small program reads some hundredths of its image, `import numpy` a tenth.
const EAGER_READERS: u64 = 5;

/// How often readers are looked at before a fill begins.
const LOOK: Duration = Duration::from_millis(50);

/// A program still starts as long as its readers reach new parts of the image this often. On a link of 100 Mbit/s and 50 ms
/// `import numpy` takes 4.6 s, with a new part every 0.1 s or so; filled from the second second on it took 8.4 s, because
/// what is under way for the fill when somebody misses a part cannot be called back.
const STARTING: Duration = Duration::from_secs(1);

/// How many start delays a fill waits at most for a program that starts: a reader who never stops does not stop it.
const START_DELAYS: u32 = 10;

/// Pause after the first failure of a fill that does not give up, doubled with each further one up to the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How long nothing may be heard of a layer that is being verified before it is looked at whether its chunks are still
/// there: a disk that fails loses them.
const SILENCE: Duration = Duration::from_secs(5);

/// What a fill does about failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Persistence {
    /// The first failure of a layer is that layer's end; what can be tried again by the source has been.
    Once,
    /// It tries again, after ever longer pauses.
    Forever,
}

/// How an image is filled.
#[derive(Debug, Clone, Copy)]
pub struct FillOptions {
    /// Time before it begins, for a container that starts: longer while its readers reach new parts, up to ten times as
    /// long, and shorter if they show that they want everything.
    pub start_delay: Duration,
    /// What it does about failures.
    pub persistence: Persistence,
}

/// How far the fill of a layer is.
#[derive(Debug, Clone)]
pub enum Phase {
    /// It will begin.
    Waiting,
    /// Chunks come, or the whole is being verified.
    Filling,
    /// It failed and will be tried again.
    Pausing(UnpackError),
    /// The layer is local.
    Local,
    /// It failed for good.
    Failed(UnpackError),
}

/// The fill of an image. Dropped, it ends.
#[derive(Debug)]
pub struct Fill {
    phases: Vec<watch::Receiver<Phase>>,
    tasks: JoinSet<()>,
}

impl Fill {
    /// Begins to fill `layers`, on `runtime`. It does not keep the layers: a layer that is dropped is given up.
    pub fn start(runtime: &Handle, layers: &[Arc<LayerImage>], options: FillOptions) -> Self {
        let mut tasks = JoinSet::new();
        let together: Arc<[Weak<LayerImage>]> = layers.iter().map(Arc::downgrade).collect();
        let phases = layers.iter().map(|layer| {
            let (phase, watcher) = watch::channel(Phase::Waiting);
            let task = Task { layer: Arc::downgrade(layer), phase, options };
            tasks.spawn_on(task.run(Arc::clone(&together)), runtime);
            watcher
        });
        Self { phases: phases.collect(), tasks }
    }

    /// How far the layers are, in the order they were given.
    pub fn phases(&self) -> Vec<Phase> {
        self.phases.iter().map(|phase| phase.borrow().clone()).collect()
    }

    /// Waits until every layer is local, or tells why the first one in order that is not will never be.
    ///
    /// # Errors
    /// See [`UnpackError`].
    pub async fn finished(&self) -> Result<(), UnpackError> {
        let mut phases = self.phases.clone();
        for phase in &mut phases {
            let over = |phase: &Phase| matches!(phase, Phase::Local | Phase::Failed(_));
            // A task that is gone has said its last word.
            drop(phase.wait_for(over).await);
            if let Phase::Failed(error) = &*phase.borrow() {
                return Err(error.clone());
            }
        }
        Ok(())
    }

    /// Ends the fill: nothing more is begun.
    pub fn stop(&mut self) {
        self.tasks.abort_all();
    }
}

/// The fill of one layer.
struct Task {
    layer: Weak<LayerImage>,
    phase: watch::Sender<Phase>,
    options: FillOptions,
}

impl Task {
    async fn run(self, together: Arc<[Weak<LayerImage>]>) {
        self.wait_for_the_start(&together).await;
        drop(together);
        let mut pause = FIRST_PAUSE;
        loop {
            let Some(layer) = self.layer.upgrade() else { return };
            self.phase.send_replace(Phase::Filling);
            let error = match bring(&layer).await {
                Ok(()) => {
                    self.phase.send_replace(Phase::Local);
                    return;
                }
                Err(error) => error,
            };
            if is_hopeless(&error) || self.options.persistence == Persistence::Once {
                self.phase.send_replace(Phase::Failed(error));
                return;
            }
            complain(&error, pause);
            self.phase.send_replace(Phase::Pausing(error));
            drop(layer);
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    async fn wait_for_the_start(&self, together: &[Weak<LayerImage>]) {
        let mut start = Start::new(Instant::now(), self.options.start_delay, needed_of(together).0);
        while Instant::now() < start.at {
            if self.layer.upgrade().is_none_or(|layer| layer.is_local()) || wants_everything(together) {
                return;
            }
            sleep(LOOK.min(start.at.saturating_duration_since(Instant::now()))).await;
            start.look(Instant::now(), needed_of(together).0);
        }
    }
}

/// When a fill begins that waits for a program to start.
struct Start {
    at: Instant,
    last: Instant,
    /// How long readers have to be content.
    quiet: Duration,
    /// What they have reached so far.
    needed: u64,
}

impl Start {
    fn new(now: Instant, delay: Duration, needed: u64) -> Self {
        let at = now + delay;
        let last = at.checked_add(delay.saturating_mul(START_DELAYS - 1)).unwrap_or(at);
        Self { at, last, quiet: STARTING.min(delay), needed }
    }

    fn look(&mut self, now: Instant, needed: u64) {
        if std::mem::replace(&mut self.needed, needed) != needed {
            self.at = self.at.max(now + self.quiet).min(self.last);
        }
    }
}

/// True if trying again makes nothing better.
fn is_hopeless(error: &UnpackError) -> bool {
    match error {
        UnpackError::Contradiction { .. } | UnpackError::Unverifiable { .. } => true,
        UnpackError::Fetch { source, .. } => matches!(**source, FetchError::NoRoom { .. }),
        _ => false,
    }
}

fn complain(error: &UnpackError, pause: Duration) {
    let error: &dyn std::error::Error = error;
    tracing::warn!(error, ?pause, "a layer is not complete, trying again after a pause");
}

/// True if readers have needed so much of these layers that they will need the rest.
fn wants_everything(layers: &[Weak<LayerImage>]) -> bool {
    let (needed, all) = needed_of(layers);
    needed.saturating_mul(EAGER_READERS) > all
}

/// Stored bytes of these layers that readers have reached, and all there are.
fn needed_of(layers: &[Weak<LayerImage>]) -> (u64, u64) {
    let (mut needed, mut all) = (0_u64, 0_u64);
    for layer in layers.iter().filter_map(Weak::upgrade) {
        needed = needed.saturating_add(layer.counters().needed);
        all = all.saturating_add(layer.stored_size());
    }
    (needed, all)
}

/// Fetches what is missing until the layer is local.
async fn bring(layer: &Arc<LayerImage>) -> Result<(), UnpackError> {
    let blob = *layer.blob();
    let failed = |source: &Arc<FetchError>| UnpackError::Fetch { blob, source: Arc::clone(source) };
    let (mut standing, evictions) = (layer.standing(), layer.evictions());
    loop {
        if layer.evictions() != evictions && !layer.is_complete() {
            return Err(failed(&Arc::new(FetchError::NoRoom { blob })));
        }
        let full_before = layer.counters().disk_full;
        let (sender, filled) = oneshot::channel();
        // Whoever waited may have given up.
        layer.fill(move |result| drop(sender.send(result)));
        match filled.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(failed(&error)),
            Err(_) => return Err(UnpackError::Abandoned { blob }),
        }
        if !layer.is_complete() && layer.counters().disk_full > full_before {
            return Err(UnpackError::Full { blob });
        }
        loop {
            match &*standing.borrow_and_update() {
                Standing::Local { .. } => return Ok(()),
                Standing::Contradicted(found) => {
                    return Err(UnpackError::Contradiction { blob, expected: layer.diff_id(), found: *found });
                }
                Standing::Unverifiable => return Err(UnpackError::Unverifiable { blob }),
                Standing::Failed(error) => return Err(failed(error)),
                Standing::Incomplete | Standing::Distrusted(_) => {}
            }
            if timeout(SILENCE, standing.changed()).await.is_ok_and(|changed| changed.is_err()) {
                return Err(UnpackError::Abandoned { blob });
            }
            if !layer.is_complete() {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fill_waits_for_a_program_that_starts() {
        let begin = Instant::now();
        let seconds = Duration::from_secs_f64;
        for (name, delay, looks, expected) in [
            ("nobody reads", 2.0, vec![(0.5, 0), (1.9, 0)], 2.0),
            ("early reads change nothing", 2.0, vec![(0.5, 10), (0.9, 20)], 2.0),
            ("late ones do", 2.0, vec![(0.5, 10), (1.9, 20), (2.8, 30)], 3.8),
            ("the same again is not new", 2.0, vec![(1.5, 10), (1.9, 10)], 2.5),
            ("not for ever", 2.0, vec![(1.9, 1), (8.0, 2), (19.5, 3)], 20.0),
            ("a short delay is short", 0.1, vec![(0.05, 1)], 0.15),
            ("no delay is none", 0.0, vec![(0.0, 1), (0.1, 2)], 0.0),
        ] {
            let mut start = Start::new(begin, seconds(delay), 0);
            looks.into_iter().for_each(|(at, needed)| start.look(begin + seconds(at), needed));
            assert_eq!(start.at - begin, seconds(expected), "{name}");
        }
        assert_eq!(Start::new(begin, Duration::from_secs(1 << 40), 0).quiet, STARTING);
    }
}
