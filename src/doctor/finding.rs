//! What was found, and what to do about it.

use std::path::{Path, PathBuf};

use serde::Serialize;

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// It is as it should be.
    Good,
    /// It is good to know.
    Note,
    /// Something works less well than it could.
    Should,
    /// Something does not work until this is done.
    Must,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Remedy {
    /// Write these lines into a file.
    Write {
        /// Which.
        file: PathBuf,
        /// What.
        lines: String,
    },
    /// Take this out of a file.
    Remove {
        /// Which.
        file: PathBuf,
        /// What.
        lines: String,
    },
    /// Run a command.
    Run {
        /// Which.
        command: String,
    },
}

impl Remedy {
    pub(super) fn write(file: &Path, lines: impl Into<String>) -> Self {
        Self::Write { file: file.to_owned(), lines: lines.into() }
    }

    pub(super) fn remove(file: &Path, lines: impl Into<String>) -> Self {
        Self::Remove { file: file.to_owned(), lines: lines.into() }
    }

    pub(super) fn run(command: impl Into<String>) -> Self {
        Self::Run { command: command.into() }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at: `kernel.erofs`, `containerd.proxy`.
    pub check: &'static str,
    /// How much it matters.
    pub severity: Severity,
    /// What was found.
    pub what: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<Remedy>,
}

impl Finding {
    fn new(severity: Severity, check: &'static str, what: impl Into<String>) -> Self {
        Self { check, severity, what: what.into(), remedy: None }
    }

    pub(super) fn good(check: &'static str, what: impl Into<String>) -> Self {
        Self::new(Severity::Good, check, what)
    }

    pub(super) fn note(check: &'static str, what: impl Into<String>) -> Self {
        Self::new(Severity::Note, check, what)
    }

    pub(super) fn should(check: &'static str, what: impl Into<String>) -> Self {
        Self::new(Severity::Should, check, what)
    }

    pub(super) fn must(check: &'static str, what: impl Into<String>) -> Self {
        Self::new(Severity::Must, check, what)
    }

    pub(super) fn with(self, remedy: Remedy) -> Self {
        Self { remedy: Some(remedy), ..self }
    }
}
