//! Progress bars, on a terminal only.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::convert::{Event, LeftOut, Observer};
use crate::model::RelPath;

/// Time between two drawings: enough for the eye.
const REDRAW: Duration = Duration::from_millis(200);

/// A bar that counts bytes. Draws on the standard error if that is a terminal, and nothing else.
pub(crate) fn bytes(what: &'static str, total: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} [{bar:30}] {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left");
    let bar = ProgressBar::new(total).with_message(what);
    bar.enable_steady_tick(REDRAW);
    match style {
        Ok(style) => bar.with_style(style.progress_chars("=> ")),
        Err(_) => bar,
    }
}

/// Shows how far a conversion is: stored bytes of the layers that have begun, and what was left out.
#[derive(Debug)]
pub(crate) struct ConversionBar {
    bar: ProgressBar,
    /// Bytes read of each layer.
    read: Mutex<HashMap<(usize, usize), u64>>,
    told: Mutex<Told>,
}

/// What a conversion told that its result does not show, by image and layer.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(crate) left_out: Vec<(usize, usize, LeftOut)>,
    pub(crate) not_laid_out: Vec<(usize, Vec<RelPath>)>,
}

impl ConversionBar {
    pub(crate) fn new() -> Self {
        Self { bar: bytes("converting", 0), read: Mutex::default(), told: Mutex::default() }
    }

    /// Takes the bar away. Returns what there is to tell, in the order of the layers.
    pub(crate) fn finish(&self) -> Told {
        self.bar.finish_and_clear();
        let mut told = std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner));
        told.left_out.sort_by_key(|(image, layer, _)| (*image, *layer));
        told
    }

    fn layer_read(&self, layer: (usize, usize), now: u64) {
        let before = self.read.lock().unwrap_or_else(PoisonError::into_inner).insert(layer, now).unwrap_or(0);
        self.bar.inc(now.saturating_sub(before));
    }
}

impl Observer for ConversionBar {
    fn event(&self, event: &Event<'_>) {
        match event {
            Event::Image { platform, layers, .. } => {
                tracing::info!(%platform, layers, "converting");
            }
            Event::LayerStarted { size, .. } => self.bar.inc_length(*size),
            Event::LayerRead { image, layer, read } => self.layer_read((*image, *layer), *read),
            Event::LayerDone { layer, outcome, .. } => tracing::info!(layer, ?outcome, "layer done"),
            Event::Copied { manifest } => tracing::info!(%manifest, "copied as it is"),
            Event::LeftOut { image, layer, what } => {
                tracing::info!(layer, "left out: {what}");
                let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
                told.left_out.push((*image, *layer, (*what).clone()));
            }
            Event::NotLaidOut { image, paths } => {
                let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
                told.not_laid_out.push((*image, paths.to_vec()));
            }
        }
    }
}
