//! The documents are held against the program: promises have tests, and what messages are told of is what it says.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn page(name: &str) -> String {
    fs::read_to_string(root().join("docs").join(name)).unwrap()
}

#[test]
fn every_promise_names_its_test() {
    let page = page("semantics.md");
    for promise in page.split("\n\n").filter(|paragraph| paragraph.starts_with("**")) {
        let rooms = [
            "cli",
            "daemon",
            "drivers",
            "fetch",
            "forest",
            "lazy",
            "mount",
            "mount_judge",
            "overlay_judge",
            "restart",
            "shelf",
            "takeover",
        ];
        let named = promise.split('`').filter_map(|word| word.rsplit_once("::"));
        let tests: Vec<(&str, &str)> =
            named.filter(|(module, _)| module.split("::").next().is_some_and(|room| rooms.contains(&room))).collect();
        assert!(!tests.is_empty(), "nothing holds this: {promise}");
        for (module, name) in tests {
            let file = format!("tests/it/{}.rs", module.replace("::", "/"));
            let text = fs::read_to_string(root().join(&file)).unwrap_or_else(|error| panic!("{file}: {error}"));
            assert!(text.contains(&format!("fn {name}(")), "there is no test {module}::{name}");
        }
    }
}

#[test]
fn tests_that_are_named_exist() {
    let page = page("containerd.md");
    let is_name = |word: &&str| {
        word.contains("::") && word.bytes().all(|b| b.is_ascii_lowercase() || b"_:0123456789".contains(&b))
    };
    let names: Vec<&str> = page.split('`').filter(is_name).collect();
    assert!(names.len() > 10, "the names are not found");
    for name in names {
        let (module, last) = name.rsplit_once("::").unwrap();
        let exists = ["tests/it", "src"].into_iter().any(|place| {
            let file = |module: &str| root().join(place).join(module.replace("::", "/") + ".rs");
            let text = fs::read_to_string(file(module)).unwrap_or_default();
            file(name).exists() || text.contains(&format!("fn {last}(")) || text.contains(&format!("mod {last} {{"))
        });
        assert!(exists, "there is no {name}");
    }
}

/// The text of all programs, with lines of literals that go on joined as the compiler joins them.
fn program() -> String {
    let mut text = String::new();
    let mut rest: Vec<PathBuf> = vec![root().join("src")];
    while let Some(path) = rest.pop() {
        if path.is_dir() {
            rest.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            text.push_str(&fs::read_to_string(&path).unwrap());
        }
    }
    let mut pieces = text.split("\\\n");
    let first = pieces.next().unwrap_or_default().to_owned();
    pieces.fold(first, |joined, piece| joined + piece.trim_start())
}

#[test]
fn what_to_do_is_told_of_messages_that_there_are() {
    let (page, program) = (page("troubleshooting.md"), program());
    let rows = page.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| seen |"));
    let mut told = 0;
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split(" | ").collect();
        let [_, _, said, _] = cells[..] else { panic!("not four columns: {row}") };
        let said = said.trim().strip_prefix('`').and_then(|said| said.strip_suffix('`'));
        for part in said.unwrap_or_else(|| panic!("no message: {row}")).split("...").map(str::trim) {
            assert!(program.contains(part), "nothing says {part:?}: {row}");
            told += 1;
        }
    }
    assert!(told > 30, "the tables are not found");
}
