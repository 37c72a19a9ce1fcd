//! What may go: a plan, no deed.

use std::collections::BTreeSet;

use super::{Chain, Key, Owner, Snapshot};

/// Snapshots that nobody needs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Garbage {
    /// Their keys, each before its parent: removed in this order, none is refused, unless somebody has begun to need it
    /// meanwhile.
    pub snapshots: Vec<Key>,
}

impl Chain {
    /// Snapshots that were brought for images, that no image names any more, on which nothing else stands, and that are
    /// not `pinned`. What a client made is the client's to remove.
    pub fn garbage(&self, pinned: &BTreeSet<Key>) -> Garbage {
        let named: BTreeSet<&Key> =
            self.images.values().flat_map(|image| image.layers.iter().map(|layer| &layer.name)).collect();
        let becomes =
            |snapshot: &Snapshot| snapshot.filling.as_ref().map_or(&snapshot.key, |target| &target.name).clone();
        let needed_itself = |snapshot: &Snapshot| {
            snapshot.owner == Owner::Client || named.contains(&becomes(snapshot)) || pinned.contains(&snapshot.key)
        };
        let mut needed: BTreeSet<&Key> = BTreeSet::new();
        for snapshot in self.snapshots.values().filter(|snapshot| needed_itself(snapshot)) {
            needed.insert(&snapshot.key);
            let below =
                snapshot.parent.as_ref().or(snapshot.filling.as_ref().and_then(|target| target.parent.as_ref()));
            let mut below = below.and_then(|key| self.snapshots.get(key));
            while let Some(parent) = below {
                if !needed.insert(&parent.key) {
                    break;
                }
                below = parent.parent.as_ref().and_then(|key| self.snapshots.get(key));
            }
        }
        let mut garbage: Vec<&Snapshot> =
            self.snapshots.values().filter(|snapshot| !needed.contains(&snapshot.key)).collect();
        // What stands on more goes first.
        garbage.sort_by_key(|snapshot| std::cmp::Reverse(self.height(snapshot)));
        Garbage { snapshots: garbage.into_iter().map(|snapshot| snapshot.key.clone()).collect() }
    }

    /// How many are below, those included that will be.
    fn height(&self, snapshot: &Snapshot) -> usize {
        let mut height = 0;
        let mut snapshot = snapshot;
        while height <= self.snapshots.len() {
            let target = snapshot.filling.as_ref();
            let Some(below) = snapshot.parent.as_ref().or(target.and_then(|target| target.parent.as_ref())) else {
                break;
            };
            let Some(parent) = self.snapshots.get(below).or_else(|| self.filling_for(below)) else { break };
            height += 1;
            snapshot = parent;
        }
        height
    }
}
