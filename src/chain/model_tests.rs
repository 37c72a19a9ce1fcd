//! Random commands over very few names, against a model that looks at everything each time.

use proptest::prelude::*;

use super::tests::{Class, at, class, fill, key, layer, manifest};
use super::*;

/// A snapshot of the model.
#[derive(Debug, Clone, PartialEq)]
struct Simple {
    key: String,
    kind: Kind,
    parent: Option<String>,
    labels: Labels,
    /// Number of the layer whose image it is.
    layer: Option<usize>,
    becomes: Option<(String, Option<String>)>,
}

/// Everything in lists; a command works on a copy that is thrown away if it is refused.
#[derive(Debug, Clone, Default)]
struct Model {
    snapshots: Vec<Simple>,
    images: Vec<(String, Vec<(usize, String)>)>,
    local: Vec<usize>,
}

/// A command over the tiny alphabet.
#[derive(Debug, Clone)]
enum Step {
    Prepare(String, Option<String>, Option<usize>),
    View(String, Option<String>),
    Commit(String, String, Option<String>),
    Become(String, usize),
    Remove(String),
    Label(String, String, String, bool),
    Pull(String, Vec<usize>),
    Forget(String),
    Local(usize),
    Lost(usize),
    Collect,
}

fn names() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => prop::sample::select(vec!["a", "b c", "c/../:"]).prop_map(str::to_owned),
        // What images call their layers, and what fills is called.
        2 => prop::sample::select(vec!["0", "1", "0-1", "1-0"]).prop_map(str::to_owned),
        1 => prop::sample::select(vec![("0", "0"), ("1", "0-1")]).prop_map(|(of, becomes)| fill(of, becomes)),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let parent = || prop::option::of(names());
    let image = || prop::sample::select(vec!["x", "y"]).prop_map(str::to_owned);
    prop_oneof![
        5 => (names(), parent(), prop::option::weighted(0.2, 0..3_usize)).prop_map(|(k, p, l)| Step::Prepare(k, p, l)),
        2 => (names(), parent()).prop_map(|(k, p)| Step::View(k, p)),
        6 => (names(), names(), parent()).prop_map(|(k, n, p)| Step::Commit(k, n, p)),
        2 => (names(), 0..3_usize).prop_map(|(name, layer)| Step::Become(name, layer)),
        3 => names().prop_map(Step::Remove),
        2 => (names(), "[lm]", "[01]?", any::<bool>()).prop_map(|(k, l, v, all)| Step::Label(k, l, v, all)),
        3 => (image(), prop::collection::vec(0..3_usize, 0..3)).prop_map(|(i, l)| Step::Pull(i, l)),
        1 => image().prop_map(Step::Forget),
        3 => (0..3_usize).prop_map(Step::Local),
        1 => (0..3_usize).prop_map(Step::Lost),
        1 => Just(Step::Collect),
    ]
}

/// The names of an image's layers: what is below, and it.
fn chain_names(layers: &[usize]) -> Vec<String> {
    let texts: Vec<String> = layers.iter().map(usize::to_string).collect();
    (1..=texts.len()).map(|n| texts[..n].join("-")).collect()
}

fn command(step: &Step) -> Option<Command> {
    let optional = |parent: &Option<String>| parent.as_deref().map(key);
    let of = |layer_number: &usize| layer(&layer_number.to_string());
    Some(match step {
        Step::Prepare(name, parent, layer) => Command::Prepare {
            key: key(name),
            parent: optional(parent),
            labels: Labels::new(),
            layer: layer.as_ref().map(|layer| (of(layer), None)),
        },
        Step::View(name, parent) => Command::View { key: key(name), parent: optional(parent), labels: Labels::new() },
        Step::Commit(from, name, parent) => Command::Commit {
            key: key(from),
            name: key(name),
            parent: optional(parent),
            labels: Labels::new(),
            usage: Some(Usage::default()),
        },
        Step::Become(name, layer) => Command::Become { key: key(name), layer: of(layer), size: Some(4096) },
        Step::Remove(name) => Command::Remove { key: key(name) },
        Step::Label(name, label, value, all) => Command::Update {
            key: key(name),
            labels: [(label.clone(), value.clone())].into(),
            fields: if *all { Vec::new() } else { vec![format!("labels.{label}")] },
        },
        Step::Pull(image, layers) => Command::Pull {
            image: image.clone(),
            manifest: manifest(),
            layers: layers
                .iter()
                .zip(chain_names(layers))
                .map(|(layer, name)| PulledLayer { id: of(layer), size: Some(4096), name: key(&name) })
                .collect(),
        },
        Step::Forget(image) => Command::Forget { image: image.clone() },
        Step::Local(layer) => Command::LayerLocal { layer: of(layer), size: 4096 },
        Step::Lost(layer) => Command::LayerLost { layer: of(layer) },
        Step::Collect => return None,
    })
}

impl Model {
    fn find(&self, name: &str) -> Option<&Simple> {
        self.snapshots.iter().find(|snapshot| snapshot.key == name)
    }

    fn knows_layer(&self, layer: usize) -> bool {
        self.snapshots.iter().any(|snapshot| snapshot.layer == Some(layer))
            || self.images.iter().any(|(_, layers)| layers.iter().any(|(of, _)| *of == layer))
    }

    fn run(&mut self, step: &Step) -> Result<(), Class> {
        let mut next = self.clone();
        next.attempt(step)?;
        *self = next;
        let known: Vec<usize> = (0..3).filter(|layer| self.knows_layer(*layer)).collect();
        self.local.retain(|layer| known.contains(layer));
        Ok(())
    }

    fn attempt(&mut self, step: &Step) -> Result<(), Class> {
        let new = |key: &str, kind, parent: &Option<String>, layer| Simple {
            key: key.to_owned(),
            kind,
            parent: parent.clone(),
            labels: Labels::new(),
            layer,
            becomes: None,
        };
        match step {
            Step::Prepare(name, parent, layer) => {
                self.may_create(name, parent)?;
                self.snapshots.push(new(name, Kind::Active, parent, *layer));
            }
            Step::View(name, parent) => {
                self.may_create(name, parent)?;
                self.snapshots.push(new(name, Kind::View, parent, None));
            }
            Step::Commit(from, name, parent) => {
                if self.find(name).is_some() {
                    return Err(Class::Exists);
                }
                let found = self.find(from).ok_or(Class::NotFound)?.clone();
                if found.kind != Kind::Active || found.becomes.is_some() {
                    return Err(Class::Precondition);
                }
                if found.parent.is_some() && parent.is_some() && found.parent != *parent {
                    return Err(Class::Argument);
                }
                let parent = found.parent.clone().or(parent.clone());
                if let Some(parent) = &parent
                    && self.find(parent).ok_or(Class::NotFound)?.kind != Kind::Committed
                {
                    return Err(Class::Precondition);
                }
                self.snapshots.retain(|snapshot| snapshot.key != *from);
                self.snapshots.push(new(name, Kind::Committed, &parent, found.layer));
                // What fills for that name has lost, and what waited for it goes on.
                self.snapshots.retain(|of| of.becomes.as_ref().is_none_or(|(becomes, _)| becomes != name));
                self.settle();
            }
            Step::Become(name, layer) => {
                let found = self.snapshots.iter_mut().find(|of| of.key == *name).ok_or(Class::NotFound)?;
                if found.kind != Kind::Active || found.becomes.is_some() {
                    return Err(Class::Precondition);
                }
                found.layer = Some(*layer);
            }
            Step::Remove(name) => {
                let found = self.find(name).ok_or(Class::NotFound)?;
                let becomes = found.becomes.as_ref().map_or(name, |(becomes, _)| becomes);
                let held = self.images.iter().any(|(_, layers)| layers.iter().any(|(_, of)| of == becomes));
                let used = self.snapshots.iter().any(|other| {
                    other.parent.as_ref() == Some(name)
                        || other.becomes.as_ref().is_some_and(|(_, below)| below.as_ref() == Some(name))
                });
                if held || used {
                    return Err(Class::Precondition);
                }
                self.snapshots.retain(|snapshot| snapshot.key != *name);
            }
            Step::Label(name, label, value, all) => {
                let found = self.snapshots.iter_mut().find(|of| of.key == *name).ok_or(Class::NotFound)?;
                if *all {
                    found.labels.clear();
                }
                found.labels.remove(label);
                if !value.is_empty() {
                    found.labels.insert(label.clone(), value.clone());
                }
            }
            Step::Pull(image, layers) => {
                let names = chain_names(layers);
                let mut parent: Option<String> = None;
                for (layer, name) in layers.iter().zip(&names) {
                    match self.find(name) {
                        Some(there) if there.kind != Kind::Committed || there.parent != parent => {
                            return Err(Class::Precondition);
                        }
                        Some(_) => {}
                        None => {
                            let same = |of: &&Simple| of.becomes.as_ref().is_some_and(|(becomes, _)| becomes == name);
                            if self.snapshots.iter().find(same).is_none() {
                                let mut filling =
                                    new(&fill(&layer.to_string(), name), Kind::Active, &None, Some(*layer));
                                if self.find(&filling.key).is_some() {
                                    return Err(Class::Exists);
                                }
                                filling.becomes = Some((name.clone(), parent.clone()));
                                self.snapshots.push(filling);
                            }
                        }
                    }
                    parent = Some(name.clone());
                }
                self.images.retain(|(of, _)| of != image);
                self.images.push((image.clone(), layers.iter().copied().zip(names).collect()));
                self.settle();
            }
            Step::Forget(image) => {
                let before = self.images.len();
                self.images.retain(|(of, _)| of != image);
                if self.images.len() == before {
                    return Err(Class::NotFound);
                }
            }
            Step::Local(layer) | Step::Lost(layer) => {
                if !self.knows_layer(*layer) {
                    return Err(Class::NotFound);
                }
                self.local.retain(|of| of != layer);
                if matches!(step, Step::Local(_)) {
                    self.local.push(*layer);
                    self.settle();
                }
            }
            Step::Collect => {}
        }
        Ok(())
    }

    fn may_create(&self, name: &str, parent: &Option<String>) -> Result<(), Class> {
        if let Some(parent) = parent
            && self.find(parent).ok_or(Class::NotFound)?.kind != Kind::Committed
        {
            return Err(Class::Argument);
        }
        if self.find(name).is_some() { Err(Class::Exists) } else { Ok(()) }
    }

    fn settle(&mut self) {
        for _ in 0..self.snapshots.len() {
            for index in 0..self.snapshots.len() {
                let snapshot = self.snapshots[index].clone();
                let Some((name, parent)) = snapshot.becomes else { continue };
                let is_local = snapshot.layer.is_some_and(|layer| self.local.contains(&layer));
                let below = parent.as_ref().is_none_or(|of| self.find(of).is_some_and(|of| of.kind == Kind::Committed));
                if is_local && below && self.find(&name).is_none() {
                    let committed = Simple { key: name, kind: Kind::Committed, parent, becomes: None, ..snapshot };
                    self.snapshots[index] = committed;
                }
            }
        }
    }

    fn sorted(&self) -> Vec<Simple> {
        let mut all = self.snapshots.clone();
        all.sort_by(|a, b| a.key.cmp(&b.key));
        all
    }
}

/// The chain as the model sees it.
fn simple(chain: &Chain) -> Vec<Simple> {
    let text = |key: &Key| key.as_str().to_owned();
    let number = |slot: LayerSlot| (0..3).find(|n: &usize| chain.layer(slot).unwrap().id == layer(&n.to_string()));
    chain
        .walk()
        .map(|snapshot| Simple {
            key: text(&snapshot.key),
            kind: snapshot.kind,
            parent: snapshot.parent.as_ref().map(text),
            labels: snapshot.labels.clone(),
            layer: match snapshot.content {
                Content::Files => None,
                Content::Layer(slot) => number(slot),
            },
            becomes: snapshot.filling.as_ref().map(|target| (text(&target.name), target.parent.as_ref().map(text))),
        })
        .collect()
}

/// What a database would hold after the writes.
#[derive(Debug, Default)]
struct Records {
    snapshots: BTreeMap<Key, Snapshot>,
    layers: BTreeMap<LayerSlot, Layer>,
    images: BTreeMap<String, Image>,
    cursors: Cursors,
}

impl Records {
    fn write(&mut self, change: &Change) {
        for write in &change.writes {
            match write.clone() {
                Write::PutSnapshot(snapshot) => drop(self.snapshots.insert(snapshot.key.clone(), snapshot)),
                Write::DropSnapshot(key) => assert!(self.snapshots.remove(&key).is_some(), "{key} was not there"),
                Write::PutLayer(layer) => drop(self.layers.insert(layer.slot, layer)),
                Write::DropLayer(slot) => assert!(self.layers.remove(&slot).is_some(), "{slot} was not there"),
                Write::PutImage(image) => drop(self.images.insert(image.name.clone(), image)),
                Write::DropImage(name) => assert!(self.images.remove(&name).is_some(), "{name} was not there"),
                Write::Cursors(cursors) => self.cursors = cursors,
            }
        }
    }

    fn restored(&self) -> Chain {
        let (snapshots, layers) = (self.snapshots.values().cloned(), self.layers.values().cloned());
        Chain::restore(snapshots, layers, self.images.values().cloned(), self.cursors).unwrap()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_commanded_the_model_agrees_and_records_are_the_state(steps in prop::collection::vec(step(), 1..60)) {
        let (mut chain, mut model, mut records) = (Chain::default(), Model::default(), Records::default());
        // Directories that are there.
        let mut files = BTreeSet::new();
        for (second, step) in steps.iter().enumerate() {
            let commands = match command(step) {
                Some(command) => vec![command],
                None => {
                    let plan = chain.garbage(&BTreeSet::new());
                    plan.snapshots.into_iter().map(|key| Command::Remove { key }).collect()
                }
            };
            for command in commands {
                let done = chain.apply(&command, at(i64::try_from(second).unwrap()));
                let step = match &command {
                    Command::Remove { key } => &Step::Remove(key.to_string()),
                    _ => step,
                };
                let agreed = model.run(step);
                match (&done, agreed) {
                    (Ok(_), Ok(())) => {}
                    (Err(error), Err(wanted)) => prop_assert_eq!(class(error), wanted, "{:?}: {}", command, error),
                    (done, wanted) => prop_assert!(false, "{:?}: {:?}, the model says {:?}", command, done, wanted),
                }
                let Ok(change) = done else { continue };
                records.write(&change);
                for effect in &change.effects {
                    match effect {
                        Effect::MakeFiles(slot) => prop_assert!(files.insert(*slot)),
                        Effect::DropFiles(slot) => prop_assert!(files.remove(slot)),
                        Effect::Committed(name) => prop_assert_eq!(chain.stat(name.as_str()).unwrap().kind, Kind::Committed),
                        Effect::ReleaseLayer(layer) => prop_assert!(chain.layer(layer.slot).is_none()),
                    }
                }
            }
            if matches!(step, Step::Collect) {
                prop_assert_eq!(chain.garbage(&BTreeSet::new()), Garbage::default());
            }
            prop_assert_eq!(simple(&chain), model.sorted());
            let with_files = chain.walk().filter(|of| of.content == Content::Files).map(|of| of.slot);
            prop_assert_eq!(with_files.collect::<BTreeSet<_>>(), files.clone());
            let known: Vec<bool> = (0..3).map(|n: usize| chain.layers().any(|of| of.id == layer(&n.to_string()))).collect();
            prop_assert_eq!(known, (0..3).map(|n| model.knows_layer(n)).collect::<Vec<_>>());
            let restored = records.restored();
            prop_assert_eq!(format!("{restored:?}"), format!("{chain:?}"));
        }
    }
}
