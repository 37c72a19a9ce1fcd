//! System calls that need care, and the only unsafe code.
