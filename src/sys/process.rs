//! What is to be known of other processes' threads.

use std::fs;

/// The bit of `SIGKILL` (9) in the signal sets of `/proc`.
const KILLED: u64 = 1 << 8;

/// True if thread `thread` (a number of this process's namespace) has been killed and is only waiting to die. Whatever
/// kills all threads of a program counts: the kernel sends `SIGKILL` to each then (`complete_signal`). False if it is
/// not to be seen.
pub fn is_dying(thread: u32) -> bool {
    // The file of a thread is there under its own number, also if it is not the first one of its process.
    thread != 0 && fs::read_to_string(format!("/proc/{thread}/status")).is_ok_and(|status| says_killed(&status))
}

fn says_killed(status: &str) -> bool {
    let pending = |line: &str| line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:")).map(str::to_owned);
    let mut sets = status.lines().filter_map(pending);
    sets.any(|set| u64::from_str_radix(set.trim(), 16).is_ok_and(|set| set & KILLED != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pending_signals_tell() {
        let status =
            |own: &str, shared: &str| format!("Name:\tcat\nSigPnd:\t{own}\nShdPnd:\t{shared}\nSigBlk:\t0100\n");
        for (own, shared, dying) in [
            ("0000000000000000", "0000000000000000", false),
            ("0000000000000100", "0000000000000000", true),
            ("0000000000000000", "0000000000004100", true),
            ("0000000000004000", "0000000000000002", false),
            ("nonsense", "", false),
        ] {
            assert_eq!(says_killed(&status(own, shared)), dying, "{own} {shared}");
        }
        assert!(!is_dying(std::process::id()));
        assert!(!is_dying(0) && !is_dying(u32::MAX));
    }
}
