//! Progress bars, on a terminal only.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Redraws a second: enough for the eye.
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
