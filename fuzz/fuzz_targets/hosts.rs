//! A foreign `hosts.toml`. Every server it names is an address that can be asked, without a user in it; no message about a
//! file that cannot be understood shows a header or a password.
//!
//! Input: one byte that chooses the registry, the text.
#![no_main]

use headstart::registry::servers_in;
use libfuzzer_sys::fuzz_target;

const REGISTRIES: [&str; 5] = ["docker.io", "registry.example", "localhost:5000", "[::1]:5000", "127.0.0.1"];
/// What no message may show.
const SECRET: &str = "open-sesame-0451";

fuzz_target!(|input: &[u8]| {
    let Some((choice, text)) = input.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let registry = REGISTRIES[usize::from(*choice) % REGISTRIES.len()];
    if let Ok(servers) = servers_in(text, registry) {
        assert!(!servers.is_empty(), "the registry's own server is always there");
        for server in servers {
            assert!(matches!(server.scheme(), "http" | "https") && server.host().is_some(), "{server}");
            assert!(server.username().is_empty() && server.password().is_none(), "{server}");
            assert!(server.query().is_none() && server.fragment().is_none(), "{server}");
        }
    }
    if !text.contains(SECRET) {
        let header = format!("[host.'https://secret.example'.header]\nauthorization = '{SECRET}'\n");
        for text in [format!("{header}{text}"), format!("{text}\n{header}")] {
            if let Err(error) = servers_in(&text, registry) {
                assert!(!error.to_string().contains(SECRET), "{error}");
            }
        }
    }
});
