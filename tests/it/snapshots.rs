//! Snapshots of a process that is killed, and the command that shows them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use headstart::chain::{Content, Key, Kind, Labels, Snapshot};
use headstart::model::{Algorithm, BlobDigest, ChainId, DiffId, Digest, IndexDigest};
use headstart::snapshots::{LayerSpec, Recovery, Snapshots, SnapshotsConfig, SnapshotsError};
use headstart::store::{Anchor, Store};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::cli::stage::{Stage, noise, reference, tar, wait_until};

const ROOT: &str = "HEADSTART_TEST_ROOT";
const SEED: &str = "HEADSTART_TEST_SEED";
/// What the child says begins so; the test runner says other things.
const SAYS: &str = "said ";

fn open(root: &Path) -> (Snapshots, Recovery) {
    let store = Arc::new(Store::open(root).unwrap());
    Snapshots::open(store, SnapshotsConfig { sync: false }).unwrap()
}

/// Numbers that look random and are the same every time (xorshift64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % sides as u64).unwrap()
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        if from.is_empty() { None } else { from.get(self.roll(from.len())) }
    }
}

fn digest(of: &str) -> Digest {
    Digest::of(Algorithm::Sha256, of.as_bytes())
}

fn layer(number: usize) -> LayerSpec {
    LayerSpec {
        diff_id: DiffId(digest(&format!("layer {number}"))),
        blob: BlobDigest(digest(&format!("blob {number}"))),
        anchor: Anchor::ImageSpec(IndexDigest(digest(&format!("index {number}")))),
        size: Some(4096),
    }
}

fn say(what: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("\n{SAYS}{what}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

fn say_committed(snapshots: &Snapshots, name: &str) {
    let parent = snapshots.stat(name).unwrap().parent.map(|parent| parent.to_string());
    say(&format!("committed {name} {}", parent.unwrap_or_else(|| "nothing".to_owned())));
}

/// The file that a snapshot of its own directory holds, so that it can be told from others.
const MARK: &str = "mark";

/// One random command. What is refused is no news.
fn command(snapshots: &Snapshots, dice: &mut Dice) -> Result<(), SnapshotsError> {
    let all = snapshots.list::<&str>(&[]).unwrap();
    let named = |kind: Kind| -> Vec<&Snapshot> { all.iter().filter(|of| of.kind == kind).collect() };
    match dice.roll(12) {
        0..=3 => {
            let key = format!("key {}", dice.roll(6));
            let committed = named(Kind::Committed);
            let parent = if dice.roll(2) == 0 { None } else { dice.pick(&committed) };
            let parent = parent.map_or("", |parent| parent.key.as_str());
            let stack = snapshots.prepare(&key, parent, Labels::new())?;
            fs::write(stack.own.unwrap().upper.join(MARK), stack.snapshot.slot.to_string()).unwrap();
        }
        4..=6 => {
            let (active, committed) = (named(Kind::Active), named(Kind::Committed));
            let Some(from) = dice.pick(&active) else { return Ok(()) };
            let marked = stack_is_marked(snapshots, from);
            let name = format!("name-{}", dice.roll(usize::MAX >> 1));
            let parent = if dice.roll(2) == 0 { None } else { dice.pick(&committed) };
            // A kill may have come before the mark; then there is nothing to lose.
            if marked {
                let parent = parent.map_or("", |parent| parent.key.as_str());
                snapshots.commit(&name, from.key.as_str(), parent, Labels::new())?;
                say_committed(snapshots, &name);
            }
        }
        7 => {
            let Some(gone) = dice.pick(&all) else { return Ok(()) };
            remove(snapshots, &gone.key)?;
        }
        8 => {
            let layers: Vec<LayerSpec> = (0..=dice.roll(3)).map(|_| layer(dice.roll(4))).collect();
            let manifest = BlobDigest(digest("manifest"));
            let recorded = snapshots.pull(&format!("image {}", dice.roll(3)), manifest, &layers)?;
            recorded.committed.iter().for_each(|name| say_committed(snapshots, name.as_str()));
        }
        9 | 10 => {
            for name in snapshots.layer_local(&layer(dice.roll(4)).id(), 4096)? {
                say_committed(snapshots, name.as_str());
            }
        }
        _ => {
            let images = snapshots.images();
            if let Some(image) = dice.pick(&images) {
                snapshots.forget(&image.name)?;
            }
            for key in snapshots.all().garbage(&BTreeSet::new()).snapshots {
                remove(snapshots, &key)?;
            }
        }
    }
    Ok(())
}

fn stack_is_marked(snapshots: &Snapshots, of: &Snapshot) -> bool {
    let own = snapshots.stack(of.key.as_str()).ok().and_then(|stack| stack.own);
    own.is_some_and(|own| fs::read_to_string(own.upper.join(MARK)).is_ok_and(|mark| mark == of.slot.to_string()))
}

fn remove(snapshots: &Snapshots, key: &Key) -> Result<(), SnapshotsError> {
    // Whoever is killed after this line may have removed it.
    say(&format!("removing {key}"));
    let removed = snapshots.remove(key.as_str());
    if removed.is_err() {
        say(&format!("keeping {key}"));
    }
    removed
}

#[test]
#[ignore = "is the child of the test below"]
fn a_process_that_never_rests() {
    let root = std::env::var_os(ROOT).expect("the test below says where");
    let seed = std::env::var(SEED).expect("the test below says how").parse().unwrap();
    let (snapshots, _) = open(Path::new(&root));
    let mut dice = Dice(seed);
    loop {
        match command(&snapshots, &mut dice) {
            Ok(()) => say("next"),
            Err(error) => assert!(error.is_refusal(), "{error:?}"),
        }
    }
}

/// What the child has said: committed snapshots and their parents, and what it may have removed since.
#[derive(Default)]
struct Heard {
    committed: BTreeMap<String, Option<String>>,
    removing: Option<(String, Option<String>)>,
}

impl Heard {
    fn hear(&mut self, line: &str) {
        match line.split_once(' ') {
            Some(("committed", what)) => {
                let (name, parent) = what.split_once(' ').unwrap();
                self.committed.insert(name.to_owned(), (parent != "nothing").then(|| parent.to_owned()));
            }
            Some(("removing", name)) => {
                self.removing = self.committed.remove(name).map(|parent| (name.to_owned(), parent));
            }
            Some(("keeping", _)) => self.committed.extend(self.removing.take()),
            _ => self.removing = None,
        }
    }
}

#[test]
fn a_process_killed_at_200_points_loses_nothing_committed_and_leaves_nothing() {
    let root = TempDir::new().unwrap();
    let mut heard = Heard::default();
    let mut dice = Dice(0x5eed_0f5a_11ad_0001);
    let mut commits = 0;
    for kill in 0..200_u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "--nocapture", "snapshots::a_process_that_never_rests"])
            .env(ROOT, root.path())
            .env(SEED, (kill * 7919 + 1).to_string())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let patience = dice.roll(12);
        let mut count = 0;
        while count < patience {
            let line = lines.next().expect("the child never rests").unwrap();
            if let Some(line) = line.strip_prefix(SAYS) {
                commits += u32::from(line.starts_with("committed"));
                heard.hear(line);
                count += 1;
            }
        }
        child.kill().unwrap();
        // What it said before it died counts too.
        for line in lines.map_while(Result::ok) {
            if let Some(line) = line.strip_prefix(SAYS) {
                heard.hear(line);
            }
        }
        child.wait().unwrap();

        let (snapshots, recovery) = open(root.path());
        assert_eq!((&recovery.missing, &recovery.strange), (&vec![], &vec![]), "kill {kill}");
        for (name, parent) in &heard.committed {
            let found = snapshots.stat(name).unwrap_or_else(|error| panic!("kill {kill} lost {name}: {error}"));
            assert_eq!(
                (found.kind, found.parent.map(|of| of.to_string())),
                (Kind::Committed, parent.clone()),
                "{name}"
            );
        }
        let all = snapshots.list::<&str>(&[]).unwrap();
        let with_files: BTreeSet<u32> =
            all.iter().filter(|of| of.content == Content::Files).map(|of| of.slot.0).collect();
        for of in all.iter().filter(|of| of.kind == Kind::Committed) {
            if of.content == Content::Files {
                let mark = root.path().join(format!("snapshots/{}/upper/{MARK}", of.slot));
                assert_eq!(
                    fs::read_to_string(mark).unwrap(),
                    of.slot.to_string(),
                    "the files of {} are others",
                    of.key
                );
            }
            // A kill may have come between the commit and its announcement.
            let parent = of.parent.as_ref().map(ToString::to_string);
            heard.committed.insert(of.key.to_string(), parent);
        }
        heard.committed.retain(|name, _| snapshots.stat(name).is_ok());
        heard.removing = None;
        let there: BTreeSet<u32> = fs::read_dir(root.path().join("snapshots"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
            .collect();
        assert_eq!(there, with_files, "kill {kill} left directories");
        snapshots.cleaned();
        assert_eq!(fs::read_dir(root.path().join("trash")).unwrap().count(), 0, "kill {kill} left trash");
    }
    assert!(commits > 50, "{commits} commits are too few to mean anything");
}

#[test]
fn snapshots_are_shown_whoever_has_them_open() {
    let stage = Stage::new();
    let show = |json: bool| {
        let mut program = stage.program();
        program.args(if json { &["snapshots", "--json"][..] } else { &["snapshots"] });
        let output = program.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(show(false), "there are no snapshots\n");
    assert_eq!(serde_json::from_str::<Value>(&show(true)).unwrap(), json!({"snapshots": [], "images": []}));

    let (snapshots, _) = open(&stage.root());
    let labels: Labels = [("containerd.io/snapshot.ref".to_owned(), "sha256:\u{1b}[2J".to_owned())].into();
    let upper = snapshots.prepare("default/1/extract sha256:c0", "", labels).unwrap().own.unwrap().upper;
    fs::write(upper.join("file"), vec![1; 10_000]).unwrap();
    snapshots.commit("c0", "default/1/extract sha256:c0", "", Labels::new()).unwrap();
    snapshots.prepare("k8s.io/2/container", "c0", [("a".to_owned(), "b".to_owned())].into()).unwrap();
    snapshots.view("k8s.io/3/look\n", "c0", Labels::new()).unwrap();
    let specs = [layer(0), layer(1)];
    snapshots.pull("registry.example/image:1", BlobDigest(digest("manifest")), &specs).unwrap();
    let committed = snapshots.layer_local(&specs[0].id(), 4096).unwrap();

    let seen: Value = serde_json::from_str(&show(true)).unwrap();
    let told: Vec<[&Value; 4]> = seen["snapshots"]
        .as_array()
        .unwrap()
        .iter()
        .map(|of| [&of["key"], &of["kind"], &of["parent"], &of["state"]])
        .collect();
    let becomes = seen["snapshots"][0]["becomes"].as_str().unwrap();
    let name = committed[0].as_str();
    let filling = seen["snapshots"][0]["key"].as_str().unwrap();
    assert!(filling.starts_with("/fill/") && filling.ends_with(becomes), "{filling}");
    assert_eq!(
        json!(told),
        json!([
            [filling, "active", null, "filling"],
            ["c0", "committed", null, "local"],
            ["k8s.io/2/container", "active", "c0", "open"],
            ["k8s.io/3/look\n", "view", "c0", "open"],
            // It was said to be local, and the store knows better.
            [name, "committed", null, "lazy"],
        ])
    );
    let c0 = &seen["snapshots"][1];
    assert!(c0["bytes"].as_u64().unwrap() >= 10_000 && c0["inodes"] == 2, "{c0}");
    assert_eq!(seen["snapshots"][2]["labels"], json!({"a": "b"}));
    assert_eq!(seen["snapshots"][4]["layer"]["diff_id"], json!(specs[0].diff_id));
    assert_eq!(seen["images"][0]["image"], "registry.example/image:1");
    assert_eq!((&seen["images"][0]["layers"], &seen["images"][0]["committed"]), (&json!(2), &json!(1)));

    let text = show(false);
    assert!(text.starts_with("registry.example/image:1: 1 of 2 layers committed"), "{text}");
    assert!(text.contains("k8s.io/3/look\\n\n  view       open"), "{text}");
    // Nobody has them open: the same answer.
    drop(snapshots);
    assert_eq!(show(false), text);
}

/// What is committed, bottom first: follows the parents and finds that nothing else is there.
fn row(seen: &Value) -> Vec<(String, String)> {
    let all = seen["snapshots"].as_array().unwrap();
    let mut row: Vec<(String, String)> = Vec::new();
    while row.len() < all.len() {
        let below = row.last().map_or(Value::Null, |(key, _)| key.as_str().into());
        let next = all.iter().find(|of| of["parent"] == below && of["kind"] == "committed");
        let next = next.unwrap_or_else(|| panic!("nothing stands on {below}: {seen:#}"));
        assert_eq!(next["state"], "local", "{seen:#}");
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        row.push((text(&next["key"]), text(&next["layer"]["diff_id"])));
    }
    row
}

#[test]
fn a_pulled_image_is_a_row_of_committed_snapshots() {
    for is_tar in [false, true] {
        let stage = Stage::new();
        let tars = [tar(&[("a", &noise(1, 300_000))]), tar(&[("b", b"b")]), tar(&[("c", &noise(2, 200_000))])];
        let (_, converted) = stage.images(&tars);
        let image = if is_tar { reference(&stage.path("source")) } else { reference(&converted) };
        let pulled = stage.json(&["pull", &image]);
        let seen = stage.json(&["snapshots"]);
        let diff_ids: Vec<DiffId> = pulled["layers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|layer| serde_json::from_value(layer["diff_id"].clone()).unwrap())
            .collect();
        let names = ChainId::of_stack(&diff_ids);
        let wanted: Vec<(String, String)> =
            names.iter().zip(&diff_ids).map(|(name, diff_id)| (name.to_string(), diff_id.to_string())).collect();
        assert_eq!(row(&seen), wanted);
        assert_eq!((&seen["images"][0]["image"], &seen["images"][0]["committed"]), (&json!(image), &json!(3)));
        // Again is as good as once.
        stage.json(&["pull", &image]);
        let again = stage.json(&["snapshots"]);
        assert_eq!(again["snapshots"], seen["snapshots"]);

        // Without the cache they are what they were, and come back.
        fs::remove_dir_all(stage.root().join("blobs")).unwrap();
        let emptied = stage.json(&["snapshots"]);
        for (before, now) in seen["snapshots"].as_array().unwrap().iter().zip(emptied["snapshots"].as_array().unwrap())
        {
            assert_eq!(
                (&now["key"], &now["kind"], &now["parent"]),
                (&before["key"], &before["kind"], &before["parent"])
            );
            assert_eq!((&now["state"], &now["bytes"]), (&json!("lazy"), &json!(0)), "{now:#}");
        }
        stage.json(&["pull", &image]);
        assert_eq!(row(&stage.json(&["snapshots"])), wanted);
        stage.assert_clean();
    }
}

#[test]
fn pulls_beside_each_other_are_all_written_down() {
    let stage = Stage::new();
    let shared = tar(&[("shared", &noise(1, 400_000))]);
    let images: Vec<String> = (0..3)
        .map(|number| {
            let own = tar(&[("own", &noise(10 + number, 200_000))]);
            let (from, to) = (format!("source-{number}"), format!("converted-{number}"));
            reference(&stage.images_at(&from, &to, &[shared.clone(), own]).1)
        })
        .collect();
    let pulls: Vec<_> = images
        .iter()
        .map(|image| stage.program().args(["pull", image]).stdout(Stdio::null()).spawn().unwrap())
        .collect();
    for mut pull in pulls {
        assert!(pull.wait().unwrap().success());
    }
    let seen = stage.json(&["snapshots"]);
    assert_eq!(seen["images"].as_array().unwrap().len(), 3);
    let all = seen["snapshots"].as_array().unwrap();
    assert_eq!(all.len(), 4, "{seen:#}");
    assert!(all.iter().all(|of| of["kind"] == "committed" && of["state"] == "local"), "{seen:#}");
}

#[test]
fn a_pull_that_is_killed_is_taken_up_by_the_next() {
    let stage = Stage::new();
    let layers = [tar(&[("a", b"a")]), tar(&[("b", &noise(1, 6 << 20))]), tar(&[("c", b"c")])];
    let (_, converted) = stage.images(&layers);
    let slow = stage.serve(&converted, &["--bandwidth", "2Mbit"]);
    let mut pull = stage.program().args(["pull", &slow.image()]).stdout(Stdio::null()).spawn().unwrap();
    let states = || -> Vec<String> {
        let seen = stage.json(&["snapshots"]);
        let all = seen["snapshots"].as_array().unwrap();
        all.iter().map(|of| of["state"].as_str().unwrap().to_owned()).collect()
    };
    // The lowest is committed before the one above it is here; the highest has to wait.
    wait_until("a pull that is half done", || {
        let mut states = states();
        states.sort();
        states == ["filling", "local", "waiting"]
    });
    pull.kill().unwrap();
    pull.wait().unwrap();
    let left = stage.json(&["snapshots"]);
    let active = left["snapshots"].as_array().unwrap().iter().filter(|of| of["kind"] == "active");
    assert!(active.clone().all(|of| of["parent"].is_null() && of["becomes"].is_string()), "{left:#}");
    assert_eq!(active.count(), 2);
    drop(slow);
    stage.json(&["pull", &reference(&converted)]);
    assert_eq!(row(&stage.json(&["snapshots"])).len(), 3);
}

#[test]
fn damaged_records_are_told_as_what_they_are() {
    let stage = Stage::new();
    drop(open(&stage.root()));
    fs::write(stage.root().join("state/snapshots.redb"), b"something else").unwrap();
    let output = stage.program().args(["snapshots", "--json"]).output().unwrap();
    assert_eq!(output.status.code(), Some(6));
    let told: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(told["error"]["problem"], "corrupt");
}
