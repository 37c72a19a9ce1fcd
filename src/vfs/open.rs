//! Bytes that can be brought, and layers opened while their bytes are still on the way.

use std::sync::Arc;
use std::sync::mpsc;

use futures::channel::oneshot;

use super::Layer;
use crate::erofs::{self, Image};
use crate::fetch::{Cause, LayerImage};
use crate::model::{ByteRange, ReadAt};

/// What bytes are wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// A program reads a file.
    Read,
    /// A lookup, a listing, attributes: many more will follow soon.
    Metadata,
}

/// Why bytes could not be brought; shared by all who waited for them.
pub type BringError = Arc<dyn std::error::Error + Send + Sync>;

/// Is called once, from any thread, when bytes are there or will not be. Dropped uncalled, it means they will not be.
pub type Done = Box<dyn FnOnce(Result<(), BringError>) + Send>;

/// Bytes of which absent ones can be brought.
pub trait Bring: ReadAt + 'static {
    /// Asks for `range` and returns at once. `done` may also be called before this returns.
    fn bring(&self, range: ByteRange, purpose: Purpose, done: Done);
}

impl Bring for Arc<LayerImage> {
    fn bring(&self, range: ByteRange, purpose: Purpose, done: Done) {
        let cause = match purpose {
            Purpose::Read => Cause::Read,
            Purpose::Metadata => Cause::Metadata,
        };
        self.request(range, cause, |result| done(result.map_err(|error| error as BringError)));
    }
}

/// Why a layer could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// What it needs could not be brought.
    #[error("cannot fetch bytes {range} of layer {layer}")]
    Bring {
        /// Index of the layer, 0 is the lowest.
        layer: usize,
        /// Which bytes.
        range: ByteRange,
        /// Why not.
        #[source]
        source: BringError,
    },
    /// Somebody forgot to answer.
    #[error("nobody answered for bytes {range} of layer {layer}")]
    Forgotten {
        /// Index of the layer.
        layer: usize,
        /// Which bytes.
        range: ByteRange,
    },
    /// It is no image that can be read.
    #[error("cannot open layer {layer}")]
    Image {
        /// Index of the layer.
        layer: usize,
        /// Why not.
        #[source]
        source: erofs::Error,
    },
}

/// Opens layers (each an image and its further devices, the lowest first) and waits for the bytes they need: what one
/// layer lacks is fetched while the others wait for theirs.
///
/// # Errors
/// See [`OpenError`].
pub fn open_layers<R: Bring + Clone>(layers: &[(R, Vec<R>)]) -> Result<Vec<Layer<R>>, OpenError> {
    let mut done: Vec<Option<Layer<R>>> = layers.iter().map(|_| None).collect();
    let (answer, answers) = mpsc::channel();
    // Each round ends with all layers open or with one more absent range of each brought. An image needs its
    // superblock, its device table, its attribute prefixes and its root; ranges that stay absent after they were
    // brought would never end.
    let mut left: Vec<usize> = (0..layers.len()).collect();
    while !left.is_empty() {
        let mut waiting = 0;
        for &index in &left {
            let Some((image, devices)) = layers.get(index) else { continue };
            match open(image, devices) {
                Ok(image) => {
                    if let Some(slot) = done.get_mut(index) {
                        *slot = Some(Layer::new(image));
                    }
                }
                Err(erofs::Error::Absent { device, range }) => {
                    let source = match device.checked_sub(1) {
                        None => image,
                        Some(other) => devices.get(usize::from(other)).unwrap_or(image),
                    };
                    let guard = Answer { layer: index, range, channel: answer.clone(), sent: false };
                    source.bring(range, Purpose::Metadata, Box::new(move |result| guard.send(result)));
                    waiting += 1;
                }
                Err(source) => return Err(OpenError::Image { layer: index, source }),
            }
        }
        left.clear();
        for _ in 0..waiting {
            let (layer, range, result) = answers.recv().expect("this function holds a sender");
            match result {
                Some(Ok(())) => left.push(layer),
                Some(Err(source)) => return Err(OpenError::Bring { layer, range, source }),
                None => return Err(OpenError::Forgotten { layer, range }),
            }
        }
    }
    Ok(done.into_iter().flatten().collect())
}

/// Opens an image if all that it needs is there. Its root is needed before anything else.
fn open<R: Bring + Clone>(image: &R, devices: &[R]) -> Result<Image<R>, erofs::Error> {
    let opened = match devices {
        [] => Image::open(image.clone()),
        _ => Image::open_with_devices(image.clone(), devices.to_vec()),
    }?;
    opened.root_inode()?;
    Ok(opened)
}

/// Opens one layer without holding a thread while its bytes are on the way; `index` is for messages.
///
/// # Errors
/// See [`OpenError`].
pub async fn open_layer<R: Bring + Clone>(index: usize, image: R, devices: Vec<R>) -> Result<Layer<R>, OpenError> {
    loop {
        let (device, range) = match open(&image, &devices) {
            Ok(image) => return Ok(Layer::new(image)),
            Err(erofs::Error::Absent { device, range }) => (device, range),
            Err(source) => return Err(OpenError::Image { layer: index, source }),
        };
        let source = match device.checked_sub(1) {
            None => &image,
            Some(other) => devices.get(usize::from(other)).unwrap_or(&image),
        };
        let (answer, answered) = oneshot::channel();
        // Nobody listens any more if the caller has given up.
        source.bring(range, Purpose::Metadata, Box::new(move |result| drop(answer.send(result))));
        match answered.await {
            Ok(Ok(())) => {}
            Ok(Err(source)) => return Err(OpenError::Bring { layer: index, range, source }),
            Err(oneshot::Canceled) => return Err(OpenError::Forgotten { layer: index, range }),
        }
    }
}

type Sender = mpsc::Sender<(usize, ByteRange, Option<Result<(), BringError>>)>;

/// Sends what became of a range, also if nobody says so.
struct Answer {
    layer: usize,
    range: ByteRange,
    channel: Sender,
    sent: bool,
}

impl Answer {
    fn send(mut self, result: Result<(), BringError>) {
        self.sent = true;
        // Nobody listens any more if another layer failed.
        drop(self.channel.send((self.layer, self.range, Some(result))));
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        if !self.sent {
            drop(self.channel.send((self.layer, self.range, None)));
        }
    }
}
