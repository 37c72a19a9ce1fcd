//! What this machine's kernel can do for us, each with the reason if it cannot.

use std::path::Path;

use super::error::in_one_line;
use crate::erofs::writer::{EarlyLayout, ImageIdentity, LayerRole, Plan, Tree};
use crate::model::{Algorithm, Digest};
use crate::sys::{loopdev, stack};

/// Whether something can be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capability(Option<String>);

impl Capability {
    /// It can.
    pub const PRESENT: Self = Self(None);

    /// It cannot, for this reason.
    pub fn missing(reason: impl Into<String>) -> Self {
        Self(Some(reason.into()))
    }

    /// Why it cannot be had; none if it can.
    pub fn reason(&self) -> Option<&str> {
        self.0.as_deref()
    }

    fn of<E: std::error::Error + 'static>(result: Result<(), E>, what: &str) -> Self {
        match result {
            Ok(()) => Self::PRESENT,
            Err(error) => Self::missing(format!("{what}: {}", in_one_line(&error))),
        }
    }
}

/// What the kernel driver and the local driver need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// This process may mount.
    pub root: Capability,
    /// The kernel has EROFS.
    pub erofs: Capability,
    /// EROFS reads regular files without a block device (Linux 6.12).
    pub file_backed: Capability,
    /// There are loop devices.
    pub loop_devices: Capability,
    /// The kernel has overlayfs.
    pub overlay: Capability,
}

impl Capabilities {
    /// Of a machine that was not asked.
    pub fn unknown() -> Self {
        let untried = || Capability::missing("the kernel was not asked");
        Self { root: untried(), erofs: untried(), file_backed: untried(), loop_devices: untried(), overlay: untried() }
    }

    /// Asks the kernel, which loads modules for that if it can. Whether a file can be mounted is tried on a small one in
    /// `scratch`. Takes about a millisecond and leaves nothing behind.
    pub fn probe(scratch: &Path) -> Self {
        let root = if rustix::process::geteuid().is_root() {
            Capability::PRESENT
        } else {
            Capability::missing("only root mounts EROFS and overlayfs")
        };
        if root.reason().is_some() {
            return Self { root, ..Self::unknown() };
        }
        Self {
            root,
            erofs: Capability::of(stack::has_file_system("erofs"), "the kernel has no EROFS"),
            overlay: Capability::of(stack::has_file_system("overlay"), "the kernel has no overlayfs"),
            loop_devices: Capability::of(loopdev::check_loop_control(), "loop devices cannot be used"),
            file_backed: file_backed(scratch),
        }
    }
}

fn file_backed(scratch: &Path) -> Capability {
    let what = "the kernel does not mount EROFS images that are regular files";
    let image = match tempfile::NamedTempFile::new_in(scratch) {
        Ok(file) => file,
        Err(error) => return Capability::missing(format!("cannot try in {}: {error}", scratch.display())),
    };
    let written =
        Plan::new(Tree::new(LayerRole::Bottom), ImageIdentity::of_source(&Digest::of(Algorithm::Sha256, b"")))
            .map_err(std::io::Error::other)
            .and_then(|plan| plan.write_metadata(&EarlyLayout::default(), 0, image.as_file()));
    match written {
        Ok(()) => Capability::of(stack::try_erofs(image.path()), what),
        Err(error) => Capability::missing(format!("cannot try in {}: {error}", scratch.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_can_do_everything() {
        let scratch = tempfile::tempdir().unwrap();
        let found = Capabilities::probe(scratch.path());
        let missing = |capability: &Capability| capability.reason().map(str::to_owned);
        for capability in [&found.root, &found.erofs, &found.file_backed, &found.loop_devices, &found.overlay] {
            assert_eq!(missing(capability), None);
        }
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_place_that_cannot_be_written_is_a_reason() {
        let found = Capabilities::probe(Path::new("/no/such/directory"));
        assert!(found.file_backed.reason().unwrap().contains("/no/such/directory"));
        assert_eq!(found.loop_devices, Capability::PRESENT);
    }
}
