//! Which driver presents a stack, and why: a decision without any doing.

use std::path::PathBuf;

use super::error::in_one_line;
use super::{Capabilities, Driver, Wanted};
use crate::model::DiffId;

/// What decides about a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerFacts {
    /// Which layer.
    pub diff_id: DiffId,
    /// All of it is here.
    pub local: bool,
    /// There will be a file that is filled as it is read.
    pub lazy: bool,
    /// Why the kernel cannot be given the layer, if it cannot.
    pub obstacle: Option<String>,
}

/// A driver and the reason for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The driver.
    pub driver: Driver,
    /// A sentence.
    pub why: String,
}

impl Choice {
    fn new(driver: Driver, why: impl Into<String>) -> Self {
        Self { driver, why: why.into() }
    }

    /// What is left when the kernel would not do what was chosen.
    #[must_use]
    pub fn after(&self, error: &(dyn std::error::Error + 'static)) -> Self {
        Self::new(Driver::Fuse, format!("driver {} failed: {}", self.driver, in_one_line(error)))
    }
}

/// Chooses the driver of a stack of `layers`.
///
/// `local` if all of them are here, else `kernel`, else `fuse`; each only if the machine can. A driver that was asked for
/// by name and cannot be had is replaced by the next one of this order, never by an earlier one.
pub fn choose(wanted: Wanted, capabilities: &Capabilities, layers: &[LayerFacts]) -> Choice {
    let asked = match wanted {
        Wanted::Auto => String::new(),
        Wanted::Driver(Driver::Fuse) => return Choice::new(Driver::Fuse, "asked for"),
        Wanted::Driver(driver) => format!("no driver {driver}: "),
    };
    if let Some(obstacle) = obstacle(capabilities, layers) {
        return Choice::new(Driver::Fuse, format!("{asked}{obstacle}"));
    }
    let missing = layers.iter().filter(|layer| !layer.local).count();
    let loops = capabilities.loop_devices.reason();
    if missing == 0 && wanted != Wanted::Driver(Driver::Kernel) {
        let why = if wanted == Wanted::Auto { "all layers are local" } else { "asked for" };
        return match (capabilities.file_backed.reason(), loops) {
            (None, _) => Choice::new(Driver::Local, why),
            (Some(_), None) => Choice::new(Driver::Local, format!("{why} (through loop devices)")),
            (Some(files), Some(loops)) => Choice::new(Driver::Fuse, format!("{asked}{files}, and {loops}")),
        };
    }
    if let Some(loops) = loops {
        return Choice::new(Driver::Fuse, format!("{asked}{loops}"));
    }
    let not_local = format!("{missing} of {} layers are not local", layers.len());
    match wanted {
        Wanted::Driver(Driver::Kernel) => Choice::new(Driver::Kernel, "asked for"),
        _ => Choice::new(Driver::Kernel, format!("{asked}{not_local}")),
    }
}

/// What keeps the kernel from presenting the stack, however far its layers are.
fn obstacle(capabilities: &Capabilities, layers: &[LayerFacts]) -> Option<String> {
    let machine = [&capabilities.root, &capabilities.erofs, &capabilities.overlay];
    let machine = machine.into_iter().find_map(|capability| capability.reason().map(str::to_owned));
    machine.or_else(|| {
        layers.iter().find_map(|layer| match (&layer.obstacle, layer.local || layer.lazy) {
            (Some(obstacle), _) => Some(format!("layer {}: {obstacle}", layer.diff_id)),
            (None, false) => Some(format!("layer {}: it is read from start to end", layer.diff_id)),
            (None, true) => None,
        })
    })
}

/// What a stack is made of, for a decision about it.
impl From<&super::LayerBacking> for LayerFacts {
    fn from(layer: &super::LayerBacking) -> Self {
        let has = |file: &Option<PathBuf>| file.is_some();
        let (lazy, local) = (has(&layer.lazy), has(&layer.local));
        // A file of any size can be mounted; a device has whole sectors.
        let uneven = !local && !layer.size.is_multiple_of(512);
        let obstacle = uneven.then(|| format!("its {} bytes are no multiple of 512", layer.size));
        Self { diff_id: layer.id.diff_id, local, lazy, obstacle }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Capability, DriverError};
    use super::*;
    use crate::chain::LayerId;
    use crate::model::{Algorithm, BlobDigest, Digest};

    fn no(reason: &str) -> Capability {
        Capability::missing(reason)
    }

    fn all() -> Capabilities {
        Capabilities {
            root: Capability::PRESENT,
            erofs: Capability::PRESENT,
            file_backed: Capability::PRESENT,
            loop_devices: Capability::PRESENT,
            overlay: Capability::PRESENT,
        }
    }

    fn layer(local: bool, lazy: bool, obstacle: Option<&str>) -> LayerFacts {
        let diff_id = DiffId(Digest::of(Algorithm::Sha256, b"layer"));
        LayerFacts { diff_id, local, lazy, obstacle: obstacle.map(str::to_owned) }
    }

    #[test]
    fn the_best_driver_that_works_is_chosen() {
        const FUSE: Wanted = Wanted::Driver(Driver::Fuse);
        const KERNEL: Wanted = Wanted::Driver(Driver::Kernel);
        const LOCAL: Wanted = Wanted::Driver(Driver::Local);
        let here = || vec![layer(true, true, None), layer(true, false, None)];
        let lazy = || vec![layer(true, true, None), layer(false, true, None)];
        let odd = || vec![layer(true, true, Some("odd"))];
        let whole = || vec![layer(false, false, None)];
        let no_root = || Capabilities { root: no("not root"), ..all() };
        let no_erofs = || Capabilities { erofs: no("no EROFS"), ..all() };
        let no_overlay = || Capabilities { overlay: no("no overlay"), ..all() };
        let no_files = || Capabilities { file_backed: no("no files"), ..all() };
        let no_loops = || Capabilities { loop_devices: no("no loops"), ..all() };
        let neither = || Capabilities { file_backed: no("no files"), loop_devices: no("no loops"), ..all() };
        let cases: Vec<(Wanted, Capabilities, Vec<LayerFacts>, Driver, &str)> = vec![
            (Wanted::Auto, all(), here(), Driver::Local, "all layers are local"),
            (Wanted::Auto, all(), lazy(), Driver::Kernel, "1 of 2 layers are not local"),
            (Wanted::Auto, no_root(), here(), Driver::Fuse, "not root"),
            (Wanted::Auto, no_erofs(), lazy(), Driver::Fuse, "no EROFS"),
            (Wanted::Auto, no_overlay(), lazy(), Driver::Fuse, "no overlay"),
            (Wanted::Auto, no_files(), here(), Driver::Local, "all layers are local (through loop devices)"),
            (Wanted::Auto, no_loops(), here(), Driver::Local, "all layers are local"),
            (Wanted::Auto, no_loops(), lazy(), Driver::Fuse, "no loops"),
            (Wanted::Auto, neither(), here(), Driver::Fuse, "no files, and no loops"),
            (Wanted::Auto, all(), odd(), Driver::Fuse, "layer LAYER: odd"),
            (Wanted::Auto, all(), whole(), Driver::Fuse, "layer LAYER: it is read from start to end"),
            (FUSE, all(), here(), Driver::Fuse, "asked for"),
            (KERNEL, all(), here(), Driver::Kernel, "asked for"),
            (KERNEL, all(), lazy(), Driver::Kernel, "asked for"),
            (KERNEL, no_loops(), here(), Driver::Fuse, "no driver kernel: no loops"),
            (KERNEL, no_erofs(), here(), Driver::Fuse, "no driver kernel: no EROFS"),
            (LOCAL, all(), here(), Driver::Local, "asked for"),
            (LOCAL, all(), lazy(), Driver::Kernel, "no driver local: 1 of 2 layers are not local"),
            (LOCAL, no_loops(), lazy(), Driver::Fuse, "no driver local: no loops"),
            (LOCAL, neither(), here(), Driver::Fuse, "no driver local: no files, and no loops"),
        ];
        for (number, (wanted, capabilities, layers, driver, why)) in cases.into_iter().enumerate() {
            let why = why.replace("LAYER", &layer(true, true, None).diff_id.to_string());
            assert_eq!(choose(wanted, &capabilities, &layers), Choice { driver, why }, "case {number}");
        }
    }

    #[test]
    fn the_files_of_a_layer_decide() {
        let diff_id = layer(true, true, None).diff_id;
        let backing = |size, lazy: Option<&str>, local: Option<&str>| {
            let layer = super::super::LayerBacking {
                number: 1,
                id: LayerId { diff_id, blob: BlobDigest(diff_id.0), anchor: "whole".to_owned() },
                size,
                lazy: lazy.map(Into::into),
                local: local.map(Into::into),
                tree: None,
            };
            LayerFacts::from(&layer)
        };
        assert_eq!(backing(4096, Some("a"), None), layer(false, true, None));
        assert_eq!(backing(4095, None, Some("a")), layer(true, false, None));
        assert_eq!(backing(4095, Some("a"), None).obstacle.as_deref(), Some("its 4095 bytes are no multiple of 512"));
    }

    #[test]
    fn what_failed_is_told() {
        let choice = Choice::new(Driver::Kernel, "asked for");
        let source = crate::sys::loopdev::LoopError::None(std::io::Error::from(std::io::ErrorKind::NotFound));
        let error = DriverError::Loop { diff_id: layer(true, true, None).diff_id, source };
        let next = choice.after(&error);
        assert_eq!(next.driver, Driver::Fuse);
        assert!(next.why.starts_with("driver kernel failed: cannot attach layer sha256:"), "{}", next.why);
        assert!(next.why.contains("there are no loop devices here"), "{}", next.why);
    }
}
