//! Pulls that the daemon does for others, on disk as long as they are under way: if it does not come to their end, the next
//! daemon goes on with them, though whoever asked has gone with it.
//!
//! ```text
//! <root>/pulls/<id>.json    what was asked
//! ```
//!
//! Guarantees: a pull is written down before anything is fetched and until it has succeeded, has failed for good, or whoever
//! asked does not want it any more. What is not readable is taken away. That nothing can be written down is no reason not to
//! pull.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::api::Judge;
use super::image::House;
use super::pull;
use crate::control::{PullAsked, Pulled};
use crate::sys::FileError;

/// Pause after the first failure that may pass, doubled with each further one up to the longest: a registry that is away for
/// an hour is asked some sixty times.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The kind of failures that may pass (docs/operations.md).
const UNREACHABLE: &str = "unreachable";

/// The pulls of a root's daemon.
#[derive(Debug, Clone)]
pub(super) struct Pulls {
    directory: PathBuf,
}

/// One that is under way. Dropped, it stays written down.
#[derive(Debug)]
pub(super) struct UnderWay {
    asked: PullAsked,
    path: PathBuf,
}

impl Pulls {
    pub(super) fn new(root: &Path) -> Self {
        Self { directory: root.join("pulls") }
    }

    /// Writes down that `asked` is begun. Waits for the disk.
    pub(super) fn begin(&self, asked: &PullAsked) -> Result<UnderWay, FileError> {
        let failed = |source| FileError::of("write down a pull in", &self.directory)(source);
        fs::create_dir_all(&self.directory).map_err(failed)?;
        let text = serde_json::to_vec(asked).expect("plain fields always have a JSON form");
        let write = || -> io::Result<PathBuf> {
            let mut file = tempfile::Builder::new().prefix("").suffix(".json").tempfile_in(&self.directory)?;
            file.write_all(&text)?;
            Ok(file.into_temp_path().keep()?)
        };
        Ok(UnderWay { asked: asked.clone(), path: write().map_err(failed)? })
    }

    /// What a daemon before this one did not come to the end of. Waits for the disk.
    pub(super) fn left(&self) -> Result<Vec<UnderWay>, FileError> {
        let failed = |source| FileError::of("list", &self.directory)(source);
        let mut left = Vec::new();
        let listing = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(left),
            listing => listing.map_err(failed)?,
        };
        for entry in listing {
            let path = entry.map_err(failed)?.path();
            let text = fs::read(&path).map_err(FileError::of("read", &path))?;
            match serde_json::from_slice(&text) {
                Ok(asked) => left.push(UnderWay { asked, path }),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "what a pull left is damaged and taken away");
                    fs::remove_file(&path).map_err(FileError::of("remove", &path))?;
                }
            }
        }
        Ok(left)
    }
}

impl UnderWay {
    /// It has come to its end.
    pub(super) fn over(self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a pull that is over will be done again");
        }
    }

    /// Goes on until all of the image is here, or never will be.
    pub(super) async fn go_on(self, house: House, judge: Judge) {
        let image = &self.asked.image;
        tracing::info!(image, "a pull goes on that the daemon before this one did not come to the end of");
        let mut pause = FIRST_PAUSE;
        loop {
            let error = match bring(&house, &self.asked).await {
                Ok(pulled) => {
                    tracing::info!(image, fetched = pulled.bytes_fetched, "the pull is done");
                    break;
                }
                Err(error) => error,
            };
            let may_pass = judge(&error).kind == UNREACHABLE;
            {
                let error: &dyn std::error::Error = error.as_ref();
                match may_pass {
                    true => tracing::info!(image, error, pause = pause.as_secs(), "the pull will be tried again"),
                    false => tracing::warn!(image, error, "the pull is given up"),
                }
            }
            if !may_pass {
                break;
            }
            tokio::time::sleep(pause).await;
            pause = pause.saturating_mul(2).min(LONGEST_PAUSE);
        }
        self.over();
    }
}

/// Brings what is asked for; nobody is told how far it is.
async fn bring(house: &House, asked: &PullAsked) -> anyhow::Result<Pulled> {
    let platform = asked.platform.as_ref().map(|platform| platform.parse()).transpose()?;
    pull::bring(house, &asked.image.parse()?, platform.as_ref(), |_, _| {}).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_under_way_is_found_until_it_is_over() {
        let root = tempfile::tempdir().unwrap();
        let pulls = Pulls::new(root.path());
        assert!(pulls.left().unwrap().is_empty());
        let asked = |image: &str| PullAsked { image: image.to_owned(), platform: Some("linux/amd64".to_owned()) };
        // Two may ask for the same.
        let begun: Vec<_> = ["a", "a", "b"].map(|image| pulls.begin(&asked(image)).unwrap()).into();
        drop(begun);
        fs::write(root.path().join("pulls/x.json"), "{").unwrap();
        let mut left = pulls.left().unwrap();
        assert!(!root.path().join("pulls/x.json").exists());
        left.sort_by(|one, other| one.asked.image.cmp(&other.asked.image));
        assert_eq!(left.iter().map(|left| left.asked.clone()).collect::<Vec<_>>(), ["a", "a", "b"].map(asked));
        left.into_iter().for_each(UnderWay::over);
        assert!(pulls.left().unwrap().is_empty());
    }
}
