//! How a failure is told: once, as what was attempted on what, why, and what can be done.

use std::io::Write as _;

use serde::{Deserialize, Serialize};

use super::exit::Problem;
use super::output;
use crate::control::{ControlError, Fault};

/// A failure in words. It crosses the pipe from a serving process to the command that started it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) problem: Problem,
    pub(crate) message: String,
    pub(crate) causes: Vec<String>,
    pub(crate) hint: Option<String>,
}

impl Failure {
    /// What `error` says, each thing once.
    pub(crate) fn of(error: &anyhow::Error) -> Self {
        if let Some(Relayed(failure)) = error.downcast_ref::<Relayed>() {
            return failure.clone();
        }
        if let Some(ControlError::Refused(fault)) = error.downcast_ref::<ControlError>() {
            return Self::of_fault(fault);
        }
        let problem = Problem::of(error);
        let message = error.to_string();
        let mut causes: Vec<String> = Vec::new();
        for cause in error.chain().skip(1) {
            // Messages of foreign errors often hold those of their causes.
            let text = cause.to_string();
            if !message.contains(&text) && !causes.iter().any(|above| above.contains(&text)) {
                causes.push(text);
            }
        }
        Self { problem, message, causes, hint: problem.hint().map(str::to_owned) }
    }

    /// What another process says, as if it had happened here.
    fn of_fault(fault: &Fault) -> Self {
        let Fault { kind, message, causes } = fault.clone();
        let problem = Problem::named(&kind).unwrap_or(Problem::Internal);
        Self { problem, message, causes, hint: problem.hint().map(str::to_owned) }
    }
}

/// What `error` says, in the form in which it crosses a control socket.
pub(crate) fn fault(error: &anyhow::Error) -> Fault {
    let Failure { problem, message, causes, hint: _ } = Failure::of(error);
    Fault { kind: problem.name(), message, causes }
}

/// A failure of another process, told again as it is.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.message)]
pub(crate) struct Relayed(pub(crate) Failure);

/// Tells on the standard error what is good to know.
pub(crate) fn note(text: &str) {
    let mut err = std::io::stderr().lock();
    // If the standard error is gone, nobody wants to know.
    writeln!(err, "headstart: {text}").ok();
}

/// Tells a failure on the standard error.
pub(crate) fn print(failure: &Failure, json: bool) {
    let mut err = std::io::stderr().lock();
    // If the standard error is gone, the exit code remains.
    err.write_all(text(failure, json).as_bytes()).ok();
}

fn text(failure: &Failure, json: bool) -> String {
    if json {
        let Failure { problem, message, causes, hint } = failure;
        let value = serde_json::json!({"error": {
            "problem": problem, "exit_code": problem.code(), "message": message, "causes": causes, "hint": hint,
        }});
        return format!("{value}\n");
    }
    let mut text = format!("headstart: {}\n", output::printable_lines(&failure.message));
    for cause in &failure.causes {
        text.push_str(&format!("  because: {}\n", output::printable_lines(cause)));
    }
    if let Some(hint) = &failure.hint {
        text.push_str(&format!("  hint: {hint}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    fn example() -> anyhow::Error {
        let error = std::io::Error::new(std::io::ErrorKind::NotFound, "no such file");
        Err::<(), _>(error).context("cannot read x: no such file").context("cannot open image y").unwrap_err()
    }

    #[test]
    fn a_failure_is_told_as_what_and_why_and_what_to_do() {
        let failure = Failure::of(&example());
        assert_eq!(failure.problem, Problem::NotFound);
        let hint = Problem::NotFound.hint().unwrap();
        assert_eq!(
            text(&failure, false),
            format!("headstart: cannot open image y\n  because: cannot read x: no such file\n  hint: {hint}\n")
        );
        let value: serde_json::Value = serde_json::from_str(&text(&failure, true)).unwrap();
        assert_eq!(value["error"]["problem"], "not-found");
        assert_eq!(value["error"]["exit_code"], 3);
        assert_eq!(value["error"]["causes"], serde_json::json!(["cannot read x: no such file"]));
    }

    #[test]
    fn a_failure_that_crossed_a_socket_stays_what_it_was() {
        let failure = Failure::of(&example());
        let refused = ControlError::Refused(fault(&example()));
        assert_eq!(Failure::of(&refused.into()), failure);
    }

    #[test]
    fn a_relayed_failure_stays_what_it_was() {
        let failure = Failure::of(&example());
        let relayed = anyhow::Error::new(Relayed(failure.clone())).context("cannot mount");
        assert_eq!(Failure::of(&relayed), failure);
    }
}
