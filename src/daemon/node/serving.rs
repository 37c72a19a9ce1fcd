//! Layers that are served: recorded, shown, and answered in the way that containerd understands; or left to containerd.
//!
//! Guarantees: what cannot be shown is not recorded; what is there already under the same name is answered only if its files
//! are the same. Refuses to know which layers can be served.

use super::layers::{Asked, How, OWN_LABELS, Offered};
use super::{Inner, Node, mounts};
use crate::chain::{ChainError, Content, Key, Kind, Labels, Snapshot};
use crate::daemon::recorder::spec;
use crate::fetch::LayerImage;
use crate::grpc::{Prepared, SnapshotterError};
use crate::snapshots::SnapshotsError;

/// With how many images of one layer it is noted that it is theirs: copies in several registries have a handful.
const MOST_NOTED: usize = 8;

impl Node {
    /// What `offered` becomes; none if somebody else must bring the layer.
    pub(super) async fn serve(&self, asked: &Asked, offered: Offered) -> Result<Option<Prepared>, SnapshotterError> {
        let (key, labels, parent) = (asked.key.clone(), asked.labels.clone(), asked.parent.clone());
        self.blocking(move |inner| inner.serve(&key, parent.as_ref(), labels, offered)).await
    }
}

impl Inner {
    fn serve(
        &self,
        key: &str,
        parent: Option<&Key>,
        mut labels: Labels,
        offered: Offered,
    ) -> Result<Option<Prepared>, SnapshotterError> {
        let Offered { image, name, how, labels: noted } = offered;
        labels.extend(noted);
        if how == How::Commit
            && let Ok(there) = self.snapshots.stat(name.as_str())
        {
            return self.serve_known(&there, parent, &labels, &image);
        }
        let parent = parent.map_or("", Key::as_str);
        let stack = self.snapshots.prepare_layer(key, parent, labels.clone(), &spec(&image))?;
        let Content::Layer(slot) = stack.snapshot.content else { return Err(SnapshotterError::Broken) };
        let shown = self.show(&image, slot);
        let served = match (shown, how) {
            (Err(error), _) => Err(SnapshotterError::Layers { key: key.to_owned(), source: error.into() }),
            (Ok(_), How::Staged) => self.mounts(&stack, true).map(|mounts| Some(Prepared::Mounts(mounts))),
            (Ok(_), How::Commit) => match self.snapshots.commit(name.as_str(), key, parent, labels.clone()) {
                Ok(()) => Ok(Some(Prepared::There(name.to_string()))),
                Err(error) => Err(error.into()),
            },
        };
        if served.is_ok() {
            return served;
        }
        self.snapshots.remove(key)?;
        self.untidy.notify_one();
        match served {
            // Another namespace was faster.
            Err(SnapshotterError::Snapshots(error))
                if matches!(error.refusal(), Some(ChainError::AlreadyExists { .. })) =>
            {
                let there = self.snapshots.stat(name.as_str())?;
                let parent = Key::optional(parent).map_err(SnapshotsError::from)?;
                self.serve_known(&there, parent.as_ref(), &labels, &image)
            }
            other => other,
        }
    }

    /// The layer is there already, by another namespace or by a pull of this program.
    fn serve_known(
        &self,
        there: &Snapshot,
        parent: Option<&Key>,
        labels: &Labels,
        image: &LayerImage,
    ) -> Result<Option<Prepared>, SnapshotterError> {
        if !self.is_as_good(there, image) {
            tracing::warn!(name = %there.key, "a layer is known from another blob and was not verified: containerd brings it");
            return Ok(None);
        }
        if there.kind != Kind::Committed || there.parent.as_ref() != parent {
            let found = there.parent.as_ref().map(Key::as_str);
            tracing::warn!(name = %there.key, found, "a layer is known with another parent: containerd brings it again");
            return Ok(None);
        }
        // containerd looks for what it said: the label of the layer, which a pull of ours did not have.
        let new: Vec<String> = labels
            .iter()
            .filter(|(name, value)| there.labels.get(*name) != Some(value))
            .map(|(name, _)| format!("labels.{name}"))
            .collect();
        if !mounts::is_extraction(&there.labels) && !new.is_empty() {
            self.snapshots.update(there.key.as_str(), labels.clone(), new)?;
        } else if let Some((name, value)) = one_more(&there.labels, labels)
            && self.is_layer(there, image)
        {
            let fields = vec![format!("labels.{name}")];
            self.snapshots.update(there.key.as_str(), Labels::from([(name, value)]), fields)?;
        }
        Ok(Some(Prepared::There(there.key.to_string())))
    }

    /// True if `there` is made of this very layer.
    fn is_layer(&self, there: &Snapshot, image: &LayerImage) -> bool {
        let Content::Layer(slot) = there.content else { return false };
        self.snapshots.all().layer(slot).is_some_and(|layer| layer.id == spec(image).id())
    }

    /// True if the files of `there` are those of `image`. What a ChainID stands for is the word of whoever published an
    /// image until its layers were hashed as a whole; one publisher's does not hold for another's image.
    fn is_as_good(&self, there: &Snapshot, image: &LayerImage) -> bool {
        let Content::Layer(slot) = there.content else { return true };
        let (wanted, all) = (spec(image).id(), self.snapshots.all());
        all.layer(slot)
            .is_some_and(|layer| layer.id == wanted || (layer.local.is_some() && layer.id.diff_id == wanted.diff_id))
    }
}

/// What is noted of this program's own with a layer that is served for one more image, under a name of its own: it may have to be
/// found again by any of them. None if it is noted already, or there is enough.
fn one_more(noted: &Labels, fresh: &Labels) -> Option<(String, String)> {
    let (name, value) = fresh.iter().find(|(name, _)| name.starts_with(OWN_LABELS))?;
    let names = std::iter::once(name.clone()).chain((1..MOST_NOTED).map(|number| format!("{name}.{number}")));
    for name in names {
        match noted.get(&name) {
            None => return Some((name, value.clone())),
            Some(known) if known == value => return None,
            Some(_) => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_image_of_a_layer_is_noted_once() {
        let labels = |of: &[(&str, &str)]| -> Labels {
            of.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let fresh = labels(&[("containerd.io/x", "y"), ("headstart.image", "b")]);
        let named = |name: &str| Some((name.to_owned(), "b".to_owned()));
        for (noted, expected) in [
            (labels(&[]), named("headstart.image")),
            (labels(&[("headstart.image", "a")]), named("headstart.image.1")),
            (labels(&[("headstart.image", "a"), ("headstart.image.1", "c")]), named("headstart.image.2")),
            (labels(&[("headstart.image", "b")]), None),
            (labels(&[("headstart.image", "a"), ("headstart.image.1", "b")]), None),
        ] {
            assert_eq!(one_more(&noted, &fresh), expected, "{noted:?}");
        }
        assert_eq!(one_more(&labels(&[]), &labels(&[("containerd.io/x", "y")])), None);
        let mut noted = labels(&[("headstart.image", "a")]);
        while let Some((name, _)) = one_more(&noted, &fresh) {
            assert!(noted.insert(name, format!("image {}", noted.len())).is_none());
        }
        assert_eq!(noted.len(), MOST_NOTED);
    }
}
