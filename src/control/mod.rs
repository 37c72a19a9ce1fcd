//! The local socket that the command line talks to.
