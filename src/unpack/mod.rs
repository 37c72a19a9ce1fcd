//! Brings layers to local: all layers of an image at the same time, many chunks of each at the same time.
//!
//! ```text
//! Fill::start(layers) ── a task a layer ── LayerImage::fill ── verified as a whole ── Standing::Local
//! ```
//!
//! Layers that are tars have no chunks to fetch: see [`unpack_tars`].
//!
//! The fetch path does the work and orders it behind everything that somebody waits for; this room decides when a fill
//! begins, what becomes of its failures, and tells how far it is. Who wants to know that a layer is local asks the layer
//! itself ([`LayerImage::when_local`]), whoever brought its last chunk.
//!
//! Guarantees: a fill ends with every layer local or with the reason why one is not; a fill that is dropped begins
//! nothing more. Refuses to know mounts, references, and what a local layer is good for.

mod apply;
mod error;
mod fill;
mod ordinary;
mod tar;
mod why;

pub use apply::applied_before;
pub(crate) use apply::{Apply, Place};
pub use error::UnpackError;
pub use fill::{Fill, FillOptions, Persistence, Phase};
pub use ordinary::{Part, Progress, unpack_tars};
pub(crate) use tar::{Told, identity_of};
pub use why::why;

#[cfg(doc)]
use crate::fetch::LayerImage;
