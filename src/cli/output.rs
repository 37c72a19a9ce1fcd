//! The standard output: where data goes, and nothing else; and notes about it on the standard error.

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

/// Writes lines about the data to the standard error. Who does not listen misses nothing that matters.
pub(crate) fn notes(lines: &[String]) {
    let mut out = io::stderr().lock();
    for line in lines {
        if writeln!(out, "note: {line}").is_err() {
            return;
        }
    }
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
