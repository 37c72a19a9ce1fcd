//! How a stack of layer images becomes a directory, with as much of the work in the kernel as can be.
//!
//! | driver | what it mounts |
//! |---|---|
//! | `fuse` | nothing here: the FUSE server shows the merged tree itself |
//! | `kernel` | a loop device on the layer's lazily filled file, kernel EROFS on it, overlayfs over all layers |
//! | `local` | kernel EROFS on the complete file, overlayfs over all layers |
//!
//! [`choose`] says which it will be and why, from what the machine can ([`Capabilities`]) and how far the layers are.
//! [`KernelMounts`] does it: each layer is mounted once ([`KernelMounts::hold`]), whatever number of stacks shows it. When a lazy layer is
//! complete, [`KernelMounts::hand_over`] exchanges the file behind its loop device under the live mounts; from then on
//! nothing that reads it needs the server of the lazy file.
//!
//! Guarantees: a stack is there as a whole or not at all; no call waits longer for the kernel than the patience it was
//! given, though the kernel may read lazy files that do not come; what is dropped is unmounted; what a killed owner left
//! is found from the mount table alone ([`leftovers`]) and told apart from what a living owner has.
//!
//! Refuses to know FUSE, where bytes come from, and what images are.

mod attached;
mod capabilities;
mod choice;
mod error;
pub mod leftovers;
mod mounts;
mod run;
mod timely;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::chain::LayerId;

pub use attached::{Backing, HeldLayer, LayerReport};
pub use capabilities::{Capabilities, Capability};
pub use choice::{Choice, LayerFacts, choose};
pub use error::DriverError;
pub use mounts::{KernelMounts, Presented};
pub use run::RunDirectory;

/// A way to present a stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// The FUSE server merges the layers.
    Fuse,
    /// The kernel reads lazy files and merges the layers.
    Kernel,
    /// The kernel reads complete files and merges the layers.
    Local,
}

impl fmt::Display for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fuse => "fuse",
            Self::Kernel => "kernel",
            Self::Local => "local",
        })
    }
}

/// Which driver somebody wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wanted {
    /// The best one that works.
    #[default]
    Auto,
    /// This one, or what comes nearest.
    #[serde(untagged)]
    Driver(Driver),
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Driver(driver) => driver.fmt(f),
        }
    }
}

/// A word that is no driver.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no driver: known are auto, fuse, kernel and local")]
pub struct UnknownDriver(String);

impl FromStr for Wanted {
    type Err = UnknownDriver;

    fn from_str(word: &str) -> Result<Self, UnknownDriver> {
        Ok(match word {
            "auto" => Self::Auto,
            "fuse" => Self::Driver(Driver::Fuse),
            "kernel" => Self::Driver(Driver::Kernel),
            "local" => Self::Driver(Driver::Local),
            _ => return Err(UnknownDriver(word.to_owned())),
        })
    }
}

/// A layer image and the files that hold it. One of them is needed at least; the complete one is preferred to the lazy
/// one, and that one to the directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerBacking {
    /// What its owner calls it: two layers are the same only if this is, and it names the directory of the mount.
    pub number: u32,
    /// Which layer it is. A diffID alone is a claim until all of a layer has been seen, and no stack must show what somebody
    /// else claims.
    pub id: LayerId,
    /// Size of the image in bytes.
    pub size: u64,
    /// A file that is complete to its readers and filled as they read: one in `layers/` of the FUSE server.
    pub lazy: Option<PathBuf>,
    /// A file that holds all of the image, verified. Its owner keeps it as long as it may be mounted.
    pub local: Option<PathBuf>,
    /// A directory that shows what is in the image, for a kernel that cannot read it itself.
    pub tree: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_have_the_names_that_are_said() {
        for word in ["auto", "fuse", "kernel", "local"] {
            let wanted: Wanted = word.parse().unwrap();
            assert_eq!(wanted.to_string(), word);
            assert_eq!(serde_json::to_value(wanted).unwrap(), word);
            assert_eq!(serde_json::from_value::<Wanted>(word.into()).unwrap(), wanted);
        }
        assert_eq!("fast".parse::<Wanted>(), Err(UnknownDriver("fast".to_owned())));
    }
}
