//! Holds the map in `src/lib.rs` against the code: every room stands in the table, and no room uses a higher floor.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Room -> floor, as the table in `src/lib.rs` says.
fn floors() -> BTreeMap<String, u32> {
    let map = fs::read_to_string(source_dir().join("lib.rs")).expect("src/lib.rs is readable");
    map.lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("//! | ")?.split(" | ");
            let floor = cells.next()?.trim().parse().ok()?;
            let room = cells.next()?.trim().trim_matches('`').to_owned();
            Some((room, floor))
        })
        .collect()
}

fn source_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn rust_files(below: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(below).expect("a source directory is readable") {
        let path = entry.expect("a directory entry is readable").path();
        if path.is_dir() {
            rust_files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Rooms named by `crate::room` in `text`, `use crate::{a::…, b}` included. Test modules count like any other code.
fn rooms_used(text: &str, known: &BTreeMap<String, u32>) -> BTreeSet<String> {
    let mut used = BTreeSet::new();
    for part in text.split("crate::").skip(1) {
        if let Some(group) = part.strip_prefix('{') {
            let mut depth = 1;
            let mut word = String::new();
            let mut fresh = true;
            for c in group.chars() {
                match c {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    _ => {}
                }
                if depth == 0 {
                    break;
                }
                if c.is_alphanumeric() || c == '_' {
                    word.push(c);
                    continue;
                }
                if depth == 1 && fresh && known.contains_key(&word) {
                    used.insert(word.clone());
                }
                if !word.is_empty() {
                    fresh = false;
                }
                if depth == 1 && c == ',' {
                    fresh = true;
                }
                word.clear();
            }
            if fresh && known.contains_key(&word) {
                used.insert(word);
            }
        } else {
            let room: String = part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if known.contains_key(&room) {
                used.insert(room);
            }
        }
    }
    used
}

/// Room -> rooms it uses.
fn uses() -> BTreeMap<String, BTreeSet<String>> {
    let floors = floors();
    let mut files = Vec::new();
    rust_files(&source_dir(), &mut files);
    let mut uses: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in files {
        let inside = file.strip_prefix(source_dir()).expect("the walk stays inside");
        let room =
            inside.iter().next().expect("a file has a name").to_string_lossy().trim_end_matches(".rs").to_owned();
        if room == "lib" || room == "main" {
            continue;
        }
        assert!(floors.contains_key(&room), "room {room} does not stand in the table of src/lib.rs");
        let text = fs::read_to_string(&file).expect("a source file is readable");
        let mut used = rooms_used(&text, &floors);
        used.remove(&room);
        uses.entry(room).or_default().extend(used);
    }
    uses
}

#[test]
fn every_room_of_the_table_exists() {
    let rooms: BTreeSet<String> = uses().into_keys().collect();
    let table: BTreeSet<String> = floors().into_keys().collect();
    assert_eq!(rooms, table);
}

#[test]
fn no_room_uses_a_higher_floor() {
    let floors = floors();
    for (room, used) in uses() {
        for other in used {
            assert!(
                floors[&other] <= floors[&room],
                "room {room} (floor {}) uses {other} (floor {})",
                floors[&room],
                floors[&other]
            );
        }
    }
}

#[test]
fn rooms_of_one_floor_have_no_cycle() {
    let mut left = uses();
    loop {
        let free: Vec<String> = left
            .iter()
            .filter(|(_, used)| used.iter().all(|u| !left.contains_key(u)))
            .map(|(r, _)| r.clone())
            .collect();
        if free.is_empty() {
            break;
        }
        left.retain(|room, _| !free.contains(room));
    }
    assert!(left.is_empty(), "these rooms use each other in a circle: {left:?}");
}

#[test]
fn the_reader_of_uses_sees_groups_and_paths() {
    let known: BTreeMap<String, u32> = [("model", 0), ("tar", 1), ("erofs", 1)].map(|(r, f)| (r.to_owned(), f)).into();
    let used = rooms_used("use crate::{model::{self, tar}, erofs};\nlet x = crate::tar::Reader;", &known);
    assert_eq!(used.into_iter().collect::<Vec<_>>(), ["erofs", "model", "tar"]);
    let used = rooms_used("use crate::{model::{self, tar::x}};", &known);
    assert_eq!(used.into_iter().collect::<Vec<_>>(), ["model"]);
}

#[test]
fn unsafe_code_lives_in_sys_alone() {
    let mut files = Vec::new();
    rust_files(&source_dir(), &mut files);
    for file in files {
        let inside = file.strip_prefix(source_dir()).expect("the walk stays inside").to_owned();
        let text = fs::read_to_string(&file).expect("a source file is readable");
        assert!(
            inside.starts_with("sys") || !text.contains("unsafe_code,"),
            "{} lifts the ban on unsafe code",
            inside.display()
        );
    }
}
