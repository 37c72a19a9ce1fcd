//! Parse, run, exit code.

fn main() -> std::process::ExitCode {
    headstart::cli::main()
}
