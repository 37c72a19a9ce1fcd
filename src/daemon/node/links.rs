//! Short names for directories of snapshots: the options of a mount have one page, and a stack may have more than a hundred
//! directories.
//!
//! ```text
//! <run>/f/<number>    symbolic link to <root>/snapshots/<number>/upper
//! ```
//!
//! A link is made when it is needed first. It stays true for as long as there are directories of this root, since the number
//! says everything; so it is never removed.

use std::fs;
use std::io;
use std::path::PathBuf;

#[derive(Debug)]
pub(super) struct Links {
    directory: PathBuf,
}

impl Links {
    pub(super) const fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    /// A shorter name of `long`, or itself if it has none.
    pub(super) fn short(&self, long: PathBuf) -> PathBuf {
        let number = long.parent().and_then(|parent| parent.file_name());
        let number = number.filter(|number| number.to_str().is_some_and(|number| number.parse::<u32>().is_ok()));
        let Some(number) = number.filter(|_| long.file_name().is_some_and(|name| name == "upper")) else { return long };
        let link = self.directory.join(number);
        match self.point(&link, &long) {
            Ok(()) => link,
            Err(error) => {
                tracing::warn!(link = %link.display(), %error, "a directory has no short name");
                long
            }
        }
    }

    fn point(&self, link: &PathBuf, long: &PathBuf) -> io::Result<()> {
        if fs::read_link(link).is_ok_and(|there| there == *long) {
            return Ok(());
        }
        fs::create_dir_all(&self.directory)?;
        match fs::remove_file(link) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        match std::os::unix::fs::symlink(long, link) {
            // Somebody else needed it at the same time.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_lead_where_the_names_did() {
        let directory = tempfile::tempdir().unwrap();
        let links = Links::new(directory.path().join("f"));
        for long in ["/root-a/snapshots/12/upper", "/root-b/snapshots/12/upper", "/root-b/snapshots/12/upper"] {
            let short = links.short(long.into());
            assert_eq!(short, directory.path().join("f/12"));
            assert_eq!(fs::read_link(short).unwrap(), PathBuf::from(long));
        }
        for other in ["/run/headstart/l/7", "/a/x/upper", "/a/../upper", "/"] {
            assert_eq!(links.short(other.into()), PathBuf::from(other));
        }
    }
}
