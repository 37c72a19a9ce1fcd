//! The standard output: where data goes, and nothing else; and notes about it on the standard error.
//!
//! Guarantees: lines of text hold no control characters but those that end lines, whoever wrote the words in them (images,
//! registries, labels). What is data to other programs (JSON, the names of `ls` and the bytes of `cat` in a pipe) is not touched.

use std::borrow::Cow;
use std::io::{self, IsTerminal as _, Write};

use crate::daemon::browse::BrowseError;

/// Other people's words in one line, so that nothing of them acts on a terminal or looks like a line of ours.
pub(crate) fn printable(text: &str) -> Cow<'_, str> {
    escape(text, char::is_control)
}

/// Lines of ours that may hold other people's words.
pub(crate) fn printable_lines(text: &str) -> Cow<'_, str> {
    escape(text, |c| c.is_control() && c != '\n')
}

fn escape(text: &str, acts: impl Fn(char) -> bool) -> Cow<'_, str> {
    match text.contains(&acts) {
        false => Cow::Borrowed(text),
        true => text.chars().flat_map(|c| if acts(c) { c.escape_default().collect() } else { vec![c] }).collect(),
    }
}

/// A name for the standard output: its bytes, but for people as text that does nothing else than be read.
pub(crate) fn name(bytes: &[u8]) -> Cow<'_, [u8]> {
    match io::stdout().is_terminal() {
        true => readable(bytes),
        false => Cow::Borrowed(bytes),
    }
}

fn readable(bytes: &[u8]) -> Cow<'_, [u8]> {
    Cow::Owned(printable(&String::from_utf8_lossy(bytes)).into_owned().into_bytes())
}

/// Writes lines of text.
pub(crate) fn line(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(printable_lines(text).as_bytes())?;
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
        if writeln!(out, "note: {}", printable(line)).is_err() {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_words_do_not_act_on_a_terminal() {
        for (said, one_line, lines) in [
            ("k8s.io/1/ä b", "k8s.io/1/ä b", "k8s.io/1/ä b"),
            ("a\u{1b}[2Jb\nc", "a\\u{1b}[2Jb\\nc", "a\\u{1b}[2Jb\nc"),
            ("\u{9b}31m\u{7f}\r", "\\u{9b}31m\\u{7f}\\r", "\\u{9b}31m\\u{7f}\\r"),
        ] {
            assert_eq!((&*printable(said), &*printable_lines(said)), (one_line, lines));
        }
        assert_eq!(&*readable(b"\x1b]0;x\x07\xff"), "\\u{1b}]0;x\\u{7}\u{fffd}".as_bytes());
    }
}
