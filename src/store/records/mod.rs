//! The records of snapshots, layers and images: one transactional file.
//!
//! ```text
//! <root>/state/snapshots.redb
//!     header      name -> bytes: magic, version, compatible and incompatible features
//!     snapshots   key -> JSON       layers, by number -> JSON
//!     images      name -> JSON      cursors   name -> number
//! ```
//!
//! Guarantees. A command is one transaction: [`Chain`] decides, its writes become lasting together, and only then others
//! see them; a command that returned survives a power cut. One process at a time has the records open to change them;
//! others can look meanwhile ([`look`]). What a newer program wrote and this one must not touch is refused, what
//! is damaged is refused: records are the one thing that cannot be fetched again. After a disk that failed or was full
//! the file is opened anew with the next command.
//!
//! It refuses to know what a snapshot is for; the rules are in [`crate::chain`].

mod error;
mod tables;

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock};

pub use error::RecordsError;
use redb::{Builder, ConcurrencyMode, Database, ReadableDatabase as _};

use super::files;
use crate::chain::{Chain, Change, Command};
use crate::model::Timestamp;

/// Directory below the root.
const STATE: &str = "state";
const FILE: &str = "snapshots.redb";

/// Pages that are kept in memory. All that is read is kept as values here, so this serves writes alone.
const CACHE: usize = 4 << 20;

/// How often somebody who only looks tries again because the file changes hands.
const LOOKS: u32 = 50;
const LOOK_AGAIN: std::time::Duration = std::time::Duration::from_millis(20);

type Opener = Box<dyn Fn() -> Result<Database, redb::DatabaseError> + Send + Sync>;

/// The records of one root, open to change them.
pub struct Records {
    path: PathBuf,
    open: Opener,
    /// Held for as long as a command takes: commands come one after another. Empty after a failure. Taken before
    /// `chain`.
    database: Mutex<Option<Database>>,
    /// What the file says. Held for the time of a look only, never while the disk works.
    chain: RwLock<Chain>,
}

impl std::fmt::Debug for Records {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Records").field("path", &self.path).finish_non_exhaustive()
    }
}

/// Where the records of the store at `root` are.
pub fn path(root: &Path) -> PathBuf {
    root.join(STATE).join(FILE)
}

impl Records {
    /// Opens the records below `root`, which are made if they are missing.
    ///
    /// # Errors
    /// [`RecordsError::InUse`] if another process has them open; see there for the rest.
    pub fn open(root: &Path) -> Result<Self, RecordsError> {
        let path = path(root);
        files::make_dirs(&root.join(STATE))?;
        if !path.exists() {
            create(&path)?;
            files::sync_dir(&root.join(STATE))?;
            files::sync_dir(root)?;
        }
        let at = path.clone();
        Self::open_with(path, Box::new(move || builder().open(&at)))
    }

    fn open_with(path: PathBuf, open: Opener) -> Result<Self, RecordsError> {
        let (database, chain) = opened(&path, &open)?;
        Ok(Self { path, open, database: Mutex::new(Some(database)), chain: RwLock::new(chain) })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Looks at the records as they are now. `look` must be short: whoever changes them waits for it.
    pub fn read<T>(&self, look: impl FnOnce(&Chain) -> T) -> T {
        look(&self.chain.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Does what `command` says, all or nothing. `make` is called in between, with what will change: what it makes is
    /// there before a record speaks of it, and if it fails nothing changes. Waits for the disk.
    ///
    /// # Errors
    /// [`RecordsError::Refused`] from the rules; see there for the rest. After an error of the disk nobody knows whether
    /// the command has happened; the next one finds out.
    pub fn apply<E: From<RecordsError>>(
        &self,
        command: &Command,
        now: Timestamp,
        make: impl FnOnce(&Change) -> Result<(), E>,
    ) -> Result<Change, E> {
        let mut held = self.database.lock().unwrap_or_else(PoisonError::into_inner);
        let database = match held.take() {
            Some(database) => database,
            None => self.recovered()?,
        };
        let planned = self.read(|chain| chain.plan(command, now));
        let change = match planned {
            Ok(change) => change,
            Err(refused) => {
                *held = Some(database);
                return Err(RecordsError::Refused(refused).into());
            }
        };
        if let Err(failed) = make(&change) {
            *held = Some(database);
            return Err(failed);
        }
        if !change.writes.is_empty() {
            // If this fails the database is dropped.
            tables::write(&database, &change.writes).map_err(|error| self.failed("write", error))?;
            self.chain.write().unwrap_or_else(PoisonError::into_inner).accept(&change);
        }
        *held = Some(database);
        Ok(change)
    }

    /// The file opened again after it failed, and what it says now.
    fn recovered(&self) -> Result<Database, RecordsError> {
        let (database, chain) = opened(&self.path, &self.open)?;
        *self.chain.write().unwrap_or_else(PoisonError::into_inner) = chain;
        Ok(database)
    }

    fn failed(&self, attempted: &'static str, error: redb::Error) -> RecordsError {
        RecordsError::database(attempted, &self.path, error)
    }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    // The file is small; its checksums are looked at whenever it is opened, so that damage is an error, no surprise.
    builder.set_cache_size(CACHE).set_check_integrity_on_open(true).set_concurrency_mode(ConcurrencyMode::SingleWriter);
    builder
}

/// Makes a file without records at `path`, for others all at once: a crash in between leaves none. If somebody else
/// makes one at the same moment, his stays.
fn create(path: &Path) -> Result<(), RecordsError> {
    let failed = |error| RecordsError::database("make", path, error);
    let above = path.parent().unwrap_or(Path::new("."));
    let made = tempfile::Builder::new().prefix(".new-").tempfile_in(above).map_err(|error| failed(error.into()))?;
    let database = builder().create(made.path()).map_err(|error| failed(error.into()))?;
    tables::prepare(&database).map_err(failed)?;
    drop(database);
    made.as_file().sync_all().map_err(|error| failed(error.into()))?;
    match made.persist_noclobber(path) {
        Ok(_) => Ok(()),
        Err(error) if error.error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(failed(error.error.into())),
    }
}

fn opened(path: &Path, open: &Opener) -> Result<(Database, Chain), RecordsError> {
    let failed = |error| RecordsError::database("open", path, error);
    let database = open().map_err(|error| failed(error.into()))?;
    let chain = loaded(path, &database.begin_read().map_err(|error| failed(error.into()))?)?;
    Ok((database, chain))
}

fn loaded(path: &Path, transaction: &redb::ReadTransaction) -> Result<Chain, RecordsError> {
    tables::load(transaction).map_err(|error| match error {
        tables::LoadError::Database(error) => RecordsError::database("read", path, error),
        tables::LoadError::Unsupported(needs) => RecordsError::Unsupported { path: path.to_owned(), needs },
        tables::LoadError::Damaged(what) => RecordsError::Damaged { path: path.to_owned(), what },
        tables::LoadError::Contradiction(source) => RecordsError::Contradiction { path: path.to_owned(), source },
    })
}

/// What the records of the store at `root` say now, whoever has them open. Nothing if there are none.
///
/// # Errors
/// See [`RecordsError`].
pub fn look(root: &Path) -> Result<Chain, RecordsError> {
    let path = path(root);
    let mut looks = 0;
    loop {
        looks += 1;
        let found = match try_look(&path) {
            Err(RecordsError::Unclean { .. }) => Records::open(root).map(|records| records.read(Chain::clone)),
            other => other,
        };
        match found {
            // Somebody makes it right at this moment, or opens it after a crash.
            Err(RecordsError::InUse { .. } | RecordsError::Unclean { .. }) if looks < LOOKS => {
                std::thread::sleep(LOOK_AGAIN);
            }
            other => return other,
        }
    }
}

fn try_look(path: &Path) -> Result<Chain, RecordsError> {
    match std::fs::metadata(path) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Chain::default()),
        Err(error) => return Err(super::StoreError::io("look at", path, error).into()),
    }
    let failed = |error| RecordsError::database("open", path, error);
    let database = builder().open_read_only(path).map_err(|error| failed(error.into()))?;
    loaded(path, &database.begin_read().map_err(|error| failed(error.into()))?)
}

#[cfg(test)]
mod tests;
