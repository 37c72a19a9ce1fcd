//! Calls that wait where nobody can be killed, made by a process of their own.
//!
//! A loop device takes another file when everything is read that was asked for; if that comes through a FUSE connection, it
//! waits uninterruptibly for whoever serves that. Should this process be it and be killed meanwhile, it would not die: the
//! thread waits for threads that are gone, its descriptors stay open and its locks held, nobody can take its place, and
//! whoever opens the device waits with it. So a child makes the call, which has the descriptors of the call and nothing else of
//! this process; it ends when the next one serves.
//!
//! Refuses to know what is called.

#![expect(unsafe_code, reason = "a process that is only a call is made by fork, and may do nothing but system calls")]

use std::ffi::{c_int, c_uint, c_ulong};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, waitpid};

/// How the child ends that could not get rid of what is not its own (before Linux 5.9). No errno is as large.
const UNABLE: c_int = 255;

/// `ioctl(device, request, argument)`, with an argument that is a descriptor. Waits for the end of it.
pub(super) fn ioctl_apart(device: BorrowedFd<'_>, request: c_ulong, argument: BorrowedFd<'_>) -> Result<(), Errno> {
    let (device, argument) = (device.as_raw_fd(), argument.as_raw_fd());
    // SAFETY: the child is a copy of this thread alone, so it must not wait for a lock or allocate: it makes system calls and ends
    // without returning from `call_and_end`.
    let child = unsafe { libc::fork() };
    match child {
        0 => call_and_end(device, request, argument),
        -1 => Err(last_errno()),
        child => {
            let child = Pid::from_raw(child).ok_or(Errno::CHILD)?;
            let ended = rustix::io::retry_on_intr(|| waitpid(Some(child), WaitOptions::empty()))?;
            match ended.and_then(|(_, status)| status.exit_status()) {
                Some(0) => Ok(()),
                Some(UNABLE) => call(device, request, argument),
                Some(errno) => Err(Errno::from_raw_os_error(errno)),
                // It was killed.
                None => Err(Errno::INTR),
            }
        }
    }
}

fn call(device: c_int, request: c_ulong, argument: c_int) -> Result<(), Errno> {
    // SAFETY: both are open as long as the caller has borrowed them, and the argument is taken as a number.
    if unsafe { libc::ioctl(device, request, argument) } < 0 { Err(last_errno()) } else { Ok(()) }
}

fn last_errno() -> Errno {
    // SAFETY: the place is this thread's own.
    Errno::from_raw_os_error(unsafe { *libc::__errno_location() })
}

/// What the child does.
fn call_and_end(device: c_int, request: c_ulong, argument: c_int) -> ! {
    let (low, high) = (device.min(argument), device.max(argument));
    let alone = close(0, low - 1) && close(low + 1, high - 1) && close(high + 1, c_int::MAX);
    let code = match alone {
        true => call(device, request, argument).map_or_else(Errno::raw_os_error, |()| 0),
        false => UNABLE,
    };
    // SAFETY: ends this process, without anything that a copy of another one must not do.
    unsafe { libc::_exit(code) }
}

/// Closes the descriptors from `first` to `last`.
fn close(first: c_int, last: c_int) -> bool {
    let (Ok(first), Ok(last)) = (c_uint::try_from(first), c_uint::try_from(last)) else { return true };
    // SAFETY: this process is a copy that uses none of them, and ends without dropping their owners.
    first > last || unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } == 0
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn the_child_calls_and_says_how_it_went() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(ioctl_apart(file.as_fd(), 0, file.as_fd()), Err(Errno::NOTTY));
        let other = tempfile::tempfile().unwrap();
        let refused = ioctl_apart(file.as_fd(), 0, other.as_fd());
        assert_eq!(refused, Err(Errno::NOTTY));
    }

    #[test]
    fn the_child_keeps_nothing_open() {
        let (reader, writer) = std::io::pipe().unwrap();
        let file = tempfile::tempfile().unwrap();
        assert!(ioctl_apart(file.as_fd(), 0, file.as_fd()).is_err());
        drop(writer);
        let mut rest = Vec::new();
        // Ends because nobody else can write.
        let mut reader = reader;
        reader.read_to_end(&mut rest).unwrap();
        assert!(rest.is_empty());
    }
}
