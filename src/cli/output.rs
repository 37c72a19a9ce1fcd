//! The standard output: where data goes, and nothing else.

use std::io::{self, Write};

use crate::daemon::browse::BrowseError;

/// Writes one line of text.
pub(crate) fn line(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.write_all(b"\n")?;
    out.flush()
}

/// Writes a value as indented JSON.
pub(crate) fn json(value: &impl serde::Serialize) -> io::Result<()> {
    let mut out = io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, value)?;
    out.write_all(b"\n")?;
    out.flush()
}

/// True if writing failed because nobody reads any more.
pub(crate) fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let write = match error.downcast_ref::<BrowseError>() {
        Some(BrowseError::Write { source, .. }) => Some(source),
        Some(_) => None,
        None => error.downcast_ref::<io::Error>(),
    };
    write.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
