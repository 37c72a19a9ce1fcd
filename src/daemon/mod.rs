//! Configuration, wiring, shutdown.
