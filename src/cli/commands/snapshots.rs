//! `headstart snapshots`.

use std::process::ExitCode;

use indicatif::HumanBytes;
use serde::Serialize;

use super::Context;
use crate::chain::{Chain, Content, Image, Key, Kind, Labels, Layer, Snapshot, State};
use crate::cli::output;
use crate::model::{BlobDigest, DiffId};
use crate::snapshots::{is_local, usage_of};
use crate::store::records;

pub(crate) fn snapshots(context: &Context) -> anyhow::Result<ExitCode> {
    // A daemon that has the records open lets others look; nothing has to be asked of it.
    let chain = records::look(&context.config.root)?;
    let seen = Seen {
        snapshots: chain.walk().map(|snapshot| SeenSnapshot::of(context, &chain, snapshot)).collect(),
        images: chain.images().map(|image| SeenImage::of(&chain, image)).collect(),
    };
    if context.json {
        output::json(&seen)?;
    } else {
        output::line(&seen.table())?;
    }
    Ok(ExitCode::SUCCESS)
}

/// What `snapshots --json` prints.
#[derive(Debug, Serialize)]
struct Seen {
    snapshots: Vec<SeenSnapshot>,
    images: Vec<SeenImage>,
}

#[derive(Debug, Serialize)]
struct SeenSnapshot {
    key: Key,
    kind: Kind,
    parent: Option<Key>,
    state: State,
    /// Allocated on disk, without parents.
    bytes: u64,
    inodes: u64,
    created: String,
    updated: String,
    labels: Labels,
    slot: u32,
    /// The name that it is committed under when its layer is local.
    becomes: Option<Key>,
    layer: Option<SeenLayer>,
}

#[derive(Debug, Serialize)]
struct SeenLayer {
    slot: u32,
    diff_id: DiffId,
    blob: BlobDigest,
    anchor: String,
    /// Size of the image, if it is known.
    bytes: Option<u64>,
    /// Since when all of it is here and verified.
    local: Option<String>,
}

#[derive(Debug, Serialize)]
struct SeenImage {
    image: String,
    manifest: BlobDigest,
    pulled: String,
    layers: usize,
    committed: usize,
}

impl SeenSnapshot {
    fn of(context: &Context, chain: &Chain, snapshot: &Snapshot) -> Self {
        let root = &context.config.root;
        let layer = match snapshot.content {
            Content::Layer(slot) => chain.layer(slot).cloned(),
            Content::Files => None,
        };
        // The cache may have been emptied since it was written down.
        let layer = layer.map(|layer| Layer { local: layer.local.filter(|_| is_local(root, &layer)), ..layer });
        let layer = layer.as_ref();
        let usage = usage_of(root, snapshot, layer);
        Self {
            key: snapshot.key.clone(),
            kind: snapshot.kind,
            parent: snapshot.parent.clone(),
            state: snapshot.state(layer),
            bytes: usage.bytes,
            inodes: usage.inodes,
            created: snapshot.created.to_string(),
            updated: snapshot.updated.to_string(),
            labels: snapshot.labels.clone(),
            slot: snapshot.slot.0,
            becomes: snapshot.filling.as_ref().map(|target| target.name.clone()),
            layer: layer.map(SeenLayer::of),
        }
    }
}

impl SeenLayer {
    fn of(layer: &Layer) -> Self {
        Self {
            slot: layer.slot.0,
            diff_id: layer.id.diff_id,
            blob: layer.id.blob,
            anchor: layer.id.anchor.clone(),
            bytes: layer.size,
            local: layer.local.map(|since| since.to_string()),
        }
    }
}

impl SeenImage {
    fn of(chain: &Chain, image: &Image) -> Self {
        let committed = |name: &Key| chain.stat(name.as_str()).is_ok_and(|of| of.kind == Kind::Committed);
        Self {
            image: image.name.clone(),
            manifest: image.manifest,
            pulled: image.pulled.to_string(),
            layers: image.layers.len(),
            committed: image.layers.iter().filter(|layer| committed(&layer.name)).count(),
        }
    }
}

impl Seen {
    fn table(&self) -> String {
        let mut lines = Vec::new();
        for SeenImage { image, pulled, layers, committed, .. } in &self.images {
            lines.push(format!("{}: {committed} of {layers} layers committed, pulled {pulled}", printable(image)));
        }
        if self.snapshots.is_empty() {
            lines.push("there are no snapshots".to_owned());
        }
        for of in &self.snapshots {
            lines.push(printable(of.becomes.as_ref().unwrap_or(&of.key).as_str()));
            lines.push(format!(
                "  {:9}  {:7}  {:>10}  {}",
                of.kind.name(),
                state_name(of.state),
                HumanBytes(of.bytes).to_string(),
                of.created
            ));
            if let Some(parent) = &of.parent {
                lines.push(format!("  on {}", printable(parent.as_str())));
            }
            for (name, value) in &of.labels {
                lines.push(format!("  {}={}", printable(name), printable(value)));
            }
        }
        lines.join("\n")
    }
}

const fn state_name(state: State) -> &'static str {
    match state {
        State::Open => "open",
        State::Filling => "filling",
        State::Waiting => "waiting",
        State::Lazy => "lazy",
        State::Local => "local",
    }
}

/// Keys and labels are other people's words: nothing of them may act on a terminal.
fn printable(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn foreign_words_do_not_act_on_a_terminal() {
        assert_eq!(printable("k8s.io/1/ä b"), "k8s.io/1/ä b");
        assert_eq!(printable("a\u{1b}[2Jb\nc"), "a\\u{1b}[2Jb\\nc");
    }
}
